"""Tokenizer files in and out: Llama-3's tokenizer.model, and Hugging Face's tokenizer.json.

We refuse a tokenizer.json that tiktoken would not encode exactly as its own library does, and name
the field that makes the difference.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import tiktoken

from .files import read_json

Loaded = tuple[tiktoken.Encoding, str | None, str, bool, list[Path]]
#             encoding,           bos,        eos, NFC first?, its files
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM takes every digit out first: a digit ends white space as the end of the text does.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
MISSING = 2**31  # + byte: the id of a byte that is no token (SmolLM2 lacks 21); no text may have it

# Long texts are encoded in pieces, because tiktoken crashes on very long runs without a word break.
# We cut only after a letter or digit that is followed by a space or a full stop. Every supported
# tokenizer starts a new word there, so the ids do not change. Only a run of 64K characters without
# such a place (neither prose nor code) is cut anywhere, and may gain a token.
MAX_PIECE = 2**17
WORD_END = re.compile(r"[^\W_](?=[ \t\r\n.,。，])")


def cut_text(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > MAX_PIECE:
        place = WORD_END.search(text, begin + MAX_PIECE // 2, begin + MAX_PIECE)
        end = place.end() if place else begin + MAX_PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def read_llama_model(path: Path) -> Loaded:
    """Llama-3's tokenizer.model: a line a token, base64 and rank; 256 special tokens follow."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(lines))) or not ranks.keys() >= _ALL_BYTES:
            raise ValueError("ranks are not 0, 1, 2, ... with all 256 bytes among them")
    except ValueError as error:
        raise ValueError(f"it is not a table of base64 tokens and ranks as Llama-3's ({error}); "
                         "for another family give its tokenizer.json") from None
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(251))]
    names[6:6] = ["start_header_id", "end_header_id"]
    names[9:9] = ["eot_id"]
    special = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                                 special_tokens=special)
    return encoding, "<|begin_of_text|>", "<|end_of_text|>", False, [path]


_ALL_BYTES = {bytes([i]) for i in range(256)}


# --- 1. tokenizer.json ----------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> Loaded:
    """Turn a tokenizer.json into an Encoding. Raises ValueError where that is not exact."""
    table = read_json(path)
    model, added = table["model"], {entry["content"]: entry for entry in table["added_tokens"]}
    pattern = _check_parts(table, model, added)
    special = {name: entry["id"] for name, entry in added.items()}
    ids = model["vocab"] | special
    if (len(set(ids.values())) < len(ids) or max(map(len, ids)) > 4096
            or not all(type(i) is int and 0 <= i < 2 * len(ids) + 1000 for i in ids.values())):
        _refuse("model.vocab", len(ids), "ids must be whole numbers, each given once, with few "
                "left out, and no token longer than 4,096 bytes")
    letters = _byte_letters()
    try:
        ranks = {_spell(token, letters): i for token, i in model["vocab"].items()
                 if token not in added}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        pairs = [tuple(_spell(part, letters) for part in pair) for pair in merges]
    except KeyError as error:
        _refuse("model.vocab", str(error), "that character is not in the byte alphabet")
    ranks |= {byte: MISSING + byte[0] for byte in _ALL_BYTES - ranks.keys()}
    problem = _why_ranks_differ(ranks, pairs, bool(model.get("ignore_merges")))
    if problem:
        _refuse("model.merges", problem, "tiktoken, which merges by rank, would give other ids")
    encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    probe = "It's 3.14, naïve—don't  stop\n\n\tx_1 = [2048, ' ']\r\n中文，。 \u00a0e\u0301🙂\x1c "
    probe *= 3
    whole = encoding.encode_ordinary(probe)
    parts = map(encoding.encode_ordinary, re.split(rf"(?<={WORD_END.pattern})", probe))
    if encoding.decode(whole) != probe or list(itertools.chain(*parts)) != whole:
        _refuse("pre_tokenizer", pattern,
                "its pattern drops text, or has words that go on after white space")
    bos, eos = _begin_and_end(table, path.parent, added)
    files = [path, *(path.with_name(name) for name in SIDE_FILES if path.with_name(name).is_file())]
    return encoding, bos, eos, table.get("normalizer") == {"type": "NFC"}, files


def _refuse(field: str, value: Any, rule: str = "only byte-level BPE is exact here") -> NoReturn:
    raise ValueError(f"{field} is {json.dumps(value)[:200]}; {rule}")


def _check_parts(table: dict[str, Any], model: dict[str, Any], added: dict[str, Any]) -> str:
    """Check all but the table of tokens. Returns the pattern that splits text into words."""
    for field, wanted in (("type", "BPE"), ("dropout", None), ("continuing_subword_prefix", ""),
                          ("end_of_word_suffix", ""), ("byte_fallback", False)):
        if model.get(field, wanted) not in (wanted, wanted or None):
            _refuse(f"model.{field}", model[field])
    normalizer = table.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        _refuse("normalizer", normalizer, "only NFC or none is exact here")
    if (table.get("decoder") or {}).get("type") != "ByteLevel":
        _refuse("decoder", table.get("decoder"))
    for name, entry in added.items():
        if not entry["special"] and not (name.startswith("<") and name.endswith(">")):
            _refuse("added_tokens", entry, "tiktoken cannot match a word before BPE")
    pattern = _split_pattern(table.get("pre_tokenizer"))
    if pattern is None:
        _refuse("pre_tokenizer", table.get("pre_tokenizer"),
                "only ByteLevel without a prefix space, after one Split or Digits, is exact here")
    return pattern


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own letters, the 68 others borrow from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _spell(token: str, letters: dict[str, int]) -> bytes:
    return bytes(letters[letter] for letter in token)


def _split_pattern(entry: Any) -> str | None:
    """The regular expression that does what a pre_tokenizer does, or None."""
    steps = entry["pretokenizers"] if (entry or {}).get("type") == "Sequence" else [entry]
    last = steps[-1] or {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    match steps[:-1], last.get("use_regex", True):
        case [], True:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True}], True:
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False}], False:
            return pattern
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed",
               "invert": True}], False:
            return pattern
    return None


def _why_ranks_differ(ranks: dict[bytes, int], pairs: list[tuple[bytes, ...]],
                      ignore_merges: bool) -> str:
    """Compare BPE by a list of merges (Hugging Face) with BPE by ranks (tiktoken): "" if equal.

    tiktoken always merges the two neighbours that make the token of lowest rank. Both give the same
    ids if (1) the list creates tokens in the order of their ids and (2) for every token, the list
    contains the pair that BPE reaches when it may use only tokens with smaller ids (or every pair
    that spells the token).
    """
    before = 0
    for pair in pairs:
        if max(ranks.get(part, MISSING) for part in pair) >= MISSING:
            return f"{pair} merges what is no token"
        made = ranks.get(b"".join(pair), -1)
        if made < before:
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
    """The tokens that begin and end a document.

    The post_processor puts the first one (Llama-3's does, GPT-2's and Qwen's do not). The last one
    is the eos_token of the files beside, or else one of the usual names.
    """
    steps = table.get("post_processor") or {}
    first = [step["single"][0] for step in steps.get("processors", [steps])
             if step.get("type") == "TemplateProcessing"]
    bos = first[0].get("SpecialToken", {}).get("id") if first else None
    names = []
    for file in SIDE_FILES:
        if (folder / file).is_file():
            eos = read_json(folder / file).get("eos_token")
            names.append(eos.get("content") if isinstance(eos, dict) else eos)
    for name in [*names, "<|end_of_text|>", "<|endoftext|>", "</s>"]:
        if name in added:
            return bos, name
    _refuse("added_tokens", list(added), "none is known to end a document: give eos_token in a "
                                         "tokenizer_config.json beside it")


# --- 2. Writing -----------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What makes transformers encode as this tokenizer: its own files, or a tokenizer.json.

    The list of merges is written from the ranks: for each token, the two parts that BPE reaches
    with lower ranks. Unlike here, transformers makes special tokens of text that looks like one.
    """
    found = {path.name: path.read_bytes() for path in tokenizer.files}
    if "tokenizer.json" in found:
        return found
    encoding = tokenizer.encoding
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    merges = [_merge_below(token, rank, ranks) for token, rank in by_rank]

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    names = {i: name for name, i in encoding._special_tokens.items()}
    text, other = ({"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB"))
    begin, first = tokenizer.begin, [names[i] for i in tokenizer.begin]
    template = {
        "type": "TemplateProcessing", "pair": [text, other],
        "single": [*({"SpecialToken": {"id": name, "type_id": 0}} for name in first), text],
        "special_tokens": {name: {"id": name, "ids": begin, "tokens": [name]} for name in first}}
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated",
             "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    table = {
        "version": "1.0", "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]},
        "post_processor": template if first else bytewise, "decoder": bytewise,
        "added_tokens": [{"id": i, "content": names[i], **plain} for i in sorted(names)],
        "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()},
                  "merges": [[spell(part) for part in pair] for pair in merges if len(pair) == 2]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[tokenizer.eos_id],
              "bos_token": first[0] if first else None, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(table, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}
