"""The lab: how a finding of the paper is tried in small. Commands: run.py; the list: findings_*.py.

A finding is a question with arms, and an arm is a model that anybody could make by hand:

    runs/lab/starts/0/checkpoints/long-700       the tiny recipe up to 2K tokens, one for each seed
      └─ train.py --stage ultra --seq 8k --rope-theta 1.28e+06 --steps 40 ...   an arm: 2K -> 8K
           └─ eval.py --tasks recall_bare,recall,icl --lengths 256,2k,4k,8k ... its points

All arms of a seed start from the same weights and see the same data in the same order, so we
compare arms *within* a seed. A contrast turns the paper's direction into a number that is positive
where the paper is right ("recall at 8K, theta x16 less x1"). Three seeds give a mean and
Student's t interval: above zero we agree, below zero we disagree, else the two are not told apart.

Arms run as processes of one thread, so that their digits do not depend on the number of cores. What
an arm gave is kept under runs/lab by a hash of its settings, its start and the code; two findings
that share an arm train it once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import PackedDataset, PackedSequence, format_length  # noqa: E402
from model import preset_config  # noqa: E402
from train import RECIPES, TrainConfig, choose_stages, pack_domains  # noqa: E402

STAGES = {stage.name: stage for stage in RECIPES["tiny"]}
START_STAGES = ("base", "long")  # what a start consists of

# --- 1. What a finding is -------------------------------------------------------------------------

Point = dict[str, float]  # {"step": 40, "recall@8k": 0.93, "bits/byte short": 4.4, ...}
Measured = dict[str, list[Point]]  # of one seed: an arm's points, the last one its end
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


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, and how it is tried here."""

    name: str
    title: str
    source: str  # "Tables 18 and 19"
    claim: str  # the paper's direction in a plain sentence
    arms: dict[str, Arm]
    contrasts: dict[str, Callable[[Measured], float]]  # positive where the paper is right
    draw: Painter
    why: str = ""  # the likely reason where the small world disagrees, and how doses were chosen
    tasks: str = "recall_bare,recall,icl"
    lengths: str = "256,2k,4k,8k"
    samples: int = 200
    shown: tuple[str, ...] = ("recall@256", "recall@2k", "recall@8k")  # in tables
    evaluator: str = "eval.py"  # or experiments/tasks.py, which has more tasks
    along: bool = False  # measure an arm's start and all its checkpoints, not only its end
    compute: Callable[[int, bool], Measured] | None = None  # (seed, quick): without training


def less(a: str, b: str, *metrics: str | Callable[[Point], float]) -> Callable[[Measured], float]:
    """The contrast "a less b" at the end of training, in a metric or the mean of several."""
    def of(point: Point) -> float:
        return sum(point[m] if isinstance(m, str) else m(point) for m in metrics) / len(metrics)

    return lambda measured: of(measured[a][-1]) - of(measured[b][-1])


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


def find_start(stage: str, seed: int, lab: Lab) -> Path:
    """A seed's checkpoint at the end of a stage of the tiny recipe, trained now if it is missing.

    Raises ValueError if it is not in the --starts that were given, and for a later stage.
    """
    own = lab.folder / ("quick-starts" if lab.quick else "starts")
    folder = (lab.starts or own) / str(seed)
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
    """Hashes of the code that every arm runs, as it was when the lab was opened."""
    five = [ROOT / f"{name}.py" for name in ("data", "model", "eval", "train", "sft")]
    return [sha256(path) for path in [*five, *sorted((ROOT / "support").glob("*.py"))]]


def hash_program(command: str) -> list[str]:
    """The hash of a program of experiments/, where a command runs one."""
    programs = [word for word in command.split()[:1] if word.startswith("experiments/")]
    return [sha256(ROOT / path) for path in programs]


def key_of(arm: Arm, seed: int, lab: Lab) -> str:
    """A name for what an arm gives: a hash of all that it depends on."""
    if isinstance(arm.start, Arm):
        start = key_of(arm.start, seed, lab)
    else:
        start = sha256(find_start(arm.start, seed, lab) / "model.safetensors")
    transform = inspect.getsource(arm.transform) if arm.transform else ""
    facts = [arm.command, arm.before, arm.steps, arm.every, start, arm.config, seed, lab.quick,
             hash_code(), hash_program(arm.command), hash_program(arm.before), transform]
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
            run_program(command, folder / "train.log")
            (folder / "done").touch()
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
    """An arm's points in one seed, with the commands that made them and the seconds they took."""
    arm, points, begin = finding.arms[label], [], time.monotonic()
    checkpoints, commands = make_arm(arm, seed, lab)
    evaluation = evaluation_of(finding, seed, lab.quick)
    asked = short_hash(evaluation + hash_program(finding.evaluator))
    out = lab.folder / key_of(arm, seed, lab) / "eval" / asked
    for checkpoint in checkpoints if finding.along else checkpoints[-1:]:
        command = [*evaluation, "--model", shown_path(checkpoint), "--out", shown_path(out)]
        path = out / f"{checkpoint.name}.json"
        with MAKING[str(path)]:
            if not path.exists():
                run_program(command, out / f"{checkpoint.name}.log")
        step = 0 if checkpoint is checkpoints[0] else step_of(checkpoint)
        points.append(point_of(json.loads(path.read_text()), step))
        commands = [*commands, typed(command)]
    return {"points": points, "commands": commands,
            "seconds": round(time.monotonic() - begin, 1)}


def evaluation_of(finding: Finding, seed: int, quick: bool) -> list[str]:
    """The command line that asks a model a finding's questions, but for the model."""
    return [*shlex.split(finding.evaluator), "--tasks", finding.tasks, "--lengths", finding.lengths,
            "--samples", str(16 if quick else finding.samples), "--seed", str(seed)]


def point_of(evaluation: dict[str, Any], step: int) -> Point:
    """What eval.py wrote, as one flat row."""
    point: Point = {"step": step}
    for row in evaluation["results"]:
        point[f"{row['task']}@{format_length(row['length'])}"] = row["score"]
    for row in evaluation["bits_per_byte"]:
        point[f"bits/byte {row['name']}"] = row["bits_per_byte"]
    return point


# --- 3. A finding ---------------------------------------------------------------------------------


def run_finding(finding: Finding, seeds: Sequence[int], lab: Lab, command: str) -> dict[str, Any]:
    """Make and measure all arms in all seeds; return what docs/figures/lab/<name>.json holds."""
    if finding.compute:
        arms = compute_arms(finding, seeds, lab, command)
    else:
        arms = train_arms(finding, seeds, lab)
    version = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                             capture_output=True, text=True).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread an arm"
    return {"finding": finding.name, "title": finding.title, "source": finding.source,
            "claim": finding.claim, "why": finding.why, "command": command,
            "date": date.today().isoformat(), "commit": version or "unknown", "machine": machine,
            "seeds": list(seeds), "quick": lab.quick, "contrasts": judge(finding, arms, seeds),
            "arms": arms}


def compute_arms(finding: Finding, seeds: Sequence[int], lab: Lab, command: str) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    assert finding.compute is not None
    for seed in tqdm(seeds, desc=finding.name, unit="seed", disable=None):
        for label, points in finding.compute(seed, lab.quick).items():
            arm = arms.setdefault(label, {"points": {}, "commands": [command]})
            arm["points"][str(seed)] = points
    return arms


def train_arms(finding: Finding, seeds: Sequence[int], lab: Lab) -> dict[str, Any]:
    for seed in seeds:  # first, because the arms share them
        for stage in sorted({stage_of(arm) for arm in finding.arms.values()}):
            find_start(stage, seed, lab)
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(lab.jobs) as pool:
        waiting = {pool.submit(measure, finding, label, seed, lab): (label, seed)
                   for seed in seeds for label in finding.arms}
        for future in tqdm(as_completed(waiting), finding.name, len(waiting), unit="arm",
                           disable=None):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # an error need not wait for the other arms
            measured[waiting[future]] = future.result()
    return {label: {"points": {str(seed): measured[label, seed]["points"] for seed in seeds},
                    "commands": measured[label, seeds[0]]["commands"],
                    "seconds": {str(seed): measured[label, seed]["seconds"] for seed in seeds}}
            for label in finding.arms}


def stage_of(arm: Arm) -> str:
    return stage_of(arm.start) if isinstance(arm.start, Arm) else arm.start


# --- 4. From numbers to a verdict -----------------------------------------------------------------

# Student's t at 97.5%, for 1, 2, ... degrees of freedom: half a 95% interval in standard errors
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one number a seed, and its 95% interval (none for one seed)."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def verdict(differences: Sequence[float]) -> str:
    """What paired differences, positive where the paper is right, say about its claim."""
    _, low, high = mean_interval(differences)
    if low is None or high is None:
        return "one seed"
    return "agree" if low > 0 else "disagree" if high < 0 else "not told apart"


def judge(finding: Finding, arms: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every contrast of a finding: its difference in each seed, mean, interval and verdict."""
    rows = []
    for name, difference in finding.contrasts.items():
        values = [difference({label: arm["points"][str(seed)] for label, arm in arms.items()})
                  for seed in seeds]
        mean, low, high = mean_interval(values)
        rows.append({"contrast": name, "differences": values, "mean": mean, "low": low,
                     "high": high, "verdict": verdict(values)})
    return rows


# --- 5. Tables and pictures -----------------------------------------------------------------------


def values_of(result: dict[str, Any], label: str, metric: str, i: int = -1) -> list[float]:
    """One number a seed: an arm's metric at its i-th point."""
    return [points[i][metric] for points in result["arms"][label]["points"].values()]


def show(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:z.3f}" if low is None else f"{mean:z.3f} [{low:z.2f}, {high:z.2f}]"


def markdown_table(results: Iterable[dict[str, Any]]) -> str:
    """A row for each finding: the paper's direction beside the first of its contrasts."""
    lines = ["| finding | paper | here: mean [95% interval over seeds] | seeds with the paper "
             "| agrees? |", "|---|---|---|---|---|"]
    for result in results:
        row = result["contrasts"][0]
        seeds = f"{sum(value > 0 for value in row['differences'])} of {len(row['differences'])}"
        name = f"[{result['finding']}](#{result['finding']}) ({result['source']})"
        lines.append(f"| {name} | {result['claim']} | {row['contrast']}: "
                     f"{show(row['differences'])} | {seeds} | {row['verdict']} |")
    return "\n".join(lines)


def markdown_section(finding: Finding, result: dict[str, Any]) -> str:
    """One finding on docs/FINDINGS.md: figure, arms by metrics, contrasts, and our comment."""
    first = next(iter(result["arms"].values()))["points"][str(result["seeds"][0])][-1]
    metrics = [metric for metric in finding.shown if metric in first]
    lines = [f"## {finding.name}", "",
             f"**{finding.title}** ({finding.source}). The paper: {finding.claim}.", "",
             f"![{finding.title}](figures/lab/{finding.name}.png)", "",
             f"| arm | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for label in result["arms"]:
        cells = (show(values_of(result, label, metric)) for metric in metrics)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| the paper says more than 0 | each seed | mean [95% interval] | agrees? |",
              "|---|---|---|---|"]
    for row in result["contrasts"]:
        seeds = ", ".join(f"{value:z.3f}" for value in row["differences"])
        lines.append(f"| {row['contrast']} | {seeds} | {show(row['differences'])} "
                     f"| {row['verdict']} |")
    why = finding.why and finding.why[0].upper() + finding.why[1:].rstrip(".") + "."
    lines += ["", *([why, ""] if why else []),
              f"`{result['command']}`, commit {result['commit']}, {result['date']}.", ""]
    return "\n".join(lines)


def draw(finding: Finding, result: dict[str, Any], path: Path) -> bool:
    """Draw a result as its finding says. False where matplotlib, the `plots` extra, is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(7.5, 3.6), layout="constrained")
    finding.draw(figure, result)
    figure.suptitle(f"{result['title']} ({result['source']})", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def fit_to_dots(axes: Any, values: Sequence[float]) -> None:
    """Limit an axis to the seeds' values; the intervals may reach beyond what a score can be."""
    low, high = min(values), max(values)
    room = (high - low) / 4
    axes.set_ylim((-0.03, 1.03) if 0 <= low <= high <= 1 else (low - room, high + room))


def curve(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], label: str,
          i: int) -> None:
    """The i-th curve of a panel, `seeds` as [seed][x]: mean, intervals, and every seed a dot."""
    x = [place + 0.012 * i * (x[-1] - x[0]) for place in x]  # aside, so that no dot hides another
    means, lows, highs = zip(*map(mean_interval, zip(*seeds, strict=True)), strict=True)
    axes.plot(x, means, color=f"C{i}", label=label)
    if len(seeds) > 1:
        axes.vlines(x, lows, highs, color=f"C{i}", linewidth=1, alpha=0.6)
    for values in seeds:
        axes.plot(x, values, ".", color=f"C{i}", markersize=5)


def by_length(lengths: str, panels: dict[str, tuple[str, list[str] | None]]) -> Painter:
    """Scores by context length, a curve for each arm. `panels` is {title: (task, arms or all)}."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        names = lengths.split(",")
        all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, (task, labels)) in zip(all_axes, panels.items(), strict=True):
            for i, label in enumerate(labels or result["arms"]):
                seeds = [[points[-1][f"{task}@{name}"] for name in names]
                         for points in result["arms"][label]["points"].values()]
                curve(axes, range(len(names)), seeds, label, i)
            axes.set(xlabel="context length in tokens", title=title, ylim=(-0.03, 1.03))
            axes.set_xticks(range(len(names)), names)
            axes.legend(fontsize=8)
        all_axes[0].set_ylabel("share of right answers")

    return paint


def by_step(metrics: Sequence[str]) -> Painter:
    """Metrics along an arm's training, a panel for each arm."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        panels = figure.subplots(1, len(result["arms"]), squeeze=False, sharey=True)[0]
        for axes, (label, arm) in zip(panels, result["arms"].items(), strict=True):
            runs = list(arm["points"].values())
            steps = [point["step"] for point in runs[0]]
            for i, metric in enumerate(metrics):
                curve(axes, steps, [[point[metric] for point in run] for run in runs], metric, i)
            axes.set(xlabel="step", title=label, ylim=(-0.03, 1.03))
        panels[0].set_ylabel("share of right answers")
        panels[-1].legend(fontsize=8)

    return paint


def bars(metrics: Sequence[str]) -> Painter:
    """A panel for each metric, in it a bar for each arm."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        labels = list(result["arms"])
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            columns = [values_of(result, label, metric) for label in labels]
            for i, values in enumerate(columns):
                mean, low, high = mean_interval(values)
                error = None if low is None or high is None else [[mean - low], [high - mean]]
                axes.bar(i, mean, color=f"C{i}", alpha=0.5, yerr=error, capsize=3)
                axes.plot([i] * len(values), values, ".", color="black", markersize=4)
            axes.set_ylim(0, 1.15 * max(map(max, columns)) or 1)
            axes.set_title(metric, fontsize=8)
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)

    return paint
