"""Command-line options: from fields of dataclasses, from argument files, and from a saved run."""

import dataclasses
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from edits import FUZZ
from hypothesis import given
from hypothesis import strategies as st

import distill
import train
from cyclegan import OptimConfig
from toolkit import cli
from toolkit.cli import Parser
from toolkit.executor import parse_micro_batch
from utils import InputError, epoch_name, existing_or_new_path, folder_name, one_line, option, some_of

PATH = Path("saved_models/tiny/latest.pt")


@dataclass(frozen=True)
class Example:
    """One option of each kind."""

    count: int = option(3, "how many", least=1, most=8)
    steps: int = option(5, "how long", least=0)
    rate: float = option(2e-4, "how fast", above=0)
    share: float | None = option(None, "a share (default: all)", least=0, most=1)
    mirror: bool = option(True, "mirror images")
    quick: bool = option(False, "do without 50 % of them")
    size: str = option("small", "which", choices=("small", "large"))
    parts: list[str] = option(["stem"], "some of them", parse=some_of(("stem", "head")), metavar="stem,head")
    photos: list[Path] = option([], "files", nargs="*", metavar="PHOTO")
    root: Path = option(Path("sets"), "folder of the sets")
    layers: int = option(2, "layers of D", flag="layers_D")
    hidden: int = 7  # not an option


def parse(*argv):
    parser = Parser(prog="example.py")
    cli.add_options(parser, "examples", Example)
    return parser.parse_args([str(word) for word in argv])


def parse_train(*argv):
    return train.make_parser().parse_args([str(word) for word in argv])


def saved(*argv):
    """The options as a checkpoint contains them."""
    return cli.plain_args(parse_train(*argv))


def resume(old, *argv, fixed=train.FIXED_OPTIONS):
    """The options of a resumed run, from those in its checkpoint and those on the command line."""
    return cli.resume_args(train.make_parser(), parse_train(*argv), ({"args": old}, PATH), fixed)


def assert_one_line(error, text):
    assert str(text) in str(error)
    assert len(one_line(error)) < 1000


# -- options from fields ---------------------------------------------------------------------


def test_options_fill_the_fields_that_declare_them():
    assert cli.config_of(Example, parse()) == Example()
    argv = "--count 8 --rate 1 --share 0.5 --no-mirror --quick --size large --parts head,stem --layers_D 4 --root a/b"
    args = parse(*argv.split(), "--photos", "a.png", "b c.png")
    expected = Example(8, 5, 1.0, 0.5, False, True, "large", ["head", "stem"], [Path("a.png"), Path("b c.png")])
    assert cli.config_of(Example, args) == dataclasses.replace(expected, root=Path("a/b"), layers=4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--count 0", "argument --count: given '0', expected an integer, at least 1 and at most 8"),
        ("--count 1.5", "given '1.5', expected an integer"),
        ("--steps 10000001", "expected an integer, at least 0 and at most 10000000"),
        (f"--steps {'9' * 400}", "expected an integer"),
        ("--rate nan", "argument --rate: given 'nan', expected a number, above 0"),
        ("--share inf", "given 'inf', expected a number, at least 0 and at most 1"),
        ("--size tiny", "--size: invalid choice: 'tiny'"),
        ("--parts stem,tail", "--parts: given 'tail', expected some of stem,head"),
        ("--layers 3", "unrecognized arguments: --layers 3"),  # the option is --layers_D, and may not be shortened
        ("--count", "expected one argument"),
    ],
)
def test_wrong_options_are_refused_with_what_was_expected(argv, message):
    with pytest.raises(InputError) as error:
        parse(*argv.split())
    assert_one_line(error.value, message)
    assert str(error.value).endswith("; all flags: python example.py --help")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (folder_name, ["a", "день-1", "a.b c"], ["", ".", "..", "../..", "a/b", "a\\b", "/a", "-a", "a\nb", "c:x"]),
        (existing_or_new_path, ["a", "../a/b", "."], [""]),
        (epoch_name, ["0", "007", "latest", "best"], ["-1", "last", "1.5"]),
        (parse_micro_batch, ["auto", "1"], ["0", "all", "1.5"]),
        (some_of(("a", "b")), ["", "a", "b,a", "a,"], ["c", "a,c", "a b"]),
        (distill.block_list, ["auto", "1,4,8"], ["1,x", "", "1001"]),
    ],
)
def test_parse_functions_accept_what_makes_sense_and_nothing_else(kind, good, bad):
    for text in good:
        kind(text)
    for text in bad:
        with pytest.raises(ValueError, match=r"given .*expected"):
            kind(text)


def test_given_options_are_told_from_defaults():
    assert parse().given == set()
    assert parse("--count", 3, "--mirror", "--layers_D", 2, "--photos").given == {
        *("count", "mirror", "layers_D", "photos")
    }


def test_two_command_lines_never_share_a_default():
    parser = train.make_parser()
    parser.parse_args([]).watch.append("cat.jpg")
    cli.saved_args(parser, {"lr": 1.0}, "x")["watch"].append("cat.jpg")
    assert parser.parse_args([]).watch == []


def test_inherited_options_are_none_unless_they_are_given(capsys):
    parser = Parser()
    cli.add_options(parser, "examples", Example, "the teacher's")
    args = parser.parse_args(["--no-quick"])
    assert (args.quick, args.mirror, args.count, args.photos) == (False, None, None, None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert capsys.readouterr().out.count("(default: the teacher's)") == len(parser.options)


@pytest.mark.parametrize("command", [train, distill])
def test_help_shows_each_option_and_its_default_once(command, capsys):
    parser = command.make_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for name, action in parser.options.items():
        assert f"--{name}" in text
        assert action.help.count("default:") <= 1, name
        assert "None" not in action.help % {"default": action.default}, name


def test_options_that_exclude_each_other_are_refused():
    pairs = [("lr", "lr_D"), ("norm", "init")]
    cli.refuse_both(train.make_parser(), parse_train("--lr", 1, "--norm", "batch"), *pairs)
    with pytest.raises(InputError, match="--norm and --init contradict each other: give one of them"):
        cli.refuse_both(train.make_parser(), parse_train("--init", "xavier", "--norm", "batch"), *pairs)


FLAGS = [flag for action in train.make_parser().options.values() for flag in action.option_strings]
WORDS = st.sampled_from(FLAGS) | st.text(string.printable, max_size=8) | st.integers().map(str) | st.floats().map(str)


@FUZZ
@given(argv=st.lists(WORDS, max_size=8))
def test_any_command_line_is_understood_or_refused_in_one_line(argv):
    if {"-h", "--help"} & set(argv):
        return
    try:
        parse_train(*argv)
    except InputError as error:
        assert_one_line(error, "python train.py")


# -- argument files --------------------------------------------------------------------------


def test_an_argument_file_has_comments_and_options_after_it_override_its_own():
    Path("more.txt").write_text("--rate 0.5\n")
    Path("recipe.txt").write_text(
        "# don't forget\n\n--count 4 --no-mirror  # two on a line\n--photos 'my cat.png' b.png\n@more.txt\n"
    )
    args = parse("@recipe.txt", "--count", 5)
    assert (args.count, args.mirror, args.rate) == (5, False, 0.5)
    assert args.photos == [Path("my cat.png"), Path("b.png")]
    assert args.given == {"count", "mirror", "rate", "photos"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory: 'recipe.txt'"),
        ("--count many\n", "--count: given 'many'"),
        ("--photos 'a.png\n", "argument file, --photos 'a.png: No closing quotation"),
        (b"\xff\xfe\x00--count", "an argument file is not text"),
    ],
)
def test_a_wrong_argument_file_is_one_line(content, message):
    if content is not None:
        Path("recipe.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        parse("@recipe.txt")
    assert_one_line(error.value, message)


# -- options of a saved run ------------------------------------------------------------------

MANY = [
    *("--lr", "1e-3", "--no-flip", "--pool_D", "--freeze", "stem,D", "--watch", "a b.jpg"),
    *("--max_images", "7", "--eval_metrics", "losses,paired", "--best_by", "SSIM", "--eval_interval", "2"),
    *("--micro_batch", "3", "--data_root", "/else where", "--vit_size", "uvcgan", "--start_from", "7", "--seed", "3"),
    *("--save_minutes", "0.5", "--lr_D", "4e-4", "--decay_epoch", "3", "--n_downsampling", "0", "--channels", "1"),
]


def test_plain_options_contain_nothing_that_needs_code(tmp_path):
    plain = saved(*MANY)
    assert (plain["watch"], plain["data_root"], plain["freeze"]) == (["a b.jpg"], "/else where", ["stem", "D"])
    assert "given" not in plain
    torch.save(plain, tmp_path / "args.pt")
    assert torch.load(tmp_path / "args.pt", weights_only=True) == plain


@pytest.mark.parametrize("argv", [[], MANY])
def test_saved_options_come_back_as_they_were_given(argv, capsys):
    args = parse_train(*argv)
    values = cli.saved_args(train.make_parser(), cli.plain_args(args), "x.pt")
    assert {**values, "given": args.given} == vars(args)
    assert capsys.readouterr().out == ""


def test_saved_photos_whose_names_begin_with_a_dash_come_back():
    values = cli.saved_args(train.make_parser(), saved() | {"watch": ["-x.png", "--lr"]}, "x.pt")
    assert values["watch"] == [Path("-x.png"), Path("--lr")]


def test_options_newer_than_the_checkpoint_have_their_defaults_and_removed_ones_are_ignored(capsys):
    old = saved("--lr", "1e-3") | {"norm_output": False}
    del old["ema"], old["eval_metrics"]
    values = cli.saved_args(train.make_parser(), old, "x.pt", skip=("seed",))
    assert (values["ema"], values["eval_metrics"], values["lr"]) == (0.0, ["cycle", "identity"], 1e-3)
    assert not {"seed", "norm_output"} & values.keys()
    assert capsys.readouterr().out == "x.pt: older than --ema, --eval_metrics; these have their defaults\n"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(name=st.sampled_from(sorted(train.make_parser().options)), value=VALUES)
def test_an_edited_value_is_one_that_could_have_been_given_or_is_refused_in_one_line(name, value):
    parser = train.make_parser()
    try:
        found = cli.saved_args(parser, saved() | {name: value}, PATH)[name]
    except InputError as error:
        assert_one_line(error, PATH)
        return
    action = parser.options[name]
    if found is None:
        assert action.default is None
    elif action.nargs == 0:
        assert isinstance(found, bool)
    elif action.choices:
        assert found in action.choices
    elif action.nargs is None and not isinstance(found, list | tuple):
        assert action.type(str(found)) == found


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize("name", ["flip", "pool_D"])
def test_an_edited_switch_is_true_or_false_or_refused(name, value):
    assert vars(resume(saved() | {name: True}))[name] is True
    with pytest.raises(InputError) as error:
        resume(saved() | {name: value})
    assert_one_line(error.value, f"{PATH}: its flags cannot be read (given {value!r}, expected true or false)")


@pytest.mark.parametrize("edited", [None, [], [1], "--lr 1", 3, torch.zeros(2)])
def test_a_checkpoint_without_options_is_refused_in_one_line(edited):
    with pytest.raises(InputError) as error:
        resume(edited)
    assert_one_line(error.value, PATH)


# -- options of a resumed run ----------------------------------------------------------------


def test_options_that_are_not_given_come_from_the_checkpoint(capsys):
    old = saved("--lr", "1e-3", "--no-flip", "--ngf", 8, "--watch", "a.jpg", "--device", "cuda:7", "--overwrite")
    resumed = resume(old, "--run_name", "new", "--start_from", "latest")
    assert (resumed.lr, resumed.flip, resumed.ngf, resumed.watch) == (1e-3, False, 8, [Path("a.jpg")])
    assert (resumed.device, resumed.overwrite, resumed.run_name) == ("auto", False, "new")  # those of one call alone
    assert resumed.start_from == "latest"
    assert resumed.given == {"run_name", "start_from"}
    assert capsys.readouterr().out == ""
    assert resume(old, "--watch").watch == []


def test_changes_are_reported_and_those_that_networks_cannot_follow_refused(capsys):
    old = saved("--num_epochs", 4, "--lr", "1e-3", "--ngf", 4, "--decay_epoch", 1)
    resumed = resume(old, "--lr", "0.001", "--ngf", 4, "--batch_size", 2, "--watch", "a.jpg")
    assert capsys.readouterr().out.splitlines() == [
        "changed on resume: --batch_size 10 → 2",
        "changed on resume: --watch [] → ['a.jpg']",
    ]
    assert (resumed.batch_size, resumed.decay_epoch) == (2, 1)
    message = "--ngf 8: saved_models/tiny has 4; leave the flag out"
    with pytest.raises(InputError, match=message):
        resume(old, "--ngf", 8)
    for argv in ("--norm batch", "--freeze D", "--init xavier", "--pool_D", "--generator unet_vit", "--channels 1"):
        with pytest.raises(InputError, match=rf"^{argv.split()[0]} .*saved_models"):
            resume(old, *argv.split())
    resume(old, "--ngf", 8, fixed=("lr",))  # of another command


def test_a_decay_epoch_that_was_not_given_follows_num_epochs():
    def first_decay_epoch(old, *argv):
        return cli.config_of(OptimConfig, resume(old, *argv)).first_decay_epoch

    assert first_decay_epoch(saved("--num_epochs", 100), "--num_epochs", 400) == 200
    assert first_decay_epoch(saved("--num_epochs", 100, "--decay_epoch", 50), "--num_epochs", 400) == 50
    old = saved("--num_epochs", 101) | {"decay_epoch": 50}
    del old["dry_run"]  # as versions before that option filled it in
    assert first_decay_epoch(old, "--num_epochs", 20) == 10
    assert first_decay_epoch(old) == 50
    assert first_decay_epoch(saved("--num_epochs", 100, "--decay_epoch", 30), "--num_epochs", 400) == 30


@pytest.mark.parametrize("command", [train, distill])
def test_an_option_that_is_gone_is_refused_with_what_replaces_it(command, refused, tmp_path):
    (tmp_path / "old.txt").write_text("--norm_output")
    for words in (["--norm_output"], ["--norm_output=1"], ["@old.txt"]):
        error = refused(command.main, *words)
        assert "--norm_output is no longer an option; use GeneratorConfig(norm_output=True)" in error
