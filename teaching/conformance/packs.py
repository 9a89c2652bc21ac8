"""What a pack is, and how packs and their truth are read from `known/`.

    known/gqa.json, gqa.safetensors    a Llama's config.json, and its weights in float64
    known/mqa.json, mqa.safetensors    the same with one KV head for all query heads
    known/packs.json                   of each pack: what it catches, doc_lens, loss, gradient norms
    known/packs.safetensors            NAME/input_ids int64 and NAME/loss_mask bool, (M, S)
    known/gradients.safetensors        NAME/PARAMETER float64, for three packs

One pack is one optimizer step: M micro-batches of S tokens. Its loss is the mean cross-entropy, in
nats, over all trained tokens of the step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

KNOWN = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Weights:
    """A Llama: its config.json, and its tensors in float64 under Hugging Face's names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Pack:
    """One step of training, without its truth."""

    name: str
    catches: str
    weights: str  # "gqa" or "mqa"
    input_ids: Tensor  # (M, S) int64: a row is a micro-batch
    loss_mask: Tensor  # (M, S) bool: which tokens are trained, as targets
    doc_lens: list[list[int]]  # of each micro-batch; they sum to S
    chunk_tokens: int  # the chunk of the loss to try, if the trainer has chunks


@dataclass(frozen=True)
class Truth:
    """What a trainer must give for a pack."""

    valid_tokens: int
    loss: float
    grad_norm: float
    grad_norms: dict[str, float]  # of each parameter
    gradients: dict[str, Tensor]  # of each parameter, or empty


def load_weights(folder: Path = KNOWN) -> dict[str, Weights]:
    """The Llamas by name."""
    return {name: Weights(json.loads((folder / f"{name}.json").read_text()),
                          load_file(folder / f"{name}.safetensors")) for name in ("gqa", "mqa")}


def load_packs(folder: Path = KNOWN) -> tuple[list[Pack], dict[str, Truth]]:
    """All packs, and the truth by pack's name."""
    tensors = load_file(folder / "packs.safetensors")
    gradients = load_file(folder / "gradients.safetensors")
    packs, truths = [], {}
    for row in json.loads((folder / "packs.json").read_text()):
        name, truth = row["name"], row.pop("truth")
        packs.append(Pack(input_ids=tensors[f"{name}/input_ids"],
                          loss_mask=tensors[f"{name}/loss_mask"], **row))
        mine = {key.removeprefix(f"{name}/"): value for key, value in gradients.items()
                if key.startswith(f"{name}/")}
        truths[name] = Truth(gradients=mine, **truth)
    return packs, truths
