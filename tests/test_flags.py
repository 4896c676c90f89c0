import argparse
import string
from pathlib import Path

import pytest
import torch
from conftest import TINY
from edits import FUZZ
from hypothesis import given
from hypothesis import strategies as st

import models
from models import VIT_SIZES
from toolkit import cli
from toolkit.cli import Parser, float_between, folder_name, int_between, words_of
from utils import InputError, one_line

CPU = torch.device("cpu")
PATH = Path("saved_models/tiny/latest.pt")


def full_parser():
    """A parser with all the flags that stages share."""
    parser = Parser(prog="stage.py")
    for add_flags in (
        *(cli.add_data_flags, cli.add_network_flags, cli.add_loss_flags, cli.add_optim_flags),
        *(cli.add_transfer_flags, cli.add_run_flags, cli.add_speed_flags),
    ):
        add_flags(parser)
    return parser


def parse(*argv):
    return full_parser().parse_args([str(word) for word in argv])


def saved(*argv):
    """The flags as a checkpoint holds them."""
    return cli.plain_flags(parse(*argv))


def resume(old, *argv, **options):
    """The flags of a run that goes on, from those of its checkpoint and those that are typed."""
    return cli.resume_flags(full_parser(), parse(*argv), old, PATH, **options)


def is_one_line(error, words):
    """A refusal names what it is about and fits on a line that nobody has to scroll."""
    assert words in str(error)
    assert len(one_line(error)) < 1000


# -- types of flags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int_between(1), ["1", "12"], ["0", "-1", "1.5", "x", "", "nan", "99999999999"]),
        (int_between(4, 8), ["4", "8"], ["3", "9"]),
        (float_between(0), ["0", "2e-4"], ["-1", "nan", "inf", "x", ""]),
        (float_between(0, 1, above=True), ["1", "0.5"], ["0", "1.1"]),
        (folder_name, ["a", "день-1", "a.b c"], ["", ".", "..", "../..", "a/b", "a\\b", "/a", "-a", "a\nb", "c:x"]),
        (cli.path_name, ["a", "../a/b", "."], [""]),
        (cli.epoch_name, ["0", "007", "latest", "best"], ["-1", "last", "1.5"]),
        (cli.micro_batch, ["auto", "1"], ["0", "all", "1.5"]),
        (words_of(("a", "b")), ["", "a", "b,a", "a,"], ["c", "a,c", "a b"]),
    ],
)
def test_flag_types_take_what_makes_sense_and_nothing_else(kind, good, bad):
    for text in good:
        kind(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"given .*expected"):
            kind(text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (int_between(1), "0", "given '0', expected an integer of at least 1"),
        (int_between(4, 8), "9", "given '9', expected an integer of at least 4 and at most 8"),
        (float_between(0, above=True), "nan", "given 'nan', expected a number above 0"),
        (float_between(0), "-1", "given '-1', expected a number of at least 0"),
        (float_between(0, 0.999999), "1", "given '1', expected a number of at least 0 and at most 0.999999"),
        (words_of(("a", "b")), "a,c", "given 'c', expected some of a,b"),
    ],
)
def test_flag_types_say_what_they_expect(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value).startswith(words)


def test_flag_types_give_values():
    assert int_between(0)("7") == 7
    assert float_between(0)("2e-4") == 2e-4
    assert words_of(("a", "b"))("b,a") == ["b", "a"]
    assert words_of(("a", "b"))("") == []
    assert cli.path_name("a/b") == Path("a/b")
    assert (cli.epoch_name("007"), cli.epoch_name("best")) == ("7", "best")
    assert (cli.micro_batch("auto"), cli.micro_batch("3")) == ("auto", 3)


# -- the parser ------------------------------------------------------------------------------


def test_given_flags_are_told_from_defaults():
    parser = Parser()
    add = cli.flag_group(parser, "some")
    add("--lr", type=float, default=1.0, help="rate")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror")
    add("--overwrite", action="store_true", help="delete")
    assert parser.parse_args([]).given == set()
    assert parser.parse_args(["--lr", "1.0", "--flip"]).given == {"lr", "flip"}
    assert parser.parse_args(["--no-flip", "--overwrite"]).given == {"flip", "overwrite"}
    with pytest.raises(InputError, match="unrecognized arguments: --over"):
        parser.parse_args(["--over"])


def test_flags_that_are_not_given_have_their_defaults():
    args = parse()
    assert args.given == set()
    for name, action in full_parser().options.items():
        assert getattr(args, name) == action.default, name
    asked_for = {"num_epochs": 200, "batch_size": 10, "img_height": 256, "img_width": 256, "channels": 3}
    asked_for |= {"dataset_name": "horse2zebra", "num_residual": 9, "lambda_cycle": 10.0, "start_from": "0"}
    assert {name: getattr(args, name) for name in asked_for} == asked_for


def test_a_default_is_never_shared_between_two_command_lines():
    parser = full_parser()
    parser.parse_args([]).watch.append("cat.jpg")
    cli.saved_flags(parser, {"lr": 1.0}, "x")["watch"].append("cat.jpg")
    assert parser.parse_args([]).watch == []


def test_an_error_is_one_line_with_the_program_to_ask():
    with pytest.raises(InputError) as error:
        parse("--channels", "4")
    assert "invalid choice: 4" in str(error.value)
    assert str(error.value).endswith("; all flags: python stage.py --help")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset_name", "../.."], "expected one folder name"),
        (["--run_name", "a/b"], "expected one folder name"),
        (["--batch_size", "0"], "given '0', expected an integer of at least 1"),
        (["--lr", "nan"], "given 'nan', expected a number above 0"),
        (["--lambda_cycle", "-1"], "expected a number of at least 0"),
        (["--beta1", "1"], "at most 0.999999"),
        (["--lambda_id", "5"], "unrecognized arguments: --lambda_id 5"),
        (["--channels", "4"], "invalid choice"),
        (["--load_scale", "0.5"], "of at least 1"),
        (["--eval_metrics", "psnr"], "expected some of losses,cycle,identity,paired"),
        (["--freeze", "tail"], "expected some of stem,down,blocks,up,skips,head,D"),
        (["--init_from"], "expected at least one argument"),
    ],
)
def test_wrong_flags_are_refused(argv, words):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert words in str(error.value)
    assert str(error.value) == one_line(error.value)


def test_help_shows_each_default_once(capsys):
    with pytest.raises(SystemExit):
        full_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 2e-4)" not in text
    assert text.count("(default: 0.0002)") == 1
    for name, action in full_parser().options.items():
        assert f"--{name}" in text
        assert action.help.count("default:") <= 1, name
        assert "None" not in action.help % {"default": action.default, "prog": "x"}, name


def test_watch_without_a_name_ends_watching():
    assert parse("--watch", "a.jpg", "b.jpg").watch == [Path("a.jpg"), Path("b.jpg")]
    args = parse("--watch")
    assert args.watch == []
    assert "watch" in args.given
    assert resume(saved("--watch", "a.jpg")).watch == [Path("a.jpg")]
    assert resume(saved("--watch", "a.jpg"), "--watch").watch == []


WORDS = st.sampled_from(sorted(o for a in full_parser().options.values() for o in a.option_strings))
WORDS = WORDS | st.text(string.printable, max_size=8) | st.integers().map(str) | st.floats().map(str)


@FUZZ
@given(argv=st.lists(WORDS, max_size=8))
def test_any_command_line_is_understood_or_refused_in_one_line(argv):
    if {"-h", "--help"} & set(argv):
        return
    try:
        parse(*argv)
    except InputError as error:
        is_one_line(error, "python stage.py")


def test_plain_flags_hold_no_object_that_needs_code(tmp_path):
    plain = saved("--watch", "a.jpg", "--data_root", "elsewhere", "--freeze", "stem,D")
    assert plain["watch"] == ["a.jpg"]
    assert plain["data_root"] == "elsewhere"
    assert plain["freeze"] == ["stem", "D"]
    assert "given" not in plain
    torch.save(plain, tmp_path / "flags.pt")
    assert torch.load(tmp_path / "flags.pt", weights_only=True) == plain


def test_changed_flags_leave_the_old_ones_as_they_are():
    args = parse("--lr", "1e-3")
    other = cli.changed(args, lr=1.0)
    assert (args.lr, other.lr, other.given) == (1e-3, 1.0, {"lr"})


# -- checks that need more than one flag -----------------------------------------------------


@pytest.mark.parametrize("argv", [("--overwrite",), ("--init_from", "x.safetensors")])
def test_a_new_start_and_going_on_contradict_each_other(argv):
    for start in ("latest", "7"):
        args = parse(*argv, "--start_from", start)
        words = rf"{argv[0]} contradicts --start_from {start}, which goes on with a run: give one of them"
        with pytest.raises(InputError, match=words):
            cli.refuse_contradictions(full_parser(), args)
    cli.refuse_contradictions(full_parser(), parse(*argv))
    cli.refuse_contradictions(full_parser(), parse("--start_from", "latest"))


def test_pairs_of_flags_are_refused_when_both_are_given():
    pairs = [("lr", "lr_D"), ("norm", "init")]
    cli.refuse_both(full_parser(), parse("--lr", "1", "--norm", "batch"), *pairs)
    for argv, words in (
        (("--lr", "1", "--lr_D", "1"), "--lr and --lr_D contradict each other: give one of them"),
        (("--init", "xavier", "--norm", "batch"), "--norm and --init contradict each other"),
    ):
        with pytest.raises(InputError, match=words):
            cli.refuse_both(full_parser(), parse(*argv), *pairs)


EVALUATED = ["--eval_interval", "1", "--eval_metrics", "paired"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gp_target", "1"], "--gp_target 1: has no effect without --lambda_gp"),
        (["--best_by", "PSNR"], "needs --eval_interval and paired"),
        (["--best_by", "cycle"], "needs --eval_interval and cycle"),
        (["--best_by", "loss_G", "--eval_interval", "1"], "needs --eval_interval and losses"),
        (["--best_by", "SSIM", "--eval_interval", "1"], "needs --eval_interval and paired"),
        (["--best_by", "cycle", "--eval_interval", "1", "--eval_metrics", "identity"], "and cycle among"),
        (["--best_by", "SSIM", *EVALUATED, "--img_width", "10"], "--best_by SSIM: .*11 px a side"),
        (["--decay_epoch", "201"], "--num_epochs 200"),
        (["--decay_epoch", "5", "--num_epochs", "4"], "--decay_epoch 5: .*--num_epochs 4"),
    ],
)
def test_flags_that_need_another_one_are_refused_without_it(argv, words):
    with pytest.raises(InputError, match=words):
        cli.check_run_flags(parse(*argv))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--gp_target", "1", "--lambda_gp", "1"],
        ["--best_by", "PSNR", *EVALUATED, "--img_width", "10"],
        ["--best_by", "SSIM", *EVALUATED, "--img_width", "11"],
        ["--best_by", "SSIM", "--eval_interval", "1", "--eval_metrics", "cycle,paired"],
        ["--best_by", "cycle", "--eval_interval", "5"],
        ["--best_by", "loss_G", "--eval_interval", "5", "--eval_metrics", "losses"],
        ["--decay_epoch", "200"],
        ["--decay_epoch", "0", "--num_epochs", "1"],
    ],
)
def test_flags_that_fit_each_other_are_taken(argv):
    cli.check_run_flags(parse(*argv))


def test_an_inherited_best_by_is_checked_like_a_typed_one():
    old = saved("--best_by", "PSNR", "--eval_interval", "1", "--eval_metrics", "paired")
    cli.check_run_flags(resume(old))
    with pytest.raises(InputError, match="--best_by PSNR: needs --eval_interval and paired"):
        cli.check_run_flags(resume(old, "--eval_metrics", "cycle"))
    cli.check_run_flags(resume(old, "--eval_interval", "0"))  # nothing is evaluated any more: it has no effect
    with pytest.raises(InputError, match="--best_by cycle: needs --eval_interval and cycle"):
        cli.check_run_flags(resume(old, "--best_by", "cycle"))


def test_a_missing_tensorboard_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cli.check_run_flags(parse())
    with pytest.raises(InputError, match=r"--log tensorboard: the package tensorboard is missing; .*pip install"):
        cli.check_run_flags(parse("--log", "tensorboard"))


def test_the_rate_falls_from_half_of_the_epochs_unless_it_is_said():
    assert cli.decay_epoch(parse()) == 100
    assert cli.decay_epoch(parse("--num_epochs", 5)) == 2
    assert cli.decay_epoch(parse("--decay_epoch", 0)) == 0
    assert cli.decay_epoch(parse("--decay_epoch", 150)) == 150


# -- flags → configs -------------------------------------------------------------------------


def test_network_flags_become_configs():
    argv = ["--num_residual", 3, "--ngf", 8, "--n_downsampling", 1, "--upsample", "resize", "--norm", "batch"]
    argv += ["--skips"]
    argv += ["--norm_output", "--channels", 1, "--discriminator", "pixel", "--ndf", 6, "--n_layers_D", 2]
    argv += ["--max_mult_D", 4, "--pool_D"]
    generator, discriminator = cli.network_configs(parse(*argv))
    shape = {"ngf": 8, "num_residual": 3, "n_downsampling": 1, "upsample": "resize"}
    shape |= {"norm_output": True, "skips": True}
    assert generator == models.GeneratorConfig(channels=1, norm="batch", **shape)
    shape = {"ndf": 6, "n_layers": 2, "max_mult": 4, "pool": True}
    assert discriminator == models.DiscriminatorConfig("pixel", channels=1, norm="batch", **shape)
    generator, discriminator = cli.network_configs(parse("--norm", "group"))
    assert (generator.norm, discriminator.norm) == ("group", "instance")
    default = (models.GeneratorConfig(), models.DiscriminatorConfig())
    assert cli.network_configs(parse()) == default  # those of the paper


@pytest.mark.parametrize(
    ("argv", "blocks", "heads"),
    [
        ([], 4, 4),
        (["--vit_size", "uvcgan"], 12, 6),
        (["--vit_size", "uvcgan", "--vit_blocks", "2"], 2, 6),
        (["--vit_heads", "8"], 4, 8),
        (["--vit_blocks", "0"], 0, 4),
    ],
)
def test_blocks_and_heads_of_a_unet_vit_follow_its_size(argv, blocks, heads):
    args = parse("--generator", "unet_vit", *argv)
    generator, _ = cli.network_configs(args)
    assert (generator.vit_blocks, generator.vit_heads) == (blocks, heads)
    filled = cli.with_vit_defaults(args)  # as they go into a checkpoint
    assert (filled.vit_blocks, filled.vit_heads) == (blocks, heads)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--img_height", "4", "--img_width", "4"], "images of 4x4 px: 2 downsamplings need at least 8 px a side"),
        (["--img_height", "7"], "images of 256x7 px"),
        ([*TINY, "--n_layers_D", "5"], "--n_layers_D 5: .*the largest --n_layers_D that fits is 2"),
        (["--n_downsampling", "0", "--img_height", "5", "--n_layers_D", "1"], "take --discriminator pixel"),
        (["--generator", "unet_vit", "--vit_heads", "7"], "--vit_heads 7: expected a divisor of 256"),
        ([*TINY, "--generator", "unet_vit", "--vit_size", "uvcgan"], "4 downsamplings need at least 32 px"),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(argv, words):
    with pytest.raises(InputError, match=words):
        cli.network_configs(parse(*argv))


@pytest.mark.parametrize(
    "argv",
    [
        ["--img_height", "8", "--img_width", "8", "--discriminator", "pixel"],
        ["--img_height", "64", "--img_width", "64", "--n_layers_D", "4"],
        ["--img_height", "4", "--img_width", "4", "--n_downsampling", "0", "--discriminator", "pixel"],
        ["--generator", "unet_vit", "--vit_size", "uvcgan", "--img_height", "32", "--img_width", "32"],
    ],
)
def test_the_smallest_images_that_fit_are_taken(argv):
    cli.network_configs(parse(*argv))


def check_memory(*argv, device=CPU):
    args = parse("--generator", "unet_vit", *argv)
    cli.check_memory(args, cli.network_configs(args)[0], device)


def test_tokens_that_memory_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr("toolkit.cli.total_memory", lambda device: 2**30)
    with pytest.raises(InputError) as error:
        check_memory("--img_height", 512, "--img_width", 256, "--batch_size", 4)
    # 6 images of each of 4 pairs; 4 blocks of 8 vectors of 256 numbers and 2 of 1024, 4 bytes each; 128 x 64 tokens
    wanted = 6 * 4 * 4 * (8 * 256 + 2 * 1024) * 4 * 128 * 64
    assert wanted > 2**30
    assert "8,192 tokens an image at 256x512 px" in str(error.value)
    assert f"about {wanted / 2**30:.0f} GiB in a step, and cpu has 1" in str(error.value)
    assert "lower --img_height" in str(error.value)
    monkeypatch.setattr("toolkit.cli.total_memory", lambda device: wanted)
    check_memory("--img_height", 512, "--img_width", 256, "--batch_size", 4)  # just enough


def test_memory_is_asked_for_what_is_processed_at_once(monkeypatch):
    one_pair = 6 * 4 * (8 * 256 + 2 * 1024) * 4 * 64 * 64
    monkeypatch.setattr("toolkit.cli.total_memory", lambda device: 2 * one_pair)
    with pytest.raises(InputError, match="unet_vit"):
        check_memory("--batch_size", 3)
    check_memory("--batch_size", 3, "--micro_batch", 2)
    check_memory("--batch_size", 2, "--micro_batch", 3)
    check_memory("--batch_size", 10, device=torch.device("cuda"))  # where an out-of-memory can be caught
    with pytest.raises(InputError, match="unet_vit"):
        check_memory("--batch_size", 10, "--micro_batch", 3, device=torch.device("cuda"))
    monkeypatch.setattr("toolkit.cli.world_size", lambda: 2)
    check_memory("--batch_size", 4)  # two for each of two ranks


def test_a_resnet_has_no_tokens_to_hold(monkeypatch):
    monkeypatch.setattr("toolkit.cli.total_memory", lambda device: 1)
    args = parse("--img_height", 1024)
    cli.check_memory(args, cli.network_configs(args)[0], CPU)


# -- how saved flags come back ---------------------------------------------------------------


MANY = [
    *("--lr", "1e-3", "--no-flip", "--pool_D", "--freeze", "stem,D", "--watch", "a b.jpg", "-x.png"),
    *("--max_images", "7", "--eval_metrics", "losses,paired", "--best_by", "SSIM", "--eval_interval", "2"),
    *("--micro_batch", "3", "--data_root", "/else where", "--vit_size", "uvcgan", "--start_from", "7", "--seed", "3"),
    *("--save_minutes", "0.5", "--lr_D", "4e-4", "--decay_epoch", "3", "--n_downsampling", "0", "--channels", "1"),
]


def test_saved_flags_come_back_as_they_were_typed(capsys):
    for argv in ([], [word for word in MANY if word != "-x.png"]):
        args = parse(*argv)
        values = cli.saved_flags(full_parser(), cli.plain_flags(args), "x.pt")
        assert {**values, "given": args.given} == vars(args)
    assert capsys.readouterr().out == ""


def test_names_that_begin_with_a_dash_come_back():
    old = saved() | {"watch": ["-x.png", "--lr"]}
    assert cli.saved_flags(full_parser(), old, "x.pt")["watch"] == [Path("-x.png"), Path("--lr")]


def test_flags_that_are_newer_than_the_checkpoint_have_their_defaults_and_it_is_said(capsys):
    old = saved("--lr", "1e-3")
    del old["ema"], old["eval_metrics"]
    values = cli.saved_flags(full_parser(), old, "x.pt")
    assert (values["ema"], values["eval_metrics"], values["lr"]) == (0.0, ["cycle", "identity"], 1e-3)
    out = capsys.readouterr().out
    assert out == "x.pt: older than --ema, --eval_metrics; these have their defaults\n"


def test_flags_that_are_gone_and_flags_to_skip_are_left_out():
    old = saved("--lr", "1e-3") | {"no_longer_a_flag": object()}
    values = cli.saved_flags(full_parser(), old, "x.pt", skip=("lr", "device"))
    assert values.keys() == full_parser().options.keys() - {"lr", "device"}


@pytest.mark.parametrize("nothing", [None, {}, [], [1], "--lr 1", 3, torch.zeros(2)])
def test_a_checkpoint_without_flags_is_refused(nothing):
    with pytest.raises(InputError, match=r"x\.pt: does not say its flags"):
        cli.saved_flags(full_parser(), nothing, "x.pt")


HOSTILE = [
    ("lambda_cycle", None, "says --lambda_cycle None; written by another program, or edited"),
    ("num_epochs", None, "says --num_epochs None"),
    ("img_height", 10**9, "expected an integer of at least 4 and at most 16384"),
    ("img_height", 16.0, "expected an integer"),
    ("img_height", True, "--img_height True: "),
    ("lr", "fast", "given 'fast', expected a number above 0"),
    ("lr", float("nan"), "given 'nan', expected a number above 0"),
    ("lr", -1.0, "expected a number above 0"),
    ("lr", True, "--lr True: "),
    ("lr", {"a": 1}, "--lr {'a': 1}: "),
    ("lr", torch.zeros(2), "--lr tensor"),
    ("lr_D", [], "--lr_D []: "),
    ("flip", 1, "says --flip 1, expected true or false"),
    ("flip", "yes", "expected true or false"),
    ("flip", None, "says --flip None"),
    ("overwrite", [], "expected true or false"),
    ("channels", 2, "says --channels 2, expected 3, 1"),
    ("channels", "3x", "--channels 3x: "),
    ("n_downsampling", 7, "expected 0, 1, 2, 3, 4"),
    ("generator", "unet", "says --generator unet, expected resnet, unet_vit"),
    ("generator", 3, "expected resnet, unet_vit"),
    ("vit_size", ["small", "uvcgan"], "expected small, uvcgan"),
    ("best_by", "FID", "expected PSNR, SSIM, cycle, identity, loss_G"),
    ("freeze", ["stem", "tail"], "given 'tail', expected some of stem,"),
    ("eval_metrics", 5, "given '5', expected some of losses,"),
    ("watch", 3, "--watch 3: expected a list"),
    ("watch", "cat.jpg", "--watch cat.jpg: expected a list"),
    ("watch", {"cat.jpg": 1}, "expected a list"),
    ("watch", None, "says --watch None"),
    ("init_from", 2.5, "--init_from 2.5: "),
    ("dataset_name", "../../etc", "expected one folder name"),
    ("dataset_name", "a\nb", "expected one folder name"),
    ("seed", 2**32, "at most 4294967295"),
    ("micro_batch", "some", "expected an integer"),
    ("start_from", -1, "expected an integer"),
]


@pytest.mark.parametrize(("name", "value", "words"), HOSTILE)
def test_a_saved_value_that_could_not_have_been_typed_is_refused(name, value, words):
    with pytest.raises(InputError) as error:
        cli.saved_flags(full_parser(), saved() | {name: value}, PATH)
    assert str(error.value).startswith(f"{PATH}: says --{name}")
    assert words in str(error.value)
    assert len(one_line(error.value)) < 300


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(name=st.sampled_from(sorted(full_parser().options)), value=VALUES)
def test_any_saved_value_is_one_that_could_have_been_typed_or_refused_in_one_line(name, value):
    try:
        found = cli.saved_flags(full_parser(), saved() | {name: value}, PATH)[name]
    except InputError as error:
        is_one_line(error, f"{PATH}: says --{name}")
        return
    action = full_parser().options[name]
    if found is None:
        assert action.default is None
    elif action.nargs == 0:
        assert type(found) is bool
    elif action.choices is not None:
        assert found in action.choices
    elif action.type is not None and action.nargs is None and not isinstance(found, list):
        assert action.type(str(found)) == found


@pytest.mark.parametrize("left", [{"num_epochs": None}, {"decay_epoch": 0}, {"num_epochs": None, "decay_epoch": 0}, {}])
def test_epochs_that_a_teacher_shall_tell_may_be_unset(left):
    """As in distillation, where flags that are not given come from the teacher."""
    parser = Parser()
    cli.add_optim_flags(parser)
    parser.flags["num_epochs"].default = None
    values = cli.saved_flags(parser, {"lr": 1.0, **left}, "x.pt")
    assert (values["num_epochs"], values["decay_epoch"]) == (None, left.get("decay_epoch"))


def test_a_switch_whose_default_is_inherited_stays_a_switch():
    """As in distillation, where flags that are not given come from the teacher."""
    parser = full_parser()
    parser.flags["flip"].default = None
    assert cli.check_saved(parser.flags["flip"], False, "x.pt") is False
    assert cli.check_saved(parser.flags["flip"], True, "x.pt") is True
    assert cli.check_saved(parser.flags["flip"], None, "x.pt") is None


# -- going on --------------------------------------------------------------------------------


def test_flags_that_are_not_typed_come_from_the_checkpoint(capsys):
    resumed = resume(saved("--lr", "1e-3", "--no-flip", "--ngf", 8, "--watch", "a.jpg"), "--start_from", "latest")
    assert (resumed.lr, resumed.flip, resumed.ngf, resumed.watch) == (1e-3, False, 8, [Path("a.jpg")])
    assert resumed.start_from == "latest"
    assert resumed.given == {"start_from"}
    assert capsys.readouterr().out == ""


def test_some_flags_are_never_inherited():
    old = saved("--device", "cuda:7", "--overwrite", "--run_name", "old", "--start_from", "3")
    resumed = resume(old, "--run_name", "new")
    found = (resumed.device, resumed.overwrite, resumed.run_name, resumed.start_from)
    assert found == ("auto", False, "new", "0")
    for name in cli.NEVER_INHERITED:
        resume({**old, name: object()})  # not even looked at


def test_changes_are_said_and_other_networks_refused(capsys):
    old = saved("--num_epochs", 4, "--lr", "1e-3", "--ngf", 4, "--decay_epoch", 1)
    resumed = resume(old, "--lr", "0.001", "--ngf", 4, "--batch_size", 2, "--watch", "a.jpg")
    assert capsys.readouterr().out.splitlines() == [
        "changed on resume: --batch_size 10 → 2",
        "changed on resume: --watch [] → ['a.jpg']",
    ]
    assert (resumed.batch_size, resumed.decay_epoch) == (2, 1)
    words = "--ngf 8: the run in saved_models/tiny was started with 4; leave the flag out, or take another --run_name"
    with pytest.raises(InputError, match=words):
        resume(old, "--ngf", 8)
    for argv in ("--norm batch", "--freeze D", "--init xavier", "--pool_D", "--generator unet_vit"):
        with pytest.raises(InputError, match=rf"^{argv.split()[0]} .*was started with"):
            resume(old, *argv.split())
    resume(old, "--ngf", 8, fixed=("lr",))  # of another stage
    with pytest.raises(InputError, match=r"--lr 2.0: .*started with 0.001"):
        resume(old, "--lr", 2, fixed=("lr",))


def test_all_flags_that_shape_networks_are_fixed():
    shapes = {"channels", "generator", "discriminator", "ngf", "ndf", "num_residual", "n_downsampling", "n_layers_D"}
    shapes |= {
        "max_mult_D",
        "upsample",
        "norm",
        "norm_output",
        "skips",
        "pool_D",
        "vit_size",
        "vit_blocks",
        "vit_heads",
    }
    assert set(cli.FIXED_FLAGS) == shapes | {"init", "freeze"}
    parser = Parser()
    cli.add_network_flags(parser)
    assert parser.flags.keys() | {"channels", "freeze"} == set(cli.FIXED_FLAGS)


def test_a_decay_epoch_that_was_never_typed_follows_num_epochs(capsys):
    resumed = resume(saved("--num_epochs", 100), "--num_epochs", 400)
    assert cli.decay_epoch(resumed) == 200
    assert capsys.readouterr().out.splitlines() == [
        "changed on resume: --num_epochs 100 → 400",
        "the learning rate falls from epoch 200 to 0 at 400",
    ]
    resume(saved("--num_epochs", 100), "--num_epochs", 100)
    assert capsys.readouterr().out == ""


def test_a_decay_epoch_that_older_versions_filled_in_follows_num_epochs_too():
    old = saved("--num_epochs", 101) | {"decay_epoch": 50}
    assert cli.decay_epoch(resume(old, "--num_epochs", 20)) == 10
    assert cli.decay_epoch(resume(old)) == 50


def test_a_typed_decay_epoch_stays(capsys):
    resumed = resume(saved("--num_epochs", 100, "--decay_epoch", 30), "--num_epochs", 400)
    assert cli.decay_epoch(resumed) == 30
    assert "falls from epoch 30 to 0 at 400" in capsys.readouterr().out
    resumed = resume(saved("--num_epochs", 100), "--num_epochs", 400, "--decay_epoch", 7)
    assert cli.decay_epoch(resumed) == 7
    assert "falls from epoch 7 to 0 at 400" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value", "words"), HOSTILE)
def test_hostile_flags_of_a_checkpoint_end_a_resume_in_one_line(name, value, words):
    old = saved() | {name: value}
    if name in cli.NEVER_INHERITED:
        resume(old)
        return
    with pytest.raises(InputError, match=r"latest\.pt: says --"):
        resume(old, "--start_from", "latest")


def test_the_sizes_that_flags_offer_are_those_of_the_networks():
    parser = full_parser()
    assert tuple(parser.flags["vit_size"].choices) == tuple(VIT_SIZES)
    assert tuple(parser.flags["norm"].choices) == models.NORMS
    assert tuple(parser.flags["gan_loss"].choices) == models.GAN_LOSSES
    assert set(cli.BEST_BY.values()) <= set(cli.MEASURES)
