"""NTK's theta, and RoPE.                                                       about 45 minutes

The idea. RoPE turns pairs of numbers in each query and key, like hands of clocks: pair i turns by
theta^(-2i/D) radians per position, the first by 1, the others more and more slowly. Only the
difference of two positions then counts in the product of a query and a key. A larger theta slows
the hands, so that a longer context has no angle that the model has never seen. For a context that
is t = to/from times as long, dynamic NTK suggests theta * t^(D/(D-2)).

    theta 100, from 10 to 20 tokens, D = 4      100 * 2^(4/2) = 400
    theta 100, from 20 to 10 tokens             100: a shorter context keeps it

    x = (1, 0, 0, 1), D = 4, theta 100, position 1: two pairs, (x0, x2) and (x1, x3)
        pair 0, frequency 1       (1, 0) turns by 1.0    ->  ( cos 1,     sin 1  )
        pair 1, frequency 0.1     (0, 1) turns by 0.1    ->  (-sin 0.1,   cos 0.1)
        result                    (cos 1, -sin 0.1, sin 1, cos 0.1)

Shapes. x (T, H, D), positions (T,) -> (T, H, D) in the dtype of x.

Hints. Llama's weights from Hugging Face pair i with i + D/2, not 2i with 2i + 1. bfloat16 has eight
bits: it cannot tell position 15,962 from 15,990. Compute angles in float64, and round at the end.

Read: ProLong 6.1 and B.1, RoFormer (2104.09864). Grade: python teaching/grade.py 03
"""

from __future__ import annotations

from torch import Tensor


def ntk_theta(theta: float, from_len: float, to_len: float, head_dim: int) -> float:
    """The base for a context of `to_len` tokens, of a model trained with theta on `from_len`."""
    raise NotImplementedError


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn each head of each token by its position: (T, H, D), (T,) -> (T, H, D)."""
    raise NotImplementedError
