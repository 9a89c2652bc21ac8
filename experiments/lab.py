"""The lab: how a finding of the paper is tried in small. run.py is its command line, findings_*.py its list.

A finding is a question with arms, and an arm is a model that somebody could have made by hand:

    runs/lab/starts/0/checkpoints/long-900          the tiny recipe up to 2K tokens, one for each seed
      └─ train.py --stage ultra --seq 8k --rope-theta 1.28e+06 --steps 40 ...     an arm: 2K -> 8K
           └─ eval.py --tasks recall_bare,recall,icl --lengths 256,2k,4k,8k ...   its points

Every arm of a seed starts from the same weights and sees the same data in the same order, so arms are
compared *within* a seed. The paper's direction becomes a number that is positive where the paper is right
("recall at 8K, theta x16 less x1"), one a seed, and three seeds give a mean and a Student's t interval.
If that lies above zero we agree, below zero we disagree, and else the two are not told apart.

Arms run as processes of one thread, so that their digits do not depend on the number of cores, and two
at a time on two cores. What an arm gave is kept under runs/lab by a hash of its settings, its start and the
five files; two findings that share an arm train it once.
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
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import (  # noqa: E402
    PackedDataset,
    PackedSequence,
    PackReport,
    format_length,
    load_tokenizer,
    parse_cli,
    write_packed,
)
from train import RECIPES, TrainConfig, choose_stages, pack_domains  # noqa: E402

STAGES = {stage.name: stage for stage in RECIPES["tiny"]}
START_STAGES = ("base", "long")  # what a start consists of

# --- 1. What a finding is ---------------------------------------------------------------------------

Point = dict[str, float]  # {"step": 40, "recall@8k": 0.93, "bits/byte short": 4.4, ...}
Measured = dict[str, list[Point]]  # of one seed: an arm's points along its training, the last one its end
Painter = Callable[[Any, dict[str, Any]], None]  # (matplotlib figure, result): see section 5
Transform = Callable[[PackedDataset, int], Iterable[PackedSequence]]  # (a packed domain, seed) -> another


@dataclass(frozen=True)
class Arm:
    """A model: where it starts, what changes in its config.json, and the command that trains it."""

    command: str = ""  # "train.py --stage ultra --seq 8k"; none: the start itself is measured
    steps: int = 0
    start: str | Arm = "long"  # a stage of the tiny recipe, or what another arm ended with
    config: dict[str, Any] | None = None  # entries of config.json to change; the start's weights alone remain
    transform: Transform | None = None  # rewrites the packed domains, which --data then names
    every: int = 0  # steps between checkpoints, for findings that look along the training


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, and how it is tried here."""

    name: str
    title: str
    source: str  # "Tables 18 and 19"
    claim: str  # the paper's direction in a plain sentence
    arms: dict[str, Arm]
    contrasts: dict[str, Callable[[Measured], float]]  # what is compared: positive where the paper is right
    draw: Painter
    why: str = ""  # the likely reason where the small world disagrees, and how doses were chosen
    tasks: str = "recall_bare,recall,icl"
    lengths: str = "256,2k,4k,8k"
    samples: int = 200
    shown: tuple[str, ...] = ("recall@256", "recall@2k", "recall@8k")  # columns of the printed table
    evaluator: str = "eval.py"  # or experiments/tasks.py, which knows more tasks; options may follow
    along: bool = False  # measure an arm's start and all its checkpoints, not only its end
    compute: Callable[[int, bool], Measured] | None = None  # (seed, quick): instead of arms that are trained


def less(a: str, b: str, *metrics: str | Callable[[Point], float]) -> Callable[[Measured], float]:
    """The contrast "arm a less arm b" at the end of training, in a metric or the mean of several."""
    def of(point: Point) -> float:
        return sum(point[m] if isinstance(m, str) else m(point) for m in metrics) / len(metrics)

    return lambda measured: of(measured[a][-1]) - of(measured[b][-1])


@dataclass(frozen=True)
class Lab:
    """Where things lie, and how much is done."""

    folder: Path = ROOT / "runs" / "lab"
    starts: Path | None = None  # somebody's runs of the tiny recipe, by seed; none: the lab trains its own
    quick: bool = False  # two steps and sixteen questions: does it run?
    jobs: int = 1


# --- 2. An arm --------------------------------------------------------------------------------------


def shown_path(path: Path) -> str:
    """A path as a reader would type it in the project's folder."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def typed(command: Sequence[str]) -> str:
    """The line that a reader would type."""
    return f"OMP_NUM_THREADS=1 python {shlex.join(command)}"


def run_program(command: Sequence[str], log: Path) -> None:
    """Run one of the five files on one thread. Raises RuntimeError with its last words."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{typed(command)} failed; {log} ends:\n{log.read_text()[-2000:]}")


def find_start(stage: str, seed: int, lab: Lab) -> Path:
    """A seed's checkpoint at the end of a stage of the tiny recipe, trained now if the lab has none.

    Raises ValueError for one that is not in the folder of starts that was given, and for a later stage.
    """
    own = lab.folder / ("quick-starts" if lab.quick else "starts")
    folder = (lab.starts or own) / str(seed)
    if found := sorted((folder / "checkpoints").glob(f"{stage}-*[0-9]"), key=step_of):
        return found[-1]
    if lab.starts or stage not in START_STAGES:
        raise ValueError(f"{folder} has no checkpoint of stage {stage!r}; give --starts DIR, with a run of "
                         "the tiny recipe in DIR/SEED")
    out = folder / f"{stage}.run"
    shutil.rmtree(out, ignore_errors=True)
    command = ["train.py", "--stage", stage, "--seed", str(seed), "--no-eval", "--out", shown_path(out)]
    if before := START_STAGES[:START_STAGES.index(stage)]:
        command += ["--init", shown_path(find_start(before[-1], seed, lab))]
    run_program(command + ["--steps", "2"] * lab.quick, folder / f"{stage}.log")
    (folder / "checkpoints").mkdir(exist_ok=True)
    done, = (out / "checkpoints").iterdir()
    return done.rename(folder / "checkpoints" / done.name)


def key_of(arm: Arm, seed: int, lab: Lab) -> str:
    """A name for what an arm gives: a hash of all that it depends on."""
    start = (key_of(arm.start, seed, lab) if isinstance(arm.start, Arm) else
             sha256(find_start(arm.start, seed, lab) / "model.safetensors"))
    facts = [arm.command, arm.steps, arm.every, start, arm.config, seed, lab.quick, five_files(),
             own_code(arm.command), inspect.getsource(arm.transform) if arm.transform else ""]
    return f"{seed}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def five_files() -> list[str]:
    """The hashes of the code that every arm runs, as it was when the lab was opened."""
    return [sha256(ROOT / f"{name}.py") for name in ("data", "model", "eval", "train", "sft")]


def own_code(command: str) -> list[str]:
    """The hash of a program of the lab's own, where a command names one."""
    return [sha256(ROOT / path) for path in command.split()[:1] if path.startswith("experiments/")]


MAKING: dict[str, Lock] = defaultdict(Lock)  # by key: arms that share a start wait for it


def make_arm(arm: Arm, seed: int, lab: Lab) -> tuple[list[Path], list[str]]:
    """Train an arm, or find it trained: its start and checkpoints, and the commands that made them."""
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
        command = command_of(arm, seed, start, folder, lab.quick)
        if not (folder / "done").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
            if arm.transform:
                pack_transformed(command, folder, arm.transform)
            run_program(command, folder / "train.log")
            (folder / "done").touch()
    checkpoints = sorted((folder / "run" / "checkpoints").iterdir(), key=step_of)
    return [start, *checkpoints], [*commands, typed(command)]


def command_of(arm: Arm, seed: int, start: Path, folder: Path, quick: bool) -> list[str]:
    """The command line that trains an arm, as a reader could type it after `python`."""
    steps, every = (2, min(arm.every, 1)) if quick else (arm.steps, arm.every)
    command = [*shlex.split(arm.command), "--steps", str(steps), "--seed", str(seed), "--no-eval",
               "--init", shown_path(start), "--out", shown_path(folder / "run")]
    command += ["--save-every", str(every), "--keep", "0"] if every else []
    return command + (["--data", shown_path(folder / "packs")] if arm.transform else [])


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def change_config(start: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model's folder with other entries in its config.json; weights, not Adam's moments."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in start.iterdir():
        if path.is_file() and path.name != "state.json" and not path.name.startswith("optimizer"):
            shutil.copyfile(path, folder / path.name)
    entry = json.loads((start / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(entry, indent=2) + "\n")
    return folder


def pack_transformed(command: Sequence[str], folder: Path, transform: Transform) -> None:
    """Pack the domains as `command` (of train.py) would, then write what `transform` makes of them."""
    config = parse_cli(TrainConfig, None, command[1:])
    stage, = choose_stages(config, head_dim=16)
    tokenizer = load_tokenizer(config.tokenizer)
    for name in ("plain", "packs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    pack_domains(stage, folder / "plain", tokenizer, config.seed)
    for path in sorted((folder / "plain").iterdir()):
        write_packed(folder / "packs" / path.name, transform(PackedDataset(path), config.seed), tokenizer,
                     stage.seq_len, path.name, config.seed, PackReport())


def measure(finding: Finding, label: str, seed: int, lab: Lab) -> dict[str, Any]:
    """An arm's points in one seed, with the commands that made them and the seconds they took."""
    arm, points, begin = finding.arms[label], [], time.monotonic()
    checkpoints, commands = make_arm(arm, seed, lab)
    evaluation = evaluation_of(finding, seed, lab.quick)
    asked = hashlib.sha256(json.dumps(evaluation + own_code(finding.evaluator)).encode()).hexdigest()[:8]
    for checkpoint in checkpoints if finding.along else checkpoints[-1:]:
        out = lab.folder / key_of(arm, seed, lab) / "eval" / asked
        command = [*evaluation, "--model", shown_path(checkpoint), "--out", shown_path(out)]
        path = out / f"{checkpoint.name}.json"
        with MAKING[str(path)]:
            if not path.exists():
                run_program(command, out / f"{checkpoint.name}.log")
        at_start = checkpoint is checkpoints[0]
        points.append(point_of(json.loads(path.read_text()), 0 if at_start else step_of(checkpoint)))
        commands = [*commands, typed(command)]
    return {"points": points, "commands": commands, "seconds": round(time.monotonic() - begin, 1)}


def evaluation_of(finding: Finding, seed: int, quick: bool) -> list[str]:
    """The command line that asks a model a finding's questions, but for the model."""
    return [*shlex.split(finding.evaluator), "--tasks", finding.tasks, "--lengths", finding.lengths,
            "--samples", str(16 if quick else finding.samples), "--seed", str(seed)]


def point_of(evaluation: dict[str, Any], step: int) -> Point:
    """What eval.py wrote, as one flat row."""
    return ({"step": step}
            | {f"{row['task']}@{format_length(row['length'])}": row["score"] for row in evaluation["results"]}
            | {f"bits/byte {row['name']}": row["bits_per_byte"] for row in evaluation["bits_per_byte"]})


# --- 3. A finding -----------------------------------------------------------------------------------


def run_finding(finding: Finding, seeds: Sequence[int], lab: Lab, command: str) -> dict[str, Any]:
    """Make and measure all arms in all seeds; return what docs/figures/lab/<name>.json holds."""
    arms: dict[str, dict[str, Any]] = {}
    if finding.compute:
        for seed in tqdm(seeds, desc=finding.name, unit="seed", disable=None):
            for label, points in finding.compute(seed, lab.quick).items():
                arms.setdefault(label, {"points": {}, "commands": [command]})["points"][str(seed)] = points
    else:
        for seed in seeds:  # before the arms, which share them
            for stage in sorted({stage_of(arm) for arm in finding.arms.values()}):
                find_start(stage, seed, lab)
        arms = {label: {"points": {}, "commands": [], "seconds": {}} for label in finding.arms}
        with ThreadPoolExecutor(lab.jobs) as pool:
            waiting = {pool.submit(measure, finding, label, seed, lab): (label, seed)
                       for seed in seeds for label in finding.arms}
            for future in tqdm(as_completed(waiting), finding.name, len(waiting), unit="arm", disable=None):
                label, seed = waiting[future]
                if future.exception():
                    pool.shutdown(cancel_futures=True)  # the others would only hold up the news
                measured = future.result()
                arms[label]["points"][str(seed)] = measured["points"]
                arms[label]["seconds"][str(seed)] = measured["seconds"]
                if seed == seeds[0]:
                    arms[label]["commands"] = measured["commands"]
        for arm in arms.values():  # in the order of the seeds, whichever was ready first
            for part in ("points", "seconds"):
                arm[part] = {str(seed): arm[part][str(seed)] for seed in seeds}
    return {"finding": finding.name, "title": finding.title, "source": finding.source, "claim": finding.claim,
            "why": finding.why, "command": command, "date": date.today().isoformat(), "commit": commit(),
            "machine": machine(), "seeds": list(seeds), "quick": lab.quick,
            "contrasts": judge(finding, arms, seeds), "arms": arms}


def stage_of(arm: Arm) -> str:
    return stage_of(arm.start) if isinstance(arm.start, Arm) else arm.start


def commit() -> str:
    """The commit of the code, and whether files were changed since."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread an arm"


# --- 4. From numbers to a verdict -------------------------------------------------------------------

# Student's t at 97.5% for 1, 2, ... degrees of freedom: half a 95% interval in standard errors of the mean.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of one number a seed, and its 95% interval (none for one seed). Source: Student (1908)."""
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


def judge(finding: Finding, arms: dict[str, dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every contrast of a finding: its difference in each seed, mean, interval and verdict."""
    rows = []
    for name, difference in finding.contrasts.items():
        values = [difference({label: arm["points"][str(seed)] for label, arm in arms.items()})
                  for seed in seeds]
        mean, low, high = mean_interval(values)
        rows.append({"contrast": name, "differences": values, "mean": mean, "low": low, "high": high,
                     "verdict": verdict(values)})
    return rows


# --- 5. Tables and pictures --------------------------------------------------------------------------


def values_of(result: dict[str, Any], label: str, metric: str, i: int = -1) -> list[float]:
    """One number a seed: an arm's metric at its i-th point."""
    return [points[i][metric] for points in result["arms"][label]["points"].values()]


def show(values: Sequence[float]) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:z.3f}" if low is None else f"{mean:z.3f} [{low:z.2f}, {high:z.2f}]"


def format_result(finding: Finding, result: dict[str, Any]) -> str:
    """For the terminal: arms by metrics, then every contrast and its verdict."""
    first = next(iter(result["arms"].values()))["points"][str(result["seeds"][0])][-1]
    metrics = [metric for metric in finding.shown if metric in first]
    width = max(map(len, result["arms"]))
    lines = [f"\n{result['title']} ({result['source']})", f"  paper: {result['claim']}",
             "  " + " " * width + "".join(f"{m:>24}" for m in metrics)]
    for label in result["arms"]:
        cells = (show(values_of(result, label, metric)) for metric in metrics)
        lines.append(f"  {label:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    for row in result["contrasts"]:
        lines.append(f"  {row['contrast']}: {show(row['differences'])} -> {row['verdict']}")
    return "\n".join(lines)


def markdown_table(results: Iterable[dict[str, Any]]) -> str:
    """The README's: a row for each finding, the paper's direction beside the first of its contrasts."""
    lines = ["| finding | paper | here: mean [95% interval over seeds] | seeds with the paper | agrees? |",
             "|---|---|---|---|---|"]
    for result in results:
        row = result["contrasts"][0]
        seeds = f"{sum(value > 0 for value in row['differences'])} of {len(row['differences'])}"
        name = f"[{result['finding']}](docs/FINDINGS.md#{result['finding']}) ({result['source']})"
        lines.append(f"| {name} | {result['claim']} | {row['contrast']}: {show(row['differences'])} | "
                     f"{seeds} | {row['verdict']} |")
    return "\n".join(lines)


def markdown_section(finding: Finding, result: dict[str, Any]) -> str:
    """One finding on docs/FINDINGS.md: figure, arms by metrics, all contrasts, and what we make of it."""
    first = next(iter(result["arms"].values()))["points"][str(result["seeds"][0])][-1]
    metrics = [metric for metric in finding.shown if metric in first]
    lines = [f"## {finding.name}", "", f"**{finding.title}** ({finding.source}). The paper: {finding.claim}.",
             "", f"![{finding.title}](figures/lab/{finding.name}.png)", "",
             f"| arm | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
    for label in result["arms"]:
        cells = (show(values_of(result, label, metric)) for metric in metrics)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| the paper says more than 0 | each seed | mean [95% interval] | agrees? |",
              "|---|---|---|---|"]
    lines += [f"| {row['contrast']} | {', '.join(f'{value:z.3f}' for value in row['differences'])} | "
              f"{show(row['differences'])} | {row['verdict']} |" for row in result["contrasts"]]
    why = finding.why and finding.why[0].upper() + finding.why[1:].rstrip(".") + "."
    return "\n".join([*lines, "", *([why, ""] if why else []),
                      f"`{result['command']}`, commit {result['commit']}, {result['date']}.", ""])


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
    """Limit an axis to what was measured: intervals over three seeds reach beyond what a score can be."""
    low, high = min(values), max(values)
    room = (high - low) / 4
    axes.set_ylim((-0.03, 1.03) if 0 <= low <= high <= 1 else (low - room, high + room))


def curve(axes: Any, x: Sequence[float], seeds: Sequence[Sequence[float]], label: str, i: int) -> None:
    """The i-th curve: the mean over the seeds with intervals, every seed a dot. `seeds` is [seed][x]."""
    x = [place + 0.012 * i * (x[-1] - x[0]) for place in x]  # aside, so that dots don't hide each other
    means, lows, highs = zip(*map(mean_interval, zip(*seeds, strict=True)), strict=True)
    axes.plot(x, means, color=f"C{i}", label=label)
    if len(seeds) > 1:
        axes.vlines(x, lows, highs, color=f"C{i}", linewidth=1, alpha=0.6)
    for values in seeds:
        axes.plot(x, values, ".", color=f"C{i}", markersize=5)


def by_length(lengths: str, panels: dict[str, tuple[str, list[str] | None]]) -> Painter:
    """A picture: scores by context length, a curve for each arm. `panels` is {title: (task, arms or all)}."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        names = lengths.split(",")
        all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, (task, labels)) in zip(all_axes, panels.items(), strict=True):
            for i, label in enumerate(labels or result["arms"]):
                runs = result["arms"][label]["points"].values()
                curve(axes, range(len(names)), [[points[-1][f"{task}@{name}"] for name in names]
                                                for points in runs], label, i)
            axes.set(xlabel="context length in tokens", title=title, ylim=(-0.03, 1.03))
            axes.set_xticks(range(len(names)), names)
            axes.legend(fontsize=8)
        all_axes[0].set_ylabel("share of right answers")

    return paint


def by_step(metrics: Sequence[str]) -> Painter:
    """A picture: metrics along an arm's training, one panel an arm."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        panels = figure.subplots(1, len(result["arms"]), squeeze=False, sharey=True)[0]
        for axes, (label, arm) in zip(panels, result["arms"].items(), strict=True):
            for i, metric in enumerate(metrics):
                runs = list(arm["points"].values())
                curve(axes, [point["step"] for point in runs[0]], [[p[metric] for p in run] for run in runs],
                      metric, i)
            axes.set(xlabel="step", title=label, ylim=(-0.03, 1.03))
        panels[0].set_ylabel("share of right answers")
        panels[-1].legend(fontsize=8)

    return paint


def bars(metrics: Sequence[str]) -> Painter:
    """A picture: a panel for each metric and in it a bar for each arm."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        labels = list(result["arms"])
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for i, label in enumerate(labels):
                values = values_of(result, label, metric)
                mean, low, high = mean_interval(values)
                error = None if low is None or high is None else [[mean - low], [high - mean]]
                axes.bar(i, mean, color=f"C{i}", alpha=0.5, yerr=error, capsize=3)
                axes.plot([i] * len(values), values, ".", color="black", markersize=4)
            axes.set_ylim(0, 1.15 * max(max(values_of(result, label, metric)) for label in labels) or 1)
            axes.set_title(metric, fontsize=8)
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)

    return paint
