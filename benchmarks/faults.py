"""What faults do to a run: each figure of docs/reliability.md comes from one of these commands.

python benchmarks/faults.py kills --count 50
python benchmarks/faults.py signals
python benchmarks/faults.py disk
python benchmarks/faults.py images
python benchmarks/faults.py fuzz --images 10000 --files 2000 --csv 10000 --json 10000 --zips 10000
python benchmarks/faults.py watchdog
python benchmarks/faults.py plain

Small networks on day2night at 32 px, on the CPU; everything happens in --folder, which may be removed afterwards.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

import app  # noqa: E402
import distill  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from toolkit import cli, converters, images, inference, synthetic, weights  # noqa: E402
from toolkit.checkpoints import Progress, flag_changes, load_state, networks_of, restore  # noqa: E402
from toolkit.metrics import format_table  # noqa: E402
from toolkit.monitor import CsvLog, Meter, plot_losses, read_losses  # noqa: E402
from utils import InputError  # noqa: E402

SMALL = [
    *("--dataset_name", "day2night", "--img_height", "32", "--img_width", "32", "--num_residual", "1", "--ngf", "8"),
    *("--ndf", "8", "--n_layers_D", "1", "--batch_size", "1", "--precision", "fp32", "--device", "cpu"),
]
SIDE = 32  # px
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
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


def latest(run_name):
    """The newest whole state of a run."""
    return load_state(Path("saved_models") / run_name / "latest.pt")


def compare(one, other):
    """Which parts of two finished runs are equal bit for bit."""
    a = latest(one)
    b = latest(other)
    found = {key: equal(a[key], b[key]) for key in ("nets", "optims", "buffers", "rng", "loader", "step")}
    logs = {(Path("saved_models") / name / "losses.csv").read_bytes() for name in (one, other)}
    grids = sorted(path.name for path in (Path("generated_images") / one).glob("epoch_*.png"))
    same = []
    for grid in grids:
        contents = {(Path("generated_images") / name / grid).read_bytes() for name in (one, other)}
        same.append(len(contents) == 1)
    return found | {"losses.csv": len(logs) == 1, "grids": all(same)}


def new_model(argv):
    """Flags, and the fresh model that they describe, on the CPU."""
    args = cli.with_vit_defaults(train.parse_args([str(word) for word in argv]))
    cli.check_run_flags(args)
    return args, train.make_model(args, train.make_nets(args, {}), torch.device("cpu"))


def lines_of(log):
    """What a run said, line by line; a progress bar's states are lines, too."""
    return Path(log).read_text().replace("\r", "\n").splitlines()


# ---------------------------------------------------------------------------------------------


def live(pid, folder, rng, longest):
    """Let a process live until a random moment; half of them until a save is under way. The exit code, if it ended."""
    begun = time.time()
    code = None
    in_save = rng.random() < 0.5
    while code is None and not any(path.stat().st_mtime > begun for path in folder.glob("run.json")):
        code = wait(pid, 0.005)  # it reads its state and the images
    if code is None and not in_save:
        return wait(pid, rng.uniform(0, longest))
    while code is None and not any(folder.glob(".*.tmp")):
        code = wait(pid, 0.001)
    return wait(pid, rng.uniform(0, 0.02)) if code is None else code


def unreadable_states(folder):
    """How many whole states of a run cannot be read; each is named."""
    count = 0
    for path in folder.glob("*.pt"):
        try:
            load_state(path)
        except InputError as error:
            count += 1
            print(error)
    return count


def kills(args):
    """SIGKILL at random moments, restart, until the run is finished; then another run."""
    rng = random.Random(0)
    count = Counter()
    runs = 0
    while count["killed"] < args.count:
        words = [*SMALL, "--num_epochs", "4", "--steps_per_epoch", "30", "--checkpoint_interval", "2", "--seed", runs]
        finish([*words, "--run_name", f"whole{runs}", "--save_minutes", "0"])
        name = f"killed{runs}"
        folder = Path("saved_models") / name
        code = None
        while code is None:
            started = any(folder.glob("latest.pt")) or any(folder.glob("previous.pt"))
            resume = ["--start_from", "latest", "--dataset_name", "day2night"] if started else [*words, "--overwrite"]
            last = count["killed"] >= args.count
            often = ["--save_minutes", "0" if last else "1e-6"]  # after each step: many kills shall hit a save
            pid = spawn([*resume, "--run_name", name, *often, "--device", "cpu"], f"{name}.log")
            code = wait(pid, 3600) if last else live(pid, folder, rng, args.longest)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                count["killed"] += wait(pid, 60) == -signal.SIGKILL
                count["saving"] += any(folder.glob(".*.tmp"))
                count["unreadable"] += unreadable_states(folder)
        count["fallbacks"] += Path(f"{name}.log").read_text().count("using saved_models")
        result = compare(f"whole{runs}", name)
        print(f"run {runs}: exit code {code} after {count['killed']} kills in all; equal: {result}", flush=True)
        if code or not all(result.values()):
            raise SystemExit(Path(f"{name}.log").read_text()[-3000:])
        runs += 1
    saving = f"{count['saving']} of them while a file was being written"
    print(f"{count['killed']} kills, {saving}; {count['unreadable']} unreadable states;")
    needed = f"previous.pt was needed {count['fallbacks']} times"
    print(f"{needed}; {runs} runs, all ended bit for bit as uninterrupted ones")


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_done(log, total):
    """How many of so many steps a progress bar has shown to be done."""
    return max(map(int, re.findall(rf"(\d+)/{total} \[", Path(log).read_text())), default=0)


def signals(args):
    """Ctrl-C, SIGTERM and the loss of the terminal in the middle of an epoch, with 2 workers."""
    words = [*SMALL, "--num_epochs", "2", "--steps_per_epoch", "60", "--num_workers", "2"]
    finish([*words, "--run_name", "whole"])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        name = signum.name
        log = Path(f"{name}.log")
        with log.open("w") as file:
            command = [sys.executable, ROOT / "train.py", *words, "--run_name", name]
            process = subprocess.Popen(command, stdout=file, stderr=file)
            while steps_done(log, 120) < 20 and process.poll() is None:
                time.sleep(0.05)
            workers = children(process.pid)
            start = time.monotonic()
            process.send_signal(signum)
            sent = time.time()
            code = process.wait(60)
            seconds = time.monotonic() - start
            saved = (Path("saved_models") / name / "latest.pt").stat().st_mtime - sent
        time.sleep(0.2)
        orphans = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        step = latest(name)["step"]
        finish(["--dataset_name", "day2night", "--run_name", name, "--start_from", "latest", "--device", "cpu"])
        result = compare("whole", name)
        after = f"saved at step {step} after {saved:.1f} s, ended after {seconds:.1f} s"
        print(f"{name}: {len(workers)} workers, {after}, exit code {code},")
        print(f"  {len(orphans)} orphans; after resuming equal to the uninterrupted run: {result}", flush=True)


@contextlib.contextmanager
def small_disk(folder):
    """Mount 20 MB as a folder until the block ends; the program ends where that is not allowed."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        raise SystemExit("a tmpfs cannot be mounted here; the same by injected errors: pytest -k full_disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast):
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(2**14)):
            pass


def run_on_full_disk(words, freed):
    """Train where the disk fills up after the first save; freed: it has room again after the first failed one."""
    log = Path("../disk.log")
    ballast = Path("ballast")
    folder = Path("saved_models/run")
    pid = spawn([*words, "--run_name", "run"], log)
    while not (folder / "latest.pt").exists():
        time.sleep(0.02)
    fill(ballast)
    while "warning: " not in log.read_text():
        time.sleep(0.02)
    step = latest("run")["step"]
    if freed:
        ballast.unlink()
    code = wait(pid, 600)
    lines = [line for line in lines_of(log) if "warning: " in line or "error: " in line]
    state = latest("run")
    left = sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))
    how = "freed" if freed else "full to the end"
    print(f"{how}: exit code {code}, {len(lines)} lines, such as: {lines[0]}")
    print(f"  state when it was full: step {step}; at the end: step {state['step']}; half files: {left}")
    whole = load_state(Path("../saved_models/whole/latest.pt"))
    if freed:
        print(f"  weights equal to the uninterrupted run: {equal(whole['nets'], state['nets'])}")
    else:
        print(f"  last line: {lines[-1]}")
        for path in folder.glob("*.safetensors"):
            weights.load_generator(path)
        ballast.unlink()
        finish(["--dataset_name", "day2night", "--run_name", "run", "--start_from", "latest"], log)
        same = equal(whole["nets"], latest("run")["nets"])
        print(f"  after freeing and resuming, weights equal: {same}", flush=True)
    log.unlink()


def disk(args):
    """A disk of 20 MB that fills up during the run, and is freed again, or is not."""
    words = [*SMALL, "--ngf", "16", "--num_epochs", "6", "--steps_per_epoch", "40", "--save_minutes", "0.02"]
    finish([*words, "--run_name", "whole"])
    for freed in (True, False):
        with small_disk(Path("disk")):
            (Path("disk") / "datasets").symlink_to(Path("datasets").resolve())
            with contextlib.chdir("disk"):
                run_on_full_disk(words, freed)


def bad_images(args):
    """Sets of 400 images a domain: 2 % bad train through, 6 % unreadable headers do not start."""
    for percent in (2, 6):
        name = f"bad{percent}"
        shutil.copytree("datasets/day2night", f"datasets/{name}")
        for domain in "AB":
            paths = images.list_images(Path(f"datasets/{name}/train{domain}"))
            for i, path in enumerate(paths[: percent * len(paths) // 100]):
                data = path.read_bytes()
                torn = [data[:10]]
                if percent == 2:
                    torn = [data[: len(data) // 2], b"", b"GIF89a", data[:-200]]
                path.write_bytes(torn[i % len(torn)])
        log = Path(f"{name}.log")
        pid = spawn([*SMALL, "--dataset_name", name, "--num_epochs", "2", "--save_minutes", "0"], log)
        code = wait(pid, 3600)
        skipped = [line for line in lines_of(log) if "skipped, unreadable" in line]
        named = {line.split(": ")[1].split(" (")[0] for line in skipped}
        begun = Path(f"saved_models/{name}").exists()
        last = [line for line in lines_of(log) if "skipped, unreadable" in line or "error: " in line][-1]
        found = f"{len(skipped)} lines name {len(named)} files"
        print(f"{percent} %: exit code {code}; {found}; a run was begun: {begun}; {last}")


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


class Evil:
    """A pickle that would write a file."""

    def __init__(self, word):
        self.word = word

    def __reduce__(self):
        return [(os.system, (f"touch {self.word}",)), (open, (self.word, "w")), (exec, (f"open({self.word!r}, 'w')",))][
            len(self.word) % 3
        ]


def strange_values(value):
    """What may stand in a damaged state in place of a value."""
    found = [None, -1, 10**30, 2**70, "x", "", [], {}, (), float("nan"), True, [[]], {"x": 1}, b"x"]
    if isinstance(value, torch.Tensor):
        found += [value.flatten()[:0], value.double(), value.long(), value.bool(), value.half(), torch.zeros(())]
        found += [value.to(torch.complex64), value.float().to_sparse(), value.unsqueeze(0)]
        found += [torch.full_like(value.float(), float("nan"))]
    return found


def sow(state, rng):
    """Replace a random value deep in a copy of a state by something else."""
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


class Hang(BaseException):
    """An attempt took too long; no OSError, which stages explain and end with."""


class Refused(Exception):
    """What was read was refused, or left out in part, in one line."""


def tally(what, count, attempt, refusal, limit=HANG):
    """Call attempt(i) `count` times; anything but a result or a refusal counts as a traceback. Returns the number of those.

    limit: s; what takes longer counts as a hang
    """
    count_of = Counter()
    slowest = 0.0

    def too_long(*_):
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    for i in range(count):
        signal.alarm(limit)
        start = time.monotonic()
        try:
            attempt(i)
            count_of["read"] += 1
        except refusal:
            count_of["refused"] += 1
        except (Exception, Hang) as error:  # noqa: BLE001 (what is counted)
            count_of["failed"] += 1
            print(f"{what} {i}: {type(error).__name__}: {error}", flush=True)
            if count_of["failed"] < 4:
                traceback.print_exc()
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
    found = f"{count_of['read']} read, {count_of['refused']} refused in one line"
    print(f"{count} {what}: {found}, {count_of['failed']} tracebacks or hangs; slowest {slowest:.1f} s")
    return count_of["failed"]


def sample_images():
    """A small image in every format and mode that a file can have, as bytes."""
    image = synthetic.draw_scene(0, "day", 48)
    wanted = [(mode, kind, {}) for mode in ("RGB", "L", "RGBA", "P", "1") for kind in KINDS]
    wanted += [("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "JPEG", {"progressive": True})]
    wanted += [("P", "PNG", {"bits": 4})]
    found = []
    for mode, kind, options in wanted:
        with contextlib.suppress(OSError):  # of modes that a format does not know
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, kind, **options)
            found.append(buffer.getvalue())
    return found


def fuzz_images(count):
    """Read so many damaged images; returns the number of tracebacks and hangs."""
    samples = sample_images()
    path = Path("fuzzed.png")

    def read_one(i):
        rng = random.Random(f"picture-{i}")  # the seed of the figures in docs/reliability.md
        path.write_bytes(damage(rng.choice(samples), samples, rng))
        images.load_image(path, (16, 16), rng.choice((1, 3)))

    return tally("fuzzed images", count, read_one, images.UnreadableImage)


class Reader:
    """Reads a file of weights or a whole state in every way in which a stage would."""

    def __init__(self):
        self.given = train.parse_args(["--dataset_name", "day2night", "--run_name", "fuzz", "--start_from", "latest"])
        _, self.model = new_model(SMALL)
        Path("saved_models/fuzzed").mkdir()
        self.state = Path("saved_models/fuzzed/latest.pt")
        self.state.touch()

    def start_from(self):
        found = load_state(self.state, "train")
        args = cli.resume_flags(train.make_parser(), self.given, found.get("args"), self.state)
        args = cli.with_vit_defaults(args)
        cli.check_run_flags(args)
        cli.network_configs(args)
        restore(found, self.state, self.model, Meter(), (3, SIDE, SIDE))

    def run_name(self):
        inference.load_run("fuzzed")

    def teacher(self):
        args = distill.parse_args(["--teacher", "fuzzed", "--direction", "both"])
        distill.inherit(args, distill.load_teacher("fuzzed", ["G_AB", "G_BA"]))

    def weights_file(self):
        networks_of(load_state(self.state), self.state)

    def read_state(self):
        """All of the above; raises the first refusal after the last of them."""
        refusals = []
        for read in (self.start_from, self.run_name, self.teacher, self.weights_file):
            try:
                read()
            except InputError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]


def all_files():
    """Every file below this folder, but those that fuzzing writes."""
    return {path for path in Path().rglob("*") if not path.name.startswith("fuzzed")}


def fuzz_files(count):
    """Read so many damaged, edited and malicious checkpoints and weights.

    returns: the number of tracebacks and hangs, and the files that appeared meanwhile
    """
    folder = Path("saved_models/fuzz")
    finish([*SMALL, "--num_epochs", "1", "--steps_per_epoch", "3", "--buffer_size", "2", "--run_name", "fuzz"])
    state = latest("fuzz")
    foreign = converters.to_junyanz(weights.load_generator(folder / "G_AB.safetensors")[0])
    torch.save(foreign, "foreign.pth")
    torch.save(foreign, "old.pth", _use_new_zipfile_serialization=False)
    files = [folder / "latest.pt", folder / "G_AB.safetensors", Path("foreign.pth"), Path("old.pth")]
    contents = [file.read_bytes() for file in files]
    reader = Reader()

    def read_one(i):
        rng = random.Random(f"file-{i}")
        kind = rng.randrange(8)
        if kind < 4:
            file = Path(f"fuzzed{files[kind].suffix}") if kind else reader.state
            file.write_bytes(damage(contents[kind], contents, rng))
        elif kind < 6:
            file = reader.state
            torch.save(sow(state, rng), file)
        elif kind == 6:
            file = Path("fuzzed.pth")
            torch.save(sow(foreign, rng), file)
        else:
            file = rng.choice((reader.state, Path("fuzzed.pth"), Path("fuzzed.safetensors")))
            evil = Evil("executed" + "!" * rng.randrange(3))
            if rng.random() < 0.5:
                file.write_bytes(pickle.dumps({"format": 1, "nets": evil}, protocol=rng.choice((2, 4, 5))))
            else:
                torch.save({**state, rng.choice(list(state)): evil}, file)
        if file == reader.state:
            reader.read_state()
        else:
            weights.load_generator(file)

    before = all_files()
    failed = tally("fuzzed checkpoints and weights", count, read_one, InputError)
    return failed, all_files() - before


def damage_text(data, others, rng):
    """Damage a text as `damage` does; or put some of its characters elsewhere; or repeat a part, up to a very long line."""
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
def one_line_at_most(begins):
    """Within the block at most one line on stderr begins so; the block gets them all when it is over."""
    lines = []
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            yield lines
        finally:
            lines += [line for line in said.getvalue().replace("\r", "\n").splitlines() if begins in line]
    if len(lines) > 1:
        raise AssertionError(f"{len(lines)} lines: {lines[:2]}")


def run_with_logs():
    """A run of three short epochs with all measures, named logs; returns its folder."""
    if Path("saved_models/logs").exists():
        return Path("saved_models/logs")
    measures = ("--eval_interval", "1", "--eval_metrics", "losses,cycle,identity,paired")
    short = ("--steps_per_epoch", "2", "--num_epochs", "3", "--buffer_size", "2")
    finish([*SMALL, *short, *measures, "--max_images", "2", "--run_name", "logs"])
    return Path("saved_models/logs")


def read_log(path, last_step, plot):
    """Read a log in every way in which a run that goes on, its page and its plot would; returns the rows kept."""
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
    """Read so many damaged losses.csv and measures.csv; each 50th by going on with its run. Returns the tracebacks."""
    folder = run_with_logs()
    whole = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".csv", ".pt", ".safetensors")
    }
    names = ("losses.csv", "measures.csv")
    logs = [whole[name] for name in names]
    resume = ["--dataset_name", "day2night", "--run_name", "logs", "--start_from", "latest", "--num_epochs", "4"]

    def read_one(i):
        rng = random.Random(f"log-{i}")
        name = rng.choice(names)
        path = folder / name
        path.write_bytes(damage_text(whole[name], logs, rng))
        with one_line_at_most(str(path)) as lines:
            if i % 50:
                read_log(path, rng.choice((1, 4, 6, 10**6)), plot=i % 10 == 0)
            else:
                for other in whole.keys() - {name}:
                    (folder / other).write_bytes(whole[other])
                train.main([*resume, "--steps_per_epoch", "2", "--device", "cpu"])
        if lines:
            raise Refused

    return tally("fuzzed logs", count, read_one, Refused, limit=12 * HANG)  # some of it is a training


def fuzz_descriptions(count):
    """Read so many damaged run.json, of a run and of a student, as a second start and the app do."""
    run_with_logs()
    run = Path("saved_models/logs/run.json").read_bytes()
    student = json.loads(run)
    student["flags"] |= {"teacher": "logs", "direction": "both"}
    shutil.copytree("saved_models/logs", "saved_models/taught")
    contents = {"logs": run, "taught": json.dumps(student, indent=1).encode()}
    given = cli.plain_flags(train.parse_args([*SMALL, "--run_name", "logs"]))

    def read_one(i):
        rng = random.Random(f"description-{i}")
        name = rng.choice(list(contents))
        for other, data in contents.items():
            Path("saved_models", other, "run.json").write_bytes(data)
        Path("saved_models", name, "run.json").write_bytes(damage_text(contents[name], list(contents.values()), rng))
        if not app.family("taught", "AtoB") or not app.family("logs", "BtoA"):
            raise AssertionError("a run is no relative of itself")
        with contextlib.suppress(SystemExit), one_line_at_most("error: ") as lines:
            train.main([*SMALL, "--run_name", name])
        if len(lines) != 1 or "holds a run already" not in lines[0]:
            raise AssertionError(f"a second start says {lines}")
        if "does not tell" in flag_changes(name, given):
            raise Refused

    return tally("fuzzed run.json", count, read_one, Refused)


def hostile_names():
    """Names of files in a zip that lead out of its folder, or mean trouble to a file system."""
    here = Path().resolve()
    ways = ["../" * depth for depth in range(1, 6)] + [
        "..\\" * 2,
        "trainA/../../",
        "trainA\\..\\..\\",
        f"{here}/",
        "C:\\",
    ]
    names = [f"{way}{inside}evil.png" for way in ways for inside in ("", "trainA/", "trainB/../")]
    names += ["trainA/" + "n" * 300 + ".png", "trainA/evil.png/evil.png", "trainA/\x00evil.png", "trainA/ .png"]
    return [*names, "trainA/evil\n\x1b[2J.png", "trainA/0.png", "trainA//evil.png", "trainA/.png"]


def make_zip(rng, photos):
    """A data set in a zip: of any compression, its names and attributes sometimes hostile, its sizes sometimes huge."""
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    root = rng.choice(("", "set/", "a/b/set/", "set\\"))
    hostile = rng.random() < 0.3
    names = [f"{root}{part}/{i}.png" for part in ("trainA", "trainB", "testA", "testB") for i in range(2)]
    if hostile:
        names += rng.choices(hostile_names(), k=rng.choice((1, 3)))
    rng.shuffle(names)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand there twice
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would put it right
            info.compress_type = compression
            if hostile and rng.random() < 0.2:
                info.external_attr = rng.choice((0xA1FF << 16, 0x41FF << 16, 0x10, rng.getrandbits(32)))
            archive.writestr(info, bytes(2**22) if hostile and rng.random() < 0.05 else rng.choice(photos))
    return data.getvalue()


def all_around():
    """What stands in this folder, and what would stand in those above it if a zip were unpacked there."""
    here = Path().resolve()
    found = set(here.glob("*"))
    for folder in here.parents:
        found |= {*folder.glob("evil*"), *folder.glob("train[AB]*")}
    return found


def fuzz_zips(count):
    """Unpack so many damaged and hostile data sets, as a download does; nothing may be written beside their folder."""
    photos = [data for data in sample_images() if data.startswith(b"\x89PNG")]
    rng = random.Random("zips")
    others = [make_zip(rng, photos) for _ in range(20)]
    root = Path("fuzzed_sets")
    root.mkdir()
    around = all_around()
    usual = prepare.fetch

    def read_one(i):
        rng = random.Random(f"zip-{i}")
        data = make_zip(rng, photos)
        if rng.random() < 0.7:
            data = damage(data, others, rng)
        prepare.fetch = lambda url, part: part.write_bytes(data)
        code = 0
        try:
            with one_line_at_most("error: ") as lines:
                prepare.main(["download", "set", "--url", "http://host/set.zip", "--data_root", str(root)])
        except SystemExit as error:
            code = error.code
        finally:
            prepare.fetch = usual
        left = {path.name for path in root.iterdir()}
        strange = {path.name for path in root.glob("set/*")} - {*prepare.SPLITS}
        strange |= {path.name for path in root.rglob("*") if path.is_symlink()}
        shutil.rmtree(root)
        root.mkdir()
        if all_around() != around or strange or left - {"set", ".set.zip.part"}:
            raise AssertionError(f"written beside the data set: {all_around() - around or strange or left}")
        if code not in (0, 1, 2) or (code > 0) != bool(lines) or (code > 0 and "set" in left):
            raise AssertionError(f"exit code {code}, {lines}, left {left}")
        if code == 1 and "make room" not in lines[0]:
            raise AssertionError(f"exit code 1: {lines[0]}")
        if code:
            raise Refused

    return tally("fuzzed zips", count, read_one, Refused)


def quietly(function, count):
    """Call one of the above and print only what it counted or found wrong; returns what it returns."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = function(count)
    lines = said.getvalue().splitlines()
    print("\n".join(line for line in lines if re.match(r"([0-9]+ )?fuzzed ", line)), flush=True)
    return result


def fuzz(args):
    """Damaged images, logs, run.json and zips; damaged, edited and malicious checkpoints and weights."""
    failed = fuzz_images(args.images)
    tracebacks, appeared = quietly(fuzz_files, args.files)
    print(f"files that appeared: {sorted(map(str, appeared))}")
    failed += tracebacks + len(appeared)
    for function, count in ((fuzz_logs, args.csv), (fuzz_descriptions, args.json), (fuzz_zips, args.zips)):
        failed += quietly(function, count) if count else 0
    raise SystemExit(bool(failed))


def watchdog(args):
    """Learning rate 1, a generator frozen to a constant, and with --demo the whole demo run."""
    if args.demo:
        line = next(x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("DEMO := "))
        shutil.rmtree("datasets")
        synthetic.draw_dataset(Path("datasets"))
        finish(line.removeprefix("DEMO := ").split(), "demo.log")
        print(f"demo: {Path('demo.log').read_text().count('warning: ')} warnings")
        return
    usual = train.make_nets
    words = [*SMALL, "--num_epochs", "3", "--steps_per_epoch", "30"]

    def constant(*given):
        nets = usual(*given)
        torch.nn.init.zeros_(nets["G_AB"].head[1].weight)
        return nets

    for name, more in (("healthy", []), ("lr1", ["--lr", "1.0"]), ("constant", ["--freeze", "head"])):
        train.make_nets = constant if name == "constant" else usual
        code = wait(spawn([*words, *more, "--run_name", name], f"{name}.log"), 3600)
        lines = [line.strip() for line in lines_of(f"{name}.log") if "warning: " in line or "error: " in line]
        first = f": {lines[0]}" if lines else ""
        print(f"{name}: exit code {code}, {len(lines)} lines in 3 epochs{first}", flush=True)


def start_with_weights_only(words, nets):
    """Save a fresh run whose networks alone are those of another one's state, as a plain script would go on."""
    args, model = new_model([*words, "--run_name", "weights_only"])
    for name, net in model.nets.items():
        net.load_state_dict(nets[name])
    saver = train.make_saver(args, "train")
    saver.folder.mkdir()
    saver.save(model, Progress(), Meter().state_dict(), lambda: None)


def plain(args):
    """Pull the plug after half of the steps: exact resume beside a script that had saved the weights only.

    Exact resume is shown by the uninterrupted run, to which it is equal bit for bit (see kills and signals).
    """
    train.LOG_EVERY = 10
    words = [*SMALL, "--steps_per_epoch", "200", "--num_epochs", "4"]
    finish([*words, "--checkpoint_interval", "2", "--run_name", "whole"])
    half = load_state(Path("saved_models/whole/epoch_0002.pt"))
    middle = half["step"]
    start_with_weights_only(words, half["nets"])
    argv = ["--dataset_name", "day2night", "--run_name", "weights_only", "--start_from", "latest", "--device", "cpu"]
    pid = spawn(argv, "log")
    while latest("weights_only")["step"] < middle:
        time.sleep(1)
    os.kill(pid, signal.SIGTERM)
    wait(pid, 600)
    rows = {name: read_losses(Path(f"saved_models/{name}/losses.csv")) for name in ("whole", "weights_only")}
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
    for label, (colour, words) in styles.items():
        near = [row for row in rows[label] if abs(row["step"] - middle) <= 400]
        steps = [row["step"] for row in near]
        axes.plot(steps, [row[name] for row in near], color=colour, linewidth=1, label=words)
    axes.axvline(middle, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xlabel("step")
    axes.set_title(name)
    axes.grid(alpha=0.3)


def print_resume(rows, name, middle):
    """Print the means of a loss before and after the interruption, and when it is back where it was."""
    before = np.mean([row[name] for row in rows["whole"] if middle - 100 < row["step"] <= middle])
    for label in ("whole", "weights_only"):
        after = [row[name] for row in rows[label] if middle < row["step"] <= middle + 100]
        found = f"{before:.3f} in the 100 steps before, {np.mean(after):.3f} after, highest {max(after):.3f}"
        print(f"{name}, {label}: {found}")
    recovered = [row["step"] - middle for row in rows["weights_only"] if row[name] <= before]
    print(f"{name}: first back at its earlier mean after {min(recovered, default=None)} steps")


COMMANDS = {
    **{"kills": kills, "signals": signals, "disk": disk, "images": bad_images, "fuzz": fuzz},
    **{"watchdog": watchdog, "plain": plain},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--folder", type=Path, default=Path("faults"), help="where all happens (default: ./faults)")
    parser.add_argument("--count", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--longest", type=float, default=3.0, help="longest life after a start, s (default: 3)")
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
