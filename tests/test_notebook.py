"""The notebook: rules that can be read off its file and, slowly, a run from top to bottom in a copy of the repository."""

import ast
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import distill
import prepare
import test as test_command
import train

ROOT = Path(train.__file__).parent
COMMANDS = {"prepare": prepare, "train": train, "distill": distill, "test_command": test_command}
nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install -r requirements-dev.txt")


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "playground.ipynb", as_version=4)


@pytest.fixture
def code(notebook):
    """The sources of the code cells: plain Python without magic commands."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        left = cell.get("outputs") or cell.get("execution_count")
        assert not left, "clear all outputs before you commit"
    assert "https://colab.research.google.com/github" in notebook.cells[0].source


def test_its_cells_are_short_and_define_no_functions(code):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for source in code for node in ast.walk(ast.parse(source)) if isinstance(node, definitions)]
    assert len(code) <= 25
    assert max(len(source.splitlines()) for source in code) <= 15


def test_every_command_is_called_with_flags_that_it_knows(code, monkeypatch):
    monkeypatch.chdir(ROOT)  # for @recipes/...
    constants = {}
    called = set()
    for node in (node for source in code for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
            constants[node.targets[0].id] = evaluate(node.value, constants)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "main":
            COMMANDS[node.func.value.id].parse_args(evaluate(node.args[0], constants))
            called.add(node.func.value.id)
    assert called == COMMANDS.keys()


def evaluate(expression, constants):
    """The value of a string or list in which names stand for strings that were assigned before."""
    return eval(compile(ast.Expression(expression), "playground.ipynb", "eval"), {"__builtins__": {}}, constants)


def test_the_first_cell_clones_and_installs_on_colab_only(code, tmp_path, monkeypatch):
    commands = []

    def pretend(words, check):
        commands.append(words)
        if words[0] == "git":
            Path(words[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    exec(code[0], {})
    assert (commands, sys.path[0]) == ([], str(tmp_path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    with pytest.raises(SystemExit, match="REPOSITORY is empty: enter the address"):
        exec(code[0], {})
    assert commands == []
    exec(code[0].replace('REPOSITORY = ""', 'REPOSITORY = "https://github.com/somebody/something"'), {})
    assert [words[:2] for words in commands] == [["git", "clone"], [sys.executable, "-m"]]
    assert "https://github.com/somebody/something" in commands[0]
    assert sys.path[0] == str(Path.cwd()) == str(tmp_path / "cyclegan")


def test_the_linter_reads_the_notebook():
    ruff = pytest.importorskip("ruff", reason="ruff is missing: pip install -r requirements-dev.txt")
    words = [ruff.find_ruff_bin(), "check", "--show-files", str(ROOT)]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert str(ROOT / "playground.ipynb") in listed.splitlines()


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::jupyter_client", "default:::zmq", "default:::nbclient")
def test_the_notebook_runs_from_a_fresh_clone_and_its_networks_learn(notebook, code, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install -r requirements-dev.txt")
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.rstrip("\0").split("\0"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    resources = {"metadata": {"path": str(copy)}}
    nbclient.NotebookClient(notebook, timeout=3600, resources=resources, coalesce_streams=True).execute()
    shown = {path for source in code for path in re.findall(r'"(generated_images/[^"]+\.png)"', source)}
    assert len(shown) > 10
    for path in shown:
        with Image.open(copy / path) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert max(output.get("text", "").count("\n") for output in outputs) < 30  # progress bars overwrite themselves
    assert not [output for output in outputs if output.output_type == "error"]
    scores = json.loads((copy / "generated_images/playground/test/metrics.json").read_text())
    for direction in ("AtoB", "BtoA"):
        table = scores[direction]["paired"]
        assert table["model"]["PSNR"] > table["mean image"]["PSNR"] + 1
        assert table["model"]["match@1"] > 0.8
