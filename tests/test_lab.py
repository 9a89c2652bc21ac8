"""The lab: commands that the five files accept, verdicts that follow, results that repeat."""

import json
import math
import shlex
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import lab  # noqa: E402
import neighbours  # noqa: E402
import run  # noqa: E402
import synthetic  # noqa: E402
import tasks  # noqa: E402
from findings_context import without_masks  # noqa: E402
from findings_data import language_reference, prose_haystack  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model as llama  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402

FINDINGS = run.FINDINGS.values()
TOKENIZER = data.load_tokenizer("bytes")
KNOWN = evaluation.TASKS | tasks.MORE_TASKS


def arms_of(finding):
    """Its arms, and those that they start from."""
    for arm in finding.arms.values():
        while isinstance(arm, lab.Arm):
            yield arm
            arm = arm.start


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_every_command_is_one_that_the_five_files_take(finding):
    """Unknown options, stages and tasks would fail here, not after an hour."""
    for arm in arms_of(finding):
        if not arm.command:
            continue
        place = Path("runs/start"), Path("runs/x")
        program, *options = lab.command_of(arm, 1, *place, quick=False)
        if arm.before:
            before = arm.before.format(folder="runs/x").split()
            assert before[0] == "experiments/synthetic.py" and before[-1] in " ".join(options)
            data.parse_cli(synthetic.SyntheticConfig, None, before[1:])
        if program == "experiments/neighbours.py":  # which hands on all but its own
            args, options = neighbours.parse(options)
            program = f"{args.command}.py"
        kind = {"train.py": train.TrainConfig, "sft.py": sft.SftConfig}[program]
        config = data.parse_cli(kind, None, options)
        assert not config.eval
        assert (config.seed, config.steps, config.init) == (1, arm.steps, "runs/start")
        if kind is train.TrainConfig:
            config = replace(config, recipe=config.recipe or "tiny")
            stage, = train.choose_stages(config, llama.preset_config("tiny", 295))
            assert stage.steps == arm.steps > 0 and stage.batch_tokens % stage.seq_len == 0
            assert arm.every == 0 or arm.steps % arm.every == 0  # a checkpoint is at the end
    program, *options = lab.evaluation_of(finding, 1, quick=False)
    config = data.parse_cli(evaluation.EvalConfig, None, options)
    known = KNOWN if program == "experiments/tasks.py" else evaluation.TASKS
    assert set(config.tasks.split(",")) <= known.keys() and config.samples >= 100


def made_up(finding):
    """A result as if it had been run: every metric of the finding's tasks, in three seeds."""
    rng = np.random.default_rng(0)
    config = data.parse_cli(evaluation.EvalConfig, None, lab.evaluation_of(finding, 0, False)[1:])
    metrics = ["bits/byte short", "bits/byte last 1/4"]
    for task in config.tasks.split(","):
        only = KNOWN[task].only_length
        lengths = [only] if only else config.lengths.split(",")
        metrics += [f"{task}@{data.format_length(data.parse_length(length))}" for length in lengths]
    if finding.compute:
        return lab.compute_arms(finding, range(3), lab.Lab(quick=True), "")
    arms = {}
    for label, arm in finding.arms.items():
        steps = range(0, arm.steps + 1, arm.every or 1) if finding.along else [arm.steps]
        arms[label] = {"points": {}}
        for seed in "012":
            arms[label]["points"][seed] = [
                {"step": step} | dict(zip(metrics, rng.random(len(metrics)), strict=True))
                for step in steps]
    return arms


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_every_finding_judges_and_draws_what_it_measures(finding, tmp_path):
    """Contrasts and pictures name only arms and metrics that are there."""
    arms = made_up(finding)
    contrasts = lab.judge(finding, arms, [0, 1, 2])
    result = {"finding": finding.name, "title": finding.title, "source": finding.source,
              "seeds": [0, 1, 2], "claim": finding.claim, "command": "run.py", "commit": "abc",
              "date": "2026-11-22", "arms": arms, "contrasts": contrasts}
    assert all(math.isfinite(x) for row in contrasts for x in row["differences"]) and contrasts
    text = lab.markdown_section(finding, result)
    assert all(label in text for label in arms)
    assert all(row["contrast"] in text for row in contrasts)
    assert all(metric in text for metric in finding.shown)
    assert contrasts[0]["contrast"] in lab.markdown_table([result])
    if lab.draw(finding, result, tmp_path / "figure.png"):
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_the_tables_in_the_documents_are_what_the_results_say(capsys):
    """docs/FINDINGS.md, word by word, from docs/figures/lab; all with three seeds."""
    run.main(["--table"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "FINDINGS.md").read_text()
    run.main(["--page"])
    assert capsys.readouterr().out.strip() == (ROOT / "docs" / "FINDINGS.md").read_text().strip()
    folder = ROOT / "docs" / "figures" / "lab"
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert len(results) >= 8 and all(len(r["seeds"]) >= 3 and not r["quick"] for r in results)
    assert {r["finding"] for r in results} <= run.FINDINGS.keys()


def test_verdicts_follow_from_paired_differences():
    """Student's interval for 1, 2, 3 is 2 +- 4.303 / sqrt(3); all on one side of 0 is a verdict."""
    half = 4.303 / 3**0.5
    assert lab.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half))
    assert lab.verdict([0.50, 0.52, 0.49]) == "agree"
    assert lab.verdict([-0.50, -0.52, -0.49]) == "disagree"
    assert lab.verdict([0.50, -0.02, 0.49]) == "not told apart"
    assert lab.verdict([0.0, 0.0, 0.0]) == "not told apart"
    assert lab.verdict([0.9]) == "one seed"
    contrasts = {"more": lambda a: a["x"][-1]["m"] - a["y"][-1]["m"]}
    finding = replace(run.FINDINGS["rope-base"], contrasts=contrasts)
    arms = {label: {"points": {str(seed): [{"m": value + seed / 100}] for seed in range(3)}}
            for label, value in (("x", 0.9), ("y", 0.2))}
    row, = lab.judge(finding, arms, [0, 1, 2])  # seeds differ, but in both arms alike
    assert row["verdict"] == "agree" and row["high"] - row["low"] < 1e-9
    row, = lab.judge(finding, {"x": arms["y"], "y": arms["x"]}, [0, 1, 2])
    assert row["verdict"] == "disagree" and row["mean"] == pytest.approx(-0.7)


def test_without_masks_keeps_tokens_and_labels(tmp_path):
    """Only who sees whom changes: what was no label stays none."""
    rng = np.random.default_rng(0)
    ids = rng.integers(256, size=(3, 64)).astype(np.uint32)
    masks = [None, rng.random(64) < 0.5, None]
    lens = [(64,), (10, 1, 53), (20, 44)]
    before = [data.PackedSequence(*parts) for parts in zip(ids, lens, masks, strict=True)]
    data.write_packed(tmp_path / "x", iter(before), TOKENIZER, 64, "x", 0, data.PackReport())
    after = list(without_masks(data.PackedDataset(tmp_path / "x"), 0))
    for a, b in zip(before, after, strict=True):
        assert b.doc_lens == (64,)
        a, b = data.make_batch([a]), data.make_batch([b])
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("name", ["few", "recall_prose"])
def test_more_tasks_fill_their_length_and_are_answered_by_their_context(name):
    for length in (256, 1024):
        for example in tasks.MORE_TASKS[name].examples(TOKENIZER, length, 3, 1, 0):
            context = TOKENIZER.decode(example.context_ids)
            assert len(example.questions) == tasks.MORE_TASKS[name].shared
            for question in example.questions:
                key = TOKENIZER.decode(question.prompt_ids[1:])
                assert context.count(f"<|pair|>{key}{question.answers[0]}") == 1
                total = len(example.context_ids) + len(question.prompt_ids) + example.budget
                assert total == length


def test_prose_takes_the_place_of_code_alone(tmp_path):
    """Pairs, questions, masks and lengths stay; all bytes are one piece of prose."""
    report = data.PackReport()
    packed = islice(data.pack_builtin("recall-8k", TOKENIZER, 8192, 0, report), 4)
    data.write_packed(tmp_path / "x", packed, TOKENIZER, 8192, "recall-8k", 0, report)
    before, text = data.PackedDataset(tmp_path / "x"), TOKENIZER.decode(language_reference())
    for share, changed in ((1.0, [0, 1, 2, 3]), (0.5, [1, 3])):
        for i, after in enumerate(prose_haystack(before, 0, share)):
            same = before[i].input_ids >= 256
            assert (after.input_ids >= 256).tolist() == same.tolist()
            assert after.doc_lens == before[i].doc_lens
            assert (after.input_ids[same] == before[i].input_ids[same]).all()
            assert (after.loss_mask == before[i].loss_mask).all()
            found = bytes(after.input_ids[~same].tolist()).decode(errors="ignore")
            assert (found in text) == (i in changed)


def small_start(folder, seed=0):
    """A start that nobody trained: a run's folder with a checkpoint of `long`."""
    model = llama.Transformer(llama.preset_config("tiny", TOKENIZER.vocab_size)).init_weights(seed)
    llama.save_pretrained(model, folder / "0" / "checkpoints" / "long-1")
    return folder


def test_an_arm_is_known_by_all_that_it_depends_on(tmp_path):
    """Equal settings share their result; any other setting, seed or start does not."""
    place = lab.Lab(tmp_path, small_start(tmp_path / "starts"))
    arm = lab.Arm("train.py --stage long", 4)
    key = lab.key_of(arm, 0, place)
    assert lab.key_of(lab.Arm("train.py --stage long", 4), 0, place) == key
    changes = [{"steps": 5}, {"command": "train.py --stage ultra"}, {"every": 2}, {"config": {}},
               {"transform": without_masks}, {"start": arm}, {"before": "experiments/bench.py"}]
    keys = [lab.key_of(replace(arm, **change), 0, place) for change in changes] + [key]
    keys.append(lab.key_of(arm, 0, replace(place, quick=True)))
    small_start(tmp_path / "other", seed=1)
    keys.append(lab.key_of(arm, 0, replace(place, starts=tmp_path / "other")))
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="no checkpoint of stage 'base'"):
        lab.find_start("base", 0, place)  # never trained into a folder that somebody gave
    with pytest.raises(ValueError, match="no checkpoint of stage 'ultra'"):
        lab.find_start("ultra", 0, lab.Lab(tmp_path))


def test_a_finding_runs_and_repeats_to_the_last_digit(tmp_path, monkeypatch, capsys):
    """Two arms, one stretched and one trained on rewritten packs, give the same results twice."""
    arms = {"stretched": lab.Arm(config={"rope_theta": 5e4}),
            "trained": lab.Arm("train.py --stage long --seq 512 --batch-tokens 1k "
                               "--mix recall_bare-256=1", 9, transform=without_masks, every=3)}
    finding = lab.Finding("small", "Small", "Table 0", "trained is better", arms,
                          {"better": lambda a: a["trained"][-1]["recall_bare@160"]
                           - a["stretched"][-1]["recall_bare@160"]},
                          lab.bars(("recall_bare@160",)), tasks="recall_bare", lengths="160",
                          shown=("recall_bare@160",))
    monkeypatch.setitem(run.FINDINGS, "small", finding)
    starts, results = small_start(tmp_path / "starts"), []
    for name in ("a", "b"):
        run.main(["small", "--seeds", "0", "--quick", "--jobs", "2", "--starts", str(starts),
                  "--lab", str(tmp_path / name)])
        assert "| better | " in capsys.readouterr().out
        result = json.loads((tmp_path / name / "quick" / "small.json").read_text())
        result.pop("date")
        for arm in result["arms"].values():
            assert arm.pop("seconds").keys() == {"0"}
            arm["commands"] = [c.replace(str(tmp_path / name), "LAB") for c in arm["commands"]]
        results.append(result)
    assert results[0] == results[1]
    made = results[0]["arms"]["trained"]
    assert [point["step"] for point in made["points"]["0"]] == [2]  # --quick: two steps
    assert [shlex.split(command)[2] for command in made["commands"]] == ["train.py", "eval.py"]
    packed = data.PackedDataset(next(tmp_path.glob("a/*/packs/recall_bare-256")))
    assert len(packed) == packed.meta["documents"] == 5  # one document a sequence
    run.main(["--table", "--out", str(tmp_path / "a" / "quick")])
    assert "| one seed |" in capsys.readouterr().out


def test_what_cannot_be_is_said_at_once(tmp_path):
    """Also by the program that fails."""
    arms = {"x": lab.Arm("train.py --stage nonsense", 1)}
    finding = replace(run.FINDINGS["rope-base"], arms=arms)
    place = lab.Lab(tmp_path, small_start(tmp_path / "starts"))
    with pytest.raises(RuntimeError, match=r"(?s)train.py --stage nonsense.*'nonsense' is unknown"):
        lab.run_finding(finding, [0], place, "")
    with pytest.raises(ValueError, match="finding 'rope' is unknown; choose one of rope-base"):
        run.main(["rope"])
    with pytest.raises(ValueError, match="nothing to do"):
        run.main([])
