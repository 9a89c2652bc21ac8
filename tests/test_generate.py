"""Generation changes no number: however a text is read, its logits are those of one full forward pass.

    decode      in one go, in chunks, token by token; alone, beside longer texts, or sharing a context
    generate    = the argmax of full forward passes; batched = alone; a conversation = its whole text
    sampling    follows the model's probabilities, cut at top_p, and repeats with its seed

Logits are compared in float64; tokens in float32, where only a tie could make them differ.
"""

import subprocess
import sys
from pathlib import Path

import test_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import mark, raises
from test_model import random_model

import model as m
from model import KVCache, Transformer

EXACT = {"rtol": 0, "atol": 1e-11}  # float64, values up to 160, summed in another order


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
def test_cached_decoding_equals_a_full_forward(cuts, heads):
    """Read in one go, in unequal parts or token by token: the logits of every token."""
    model, text = random_model(n_heads=heads[0], n_kv_heads=heads[1]), random_ids(23)
    cache = KVCache()
    parts = torch.tensor(text).split(cuts)
    found = torch.cat([m.decode(model, [part], [cache], last=99)[0] for part in parts])
    assert cache.length == 23
    torch.testing.assert_close(found, full_logits(model, text), **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), chunk=st.integers(1, 40),
       last=st.integers(1, 5))
def test_texts_of_any_lengths_end_to_end_in_chunks_of_any_size(lengths, chunk, last):
    """Every text's logits are its own, whatever else passes through the model with it."""
    model = random_model()
    texts = [random_ids(n, seed) for seed, n in enumerate(lengths)]
    found = m.decode(model, texts, [KVCache() for _ in texts], last, chunk)
    for text, logits in zip(texts, found, strict=True):
        torch.testing.assert_close(logits, full_logits(model, text)[-last:], **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), chunk=st.integers(1, 30),
       n=st.integers(0, 3))
def test_branches_of_one_context(lengths, chunk, n):
    """Questions of any lengths about one context, cut anywhere; the context may go on, and branch again."""
    model, context = random_model(), random_ids(12)
    trunk = KVCache()
    m.decode(model, [context], [trunk])
    questions = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    more, (early,), first = random_ids(n, 9), trunk.repeat(1), context
    for _ in range(2):
        branches = trunk.repeat(len(questions))
        found = m.decode(model, [*questions, more], [*branches, trunk], 3, chunk)
        rest = m.decode(model, [[5]] * len(questions), branches)
        for question, logits, after in zip(questions, found, rest, strict=False):
            whole = full_logits(model, [*context, *question, 5])
            torch.testing.assert_close(logits, whole[:-1][len(context):][-3:], **EXACT)
            torch.testing.assert_close(after, whole[-1:], **EXACT)
        context = context + more
    (found,) = m.decode(model, [[7, 8]], [early])
    torch.testing.assert_close(found, full_logits(model, [*first, 7, 8])[-1:], **EXACT)
    assert trunk.length == len(context) and branches[0].length == len(context) - n + lengths[0] + 1
    with raises(ValueError, match="branch of another"):
        branches[0].repeat(2)


def test_a_shared_context_is_kept_once():
    """A hundred questions cost a hundred questions' keys and values, not a hundred contexts'."""
    model, trunk = random_model(torch.float32), KVCache()
    m.decode(model, [random_ids(5000)], [trunk])
    m.decode(model, [random_ids(3, i) for i in range(100)], trunk.repeat(100))
    assert trunk._slots.filled == 5300 and trunk._slots.layers[0].shape[2] <= 7884  # 5256, grown by half once


def test_room_grows_by_half():
    """1,000 tokens one by one are copied into new room a few times, not 1,000 times, and none is lost."""
    model, cache, sizes, text = random_model(), KVCache(), set(), random_ids(1000)
    for token in text:
        (logits,) = m.decode(model, [[token]], [cache])
        sizes.add(cache._slots.layers[0].shape[2])
    torch.testing.assert_close(logits, full_logits(model, text)[-1:], **EXACT)
    assert len(sizes) <= 5 and max(sizes) < 1500


def test_greedy_tokens_are_the_same_however_they_are_made():
    """float32: plain, cached, in chunks, in a batch of unequal prompts, and about a shared context."""
    model, context = random_model(torch.float32), random_ids(30)
    prompts = [random_ids(n, n) for n in (3, 17, 1, 40)]
    expected = [write_plainly(model, prompt, 12) for prompt in prompts]
    for chunk in (1, 7, 1024):
        assert [m.generate(model, prompt, 12, chunk_tokens=chunk) for prompt in prompts] == expected
        assert m.generate_batch(model, prompts, 12, chunk_tokens=chunk) == expected
    trunk = KVCache()
    m.decode(model, [context], [trunk])
    found = m.generate_batch(model, prompts, 12, caches=trunk.repeat(4))
    assert found == [write_plainly(model, context + prompt, 12) for prompt in prompts]


def test_a_stop_token_is_the_last_one():
    """In a batch the others go on; the limit is kept, and may be 0."""
    model = random_model(torch.float32)
    prompts = [random_ids(8, 1), random_ids(5, 2)]
    whole = [write_plainly(model, prompt, 12) for prompt in prompts]
    stop = whole[0][5]
    expected = [w[:w.index(stop) + 1] if stop in w else w for w in whole]
    assert len(expected[0]) < 12 and len(expected[1]) > len(expected[0])
    assert m.generate(model, prompts[0], 12, stop_ids=(97, stop)) == expected[0]
    assert m.generate_batch(model, prompts, 12, stop_ids=(stop,)) == expected
    assert m.generate(model, prompts[0], 0) == [] and m.generate_batch(model, [], 3) == []


@mark.parametrize("leave_early", [False, True])
def test_a_conversation_goes_on(leave_early):
    """With a cache only new tokens are given; what was written last is read first. Also if the reader stops
    listening in the middle of an answer."""
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
    """Frequencies are softmax(logits / T) within four standard errors; top_p keeps the fewest that do."""
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]), 4000
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = [m.choose_token(logits, temperature, 1.0, generator) for _ in range(n)]
        p = (logits / temperature).softmax(-1)
        found = torch.tensor(drawn).bincount(minlength=5) / n
        assert ((found - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    p = logits.softmax(-1)  # 0.644, 0.237, 0.087, 0.032, 0.00001
    for top_p, kept in ((0.6, 1), (0.65, 2), (0.9, 3), (0.97, 4)):
        drawn = {m.choose_token(logits, 1.0, top_p, generator) for _ in range(300)}
        assert drawn == set(range(kept)), (top_p, drawn)


def test_sampling_repeats_with_its_seed():
    model, prompt = random_model(torch.float32), random_ids(5)
    hot = {"temperature": 3.0, "top_p": 0.95}
    answers = [m.generate(model, prompt, 20, seed=seed, **hot) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    assert m.generate(model, prompt, 20, temperature=1e-4) == m.generate(model, prompt, 20)


@mark.parametrize("changes, words", [
    ({"prompt_ids": []}, "prompt is empty"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"prompt_ids": [3, 97]}, "vocabulary of 97"),
    ({"prompt_ids": [-1]}, "vocabulary of 97"),
])
def test_bad_input_is_one_clear_error(changes, words):
    with raises(ValueError, match=words):
        m.generate(random_model(), **{"prompt_ids": [1], "max_new_tokens": 3} | changes)


@mark.slow
def test_a_long_prompt_needs_little_memory():
    """16K tokens through the shape of SmolLM2-135M, float32, on a CPU: at most 2.5 GiB, weights included.

    0.5 GiB weights, 0.7 GiB keys and values; all at once, one layer's MLP alone would take 0.3 GiB.
    """
    code = ("import resource, torch, model; m = model.Transformer(model.preset_config('smollm2-135m', 1));"
            "m.init_weights(0); ids = torch.randint(49_152, (16_384,)); print(model.generate(m, ids, 2));"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    tokens, gib = done.stdout.splitlines()
    assert len(tokens.split(",")) == 2 and float(gib) <= 2.5, gib
