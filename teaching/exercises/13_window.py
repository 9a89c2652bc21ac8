"""* A sliding window.                                                          about 60 minutes

The idea. Attention over everything costs the square of a document's length. Some layers of some
models look only at the last `window` tokens: of their document, and themselves among them.
doc_lens (4, 2), window 2:

        a b c d e f
      a x . . . . .
      b x x . . . .
      c . x x . . .
      d . . x x . .
      e . . . . x .       e begins a document: nothing before it counts
      f . . . . x x

Shapes. q (T, H, D), k and v (T, H_kv, D), cu_seqlens (N + 1,) -> (T, H, D), in the dtype of q.
Scores are divided by the square root of D; query head h looks at KV head h // (H / H_kv).

Hints. The mask of exercise 2 with one more condition. Fill what is not allowed with minus infinity
*before* the softmax. How far back can two such layers look, and how far thirty-two?

Read: Mistral 7B (2310.06825). Grade: python teaching/grade.py 13
"""

from __future__ import annotations

from torch import Tensor


def window_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """Causal attention inside documents over the last `window` tokens, one's own among them."""
    raise NotImplementedError
