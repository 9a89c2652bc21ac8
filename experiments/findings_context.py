"""Findings about position and length: what RoPE, masks and the training length do to a longer context.

All start from the tiny recipe's `long` stage (2K tokens) and go to 8K in 40 steps of one sequence.
"""

from __future__ import annotations

from lab import STAGES, Arm, Finding, by_length

THETA = STAGES["long"].rope_theta or 0.0  # what the start was trained with
LENGTHS = "256,2k,4k,8k"
STEPS = 40


def extend(times: float, length: str = "8k", steps: int = STEPS, **changes: object) -> Arm:
    """The start, trained on at a longer length with so many times its RoPE base."""
    return Arm(f"train.py --stage ultra --seq {length} --batch-tokens {length} "
               f"--rope-theta {times * THETA:g}", steps, **changes)  # type: ignore[arg-type]


rope_base = Finding(
    "rope-base", "RoPE base for a context four times as long", "Tables 18 and 19",
    "a base well above the old one recalls more at the new length",
    {f"theta x{times}": extend(times) for times in (1, 8, 16, 64)},
    {"recall at 8K, theta x16 less x1":
        lambda arms: arms["theta x16"][-1]["recall@8k"] - arms["theta x1"][-1]["recall@8k"]},
    by_length("recall", LENGTHS), lengths=LENGTHS)

FINDINGS = [rope_base]
