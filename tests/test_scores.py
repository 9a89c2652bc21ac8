"""Scores of answers are those published; averages and tests of differences by known values."""

import numpy as np
import pytest

import eval as evaluation
from eval import Question
from support import scores
from support.files import write_json


@pytest.mark.parametrize("score, written, answers, expected", [
    # HELMET, substring_exact_match: lower case, no punctuation, no articles, any answer
    (scores.contains, "It is the  answer, forty\ttwo.", ["answer forty-two", "43"], 0),
    (scores.contains, "It is the  answer, forty\ttwo.", ["answer, Forty two"], 1),
    (scores.contains, "theatre", ["atre"], 1),  # articles are whole words
    # HELMET, exact_match on what follows the cue, or on the first line
    (scores.exact_line, " 7\n\ntext", ["7"], 1),
    (scores.exact_line, "label: Label: 7", ["7"], 1),
    (scores.exact_line, "I say\nLabel: 12.\nlabel: 3", ["12"], 1),
    (scores.exact_line, "\n7", ["7"], 0),
])
def test_scores_are_those_of_helmet(score, written, answers, expected):
    assert score(written, Question(np.zeros(1), tuple(answers))) == expected


@pytest.mark.parametrize("written, ranking", [
    (" ID3 > ID1 > ID2", ["3", "1", "2"]), ("[ID: 12] > [ID: 7]", ["12", "7"]),
    ("3>1>3>2", ["3", "1", "2"]), ("Of 2025: 5 > 6 > 7 and 8 > 9", ["5", "6", "7"]),
    ("no idea", []), ("4 > 5 >", ["4", "5"])])
def test_rankings_are_read_as_helmet_does(written, ranking):
    """The longest chain; a passage named twice counts where it came first."""
    assert scores.parse_ranking(written) == ranking


@pytest.mark.parametrize("ranking, gain", [
    ("abcd", 3 + 2 / np.log2(3) + 2 / 2),
    ("acbd", 3 + 2 / np.log2(3) + 2 / 2),  # b and c are equally relevant: either order is ideal
    ("bac", 2 + 3 / np.log2(3) + 2 / 2),
    ("xa", 3 / np.log2(3)),  # one that does not exist takes up a rank
    ("d", 0), ("", 0), ("efghijklmna", 0)])  # eleventh: not among the ten
def test_ndcg(ranking, gain):
    """By hand, with gains linear in the relevance, as trec_eval has it."""
    expected = gain / (3 + 2 / np.log2(3) + 2 / 2)
    assert scores.ndcg(list(ranking), {"a": 3, "b": 2, "c": 2, "d": 0}) == pytest.approx(expected)


def test_paired_test():
    """Right or wrong: the exact binomial, ties apart. Graded: near the share of all sign flips."""
    for wins, losses, p in ((0, 0, 1), (5, 0, 0.0625), (6, 1, 0.125), (10, 2, 0.03857), (3, 3, 1)):
        differences = [1.0] * wins + [-1.0] * losses + [0.0] * 20
        assert scores.paired_p_value(differences) == pytest.approx(p, abs=1e-4)
    d = [0.5, 0.25, -0.1, 0.4, 0.3, 0.2]
    flips = [abs(sum(x if bits >> i & 1 else -x for i, x in enumerate(d))) >= sum(d) - 1e-9
             for bits in range(64)]
    assert scores.paired_p_value(d) == pytest.approx(sum(flips) / 64, abs=0.01)
    rng = np.random.default_rng(0)
    false = sum(scores.paired_p_value(rng.normal(size=20).tolist()) <= 0.05 for _ in range(200))
    assert false <= 20  # 10 expected; 20 is three standard errors more


def evaluation_of(name: str, by_task: dict[str, list[float]]) -> dict:
    rows = []
    for task, values in by_task.items():
        predictions = [{"context": i, "prompt": "p", "answers": ["a"], "score": s}
                       for i, s in enumerate(values)]
        rows.append({"task": task, "length": 1024, "score": float(np.mean(values)), "low": 0.0,
                     "high": 1.0, "chance": 0.0, "n": len(values), "predictions": predictions})
    return {"model": name, "results": rows, "bits_per_byte": []}


def test_comparison_finds_the_real_differences(tmp_path, monkeypatch, capsys):
    """20 of 20 against none is real; 6 wins against 1 is not; unlike questions are refused."""
    y = [0.0] * 6 + [1.0] * 14, [1.0] * 6 + [0.0] + [1.0] * 13
    a = evaluation_of("before", {"x": [0.0] * 20, "y": y[0], "z": [0.5] * 20})
    b = evaluation_of("after", {"x": [1.0] * 20, "y": y[1], "z": [0.5] * 20})
    rows = scores.compare(a, b)
    assert [row["real"] for row in rows] == [True, False, False]
    assert [row["p"] for row in rows] == pytest.approx([2 / 2**20, 0.125, 1.0])
    assert rows[1]["low"] < rows[1]["difference"] < rows[1]["high"]
    for result in (a, b):
        write_json(tmp_path / f"{result['model']}.json", result)
    paths = f"{tmp_path}/before.json,{tmp_path}/after.json"
    monkeypatch.setattr("sys.argv", ["eval.py", "--compare", paths])
    evaluation.main()
    assert "real: 1 of 3" in capsys.readouterr().out
    assert (tmp_path / "before-after.png").stat().st_size > 10_000
    b["results"][1]["predictions"][3]["answers"] = ["another"]
    with pytest.raises(ValueError, match=r"same questions \(y at 1024\)"):
        scores.compare(a, b)


def test_macro_average_is_of_categories():
    """Two tasks of one category weigh as much as one of another; where one lacks, there is none."""
    rows = [{"length": n, "category": c, "score": s} for n, c, s in (
        (1, "recall", 1.0), (1, "recall", 0.0), (1, "icl", 1.0), (2, "recall", 1.0))]
    assert scores.macro_averages(rows) == {1: 0.75}
