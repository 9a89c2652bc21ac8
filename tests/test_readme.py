"""The README and its two companions say what is so: commands parse or run, links lead somewhere, and the
arithmetic of "512K by hand" is done again from the code, number by number.
"""

import dataclasses
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import data
import eval as evaluation
import model
import sft
import train
from model import MemoryOptions, flops_per_step, preset_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
README = (ROOT / "README.md").read_text()
DOCS = {name: (ROOT / name).read_text() for name in ("README.md", "docs/USE.md", "docs/MEASURED.md",
                                                "docs/FINDINGS.md")}


def commands_of(text: str) -> list[str]:
    """Commands in indented lines, and `in a line of text`, which may be wrapped."""
    blocks = [line.strip() for line in text.splitlines()
              if re.match(r"    (torchrun|python|python3|\.venv/bin/python) ", line)]
    inline = re.findall(r"`((?:torchrun|python|pytest) [^`]+)`", re.sub(r"\n +", " ", text))
    return blocks + [command for command in inline if ".py" in command or command.startswith("pytest")]


COMMANDS = [command for text in DOCS.values() for command in commands_of(text)]
SETUP = [command for command in commands_of(README) if "-m venv" in command]


def commands_with(*scripts: str) -> list[str]:
    return sorted({c for c in COMMANDS if c not in SETUP and any(s in c for s in scripts)})


def section(title: str) -> str:
    """The README from a heading to the next of its rank or higher."""
    mark, = re.findall(rf"^(#+) {re.escape(title)}$", README, re.M)
    return re.search(rf"^{mark} {re.escape(title)}$(.*?)(?=^#{{1,{len(mark)}}} |\Z)", README, re.M | re.S)[1]


# --- Commands ---


def python_part(command: str) -> list[str]:
    """The script and its arguments, without comment and launcher."""
    words = shlex.split(command, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")):]


def test_there_are_exactly_two_setup_commands():
    """One line runs the main job, one passes the tests; both set up by themselves."""
    assert len(SETUP) == 2
    assert SETUP[0].endswith("train.py") and SETUP[1].endswith("pytest")


@pytest.mark.parametrize("command", commands_with(" train.py"))
def test_train_commands_parse_and_name_what_exists(command):
    """Every option exists, and recipe, stage and lengths are known."""
    config = data.parse_cli(train.TrainConfig, None, python_part(command)[1:])
    if not config.resume:
        stages = train.choose_stages(config, head_dim=16)
        assert stages and all(stage.steps > 0 for stage in stages)
    assert config.model in model.PRESETS
    assert config.plan == bool(config.world_size)


def needs_a_download(command: str) -> bool:
    """What a fresh clone does not have: your sources, a model's folder, the hub, a trained run."""
    return bool(re.search(r"\b(SRC|DIR|docs/\w+|models/|exported|runs/|prolong-data|mine\.jsonl)", command))


def test_small_data_commands_run(tmp_path):
    """As they stand, one after another, in an empty folder."""
    ran = 0
    for command in COMMANDS:
        if command.startswith("python data.py") and not needs_a_download(command):
            script, *arguments = python_part(command)
            done = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path,
                                  capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
            ran += 1
    assert ran >= 2


SMALLER = {  # what makes a command of "Use it" short; all else stays as it is written
    "--nproc-per-node 8": "--nproc-per-node 2",
    "train.py --steps 20": "train.py --steps 2 --no-eval",
    "--data packs/64k": "--data packs/64k --mix code_repos-64k=1 --seq 64k "
                        "--batch-tokens 4k --steps 1 --no-eval",
    "--tasks text --lengths 8k,32k,64k": "--tasks json_kv,needle,rerank --lengths 2k --samples 2",
    "sft.py --init runs/tiny": "sft.py --init runs/tiny --steps 2 --no-eval",
    "code_repos-64k": "code_repos-2k",
    "--seq 64k": "--seq 2k",
    "ultra-100": "ultra-2",
    "DIR": "exported",
}


def test_the_commands_of_use_it_run_one_after_another(tmp_path):
    """Two ranks train; that is resumed, tuned, talked to, exported; text is packed, the export trained."""
    commands = sorted((c for c in commands_of(section("Use it")) if ".py " in c),
                      key=lambda c: "DIR" in c)  # their DIR is the export, which the last of the others makes
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
        start = [sys.executable] + ["-m", "torch.distributed.run"] * (launcher == "torchrun")
        done = subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, input="hi\n")
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
    assert len(commands) == 9 and changed == set(SMALLER)
    assert (tmp_path / "runs/tiny/checkpoints/ultra-2/model.safetensors").exists()


PARSERS = {"data.py tokenize": data.TokenizeConfig, "data.py pack": data.PackConfig,
           "eval.py": evaluation.EvalConfig, "sft.py": sft.SftConfig}


@pytest.mark.parametrize("command", commands_with(*(f" {name}" for name in PARSERS)))
def test_other_commands_parse(command):
    """Every option exists and takes what it is given."""
    words = python_part(command)
    name = next(name for name in PARSERS if " ".join(words).startswith(name))
    config = data.parse_cli(PARSERS[name], None, words[len(name.split()):])
    if isinstance(config, evaluation.EvalConfig):
        for task in filter(None, config.tasks.split(",")):
            assert task in evaluation.GROUPS or evaluation.find_task(task)


@pytest.mark.parametrize("command", commands_with(" model.py"))
def test_model_commands_parse(command, monkeypatch, capsys):
    """Presets are described for real; folders and exports only get as far as their function."""
    words = python_part(command)
    monkeypatch.setattr(sys, "argv", words)
    if words[2] not in model.PRESETS:
        monkeypatch.setattr(model, "describe", lambda *_: "described")
        monkeypatch.setattr(model, "export", lambda *_: None)
    model.main()
    assert "described" in (printed := capsys.readouterr().out) or "written" in printed or (
        "8,030,261,248 parameters" in printed)


@pytest.mark.parametrize("command", commands_with(" experiments/"))
def test_experiments_exist_and_take_their_options(command):
    """By the script's own parser where it can be called, else by the names in its source."""
    script, *arguments = python_part(command)
    source = (ROOT / script).read_text()
    module = importlib.import_module(Path(script).stem)
    configs = [value for value in vars(module).values() if dataclasses.is_dataclass(value)
               and value.__module__ == module.__name__ and value.__name__.endswith("Config")]
    if hasattr(module, "parse"):
        names = [name for name in module.parse(arguments).findings if name != "NAME"]
        assert set(names) <= set(module.FINDINGS) | set(LAB_PLACES)
    elif configs:
        data.parse_cli(configs[0], None, arguments)
    else:
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("pytest")}))
def test_tests_that_are_named_exist(command):
    """Files are there, and each word after -k is in a test's name."""
    words = shlex.split(command)
    files = [ROOT / word for word in words if word.endswith(".py")] or sorted((ROOT / "tests").glob("*.py"))
    names = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.M)
    chosen = words[words.index("-k") + 1].split() if "-k" in words else []
    assert names
    assert all(any(word in name for name in names) for word in chosen if word not in ("or", "and", "not"))


def test_named_checkpoints_are_those_of_the_recipe():
    """After `python train.py`: runs/tiny/checkpoints/ultra-100, and so on."""
    known = {f"{stage.name}-{stage.steps}" for stage in train.RECIPES["tiny"]}
    named = {name for text in DOCS.values()
             for name in re.findall(r"runs/(?:tiny/checkpoints|a/eval)/(\w+-\d+)", text)}
    assert named and named <= known


# --- Links, figures and the map ---


def test_every_function_that_is_linked_exists():
    """`name` in a link to a file is defined in that file."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(links) >= 30
    for name, file in links:
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", source, re.M), (name, file)


LAB_PLACES = re.findall(r"<!-- lab: ([\w-]+)", README)  # where a result is still to be put


@pytest.mark.parametrize("name", DOCS)
def test_figures_and_links_lead_somewhere(name):
    text = re.sub(r"<!--.*?-->", "", DOCS[name], flags=re.S)
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert ((ROOT / name).parent / path).stat().st_size > 10_000
    for path, anchor in re.findall(r"(?<!!)\[[^]]*\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, anchor


def sections_of(file: str) -> dict[int, str]:
    """A file's numbered sections: number -> source."""
    parts = re.split(r"^# --- (\d+)\. .*$", (ROOT / file).read_text(), flags=re.M)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def test_sections_to_read_first_exist():
    rows = re.findall(r"^\| `(\w+\.py)` ([\d, to]+) \|", README, re.M)
    assert [file for file, _ in rows] == ["data.py", "model.py", "train.py", "sft.py", "eval.py"]
    for file, text in rows:
        assert {int(n) for n in re.findall(r"\d+", text)} <= sections_of(file).keys()


def test_the_readers_map_is_right():
    """Every name is defined in the section that the map gives; every finding is there, or has its place."""
    rows = [line.strip("| ").split(" | ") for line in section("The reader's map").splitlines()
            if line.startswith("|")][2:]
    assert len(rows) >= 20
    for row in rows:
        file, number, found = "", 0, 0
        for new_file, new_number, name in re.findall(r"`(\w+\.py)`|(?:(\d+) )?`(\w+)`", row[2]):
            if new_file:
                file, found = new_file, found + 1
                number = int(re.search(rf"`{new_file}` (\d+)", row[2])[1])
                continue
            number = int(new_number or number)
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", sections_of(file)[number], re.M), name
        assert found, row
    import run as lab  # experiments/run.py
    findings = {name.strip() for row in rows for name in row[3:] for name in name.split(",")} - {"", "|"}
    assert findings <= set(lab.FINDINGS) | set(LAB_PLACES)


# --- 512K by hand ---

NVLINK, NETWORK = 450e9, 50e9  # bytes/s each way of an H100, from its datasheet; of a 400 Gb/s network card
PAPER_HOURS = {"64k": 2200, "512k": 12_200}  # Table 9
GIB, KIB = 2**30, 2**10


SHAPE = preset_config("llama3-8b", 295)
S, P = 524_288, 8
T, LAYERS = S // P, SHAPE.n_layers


def plan_of(capsys, *arguments: str) -> str:
    train.print_plan(data.parse_cli(train.TrainConfig, None, ["--plan", "--world-size", "8", "--model",
                                                              "llama3-8b", *arguments]))
    return capsys.readouterr().out


def weights_by_code() -> dict[str, str]:
    """What the section says, from the code: what it is -> how it is written there."""
    block, rest = train.count_weights(SHAPE)
    n = LAYERS * block + rest
    found = {"a block": f"{block:,}", "parameters": f"{n:,}"}
    for size, what in ((4, "weights"), (8, "Adam"), (16, "all")):
        found[what] = f"| {size} | {size * n / GIB:.1f} GiB | {size * n / P / GIB:.1f} GiB |"
    return found


def tokens_by_code() -> dict[str, str]:
    with torch.device("meta"):  # shapes without memory
        layer = model.Block(SHAPE, 0).to(torch.bfloat16)
        x = torch.empty(T, SHAPE.dim, dtype=torch.bfloat16)
        qkv = layer.before_attention(x, model.rope_cos_sin(SHAPE, torch.arange(T), x.dtype))
        logits = torch.empty(T, SHAPE.vocab_size, dtype=torch.float32)

    def parts(**levers: Any) -> dict[str, int]:
        return train.memory_per_rank(SHAPE, MemoryOptions(**levers), T, P)

    def logits_at_work(chunk: int) -> int:  # twice what the second half of a chunk adds
        return 2 * (parts(loss_chunk_tokens=chunk)["at work: the logits"]
                    - parts(loss_chunk_tokens=chunk // 2)["at work: the logits"])

    def row(size: float, decimals: int = 1) -> str:
        return f"| {size / T / KIB:,.0f} KiB | {size / GIB:.{decimals}f} GiB |"

    kept = parts()["kept for backward"]
    assert parts(activations="recompute")["kept for backward, then gradients"] == LAYERS * x.nbytes
    return {"q, k, v": row(sum(t.nbytes for t in qkv), 2), "block input": row(x.nbytes),
            "block inputs": row(LAYERS * x.nbytes), "kept of a block": row(kept / LAYERS, 2),
            "kept": row(kept), "logits": row(logits.nbytes), "logits' peak": row(logits_at_work(T)),
            "a chunk's peak": f"| | {logits_at_work(8192) / GIB:.1f} GiB |",
            "a head's scores": f"{S:,}² entries, {2 * S * S // GIB} GiB in bfloat16"}


def plan_by_code(capsys) -> dict[str, str]:
    printed = plan_of(capsys, "--seq", "512k")
    ladder = re.findall(r"^  ((?:everything|recompute|and the|and block|and weights).*)$", printed, re.M)
    assert len(ladder) == 7
    mine = dict(re.findall(r"^    (\w+).*? (\d+\.\d)$", printed, re.M))
    sent = float(re.search(r"each sends ([\d.]+) GB a sequence", printed)[1]) * 1e9
    a_layer = sent / 3 / LAYERS  # forward, again, backward
    seconds = flops_per_step(SHAPE, (S,)) / P / train.PLAN_FLOPS
    wider = 4 * SHAPE.n_heads / (2 * (SHAPE.n_heads + SHAPE.n_kv_heads))
    return {line: line for line in ladder} | {
        "gathered": f"two blocks are {mine['gathered']} GiB",
        "at work": "weights and moments {weights}, gathered {gathered}, block inputs (gradients take their "
        "place one by one) {kept}, and one block at work {at}".format(**mine),
        "sent a layer": f"= {a_layer / 1e9:.2f} GB, at NVLink's {NVLINK / 1e9:.0f} GB/s each way "
        f"{a_layer / NVLINK * 1e3:.1f} ms",
        "sent": f"{sent / 1e9:.1f} GB: {sent / NVLINK:.2f} s of the {seconds:.1f}",
        "network": f"{NETWORK / 1e9:.0f} GB/s it would be {sent / NETWORK:.1f} s",
        "expanded": f"{wider:.1f} times as much"}


def time_by_code(capsys) -> dict[str, str]:
    matmuls = (4 * flops_per_step(SHAPE, (1,)) - flops_per_step(SHAPE, (2,))) / 2  # f(n) = a n + b n²
    attention = flops_per_step(SHAPE, (1,)) - matmuls
    assert attention == 6 * LAYERS * SHAPE.n_heads * SHAPE.head_dim
    found = {f"FLOPs at {n}": f"| {data.format_length(n).upper()} | {matmuls:.2e} | {attention * n:.2e} | "
             f"{attention * n / matmuls:.2f} |" for n in (8192, 65_536, S)}
    one, eight = flops_per_step(SHAPE, (S,)), flops_per_step(SHAPE, (65_536,) * 8)
    seconds, peak = one / P / train.PLAN_FLOPS, model._PEAK_BF16["H100"]
    found |= {"overtakes": f"at {matmuls / attention:,.0f} tokens", "one document": f"is {one:.2e} FLOPs",
              "eight": f"are {eight:.2e}: {one / eight:.1f} times less", "peak": f"{peak / 1e12:.0f} TFLOP/s",
              "of it": f"{train.PLAN_FLOPS / peak:.0%} of that ({train.PLAN_FLOPS / 1e12:.0f})",
              "seconds": f"{seconds:.1f} s for the long document, {S / seconds / P:.0f} tokens/s each, and "
              f"{eight / P / train.PLAN_FLOPS:.1f} s for the eight"}
    hours = {}
    for stage, step_s, steps, planned in re.findall(
            r"stage (\w+):.*?FLOPs, ([\d.]+) s.*?([\d,]+) steps: ([\d,]+) GPU-hours",
            plan_of(capsys, "--recipe", "prolong"), re.S):
        found[f"stage {stage}"] = f"| {stage} | {steps} | {step_s} s | {planned} | {PAPER_HOURS[stage]:,} |"
        hours[stage] = int(planned.replace(",", ""))
    share = [f"{hours[stage] / PAPER_HOURS[stage] * train.PLAN_FLOPS / peak:.0%}" for stage in hours]
    found |= {"days": f"that is {sum(hours.values()) / P / 24:.0f} days, and the paper's hours are "
              f"{sum(PAPER_HOURS.values()) / P / 24:.0f}", "shares": f"ran at {share[0]} and {share[1]}"}
    return {what: re.sub(r"e\+0?", "e", line) for what, line in found.items()}


GIVEN = {  # shapes of the model and the machine, what FLOPs are made of, powers, the plan's assumptions
    "2", "3", "4", "6", "7", "8", "9", "10", "12", "15", "30", "32", "64", "80", "128", "512", "900", "1,024",
    "4,096", "8,192", "14,336", "65,536", "128,256", "524,288"}


def test_512k_by_hand_is_what_the_code_says(capsys):
    """Each result is there as the code gives it, and every number there is given or a result."""
    text = section("512K by hand")
    flat = re.sub(r"\s+", " ", text)
    found = weights_by_code() | tokens_by_code() | plan_by_code(capsys) | time_by_code(capsys)
    missing = {name: line for name, line in found.items() if re.sub(r"\s+", " ", line) not in flat}
    assert not missing
    number = r"\d[\d,]*(?:\.\d+)?(?:e\d+)?"
    known = GIVEN | set(re.findall(number, " ".join(found.values())))
    names = r"\]\([^)]*\)|`[^`]*`|\b[A-Za-z-]+\d[\w-]*"  # links, code, bfloat16, H100, Llama-3-8B
    strange = {n.rstrip(",") for n in re.findall(number, re.sub(names, "", text))} - known
    assert not strange


def test_what_is_said_of_rope_is_so():
    """How many of Llama-3's pairs complete a turn, and where a larger theta leads them."""
    old, _ = model.rope_frequencies(SHAPE)
    new, _ = model.rope_frequencies(dataclasses.replace(SHAPE, rope_theta=8e6))
    unfinished = old * 8192 < 2 * math.pi
    further = (new * 65_536 / (old * 8192))[unfinished]
    text = re.sub(r"\s+", " ", section("4. RoPE is stretched"))
    turns = f"{unfinished.sum()} of them do not even complete one turn"
    assert f"{len(old)} pairs, and over its 8K tokens {turns}" in text
    assert f"only {(further > 1 + 1e-9).sum()} go further than before, and not twice as far" in text
    assert further.max() < 2
    assert f"{model.ntk_rope_theta(5e5, 8192, 65_536, 128) / 1e6:.1f}e6 for 64K" in text
    thetas = [f"{s.rope_theta:.1e}".replace(".0e", "e").replace("e+0", "e") for s in train.RECIPES["tiny"]]
    assert f"The tiny recipe goes {' → '.join(thetas)}" in text


def test_what_the_steps_cost_is_so(capsys):
    """Numbers of the story that the code gives."""
    story = re.sub(r"\s+", " ", section("The recipe, step by step"))
    ratio = flops_per_step(SHAPE, (524_288,)) / flops_per_step(SHAPE, (65_536,) * 8)
    assert f"A token costs {ratio:.1f} times as much there as at 64K" in story
    plan = plan_of(capsys, "--seq", "512k")
    whole = float(re.search(r"everything kept, all logits at once +([\d.]+)", plan)[1])
    assert f"keeping it takes {round(whole, -1):.0f} GiB a rank" in story
    sizes = ", ".join(map(str, model.valid_seq_parallel_sizes(32, 8)))
    assert f"allow {', '.join(sizes.split(', ')[:-1])} or {sizes.split(', ')[-1]} ranks" in story


# --- Measured numbers are those of the committed results ---


def result(name: str) -> Any:
    return json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())


def test_the_three_seeds_are_those_of_the_committed_runs():
    runs = result("tiny_seeds")["runs"]
    rows = re.findall(r"^\| (\w+) at (\w+) \| (.*) \|$", section("Start"), re.M)
    assert len(rows) >= 8
    for task, length, cells in rows:
        scores = [[run["scores"][stage.name][f"{task}@{length}"] for run in runs]
                  for stage in train.RECIPES["tiny"]]
        assert cells == " | ".join(f"{sum(each) / len(each):.3f} ({', '.join(f'{x:.2f}' for x in each)})"
                                   for each in scores), (task, length)
    seconds, first = ([f"{run[key]:.0f}" for run in runs] for key in ("seconds", "first_figure_s"))
    assert (f"They took {', '.join(seconds)} seconds, the first figure {', '.join(first)}, and at most "
            f"{max(run['peak_rss_gib'] for run in runs):.2f} GiB") in README


def test_what_is_said_of_speed_and_faults_is_in_the_committed_results():
    bench, faults, ranks = result("bench"), result("faults"), result("parallel_speed")
    ratio, bf16 = bench["ratios"]["float32, both packed"], "our bfloat16, their float32, packed"
    lost = sum(each["kills"] for each in faults["kills"])
    text = re.sub(r"\s+", " ", README)
    assert f"a step is {ratio:.1f} times as fast as transformers' (float32)" in text
    assert (f"ours in bfloat16 is {bench['ratios'][bf16]:.1f} times as fast as theirs in float32, and "
            f"{bench['ratios_compiled'][bf16]:.1f} times when compiled") in text
    assert f"a line with its length (R² {bench['memory_r2']:.3f}); {lost} runs killed" in text
    assert f"of {faults['mutations']['tried']:,} damaged files none" in text
    assert not faults["mutations"]["wrong"]
    measured = re.sub(r"\s+", " ", DOCS["docs/MEASURED.md"])
    assert f"ours is {ratio:.1f} times as fast in float32" in measured
    cost = [row["seconds"] / row["tokens"] * 1e6 for row in bench["scaling"]]  # at 4K, 8K, ... 256K tokens
    assert f"is flat, {min(cost):.0f} to {max(cost):.0f} us from 4K to 256K tokens in all" in measured
    assert "In documents of 512 tokens it costs as much a token at 256K tokens as at 4K" in text
    assert cost[-1] == pytest.approx(cost[0], rel=0.1)
    assert (f"raises throughput by {ranks['modelled_reordering'] - 1:.0%} in a model of the 64K stage over 8 "
            f"ranks, and by {ranks['reordering']['ratio'] - 1:.0%} on two ranks") in measured
    assert f"are {ranks['ulysses']['one document of 16K']['ratio']:.2f} times as fast" in measured
