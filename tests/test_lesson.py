"""teaching/lesson.ipynb: it runs, it shows what is stored in it, and it has no logic of its own."""

import ast
import base64
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "teaching"
LESSON = nbformat.read(FOLDER / "lesson.ipynb", as_version=4)
CODE = [cell for cell in LESSON.cells if cell.cell_type == "code"]


def shown(cells):
    """Whether each cell prints, and how many pictures it shows. What the haystack is depends on
    the installed packages, and last digits on the machine."""
    return [(any("text" in out for out in cell.outputs),
             sum("image/png" in out.get("data", {}) for out in cell.outputs)) for cell in cells]


def test_the_lesson_runs_and_shows_what_is_stored():
    run = nbformat.from_dict(LESSON)
    for cell in (cell for cell in run.cells if cell.cell_type == "code"):
        cell.outputs = []
    NotebookClient(run, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(FOLDER)}}).execute()
    again = [cell for cell in run.cells if cell.cell_type == "code"]
    assert shown(again) == shown(CODE)
    assert sum(pictures for _, pictures in shown(CODE)) == 7
    assert sum(prints for prints, _ in shown(CODE)) == 4
    said = "".join(out.get("text", "") for cell in again for out in cell.outputs)
    assert "largest difference: " in said and "answer: " in said
    assert float(re.search(r"difference: (\S+)", said)[1]) < 1e-12


def test_stored_pictures_are_small():
    pictures = [base64.b64decode(out.data["image/png"]) for cell in CODE for out in cell.outputs
                if "image/png" in out.get("data", {})]
    assert all(picture[:4] == b"\x89PNG" for picture in pictures)
    assert sum(map(len, pictures)) < 400_000


def test_every_cell_is_explained_in_two_sentences_and_defines_nothing():
    for text, code in zip(LESSON.cells[1::2], CODE, strict=False):
        assert text.cell_type == "markdown"
        words = re.sub(r"^#+ .*$", "", text.source, flags=re.M)
        assert 1 <= len(re.findall(r"[.:?](?=\*\*|\s|$)", words)) <= 4, words
        nodes = list(ast.walk(ast.parse(code.source)))
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
        assert len(code.source.splitlines()) <= 12
