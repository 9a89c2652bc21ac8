"""Hold a trainer against the packs.

    python teaching/conformance/check.py --adapter teaching/conformance/ours.py
    python teaching/conformance/check.py --adapter mine.py:other_function --tolerance 5e-6

An adapter is a Python file with a function `run(weights, packs) -> (losses, gradients)`:

    weights      {"gqa": Weights, "mqa": Weights}, see packs.py
    packs        a list of Pack; pack.weights says which of the two it is for
    losses       {pack's name: float}
    gradients    {pack's name: {parameter's name: tensor}}, before any clipping

A pack that is missing in `losses` was not run. The exit status is 0 if all packs agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from teaching.conformance.packs import Pack, Truth, Weights, load_packs, load_weights

Gradients = dict[str, Tensor]
Adapter = Callable[[dict[str, Weights], list[Pack]],
                   tuple[dict[str, float], dict[str, Gradients]]]


class Row(NamedTuple):
    """One line of the table. Differences are relative, or absolute where the truth is 0."""

    pack: str
    catches: str
    loss: float
    norm: float  # the worst of the whole gradient's norm and each parameter's
    gradient: float  # the worst parameter's, in the norm of the difference; 0 where none is known
    verdict: str


def load_adapter(spec: str) -> Adapter:
    """The function of FILE, or FILE:FUNCTION."""
    file, _, function = spec.partition(":")
    path = Path(file)
    found = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    if not path.is_file() or found is None or found.loader is None:
        raise SystemExit(f"{file} is not a Python file; write --adapter FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    if not hasattr(module, function or "run"):
        raise SystemExit(f"{file} has no function {function or 'run'}(weights, packs)")
    return getattr(module, function or "run")


def relative(ours: Any, truth: Any) -> float:
    """|ours - truth| / |truth|; infinite if it is no number."""
    size = abs(truth) if isinstance(truth, float) else truth.norm().item()
    difference = abs(ours - truth) if isinstance(truth, float) else (ours - truth).norm().item()
    return difference / (size or 1.0) if math.isfinite(difference) else math.inf


def compare(pack: Pack, truth: Truth, loss: float, gradients: Gradients,
            tolerance: float) -> Row:
    """One pack's line."""
    lost = sorted(truth.grad_norms.keys() - gradients.keys())
    if lost:
        return Row(pack.name, pack.catches, relative(loss, truth.loss), math.inf, math.inf,
                   f"no gradient of {lost[0]}")
    norms = {name: gradients[name].double().norm().item() for name in truth.grad_norms}
    worst = max(relative(norms[name], norm) for name, norm in truth.grad_norms.items())
    worst = max(worst, relative(math.hypot(*norms.values()), truth.grad_norm))
    whole = max((relative(gradients[name].double(), g) for name, g in truth.gradients.items()),
                default=0.0)
    difference = relative(loss, truth.loss)
    good = max(difference, worst, whole) <= tolerance
    return Row(pack.name, pack.catches, difference, worst, whole, "ok" if good else "WRONG")


def check(adapter: Adapter, tolerance: float = 1e-10, only: tuple[str, ...] = ()) -> list[Row]:
    """Run the adapter over the packs, or those named, and compare with the truth."""
    packs, truths = load_packs()
    packs = [pack for pack in packs if not only or pack.name in only]
    losses, gradients = adapter(load_weights(), packs)
    return [compare(pack, truths[pack.name], float(losses[pack.name]), gradients[pack.name],
                    tolerance) if pack.name in losses
            else Row(pack.name, pack.catches, math.nan, math.nan, math.nan, "not run")
            for pack in packs]


def format_table(rows: list[Row]) -> str:
    """The rows as text, and how many agree."""
    lines = [f"{'pack':<18}{'loss':>9}{'norms':>9}{'gradient':>10}  {'verdict':<9}catches"]
    for row in rows:
        lines.append(f"{row.pack:<18}{row.loss:>9.0e}{row.norm:>9.0e}{row.gradient:>10.0e}  "
                     f"{row.verdict:<9}{row.catches}")
    good = sum(row.verdict == "ok" for row in rows)
    return "\n".join([*lines, f"{good} of {len(rows)} packs agree"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", required=True, help="FILE.py or FILE.py:FUNCTION")
    parser.add_argument("--tolerance", type=float, default=1e-10, help="relative difference")
    args = parser.parse_args()
    rows = check(load_adapter(args.adapter), args.tolerance)
    print(format_table(rows))
    sys.exit(0 if all(row.verdict == "ok" for row in rows) else 1)


if __name__ == "__main__":
    main()
