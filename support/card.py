"""README.md of an exported model: what its folder and the run around it say. No path is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .files import read_json
from .hf import ARCHITECTURES
from .run import STATE, whole_checkpoints
from .scores import format_table

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{family}, long-context, nanolong]
---
# {class_name} with a context of {max_seq_len:,} tokens

{count:,} parameters in {dtype}: {n_layers} layers of width {dim}, MLPs of {ffn_dim},
{n_heads} heads for queries and {n_kv_heads} for keys and values, each of {head_dim},
and a vocabulary of {vocab_size:,} tokens. RoPE: theta {rope_theta:,.0f}, scaling {rope_scaling}.
Written by nanolong's `model.py export`. To load this folder:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("FOLDER")
"""


def add_card(model: Any, folder: str | Path) -> Any:
    """Put a README.md beside the weights of a model that was read from `folder`; return it."""
    weights, config = list(model.parameters()), model.config
    text = CARD.format(**vars(config) | {"rope_scaling": config.rope_scaling or "none"},
                       class_name=ARCHITECTURES[config.family].class_name,
                       count=sum(map(torch.numel, weights)), dtype=str(weights[0].dtype)[6:])
    if "tokenizer.json" in model.files:
        text += '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
    if (Path(folder) / "state.json").is_file():
        text += history(Path(folder).resolve())
    model.files["README.md"] = text.encode()
    return model


def history(folder: Path) -> str:
    """How a checkpoint came about: its stage and those before it in the run, and its scores."""
    state, run = read_json(folder / "state.json", STATE), folder.parent.parent
    in_run = folder.parent.name == "checkpoints" and (run / "config.json").is_file()
    lines, others = ["\n## Training\n"], whole_checkpoints(run, name_damaged=True) if in_run else []
    if in_run:
        init = Path(read_json(run / "config.json", {"init": str})["init"]).name
        lines += [f"The run began with the weights of `{init}`.\n"] if init else []
    before = [each for _, each in reversed(others) if each["step"] == each["steps"]
              and each["tokens_seen"] < state["tokens_seen"]]
    try:
        for each in (*before, state):
            stage, total = each["fingerprint"], sum(each["fingerprint"]["mixture"].values())
            theta = f"RoPE's theta {stage['rope_theta']:,.0f}, " if stage["rope_theta"] else ""
            lines += [f"- {each['stage']}: {each['step']:,} of {each['steps']:,} steps of "
                      f"{stage['batch_tokens']:,} tokens in sequences of {stage['seq_len']:,}, "
                      f"{theta}learning rate up to {stage['lr']:g}, seed {stage['seed']}; data:"]
            lines += [f"  - {share / total:.1%} {name}, sha256 {stage[f'data {name}']}"
                      for name, share in stage["mixture"].items() if share]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'state.json'} is none of train.py's ({error!r}); remove it, "
                         "to export the weights without their history") from None
    path = run / "eval" / f"{state['stage']}.json"
    if in_run and path.is_file():
        found = read_json(path, {"model": str, "settings": dict, "results": list,
                                 "bits_per_byte": list})
        if Path(found["settings"].get("model", "")).name == folder.name:  # else of a later step
            table = format_table([found]).replace("\n", "\n    ")
            lines += [f"\n## Scores\n\nOf this checkpoint before the export:\n\n    {table}"]
    return "\n".join(lines) + "\n"
