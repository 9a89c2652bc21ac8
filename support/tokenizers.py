"""Text to token ids and back, and tokenizer files in and out.

Byte-level BPE has three parts: a pattern that splits text into words, a table of byte strings in
the order in which they are merged, and special tokens. tiktoken runs it, from whichever file the
parts come. A tokenizer.json that its own library would encode otherwise is refused by its field.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from .files import read_json
from .toy import SYMBOL_NAMES

Loaded = tuple[tiktoken.Encoding, str | None, str, bool, list[Path]]
#             encoding,           bos,        eos, NFC first?, its files
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM takes every digit out first: a digit ends white space as the end of the text does.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
MISSING = 2**31  # + byte: the id of a byte that is no token (SmolLM2 lacks 21); no text may have it
# GPT-2 writes bytes as letters: printable ones as themselves, the 68 others from chr(256) on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {chr(byte): byte for byte in PRINTABLE}
LETTERS |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
ALL_BYTES = {bytes([i]) for i in range(256)}
SPLITS_INTO_MATCHES = (("Isolated", False), ("Removed", True))
MAX_PIECE = 2**17
WORD_END = re.compile(r"[^\W_](?=[ \t\r\n.,。，])")


class Tokenizer:
    """A `tiktoken.Encoding` with the names that the recipe uses, and a fingerprint of its table."""

    def __init__(self, spec: str, encoding: tiktoken.Encoding, bos: str | None, eos: str,
                 nfc: bool = False, files: Sequence[Path] = ()) -> None:
        self.spec, self.encoding, self.nfc = spec, encoding, nfc
        self.files = tuple(files)  # a checkpoint copies them, so that it brings its tokenizer along
        self.specials: dict[str, int] = encoding._special_tokens
        ids = [*encoding._mergeable_ranks.values(), *self.specials.values()]
        self.vocab_size = 1 + max(i for i in ids if i < MISSING)
        self.begin = [] if bos is None else [self.special_id(bos)]  # GPT-2, Qwen begin with nothing
        self.eos_id = self.special_id(eos)

    @property
    def bos_id(self) -> int:
        """The token that begins a document. Raises ValueError for a family that has none."""
        if not self.begin:
            raise ValueError(f"tokenizer {self.spec!r} begins a document with no token")
        return self.begin[0]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever any text could get other ids."""
        ranks = self.encoding._mergeable_ranks.items()
        whole = [self.encoding._pat_str, sorted((rank, token.hex()) for token, rank in ranks),
                 sorted(self.specials.items()), self.begin, self.eos_id, self.nfc]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, uint32 (n,). "<|end_of_text|>" inside a document is text, 15 letters."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=())
                              for part in cut_text(text)])
        if len(ids) and ids.max() >= MISSING:
            raise ValueError(f"has byte {int(ids.max()) - MISSING:#04x}, which is no token of "
                             f"tokenizer {self.spec!r}")
        return ids

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The same, but "<|...|>" is a special token. Raises ValueError if there is none such."""
        parts = re.split(r"(<\|\w+\|>)", text)  # ordinary text and special tokens in turn
        ids = [np.array([self.special_id(part)]) if i % 2 else self.encode(part)
               for i, part in enumerate(parts)]
        return np.concatenate(ids).astype(np.uint32)

    def special_id(self, name: str) -> int:
        """The id of a special token, as in "<|eot_id|>". Raises ValueError if there is none."""
        if name not in self.specials:
            raise ValueError(f"tokenizer {self.spec!r} has no special token {name!r}; its first "
                             f"are {', '.join(list(self.specials)[:8])}")
        return self.specials[name]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.encoding.decode([int(i) for i in ids])


def cut_text(text: str) -> Iterator[str]:
    """Pieces to encode one by one: tiktoken crashes on very long runs without a word break.

    Between a letter or digit and a space or a full stop, every supported tokenizer starts a new
    word, so a cut changes no id. Only 64K characters without such a place may gain a token.
    """
    begin = 0
    while len(text) - begin > MAX_PIECE:
        place = WORD_END.search(text, begin + MAX_PIECE // 2, begin + MAX_PIECE)
        end = place.end() if place else begin + MAX_PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


# --- 1. Reading -----------------------------------------------------------------------------------


def load_encoding(spec: str) -> Loaded:
    """Load "bytes", "tiktoken:NAME", or a file or folder. Raises ValueError for anything else."""
    path = Path(spec)
    if spec and path.is_dir():
        path /= "tokenizer.json" if (path / "tokenizer.json").is_file() else "tokenizer.model"
    try:
        if spec == "bytes":
            names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id",
                     "pair", "ask", *SYMBOL_NAMES]
            return _like_llama({token: token[0] for token in ALL_BYTES}, r"[\s\S]{1,256}", names)
        if spec.startswith("tiktoken:"):
            return tiktoken.get_encoding(spec[9:]), None, "<|endoftext|>", False, []
        return read_tokenizer_json(path) if path.suffix == ".json" else read_llama_model(path)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        raise ValueError(
            f"tokenizer {spec!r} can't be read exactly: {' '.join(reason.split())}; choose bytes, "
            "tiktoken:NAME (with its file in TIKTOKEN_CACHE_DIR), or the file or folder of a "
            "byte-level BPE tokenizer.json or of Llama-3's tokenizer.model") from None


def _like_llama(ranks: dict[bytes, int], pattern: str, names: list[str], *files: Path) -> Loaded:
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding("llama", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    return encoding, "<|begin_of_text|>", "<|end_of_text|>", False, [*files]


def read_llama_model(path: Path) -> Loaded:
    """Llama-3's tokenizer.model: a line a token, base64 and rank; 256 special tokens follow."""
    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(lines))) or not ranks.keys() >= ALL_BYTES:
        raise ValueError("its ranks are not 0, 1, 2, ... with all 256 bytes among them")
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(251))]
    names[6:6] = ["start_header_id", "end_header_id"]
    names[9:9] = ["eot_id"]
    return _like_llama(ranks, LLAMA3_SPLIT, names, path)


def read_tokenizer_json(path: Path) -> Loaded:
    """Turn a tokenizer.json into an Encoding. Raises ValueError where that is not exact."""
    table = read_json(path)
    model, added = table["model"], {entry["content"]: entry for entry in table["added_tokens"]}
    special = {name: entry["id"] for name, entry in added.items()}
    pattern = _check_fields(table, model, added, model["vocab"] | special)
    ranks = {_spell(token): i for token, i in model["vocab"].items() if token not in added}
    ranks |= {byte: MISSING + byte[0] for byte in ALL_BYTES - ranks.keys()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    pairs = [(_spell(left), _spell(right)) for left, right in merges]
    _check_merges(ranks, pairs, bool(model.get("ignore_merges")))
    encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    probe = "It's 3.14, naïve—don't  stop\n\n\tx_1 = [2048, ' ']\r\n中文，。 \u00a0e\u0301🙂\x1c "
    whole = encoding.encode_ordinary(probe * 3)
    parts = map(encoding.encode_ordinary, re.split(rf"(?<={WORD_END.pattern})", probe * 3))
    if encoding.decode(whole) != probe * 3 or list(itertools.chain(*parts)) != whole:
        raise ValueError(f"the pattern of its pre_tokenizer, {pattern!r}, drops text, or has words "
                         "that go on after white space")
    bos, eos = _begin_and_end(table, path.parent, added)
    files = [path, *(path.with_name(name) for name in SIDE_FILES if path.with_name(name).is_file())]
    return encoding, bos, eos, table.get("normalizer") == {"type": "NFC"}, files


def _spell(token: str) -> bytes:
    return bytes(LETTERS[letter] for letter in token)


def _check_fields(table: dict[str, Any], model: dict[str, Any], added: dict[str, Any],
                  ids: dict[str, int]) -> str:
    """Check all but the merges. Returns the pattern that splits text into words."""
    settings = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "byte_fallback": False}
    normalizers = (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})
    pattern = _split_pattern(table.get("pre_tokenizer"))
    checks = {f"model.{key}": (model.get(key) or value) == value for key, value in settings.items()}
    checks |= {
        "normalizer": table.get("normalizer") in normalizers,
        "decoder": (table.get("decoder") or {}).get("type") == "ByteLevel",
        "pre_tokenizer": bool(pattern),
        "added_tokens": all(entry["special"] or name[:1] + name[-1:] == "<>"
                            for name, entry in added.items()),
        "model.vocab": len(set(ids.values())) == len(ids) and max(map(len, ids)) <= 4096 and all(
            type(i) is int and 0 <= i < 2 * len(ids) + 1000 for i in ids.values())}
    for field, is_exact in checks.items():
        if not is_exact:
            raise ValueError(f"its {field} is none that tiktoken would encode exactly alike")
    return pattern


def _split_pattern(entry: Any) -> str:
    """The regular expression that does what a pre_tokenizer does, or "" if we know none."""
    steps = entry["pretokenizers"] if (entry or {}).get("type") == "Sequence" else [entry or {}]
    last = steps[-1]
    match steps[:-1], last.get("use_regex", True):
        case _ if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
            return ""
        case [], True:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True}], True:
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": kind,
               "invert": invert}], False if (kind, invert) in SPLITS_INTO_MATCHES:
            return pattern
    return ""


def _check_merges(ranks: dict[bytes, int], pairs: list[tuple[bytes, bytes]],
                  ignore_merges: bool) -> None:
    """Compare BPE by a list of merges (Hugging Face) with BPE by ranks (tiktoken).

    tiktoken always merges the two neighbours that make the token of lowest rank. Both give the same
    ids if (1) the list creates tokens in the order of their ids and (2) for every token, the list
    contains the pair that BPE reaches when it may use only tokens with smaller ids (or every pair
    that spells the token).
    """
    made = [ranks.get(left + right, -1) for left, right in pairs]
    are_tokens = all(ranks.get(part, MISSING) < MISSING for pair in pairs for part in pair)
    if made != sorted(made) or -1 in made or not are_tokens:
        raise ValueError("its model.merges stand in another order than their tokens, or merge what "
                         "is no token")
    listed = set(pairs)
    for token, rank in ranks.items():
        parts = tuple(_merge_below(token, rank, ranks))
        if len(parts) == 1 or parts in listed:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        every = {pair for pair in splits if pair[0] in ranks and pair[1] in ranks}
        if not (ignore_merges and every <= listed):
            raise ValueError(f"its model.merges have no way to {token!r} that tiktoken would go")


def _merge_below(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that BPE reaches with ranks below the token's own: two, if a merge can make it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if best == rank:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _begin_and_end(table: dict[str, Any], folder: Path,
                   added: dict[str, Any]) -> tuple[str | None, str]:
    """What begins a document (post_processor), and ends it (eos_token beside, or a usual name).

    Llama-3's post_processor puts a token first, GPT-2's and Qwen's do not.
    """
    steps = table.get("post_processor") or {}
    first = [step["single"][0] for step in steps.get("processors", [steps])
             if step.get("type") == "TemplateProcessing"]
    bos = first[0].get("SpecialToken", {}).get("id") if first else None
    beside = [read_json(folder / file).get("eos_token") for file in SIDE_FILES
              if (folder / file).is_file()]
    names = [name.get("content") if isinstance(name, dict) else name for name in beside]
    if names and names[0] in ("<|eot_id|>", "<|im_end|>"):  # ends a turn of chat, not a document
        names = ["<|end_of_text|>", "<|endoftext|>", *names]
    for name in [*names, "<|end_of_text|>", "<|endoftext|>", "</s>"]:
        if name in added:
            return bos, name
    raise ValueError(f"none of its {len(added)} added tokens is known to end a document: give "
                     "eos_token in a tokenizer_config.json beside it")


# --- 2. Writing -----------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What makes transformers encode as this tokenizer: its own files, or a tokenizer.json.

    Unlike here, transformers makes special tokens of text that looks like one.
    """
    found = {path.name: path.read_bytes() for path in tokenizer.files}
    if "tokenizer.json" in found:
        return found
    ranks = tokenizer.encoding._mergeable_ranks
    names = {i: name for name, i in tokenizer.specials.items()}
    letters = {byte: letter for letter, byte in LETTERS.items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    parts = [_merge_below(token, rank, ranks) for token, rank in by_rank]
    merges = [[spelled[part] for part in pair] for pair in parts if len(pair) == 2]
    first = [names[i] for i in tokenizer.begin]
    text, other = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    template = {
        "type": "TemplateProcessing", "pair": [text, other],
        "single": [*({"SpecialToken": {"id": name, "type_id": 0}} for name in first), text],
        "special_tokens": {name: {"id": name, "ids": tokenizer.begin, "tokens": [name]}
                           for name in first}}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.encoding._pat_str},
             "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    table = {
        "version": "1.0", "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": template, "decoder": bytewise,
        "added_tokens": [{"id": i, "content": names[i], **plain, "special": True}
                         for i in sorted(names)],
        "model": {"type": "BPE", "merges": merges,
                  "vocab": {spelled[token]: rank for token, rank in ranks.items()}}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eos_id],
              "bos_token": first[0] if first else None, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}
