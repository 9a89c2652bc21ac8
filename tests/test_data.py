"""Tests of data.py: what goes in comes out, in order, once, and what is dropped is counted."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Document, PackedDataset, PackedSequence, PackReport, Tokenizer, load_tokenizer
from model import crosses_ranks
from support import installed

ROOT = Path(__file__).parent.parent

TOKENIZER = load_tokenizer("bytes")
# The same examples at every run: a failure is a change in the code, not luck.
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# --- 1. Tokenizer ---------------------------------------------------------------------------------


@property_test
@given(st.text())
def test_encode_then_decode_is_the_identity(text):
    """Text comes back, and the ids are its UTF-8 bytes."""
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_are_made_from_a_template_alone():
    """A name inside a document is encoded letter by letter; encode_with_specials knows names."""
    for name, special_id in TOKENIZER.encoding._special_tokens.items():
        assert special_id >= 256
        ids = TOKENIZER.document(f"before{name}after").input_ids
        assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
        assert ids[1:-1].tolist() == list(f"before{name}after".encode())
        assert TOKENIZER.decode([special_id]) == name
    ids = TOKENIZER.encode_with_specials("a<|eot_id|><|A|>\nb")
    assert ids.dtype == np.uint32 and ids.tolist() == [97, 260, 263, 10, 98]
    assert TOKENIZER.encode_with_specials("").tolist() == []
    with pytest.raises(ValueError, match=r"no special token '<.im_end.>'; its first are <.begin_"):
        TOKENIZER.encode_with_specials("a<|im_end|>")


def byte_tokenizer(pattern=r"[\s\S]{1,256}", merges=None, begin=300, **special) -> Tokenizer:
    """A tokenizer of bytes with two special tokens, and whatever else it is given."""
    ranks = {bytes([i]): i for i in range(256)} | (merges or {})
    names = {"<|begin_of_text|>": begin, "<|end_of_text|>": begin + 1}
    encoding = tiktoken.Encoding("other", pat_str=pattern, special_tokens=names | special,
                                 mergeable_ranks=ranks)
    return Tokenizer("other", encoding, *names)


def test_fingerprint_tells_tokenizers_apart():
    """Two loads agree; another special token, id, merge, order of merges or pattern does not."""
    assert load_tokenizer().fingerprint == load_tokenizer().fingerprint
    assert re.fullmatch("[0-9a-f]{16}", load_tokenizer().fingerprint)
    changes = [{}, {"x": 302}, {"x": 303}, {"y": 302}, {"pattern": r"[\s\S]{1,8}"},
               {"merges": {b"ab": 256}}, {"merges": {b"ab": 256, b"bc": 257}},
               {"merges": {b"bc": 256, b"ab": 257}}]
    others = [load_tokenizer(), *(byte_tokenizer(**change) for change in changes)]
    assert len({other.fingerprint for other in others}) == len(others)


@pytest.mark.parametrize("spec", ["", "Bytes", "/nowhere/tokenizer.model", "tiktoken:nothing"])
def test_unknown_tokenizers_are_refused(spec):
    """A spec that is not known is an error that names it, never a default."""
    with pytest.raises(ValueError, match=re.escape(repr(spec))):
        load_tokenizer(spec)


# --- 2. Packing -----------------------------------------------------------------------------------


def make_documents(specs: list[tuple[int, bool]]) -> list[Document]:
    """Documents of given lengths, each token a number; with a mask, a third is not trained."""
    documents, begin = [], 0
    for n, masked in specs:
        ids = np.arange(begin, begin + n, dtype=np.uint32)
        documents.append(Document(ids, ids % 3 != 0 if masked else None))
        begin += n
    return documents


def trained(part: Document | PackedSequence) -> list[bool]:
    return [True] * len(part.input_ids) if part.loss_mask is None else part.loss_mask.tolist()


def laid_end_to_end(parts) -> tuple[list[int], list[bool]]:
    """All tokens of documents or sequences, and which of them are trained on."""
    return ([i for part in parts for i in part.input_ids.tolist()],
            [flag for part in parts for flag in trained(part)])


DOCUMENTS = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12).map(make_documents)
# a sequence at least
SOME_DOCUMENTS = DOCUMENTS.filter(lambda documents: sum(map(len, documents)) >= 24)
# a, b, c, d of data.py
PAPER_EXAMPLE = make_documents([(11, False), (3, False), (7, False), (4, False)])


@property_test
@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 4))
def test_pack_long_keeps_whole_pieces_in_order(documents, doc_len, pieces_each):
    """Whole pieces only, in order, and every token is either packed or counted as dropped."""
    report = PackReport()
    sequences = list(data.pack_long(documents, doc_len, doc_len * pieces_each, report))
    pieces = [d[i * doc_len:(i + 1) * doc_len] for d in documents for i in range(len(d) // doc_len)]
    kept = pieces[:len(pieces) // pieces_each * pieces_each]
    assert laid_end_to_end(sequences) == laid_end_to_end(kept)
    for i, sequence in enumerate(sequences):
        assert sequence.doc_lens == (doc_len,) * pieces_each
        assert len(sequence.input_ids) == doc_len * pieces_each
        mine = kept[i * pieces_each:(i + 1) * pieces_each]
        assert (sequence.loss_mask is None) == all(piece.loss_mask is None for piece in mine)
    assert report.documents_in == len(documents)
    assert report.documents_dropped == sum(len(d) < doc_len for d in documents)
    assert report.tokens_in == sum(map(len, documents))
    assert report.tokens_packed == sum(len(s.input_ids) for s in sequences)
    assert report.tokens_in == report.tokens_packed + report.tokens_dropped


@property_test
@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 4))
def test_pack_short_loses_nothing(documents, share, ranks):
    """The documents laid end to end, cut at every share of every sequence; ends are kept."""
    report, seq_len = PackReport(), share * ranks
    sequences = list(data.pack_short(documents, seq_len, report, ranks=ranks))
    assert not any(crosses_ranks(s.doc_lens, ranks) for s in sequences)
    ids, flags = laid_end_to_end(documents)
    packed = len(ids) // seq_len * seq_len
    assert laid_end_to_end(sequences) == (ids[:packed], flags[:packed])
    assert all(len(s.input_ids) == sum(s.doc_lens) == seq_len for s in sequences)
    assert all(n > 0 for s in sequences for n in s.doc_lens)
    ends = set(np.cumsum([len(d) for d in documents]).tolist()) | set(range(0, packed + 1, share))
    found = np.cumsum([0] + [n for s in sequences for n in s.doc_lens]).tolist()
    assert found == sorted(end for end in ends if end <= packed)
    assert (report.documents_in, report.tokens_in) == (len(documents), len(ids))
    assert (report.tokens_packed, report.tokens_dropped) == (packed, len(ids) - packed)


@property_test
@given(DOCUMENTS, st.integers(1, 30))
def test_pack_sft_never_begins_inside_a_document(documents, seq_len):
    """Documents in order, each from its first token; only a sequence's last may lack its tail."""
    report = PackReport()
    sequences = list(data.pack_sft(documents, seq_len, report))
    remaining = iter([d for d in documents if len(d)])
    kept = []
    for sequence in sequences:
        assert sum(sequence.doc_lens) == len(sequence.input_ids) == seq_len
        for i, n in enumerate(sequence.doc_lens):
            document = next(remaining)
            assert n == len(document) or (n < len(document) and i == len(sequence.doc_lens) - 1)
            kept.append(document[:n])
    assert laid_end_to_end(sequences) == laid_end_to_end(kept)
    assert sum(map(len, remaining)) < seq_len  # nothing that could have filled a sequence was left
    assert report.tokens_in == sum(map(len, documents))
    assert report.tokens_packed == len(sequences) * seq_len
    assert report.tokens_in == report.tokens_packed + report.tokens_dropped


@pytest.mark.parametrize(("pack", "ids", "doc_lens"), [
    (lambda d: data.pack_long(d, 8), [range(0, 8)], [(8,)]),
    (lambda d: data.pack_long(d, 2, 8), [range(0, 8), [8, 9, 11, 12, 14, 15, 16, 17]],
     [(2,) * 4] * 2),
    (lambda d: data.pack_short(d, 8), [range(0, 8), range(8, 16), range(16, 24)],
     [(8,), (3, 3, 2), (5, 3)]),
    (lambda d: data.pack_sft(d, 8), [range(0, 8), range(11, 19)], [(8,), (3, 5)]),
])
def test_packing_by_hand(pack, ids, doc_lens):
    """The example at the top of data.py: 11, 3, 7, 4 tokens. A corpus need not fit in memory."""
    sequences = list(pack(PAPER_EXAMPLE))
    assert [s.input_ids.tolist() for s in sequences] == [list(part) for part in ids]
    assert [s.doc_lens for s in sequences] == doc_lens
    endless = (Document(np.full(8, i, np.uint32)) for i in iter(int, None))  # zeros without end
    assert [sum(s.doc_lens) for s in islice(pack(endless), 3)] == [8] * 3


@pytest.mark.parametrize(("doc_len", "seq_len"), [(3, 8), (16, 8)])
def test_pack_long_refuses_lengths_that_do_not_divide(doc_len, seq_len):
    """A piece length that cannot fill a sequence is an error with both numbers."""
    with pytest.raises(ValueError, match=rf"{doc_len}\b.*\b{seq_len}\b"):
        list(data.pack_long(PAPER_EXAMPLE, doc_len, seq_len))


# --- 3. Batches -----------------------------------------------------------------------------------


@property_test
@given(SOME_DOCUMENTS, st.sampled_from([8, 12, 24]))
def test_packed_labels_are_those_of_separate_documents(documents, seq_len):
    """The next token; none at a document's end, none where the target is masked."""
    sequences = list(data.pack_short(documents, seq_len))
    packed = data.make_batch(sequences)
    assert packed.input_ids.dtype == packed.labels.dtype == torch.int64
    assert packed.doc_lens == sum((s.doc_lens for s in sequences), ())
    separate, ids, flags = [], *laid_end_to_end(sequences)
    assert packed.input_ids.tolist() == ids
    for n in packed.doc_lens:
        mine, mask = np.array(ids[:n], np.uint32), np.array(flags[:n])
        del ids[:n], flags[:n]
        alone = data.make_batch([PackedSequence(mine, (n,), mask)])
        wanted = np.where(mask[1:], mine[1:].astype(int), data.IGNORE_INDEX).tolist()
        assert alone.labels.tolist() == [*wanted, data.IGNORE_INDEX]
        separate.append(alone.labels)
    assert torch.equal(packed.labels, torch.cat(separate))


@property_test
@given(SOME_DOCUMENTS, st.sampled_from([1, 2, 3, 4, 8, 24]))
def test_shards_laid_end_to_end_are_the_batch(documents, sp_size):
    """The ranks' shares, in rank order, are the whole, equally long, labels included."""
    batch = data.make_batch(list(data.pack_short(documents, 24)))
    ids, labels = zip(*(batch.shard(rank, sp_size) for rank in range(sp_size)), strict=True)
    assert torch.equal(torch.cat(ids), batch.input_ids)
    assert torch.equal(torch.cat(labels), batch.labels)
    assert {len(part) for part in (*ids, *labels)} == {len(batch.input_ids) // sp_size}


# --- 4. Packed sequences on disk ------------------------------------------------------------------


def write(folder: Path, sequences, seq_len: int = 8, report: PackReport | None = None) -> None:
    report = report or PackReport()
    data.write_packed(folder, sequences, load_tokenizer(), seq_len, "short", 7, report)


@pytest.fixture
def packed(tmp_path) -> Path:
    """A folder of three sequences with a mask: doc_lens (8,), (3, 3, 2), (5, 3)."""
    documents = make_documents([(11, True), (3, True), (7, True), (4, True)])
    write(tmp_path / "set", data.pack_short(documents, 8))
    return tmp_path / "set"


@property_test
@given(SOME_DOCUMENTS)
def test_written_sequences_are_read_back(tmp_path_factory, documents):
    """Ids, document lengths and masks survive the disk, whether all, some or none have a mask."""
    folder, report = tmp_path_factory.mktemp("packs") / "set", PackReport()
    write(folder, data.pack_short(documents, 8, report), report=report)
    dataset, sequences = PackedDataset(folder), list(data.pack_short(documents, 8))
    assert len(dataset) == len(sequences)
    for i, sequence in enumerate(sequences):
        assert dataset[i].input_ids.tolist() == sequence.input_ids.tolist()
        assert dataset[i].doc_lens == sequence.doc_lens
        assert trained(dataset[i]) == trained(sequence)
        assert data.make_batch([dataset[i]]).sources == (f"set[{i}]",)
    assert (dataset.loss_mask is None) == all(s.loss_mask is None for s in sequences)
    assert (dataset.seq_len, dataset.domain, dataset.meta["seed"]) == (8, "short", 7)
    assert dataset.meta["tokens_dropped"] == report.tokens_dropped


def test_inspect_check_finds_a_changed_byte(packed, capsys):
    """A set opens by its sizes alone; `inspect --check` reads it all and compares the sum."""
    data.inspect(str(packed), check=True)
    content = bytearray((packed / "input_ids.bin").read_bytes())
    content[5] ^= 1
    (packed / "input_ids.bin").write_bytes(content)
    data.inspect(str(packed))
    with pytest.raises(ValueError, match="set is not as it was packed"):
        data.inspect(str(packed), check=True)


def test_a_set_that_lies_or_teaches_nothing_is_found_before_training(tmp_path, packed):
    """A largest id that is not the largest, and sequences in which no token is trained on."""
    meta = json.loads((packed / "meta.json").read_text())
    (packed / "meta.json").write_text(json.dumps(meta | {"max_id": meta["max_id"] - 1}))
    with pytest.raises(ValueError, match="set is not as it was packed"):
        PackedDataset(packed).check_content()
    masked = (PackedSequence(np.zeros(8, np.uint32), (8,), np.zeros(8, bool)) for _ in range(2))
    write(tmp_path / "masked", masked)
    with pytest.raises(ValueError, match="masked has no token that is trained on"):
        PackedDataset(tmp_path / "masked").check_content()


def test_an_interrupted_write_leaves_nothing_that_opens(tmp_path):
    """An exception between two sequences leaves no such folder, and the next attempt succeeds."""

    def interrupted():
        yield from data.pack_short(PAPER_EXAMPLE, 8)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path / "set", interrupted())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "set", data.pack_short(PAPER_EXAMPLE, 8))
    assert len(PackedDataset(tmp_path / "set")) == 3
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "set", data.pack_short(PAPER_EXAMPLE[1:], 8))
    PackedDataset(tmp_path / "set").check_content()
    assert len(PackedDataset(tmp_path / "set")) == 3


def _edit_meta(**changes):
    """Damage: write other values into meta.json; None takes the key away."""
    def damage(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text()) | changes
        meta = {key: value for key, value in meta.items() if value is not None}
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def _replace(name: str, content: bytes | list[int], dtype: type = np.uint32):
    """Damage: other content for a file."""
    content = content if isinstance(content, bytes) else np.array(content, dtype).tobytes()
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(("damage", "named"), [
    (_replace("meta.json", b"{"), "meta.json"),
    (_replace("meta.json", b"[" * 100_000), "meta.json"),
    (_replace("meta.json", b"[]"), "meta.json"),
    (_edit_meta(format="packed-0"), "meta.json"),
    (_edit_meta(seq_len=None), "'seq_len'"),
    (_edit_meta(seq_len=True), "'seq_len'"),
    (_edit_meta(sequences=2**62, documents=2**62, seq_len=4), "input_ids.bin"),
    (_edit_meta(sequences=-3), "'sequences'"),
    (_edit_meta(sequences=2), "input_ids.bin"),
    (_edit_meta(documents=7), "doc_lens.bin"),
    (_replace("doc_ends.bin", bytes(23)), "doc_ends.bin"),
    (lambda folder: (folder / "loss_mask.bin").unlink(), "loss_mask.bin"),
    (_replace("doc_lens.bin", [8, 3, 3, 2, 5, 4]), "set: .*add up"),
    (_replace("doc_lens.bin", [8, 3, 3, 2, 8, 0]), "set: .*add up"),
    (_replace("doc_ends.bin", [1, 4, 5], np.int64), "set: .*add up"),
    (_replace("doc_ends.bin", [4, 1, 6], np.int64), "set: .*add up"),
])
def test_a_damaged_folder_does_not_open(packed, damage, named):
    """Each damage is a ValueError that says where: the folder, the file or the key."""
    PackedDataset(packed)  # whole, it opens
    damage(packed)
    with pytest.raises(ValueError, match=named) as error:
        PackedDataset(packed)
    assert str(packed) in str(error.value)


def test_a_file_that_is_cut_while_it_is_mapped(packed):
    """Reading there would kill the process, so each draw looks at the sizes first."""
    dataset = PackedDataset(packed)
    dataset[0]
    os.truncate(packed / "input_ids.bin", 4)
    with pytest.raises(ValueError, match=r"input_ids.bin was cut"):
        dataset[0]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_what_is_no_packed_folder_does_not_open(tmp_path, make):
    """A missing path, an empty folder and a plain file are named, with the command to make one."""
    make(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"nothing is not a packed data folder.*data\.py pack"):
        PackedDataset(tmp_path / "nothing")


# --- 5. The mixture -------------------------------------------------------------------------------


def make_mixture(shares: dict[str, float], size: int = 5, seed: int = 0, names="") -> data.Mixture:
    """A mixture asks its data sets for length and items alone, so lists of names will do."""
    items = {name: [f"{name}{i}" for i in range(size)] for name in names or shares}
    return data.Mixture(items, shares, seed)


SHARES = st.lists(st.floats(1e-4, 1e4) | st.integers(0, 9), min_size=1, max_size=9).filter(any).map(
    lambda shares: dict(zip("abcdefghi", shares)))  # noqa: B905


@property_test
@given(SHARES)
def test_shares_hold_at_every_prefix_to_within_one(shares):
    """After any n draws, a domain with share s has given s n sequences, to within one."""
    mixture, total, given_so_far = make_mixture(shares), math.fsum(shares.values()), Counter()
    for n in range(1, 250):
        (name,) = mixture.draw(1)
        given_so_far[name[0]] += 1
        assert all(abs(given_so_far[d] - share / total * n) < 1 + 1e-6
                   for d, share in shares.items())
    assert mixture.drawn == {d: given_so_far[d] for d, share in shares.items() if share > 0}


def test_an_epoch_has_every_sequence_once_and_the_next_another_order():
    """Three epochs are three permutations, all different, the same ones beside other domains."""
    mixture = make_mixture({"a": 1.0}, 20)
    epochs = [mixture.draw(20) for _ in range(3)]
    assert all(sorted(epoch) == sorted(f"a{i}" for i in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    beside = [name for name in make_mixture({"a": 0.5, "b": 0.5}, 20).draw(60) if name[0] == "a"]
    assert beside == [*epochs[0], *epochs[1][:10]]


@property_test
@given(SHARES, st.integers(0, 60), st.lists(st.integers(0, 9), max_size=5))
def test_a_resumed_mixture_goes_on_where_it_was(shares, before, steps):
    """Setting `drawn` is all it takes: resumed = uninterrupted, however the draws are grouped."""
    whole = make_mixture(shares).draw(before + sum(steps))
    first = make_mixture(shares)
    begun = first.draw(before)
    resumed = make_mixture(shares)
    resumed.drawn = json.loads(json.dumps(first.drawn))  # as a checkpoint keeps it
    assert begun + [name for n in steps for name in resumed.draw(n)] == whole


@pytest.mark.parametrize("shares", [{}, {"a": 0, "b": 0}, {"a": -1, "b": 2}, {"a": math.nan},
                                    {"a": 1, "b": -math.inf}, {"a": 1e308, "b": 1e308}])
def test_impossible_shares_are_refused(shares):
    """Negative, infinite, no number, nothing at all; of an unknown domain, unless it is 0."""
    with pytest.raises(ValueError, match="mixture shares"):
        make_mixture(shares, names="ab")
    with pytest.raises(ValueError, match=r"'books'.*a, b"):
        make_mixture({"a": 1.0, "books": 1.0}, names="ab")
    assert make_mixture({"a": 1.0, "books": 0.0}, names="ab").shares == {"a": 1.0}


@pytest.mark.parametrize(("text", "shares"), [
    ("recall-2k=0.6,code_repos-2k=0.4", {"recall-2k": 0.6, "code_repos-2k": 0.4}),
    (" a =1, b= 2 ", {"a": 1.0, "b": 2.0}), ("a=0,b=3e-1", {"a": 0.0, "b": 0.3}),
])
def test_parse_mixture(text, shares):
    """Names and shares, in any scale, with blanks after the commas."""
    assert data.parse_mixture(text) == shares


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=x", "a=1,", "a=1,a=2", "a:1", "a=nan"])
def test_parse_mixture_refuses_what_is_no_mixture(text):
    """Anything but NAME=SHARE, each name once, with shares that can be."""
    with pytest.raises(ValueError, match="mixture"):
        data.parse_mixture(text)


# --- 6. Dealing a step's sequences to the ranks ---------------------------------------------------


@st.composite
def steps(draw):
    """(sequences, dp_size, per_batch) that divide, as a step plan makes sure."""
    dp_size, per_batch, micro_steps = (draw(st.integers(1, 4)) for _ in range(3))
    n = dp_size * per_batch * micro_steps
    lens = st.lists(st.integers(1, 32), min_size=1, max_size=4)
    sequences = [PackedSequence(np.zeros(sum(part), np.uint32), tuple(part), None, f"s[{i}]")
                 for i, part in enumerate(draw(st.lists(lens, min_size=n, max_size=n)))]
    return sequences, dp_size, per_batch


@property_test
@given(steps(), st.booleans())
def test_every_sequence_is_dealt_once(step, reorder):
    """[micro-step][rank] batches are equally large; side by side are sequences of like costs."""
    sequences, dp_size, per_batch = step
    dealt = data.arrange_step(sequences, dp_size, per_batch, reorder)
    assert {len(ranks) for ranks in dealt} == {dp_size}
    assert {len(batch) for ranks in dealt for batch in ranks} == {per_batch}
    flat = [s.source for ranks in dealt for batch in ranks for s in batch]
    assert sorted(flat) == sorted(s.source for s in sequences)
    if not reorder:
        assert flat == [s.source for s in sequences]
        return
    costs = [[sum(n * n for n in s.doc_lens) for batch in ranks for s in batch] for ranks in dealt]
    assert all(max(earlier) <= min(later) for earlier, later in pairwise(costs))


# --- 7. Embedded domains: a small Python installation ---------------------------------------------

PACKAGES = [f"package{i}" for i in range(6, 18)]  # 14 and 16 are held out
FILES = ["__init__", "core", "util"]


def source_text(name: str) -> str:
    """A module with a docstring, a function, a class, and what looks like a pair of recall."""
    return (f'"""About {name}. {"It explains itself at some length. " * 7}"""\n\n'
            f"{function_text(name)}\n\n{class_text(name)}\n\nFORMAT = '~QAAAA'\n")


def function_text(name: str) -> str:
    return f"def make_{name}(n):\n    # {name}\n    return n\n"


def class_text(name: str) -> str:
    return f"class Of_{name}:\n    def get(self):\n        return {name!r}\n"


@pytest.fixture
def installation(tmp_path, monkeypatch) -> Path:
    """Two roots of packages, single-file modules, and what must be passed over."""
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for i, package in enumerate(PACKAGES):
        folder = (stdlib, site)[i % 2] / package / "inner"
        folder.mkdir(parents=True)
        for file in FILES:
            path = folder if file == "util" else folder.parent
            (path / f"{file}.py").write_text(source_text(f"{package}_{file}"))
        (folder / "readme.txt").write_text(source_text("not_python"))
    for name in ("one", "two"):
        (stdlib / f"{name}.py").write_text(source_text(f"modules_{name}"))
    (site / "single.py").write_text(source_text("not_a_package"))
    (stdlib / "package6" / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (stdlib / "package6" / "broken.py").write_text("def (:\n")
    paths = {"stdlib": str(stdlib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(installed.sysconfig, "get_paths", lambda: paths)
    topics = {"if": "About if. " * 30, "for": "About for. " * 30}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    data.haystack_text.cache_clear()
    yield tmp_path
    data.haystack_text.cache_clear()


def texts(documents) -> list[str]:
    """The documents' texts; each must be whole: begin of text first, end of text last."""
    documents = list(documents)
    assert {d.input_ids[0] for d in documents} <= {TOKENIZER.bos_id}
    assert {d.input_ids[-1] for d in documents} <= {TOKENIZER.eos_id}
    return [TOKENIZER.decode(d.input_ids[1:-1]) for d in documents]


def test_a_repository_is_one_document(installation, monkeypatch):
    """Each package, and single-file modules as one, is either trained on or held out."""
    train, held_out = (
        [sorted(re.findall(r"^def make_(\w+)", text, re.M))
         for text in texts(data.code_repos(TOKENIZER, 0, out))] for out in (False, True))
    wanted = [[f"{package}_{file}" for file in FILES] for package in PACKAGES]
    assert sorted(train + held_out) == sorted([*wanted, ["modules_one", "modules_two"]])
    assert train and held_out
    paths = installed.sysconfig.get_paths() | {"purelib": "/nowhere"}
    monkeypatch.setattr(installed.sysconfig, "get_paths", lambda: paths)  # none was ever installed
    assert "package6" in installed.list_repositories()


def test_files_of_a_repository_stand_in_every_order(installation):
    """Over some seeds, three files of a repository come in all six orders."""
    code = ["\n".join(texts(data.code_repos(TOKENIZER, seed))) for seed in range(30)]
    orders = {tuple(re.findall(r"^def make_package7_(\w+)", text, re.M)) for text in code}
    assert orders == set(permutations(FILES))


def test_short_documents_are_functions_and_classes(installation):
    """Each top-level function and class of a training repository is a document, word for word."""
    repositories = texts(data.code_repos(TOKENIZER, 0))
    names = re.findall(r"^def make_(\w+)", "\n".join(repositories), re.M)
    wanted = [make(name) for name in names for make in (function_text, class_text)]
    decorated = "@cache\ndef odd():\n    return 1\n"  # a form feed before it ends no line
    (installation / "lib" / "package8" / "odd.py").write_text(f"x = 1\n\x0c\n{decorated}")
    assert sorted(texts(data.short(TOKENIZER, 0))) == sorted([*wanted, decorated])


def test_textbooks_are_joined_chapters(installation, monkeypatch):
    """First the language reference, then docstrings; where one is too short, all in order."""
    first, *books = texts(data.textbooks(TOKENIZER, 0))
    assert first == "About for. " * 30 + "\n\n" + "About if. " * 30
    assert any(f"About package7_{file}." in book for book in books for file in FILES)
    assert not any("def make_" in book for book in books)
    found = set(re.findall(r"About ([a-z]+\d*)_", "\n".join(books)))  # nothing that is held out
    assert found == {name for name in [*PACKAGES, "modules"] if not installed.is_held_out(name)}
    books = [document.input_ids for document in data.textbooks(TOKENIZER, 0)]
    monkeypatch.setattr(data, "LONGEST_BOOK", 1024)
    assert max(map(len, books)) < 2048 <= sum(map(len, books))
    (sequence,) = islice(data.pack_builtin("textbooks-2k", TOKENIZER, 2048, 0, PackReport()), 1)
    assert sequence.input_ids.tolist() == np.concatenate(books)[:2048].tolist()
    assert sequence.doc_lens == (2048,)


def _shuffled(method, seed: int):
    """A directory listing in another order, as another disk might give it."""

    def listing(self, *args):
        entries = list(method(self, *args))
        random.Random(f"{seed} {self}").shuffle(entries)
        return iter(entries)

    return listing


def packed_ids(domain: str, seed: int) -> list[list[int]]:
    """The first sequences of an embedded domain, packed anew."""
    data.haystack_text.cache_clear()
    sequences = data.pack_builtin(domain, load_tokenizer(), 512, seed, PackReport())
    return [s.input_ids.tolist() for s in islice(sequences, 8)]


@pytest.mark.parametrize("domain", ["code_repos-256", "textbooks-256", "short", "recall-256"])
def test_the_seed_alone_fixes_a_pack(installation, monkeypatch, domain):
    """Another seed gives other sequences, a directory listed in another order the same."""
    wanted, iterdir, rglob = packed_ids(domain, 0), Path.iterdir, Path.rglob
    assert domain == "textbooks-256" or packed_ids(domain, 1) != wanted
    for seed in range(3):
        monkeypatch.setattr(Path, "iterdir", _shuffled(iterdir, seed))
        monkeypatch.setattr(Path, "rglob", _shuffled(rglob, seed))
        assert packed_ids(domain, 0) == wanted


def test_a_haystack_is_code_without_pairs(installation):
    """Windows are stretches of the repositories, held out or not as asked; there is an end."""
    for held_out in (False, True):
        windows = data.haystack_windows(TOKENIZER, np.random.default_rng(0), 20, 200, 0, held_out)
        code = "".join(texts(data.code_repos(TOKENIZER, 0, held_out)))
        assert windows.shape == (20, 200) and windows.max() < 256
        for window in windows:
            assert TOKENIZER.decode(window) in code
    with pytest.raises(ValueError, match="haystack of 1,000,000 tokens"):
        data.haystack_windows(TOKENIZER, np.random.default_rng(0), 1, 10**6, 0)


@pytest.mark.parametrize(("domain", "shortest"), [("recall_bare-128", 32), ("recall-1k", 32),
                                                  ("icl-256", 64), ("icl-64", 64)])
def test_lengths_of_a_synthetic_domain_share_its_tokens(installation, domain, shortest):
    """The longest, half of it, ..., each length has as many tokens; packed, no document is cut."""
    name, longest = data.parse_domain(domain)
    documents = list(islice(data.SYNTHETIC_DOMAINS[name](TOKENIZER, 0, longest), 100))
    lengths = sorted({len(document) for document in documents}, reverse=True)
    assert lengths == [longest >> i for i in range(len(lengths))] and lengths[-1] >= shortest
    tokens, cycles = Counter(), 0
    for document in documents:
        tokens[len(document)] += len(document)
        if tokens.total() % (longest * len(lengths)) == 0:  # a cycle through all lengths is over
            assert set(tokens.values()) == {tokens.total() // len(lengths)}
            cycles += 1
    assert cycles > 2
    for sequence in islice(data.pack_builtin(domain, TOKENIZER, 1024, 0, PackReport()), 20):
        ends = np.cumsum(sequence.doc_lens)
        assert (sequence.input_ids[ends - 1] == TOKENIZER.eos_id).all()
        assert (sequence.input_ids[ends - sequence.doc_lens] == TOKENIZER.bos_id).all()


@pytest.mark.parametrize("domain", ["", "-2k", "books-2k", "code_repos", "recall-", "short-2k",
                                    "code_repos-2q", "icl-0", "icl-32", "recall-100", "recall-4k"])
def test_unknown_domains_are_refused(installation, domain):
    """A name that is not known, or a length that is missing or does not fit a sequence."""
    with pytest.raises(ValueError, match=r"domain|length"):
        list(islice(data.pack_builtin(domain, TOKENIZER, 2048, 0, PackReport()), 1))


def test_a_domain_is_a_name_and_a_length(installation, tmp_path):
    """pack_domain writes what pack_builtin packs."""
    assert data.parse_domain("recall-2k") == ("recall", 2048)
    assert data.parse_domain("short") == ("short", None)
    data.pack_domain(tmp_path / "set", "icl-64", 3, TOKENIZER, 128, 0)
    dataset = PackedDataset(tmp_path / "set")
    wanted = islice(data.pack_builtin("icl-64", TOKENIZER, 128, 0, PackReport()), 3)
    assert [s.input_ids.tolist() for s in wanted] == dataset.input_ids.tolist()
    with pytest.raises(data.NothingPacked, match=r"textbooks-64k: none of its .* documents \("):
        data.pack_domain(tmp_path / "none", "textbooks-64k", 3, TOKENIZER, 65_536, 0)
    assert [path.name for path in tmp_path.glob("*")] == ["lib", "set"]


# --- 8. The command line, as typed ----------------------------------------------------------------


def test_pack_then_inspect(tmp_path):
    """`pack` writes a folder that opens and says what is in it; `inspect` says the same again."""
    out = str(tmp_path / "icl")
    typed = f"pack --domain icl-64 --seq 128 --sequences 5 --out {out}", f"inspect {out}"
    packed, inspected = (subprocess.run([sys.executable, str(ROOT / "data.py"), *line.split()],
                                        capture_output=True, text=True) for line in typed)
    assert (packed.returncode, packed.stderr) == (0, "")
    dataset = PackedDataset(out)
    assert (len(dataset), dataset.seq_len, dataset[4].doc_lens) == (5, 128, (64, 64))
    assert "icl-64, 5 sequences x 128 tokens, 10 documents" in packed.stdout
    assert (inspected.returncode, inspected.stderr) == (0, "")
    report, _, said = packed.stdout.partition("\n")
    assert inspected.stdout == said
    assert report == ("documents in 10 (640 tokens), dropped entirely 0; "
                      "tokens packed 640, dropped 0")


@pytest.mark.parametrize("args", [
    ["unpack", "now"], ["inspect"], ["inspect", "a", "b"], ["inspect", "missing"],
    ["inspect", "--check"], ["pack", "--unknown"], ["pack", "--tokenizer", "gpt2"],
    ["pack", "--domain", "books-2k"], ["pack", "--seq", "100", "--domain", "code_repos-64"],
])
def test_a_wrong_command_ends_in_one_line(args, tmp_path, monkeypatch, capsys):
    """Whatever is wrong with a command, it ends in exit code 2 and one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *args])
    with pytest.raises(SystemExit) as exit:
        data.run_main(data.main)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1)
    assert re.match(r"data\.py( pack)?: error: ", err)


def test_without_a_command_data_explains_itself(monkeypatch, capsys):
    """The module's docstring is its help."""
    monkeypatch.setattr(sys, "argv", ["data.py"])
    data.main()
    assert capsys.readouterr().out == data.__doc__ + "\n"

