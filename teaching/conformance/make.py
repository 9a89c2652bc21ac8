"""Make the packs and their truth: `python teaching/conformance/make.py [FOLDER]`.

Tokens and weights come from numpy's seeded generator, the truth from reference.py. A second run on
the same machine gives the same bytes; on another one sums may round differently in the last digits.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from teaching.conformance import reference
from teaching.conformance.packs import KNOWN, Pack, Weights

S, VOCAB, DIM, HEAD_DIM, FFN, LAYERS = 48, 41, 16, 4, 24, 2
BEGIN, END, FIRST = 1, 2, 3  # begin of text, end of text, the first other token
KV_HEADS = {"gqa": 2, "mqa": 1}  # of 4 query heads
WITH_GRADIENTS = ("straddle", "fewer_kv_heads", "sft_border")

# --- 1. The packs -----------------------------------------------------------------------


class Plan(NamedTuple):
    """How a pack is made."""

    catches: str
    doc_lens: list[list[int]]
    trained: list[list[tuple[int, int]]] | None = None  # spans of each micro-batch; None: all
    weights: str = "gqa"
    ends: bool = True  # whether documents end in END
    inside: tuple[int, ...] = ()  # tokens that are END in the middle of a document
    padded: int = 0  # the last document is so many END


ODD = [5, 7, 13, 9, 11, 3]
PLANS = {  # with 2 ranks shares end at 24, with 4 at 12, 24, 36
    "straddle": Plan("attention or positions that begin anew on each rank", [[7, 29, 12]]),
    "short_straddle": Plan("no exchange between ranks because every document is shorter than a "
                           "rank's share", [[7] * 6 + [6]]),
    "end_inside": Plan("documents and positions that restart at an end token instead of at a "
                       "document's end", [[30, 18]], inside=(11, 20, 40)),
    "no_end": Plan("documents without an end token that run into each other",
                   [[16, 16, 16]], ends=False),
    "ones": Plan("documents of one token that are lost, or joined to the next",
                 [[1, 25, 1, 1, 1, 19]]),
    "idle_ranks": Plan("a mean over ranks, though some have nothing to train", [ODD],
                       [[(42, 48)]]),
    "masked_document": Plan("a mean over documents, though one has nothing to train",
                            [[20, 15, 13]], [[(0, 20), (35, 48)]]),
    "nothing_trains": Plan("0 / 0 where a step has nothing to train: loss and gradients are 0",
                           [[20, 28]], [[]]),
    "fewer_kv_heads": Plan("gradients of K and V that are not summed over the ranks that share "
                           "a KV head", [[7, 29, 12]], weights="mqa"),
    "unequal_counts": Plan("a mean of micro-batches' means", [ODD, [48], [30, 18]],
                           [[(0, 48)], [(20, 23)], [(25, 36)]]),
    "empty_micro_batch": Plan("a mean of means with a micro-batch that has nothing to train",
                              [[48], ODD, [24, 24]], [[(0, 48)], [], [(10, 30)]]),
    "empty_chunk": Plan("0 / 0 in a chunk of the loss that has no label", [[48]],
                        [[(0, 9), (40, 48)]]),
    "padding": Plan("padding that is trained, or real end tokens that are not because they have "
                    "its id", [[19, 11, 18]], [[(0, 30)]], padded=18),
    "sft_border": Plan("a loss mask put on inputs instead of targets, or a document's last token "
                       "that predicts the next document", [[14, 10, 24]],
                       [[(8, 18), (20, 26), (39, 48)]]),
}


def draw_ids(plan: Plan, doc_lens: list[int], rng: np.random.Generator) -> np.ndarray:
    """One micro-batch: BEGIN, random tokens, END; a document of one token has neither."""
    ids = rng.integers(FIRST, VOCAB, size=S)
    start = 0
    for length in doc_lens:
        if length > 1:
            ids[start] = BEGIN
            if plan.ends:
                ids[start + length - 1] = END
        start += length
    ids[list(plan.inside)] = END
    ids[S - plan.padded:] = END
    return ids


def make_pack(name: str, seed: int) -> Pack:
    """Draw a pack's tokens, and mask what its plan does not train."""
    plan, rng = PLANS[name], np.random.default_rng((0, seed))
    ids = np.stack([draw_ids(plan, doc_lens, rng) for doc_lens in plan.doc_lens])  # (M, S)
    mask = np.full(ids.shape, plan.trained is None)
    for row, spans in enumerate(plan.trained or ()):
        for start, end in spans:
            mask[row, start:end] = True
    return Pack(name, plan.catches, plan.weights, torch.from_numpy(ids), torch.from_numpy(mask),
                plan.doc_lens, chunk_tokens=8)


# --- 2. The weights ---------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    """A config.json as Hugging Face writes it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
            "hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "num_key_value_heads": KV_HEADS[name], "head_dim": HEAD_DIM, "intermediate_size": FFN,
            "max_position_embeddings": S, "rope_theta": 100.0, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
            "mlp_bias": False, "bos_token_id": BEGIN, "eos_token_id": END}


def make_weights(name: str) -> Weights:
    """Matrices large enough for attention to choose, and gains that differ."""
    rng, kv_dim = np.random.default_rng((1, KV_HEADS[name])), KV_HEADS[name] * HEAD_DIM
    shapes = {"model.embed_tokens": (VOCAB, DIM)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in (
            ("input_layernorm", (DIM,)), ("self_attn.q_proj", (DIM, DIM)),
            ("self_attn.k_proj", (kv_dim, DIM)), ("self_attn.v_proj", (kv_dim, DIM)),
            ("self_attn.o_proj", (DIM, DIM)), ("post_attention_layernorm", (DIM,)),
            ("mlp.gate_proj", (FFN, DIM)), ("mlp.up_proj", (FFN, DIM)),
            ("mlp.down_proj", (DIM, FFN)))}
    shapes |= {"model.norm": (DIM,), "lm_head": (VOCAB, DIM)}
    drawn = {part: rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, 0.4, shape)
             for part, shape in shapes.items()}
    return Weights(config_of(name), {f"{part}.weight": torch.from_numpy(value)
                                     for part, value in drawn.items()})


# --- 3. The truth, and the files --------------------------------------------------------


def truth_of(pack: Pack, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The pack's row of packs.json under "truth", and the gradients."""
    pieces = reference.pieces_of(pack)
    loss, gradients = reference.step(weights, pieces)
    norms = {name: g.norm().item() for name, g in gradients.items()}
    valid = sum(target is not None for piece in pieces for target in piece.targets)
    return {"valid_tokens": valid, "loss": loss, "grad_norm": math.hypot(*norms.values()),
            "grad_norms": norms}, gradients


def main(folder: Path = KNOWN) -> None:
    """Write all files of `folder`."""
    folder.mkdir(exist_ok=True)
    weights = {name: make_weights(name) for name in KV_HEADS}
    for name, each in weights.items():
        (folder / f"{name}.json").write_text(json.dumps(each.config, indent=1) + "\n")
        save_file(each.tensors, folder / f"{name}.safetensors")
    rows, tensors, kept = [], {}, {}
    for seed, name in enumerate(PLANS):
        pack = make_pack(name, seed)
        truth, gradients = truth_of(pack, weights[pack.weights])
        rows.append({"name": name, "catches": pack.catches, "weights": pack.weights,
                     "doc_lens": pack.doc_lens, "chunk_tokens": pack.chunk_tokens, "truth": truth})
        tensors |= {f"{name}/input_ids": pack.input_ids, f"{name}/loss_mask": pack.loss_mask}
        if name in WITH_GRADIENTS:
            kept |= {f"{name}/{key}": gradient for key, gradient in gradients.items()}
        print(f"{name:<18} {truth['valid_tokens']:>4} trained, loss {truth['loss']:.6f}, "
              f"gradient norm {truth['grad_norm']:.6f}")
    (folder / "packs.json").write_text(json.dumps(rows, indent=1) + "\n")
    save_file(tensors, folder / "packs.safetensors")
    save_file(kept, folder / "gradients.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
