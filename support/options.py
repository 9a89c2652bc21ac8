"""The options of train.py, most of which sft.py shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from support.cli import option, parse_length


@dataclass(frozen=True)
class RunConfig:
    """Options of every run; train.py and sft.py add their own."""

    init: str = option("", "start from this model folder, or from a run's newest checkpoint")
    steps: int | None = option(None, "optimizer steps per stage", parse_length)
    batch_tokens: int | None = option(None, "tokens per optimizer step", parse_length)
    micro_batch_tokens: int | None = option(None, "tokens of a forward pass", parse_length)
    lr: float | None = option(None, "peak learning rate", float)
    reorder: bool = option(True, "sort a step's sequences by cost, so that ranks wait less")
    seq_parallel_size: int | None = option(None, "ranks that share a sequence", parse_length)
    dtype: str = option("auto", "compute in auto, float32, bfloat16 or float64")
    attention: str = option("auto", "attention backend: auto, varlen, sdpa or reference")
    compile: str = option("auto", "torch.compile each block: on, off, or auto (on a GPU)")
    activations: str = option("auto", "keep, attention, recompute or offload; auto: what fits")
    loss_chunk_tokens: int = option(2048, "hold the logits of so many tokens; 0: of all", int)
    mlp_tile_tokens: int | None = option(None, "MLPs in tiles of so many tokens; 0: in one", int)
    head_chunks: int | None = option(None, "exchange and attend to a rank's heads in N parts", int)
    host_optimizer: bool = option(False, "keep weights and Adam's moments in host memory")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices", float)
    clip: float = option(1.0, "largest norm of the gradient", float)
    eval: bool = option(True, "evaluate and draw after each stage")
    eval_every: int | None = option(None, "steps between small evaluations", parse_length)
    samples: int | None = option(None, "questions of a task and length (as eval.py)", parse_length)
    save_every: int | None = option(None, "steps from save to save (default: 30 min)", parse_length)
    keep: int = option(2, "newest checkpoints to keep, besides stages' last; 0 keeps all", int)
    resume: str = option("", "go on with this run, from its newest checkpoint")
    out: str = option("", "run folder (default: runs/RECIPE, numbered if taken)")
    tokenizer: str = option("", "tokenizer (default: the model's own, or bytes)")
    seed: int = option(0, "seed of weights, data and order", int)

    def __post_init__(self) -> None:
        """Raise ValueError for a number that no run can have, before anything runs."""
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"--compile {self.compile} is unknown; choose auto, on or off")
        for name, value in vars(self).items():
            may_be_0 = name in ("seed", "keep", "weight_decay", "loss_chunk_tokens",
                                "mlp_tile_tokens")
            if isinstance(value, int | float) and not isinstance(value, bool) and not (
                    0 < value < math.inf or (may_be_0 and value == 0)):
                least = "at least 0" if may_be_0 else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} {value} must be {least} and finite")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What train.py adds: which stages to run, on which data."""

    recipe: str = option("", "tiny, prolong or ablation (default: tiny for bytes, else prolong)")
    stage: str = option("", "run this stage of the recipe alone")
    seq: int | None = option(None, "run the last stage (or --stage) at this length", parse_length)
    model: str = option("tiny", "model preset, where there is no --init")
    data: str = option("", "folder of packed domains; without it the embedded ones are packed")
    mix: str = option("", "other mixture: recall-2k=0.6,code_repos-2k=0.4")
    short_mix: str = option("", "short part: shortmix[-ablation], slimpajama, fineweb-edu or dclm")
    rope_theta: float | None = option(None, "RoPE base of the stage", float)
    plan: bool = option(False, "print what a step needs in memory and time, and train nothing")
    world_size: int | None = option(None, "ranks that --plan is for", parse_length)


def usual_recipe(tokenizer: Any) -> str:
    """The tiny recipe's made-up documents are for the tokenizer "bytes" alone."""
    return "tiny" if tokenizer.spec == "bytes" else "prolong"
