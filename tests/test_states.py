"""Stages in any order, stopped and damaged in between: what a run leaves stays true, whatever came before."""

import hashlib
import math
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from breakage import before_steps
from conftest import TINY, differences, make_dataset, noise_image
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tiny_runs import run_tiny, state_of

import distill
import export
import test as test_stage
import train
from checkpoints import RUNS, load_state
from progress import read_losses
from utils import InputError
from weights import load_generator

STEPS = 2  # in an epoch
RATE = 2e-4
SAVED = RUNS / "tiny"
CPU = ("--device", "cpu", "--precision", "fp32")
START = ("--dataset_name", "tiny", *TINY, "--load_scale", 1, "--checkpoint_interval", 1)
MEASURE_OF = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
DEFAULTS = {
    **{"num_epochs": 200, "decay_epoch": None, "norm": "instance", "ema": 0.0, "lambda_gp": 0.0, "watch": None},
    **{"eval_interval": 0, "eval_metrics": "cycle,identity", "best_by": None},
}


# ---------------------------------------------------------------------------------------------
# What is drawn

METRICS = st.sampled_from(["cycle", "identity", "paired", "losses", "cycle,paired", "losses,paired,cycle,identity"])
EVALUATIONS = {  # that are accepted
    "none": {},
    "unused": {"eval_interval": 1, "eval_metrics": "paired"},
    "PSNR": {"eval_interval": 1, "eval_metrics": "paired,losses", "best_by": "PSNR"},
    "SSIM": {"eval_interval": 1, "eval_metrics": "losses,paired,cycle", "best_by": "SSIM"},
    "cycle": {"eval_interval": 1, "best_by": "cycle"},
    "loss_G": {"eval_interval": 1, "eval_metrics": "losses", "best_by": "loss_G"},
}
WAYS = st.sampled_from(["delete", "cut", "cut off", "empty", "junk", "spill"])
FRESH = st.fixed_dictionaries(
    {"num_epochs": st.integers(1, 3)},
    optional={
        "norm": st.just("batch"),
        "ema": st.just(0.5),
        "watch": st.just("photo.png"),
        "decay_epoch": st.integers(0, 3),
    },
)
EVALUATED = st.sampled_from(list(EVALUATIONS)).map(EVALUATIONS.get)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "num_epochs": st.integers(1, 4),
        "eval_metrics": METRICS,
        "best_by": st.sampled_from(list(MEASURE_OF)),
        "eval_interval": st.integers(0, 2),
        "lambda_gp": st.sampled_from([0.0, 0.1]),
        "ema": st.sampled_from([0.0, 0.5]),
        "watch": st.sampled_from(["photo.png", "gone.png"]),
        "decay_epoch": st.integers(0, 3),
    },
)
STOPS = st.sampled_from([signal.SIGTERM, signal.SIGINT])
DURING = st.sampled_from(["losses.csv", "latest.pt", "previous.pt", "best.pt", "G_AB.safetensors", "run.json"])
BETWEEN = DURING | st.sampled_from(["losses.csv", "measures.csv", "epoch_0001.pt", "G_BA.safetensors", "../../photo.png"])
EVENTS = st.none() | st.tuples(st.integers(1, 5), STOPS | st.tuples(DURING, WAYS))
EPOCHS = st.sampled_from(["latest", "best", "1", "2", "3"])


# ---------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Saved:
    """What is known of a state: where it stands, the flags in force, the scores by --best_by that best.pt is chosen from."""

    epoch: int = 0
    step: int = 0
    flags: dict = field(default_factory=lambda: DEFAULTS)
    scores: dict[int, float] = field(default_factory=dict)  # by epoch
    penalties: int = 0  # steps with a gradient penalty


def better_of(best_by, scores):
    """The epochs that may be called the best, for measures.csv rounds."""
    best = (max if best_by in ("PSNR", "SSIM") else min)(scores.values())
    return {epoch for epoch, score in scores.items() if math.isclose(score, best, rel_tol=1e-5)}


def score_of(best_by, row):
    values = [row[name] for name in (best_by, f"{best_by}_A", f"{best_by}_B") if name in row]
    return sum(values) / len(values)


def decay_of(flags):
    half = flags["num_epochs"] // 2
    return half if flags["decay_epoch"] is None else flags["decay_epoch"]


def rate_after(epoch, flags):
    """The learning rate of the epoch that follows `epoch` finished ones."""
    decay = decay_of(flags)
    if epoch <= decay:
        return RATE
    return RATE * (flags["num_epochs"] - epoch) / (flags["num_epochs"] - decay)


def is_refused(flags, given):
    """Whether these flags contradict each other."""
    needed = MEASURE_OF.get(flags["best_by"])
    evaluated = flags["eval_interval"] and needed in flags["eval_metrics"].split(",")
    if needed and not evaluated and (flags["eval_interval"] or "best_by" in given):
        return True
    if flags["decay_epoch"] is not None and flags["decay_epoch"] > flags["num_epochs"]:
        return True
    return "watch" in given and not is_photo(Path(given["watch"]))


def is_photo(path):
    return path.is_file() and path.read_bytes() == PHOTO


def words_of(flags):
    """Flags as on a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(*left_out):
    """Everything in saved_models: contents and times by path."""
    found = {}
    for path in RUNS.rglob("*"):
        if path.is_file() and path.name not in (".lock", *left_out):
            found[path] = (digest(path), path.stat().st_mtime_ns)
    return found


def exit_code(main, *argv):
    try:
        main([str(word) for word in argv])
    except SystemExit as error:
        return error.code
    return 0


JUNK = b'"junk,\n1,2,3\n\xff\x00,,,,\nepoch\n'
PHOTO = b""  # contents of the watched photo, once it is made


def harm(path, way):
    """Damage a file as disks and people do; all names of a file that is cut share the damage."""
    data = path.read_bytes()
    if way == "delete":
        path.unlink()
    elif way.startswith("cut") or way == "empty":
        fraction = {"cut": 0.5, "cut off": 0.95, "empty": 0}[way]
        os.truncate(path, int(fraction * len(data)))
    else:
        path.unlink()
        middle = len(data) // 2 if way == "spill" else 0
        path.write_bytes(data[:middle] + JUNK + (data[middle:] if way == "spill" else b""))


class Stages(RuleBasedStateMachine):
    """A data set, a run named tiny and its student; rules are what people do, invariants what they rely on."""

    def __init__(self):
        super().__init__()
        self.home = Path.cwd()
        self.folder = tempfile.mkdtemp(dir=self.home)
        os.chdir(self.folder)
        tiny = make_dataset(Path("datasets/tiny"), (4, 3, 3, 2), (18, 16))
        noise_image("small", (9, 8)).save(tiny / "testA" / "1.png")  # too small for SSIM
        noise_image("photo").save("photo.png")
        global PHOTO
        PHOTO = Path("photo.png").read_bytes()
        self.known: dict[str, Saved] = {}  # states by their digest
        self.harmed: set[str] = set()  # digests of what was damaged
        self.sound: set[str] = set()  # of what was seen to load
        self.scores: dict[int, float] = {}  # that best.pt is to be chosen from
        self.best_by = None
        self.best_lost = False  # by damage, since the last start

    def teardown(self):
        os.chdir(self.home)
        shutil.rmtree(self.folder)

    # -- what people do ----------------------------------------------------------------------

    @initialize(fresh=FRESH, evaluated=EVALUATED, event=EVENTS)
    def begin(self, fresh, evaluated, event):
        self.start(fresh, evaluated, event, overwrite=False)

    @rule(fresh=FRESH, evaluated=EVALUATED, event=EVENTS, overwrite=st.booleans())
    def start(self, fresh, evaluated, event, overwrite):
        given = {**fresh, **evaluated}
        flags = {**DEFAULTS, **given}
        refused = is_refused(flags, given) or (SAVED.exists() and not overwrite)
        words = [*START, *words_of(given), *(["--overwrite"] if overwrite else [])]
        self.scores = self.scores if refused else {}
        self.train(words, Saved(flags=flags), refused, event)

    @rule(changes=CHANGES, event=EVENTS)
    def resume(self, changes, event):
        self.go_on("latest", changes, event)

    @rule(epoch=EPOCHS, changes=CHANGES, event=EVENTS)
    def go_back(self, epoch, changes, event):
        self.go_on(epoch, changes, event)

    @rule(epoch=EPOCHS, metrics=METRICS)
    def look(self, epoch, metrics):
        words = ["--run_name", "tiny", "--epoch", epoch, "--metrics", metrics, "--num_test", 2, *CPU]
        before = contents()
        code = exit_code(test_stage.main, *words)
        assert contents() == before
        assert code == 0 if self.is_whole() and self.state_path(epoch) else code in (0, 2)

    @rule(epoch=EPOCHS)
    def ship(self, epoch):
        before = contents()
        code = exit_code(export.main, "--run_name", "tiny", "--epoch", epoch, "--to", "junyanz")
        after = contents("latest_net_G_A.pth")
        assert after == {path: what for path, what in before.items() if path in after}
        assert code == 0 if self.is_whole() and self.state_path(epoch) else code in (0, 2)

    @rule(go_on=st.booleans())
    def distil(self, go_on):
        how = ["--start_from", "latest", "--num_epochs", 2] if go_on else ["--overwrite", "--num_epochs", 1]
        before = {path: what for path, what in contents().items() if path.parent == SAVED}
        words = ["--teacher", "tiny", "--student_residual", 1, "--steps_per_epoch", 1, *how, *CPU]
        code = exit_code(distill.main, *words)
        assert {path: what for path, what in contents().items() if path.parent == SAVED} == before
        assert code == 0 if self.state_path("latest") and not go_on else code in (0, 2)

    @rule(name=BETWEEN, way=WAYS)
    def damage(self, name, way):
        path = SAVED / name
        if not path.is_file() or path.suffix in (".pt", ".safetensors") and way == "cut off":
            return
        self.best_lost |= (SAVED / "best.pt").exists() and path.samefile(SAVED / "best.pt")
        harm(path, way)
        if path.exists():
            self.harmed.add(digest(path))

    # -- training ----------------------------------------------------------------------------

    def is_good(self, path):
        return path.is_file() and digest(path) not in self.harmed

    def is_whole(self):
        return SAVED.exists() and all(map(self.is_good, SAVED.glob("*.*")))

    def state_path(self, epoch):
        """The file that --start_from takes, if there is a good one."""
        names = {"latest": ["latest.pt", "previous.pt"], "best": ["best.pt"]}
        paths = [SAVED / name for name in names.get(epoch, [f"epoch_000{epoch}.pt"])]
        return next(filter(self.is_good, paths), None)

    def go_on(self, epoch, changes, event):
        path = self.state_path(epoch)
        words = ["--run_name", "tiny", "--dataset_name", "tiny", "--start_from", epoch, "--device", "cpu"]
        words += words_of(changes)
        if path is None:
            self.train(words, Saved(), True, event)
            return
        saved = self.known[digest(path)]
        flags = dict(saved.flags)
        if flags["decay_epoch"] == flags["num_epochs"] // 2:
            flags["decay_epoch"] = None  # counts as never typed
        flags |= changes
        refused = is_refused(flags, changes)
        idle = saved.epoch >= flags["num_epochs"]
        if not refused and not idle:
            self.scores = saved.scores if flags["best_by"] == saved.flags["best_by"] else {}
            self.scores = dict(self.scores) if self.best_is_of(flags["best_by"]) else {}
        self.train(words, Saved(saved.epoch, saved.step, flags, {}, saved.penalties), refused, event)

    def train(self, words, begun, refused, event):
        """Call train.py, from where `begun` says, and compare what it leaves with what it should."""
        flags = begun.flags
        last = STEPS * flags["num_epochs"]
        code = 0
        actions = {}
        if event and isinstance(event[1], tuple):
            actions = {event[0]: lambda: self.damage(*event[1])}
        elif event and begun.step + event[0] <= last:
            actions = {event[0]: lambda: signal.raise_signal(event[1])}
            last = begun.step + event[0]
            code = 128 + event[1]
        before = contents()
        rows = self.rows("losses.csv", begun.step)
        if refused or begun.epoch >= flags["num_epochs"]:
            assert exit_code(train.main, *words) == (2 if refused else 0)
            assert contents() == before
            return
        self.best_lost = False
        with before_steps(actions):
            assert exit_code(train.main, *words) == code
        self.check_losses(rows, begun, last)
        self.take_scores(begun, last)
        self.check_state(begun, last)

    def rows(self, name, last_step):
        path = SAVED / name
        return [row for row in read_losses(path) if row["step"] <= last_step] if path.is_file() else []

    def check_losses(self, before, begun, last):
        rows = read_losses(SAVED / "losses.csv") if self.is_good(SAVED / "losses.csv") else None
        ended = range(begun.step // STEPS, last // STEPS)  # epochs before each that was finished now
        if rows is None:  # damaged after the last save, which therefore came before an end
            assert not ended
            return
        kept = [row["step"] for row in before]
        assert [row["step"] for row in rows] == kept + [STEPS * (epoch + 1) for epoch in ended]
        for epoch, row in zip(ended, rows[len(kept) :], strict=True):
            assert row["epoch"] == epoch + 1
            assert row["lr"] == pytest.approx(rate_after(epoch, begun.flags), rel=1e-5)

    def take_scores(self, begun, last):
        """Note what was evaluated now."""
        flags = begun.flags
        interval = flags["eval_interval"] or math.inf
        ended = range(begun.step // STEPS + 1, last // STEPS + 1)
        evaluated = [epoch for epoch in ended if epoch % interval == 0]
        rows = {row["epoch"]: row for row in self.rows("measures.csv", last)}
        assert set(evaluated) <= rows.keys()
        self.best_by = flags["best_by"]
        if self.best_by:
            self.scores |= {epoch: score_of(self.best_by, rows[epoch]) for epoch in evaluated}

    def check_state(self, begun, last):
        """Look at the newest state and the generators beside it, and note all states that are new."""
        penalties = begun.penalties + (last - begun.step if begun.flags["lambda_gp"] else 0)
        state = load_state(SAVED / "latest.pt")
        assert (state["epoch"], state["loader"]["place"]) == divmod(last, STEPS)
        assert state["step"] == last
        for name in ("G_AB", "G_BA"):
            _, metadata = load_generator(SAVED / f"{name}.safetensors")
            assert metadata["step"] == last
        for name, tensors in state["nets"].items():
            passes = 3 * last + (penalties if name.startswith("D") else 0)
            counts = {int(x) for key, x in tensors.items() if key.endswith("num_batches_tracked")}
            assert counts <= {passes}, f"{name}: its normalisation saw images that it does not learn from"
        for path in SAVED.glob("*.pt"):
            what = digest(path)
            if what not in self.known and what not in self.harmed:
                state = load_state(path)
                scores = {epoch: score for epoch, score in self.scores.items() if epoch <= state["epoch"]}
                self.known[what] = Saved(state["epoch"], state["step"], begun.flags, scores, penalties)

    # -- what they rely on -------------------------------------------------------------------

    def best_is_of(self, best_by):
        """Whether best.pt is the best of the scores."""
        path = SAVED / "best.pt"
        if not (self.scores and self.is_good(path)):
            return False
        saved = self.known[digest(path)]
        same = saved.scores == {epoch: score for epoch, score in self.scores.items() if epoch <= saved.epoch}
        return same and saved.epoch in better_of(best_by, self.scores)

    @invariant()
    def the_best_is_kept(self):
        path = SAVED / "best.pt"
        if not self.scores or self.best_lost:
            return
        assert self.best_is_of(self.best_by), f"expected the best by {self.best_by} of {self.scores}"
        best = load_state(path)["best"]
        assert (best["metric"], best["epoch"]) == (self.best_by, self.known[digest(path)].epoch)
        assert best["score"] == pytest.approx(self.scores[best["epoch"]], rel=1e-5)

    @invariant()
    def what_was_saved_loads(self):
        for path in (*RUNS.glob("*/*.pt"), *RUNS.glob("*/*.safetensors")):
            what = digest(path)
            if what in self.harmed | self.sound:
                continue
            try:
                load_state(path) if path.suffix == ".pt" else load_generator(path)
            except InputError as error:
                raise AssertionError(f"{path} was saved and not damaged: {error}") from error
            self.sound.add(what)

    @invariant()
    def nothing_is_left_half_written(self):
        assert not [*Path().rglob(".*.tmp")]


# ---------------------------------------------------------------------------------------------
# Running it

USUAL = settings(
    max_examples=15,
    stateful_step_count=5,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def light(no_plots, monkeypatch):
    """Leave out what takes time and is not looked at here: synced disks, drawn grids and pages."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for name in ("progress.draw_grid", "progress.save_image", "progress.write_progress"):
        monkeypatch.setattr(name, lambda *args: None)


@pytest.mark.usefixtures("light")
def test_stages_in_any_order_leave_what_is_true():
    run_state_machine_as_test(Stages, settings=USUAL)


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_many_stages_in_any_order_leave_what_is_true():
    run_state_machine_as_test(Stages, settings=settings(USUAL, max_examples=150, stateful_step_count=7))


def test_evaluating_by_losses_leaves_a_batch_norm_alone(tiny, no_plots):
    flags = ("--num_epochs", 2, "--norm", "batch")
    run_tiny(*flags, "--run_name", "plain")
    run_tiny(*flags, "--run_name", "watched", "--eval_interval", 1, "--eval_metrics", "losses")
    assert differences(state_of("plain")["nets"], state_of("watched")["nets"]) == []
