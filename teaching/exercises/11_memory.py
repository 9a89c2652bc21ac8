"""The memory of one rank at 512K.                                              about 60 minutes

The idea. Whether a model fits can be known with pencil and paper. What counts is not the weights
but what a rank's tokens leave behind for backward. A number has 4 bytes in float32 and 2 in
bfloat16. C is the model's width, F the MLP's, D a head's, H and H_kv the numbers of heads.

Weights. A block has the queries' and the output's matrix (C x HD each), keys' and values' (C x
H_kv D each), three matrices of the MLP (C x F) and two gains (C). Besides blocks there are the
embedding and the head (V x C each; one, if they are tied) and a last gain (C).

For 512K tokens over 8 ranks, `tokens` is 65,536, this rank's. Bytes:

    "state"        weights, gradients and Adam's two moments, float32, spread over all ranks
    "gathered"     embedding, head, last gain and two blocks in bfloat16, and the gradients of one
                   block in float32: what a rank has whole while it computes
    "inputs"       if blocks are computed again: the input of each block, bfloat16
    "everything"   if nothing is: of each block, in bfloat16, two norms with input and output each;
                   q and attention's output; k and v; four rows of F in the MLP (gate, silu(gate),
                   up, their product); and in float32 a number for each head (the log-sum-exp)

By hand: C 4, F 6, H 2, H_kv 1, D 2, V 10, one layer, not tied; 16 tokens, one rank.

    weights        4 * (2*4 + 2*2 + 3*6 + 2) = 128 in the block, and 4 * (2*10 + 1) = 84: 212
    state          212 * 16 = 3,392
    gathered       2 * (84 + 2*128) + 4 * 128 = 1,192
    inputs         16 * 1 * 2 * 4 = 128
    everything     16 * (2 * (4*4 + 2*4 + 2*2 + 4*6) + 4*2) = 16 * 112 = 1,792

Shapes. `shape` is a ModelConfig (model.py): dim, ffn_dim, head_dim, n_heads, n_kv_heads, n_layers,
vocab_size, tie_embeddings.

Hints. Which of the four are divided by the ranks, and which have been already? Then ask your
function for Llama-3-8B at 512K over 8 ranks: what is 328 GiB, and what is 16?

Read: docs/512K.md. Grade: python teaching/grade.py 11
"""

from __future__ import annotations

from model import ModelConfig


def count_weights(shape: ModelConfig) -> int:
    """The number of weights of a model."""
    raise NotImplementedError


def rank_memory(shape: ModelConfig, tokens: int, ranks: int) -> dict[str, int]:
    """Bytes of "state", "gathered", "inputs" and "everything" on a rank with `tokens` tokens."""
    raise NotImplementedError
