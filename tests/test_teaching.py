"""teaching/: the grader knows right answers, wrong ones and their names, and unwritten ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teaching import checks_data, checks_model, grade, reference, wrong

ROOT = Path(__file__).parent.parent
STUBS = sorted((ROOT / "teaching" / "exercises").glob("*.py"))
PAGE, EXERCISES = (ROOT / "teaching" / "README.md").read_text(), grade.EXERCISES


@pytest.fixture
def run_grader(monkeypatch, capsys):
    """run(words...): what `grade.py words...` prints, and its exit status."""
    def run(*words: str | Path) -> tuple[str, int]:
        monkeypatch.setattr(sys, "argv", ["grade.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            grade.main()
        return capsys.readouterr().out, ended.value.code
    return run


@pytest.mark.parametrize("number", EXERCISES)
def test_the_reference_has_all_points(number):
    """Also the ring and the window, which only stand in reference.py, against one process."""
    for result in grade.grade(EXERCISES[number], reference.ANSWERS[number]):
        assert (result.points, result.message) == (result.part.points, "")


@pytest.mark.parametrize("mistake", wrong.WRONG, ids=lambda mistake: mistake.answer.__name__)
def test_a_wrong_answer_loses_points_and_hears_its_own_words(mistake):
    """And no other's, in any of the parts where it fails as a whole; its case is drawn."""
    failed = [result for part in EXERCISES[mistake.exercise].parts
              if part.function == mistake.function
              and (result := grade.grade_part(part, mistake.exercise, mistake.answer)).message]
    assert failed and all(result.points == 0 for result in failed)
    for result in failed:
        first, _, drawn = result.message.partition("\nthe smallest case that fails:\n")
        assert first == f"it looks as if {mistake.says}" and len(drawn.splitlines()) >= 2


def test_wrong_answers_are_many_and_their_words_differ():
    assert len(wrong.WRONG) >= 25 and {m.exercise for m in wrong.WRONG} == set(EXERCISES)
    assert len({m.says for m in wrong.WRONG}) == len(wrong.WRONG)
    assert f"{len(wrong.WRONG)} wrong answers" in PAGE


def test_untouched_stubs_are_not_written_yet():
    """All of them, ranks too: nothing else is printed, and nothing is given."""
    done = subprocess.run([sys.executable, ROOT / "teaching" / "grade.py"], capture_output=True,
                          text=True)
    *lines, total = done.stdout.splitlines()
    assert len(lines) == len(STUBS) == len(EXERCISES) >= 10 and done.returncode == 1
    assert total == "0 of 150 points" and not done.stderr
    for line, exercise in zip(lines, EXERCISES.values(), strict=True):
        points = sum(part.points for part in exercise.parts)
        assert line == f"{exercise.number} {exercise.title}: 0 of {points} points, not written yet"


@pytest.mark.parametrize("path", STUBS, ids=lambda path: path.stem)
def test_a_stub_says_what_is_to_do(path):
    """Idea, shapes, hints, minutes, and the functions that are graded, each empty."""
    text, number = path.read_text(), path.stem[:2]
    for word in ("The idea. ", "\nShapes. ", "\nHints. ", "\nRead: ", f"grade.py {number}\n"):
        assert word in text, word
    assert re.search(r"about \d+ (minutes|hours)", text.splitlines()[0])
    functions = {part.function for part in EXERCISES[number].parts}
    assert set(re.findall(r"^def (\w+)", text, re.M)) == functions == {*reference.ANSWERS[number]}
    assert text.count("raise NotImplementedError\n") == len(functions) <= 2


def test_a_students_file_is_drawn_as_the_teachers_page_shows(tmp_path, run_grader):
    """A mistake in other words than ours is known by what it does; the rest stands alone."""
    stub = STUBS[0].read_text().replace("    raise NotImplementedError\n", """\
    import torch
    from teaching import reference
    positions = torch.tensor([i for i, _ in enumerate(input_ids)])
    return positions, *reference.layout(input_ids, doc_lens, loss_mask)[1:]
""", 1)
    (tmp_path / STUBS[0].name).write_text(stub)
    said, status = run_grader("1", "--folder", tmp_path)
    example = re.search(r"^    (01 .*?\^)$", PAGE, re.M | re.S)[1].replace("\n    ", "\n")
    title, wrong_part = example.split("\n", 1)
    assert title in said and wrong_part in said and status == 1
    assert said.count("right  [") == 2 and "\n  not written yet  [0/3]" in said


def test_whatever_is_in_a_file_is_answered(tmp_path, run_grader):
    """No file, one that cannot be imported, a function that is gone, one that raises."""
    (tmp_path / "02_mask.py").write_text("def document_mask(cu_seqlens:\n")
    (tmp_path / "03_rope.py").write_text("def rope(x, positions, theta): return positions[99]\n")
    out, _ = run_grader("01", "02", "03", "--folder", tmp_path)
    for said in (f"there is no file 01_*.py in {tmp_path}", "cannot be imported: SyntaxError",
                 "there is no function ntk_theta", "IndexError: ", "0 of 30 points"):
        assert said in out
    assert run_grader("14")[1] == 2


def test_the_examples_by_hand_are_true():
    """What stubs say, from the reference."""
    _, labels, ends = reference.layout(torch.arange(10, 18), (3, 1, 4), None)
    assert labels.tolist() == [11, 12, -100, -100, 15, 16, 17, -100]
    assert ends.tolist() == [0, 3, 4, 8]
    turned = reference.rope(torch.tensor([[[1., 0, 0, 1]]]), torch.tensor([1]), 100.0)[0, 0]
    assert torch.allclose(turned, torch.tensor([1., -0.1, 1, 0.1]).sin().where(
        torch.tensor([False, True, True, False]), torch.tensor([1., 0, 0, 0.1]).cos()))
    assert reference.next_domains({"a": 3, "b": 1}, {"a": 0, "b": 0}, 4) == ["a", "a", "a", "b"]
    step = ((1, 1, 1, 1), (3, 1), (4,), (2, 2)), 2, 1
    assert checks_data.waiting(step, [[[0], [1]], [[2], [3]]]) == 26
    assert checks_data.waiting(step, reference.arrange(*step)) == 24
    shape = checks_model.shape_cases()[0]
    assert reference.count_weights(shape) == 212
    assert list(reference.rank_memory(shape, 16, 1).values()) == [3392, 1192, 128, 1792]
