"""Adapters for transformers: LlamaForCausalLM on packed documents, in the ways people call it.

    python teaching/conformance/check.py --adapter teaching/conformance/hf.py --tolerance 5e-6

`run` is the way that its own collator and Trainer go: `position_ids` that restart, labels of -100
where a document begins, and one count of labels for the whole step. The other functions each leave
one of these out. transformers computes RoPE's angles and the loss's softmax in float32, so even
what is right differs in the sixth digit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from teaching.conformance.packs import Pack, Weights

IGNORED = -100


def make_model(weights: Weights, attention: str) -> LlamaForCausalLM:
    """A LlamaForCausalLM in float64 with the pack's weights."""
    config = LlamaConfig.from_dict(dict(weights.config), attn_implementation=attention)
    model = LlamaForCausalLM(config).to(torch.float64)
    model.load_state_dict(weights.tensors)
    return model.train()


def flatten(pack: Pack, row: int) -> dict[str, Tensor]:
    """A micro-batch as the collator makes it of documents: input_ids, labels, position_ids."""
    ids, mask = pack.input_ids[row], pack.loss_mask[row]
    labels = torch.where(mask, ids, IGNORED)
    lengths = pack.doc_lens[row]
    documents = [{"input_ids": i, "labels": l}
                 for i, l in zip(ids.split(lengths), labels.split(lengths), strict=True)]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(documents))


def step(weights: Weights, pack: Pack, *, without: str = "", count: bool = True,
         attention: str = "sdpa", **more: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, summed over micro-batches as the Trainer does.

    Without the count each micro-batch has its own mean, divided by their number.
    """
    model, loss_sum = make_model(weights, attention), 0.0
    batches = [flatten(pack, row) for row in range(len(pack.doc_lens))]
    total = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)  # as the Trainer
    for row, batch in enumerate(batches):
        if without == "borders":
            batch["labels"] = torch.where(pack.loss_mask[row], pack.input_ids[row], IGNORED)[None]
        if without in batch:
            del batch[without]
        if more.get("ones"):
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        shared = {"num_items_in_batch": total} if count else {}
        loss = model(**batch, **shared, use_cache=more.get("use_cache", False)).loss
        loss = loss if count else loss / len(batches)
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, {name: weight.grad for name, weight in model.named_parameters()}


def over_packs(weights: dict[str, Weights], packs: list[Pack],
               **options: Any) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """An adapter with options of `step`."""
    steps = {pack.name: step(weights[pack.weights], pack, **options) for pack in packs}
    return ({name: loss for name, (loss, _) in steps.items()},
            {name: gradients for name, (_, gradients) in steps.items()})


run = over_packs  # position_ids, the collator's labels, one count for the step
eager = partial(over_packs, attention="eager")
no_count = partial(over_packs, count=False)  # model(...).loss / micro-batches
no_positions = partial(over_packs, without="position_ids")
no_borders = partial(over_packs, without="borders")  # labels = input_ids where trained
ones_mask = partial(over_packs, ones=True)  # position_ids, and an attention_mask of ones
with_cache = partial(over_packs, use_cache=True)  # position_ids, and the default use_cache
WAYS = {"run": run, "eager": eager, "no_count": no_count, "no_positions": no_positions,
        "no_borders": no_borders, "ones_mask": ones_mask, "with_cache": with_cache}
