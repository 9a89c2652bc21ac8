"""Ulysses: tokens for heads.                                                   about 90 minutes

The idea. P ranks share a sequence: each holds T = S/P tokens with all their heads. Only attention
mixes tokens. So before it, ranks trade tokens for heads: each gets *all* tokens of *some* heads,
computes ordinary attention, and trades back. With P = 2 ranks, 2 heads and 4 tokens:

                before             after: which rank has it
             head 0  head 1        head 0  head 1
    a           0       0             0       1        before (T, H, D)
    b           0       0             0       1        after  (S, H/P, D)
    c           1       1             0       1
    d           1       1             0       1

The trade is one collective: every rank has x of P parts, and sends part j to rank j. What arrives
is in the order of the senders. With P = 2:

    rank 0 has x = [A, B]       rank 0 receives [A, C]
    rank 1 has x = [C, D]       rank 1 receives [B, D]

K and V have fewer heads than q. They travel with their own: 32 + 8 + 8 heads, not 32 + 32 + 32.
Only if there are fewer KV heads than ranks is each repeated, P / H_kv times *side by side*: heads
0 1 become 0 0 1 1, because the query heads of rank 0 and of rank 1 look at KV head 0.

Shapes. exchange: x (P, ...) -> (P, ...). Attention: q (T, H, D), k and v (T, H_kv, D) -> (T, H, D).
cu_seqlens and max_seqlen are those of the whole sequence of S tokens. H divides by P, and H_kv by P
or P by H_kv.

Hints. torch.distributed.all_to_all_single(out, x, group=group) wants contiguous tensors and knows
nothing of autograd: write a torch.autograd.Function. Where does the gradient of a part lie that I
sent to rank j? (T, H, D) is (T, P, H/P, D), and what arrives as (P, T, H/P, D) is (S, H/P, D):
write the shape beside every line. torch.empty_like(x) keeps the strides of x: make x contiguous
first. Ask `group` for rank and size; this world may hold other groups.

Given: `document_attention(q, k, v, cu_seqlens, max_seqlen)`, q (S, h, D), k and v (S, h_kv, D) ->
(S, h, D), where h is a multiple of h_kv. Four processes on this machine are the ranks; a rank that
waits for a call that others do not make gives up after a minute.

Read: Ulysses (2309.14509), ProLong A.3. Grade: python teaching/grade.py 07
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from model import document_attention  # noqa: F401 (it is for you to call)


def exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send x[j] to rank j, receive rank i's part as out[i]; gradients go back the same way."""
    raise NotImplementedError


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      group: dist.ProcessGroup) -> Tensor:
    """Attention inside documents over all ranks' tokens; returns this rank's, (T, H, D)."""
    raise NotImplementedError
