"""Positions, labels and cu_seqlens.                                            about 45 minutes

The idea. Many documents lie end to end in one sequence of S tokens. All that keeps them apart is
`doc_lens`, their lengths. Three things follow from it:

    doc_lens     (3, 1, 4)                     S = 8 tokens, N = 3 documents
    input_ids    10 11 12 | 13 | 14 15 16 17
    positions     0  1  2 |  0 |  0  1  2  3   a document does not know what stands before it
    labels       11 12  . |  . | 15 16 17  .   the next token; a document's last has none: -100
    cu_seqlens   0 3 4 8                       where documents begin, and the end

A loss mask says which tokens are trained on, as *targets*. If 12 is not trained on, the label of
11 is gone, because 12 is what 11 would be asked for:

    loss_mask     x  x  - |  x |  x  x  x  x
    labels       11  .  . |  . | 15 16 17  .

Then P ranks share the sequence. Rank r has the tokens from r * S/P up to (r + 1) * S/P. Its labels
and positions are cut from the whole, as its ids are. In (3, 1, 4) over two ranks rank 1 has the
positions 0 1 2 3; in (6, 2) it has 4 5 0 1.

Shapes. input_ids, labels, positions (S,); cu_seqlens (N + 1,); a share (S / P,). All are whole
numbers of any dtype.

Hints. torch.arange, cumsum and repeat_interleave are enough. Which token asks for a document's
first? What is the label of the last token of rank 0's share, if its document goes on in rank 1?

Read: ProLong 6.1 and A.3. Grade: python teaching/grade.py 01
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

IGNORE_INDEX = -100  # the label of a token that has none


def layout(input_ids: Tensor, doc_lens: Sequence[int],
           loss_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions (S,), labels (S,) and cu_seqlens (N + 1,) of one sequence.

    `loss_mask` (S,) bool is true where a token is trained on; None means everywhere.
    """
    raise NotImplementedError


def share(input_ids: Tensor, doc_lens: Sequence[int], rank: int,
          ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels and positions, (S / ranks,) each, of one rank. All tokens are trained."""
    raise NotImplementedError
