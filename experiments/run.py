"""The paper's findings in small, one command each: train, measure, draw, and say whether we agree.

    python experiments/run.py --list                      what there is
    python experiments/run.py rope-base                   eight seeds, figure and table
    python experiments/run.py rope-base --seeds 0 --quick two steps, few questions: does it run?
    python experiments/run.py --all                       seed after seed; run again, it goes on
    python experiments/run.py --table                     the results in a table
    python experiments/run.py --page                      all results, in docs/FINDINGS.md

The first run trains a start for each seed (base and long stage of the tiny recipe, minutes on one
thread); `--starts DIR` takes those of DIR/SEED. Results are docs/figures/lab/FINDING.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import findings_context  # noqa: E402
import findings_data  # noqa: E402
import lab  # noqa: E402

from data import run_main  # noqa: E402
from support.cli import choose  # noqa: E402

PAGE, HEADING = ROOT / "docs" / "FINDINGS.md", "## All findings"
FINDINGS: dict[str, lab.Finding] = {
    finding.name: finding for finding in [*findings_context.FINDINGS, *findings_data.FINDINGS]}

def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("findings", nargs="*", help="names of findings; see --list")
    add("--list", action="store_true", help="list the findings and end")
    add("--all", action="store_true", help="run all findings")
    add("--table", action="store_true", help="print the summary of the results in --out")
    add("--page", action="store_true", help="write docs/FINDINGS.md below its head, from --out")
    add("--seeds", default="0,1,2,3,4,5,6,7", help="seeds, with commas (default: 0 to 7)")
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
    for n in lab.train_seeds(findings, seeds, place) if findings else ():
        for finding in findings:
            asked = ",".join(map(str, seeds[:n]))
            command = ["python", "experiments/run.py", finding.name, "--seeds", asked,
                       *["--quick"] * args.quick]
            result = lab.collect(finding, seeds[:n], place, shlex.join(command))
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{finding.name}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            if n == len(seeds):
                print(lab.markdown_section(finding, result))
                drawn = lab.draw(finding, result, path.with_suffix(".png"))
                print(path, "and .png" if drawn else "; no picture: install the `plots` extra")
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in FINDINGS
               if (out / f"{name}.json").exists()}
    table = lab.markdown_tables(FINDINGS.values(), results)
    if findings and not args.quick:
        lab.draw_forest(results.values(), out / "forest.png")
    if args.table:
        print(table)
    if args.page:
        sections = [lab.markdown_section(FINDINGS[name], results.get(name)) for name in FINDINGS]
        head = PAGE.read_text().partition(HEADING)[0]
        forest = (out / "forest.png").exists()
        shown = ["![Primary contrasts by finding](figures/lab/forest.png)", ""] * forest
        PAGE.write_text("\n".join([head + HEADING, "", *shown, table, "", *sections]))
    if not (findings or args.list or args.table or args.page):
        raise ValueError("nothing to do; name a finding, or --list, --all, --table or --page")


if __name__ == "__main__":
    run_main(main)
