"""Tests of eval.py: an oracle that reads the prompt scores 1 on every task, a guesser chance."""

import dataclasses
import json
import os
import re
import socket
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import TOKENIZER, byte_tokenizer

import eval as evaluation
from eval import Example, Question
from model import Transformer, init_parallel, preset_config, save_pretrained
from support import scores, tasks, toy

TEXT = evaluation.GROUPS["text"]
TOKENS = ["recall_bare", "recall", "icl"]


@pytest.fixture(scope="module")
def bpe():
    """A small tokenizer: bytes, and the pairs of letters that code has most often."""
    text = "\n".join(evaluation.code_lines()[:4000]).encode()
    pairs = Counter(pair for pair in pairwise(text) if bytes(pair).isalpha()).most_common(500)
    merges = {bytes(pair): 256 + i for i, (pair, _) in enumerate(pairs)}
    return byte_tokenizer(r"\p{L}+|[^\p{L}]", merges, begin=256 + len(merges))


@pytest.fixture
def model():
    return Transformer(preset_config("tiny", TOKENIZER.vocab_size)).init_weights(0)


def make(tokenizer, name: str, length: int, n: int, questions: int = 1) -> list[Example]:
    return evaluation.TASKS[name].examples(tokenizer, length, n, questions, 0)


def text_of(tokenizer, example: Example) -> str:
    return tokenizer.decode(example.context_ids[len(tokenizer.begin):])


@pytest.mark.parametrize("task, length", [("recall_bare", 160), ("recall", 256), ("recall", 777),
                                          ("icl", 256)])
def test_examples_in_special_tokens_fill_the_length_and_hold_their_answers(task, length):
    """Context, question and answer fit the length; the answer stands where the depth says."""
    shared = evaluation.TASKS[task].shared
    for example in make(TOKENIZER, task, length, 4, shared):
        text = example.context_ids.tolist()
        assert text[0] == TOKENIZER.bos_id and len(example.questions) == shared
        for q in example.questions:
            answer = TOKENIZER.encode_with_specials(q.answers[0]).tolist()
            total = len(text) + len(q.prompt_ids) + len(answer)
            if task == "icl":
                assert length - toy.ICL_LINE <= total <= length
                lines = np.array(text[1:]).reshape(-1, toy.ICL_LINE)
                topic = next(row for row in toy.TOPICS if q.prompt_ids[1] in row)
                assert set(lines[np.isin(lines[:, 1], topic), 2]) == set(answer)
            else:
                pair = [toy.PAIR, int(q.prompt_ids[1]), *answer]
                start = round(q.depth * (len(text) - 1)) + 1
                assert total == length and text[start:start + toy.PAIR_LEN] == pair
                assert [i for i in range(len(text)) if text[i:i + 2] == pair[:2]] == [start]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("kind, length", [("bytes", 5000), ("bpe", 4000)])
def test_text_examples_are_what_they_say(bpe, name, kind, length):
    """With two tokenizers: length, depths, demonstrations, and no two alike."""
    tokenizer, seen = TOKENIZER if kind == "bytes" else bpe, set()
    for example in make(tokenizer, name, length, 10):
        (q,) = example.questions
        total = len(example.context_ids) + len(q.prompt_ids) + example.budget
        assert 0.97 * length <= total <= length, total
        text, prompt = text_of(tokenizer, example), tokenizer.decode(q.prompt_ids)
        assert len(set(q.answers)) == len(q.answers) and all(answer in text for answer in q.answers)
        if q.depth is not None:
            assert text[round(q.depth * len(text)):].startswith(q.answers[0])
        assert "icl" in name or "rerank" in name or not any(a in prompt for a in q.answers)
        budgets = {"recall": 100, "ruler": 128, "icl": 20, "rerank": 200}  # the referees'
        assert example.budget == budgets[evaluation.TASKS[name].category]
        assert example.one_line == (name[:3] in ("icl", "rer"))
        if name == "json_kv":
            context, _, after = text.partition("}")
            pairs = json.loads(context[context.index("{"):] + "}")
            demos = re.findall(r"^Key: (\S+)\nCorresponding value: (\S+)$", after, re.MULTILINE)
            assert len(demos) == 2 and all(pairs[key] == value for key, value in demos)
            assert q.answers[0] not in after and not any(key in prompt for key, _ in demos)
        seen.add((text, prompt))
    assert len(seen) == 10


def test_depths_are_spread_evenly():
    """Each fifth of the context has its share of the answers, 8 of 40, to within three."""
    depths = [q.depth for e in make(TOKENIZER, "needle", 3000, 40) for q in e.questions]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert all(5 <= count <= 11 for count in counts), depths


def test_labels_are_dealt_anew_and_examples_balanced(bpe):
    """The same class has different numbers in different contexts; a round has every class once."""
    mappings = set()
    for example in make(bpe, "icl_6", 1500, 20):
        labels = [int(label) for label in re.findall(r"\nlabel: (\d)", text_of(bpe, example))]
        for i in range(0, len(labels) - 5, 6):
            assert sorted(labels[i:i + 6]) == list(range(6))
        asked = bpe.decode(example.questions[0].prompt_ids).split("\n")[2]
        assert asked and f"\n\n{asked}\nlabel" not in text_of(bpe, example)
        mappings.add(tuple(labels[:6]))
    assert len(mappings) > 15


def solve(name: str, text: str, prompt: str) -> str:
    """Read the answer out of the prompt, knowing the task's form but none of its answers."""
    symbol = r"<\|[^|]\|>"
    if name == "icl":
        labels = dict(re.findall(rf"<\|pair\|>({symbol})({symbol})", text))
        letters = [toy.SYMBOL_NAMES[i:i + 4] for i in range(0, 24, 4)]  # of each topic
        topic = next(row for row in letters if re.search(symbol, prompt)[0][2] in row)
        return next(labels[f"<|{c}|>"] for c in topic if f"<|{c}|>" in labels)
    if name.startswith("recall"):
        key = re.escape(re.search(rf"<\|ask\|>({symbol})", prompt)[1])
        return re.search(rf"<\|pair\|>{key}((?:{symbol})+)", text)[1]
    if name == "json_kv":
        key = re.search(r"Key: (\S+)", prompt)[1]
        return re.search(f'"{key}": "(.*?)"', text)[1]
    if "secret" in prompt:
        keys = re.findall(r"[\w-]+", re.search(r"secret \w+ of (.*)\? In", prompt)[1])
        return " ".join(value for key in keys
                        for value in re.findall(rf"secret \w+ of {key} is ([\w-]+)\.", text))
    if name.startswith("icl"):
        known = set(re.findall(r"\w+", " ".join(tasks.ICL_TEXTS)))
        words = re.findall(r"\w+", prompt)
        thing = next(word[:6] for word in words if not {word, word[:6]} & known)
        return " " + re.search(rf"{thing}[^\n]*\nlabel: (\d+)", text)[1] + "\n\nmore"
    if name == "rerank":
        passages = re.findall(r"\[ID: (\d+)\](.*)", text)
        wanted = set(re.findall(r"\b[a-z]{4}\b", prompt)) - {"came", "from", "sell", "fair"}
        ranked = sorted(passages, key=lambda p: -len(wanted & set(re.findall(r"\w+", p[1]))))
        return " ID" + " > ID".join(number for number, _ in ranked[:10])
    raise AssertionError(name)


def guess(rng: np.random.Generator, name: str, question: Question) -> str:
    """An answer of the right form: a label, a ranking, or letters and digits like those wanted."""
    if name.startswith("icl_"):
        return str(rng.integers(round(1 / question.chance)))
    if question.relevance is not None:
        return " > ".join(rng.permutation(list(question.relevance))[:10])
    if name == "icl":
        return f"<|{rng.choice(list('012345'))}|>"
    if name.startswith("recall"):
        return "".join(f"<|{c}|>" for c in rng.choice(list(toy.SYMBOL_NAMES), toy.VALUE_LEN))
    letters = {c: chr(rng.integers(97, 123)) for c in " ".join(question.answers) if c.isalnum()}
    return " ".join("".join(letters.get(c, c) for c in answer) for answer in question.answers)


@pytest.mark.parametrize("name", [*TOKENS, *TEXT])
def test_an_oracle_scores_one_and_a_guesser_chance(bpe, monkeypatch, name):
    """Who reads the answer is always right; who guesses, as often as the table says."""
    tokenizer = TOKENIZER if name in TOKENS else bpe
    length = 160 if name == "recall_bare" else 1024 if name in TOKENS else 4000
    rng = np.random.default_rng(0)

    def answer(model, tokenizer, example, exact, parallel):
        text = tokenizer.decode(example.context_ids)
        return [solve(name, text, tokenizer.decode(q.prompt_ids)) if knows
                else guess(rng, name, q) for q in example.questions]

    monkeypatch.setattr(evaluation, "answer_questions", answer)
    for knows, n in ((True, 12), (False, 96)):
        row = evaluation.run_task(None, tokenizer, name, length, n, per_context=4)
        assert row["n"] >= n
        assert row["score"] == 1 if knows else row["low"] <= row["chance"] <= row["high"], row


def sharp_model() -> Transformer:
    """One that is sure of itself and likes labels: a few ICL answers come out right."""
    config = dataclasses.replace(preset_config("tiny", TOKENIZER.vocab_size), n_layers=1)
    model = Transformer(config).init_weights(6).to(torch.float64)
    with torch.no_grad():
        model.embed_tokens.weight *= 40
        model.embed_tokens.weight[toy.LABELS.astype(int)] *= 3
    return model


@pytest.mark.parametrize("task, length", [("recall", 256), ("icl", 128)])
def test_teacher_forcing_agrees_with_greedy_decoding(task, length):
    """Both count the same answers right, on a model whose guesses are sometimes right (float64)."""
    model, right = sharp_model(), {True: [], False: []}
    for example in make(TOKENIZER, task, length, 2, questions=8):
        written = evaluation.answer_questions(model, TOKENIZER, example, exact=False)
        questions = list(example.questions)
        for k in range(1, 8, 2):  # what it writes becomes the right answer
            ids = TOKENIZER.encode_with_specials(written[k])[:example.budget]
            if len(ids) == example.budget:
                questions[k] = dataclasses.replace(questions[k], answers=(TOKENIZER.decode(ids),))
        changed = dataclasses.replace(example, questions=tuple(questions))
        for exact, found in right.items():
            texts = evaluation.answer_questions(model, TOKENIZER, changed, exact)
            found += [text == q.answers[0] for q, text in zip(questions, texts, strict=True)]
    assert right[True] == right[False] and 3 <= sum(right[True]) < len(right[True])


def test_questions_do_not_see_each_other():
    """The cache is cut back: each question is answered as if it were the only one."""
    model = sharp_model()
    for name, length in (("recall", 256), ("json_kv", 1000)):
        (example,) = make(TOKENIZER, name, length, 1, questions=3)
        alone = [dataclasses.replace(example, questions=(q,)) for q in example.questions]
        together, *each = (evaluation.answer_questions(model, TOKENIZER, e, exact=False)
                           for e in (example, *alone))
        assert each == [[text] for text in together] and any(together)


def options(folder, **changes):
    small = {"tasks": "recall,icl", "lengths": "256,512", "samples": 16, "bpb_length": 256}
    return evaluation.EvalConfig(model=str(folder), **(small | changes))


def test_a_stopped_evaluation_goes_on_where_it_was(model, tmp_path, monkeypatch):
    """We ask again only what is not whole in the file; the results are the same."""
    honest, calls = evaluation.answer_questions, []

    def counted(*args):
        calls.append(args)
        return honest(*args)

    monkeypatch.setattr(evaluation, "answer_questions", counted)
    config, path = options(tmp_path, samples=40), tmp_path / "out" / "predictions.jsonl"
    whole = evaluation.evaluate(model, config, "m", predictions=path)
    asked = len(calls)
    lines = path.read_text().splitlines()  # the settings, then a line a context
    assert len(lines) == 1 + asked
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert evaluation.evaluate(model, config, "m", predictions=path) == whole
    assert len(calls) == asked + asked - 2
    assert evaluation.evaluate(model, config, "m", predictions=path) == whole
    assert len(calls) == asked + asked - 2
    with pytest.raises(ValueError, match=r"other settings.*seed 0, now 1"):
        evaluation.evaluate(model, dataclasses.replace(config, seed=1), "m", predictions=path)


def parallel_work(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    parallel, model, path = init_parallel(world), sharp_model(), folder / "predictions.jsonl"
    config = options(folder, lengths="301", bpb_length=301)
    done = evaluation.evaluate(model, config, "m", parallel, path)
    if rank == 0:  # as if it had been stopped half-way
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:len(lines) // 2 + 1]))
    assert evaluation.evaluate(model, config, "m", parallel, path) == done
    with pytest.raises(ValueError, match="other settings"):  # on both ranks, and none waits
        evaluation.evaluate(model, dataclasses.replace(config, seed=1), "m", parallel, path)
    done["quick"] = evaluation.quick_scores(model, TOKENIZER, 301, parallel)
    alone = init_parallel(1)  # two dp ranks of one
    done["quick_dp"] = evaluation.quick_scores(model, TOKENIZER, 301, alone, n=1)
    if rank == 0:
        (folder / "parallel.json").write_text(json.dumps(done))
    torch.distributed.destroy_process_group()


def test_ranks_that_share_every_text_write_the_same(tmp_path):
    """Two ranks, half the heads each; 301 tokens, which two do not divide: float64 to 1e-10."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(parallel_work, (2, port, tmp_path), nprocs=2)
    found, model = json.loads((tmp_path / "parallel.json").read_text()), sharp_model()
    alone = evaluation.evaluate(model, options(tmp_path, lengths="301", bpb_length=301), "m")
    assert found["results"] == json.loads(json.dumps(alone["results"]))
    for a, b in zip(found["bits_per_byte"], alone["bits_per_byte"], strict=True):
        assert a["bytes"] == b["bytes"]
        assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-10)
    for name in ("recall", "icl"):  # by hand: every token of the whole text predicted
        right = []
        for e in make(TOKENIZER, name, 301, 2, evaluation.TASKS[name].shared):
            text, answers = e.context_ids.tolist(), {}  # where they end
            for q in e.questions:
                answer = TOKENIZER.encode_with_specials(q.answers[0]).tolist()
                text += [*q.prompt_ids.tolist(), *answer]
                answers[len(text)] = answer
            likeliest = model.logits(torch.tensor(text), (len(text),)).argmax(-1).tolist()
            right += [likeliest[end - 1 - len(a):end - 1] == a for end, a in answers.items()]
        for quick in ("quick", "quick_dp"):
            assert found[quick][f"{name}@301"] == pytest.approx(sum(right) / len(right))
    assert found["quick"]["icl@301"] > 0


def test_intervals():
    """Wilson's, as in Newcombe (1998), Table I; ten contexts all right or wrong are worth ten."""
    wilson, approx = scores.wilson_interval, pytest.approx
    assert wilson(81, 263) == approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10) == approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == approx((0.7225, 1.0), abs=1e-4)
    together = scores.interval([[1.0] * 10] * 6 + [[0.0] * 10] * 4)
    independent = scores.interval([[1.0]] * 60 + [[0.0]] * 40)
    assert together == approx(wilson(6, 10), abs=0.03)
    assert independent == approx(wilson(60, 100), abs=0.003)


def test_another_tokenizer_has_text_tasks(bpe):
    """A model with its own tokenizer is asked in text; recall in special tokens is refused."""
    plan, config = evaluation.plan_jobs, evaluation.EvalConfig
    assert {task for task, *_ in plan(config(tasks="text", lengths="4k"), bpe)} == set(TEXT)
    assert [task for task, *_ in plan(config(lengths="512"), TOKENIZER)] == TOKENS
    with pytest.raises(ValueError, match="tokenizer 'bytes'"):
        plan(config(tasks="recall"), bpe)
    assert plan(config(tasks="icl", lengths="4k,8k", samples=100), TOKENIZER) == [
        ("icl", 4096, 100), ("icl", 8192, 100)]


def test_bits_per_byte_of_a_model_that_knows_nothing():
    """Equal logits cost log2(vocabulary) bits per byte of text, at every position."""
    model = Transformer(preset_config("tiny", TOKENIZER.vocab_size))
    torch.nn.init.zeros_(model.embed_tokens.weight)
    rows = evaluation.bits_per_byte(model, TOKENIZER, 512, 2)
    assert [(row["name"], row["from"], row["to"]) for row in rows] == [
        ("0-256", 0, 256), ("256-512", 256, 512), ("last 1/4", 384, 512), ("short", 0, 256)]
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(np.log2(TOKENIZER.vocab_size), rel=1e-2)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def test_command_line_writes_results_and_pictures(model, tmp_path, monkeypatch, capsys):
    """A model folder in; a table, a JSON with every prediction and figures out."""
    save_pretrained(model, tmp_path / "model")
    run_main(monkeypatch, "--model", tmp_path / "model", "--lengths", "256,512", "--samples", 16,
             "--tasks", "recall,icl", "--bpb-length", 256)
    out = capsys.readouterr().out
    assert all(part in out for part in ("recall", "macro avg", "short"))
    saved = json.loads((tmp_path / "model" / "eval" / "model.json").read_text())
    assert saved["model"] == "model" and len(saved["results"]) == 4
    for row in saved["results"]:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1
        assert len(row["predictions"]) == row["n"] and {"task", "length", "chance"} <= row.keys()
    shown = scores.format_recall(saved)
    for row, lines in zip(saved["results"], shown.split("tokens: ")[1:], strict=False):
        asked = row["predictions"][len(row["predictions"]) // 2]
        key, value = asked["prompt"][-3], "".join(re.findall(r"<\|(\S)\|>", asked["answers"][0]))
        assert f" ~{key}{value} " in lines and f"question: ?{key}\n" in lines
        assert ("right" in lines) == (asked["score"] == 1)
    for name in ("model.png", "model-depth.png"):
        assert (tmp_path / "model" / "eval" / name).stat().st_size > 10_000


@pytest.mark.parametrize("arguments, words", [
    ("", "--model is missing"), ("--model nowhere", "nowhere"), ("--tasks poetry", "poetry"),
    ("--lengths 64 --tasks recall", "64"), ("--dtype float8", "float8"),
    ("--lengths 256 --tasks json_kv", "json_kv needs .* tokens at the least"),
    ("--compare one.json", "must name two"), ("--data gone.jsonl", "gone.jsonl")])
def test_bad_input_is_one_clear_error(model, tmp_path, monkeypatch, arguments, words):
    """Each names what was wrong, in an error that a script turns into one line and code 2."""
    save_pretrained(model, tmp_path / "model")
    folder = ["--model", tmp_path / "model"] if arguments else []
    with pytest.raises((ValueError, OSError), match=words):
        run_main(monkeypatch, *folder, *arguments.split())
