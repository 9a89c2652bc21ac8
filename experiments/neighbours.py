"""What neighbouring papers do to documents, positions and the loss, around the five files.

    python experiments/neighbours.py train --skip-to 8k --stage long --init runs/tiny --no-eval
    python experiments/neighbours.py sft --average documents --init runs/tiny

`train` and `sft` run train.py and sft.py with one thing replaced in this process; for knots and
decomposed documents, packs.py rewrites the packs that train.py reads.

    knot            Untie the Knots, 2409.04774        short documents, chunked and tied into one
    decompose       Dataset Decomposition, 2405.13226  pieces of 2^k tokens, batches of one size
    skip_positions  PoSE, 2309.10400                   a short document at positions of a long one
    average_by      LongAlign, 2401.18058              every conversation of a pack weighs the same

The findings `neighbours`, `decomposition` and `sft-loss` of experiments/run.py use them.
"""

from __future__ import annotations

import argparse
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import sft
import train
from data import Document, PackedSequence, Tokenizer, parse_length

# --- 1. Untie the Knots ---------------------------------------------------------------------------
#
#     aaaaaa, bbbb, cc       three short documents
#     aa aaaa | bbb b | cc   cut into chunks at random places; c stays whole
#
#     <x>bbb cc <p>aa <y>b[xy] <q>aaaa[pq]      one long document
#
# Chunks of one document keep their order, but others come between them: to foresee a chunk one must
# find the one that it continues. A chunk of a cut document begins with a name (not trained: nobody
# can foresee it), and after its last chunk the names of all stand in order (trained if anything of
# the document is: the paper's backtracing). The paper also numbers both ends of every cut.

HEAD, NAMES = "<|start_header_id|>", "<|end_header_id|>"  # special tokens that no document has


def knot(documents: Sequence[Document], tokenizer: Tokenizer, rng: np.random.Generator,
         hops: int = 4) -> Document:
    """Cut each document into 1 to `hops` chunks; tie the chunks of all into one (2409.04774)."""
    head, end = [tokenizer.special_id(HEAD)], [tokenizer.special_id(NAMES)]
    tied: list[list[Document]] = []
    for document in documents:
        chunks = cut_at_random(document, int(rng.integers(1, hops + 1)), rng)
        if len(chunks) > 1:
            letters = list(string.ascii_lowercase)
            names = [tokenizer.encode("".join(rng.choice(letters, 2))) for _ in chunks]
            chunks = [join(_ids([*head, *name], trained=False), chunk)
                      for name, chunk in zip(names, chunks, strict=True)]
            trained = document.loss_mask is None or bool(document.loss_mask.any())
            chunks[-1] = join(chunks[-1], _ids(end, trained=False),
                              _ids(np.concatenate(names), trained))
        tied.append(chunks)
    # Whose turn it is, in random order; a document gives its chunks in their own order.
    turns = rng.permutation(np.repeat(np.arange(len(tied)), [len(chunks) for chunks in tied]))
    waiting = [iter(chunks) for chunks in tied]
    return join(*(next(waiting[i]) for i in turns))


def cut_at_random(document: Document, n: int, rng: np.random.Generator) -> list[Document]:
    """Cut a document at n - 1 random places, or fewer where it has too few tokens."""
    inner = np.arange(1, len(document))
    places = np.sort(rng.choice(inner, min(n - 1, len(inner)), replace=False)).tolist()
    bounds = [0, *places, len(document)]
    return [document[begin:end] for begin, end in pairwise(bounds)]


def join(*parts: Document) -> Document:
    """Documents end to end as one; a mask that one of them has, all have."""
    masks = [np.ones(len(part), bool) if part.loss_mask is None else part.loss_mask
             for part in parts]
    masked = any(part.loss_mask is not None for part in parts)
    return Document(np.concatenate([part.input_ids for part in parts]),
                    np.concatenate(masks) if masked else None)


def _ids(ids: Sequence[int] | np.ndarray, trained: bool) -> Document:
    return Document(np.array(ids, np.uint32), np.full(len(ids), trained))


def knots(asked: Iterator[Document], others: Iterator[Document], length: int, tokenizer: Tokenizer,
          rng: np.random.Generator, hops: int = 4) -> Iterator[Document]:
    """Knots of exactly `length` tokens: one document of `asked`, and as many of `others` as fit.

    One, because two recall documents would give one key two values; real documents differ in their
    subjects. What is left of the length, a whole document of `others` being too long for it, stands
    before the knot.
    """
    marks = 5 * hops + 1  # tokens that tie a document, at most: two names and a mark a chunk, +1
    while True:
        found = [next(asked)]
        while sum(map(len, found)) + marks * len(found) < length:
            found.append(next(others))
        filler = found.pop()
        tied = knot(found, tokenizer, rng, hops)
        while len(filler) < length - len(tied):
            filler = join(filler, next(others))
        yield join(filler[:length - len(tied)], tied)


# --- 2. Dataset Decomposition ---------------------------------------------------------------------
#
#     a document of 13 tokens, 2 <= size <= 8:   aaaaaaaa | aaaa      (the last one is dropped)
#
#     sizes in the order of training   22222222 44 22222222 44 8 44 8 8    short first, then longer,
#                                      22222222 22222222 44 8 44 44 8 8      in several cycles
#
# No piece is part of two documents and no sequence has pieces of two sizes, so that attention costs
# what the documents' real lengths cost; and the model meets long ones when it is ready for them.


def decompose(document: Document, shortest: int, longest: int) -> Iterator[Document]:
    """Cut a document into pieces of powers of two, largest first (2405.13226); drop the rest."""
    begin, size = 0, longest
    while size >= shortest:
        if len(document) - begin >= size:
            yield document[begin:begin + size]
            begin += size
        else:
            size //= 2


def length_curriculum(documents: Iterable[Document], seq_len: int, shortest: int, cycles: int,
                      rng: np.random.Generator) -> list[PackedSequence]:
    """Decompose documents into sequences of pieces of one size, and order those from short to long.

    In each of `cycles` cycles a size is drawn by how many of its sequences the cycle has left, over
    the size.
    """
    pieces = [piece for document in documents for piece in decompose(document, shortest, seq_len)]
    sizes = sorted({len(piece) for piece in pieces})
    buckets = [list(data.pack_long((p for p in pieces if len(p) == size), size, seq_len))
               for size in sizes]
    order: list[PackedSequence] = []
    for cycle in range(cycles):
        left = [iter(bucket[cycle::cycles]) for bucket in buckets]
        counts = np.array([len(bucket[cycle::cycles]) for bucket in buckets])
        while counts.any():
            odds = counts / np.array(sizes)
            i = int(rng.choice(len(sizes), p=odds / odds.sum()))
            counts[i] -= 1
            order.append(next(left[i]))
    return order


def in_drawing_order(sequences: Sequence[PackedSequence], domain: str,
                     seed: int) -> list[PackedSequence]:
    """Place sequences so that a run with this seed, drawing each once, draws them in this order.

    A mixture permutes every domain; this undoes it. The domain must be the run's only one.
    """
    placed = list(sequences)
    order = data.generator(seed, domain, 0).permutation(len(placed))  # as Mixture draws epoch 0
    for place, sequence in zip(order, sequences, strict=True):
        placed[place] = sequence
    return placed


# --- 3. Skipped positions -------------------------------------------------------------------------
#
#     positions of a document of 8 tokens      0 1 2 3 4 5 6 7
#     with a jump, up to a context of 64       0 1 2 45 46 47 48 49     at a random token
#
# A model of a short context meets the distances of a long one at the cost of a short one.


def skip_positions(positions: Tensor, target: int, rng: np.random.Generator) -> Tensor:
    """Add one jump to the positions (T,) of each document; none ends beyond `target`."""
    begins = np.append((positions == 0).nonzero().flatten().numpy(), len(positions))
    lens = np.diff(begins)
    gaps = rng.integers(np.maximum(target - lens, 0) + 1)
    cuts = rng.integers(np.minimum(1, lens - 1), lens)
    jumps = np.where(positions.numpy() >= np.repeat(cuts, lens), np.repeat(gaps, lens), 0)
    return positions + torch.from_numpy(jumps)


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """Replace an attribute of a module or class inside a `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def skipping_rope(target: int, seed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """model.rope_cos_sin with skipped positions (PoSE; in fine-tuning SkipAlign, 2405.03939)."""
    rng, plain = np.random.default_rng(seed), model.rope_cos_sin

    def rope(config: model.ModelConfig, positions: Tensor,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return plain(config, skip_positions(positions, target, rng), dtype)

    return rope


# --- 4. What a loss averages over -----------------------------------------------------------------
#
#     trained tokens of two conversations:  3 and 500
#
#     tokens       (sum of 503 losses) / 503             ours, and A.3
#     documents    (mean of 3 + mean of 500) / 2         LongAlign's: the 3 weigh as much as the 500
#     sequences    the same with packed sequences for conversations: so it is where a trainer takes
#                  the mean of each sequence, and the mean of those (A.3: it "skews the
#                  optimization")


def average_by(what: str, seq_len: int = 0) -> Callable[..., tuple[Tensor, Tensor]]:
    """Transformer.loss with each document's, or sequence's, trained tokens weighing 1 together.

    It returns what train_step expects, a sum to divide by the step's valid tokens; a step must be
    one micro-batch on one rank, or the weights would be another step's.
    """
    if what not in ("documents", "sequences"):
        raise ValueError(f"a loss by {what!r} is unknown; choose documents or sequences")

    plain = model.Transformer.loss

    def loss(self: model.Transformer, input_ids: Tensor, labels: Tensor, doc_lens: Sequence[int],
             parallel: model.Parallel | None = None,
             by_token: bool = False) -> tuple[Tensor, Tensor]:
        losses, valid = plain(self, input_ids, labels, doc_lens, parallel, by_token=True)
        sizes = list(doc_lens) if what == "documents" else [seq_len] * (len(labels) // seq_len)
        counts = torch.stack([part.sum() for part in (labels != data.IGNORE_INDEX).split(sizes)])
        parts = (counts > 0).sum().clamp(min=1)
        own = counts.clamp(min=1).repeat_interleave(torch.tensor(sizes, device=counts.device))
        losses = losses * valid / parts / own  # own: the trained tokens of a token's part
        return losses if by_token else losses.sum(), valid

    return loss


# --- 5. Packs and runs ----------------------------------------------------------------------------


def make_knots(tokenizer: Tokenizer, seq_len: int, n: int, seed: int) -> list[PackedSequence]:
    """Sequences of one knot each: a recall document of up to a quarter of it, and short functions.

    Only answers are trained, as in recall documents: what lies around them is their haystack.
    """
    asked = data.SYNTHETIC_DOMAINS["recall"](tokenizer, seed, seq_len // 4)
    functions = chain.from_iterable(data.short(tokenizer, seed + epoch) for epoch in range(1000))
    haystack = (Document(f.input_ids, np.zeros(len(f), bool)) for f in functions)
    tied = knots(asked, haystack, seq_len, tokenizer, data.generator(seed, "knots"))
    return [PackedSequence(k.input_ids, (seq_len,), k.loss_mask) for k in islice(tied, n)]


def make_decomposed(tokenizer: Tokenizer, seq_len: int, n: int, seed: int, shares: dict[str, float],
                    cycles: int = 2) -> list[PackedSequence]:
    """`n` sequences of the embedded domains by their shares of tokens, decomposed and ordered.

    Made from the documents of 10 more: pieces of a size that do not fill a sequence are left over.
    """
    documents: list[Document] = []
    rng = data.generator(seed, "decomposed")
    for domain, share in shares.items():
        part = data.parse_domain(domain)
        name = part.name
        if name in data.SYNTHETIC_DOMAINS:
            stream = data.SYNTHETIC_DOMAINS[name](tokenizer, seed, part.length)
        else:
            stream = (data.LONG_DOMAINS | data.SHORT_DOMAINS)[name](tokenizer, seed)
        wanted = int(share / sum(shares.values()) * (n + 10) * seq_len)
        while wanted > 0:
            document = next(stream)
            documents.append(document if name in data.SYNTHETIC_DOMAINS else document[:wanted])
            wanted -= len(document)
    order = length_curriculum(documents, seq_len, 32, cycles, rng)
    return [order[i] for i in np.sort(rng.choice(len(order), n, replace=False))]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This file's own options, and those that are left for train.py or sft.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "sft"))
    parser.add_argument("--skip-to", type=parse_length,
                        help="jump in each document, up to this position")
    parser.add_argument("--average", choices=("documents", "sequences"), help="what weighs 1")
    return parser.parse_known_args(argv)


def run(args: argparse.Namespace, others: list[str]) -> None:
    """Run train.py or sft.py with their own options and what was asked for replaced."""
    program, kind = (train, train.TrainConfig) if args.command == "train" else (sft, sft.SftConfig)
    config = data.parse_cli(kind, program.__doc__, others)  # ends here if an option is wrong
    rope = skipping_rope(args.skip_to, config.seed) if args.skip_to else model.rope_cos_sin
    loss = model.Transformer.loss
    if args.average:
        loss = average_by(args.average, config.seq or 0)
        if args.average == "sequences" and not config.seq:
            raise ValueError("--average sequences needs --seq")
    sys.argv = [f"{args.command}.py", *others]
    with replaced(model, "rope_cos_sin", rope), replaced(model.Transformer, "loss", loss):
        program.main()


if __name__ == "__main__":
    data.run_main(lambda: run(*parse()))
