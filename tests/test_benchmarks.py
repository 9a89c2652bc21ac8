"""Other people's benchmark files: read, asked and scored as RULER and HELMET do, value by value."""

import json

import numpy as np
import pytest
import torch
from test_data import TOKENIZER
from test_eval import model, options  # noqa: F401

import eval as evaluation
from eval import Example, Question

FOUR = {"input": "Which?", "outputs": ["11", "22", "33", "44"]}
PARIS = {"input": "Where?", "outputs": ["Paris", "Paris, France", "the French capital"]}
KEPT = {"context": "11, 22", "query": "a", "outputs": ["11", "22"]}  # as HELMET keeps RULER's
PAIRS = {"context": '{"k": "v"}', "question": "k", "answer": "v", "demos": [["a", "b"]]}
RAG = {"question": "Who?", "ctxs": [{"title": None, "text": "It was Ann."}], "answers": ["Ann"]}


def to_rank(*ids: str) -> dict:
    return {"query": "q", "ctxs": [{"id": i, "text": "t", "label": label}
                                   for i, label in zip(ids, (3, 1, 0), strict=True)]}


BEST = 3 + 1 / np.log2(3)
SECOND, THIRD = (1 + 3 / np.log2(3)) / BEST, (3 / np.log2(3) + 1 / 2) / BEST  # where 1, or 0, leads


def read(folder, name, *rows):
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = evaluation.find_task(str(path))
    return task, task.examples(TOKENIZER, 0, 1, 1, 0)[0]


@pytest.mark.parametrize("name, row, budget, one_line, scores", [  # RULER, by the task's name
    ("qa_1/validation", PARIS, 32, False, {"Paris": 1, "1\nthe french CAPITAL": 1, "Rome": 0}),
    ("qa_2/test_4096", PARIS, 32, False, {" paris.": 1, "French capital": 0}),
    ("qa_data/niah", PARIS, 128, False, {"Paris": 1 / 3, "PARIS, FRANCE": 2 / 3}),
    ("multivalue/validation", FOUR, 128, False, {"11, 22, 33\n44": 1, "\n\n44": 0.25, "1 1": 0}),
    ("vt/validation", FOUR, 30, False, {"11\n22": 0.5}), ("fwe", FOUR, 50, False, {"1122": 0.5}),
    ("cwe/validation", FOUR, 120, False, {"1. 11 2. 22 3. 33": 0.75, "": 0}),
    ("one", FOUR | {"outputs": "1234567"}, 128, False, {"1234567": 1, "123456": 0}),
    ("caf", FOUR | {"outputs": ["a-b", "caf\u00e9"]}, 128, False, {"ab": 0, "Cafe\u0301": 0.5}),
    # HELMET's recall: the share of needles; its QA and its pairs: a substring, normalized
    ("niah_multivalue/validation_8192", KEPT, 50, False, {"11\n22": 1, "22": 0.5}),
    ("niah_multikey_3", KEPT | {"type_needle_v": "numbers"}, 100, False, {"11": 0.5, "33": 0}),
    ("qa_1/validation", KEPT, 50, False, {"The 2-2": 1, "2 2": 0}),
    ("kv", PAIRS, 100, False, {"no, it\nis V.": 1, "w": 0}),
    ("ask", PAIRS | {"answer": [["an Owl"], ["bat", "cat"]]}, 100, False, {"owl!": 1, "a cat": 1}),
    # HELMET's RAG and re-ranking: the longest chain of IDs, of which an unknown one takes up a rank
    ("nq", RAG, 20, True, {"the Ann-": 1, "An": 0, "joann": 1}),
    ("nq", RAG | {"answers": ["The", "a\u2028b", "cafe\u0301"]}, 20, True,
     {"B": 1, "x": 0, "Caf\u00e9": 1}),
    ("rank", to_rank("7", "8", "9"), 200, True, {
        " ID7 > ID8 > ID9": 1, "8 > 7": SECOND, "[ID: 9] > [ID: 7] > [ID: 8]": THIRD, "no": 0,
        "5 > 7 > 8": THIRD, "7 > 7 > 8": 1, "Of 20: 8 > 7": SECOND}),
    ("rank", to_rank("d1", "d2", "d10"), 200, True, {
        " d1 > d2 > d10": 1, "d10 > d1 > d2.": THIRD, "Ranking: [ID: d2] > [ID: d1]": SECOND}),
    ("rank", to_rank("MED-10", "MED-1", "id_c"), 200, True, {
        "med-10>med-1": 1, "So, ranked: MED-1 > MED-10": SECOND, "MED-7 > MED-10 > MED-1": THIRD,
        "ID_c > MED-10 > MED-1": THIRD})])
def test_files_are_scored_as_their_referees_do(tmp_path, name, row, budget, one_line, scores):
    task, example = read(tmp_path, name, row)
    assert (example.budget, example.one_line) == (budget, one_line)
    found = {written: task.score(written, example.questions[0]) for written in scores}
    assert found == pytest.approx(scores)


@pytest.mark.parametrize("row, prompt", [
    (FOUR, "Which?"), (FOUR | {"answer_prefix": " They are"}, "Which? They are"),
    (FOUR | {"input": "a\u2028b" * 30}, "a\u2028b" * 30), (KEPT, "11, 22\n\nQuestion: a\nAnswer:"),
    (RAG, "...\n\nDocument: It was Ann.\n\nQuestion: Who?\nAnswer:"),
    (RAG | {"ctxs": [{"title": "T", "text": "x"}]}, "... (Title: T): x\n\nQuestion: Who?\nAnswer:"),
    (to_rank("d1", "2", "3"), "...: t\n\n[ID: 3] Document: t\n\nQuery: q\nRanking:")])
def test_nothing_is_added_to_a_prompt(tmp_path, row, prompt):
    _, example = read(tmp_path, "x", row)
    asked = example.questions[0].prompt_ids
    text = TOKENIZER.decode([*example.context_ids[1:], *asked])
    assert text.endswith(prompt.removeprefix("...")) and 0 < len(asked) <= 64
    assert text == prompt or prompt.startswith("...")


@pytest.mark.parametrize("rows, words", [
    ([{"a": 1}], "no known format"), ([[1]], "x.jsonl:1 is a list"), ([], "no JSON objects"),
    ([FOUR, FOUR | {"outputs": ["1", " "]}], "x.jsonl:2 has the answers"), ([RAG, FOUR], "of one"),
    *(([FOUR | {"outputs": wrong}], "the answers") for wrong in ([], "", [3], None)),
    ([RAG | {"answers": ["The", "!"]}], "none of them empty")])
def test_what_cannot_be_scored_is_refused(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, "x", *rows)


def test_answers_end_where_the_referee_stops(model, monkeypatch, tmp_path):  # noqa: F811
    """What ends the text is no part of them. A model that computes no numbers is an error."""
    told = [*TOKENIZER.encode("7\n8"), TOKENIZER.eos_id]
    monkeypatch.setattr(evaluation, "generate", lambda *args, **_: told[:1 + min(
        i for i, token in enumerate(told) if token in args[3])])
    for one_line, written in ((True, "7\n"), (False, "7\n8")):
        example = Example(np.array([256]), (Question(np.array([65]), ("7",)),), 4, one_line)
        assert evaluation.answer_questions(model, TOKENIZER, example, exact=False) == [written]
    for name in ("qa_1/validation", "vt/validation"):  # RULER's are all named so
        read(tmp_path, name, PARIS)
    paths = ",".join(map(str, tmp_path.rglob("*.jsonl")))
    done = evaluation.evaluate(model, options(tmp_path, tasks="", data=paths), "m")
    assert {row["task"] for row in done["results"]} == {"qa_1/validation", "vt/validation"}
    torch.nn.init.constant_(model.layers[0].mlp.up_proj.weight, torch.nan)
    with pytest.raises(ValueError, match="not finite; try --dtype float32"):
        evaluation.answer_questions(model, TOKENIZER, example, exact=False)
