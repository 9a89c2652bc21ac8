"""Tests of support/toy.py: every question has its answer, and only the answers are trained."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import TOKENIZER, texts

from data import Document
from support import toy

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@property_test
@given(st.integers(1, 4), st.integers(0, 8), st.integers(0, 40), st.integers(0, 2**32))
def test_scattered_pairs_lie_in_an_unchanged_haystack(batch, n_pairs, room, seed):
    """Every start points at a mark and its pair; without the pairs the haystack is as it was."""
    rng = np.random.default_rng(seed)
    pairs = toy.recall_pairs(rng, batch, n_pairs)
    haystack = rng.integers(200, 256, size=(batch, room)).astype(np.uint32)
    contexts, starts = toy.scatter_pairs(rng, pairs, haystack)
    assert contexts.shape == (batch, room + n_pairs * toy.PAIR_LEN)
    for context, begins, row, hay in zip(contexts.tolist(), starts.tolist(), pairs.tolist(),
                                         haystack.tolist(), strict=True):
        assert begins == sorted(begins)
        assert [context[b:b + toy.PAIR_LEN] for b in begins] == [[toy.PAIR, *pair] for pair in row]
        inside = {b + i for b in begins for i in range(toy.PAIR_LEN)}
        assert [token for i, token in enumerate(context) if i not in inside] == hay


def recall_documents(length: int, bare: bool) -> list[Document]:
    """Eight recall documents of any length, in bytes of text or among blanks."""
    rng = np.random.default_rng(3)
    pairs, room = toy.pairs_and_room(rng, 8, length)
    haystack = (np.full((8, room), toy.BLANK, np.uint32) if bare else
                rng.integers(32, 127, size=(8, room)).astype(np.uint32))
    ids, mask = toy.recall_rows(rng, pairs, haystack, TOKENIZER.bos_id, TOKENIZER.eos_id)
    return [Document(row, mask) for row in ids]


@pytest.mark.parametrize(("bare", "length", "n_pairs"), [
    (False, 64, 4), (False, 256, 16), (False, 1000, 16), (True, 32, 2), (True, 2048, 16)])
def test_every_recall_question_has_its_answer(bare, length, n_pairs):
    """Read as text: each key stands once and is asked once; only true answers are trained."""
    documents = recall_documents(length, bare)
    assert len(documents) == 8
    for document, text in zip(documents, texts(documents), strict=True):
        assert len(document) == len(document.loss_mask) == length
        symbol = r"<\|\S\|>"
        context, questions = text[:text.index("<|ask|>")], text[text.index("<|ask|>"):]
        pairs = re.findall(rf"<\|pair\|>({symbol})((?:{symbol}){{4}})", context)
        asked = re.findall(rf"<\|ask\|>({symbol})((?:{symbol}){{4}})", questions)
        assert len(asked) == len(dict(pairs)) == len(pairs) == context.count("<|pair|>") == n_pairs
        assert sorted(asked) == sorted(pairs)
        answers = TOKENIZER.decode(document.input_ids[document.loss_mask])
        assert answers == "".join(value for _, value in asked)
        assert np.flatnonzero(document.loss_mask)[0] >= length - 1 - toy.PAIR_LEN * n_pairs


@pytest.mark.parametrize("length", [64, 128, 301])
def test_icl_labels_can_only_be_learnt_from_the_examples(length):
    """Rounds have every topic once, a topic one label a document, documents different labels."""
    rng = np.random.default_rng(0)
    rows, mask = toy.icl_rows(rng, 16, length, TOKENIZER.bos_id, TOKENIZER.eos_id)
    documents = [Document(row, mask) for row in rows]
    dealt = set()
    for document, text in zip(documents, texts(documents), strict=True):
        assert len(document) == len(document.loss_mask) == length
        n_lines = (length - 2) // toy.ICL_LINE
        lines = re.findall(r"<\|pair\|><\|([A-X])\|><\|([0-5])\|>", text)
        examples = "".join(f"<|pair|><|{letter}|><|{label}|>" for letter, label in lines)
        assert len(lines) == n_lines and text == examples + "\n" * (length - 2 - 3 * n_lines)
        topics = [(ord(letter) - ord("A")) // 4 for letter, _ in lines]
        labels = [label for _, label in lines]
        assert all(sorted(topics[i:i + 6]) == list(range(6)) for i in range(0, n_lines // 6 * 6, 6))
        assert len(set(topics[n_lines // 6 * 6:])) == n_lines % 6
        label_of = dict(zip(topics, labels, strict=True))
        assert labels == [label_of[topic] for topic in topics]
        assert sorted(label_of.values()) == list("012345")
        trained = TOKENIZER.decode(document.input_ids[document.loss_mask])
        assert trained == "".join(f"<|{label}|>" for label in labels[6:])
        dealt.add(tuple(label_of[topic] for topic in range(6)))
    assert len(dealt) > 8


@pytest.mark.parametrize("n_pairs", [2, 16, 17])
def test_no_symbol_stands_twice_in_a_document(n_pairs):
    """One symbol tells which one follows; over many documents every symbol is at every place."""
    pairs = toy.recall_pairs(np.random.default_rng(0), 1000, n_pairs)
    assert pairs.shape == (1000, n_pairs, 1 + toy.VALUE_LEN)
    assert all(len(set(row.ravel().tolist())) == row.size for row in pairs)
    assert all(set(pairs[:, 0, place]) == set(toy.SYMBOLS) for place in range(1 + toy.VALUE_LEN))
    with pytest.raises(ValueError, match="18 pairs need 90 symbols, and there are 85"):
        toy.recall_pairs(np.random.default_rng(0), 1, 18)


def test_symbols_survive_as_text():
    """Answers are kept as text, "<|A|><|!|>": each of the 85 comes back as its own token."""
    text = TOKENIZER.decode(toy.SYMBOLS)
    assert TOKENIZER.encode_with_specials(f"a{text}b").tolist() == [97, *toy.SYMBOLS, 98]


def test_a_pair_typed_in_a_chat_becomes_symbols():
    """Only a pair and the key that is asked for; all other text is left as it is."""
    encode = TOKENIZER.encode
    symbols = {name: toy.SYMBOLS[i] for i, name in enumerate(toy.SYMBOL_NAMES)}
    typed = toy.read_typed("A ~KABCD is. The value of K?", encode)
    pair = [toy.PAIR, *(symbols[name] for name in "KABCD")]
    assert typed.tolist() == [*encode("A "), *pair, *encode(" is. The value of "), symbols["K"],
                              *encode("?")]
    for text in ("Is json.dumps a class?", "~KABCDE", "The value of KA?"):
        assert toy.read_typed(text, encode) == text
