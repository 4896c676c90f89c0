"""What faults do to a run: each figure of docs/reliability.md comes from one of these commands.

python benchmarks/faults.py kills --count 50
python benchmarks/faults.py signals
python benchmarks/faults.py disk
python benchmarks/faults.py pictures
python benchmarks/faults.py fuzz --pictures 10000 --files 2000
python benchmarks/faults.py watchdog
python benchmarks/faults.py plain

Small networks on day2night at 32 px, on the CPU; everything happens in --folder, which may be removed afterwards.
"""

import argparse
import contextlib
import copy
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

import datasets  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
import weights  # noqa: E402

SMALL = [
    *("--dataset_name", "day2night", "--img_height", "32", "--img_width", "32", "--num_residual", "1", "--ngf", "8"),
    *("--ndf", "8", "--n_layers_D", "1", "--batch_size", "1", "--precision", "fp32", "--device", "cpu"),
]
HANG = 10  # s; a file that takes longer counts as a hang


def spawn(argv, log):
    """Start train.py in a fork of this process, which has imported everything: restarts cost no time. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with Path(log).open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        train.main([str(word) for word in argv])
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 (shown, and counted as what it is)
        traceback.print_exc()
        code = 70
    finally:
        os._exit(code)


def wait(pid, seconds):
    """The exit code, or None when it still runs after so many seconds; a killed process has minus its signal."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def finish(argv, log="log"):
    """Run to the end; the exit code must be 0."""
    code = wait(spawn(argv, log), 3600)
    if code:
        raise SystemExit(f"exit code {code}: {Path(log).read_text()[-2000:]}")


def equal(a, b):
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def compare(one, other):
    """Which parts of two finished runs are equal bit for bit."""
    a, b = (utils.load_state(Path("saved_models") / name / "latest.pt") for name in (one, other))
    found = {key: equal(a[key], b[key]) for key in ("nets", "optims", "buffers", "rng", "loader", "step")}
    csv = [(Path("saved_models") / name / "losses.csv").read_bytes() for name in (one, other)]
    grids = sorted(p.name for p in (Path("generated_images") / one).glob("epoch_*.png"))
    same = [
        len({(Path("generated_images") / name / grid).read_bytes() for name in (one, other)}) == 1 for grid in grids
    ]
    return found | {"losses.csv": csv[0] == csv[1], "grids": all(same)}


# ---------------------------------------------------------------------------------------------


def live(pid, folder, rng, longest):
    """Let a process live until a random moment; half of them until a save is under way. The exit code, if it ended."""
    begun, code = time.time(), None
    in_save = rng.random() < 0.5
    while code is None and not any(path.stat().st_mtime > begun for path in folder.glob("run.json")):
        code = wait(pid, 0.005)  # it reads its state and the pictures
    if code is None and not in_save:
        return wait(pid, rng.uniform(0, longest))
    while code is None and not any(folder.glob(".*.tmp")):
        code = wait(pid, 0.001)
    return wait(pid, rng.uniform(0, 0.02)) if code is None else code


def kills(args):
    """SIGKILL at random moments, restart, until the run is finished; then another run."""
    rng, killed, saving, runs, unreadable, fallbacks = random.Random(0), 0, 0, 0, 0, 0
    while killed < args.count:
        flags = [*SMALL, "--num_epochs", "4", "--steps_per_epoch", "30", "--checkpoint_interval", "2", "--seed", runs]
        finish([*flags, "--run_name", f"whole{runs}", "--save_minutes", "0"])
        name, code = f"killed{runs}", None
        folder = Path("saved_models") / name
        while code is None:
            started = any(folder.glob("latest.pt")) or any(folder.glob("previous.pt"))
            resume = ["--start_from", "latest", "--dataset_name", "day2night"] if started else [*flags, "--overwrite"]
            last = killed >= args.count
            often = ["--save_minutes", "0" if last else "1e-6"]  # after each step: many kills shall hit a save
            pid = spawn([*resume, "--run_name", name, *often, "--device", "cpu"], f"{name}.log")
            code = wait(pid, 3600) if last else live(pid, folder, rng, args.longest)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                killed += wait(pid, 60) == -signal.SIGKILL
                saving += any(folder.glob(".*.tmp"))
                for path in folder.glob("*.pt"):
                    try:
                        utils.load_state(path)
                    except utils.InputError as error:
                        unreadable += 1
                        print(error)
        fallbacks += Path(f"{name}.log").read_text().count("using saved_models")
        result = compare(f"whole{runs}", name)
        print(f"run {runs}: exit code {code} after {killed} kills in all; equal: {result}", flush=True)
        if code or not all(result.values()):
            raise SystemExit(Path(f"{name}.log").read_text()[-3000:])
        runs += 1
    print(f"{killed} kills, {saving} of them while a file was being written; {unreadable} unreadable states;")
    print(f"previous.pt was needed {fallbacks} times; {runs} runs, all ended bit for bit as uninterrupted ones")


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def signals(args):
    """Ctrl-C, SIGTERM and the loss of the terminal in the middle of an epoch, with 2 workers."""
    flags = [*SMALL, "--num_epochs", "2", "--steps_per_epoch", "60", "--num_workers", "2"]
    finish([*flags, "--run_name", "whole"])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        name = signum.name
        with Path(f"{name}.log").open("w") as log:
            words = [sys.executable, ROOT / "train.py", *map(str, flags), "--run_name", name]
            process = subprocess.Popen(words, stdout=log, stderr=log)
            rows = Path("saved_models") / name / "losses.csv"
            while not rows.exists() or len(rows.read_text().splitlines()) < 2:  # after step 20 of 60
                time.sleep(0.05)
            workers = children(process.pid)
            start = time.monotonic()
            process.send_signal(signum)
            sent = time.time()
            code, seconds = process.wait(60), time.monotonic() - start
            saved = (Path("saved_models") / name / "latest.pt").stat().st_mtime - sent
        time.sleep(0.2)
        orphans = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        step = utils.load_state(Path("saved_models") / name / "latest.pt")["step"]
        finish(["--dataset_name", "day2night", "--run_name", name, "--start_from", "latest", "--device", "cpu"])
        result = compare("whole", name)
        print(
            f"{name}: {len(workers)} workers, saved at step {step} after {saved:.1f} s, ended after {seconds:.1f} s, exit code {code},"
        )
        print(f"  {len(orphans)} orphans; after resuming equal to the uninterrupted run: {result}", flush=True)


@contextlib.contextmanager
def small_disk(folder):
    """Mount 20 MB there where that is allowed; else this folder is only used as it is, and files cannot grow."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        raise SystemExit("a tmpfs cannot be mounted here; the same by injected errors: pytest -k full_disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk(args):
    """A disk of 20 MB that fills up during the run, and is freed again, or is not."""
    flags = [*SMALL, "--ngf", "16", "--num_epochs", "6", "--steps_per_epoch", "40", "--save_minutes", "0.02"]
    finish([*flags, "--run_name", "whole"])
    for freed in (True, False):
        with small_disk(Path("disk")):
            (Path("disk") / "datasets").symlink_to(Path("datasets").resolve())
            with contextlib.chdir("disk"):
                pid, ballast, latest = spawn([*flags, "--run_name", "run"], "../disk.log"), Path("ballast"), None
                while not (Path("saved_models/run") / "latest.pt").exists():
                    time.sleep(0.02)
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while file.write(bytes(2**14)):
                        pass
                log = Path("../disk.log")
                while "warning: " not in log.read_text():
                    time.sleep(0.02)
                latest = utils.load_state(Path("saved_models/run/latest.pt"))["step"]
                if freed:
                    ballast.unlink()
                code = wait(pid, 600)
                text = log.read_text().replace("\r", "\n").splitlines()
                lines = [line for line in text if "warning: " in line or "error: " in line]
                state = utils.load_state(Path("saved_models/run/latest.pt"))
                left = sorted(p.name for p in Path("saved_models/run").iterdir() if p.name.endswith(".tmp"))
                print(
                    f"{'freed' if freed else 'full to the end'}: exit code {code}, {len(lines)} lines, such as: {lines[0]}"
                )
                print(f"  state when it was full: step {latest}; at the end: step {state['step']}; half files: {left}")
                if freed:
                    whole = utils.load_state(Path("../saved_models/whole/latest.pt"))
                    print(f"  weights equal to the uninterrupted run: {equal(whole['nets'], state['nets'])}")
                else:
                    print(f"  last line: {lines[-1]}")
                    for path in Path("saved_models/run").glob("*.safetensors"):
                        weights.load_generator(path)
                    ballast.unlink()
                    finish(
                        ["--dataset_name", "day2night", "--run_name", "run", "--start_from", "latest"], "../disk.log"
                    )
                    state, whole = (
                        utils.load_state(Path(f"{p}/latest.pt")) for p in ("saved_models/run", "../saved_models/whole")
                    )
                    print(
                        f"  after freeing and resuming, weights equal: {equal(whole['nets'], state['nets'])}",
                        flush=True,
                    )
                log.unlink()


def pictures(args):
    """Sets of 200 pictures a domain: 2 % bad train through, 6 % unreadable headers do not start."""
    for share in (2, 6):
        name = f"bad{share}"
        shutil.copytree("datasets/day2night", f"datasets/{name}")
        for domain in "AB":
            paths = datasets.list_pictures(Path(f"datasets/{name}/train{domain}"))
            for i, path in enumerate(paths[: share * len(paths) // 100]):
                data = path.read_bytes()
                torn = [data[: len(data) // 2], b"", b"GIF89a", data[:-200]] if share == 2 else [data[:10]]
                path.write_bytes(torn[i % len(torn)])
        log = Path(f"{name}.log")
        pid = spawn([*SMALL, "--dataset_name", name, "--num_epochs", "2", "--save_minutes", "0"], log)
        code = wait(pid, 3600)
        lines = [
            x for x in log.read_text().replace("\r", "\n").splitlines() if "skipped, unreadable" in x or "error: " in x
        ]
        named = {line.split(": ")[1].split(" (")[0] for line in lines if "skipped" in line}
        begun = Path(f"saved_models/{name}").exists()
        skipped = sum("skipped" in line for line in lines)
        print(
            f"{share} %: exit code {code}; {skipped} lines name {len(named)} files; a run was begun: {begun}; {lines[-1]}"
        )


def damage(data, others, rng):
    """Flip bits, cut, insert, or splice a piece of another file into `data`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        kind, i = rng.randrange(5), rng.randrange(len(data) + 1)
        if kind == 0 and data:
            data[i % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i:]
        elif kind == 2:
            data[i:i] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[i : i + rng.randrange(200)] = other[start : start + rng.randrange(200)]
        elif data:
            data[i % len(data)] = rng.choice((0, 255, 127, 128))
    return bytes(data)


class Evil:
    """A pickle that would write a file."""

    def __init__(self, word):
        self.word = word

    def __reduce__(self):
        return [(os.system, (f"touch {self.word}",)), (open, (self.word, "w")), (exec, (f"open({self.word!r}, 'w')",))][
            len(self.word) % 3
        ]


def sow(state, rng):
    """Replace a random value deep in a copy of a state by something else."""
    state = copy.deepcopy(state)
    place, key = state, rng.choice(list(state))
    while isinstance(place[key], dict | list) and len(place[key]) and rng.random() < 0.9:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    value, seeds = place[key], [None, -1, 10**30, 2**70, "x", "", [], {}, (), float("nan"), True, [[]], {"x": 1}, b"x"]
    if isinstance(value, torch.Tensor):
        seeds += [
            value.flatten()[:0],
            value.double(),
            value.long(),
            value.bool(),
            torch.full_like(value.float(), float("nan")),
        ]
        seeds += [
            value.to(torch.complex64),
            value.half(),
            torch.zeros(()),
            value.float().to_sparse(),
            value.unsqueeze(0),
        ]
    if rng.random() < 0.2 and isinstance(place, dict):
        del place[key]
    elif rng.random() < 0.2 and isinstance(place, dict):
        place[rng.choice(("x" * 300, "a\nb", 7, None))] = rng.choice(seeds)
    else:
        place[key] = rng.choice(seeds)
    return state


def tally(what, count, attempt, refusal):
    """Call attempt(i) `count` times; anything but a result or a refusal counts as a traceback. Returns the number of those."""
    read, refused, failed, slowest = 0, 0, 0, 0.0

    def too_long(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    for i in range(count):
        signal.alarm(HANG)
        start = time.monotonic()
        try:
            attempt(i)
            read += 1
        except refusal:
            refused += 1
        except Exception as error:  # noqa: BLE001 (what is counted)
            failed += 1
            print(f"{what} {i}: {type(error).__name__}: {error}", flush=True)
            if failed < 4:
                traceback.print_exc()
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
    print(
        f"{count} {what}: {read} read, {refused} refused in one line, {failed} tracebacks or hangs; slowest {slowest:.1f} s"
    )
    return failed


def fuzz(args):
    """Damaged pictures; damaged, edited and malicious checkpoints and weights."""
    picture, samples = datasets.draw_scene(0, "day", 48), []
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
            with contextlib.suppress(OSError):
                buffer = io.BytesIO()
                picture.convert(mode).save(buffer, kind)
                samples.append(buffer.getvalue())
    for kind, options in (("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {"progressive": True}), ("PNG", {"bits": 4})):
        buffer = io.BytesIO()
        picture.convert("P" if kind == "PNG" else "RGB").save(buffer, kind, **options)
        samples.append(buffer.getvalue())
    path = Path("fuzzed.png")

    def one_picture(i):
        rng = random.Random(f"picture-{i}")
        path.write_bytes(damage(rng.choice(samples), samples, rng))
        datasets.load_picture(path, (16, 16), rng.choice((1, 3)))

    failed = tally("fuzzed pictures", args.pictures, one_picture, datasets.UnreadablePicture)

    finish([*SMALL, "--num_epochs", "1", "--steps_per_epoch", "3", "--buffer_size", "2", "--run_name", "fuzz"])
    folder, words = (
        Path("saved_models/fuzz"),
        ["--dataset_name", "day2night", "--run_name", "fuzz", "--start_from", "latest"],
    )
    state = utils.load_state(folder / "latest.pt")
    foreign = weights.to_junyanz(weights.load_generator(folder / "G_AB.safetensors")[0])
    torch.save(foreign, "foreign.pth")
    torch.save(foreign, "old.pth", _use_new_zipfile_serialization=False)
    files = [folder / "latest.pt", folder / "G_AB.safetensors", Path("foreign.pth"), Path("old.pth")]
    contents = [file.read_bytes() for file in files]
    given = train.parse_args(words)
    fresh = train.settle(train.parse_args(SMALL))
    run = train.make_run(fresh, train.make_nets(fresh, {}), Path("datasets/day2night"), torch.device("cpu"))

    def read_whole(file):
        """As --start_from, --teacher, --run_name and --weights would read it."""
        found = utils.load_state(file)
        train.settle(train.resume_args(train.make_parser(), given, found.get("args"), file))
        weights.networks_of(found, file)
        train.load_run(run, found, file)

    def one_file(i):
        rng = random.Random(f"file-{i}")
        kind = rng.randrange(8)
        if kind < 4:
            file = Path(f"fuzzed{files[kind].suffix}")
            file.write_bytes(damage(contents[kind], contents, rng))
        elif kind < 6:
            file = Path("fuzzed.pt")
            torch.save(sow(state, rng), file)
        elif kind == 6:
            file = Path("fuzzed.pth")
            torch.save(sow(foreign, rng), file)
        else:
            file, evil = (
                Path(rng.choice(("fuzzed.pt", "fuzzed.pth", "fuzzed.safetensors"))),
                Evil("executed" + "!" * rng.randrange(3)),
            )
            if rng.random() < 0.5:
                file.write_bytes(pickle.dumps({"format": 1, "nets": evil}, protocol=rng.choice((2, 4, 5))))
            else:
                torch.save({**state, rng.choice(list(state)): evil}, file)
        read_whole(file) if kind in (0, 4, 5) or (kind == 7 and rng.random() < 0.5) else weights.load_generator(file)

    with contextlib.redirect_stdout(io.StringIO()) as said:
        before = {p for p in Path().rglob("*") if not p.name.startswith("fuzzed")}
        count = tally("fuzzed checkpoints and weights", args.files, one_file, utils.InputError)
        after = {p for p in Path().rglob("*") if not p.name.startswith("fuzzed")}
    print("\n".join(line for line in said.getvalue().splitlines() if "fuzzed checkpoints" in line))
    print(f"files that appeared: {sorted(map(str, after - before))}")
    raise SystemExit(bool(failed + count + len(after - before)))


def watchdog(args):
    """Learning rate 1, a generator frozen to a constant, and with --demo the whole demo run."""
    if args.demo:
        line = next(x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("DEMO := "))
        shutil.rmtree("datasets")
        datasets.draw_dataset(Path("datasets"))
        finish(line.removeprefix("DEMO := ").split(), "demo.log")
        print(f"demo: {Path('demo.log').read_text().count('warning: ')} warnings in 12 epochs")
        return
    plain, flags = train.make_nets, [*SMALL, "--num_epochs", "3", "--steps_per_epoch", "30"]

    def constant(*given):
        nets = plain(*given)
        torch.nn.init.zeros_(nets["G_AB"].head[1].weight)
        return nets

    for name, more in (("healthy", []), ("lr1", ["--lr", "1.0"]), ("constant", ["--freeze", "head"])):
        train.make_nets = constant if name == "constant" else plain
        code = wait(spawn([*flags, *more, "--run_name", name], f"{name}.log"), 3600)
        lines = Path(f"{name}.log").read_text().replace("\r", "\n").splitlines()
        lines = [line.strip() for line in lines if "warning: " in line or "error: " in line]
        print(f"{name}: exit code {code}, {len(lines)} lines in 3 epochs{': ' + lines[0] if lines else ''}", flush=True)


def plain(args):
    """Pull the plug after half of the steps: exact resume beside a script that had saved the weights only.

    Exact resume is shown by the uninterrupted run, to which it is equal bit for bit (see kills and signals).
    """
    train.LOG_EVERY = 10
    flags = [*SMALL, "--steps_per_epoch", "200", "--num_epochs", "4"]
    finish([*flags, "--checkpoint_interval", "2", "--run_name", "whole"])
    half = utils.load_state(Path("saved_models/whole/epoch_0002.pt"))
    middle = half["step"]
    fresh = train.settle(train.parse_args([*flags, "--run_name", "weights_only"]))
    run = train.make_run(fresh, train.make_nets(fresh, {}), Path("datasets/day2night"), torch.device("cpu"))
    Path("saved_models/weights_only").mkdir()
    utils.save_state(
        Path("saved_models/weights_only/latest.pt"),
        train.state_of(run, [train.own_parts(run)]) | {"nets": half["nets"]},
    )
    argv = ["--dataset_name", "day2night", "--run_name", "weights_only", "--start_from", "latest", "--device", "cpu"]
    pid, folder = spawn(argv, "log"), Path("saved_models/weights_only")
    while utils.load_state(folder / "latest.pt")["step"] < middle:
        time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    wait(pid, 600)
    rows = {name: utils.read_losses(Path(f"saved_models/{name}/losses.csv")) for name in ("whole", "weights_only")}
    for row in rows["weights_only"]:
        row["step"] += middle
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss_G", "loss_D_A"), strict=True):
        for label, colour, words in (
            ("whole", "tab:blue", "exact resume = uninterrupted"),
            ("weights_only", "tab:red", "weights only"),
        ):
            points = [(r["step"], r[name]) for r in rows[label] if abs(r["step"] - middle) <= 400]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=words)
        axes.axvline(middle, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        for label in ("whole", "weights_only"):
            after = [r[name] for r in rows[label] if middle < r["step"] <= middle + 100]
            before = [r[name] for r in rows["whole"] if middle - 100 < r["step"] <= middle]
            highest = max(after)
            print(
                f"{name}, {label}: {np.mean(before):.3f} in the 100 steps before, {np.mean(after):.3f} after, highest {highest:.3f}"
            )
        recovered = [r["step"] - middle for r in rows["weights_only"] if r[name] <= np.mean(before)]
        print(f"{name}: first back at its earlier mean after {min(recovered, default=None)} steps")
    axes.legend(fontsize="small")
    figure.savefig("resume.png", dpi=100)
    picture = Image.open("resume.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    picture.save("resume.png", optimize=True)
    print(f"resume.png: {Path('resume.png').stat().st_size / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "signals", "disk", "pictures", "fuzz", "watchdog", "plain"))
    parser.add_argument("--folder", type=Path, default=Path("faults"), help="where all happens (default: ./faults)")
    parser.add_argument("--count", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--longest", type=float, default=3.0, help="longest life after a start, s (default: 3)")
    parser.add_argument("--pictures", type=int, default=10_000, help="fuzzed pictures (default: 10000)")
    parser.add_argument("--files", type=int, default=2_000, help="fuzzed checkpoints and weights (default: 2000)")
    parser.add_argument("--demo", action="store_true", help="watchdog: the demo run instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder / args.what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    datasets.draw_dataset(Path("datasets"), size=32)
    globals()[args.what](args)


if __name__ == "__main__":
    main()
