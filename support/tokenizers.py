"""Text to token ids and back, and tokenizer.json files in and out.

Byte-level BPE has three parts: a pattern that splits text into words, a table of byte strings in
the order in which they are merged, and special tokens. tiktoken runs it, wherever they come from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import is_normalized, normalize

import numpy as np
import tiktoken.load

from .files import read_json
from .toy import SYMBOL_NAMES

Ranks = dict[bytes, int]
Loaded = tuple[tiktoken.Encoding, str | None, str, bool, list[Path]]
#             encoding,           bos,        eos, NFC first?, its files
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM takes every digit out first: a digit ends white space as the end of the text does.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
MISSING = 2**31  # + byte: the id of a byte that is no token (SmolLM2 lacks 21); no text may have it
BYTES = [bytes([i]) for i in range(256)]
# GPT-2 writes bytes as letters: printable ones as themselves, the 68 others from chr(256) on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {chr(byte): byte for byte in PRINTABLE}
LETTERS |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
# tiktoken crashes on very long runs, so we encode pieces. Between a letter or digit and a space or
# a full stop every supported tokenizer starts a new word: a cut there changes no id. Only 128K
# characters without such a place may gain a token.
WORD_END = r"(?<=[^\W_])(?=[ \t\r\n.,。，])"
PIECE = re.compile(rf"[\s\S]{{1,131072}}(?:\Z|{WORD_END})|[\s\S]{{1,131072}}")
POSSESSIVE = re.compile(r"(\{[\d,]+\})\+")  # {1,3}+ is more than 3 to Hugging Face's engine
USUAL_ENDS = ("<|end_of_text|>", "<|endoftext|>")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # end an answer in a chat, not a document
PROBE = "It's 3.14, naïve—don't  stop\n\n\tx_1 = [2048, ' ']\r\n中文，。 \u00a0e\u0301🙂\x1c " * 3


def nfc(text: str) -> str:
    """Unicode's form NFC. Python takes n² steps for n combining marks: many are a ValueError."""
    for signs in re.findall(r"[^\w\s\x00-\u02ff]{256,}", text):  # marks, or others between words
        if not is_normalized("NFC", signs):
            raise ValueError("has 256 combining marks in a row, which no text has")
    return normalize("NFC", text)


class Tokenizer:
    """A `tiktoken.Encoding` with the names that the recipe uses, and a fingerprint of its table."""

    def __init__(self, spec: str, encoding: tiktoken.Encoding, bos: str | None, eos: str,
                 nfc: bool = False, files: Sequence[Path] = ()) -> None:
        self.spec, self.encoding, self.nfc = spec, encoding, nfc
        self.files = files  # a checkpoint copies them, so that it brings its tokenizer along
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
        text = nfc(text) if self.nfc else text
        ids = np.concatenate([self.encoding.encode_to_numpy(part, disallowed_special=())
                              for part in PIECE.findall(text) or [""]])
        if len(ids) and ids.max() >= MISSING:
            raise ValueError(f"has byte {int(ids.max()) - MISSING:#04x}, which is no token of "
                             f"tokenizer {self.spec!r}")
        return ids

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The same, but "<|...|>" is a special token. Raises ValueError if there is none such."""
        parts = re.split(r"(<\|(?:\w+|\S)\|>)", text)  # ordinary text and special tokens in turn
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


def load_encoding(spec: str) -> Loaded:
    """Load "bytes", "tiktoken:NAME", or a tokenizer.json or its folder; else raise ValueError."""
    try:
        if spec == "bytes":
            names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id",
                     "pair", "ask", *SYMBOL_NAMES]
            special = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}
            encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,256}", special_tokens=special,
                                         mergeable_ranks={byte: byte[0] for byte in BYTES})
            return encoding, "<|begin_of_text|>", "<|end_of_text|>", False, []
        if spec.startswith("tiktoken:"):
            tiktoken.load.read_file = open  # type: ignore  # no network: an URL is no file
            named = tiktoken.get_encoding(spec[9:])
            encoding = tiktoken.Encoding(
                named.name, mergeable_ranks=named._mergeable_ranks,
                special_tokens=named._special_tokens,
                # the same words, since nothing follows {1,3}+ in any of these patterns
                pat_str=POSSESSIVE.sub(r"\1", named._pat_str))
            return encoding, None, "<|endoftext|>", False, []
        is_folder = spec and Path(spec).is_dir()
        return read_tokenizer_json(Path(spec, "tokenizer.json") if is_folder else Path(spec))
    except (ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
        raise ValueError(f"tokenizer {spec!r} can't be read exactly ({reason}); choose bytes, "
                         "tiktoken:NAME (its file in TIKTOKEN_CACHE_DIR), or a tokenizer.json of "
                         "byte-level BPE, as Hugging Face's folders of Llama-3 have one") from None


def read_tokenizer_json(path: Path) -> Loaded:
    """Turn a tokenizer.json into an Encoding. Raises ValueError where that is not exact."""
    table, beside = read_json(path), path.with_name("tokenizer_config.json")
    config = read_json(beside) if beside.is_file() else {}
    added = {entry["content"]: entry["id"] for entry in table["added_tokens"]}
    model = table["model"]
    _check_fields(table, model, list((model["vocab"] | added).values()))
    ranks = {_spell(token): i for token, i in model["vocab"].items() if token not in added}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    _check_merges(ranks, [(_spell(left), _spell(right)) for left, right in merges],
                  bool(model.get("ignore_merges")))
    ranks |= {byte: MISSING + byte[0] for byte in BYTES if byte not in ranks}
    pattern = _split_pattern(table["pre_tokenizer"])
    encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=added)
    whole = encoding.encode_ordinary(PROBE)
    cut = [i for part in re.split(WORD_END, PROBE) for i in encoding.encode_ordinary(part)]
    if encoding.decode(whole) != PROBE or cut != whole or POSSESSIVE.search(pattern):
        raise ValueError(f"its pre_tokenizer {pattern!r} drops text, has words that go on after "
                         "white space, or has {n}+, which libraries read differently")

    steps = table.get("post_processor") or {}  # Llama-3's puts a token before a document
    first = [step["single"][0] for step in steps.get("processors", [steps])
             if step.get("type") == "TemplateProcessing"]
    bos = first[0].get("SpecialToken", {}).get("id") if first else None
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    names = [eos] if eos and eos not in TURN_ENDS else [*USUAL_ENDS, str(eos)]
    ends = [name for name in names if name in added]
    if not ends:
        raise ValueError("no added token is known to end a document: give eos_token in a "
                         "tokenizer_config.json beside it")
    files = [path, beside] if config else [path]
    return encoding, bos, ends[0], bool(table.get("normalizer")), files


def _spell(token: str) -> bytes:
    return bytes(LETTERS[letter] for letter in token)


def _check_fields(table: dict[str, Any], model: dict[str, Any], ids: list[Any]) -> None:
    """Raise ValueError for a setting that tiktoken does not have, by the name of its field."""
    checks = {f"model.{key}": not model.get(key) for key in (
        "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")}
    checks |= {
        "model.type": model.get("type", "BPE") == "BPE",
        "normalizer": table.get("normalizer") in (None, {"type": "NFC"}),
        "added_tokens": all(entry["special"] or re.fullmatch("<.*>", entry["content"])
                            for entry in table["added_tokens"]),
        "model.vocab": len({i for i in ids if type(i) is int and 0 <= i < MISSING}) == len(ids)}
    for field, is_exact in checks.items():
        if not is_exact:
            raise ValueError(f"its {field} is none that tiktoken would encode exactly alike")


def _split_pattern(entry: dict[str, Any]) -> str:
    """The regular expression that does what a pre_tokenizer does."""
    *first, last = entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]
    match first, last.get("use_regex", True):
        case _ if last["type"] != "ByteLevel" or last["add_prefix_space"]:
            pass
        case [], True:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True}], True:
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False}], False:
            return pattern
    raise ValueError("its pre_tokenizer is none of the makes of GPT-2, Llama-3, Qwen and SmolLM")


def _check_merges(ranks: Ranks, pairs: list[tuple[bytes, bytes]], whole_words: bool) -> None:
    """Compare BPE by a list of merges (Hugging Face) with BPE by ranks (tiktoken).

    tiktoken always merges the two neighbours that make the token of lowest rank. Both give the same
    ids if the list creates tokens in the order of their ids and holds the last pair of every token.
    A token that no merges can make must be looked up as a whole word, as in Llama-3.
    """
    tokens = {part for left, right in pairs for part in (left, right, left + right)}
    made = [ranks.get(left + right, MISSING) for left, right in pairs]
    if made != sorted(made) or not tokens <= ranks.keys():
        raise ValueError("its model.merges stand in another order, or merge what is no token")
    listed = {*pairs, *((byte,) for byte in BYTES)}
    for token in ranks:
        parts = last_parts(token, ranks)
        if parts not in listed and not (whole_words and len(parts) > 2):
            raise ValueError(f"its model.merges have no way to {token!r} that tiktoken would go")


def last_parts(token: bytes, ranks: Ranks) -> tuple[bytes, ...]:
    """Where BPE arrives before it makes a token: at two parts, if merges can make it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], MISSING), i)
                      for i in range(len(parts) - 1))
        if rank == MISSING:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What makes transformers encode as this tokenizer: its own files, or a tokenizer.json.

    Unlike here, transformers makes special tokens of text that looks like one.
    """
    if tokenizer.files:
        return {path.name: path.read_bytes() for path in tokenizer.files}
    ranks, begin = tokenizer.encoding._mergeable_ranks, tokenizer.begin
    names = {i: name for name, i in tokenizer.specials.items()}
    letters = {byte: letter for letter, byte in LETTERS.items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    last = [last_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in begin]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    table = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.encoding._pat_str},
             "behavior": "Isolated", "invert": False}, bytewise]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [*first, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}
                               for i in begin}},
        "decoder": bytewise,
        "added_tokens": [{"id": i, "content": names[i], **plain, "special": True} for i in names],
        "model": {"type": "BPE", "ignore_merges": True,
                  "vocab": {spelled[token]: rank for token, rank in ranks.items()},
                  "merges": [[spelled[part] for part in parts] for parts in last
                             if len(parts) == 2]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eos_id],
              "bos_token": names[begin[0]] if begin else None,
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}
