"""The data: raw text becomes documents, documents become packed sequences, sequences become batches.

    raw text --tokenize--> documents --pack--> sequences --mix--> one step's sequences --> batches

What a model learns about long context it learns from *how documents are laid out*. The paper (2410.02660,
A.2) has two rules, here with seq_len = 8 and documents a (11 tokens), b (3), c (7), d (4):

    long    drop what is shorter than seq_len, cut whole sequences, drop the rest
            a a a a a a a a                        doc_lens (8,)      b c d and the last 3 of a: gone
    short   lay end to end; what a cut leaves over begins the next sequence
            a a a a a a a a | a a a b b b c c | c c c c c d d d      the last d waits for more
            (8,)              (3, 3, 2)         (5, 3)

A sequence is exactly seq_len tokens and its `doc_lens`; the model keeps attention inside the documents
(model.py). A mixture gives every domain its share *of tokens*, by an order that any rank can compute
from the seed alone.

Nothing needs to be downloaded: every Python installation holds megabytes of real code and prose. Text of
one's own, a folder of repositories here, is tokenized once and packed as often as one likes:

    python data.py pack --domain code_repos-2k --seq 2k --sequences 500 --out packs/code_repos-2k
    python data.py inspect packs/code_repos-2k
    python data.py tokenize --input ~/src --format repos --tokenizer llama3/tokenizer.model --out docs/code
    python data.py pack --from docs/code --domain code_repos-64k --seq 64k --out packs/code_repos-64k

Sources: ProLong section 3, A.2, Table 9. Unlike ProLong's, packing lives beside the training that uses it.
"""

from __future__ import annotations

import ast
import base64
import dataclasses
import hashlib
import importlib
import itertools
import json
import lzma
import math
import os
import re
import sys
import sysconfig
import tarfile
import typing
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support.cli import (  # noqa: F401 (data.parse_length and its like are public names)
    add_config_args,
    format_length,
    option,
    parse_cli,
    parse_length,
    run_main,
)
from support.files import read_json, whole_folder, write_json
from support.installed import (  # noqa: F401
    functions_and_classes,
    generator,
    is_held_out,
    list_repositories,
    read_text,
    syntax_trees,
)
from support.toy import (  # noqa: F401
    BLANK,
    ICL_LINE,
    LABELS,
    N_PAIRS,
    PAIR,
    PAIR_LEN,
    QUESTION,
    SYMBOL_NAMES,
    SYMBOLS,
    TOPICS,
    VALUE_LEN,
    icl_lines,
    icl_rows,
    pairs_and_room,
    recall_pairs,
    recall_rows,
    scatter_pairs,
)

IGNORE_INDEX = -100  # the label of a token that is not trained on

# --- 2. Tokenizer ---------------------------------------------------------------------------------
#
# Byte-level BPE is a pattern that splits text into words, a table of byte strings in the order in which they
# are merged, and special tokens. tiktoken runs it, from whichever file it comes.


class Tokenizer:
    """A `tiktoken.Encoding` with the names that the recipe uses, and a fingerprint of its whole table.

    Text is encoded as ordinary text: "<|end_of_text|>" inside a document is 15 letters, never an end.
    """

    def __init__(self, spec: str, encoding: Any, bos: str | None, eos: str, nfc: bool = False,
                 files: Sequence[Path] = ()) -> None:
        self.spec, self.encoding, self.nfc = spec, encoding, nfc
        self.files = tuple(files)  # what a checkpoint copies, so that it brings its tokenizer along
        self.vocab_size: int = encoding.n_vocab
        self.begin = [] if bos is None else [self.special_id(bos)]  # GPT-2 and Qwen begin with nothing
        self.eos_id = self.special_id(eos)

    @property
    def bos_id(self) -> int:
        """The token that begins a document. Raises ValueError for a family that has none."""
        if not self.begin:
            raise ValueError(f"tokenizer {self.spec!r} begins a document with no token; "
                             "use tokenizer.begin, a list of one or none")
        return self.begin[0]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever any text could get other ids."""
        table = sorted((rank, token.hex()) for token, rank in self.encoding._mergeable_ranks.items())
        whole = [self.encoding._pat_str, table, sorted(self.encoding._special_tokens.items()),
                 self.begin, self.eos_id, self.nfc]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, uint32 (n,); no special token is ever made from text."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        parts = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in _cut_text(text)]
        return np.concatenate(parts)

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The same, but "<|...|>" are special tokens. Raises ValueError for a name that there is not."""
        parts = re.split(r"(<\|\w+\|>)", text)  # ordinary text and special tokens in turn
        return np.concatenate([np.array([self.special_id(part)], np.uint32) if i % 2 else self.encode(part)
                               for i, part in enumerate(parts)])

    def special_id(self, name: str) -> int:
        """The id of a special token, as in "<|eot_id|>". Raises ValueError if there is none of that name."""
        specials = self.encoding._special_tokens
        if name not in specials:
            raise ValueError(f"tokenizer {self.spec!r} has no special token {name!r}; its first are "
                             f"{', '.join(list(specials)[:8])}")
        return specials[name]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def document(self, text: str) -> Document:
        """A whole document: begin of text (where the family has one), the text, end of text."""
        parts = (self.begin, self.encode(text), [self.eos_id])
        return Document(np.concatenate(parts, dtype=np.uint32, casting="unsafe"))


# tiktoken panics on a million spaces, so long text is encoded in pieces. Between a letter or digit and a
# space or full stop every pattern of these families ends a word: cut there, the ids are those of the whole. A
# run of 64K characters without such a place (neither prose nor code) is cut anywhere, and may gain a token.
MAX_PIECE = 2**17
_WORD_END = re.compile(r"[^\W_](?=[ \t\r\n.,。，])")


def _cut_text(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > MAX_PIECE:
        place = _WORD_END.search(text, begin + MAX_PIECE // 2, begin + MAX_PIECE)
        end = place.end() if place else begin + MAX_PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


@cache
def load_tokenizer(spec: str = "bytes") -> Tokenizer:
    """Load a tokenizer; nothing is downloaded that tiktoken does not have in its cache.

        bytes             256 byte values, Llama-3's special tokens and those of recall documents (section 3)
        FOLDER or FILE    tokenizer.json of the byte-level BPE family, or Llama-3's tokenizer.model
        tiktoken:gpt2     an encoding that tiktoken knows by name

    Raises ValueError for a spec that is not known, and for a file that tiktoken would not encode exactly as
    its own library does, naming the field.
    """
    import tiktoken

    path = Path(spec)
    if spec == "bytes":
        names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id",
                 "pair", "ask", *SYMBOL_NAMES)
        special = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}
        encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,256}", special_tokens=special,
                                     mergeable_ranks={bytes([i]): i for i in range(256)})
        return Tokenizer(spec, encoding, "<|begin_of_text|>", "<|end_of_text|>")
    if spec.startswith("tiktoken:"):
        try:
            encoding = tiktoken.get_encoding(spec.partition(":")[2])
        except (ValueError, OSError) as error:
            raise ValueError(f"tokenizer {spec!r}: tiktoken has no such encoding in its cache ({error}); "
                             "put it there (TIKTOKEN_CACHE_DIR), or name a tokenizer.json") from None
        return Tokenizer(spec, encoding, None, "<|endoftext|>")
    if spec and path.is_dir():
        path /= "tokenizer.json" if (path / "tokenizer.json").is_file() else "tokenizer.model"
    if not spec or not path.is_file():
        raise ValueError(f"tokenizer {spec!r} is unknown; choose bytes, tiktoken:NAME, a folder with a "
                         "tokenizer.json or tokenizer.model, or such a file")
    try:
        return (_read_tokenizer_json if path.suffix == ".json" else _read_llama_model)(spec, path)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:  # of another type
        raise ValueError(f"{path} is not a tokenizer that can be read: {error!r}") from None


_ALL_BYTES = {bytes([i]) for i in range(256)}
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM takes every digit out first: a digit ends white space as the end of the text does.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")


def _read_llama_model(spec: str, path: Path) -> Tokenizer:
    """Llama-3's tokenizer.model: a line a token, base64 and rank; then 256 special tokens, named here."""
    import tiktoken

    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(lines))) or _ALL_BYTES - ranks.keys():
            raise ValueError("ranks are not 0, 1, 2, ... with all 256 bytes among them")
    except ValueError as error:
        raise ValueError(f"{path} is not a table of base64 tokens and ranks as Llama-3's ({error}); for "
                         "another family give its tokenizer.json") from None
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(251))]
    names[6:6] = ["start_header_id", "end_header_id"]
    names[9:9] = ["eot_id"]
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                                 special_tokens=special)
    return Tokenizer(spec, encoding, "<|begin_of_text|>", "<|end_of_text|>", files=[path])


def _read_tokenizer_json(spec: str, path: Path) -> Tokenizer:
    """Turn a Hugging Face tokenizer.json into an Encoding. Raises ValueError where that is not exact."""
    import tiktoken

    def refuse(field: str, value: Any, rule: str) -> typing.NoReturn:
        raise ValueError(f"{path}: {field} is {json.dumps(value)[:200]}; {rule}")

    try:
        table = read_json(path)
        model, added = table["model"], {entry["content"]: entry for entry in table["added_tokens"]}
        vocab, merges = model["vocab"], model["merges"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a byte-level BPE tokenizer.json ({error!r})") from None
    for field, wanted in (("type", "BPE"), ("dropout", None), ("continuing_subword_prefix", ""),
                          ("end_of_word_suffix", ""), ("byte_fallback", False)):
        if model.get(field, wanted) not in (wanted, wanted or None):
            refuse(f"model.{field}", model[field], "only plain byte-level BPE can be represented exactly")
    normalizer = table.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        refuse("normalizer", normalizer, "only NFC or none can be represented exactly")
    if (table.get("decoder") or {}).get("type") != "ByteLevel":
        refuse("decoder", table.get("decoder"), "only ByteLevel can be represented exactly")
    if (pattern := _split_pattern(table.get("pre_tokenizer"))) is None:
        refuse("pre_tokenizer", table.get("pre_tokenizer"),
               "only ByteLevel without a prefix space, after one Split or Digits, can be represented exactly")
    for name, entry in added.items():
        if not entry["special"] and not (name.startswith("<") and name.endswith(">")):
            refuse("added_tokens", entry, "a word that is matched before BPE cannot be represented exactly")
    ids = vocab | {name: entry["id"] for name, entry in added.items()}
    if len(set(ids.values())) < len(ids) or not all(type(i) is int and 0 <= i < 2 * len(ids) + 1000
                                                    for i in ids.values()) or max(map(len, ids)) > 4096:
        refuse("model.vocab", f"a table of {len(ids)} tokens", "ids must be whole numbers, each given once, "
               "with few left out, and no token longer than 4,096 bytes")
    letters = _byte_letters()

    def spell(token: str) -> bytes:
        return bytes(map(letters.__getitem__, token))

    try:
        ranks = {spell(token): i for token, i in vocab.items() if token not in added}
        pairs = [tuple(map(spell, pair.split(" ") if isinstance(pair, str) else pair)) for pair in merges]
    except KeyError as error:
        refuse("model.vocab", str(error), "a character outside the byte alphabet is no byte-level BPE")
    if problem := _why_ranks_differ(ranks, pairs, bool(model.get("ignore_merges"))):
        refuse("model.merges", problem, "tiktoken, which merges by rank, would give other ids")
    encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={name: entry["id"] for name, entry in added.items()})
    probe = "It's 3.14, naïve—don't  stop\n\n\tx_1 = [2048, ' ']\r\n中文，。 \u00a0e\u0301🙂\x1c " * 3
    whole = encoding.encode_ordinary(probe)
    parts = map(encoding.encode_ordinary, re.split(rf"(?<={_WORD_END.pattern})", probe))
    if encoding.decode(whole) != probe or list(itertools.chain(*parts)) != whole:
        refuse("pre_tokenizer", pattern, "its pattern drops text, or has words that go on after white space")
    bos, eos = _begin_and_end(table, path.parent, added)
    if eos is None:
        refuse("added_tokens", list(added), "none is known to end a document: give eos_token in a "
                                            "tokenizer_config.json beside it")
    files = [path, *(path.with_name(name) for name in _SIDE_FILES if path.with_name(name).is_file())]
    return Tokenizer(spec, encoding, bos, eos, normalizer == {"type": "NFC"}, files)


_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the 68 others borrow from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _split_pattern(entry: Any) -> str | None:
    """The regular expression that does what a pre_tokenizer does, or None."""
    match entry["pretokenizers"] if (entry or {}).get("type") == "Sequence" else [entry]:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": invert},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if (
                  (behavior, invert) in (("Isolated", False), ("Removed", True))):
            return pattern
    return None


def _why_ranks_differ(ranks: dict[bytes, int], pairs: list[tuple[bytes, ...]], ignore_merges: bool) -> str:
    """Compare BPE by a list of merges (Hugging Face) with BPE by ranks (tiktoken); "" if they agree.

    tiktoken merges whichever two neighbours make the token of lowest rank. That is the same as merging by
    the list if the list makes tokens in the order of their ranks, and if for every token it either allows
    all its splits, or the one split at which BPE with lower ranks alone arrives: no other can come up then.
    """
    if _ALL_BYTES - ranks.keys():
        return "not all 256 bytes are tokens"
    before = 0
    for pair in pairs:
        if (made := ranks.get(b"".join(pair), -1)) < before:
            return f"{pair} stands in another order than its token"
        before = made
    listed = set(pairs)
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        if ignore_merges and listed.issuperset(splits):
            continue
        parts = _merge_below(token, rank, ranks)
        if len(parts) > 1 and tuple(parts) not in listed:
            return f"no way to {token!r}"
    return ""


def _merge_below(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts at which BPE with ranks below the token's own arrives: two, if it can be made by a merge."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if best == rank:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _begin_and_end(table: dict[str, Any], folder: Path,
                   added: dict[str, Any]) -> tuple[str | None, str | None]:
    """What the post_processor puts first (Llama-3 has a token for it, GPT-2 and Qwen none), and the
    eos_token of the files beside, or the usual names.
    """
    steps = table.get("post_processor") or {}
    first = [step["single"][0] for step in steps.get("processors", [steps])
             if step.get("type") == "TemplateProcessing"]
    bos = first[0].get("SpecialToken", {}).get("id") if first else None
    names = []
    for file in _SIDE_FILES:
        if (folder / file).is_file():
            eos = read_json(folder / file).get("eos_token")
            names.append(eos.get("content") if isinstance(eos, dict) else eos)
    names += ["<|end_of_text|>", "<|endoftext|>", "</s>"]
    return bos, next((name for name in names if name in added), None)


def tokenizer_for(model_folder: str | Path, spec: str) -> Tokenizer:
    """Load `spec`, to be used with the model in a folder. Raises ValueError if the folder brings another one.

    To the model, ids of another tokenizer are other words; nothing but bad scores would say so.
    """
    tokenizer, own = load_tokenizer(spec), Path(model_folder) / "tokenizer.json"
    if own.is_file() and load_tokenizer(str(model_folder)).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{own} is another tokenizer than {spec!r}; write --tokenizer {model_folder}")
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What makes transformers encode as this tokenizer does: the files it came from, or a tokenizer.json.

    A list of merges is written from the ranks: of each token, the two parts at which BPE with lower ranks
    arrives. Unlike here, transformers makes special tokens of text that looks like one.
    """
    files = {path.name: path.read_bytes() for path in tokenizer.files}
    if "tokenizer.json" in files:
        return files
    encoding = tokenizer.encoding
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    merges = [_merge_below(token, rank, ranks) for token, rank in by_rank]

    def spell(token: bytes) -> str:
        return "".join(map(letters.__getitem__, token))

    names = {i: name for name, i in sorted(encoding._special_tokens.items(), key=lambda item: item[1])}
    text, first = {"Sequence": {"id": "A", "type_id": 0}}, [names[i] for i in tokenizer.begin]
    template = {"type": "TemplateProcessing", "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "single": [*({"SpecialToken": {"id": name, "type_id": 0}} for name in first), text],
                "special_tokens": {name: {"id": name, "ids": tokenizer.begin, "tokens": [name]}
                                   for name in first}}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated",
             "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    table = {"version": "1.0", "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
             "post_processor": template if first else bytewise, "decoder": bytewise,
             "added_tokens": [{"id": i, "content": name, **plain} for i, name in names.items()],
             "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()},
                       "merges": [list(map(spell, parts)) for parts in merges if len(parts) == 2]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eos_id],
              "bos_token": first[0] if first else None, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}


# --- 3. Documents: what every Python installation brings along ------------------------------------
#
# Real text first: code repositories and prose (section 3.1). Then two synthetic domains that teach a
# tiny model what a released checkpoint already knows: to look things up, and to learn from examples.


@dataclass(frozen=True)
class Document:
    """Token ids, and which of them are trained on (None: all)."""

    input_ids: np.ndarray  # (n,) uint32
    loss_mask: np.ndarray | None = None  # (n,) bool

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, part: slice) -> Document:
        mask = None if self.loss_mask is None else self.loss_mask[part]
        return Document(self.input_ids[part], mask)


MAX_REPO_BYTES = 2**20  # of one repository: a few packages are a hundred times the size of the others


def code_repos(tokenizer: Tokenizer, seed: int, held_out: bool = False) -> Iterator[Document]:
    """Each repository as one document: all its files, in a seeded random order, joined (section 3.1).

    Not in order of dependency, unlike other work: it keeps related files further apart.
    """
    repositories = list_repositories()
    names = [name for name in sorted(repositories) if is_held_out(name) == held_out]
    for i in generator(seed, "repositories").permutation(len(names)):
        files, texts, size = repositories[names[i]], [], 0
        for j in generator(seed, names[i]).permutation(len(files)):
            text = read_text(files[j])
            texts.append(text)
            size += len(text)
            if size > MAX_REPO_BYTES:
                break
        yield tokenizer.document("\n".join(texts))


def textbooks(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """Prose, chapters joined to books: Python's language reference, then each package's docstrings.

    The paper joins the chapters of a book, and the books of a subject (A.2). Here a module's docstring is
    a chapter and a package the book; the order is the same whatever the seed.
    """
    from pydoc_data.topics import topics

    yield tokenizer.document("\n\n".join(topics[name] for name in sorted(topics)))
    for name, files in sorted(list_repositories().items()):
        if is_held_out(name):
            continue
        chapters = [ast.get_docstring(tree) or "" for tree in syntax_trees(files[:200])]
        yield tokenizer.document("\n\n".join(text for text in chapters if len(text) > 200))


def short(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """Functions and classes of the standard library, one each a document: the mixture's short part."""
    repositories = list_repositories()
    names = [name for name in sorted(repositories) if not is_held_out(name)]
    files = [path for name in names for path in repositories[name][:50]]
    for i in generator(seed, "short").permutation(len(files)):
        yield from map(tokenizer.document, functions_and_classes(files[i]))


# Recall. A pair is a mark, a key and its value of four symbols; a question a mark and a key. All are special
# tokens (<|pair|>, <|ask|>, <|A|>, ...), so that no haystack contains one. Here ~ and ? are the marks:
#
#     <begin> import os ~QX7KA def main(): ~CPLM3 return 0 ?CPLM3?QX7KA <end>
#             real code as haystack, with the pairs scattered in it       only answers are trained
#
# 32 symbols, the base-32 alphabet. With keys of two symbols, or an alphabet of 64, a model this small does
# not leave the plateau within minutes (docs/LOG.md).


@cache
def haystack_text(tokenizer: Tokenizer, seed: int, held_out: bool) -> np.ndarray:
    """Two million tokens of real code."""
    parts: list[np.ndarray] = []
    for document in code_repos(tokenizer, seed, held_out):
        parts.append(document.input_ids[1:-1])
        if sum(map(len, parts)) > 2**21:
            break
    return np.concatenate(parts)


def haystack_windows(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int, seed: int,
                     held_out: bool = False) -> np.ndarray:
    """Random stretches of real code, (batch, length)."""
    text = haystack_text(tokenizer, seed, held_out)
    if length > len(text):
        raise ValueError(f"a haystack of {length:,} tokens is wanted, the installed packages have only "
                         f"{len(text):,}; choose a shorter length")
    begins = rng.integers(len(text) - length + 1, size=(batch, 1))
    return text[begins + np.arange(length)]


def recall_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                     seed: int) -> Iterator[Document]:
    """Pairs scattered in real code, and a question about each at the end."""
    pairs, room = pairs_and_room(rng, batch, length)
    haystack = haystack_windows(tokenizer, rng, batch, room, seed)
    return _documents(*recall_rows(rng, pairs, haystack, tokenizer.bos_id, tokenizer.eos_id))


def bare_recall_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                          seed: int) -> Iterator[Document]:
    """The same with only blanks between the pairs: the ability without the search."""
    pairs, room = pairs_and_room(rng, batch, length)
    haystack = np.full((batch, room), BLANK, np.uint32)
    return _documents(*recall_rows(rng, pairs, haystack, tokenizer.bos_id, tokenizer.eos_id))


def _documents(ids: np.ndarray, mask: np.ndarray) -> Iterator[Document]:
    return (Document(row, mask) for row in ids)


# ICL. Each line is a mark, a symbol of one of six topics, and the topic's number *in this document*:
#
#     <begin>~A3~N7~X5~C3 ... <end>       the numbers are dealt anew for every document, so only the examples
#                                         can tell that A's topic is 3 today (A.1)


def icl_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                  seed: int) -> Iterator[Document]:
    """ICL documents of exactly `length` tokens; labels are trained from the second round on."""
    return _documents(*icl_rows(rng, batch, length, tokenizer.bos_id, tokenizer.eos_id))


Maker = Callable[[Tokenizer, np.random.Generator, int, int, int], Iterator[Document]]
#                 (tokenizer, rng, batch, length, seed) -> `batch` documents of exactly `length` tokens


def _octaves(make: Maker, shortest: int, octaves: int) -> Callable[..., Iterator[Document]]:
    """Documents of `longest` tokens, half of that, a quarter, ...: each length with as many tokens.

    Equal shares of tokens, not of documents: counted by heads, the long ones would be all there is. The
    shortest are what a model learns first, and with them the rest.
    """

    def documents(tokenizer: Tokenizer, seed: int, longest: int) -> Iterator[Document]:
        if longest % shortest or (longest // shortest).bit_count() != 1:
            raise ValueError(f"documents of this domain cannot be {longest} tokens long; choose {shortest} "
                             "times a power of 2")
        rng = generator(seed, make.__name__, longest)
        lengths = [longest >> i for i in reversed(range(octaves)) if longest >> i >= shortest]
        return itertools.chain.from_iterable(make(tokenizer, rng, longest // length, length, seed)
                                             for length in itertools.cycle(lengths))

    return documents


# Domains that are real text, packed long or short, and domains made to measure.
LONG_DOMAINS = {"code_repos": code_repos, "textbooks": textbooks}
SHORT_DOMAINS = {"short": short}
SYNTHETIC_DOMAINS = {
    "recall_bare": _octaves(bare_recall_documents, shortest=32, octaves=4),  # 2, 4, 8 and 16 pairs in 256
    "recall": _octaves(recall_documents, shortest=32, octaves=3),
    "icl": _octaves(icl_documents, shortest=64, octaves=3),
}
REAL_TEXT = LONG_DOMAINS.keys() | SHORT_DOMAINS.keys()


_generator, _haystack_text = generator, haystack_text  # until the others are merged

# --- 4. Text from files and from the hub ----------------------------------------------------------
#
# A row is where it stands ("web.jsonl:17") and its text, or its bytes, or the ValueError that says why there
# is none. Only `read_texts` decides what becomes of bad rows. Sources of any size are read as streams.

Row = tuple[str, "str | bytes | ValueError | None"]
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
             ".md": "text", ".tar": "repos", ".tgz": "repos"}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard", ".zstd": "zstandard"}


@dataclass(frozen=True)
class TokenizeConfig:
    input: str = option("", "a file, a folder, or with --format hub the name of a data set")
    format: str = option("auto", "auto, jsonl, parquet, arrow, text (a file a document), repos (a folder of "
                                 "repositories, or a tar), textbooks (SUBJECT/BOOK/CHAPTER) or hub")
    text_column: str = option("text", "the column that holds the text")
    subset: str | None = option(None, "configuration of a hub data set, as in sample-10BT")
    split: str = option("train", "split of a hub data set")
    on_bad: str = option("stop", "at a row without usable text: stop, or skip (counted)")
    max_document_bytes: int = option(2**26, "longer rows are bad; longer repositories are cut", parse_length)
    shard_tokens: int = option(2**24, "tokens of a shard: what a crash loses and packing holds", parse_length)
    workers: int = option(os.cpu_count() or 1, "threads that tokenize", parse_length)
    tokenizer: str = option("bytes", "bytes, tiktoken:NAME, or a tokenizer.json or tokenizer.model")
    out: str = option("documents", "the folder to write; run again, it goes on where it stopped")
    seed: int = option(0, "seed of the order of a repository's files", int)


def read_texts(config: TokenizeConfig) -> Iterator[str | ValueError]:
    """Each row's text, or what is wrong with it. With `--on-bad stop` the first bad row ends in a ValueError
    that names file and row.
    """
    for where, value in read_rows(config):
        try:
            yield _as_text(value, config.max_document_bytes)
        except ValueError as error:
            if config.on_bad == "stop":
                raise ValueError(f"{where} {error}; mend it, or pass over it with --on-bad skip") from None
            yield ValueError(f"{where} {error}")


def _as_text(value: Any, most_bytes: int) -> str:
    if isinstance(value, ValueError):
        raise value
    if not isinstance(value, str | bytes):
        raise ValueError(f"holds {'nothing' if value is None else type(value).__name__}, not text")
    try:  # both ways: JSON can spell half a character, which is not UTF-8 either
        coded = value if isinstance(value, bytes) else value.encode()
        text = coded.decode() if isinstance(value, bytes) else value
    except UnicodeError:
        raise ValueError("is not UTF-8") from None
    if len(coded) > most_bytes:
        raise ValueError(f"is longer than {most_bytes:,} bytes (--max-document-bytes)")
    if not coded.strip():
        raise ValueError("is empty")
    return text


def read_rows(config: TokenizeConfig) -> Iterator[Row]:
    """All rows of a source, in one order everywhere. Raises ValueError for what cannot be read at all."""
    if config.on_bad not in ("stop", "skip"):
        raise ValueError(f"--on-bad {config.on_bad!r} is neither stop nor skip")
    if config.format == "hub":
        yield from _hub_rows(config)
        return
    root = Path(config.input)
    if not config.input or not root.exists():
        raise ValueError(f"--input {config.input!r} does not exist; a data set of the hub wants --format hub")
    files = _files(root) if root.is_dir() else [root]
    kind = config.format
    if kind == "auto":
        kinds = {_SUFFIXES.get(_plain_suffix(path)) for path in files}
        if len(kinds) != 1 or None in kinds:
            suffixes = ", ".join(sorted({path.suffix or path.name for path in files})[:9])
            raise ValueError(f"--input {root} holds {suffixes or 'nothing'}: not one kind of file by its "
                             "suffix; say which with --format")
        kind = str(kinds.pop())
    if kind in ("repos", "textbooks"):
        read = {"repos": _repository_rows, "textbooks": _textbook_rows}[kind]
        yield from _readable_rows(root, read(root, config))
        return
    readers = {"jsonl": _jsonl_rows, "parquet": _arrow_rows, "arrow": _arrow_rows, "text": _text_rows}
    if kind not in readers:
        raise ValueError(f"--format {kind!r} is unknown; choose auto, {', '.join(readers)}, repos, textbooks "
                         "or hub")
    for path in files:
        yield from _readable_rows(path, readers[kind](path, config))


def _readable_rows(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """A file that breaks off or is no such file stops everything: how much is missing cannot be known."""
    try:
        yield from rows
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read to its end: {error}") from None


def _files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted; what is hidden and what is a link is passed over."""
    found = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.is_file() and not path.is_symlink()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _plain_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _open(path: Path) -> typing.BinaryIO:
    """Open a file, unpacked by its suffix. Raises ValueError where that needs what is not installed."""
    if path.suffix not in _COMPRESSED:
        return open(path, "rb")
    try:
        return importlib.import_module(_COMPRESSED[path.suffix]).open(path, "rb")
    except ImportError:
        raise ValueError("reading it needs `pip install zstandard`") from None


def _jsonl_rows(path: Path, config: TokenizeConfig) -> Iterator[Row]:
    """Line by line, by hand: a library's reader would lose the good rows before a bad one."""
    most = config.max_document_bytes
    with _open(path) as file:
        for number in itertools.count(1):
            line = file.readline(most)
            value: Any = None
            if not line:
                return
            if len(line) == most:
                while line and not line.endswith(b"\n"):
                    line = file.readline(most)
                value = ValueError(f"is longer than {most:,} bytes (--max-document-bytes)")
            elif line.strip():
                try:
                    value = _column(json.loads(line), config.text_column)
                except (ValueError, RecursionError) as error:
                    value = ValueError(f"is not a JSON object with the text: {error}")
            else:
                continue
            yield f"{path}:{number}", value


def _column(row: Any, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        has = f"only {', '.join(map(repr, row))}" if isinstance(row, dict) else "no columns at all"
        raise ValueError(f"there is no column {name!r}, {has}; choose one with --text-column")
    return row[name]


def _arrow_rows(path: Path, config: TokenizeConfig) -> Iterator[Row]:
    """Parquet or Arrow, a batch of rows at a time. As bytes, so that a bad row does not hide the others."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    with _open(path) as file:
        if _plain_suffix(path) == ".arrow":
            try:
                stream = arrow.ipc.open_stream(file)  # as `datasets` writes
                schema, batches = stream.schema, iter(stream)
            except arrow.ArrowInvalid:
                table = arrow.ipc.open_file(file)
                schema, batches = table.schema, (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            table = parquet.ParquetFile(file)
            schema = table.schema_arrow
            batches = table.iter_batches(batch_size=64, columns=[config.text_column])
        kind = _column(dict(zip(schema.names, schema.types, strict=True)), config.text_column)
        if str(kind) not in ("string", "large_string", "binary", "large_binary"):
            raise ValueError(f"column {config.text_column!r} is {kind}, not text")
        numbers = itertools.count(1)
        for batch in batches:
            for value in batch.column(config.text_column).cast(arrow.large_binary()):
                yield f"{path}:{next(numbers)}", value.as_py()


def _text_rows(path: Path, config: TokenizeConfig) -> Iterator[Row]:
    with _open(path) as file:
        content = file.read(config.max_document_bytes + 1)
        yield str(path), ValueError("is binary") if b"\0" in content else content


def _hub_rows(config: TokenizeConfig) -> Iterator[Row]:
    """Any data set that `datasets` can stream, by name, or a local folder of one."""
    import datasets

    try:
        rows = datasets.load_dataset(config.input, config.subset, split=config.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{config.input}:{number}", _column(row, config.text_column)
    except (OSError, ValueError) as error:
        raise ValueError(f"data set {config.input!r} cannot be read: {error}") from None


def _repository_rows(root: Path, config: TokenizeConfig) -> Iterator[Row]:
    """Each repository as one document, its files in a seeded random order (section 3.1).

    Repositories are the folders in `root`, or in a tar; a tar is never unpacked, and only regular files in
    it count. Raises ValueError for a tar that does not keep a repository's files together.
    """
    most = config.max_document_bytes
    if root.is_dir():
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                paths = _shuffled(_files(entry), entry.name, config)
                yield from _joined(str(entry), (_head(path.open("rb"), most) for path in paths), "\n", most)
        return
    seen: set[str] = set()
    with tarfile.open(root, "r|*") as archive:
        members = ((member.name.removeprefix("./"), _head(archive.extractfile(member), most))
                   for member in archive if member.isreg())
        for name, files in itertools.groupby(members, key=lambda item: item[0].partition("/")[0]):
            if name in seen:
                raise ValueError(f"the files of {name} do not stand together in it; unpack it into a folder")
            seen.add(name)
            part: list[tuple[str, bytes]] = []
            size = 0
            for file in itertools.chain(files, [None]):  # a repository too large for memory is several
                size += len(file[1]) if file else 0
                if file is None or size > most:
                    contents = (content for _, content in _shuffled(sorted(part), name, config))
                    yield from _joined(f"{root}:{name}", contents, "\n", most)
                    part, size = [], len(file[1]) if file else 0
                if file is not None:
                    part.append(file)


def _shuffled(files: Sequence[Any], name: str, config: TokenizeConfig) -> Iterator[Any]:
    return (files[i] for i in generator(config.seed, name).permutation(len(files)))


def _textbook_rows(root: Path, config: TokenizeConfig) -> Iterator[Row]:
    """The chapters of a book, then the books of a subject, joined (A.2): SUBJECT/BOOK/CHAPTER, in order."""
    def in_order(path: Path) -> list[Any]:  # chapter 10 after chapter 9
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part)
                for part in re.split(r"(\d+|/)", str(path))]

    most = config.max_document_bytes
    for subject in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        chapters = (_head(_open(path), most) for path in sorted(_files(subject), key=in_order))
        yield from _joined(str(subject), chapters, "\n\n", most)


def _head(file: Any, most_bytes: int) -> bytes:
    """A file's content; nothing, if it is too long or binary."""
    with file:
        content = file.read(most_bytes + 1)
    return b"" if len(content) > most_bytes or b"\0" in content else content


def _joined(where: str, contents: Iterable[bytes], between: str, most_bytes: int) -> Iterator[Row]:
    """Text files, joined; what is not UTF-8 is passed over, and at `most_bytes` another document begins."""
    texts: list[str] = []
    size = 0
    for content in contents:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if size + len(content) > most_bytes:
            yield where, between.join(texts)
            texts, size = [], 0
        if text.strip():
            texts.append(text)
            size += len(content) + len(between)
    if texts:
        yield where, between.join(texts)


# --- 5. Tokenized documents on disk ---------------------------------------------------------------
#
#     documents/00000/input_ids.bin   uint32 (tokens,)      whole documents, one after another
#               00000/doc_ends.bin    int64  (documents,)   where each ends
#               00000/meta.json       sizes, and how many rows of the source it took
#               meta.json             written last: with it the folder is whole

DOCUMENTS_FORMAT = "nanolong-documents-1"


_TOKENIZER_META = {"tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int, "max_id": int}
_DOCUMENTS_META = {"format": str, **_TOKENIZER_META, "shards": int, "documents": int, "tokens": int}
_SHARD_META = {"rows": int, "documents": int, "tokens": int, "bad": int, "max_id": int}


def _read_meta(folder: Path, kinds: Mapping[str, type], format: str = "") -> dict[str, Any]:
    """Read a folder's meta.json. Raises ValueError unless it has `kinds` of values, and the format."""
    path = folder / "meta.json"
    if not path.is_file():
        what, verb = ("packed", "pack") if format == FORMAT else ("tokenized", "tokenize")
        raise ValueError(f"{folder} is not a {what} data folder: it has no meta.json; "
                         f"make one with `python data.py {verb}`")
    meta = read_json(path)
    if meta.get("format", "") != format:
        raise ValueError(f"{path} does not say format {format!r}; make the folder again")
    for key, kind in kinds.items():
        value = meta.get(key)
        if type(value) is not kind or (isinstance(value, int) and value < 0 and key != "seed"):
            raise ValueError(f"{path}: {key!r} is {value!r}, which is no {kind.__name__} that can be")
    return meta


def tokenize(config: TokenizeConfig) -> None:
    """Tokenize a source into a folder of documents, shard by shard. Run again after a crash, it goes on.

    The same bytes whatever the number of workers and of crashes: shards are cut by the order of rows alone.
    """
    tokenizer, out = load_tokenizer(config.tokenizer), Path(config.out)
    job = dataclasses.asdict(config) | {"workers": 0, "out": "", "fingerprint": tokenizer.fingerprint}
    if (out / "meta.json").exists():
        raise ValueError(f"{out} is complete already; choose another --out, or remove it")
    if (out / "job.json").exists() and json.loads((out / "job.json").read_text()) != job:
        raise ValueError(f"{out} was begun with other settings, those in its job.json; choose another --out")
    texts = read_texts(config)
    shards: list[dict[str, Any]] = []
    while (out / f"{len(shards):05d}" / "meta.json").is_file():
        shards.append(_read_meta(out / f"{len(shards):05d}", _SHARD_META))
    for _ in range(sum(shard["rows"] for shard in shards)):
        if next(texts, None) is None:
            raise ValueError(f"--input {config.input} has fewer rows than {out} has of it; begin anew")
    bar = tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), total=_size(config.input) or None)
    documents = encode_all(tokenizer, texts, config.workers, bar)
    while (first := next(documents, None)) is not None:
        out.mkdir(parents=True, exist_ok=True)
        if not shards:
            write_json(out / "job.json", job)
        with whole_folder(out / f"{len(shards):05d}") as folder:
            shards.append(_write_shard(folder, itertools.chain([first], documents), config.shard_tokens))
    bar.close()
    counts = {key: sum(shard[key] for shard in shards) for key in ("rows", "documents", "tokens", "bad")}
    if not counts["tokens"]:
        raise ValueError(f"--input {config.input} has no usable text in its {counts['rows']} rows")
    write_json(out / "meta.json", {
        "format": DOCUMENTS_FORMAT, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint, "max_id": max(shard["max_id"] for shard in shards),
        "shards": len(shards), **counts})
    for line in itertools.islice((line for shard in shards for line in shard["bad_rows"]), 9):
        print(f"skipped: {line}")
    inspect(config.out)


def encode_all(tokenizer: Tokenizer, texts: Iterable[str | ValueError], workers: int,
               bar: Any = None) -> Iterator[np.ndarray | ValueError]:
    """Encode on threads (tiktoken works outside Python's lock), in order, a bounded way ahead."""
    def encode(batch: list[str | ValueError]) -> list[np.ndarray | ValueError]:
        return [text if isinstance(text, ValueError) else tokenizer.document(text).input_ids
                for text in batch]

    ahead: deque[tuple[int, Future[list[np.ndarray | ValueError]]]] = deque()
    batch: list[str | ValueError] = []
    waiting = size = 0
    with ThreadPoolExecutor(workers) as pool:
        for text in itertools.chain(texts, [None]):
            if text is not None:
                batch.append(text)
                size += len(str(text))
            if size > 2**18 or text is None:  # many short texts are one task
                ahead.append((size, pool.submit(encode, batch)))
                waiting, batch, size = waiting + size, [], 0
            while ahead and (len(ahead) > 4 * workers or waiting > 2**25 or text is None):
                done, future = ahead.popleft()
                waiting -= done
                if bar is not None:
                    bar.update(done)
                yield from future.result()


def _write_shard(folder: Path, documents: Iterator[np.ndarray | ValueError], enough: int) -> dict[str, Any]:
    """Write documents until they have `enough` tokens."""
    ends: list[int] = []
    bad_rows: list[str] = []
    tokens = bad = max_id = 0
    with open(folder / "input_ids.bin", "wb") as file:
        for ids in documents:
            if isinstance(ids, ValueError):
                bad += 1
                bad_rows = [*bad_rows, str(ids)][:9]
                continue
            file.write(ids.data)
            tokens, max_id = tokens + len(ids), max(max_id, int(ids.max()))
            ends.append(tokens)
            if tokens >= enough:
                break
    (folder / "doc_ends.bin").write_bytes(np.array(ends, np.int64).tobytes())
    meta = {"rows": len(ends) + bad, "documents": len(ends), "tokens": tokens, "bad": bad,
            "bad_rows": bad_rows, "max_id": max_id}
    write_json(folder / "meta.json", meta)
    return meta


def _size(source: str) -> int:
    """Bytes of a local source, as far as its folder tells; for the progress bar."""
    path = Path(source)
    return sum(p.stat().st_size for p in ([path] if path.is_file() else _files(path)) if source)


def read_tokenized(folder: str | Path, seed: int) -> Iterator[Document]:
    """All documents of a tokenized folder: its shards in random order, and the documents of each.

    One shard is in memory at a time, and read from end to end: A.2 samples documents at random, which on a
    disk full of text would be one seek for each.
    """
    folder = Path(folder)
    meta = _read_meta(folder, _DOCUMENTS_META, DOCUMENTS_FORMAT)
    for shard in generator(seed, "shards").permutation(meta["shards"]):
        part = _read_meta(folder / f"{shard:05d}", _SHARD_META)
        ids = np.fromfile(folder / f"{shard:05d}" / "input_ids.bin", np.uint32)
        ends = np.fromfile(folder / f"{shard:05d}" / "doc_ends.bin", np.int64)
        if len(ids) != part["tokens"] or len(ends) != part["documents"] or (
                len(ends) and (ends[-1] != len(ids) or (np.diff(ends, prepend=0) <= 0).any())):
            raise ValueError(f"{folder / f'{shard:05d}'}: its files and its meta.json do not agree; it is "
                             "damaged, remove the folder and tokenize again")
        begins = np.append(0, ends[:-1])
        for i in generator(seed, "documents", int(shard)).permutation(len(ends)):
            yield Document(ids[begins[i]:ends[i]])


# --- 6. Packing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedSequence:
    """Exactly seq_len tokens, and the lengths of the documents they consist of."""

    input_ids: np.ndarray  # (S,) uint32
    doc_lens: tuple[int, ...]  # adds up to S
    loss_mask: np.ndarray | None = None  # (S,) bool
    source: str = ""  # "recall-2k[17]": where it lies, for messages


@dataclass
class PackReport:
    """What became of the tokens: tokens_in = tokens_packed + tokens_dropped, always."""

    documents_in: int = 0
    documents_dropped: int = 0  # all of it: too short for pack_long, or too long
    tokens_in: int = 0
    tokens_packed: int = 0

    @property
    def tokens_dropped(self) -> int:
        """Too short, cut off, or not reached when enough sequences were packed."""
        return self.tokens_in - self.tokens_packed


def pack_long(documents: Iterable[Document], doc_len: int, seq_len: int | None = None,
              report: PackReport | None = None, below: float = math.inf) -> Iterator[PackedSequence]:
    """Cut documents into pieces of exactly `doc_len`, and lay seq_len / doc_len of them in a sequence.

    What is shorter is dropped, and so is the rest of a cut document. `doc_len` below `seq_len` is how
    the paper mixes 64K documents into its 512K stage, and `below` 512K leaves out those that the stage has
    whole already (A.2). Raises ValueError if `doc_len` does not divide `seq_len`.
    """
    seq_len = seq_len or doc_len
    if seq_len % doc_len:
        raise ValueError(f"documents of {doc_len} tokens do not fill sequences of {seq_len}; "
                         "choose a divisor")
    report = report if report is not None else PackReport()
    pieces: list[Document] = []
    for document in documents:
        report.documents_in += 1
        report.tokens_in += len(document)
        if not doc_len <= len(document) < below:
            report.documents_dropped += 1
            continue
        for begin in range(0, len(document) - doc_len + 1, doc_len):
            pieces.append(document[begin:begin + doc_len])
            if len(pieces) * doc_len == seq_len:
                report.tokens_packed += seq_len
                yield _join(pieces)
                pieces = []


def pack_short(documents: Iterable[Document], seq_len: int, report: PackReport | None = None,
               carry_tail: bool = True, ranks: int = 1) -> Iterator[PackedSequence]:
    """Lay documents end to end and cut every `seq_len` tokens; a cut tail begins the next sequence.

    What has not filled a last sequence is dropped (and counted). With `ranks` they are cut at every rank's
    share of the sequence instead: nothing more is lost, and no document lies on two ranks, so that sequence
    parallelism has nothing to exchange. Raises ValueError if shares are not equal. Source: A.2.
    """
    if seq_len % ranks:
        raise ValueError(f"sequences of {seq_len} tokens cannot be cut into {ranks} equal shares; "
                         "choose a divisor")
    report = report if report is not None else PackReport()
    pieces: list[Document] = []
    share = seq_len // ranks
    room = seq_len
    for document in documents:
        report.documents_in += 1
        report.tokens_in += len(document)
        while n := len(document):
            cut = (room - 1) % share + 1  # to the end of this share
            whole = n <= cut
            pieces.append(document if whole else document[:cut])
            room -= n if whole else cut
            if room == 0:
                report.tokens_packed += seq_len
                yield _join(pieces)
                pieces, room = [], seq_len
            if whole or not carry_tail:
                break
            document = document[cut:]


def pack_sft(documents: Iterable[Document], seq_len: int,
             report: PackReport | None = None) -> Iterator[PackedSequence]:
    """Like pack_short, but the cut tail of a conversation is dropped: half an answer is no lesson (A.2)."""
    return pack_short(documents, seq_len, report, carry_tail=False)


def _join(pieces: list[Document]) -> PackedSequence:
    ids = np.concatenate([piece.input_ids for piece in pieces])
    mask = None
    if any(piece.loss_mask is not None for piece in pieces):
        mask = np.concatenate([np.ones(len(piece), bool) if piece.loss_mask is None else piece.loss_mask
                               for piece in pieces])
    return PackedSequence(ids, tuple(map(len, pieces)), mask)


@dataclass(frozen=True)
class Domain:
    """A domain is NAME-LENGTH, with the length of its (longest) documents, or the NAME of short documents."""

    name: str
    length: int | None


def parse_domain(text: str) -> Domain:
    """Read "recall-2k" or "short". Raises ValueError for what is no length."""
    name, dash, length = text.partition("-")
    return Domain(name, parse_length(length) if dash else None)


def pack_domain(folder: str | Path, domain: str, n: int, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
    """Write the first `n` sequences of an embedded domain. Raises NothingPacked if there is none."""
    report = PackReport()
    sequences = itertools.islice(pack_builtin(domain, tokenizer, seq_len, seed, report), n)
    write_packed(folder, sequences, tokenizer, seq_len, domain, seed, report)


class NothingPacked(ValueError):
    """No document fills a sequence."""


def pack_builtin(domain: str, tokenizer: Tokenizer, seq_len: int, seed: int, report: PackReport,
                 ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack an embedded domain: "short", or a name with its longest document, as in "code_repos-2k"."""
    name, _, length = domain.partition("-")
    known = [*SHORT_DOMAINS, *(f"{n}-LENGTH" for n in (LONG_DOMAINS | SYNTHETIC_DOMAINS))]
    if name in SHORT_DOMAINS and not length:
        return pack_short(SHORT_DOMAINS[name](tokenizer, seed), seq_len, report, ranks=ranks)
    if ranks != 1:
        raise ValueError(f"--ranks cuts short documents; those of {domain!r} keep their length")
    if name in LONG_DOMAINS and length:
        return pack_long(LONG_DOMAINS[name](tokenizer, seed), parse_length(length), seq_len, report)
    if name in SYNTHETIC_DOMAINS and length:
        if seq_len % parse_length(length):
            raise ValueError(f"documents of {domain} do not fit sequences of {seq_len:,} tokens whole; "
                             "choose a divisor as their length")
        documents = SYNTHETIC_DOMAINS[name](tokenizer, seed, parse_length(length))
        return pack_short(documents, seq_len, report)
    raise ValueError(f"domain {domain!r} is unknown; choose one of {', '.join(known)}, "
                     "where LENGTH is that of the longest document, as in 2k")


def pack_tokenized(folder: str, rule: str, domain: str, seq_len: int, seed: int, report: PackReport,
                   ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack a tokenized folder by a rule of A.2: long, short or sft; auto is long for a NAME-LENGTH domain.

    A long domain of shorter documents than its sequences, "books-64k" in sequences of 512K, leaves documents
    of 512K and more to the set that has them whole: no document is in both.
    """
    _, _, length = domain.partition("-")
    rule = ("long" if length else "short") if rule == "auto" else rule
    documents = read_tokenized(folder, seed)
    if rule != "short" and ranks != 1:
        raise ValueError(f"--ranks cuts short documents; rule {rule!r} keeps theirs as they are")
    if rule == "long":
        doc_len = parse_length(length or seq_len)
        return pack_long(documents, doc_len, seq_len, report, seq_len if doc_len < seq_len else math.inf)
    if rule == "short":
        return pack_short(documents, seq_len, report, ranks=ranks)
    if rule == "sft":
        return pack_sft(documents, seq_len, report)
    raise ValueError(f"--rule {rule!r} is unknown; choose auto, long, short or sft")


# ProLong's own packs are mosaicml-streaming folders: index.json names shards, and a shard is
#
#     uint32 samples, uint32 offsets (samples + 1), ...   and at each offset a sample: the uint32 sizes of its
#                                                         columns of variable size, then the columns, in order
#
# with columns input_ids, indices (where its documents begin and end) and, for SFT, mask: arrays that say
# their dtype and shape in their first bytes, unless the column's encoding does ("ndarray:uint32").

_MDS_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64",
               65: "int64"}


def pack_mds(folder: str | Path, seq_len: int, report: PackReport | None = None) -> Iterator[PackedSequence]:
    """The packed sequences of a mosaicml-streaming folder, boundaries and masks intact.

    Raises ValueError, naming shard and sample, for what is missing, damaged, or no such sequence.
    """
    report = report if report is not None else PackReport()
    for shard in read_json(Path(folder) / "index.json").get("shards", []):
        names, codes, sizes = (shard.get(f"column_{key}", []) for key in ("names", "encodings", "sizes"))
        path = Path(folder, (shard.get("zip_data") or shard["raw_data"])["basename"])
        if shard.get("format") != "mds" or "input_ids" not in names or ".." in path.parts:
            raise ValueError(f"{folder}/index.json: {path}, a {shard.get('format')!r} shard with columns "
                             f"{names}, is no MDS shard with input_ids")
        with _open(path) as file:
            content = file.read()
        for i in range(shard["samples"]):
            try:
                begin, end = np.frombuffer(content, np.uint32, 2, 4 * (i + 1)).tolist()
                heads = sum(size is None for size in sizes)
                lengths = iter(np.frombuffer(content, np.uint32, heads, begin).tolist())
                begin, columns = begin + 4 * heads, {}
                for name, code, size in zip(names, codes, sizes, strict=True):
                    size = next(lengths) if size is None else size
                    if name in ("input_ids", "indices", "mask"):
                        columns[name] = _mds_array(content[begin:begin + size], code)
                    begin += size
                if begin != end or end > len(content):
                    raise ValueError(f"it ends at byte {begin} of {len(content)}, its index says {end}")
                sequence = _mds_sequence(columns, seq_len)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path} sample {i}: {error}") from None
            report.documents_in += len(sequence.doc_lens)
            report.tokens_in += seq_len
            report.tokens_packed += seq_len
            yield sequence


def _mds_array(content: bytes, code: str) -> np.ndarray:
    kind, dtype, shape, *_ = (*code.split(":"), "", "")
    if kind != "ndarray":
        raise ValueError(f"a column of encoding {code!r} where an ndarray is wanted")
    if not dtype:
        dtype, content = _MDS_DTYPES.get(content[0], "object"), content[1:]
    if shape:
        return np.frombuffer(content, dtype).reshape([int(n) for n in shape.split(",")])
    rank, width = content[0] >> 2, 1 << (content[0] & 3)  # axes, and bytes of each one's length
    lengths = np.frombuffer(content, f"uint{8 * width}", rank, 1)
    return np.frombuffer(content, dtype, offset=1 + rank * width).reshape(lengths.tolist())


def _mds_sequence(columns: dict[str, np.ndarray], seq_len: int) -> PackedSequence:
    ids, mask = columns["input_ids"], columns.get("mask")
    bounds = columns.get("indices", np.array([0, len(ids)])).astype(np.int64).reshape(-1, 2)
    begins, ends = bounds[:, 0], bounds[:, 1]
    if len(ids) != seq_len:
        raise ValueError(f"it has {len(ids):,} tokens, not {seq_len:,}; give their length as --seq")
    if begins[0] != 0 or ends[-1] != seq_len or (begins[1:] != ends[:-1]).any() or (begins >= ends).any():
        raise ValueError(f"its documents {bounds.tolist()[:4]} do not lie end to end in {seq_len:,} tokens")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"its mask is {mask.shape}, its tokens are {ids.shape}")
    return PackedSequence(ids.astype(np.uint32), tuple((ends - begins).tolist()),
                          None if mask is None else mask.astype(bool))


# --- 7. Packed sequences on disk ------------------------------------------------------------------
#
#     packs/code_repos-2k/
#         input_ids.bin   uint32 (sequences, seq_len)      plain memory maps: training needs numpy alone
#         doc_lens.bin    uint32 (documents,)              all sequences' doc_lens, one after another
#         doc_ends.bin    int64  (sequences,)              where in doc_lens each sequence's part ends
#         loss_mask.bin   bool   (sequences, seq_len)      only if something is not trained on
#         meta.json       sizes, tokenizer and its fingerprint, domain, seed, and what was dropped

FORMAT = "nanolong-packed-2"
_META = {"format": str, "domain": str, **_TOKENIZER_META, "seq_len": int, "sequences": int, "documents": int,
         "has_loss_mask": bool, "seed": int, "tokens_dropped": int, "sha256": str}


def write_packed(folder: str | Path, sequences: Iterable[PackedSequence], tokenizer: Tokenizer,
                 seq_len: int, domain: str, seed: int, report: PackReport) -> None:
    """Write a packed set, whole or not at all: into a folder aside, renamed at the end.

    Raises ValueError for a token id that the tokenizer does not have, and when nothing could be packed
    (every document shorter than a long domain's length).
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --out, or remove it")
    max_id, has_mask = 0, False
    ends: list[int] = []
    with whole_folder(folder) as temporary:
        with (open(temporary / "input_ids.bin", "wb") as ids, open(temporary / "doc_lens.bin", "wb") as lens,
              open(temporary / "loss_mask.bin", "wb") as masks):
            for sequence in sequences:
                assert sequence.input_ids.shape == (seq_len,) and sequence.input_ids.dtype == np.uint32
                if sequence.loss_mask is not None and not has_mask:  # those before were trained on whole
                    masks.write(b"\1" * (len(ends) * seq_len))
                    has_mask = True
                if has_mask:
                    mask = np.ones(seq_len, bool) if sequence.loss_mask is None else sequence.loss_mask
                    masks.write(mask.data)
                ids.write(sequence.input_ids.data)
                lens.write(np.array(sequence.doc_lens, np.uint32).data)
                ends.append((ends[-1] if ends else 0) + len(sequence.doc_lens))
                max_id = max(max_id, int(sequence.input_ids.max()))
        if not has_mask:
            (temporary / "loss_mask.bin").unlink()
        if not ends:
            raise NothingPacked(f"domain {domain}: none of its {report.documents_in} documents "
                             f"({report.tokens_in:,} tokens) fills a sequence of {seq_len:,} tokens; "
                             "choose a shorter length or longer documents")
        (temporary / "doc_ends.bin").write_bytes(np.array(ends, np.int64).tobytes())
        meta = {"format": FORMAT, "domain": domain, "tokenizer": tokenizer.spec,
                "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
                "max_id": max_id, "seq_len": seq_len, "sequences": len(ends), "documents": ends[-1],
                "has_loss_mask": has_mask, "seed": seed, "tokens_dropped": report.tokens_dropped,
                "sha256": _sha256(temporary)}
        _check_ids(folder, meta, tokenizer.vocab_size)
        write_json(temporary / "meta.json", meta)


def _sha256(folder: Path) -> str:
    """One checksum of all the content, from the checksums of its files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_ids(folder: Path, meta: dict[str, Any], vocab_size: int) -> None:
    if meta["max_id"] >= vocab_size:
        raise ValueError(f"{folder} has token id {meta['max_id']:,}, but there are only {vocab_size:,}; "
                         "use the tokenizer and the model that belong together")


class PackedDataset:
    """A packed set as memory maps: `dataset[i]` is a PackedSequence, read when asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder. Raises ValueError if its meta.json and its files do not agree."""
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder, _META, FORMAT)
        if (not 0 < self.meta["sequences"] <= self.meta["documents"] or not 0 < self.meta["seq_len"] < 2**32):
            raise ValueError(f"{self.folder / 'meta.json'}: {self.meta['documents']} documents in "
                             f"{self.meta['sequences']} sequences of {self.meta['seq_len']} tokens cannot be")
        n, seq_len, documents = (self.meta[key] for key in ("sequences", "seq_len", "documents"))
        self.sizes: dict[Path, int] = {}
        self.seq_len: int = seq_len
        self.domain: str = self.meta["domain"]
        self.input_ids = self._map("input_ids.bin", np.uint32, (n, seq_len))
        self.doc_lens = self._map("doc_lens.bin", np.uint32, (documents,))
        self.doc_ends = self._map("doc_ends.bin", np.int64, (n,))
        self.loss_mask = (self._map("loss_mask.bin", np.bool_, (n, seq_len))
                          if self.meta["has_loss_mask"] else None)
        begins = np.concatenate(([0], self.doc_ends[:-1]))
        if (self.doc_ends[-1] != documents or (self.doc_ends <= begins).any() or (self.doc_lens == 0).any()
                or (np.add.reduceat(self.doc_lens.astype(np.int64), begins) != seq_len).any()):
            raise ValueError(f"{self.folder}: the document lengths do not add up to seq_len={seq_len} in "
                             "every sequence; the folder is damaged, pack it again")

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        self.sizes[self.folder / name] = math.prod(shape) * np.dtype(dtype).itemsize
        self.check_sizes()
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape)

    def check_sizes(self) -> None:
        """Raise ValueError for a file that is gone or cut: to read there would kill the process (SIGBUS)."""
        for path, wanted in self.sizes.items():
            size = os.stat(path).st_size if os.path.isfile(path) else 0
            if size != wanted:
                raise ValueError(f"{path} has {size:,} bytes where meta.json says {wanted:,}; "
                                 "the folder is damaged, pack it again")

    def check_content(self) -> None:
        """Read all of it: raise ValueError if a byte is not as it was packed."""
        if _sha256(self.folder) != self.meta["sha256"]:
            raise ValueError(f"{self.folder} is not as it was packed: its sha256 is not what meta.json says; "
                             "pack it again")

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> PackedSequence:
        self.check_sizes()
        begin = int(self.doc_ends[i - 1]) if i else 0
        doc_lens = tuple(self.doc_lens[begin:int(self.doc_ends[i])].tolist())
        mask = None if self.loss_mask is None else self.loss_mask[i]  # still on disk, as the ids are
        return PackedSequence(self.input_ids[i], doc_lens, mask, f"{self.folder.name}[{i}]")

    @property
    def trained_share(self) -> float:
        """Share of its tokens that are trained on."""
        return 1.0 if self.loss_mask is None else float(self.loss_mask.mean())

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a token has no place in a model's vocabulary."""
        _check_ids(self.folder, self.meta, vocab_size)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the folder was packed with another tokenizer."""
        _check_tokenizer(self.folder, self.meta, tokenizer)


def _check_tokenizer(folder: str | Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    if (meta["tokenizer_fingerprint"], meta["vocab_size"]) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise ValueError(f"{folder} was packed with tokenizer {meta['tokenizer']!r} "
                         f"({meta['tokenizer_fingerprint']}), this is {tokenizer.spec!r} "
                         f"({tokenizer.fingerprint}); pack it again with this one")


# --- 8. The mixture -------------------------------------------------------------------------------


class Mixture:
    """Draws sequences so that every domain has its share of tokens, in an order fixed by the seed.

    All sequences are equally long, so a share of tokens is a share of sequences. At each draw, among the
    domains that are behind their share the one whose next sequence is due first goes next: after any n
    draws a domain with share s has had s * n sequences, to within one. Inside a domain the order is a
    new permutation every epoch. The whole state is how many sequences each domain has given: `drawn`.
    """

    def __init__(self, datasets: dict[str, PackedDataset], shares: dict[str, float], seed: int) -> None:
        """Raises ValueError for shares that are negative, not finite, all zero, or of no dataset."""
        check_shares(shares)
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items() if share > 0}
        if missing := self.shares.keys() - datasets.keys():
            raise ValueError(f"the mixture names {min(missing)!r}, but there is only "
                             f"{', '.join(datasets) or 'nothing'}")
        self.datasets = {name: datasets[name] for name in self.shares}
        self.seed = seed
        self.drawn = dict.fromkeys(self.shares, 0)

    def draw(self, n: int) -> list[PackedSequence]:
        """The next `n` sequences."""
        return [self._next() for _ in range(n)]

    def _next(self) -> PackedSequence:
        n = sum(self.drawn.values())
        behind = [d for d, share in self.shares.items() if share * (n + 1) > self.drawn[d] + 1e-9]
        name = min(behind, key=self._due)
        dataset, count = self.datasets[name], self.drawn[name]
        self.drawn[name] += 1
        epoch, i = divmod(count, len(dataset))
        return dataset[int(self._order(name, epoch)[i])]

    def _due(self, name: str) -> float:
        """The draw by which this domain's next sequence must have come."""
        return (self.drawn[name] + 1) / self.shares[name]

    def _order(self, name: str, epoch: int) -> np.ndarray:
        return _permutation(self.seed, name, epoch, len(self.datasets[name]))

    def resume(self, drawn: dict[str, int]) -> None:
        """Go on where `drawn` says. Raises ValueError if that is not a state of this mixture."""
        if drawn.keys() != self.drawn.keys() or not all(type(n) is int and n >= 0 for n in drawn.values()):
            raise ValueError(f"the data's cursor {drawn} does not belong to the mixture of "
                             f"{', '.join(self.drawn)}; start anew with --init instead of --resume")
        self.drawn = dict(drawn)

    def epochs(self) -> dict[str, float]:
        """How often each domain has been seen so far; above 1 sequences repeat."""
        return {name: self.drawn[name] / len(self.datasets[name]) for name in self.shares}


def check_shares(shares: dict[str, float]) -> None:
    """Raise ValueError unless all shares are finite, none negative, and some positive."""
    if not all(share >= 0 for share in shares.values()) or not 0 < sum(shares.values()) < float("inf"):
        raise ValueError(f"mixture shares {shares} must be finite, none negative and not all 0")


def parse_mixture(text: str) -> dict[str, float]:
    """Read "recall-2k=0.6,code_repos-2k=0.4". Raises ValueError for anything else."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, mark, share = (field.strip() for field in part.partition("="))
        try:
            if not name or not mark or name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"mixture part {part!r} is not NAME=SHARE, each name once; "
                             "write for example recall-2k=0.6,code_repos-2k=0.4") from None
    check_shares(shares)
    return shares


@cache
def _permutation(seed: int, name: str, epoch: int, n: int) -> np.ndarray:
    return generator(seed, name, epoch).permutation(n)


# --- 9. Batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packed sequences laid end to end, T tokens, with labels already shifted.

    The label of a token is the token after it. The last token of a document has none: what follows
    belongs to another document. So a document of n tokens trains at most n - 1 of them.
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, IGNORE_INDEX where nothing is trained
    doc_lens: tuple[int, ...]
    sources: tuple[str, ...]

    def shard(self, sp_rank: int, sp_size: int) -> tuple[Tensor, Tensor]:
        """The tokens and labels that one of `sp_size` ranks holds: a consecutive share of each.

        Labels were shifted before this cut, so that no target is lost at a rank's boundary.
        """
        share = len(self.input_ids) // sp_size
        assert share * sp_size == len(self.input_ids)
        mine = slice(sp_rank * share, (sp_rank + 1) * share)
        return self.input_ids[mine], self.labels[mine]


def make_batch(sequences: Sequence[PackedSequence]) -> Batch:
    """Join sequences. A loss mask says which tokens are trained on *as targets*."""
    ids = np.concatenate([s.input_ids for s in sequences], dtype=np.int64)
    doc_lens = tuple(n for s in sequences for n in s.doc_lens)
    labels = np.empty_like(ids)
    labels[:-1] = ids[1:]  # the last one is the end of a document
    if any(s.loss_mask is not None for s in sequences):
        mask = np.concatenate([np.ones(len(s.input_ids), bool) if s.loss_mask is None
                               else s.loss_mask for s in sequences])
        labels[:-1][~mask[1:]] = IGNORE_INDEX
    labels[np.cumsum(doc_lens) - 1] = IGNORE_INDEX
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), doc_lens,
                 tuple(s.source for s in sequences))


def arrange_step(sequences: Sequence[PackedSequence], dp_size: int, per_batch: int,
                 reorder: bool = True) -> list[list[list[PackedSequence]]]:
    """Deal one step's sequences to [micro-step][dp rank], ranks of a micro-step with like costs.

    Ranks wait for the slowest at every micro-step. Attention costs the sum of squared document lengths,
    so sorting by it puts like beside like; the step's sum, hence the gradient, does not change
    (A.3, Table 15: +11.7% throughput). `reorder` False keeps the drawn order, to compare.
    """
    if reorder:
        sequences = sorted(sequences, key=lambda s: sum(n * n for n in s.doc_lens))
    parts = [list(sequences[i:i + per_batch]) for i in range(0, len(sequences), per_batch)]
    return [parts[i:i + dp_size] for i in range(0, len(parts), dp_size)]


# --- 10. Tokenize, pack and inspect from the command line -----------------------------------------


@dataclass(frozen=True)
class PackConfig:
    domain: str = option("code_repos-2k", "NAME of short documents, NAME-LENGTH of long ones of that length; "
                         "without --from an embedded one, as in recall-2k")
    from_: str = option("", "pack the documents in this folder, which `tokenize` wrote")
    from_mds: str = option("", "turn this mosaicml-streaming folder into ours")
    rule: str = option("auto", "long, short or sft (A.2); auto: long if the domain has a LENGTH, else short")
    seq: int = option(2048, "tokens of a packed sequence", parse_length)
    sequences: int | None = option(None, "stop after so many sequences (default: all, of an embedded domain "
                                         "1,000)", parse_length)
    ranks: int = option(1, "cut short documents so that none lies on two of so many ranks", parse_length)
    out: str = option("packs/code_repos-2k", "the folder to write")
    tokenizer: str = option("", "tokenizer (default: the source's, else bytes)")
    seed: int = option(0, "seed of every random choice", int)


def pack(config: PackConfig) -> None:
    """Pack a tokenized folder, a mosaicml-streaming folder or an embedded domain, and report on it."""
    report, enough, seq_len = PackReport(), config.sequences, config.seq
    if config.from_ and config.from_mds:
        raise ValueError("--from and --from-mds are two sources; give one")
    if (config.rule != "auto" and not config.from_) or (config.from_mds and config.ranks != 1):
        raise ValueError("--rule is for documents that --from names, --ranks is not for --from-mds; drop it")
    if config.from_:
        meta = _read_meta(Path(config.from_), _DOCUMENTS_META, DOCUMENTS_FORMAT)
        tokenizer = load_tokenizer(config.tokenizer or meta["tokenizer"])
        _check_tokenizer(config.from_, meta, tokenizer)
        sequences = pack_tokenized(config.from_, config.rule, config.domain, seq_len, config.seed, report,
                                   config.ranks)
    elif config.from_mds:
        tokenizer = load_tokenizer(config.tokenizer or "bytes")
        sequences = pack_mds(config.from_mds, seq_len, report)
    else:
        tokenizer, enough = load_tokenizer(config.tokenizer or "bytes"), enough or 1000
        sequences = pack_builtin(config.domain, tokenizer, seq_len, config.seed, report, config.ranks)
    bar = tqdm(itertools.islice(sequences, enough), unit=" sequences", disable=not sys.stderr.isatty())
    write_packed(config.out, bar, tokenizer, seq_len, config.domain, config.seed, report)
    print(f"documents in {report.documents_in:,} ({report.tokens_in:,} tokens), of no use whole "
          f"{report.documents_dropped:,}; tokens packed {report.tokens_packed:,}, "
          f"dropped {report.tokens_dropped:,}")
    inspect(config.out)


def inspect(folder: str) -> None:
    """Say what a folder holds: tokenized documents, packed sequences, or several packed domains."""
    path = Path(folder)
    found = sorted(entry.parent for entry in path.glob("*/meta.json") if _is_packed(entry.parent))
    if _is_packed(path):
        inspect_packed(PackedDataset(path))
    elif found:
        sets = [PackedDataset(entry) for entry in found]
        total = sum(dataset.input_ids.size for dataset in sets)
        for dataset in sets:
            tokens, meta = dataset.input_ids.size, dataset.meta
            print(f"{tokens / total:>6.1%} {dataset.folder.name:<20} {len(dataset):>8,} sequences x "
                  f"{dataset.seq_len:,} = {tokens:,} tokens, {meta['documents']:,} documents, tokenizer "
                  f"{meta['tokenizer_fingerprint']}")
    else:
        meta = _read_meta(path, _DOCUMENTS_META, DOCUMENTS_FORMAT)
        print(f"{folder}: {meta['documents']:,} documents, {meta['tokens']:,} tokens in {meta['shards']} "
              f"shards, tokenizer {meta['tokenizer']}; {meta['bad']:,} of {meta['rows']:,} rows skipped")
        lens = np.concatenate([np.diff(np.fromfile(file, np.int64), prepend=0)
                               for file in sorted(path.glob("*/doc_ends.bin"))])
        print(format_lengths(lens))


def _is_packed(folder: Path) -> bool:
    return (folder / "meta.json").is_file() and read_json(folder / "meta.json").get("format") == FORMAT


def format_lengths(lens: np.ndarray) -> str:
    """Document lengths, and the share of tokens in long ones (Table 14).

    Of tokens, not documents, as in the paper: its ShortMix row is the mean of its components' rows weighted
    by their shares of tokens.
    """
    parts = [f">{limit}K {lens[lens > limit * 1024].sum() / lens.sum():.1%}" for limit in (4, 8, 16, 32)]
    return (f"document lengths: shortest {lens.min():,}, median {int(np.median(lens)):,}, longest "
            f"{lens.max():,}; tokens in documents {'  '.join(parts)}")


def inspect_packed(dataset: PackedDataset) -> None:
    """Print counts, lengths, a picture of sequences and the text around a document's end; draw a figure."""
    meta, lens = dataset.meta, np.array(dataset.doc_lens, np.int64)
    print(f"{dataset.folder}: {meta['domain']}, {len(dataset):,} sequences x {dataset.seq_len:,} tokens, "
          f"{len(lens):,} documents, tokenizer {meta['tokenizer']}, sha256 {meta['sha256'][:12]}")
    print(format_lengths(lens))
    print(f"trained tokens: {dataset.trained_share:.1%}; dropped while packing: {meta['tokens_dropped']:,}")
    for i in range(min(4, len(dataset))):
        print(f"  {i:>4} {picture(dataset[i].doc_lens)}")
    first = dataset[0]
    end = first.doc_lens[0]
    around = first.input_ids[max(0, end - 60):end + 60]
    try:
        tokenizer = load_tokenizer(meta["tokenizer"])
        dataset.check_tokenizer(tokenizer)
        print(f"around the first document's end (token {end:,}):\n    {tokenizer.decode(around)!r}")
    except (ValueError, KeyError) as error:
        print(f"around the first document's end (token {end:,}), as ids ({error}):\n    {around.tolist()}")
    if drawn := draw_packed(dataset, lens):
        print(f"figure: {drawn}")


def picture(doc_lens: Sequence[int], width: int = 96) -> str:
    """A sequence as at the top of this file, a letter a document: "aaabbbcc". The shortest do not show."""
    ends = np.cumsum(doc_lens)
    columns = (np.arange(width) + 0.5) * ends[-1] / width
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "".join(letters[np.searchsorted(ends, columns, side="right") % 26])


def draw_packed(dataset: PackedDataset, lens: np.ndarray) -> Path | None:
    """Draw the first sequences and the histogram of lengths beside the data, where matplotlib is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 5), layout="constrained")
    rows, histogram = figure.subplots(2, 1, height_ratios=(3, 2))
    for i in range(min(16, len(dataset))):
        ends = np.cumsum(dataset[i].doc_lens)
        spans = [(int(end) - n, n) for end, n in zip(ends, dataset[i].doc_lens, strict=True)]
        rows.broken_barh(spans, (i - 0.4, 0.8), facecolors=[f"C{k % 10}" for k in range(len(spans))])
    rows.set(xlim=(0, dataset.seq_len), xlabel="token", ylabel="sequence",
             title=f"{dataset.folder.name}: a color a document")
    rows.set_yticks(range(min(16, len(dataset))))
    rows.invert_yaxis()
    edges = 2.0 ** np.arange(np.floor(np.log2(lens.min())), np.log2(lens.max()) + 1.01)
    histogram.hist(lens, bins=edges.tolist(), weights=lens / lens.sum())
    histogram.set(xscale="log", xlabel="tokens of a document", ylabel="share of tokens")
    histogram.set_xscale("log", base=2)
    path = dataset.folder / "documents.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "tokenize":
        tokenize(parse_cli(TokenizeConfig, tokenize.__doc__, rest))
    elif command == "pack":
        pack(parse_cli(PackConfig, pack.__doc__, rest))
    elif command == "inspect" and len(rest) == 1 and not rest[0].startswith("-"):
        inspect(rest[0])
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise ValueError(f"command {' '.join(sys.argv[1:])!r} is unknown; write `data.py tokenize --help`, "
                         "`data.py pack --help` or `data.py inspect FOLDER`")


if __name__ == "__main__":
    run_main(main)
