"""The document mask.                                                           about 20 minutes

The idea. A token may look at itself, and at what stands before it in its own document. Written out
for doc_lens (3, 1, 2), where the row looks at the column:

        a b c d e f
      a x . . . . .
      b x x . . . .       cu_seqlens = [0, 3, 4, 6]
      c x x x . . .
      d . . . x . .       at 512K tokens this would have 275 billion entries:
      e . . . . x .       fast kernels take cu_seqlens instead, and never build it
      f . . . . x x

Shapes. cu_seqlens (N + 1,) int32, from 0 to T -> mask (T, T) bool.

Hints. First find for each token the number of its document. torch.bucketize or searchsorted do it;
mind on which side a token falls that stands exactly at an end. Then compare all rows with all
columns at once: x[:, None] is a column, and x[None, :] a row.

Read: ProLong B.2 and Table 20. Grade: python teaching/grade.py 02
"""

from __future__ import annotations

from torch import Tensor


def document_mask(cu_seqlens: Tensor) -> Tensor:
    """Who may look at whom, (T, T) bool: [i, j] is true if token i may look at token j."""
    raise NotImplementedError
