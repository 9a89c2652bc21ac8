"""Generation changes no number: a text's logits are those of one full forward pass.

Logits are compared in float64; tokens in float32, where only a tie could make them differ.
"""

import test_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import mark, raises
from test_model import EXACT, random_model

import model as m
from model import KVCache, Transformer


def random_ids(n: int, seed=0) -> list[int]:
    return test_model.random_ids(n, seed).tolist()


def full_logits(model: Transformer, text: list[int]) -> torch.Tensor:
    return model.logits(torch.tensor(text), (len(text),))


def write_plainly(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding with nothing kept: the oracle."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(full_logits(model, text)[-1].argmax()))
    return text[len(prompt):]


@mark.parametrize("cuts", [(23,), (9, 1, 10, 3), (1, 22), (22, 1), (1,) * 23], ids=str)
@mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=str)
def test_cached_reading_equals_a_full_forward(cuts, heads):
    """Read in one go, in unequal parts or token by token: the logits of every token."""
    model, text = random_model(n_heads=heads[0], n_kv_heads=heads[1]), random_ids(23)
    cache = KVCache()
    parts = torch.tensor(text).split(cuts)
    found = torch.cat([m.read(model, part, cache, last=99) for part in parts])
    assert cache.length == 23
    torch.testing.assert_close(found, full_logits(model, text), **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), chunk=st.integers(1, 30),
       last=st.integers(1, 12))
def test_questions_about_one_context(lengths, chunk, last):
    """The cache is cut back after each question; then every question's logits are its own."""
    model, context, cache = random_model(), random_ids(12), KVCache()
    m.read(model, context, cache, chunk_tokens=chunk)
    for seed, length in enumerate(lengths):
        question = random_ids(length, seed)
        found = m.read(model, question, cache, last, chunk)
        expected = full_logits(model, context + question)[len(context):][-last:]
        torch.testing.assert_close(found, expected, **EXACT)
        assert cache.length == len(context) + length
        cache.length = len(context)
    more = random_ids(3, 9)  # the context may go on instead
    expected = full_logits(model, context + more)[-1:]
    torch.testing.assert_close(m.read(model, more, cache), expected, **EXACT)


def test_cutting_back_forgets_what_was_pending():
    """An answer's last token has not been read yet; the next question does not follow it."""
    model, context, cache = random_model(torch.float32), random_ids(30), KVCache()
    m.read(model, context, cache)
    for seed in range(3):
        question = random_ids(5, seed)
        answer = m.generate(model, question, 6, cache=cache)
        assert answer == write_plainly(model, context + question, 6)
        assert cache.pending == answer[-1:]
        cache.length = len(context)
        assert cache.pending == []


def test_a_stop_token_is_the_last_one():
    """It is part of the answer; the limit is kept, and may be 0."""
    model, prompt = random_model(torch.float32), random_ids(8, 1)
    whole = write_plainly(model, prompt, 12)
    stop = whole[5]
    expected = whole[:whole.index(stop) + 1]
    assert len(expected) < 12 and m.generate(model, prompt, 12, stop_ids=(97, stop)) == expected
    assert m.generate(model, prompt, 0) == []


@mark.parametrize("leave_early", [False, True])
def test_a_conversation_goes_on(leave_early):
    """Only new tokens are given, and what was written last is read first; also if cut short."""
    model, cache, text = random_model(torch.float32), KVCache(), []
    for turn in range(3):
        new = random_ids(4 + turn, turn)
        answer = []
        for token in m.stream(model, new, 6, cache=cache):
            answer.append(token)
            if leave_early and len(answer) == 2:
                break
        assert answer == write_plainly(model, text + new, 2 if leave_early else 6)
        text += new + answer
    assert [*m.stream(model, [], 3, cache=cache)] == write_plainly(model, text, 3)
    assert cache.length == len(text) + 2 and len(cache.pending) == 1


def test_sampling_follows_the_probabilities():
    """Frequencies are softmax(logits / T) within four standard errors."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]), 4000
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = [m.choose_token(logits, temperature, generator) for _ in range(n)]
        p = (logits / temperature).softmax(-1)
        found = torch.tensor(drawn).bincount(minlength=5) / n
        assert ((found - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_sampling_repeats_with_its_seed():
    model, prompt = random_model(torch.float32), random_ids(5)
    answers = [m.generate(model, prompt, 20, temperature=3.0, seed=seed) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    assert m.generate(model, prompt, 20, temperature=1e-4) == m.generate(model, prompt, 20)


@mark.parametrize("changes, words", [
    ({"prompt_ids": []}, "prompt is empty"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"prompt_ids": [3, 97]}, "vocabulary of 97"),
    ({"prompt_ids": [-1]}, "vocabulary of 97"),
])
def test_bad_input_is_one_clear_error(changes, words):
    with raises(ValueError, match=words):
        m.generate(random_model(), **{"prompt_ids": [1], "max_new_tokens": 3} | changes)
