"""Rules that can be read off the files: layout, import direction, documented commands, links."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import app
import distill
import export
import prepare
import test as test_command
import train
from utils import InputError

ROOT = Path(train.__file__).parent
COMMANDS = {"train": train, "distill": distill, "test": test_command, "export": export, "app": app, "prepare": prepare}
CORE = ("models", "cyclegan", "datasets", "utils")
MODULES = {path.stem: path for path in ROOT.glob("*.py")} | {
    f"toolkit.{path.stem}": path for path in (ROOT / "toolkit").glob("*.py") if path.stem != "__init__"
}


def tree(module):
    return ast.parse(MODULES[module].read_text())


def imports(module):
    """The modules that a file imports, ours by their full name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module == "toolkit":
            found |= {f"toolkit.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def parameters(module):
    return {arg.arg for node in ast.walk(tree(module)) if isinstance(node, ast.arguments) for arg in node.args}


# -- layout and import direction ---------------------------------------------------------------


def test_the_root_shows_the_commands_and_the_core_alone():
    assert {name for name in MODULES if "." not in name} == {*COMMANDS, *CORE}


def test_imports_have_no_cycle():
    graph = {module: imports(module) & MODULES.keys() for module in MODULES}
    while leaves := [module for module, needed in graph.items() if not needed]:
        for module in leaves:
            del graph[module]
        graph = {module: needed - set(leaves) for module, needed in graph.items()}
    assert not graph


@pytest.mark.parametrize("module", MODULES)
def test_nothing_below_imports_a_command(module):
    allowed = {"train"} if module == "distill" else set()
    assert imports(module) & COMMANDS.keys() <= allowed


def test_utils_imports_nothing_of_ours():
    assert not imports("utils") & MODULES.keys()


@pytest.mark.parametrize("module", ["models", "cyclegan"])
def test_networks_and_losses_know_no_command_line_path_or_image_file(module):
    assert not imports(module) & {"argparse", "pathlib", "PIL", "toolkit.files", "toolkit.cli", "toolkit.images"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in COMMANDS and module != "toolkit.cli"])
def test_nothing_below_the_commands_takes_the_command_line(module):
    assert "argparse" not in imports(module)
    assert "args" not in parameters(module)


def test_no_package_shadows_datasets():
    assert not (ROOT / "datasets" / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("module", MODULES)
def test_nothing_ends_the_program_behind_the_back_of_cleaning_up(module):
    assert "os._exit" not in MODULES[module].read_text()


def test_importing_does_nothing(tmp_path):
    code = (
        "import sys, torch, random, signal; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = ['--bad'];"
        "before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), signal.getsignal(signal.SIGINT);"
        f"import {', '.join(MODULES)};"
        "assert 'gradio' not in sys.modules;"
        "assert torch.equal(before[0], torch.get_rng_state());"
        "assert before[1:] == (random.getstate(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_help_a_typo_and_one_translated_image_wait_for_nothing_they_do_not_use(tmp_path):
    """Each of these imports takes as long as a third of torch, or more."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import train, test

def call(main, argv, code, unused):
    try:
        main(argv)
    except SystemExit as error:
        assert error.code == code, error.code
    assert not unused & sys.modules.keys(), (argv, unused & sys.modules.keys())

heavy = {"torchvision", "matplotlib", "torch._dynamo", "tensorboard", "onnxruntime", "gradio"}
call(train.main, ["--help"], 0, heavy | {"jinja2"})
call(train.main, ["--num_epoch", "3"], 2, heavy | {"jinja2"})
examples = sys.argv[1] + "/examples/"
call(test.main, ["--weights", examples + "day2night.safetensors", "--input", examples + "day.png"], None, heavy)
"""
    words = [sys.executable, "-c", code, str(ROOT)]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# -- commands and flags ------------------------------------------------------------------------


def commands():
    """All `python FILE.py …` lines of the README, docs, docstrings and Makefile."""
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))]
    texts += [ast.get_docstring(tree(module)) for module in MODULES]
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE)[1]
    texts.append(makefile.replace("$(DEMO)", demo).replace("$(BIN)/", "").replace("; \\", "").replace("; fi", ""))
    joined = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(rf"python (?:{'|'.join(COMMANDS)})\.py[^\n`#|&;)]*", joined)
    return sorted({command.strip() for command in found})


def test_there_are_commands_to_check():
    assert len(commands()) > 20


def shortened(words):
    """A command that the docs cut short with "…" has to parse as far as it goes."""
    return words[: words.index("…")] if "…" in words else words


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command):
    words = shortened(shlex.split(command))
    if "--help" in words or "…" in command.split()[-1]:
        words = [word for word in words if word != "--help" and "…" not in word]
    if len(words) == 2 and words[1] == "prepare.py":
        return
    try:
        COMMANDS[words[1].removesuffix(".py")].parse_args(words[2:])
    except InputError as error:
        pytest.fail(f"{command}: {error}")


def anchors(page):
    """What links can lead to within a page: its headings as a page of a repository is shown."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def help_of(module, capsys):
    with pytest.raises(SystemExit) as exit_:
        module.parse_args(["--help"])
    assert exit_.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_flags_and_defaults_that_users_were_promised(capsys):
    text = help_of(train, capsys)
    promised = {
        **{"start_from": "0", "num_epochs": "200", "dataset_name": "horse2zebra", "batch_size": "10"},
        **{"img_height": "256", "img_width": "256", "channels": "3", "num_residual": "9", "lambda_cycle": "10.0"},
        **{"load_scale": "1.12", "ngf": "64", "ndf": "64", "n_downsampling": "2", "n_layers_D": "3", "max_mult_D": "8"},
        **{"lambda_identity": "5.0", "buffer_size": "50", "lr": "0.0002", "beta1": "0.5", "beta2": "0.999"},
        **{"checkpoint_interval": "10", "sample_interval": "200", "keep_checkpoints": "0", "seed": "0"},
    }
    args = train.parse_args([])
    for name, default in promised.items():
        assert f"--{name} " in text
        assert str(getattr(args, name)) == default
        assert f"(default: {default})" in text


def read_names(module):
    """The flags that a file reads: as args.NAME, or as a field of a config that flags fill by name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args" and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            found |= fields(node)
    return found


@pytest.mark.parametrize("name", ["train", "distill", "test", "export", "app"])
def test_every_flag_is_read_somewhere(name):
    rooms = {"flags", "models", "cyclegan", name} | ({"train"} if name == "distill" else set())
    read = set().union(*map(read_names, rooms))
    assert vars(COMMANDS[name].parse_args([])).keys() - {"given"} <= read


def test_no_flag_is_declared_twice():
    declared = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "add" and node.args:
                declared.append((room, ast.literal_eval(node.args[0])))
    shared = [flag for room, flag in declared if room == "flags"]
    assert len(shared) == len(set(shared))
    assert not set(shared) & {flag for room, flag in declared if room in ("train", "distill")}


def test_flags_are_those_of_a_parser_of_ours():
    assert issubclass(type(train.make_parser()), argparse.ArgumentParser)
    assert not train.make_parser().allow_abbrev


def test_the_page_names_no_other_server():
    folder = ROOT / "examples" / "web"
    for path in (*folder.glob("*.html"), *folder.glob("*.js"), *folder.glob("package*.json")):
        assert "://" not in path.read_text(), path
