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
from support.cli import GROUPS

ROOT = Path(__file__).parent.parent
ORDER = ["data", "model", "eval", "train", "sft"]  # each may import what stands before it
FILES = [ROOT / f"{name}.py" for name in ORDER]
SUPPORT = sorted((ROOT / "support").glob("*.py"))


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Packages that a file imports, wherever in the file; or only those at its top level."""
    names, tree = set(), ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("support" if node.level else node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_one_way_and_functions_fit_on_a_screen(path):
    """data and model import none of the five; the others only what stands to their left."""
    allowed = set() if path.stem in ("data", "model") else set(ORDER[:ORDER.index(path.stem)])
    assert imported(path) & set(ORDER) <= allowed
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 < LONG.get(node.name, 60), node.name


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.stem)
def test_support_is_a_leaf(path):
    """Plumbing knows strings, arrays and tensors, never one of the five; and no file is long."""
    assert not imported(path) & set(ORDER)
    assert len(path.read_text().splitlines()) <= 350


BUDGETS = {"data": 700, "model": 900, "eval": 600, "train": 750, "sft": 360}  # lines
LONG = {"train_step": 90, "main": 90}  # functions that may be longer than 60 lines


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_five_files_are_an_afternoon():
    """Lines, bytes and columns, so that the one is not bought with the other."""
    lines = {path.stem: count_lines([path]) for path in FILES}
    assert all(lines[name] <= most for name, most in BUDGETS.items()), lines
    assert sum(lines.values()) <= 3200, lines
    assert sum(path.stat().st_size for path in FILES) <= 160_000
    assert count_lines(SUPPORT) <= 3260
    assert count_lines(list((ROOT / "tests").rglob("*.py"))) <= 7100
    for path in [*FILES, *SUPPORT]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path


def test_training_on_packed_data_needs_five_packages_and_no_pickle():
    """Others are imported where they are used; nothing that could run code is ever read."""
    for path in [*FILES, *SUPPORT]:
        others = imported(path, True) - set(sys.stdlib_module_names) - {*ORDER, "support"}
        assert others <= {"torch", "numpy", "tiktoken", "safetensors", "tqdm"}, path
        assert not {"pickle", "shelve", "dill", "joblib"} & imported(path)
        for name in ("torch.load", "torch.save", "allow_pickle=True"):
            assert name not in path.read_text(), path


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
def test_every_option_is_read_and_has_its_group_in_help(module, config):
    """An option that nothing reads would be an option without effect."""
    files = [module.__file__, train.__file__, *SUPPORT]
    source = "".join(Path(file).read_text() for file in files)
    for field in dataclasses.fields(config):
        assert f"config.{field.name}" in source, field.name
        assert " ".join(GROUPS.values()).split().count(field.name) == 1, field.name
