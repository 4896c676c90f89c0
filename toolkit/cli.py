"""The command line: options from dataclass fields, argument files, and how saved options come back."""

import argparse
import copy
import dataclasses
import json
import re
import shlex
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from toolkit import foreign_flags
from utils import InputError, existing_or_new_path, in_range, range_in_words, say

REMOVED = {"--norm_output": "GeneratorConfig(norm_output=True) in Python (docs/experiments/norm_output.md)"}
NEVER_INHERITED = frozenset({"start_from", "overwrite", "dry_run", "device", "run_name"})  # of one call alone


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that remembers which options were given, and reads argument files, in which # begins a comment."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)
        self.options: dict[str, argparse.Action] = {}  # those of add_options, by name

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return [as_value(word) for word in shlex.split(arg_line, comments=True)]
        except ValueError as error:
            self.error(f"argument file, {arg_line.strip()}: {error}")

    def error(self, message: str) -> NoReturn:
        for flag, replacement in REMOVED.items():
            if flag in message.replace("=", " ").split():
                message = f"{flag} is no longer an option; use {replacement}"
        raise InputError(f"{message}; all flags: python {self.prog} --help")

    def _refuse(self, unknown: Sequence[str], given: set[str]) -> NoReturn:
        """Raise InputError for words that are no options here; those of other projects are translated."""
        answers, others = foreign_flags.answers(unknown, given)
        for i, answer in enumerate(answers):
            ours = re.findall(r"(?<!\S)--[\w-]+", answer.partition(" → ")[2])
            if any(flag not in self._option_string_actions for flag in ours):
                answers[i] = f"{answer}, which {self.prog} does not need: leave it out"
        messages = [f"flags of another project: {', '.join(answers)} (docs/coming_from.md)"] if answers else []
        messages += [f"unrecognized arguments: {' '.join(others)}"] if others else []
        self.error("; ".join(messages))

    def parse_args(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # ty: ignore
        """Read the command line; args.given names the options that were given."""
        unset = object()
        try:
            words = [as_value(word) for word in (sys.argv[1:] if argv is None else argv)]
            args, unknown = self.parse_known_args(words, argparse.Namespace(**dict.fromkeys(self.options, unset)))
        except UnicodeDecodeError as error:
            self.error(f"an argument file is not text ({error})")
        args.given = {name for name in self.options if getattr(args, name) is not unset}
        if unknown:
            self._refuse(unknown, args.given)
        for name in self.options.keys() - args.given:
            setattr(args, name, copy.copy(self.options[name].default))
        return args


def as_value(word: str) -> str:
    """Put a space before numbers such as -1000,3000, which argparse would take for an option."""
    return f" {word}" if re.match(r"-[\d.]+,", word) else word


def add_options(parser: Parser, title: str, kind: Any, inherited_from: str = "") -> None:
    """Make command-line options of the fields of a dataclass that were declared with utils.option.

    inherited_from: the owner of the values of options that are not given; these are None then
    """
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            name = field.metadata.get("flag", field.name)
            parser.options[name] = _add_option(group, f"--{name}", field, types[field.name], inherited_from)


def _add_option(group: Any, flag: str, field: Any, hint: Any, inherited_from: str) -> argparse.Action:
    given = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    help = given["help"].replace("%", "%%")
    is_switch = hint is bool and default is False
    if inherited_from:
        help = f"{help.split(' (default')[0]} (default: {inherited_from})"
        default = None
    elif default not in (None, []) and not is_switch and "default" not in help:
        help += " (default: %(default)s)"
    if is_switch and not inherited_from:
        return group.add_argument(flag, action="store_true", help=help)
    if bool in (hint, *typing.get_args(hint)):
        return group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help)
    convert = argument_type(given["parse"] if "parse" in given else _number_parser(hint, given))
    shape = {name: given.get(name) for name in ("choices", "nargs", "metavar")}
    return group.add_argument(flag, type=convert, default=default, help=help, **shape)


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the message of a ValueError."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _number_parser(hint: Any, given: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return what turns text into a value of a field's type, within its range."""
    kind = next(kind for kind in (*typing.get_args(hint), hint) if kind in (int, float, Path, str))
    if kind in (Path, str):
        return existing_or_new_path if kind is Path else str
    limits = {"most": 10**7, **given} if kind is int else given
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        with suppress(ValueError):
            if in_range(kind(text), **limits):
                return kind(text)
        raise ValueError(f"given {text!r}, expected {noun}, {range_in_words(**limits)}")

    return parse


def config_of(kind: Any, args: argparse.Namespace) -> Any:
    """Fill a dataclass from the options of its fields; a field without an option takes one of its own name, if any.

    raises: InputError if the dataclass refuses the values
    """
    names = {field.metadata.get("flag", field.name): field.name for field in dataclasses.fields(kind)}
    try:
        return kind(**{names[flag]: value for flag, value in vars(args).items() if flag in names})
    except ValueError as error:
        raise InputError(f"--{error}") from error


def config_fields(args: argparse.Namespace, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a TrainConfig that the options of some dataclasses fill; kinds: the dataclasses by field."""
    configs = {name: config_of(kind, args) for name, kind in kinds.items()}
    return {**configs, "flags": plain_args(args), "given": frozenset(args.given)}


def changed(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """Return a copy of the options in which some have other values."""
    return argparse.Namespace(**{**vars(args), **values})


def plain_args(args: argparse.Namespace) -> dict:
    """Return the options as plain values, which a file can hold without code; paths become text."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "given"}, default=str))


def refuse_both(parser: Parser, args: argparse.Namespace, *pairs: tuple[str, str]) -> None:
    """Refuse pairs of options that cannot be given together."""
    for one, other in pairs:
        if {one, other} <= args.given:
            parser.error(f"--{one} and --{other} contradict each other: give one of them")


def refuse_contradictions(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse options of a new run together with --start_from."""
    for flag in ("overwrite", "init_from"):
        if flag in args.given and args.start_from != "0":
            parser.error(f"--{flag} contradicts --start_from {args.start_from}: give one of them")


def saved_args(
    parser: Parser, saved: Any, path: object, skip: Collection[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Return the options of a state by name, defaults for those newer than it; raise InputError if they cannot be read."""
    try:
        values = {name: copy.copy(action.default) for name, action in parser.options.items() if name not in skip}
        newer = [f"--{name}" for name in values if name not in saved]
        for name in values.keys() & saved.keys():
            values[name] = _as_typed(parser.options[name], saved[name])
        num_epochs = values.get("num_epochs")  # None where a student inherits it from its teacher
        # A default is saved as None, except by the first versions, which filled it in and had no --dry_run.
        if "dry_run" not in saved and num_epochs is not None and values.get("decay_epoch") == num_epochs // 2:
            values["decay_epoch"] = None  # it changes with --num_epochs
    except Exception as error:  # an edited file can raise anything
        raise InputError(f"{path}: its flags cannot be read ({str(error)[:160]}); use another checkpoint") from error
    if newer and not quiet:
        say(f"{path}: older than {', '.join(newer)}; these have their defaults")
    return values


def _as_typed(action: argparse.Action, value: Any) -> Any:
    """Return a saved value as the command line would give it: text becomes a path again; raise an error if it could not."""
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"given {value!r}, expected true or false")
        return value
    convert: Any = action.type
    if action.nargs:
        return [convert(text) for text in value]
    value = convert(",".join(map(str, value)) if isinstance(value, list) else str(value))
    if action.choices and value not in action.choices:
        raise ValueError(f"given {value!r}, expected one of {', '.join(map(str, action.choices))}")
    return value


def resume_args(
    parser: Parser, args: argparse.Namespace, checkpoint: tuple[dict, Path], fixed: Collection[str]
) -> argparse.Namespace:
    """Take options that were not given from a training state, print those that change; raise InputError for fixed ones."""
    state, path = checkpoint
    old = saved_args(parser, state.get("args"), path, NEVER_INHERITED)
    before = plain_args(argparse.Namespace(**old))
    now = plain_args(args)
    for name in sorted(args.given - NEVER_INHERITED):
        if before[name] != now[name]:
            if name in fixed:
                raise InputError(f"--{name} {now[name]}: {path.parent} has {before[name]}; leave the flag out")
            say(f"changed on resume: --{name} {before[name]} → {now[name]}")
    resumed = changed(args, **{name: value for name, value in old.items() if name not in args.given})
    if before["num_epochs"] != resumed.num_epochs:
        decay_epoch = resumed.num_epochs // 2 if resumed.decay_epoch is None else resumed.decay_epoch
        say(f"the learning rate falls from epoch {decay_epoch} to 0 at {resumed.num_epochs}")
    return resumed
