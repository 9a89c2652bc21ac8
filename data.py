"""The data: documents become packed sequences, sequences are mixed, and batches go to the model.

    raw text --tokenize--> documents --pack--> sequences --mix--> one step's sequences --> batches

How documents are laid out in a sequence decides what a model can learn about long context. The paper
(2410.02660, A.2) has two rules. Here they pack documents a (11 tokens), b (3), c (7) and d (4) into
sequences of 8 tokens:

    long    drop documents shorter than a sequence, cut the others, drop what is left over

            a a a a a a a a                         doc_lens (8,)
                                                    b, c, d and the last 3 tokens of a are gone

    short   lay all documents end to end; what a cut leaves over begins the next sequence

            a a a a a a a a | a a a b b b c c | c c c c c d d d        the last d waits for more
            (8,)              (3, 3, 2)         (5, 3)

A sequence is exactly seq_len tokens and its `doc_lens`, the lengths of the documents in it. The model
uses them to keep attention inside each document (model.py). A mixture then gives every domain its share
of the tokens, in an order that any rank can compute from the seed alone.

Nothing needs to be downloaded: every Python installation holds megabytes of code and prose. Text of
your own, here a folder of repositories, is tokenized once and packed as often as you like:

    python data.py pack --domain code_repos-2k --seq 2k --sequences 500 --out packs/code_repos-2k
    python data.py inspect packs/code_repos-2k
    python data.py tokenize --input ~/src --format repos --tokenizer llama3/tokenizer.model --out docs/code
    python data.py pack --from docs/code --domain code_repos-64k --seq 64k --out packs/code_repos-64k

Sources: ProLong section 3, A.2, Table 9. ProLong packs in another project; here it is part of the recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support import installed, mds, report, texts, tokenizers, toy
from support.cli import (  # noqa: F401 (data.parse_length and its like are public names)
    add_config_args,
    format_length,
    option,
    parse_cli,
    parse_length,
    run_main,
)
from support.files import read_json, read_meta, whole_folder, write_json
from support.installed import generator

IGNORE_INDEX = -100  # the label of a token that is not trained on

# --- 1. Packing -----------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class PackedSequence:
    """Exactly seq_len tokens, and the lengths of the documents in it."""

    input_ids: np.ndarray  # (S,) uint32
    doc_lens: tuple[int, ...]  # adds up to S
    loss_mask: np.ndarray | None = None  # (S,) bool
    source: str = ""  # where it lies, for messages: "recall-2k[17]"


@dataclass
class PackReport:
    """Counts what became of the tokens: tokens_in = tokens_packed + tokens_dropped, always."""

    documents_in: int = 0
    documents_dropped: int = 0  # not one token of these was packed: too short for pack_long, or too long
    tokens_in: int = 0
    tokens_packed: int = 0

    @property
    def tokens_dropped(self) -> int:
        """Tokens of short documents, tokens cut off, and those read after the last whole sequence."""
        return self.tokens_in - self.tokens_packed


def pack_long(documents: Iterable[Document], doc_len: int, seq_len: int | None = None,
              report: PackReport | None = None, below: float = math.inf) -> Iterator[PackedSequence]:
    """Cut documents into pieces of exactly `doc_len`, and lay seq_len / doc_len of them in a sequence.

    Shorter documents are dropped, and so is what remains of a document after its last whole piece. In its
    512K stage the paper also packs pieces of 64K. It takes those from documents `below` 512K, because the
    longer ones are in the stage already (A.2). Raises ValueError if `doc_len` does not divide `seq_len`.
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

    Tokens that do not fill a last sequence are dropped. With `ranks` we also cut at every rank's share of
    the sequence. Then no document lies on two ranks, and sequence parallelism has nothing to exchange; no
    more tokens are dropped. Raises ValueError if the ranks' shares are not equal. Source: A.2.
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
        while len(document) > 0:
            cut = (room - 1) % share + 1  # tokens to the end of this rank's share
            piece, document = document[:cut], document[cut:]
            pieces.append(piece)
            room -= len(piece)
            if room == 0:
                report.tokens_packed += seq_len
                yield _join(pieces)
                pieces, room = [], seq_len
            if not carry_tail:
                break


def pack_sft(documents: Iterable[Document], seq_len: int,
             report: PackReport | None = None) -> Iterator[PackedSequence]:
    """Pack conversations. As pack_short, but a cut tail is dropped: it would lack its question (A.2)."""
    return pack_short(documents, seq_len, report, carry_tail=False)


def _join(pieces: list[Document]) -> PackedSequence:
    ids = np.concatenate([piece.input_ids for piece in pieces])
    mask = None
    if any(piece.loss_mask is not None for piece in pieces):
        mask = np.concatenate([_mask_of(piece) for piece in pieces])
    return PackedSequence(ids, tuple(len(piece) for piece in pieces), mask)


def _mask_of(part: Document | PackedSequence) -> np.ndarray:
    return np.ones(len(part.input_ids), bool) if part.loss_mask is None else part.loss_mask


# --- 2. Packed sequences on disk ------------------------------------------------------------------
#
#     packs/code_repos-2k/
#         input_ids.bin   uint32 (sequences, seq_len)      plain memory maps: training needs numpy alone
#         doc_lens.bin    uint32 (documents,)              all sequences' doc_lens, one after another
#         doc_ends.bin    int64  (sequences,)              where in doc_lens each sequence's part ends
#         loss_mask.bin   bool   (sequences, seq_len)      only if some tokens are not trained on
#         meta.json       sizes, tokenizer and its fingerprint, domain, seed, and what was dropped

FORMAT = "nanolong-packed-2"
_META = {"format": str, "domain": str, "tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int,
         "max_id": int, "seq_len": int, "sequences": int, "documents": int, "has_loss_mask": bool,
         "seed": int, "tokens_dropped": int, "sha256": str}


class NothingPacked(ValueError):
    """No document fills a sequence."""


def write_packed(folder: str | Path, sequences: Iterable[PackedSequence], tokenizer: Tokenizer,
                 seq_len: int, domain: str, seed: int, report: PackReport) -> None:
    """Write a packed set, whole or not at all: into a folder beside it that is renamed at the end.

    Raises NothingPacked if no sequence came, and ValueError for a token id that the tokenizer lacks.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --out, or remove it")
    max_id, has_mask = 0, False
    ends: list[int] = []
    with whole_folder(folder) as aside:
        with (open(aside / "input_ids.bin", "wb") as ids, open(aside / "doc_lens.bin", "wb") as lens,
              open(aside / "loss_mask.bin", "wb") as masks):
            for sequence in sequences:
                assert sequence.input_ids.shape == (seq_len,) and sequence.input_ids.dtype == np.uint32
                ids.write(sequence.input_ids.data)
                lens.write(np.array(sequence.doc_lens, np.uint32).data)
                masks.write(_mask_of(sequence).data)
                has_mask = has_mask or sequence.loss_mask is not None
                ends.append((ends[-1] if ends else 0) + len(sequence.doc_lens))
                max_id = max(max_id, int(sequence.input_ids.max()))
        if not ends:
            raise NothingPacked(f"domain {domain}: none of its {report.documents_in} documents "
                                f"({report.tokens_in:,} tokens) fills a sequence of {seq_len:,} tokens; "
                                "choose a shorter length or longer documents")
        if not has_mask:
            (aside / "loss_mask.bin").unlink()
        (aside / "doc_ends.bin").write_bytes(np.array(ends, np.int64).tobytes())
        _check_ids(folder, max_id, tokenizer.vocab_size)
        write_json(aside / "meta.json", {
            "format": FORMAT, "domain": domain, "tokenizer": tokenizer.spec,
            "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
            "max_id": max_id, "seq_len": seq_len, "sequences": len(ends), "documents": ends[-1],
            "has_loss_mask": has_mask, "seed": seed, "tokens_dropped": report.tokens_dropped,
            "sha256": _sha256(aside)})


def _sha256(folder: Path) -> str:
    """One checksum of all the content, from the checksums of its files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_ids(folder: Path, max_id: int, vocab_size: int) -> None:
    if max_id >= vocab_size:
        raise ValueError(f"{folder} has token id {max_id:,}, but there are only {vocab_size:,}; use the "
                         "tokenizer and the model that belong together")


def check_tokenizer(folder: str | Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError if a folder, packed or tokenized, was made with another tokenizer."""
    if (meta["tokenizer_fingerprint"], meta["vocab_size"]) != (tokenizer.fingerprint, tokenizer.vocab_size):
        raise ValueError(f"{folder} was made with tokenizer {meta['tokenizer']!r} "
                         f"({meta['tokenizer_fingerprint']}), this is {tokenizer.spec!r} "
                         f"({tokenizer.fingerprint}); make it again with this one")


class PackedDataset:
    """A packed set as memory maps: `dataset[i]` is a PackedSequence, read from disk when it is used.

    Sizes are checked here, at opening. If a file is cut later, reading it kills the process (SIGBUS).
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder. Raises ValueError if its meta.json and its files do not agree."""
        self.folder = Path(folder)
        self.meta = read_meta(self.folder, _META, FORMAT, "pack")
        n, seq_len, documents = (self.meta[key] for key in ("sequences", "seq_len", "documents"))
        if not 0 < n <= documents or not 0 < seq_len < 2**32:
            raise ValueError(f"{self.folder / 'meta.json'}: {documents} documents in {n} sequences of "
                             f"{seq_len} tokens cannot be")
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
        path = self.folder / name
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        size = os.stat(path).st_size if os.path.isfile(path) else 0
        if size != wanted:
            raise ValueError(f"{path} has {size:,} bytes where meta.json says {wanted:,}; the folder is "
                             "damaged, pack it again")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> PackedSequence:
        begin = int(self.doc_ends[i - 1]) if i else 0
        doc_lens = tuple(self.doc_lens[begin:int(self.doc_ends[i])].tolist())
        mask = None if self.loss_mask is None else self.loss_mask[i]
        return PackedSequence(self.input_ids[i], doc_lens, mask, f"{self.folder.name}[{i}]")

    @property
    def trained_share(self) -> float:
        """The share of its tokens that are trained on."""
        return 1.0 if self.loss_mask is None else float(self.loss_mask.mean())

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a token has no place in a model's vocabulary."""
        _check_ids(self.folder, self.meta["max_id"], vocab_size)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the folder was packed with another tokenizer."""
        check_tokenizer(self.folder, self.meta, tokenizer)

    def check_content(self) -> None:
        """Read all of it. Raise ValueError if a byte is not as it was packed."""
        if _sha256(self.folder) != self.meta["sha256"]:
            raise ValueError(f"{self.folder} is not as it was packed: its sha256 is not what meta.json says; "
                             "pack it again")


# --- 3. The mixture -------------------------------------------------------------------------------


class Mixture:
    """Draws sequences so that every domain has its share of tokens, in an order fixed by the seed.

    All sequences are equally long, so a share of tokens is a share of sequences. Each draw takes the most
    urgent domain: among those that have had less than their share, the one whose next sequence is due first.
    So after any n draws, a domain with share s has had s * n sequences, to within one. Inside a domain,
    every epoch has a new random order. `drawn`, how many sequences each domain has given, is all its state.
    """

    def __init__(self, datasets: Mapping[str, PackedDataset], shares: dict[str, float], seed: int) -> None:
        """Raises ValueError for shares that are negative, not finite, all zero, or of no dataset."""
        check_shares(shares)
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items() if share > 0}
        missing = sorted(self.shares.keys() - datasets.keys())
        if missing:
            raise ValueError(f"the mixture names {missing[0]!r}, but there is only "
                             f"{', '.join(datasets) or 'nothing'}")
        self.datasets = {name: datasets[name] for name in self.shares}
        self.seed = seed
        self.drawn = dict.fromkeys(self.shares, 0)

    def draw(self, n: int) -> list[PackedSequence]:
        """The next `n` sequences."""
        return [self._next() for _ in range(n)]

    def _next(self) -> PackedSequence:
        n = sum(self.drawn.values())
        behind = [name for name, share in self.shares.items() if share * (n + 1) > self.drawn[name] + 1e-9]
        name = min(behind, key=lambda name: (self.drawn[name] + 1) / self.shares[name])  # due at this draw
        dataset = self.datasets[name]
        epoch, i = divmod(self.drawn[name], len(dataset))
        self.drawn[name] += 1
        return dataset[int(_permutation(self.seed, name, epoch, len(dataset))[i])]

    def resume(self, drawn: dict[str, int]) -> None:
        """Go on where `drawn` says. Raises ValueError if that is not a state of this mixture."""
        if drawn.keys() != self.drawn.keys() or not all(type(n) is int and n >= 0 for n in drawn.values()):
            raise ValueError(f"the data's cursor {drawn} does not belong to the mixture of "
                             f"{', '.join(self.drawn)}; start anew with --init instead of --resume")
        self.drawn = dict(drawn)

    def epochs(self) -> dict[str, float]:
        """How often each domain has been seen so far; above 1 sequences repeat."""
        return {name: self.drawn[name] / len(self.datasets[name]) for name in self.shares}


@cache
def _permutation(seed: int, name: str, epoch: int, n: int) -> np.ndarray:
    return generator(seed, name, epoch).permutation(n)


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


# --- 4. Batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packed sequences laid end to end, T tokens, with labels already shifted.

    The label of a token is the token after it. The last token of a document has none, because the next
    token belongs to another document. So a document of n tokens trains at most n - 1 of them.
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, IGNORE_INDEX where nothing is trained
    doc_lens: tuple[int, ...]
    sources: tuple[str, ...]

    def shard(self, sp_rank: int, sp_size: int) -> tuple[Tensor, Tensor]:
        """The tokens and labels that one of `sp_size` ranks holds: a consecutive share of each.

        Labels were shifted before this cut, so no target is lost at a rank's boundary.
        """
        share = len(self.input_ids) // sp_size
        assert share * sp_size == len(self.input_ids)
        mine = slice(sp_rank * share, (sp_rank + 1) * share)
        return self.input_ids[mine], self.labels[mine]  # (T,) -> (T / P,)


def make_batch(sequences: Sequence[PackedSequence]) -> Batch:
    """Join sequences. A loss mask says which tokens are trained on *as targets*."""
    ids = np.concatenate([s.input_ids for s in sequences], dtype=np.int64)
    doc_lens = tuple(n for s in sequences for n in s.doc_lens)
    labels = np.empty_like(ids)
    labels[:-1] = ids[1:]
    if any(s.loss_mask is not None for s in sequences):
        mask = np.concatenate([_mask_of(s) for s in sequences])
        labels[:-1][~mask[1:]] = IGNORE_INDEX
    labels[np.cumsum(doc_lens) - 1] = IGNORE_INDEX  # the last token of each document
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), doc_lens,
                 tuple(s.source for s in sequences))


def arrange_step(sequences: Sequence[PackedSequence], dp_size: int, per_batch: int,
                 reorder: bool = True) -> list[list[list[PackedSequence]]]:
    """Deal one step's sequences to [micro-step][dp rank], so that ranks side by side have like costs.

    At every micro-step, all ranks wait for the slowest. Attention costs the sum of squared document
    lengths, so we sort sequences by it. The step's summed gradient does not change (A.3, Table 15:
    +11.7% throughput). `reorder` False keeps the drawn order, to compare.
    """
    if reorder:
        sequences = sorted(sequences, key=lambda s: sum(n * n for n in s.doc_lens))
    parts = [list(sequences[i:i + per_batch]) for i in range(0, len(sequences), per_batch)]
    return [parts[i:i + dp_size] for i in range(0, len(parts), dp_size)]


# --- 5. The tokenizer -----------------------------------------------------------------------------


class Tokenizer:
    """A `tiktoken.Encoding` with the names that the recipe uses, and a fingerprint of its whole table.

    `encode` treats everything as ordinary text: "<|end_of_text|>" inside a document is 15 letters.
    """

    def __init__(self, spec: str, encoding: Any, bos: str | None, eos: str, nfc: bool = False,
                 files: Sequence[Path] = ()) -> None:
        self.spec, self.encoding, self.nfc = spec, encoding, nfc
        self.files = tuple(files)  # a checkpoint copies them, so that it brings its tokenizer along
        ids = [*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()]
        self.vocab_size = 1 + max(i for i in ids if i < tokenizers.MISSING)
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
        """Text to ids, uint32 (n,). Raises ValueError for a byte that the tokenizer has no token for."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        parts = [self.encoding.encode_to_numpy(part, disallowed_special=())
                 for part in tokenizers.cut_text(text)]
        ids = np.concatenate(parts)
        if len(ids) and ids.max() >= tokenizers.MISSING:
            raise ValueError(f"has byte {ids.max() - tokenizers.MISSING:#04x}, which is no token of "
                             f"tokenizer {self.spec!r}")
        return ids

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The same, but "<|...|>" are special tokens. Raises ValueError for one that there is not."""
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


@cache
def load_tokenizer(spec: str = "bytes") -> Tokenizer:
    """Load a tokenizer; nothing is downloaded that tiktoken does not have in its cache.

        bytes             256 byte values, Llama-3's special tokens and the symbols of recall documents
        FOLDER or FILE    tokenizer.json of the byte-level BPE family, or Llama-3's tokenizer.model
        tiktoken:gpt2     an encoding that tiktoken knows by name

    Raises ValueError for anything else, and for a file that we would not encode exactly as its library does.
    """
    return Tokenizer(spec, *tokenizers.load_encoding(spec))


def tokenizer_for(model_folder: str | Path, spec: str) -> Tokenizer:
    """Load `spec`, for the model in a folder. Raises ValueError if the folder brings another tokenizer.

    To the model, ids of another tokenizer are other words, and only bad scores would show it.
    """
    tokenizer, own = load_tokenizer(spec), Path(model_folder) / "tokenizer.json"
    if own.is_file() and load_tokenizer(str(model_folder)).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{own} is another tokenizer than {spec!r}; write --tokenizer {model_folder}")
    return tokenizer


# --- 6. Domains that need no download -------------------------------------------------------------
#
# Real text first: the code and prose of the installed Python (section 3.1). Then two synthetic domains
# that teach a tiny model what a released checkpoint already knows: to look things up (recall), and to
# learn from examples (icl). support/toy.py draws and explains them.


def code_repos(tokenizer: Tokenizer, seed: int, held_out: bool = False) -> Iterator[Document]:
    """Each repository is one document: all its files in a seeded random order, joined (section 3.1).

    Other work orders files by dependency. The paper does not: random order keeps related files far apart.
    """
    repositories = installed.list_repositories(held_out)
    names = list(repositories)
    for i in generator(seed, "repositories").permutation(len(names)):
        files = repositories[names[i]]
        order = generator(seed, names[i]).permutation(len(files))
        yield tokenizer.document(installed.join_files(files[j] for j in order))


LONGEST_BOOK = 2**18  # for longer documents, the books of a subject are joined


def textbooks(tokenizer: Tokenizer, seed: int, length: int = 0) -> Iterator[Document]:
    """Prose, chapters joined to books: Python's language reference, then each package's docstrings.

    The paper joins the chapters of a book, and the books of a subject (A.2). Here a module's docstring is a
    chapter and a package a book. No book is as long as 512K, so beyond 256K all books together are the one
    subject, Python. The order is the same for every seed.
    """
    books: Iterable[str] = installed.books()
    if length > LONGEST_BOOK:
        books = ["\n\n".join(books)]
    return (tokenizer.document(book) for book in books)


def short(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """The mixture's short part: each function and class of the installed packages is a document."""
    files = [path for paths in installed.list_repositories().values() for path in paths[:50]]
    for i in generator(seed, "short").permutation(len(files)):
        for source in installed.functions_and_classes(files[i]):
            yield tokenizer.document(source)


@cache
def haystack_text(tokenizer: Tokenizer, seed: int, held_out: bool) -> np.ndarray:
    """Two million tokens of real code."""
    parts: list[np.ndarray] = []
    for document in code_repos(tokenizer, seed, held_out):
        parts.append(document.input_ids[1:-1])
        if sum(len(part) for part in parts) > 2**21:
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
    return text[begins + np.arange(length)]  # (batch, 1) + (length,) -> (batch, length)


def recall_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                     seed: int) -> Iterator[Document]:
    """Pairs scattered in real code, and a question about each at the end."""
    pairs, room = toy.pairs_and_room(rng, batch, length)
    haystack = haystack_windows(tokenizer, rng, batch, room, seed)
    ids, mask = toy.recall_rows(rng, pairs, haystack, tokenizer.bos_id, tokenizer.eos_id)
    return (Document(row, mask) for row in ids)


def bare_recall_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                          seed: int) -> Iterator[Document]:
    """The same with only blanks between the pairs: the ability without the search."""
    pairs, room = toy.pairs_and_room(rng, batch, length)
    haystack = np.full((batch, room), toy.BLANK, np.uint32)
    ids, mask = toy.recall_rows(rng, pairs, haystack, tokenizer.bos_id, tokenizer.eos_id)
    return (Document(row, mask) for row in ids)


def icl_documents(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                  seed: int) -> Iterator[Document]:
    """Labelled examples; the labels are trained from the second round of topics on."""
    ids, mask = toy.icl_rows(rng, batch, length, tokenizer.bos_id, tokenizer.eos_id)
    return (Document(row, mask) for row in ids)


Maker = Callable[[Tokenizer, np.random.Generator, int, int, int], Iterator[Document]]
#                 (tokenizer, rng, batch, length, seed) -> `batch` documents of exactly `length` tokens


def _halved(make: Maker, shortest: int, n_lengths: int) -> Callable[..., Iterator[Document]]:
    """Documents of `longest` tokens, of half as many, a quarter, ...: at most `n_lengths` lengths.

    Each length gets the same number of *tokens*. With the same number of documents, almost all tokens would
    be in the longest ones. But a model learns from the shortest first, and they help it to learn the rest.
    """

    def documents(tokenizer: Tokenizer, seed: int, longest: int) -> Iterator[Document]:
        if longest % shortest or (longest // shortest).bit_count() != 1:
            raise ValueError(f"documents of this domain cannot be {longest} tokens long; choose {shortest} "
                             "times a power of 2")
        rng = generator(seed, make.__name__, longest)
        lengths = [longest >> i for i in reversed(range(n_lengths)) if longest >> i >= shortest]
        return itertools.chain.from_iterable(make(tokenizer, rng, longest // length, length, seed)
                                             for length in itertools.cycle(lengths))

    return documents


LONG_DOMAINS = {"code_repos": code_repos, "textbooks": textbooks}
SHORT_DOMAINS = {"short": short}
SYNTHETIC_DOMAINS = {
    "recall_bare": _halved(bare_recall_documents, shortest=32, n_lengths=4),  # 2, 4, 8, 16 pairs in 256
    "recall": _halved(recall_documents, shortest=32, n_lengths=3),
    "icl": _halved(icl_documents, shortest=64, n_lengths=3),
}
REAL_TEXT = LONG_DOMAINS.keys() | SHORT_DOMAINS.keys()


@dataclass(frozen=True)
class Domain:
    """A part of the mixture, as "recall-2k": its name, and the length of its (longest) documents."""

    name: str
    length: int | None  # None: short documents of any length


def parse_domain(text: str) -> Domain:
    """Read "recall-2k" or "short". Raises ValueError for what is no length."""
    name, dash, length = text.partition("-")
    return Domain(name, parse_length(length) if dash else None)


def pack_builtin(domain: str, tokenizer: Tokenizer, seq_len: int, seed: int, report: PackReport,
                 ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack an embedded domain: "short", or a name with its longest document, as in "code_repos-2k"."""
    name, length = dataclasses.astuple(parse_domain(domain))
    if name in SHORT_DOMAINS and length is None:
        return pack_short(SHORT_DOMAINS[name](tokenizer, seed), seq_len, report, ranks=ranks)
    if ranks != 1:
        raise ValueError(f"--ranks cuts short documents; those of {domain!r} keep their length")
    if length is None or name not in LONG_DOMAINS | SYNTHETIC_DOMAINS:
        known = [*SHORT_DOMAINS, *(f"{n}-LENGTH" for n in LONG_DOMAINS | SYNTHETIC_DOMAINS)]
        raise ValueError(f"domain {domain!r} is unknown; choose one of {', '.join(known)}, "
                         "where LENGTH is that of the longest document, as in 2k")
    if name in SYNTHETIC_DOMAINS:
        if seq_len % length:
            raise ValueError(f"documents of {domain} do not fit sequences of {seq_len:,} tokens whole; "
                             "choose a divisor as their length")
        return pack_short(SYNTHETIC_DOMAINS[name](tokenizer, seed, length), seq_len, report)
    documents = (textbooks(tokenizer, seed, length) if name == "textbooks" else
                 LONG_DOMAINS[name](tokenizer, seed))
    return pack_long(documents, length, seq_len, report)


def pack_domain(folder: str | Path, domain: str, n: int, tokenizer: Tokenizer, seq_len: int,
                seed: int) -> None:
    """Write the first `n` sequences of an embedded domain. Raises NothingPacked if there is none."""
    report = PackReport()
    sequences = itertools.islice(pack_builtin(domain, tokenizer, seq_len, seed, report), n)
    write_packed(folder, sequences, tokenizer, seq_len, domain, seed, report)


# --- 7. Text from outside -------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeConfig:
    input: str = option("", "a file, a folder, or with --format hub the name of a data set")
    format: str = option("auto", "auto, jsonl, parquet, arrow, text (a file a document), repos (a folder of "
                                 "repositories) or hub")
    text_column: str = option("text", "the column that holds the text")
    subset: str | None = option(None, "configuration of a hub data set, as in sample-10BT")
    split: str = option("train", "split of a hub data set")
    on_bad: str = option("stop", "at a row without usable text: stop, or skip (counted)")
    max_document_bytes: int = option(2**26, "longer rows are bad; longer repositories are cut", parse_length)
    shard_tokens: int = option(2**24, "tokens of a shard: a crash loses one, packing holds one", parse_length)
    workers: int = option(os.cpu_count() or 1, "threads that tokenize", parse_length)
    tokenizer: str = option("bytes", "bytes, tiktoken:NAME, or a tokenizer.json or tokenizer.model")
    out: str = option("documents", "the folder to write; run again, it goes on where it stopped")
    seed: int = option(0, "seed of the order of a repository's files", int)


def tokenize(config: TokenizeConfig) -> None:
    """Tokenize a source into a folder of documents, shard by shard. Run again after a crash, it goes on."""
    tokenizer = load_tokenizer(config.tokenizer)
    rows = texts.read_rows(config.input, config.format, config.subset, config.split,
                           config.max_document_bytes, config.seed)
    about = {"tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size,
             "tokenizer_fingerprint": tokenizer.fingerprint}
    job = dataclasses.asdict(config) | {"fingerprint": tokenizer.fingerprint}
    texts.write_documents(Path(config.out), job, about, texts.read_texts(rows, config.text_column),
                          lambda text: tokenizer.document(text).input_ids)
    inspect(config.out)


def read_tokenized(folder: str | Path, seed: int) -> Iterator[Document]:
    """All documents of a tokenized folder: its shards in random order, and in each its documents.

    One shard is in memory at a time, and read from end to end. A.2 samples documents at random from the
    whole; on a large disk that would be one seek for each.
    """
    meta = read_meta(Path(folder), texts.META, texts.FORMAT, "tokenize")
    for shard in generator(seed, "shards").permutation(meta["shards"]):
        documents = texts.read_shard(Path(folder) / f"{shard:05d}")
        for i in generator(seed, "documents", int(shard)).permutation(len(documents)):
            yield Document(documents[i])


def pack_tokenized(folder: str, rule: str, domain: str, seq_len: int, seed: int, report: PackReport,
                   ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack a tokenized folder by a rule of A.2: long, short or sft; auto is long for a NAME-LENGTH domain.

    With shorter documents than sequences, "books-64k" in sequences of 512K, documents of 512K and more are
    left to the domain that has them whole, "books-512k": no document is in both.
    """
    length = parse_domain(domain).length
    if rule == "auto":
        rule = "short" if length is None else "long"
    documents = read_tokenized(folder, seed)
    if rule != "short" and ranks != 1:
        raise ValueError(f"--ranks cuts short documents; rule {rule!r} keeps theirs as they are")
    if rule == "long":
        doc_len = length or seq_len
        return pack_long(documents, doc_len, seq_len, report, seq_len if doc_len < seq_len else math.inf)
    if rule == "short":
        return pack_short(documents, seq_len, report, ranks=ranks)
    if rule == "sft":
        return pack_sft(documents, seq_len, report)
    raise ValueError(f"--rule {rule!r} is unknown; choose auto, long, short or sft")


def pack_mds(folder: str | Path, seq_len: int, report: PackReport | None = None) -> Iterator[PackedSequence]:
    """The packed sequences of a mosaicml-streaming folder, as ProLong's own: boundaries and masks intact."""
    report = report if report is not None else PackReport()
    for ids, doc_lens, mask in mds.read_mds(folder, seq_len):
        report.documents_in += len(doc_lens)
        report.tokens_in += seq_len
        report.tokens_packed += seq_len
        yield PackedSequence(ids, doc_lens, mask)


# --- 8. Tokenize, pack and inspect from the command line ------------------------------------------


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
    counts, enough, seq_len = PackReport(), config.sequences, config.seq
    if config.from_ and config.from_mds:
        raise ValueError("--from and --from-mds are two sources; give one")
    if (config.rule != "auto" and not config.from_) or (config.from_mds and config.ranks != 1):
        raise ValueError("--rule is for documents that --from names, --ranks is not for --from-mds; drop it")
    if config.from_:
        meta = read_meta(Path(config.from_), texts.META, texts.FORMAT, "tokenize")
        tokenizer = load_tokenizer(config.tokenizer or meta["tokenizer"])
        check_tokenizer(config.from_, meta, tokenizer)
        sequences = pack_tokenized(config.from_, config.rule, config.domain, seq_len, config.seed, counts,
                                   config.ranks)
    elif config.from_mds:
        tokenizer = load_tokenizer(config.tokenizer or "bytes")
        sequences = pack_mds(config.from_mds, seq_len, counts)
    else:
        tokenizer, enough = load_tokenizer(config.tokenizer or "bytes"), enough or 1000
        sequences = pack_builtin(config.domain, tokenizer, seq_len, config.seed, counts, config.ranks)
    bar = tqdm(itertools.islice(sequences, enough), unit=" sequences", disable=not sys.stderr.isatty())
    write_packed(config.out, bar, tokenizer, seq_len, config.domain, config.seed, counts)
    print(f"documents in {counts.documents_in:,} ({counts.tokens_in:,} tokens), of no use whole "
          f"{counts.documents_dropped:,}; tokens packed {counts.tokens_packed:,}, "
          f"dropped {counts.tokens_dropped:,}")
    inspect(config.out)


def inspect(folder: str, check: bool = False) -> None:
    """Say what a folder holds: tokenized documents, packed sequences, or several packed domains.

    With `check` (--check), read all of the packed ones and compare their checksums.
    """
    path = Path(folder)
    domains = [entry.parent for entry in sorted(path.glob("*/meta.json")) if _is_packed(entry.parent)]
    datasets = [PackedDataset(entry) for entry in ([path] if _is_packed(path) else domains)]
    for dataset in datasets:
        if check:
            dataset.check_content()
    if not datasets:
        meta = read_meta(path, texts.META, texts.FORMAT, "tokenize")
        print(f"{folder}: {meta['documents']:,} documents, {meta['tokens']:,} tokens in {meta['shards']} "
              f"shards, tokenizer {meta['tokenizer']}; {meta['bad']:,} of {meta['rows']:,} rows skipped")
        lens = np.concatenate([np.diff(np.fromfile(file, np.int64), prepend=0)
                               for file in sorted(path.glob("*/doc_ends.bin"))])
        print(report.format_lengths(lens))
    elif _is_packed(path):
        _inspect_packed(datasets[0])
    else:
        total = sum(dataset.input_ids.size for dataset in datasets)
        for dataset in datasets:
            tokens, meta = dataset.input_ids.size, dataset.meta
            print(f"{tokens / total:>6.1%} {dataset.folder.name:<20} {len(dataset):>8,} sequences x "
                  f"{dataset.seq_len:,} = {tokens:,} tokens, {meta['documents']:,} documents, tokenizer "
                  f"{meta['tokenizer_fingerprint']}")


def _is_packed(folder: Path) -> bool:
    return (folder / "meta.json").is_file() and read_json(folder / "meta.json").get("format") == FORMAT


def _inspect_packed(dataset: PackedDataset) -> None:
    """Print counts, lengths, a picture of sequences and the text around a document's end; draw a figure."""
    meta, lens = dataset.meta, np.array(dataset.doc_lens, np.int64)
    print(f"{dataset.folder}: {meta['domain']}, {len(dataset):,} sequences x {dataset.seq_len:,} tokens, "
          f"{len(lens):,} documents, tokenizer {meta['tokenizer']}, sha256 {meta['sha256'][:12]}")
    print(report.format_lengths(lens))
    print(f"trained tokens: {dataset.trained_share:.1%}; dropped while packing: {meta['tokens_dropped']:,}")
    for i in range(min(4, len(dataset))):
        print(f"  {i:>4} {report.picture(dataset[i].doc_lens)}")
    first = dataset[0]
    end = first.doc_lens[0]
    around = first.input_ids[max(0, end - 60):end + 60]
    try:
        tokenizer = load_tokenizer(meta["tokenizer"])
        dataset.check_tokenizer(tokenizer)
        print(f"around the first document's end (token {end:,}):\n    {tokenizer.decode(around)!r}")
    except (ValueError, KeyError) as error:
        print(f"around the first document's end (token {end:,}), as ids ({error}):\n    {around.tolist()}")
    drawn = report.draw_packed(dataset.folder, dataset.seq_len,
                               [dataset[i].doc_lens for i in range(min(16, len(dataset)))], lens)
    if drawn:
        print(f"figure: {drawn}")


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    check = command == "inspect" and "--check" in rest
    rest = [word for word in rest if not check or word != "--check"]
    if command == "tokenize":
        tokenize(parse_cli(TokenizeConfig, tokenize.__doc__, rest))
    elif command == "pack":
        pack(parse_cli(PackConfig, pack.__doc__, rest))
    elif command == "inspect" and len(rest) == 1 and not rest[0].startswith("-"):
        inspect(rest[0], check)
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise ValueError(f"command {' '.join(sys.argv[1:])!r} is unknown; write `data.py tokenize --help`, "
                         "`data.py pack --help` or `data.py inspect [--check] FOLDER`")


if __name__ == "__main__":
    run_main(main)
