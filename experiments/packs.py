"""The lab's data: mixtures of long and short, and rewrites of packed domains.

What is *long* and what is *short* here: the start handles up to 2K tokens, its arms go to 8K.

    long    recall-8k    pairs in 2K, 4K or 8K tokens of code, a third of the tokens each
            code_repos   whole repositories, in pieces of 8K
            icl-8k       lines to learn labels from, 2K to 8K tokens of them
    short   recall-256, recall_bare-256, icl-256    the same abilities in at most 256 tokens
            short        functions and classes, of their own length

Both teach the same things, over other distances. "Short-context performance" is recall and ICL at
256 tokens and bits per byte of short documents, where the paper has HellaSwag and MMLU.
A rewrite takes a packed domain and a seed; train.py reads the sequences that it gives instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import neighbours
import numpy as np

import data
from data import PackedDataset, PackedSequence
from support import toy

LONG = {"recall-8k": 0.70, "code_repos-8k": 0.15, "icl-8k": 0.15}
SHORT = {"recall-256": 0.40, "recall_bare-256": 0.25, "short": 0.15, "icl-256": 0.20}


def mix(*parts: tuple[float, dict[str, float]]) -> str:
    """A mixture as train.py reads it: (share, domains) of each part."""
    shares: dict[str, float] = {}
    for share, domains in parts:
        for domain, of_part in domains.items():
            shares[domain] = shares.get(domain, 0.0) + share * of_part
    return ",".join(f"{domain}={share:.6g}" for domain, share in shares.items() if share > 0)


# 75% long, and the same with what is long replaced by what the start could read already.
TO_2K = {"recall-2k": 0.70, "short": 0.15, "icl-2k": 0.15}
REAL, UP_TO_2K = mix((0.75, LONG), (0.25, SHORT)), mix((0.75, TO_2K), (0.25, SHORT))


def without_mask(sequence: PackedSequence) -> PackedSequence:
    """The same tokens and labels, but a sequence is one document: all its tokens see each other.

    A document's first token is no target, as it was none while it began a document of its own.
    """
    size, mask = len(sequence.input_ids), sequence.loss_mask
    trained = np.ones(size, bool) if mask is None else np.array(mask)
    trained[np.cumsum((0, *sequence.doc_lens[:-1]))] = False
    return PackedSequence(np.array(sequence.input_ids), (size,), trained)


def two_documents(seed: int, seq_len: int, related: bool) -> Iterator[PackedSequence]:
    """Recall: a document of a whole sequence and 16 pairs, then two of half of it and 8, in turn.

    The two have no symbol in common: what one says neither helps nor contradicts the other. If
    `related`, they have the same pairs, at other places and in other code.
    """
    tokenizer, rng = data.load_tokenizer(), data.generator(seed, "two documents")
    while True:
        one, two = toy.recall_pairs(rng, 2, toy.N_PAIRS)
        first, second = np.split(two, 2)
        for parts in ([one], [first, first if related else second]):
            length, rows = seq_len // len(parts), []
            for pairs in parts:
                room = length - 2 - 2 * len(pairs) * toy.PAIR_LEN
                haystack = data.haystack_windows(tokenizer, rng, 1, room, seed)
                rows.append(toy.recall_rows(rng, pairs[None], haystack, tokenizer.bos_id,
                                            tokenizer.eos_id))
            ids, masks = (np.concatenate(each, axis=-1) for each in zip(*rows, strict=True))
            yield PackedSequence(ids[0], (length,) * len(parts), masks)


def unrelated(dataset: PackedDataset, seed: int, masked: bool = True,
              related: bool = False) -> Iterator[PackedSequence]:
    """recall-8k as `two_documents`; without masks there and in `short`. Other domains stay."""
    made = two_documents(seed, dataset.seq_len, related)
    for i in range(len(dataset)):
        sequence = next(made) if dataset.domain == "recall-8k" else dataset[i]
        unmasked = not masked and dataset.domain in ("recall-8k", "short")
        yield without_mask(sequence) if unmasked else sequence


def unrelated_unmasked(dataset: PackedDataset, seed: int) -> Iterator[PackedSequence]:
    return unrelated(dataset, seed, masked=False)


def related_unmasked(dataset: PackedDataset, seed: int) -> Iterator[PackedSequence]:
    return unrelated(dataset, seed, masked=False, related=True)


def language_reference() -> np.ndarray:
    """Prose to train on, 0.7 million tokens: the first document of data.textbooks."""
    return next(iter(data.textbooks(data.load_tokenizer(), 0))).input_ids[1:-1]


def prose_haystack(dataset: PackedDataset, seed: int,
                   share: float = 1.0) -> Iterator[PackedSequence]:
    """recall-8k with prose for code in a `share` of its sequences; pairs and questions stay."""
    prose = language_reference() if dataset.domain == "recall-8k" else None
    for i in range(len(dataset)):
        sequence = dataset[i]
        if prose is not None and int((i + 1) * share) > int(i * share):
            rng, ids = data.generator(seed, "prose", i), sequence.input_ids.copy()
            code = ids < 256  # bytes; all else are special tokens
            begin = int(rng.integers(len(prose) - code.sum() + 1))
            ids[code] = prose[begin:begin + int(code.sum())]
            sequence = PackedSequence(ids, sequence.doc_lens, sequence.loss_mask)
        yield sequence


def half_prose_haystack(dataset: PackedDataset, seed: int) -> Iterator[PackedSequence]:
    return prose_haystack(dataset, seed, share=0.5)


def tie_knots(dataset: PackedDataset, seed: int) -> Iterable[PackedSequence]:
    """recall-2k as knots of 8K, each of one recall document and the short functions around it."""
    if dataset.domain != "recall-2k":
        return (dataset[i] for i in range(len(dataset)))
    return neighbours.make_knots(data.load_tokenizer(), dataset.seq_len, len(dataset), seed)


def decompose(dataset: PackedDataset, seed: int) -> Iterable[PackedSequence]:
    """The documents of the mixture REAL, decomposed and in the order of a length curriculum."""
    made = neighbours.make_decomposed(data.load_tokenizer(), dataset.seq_len, len(dataset), seed,
                                      data.parse_mixture(REAL))
    return neighbours.in_drawing_order(made, dataset.domain, seed)
