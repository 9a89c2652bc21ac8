"""Run the tiny recipe for several seeds: does `python train.py` keep its promises, in every run?

    python experiments/tiny_seeds.py                                  seeds 0, 1, 2
    python experiments/tiny_seeds.py --seeds 0,1,2,3,4,5,6,7 --one-thread 0,1,2,3

The second is twelve runs of about seven minutes on two idle cores: eight on all threads, then four
on one thread each, two at a time. Sums are rounded in another order there, so that it is another
run of the same seed. A run that has finished is not repeated.

Writes docs/figures/tiny_seeds.json (every score of every run, seconds, memory),
docs/figures/tiny_seeds.png (mean recall by length after each stage, a dot a run), copies the
pictures of the first run beside them, and prints the tables for docs/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import format_length  # noqa: E402

STAGES = ("base", "long", "ultra")


def run_seed(seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate a seed in a process of its own, unless `folder` holds the finished run.

    Returns its scores, seconds and peak memory.
    """
    if not (folder / "eval" / "ultra.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--samples", "200",
                   "--out", str(folder)]  # train.py's own 100 tell a newcomer enough
        with folder.with_suffix(".txt").open("w") as printed:
            subprocess.run(command, check=True, stdout=printed,
                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    stages = {name: json.loads((folder / "eval" / f"{name}.json").read_text()) for name in STAGES}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    begin = (folder / "config.json").stat().st_mtime
    seconds = {name: (folder / "eval" / f"{name}.json").stat().st_mtime - begin for name in STAGES}

    def by_name(stage: str, field: str) -> dict[str, Any]:
        return {f"{row['task']}@{format_length(row['length'])}": row[field]
                for row in stages[stage]["results"]}

    return {"seed": seed, "threads": threads, "seconds": seconds["ultra"],
            "first_figure_s": seconds["base"],
            "peak_rss_gib": max(row["mem_gib"] for row in log),
            "scores": {stage: by_name(stage, "score") for stage in STAGES},
            "n": by_name("base", "n"),
            "bits_per_byte": {stage: [row["bits_per_byte"] for row in found["bits_per_byte"]]
                              for stage, found in stages.items()}}


def mean_scores(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over the runs, {stage: {task@length: score}}."""
    return {stage: {key: sum(run["scores"][stage][key] for run in runs) / len(runs)
                    for key in runs[0]["scores"][stage]} for stage in STAGES}


def format_runs(runs: list[dict[str, Any]]) -> str:
    """A Markdown table a stage: every run's scores, their mean, and the lowest."""
    names, means = list(runs[0]["n"]), mean_scores(runs)
    lines = []
    for stage in STAGES:
        heads = [name.replace("@", " ") for name in names]
        lines += [f"| after {stage} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        rows = {f"seed {run['seed']}, {run['threads']} thread{'s' * (run['threads'] > 1)}":
                [run["scores"][stage][name] for name in names] for run in runs}
        if len(runs) > 1:
            rows["**mean**"] = [means[stage][name] for name in names]
            rows["**lowest**"] = [min(run["scores"][stage][name] for run in runs)
                                  for name in names]
        lines += [f"| {row} | " + " | ".join(f"{score:.3f}" for score in scores) + " |"
                  for row, scores in rows.items()]
        lines.append("")
    for stage in STAGES:
        bits = [sum(run["bits_per_byte"][stage][i] for run in runs) / len(runs) for i in range(4)]
        lines.append(f"Mean bits per byte after {stage}, tokens 0-256, 256-512, 512-1k, 1k-2k: "
                     + ", ".join(f"{each:.3f}" for each in bits) + ".")
    seconds = ", ".join(f"{run['seconds']:.0f} ({run['first_figure_s']:.0f})" for run in runs)
    lines.append(f"Seconds of each run (to the first figure): {seconds}. "
                 f"Memory: {max(run['peak_rss_gib'] for run in runs):.2f} GiB.")
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
             title=f"Mean of {len(runs)} runs; dots are single runs")
    axes.grid(alpha=0.3)
    axes.legend(title="after stage")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds on all threads, with commas")
    parser.add_argument("--one-thread", default="", help="seeds on one thread, two at a time")
    parser.add_argument("--runs", default="runs/seeds", help="where the run folders go")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures"), help="where table and "
                                                                              "picture go")
    args = parser.parse_args(argv)
    out, folder = Path(args.out), Path(args.runs)
    out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for seeds, threads, at_once in ((args.seeds, torch.get_num_threads(), 1),
                                    (args.one_thread, 1, 2)):
        with ThreadPoolExecutor(at_once) as pool:
            runs += pool.map(lambda seed, n=threads: run_seed(seed, n, folder / f"{seed}-{n}"),
                             map(int, filter(None, seeds.split(","))))
    first = folder / f"{runs[0]['seed']}-{runs[0]['threads']}" / "figures"
    shutil.copy(first / "recall_by_length.png", out)
    shutil.copy(first / "loss.png", out)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    record = {"commit": commit, "date": str(date.today()),
              "machine": platform.processor() or platform.machine(), "runs": runs}
    (out / "tiny_seeds.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(runs, out / "tiny_seeds.png")
    print(format_runs(runs))
    return runs


if __name__ == "__main__":
    main()
