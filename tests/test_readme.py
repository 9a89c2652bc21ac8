"""README.md and docs/ say what is so: commands run, links lead somewhere, and so do numbers."""

import dataclasses
import functools
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data
import eval as evaluation
import model
import sft
import train
from experiments import predictions
from support import memory
from support.speed import KERNELS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: re.sub(r" \\\n +", " ", (ROOT / page).read_text()) for page in PAGES}
SHAPE = model.preset_config("llama3-8b", 295)


def section(title: str, page: str = "README.md") -> str:
    """A page's text from a heading to the next of its rank or higher."""
    mark, = re.findall(rf"^(#+) {re.escape(title)}$", TEXTS[page], re.M)
    end = rf"(?=^#{{1,{len(mark)}}} |\Z)"
    return re.search(rf"^{mark} {re.escape(title)}$(.*?){end}", TEXTS[page], re.M | re.S)[1]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)  # so that it does not matter where the text is wrapped


def commands_of(text: str) -> list[str]:
    """Commands in indented lines, and `in a line of text`, which may be wrapped."""
    blocks = re.findall(r"^    ((?:torchrun|python3?) .*)$", text, re.M)
    inline = re.findall(r"`((?:torchrun|python|pytest) [^`]+)`", re.sub(r"\n *", " ", text))
    return blocks + [words for words in inline if ".py" in words or words.startswith("pytest")]


TODAY = [TEXTS[page] for page in PAGES if page != "docs/LOG.md"]  # the log's commands are history
COMMANDS = [command for text in TODAY for command in commands_of(text)]
SETUP = [command for command in COMMANDS if "-m venv" in command]


def commands_with(*scripts: str) -> list[str]:
    found = {command for command in COMMANDS if any(script in command for script in scripts)}
    return sorted(found - set(SETUP))


def python_part(command: str) -> list[str]:
    """The script and its arguments, without comment and launcher."""
    words = shlex.split(command, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")):]


def test_the_readme_is_short_and_so_is_the_way_to_start():
    """One line runs the main job, one the tests."""
    job, tests = SETUP
    assert job.endswith("train.py") and tests.endswith("pytest")
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 110


SMALLER = {  # what makes a command of "Use it" short; all else stays as it is written
    "--nproc-per-node 8": "--nproc-per-node 2",
    "train.py --steps 20": "train.py --steps 2 --no-eval",
    "--data packs/64k": "--data packs/64k --mix code_repos-64k=1 --seq 64k "
                        "--batch-tokens 4k --steps 1 --no-eval",
    "--tasks text --lengths 8k,32k,64k": "--tasks json_kv,needle,rerank --lengths 3k --samples 2",
    "sft.py --init runs/tiny": "sft.py --init runs/tiny --steps 2 --no-eval",
    "code_repos-64k": "code_repos-2k", "--seq 64k": "--seq 2k", "ultra-56": "ultra-2",
    "DIR": "exported"}


def test_the_commands_of_use_it_run_one_after_another(tmp_path):
    """Two ranks train; that is resumed, tuned, exported; text is packed, the export trained."""
    commands = [command for command in commands_of(section("Use it")) if ".py " in command]
    commands.sort(key=lambda command: "DIR" in command)  # DIR is what the last of the others makes
    (tmp_path / "SRC" / "repo").mkdir(parents=True)
    for name in ("data.py", "model.py", "train.py"):
        (tmp_path / "SRC" / "repo" / name).write_text((ROOT / name).read_text())
    changed = set()
    for command in commands:
        for long, short in SMALLER.items():
            if long in command:
                command = command.replace(long, short)
                changed.add(long)
        launcher, *words = shlex.split(command, comments=True)
        words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
        start = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
        done = subprocess.run([sys.executable, *start, *words], cwd=tmp_path, input="hi\n",
                              capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
    assert len(commands) == 9 and changed == set(SMALLER)
    assert (tmp_path / "runs/tiny/checkpoints/ultra-2/model.safetensors").exists()


PARSERS = {"data.py tokenize": data.TokenizeConfig, "data.py pack": data.PackConfig,
           "eval.py": evaluation.EvalConfig, "train.py": train.TrainConfig, "sft.py": sft.SftConfig}


@pytest.mark.parametrize("command", commands_with(*(f" {name}" for name in PARSERS)))
def test_commands_parse_and_name_what_exists(command):
    """Every option exists; tasks, recipes, stages and lengths are known."""
    words = python_part(command)
    name = next(name for name in PARSERS if " ".join(words).startswith(name))
    config = data.parse_cli(PARSERS[name], None, words[len(name.split()):])
    if name == "train.py":
        shape = model.preset_config("tiny", 295)
        config = replace(config, recipe=config.recipe or "tiny")
        assert config.resume or train.choose_stages(config, shape)
        assert config.model in model.PRESETS and config.plan == bool(config.world_size)
    if name == "eval.py":
        for task in filter(None, config.tasks.split(",")):
            assert task in evaluation.GROUPS or evaluation.find_task(task)


@pytest.mark.parametrize("command", commands_with(" model.py"))
def test_model_commands_run_or_miss_only_their_folder(command, tmp_path):
    """Presets are described for real; other commands name the folder they lack."""
    script, *words = python_part(command)
    done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path,
                          capture_output=True, text=True)
    if words[1] in model.PRESETS:
        assert "8,030,261,248 parameters" in done.stdout
    else:
        assert words[1] in done.stderr and "usage" not in done.stderr


@pytest.mark.parametrize("command", commands_with(" experiments/"))
def test_experiments_exist_and_take_their_options(command):
    """By the script's own parser where it can be called, else by the names in its source."""
    script, *arguments = python_part(command)
    module = importlib.import_module(Path(script).stem)
    configs = [value for value in vars(module).values() if dataclasses.is_dataclass(value)
               and value.__module__ == module.__name__ and value.__name__.endswith("Config")]
    if hasattr(module, "parse"):
        assert {*module.parse(arguments).findings} - {"NAME"} <= set(module.FINDINGS)
    elif configs:
        data.parse_cli(configs[0], None, arguments)
    else:
        source = (ROOT / script).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("pytest")}))
def test_tests_that_are_named_exist(command):
    """Files are there, and each word after -k is in a test's name."""
    words = shlex.split(command)
    files = [ROOT / word for word in words if word.endswith(".py")] or (ROOT / "tests").glob("*.py")
    names = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.M)
    chosen = words[words.index("-k") + 1] if "-k" in words else "test_"
    assert all(any(word in name for name in names) for word in re.split(" (?:or|and|not) ", chosen))


# --- Links, figures and questions ---

@pytest.mark.parametrize("page", PAGES)
def test_figures_and_links_lead_somewhere(page):
    """Files exist, anchors are headings, and a `name` that links to a file is defined in it."""
    here = (ROOT / page).parent
    link = r"\[([^]]*)\]\((?!https?:)([^)#]*)#?([^)]*)\)"
    for label, path, anchor in re.findall(link, TEXTS[page]):
        target = here / path if path else ROOT / page
        text = "" if target.suffix == ".png" and target.stat().st_size else target.read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, anchor
        if target.suffix == ".py":
            name = label.strip("`")
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", text, re.M), (label, path)


def test_each_of_the_twenty_questions_has_its_answer():
    """Spread over all five files, and answered with a function in that file."""
    questions, answers = (section(name, "docs/EXERCISES.md")
                          for name in ("Find it yourself", "Answers"))
    numbers = re.findall(r"^(\d+)\. ", questions, re.M)
    answers = re.findall(r"^(\d+)\. \[`\w+`\]\(\.\./(\w+\.py)\)", answers, re.M)
    assert numbers == [number for number, _ in answers] == [str(n) for n in range(1, 21)]
    files = [f"{name}.py" for name in ("data", "model", "eval", "train", "sft") for _ in range(4)]
    assert [file for _, file in answers] == files


# --- 512K by hand, and other numbers that the code gives ---

NVLINK, NETWORK = 450e9, 50e9  # bytes/s each way of an H100 (datasheet); of a 400 Gb/s card
PAPER_HOURS = {"64k": 2200, "512k": 12_200}  # Table 9
PEAK, GIB, KIB = 989e12, 2**30, 2**10  # FLOP/s of an H100 in bfloat16 (datasheet)
S, P, T, LAYERS = 524_288, 8, 524_288 // 8, SHAPE.n_layers
PLANNED = re.compile(r"by (\w+): .*? FLOPs, ([\d.,]+) s, ([\d,]+) tok/s a GPU, MFU ([\d.]+%)")
PLANS = ("--seq 64k --batch-tokens 512k", "--seq 512k", "--seq 1m", "--seq 5m")
flops = functools.partial(model.flops_per_step, SHAPE)
GIVEN = {  # shapes, powers, what FLOPs are made of, the plan's assumptions
    "2", "3", "4", "6", "7", "8", "9", "10", "12", "15", "30", "32", "64", "80", "128", "512",
    "900", "1,024", "2,048", "4,096", "8,192", "14,336", "65,536", "128,256", "524,288",
    "1", "5", "11", "16", "25", "600", "2.13", "2026", "2407.08608", "2602.21196",
    "71.6", "61.6", "59.3"}  # counted tensors


@functools.cache
def plan_of(*arguments: str) -> str:
    command = [sys.executable, "train.py", "--plan", "--world-size", "8", "--model", "llama3-8b"]
    return subprocess.check_output([*command, *arguments], cwd=ROOT, text=True)


def said_of_weights() -> list[str]:
    """What the page must say, by the code."""
    block, rest = memory.count_weights(SHAPE)
    n = (LAYERS * block + rest) / GIB
    return [f"= {block:,}: queries", f"gain are {LAYERS * block + rest:,}"] + [
        f"| {size} | {size * n:.1f} GiB | {size * n / P:.1f} GiB |" for size in (4, 8, 16)]


def said_of_tokens() -> list[str]:
    def part(name: str, **options: str | int) -> int:
        return memory.memory_per_rank(SHAPE, model.MemoryOptions(**options), T, P)[name]

    def logits_at_work(chunk: int) -> int:  # twice what the second half of a chunk adds
        at_work = [part("at work: the logits", loss_chunk_tokens=n) for n in (chunk, chunk // 2)]
        return 2 * (at_work[0] - at_work[1])

    kept = part("kept for backward", loss_chunk_tokens=0)
    inputs = part("kept for backward, then gradients", activations="recompute")
    qkv = 2 * T * SHAPE.head_dim * (SHAPE.n_heads + 2 * SHAPE.n_kv_heads)  # 2 bytes each: bfloat16
    rows = [(qkv, 2), (inputs / LAYERS, 1), (inputs, 1), (kept / LAYERS, 2), (kept, 1),
            (4 * T * SHAPE.vocab_size, 1), (logits_at_work(T), 1)]
    said = [f"| {size / T / KIB:,.0f} KiB | {size / GIB:.{n}f} GiB |" for size, n in rows]
    one, two = (part("at work: a block's attention", activations="recompute", mlp_tile_tokens=1,
                     loss_chunk_tokens=1, head_chunks=n) / T / KIB for n in (1, 2))
    said += [f"is {2 * (one - two):.0f} KiB a token in all", f"needs {(one - two) / 2:.0f} KiB",
             f"holds {10 * P * inputs / GIB:,.0f} GiB of block inputs"]  # 5M is 10 x 512K
    return [*said, f"| | {logits_at_work(T) * 2048 / T / GIB:.1f} GiB |",
            f"{S:,}² entries, {2 * S * S // GIB} GiB in bfloat16"]


def said_of_the_plan() -> list[str]:
    printed = plan_of("--seq", "512k")
    row = r"^  (\w.* \d+\.\d  (?:fits|-))$"
    options = re.findall(row, printed, re.M) + re.findall(row, plan_of("--seq", "5m"), re.M)[-3:]
    assert len(options) == 12
    part = dict(re.findall(r"^    (\w+).*? (\d+\.\d)$", printed, re.M))
    sent = float(re.search(r"each sends ([\d.]+) GB a sequence", printed)[1]) * 1e9
    a_layer = sent / 3 / LAYERS  # forward, again, backward
    seconds = float(re.search(r"a document of .*? FLOPs, ([\d.]+) s", printed)[1])
    wider = 4 * SHAPE.n_heads / (2 * (SHAPE.n_heads + SHAPE.n_kv_heads))
    return [*options, f"two blocks are {part['gathered']} GiB",
            f"weights and moments {part['weights']}, gathered {part['gathered']}, block inputs",
            f"one by one) {part['kept']}, and one block at work {part['at']}",
            f"= {a_layer / 1e9:.2f} GB, at NVLink's {NVLINK / 1e9:.0f} GB/s",
            f"each way {a_layer / NVLINK * 1e3:.1f} ms",
            f"{sent / 1e9:.1f} GB: {sent / NVLINK:.2f} s of the {seconds:.1f}",
            f"{NETWORK / 1e9:.0f} GB/s it would be {sent / NETWORK:.1f} s",
            f"{wider:.1f} times as much"]


def said_of_time() -> list[str]:
    matmuls = (4 * flops((1,)) - flops((2,))) / 2  # of a n + b n²
    attention = flops((1,)) - matmuls
    one, eight = flops((S,)), flops((65_536,) * 8)
    said = [f"| {data.format_length(n).upper()} | {matmuls:.2e} | {attention * n:.2e} | "
            f"{attention * n / matmuls:.2f} |" for n in (8192, 65_536, S)]
    said += [f"at {matmuls / attention:,.0f} tokens", f"is {one:.2e} FLOPs",
             f"are {eight:.2e}: {one / eight:.1f} times less", f"{PEAK / 1e12:.0f} TFLOP/s"]
    said += [f"| {n} | {f / 1e12:.0f} | {b / 1e12:.0f} |" for n, (f, b) in KERNELS.items()]
    for options in PLANS:
        kernel, *rates = PLANNED.search(printed := plan_of(*options.split())).groups()
        gib = re.search(r"in all +([\d.]+)  it fits", printed)[1]
        said.append(f"| `{options}` | {kernel} | {gib} | {rates[0]} s | {rates[1]} | {rates[2]} |")
    planned = re.findall(r"stage (\w+):.*?a step of.*? FLOPs, ([\d.]+) s.*?MFU ([\d.]+)%\s+([\d,]+)"
                         r" steps: ([\d,]+) GPU-hours", plan_of("--recipe", "prolong"), re.S)
    said += [f"| {stage} | {steps} | {step_s} s | {hours} | {PAPER_HOURS[stage]:,} |"
             for stage, step_s, _, steps, hours in planned]
    ours = [int(hours.replace(",", "")) for *_, hours in planned]
    theirs = [PAPER_HOURS[stage] for stage, *_ in planned]
    share = [f"{a / b * float(p[2]):.0f}%" for a, b, p in zip(ours, theirs, planned, strict=True)]
    said += [f"ran at {share[0]} and {share[1]} of", f"that is {sum(ours) / P / 24:.0f} days",
             f"the paper's hours are {sum(theirs) / P / 24:.0f}", *predictions.table().splitlines()]
    return [re.sub(r"e\+0?", "e", line) for line in said]


def test_512k_by_hand_is_what_the_code_says():
    """Each result is there as the code gives it, and every number there is given or a result."""
    text = section("512K by hand", "docs/512K.md")
    said = said_of_weights() + said_of_tokens() + said_of_the_plan() + said_of_time()
    assert not [line for line in said if flat(line) not in flat(text)]
    number = r"\d[\d,]*(?:\.\d+)?(?:e\d+)?"
    known = GIVEN | set(re.findall(number, " ".join(said)))
    names = r"\]\([^)]*\)|`[^`]*`|\b[A-Za-z-]+\d[\w-]*"  # links, code, bfloat16, H100, Llama-3-8B
    assert not {n.rstrip(",") for n in re.findall(number, re.sub(names, "", text))} - known


def test_the_readmes_speeds_are_the_plans():
    rates = [PLANNED.search(plan_of(*options.split()))[3] for options in PLANS]
    said = "{} tokens/s a GPU at 64K, {} at 512K, {} at 1M, and {} at 5M".format(*rates)
    assert said in flat(section("What runs where"))


def test_what_the_recipe_says_is_so():
    """How many of Llama-3's pairs complete a turn, where a larger theta leads them, and costs."""
    old, _ = model.rope_frequencies(SHAPE)
    new, _ = model.rope_frequencies(dataclasses.replace(SHAPE, rope_theta=8e6))
    unfinished = old * 8192 < 2 * math.pi
    further = (new * 65_536 / (old * 8192))[unfinished]
    assert further.max() < 2
    ratio = flops((S,)) / flops((65_536,) * 8)
    whole = float(re.search(r"everything kept, all .* ([\d.]+)", plan_of("--seq", "512k"))[1])
    *sizes, last = map(str, model.valid_seq_parallel_sizes(32, 8))
    thetas = " → ".join(f"{s.rope_theta:.1e}".replace("e+0", "e") for s in train.RECIPES["tiny"])
    for said in (f"{len(old)} pairs, and over its 8K tokens {unfinished.sum()} of them do not even",
                 f"only {(further > 1 + 1e-9).sum()} go further than before, and not twice as far",
                 f"{model.ntk_rope_theta(5e5, 8192, 65_536, 128) / 1e6:.1f}e6 for 64K",
                 f"The tiny recipe goes {thetas.replace('.0e', 'e')}",
                 f"A token costs {ratio:.1f} times as much there as at 64K",
                 f"keeping it takes {round(whole, -1):.0f} GiB a rank",
                 f"allow {', '.join(sizes)} or {last} ranks"):
        assert said in flat(TEXTS["docs/RECIPE.md"])


def test_the_three_seeds_are_those_of_the_committed_runs():
    found = json.loads((ROOT / "docs/figures/tiny_seeds.json").read_text())
    rows = re.findall(r"^\| recall at (\w+) \| (.*) \|$", section("Start"), re.M)
    assert [length for length, _ in rows] == ["256", "2k", "8k", "16k"]
    for length, cells in rows:
        scores = [[run["scores"][stage.name][f"recall@{length}"] for run in found["runs"]]
                  for stage in train.RECIPES["tiny"]]
        assert cells == " | ".join(f"{sum(each) / len(each):.3f}" for each in scores), length
    assert f"commit {found['commit']}, {found['date']}" in flat(section("Start"))
