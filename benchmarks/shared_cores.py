"""Time training steps and translations beside busy neighbours, with threads that sleep while they wait, and without.

python benchmarks/shared_cores.py
python benchmarks/shared_cores.py --neighbours 0 2 --turns 20

A neighbour is a process that keeps one core busy. Two processes with torch's default number of threads are timed in turns:
one as our commands start (OMP_WAIT_POLICY=PASSIVE, toolkit/startup.py), one with OpenMP's default, whose threads spin for a
while. A step is one of the demo's recipe, a translation one of a 64 px image by the shipped student. Prints medians.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

POLICIES = {"default": {}, "ours": {"OMP_WAIT_POLICY": "PASSIVE"}}  # environment of each process
TASKS = ("step", "image")


def answer_requests() -> None:
    """Time a step or an image for each line on stdin; prints seconds."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import build_model, recipe, train_config

    from toolkit.weights import load_generator

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the times alone
        model = build_model(train_config([*recipe("day2night"), "--device", "cpu"]))
    reals = [torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2)]
    student, _ = load_generator(Path(__file__).resolve().parents[1] / "examples" / "day2night.safetensors")

    @torch.no_grad()
    def translate() -> None:
        student(reals[0])

    tasks = dict(zip(TASKS, (lambda: model.step(*reals), translate), strict=True))
    for name in sys.stdin:
        start = time.perf_counter()
        tasks[name.strip()]()
        print(time.perf_counter() - start, flush=True)


@contextlib.contextmanager
def running(commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen]]:
    """Run programs with pipes to them until the block ends."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command, environment in zip(commands, environments, strict=True):
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))  # closes the pipes and waits
            stack.callback(process.kill)
        yield processes


def seconds(process: subprocess.Popen, task: str) -> float:
    """Ask a process for the time of a task."""
    assert process.stdin
    assert process.stdout
    print(task, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def measure(neighbours: list[int], turns: int) -> list[dict]:
    """Return medians in ms by number of neighbours, task and policy."""
    shared = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    timed = [[sys.executable, __file__, "--answer"]] * len(POLICIES)
    rows = []
    with running(timed, [shared | own for own in POLICIES.values()]) as processes:
        for count in neighbours:
            busy = [[sys.executable, "-c", "while True: pass"]] * count
            with running(busy, [shared] * count):
                for task in TASKS:
                    times = {policy: [] for policy in POLICIES}
                    for turn in range(turns + 2):
                        for policy, process in zip(POLICIES, processes, strict=True):
                            found = seconds(process, task)
                            if turn > 1:  # the first include set-up
                                times[policy].append(1000 * found)
                    medians = {policy: statistics.median(values) for policy, values in times.items()}
                    rows.append({"busy neighbours": count, "task": task} | medians)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 3], help="numbers of busy processes")
    parser.add_argument("--turns", type=int, default=20, help="timed runs of each")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)  # as a process that is timed
    args = parser.parse_args(argv)
    if args.answer:
        answer_requests()
        return
    print(f"| busy neighbours | task | {', ms | '.join(POLICIES)}, ms | ratio |")
    print("|---|---|---|---|---|")
    for row in measure(args.neighbours, args.turns):
        ratio = row["default"] / row["ours"]
        print(f"| {row['busy neighbours']} | {row['task']} | {row['default']:.1f} | {row['ours']:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
