"""The data: documents become packed sequences, sequences are mixed, and batches go to the model.

    raw text --tokenize--> documents --pack--> sequences --mix--> a step's sequences --> batches

How documents are laid out in a sequence decides what a model can learn about long context. The
paper (2410.02660, sections 3 and A.2) has three rules. Here they pack documents a (11 tokens),
b (3), c (7) and d (4) into sequences of 8 tokens:

    long    drop documents shorter than a sequence, cut the others, drop what is left over

            a a a a a a a a          doc_lens (8,)
                                     b, c, d and the last 3 tokens of a are gone

    short   lay all documents end to end; what a cut leaves over begins the next sequence

            a a a a a a a a | a a a b b b c c | c c c c c d d d      the last d waits for more
            (8,)              (3, 3, 2)         (5, 3)

    sft     conversations: as short, but what a cut leaves over is dropped

A sequence is exactly seq_len tokens and its `doc_lens`, the lengths of the documents in it. The
model uses them to keep attention inside each document (model.py). A mixture then gives every
domain its share of the tokens, in an order that any rank can compute from the seed alone.

Nothing needs to be downloaded: every Python installation holds megabytes of code and prose. Text
of your own is tokenized once and packed as often as you like:

    python data.py pack --domain code_repos-2k --seq 2k --sequences 500 --out packs/code_repos-2k
    python data.py tokenize --input ~/src --format repos --tokenizer llama3 --out docs/code
    python data.py pack --from docs/code --domain code-64k --seq 64k --out packs/code-64k
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support import cli, files, hf, installed, mds, texts, tokenizers, toy
from support import inspect as show
from support.cli import option, parse_cli, parse_length, run_main
from support.installed import generator
from support.texts import TokenizeConfig

add_config_args, format_length = cli.add_config_args, cli.format_length  # public names
parse_mixture, tokenizer_files = cli.parse_mixture, tokenizers.tokenizer_files
IGNORE_INDEX = -100  # the label of a token that is not trained on

# --- 1. Packing -------------------------------------------------------------------------


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
    """What became of the tokens: tokens_in = tokens_packed + tokens_dropped, always."""

    documents_in: int = 0
    documents_dropped: int = 0  # entirely: too short for pack_long, or not `below` its limit
    tokens_in: int = 0
    tokens_packed: int = 0

    @property
    def tokens_dropped(self) -> int:
        return self.tokens_in - self.tokens_packed


def pack_long(documents: Iterable[Document], doc_len: int, seq_len: int | None = None,
              report: PackReport | None = None,
              below: float = math.inf) -> Iterator[PackedSequence]:
    """Cut documents into pieces of exactly `doc_len`, and lay seq_len / doc_len in a sequence.

    Shorter documents are dropped, and so is what remains after a document's last whole piece. The
    paper's 512K stage also packs pieces of 64K. They come from documents `below` 512K, because the
    stage has the longer ones already (A.2).
    """
    seq_len = seq_len or doc_len
    if seq_len % doc_len:
        raise ValueError(f"documents of {doc_len} tokens do not fill sequences of {seq_len}; "
                         "choose a divisor")
    report = report or PackReport()
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
    """Lay documents end to end and cut every `seq_len` tokens.

    The tail of a cut document begins the next sequence; without `carry_tail` it is dropped. With
    `ranks` we also cut at every rank's share of the sequence. Then no document lies on two ranks,
    and sequence parallelism has nothing to exchange (A.2).
    """
    if seq_len % ranks:
        raise ValueError(f"sequences of {seq_len} tokens do not have {ranks} equal shares; "
                         "choose a divisor")
    report = report or PackReport()
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
    """Pack conversations: a cut tail is dropped, because its question would be missing (A.2)."""
    return pack_short(documents, seq_len, report, carry_tail=False)


def _join(pieces: list[Document]) -> PackedSequence:
    ids = np.concatenate([piece.input_ids for piece in pieces])
    mask = None
    if any(piece.loss_mask is not None for piece in pieces):
        mask = np.concatenate([_mask_of(piece) for piece in pieces])
    return PackedSequence(ids, tuple(len(piece) for piece in pieces), mask)


def _mask_of(part: Document | PackedSequence) -> np.ndarray:
    return np.ones(len(part.input_ids), bool) if part.loss_mask is None else part.loss_mask


# --- 2. Packed sequences on disk --------------------------------------------------------
#
#     packs/code_repos-2k/
#         input_ids.bin   uint32 (sequences, seq_len)    plain memory maps: numpy alone reads them
#         doc_lens.bin    uint32 (documents,)            all sequences' doc_lens, one after another
#         doc_ends.bin    int64  (sequences,)            where in doc_lens each sequence's part ends
#         loss_mask.bin   bool   (sequences, seq_len)    only if some tokens are not trained on
#         meta.json       sizes, tokenizer and its fingerprint, domain, seed, and what was dropped

FORMAT = "nanolong-packed-2"
_META = {"format": str, "domain": str, "tokenizer": str, "tokenizer_fingerprint": str,
         "vocab_size": int, "max_id": int, "seq_len": int, "sequences": int, "documents": int,
         "has_loss_mask": bool, "seed": int, "tokens_dropped": int, "sha256": str}


class NothingPacked(ValueError):
    """No document fills a sequence."""


def write_packed(folder: str | Path, sequences: Iterable[PackedSequence], tokenizer: Tokenizer,
                 seq_len: int, domain: str, seed: int, report: PackReport) -> None:
    """Write a packed set, whole or not at all. Raises NothingPacked if no sequence came."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already; choose another --out, or remove it")
    ends, max_id, has_mask = [0], 0, False
    with files.whole_folder(folder) as aside:
        with (open(aside / "input_ids.bin", "wb") as ids,
              open(aside / "doc_lens.bin", "wb") as lens,
              open(aside / "loss_mask.bin", "wb") as masks):
            for sequence in sequences:
                assert sequence.input_ids.shape == (seq_len,)
                ids.write(sequence.input_ids.astype(np.uint32, copy=False).data)
                lens.write(np.array(sequence.doc_lens, np.uint32).data)
                if sequence.loss_mask is not None and not has_mask:
                    has_mask = True  # the sequences before this one are trained on whole
                    masks.write(b"\1" * (seq_len * (len(ends) - 1)))
                if has_mask:
                    masks.write(_mask_of(sequence).data)
                ends.append(ends[-1] + len(sequence.doc_lens))
                max_id = max(max_id, int(sequence.input_ids.max()))
        if len(ends) == 1:
            raise NothingPacked(f"domain {domain}: none of its {report.documents_in} documents "
                                f"({report.tokens_in:,} tokens) fills a sequence of {seq_len:,} "
                                "tokens; choose a shorter length or longer documents")
        files.check_ids(folder, max_id, tokenizer.vocab_size)
        if not has_mask:
            (aside / "loss_mask.bin").unlink()
        (aside / "doc_ends.bin").write_bytes(np.array(ends[1:], np.int64).tobytes())
        files.write_json(aside / "meta.json", {
            "format": FORMAT, "domain": domain, "tokenizer": tokenizer.spec,
            "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
            "max_id": max_id, "seq_len": seq_len, "sequences": len(ends) - 1,
            "documents": ends[-1], "has_loss_mask": has_mask, "seed": seed,
            "tokens_dropped": report.tokens_dropped, "sha256": files.sha256_of(aside, "*.bin")})


class PackedDataset:
    """A packed set as memory maps: `dataset[i]` is a PackedSequence, read when it is used."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder. Raises ValueError if its meta.json and its files do not agree."""
        self.folder = folder = Path(folder)
        self.meta = files.read_meta(folder, _META, FORMAT, "pack")
        n, seq_len, documents = (self.meta[key] for key in ("sequences", "seq_len", "documents"))
        self.seq_len: int = seq_len
        self.domain: str = self.meta["domain"]
        self.input_ids = files.map_file(folder / "input_ids.bin", np.uint32, (n, seq_len))
        self.doc_lens = files.map_file(folder / "doc_lens.bin", np.uint32, (documents,))
        self.doc_ends = files.map_file(folder / "doc_ends.bin", np.int64, (n,))
        self.loss_mask: np.ndarray | None = None
        if self.meta["has_loss_mask"]:
            self.loss_mask = files.map_file(folder / "loss_mask.bin", np.bool_, (n, seq_len))
        begins = np.append(0, self.doc_ends[:-1])
        if ((self.doc_ends <= begins).any() or self.doc_ends[-1] != documents
                or (self.doc_lens == 0).any()
                or (np.add.reduceat(self.doc_lens, begins, dtype=np.int64) != seq_len).any()):
            raise ValueError(f"{folder}: document lengths do not add up to {seq_len} in every "
                             "sequence; the folder is damaged, pack it again")

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> PackedSequence:
        files.check_maps(self.input_ids, self.doc_lens, self.loss_mask)
        begin = int(self.doc_ends[i - 1]) if i else 0
        doc_lens = tuple(self.doc_lens[begin:int(self.doc_ends[i])].tolist())
        mask = None if self.loss_mask is None else self.loss_mask[i]
        return PackedSequence(self.input_ids[i], doc_lens, mask, f"{self.folder.name}[{i}]")

    @property
    def trained_share(self) -> float:
        return 1.0 if self.loss_mask is None else float(self.loss_mask.mean())

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a token has no place in a model's vocabulary."""
        files.check_ids(self.folder, self.meta["max_id"], vocab_size)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the folder was packed with another tokenizer."""
        files.check_tokenizer(self.folder, self.meta, tokenizer)

    def check_content(self) -> None:
        """Read all of it. Raise ValueError if a byte is not as it was packed."""
        if (files.sha256_of(self.folder, "*.bin") != self.meta["sha256"]
                or self.input_ids.max() != self.meta["max_id"]):
            raise ValueError(f"{self.folder} is not as it was packed; pack it again")
        if not self.trained_share:
            raise ValueError(f"{self.folder} has no token that is trained on; leave it out")


# --- 3. The mixture ---------------------------------------------------------------------


class Mixture:
    """Draws sequences so that every domain has its share of tokens; the seed fixes the order.

    All sequences are equally long, so a share of tokens is a share of sequences. Each draw takes
    the most urgent domain: among those that have had less than their share, the one whose next
    sequence is due first. So after any n draws, a domain with share s has had s * n sequences, to
    within one. Inside a domain, every epoch has a new random order. The whole state is `drawn`.
    """

    def __init__(self, datasets: Mapping[str, PackedDataset], shares: dict[str, float],
                 seed: int) -> None:
        cli.check_shares(shares)
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items() if share > 0}
        missing = sorted(self.shares.keys() - datasets.keys())
        if missing:
            raise ValueError(f"the mixture names {missing[0]!r}, but there is only "
                             f"{', '.join(datasets) or 'nothing'}")
        self.datasets = {name: datasets[name] for name in self.shares}
        self.seed = seed
        self.drawn = dict.fromkeys(self.shares, 0)  # sequences that each domain has given

    def draw(self, n: int) -> list[PackedSequence]:
        return [self._next() for _ in range(n)]

    def _next(self) -> PackedSequence:
        n = sum(self.drawn.values()) + 1
        behind = [d for d, share in self.shares.items() if share * n > self.drawn[d] + 1e-9]
        due = {d: (self.drawn[d] + 1) / self.shares[d] for d in behind}  # at which draw
        name = min(due, key=lambda d: due[d])
        dataset = self.datasets[name]
        epoch, i = divmod(self.drawn[name], len(dataset))
        self.drawn[name] += 1
        return dataset[int(_permutation(self.seed, name, epoch, len(dataset))[i])]

    def resume(self, drawn: dict[str, int]) -> None:
        """Go on where `drawn` says. Raises ValueError if that is not a state of this mixture."""
        numbers = all(type(n) is int and n >= 0 for n in drawn.values())
        if drawn.keys() != self.drawn.keys() or not numbers:
            raise ValueError(f"the data's cursor {drawn} does not belong to the mixture of "
                             f"{', '.join(self.drawn)}; start anew with --init, not --resume")
        self.drawn = dict(drawn)


@cache
def _permutation(seed: int, name: str, epoch: int, n: int) -> np.ndarray:
    return generator(seed, name, epoch).permutation(n)


# --- 4. Batches -------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One micro-batch: packed sequences laid end to end, T tokens, with labels already shifted.

    The label of a token is the token after it. The last token of a document has none, because the
    next one belongs to another document. So a document of n tokens trains at most n - 1 of them.
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, IGNORE_INDEX where nothing is trained
    doc_lens: tuple[int, ...]
    sources: tuple[str, ...]

    def shard(self, sp_rank: int, sp_size: int) -> tuple[Tensor, Tensor]:
        """One rank's consecutive share. Labels were shifted before, so no cut loses a target."""
        share, rest = divmod(len(self.input_ids), sp_size)
        assert rest == 0
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
    """Deal one step's sequences to [micro-step][dp rank]; ranks side by side get like costs.

    At every micro-step, all ranks wait for the slowest. Attention costs the sum of squared document
    lengths, so we sort by it. The step's summed gradient stays the same (A.3, Table 15: +11.7%).
    """
    if reorder:
        sequences = sorted(sequences, key=lambda s: sum(n * n for n in s.doc_lens))
    parts = [list(sequences[i:i + per_batch]) for i in range(0, len(sequences), per_batch)]
    return [parts[i:i + dp_size] for i in range(0, len(parts), dp_size)]


# --- 5. Text becomes documents ----------------------------------------------------------


class Tokenizer(tokenizers.Tokenizer):
    """Text to ids and back (support/tokenizers.py), and a text to a document."""

    def document(self, text: str) -> Document:
        """A whole document: begin of text (where the family has one), the text, end of text."""
        parts = (self.begin, self.encode(text), [self.eos_id])
        return Document(np.concatenate(parts, dtype=np.uint32, casting="unsafe"))


@cache
def load_tokenizer(spec: str = "bytes") -> Tokenizer:
    """Load a tokenizer; nothing is downloaded that tiktoken does not have in its cache.

        bytes             256 byte values, Llama-3's special tokens and the symbols of section 6
        FOLDER or FILE    tokenizer.json of the byte-level BPE family
        tiktoken:gpt2     an encoding that tiktoken knows by name
    """
    return Tokenizer(spec, *tokenizers.load_encoding(spec))


def tokenizer_for(model_folder: str | Path | None, spec: str = "") -> Tokenizer:
    """The tokenizer in a model's folder; "bytes" where there is none.

    Raises ValueError if `spec` is another one: only bad scores show it.
    """
    own = hf.own_tokenizer(Path(model_folder), not spec) if model_folder else ""
    tokenizer, tiny = load_tokenizer(spec or own or "bytes"), load_tokenizer("bytes")
    if own and load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{own} is not for tokenizer {spec!r}; write --tokenizer {own}")
    return tiny if tokenizer.fingerprint == tiny.fingerprint else tokenizer


# --- 6. Domains that need no download ---------------------------------------------------
#
# Real text first: the code and prose of the installed Python (section 3.1). Then synthetic domains
# that teach a tiny model what a released checkpoint already knows: to look things up (recall), and
# to learn from examples (icl). support/toy.py draws and explains them.


def code_repos(tokenizer: Tokenizer, seed: int, held_out: bool = False) -> Iterator[Document]:
    """Each repository is one document: all its files in a random order, joined (section 3.1).

    Random order keeps related files further apart than an order by dependency.
    """
    repositories = installed.list_repositories(held_out)
    names = list(repositories)
    for i in generator(seed, "repositories").permutation(len(names)):
        paths = repositories[names[i]]
        order = generator(seed, names[i]).permutation(len(paths))
        yield tokenizer.document(installed.join_files(paths[j] for j in order))


def textbooks(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """Prose, chapters joined to books (A.2): Python's language reference, then docstrings."""
    return (tokenizer.document(book) for book in installed.books())


def short(tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """The mixture's short part: each function and class of the installed packages is a document."""
    paths = [path for repo in installed.list_repositories().values() for path in repo[:50]]
    for i in generator(seed, "short").permutation(len(paths)):
        for source in installed.source_texts(paths[i]):
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


def haystack_windows(tokenizer: Tokenizer, rng: np.random.Generator, batch: int, length: int,
                     seed: int, held_out: bool = False) -> np.ndarray:
    """Random stretches of real code, (batch, length)."""
    text = haystack_text(tokenizer, seed, held_out)
    if length > len(text):
        raise ValueError(f"a haystack of {length:,} tokens is wanted, but all code has "
                         f"{len(text):,}; choose a shorter length")
    begins = rng.integers(len(text) - length + 1, size=(batch, 1))
    return text[begins + np.arange(length)]  # (batch, 1) + (length,) -> (batch, length)


def synthetic(kind: str, shortest: int, n_lengths: int, tokenizer: Tokenizer, seed: int,
              longest: int) -> Iterator[Document]:
    """Recall or ICL documents of `longest` tokens, of half as many, a quarter, ..., without end.

    Each length gets the same number of *tokens*. With the same number of documents, almost all
    tokens would be in the longest ones, and a model learns from the shortest first.
    """
    if longest % shortest or (longest // shortest).bit_count() != 1:
        raise ValueError(f"documents of this domain cannot be {longest} tokens long; choose "
                         f"{shortest} times a power of 2")
    rng = generator(seed, f"{kind}_documents", longest)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    lengths = [longest >> i for i in reversed(range(n_lengths)) if longest >> i >= shortest]
    for length in itertools.cycle(lengths):
        batch = longest // length
        if kind == "icl":
            ids, mask = toy.icl_rows(rng, batch, length, bos, eos)
        else:
            pairs, room = toy.pairs_and_room(rng, batch, length)
            if kind == "bare_recall":  # only blanks between the pairs: there is nothing to search
                haystack = np.full((batch, room), toy.BLANK, np.uint32)
            else:
                haystack = haystack_windows(tokenizer, rng, batch, room, seed)
            ids, mask = toy.recall_rows(rng, pairs, haystack, bos, eos)
        for row in ids:
            yield Document(row, mask)


LONG_DOMAINS = {"code_repos": code_repos, "textbooks": textbooks}  # (tokenizer, seed) -> documents
SHORT_DOMAINS = {"short": short}
SYNTHETIC_DOMAINS = {  # (tokenizer, seed, longest) -> documents
    "recall_bare": partial(synthetic, "bare_recall", 32, 4),  # in 32 tokens 2 pairs, in 256 16
    "recall": partial(synthetic, "recall", 32, 3),
    "icl": partial(synthetic, "icl", 64, 3),
}


class Domain(NamedTuple):
    """A part of the mixture, as "recall-2k": its name, and the length of its longest documents."""

    name: str
    length: int | None  # None: short documents of any length


def parse_domain(text: str) -> Domain:
    """Read "recall-2k" or "short". Raises ValueError for what is no length."""
    name, dash, length = text.partition("-")
    return Domain(name, parse_length(length) if dash else None)


LONGEST_BOOK = 2**18  # for longer documents all books are joined, as those of a subject (A.2)


def pack_builtin(domain: str, tokenizer: Tokenizer, seq_len: int, seed: int, report: PackReport,
                 ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack an embedded domain: "short", or one with its longest document, as in "code_repos-2k"."""
    name, length = parse_domain(domain)
    if name in SHORT_DOMAINS and length is None:
        return pack_short(SHORT_DOMAINS[name](tokenizer, seed), seq_len, report, ranks=ranks)
    if length is None or name not in [*LONG_DOMAINS, *SYNTHETIC_DOMAINS]:
        known = [*SHORT_DOMAINS, *(f"{d}-LENGTH" for d in [*LONG_DOMAINS, *SYNTHETIC_DOMAINS])]
        raise ValueError(f"domain {domain!r} is unknown; choose one of {', '.join(known)}, with "
                         "the length of the longest document, as in 2k")
    if ranks != 1 or seq_len % length:
        raise ValueError(f"documents of {domain!r} must fill sequences of {seq_len:,} tokens "
                         "without a cut; choose a divisor as their length, and no --ranks")
    if name in SYNTHETIC_DOMAINS:
        toy.check_symbols(tokenizer.specials, domain)
        return pack_short(SYNTHETIC_DOMAINS[name](tokenizer, seed, length), seq_len, report)
    found: Iterable[Document] = LONG_DOMAINS[name](tokenizer, seed)
    if name == "textbooks" and length > LONGEST_BOOK:
        found = [Document(np.concatenate([book.input_ids for book in found]))]
    return pack_long(found, length, seq_len, report)


def pack_domain(folder: str | Path, domain: str, n: int, tokenizer: Tokenizer, seq_len: int,
                seed: int) -> None:
    """Write the first `n` sequences of an embedded domain."""
    report = PackReport()
    sequences = itertools.islice(pack_builtin(domain, tokenizer, seq_len, seed, report), n)
    write_packed(folder, sequences, tokenizer, seq_len, domain, seed, report)


# --- 7. Text from outside ---------------------------------------------------------------


def tokenize(config: TokenizeConfig) -> None:
    """Tokenize a source into a folder of documents. Run again after a crash, it goes on."""
    texts.tokenize(config, load_tokenizer(config.tokenizer))
    inspect(config.out)


def read_tokenized(folder: str | Path, seed: int) -> Iterator[Document]:
    """All documents of a tokenized folder: its shards in random order, and the documents of each.

    A.2 samples from the whole. With one shard in memory at a time, no document costs a disk seek.
    """
    meta = texts.read_meta_of(folder)
    for shard in generator(seed, "shards").permutation(meta["shards"]):
        found = texts.read_shard(Path(folder) / f"{shard:05d}")
        for i in generator(seed, "documents", int(shard)).permutation(len(found)):
            yield Document(found[i])


def pack_tokenized(folder: str, rule: str, domain: str, seq_len: int, seed: int,
                   report: PackReport, ranks: int = 1) -> Iterator[PackedSequence]:
    """Pack a tokenized folder by a rule of A.2: long, short, sft; auto: long for a NAME-LENGTH."""
    length = parse_domain(domain).length
    if rule == "auto":
        rule = "short" if length is None else "long"
    if rule != "short" and ranks != 1:
        raise ValueError(f"--ranks cuts short documents; rule {rule!r} keeps theirs whole")
    found = read_tokenized(folder, seed)
    if rule == "long":
        doc_len = length or seq_len
        below = seq_len if doc_len < seq_len else math.inf
        return pack_long(found, doc_len, seq_len, report, below)
    if rule == "short":
        return pack_short(found, seq_len, report, ranks=ranks)
    if rule == "sft":
        return pack_sft(found, seq_len, report)
    raise ValueError(f"--rule {rule!r} is unknown; choose auto, long, short or sft")


def pack_mds(folder: str | Path, seq_len: int, report: PackReport) -> Iterator[PackedSequence]:
    """The packed sequences of a mosaicml-streaming folder, as ProLong's own: nothing is cut."""
    for ids, doc_lens, mask in mds.read_mds(folder, seq_len):
        report.documents_in += len(doc_lens)
        report.tokens_in += seq_len
        report.tokens_packed += seq_len
        yield PackedSequence(ids, doc_lens, mask)


# --- 8. The command line ----------------------------------------------------------------


@dataclass(frozen=True)
class PackConfig:
    domain: str = option("code_repos-2k", "NAME, or NAME-LENGTH of long documents")
    from_: str = option("", "pack this folder of `tokenize`, not an embedded domain")
    from_mds: str = option("", "turn this mosaicml-streaming folder into ours")
    rule: str = option("auto", "long, short or sft (A.2); auto: long with a LENGTH, else short")
    seq: int = option(2048, "tokens of a packed sequence", parse_length)
    sequences: int | None = option(None, "at most (default: all, embedded 1,000)", parse_length)
    ranks: int = option(1, "cut short documents so that none lies on two ranks", parse_length)
    out: str = option("packs/code_repos-2k", "the folder to write")
    tokenizer: str = option("", "tokenizer (default: the source's, else bytes)")
    seed: int = option(0, "seed of every random choice", int)


def pack(config: PackConfig) -> None:
    """Pack a tokenized folder, a mosaicml-streaming folder or an embedded domain."""
    report, domain, seq_len, seed = PackReport(), config.domain, config.seq, config.seed
    if config.from_ and config.from_mds:
        raise ValueError("--from and --from-mds are two sources; give one")
    if (config.rule != "auto" and not config.from_) or (config.from_mds and config.ranks != 1):
        raise ValueError("--rule goes with --from alone, and --ranks not with --from-mds; drop it")
    meta = texts.read_meta_of(config.from_) if config.from_ else {"tokenizer": "bytes"}
    tokenizer = load_tokenizer(config.tokenizer or meta["tokenizer"])
    if config.from_:
        files.check_tokenizer(config.from_, meta, tokenizer)
        sequences = pack_tokenized(config.from_, config.rule, domain, seq_len, seed, report,
                                   config.ranks)
    elif config.from_mds:
        sequences = pack_mds(config.from_mds, seq_len, report)
    else:
        sequences = pack_builtin(domain, tokenizer, seq_len, seed, report, config.ranks)
    enough = config.sequences or (None if config.from_ or config.from_mds else 1000)
    bar = tqdm(itertools.islice(sequences, enough), disable=not sys.stderr.isatty())
    write_packed(config.out, bar, tokenizer, seq_len, domain, seed, report)
    print(f"documents in {report.documents_in:,} ({report.tokens_in:,} tokens), dropped entirely "
          f"{report.documents_dropped:,}; tokens packed {report.tokens_packed:,}, "
          f"dropped {report.tokens_dropped:,}")
    inspect(config.out)


def inspect(folder: str, check: bool = False) -> None:
    """Say what a folder holds: tokenized documents, packed sequences, or several packed domains."""
    show.folder(Path(folder), FORMAT, PackedDataset, load_tokenizer, check)


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "tokenize":
        tokenize(parse_cli(TokenizeConfig, tokenize.__doc__, rest))
    elif command == "pack":
        pack(parse_cli(PackConfig, pack.__doc__, rest))
    elif command == "inspect" and len(rest) == 1 and not rest[0].startswith("-"):
        inspect(rest[0])
    elif command == "inspect" and len(rest) == 2 and rest[0] == "--check":
        inspect(rest[1], check=True)
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise ValueError(f"command {' '.join(sys.argv[1:])!r} is unknown; write `data.py tokenize "
                         "--help`, `data.py pack --help` or `data.py inspect [--check] FOLDER`")


if __name__ == "__main__":
    run_main(main)
