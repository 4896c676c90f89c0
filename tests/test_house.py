"""The rules of the house that can be read off its files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import app
import datasets
import distill
import test as test_stage
import train
from utils import InputError

ROOT = Path(train.__file__).parent
ROOMS = {
    "models": set(),
    "utils": set(),
    "datasets": {"utils"},
    "metrics": {"utils"},
    "weights": {"models", "utils"},
    "train": {"models", "utils", "datasets", "metrics", "weights"},
    "distill": {"models", "utils", "datasets", "metrics", "weights", "train"},
    "test": {"models", "utils", "datasets", "metrics", "weights"},
    "app": {"utils", "datasets", "metrics", "test"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported & ROOMS.keys() <= ROOMS[room]
    assert "argparse" not in imported or room not in ("models", "metrics", "weights")


def test_importing_does_nothing(tmp_path):
    code = (
        "import sys, torch, random, signal; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = ['--bad'];"
        "before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), signal.getsignal(signal.SIGINT);"
        f"import {', '.join(ROOMS)};"
        "assert 'gradio' not in sys.modules;"
        "assert torch.equal(before[0], torch.get_rng_state());"
        "assert before[1:] == (random.getstate(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def commands():
    """All `python FILE.py …` lines of the README, docs, module docstrings and Makefile."""
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    texts += [ast.get_docstring(ast.parse((ROOT / f"{room}.py").read_text())) for room in ROOMS]
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE)[1]
    texts.append(makefile.replace("$(DEMO)", demo).replace("$(BIN)/", "").replace("; \\", "").replace("; fi", ""))
    joined = "\n".join(texts).replace("\\\n", " ")
    return sorted(set(re.findall(r"python (?:train|distill|test|datasets|app)\.py[^\n`#|&;]*", joined)))


def test_there_are_commands_to_check():
    assert len(commands()) > 12


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_parses(command):
    words = command.split()
    stages = {"train.py": train, "distill.py": distill, "test.py": test_stage, "datasets.py": datasets, "app.py": app}
    parse = stages[words[1]].parse_args
    if "--help" in words or "…" in words:
        return
    try:
        parse(words[2:])
    except InputError as error:
        pytest.fail(f"{command}: {error}")


def flags_of(module, argv=("--help",)):
    with pytest.raises(SystemExit) as exit_:
        module.parse_args(list(argv))
    assert exit_.value.code == 0


def test_help_shows_the_flags_and_defaults_that_users_were_promised(capsys):
    flags_of(train)
    text = " ".join(capsys.readouterr().out.split())
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


@pytest.mark.parametrize(
    ("module", "files"),
    [
        (train, ["train.py", "utils.py", "models.py"]),
        (distill, ["distill.py", "train.py", "models.py"]),
        (test_stage, ["test.py"]),
        (app, ["app.py"]),
    ],
)
def test_every_flag_is_read_somewhere(module, files):
    source = "".join((ROOT / file).read_text() for file in files)
    for name in vars(module.parse_args([])):
        assert re.search(rf'args\.{name}\b|"{name}"\]|\("{name}"|, "{name}"', source), name


def test_no_package_shadows_datasets():
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_the_page_names_no_other_server():
    for name in ("index.html", "page.js", "package.json", "package-lock.json"):
        assert "://" not in (ROOT / "examples" / "web" / name).read_text(), name
