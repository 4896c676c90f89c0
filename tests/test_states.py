"""Stages in any order, stopped and damaged in between: what a run leaves stays true, whatever came before.

Rules are what people do, invariants what they rely on; the model knows flags, steps and scores, and no file of ours.
"""

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
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_runs import run_tiny, state_of

import distill
import export
import test as test_stage
import train
from toolkit.checkpoints import RUNS, load_state
from toolkit.monitor import read_losses
from toolkit.weights import load_generator
from utils import InputError

STEPS = 2  # in an epoch
RATES = [2e-4, 0.05]  # the second spoils what was learned, so that a later epoch is not always the better one
SAVED = RUNS / "tiny"
CPU = ("--device", "cpu", "--precision", "fp32")
SMALL = ("--n_downsampling", 1, "--buffer_size", 3, "--load_scale", 1)
START = ("--dataset_name", "tiny", *TINY, *SMALL, "--checkpoint_interval", 1)
RESUME = ("--dataset_name", "tiny", "--device", "cpu")
MEASURE_OF = {"PSNR": "paired", "SSIM": "paired", "cycle": "cycle", "identity": "identity", "loss_G": "losses"}
DEFAULTS = {
    **{"num_epochs": 200, "decay_epoch": None, "lambda_gp": 0.0, "lr": RATES[0]},
    **{"eval_interval": 0, "eval_metrics": "cycle,identity", "best_by": None},
}
CLOSE = {"rel_tol": 1e-5, "abs_tol": 1e-6}  # of scores: measures.csv rounds
JUNK = b'"junk,\n1,2,3\n\xff\x00,,,,\nepoch\n'


# ---------------------------------------------------------------------------------------------
# What is drawn


def one(**flag):
    return st.fixed_dictionaries(flag)


METRICS = st.sampled_from(["cycle", "identity", "paired", "losses", "losses,paired,cycle,identity"])
EVALUATIONS = st.sampled_from(
    [
        {"eval_interval": 1, "eval_metrics": "paired,losses", "best_by": "PSNR"},
        {"eval_interval": 1, "eval_metrics": "cycle,paired", "best_by": "SSIM"},
        {"eval_interval": 1, "eval_metrics": "cycle", "best_by": "cycle"},
        {"eval_interval": 1, "eval_metrics": "losses", "best_by": "loss_G"},
        {"eval_interval": 2, "eval_metrics": "identity", "best_by": "identity"},
        {"eval_interval": 1, "eval_metrics": "losses"},
        {"eval_interval": 0},
    ]
)
BUILDS = st.fixed_dictionaries(
    {"num_epochs": st.sampled_from([2, 1, 3])},
    optional={"norm": st.just("batch"), "ema": st.just(0.5), "watch": st.just("photo.png"), "decay_epoch": st.just(1)},
)
CHANGES = st.just({}) | st.one_of(
    EVALUATIONS,
    one(eval_metrics=METRICS),
    one(eval_metrics=METRICS, best_by=st.sampled_from(list(MEASURE_OF))),
    one(eval_interval=st.integers(0, 2)),
    one(lambda_gp=st.sampled_from([0.1, 0.0]), ema=st.sampled_from([0.5, 0.0])),
    one(watch=st.sampled_from(["photo.png", "gone.png"])),
    one(decay_epoch=st.integers(0, 3)),
)
MORE = st.sampled_from([1, 2, 3, None, 0, -1])  # epochs than the state has; None: --num_epochs is not given
STOPS = st.sampled_from([signal.SIGTERM, signal.SIGINT])
FILES = st.sampled_from(["losses.csv", "latest.pt", "losses.csv", "best.pt", "previous.pt", "G_AB.safetensors"])
OTHERS = st.sampled_from(["measures.csv", "run.json", "measures.csv", "epoch_0001.pt", "G_BA.safetensors"])
WAYS = st.sampled_from(["delete", "cut", "delete", "cut off", "empty", "junk", "spill"])
AT = st.integers(1, 4)  # before which step
EVENTS = st.none() | st.tuples(AT, STOPS) | st.tuples(AT, st.tuples(FILES, WAYS))
EPOCHS = st.sampled_from(["1", "best", "2", "latest"])
USES = st.one_of(
    st.tuples(st.just(test_stage), EPOCHS, METRICS),
    st.tuples(st.just(export), EPOCHS),
    st.tuples(st.just(distill), st.booleans()),
)


# ---------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Saved:
    """What is known of a state: how far it is, the flags in force, the scores that best.pt is chosen from."""

    epoch: int = 0
    step: int = 0
    flags: dict = field(default_factory=lambda: DEFAULTS)
    scores: dict[int, float] = field(default_factory=dict)  # by epoch; of --best_by
    penalties: int = 0  # steps with a gradient penalty


def best_epochs(best_by, scores):
    """The epochs that may be called the best; more than one where measures.csv rounds the difference away."""
    best = (max if best_by in ("PSNR", "SSIM") else min)(scores.values())
    return [epoch for epoch, score in scores.items() if math.isclose(score, best, **CLOSE)]


def score_of(best_by, row):
    values = [row[name] for name in (best_by, f"{best_by}_A", f"{best_by}_B") if name in row]
    return sum(values) / len(values)


def rate_after(epoch, flags):
    """The learning rate of the epoch that follows `epoch` finished ones."""
    last = flags["num_epochs"]
    decay = last // 2 if flags["decay_epoch"] is None else flags["decay_epoch"]
    return flags["lr"] * (1.0 if epoch <= decay else (last - epoch) / (last - decay))


def is_refused(flags, given):
    """Whether these flags contradict each other."""
    needed = MEASURE_OF.get(flags["best_by"])
    evaluated = flags["eval_interval"] and needed in flags["eval_metrics"].split(",")
    if needed and not evaluated and (flags["eval_interval"] or "best_by" in given):
        return True
    if flags["decay_epoch"] is not None and flags["decay_epoch"] > flags["num_epochs"]:
        return True
    return "watch" in given and not Path(given["watch"]).exists()


def inherited(flags):
    """The flags of a state as a resumed run takes them: half of the epochs count as a decay that nobody typed."""
    typed = flags["decay_epoch"] != flags["num_epochs"] // 2
    return {**flags, "decay_epoch": flags["decay_epoch"] if typed else None}


def words_of(flags):
    """Flags as on a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def exit_code(main, *argv):
    try:
        main([str(word) for word in argv])
    except SystemExit as error:
        return error.code
    return 0


# ---------------------------------------------------------------------------------------------
# Files


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder=RUNS, left_out=()):
    """Everything below a folder: contents and times by path."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (".lock", *left_out):
            found[path] = (digest(path), path.stat().st_mtime_ns)
    return found


def harm(path, way):
    """Damage a file as disks and people do; all names of a file that is cut share the damage."""
    data = path.read_bytes()
    if way in ("cut", "cut off", "empty"):
        length = {"cut": len(data) // 2, "cut off": len(data) - 9, "empty": 0}
        os.truncate(path, max(0, length[way]))
        return
    path.unlink()
    middle = len(data) // 2
    if way == "junk":
        path.write_bytes(JUNK)
    elif way == "spill":
        path.write_bytes(data[:middle] + JUNK + data[middle:])


class Stages(RuleBasedStateMachine):
    """A data set, a run named tiny, and its student."""

    def __init__(self):
        super().__init__()
        self.home = Path.cwd()
        self.folder = tempfile.mkdtemp(dir=self.home)
        os.chdir(self.folder)
        tiny = make_dataset(Path("datasets/tiny"), (4, 3, 3, 2), (18, 16))
        noise_image("small", (9, 8)).save(tiny / "testA" / "1.png")  # test.py has no SSIM for it
        noise_image("photo").save("photo.png")
        self.known: dict[str, Saved] = {}  # states by digest
        self.facts: dict[str, dict] = {}  # what files say that were seen to load, by digest
        self.harmed: set[str] = set()  # digests of what was damaged
        self.scores: dict[int, float] = {}  # that best.pt shall be the best of
        self.best_by = None
        self.best_harmed = False  # since the last training began
        self.starts = 0  # few, so that most rules go on with what is there

    def teardown(self):
        os.chdir(self.home)
        shutil.rmtree(self.folder)

    # -- what people do ----------------------------------------------------------------------

    @initialize(build=BUILDS, evaluation=EVALUATIONS, event=EVENTS)
    def begin(self, build, evaluation, event):
        self.start(build, evaluation, event, overwrite=False)

    @precondition(lambda self: self.starts < 2)
    @rule(build=BUILDS, evaluation=EVALUATIONS, event=EVENTS, overwrite=st.booleans())
    def start(self, build, evaluation, event, overwrite):
        self.starts += 1
        given = {**build, **evaluation}
        begun = Saved(flags={**DEFAULTS, **given})
        refused = is_refused(begun.flags, given) or (SAVED.exists() and not overwrite)
        words = [*START, *words_of(given), *(["--overwrite"] if overwrite else [])]
        self.train(words, begun, {}, refused, event)

    @rule(more=MORE, changes=CHANGES, event=EVENTS)
    def resume(self, more, changes, event):
        self.go_on("latest", more, changes, event)

    @rule(epoch=EPOCHS, more=MORE, changes=CHANGES, event=EVENTS, lr=st.sampled_from(RATES))
    def go_back(self, epoch, more, changes, event, lr):
        there = self.file_of(epoch).exists()
        self.go_on(epoch if there else "latest", more, {"lr": lr, **changes}, event)

    @rule(use=USES)
    def use(self, use):
        stage, *how = use
        if stage is distill:
            self.distil(*how)
        elif stage is export:
            words = ("--run_name", "tiny", "--epoch", *how, "--to", "junyanz")
            self.look(export.main, how[0], words, left_out=("latest_net_G_A.pth",))
        else:
            words = ("--run_name", "tiny", "--epoch", how[0], "--metrics", how[1], "--num_test", 2, *CPU)
            self.look(test_stage.main, how[0], words)

    @rule(name=FILES | OTHERS, way=WAYS)
    def damage(self, name, way):
        path = SAVED / name
        if not path.is_file():
            Path("photo.png").unlink(missing_ok=True)  # damage all the same
            return
        best = SAVED / "best.pt"
        self.best_harmed |= best.exists() and path.samefile(best)
        harm(path, way)
        if path.exists():
            self.harmed.add(digest(path))

    # -- looking and distilling --------------------------------------------------------------

    def is_good(self, path):
        return path.is_file() and digest(path) not in self.harmed

    def file_of(self, epoch):
        return SAVED / (f"{epoch}.pt" if epoch in ("latest", "best") else f"epoch_000{epoch}.pt")

    def state_path(self, epoch):
        """The file that --start_from takes, if there is a good one."""
        paths = [self.file_of(epoch), *([SAVED / "previous.pt"] if epoch == "latest" else [])]
        return next(filter(self.is_good, paths), None)

    def look(self, main, epoch, words, left_out=()):
        whole = all(map(self.is_good, SAVED.glob("G_??.safetensors")))
        before = contents(left_out=left_out)
        code = exit_code(main, *words)
        assert contents(left_out=left_out) == before
        assert code == 0 if whole and self.state_path(epoch) else code in (0, 2)

    def distil(self, go_on):
        how = ("--start_from", "latest", "--num_epochs", 2) if go_on else ("--overwrite", "--num_epochs", 1)
        before = contents(SAVED)
        words = ("--teacher", "tiny", "--student_residual", 0, "--steps_per_epoch", 1, *how, *CPU)
        code = exit_code(distill.main, *words)
        assert contents(SAVED) == before
        assert code == 0 if self.state_path("latest") and not go_on else code in (0, 2)

    # -- training ----------------------------------------------------------------------------

    def go_on(self, epoch, more, changes, event):
        path = self.state_path(epoch)
        saved = self.known[digest(path)] if path else Saved()
        if more is not None:
            changes = {"num_epochs": max(1, saved.epoch + more), **changes}
        flags = inherited(saved.flags) | changes
        begun = Saved(saved.epoch, saved.step, flags, penalties=saved.penalties)
        scores = saved.scores if flags["best_by"] == saved.flags["best_by"] else {}
        kept = scores if self.holds_best_of(scores, flags["best_by"]) else {}
        refused = path is None or is_refused(flags, changes)
        made_up = epoch == "latest" and self.lacks_measures(saved, flags)
        self.train([*RESUME, "--start_from", epoch, *words_of(changes)], begun, kept, refused, event, made_up)

    def lacks_measures(self, saved, flags):
        """Whether a state should have been evaluated, and measures.csv knows nothing of it."""
        interval = flags["eval_interval"]
        due = interval and saved.epoch and saved.step == STEPS * saved.epoch and saved.epoch % interval == 0
        known = [row["step"] for row in self.rows("measures.csv", math.inf)]
        return bool(due) and interval == saved.flags["eval_interval"] and saved.step not in known

    def train(self, words, begun, scores, refused, event, made_up=False):
        """Call train.py, from where `begun` says, and compare what it leaves with what it should.

        scores:  those that the best is still to be chosen from
        made_up: the epoch before is evaluated, too
        """
        last = max(begun.step, STEPS * begun.flags["num_epochs"])
        if refused or (begun.step == last and not made_up):
            before = contents()
            assert exit_code(train.main, *words) == (2 if refused else 0)
            assert contents() == before
            return
        code = 0
        actions = {}
        number, what = event or (0, None)
        if isinstance(what, tuple):
            actions = {number: lambda: self.damage(*what)}
        elif what and begun.step + number <= last:
            actions = {number: lambda: signal.raise_signal(what)}
            last = begun.step + number
            code = 128 + what
        kept = [row["step"] for row in self.rows("losses.csv", begun.step)]
        self.best_harmed = False
        older = {path.stat().st_mtime_ns for path in SAVED.glob("*.pt")}
        with before_steps(actions):
            assert exit_code(train.main, *words) == code
        self.check_losses(kept, begun, last)
        self.take_scores(scores, begun, last, made_up)
        self.check_states(begun, last, older)

    def rows(self, name, last_step):
        """The rows of a log up to a step; as far as they can be read."""
        path = SAVED / name
        return [row for row in read_losses(path) if row["step"] <= last_step] if path.is_file() else []

    def check_losses(self, kept, begun, last):
        path = SAVED / "losses.csv"
        assert self.is_good(path), "the last save left it damaged"
        ended = range(begun.step // STEPS, last // STEPS)  # epochs before each that was finished now
        rows = read_losses(path)
        assert [row["step"] for row in rows] == [*kept, *(STEPS * (epoch + 1) for epoch in ended)]
        for epoch, row in zip(ended, rows[len(kept) :], strict=True):
            assert row["epoch"] == epoch + 1
            assert row["lr"] == pytest.approx(rate_after(epoch, begun.flags), rel=1e-5)

    def take_scores(self, scores, begun, last, made_up):
        """Note what was evaluated now, and by what the best is chosen."""
        interval = begun.flags["eval_interval"] or math.inf
        ended = range(begun.step // STEPS + (0 if made_up else 1), last // STEPS + 1)
        rows = {row["epoch"]: row for row in self.rows("measures.csv", last)}
        evaluated = {epoch: rows[epoch] for epoch in ended if epoch % interval == 0}
        self.best_by = begun.flags["best_by"]
        self.scores = dict(scores)
        if self.best_by:
            self.scores |= {epoch: score_of(self.best_by, row) for epoch, row in evaluated.items()}

    def check_states(self, begun, last, older):
        """Look at the newest state and the generators beside it, and note all states that are new.

        older: times of those that were there before; a branch that is trained again saves the same bytes again
        """
        penalised = bool(begun.flags["lambda_gp"])  # each of the steps
        latest = self.read(SAVED / "latest.pt")
        assert (latest["epoch"], latest["place"], latest["step"]) == (*divmod(last, STEPS), last)
        if self.scores:
            assert self.is_best(latest["best"])
        for name in ("G_AB", "G_BA"):
            assert self.read(SAVED / f"{name}.safetensors")["step"] == last
        for name, counts in latest["passes"].items():
            looked = 3 * last + (begun.penalties + penalised * (last - begun.step) if name.startswith("D") else 0)
            assert counts <= {looked}, f"{name}: its batch norm saw images that it does not learn from"
        for path in SAVED.glob("*.pt"):
            if self.is_good(path) and path.stat().st_mtime_ns not in older:
                facts = self.read(path)
                scores = {epoch: score for epoch, score in self.scores.items() if epoch <= facts["epoch"]}
                penalties = begun.penalties + penalised * (facts["step"] - begun.step)
                self.known[digest(path)] = Saved(facts["epoch"], facts["step"], begun.flags, scores, penalties)

    def read(self, path):
        """What a file says; nobody damaged it, so it has to load."""
        what = digest(path)
        if what not in self.facts:
            try:
                self.facts[what] = load_generator(path)[1] if path.suffix == ".safetensors" else facts_of(path)
            except InputError as error:
                raise AssertionError(f"{path} was saved and not damaged: {error}") from error
        return self.facts[what]

    # -- what they rely on -------------------------------------------------------------------

    def holds_best_of(self, scores, best_by):
        """Whether best.pt is the best of some scores, and of the branch that they belong to."""
        path = SAVED / "best.pt"
        if not (scores and self.is_good(path)):
            return False
        saved = self.known[digest(path)]
        own = saved.scores == {epoch: score for epoch, score in scores.items() if epoch <= saved.epoch}
        return own and saved.epoch in best_epochs(best_by, scores)

    def is_best(self, said):
        """Whether what a state says of the best is true."""
        best = said["epoch"] in best_epochs(self.best_by, self.scores) and said["metric"] == self.best_by
        return best and math.isclose(said["score"], self.scores[said["epoch"]], **CLOSE)

    @invariant()
    def the_best_is_kept(self):
        if not self.scores or self.best_harmed:
            return
        assert self.holds_best_of(self.scores, self.best_by), (
            f"best.pt is not the best by {self.best_by} of {self.scores}"
        )
        best = self.read(SAVED / "best.pt")["best"]
        assert self.is_best(best)
        assert best["epoch"] == self.known[digest(SAVED / "best.pt")].epoch

    @invariant()
    def what_was_saved_loads(self):
        for path in (*RUNS.glob("*/*.pt"), *RUNS.glob("*/*.safetensors")):
            if self.is_good(path):
                self.read(path)

    @invariant()
    def nothing_is_left_half_written(self):
        assert not [*Path().rglob(".*.tmp")]


def facts_of(path):
    """What a whole state says; passes: how many batches each normalisation saw, by network."""
    state = load_state(path)
    passes = {}
    for name, tensors in state["nets"].items():
        passes[name] = {x.item() for key, x in tensors.items() if key.endswith("num_batches_tracked")}
    counts = {"epoch": state["epoch"], "step": state["step"], "place": state["loader"]["place"]}
    return {**counts, "best": state["best"], "passes": passes}


# ---------------------------------------------------------------------------------------------
# Running it

USUAL = settings(
    max_examples=12,
    stateful_step_count=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def light(no_plots, monkeypatch):
    """Leave out what takes time and is not looked at here: synced disks, drawn grids and pages."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for name in ("draw_grid", "save_image", "Monitor.write_index"):
        monkeypatch.setattr(f"toolkit.monitor.{name}", lambda *args: None)


@pytest.mark.usefixtures("light")
def test_stages_in_any_order_leave_what_is_true():
    run_state_machine_as_test(Stages, settings=USUAL)


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_many_stages_in_any_order_leave_what_is_true():
    run_state_machine_as_test(Stages, settings=settings(USUAL, max_examples=100, stateful_step_count=8))


def test_evaluating_by_losses_leaves_a_batch_norm_alone(tiny, no_plots):
    flags = ("--num_epochs", 2, "--norm", "batch")
    run_tiny(*flags, "--run_name", "plain")
    run_tiny(*flags, "--run_name", "watched", "--eval_interval", 1, "--eval_metrics", "losses")
    assert differences(state_of("plain")["nets"], state_of("watched")["nets"]) == []
