"""Text to token ids and back.

Byte-level BPE has three parts: a pattern that splits text into words, a table of byte strings in
the order in which they are merged, and special tokens. tiktoken runs it, from whichever file the
parts come (support/tokenizer_files.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from .tokenizer_files import MISSING, Loaded, cut_text, read_llama_model, read_tokenizer_json
from .tokenizer_files import tokenizer_files as tokenizer_files
from .toy import SYMBOL_NAMES


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
        """Text to ids, uint32 (n,). "<|end_of_text|>" inside a document is text, 15 letters.

        Raises ValueError for a byte that the tokenizer has no token for.
        """
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


def load_encoding(spec: str) -> Loaded:
    """Load "bytes", "tiktoken:NAME", or a file or folder. Raises ValueError for anything else."""
    if spec == "bytes":
        names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id",
                 "pair", "ask", *SYMBOL_NAMES)
        special = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}
        encoding = tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,256}", special_tokens=special,
                                     mergeable_ranks={bytes([i]): i for i in range(256)})
        return encoding, "<|begin_of_text|>", "<|end_of_text|>", False, []
    if spec.startswith("tiktoken:"):
        try:
            encoding = tiktoken.get_encoding(spec.partition(":")[2])
        except (ValueError, OSError) as error:
            raise ValueError(f"tokenizer {spec!r}: tiktoken has no such encoding in its cache "
                             f"({error}); put it there (TIKTOKEN_CACHE_DIR), or name a "
                             "tokenizer.json") from None
        return encoding, None, "<|endoftext|>", False, []
    path = Path(spec)
    if spec and path.is_dir():
        path /= "tokenizer.json" if (path / "tokenizer.json").is_file() else "tokenizer.model"
    if not spec or not path.is_file():
        raise ValueError(f"tokenizer {spec!r} is unknown; choose bytes, tiktoken:NAME, a folder "
                         "with a tokenizer.json or tokenizer.model, or such a file")
    try:
        return read_tokenizer_json(path) if path.suffix == ".json" else read_llama_model(path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a tokenizer that we can read exactly: {reason}") from None
