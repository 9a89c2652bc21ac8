"""The truth, slowly: a Llama that reads one document at a time, one token and one head at a time.

There is no mask, no pack, no batch and no label that is ignored. A document is cut out of its pack,
and the model sees nothing else. Tokens are a Python list of vectors. All is float64; autograd gives
the gradients, and finite differences test them. Nothing here is shared with model.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teaching.conformance.packs import Pack, Weights


class Piece(NamedTuple):
    """Tokens that see each other, and nothing else does. The truth's pieces are documents."""

    ids: list[int]
    targets: list[int | None]  # what each token shall predict; None: nothing
    positions: list[int]
    shares: list[float]  # the factor of each token's loss


def pieces_of(pack: Pack) -> list[Piece]:
    """The pack's documents, one by one."""
    documents, count = [], 0
    for row, doc_lens in enumerate(pack.doc_lens):
        start = 0
        for length in doc_lens:
            ids = pack.input_ids[row, start:start + length].tolist()
            trained = pack.loss_mask[row, start:start + length].tolist()
            targets = [ids[i + 1] if i + 1 < length and trained[i + 1] else None
                       for i in range(length)]
            count += sum(target is not None for target in targets)
            documents.append((ids, targets))
            start += length
    share = 1 / count if count else 0.0
    return [Piece(ids, targets, list(range(len(ids))), [share] * len(ids))
            for ids, targets in documents]


def normalize(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of one token, (C,) -> (C,)."""
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * gain


def rotation(position: int, head_dim: int, theta: float) -> Tensor:
    """RoPE at a position as a matrix, (D, D): it turns dimensions i and i + D/2."""
    half = head_dim // 2
    matrix = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for i in range(half):
        angle = position * theta ** (-2 * i / head_dim)
        matrix[i, i] = matrix[i + half, i + half] = math.cos(angle)
        matrix[i, i + half] = -math.sin(angle)
        matrix[i + half, i] = math.sin(angle)
    return matrix


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What a token gathers from itself and those before it; all heads in a row, (H*D,).

    Its queries (H, D), and the keys and values (n, H_kv, D) of the n tokens that it may look at.
    """
    n_heads, head_dim = query.shape
    group = n_heads // keys.shape[1]  # so many query heads share one KV head
    outputs = []
    for head in range(n_heads):
        scores = keys[:, head // group] @ query[head] / math.sqrt(head_dim)  # (n,)
        outputs.append(torch.softmax(scores, dim=0) @ values[:, head // group])
    return torch.cat(outputs)


def read(tensors: dict[str, Tensor], config: dict[str, Any], piece: Piece) -> list[Tensor]:
    """The logits after each token of a piece, each (V,)."""
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    turns = [rotation(p, head_dim, config["rope_theta"]) for p in piece.positions]
    xs = [tensors["model.embed_tokens.weight"][token] for token in piece.ids]
    for layer in range(config["num_hidden_layers"]):
        own = {name.removeprefix(f"model.layers.{layer}."): t for name, t in tensors.items()}
        queries, keys, values = [], [], []
        for x, turn in zip(xs, turns, strict=True):
            x = normalize(x, own["input_layernorm.weight"], eps)
            q, k, v = (own[f"self_attn.{name}_proj.weight"] @ x for name in "qkv")
            queries.append(q.reshape(-1, head_dim) @ turn.T)  # (H*D,) -> (H, D)
            keys.append(k.reshape(-1, head_dim) @ turn.T)  # (H_kv*D,) -> (H_kv, D)
            values.append(v.reshape(-1, head_dim))
        all_keys, all_values = torch.stack(keys), torch.stack(values)  # (length, H_kv, D)
        for i, x in enumerate(xs):
            seen = attend(queries[i], all_keys[:i + 1], all_values[:i + 1])
            x = x + own["self_attn.o_proj.weight"] @ seen
            hidden = normalize(x, own["post_attention_layernorm.weight"], eps)
            gate, up = own["mlp.gate_proj.weight"] @ hidden, own["mlp.up_proj.weight"] @ hidden
            xs[i] = x + own["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return [tensors["lm_head.weight"] @ normalize(x, tensors["model.norm.weight"], eps) for x in xs]


def loss_of(tensors: dict[str, Tensor], config: dict[str, Any], pieces: Sequence[Piece]) -> Tensor:
    """The sum of all tokens' losses, each times its share."""
    total = torch.zeros((), dtype=torch.float64)
    for piece in pieces:
        logits = read(tensors, config, piece)
        for scores, target, share in zip(logits, piece.targets, piece.shares, strict=True):
            if target is not None:
                total = total + share * (torch.logsumexp(scores, dim=0) - scores[target])
    return total


def step(weights: Weights, pieces: Sequence[Piece]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step. A weight that nothing reaches has a gradient of 0."""
    tensors = {name: t.clone().requires_grad_() for name, t in weights.tensors.items()}
    loss = loss_of(tensors, weights.config, pieces)
    if not loss.requires_grad:
        return float(loss), {name: torch.zeros_like(t) for name, t in tensors.items()}
    loss.backward()
    return loss.item(), {name: torch.zeros_like(t) if t.grad is None else t.grad
                         for name, t in tensors.items()}
