"""The paper's findings in small, one command each: train, measure, draw, and say whether we agree.

    python experiments/run.py --list                            what there is
    python experiments/run.py rope-base                         three seeds, figure and table
    python experiments/run.py rope-base --seeds 0 --quick       two steps, few questions: does it run?
    python experiments/run.py --all
    python experiments/run.py --table                           the summary of what has been run, in Markdown
    python experiments/run.py --page > docs/FINDINGS.md         all of it, with figures

The first run trains a start for each seed (base and long stage of the tiny recipe, minutes on one thread);
give `--starts DIR` if DIR/SEED holds a run of it. Results are docs/figures/lab/<finding>.json and .png.
What a finding is and how it is run: lab.py. The findings: findings_*.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import findings_context  # noqa: E402
import findings_data  # noqa: E402
from lab import (  # noqa: E402
    Finding,
    Lab,
    draw,
    format_result,
    markdown_section,
    markdown_table,
    run_finding,
)

from data import run_main  # noqa: E402

FINDINGS: dict[str, Finding] = {finding.name: finding
                                for finding in [*findings_context.FINDINGS, *findings_data.FINDINGS]}

PAGE = """# The paper's findings in small

Each was made by one command with three seeds, by models of 140,000 parameters, on two cores. What `recall`
and `icl` are stands in the README above its first table. Arms are compared within a seed, and intervals are
Student's over the seeds. *Agree*: the whole interval lies where the paper says. *Disagree*: it lies on the
other side. *Not told apart*: zero is inside. With three seeds only large effects are told apart.
This page is what `python experiments/run.py --page` prints.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("findings", nargs="*", help="names of findings; see --list")
    parser.add_argument("--list", action="store_true", help="list the findings and end")
    parser.add_argument("--all", action="store_true", help="run all findings")
    parser.add_argument("--table", action="store_true", help="print the summary of the results in --out")
    parser.add_argument("--page", action="store_true", help="print all results in --out, with figures")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas (default: 0,1,2)")
    parser.add_argument("--quick", action="store_true", help="two steps and sixteen questions; kept apart")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="arms at a time (all cores)")
    parser.add_argument("--starts", type=Path, default=None, help="DIR/SEED is a run of the tiny recipe")
    parser.add_argument("--lab", type=Path, default=ROOT / "runs" / "lab", help="folder for trained arms")
    parser.add_argument("--out", type=Path, default=None, help="for results (default: docs/figures/lab)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    names = list(FINDINGS) if args.all else args.findings
    if unknown := [name for name in names if name not in FINDINGS]:
        raise ValueError(f"finding {unknown[0]!r} is unknown; choose one of {', '.join(FINDINGS)}")
    lab_folder = args.lab.resolve()
    out = args.out or (lab_folder / "quick" if args.quick else ROOT / "docs" / "figures" / "lab")
    if args.list:
        width = max(map(len, FINDINGS))
        for finding in FINDINGS.values():
            print(f"{finding.name:<{width}}  {finding.claim} ({finding.source})")
    lab = Lab(lab_folder, args.starts and args.starts.resolve(), args.quick, args.jobs)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in names:
        begin = time.monotonic()
        command = shlex.join(["python", "experiments/run.py", name, "--seeds", args.seeds]
                             + ["--quick"] * args.quick)
        result = run_finding(FINDINGS[name], seeds, lab, command)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(format_result(FINDINGS[name], result))
        drawn = draw(FINDINGS[name], result, out / f"{name}.png")
        print(f"  {out / name}.json" + (" and .png" if drawn else "; no picture: install the `plots` extra")
              + f", {time.monotonic() - begin:.0f} s", flush=True)
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in FINDINGS
               if (out / f"{name}.json").exists()}
    if args.table:
        print(markdown_table(results.values()))
    if args.page:
        print(PAGE, *(markdown_section(FINDINGS[name], result) for name, result in results.items()), sep="\n")
    if not (names or args.list or args.table or args.page):
        raise ValueError("nothing to do; name a finding, or --list, --all, --table or --page")


if __name__ == "__main__":
    run_main(main)
