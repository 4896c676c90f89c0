"""Rules that can be read off the files: layout, import direction, options, documented commands, links, words."""

import ast
import dataclasses
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
from models import DiscriminatorConfig, GeneratorConfig
from toolkit import config
from toolkit.config import InitConfig
from utils import InputError

ROOT = Path(train.__file__).parent
COMMANDS = {"train": train, "distill": distill, "test": test_command, "export": export, "app": app, "prepare": prepare}
CORE = ("models", "cyclegan", "datasets", "utils")
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("examples/web/*.md")]
RECIPES = sorted(ROOT.glob("recipes/*.txt"))
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
MODULES |= {f"toolkit.{path.stem}": path for path in ROOT.glob("toolkit/*.py") if path.stem != "__init__"}


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


def test_help_a_typo_and_one_translated_image_import_nothing_slow_that_they_do_not_use(tmp_path):
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

slow = {"matplotlib", "tensorboard", "onnxruntime", "gradio"}
call(train.main, ["--help"], 0, slow | {"torchvision", "torch._dynamo", "jinja2"})
call(train.main, ["--num_epoch", "3"], 2, slow | {"torchvision", "torch._dynamo", "jinja2"})
examples = sys.argv[1] + "/examples/"  # torchvision draws the grid of the results
call(test.main, ["--weights", examples + "day2night.safetensors", "--input", examples + "day.png"], None, slow)
"""
    argv = [sys.executable, "-c", code, str(ROOT)]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# -- options -----------------------------------------------------------------------------------


def options_of(*kinds):
    """The options that dataclasses declare: flags, in order, and the names of their fields."""
    fields = [field for kind in kinds for field in dataclasses.fields(kind) if "help" in field.metadata]
    return [(field.metadata.get("flag", field.name), field.name) for field in fields]


def kinds_of(module):
    """The dataclasses in a module that declare options."""
    values = vars(sys.modules[module]).values()
    return [kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind) and options_of(kind)]


def help_of(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.parse_args(["--help"])
    assert exit_.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_options_and_defaults_that_users_were_promised(capsys):
    text = help_of(train, capsys)
    promised = """
        start_from 0, num_epochs 200, dataset_name horse2zebra, batch_size 10, img_height 256, img_width 256, channels 3,
        num_residual 9, lambda_cycle 10.0, load_scale 1.12, ngf 64, ndf 64, n_downsampling 2, n_layers_D 3, max_mult_D 8,
        lambda_identity 5.0, buffer_size 50, lr 0.0002, beta1 0.5, beta2 0.999, checkpoint_interval 10,
        sample_interval 200, keep_checkpoints 0, seed 0
    """
    args = train.parse_args([])
    for name, default in re.findall(r"(\w+) ([\w.]+)", promised):
        assert f"--{name} " in text
        assert str(getattr(args, name)) == default
        assert f"(default: {default})" in text


def test_help_of_distill_shows_its_own_defaults(capsys):
    text = help_of(distill, capsys)
    assert "which generators get a student (default: both; of a single file the one in it)" in text
    assert "name of the run and its folders (default: TEACHER_student or TEACHER_scratch)" in text


@pytest.mark.parametrize("name", ["train", "distill", "test", "export", "app"])
def test_every_option_is_read_somewhere(name):
    read = set()
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    fields = dict(options_of(*kinds_of("train"), *kinds_of(name)))
    options = vars(COMMANDS[name].parse_args([])).keys() - {"given"}
    assert {option for option in options if fields.get(option, option) not in read} == set()


def test_no_option_is_declared_twice():
    shared = [flag for flag, _ in options_of(*config.SHARED_CONFIGS.values(), *config.RUN_CONFIGS.values())]
    declared = shared + [flag for flag, _ in options_of(GeneratorConfig, DiscriminatorConfig, InitConfig)]
    assert len(declared) == len(set(declared))
    assert set(declared) == train.make_parser().options.keys()
    own = [flag for flag, _ in options_of(distill.DistillationConfig)]
    assert not set(own) & set(declared)
    assert {*own, *shared} == distill.make_parser().options.keys()


# -- documents ---------------------------------------------------------------------------------


def commands():
    """All `python FILE.py …` lines of documents, recipes, docstrings and the Makefile."""
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *RECIPES)]
    texts += [ast.get_docstring(tree(module)) for module in MODULES]
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE)[1]
    texts.append(makefile.replace("$(DEMO)", demo).replace("$(BIN)/", "").replace("; \\", "").replace("; fi", ""))
    joined = "\n".join(texts).replace("\\\n", " ")
    found = re.findall(rf"python (?:{'|'.join(COMMANDS)})\.py[^\n`#|&;)]*", joined)
    return sorted({command.strip() for command in found})


def test_there_are_commands_to_check():
    assert len(commands()) > 20


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "…" in words:  # cut short
        words = words[: words.index("…")]
    words = [word for word in words if word != "--help" and "…" not in word]
    if words[1:] == ["prepare.py"]:
        return
    try:
        COMMANDS[words[1].removesuffix(".py")].parse_args(words[2:])
    except InputError as error:
        pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_parses_and_its_options_are_commented(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = recipe.read_text(encoding="utf-8")
    name = re.search(rf"^# +python (\w+)\.py @recipes/{recipe.name}", text, re.MULTILINE)[1]
    assert COMMANDS[name].parse_args([f"@{recipe}"]).given
    head, *blocks = text.split("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    for block in blocks:  # a heading, or a comment on each line
        assert block.startswith("#") or all("#" in line for line in block.splitlines()), block


def anchors(page):
    """What links can lead to within a page: its headings as a page of a repository is shown."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "lines", "words"), [("README.md", 140, 1500), ("docs/results.md", 90, None)])
def test_the_first_pages_are_short(page, lines, words):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= lines
    assert words is None or len(text.split()) <= words


def test_the_page_names_no_other_server():
    folder = ROOT / "examples" / "web"
    for path in (*folder.glob("*.html"), *folder.glob("*.js"), *folder.glob("package*.json")):
        assert "://" not in path.read_text(), path


# -- words -------------------------------------------------------------------------------------

LEFT_OUT = re.compile(  # private words; the field has its own: module, command, data loader, micro-batch, artefact
    r"\b(rooms?|house|story|stories|floors?|family|families|stages?|lessons?|feed|blots?|graves?|pieces?|rests)\b"
    r"|\b(comes? along|coming along|obey(s|ed|ing)?|halvings?|doublings?|averaged nets|mean picture|in no relation)\b"
    r"|\b(is|are|be) refused as\b|\bdiscriminators? (may |can )?rest\b|\btaken for an? |\bleading features\b"
    r"|\blocal server that misbehaves\b|\bwords = f?[\"']|/work/(main|shared)\b",
    re.IGNORECASE,
)
USUAL = re.compile(  # the same words in their ordinary sense, or as keys of saved files
    r"\b(torch|math)\.floor\b|\bmake room\b|\broom(?=[=`,])|\bDraw a house\b|\bfamily=socket\b|\bfeed-forward\b"
    r"|[\"'`](stage|piece|place)[\"'`]|\bstage, run_name\b",
    re.IGNORECASE,
)
TEXTS = ("*.py", "*.md", "toolkit/**/*.py", "toolkit/templates/*", "tests/*.py", "benchmarks/*.py", "benchmarks/*.md")
TEXTS += (
    "docs/**/*.md",
    "recipes/*",
    "examples/**/*.py",
    "examples/web/*.js",
    "examples/web/*.html",
    "*.ipynb",
    "Makefile",
)


def test_left_out_words_are_not_used():
    found = []
    for path in sorted({path for pattern in TEXTS for path in ROOT.glob(pattern)} - {Path(__file__)}):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = LEFT_OUT.search(USUAL.sub("", line))
            if match:
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []
