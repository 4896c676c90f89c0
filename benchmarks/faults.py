"""What faults do to a run: the figures of docs/reliability.md come from these commands.

python benchmarks/faults.py kills --count 50
python benchmarks/faults.py signals
python benchmarks/faults.py disk
python benchmarks/faults.py images
python benchmarks/faults.py fuzz --images 10000 --files 2000 --csv 10000 --json 10000 --zips 10000
python benchmarks/faults.py watchdog
python benchmarks/faults.py plain

Small networks on day2night at 32 px, on the CPU. All files are written to --folder, which can be deleted afterwards.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, build_model, recipe, train_config

import app
import distill
import prepare
import train
from models import DIRECTIONS
from toolkit import cli, converters, images, inference, synthetic, weights
from toolkit.checkpoints import load_state, networks_of
from toolkit.logs import CsvLog, Meter, plot_losses, read_losses
from toolkit.metrics import format_table
from utils import InputError

SMALL = [
    "--dataset_name",
    "day2night",
    "--img_height",
    "32",
    "--img_width",
    "32",
    "--num_residual",
    "1",
    "--ngf",
    "8",
    "--ndf",
    "8",
    "--n_layers_D",
    "1",
    "--batch_size",
    "1",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]
SIDE = 32  # px
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
TIMEOUT = 10  # s; a file that takes longer counts as a hang
RUNS = Path("saved_models")


def resume_flags(run_name):
    return ["--dataset_name", "day2night", "--run_name", run_name, "--start_from", "latest", "--device", "cpu"]


def spawn(argv, log):
    """Run train.py in a fork of this process, which has imported everything already; returns its process id."""
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
    except BaseException:  # noqa: BLE001 (a traceback has its own exit code)
        traceback.print_exc()
        code = 70
    finally:
        os._exit(code)


def wait(pid, seconds):
    """The exit code (of a killed process, minus its signal), or None if it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def finish(argv, log="log"):
    """Run train.py to its end; the exit code must be 0."""
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


def latest(run_name):
    """The newest state of a run."""
    return load_state(RUNS / run_name / "latest.pt")


def equal_parts(one, other):
    """Which parts of two finished runs are equal bit for bit."""
    a = latest(one)
    b = latest(other)
    found = {
        key: equal(a[key], b[key]) for key in ("nets", "optims", "buffers", "rng", "meter", "step_in_epoch", "step")
    }
    found["losses.csv"] = (RUNS / one / "losses.csv").read_bytes() == (RUNS / other / "losses.csv").read_bytes()
    same = []
    for grid in Path("generated_images", one).glob("epoch_*.png"):
        same.append(grid.read_bytes() == Path("generated_images", other, grid.name).read_bytes())
    return found | {"grids": all(same)}


def lines_of(log, *marks):
    """The lines of a log that contain one of the marks; every update of a progress bar is a line, too."""
    lines = Path(log).read_text().replace("\r", "\n").splitlines()
    return [line.strip() for line in lines if any(mark in line for mark in marks)]


# ---------------------------------------------------------------------------------------------
# Killed and stopped runs


def wait_for_random_moment(pid, folder, rng, longest):
    """Wait until a random moment of a run, half of the time during a save; returns the exit code if it ended."""
    begun = time.time()
    code = None
    in_save = rng.random() < 0.5
    while code is None and not any(path.stat().st_mtime > begun for path in folder.glob("run.json")):
        code = wait(pid, 0.005)  # it is still reading its state and the images
    if code is None and not in_save:
        return wait(pid, rng.uniform(0, longest))
    while code is None and not any(folder.glob(".*.tmp")):
        code = wait(pid, 0.001)
    return wait(pid, rng.uniform(0, 0.02)) if code is None else code


def count_unreadable_states(folder):
    """Count the states of a run that cannot be read; each is named."""
    count = 0
    for path in folder.glob("*.pt"):
        try:
            load_state(path)
        except InputError as error:
            count += 1
            print(error)
    return count


def kills(args):
    """SIGKILL at random moments and restart, until the run is finished; then the next run."""
    rng = random.Random(0)
    count = Counter()
    runs = 0
    while count["killed"] < args.count:
        flags = [*SMALL, "--num_epochs", 4, "--steps_per_epoch", 30, "--checkpoint_interval", 2, "--seed", runs]
        finish([*flags, "--run_name", f"whole{runs}", "--save_minutes", 0])
        name = f"killed{runs}"
        folder = RUNS / name
        code = None
        while code is None:
            started = (folder / "latest.pt").exists() or (folder / "previous.pt").exists()
            argv = resume_flags(name) if started else [*flags, "--overwrite", "--run_name", name]
            last = count["killed"] >= args.count
            save_minutes = "0" if last else "1e-6"  # after each step, so that many kills hit a save
            pid = spawn([*argv, "--save_minutes", save_minutes], f"{name}.log")
            code = wait(pid, 3600) if last else wait_for_random_moment(pid, folder, rng, args.longest)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                count["killed"] += wait(pid, 60) == -signal.SIGKILL
                count["saving"] += any(folder.glob(".*.tmp"))
                count["unreadable"] += count_unreadable_states(folder)
        count["fallbacks"] += Path(f"{name}.log").read_text().count("using saved_models")
        result = equal_parts(f"whole{runs}", name)
        print(f"run {runs}: exit code {code} after {count['killed']} kills in all; equal: {result}", flush=True)
        if code or not all(result.values()):
            raise SystemExit(Path(f"{name}.log").read_text()[-3000:])
        runs += 1
    print(
        f"{count['killed']} kills, {count['saving']} of them while a file was being written; "
        f"{count['unreadable']} unreadable states; previous.pt was needed {count['fallbacks']} times; "
        f"{runs} runs, all ended bit for bit like uninterrupted ones"
    )


def child_processes(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_done(log, total):
    """The number of finished steps that a progress bar shows."""
    return max(map(int, re.findall(rf"(\d+)/{total} \[", Path(log).read_text())), default=0)


def signals(args):
    """Ctrl-C, SIGTERM and the loss of the terminal in the middle of an epoch, with 2 workers."""
    flags = [*SMALL, "--num_epochs", "2", "--steps_per_epoch", "60", "--num_workers", "2"]
    finish([*flags, "--run_name", "whole"])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        name = signum.name
        log = Path(f"{name}.log")
        with log.open("w") as file:
            command = [sys.executable, ROOT / "train.py", *flags, "--run_name", name]
            process = subprocess.Popen(command, stdout=file, stderr=file)
            while steps_done(log, 120) < 20 and process.poll() is None:
                time.sleep(0.05)
            workers = child_processes(process.pid)
            start = time.monotonic()
            process.send_signal(signum)
            sent = time.time()
            code = process.wait(60)
            seconds = time.monotonic() - start
            saved = (RUNS / name / "latest.pt").stat().st_mtime - sent
        time.sleep(0.2)
        orphans = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        step = latest(name)["step"]
        finish(resume_flags(name))
        print(
            f"{name}: {len(workers)} workers, saved at step {step} after {saved:.1f} s, ended after {seconds:.1f} s, "
            f"exit code {code}, {len(orphans)} orphans;\n"
            f"  after resuming equal to the uninterrupted run: {equal_parts('whole', name)}",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------
# Full disks and bad images


@contextlib.contextmanager
def small_disk(folder):
    """Mount 20 MB on a folder until the block ends; the program ends if that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise SystemExit("a tmpfs cannot be mounted here; tests inject the same errors: pytest -k full_disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(file_name):
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), Path(file_name).open("wb", buffering=0) as file:
        while file.write(bytes(2**14)):
            pass


def run_on_full_disk(flags, freed):
    """Train on a disk that fills up after the first save; freed: it has space again after the first failed save."""
    log = Path("../disk.log")
    ballast = Path("ballast")
    folder = RUNS / "run"
    pid = spawn([*flags, "--run_name", "run"], log)
    while not (folder / "latest.pt").exists():
        time.sleep(0.02)
    fill_disk(ballast)
    while "warning: " not in log.read_text():
        time.sleep(0.02)
    step = latest("run")["step"]
    if freed:
        ballast.unlink()
    code = wait(pid, 600)
    lines = lines_of(log, "warning: ", "error: ")
    state = latest("run")
    left = sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))
    print(f"{'freed' if freed else 'full to the end'}: exit code {code}, {len(lines)} lines, such as: {lines[0]}")
    print(f"  state when it was full: step {step}; at the end: step {state['step']}; partial files: {left}")
    whole = load_state(Path("../saved_models/whole/latest.pt"))
    if freed:
        print(f"  weights equal to the uninterrupted run: {equal(whole['nets'], state['nets'])}")
    else:
        print(f"  last line: {lines[-1]}")
        for path in folder.glob("*.safetensors"):
            weights.load_generator(path)
        ballast.unlink()
        finish(resume_flags("run"), log)
        same = equal(whole["nets"], latest("run")["nets"])
        print(f"  after freeing and resuming, weights equal: {same}", flush=True)
    log.unlink()


def disk(args):
    """A disk of 20 MB that fills up during the run, and is freed again or not."""
    flags = [*SMALL, "--ngf", "16", "--num_epochs", "6", "--steps_per_epoch", "40", "--save_minutes", "0.02"]
    finish([*flags, "--run_name", "whole"])
    for freed in (True, False):
        with small_disk(Path("disk")):
            (Path("disk") / "datasets").symlink_to(Path("datasets").resolve())
            with contextlib.chdir("disk"):
                run_on_full_disk(flags, freed)


def bad_images(args):
    """Sets of 400 images per domain: training with 2 % damaged ones; no start with 6 % unreadable headers."""
    for percent in (2, 6):
        name = f"bad{percent}"
        shutil.copytree("datasets/day2night", f"datasets/{name}")
        for domain in "AB":
            paths = images.list_images(Path(f"datasets/{name}/train{domain}"))
            for i, path in enumerate(paths[: percent * len(paths) // 100]):
                data = path.read_bytes()
                damaged = [data[:10]]
                if percent == 2:
                    damaged = [data[: len(data) // 2], b"", b"GIF89a", data[:-200]]
                path.write_bytes(damaged[i % len(damaged)])
        log = Path(f"{name}.log")
        code = wait(spawn([*SMALL, "--dataset_name", name, "--num_epochs", 2, "--save_minutes", 0], log), 3600)
        skipped = lines_of(log, "skipped, unreadable")
        named = {line.split(": ")[1].split(" (")[0] for line in skipped}
        print(
            f"{percent} %: exit code {code}; {len(skipped)} lines name {len(named)} files; "
            f"a run was begun: {(RUNS / name).exists()}; {lines_of(log, 'skipped, unreadable', 'error: ')[-1]}"
        )


# ---------------------------------------------------------------------------------------------
# Fuzzing: damaged files of every kind


class Timeout(BaseException):
    """An attempt took too long; not an OSError, which commands handle."""


class Refused(Exception):
    """A file was refused, or read in part, with a message of one line."""


def attempt_all(kind, count, attempt, refusal, limit=TIMEOUT):
    """Call attempt(i) `count` times and print how many succeeded; returns the number of tracebacks and hangs.

    limit: s; an attempt that takes longer counts as a hang
    """
    results = Counter()
    slowest = 0.0

    def too_long(*_):
        raise Timeout

    signal.signal(signal.SIGALRM, too_long)
    for i in range(count):
        signal.alarm(limit)
        start = time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                attempt(i)
            results["read"] += 1
        except refusal:
            results["refused"] += 1
        except (Exception, Timeout) as error:  # noqa: BLE001 (this is what is counted)
            results["failed"] += 1
            print(f"{kind} {i}: {type(error).__name__}: {error}", flush=True)
            if results["failed"] < 4:
                traceback.print_exc()
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
    print(
        f"{count} {kind}: {results['read']} read, {results['refused']} refused in one line, "
        f"{results['failed']} tracebacks or hangs; slowest {slowest:.1f} s"
    )
    return results["failed"]


def damage(data, others, rng):
    """Flip bits, cut, insert, or splice a part of another file into `data`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        kind = rng.randrange(5)
        i = rng.randrange(len(data) + 1)
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


def damage_text(data, others, rng):
    """Damage a text like `damage`, or move some of its characters, or repeat a part, up to a very long line."""
    kind = rng.randrange(4)
    if kind in (0, 1):
        data = damage(data, others, rng)
    i = rng.randrange(len(data) + 1)
    if kind in (1, 2):
        part = data[i : i + rng.choice((1, 3, 40, 400))]
        if rng.random() < 0.5:
            part = bytes([rng.choice(b'0179-.,;"[{\n\x00 e')])
        length = rng.choice((2, 50, 500, 5_000, 200_000))
        data = data[:i] + part * (length // max(1, len(part)) + 1) + data[i:]
    elif kind == 3:
        data = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice(data)
    return bytes(data)


@contextlib.contextmanager
def at_most_one_line(mark):
    """Check that the block writes at most one line with this mark to stderr; yields the list of them, filled at the end."""
    lines = []
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            yield lines
        finally:
            lines += [line for line in stderr.getvalue().replace("\r", "\n").splitlines() if mark in line]
    if len(lines) > 1:
        raise AssertionError(f"{len(lines)} lines: {lines[:2]}")


def sample_images():
    """A small image in every format and mode, as bytes."""
    image = synthetic.draw_scene(0, "day", 48)
    wanted = [(mode, kind, {}) for mode in ("RGB", "L", "RGBA", "P", "1") for kind in FORMATS]
    wanted += [("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "JPEG", {"progressive": True})]
    wanted += [("P", "PNG", {"bits": 4})]
    found = []
    for mode, kind, options in wanted:
        with contextlib.suppress(OSError):  # the format does not have this mode
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, kind, **options)
            found.append(buffer.getvalue())
    return found


def fuzz_images(count):
    """Read damaged images; returns the number of tracebacks and hangs."""
    samples = sample_images()
    path = Path("fuzzed.png")

    def attempt(i):
        rng = random.Random(f"picture-{i}")  # the seed of the figures in docs/reliability.md
        path.write_bytes(damage(rng.choice(samples), samples, rng))
        images.load_image(path, (16, 16), rng.choice((1, 3)))

    return attempt_all("fuzzed images", count, attempt, images.UnreadableImage)


class MaliciousPickle:
    """A pickle that would write a file."""

    def __init__(self, file_name):
        self.file_name = file_name

    def __reduce__(self):
        ways = [
            (os.system, (f"touch {self.file_name}",)),
            (open, (self.file_name, "w")),
            (exec, (f"open({self.file_name!r}, 'w')",)),
        ]
        return ways[len(self.file_name) % 3]


def strange_values(value):
    """What a damaged state may contain instead of a value."""
    found = [None, -1, 10**30, 2**70, "x", "", [], {}, (), float("nan"), True, [[]], {"x": 1}, b"x"]
    if isinstance(value, torch.Tensor):
        found += [value.flatten()[:0], value.double(), value.long(), value.bool(), value.half(), torch.zeros(())]
        found += [value.to(torch.complex64), value.float().to_sparse(), value.unsqueeze(0)]
        found += [torch.full_like(value.float(), float("nan"))]
    return found


def edit_state(state, rng):
    """Replace, delete or add a random value anywhere in a copy of a state."""
    state = copy.deepcopy(state)
    parent = state
    key = rng.choice(list(state))
    while isinstance(parent[key], dict | list) and len(parent[key]) and rng.random() < 0.9:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    strange = strange_values(parent[key])
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    elif rng.random() < 0.2 and isinstance(parent, dict):
        parent[rng.choice(("x" * 300, "a\nb", 7, None))] = rng.choice(strange)
    else:
        parent[key] = rng.choice(strange)
    return state


NO_DATA = SimpleNamespace(steps_per_epoch=3)


def idle_monitor(*_):
    """A monitor that shows nothing."""
    return SimpleNamespace(meter=Meter(), log=SimpleNamespace(save=lambda: None))


def resume_without_training(run_name):
    """Resume a run as train.py does, but load no images and train nothing."""
    with (
        mock.patch.multiple(train, load_data=lambda *_: NO_DATA, make_monitor=idle_monitor),
        mock.patch.object(train.Run, "run", train.Run.resume),
    ):
        train.main.__wrapped__(resume_flags(run_name))


def read_state(run_name):
    """Read the latest state of a run in every way in which a command would; raises the first refusal."""
    path = RUNS / run_name / "latest.pt"

    def read_teacher():
        args = distill.parse_args(["--teacher", run_name, "--direction", "both"])
        distill.inherit(args, distill.load_teacher(run_name, DIRECTIONS))

    refusals = []
    for read in (
        lambda: resume_without_training(run_name),
        lambda: inference.load_run(run_name),
        read_teacher,
        lambda: networks_of(load_state(path), path),
    ):
        try:
            read()
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def all_files():
    """Every file in this folder, except those that fuzzing writes."""
    return {path for path in Path().rglob("*") if not path.name.startswith("fuzzed")}


def fuzz_files(count):
    """Read damaged, edited and malicious checkpoints and weights.

    returns: the number of tracebacks and hangs, plus that of files that appeared meanwhile
    """
    folder = RUNS / "fuzz"
    finish([*SMALL, "--num_epochs", "1", "--steps_per_epoch", "3", "--buffer_size", "2", "--run_name", "fuzz"])
    state = latest("fuzz")
    foreign = converters.to_junyanz(weights.load_generator(folder / "G_AB.safetensors")[0])
    torch.save(foreign, "foreign.pth")
    torch.save(foreign, "old.pth", _use_new_zipfile_serialization=False)
    files = [folder / "latest.pt", folder / "G_AB.safetensors", Path("foreign.pth"), Path("old.pth")]
    contents = [file.read_bytes() for file in files]
    fuzzed_state = RUNS / "fuzzed" / "latest.pt"
    fuzzed_state.parent.mkdir()
    fuzzed_state.touch()

    def attempt(i):
        rng = random.Random(f"file-{i}")
        kind = rng.randrange(8)
        file = fuzzed_state
        if kind < 4:
            if kind:
                file = Path(f"fuzzed{files[kind].suffix}")
            file.write_bytes(damage(contents[kind], contents, rng))
        elif kind < 6:
            torch.save(edit_state(state, rng), file)
        elif kind == 6:
            file = Path("fuzzed.pth")
            torch.save(edit_state(foreign, rng), file)
        else:
            file = rng.choice((fuzzed_state, Path("fuzzed.pth"), Path("fuzzed.safetensors")))
            evil = MaliciousPickle("executed" + "!" * rng.randrange(3))
            if rng.random() < 0.5:
                file.write_bytes(pickle.dumps({"format": 1, "nets": evil}, protocol=rng.choice((2, 4, 5))))
            else:
                torch.save({**state, rng.choice(list(state)): evil}, file)
        if file == fuzzed_state:
            read_state("fuzzed")
        else:
            weights.load_generator(file)

    before = all_files()
    failed = attempt_all("fuzzed checkpoints and weights", count, attempt, InputError)
    appeared = sorted(map(str, all_files() - before))
    print(f"fuzzed files: {len(appeared)} other files appeared {appeared}")
    return failed + len(appeared)


def run_with_logs():
    """Train a run named logs for three short epochs with all measures, once; returns its folder."""
    if not (RUNS / "logs").exists():
        measures = ("--eval_interval", "1", "--eval_metrics", "losses,cycle,identity,paired")
        short = ("--steps_per_epoch", "2", "--num_epochs", "3", "--buffer_size", "2")
        finish([*SMALL, *short, *measures, "--max_images", "2", "--run_name", "logs"])
    return RUNS / "logs"


def read_log(path, last_step, plot):
    """Read a log in every way in which a resumed run, its page and its plot would."""
    read_losses(path)
    log = CsvLog(path, ["epoch", "step"], last_step)
    log.append({"epoch": 9, "step": last_step + 1, "loss_G": 1.0})
    log.save()
    again = CsvLog(path, ["epoch", "step"], last_step + 1)
    steps = [row["step"] for row in log.rows]
    if [row["step"] for row in again.rows] != steps or steps != sorted(set(steps)):
        raise AssertionError(f"steps {steps[:9]} are not those that are read again, or do not rise")
    format_table({f"epoch {row['epoch']}": row for row in log.rows[-12:]})
    if plot:
        plot_losses(log.rows, Path("fuzzed_losses.png"))


def fuzz_logs(count):
    """Read damaged losses.csv and measures.csv, and resume the run of every 50th; returns the number of tracebacks."""
    folder = run_with_logs()
    whole = {}
    for path in folder.iterdir():
        if path.suffix in (".csv", ".pt", ".safetensors"):
            whole[path.name] = path.read_bytes()
    names = ("losses.csv", "measures.csv")
    logs = [whole[name] for name in names]

    def attempt(i):
        rng = random.Random(f"log-{i}")
        name = rng.choice(names)
        path = folder / name
        path.write_bytes(damage_text(whole[name], logs, rng))
        with at_most_one_line(str(path)) as lines:
            if i % 50:
                read_log(path, rng.choice((1, 4, 6, 10**6)), plot=i % 10 == 0)
            else:
                for other in whole.keys() - {name}:
                    (folder / other).write_bytes(whole[other])
                train.main([*resume_flags("logs"), "--num_epochs", "4", "--steps_per_epoch", "2"])
        if lines:
            raise Refused

    return attempt_all("fuzzed logs", count, attempt, Refused, limit=12 * TIMEOUT)  # some attempts train


def fuzz_descriptions(count):
    """Read damaged run.json, of a run and of a student, as the app does; returns the number of tracebacks."""
    run = (run_with_logs() / "run.json").read_bytes()
    student = json.loads(run)
    student["flags"] |= {"teacher": "logs", "direction": "both"}
    shutil.copytree(RUNS / "logs", RUNS / "student")
    contents = {"logs": run, "student": json.dumps(student, indent=1).encode()}

    def attempt(i):
        rng = random.Random(f"description-{i}")
        name = rng.choice(list(contents))
        for other, data in contents.items():
            (RUNS / other / "run.json").write_bytes(data)
        (RUNS / name / "run.json").write_bytes(damage_text(contents[name], list(contents.values()), rng))
        for run_name in contents:
            for direction in DIRECTIONS:
                if run_name not in app.related_runs(run_name, direction):
                    raise AssertionError(f"the app does not show {run_name}")

    return attempt_all("fuzzed run.json", count, attempt, Refused)


def hostile_names():
    """File names that lead out of the folder of a zip, or are difficult for a file system."""
    ways = ["../" * depth for depth in range(1, 6)]
    ways += ["..\\" * 2, "trainA/../../", "trainA\\..\\..\\", f"{Path().resolve()}/", "C:\\"]
    names = [f"{way}{inside}evil.png" for way in ways for inside in ("", "trainA/", "trainB/../")]
    names += ["trainA/" + "n" * 300 + ".png", "trainA/evil.png/evil.png", "trainA/\x00evil.png", "trainA/ .png"]
    return [*names, "trainA/evil\n\x1b[2J.png", "trainA/0.png", "trainA//evil.png", "trainA/.png"]


def make_zip(rng, photos):
    """A zipped data set with any compression; names and attributes are sometimes hostile, sizes sometimes huge."""
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    root = rng.choice(("", "set/", "a/b/set/", "set\\"))
    hostile = rng.random() < 0.3
    names = [f"{root}{part}/{i}.png" for part in ("trainA", "trainB", "testA", "testB") for i in range(2)]
    if hostile:
        names += rng.choices(hostile_names(), k=rng.choice((1, 3)))
    rng.shuffle(names)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would correct it
            info.compress_type = compression
            if hostile and rng.random() < 0.2:
                info.external_attr = rng.choice((0xA1FF << 16, 0x41FF << 16, 0x10, rng.getrandbits(32)))
            archive.writestr(info, bytes(2**22) if hostile and rng.random() < 0.05 else rng.choice(photos))
    return data.getvalue()


def files_around():
    """The files of this folder, and those that a zip could have written to the folders above it."""
    here = Path().resolve()
    found = set(here.glob("*"))
    for folder in here.parents:
        found |= {*folder.glob("evil*"), *folder.glob("train[AB]*")}
    return found


def fuzz_zips(count):
    """Unpack damaged and hostile data sets like downloads; nothing may be written outside their folder."""
    photos = [data for data in sample_images() if data.startswith(b"\x89PNG")]
    rng = random.Random("zips")
    others = [make_zip(rng, photos) for _ in range(20)]
    root = Path("fuzzed_sets")
    root.mkdir()
    around = files_around()

    def attempt(i):
        rng = random.Random(f"zip-{i}")
        data = make_zip(rng, photos)
        if rng.random() < 0.7:
            data = damage(data, others, rng)
        code = 0
        try:
            with (
                mock.patch.object(prepare, "fetch", lambda url, part: part.write_bytes(data)),
                at_most_one_line("error: ") as lines,
            ):
                prepare.main(["download", "set", "--url", "http://host/set.zip", "--data_root", str(root)])
        except SystemExit as error:
            code = error.code
        left = {path.name for path in root.iterdir()}
        strange = {path.name for path in root.glob("set/*")} - {*prepare.SPLITS}
        strange |= {path.name for path in root.rglob("*") if path.is_symlink()}
        shutil.rmtree(root)
        root.mkdir()
        if files_around() != around or strange or left - {"set", ".set.zip.part"}:
            raise AssertionError(f"written outside the data set: {files_around() - around or strange or left}")
        if code not in (0, 1, 2) or (code > 0) != bool(lines) or (code > 0 and "set" in left):
            raise AssertionError(f"exit code {code}, {lines}, left {left}")
        if code == 1 and "space" not in lines[0]:
            raise AssertionError(f"exit code 1: {lines[0]}")
        if code:
            raise Refused

    return attempt_all("fuzzed zips", count, attempt, Refused)


def fuzz(args):
    """Damaged images, logs, run.json and zips; damaged, edited and malicious checkpoints and weights."""
    counts = {fuzz_images: args.images, fuzz_files: args.files, fuzz_logs: args.csv}
    counts |= {fuzz_descriptions: args.json, fuzz_zips: args.zips}
    failed = sum(function(count) for function, count in counts.items() if count)
    raise SystemExit(bool(failed))


# ---------------------------------------------------------------------------------------------
# Warnings, and what exact resume is good for


def watchdog(args):
    """Learning rate 1, a generator frozen to a constant, and with --demo the whole demo run."""
    if args.demo:
        shutil.rmtree("datasets")
        synthetic.draw_dataset(Path("datasets"))
        finish(recipe("day2night"), "demo.log")
        print(f"demo: {len(lines_of('demo.log', 'warning: '))} warnings")
        return
    make_networks = train.make_networks

    def make_constant(*arguments):
        networks = make_networks(*arguments)
        torch.nn.init.zeros_(networks["G_AB"].head[1].weight)
        return networks

    flags = [*SMALL, "--num_epochs", "3", "--steps_per_epoch", "30"]
    for name, more in (("healthy", []), ("lr1", ["--lr", "1.0"]), ("constant", ["--freeze", "head"])):
        with mock.patch.object(train, "make_networks", make_constant if name == "constant" else make_networks):
            code = wait(spawn([*flags, *more, "--run_name", name], f"{name}.log"), 3600)
        lines = lines_of(f"{name}.log", "warning: ", "error: ")
        print(f"{name}: exit code {code}, {len(lines)} lines in 3 epochs {lines[:1]}", flush=True)


def start_with_weights_only(flags, nets):
    """Save a fresh run that has only the weights of another run's state, as a simple script would resume."""
    config = train_config([*flags, "--run_name", "weights_only"])
    model = build_model(config)
    for name, net in model.networks.items():
        net.load_state_dict(nets[name])
    run = train.Run("train", config, model, NO_DATA, idle_monitor())
    run.saver.folder.mkdir()
    run.save()


def plain(args):
    """Interrupt a run after half of its steps: exact resume against a script that had saved only the weights.

    Exact resume is the uninterrupted run, to which it is equal bit for bit (see kills and signals).
    """
    train.LOG_EVERY = 10
    flags = [*SMALL, "--steps_per_epoch", "200", "--num_epochs", "4"]
    finish([*flags, "--checkpoint_interval", "2", "--run_name", "whole"])
    half = load_state(RUNS / "whole/epoch_0002.pt")
    middle = half["step"]
    start_with_weights_only(flags, half["nets"])
    pid = spawn(resume_flags("weights_only"), "log")
    while latest("weights_only")["step"] < middle:
        time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    wait(pid, 600)
    rows = {name: read_losses(RUNS / name / "losses.csv") for name in ("whole", "weights_only")}
    for row in rows["weights_only"]:
        row["step"] += middle
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss_G", "loss_D_A"), strict=True):
        draw_resume(axes, rows, name, middle)
        print_resume(rows, name, middle)
    axes.legend(fontsize="small")
    figure.savefig("resume.png", dpi=100)
    image = Image.open("resume.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    image.save("resume.png", optimize=True)
    print(f"resume.png: {Path('resume.png').stat().st_size / 1000:.0f} kB")


def draw_resume(axes, rows, name, middle):
    """Draw a loss of both runs around the interruption."""
    styles = {"whole": ("tab:blue", "exact resume = uninterrupted"), "weights_only": ("tab:red", "weights only")}
    for run_name, (colour, label) in styles.items():
        near = [row for row in rows[run_name] if abs(row["step"] - middle) <= 400]
        steps = [row["step"] for row in near]
        axes.plot(steps, [row[name] for row in near], color=colour, linewidth=1, label=label)
    axes.axvline(middle, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("step")
    axes.set_title(name)
    axes.grid(alpha=0.3)


def print_resume(rows, name, middle):
    """Print the means of a loss before and after the interruption, and when it is back at its earlier mean."""
    before = np.mean([row[name] for row in rows["whole"] if middle - 100 < row["step"] <= middle])
    for run_name in ("whole", "weights_only"):
        after = [row[name] for row in rows[run_name] if middle < row["step"] <= middle + 100]
        print(
            f"{name}, {run_name}: {before:.3f} in the 100 steps before, {np.mean(after):.3f} after, "
            f"highest {max(after):.3f}"
        )
    recovered = [row["step"] - middle for row in rows["weights_only"] if row[name] <= before]
    print(f"{name}: first back at its earlier mean after {min(recovered, default=None)} steps")


COMMANDS = {
    "kills": kills,
    "signals": signals,
    "disk": disk,
    "images": bad_images,
    "fuzz": fuzz,
    "watchdog": watchdog,
    "plain": plain,
}


def main():
    parser = cli.Parser(prog="faults.py", description=__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--folder", type=Path, default=Path("faults"), help="folder of all files (default: ./faults)")
    parser.add_argument("--count", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--longest", type=float, default=3.0, help="longest time until a kill, s (default: 3)")
    parser.add_argument("--images", type=int, default=10_000, help="fuzzed images (default: 10000)")
    parser.add_argument("--files", type=int, default=2_000, help="fuzzed checkpoints and weights (default: 2000)")
    parser.add_argument("--csv", type=int, default=10_000, help="fuzzed losses.csv and measures.csv (default: 10000)")
    parser.add_argument("--json", type=int, default=10_000, help="fuzzed run.json (default: 10000)")
    parser.add_argument("--zips", type=int, default=10_000, help="fuzzed data sets to unpack (default: 10000)")
    parser.add_argument("--demo", action="store_true", help="watchdog: the demo run instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder / args.what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    synthetic.draw_dataset(Path("datasets"), size=SIDE)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
