"""Cross-entropy in chunks, computed twice.                                     about 60 minutes

The idea. The logits of 64K tokens over Llama-3's 128,256 words are 33.6 GB (31.3 GiB) in float32,
more than the model. The loss needs them only one token at a time. So we compute the logits of a
chunk, take its loss and throw the logits away; backward computes them a second time.

    T = 5 tokens, chunk_tokens = 2       [t0 t1] [t2 t3] [t4]       the last chunk is shorter
    labels                                3  7    .  .    1         . is -100: no label

    forward     3 times: logits (2, V) -> sum of losses -> only hidden, weight and labels are kept
    backward    3 times: logits (2, V) again -> gradients
    the sum     loss of t0 + loss of t1 + 0 + loss of t4

A chunk without any label must add 0. Its *mean* would be 0 / 0, and NaN times 0 is still NaN.

Shapes. hidden (T, C), weight (V, C), labels (T,) int64 -> a scalar: the sum over all labels.
Divide by nothing: exercise 9 does. The scalar must take `.backward()` also when no token has a
label: gradients are 0 then. Exercise 9 says why.

Hints. torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False) keeps a function's
inputs and calls it again for backward. F.cross_entropy has `reduction` and `ignore_index`.

How it is graded: by the sum, by its gradients, and by watching every operation for results with
more rows of logits than a chunk has, and for logits that are kept between forward and backward.

Read: docs/512K.md, "What the tokens take". Grade: python teaching/grade.py 06
"""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100  # the label of a token that has none


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """The sum of the labels' cross-entropies, holding chunk_tokens rows of logits at most."""
    raise NotImplementedError
