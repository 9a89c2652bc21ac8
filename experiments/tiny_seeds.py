"""Run the tiny recipe for several seeds: does `python train.py` keep its promises, and by how much?

    python experiments/tiny_seeds.py                 seeds 0, 1, 2; eight minutes each on two cores

Writes docs/figures/tiny_seeds.json (every score of every seed, seconds, memory),
docs/figures/tiny_seeds.png (mean recall by length after each stage, with every seed's points) and
prints the table for docs/LOG.md. The figure of seed 0's run becomes the README's.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import format_length  # noqa: E402


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one seed in a process of its own: its scores, seconds and peak memory."""
    begin = time.time()
    command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--out", str(folder)]
    subprocess.run(command, check=True)
    stages = {path.stem: json.loads(path.read_text()) for path in (folder / "eval").glob("*.json")}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {"seed": seed, "seconds": time.time() - begin,
            "first_figure_s": (folder / "eval" / "base.json").stat().st_mtime - begin,
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
            "stage_s": {name: sum(row["time_s"] for row in log if row["stage"] == name)
                        for name in stages},
            "scores": {name: {f"{row['task']}@{format_length(row['length'])}": row["score"]
                              for row in stage["results"]} for name, stage in stages.items()},
            "n": {f"{row['task']}@{format_length(row['length'])}": row["n"]
                  for row in stages["base"]["results"]},
            "bits_per_byte": {name: [row["bits_per_byte"] for row in stage["bits_per_byte"]]
                              for name, stage in stages.items()}}


def mean_scores(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over the seeds, {stage: {task@length: score}}, stages in the recipe's order."""
    return {stage: {key: sum(run["scores"][stage][key] for run in runs) / len(runs)
                    for key in runs[0]["scores"][stage]}
            for stage in sorted(runs[0]["scores"], key=["base", "long", "ultra"].index)}


def format_runs(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: mean over the seeds and each seed's score, after each stage."""
    means = mean_scores(runs)
    lines = ["| task | n | " + " | ".join(f"after {stage}" for stage in means) + " |",
             "|---|---|" + "---|" * len(means)]
    for key, n in runs[0]["n"].items():
        seeds = {stage: ", ".join(f"{run['scores'][stage][key]:.3f}" for run in runs)
                 for stage in means}
        cells = [f"**{means[stage][key]:.3f}** ({seeds[stage]})" for stage in means]
        lines.append(f"| {key} | {n} | " + " | ".join(cells) + " |")
    for i, name in enumerate(("0-256", "256-512", "512-1k", "1k-2k")):
        cells = [f"{sum(run['bits_per_byte'][stage][i] for run in runs) / len(runs):.3f}"
                 for stage in means]
        lines.append(f"| bits/byte {name} | | " + " | ".join(cells) + " |")
    seconds = ", ".join(f"{run['seconds']:.0f} s (first figure after {run['first_figure_s']:.0f} s)"
                        for run in runs)
    lines.append(f"\nSeeds {[run['seed'] for run in runs]}: {seconds}; "
                 f"peak memory {max(run['peak_rss_gib'] for run in runs):.2f} GiB.")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (stage, scores) in enumerate(mean_scores(runs).items()):
        keys = [key for key in scores if key.startswith("recall@")]
        axes.plot([scores[key] for key in keys], marker="o", color=f"C{i}", label=stage)
        for run in runs:
            axes.plot([run["scores"][stage][key] for key in keys], ".", color=f"C{i}", alpha=0.5)
    axes.set(xticks=range(len(keys)), xticklabels=[key.partition("@")[2] for key in keys],
             ylim=(-0.03, 1.03), xlabel="context length (tokens)", ylabel="recall (exact match)",
             title=f"Mean of {len(runs)} seeds; dots are single seeds")
    axes.grid(alpha=0.3)
    axes.legend(title="after stage")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas")
    parser.add_argument("--runs", default="runs/seeds", help="where the run folders go")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures"), help="where table and "
                                                                              "picture go")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in map(int, args.seeds.split(",")):
        folder = Path(args.runs) / str(seed)
        runs.append(run_seed(seed, folder))
        if len(runs) == 1:
            shutil.copy(folder / "figures" / "recall_by_length.png", out)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                capture_output=True, text=True).stdout.strip()
        record = {"command": f"python experiments/tiny_seeds.py --seeds {args.seeds}",
                  "commit": commit, "date": str(date.today()),
                  "machine": platform.processor() or platform.machine(),
                  "runs": runs}
        (out / "tiny_seeds.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(runs, out / "tiny_seeds.png")
    print(format_runs(runs))
    return runs


if __name__ == "__main__":
    main()
