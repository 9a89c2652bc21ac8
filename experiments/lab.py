"""The lab: how a finding of the paper is tried in small. Commands: run.py; the list: findings_*.py.

A finding is a question with arms, and an arm is a model that anybody could make by hand:

    runs/lab/starts/0/checkpoints/long-700       the tiny recipe up to 2K tokens, one for each seed
      └─ train.py --stage ultra --seq 8k --rope-theta 1.28e+06 --steps 40 ...   an arm: 2K -> 8K
           └─ experiments/tasks.py --tasks recall,icl --lengths 256,2k,8k ...        its points

All arms of a seed start from the same weights and see the same data in the same order, so we
compare arms *within* a seed. A contrast turns the paper's direction into a number that is positive
where the paper is right ("recall at 8K, theta x64 less x1"). Of a finding's contrasts one is
primary: it was named before its seeds were run, and it alone gives a verdict (section 4).

Arms run as processes of one thread, so that their digits do not depend on the number of cores. What
an arm gave is kept under runs/lab by a hash of its settings, its start and the code. So two
findings that share an arm train it once, and a run that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import PackedDataset, PackedSequence, format_length, parse_length  # noqa: E402
from model import preset_config  # noqa: E402
from support.scores import paired_p_value  # noqa: E402
from train import RECIPES, TrainConfig, choose_stages, pack_domains  # noqa: E402

STAGES = {stage.name: stage for stage in RECIPES["tiny"]}
START_STAGES = ("base", "long")  # what a start consists of

# --- 1. What a finding is -------------------------------------------------------------------------

Point = dict[str, float]  # {"step": 40, "recall@8k": 0.93, "bits/byte short": 4.4, ...}
Measured = dict[str, list[Point]]  # of one seed: an arm's points, the last one its end
Difference = Callable[[Measured], float]  # a contrast: positive where the paper is right
Painter = Callable[[Any, dict[str, Any]], None]  # (matplotlib figure, result): see section 5
Transform = Callable[[PackedDataset, int], Iterable[PackedSequence]]  # of a packed domain


@dataclass(frozen=True)
class Arm:
    """A model: where it starts, what changes in its config.json, and the command that trains it."""

    command: str = ""  # "train.py --stage ultra --seq 8k"; none: the start itself is measured
    steps: int = 0
    start: str | Arm = "long"  # a stage of the tiny recipe, or what another arm ended with
    config: dict[str, Any] | None = None  # entries of the start's config.json to change
    transform: Transform | None = None  # rewrites the packed domains, which --data then names
    every: int = 0  # steps between checkpoints, for findings that look along the training
    before: str = ""  # a command to run first; in both commands, {folder} is the arm's folder
    lengths: str = ""  # where it is asked, if not at the finding's lengths


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, and how it is tried here."""

    name: str
    title: str
    source: str  # "Tables 18 and 19"
    claim: str  # the paper's direction in a plain sentence
    arms: dict[str, Arm]
    primary: dict[str, Difference]  # one contrast, which gives the verdict
    others: dict[str, Difference]  # more contrasts, which only describe
    draw: Painter
    why: str  # how it is measured, how doses were chosen, what may differ in the small world
    margin: float = 0.05  # a primary contrast that is surely smaller is *alike*
    floor: float = 0.0  # what the paper promises: more than this; "does no harm" is -margin
    tasks: str = "recall_bare,recall,icl"
    lengths: str = "256,2k,8k"
    samples: int = 832  # questions: 52 contexts of recall, 32 of ICL
    shown: tuple[str, ...] = ("recall@256", "recall@2k", "recall@8k")  # in tables
    evaluator: str = "experiments/tasks.py --bpb-length 8k"
    along: bool = False  # measure an arm's start and all its checkpoints, not only its end
    compute: Callable[[int, bool], Measured] | None = None  # (seed, quick): counts, no training


def less(a: str | tuple[str, ...], b: str | tuple[str, ...], *metrics: str) -> Difference:
    """The contrast "a less b" at the end of training; of several arms and metrics the mean."""
    def mean(measured: Measured, labels: str | tuple[str, ...]) -> float:
        ends = [measured[label][-1] for label in ([labels] if isinstance(labels, str) else labels)]
        return statistics.fmean(end[metric] for end in ends for metric in metrics)

    return lambda measured: mean(measured, a) - mean(measured, b)


@dataclass(frozen=True)
class Lab:
    """Where things lie, and how much is done."""

    folder: Path = ROOT / "runs" / "lab"
    starts: Path | None = None  # runs of the tiny recipe, by seed; none: we train them
    quick: bool = False  # two steps and sixteen questions: does it run?
    jobs: int = 1


# --- 2. An arm ------------------------------------------------------------------------------------


def shown_path(path: Path) -> str:
    """A path as a reader would type it in the project's folder."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def typed(command: Sequence[str]) -> str:
    """The line that a reader would type."""
    return f"OMP_NUM_THREADS=1 python {shlex.join(command)}"


def run_program(command: Sequence[str], log: Path) -> None:
    """Run a program on one thread. Raises RuntimeError with the end of its output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file,
                              stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{typed(command)} failed; {log} ends:\n{log.read_text()[-2000:]}")


def start_folder(seed: int, lab: Lab) -> Path:
    """Where a seed's start lies: with our own, its name tells the code that trained it."""
    own = lab.folder / "starts" / f"{seed}-{short_hash([hash_code(), lab.quick])}"
    return lab.starts / str(seed) if lab.starts else own


def find_start(stage: str, seed: int, lab: Lab) -> Path:
    """A seed's checkpoint at the end of a stage of the tiny recipe, trained now if it is missing.

    Raises ValueError if it is not in the --starts that were given, and for a later stage.
    """
    folder = start_folder(seed, lab)
    found = sorted((folder / "checkpoints").glob(f"{stage}-*[0-9]"), key=step_of)
    if found:
        return found[-1]
    if lab.starts or stage not in START_STAGES:
        raise ValueError(f"{folder} has no checkpoint of stage {stage!r}; give --starts DIR, with "
                         "a run of the tiny recipe in DIR/SEED")
    out = folder / f"{stage}.run"
    shutil.rmtree(out, ignore_errors=True)
    command = ["train.py", "--stage", stage, "--seed", str(seed), "--no-eval",
               "--out", shown_path(out)]
    for before in START_STAGES[:START_STAGES.index(stage)][-1:]:
        command += ["--init", shown_path(find_start(before, seed, lab))]
    run_program(command + ["--steps", "2"] * lab.quick, folder / f"{stage}.log")
    (folder / "checkpoints").mkdir(exist_ok=True)
    done, = (out / "checkpoints").iterdir()
    return done.rename(folder / "checkpoints" / done.name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def short_hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


@cache
def hash_code() -> list[str]:
    """Hashes of all the code that an arm may run, as it was when the lab was opened."""
    ours = [f"experiments/{name}" for name in ("neighbours", "packs", "synthetic", "tasks")]
    paths = [ROOT / f"{name}.py" for name in ("data", "model", "eval", "train", "sft", *ours)]
    return [sha256(path) for path in [*paths, *sorted((ROOT / "support").glob("*.py"))]]


def key_of(arm: Arm, seed: int, lab: Lab) -> str:
    """A name for what an arm gives: a hash of all that it depends on."""
    if isinstance(arm.start, Arm):
        start = key_of(arm.start, seed, lab)
    else:
        start = sha256(find_start(arm.start, seed, lab) / "model.safetensors")
    facts = [arm.command, arm.before, arm.steps, arm.every, start, arm.config, seed, lab.quick,
             hash_code(), arm.transform and arm.transform.__name__]
    return f"{seed}-{short_hash(facts)}"


MAKING: dict[str, Lock] = defaultdict(Lock)  # by key: arms that share a start wait for it


def make_arm(arm: Arm, seed: int, lab: Lab) -> tuple[list[Path], list[str]]:
    """Train an arm, or find it trained: its start and checkpoints, and the commands for it."""
    key, commands = key_of(arm, seed, lab), list[str]()
    if isinstance(arm.start, Arm):
        checkpoints, commands = make_arm(arm.start, seed, lab)
        start = checkpoints[-1]
    else:
        start = find_start(arm.start, seed, lab)
    with MAKING[key]:
        folder = lab.folder / key
        if arm.config is not None:
            start = change_config(start, folder / "start", arm.config)
        if not arm.command:
            return [start], commands
        before = shlex.split(arm.before.format(folder=shown_path(folder)))
        if before:
            before += ["--seed", str(seed)]
        command = command_of(arm, seed, start, folder, lab.quick)
        if not (folder / "done").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
            if before:
                run_program(before, folder / "before.log")
            if arm.transform:
                pack_transformed(command, folder, arm.transform)
            begin = time.monotonic()
            run_program(command, folder / "train.log")
            (folder / "done").write_text(f"{time.monotonic() - begin:.1f}")
    checkpoints = sorted((folder / "run" / "checkpoints").iterdir(), key=step_of)
    commands = commands + [typed(each) for each in (before, command) if each]
    return [start, *checkpoints], commands


def command_of(arm: Arm, seed: int, start: Path, folder: Path, quick: bool) -> list[str]:
    """The command line that trains an arm, as a reader could type it after `python`."""
    steps, every = (2, min(arm.every, 1)) if quick else (arm.steps, arm.every)
    command = shlex.split(arm.command.format(folder=shown_path(folder)))
    command += ["--steps", str(steps), "--seed", str(seed), "--no-eval",
                "--init", shown_path(start), "--out", shown_path(folder / "run")]
    if every:
        command += ["--save-every", str(every), "--keep", "0"]
    if arm.transform:
        command += ["--data", shown_path(folder / "packs")]
    return command


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def change_config(start: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model's folder with other entries in its config.json, without Adam's moments."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in start.iterdir():
        if path.is_file() and path.name != "state.json":
            shutil.copyfile(path, folder / path.name)
    entry = json.loads((start / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(entry, indent=2) + "\n")
    return folder


def pack_transformed(command: Sequence[str], folder: Path, transform: Transform) -> None:
    """Pack the domains as `command` (of train.py) would, then write their transforms."""
    config = data.parse_cli(TrainConfig, None, command[1:])
    config = replace(config, recipe=config.recipe or "tiny")
    stage, = choose_stages(config, preset_config(config.model, 295))
    tokenizer = data.tokenizer_for(None, config.tokenizer)
    for name in ("plain", "packs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    pack_domains(stage, folder / "plain", tokenizer, config.seed)
    for path in sorted((folder / "plain").iterdir()):
        sequences = transform(PackedDataset(path), config.seed)
        data.write_packed(folder / "packs" / path.name, sequences, tokenizer, stage.seq_len,
                          path.name, config.seed, data.PackReport())


def measure(finding: Finding, label: str, seed: int, lab: Lab) -> dict[str, Any]:
    """An arm's points in one seed, how sure they are, and the commands that made them."""
    arm, points, asked = finding.arms[label], [], dict[str, Any]()
    checkpoints, commands = make_arm(arm, seed, lab)
    evaluation = evaluation_of(finding, arm, seed, lab.quick)
    folder = lab.folder / key_of(arm, seed, lab)
    out = folder / "eval" / short_hash(evaluation)
    for checkpoint in checkpoints if finding.along else checkpoints[-1:]:
        command = [*evaluation, "--model", shown_path(checkpoint), "--out", shown_path(out)]
        path = out / f"{checkpoint.name}.json"
        with MAKING[str(path)]:
            if not path.exists():
                run_program(command, out / f"{checkpoint.name}.log")
        step = 0 if checkpoint is checkpoints[0] else step_of(checkpoint)
        point, asked = read_evaluation(json.loads(path.read_text()), step)
        points.append(point)
        commands = [*commands, typed(command)]
    seconds = float((folder / "done").read_text()) if arm.command else 0.0
    return {"points": points, "asked": asked, "commands": commands, "seconds": seconds}


def evaluation_of(finding: Finding, arm: Arm, seed: int, quick: bool) -> list[str]:
    """The command line that asks an arm a finding's questions, but for the model."""
    return [*shlex.split(finding.evaluator), "--tasks", finding.tasks, "--lengths",
            arm.lengths or finding.lengths, "--samples", str(16 if quick else finding.samples),
            "--seed", str(seed), *["--bpb-length", "256"] * quick]


def read_evaluation(evaluation: dict[str, Any], step: int) -> tuple[Point, dict[str, Any]]:
    """What tasks.py wrote: a flat row of scores, and how many contexts and what interval each has.

    "recall@8k even" and "odd" are the scores in every other context: one half can choose an arm,
    and the other half judge the choice.
    """
    point: Point = {"step": step}
    asked: dict[str, Any] = {}
    for row in evaluation["results"]:
        name = f"{row['task']}@{format_length(row['length'])}"
        halves: tuple[list[float], list[float]] = ([], [])
        for p in row["predictions"]:
            halves[p["context"] % 2].append(p["score"])
        point[name] = row["score"]
        for half, scores in zip(("even", "odd"), halves, strict=True):
            point[f"{name} {half}"] = statistics.fmean(scores or [row["score"]])
        asked[name] = {"contexts": 1 + row["predictions"][-1]["context"],
                       "low": round(row["low"], 4), "high": round(row["high"], 4)}
    for row in evaluation["bits_per_byte"]:
        point[f"bits/byte {row['name']}"] = row["bits_per_byte"]
    for name, bits in evaluation["answer_bits"].items():
        point[f"answer bits {name}"] = bits
    return point, asked


# --- 3. A finding ---------------------------------------------------------------------------------


def train_seeds(findings: Sequence[Finding], seeds: Sequence[int], lab: Lab) -> Iterator[int]:
    """Make and measure all arms, `lab.jobs` at a time; say after each seed how many are done."""
    minutes = expected_minutes(findings, seeds, lab)
    print(f"commit {code_version()}: about {minutes:.0f} minutes on idle cores, less what is in "
          f"{shown_path(lab.folder)} already", flush=True)
    with ThreadPoolExecutor(lab.jobs) as pool:
        if any(finding.arms for finding in findings):  # first, because the arms share them
            list(pool.map(lambda seed: find_start("long", seed, lab), seeds))
        for n, seed in enumerate(seeds, 1):
            waiting = [pool.submit(measure, finding, label, seed, lab)
                       for finding in findings for label in finding.arms]
            for future in tqdm(as_completed(waiting), f"seed {seed}", len(waiting), disable=None):
                if future.exception():
                    pool.shutdown(cancel_futures=True)  # an error need not wait for other arms
                future.result()
            yield n


@cache
def code_version() -> str:
    """The commit, as it was when the lab was opened."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                          capture_output=True, text=True).stdout.strip() or "unknown"


def collect(finding: Finding, seeds: Sequence[int], lab: Lab, command: str) -> dict[str, Any]:
    """What docs/figures/lab/<name>.json holds, from what `train_seeds` made."""
    arms: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for seed in seeds:
        found = {label: measure(finding, label, seed, lab) for label in finding.arms}
        if finding.compute:
            counts = finding.compute(seed, lab.quick)
            found = {label: {"points": counts[label], "commands": [command]} for label in counts}
        for label, record in found.items():
            arms[label].setdefault("commands", record.pop("commands"))
            for name, value in record.items():
                arms[label][name][str(seed)] = value
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread an arm"
    return {"finding": finding.name, "title": finding.title, "source": finding.source,
            "claim": finding.claim, "why": finding.why, "command": command,
            "date": date.today().isoformat(), "commit": code_version(), "machine": machine,
            "seeds": list(seeds), "quick": lab.quick, "contrasts": judge(finding, arms, seeds),
            "arms": arms}


# Seconds of an idle core for a million tokens in documents of n: a + b * n in training (arms of
# 2026-11-22: 58 with 2K, 116 with 8K), a third of it in answering. A process begins in 8.
SECONDS, BEGIN = (40.0, 0.0095), 8.0
CONTEXTS = {"icl": 32, "recall_bare": 1, "chat_value": 25, "chat_label": 25}  # as long ones; or 52


def expected_minutes(findings: Sequence[Finding], seeds: Sequence[int], lab: Lab) -> float:
    """How long it takes if nothing is there yet, `lab.jobs` arms at a time."""
    seconds: dict[str, float] = {}  # by what is made or asked, so that nothing counts twice

    def add(name: str, *parts: tuple[float, int]) -> None:  # tokens, in documents of
        seconds[name] = BEGIN + sum(n * (SECONDS[0] + SECONDS[1] * size) / 1e6 for n, size in parts)

    for finding in findings:
        for arm in finding.arms.values():
            points = 1 + arm.steps // arm.every if finding.along else 1
            contexts = points * sum(CONTEXTS.get(task, 52) for task in finding.tasks.split(","))
            lengths = map(parse_length, (arm.lengths or finding.lengths).split(","))
            add(f"{arm} {evaluation_of(finding, arm, 0, False)}",
                *((contexts * n / 3, n) for n in lengths))
            each: str | Arm = arm
            while isinstance(each, Arm):
                words = each.command.split()
                if words:
                    size, batch = (parse_length(words[words.index(option) + 1])
                                   for option in ("--seq", "--batch-tokens"))
                    add(str(each), (each.steps * batch, size))
                each = each.start
            add("start", *((STAGES[name].tokens, STAGES[name].seq_len) for name in START_STAGES))
    return len(seeds) * sum(seconds.values()) / 60 / lab.jobs


# --- 4. From numbers to a verdict -----------------------------------------------------------------

VERDICTS = {"agree": "C2", "disagree": "C3", "alike": "C0", "not told apart": "0.6"}  # with colors
NEW_SEEDS = (3, 4, 5, 6, 7)  # nobody had seen them when the primary contrasts were named


@cache
def student(df: int, inside: float = 0.95) -> float:
    """How many standard errors hold `inside` of Student's t: 12.706 for 1 degree of freedom."""
    t = (np.arange(200_000) + 0.5) / 10_000  # we integrate the density from 0 to 20
    scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
    density = np.exp(scale - (df + 1) / 2 * np.log1p(t * t / df))
    return float(np.interp(inside / 2, np.cumsum(density) / 10_000, t + 0.5 / 10_000))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one number a seed, and its 95% interval (none for one seed)."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    half = student(n - 1) * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def verdict(differences: Sequence[float], margin: float, floor: float = 0.0) -> str:
    """What paired differences, one a seed, say about a claim that they are above `floor`.

    "agree" if the whole interval is above the floor, "disagree" if it is below. A claim of a
    difference (floor 0) is "alike" if the interval holds 0 and lies within the margin.
    """
    _, low, high = mean_interval(differences)
    if low is None or high is None:
        return "one seed"
    if low > floor or high < floor:
        return "agree" if low > floor else "disagree"
    return "alike" if floor == 0 and -margin <= low <= high <= margin else "not told apart"


def seeds_needed(differences: Sequence[float], floor: float = 0.0) -> int | None:
    """How many seeds would tell the mean from the floor, if it and the spread stay as they are."""
    effect, spread = abs(statistics.fmean(differences) - floor), statistics.stdev(differences)
    return next((n for n in range(2, 1001) if student(n - 1) * spread < effect * n**0.5), None)


def judge(finding: Finding, arms: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every contrast of a finding, the primary first: by seed, mean, interval and sign-flip test.

    The primary has a verdict, from all seeds and from the new ones alone. Counts have none.
    """
    rows = []
    for name, difference in (finding.primary | finding.others).items():
        values = [difference({label: arm["points"][str(seed)] for label, arm in arms.items()})
                  for seed in seeds]
        mean, low, high = mean_interval(values)
        floor = finding.floor if name in finding.primary else 0.0
        row = {"contrast": name, "differences": values, "mean": mean, "low": low, "high": high,
               "p": paired_p_value([value - floor for value in values])}
        if name in finding.primary and not finding.compute:
            new = [value for seed, value in zip(seeds, values, strict=True) if seed in NEW_SEEDS]
            row |= {"margin": finding.margin, "floor": floor, "new": new,
                    "verdict": verdict(values, finding.margin, floor),
                    "new verdict": verdict(new, finding.margin, floor) if new else ""}
        rows.append(row)
    return rows


# --- 5. Tables and pictures -----------------------------------------------------------------------


def runs_of(result: dict[str, Any], label: str) -> list[list[Point]]:
    """An arm's points, a list a seed."""
    return list(result["arms"][label]["points"].values())


def values_of(result: dict[str, Any], label: str, metric: str) -> list[float]:
    """One number a seed: an arm's metric at its end."""
    return [points[-1][metric] for points in runs_of(result, label)]


def show(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:z.3f}" if low is None else f"{mean:z.3f} [{low:z.2f}, {high:z.2f}]"


def contexts_of(result: Any) -> str:
    """How many contexts each task asked about: "recall 52, icl 32"."""
    counts = {metric.partition("@")[0]: row["contexts"] for arm in result["arms"].values()
              for asked in arm.get("asked", {}).values() for metric, row in asked.items()}
    return ", ".join(f"{task} {n}" for task, n in counts.items())


def markdown_tables(findings: Iterable[Finding], results: dict[str, dict[str, Any]]) -> str:
    """Each finding's primary contrast and verdict; in a table below, the counts, without one."""
    lines = ["| finding | paper | primary contrast: mean [95% interval over seeds] | sign flip, p "
             "| seeds with the paper | contexts | seeds 3 to 7 alone | agrees? |", "|---" * 8 + "|"]
    counts = ["", "| counted | paper | here: mean [95% interval over seeds] |", "|---" * 3 + "|"]
    for finding in findings:
        result, (contrast,) = results.get(finding.name), finding.primary
        row = result["contrasts"][0] if result else {}
        mean = show(row["differences"]) if row else "not run here"
        text = (f"| [{finding.name}](#{finding.name}) ({finding.source}) | {finding.claim} "
                f"| {contrast}: {mean} |")
        if finding.compute:
            counts.append(text)
        elif row:
            right = sum(value > row["floor"] for value in row["differences"])
            new = f"{show(row['new'])}, {row['new verdict']}" if row["new"] else ""
            lines.append(f"{text} {row['p']:.3f} | {right} of {len(row['differences'])} "
                         f"| {contexts_of(result)} | {new} | {row['verdict']} |")
        else:
            lines.append(text + " |" * 5)
    return "\n".join(lines + counts)


def noise_of(result: Any, metric: str) -> str:
    """How far an arm's score is off because few contexts were asked, and how far seeds differ."""
    arms = {label: [asked[metric] for asked in arm.get("asked", {}).values() if metric in asked]
            for label, arm in result["arms"].items()}
    asking = [(row["high"] - row["low"]) / 3.92 for rows in arms.values() for row in rows]
    seeds = [statistics.stdev(values_of(result, label, metric)) for label, rows in arms.items()
             if len(rows) > 1]
    return (f"{metric} {statistics.fmean(asking):.3f} from asking, {statistics.fmean(seeds):.3f} "
            "between seeds" if seeds else "")


def markdown_section(finding: Finding, result: dict[str, Any] | None) -> str:
    """One finding on docs/FINDINGS.md: figure, arms by metrics, contrasts, and our comment."""
    lines = [f"## {finding.name}", "", f"**{finding.title}** ({finding.source}). The paper: "
             f"{finding.claim}.", "", f"{finding.why[0].upper()}{finding.why[1:]}.", ""]
    if result is None:
        return "\n".join([*lines, f"Arms: {'; '.join(finding.arms)}. Contrasts, the primary first: "
                          f"{'; '.join(finding.primary | finding.others)}. Not run here.", ""])
    ends = [points[-1] for arm in result["arms"].values() for points in arm["points"].values()]
    metrics = [metric for metric in finding.shown if any(metric in end for end in ends)]
    lines += [f"![{finding.title}](figures/lab/{finding.name}.png)", "",
              f"| arm | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for label in result["arms"]:
        there = runs_of(result, label)[0][-1]
        cells = (show(values_of(result, label, m)) if m in there else "" for m in metrics)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| the paper says more than 0 | each seed | mean [95% interval] | sign flip, p "
              "| agrees? |", "|---|---|---|---|---|"]
    for row in result["contrasts"]:
        seeds = ", ".join(f"{value:z.3f}" for value in row["differences"])
        floor, margin = row.get("floor"), row.get("margin")  # of the primary contrast
        bound = f" (more than {floor:g})" if floor else f" (within {margin}: alike)" * bool(margin)
        lines.append(f"| {row['contrast']}{bound} | {seeds} | {show(row['differences'])} "
                     f"| {row['p']:.3f} | {row.get('verdict', '')} |")
    noise = "; ".join(text for metric in metrics if (text := noise_of(result, metric)))
    lines += ["", f"Noise, in standard deviations of one arm: {noise}."] * bool(noise)
    row = result["contrasts"][0]
    if row.get("verdict") == "not told apart":
        needed = seeds_needed(row["differences"], row["floor"]) or "more than 1,000"
        lines += ["", f"With this mean and spread it would take {needed} seeds to tell them apart."]
    return "\n".join([*lines, "", f"`{result['command']}`, commit {result['commit']}, "
                      f"{result['date']}.", ""])


def save_picture(paint: Callable[[Any], None], title: str, path: Path, height: float = 3.6) -> bool:
    """Paint a figure and save it. False where matplotlib, the `plots` extra, is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(7.5, height), layout="constrained")
    paint(figure)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def draw(finding: Finding, result: dict[str, Any], path: Path) -> bool:
    """Draw a result as its finding says, with the verdict in the title."""
    verdict = result["contrasts"][0].get("verdict", "counted")
    title = f"{finding.title} ({finding.source}): {verdict}"
    return save_picture(lambda figure: finding.draw(figure, result), title, path)


def draw_forest(results: Iterable[dict[str, Any]], path: Path) -> bool:
    """A row a finding: its primary contrast, the interval, a dot a seed, colored by the verdict."""
    rows = {result["finding"]: result["contrasts"][0] for result in results
            if result["contrasts"][0].get("verdict", "one seed") != "one seed"}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for name, color in VERDICTS.items():
            for y, row in enumerate(rows.values()):
                if row["verdict"] == name:
                    values = row["differences"]
                    axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=3)
                    axes.plot(values, [y] * len(values), ".", color=color, markersize=4, alpha=0.6)
                    axes.plot(row["mean"], y, "o", color=color)
                    axes.plot([row["floor"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1)
            axes.plot([], [], color=color, linewidth=3, label=name)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set(xlabel="primary contrast, positive where the paper is right", xlim=(-1, 1))
        axes.legend(fontsize=8)

    title = "The primary contrast of every finding, with its 95% interval over seeds"
    return bool(rows) and save_picture(paint, title, path, height=1.5 + 0.3 * len(rows))


Panels = dict[str, tuple[Sequence[Any], dict[str, Any]]]  # title: (ticks, {label: [seed][tick]})


def paint_panels(figure: Any, panels: Panels, xlabel: str = "") -> None:
    """Panels of curves; of each curve every seed is a thin line with dots, the mean a thick one."""
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (ticks, curves)) in zip(all_axes, panels.items(), strict=True):
        x, dots = range(len(ticks)), list[float]()
        for i, (label, seeds) in enumerate(curves.items()):
            for values in seeds:
                axes.plot(x, values, ".-", color=f"C{i}", linewidth=0.6, markersize=3, alpha=0.5)
                dots += values
            means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
            axes.plot(x, means, color=f"C{i}", linewidth=2.5, label=label)
        low, high = min(dots), max(dots)
        room = (high - low) / 4 or 0.1
        axes.set_ylim((-0.03, 1.03) if 0 <= low <= high <= 1 else (low - room, high + room))
        axes.set_title(title, fontsize=8)
        slanted = {"rotation": 30, "ha": "right"} if len("".join(map(str, ticks))) > 25 else {}
        axes.set_xticks(x, ticks, fontsize=8, **slanted)
        axes.set_xlabel(xlabel)
        if len(curves) > 1:
            axes.legend(fontsize=7)


def by_length(lengths: str, panels: dict[str, tuple[str, list[str] | None]],
              xlabel: str = "context length in tokens") -> Painter:
    """Scores by context length, a curve for each arm. `panels` is {title: (task, arms or all)}."""
    names = lengths.split(",")
    return lambda figure, result: paint_panels(figure, {title: (names, {
        label: [[points[-1][f"{task}@{name}"] for name in names]
                for points in runs_of(result, label)]
        for label in labels or result["arms"]})
        for title, (task, labels) in panels.items()}, xlabel)


def by_step(metrics: Sequence[str]) -> Painter:
    """Metrics along an arm's training, a panel for each arm."""
    return lambda figure, result: paint_panels(figure, {label: (
        [point["step"] for point in runs_of(result, label)[0]],
        {metric: [[point[metric] for point in points] for points in runs_of(result, label)]
         for metric in metrics}) for label in result["arms"]}, "step")


def bars(metrics: Sequence[str]) -> Painter:
    """A panel for each metric, in it the arms that have it, side by side."""
    def paint(figure: Any, result: dict[str, Any]) -> None:
        panels: Panels = {}
        for metric in metrics:
            labels = [label for label in result["arms"] if metric in runs_of(result, label)[0][-1]]
            columns = [values_of(result, label, metric) for label in labels]
            panels[metric] = labels, {"": list(map(list, zip(*columns, strict=True)))}
        paint_panels(figure, panels)

    return paint
