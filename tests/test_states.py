"""Commands in any order, with signals and damaged files in between: what a run leaves is consistent all the same.

The rules are what people do, the invariants what they rely on. The test's own model of a run knows options, steps and
scores, and none of our files.
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
from conftest import TINY, make_dataset, noise_image
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
from tiny_runs import save_run

import distill
import export
import test as test_command
import train
from toolkit.checkpoints import RUNS, load_state
from toolkit.gallery import RECORD
from toolkit.logs import read_losses
from toolkit.metrics import BEST_BY
from toolkit.weights import load_generator
from utils import InputError

STEPS = 2  # in an epoch
RATES = [2e-4, 0.05]  # the second makes networks worse, so that the last epoch is not always the best one
SAVED = RUNS / "tiny"
CPU = ("--device", "cpu", "--precision", "fp32")
SMALL = ("--n_downsampling", 1, "--buffer_size", 3, "--load_scale", 1)
START = ("--dataset_name", "tiny", *TINY, *SMALL, "--checkpoint_interval", 1)
RESUME = ("--dataset_name", "tiny", "--device", "cpu")
DEFAULTS = {
    "num_epochs": 200,
    "decay_epoch": None,
    "lr": RATES[0],
    "eval_interval": 0,
    "eval_metrics": "cycle,identity",
    "best_by": None,
}
JUNK = b'"junk,\n1,2,3\n\xff\x00,,,,\nepoch\n'


# ---------------------------------------------------------------------------------------------
# What is drawn


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
    *map(
        st.fixed_dictionaries,
        (
            {"eval_metrics": METRICS},
            {"eval_metrics": METRICS, "best_by": st.sampled_from(list(BEST_BY))},
            {"eval_interval": st.integers(0, 2)},
            {"lambda_gp": st.sampled_from([0.1, 0.0]), "ema": st.sampled_from([0.5, 0.0])},
            {"watch": st.sampled_from(["photo.png", "gone.png"])},
            {"decay_epoch": st.integers(0, 3)},
        ),
    ),
)
MORE = st.sampled_from([1, 2, 3, None, 0, -1])  # epochs than the state has; None: --num_epochs is not given
STOPS = st.sampled_from([signal.SIGTERM, signal.SIGINT])
FILES = st.sampled_from(["losses.csv", "latest.pt", "losses.csv", "best.pt", "previous.pt", "G_AB.safetensors"])
OTHERS = st.sampled_from(["measures.csv", "run.json", "measures.csv", "epoch_0001.pt", "G_BA.safetensors"])
WAYS = st.sampled_from(["delete", "halve", "delete", "cut the end", "empty", "junk", "junk inside"])
AT = st.integers(1, 4)  # before which step
EVENTS = st.none() | st.tuples(AT, STOPS) | st.tuples(AT, st.tuples(FILES, WAYS))
EPOCHS = st.sampled_from(["1", "best", "2", "latest"])
USES = st.one_of(
    st.tuples(st.just(test_command), EPOCHS, METRICS),
    st.tuples(st.just(export), EPOCHS),
    st.tuples(st.just(distill), st.booleans()),
)


# ---------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Saved:
    """What is known of a state: its progress, its options, the scores that best.pt is chosen by."""

    epoch: int = 0
    step: int = 0
    options: dict = field(default_factory=lambda: DEFAULTS)
    scores: dict[int, float] = field(default_factory=dict)  # by --best_by, of each epoch


def close(x, y):
    """Whether two scores are equal as far as measures.csv, which rounds, can tell."""
    return math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6)


def best_epochs(best_by, scores):
    """The epochs that may count as the best."""
    best = (max if best_by in ("PSNR", "SSIM") else min)(scores.values())
    return [epoch for epoch, score in scores.items() if close(score, best)]


def score_of(best_by, row):
    values = [row[name] for name in (best_by, f"{best_by}_A", f"{best_by}_B") if name in row]
    return sum(values) / len(values)


def are_comparable(options, before):
    """Whether the scores of two trainings are of one measure."""
    weights = [o.get("lambda_gp", 0.0) for o in (options, before)]
    return options["best_by"] == before["best_by"] and (options["best_by"] != "loss_G" or weights[0] == weights[1])


def learning_rate(epoch, options):
    """The learning rate of the epoch that follows `epoch` finished ones."""
    last = options["num_epochs"]
    decay = last // 2 if options["decay_epoch"] is None else options["decay_epoch"]
    return options["lr"] * (1.0 if epoch <= decay else (last - epoch) / (last - decay))


def is_refused(options, given):
    """Whether the options contradict each other."""
    needed = BEST_BY.get(options["best_by"])
    evaluated = options["eval_interval"] and needed in options["eval_metrics"].split(",")
    if needed and not evaluated and (options["eval_interval"] or "best_by" in given):
        return True
    if options["decay_epoch"] is not None and options["decay_epoch"] > options["num_epochs"]:
        return True
    return "watch" in given and not Path(given["watch"]).exists()


def command_line(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


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


def contents(folder=RUNS, ignored=".lock"):
    """All files of a folder: contents and times by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ignored)]
    return {path: (digest(path), path.stat().st_mtime_ns) for path in files}


def damage_file(path, way):
    """Damage a file as disks and people do; all names of a file that is truncated share the damage."""
    data = path.read_bytes()
    middle = len(data) // 2
    lengths = {"halve": middle, "cut the end": max(0, len(data) - 9), "empty": 0}
    if way in lengths:
        os.truncate(path, lengths[way])
        return
    path.unlink()
    if way == "junk":
        path.write_bytes(JUNK)
    elif way == "junk inside":
        path.write_bytes(data[:middle] + JUNK + data[middle:])


class Commands(RuleBasedStateMachine):
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
        self.facts: dict[str, dict] = {}  # content of files that could be loaded, by digest
        self.damaged: set[str] = set()  # digests
        self.scores: dict[int, float] = {}  # best.pt has the best of them
        self.best_by = None
        self.best_is_damaged = False  # since the last training began
        self.starts = 0  # few, so that most rules resume

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
        begun = Saved(options={**DEFAULTS, **given})
        refused = is_refused(begun.options, given) or (SAVED.exists() and not overwrite)
        argv = [*START, *command_line(given)]
        if overwrite:
            argv.append("--overwrite")
        self.train(argv, begun, {}, refused, event)

    @rule(more=MORE, changes=CHANGES, event=EVENTS)
    def resume_latest(self, more, changes, event):
        self.resume("latest", more, changes, event)

    @rule(epoch=EPOCHS, more=MORE, changes=CHANGES, event=EVENTS, lr=st.sampled_from(RATES))
    def go_back(self, epoch, more, changes, event, lr):
        exists = self.file_of(epoch).exists()
        self.resume(epoch if exists else "latest", more, {"lr": lr, **changes}, event)

    @rule(use=USES)
    def use(self, use):
        command, *how = use
        if command is distill:
            self.distil(*how)
        elif command is export:
            argv = ("--run_name", "tiny", "--epoch", *how, "--to", "junyanz")
            self.read_run(export.main, how[0], argv, written="latest_net_G_A.pth")
        else:
            argv = ("--run_name", "tiny", "--epoch", how[0], "--metrics", how[1], "--num_test", 2, *CPU)
            self.read_run(test_command.main, how[0], argv)

    @rule(name=FILES | OTHERS, way=WAYS)
    def damage(self, name, way):
        path = SAVED / name
        if not path.is_file():
            Path("photo.png").unlink(missing_ok=True)  # so that this rule always damages something
            return
        best = SAVED / "best.pt"
        self.best_is_damaged |= best.exists() and path.samefile(best)
        damage_file(path, way)
        if path.exists():
            self.damaged.add(digest(path))

    # -- testing, exporting, distilling ------------------------------------------------------

    def is_good(self, path):
        return path.is_file() and digest(path) not in self.damaged

    def file_of(self, epoch):
        return SAVED / (f"{epoch}.pt" if epoch in ("latest", "best") else f"epoch_000{epoch}.pt")

    def state_path(self, epoch):
        """The file that --start_from takes, if there is a good one."""
        paths = [self.file_of(epoch), *([SAVED / "previous.pt"] if epoch == "latest" else [])]
        return next(filter(self.is_good, paths), None)

    def read_run(self, main, epoch, argv, written=""):
        is_whole = all(map(self.is_good, SAVED.glob("G_??.safetensors"))) and self.state_path(epoch)
        before = contents(ignored=written)
        code = exit_code(main, *argv)
        assert contents(ignored=written) == before
        assert code == 0 if is_whole else code in (0, 2)

    def distil(self, resumed):
        how = ("--start_from", "latest", "--num_epochs", 2) if resumed else ("--overwrite", "--num_epochs", 1)
        before = contents(SAVED)
        argv = ("--teacher", "tiny", "--student_residual", 0, "--steps_per_epoch", 1, *how, *CPU)
        code = exit_code(distill.main, *argv)
        assert contents(SAVED) == before
        assert code == 0 if self.state_path("latest") and not resumed else code in (0, 2)

    # -- training ----------------------------------------------------------------------------

    def resume(self, epoch, more, changes, event):
        path = self.state_path(epoch)
        saved = self.known[digest(path)] if path else Saved()
        if more is not None:
            changes = {"num_epochs": max(1, saved.epoch + more), **changes}
        options = saved.options | changes
        scores = saved.scores if are_comparable(options, saved.options) else {}
        kept = scores if self.has_best_of(scores, options["best_by"]) else {}
        refused = path is None or is_refused(options, changes)
        late = epoch == "latest" and self.lacks_measures(saved, options)
        argv = [*RESUME, "--start_from", epoch, *command_line(changes)]
        self.train(argv, Saved(saved.epoch, saved.step, options), kept, refused, event, late)

    def lacks_measures(self, saved, options):
        """Whether a state should have been evaluated, and has no row in measures.csv."""
        interval = options["eval_interval"]
        due = interval and saved.epoch and saved.step == STEPS * saved.epoch and saved.epoch % interval == 0
        measured = [row["step"] for row in self.rows("measures.csv", math.inf)]
        return bool(due) and interval == saved.options["eval_interval"] and saved.step not in measured

    def train(self, argv, begun, scores, refused, event, late=False):
        """Call train.py, which starts from `begun`, and check what it leaves.

        scores: earlier ones that count for the best
        late:   the epoch before is also evaluated
        """
        last = max(begun.step, STEPS * begun.options["num_epochs"])
        if refused or (begun.step == last and not late):
            before = contents()
            assert exit_code(train.main, *argv) == (2 if refused else 0)
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
        self.best_is_damaged = False
        older = {path.stat().st_mtime_ns for path in SAVED.glob("*.pt")}
        with before_steps(actions):
            assert exit_code(train.main, *argv) == code
        self.check_losses(kept, begun, last)
        self.note_scores(scores, begun, last, late)
        self.check_states(begun, last, older)

    def rows(self, name, last_step):
        """The readable rows of a log up to a step."""
        path = SAVED / name
        return [row for row in read_losses(path) if row["step"] <= last_step] if path.is_file() else []

    def check_losses(self, kept, begun, last):
        path = SAVED / "losses.csv"
        assert self.is_good(path), "the last save left it damaged"
        ended = range(begun.step // STEPS, last // STEPS)  # numbers of epochs before each that was finished now
        rows = read_losses(path)
        assert [row["step"] for row in rows] == [*kept, *(STEPS * (epoch + 1) for epoch in ended)]
        for epoch, row in zip(ended, rows[len(kept) :], strict=True):
            assert row["epoch"] == epoch + 1
            assert row["lr"] == pytest.approx(learning_rate(epoch, begun.options), rel=1e-5)

    def note_scores(self, scores, begun, last, late):
        """Note the evaluations of a training, and by what the best is chosen."""
        interval = begun.options["eval_interval"] or math.inf
        ended = range(begun.step // STEPS + (0 if late else 1), last // STEPS + 1)
        rows = {row["epoch"]: row for row in self.rows("measures.csv", last)}
        evaluated = {epoch: rows[epoch] for epoch in ended if epoch % interval == 0}
        self.best_by = begun.options["best_by"]
        self.scores = dict(scores)
        if self.best_by:
            self.scores |= {epoch: score_of(self.best_by, row) for epoch, row in evaluated.items()}

    def check_states(self, begun, last, older):
        """Check the newest state and the generators beside it, and note all new states.

        older: times of the states from before; an epoch that is trained again saves the same bytes again
        """
        latest = self.read(SAVED / "latest.pt")
        assert (latest["epoch"], latest["step_in_epoch"], latest["step"]) == (*divmod(last, STEPS), last)
        if self.scores:
            assert self.is_best(latest["best"])
        for name in ("G_AB", "G_BA"):
            assert self.read(SAVED / f"{name}.safetensors")["step"] == last
        for path in SAVED.glob("*.pt"):
            if self.is_good(path) and path.stat().st_mtime_ns not in older:
                state = self.read(path)
                scores = {epoch: score for epoch, score in self.scores.items() if epoch <= state["epoch"]}
                self.known[digest(path)] = Saved(state["epoch"], state["step"], begun.options, scores)

    def read(self, path):
        """The content of a file that nobody damaged."""
        key = digest(path)
        if key not in self.facts:
            try:
                self.facts[key] = load_generator(path)[1] if path.suffix == ".safetensors" else load_state(path)
            except InputError as error:
                raise AssertionError(f"{path} was saved and not damaged: {error}") from error
        return self.facts[key]

    # -- what they rely on -------------------------------------------------------------------

    def has_best_of(self, scores, best_by):
        """Whether best.pt has the best of some scores, and is of the epochs that they belong to."""
        path = SAVED / "best.pt"
        if not (scores and self.is_good(path)):
            return False
        saved = self.known[digest(path)]
        own = saved.scores == {epoch: score for epoch, score in scores.items() if epoch <= saved.epoch}
        return own and saved.epoch in best_epochs(best_by, scores)

    def is_best(self, best):
        """Whether the metric, score and epoch that a state contains are those of the best epoch."""
        best_epoch = best["epoch"] in best_epochs(self.best_by, self.scores) and best["metric"] == self.best_by
        return best_epoch and close(best["score"], self.scores[best["epoch"]])

    @invariant()
    def the_best_is_kept(self):
        if not self.scores or self.best_is_damaged:
            return
        assert self.has_best_of(self.scores, self.best_by), (
            f"best.pt is not the best by {self.best_by} of {self.scores}"
        )
        best = self.read(SAVED / "best.pt")["best"]
        assert self.is_best(best)
        assert best["epoch"] == self.known[digest(SAVED / "best.pt")].epoch

    @invariant()
    def saved_files_can_be_loaded(self):
        for path in (*RUNS.glob("*/*.pt"), *RUNS.glob("*/*.safetensors")):
            if self.is_good(path):
                self.read(path)

    @invariant()
    def nothing_is_left_half_written(self):
        assert not [*Path().rglob(".*.tmp")]


# ---------------------------------------------------------------------------------------------
# A folder of results


OUTPUT = Path("out")
SCORED = ("paired", "cycle")
TESTS = st.fixed_dictionaries(
    {"run_name": st.sampled_from(["one", "two"]), "epoch": st.sampled_from(["1", "2"])},
    optional={
        "direction": st.sampled_from(["AtoB", "BtoA"]),
        "scale": st.just("native"),
        "output_size": st.just("net"),
        "num_test": st.sampled_from([1, 2]),
        "metrics": st.sampled_from(SCORED),
    },
)
PLACES = ("fake_B/0.png", "thumbnails/real_A/0.jpg", "metrics.json", "grid.png", "rec_B/2.png", "fake_B/mine.png")


class Results(RuleBasedStateMachine):
    """Two runs that are tested into one folder, where other people's files lie too."""

    def __init__(self):
        super().__init__()
        self.home = Path.cwd()
        self.folder = tempfile.mkdtemp(dir=self.home)
        os.chdir(self.folder)
        make_dataset(Path("datasets/tiny"), (2, 2, 3, 3), (18, 16))
        save_run("one")
        save_run("two", seed=1)
        self.foreign: dict[Path, str] = {}  # somebody else's files
        self.fresh: dict[str, Path] = {}  # folders of tests that found nothing, by what they depend on

    def teardown(self):
        os.chdir(self.home)
        shutil.rmtree(self.folder)

    def fresh_folder(self, argv):
        """The folder that a test leaves where there was none."""
        inputs = [digest(path) for path in sorted(Path("datasets").rglob("test*/*.png"))]
        key = str((argv, inputs))
        if key not in self.fresh:
            self.fresh[key] = Path(f"fresh{len(self.fresh)}")
            assert exit_code(test_command.main, *argv, "--output", self.fresh[key]) == 0
        return self.fresh[key]

    def files(self, folder=OUTPUT):
        paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, ".lock")]
        return {path.relative_to(folder): digest(path) for path in paths}

    @rule(options=TESTS, skip=st.booleans())
    def test(self, options, skip):
        argv = [*command_line(options), *CPU]
        fresh = self.fresh_folder(argv)
        own = self.files(fresh)
        before = self.files()
        thumbnails = {Path("thumbnails", path).with_suffix(".jpg") for path in own}
        code = exit_code(test_command.main, *argv, "--output", OUTPUT, *["--skip_existing"] * skip)
        if self.foreign.keys() & (own.keys() | thumbnails):
            assert code == 2
            assert self.files() == before
            return
        assert code == 0
        found = self.files()
        pages = {Path("index.html"), Path("grid.png")} if skip else set()  # the page also shows what was kept
        assert {path: found.get(path) for path in own if path not in pages} == {
            path: value for path, value in own.items() if path not in pages
        }
        earlier = before.keys() - own.keys() - self.foreign.keys()
        outdated = {path for path in earlier if path.name == "metrics.json"}
        assert found.keys() - own.keys() - self.foreign.keys() == (earlier - outdated if skip else set())
        title = f"<h1>{options['run_name']}, epoch {options['epoch']}, step {2 * int(options['epoch'])}</h1>"
        assert title in (OUTPUT / "index.html").read_text(encoding="utf-8")

    @rule(number=st.integers(0, 2), domain=st.sampled_from("AB"), seed=st.integers(0, 1))
    def change_image(self, number, domain, seed):
        noise_image(f"new {seed}", (18, 16)).save(f"datasets/tiny/test{domain}/{number}.png")

    @rule(place=st.sampled_from(PLACES))
    def put_or_take_away_somebody_elses_file(self, place):
        path = OUTPUT / place
        if Path(place) in self.foreign:
            del self.foreign[Path(place)]
            path.unlink()
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
            self.foreign[Path(place)] = digest(path)

    @rule(data=st.data(), way=st.sampled_from(["delete", "delete", "halve", "junk", "swap"]))
    def change_a_result(self, data, way):
        """What is changed is somebody else's, unless its content is one that test.py wrote under that name."""
        paths = [OUTPUT / path for path in sorted(self.files().keys() - self.foreign.keys()) if path.suffix == ".png"]
        if not paths:
            return
        path = data.draw(st.sampled_from(paths))
        before = digest(path)
        if way == "swap":
            shutil.copyfile(data.draw(st.sampled_from(paths)), f"{path}.copy")
            Path(f"{path}.copy").replace(path)
        elif way == "delete":
            path.unlink()
        else:
            damage_file(path, way)
        if path.exists() and digest(path) != before:
            self.foreign[path.relative_to(OUTPUT)] = digest(path)

    @invariant()
    def other_files_are_as_they_were(self):
        assert {path: digest(OUTPUT / path) for path in self.foreign} == self.foreign


# ---------------------------------------------------------------------------------------------
# Running it

USUAL = settings(
    max_examples=8,
    stateful_step_count=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def fast(no_plots, monkeypatch):
    """Leave out what takes time and is not tested here: synced disks, drawn grids and pages."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for name in ("Monitor.draw_grid", "save_image", "Monitor.write_index"):
        monkeypatch.setattr(f"toolkit.monitor.{name}", lambda *args: None)
    monkeypatch.setattr("toolkit.inference.BATCH", 1)  # sums over other batches are rounded otherwise


@pytest.mark.usefixtures("fast")
def test_commands_in_any_order_leave_consistent_files():
    run_state_machine_as_test(Commands, settings=settings(USUAL, max_examples=2))


@pytest.mark.usefixtures("fast")
def test_tests_in_any_order_leave_only_results_of_the_last_one():
    run_state_machine_as_test(Results, settings=settings(USUAL, max_examples=5, stateful_step_count=6))


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
def test_many_tests_in_any_order_leave_only_results_of_the_last_one():
    run_state_machine_as_test(Results, settings=settings(USUAL, max_examples=150, stateful_step_count=10))


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
def test_many_commands_in_any_order_leave_consistent_files():
    run_state_machine_as_test(Commands, settings=settings(USUAL, max_examples=100, stateful_step_count=8))
