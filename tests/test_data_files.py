"""Tests of what data.py reads and writes: sources, tokenized folders, packs, MDS, inspect."""

import gzip
import json
import os
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import byte_tokenizer

import data
import model
from data import PackConfig, PackedDataset, PackReport, TokenizeConfig, load_tokenizer, tokenize
from support import inspect as show
from support import mds, texts
from support.files import sha256_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "mds"))
import make  # noqa: E402  what mosaicml-streaming was given to write

TEXTS = ["first\ntext", "zwei, größer", "третий", "four", "five five"]
property_test = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def texts_of(path: Path, column: str = "text", **options) -> list[str]:
    """The texts of a source; the first bad row raises its ValueError."""
    return [texts.text_of(row, column) for _, row in texts.read_rows(str(path), **options)]


def jsonl(texts, column: str = "text") -> bytes:
    rows = [json.dumps({"id": i, column: text}).encode() + b"\n" for i, text in enumerate(texts)]
    return b"".join(rows)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def write_table(path: Path, texts, column: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.fixture(autouse=True)
def no_figures_and_no_disk(monkeypatch):
    """Figures, and waiting for the disk, are tried with `pack` as typed, in test_data.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- 1. Sources -----------------------------------------------------------------------------------


def write_source(path: Path, kind: str) -> Path:
    """TEXTS as one file or folder of a kind."""
    if kind == "folder":
        (path / "c").mkdir(parents=True)
        (path / "c" / "d.jsonl").write_bytes(jsonl(TEXTS[3:]))
        (path / "b.jsonl").write_bytes(jsonl(TEXTS[2:3]))
        (path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:2])))
    elif kind.startswith("jsonl"):
        pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[kind[5:]]
        path = path.with_name(f"source.{kind}")
        path.write_bytes(pack(b"\n" + jsonl(TEXTS[:3])) + pack(jsonl(TEXTS[3:])))  # two frames
    elif kind == "parquet":
        path = write_table(path.with_suffix(".parquet"), TEXTS)
    else:
        path.mkdir()
        for i, text in enumerate(TEXTS):
            (path / f"{i}.{'md' if i % 2 else 'txt'}").write_text("\ufeff" * (i < 2) + text)
        (path / ".hidden.txt").write_text("not a document")
        (path / "link.txt").symlink_to(path / "0.txt")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "folder", "parquet", "text"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    """By its suffix alone, in order (a folder's files by their sorted paths), nothing twice."""
    assert texts_of(write_source(tmp_path / "source", kind)) == TEXTS


def test_a_parquet_file_is_read_as_it_lies_there(tmp_path, monkeypatch):
    """No glob, no `datasets`; categories and views are text; of one name there is one column."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_table(tmp_path / "c1.parquet", ["other"])
    path, column = tmp_path / "c[1].parquet", pyarrow.array(TEXTS)
    for kind in (column.dictionary_encode(), column.cast(pyarrow.string_view())):
        assert texts_of(write_table(path, kind)) == TEXTS
    pyarrow.parquet.write_table(pyarrow.table([column, column], ["text", "text"]), path)
    with pytest.raises(ValueError, match=r"c\[1\]\.parquet can't be read .*duplicate field names"):
        texts_of(path)


def test_rows_are_chosen_joined_and_read_as_conversations(tmp_path, monkeypatch):
    """`--where` looks into columns, `--group-by` joins neighbours, messages are plain text."""
    rows = [{"repo": repo, "text": text, "meta": {"set": kind}, "messages": turns}
            for repo, text, kind, turns in (("a", "1", "Book", [{"role": "user", "content": "Hi"}]),
                                            ("a", "2", "Book", []), ("b", "3", "Book", [{}]),
                                            ("b", "4", "Web", 7), ("c", "5", "Book", None))]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    found = list(texts.read_rows(str(source)))
    kept = list(texts.select_rows(iter(found), "meta.set=Book"))
    assert [row["text"] for _, row in kept[:-1]] == ["1", "2", "3", "5"]
    assert isinstance(kept[-1][1], ValueError)  # a damaged row is never left out silently
    *joined, last = texts.join_rows(iter(found), texts.TokenizeConfig(group_by="repo"))
    assert [sorted(row["text"].split("\n")) for _, row in joined] == [["1", "2"], ["3", "4"], ["5"]]
    assert isinstance(last[1], ValueError)
    *missing, _ = texts.join_rows(iter(found), texts.TokenizeConfig(group_by="repository"))
    assert [str(row) for _, row in missing] == ["has no 'repository' to join by"] * 5
    with pytest.raises(ValueError, match="--where 'Book' is not COLUMN=VALUE"):
        list(texts.select_rows(iter(found), "Book"))
    monkeypatch.setattr(texts, "MAX_CHARS", 2)  # of a repository that is too large for one row
    *cut, _ = texts.join_rows(iter(found), texts.TokenizeConfig(group_by="repo"))
    assert sorted(row["text"] for _, row in cut) == ["1", "2", "3", "4", "5"]
    monkeypatch.undo()
    assert texts.text_of(rows[0], "messages") == "user: Hi"
    for row in rows[1:]:
        with pytest.raises(ValueError, match="has no"):
            texts.text_of(row, "messages")
    config = texts.TokenizeConfig(input=str(source), where="meta.set=Book", group_by="repo",
                                  on_bad="skip", out=str(tmp_path / "out"), workers=1)
    data.tokenize(config)
    documents = texts.read_shard(tmp_path / "out" / "00000")
    assert len(documents) == 3 and {len(ids) for ids in documents} == {3, 5}


def test_links_are_counted_and_only_a_snapshots_are_followed(tmp_path, capsys, monkeypatch):
    """Nothing outside the folder is read, nothing twice; the hub's snapshots are links to blobs."""
    snapshot, repos = tmp_path / "set" / "snapshots" / "0", tmp_path / "repos"
    for folder in (snapshot / "data", tmp_path / "set" / "blobs", repos / "one"):
        folder.mkdir(parents=True)
    (tmp_path / "set" / "blobs" / "5e").write_bytes(jsonl(TEXTS))
    (snapshot / "data" / "a.jsonl").symlink_to("../../../blobs/5e")
    (repos / "one" / "a.py").write_text("a = 1")
    (repos / "evil").symlink_to(snapshot)
    (repos / "loop").symlink_to(".")
    (snapshot / "b.jsonl").symlink_to("../../../repos/one/a.py")
    assert texts_of(snapshot) == TEXTS and texts_of(repos, format="repos") == ["a = 1"]
    assert capsys.readouterr().err == (
        f"{snapshot}: 1 links or unreadable are left out, as {snapshot}/b.jsonl\n"
        f"{repos}: 2 links or unreadable are left out, as {repos}/evil\n")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "no", str(repos))))
    assert texts.list_files(str(repos)) == ([], [repos])  # as for a folder in it


def test_what_unpacks_to_gigabytes_is_refused(tmp_path):
    """A Parquet file of one kilobyte."""
    zeros = pyarrow.ListArray.from_arrays([0, 2**25], np.zeros(2**25, np.int8))
    pyarrow.parquet.write_table(pyarrow.table({"a": zeros}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'a\.list.element' unpacks to 33,554,432 bytes or"):
        texts_of(tmp_path / "a.parquet")


def test_a_hub_data_set_streams(tmp_path, monkeypatch):
    """The call that reads the hub reads a local folder of a data set as well."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_table(tmp_path / "set" / "train-00000.parquet", TEXTS, "content")
    assert texts_of(tmp_path / "set", "content", format="hub") == TEXTS
    with pytest.raises(ValueError, match="'text' but None; its columns are 'id', 'content'"):
        texts_of(tmp_path / "set", format="hub")
    with pytest.raises(ValueError, match="can't be read"):
        texts_of(tmp_path / "set", format="hub", split="nothing")


@pytest.mark.parametrize(("line", "why"), [
    (b"{", "is not JSON"), (b'{"text": "\xff"}', "is not JSON"), (b"[" * 99_000, "is not JSON"),
    (b'{"txt": "a"}', "but None; its columns are 'txt'"), (b'["a"]', "list, not an object"),
    (b'{"text": " \\n"}', "no text in column 'text'"), (b'{"text": ["a"]}', "but ['a']"),
    (b'{"text": "\\ud800"}', "not UTF-8"), (b'{"text": "\\u0007"}', "has byte 0x07, which is no"),
    (b'{"text": "' + b"x" * 120_000 + b'"}', "longer than 100,000 characters")])
def test_a_bad_line_stops_or_is_skipped(tmp_path, monkeypatch, line, why):
    """By default it stops, with file and row; with --on-bad skip the rows around it stay."""
    path, docs = tmp_path / "web.jsonl", tmp_path / "docs"
    path.write_bytes(jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    lacking = byte_tokenizer(merges={b"\a": 2**31 + 7})
    monkeypatch.setattr(data, "load_tokenizer", lambda spec: lacking)
    monkeypatch.setattr(texts, "MAX_CHARS", 100_000)
    config = TokenizeConfig(input=str(path), out=str(docs))
    with pytest.raises(ValueError, match=rf"web\.jsonl:2 .*{re.escape(why)}.*--on-bad skip"):
        tokenize(config)
    tokenize(replace(config, on_bad="skip"))  # in the same folder
    found = sorted(lacking.decode(d.input_ids[1:-1]) for d in data.read_tokenized(docs, 0))
    assert found == ["one", "two"]
    (reason,) = json.loads((docs / "00000" / "meta.json").read_text())["bad_rows"]
    assert reason.startswith(f"{path}:2 ") and why in reason


def cut_in_half(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path


@pytest.mark.parametrize(("make", "why"), [
    (lambda p: cut_in_half(write_table(p / "a.parquet", TEXTS * 99)), r"a\.parquet can't be read"),
    (lambda p: cut_in_half(write_source(p / "a", "jsonl.gz")), r"source\.jsonl\.gz can't be read"),
    (lambda p: write_table(p / "a.parquet", [1, 2]), "but 1; its columns are 'id', 'text'"),
    (lambda p: cut_in_half(write_source(p / "a", "jsonl.zst")), r"jsonl\.zst can't be read"),
    (lambda p: (p / "a.parquet").write_bytes(b"no table"), r"a\.parquet can't be read"),
    (lambda p: (p / "a.arrow").write_bytes(b"a"), r"a\.arrow.*JSONL or Parquet"),
    (lambda p: (p / "a.txt").write_bytes(b"\x7fELF\0\0"), r"a\.txt is binary"),
    (lambda p: (p / "a.txt").write_bytes(b"caf\xe9"), r"a\.txt is not UTF-8"),
    (lambda p: (p / "a.txt").write_bytes(b""), r"a\.txt has no text"),
    (lambda p: [(p / name).write_bytes(b"b") for name in ("a.txt", "b.jsonl")], "one kind of file"),
    (lambda p: (p / "a.tar").write_bytes(b"a"), r"a\.tar is not \.jsonl, "),
    (lambda p: None, "one kind of file"),
    (lambda p: p.rmdir(), "does not exist"),
])
def test_what_cannot_be_read_is_named(tmp_path, make, why):
    """Truncated, of the wrong kind, binary, empty, missing: one message; no shard is written."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    make(source)
    with pytest.raises(ValueError, match=why):
        tokenize(TokenizeConfig(input=str(source), out=str(out)))
    assert not list(out.glob("*/")) and not (out / "meta.json").exists()


@pytest.mark.parametrize(("options", "why"), [
    ({"format": "csv"}, "--format 'csv' is unknown"),
    ({"on_bad": "ignore"}, "--on-bad 'ignore' is unknown"),
    ({"input": ""}, "'' does not exist"),
])
def test_wrong_options_of_tokenize(tmp_path, options, why):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    config = {"input": str(tmp_path / "a.jsonl"), "out": str(tmp_path / "out"), **options}
    with pytest.raises(ValueError, match=why):
        tokenize(TokenizeConfig(**config))


def test_a_repository_is_one_document(tmp_path, monkeypatch):
    """All its text files, in an order of the seed; nothing hidden, linked, binary or outside."""
    root = tmp_path / "repos"
    for name in ("alpha", "beta"):
        (root / name).mkdir(parents=True)
        (root / name / "cut.gz").write_bytes(gzip.compress(b"a" * 999)[:20])
        for file in ("a.py", "b/c.py", "b/d.txt", ".git/config"):
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<{name}/{file}>")
        (root / name / "image.png").write_bytes(b"\x89PNG\0")
        (root / name / "latin.txt").write_bytes(b"caf\xe9")
        (root / name / "link.py").symlink_to("/etc/hostname")
    (root / "README.md").write_text("of no repository")
    (root / "empty").mkdir()
    alpha, beta = texts_of(root, format="repos")
    parts = ["<alpha/a.py>", "<alpha/b/c.py>", "<alpha/b/d.txt>"]
    assert sorted(alpha.split("\n")) == parts
    assert "<beta/a.py>" in beta and len(beta) == len("\n".join(parts)) - 3
    orders = {texts_of(root, format="repos", seed=seed)[0] for seed in range(20)}
    assert len(orders) == 6  # each order of three files
    assert texts_of(root, format="repos") == [alpha, beta]
    monkeypatch.setattr(texts, "MAX_CHARS", 30)
    cut = texts_of(root, format="repos")  # between files; no file is lost
    assert len(cut) == 4 and all(len(part) <= 32 for part in cut)
    assert sorted(" ".join(cut[:2]).split()) == parts


# --- 2. Tokenized folders -------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".png"}


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    """60 documents and three bad rows."""
    rng = np.random.default_rng(0)
    texts = [chr(97 + i % 26) * int(rng.integers(1, 200)) for i in range(60)]
    texts[7] = texts[31] = texts[59] = ""
    path = tmp_path_factory.mktemp("web") / "web.jsonl"
    path.write_bytes(jsonl(texts))
    return path


def options(web: Path, out: Path, **changes) -> TokenizeConfig:
    return replace(TokenizeConfig(input=str(web), out=str(out), on_bad="skip", shard_tokens=1000,
                                  workers=2), **changes)


def test_tokenized_documents_are_the_texts(web, tmp_path, capsys):
    """Each text once, begun and ended; bad rows counted and named; shards of a thousand tokens."""
    docs = tmp_path / "docs"
    tokenize(options(web, docs))
    out = capsys.readouterr().out
    meta = json.loads((docs / "meta.json").read_text())
    assert (meta["rows"], meta["documents"], meta["bad"]) == (60, 57, 3) and meta["shards"] > 4
    tokenizer = load_tokenizer()
    found, again = ([tokenizer.decode(d.input_ids) for d in data.read_tokenized(docs, seed)]
                    for seed in (0, 1))
    texts = [json.loads(line)["text"] for line in web.read_text().splitlines()]
    wanted = [f"<|begin_of_text|>{text}<|end_of_text|>" for text in texts if text]
    assert sorted(found) == sorted(again) == sorted(wanted) and found != again
    assert f"skipped: {web}:8 has no text" in out
    assert "57 documents" in out and "3 of 60 rows skipped" in out
    assert meta["max_id"] == tokenizer.eos_id
    assert meta["tokens"] == sum(len(text) + 2 for text in texts if text)


@pytest.mark.parametrize("at", [1, 3])
def test_killed_between_shards_and_run_again_gives_the_same_bytes(web, tmp_path, monkeypatch, at):
    """Whole at the end, never before; also with another number of workers, but not another job."""
    tokenize(options(web, tmp_path / "whole"))
    honest, written = texts._write_shard, []

    def write_and_die(*args):  # as the n-th shard gets its name: it is written, but none can see it
        written.append(honest(*args))
        if len(written) == at:
            raise KeyboardInterrupt
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(texts, "_write_shard", write_and_die)
        tokenize(options(web, tmp_path / "docs"))
    shards = [path.name for path in sorted((tmp_path / "docs").iterdir()) if path.is_dir()]
    assert shards == [f"{n:05d}" for n in range(at - 1)]
    assert not (tmp_path / "docs" / "meta.json").exists()
    if shards:
        with pytest.raises(ValueError, match="made with other settings"):
            tokenize(options(web, tmp_path / "docs", shard_tokens=2000))
        before = web.stat().st_mtime_ns
        os.utime(web, ns=(before, before + 1))
        with pytest.raises(ValueError, match="from files of other names, sizes or times"):
            tokenize(options(web, tmp_path / "docs"))
        os.utime(web, ns=(before, before))
    (tmp_path / "docs" / f"{at - 1:05d}.writing").mkdir()  # what a killed process leaves
    tokenize(options(web, tmp_path / "docs", workers=1))
    assert content(tmp_path / "docs") == content(tmp_path / "whole")
    with pytest.raises(ValueError, match="complete already"):
        tokenize(options(web, tmp_path / "docs"))


@pytest.mark.parametrize("command", ["tokenize", "pack"])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, command):
    """The kernel refuses to write on (a limit on file sizes): one error, and no folder."""
    source, docs, out = tmp_path / "a.jsonl", tmp_path / "docs", tmp_path / "out"
    source.write_bytes(jsonl(["x" * 1000] * 400))
    tokenize(TokenizeConfig(input=str(source), out=str(docs), shard_tokens=2**17))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            if command == "tokenize":
                tokenize(TokenizeConfig(input=str(source), out=str(out)))
            else:
                data.pack(PackConfig(from_=str(docs), domain="x", seq=1024, out=str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(("file", "change", "why"), [
    ("meta.json", lambda b: b.replace(b"documents-2", b"documents-0"), "does not say format"),
    ("meta.json", lambda b: re.sub(rb'"shards": \d+', b'"shards": 1', b), "its shards and"),
    ("00001/input_ids.bin", lambda b: b[:8] + bytes([b[8] ^ 1]) + b[9:], "do not agree"),
    ("00001/meta.json", lambda b: b.replace(b'"tokens": 1', b'"tokens": 2'), "do not agree"),
    ("00001/input_ids.bin", lambda b: b[:-4], "do not agree"),
    ("00001/doc_ends.bin", lambda b: b[8:16] + b[:8] + b[16:], "do not agree"),
])
def test_a_damaged_tokenized_folder_is_refused(web, tmp_path, file, change, why):
    tokenize(options(web, tmp_path / "docs"))
    path = tmp_path / "docs" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=why):
        list(data.read_tokenized(tmp_path / "docs", 0))


# --- 3. Packing tokenized documents ---------------------------------------------------------------


def write_numbered(folder: Path, shards: list[list[int]]) -> Path:
    """A tokenized folder of documents of given lengths; every token has a number of its own."""
    token = 0
    for n, lens in enumerate(shards):
        part = folder / f"{n:05d}"
        part.mkdir(parents=True)
        np.arange(token, token + sum(lens), dtype=np.uint32).tofile(part / "input_ids.bin")
        np.cumsum(lens).astype(np.int64).tofile(part / "doc_ends.bin")
        token += sum(lens)
        meta = {"rows": 0, "documents": len(lens), "tokens": sum(lens), "bad": 0, "max_id": token}
        (part / "meta.json").write_text(json.dumps(meta | {"sha256": sha256_of(part, "*.bin")}))
    (folder / "meta.json").write_text(json.dumps(meta | {
        "documents": sum(map(len, shards)), "tokens": sum(map(sum, shards)),
        "format": texts.FORMAT, "tokenizer": "bytes", "vocab_size": 295, "shards": len(shards),
        "tokenizer_fingerprint": load_tokenizer().fingerprint}))
    return folder


SHARDS = st.lists(st.lists(st.integers(1, 50), max_size=8), min_size=1, max_size=4)


@property_test
@given(SHARDS, st.sampled_from(["short", "sft", "x-8", "x-16"]), st.integers(0, 3))
def test_every_token_is_where_its_rule_puts_it(tmp_path_factory, shards, domain, seed):
    """Short: all but less than a sequence. Long: whole pieces of what is long enough."""
    folder = write_numbered(tmp_path_factory.mktemp("docs") / "docs", shards)
    rule, report, seq_len = "sft" if domain == "sft" else "auto", PackReport(), 16
    sequences = list(data.pack_tokenized(str(folder), rule, domain, seq_len, seed, report))
    ids = [i for s in sequences for i in s.input_ids.tolist()]
    assert len(set(ids)) == len(ids) == report.tokens_packed
    lens = [n for shard in shards for n in shard]
    assert (report.documents_in, report.tokens_in) == (len(lens), sum(lens))
    begins = np.cumsum([0, *lens]).tolist()
    pieces = [p for s in sequences for p in np.split(s.input_ids, np.cumsum(s.doc_lens)[:-1])]
    for piece in pieces:  # consecutive tokens of one document
        document = np.searchsorted(begins, piece[0], side="right") - 1
        assert piece.tolist() == list(range(piece[0], piece[0] + len(piece)))
        assert piece[-1] < begins[document + 1]
    if domain == "short":
        assert sum(lens) - len(ids) < seq_len
    elif domain == "sft":
        assert all(piece[0] in begins for piece in pieces)
    else:
        size = int(domain[2:])
        whole = [begin + k * size for begin, n in zip(begins, lens, strict=False) if size <= n and
                 (size == seq_len or n < seq_len) for k in range(n // size)]
        assert {len(piece) for piece in pieces} <= {size}
        assert {int(piece[0]) for piece in pieces} <= set(whole)
        assert len(pieces) == len(whole) // (seq_len // size) * (seq_len // size)


def test_packing_is_the_seeds_alone(web, tmp_path):
    """The same seed, the same bytes; --ranks, --sequences and the tokenizer are kept."""
    tokenize(options(web, tmp_path / "docs"))
    packs = {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"ranks": 4}, "e": {"sequences": 2}}
    for name, changes in packs.items():
        data.pack(PackConfig(from_=str(tmp_path / "docs"), domain="web", seq=512,
                             out=str(tmp_path / name), **changes))
    a, b, c, d, e = (PackedDataset(tmp_path / name) for name in "abcde")
    assert a.meta == b.meta and a.meta["sha256"] != c.meta["sha256"] and len(e) == 2 < len(a)
    assert not any(model.crosses_ranks(d[i].doc_lens, 4) for i in range(len(d)))
    assert a.meta["max_id"] == load_tokenizer().eos_id
    path = tmp_path / "docs" / "meta.json"
    path.write_text(path.read_text().replace(load_tokenizer().fingerprint, "0" * 16))
    with pytest.raises(ValueError, match=r"docs was made with tokenizer 'bytes' \(0{16}\)"):
        data.pack(PackConfig(from_=str(tmp_path / "docs"), domain="web", out=str(tmp_path / "f")))


@pytest.mark.parametrize(("changes", "why"), [
    ({"rule": "best"}, "--rule 'best' is unknown"),
    ({"rule": "sft", "ranks": 2}, "--ranks cuts short"),
    ({"domain": "web-3", "seq": 8}, "choose a divisor"),
    ({"domain": "web-8k", "seq": 8192}, "none of its 57"),
    ({"from_mds": "x"}, "give one"),
    ({"from_": "", "rule": "sft"}, "--rule goes with --from alone"),
    ({"from_": "", "from_mds": "x", "ranks": 2}, "--ranks not with --from-mds"),
    ({"from_": "missing"}, "not a tokenized data folder"),
])
def test_wrong_options_of_pack(web, tmp_path, changes, why):
    tokenize(options(web, tmp_path / "docs"))
    config = PackConfig(from_=str(tmp_path / "docs"), domain="web", seq=512,
                        out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=why):
        data.pack(replace(config, **changes))
    assert not (tmp_path / "out").exists()


# --- 4. MDS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make.FOLDERS)
def test_mosaicml_folders_read_as_they_were_written(name):
    """Ids, boundaries and masks, compressed or not."""
    report = PackReport()
    sequences = list(data.pack_mds(ROOT / "tests" / "mds" / name, make.SEQ_LEN, report))
    for sequence, sample in zip(sequences, make.samples(name), strict=True):
        assert sequence.input_ids.tolist() == sample["input_ids"].tolist()
        assert list(sequence.doc_lens) == np.diff(sample["indices"])[:, 0].tolist()
        assert (sequence.loss_mask is None) == (name != "sft")
        if name == "sft":
            assert sequence.loss_mask.tolist() == sample["mask"].astype(bool).tolist()
    assert report.documents_in == sum(len(s.doc_lens) for s in sequences)
    assert report.tokens_packed == 7 * 64


def test_a_mosaicml_folder_becomes_ours(tmp_path, monkeypatch, capsys):
    """--from-mds, with the mask: what training will read, given a tokenizer that has the ids."""
    config = PackConfig(from_mds=str(ROOT / "tests" / "mds" / "sft"), domain="ultrachat", seq=64,
                        out=str(tmp_path / "sft"))
    with pytest.raises(ValueError, match=r"has token id 12\d,\d{3}, but there are only 348"):
        data.pack(config)
    monkeypatch.setattr(data, "load_tokenizer", lambda spec: byte_tokenizer(begin=128_254))
    data.pack(config)
    dataset = PackedDataset(tmp_path / "sft")
    samples = list(make.samples("sft"))
    assert np.array_equal(dataset.input_ids, [sample["input_ids"] for sample in samples])
    assert np.array_equal(dataset.loss_mask, [sample["mask"] for sample in samples])
    assert "ultrachat" in capsys.readouterr().out


def _index(**changes):
    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        index["shards"][1].update(changes)
        (folder / "index.json").write_text(json.dumps(index))

    return change


def _cut(size: int):
    return lambda folder: os.truncate(folder / "shard.00001.mds", size)


@pytest.mark.parametrize(("change", "why"), [
    (lambda folder: (folder / "index.json").unlink(), r"index\.json is not readable JSON"),
    (lambda folder: os.truncate(folder / "index.json", 2**31), r"index\.json .* more than 64 MiB"),
    (lambda folder: (folder / "shard.00001.mds").unlink(), r"shard\.00001"),
    (lambda folder: (folder / "shard.00001.mds").symlink_to(
        (folder / "shard.00001.mds").rename(folder.parent / "far")), "00001.mds.*no MDS shard of"),
    (_index(format="csv"), "no MDS shard"),
    (_index(column_names=["a", "b", "c", "d"]), "'input_ids'"),
    (_index(raw_data={"basename": "../../secret"}), "no MDS shard"),
    (_index(raw_data={"basename": "/etc/hostname"}), "no MDS shard"),
    (_index(column_encodings=["str", "pkl", "pkl", "int"]), r"shard\.00001\.mds sample 0: .*'pkl'"),
    (_index(column_encodings=["str", "ndarray:uint32", "ndarray", "int"]), "have ndarray:DTYPE"),
    (_index(column_encodings=["str", "ndarray:uint32", "ndarray:uint32:64", "int"]), "DTYPE"),
    (_index(column_sizes=[None, None, 8, 8]), r"shard\.00001\.mds sample 0"),
    (_index(samples=90), r"shard\.00001\.mds sample \d+"),
    (_cut(900), r"shard\.00001\.mds sample \d"), (_cut(0), "sample 0"),
])
def test_a_damaged_mosaicml_folder_is_refused(tmp_path, change, why):
    """With shard and sample; nothing unpickled, nothing outside the folder read."""
    shutil.copytree(ROOT / "tests" / "mds" / "static", tmp_path / "mds")
    change(tmp_path / "mds")
    with pytest.raises((ValueError, OSError), match=why):
        list(data.pack_mds(tmp_path / "mds", 64, PackReport()))


@pytest.mark.parametrize(("seq_len", "columns"), [
    (8, {"indices": [[0, 3], [4, 8]]}), (8, {"indices": [[1, 8]]}), (8, {"indices": [[0, 7]]}),
    (8, {"indices": [[0, 8], [8, 8]]}), (16, {}), (8, {"mask": [1] * 7})])
def test_documents_that_do_not_fill_a_sequence_are_refused(seq_len, columns):
    sample = {"input_ids": np.arange(8)} | {name: np.array(v) for name, v in columns.items()}
    with pytest.raises(ValueError, match=f"mask do not fill {seq_len} tokens"):
        mds.check_sequence(sample, seq_len)


# --- 5. Inspect -----------------------------------------------------------------------------------


def test_inspect_a_root_and_a_folder_without_its_tokenizer(tmp_path, capsys):
    """Each domain with its share of the tokens; of one alone all but a text without tokenizer."""
    for name, n in (("one", 1), ("three", 3)):
        data.pack(PackConfig(domain="icl-64", seq=64, sequences=n, out=str(tmp_path / name)))
    capsys.readouterr()
    data.inspect(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["25.0%", "one"], ["75.0%", "three"]]
    path = tmp_path / "one" / "meta.json"
    path.write_text(path.read_text().replace('"bytes"', '"/gone/tokenizer.json"'))
    with pytest.raises(ValueError, match=r"tokenizer '/gone/tokenizer.json' can't be read"):
        data.inspect(str(tmp_path / "one"))
    assert "dropped while packing: 0" in capsys.readouterr().out


def test_lengths_by_hand():
    """Half of the tokens are in a document of more than 4K."""
    line = show.format_lengths(np.array([5000, 4000, 1000]))
    assert "shortest 1,000, median 4,000, longest 5,000" in line and ">4K 50.0%  >8K 0.0%" in line


# --- 6. From end to end ---------------------------------------------------------------------------
