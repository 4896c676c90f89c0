"""The notebook: plain to read off its file, and, slowly, run from top to bottom in a copy of the repository."""

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
import test as test_stage
import train

ROOT = Path(train.__file__).parent
STAGES = {"prepare": prepare, "train": train, "distill": distill, "test_stage": test_stage}
nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install -r requirements-dev.txt")


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "playground.ipynb", as_version=4)


@pytest.fixture
def trees(notebook):
    """The code cells, parsed: they hold no magic commands, so that they are plain Python."""
    return [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_its_outputs_are_stripped(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        left = cell.get("outputs") or cell.get("execution_count")
        assert not left, "clear all outputs before the notebook is committed"


def test_its_cells_are_short_and_define_no_logic(notebook, trees):
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for tree in trees for node in ast.walk(tree) if isinstance(node, logic)]
    assert len(trees) <= 25
    assert max(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code") <= 15


def test_every_stage_is_called_with_flags_that_it_knows(trees):
    names = {}
    called = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
            names[node.targets[0].id] = evaluate(node.value, names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "main":
            STAGES[node.func.value.id].parse_args(evaluate(node.args[0], names))
            called.add(node.func.value.id)
    assert called == STAGES.keys()


def evaluate(expression, names):
    """The value of a notebook's string or list; capital names stand for the strings assigned to them above."""
    return eval(compile(ast.Expression(expression), "playground.ipynb", "eval"), {"__builtins__": {}}, names)


def first_cell(notebook):
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_the_first_cell_clones_and_installs_on_colab_only(notebook, tmp_path, monkeypatch):
    commands = []

    def pretend(words, check):
        commands.append(words)
        if words[0] == "git":
            Path(words[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    exec(first_cell(notebook), {})
    assert (commands, sys.path[0]) == ([], str(tmp_path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    with pytest.raises(SystemExit, match="REPOSITORY is empty: put the address"):
        exec(first_cell(notebook), {})
    assert commands == []
    edited = first_cell(notebook).replace('REPOSITORY = ""', 'REPOSITORY = "https://github.com/somebody/something"')
    exec(edited, {})
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
def test_the_notebook_runs_from_a_fresh_clone_and_shows_what_it_promises(notebook, trees, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install -r requirements-dev.txt")
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.rstrip("\0").split("\0"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    place = {"metadata": {"path": str(copy)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place, coalesce_streams=True).execute()
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    promised = [text for text in texts if isinstance(text, str) and re.fullmatch(r"generated_images/.+\.png", text)]
    assert len(promised) > 10
    for path in promised:
        with Image.open(copy / path) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert max(output.get("text", "").count("\n") for output in outputs) < 30  # progress bars overwrite themselves
    assert not [output for output in outputs if output.output_type == "error"]
    scores = json.loads((copy / "generated_images/playground/test/metrics.json").read_text())
    for direction in ("AtoB", "BtoA"):  # better than the mean image, and each image its own
        table = scores[direction]["paired"]
        assert table["model"]["PSNR"] > table["mean picture"]["PSNR"] + 1
        assert table["model"]["match@1"] > 0.8
