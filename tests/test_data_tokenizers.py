"""Tests of the tokenizers that data.py reads: each gives the ids of its file's own library.

Hugging Face's `tokenizers` trains four small byte-level BPE families: GPT-2 (its own split),
Llama-3 (its split, whole words first), Qwen (NFC, single digits) and SmolLM (digits first).
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import data
from data import load_tokenizer
from support import tokenizers as files

tokenizers = pytest.importorskip("tokenizers")

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
                r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
SPECIAL = {
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|im_start|>", "<|endoftext|>"],
}
FAMILIES = list(SPECIAL)


def source_text(wanted: int) -> str:
    """Real code of the standard library, at least so many characters."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(errors="ignore")
        if len(text) >= wanted:
            break
    return text


def text_of_all_scripts(n: int) -> str:
    """Random letters, marks, digits, symbols and every kind of white space."""
    rng = random.Random(0)
    blocks = [(0x20, 0x250), (0x300, 0x2000), (0x2000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    odd = "  \n\t\r\x0b\x1c\x85\u00a0\u2028\u3000'\u2019_0٣²Ⅷ½"
    # only what every Unicode table knows: libraries order the marks of newer ones differently
    letters = [[chr(i) for i in range(*block) if unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
               for block in blocks]
    return "".join(rng.choice(odd if rng.random() < 0.3 else rng.choice(letters)) for _ in range(n))


def train(family: str, folder: Path) -> Path:
    """Train a tokenizer of a family's make, and save it with a configuration beside it."""
    from tokenizers import Regex, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre

    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    split = LLAMA3_SPLIT if family == "llama3" else QWEN_SPLIT
    bytewise = pre.ByteLevel(add_prefix_space=False, use_regex=family in ("gpt2", "smollm"))
    first = pre.Digits(True) if family == "smollm" else pre.Split(Regex(split), "isolated")
    bpe.pre_tokenizer = bytewise if family == "gpt2" else pre.Sequence([first, bytewise])
    bpe.decoder = decoders.ByteLevel()
    if family == "qwen":
        bpe.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre.ByteLevel.alphabet(),
                                  show_progress=False)
    bpe.train_from_iterator([source_text(200_000), "naïve 中文 한국어 ñ " * 20], trainer)
    bpe.add_special_tokens(SPECIAL[family])
    if family == "llama3":
        begin = SPECIAL[family][0]
        bpe.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{begin} $A",
                                          special_tokens=[(begin, bpe.token_to_id(begin))])])
    folder.mkdir(parents=True)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {
        "content": SPECIAL[family][-1], "special": True}}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: train(family, root / family) for family in FAMILIES}


MEGABYTE = source_text(600_000)[:600_000] + text_of_all_scripts(200_000)


def read_by_hugging_face(folder: Path) -> tokenizers.Tokenizer:
    """Their tokenizer; a special token's name in a text stays text, as for ours."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_documents_are_those_of_hugging_face(folders, family):
    """A megabyte of code, scripts and white space; documents begin and end as the family's do."""
    theirs, ours = read_by_hugging_face(folders[family]), load_tokenizer(str(folders[family]))
    text = MEGABYTE + "".join(SPECIAL[family]) + "DON'T don't  12 34567\n\n \n x"
    assert len(text.encode()) > 10**6
    ids = ours.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if family == "qwen" else text)

    ids = ours.document("def f(x):\n    return x").input_ids.tolist()
    # Not the eos_token of the file beside where that ends a turn of chat: <|eot_id|>, <|im_end|>.
    ends = {"llama3": "<|end_of_text|>", "qwen": "<|endoftext|>"}
    end = theirs.token_to_id(ends.get(family, SPECIAL[family][-1]))
    assert ids == [*theirs.encode("def f(x):\n    return x").ids, end]
    assert ours.special_id(SPECIAL[family][0]) == theirs.token_to_id(SPECIAL[family][0])
    assert ours.vocab_size == theirs.get_vocab_size()
    assert [path.name for path in ours.files] == ["tokenizer.json", "tokenizer_config.json"]
    if family == "llama3":
        assert ours.bos_id == ids[0]
    else:
        with pytest.raises(ValueError, match="begins a document with no token"):
            ours.bos_id  # noqa: B018
    assert load_tokenizer(str(folders[family] / "tokenizer.json")).fingerprint == ours.fingerprint


def _set(*path_and_value):
    """A change of tokenizer.json: the value at a path of keys."""
    *path, key, value = path_and_value

    def change(table: dict) -> None:
        for step in path:
            table = table[step]
        table[key] = value(table[key]) if callable(value) else value

    return change


def _split(pattern: str):
    """A change of tokenizer.json: another pattern."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    return _set("pre_tokenizer", lambda step: {"type": "Sequence", "pretokenizers": [
        split, step | {"use_regex": False}]})


@pytest.mark.parametrize(("change", "named"), [
    (_set("model", "type", "Unigram"), "model.type"),
    (_set("normalizer", {"type": "NFKC"}), "normalizer"),
    (_set("pre_tokenizer", "add_prefix_space", True), "pre_tokenizer"),
    (_split(r"\p{L}+|\s+"), "drops text"),
    (_split(r"\p{L}+(?=\s)|\s+|\S"), "words that go on after white space"),
    (_set("model", "merges", lambda merges: merges[:-1]), "model.merges"),
    (_set("model", "merges", lambda merges: [merges[-1], *merges[:-1]]), "model.merges"),
    (_set("model", "vocab", lambda vocab: {t: vocab[t] for t in vocab if t != "a"}), "is no token"),
    (_split(r"\p{N}{1,3}+|\s+|\S"), "libraries read differently"),
    (_set("model", "vocab", lambda vocab: vocab | {"ab": 5}), "model.vocab"),
    (_set("model", "vocab", lambda vocab: vocab | {"zzzzz": 5000}), "no way to b'zzzzz'"),
    (_set("added_tokens", lambda added: [*added, {"content": "the", "id": 999, "special": False}]),
     "added_tokens"),
    (lambda table: table.pop("model"), "'model'"),
])
def test_what_cannot_be_exact_is_refused(folders, tmp_path, change, named):
    """Each other make of tokenizer is an error that names the file and the field."""
    table = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    change(table)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        load_tokenizer(str(path))
    assert str(path) in str(error.value)


def test_a_byte_that_is_no_token_is_refused_in_a_text_only(folders, tmp_path):
    """SmolLM2 lacks 21 single bytes. All other text has Hugging Face's ids; the byte is named."""
    table = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    bell = chr(256 + 7)  # how the alphabet writes byte 7
    assert not [pair for pair in table["model"]["merges"] if bell in "".join(pair)]
    wanted = load_tokenizer(str(folders["gpt2"]))
    del vocab[bell]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    text = source_text(50_000)[:50_000]
    assert tokenizer.encode(text).tolist() == wanted.encode(text).tolist()
    assert tokenizer.vocab_size == wanted.vocab_size
    assert tokenizer.fingerprint != wanted.fingerprint
    with pytest.raises(ValueError, match="has byte 0x07, which is no token of tokenizer"):
        tokenizer.encode("ring\a")


def test_without_a_token_that_ends_documents_there_is_no_tokenizer(folders, tmp_path):
    """Only a name that is known, or that a file beside gives, ends a document."""
    text = (folders["gpt2"] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    load_tokenizer.cache_clear()
    assert load_tokenizer(str(tmp_path)).eos_id == load_tokenizer(str(folders["gpt2"])).eos_id


@pytest.mark.parametrize("letter", ["a", " ", "\n", "é", "。", "a1"])
def test_a_million_characters_without_a_break_take_seconds(folders, letter):
    """No panic and no crawl, and the text comes back."""
    tokenizer, text = load_tokenizer(str(folders["llama3"])), letter * 10**6
    begin = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_do_not_change_ids(folders, family, monkeypatch):
    """Encoded in pieces of at most 4,096 characters, real text has the ids of the whole."""
    tokenizer = load_tokenizer(str(folders[family]))
    text = source_text(60_000) + "中文，没有空格。" * 400 + "1,024 2.5\r\n" * 200
    whole = tokenizer.encode(text)
    piece = re.compile(files.PIECE.pattern.replace("131072", "4096"))
    monkeypatch.setattr(files, "PIECE", piece)
    pieces = piece.findall(text)
    assert "".join(pieces) == text and len(pieces) > 15
    # so each was cut at a place, none because its room was used up
    assert max(map(len, pieces)) < 4096
    assert np.array_equal(tokenizer.encode(text), whole)


def test_named_encodings_are_those_that_tiktoken_has(monkeypatch, tmp_path):
    """`tiktoken:NAME` where tiktoken has it, or one error; nobody is asked, of a pack neither."""
    small = tiktoken.Encoding("small", pat_str=files.GPT2_SPLIT, special_tokens={
        "<|endoftext|>": 256}, mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"small": small}.__getitem__)
    tokenizer = load_tokenizer("tiktoken:small")
    assert tokenizer.document("ab").input_ids.tolist() == [97, 98, 256] and not tokenizer.files

    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("socket", "getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *_, **__: pytest.fail("asked the network"))
    data.pack_domain(tmp_path / "a", "recall-64", 1, load_tokenizer(), 64, seed=0)
    meta = (tmp_path / "a" / "meta.json").read_text().replace('"bytes"', '"tiktoken:gpt2"')
    (tmp_path / "a" / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match=r"'tiktoken:gpt2' can't be read.*TIKTOKEN_CACHE_DIR"):
        data.inspect(str(tmp_path / "a"))


def test_many_combining_marks_are_refused_at_once():
    """Python's own NFC would take hours for these. Other signs may stand in any number."""
    for text in ("a" + "\u0301\u0323" * 10**6, "\u0f73" * 10**6):
        with pytest.raises(ValueError, match="has 256 combining marks in a row"):
            files.nfc(text)
    assert files.nfc("e\u0301" + "\u2500" * 999) == "\u00e9" + "\u2500" * 999


def test_reading_a_tokenizer_fetches_nothing(folders):
    """Only tiktoken and the standard library are needed: no `tokenizers`, no `transformers`.

    Nor a locale with UTF-8: of a letter that it can't print it prints a question mark.
    """
    code = ("import sys, data; data.load_tokenizer(sys.argv[1]); "
            "assert not {'tokenizers', 'transformers', 'datasets'} & set(sys.modules); "
            "data.run_main(lambda: print('gr\\xf6\\xdfer'))")
    done = subprocess.run([sys.executable, "-c", code, str(folders["qwen"])], capture_output=True,
                          cwd=Path(data.__file__).parent, check=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (done.stdout, done.stderr) == (b"gr??er\n", b"")


@pytest.mark.parametrize("split", ["bytes", files.GPT2_SPLIT, CL100K_SPLIT])
def test_a_written_tokenizer_gives_hugging_face_our_ids(folders, tmp_path, split, monkeypatch):
    """From ranks alone, as for a named encoding: ids, text and fingerprint are ours."""
    ranks = load_tokenizer(str(folders["llama3"])).encoding._mergeable_ranks
    named = tiktoken.Encoding("named", pat_str=split, mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": len(ranks)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"named": named}.__getitem__)
    load_tokenizer.cache_clear()
    ours = load_tokenizer("bytes" if split == "bytes" else "tiktoken:named")
    for name, content in data.tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(content)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = source_text(50_000)[:50_000] + text_of_all_scripts(20_000)
    found = theirs.encode(text).ids
    assert found == [*ours.begin, *ours.encode(text)]
    assert theirs.decode(found[len(ours.begin):]) == ours.decode(ours.encode(text))
    assert load_tokenizer(str(tmp_path)).fingerprint == ours.fingerprint


def test_a_model_is_not_used_with_another_tokenizer(folders, tmp_path):
    """Neither to train it nor to ask it. The same table is fine anywhere, byte by byte."""
    with pytest.raises(ValueError, match=f"'bytes'; write --tokenizer {folders['qwen']}"):
        data.tokenizer_for(folders["qwen"], "bytes")
    ours = data.tokenizer_for(folders["qwen"], str(folders["qwen"]))
    files = data.tokenizer_files(ours)
    assert files == {path.name: path.read_bytes() for path in folders["qwen"].iterdir()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert data.tokenizer_for(tmp_path, str(folders["qwen"])) is ours
    assert data.tokenizer_for(tmp_path / "none", "bytes") is load_tokenizer("bytes")

