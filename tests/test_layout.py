"""The five files keep their order: imports point one way and do nothing, every option is read."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import sft
import train

ROOT = Path(__file__).parent.parent
ORDER = ["data", "model", "eval", "train", "sft"]  # each may import what stands before it
FILES = [ROOT / f"{name}.py" for name in ORDER]
SUPPORT = sorted((ROOT / "support").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    """data and model import none of the five; the others only what stands to their left."""
    allowed = set() if path.stem in ("data", "model") else set(ORDER[:ORDER.index(path.stem)])
    assert imported(path) & set(ORDER) <= allowed


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.stem)
def test_support_is_a_leaf(path):
    """Plumbing knows strings, arrays and tensors, never one of the five; and no file is long."""
    assert not imported(path) & set(ORDER)
    assert len(path.read_text().splitlines()) <= 350


# Lines, explanation included.
BUDGETS = {"data": 700, "model": 900, "eval": 600, "train": 750, "sft": 360}
LONG = {"train_step": 90, "main": 90}  # functions that may be longer than 60 lines


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_five_files_are_an_afternoon():
    """Lines, bytes and columns, so that the one is not bought with the other."""
    lines = {path.stem: count_lines([path]) for path in FILES}
    assert all(lines[name] <= most for name, most in BUDGETS.items()), lines
    assert sum(lines.values()) <= 3200, lines
    assert sum(path.stat().st_size for path in FILES) <= 160_000
    assert count_lines(SUPPORT) <= 2100
    assert count_lines(list((ROOT / "tests").rglob("*.py"))) <= 6000
    for path in [*FILES, *SUPPORT]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_function_is_long(path):
    """A function fits on a screen."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 < LONG.get(node.name, 60), node.name


def test_training_on_packed_data_needs_five_packages():
    """Everything else (datasets, matplotlib, ...) is imported inside the function that uses it."""
    for path in [*FILES, *SUPPORT]:
        top = ast.parse(path.read_text())
        top.body = [node for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name.partition(".")[0] for node in top.body if isinstance(node, ast.Import)
                 for alias in node.names}
        names |= {(node.module or "").partition(".")[0] for node in top.body
                  if isinstance(node, ast.ImportFrom) and not node.level}
        others = names - set(sys.stdlib_module_names) - {*ORDER, "support"}
        assert others <= {"torch", "numpy", "tiktoken", "safetensors", "tqdm"}, path


def test_importing_does_nothing():
    """No process group, no CUDA context, no output and no change of the environment."""
    code = ("import os; before = dict(os.environ); import data, model, eval, train, sft, torch; "
            "assert dict(os.environ) == before and not torch.distributed.is_initialized() "
            "and not torch.cuda.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module, config", [
    (data, data.PackConfig), (data, data.TokenizeConfig), (evaluation, evaluation.EvalConfig),
    (train, train.TrainConfig), (sft, sft.SftConfig)], ids=lambda x: x.__name__)
def test_every_option_is_read(module, config):
    """An option that nothing reads would be an option without effect."""
    files = [module.__file__, train.__file__, *SUPPORT]
    source = "".join(Path(file).read_text() for file in files)
    for field in dataclasses.fields(config):
        assert f"config.{field.name}" in source, field.name


def test_no_pickle():
    """Weights and state are safetensors and JSON; nothing that could run code is ever read."""
    for path in [*FILES, *SUPPORT]:
        assert not {"pickle", "shelve", "dill", "joblib"} & imported(path)
        assert "torch.load" not in path.read_text() and "torch.save" not in path.read_text()
        assert "allow_pickle=True" not in path.read_text()
