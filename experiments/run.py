"""The paper's findings in small, one command each: train, measure, draw, and say whether we agree.

    python experiments/run.py --list                      what there is
    python experiments/run.py rope-base                   three seeds, figure and table
    python experiments/run.py rope-base --seeds 0 --quick two steps, few questions: does it run?
    python experiments/run.py --all
    python experiments/run.py --table                     the results in a table
    python experiments/run.py --page > docs/FINDINGS.md   all results, with figures

The first run trains a start for each seed (base and long stage of the tiny recipe, minutes on one
thread); `--starts DIR` takes those of DIR/SEED. Results are docs/figures/lab/FINDING.json and .png.
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
import lab  # noqa: E402

from data import run_main  # noqa: E402
from support.cli import choose  # noqa: E402

FINDINGS: dict[str, lab.Finding] = {
    finding.name: finding for finding in [*findings_context.FINDINGS, *findings_data.FINDINGS]}

PAGE = """# The paper's findings in small

Each was made by one command with three seeds, by models of 140,000 parameters, on two cores. In
`recall` a model copies the values of keys, in `icl` it labels symbols from examples (support/toy.py
shows both). Arms are compared within a seed, and intervals are Student's over the seeds. *Agree*:
the whole interval lies where the paper says. *Disagree*: it lies on the other side. *Not told
apart*: zero is inside. With three seeds only large effects are told apart.
`python experiments/run.py --page` prints this page.

All were made by the commits that they name, when recall had 32 symbols. Today's recipe has 85, of
which none stands twice in a document. With it no finding has been run again.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("findings", nargs="*", help="names of findings; see --list")
    add("--list", action="store_true", help="list the findings and end")
    add("--all", action="store_true", help="run all findings")
    add("--table", action="store_true", help="print the summary of the results in --out")
    add("--page", action="store_true", help="print all results in --out, with figures")
    add("--seeds", default="0,1,2", help="seeds, with commas (default: 0,1,2)")
    add("--quick", action="store_true", help="two steps and sixteen questions; kept apart")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="arms at a time (all cores)")
    add("--starts", type=Path, default=None, help="DIR/SEED is a run of the tiny recipe")
    add("--lab", type=Path, default=ROOT / "runs" / "lab", help="folder for trained arms")
    add("--out", type=Path, default=None, help="for results (default: docs/figures/lab)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    findings = [choose("finding", name, FINDINGS) for name in args.findings]
    if args.all:
        findings = list(FINDINGS.values())
    folder = args.lab.resolve()
    kept = folder / "quick" if args.quick else ROOT / "docs" / "figures" / "lab"
    out = args.out or kept
    if args.list:
        width = max(map(len, FINDINGS))
        for finding in FINDINGS.values():
            print(f"{finding.name:<{width}}  {finding.claim} ({finding.source})")
    place = lab.Lab(folder, args.starts and args.starts.resolve(), args.quick, args.jobs)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for finding in findings:
        begin = time.monotonic()
        command = ["python", "experiments/run.py", finding.name, "--seeds", args.seeds]
        command += ["--quick"] * args.quick
        result = lab.run_finding(finding, seeds, place, shlex.join(command))
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{finding.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(lab.markdown_section(finding, result))
        drawn = lab.draw(finding, result, path.with_suffix(".png"))
        picture = "and .png" if drawn else "; no picture: install the `plots` extra"
        print(f"{path} {picture}, {time.monotonic() - begin:.0f} s", flush=True)
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in FINDINGS
               if (out / f"{name}.json").exists()}
    if args.table:
        print(lab.markdown_table(results.values()))
    if args.page:
        print(PAGE, lab.markdown_table(results.values()), "", sep="\n")
        for name, result in results.items():
            print(lab.markdown_section(FINDINGS[name], result))
    if not (findings or args.list or args.table or args.page):
        raise ValueError("nothing to do; name a finding, or --list, --all, --table or --page")


if __name__ == "__main__":
    run_main(main)
