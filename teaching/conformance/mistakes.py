"""Public mistakes, made on purpose with the reference: each must fail on the packs that name it.

Most are a wrong way to cut a pack into pieces, or to weigh its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, chain, pairwise

from torch import Tensor

from teaching.conformance import reference
from teaching.conformance.packs import Pack, Weights
from teaching.conformance.reference import Piece

RANKS, END, S = 2, 2, 48  # ranks that share each row; the id of end of text; tokens of a row
Wrong = Callable[[Pack], list[Piece]]


def divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def rows_of(pack: Pack) -> list[list[Piece]]:
    """The truth's pieces of each row."""
    pieces = iter(reference.pieces_of(pack))
    return [[next(pieces) for _ in doc_lens] for doc_lens in pack.doc_lens]


def joined(row: list[Piece]) -> Piece:
    """All documents of a row as one; targets and positions stay."""
    return Piece(*(list(chain(*parts)) for parts in zip(*row, strict=True)))


def cut(row: list[Piece], starts: list[int], restart: bool = False) -> list[Piece]:
    """The row cut at other places: a token sees what the cuts leave; its target stays."""
    whole = joined(row)
    edges = [*starts, len(whole.ids)]
    pieces = [Piece(*(part[a:b] for part in whole)) for a, b in pairwise(edges)]
    return [p._replace(positions=list(range(len(p.ids)))) if restart else p for p in pieces]


def starts_of(row: list[Piece]) -> list[int]:
    return [0, *accumulate(len(piece.ids) for piece in row)][:-1]


def rank_edges(row: list[Piece]) -> list[int]:
    length = sum(len(piece.ids) for piece in row)
    return list(range(0, length, length // RANKS))


# --- 1. Who sees whom -------------------------------------------------------------------


def no_exchange(pack: Pack) -> list[Piece]:
    """Attention stops at a rank's edge."""
    return [p for row in rows_of(pack)
            for p in cut(row, sorted({*starts_of(row), *rank_edges(row)}))]


def no_exchange_if_short(pack: Pack) -> list[Piece]:
    """The same, but only where every document is shorter than a rank's share."""
    longest = max(max(lens) for lens in pack.doc_lens)
    short = longest <= pack.input_ids.shape[1] // RANKS
    return no_exchange(pack) if short else reference.pieces_of(pack)


def positions_of_ranks(pack: Pack) -> list[Piece]:
    """Attention is right, but positions begin at 0 on each rank."""
    share, pieces = pack.input_ids.shape[1] // RANKS, []
    for row in rows_of(pack):
        for start, piece in zip(starts_of(row), row, strict=True):
            positions = [(start + i) % share for i in range(len(piece.ids))]
            pieces.append(piece._replace(positions=positions))
    return pieces


def positions_run_on(pack: Pack) -> list[Piece]:
    """Positions of the row instead of the document. No mistake: RoPE sees distances alone."""
    return [piece._replace(positions=[start + i for i in range(len(piece.ids))])
            for row in rows_of(pack) for start, piece in zip(starts_of(row), row, strict=True)]


def cut_at_end_tokens(pack: Pack) -> list[Piece]:
    """Documents are what end tokens make of the row."""
    pieces = []
    for row in rows_of(pack):
        ids = joined(row).ids
        pieces += cut(row, [i for i in range(len(ids)) if i == 0 or ids[i - 1] == END], True)
    return pieces


def cut_where_positions_fall(pack: Pack) -> list[Piece]:
    """A document begins where a position is less than the one before: 0, 0 is one document."""
    pieces = []
    for row in rows_of(pack):
        p = joined(row).positions
        pieces += cut(row, [i for i in range(len(p)) if i == 0 or p[i] < p[i - 1]])
    return pieces


# --- 2. What is trained -----------------------------------------------------------------


def retrained(pack: Pack, rule: Callable[[int, int, int, bool], bool]) -> list[Piece]:
    """Other targets: rule(row, token, its document's last, whether it is trained)."""
    rows, wanted = rows_of(pack), []
    for r, row in enumerate(rows):
        ids, trained = joined(row).ids, [t is not None for t in joined(row).targets]
        for start, piece in zip(starts_of(row), row, strict=True):
            last = start + len(piece.ids) - 1
            wanted.append([ids[i + 1] if i + 1 < len(ids) and rule(r, i, last, trained[i]) else None
                           for i in range(start, last + 1)])
    count = sum(target is not None for targets in wanted for target in targets)
    return [piece._replace(targets=targets, shares=[divide(1, count)] * len(targets))
            for piece, targets in zip(chain(*rows), wanted, strict=True)]


def mask_on_inputs(pack: Pack) -> list[Piece]:
    mask = pack.loss_mask.tolist()
    return retrained(pack, lambda r, i, last, trained: i < last and mask[r][i])


def labels_across(pack: Pack) -> list[Piece]:
    """A document's last token predicts the next document's first, if that one is trained."""
    mask = pack.loss_mask.tolist()
    return retrained(pack, lambda r, i, last, trained: trained or (i == last and mask[r][i + 1]))


def padding_trained(pack: Pack) -> list[Piece]:
    return retrained(pack, lambda r, i, last, trained: i < last)


def ends_not_trained(pack: Pack) -> list[Piece]:
    """No target has the padding's id, which is that of the end token too."""
    ids = pack.input_ids.tolist()
    return retrained(pack, lambda r, i, last, trained: trained and ids[r][i + 1] != END)


# --- 3. What it is divided by -----------------------------------------------------------


def mean_of_means(pack: Pack, groups: Callable[[list[Piece]], list[list[int]]],
                  empty: float = math.nan) -> list[Piece]:
    """Each group of a row's tokens has a mean, and the loss is the mean of these."""
    rows, pieces = rows_of(pack), []
    n = sum(len(groups(row)) for row in rows)
    for row in rows:
        whole, shares = joined(row), [0.0] * len(joined(row).ids)
        for group in groups(row):
            count = sum(whole.targets[i] is not None for i in group)
            for i in group:
                shares[i] = 1 / (n * count) if count else empty
        parts = cut([whole._replace(shares=shares)], starts_of(row))
        pieces += [p._replace(targets=[0 if math.isnan(s) else t for t, s in
                                       zip(p.targets, p.shares, strict=True)]) for p in parts]
    return pieces


def spans(length: int) -> Callable[[list[Piece]], list[list[int]]]:
    return lambda row: [list(range(i, i + length)) for i in range(0, len(joined(row).ids), length)]


def documents(row: list[Piece]) -> list[list[int]]:
    return [list(range(start, start + len(p.ids)))
            for start, p in zip(starts_of(row), row, strict=True)]


# --- 4. All of them ---------------------------------------------------------------------

MISTAKES: dict[str, tuple[Wrong, tuple[str, ...]]] = {  # and the packs that must catch each
    "no exchange": (no_exchange, ("straddle", "short_straddle", "fewer_kv_heads")),
    "no exchange if short": (no_exchange_if_short, ("short_straddle",)),
    "positions run on": (positions_run_on, ()),
    "positions of ranks": (positions_of_ranks, ("straddle",)),
    "cut at end tokens": (cut_at_end_tokens, ("end_inside", "no_end")),
    "cut where positions fall": (cut_where_positions_fall, ("ones",)),
    "mask on inputs": (mask_on_inputs, ("sft_border",)),
    "labels across": (labels_across, ("sft_border",)),
    "padding trained": (padding_trained, ("padding",)),
    "ends not trained": (ends_not_trained, ("padding",)),
    "mean of micro-batches": (lambda p: mean_of_means(p, spans(S)),
                              ("unequal_counts", "empty_micro_batch", "nothing_trains")),
    "mean of ranks": (lambda p: mean_of_means(p, spans(S // RANKS), 0.0), ("idle_ranks",)),
    "mean of documents": (lambda p: mean_of_means(p, documents, 0.0), ("masked_document",)),
    "mean of chunks": (lambda p: mean_of_means(p, spans(p.chunk_tokens)), ("empty_chunk",)),
}


def wrong_step(name: str, weights: Weights, pack: Pack) -> tuple[float, dict[str, Tensor]]:
    """The step as the mistake has it."""
    if name == "K and V averaged":  # over the two ranks that share a KV head
        loss, gradients = reference.step(weights, reference.pieces_of(pack))
        alone = weights.config["num_key_value_heads"] < RANKS
        return loss, {key: g / RANKS if alone and ("k_proj" in key or "v_proj" in key) else g
                      for key, g in gradients.items()}
    return reference.step(weights, MISTAKES[name][0](pack))


CAUGHT_BY = {name: caught_by for name, (_, caught_by) in MISTAKES.items()}
CAUGHT_BY["K and V averaged"] = ("fewer_kv_heads",)


def run(name: str, weights: dict[str, Weights],
        packs: list[Pack]) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """An adapter that makes the mistake."""
    steps = {pack.name: wrong_step(name, weights[pack.weights], pack) for pack in packs}
    return ({pack: loss for pack, (loss, _) in steps.items()},
            {pack: gradients for pack, (_, gradients) in steps.items()})
