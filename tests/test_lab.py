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
import packs  # noqa: E402
import run  # noqa: E402
import synthetic  # noqa: E402
import tasks  # noqa: E402
from findings_data import SFT_STEPS, sft_synthetic  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model as llama  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from support import toy  # noqa: E402

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
    for arm in finding.arms.values():
        program, *options = lab.evaluation_of(finding, arm, 1, quick=False)
        config = data.parse_cli(evaluation.EvalConfig, None, options)
        assert program == "experiments/tasks.py" and set(config.tasks.split(",")) <= KNOWN.keys()
        assert (config.samples / KNOWN["recall"].shared, config.samples / KNOWN["icl"].shared) == (
            52, 32)  # contexts


def test_chat_tokens_are_equal_whatever_the_synthetic_share():
    for label, arm in sft_synthetic.arms.items():
        assert abs(arm.steps * (1 - float(label.rstrip("%")) / 100) - SFT_STEPS) < 0.5


def made_up(finding, monkeypatch):
    """A result as if it had been run in three seeds: every metric of the finding's tasks."""
    rng = np.random.default_rng(0)

    def measure(finding, label, seed, place):
        arm = finding.arms[label]
        config = data.parse_cli(evaluation.EvalConfig, None,
                                lab.evaluation_of(finding, arm, 0, False)[1:])
        rows = []
        for task in config.tasks.split(","):
            only = KNOWN[task].only_length
            rows += [{"task": task, "length": data.parse_length(str(length)), "score": rng.random(),
                      "low": 0.1, "high": 0.9, "predictions": [
                          {"context": i, "score": rng.random()} for i in range(4)]}
                     for length in ([only] if only else config.lengths.split(","))]
        bits = [{"name": name, "bits_per_byte": rng.random()} for name in ("short", "last 1/4")]
        found = {"results": rows, "bits_per_byte": bits,
                 "answer_bits": {"chat": rng.random(), "synthetic": rng.random()}}
        steps = range(0, arm.steps + 1, arm.every or 1) if finding.along else [arm.steps]
        points, asked = zip(*(lab.read_evaluation(found, step) for step in steps), strict=True)
        return {"points": list(points), "asked": asked[0], "commands": [], "seconds": 1.0}

    monkeypatch.setattr(lab, "measure", measure)
    return lab.collect(finding, [0, 1, 3], lab.Lab(quick=True), "run.py")


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_every_finding_judges_and_draws_what_it_measures(finding, tmp_path, monkeypatch):
    """Contrasts and pictures name only arms and metrics that are there."""
    result = made_up(finding, monkeypatch)
    contrasts = result["contrasts"]
    assert all(math.isfinite(x) for row in contrasts for x in row["differences"])
    assert contrasts[0]["contrast"] in finding.primary and len(finding.primary) == 1
    assert [i for i, row in enumerate(contrasts) if "verdict" in row] == [0] * (not finding.compute)
    text = lab.markdown_section(finding, result)
    assert all(label in text for label in result["arms"])
    assert all(row["contrast"] in text for row in contrasts)
    assert all(metric in text for metric in finding.shown)
    table = lab.markdown_tables([finding], {finding.name: result})
    assert contrasts[0]["contrast"] in table and (finding.compute or " 4" in table)
    if lab.draw(finding, result, tmp_path / "figure.png"):
        assert (tmp_path / "figure.png").stat().st_size > 5000
        assert finding.compute or lab.draw_forest([result], tmp_path / "forest.png")


def test_the_page_is_what_the_results_say(capsys, tmp_path, monkeypatch):
    """docs/FINDINGS.md, word by word, and its verdicts from the scores in docs/figures/lab."""
    page = run.PAGE.read_text()
    run.main(["--table"])
    assert capsys.readouterr().out.strip() in page
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    run.PAGE.write_text(page)
    run.main(["--page"])
    assert run.PAGE.read_text() == page
    for path in (ROOT / "docs" / "figures" / "lab").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["seeds"] == list(range(8)) and not result["quick"], path
        judged = lab.judge(run.FINDINGS[result["finding"]], result["arms"], result["seeds"])
        assert json.loads(json.dumps(judged)) == result["contrasts"], path


def test_verdicts_follow_from_paired_differences():
    """Student's interval for 1, 2, 3 is 2 +- 4.303 / sqrt(3); the whole interval decides."""
    for df, wanted in ((1, 12.7062), (7, 2.3646), (30, 2.0423), (1000, 1.9623)):
        assert lab.student(df) == pytest.approx(wanted, abs=2e-4)
    half = 4.3027 / 3**0.5
    assert lab.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-4)
    for differences, floor, wanted in (
            ([0.50, 0.52, 0.49], 0, "agree"), ([-0.50, -0.52, -0.49], 0, "disagree"),
            ([0.50, -0.02, 0.49], 0, "not told apart"), ([0.0, 0.01, -0.01], 0, "alike"),
            ([0.0, 0.0, 0.0], 0, "alike"), ([0.020, 0.021, 0.022], 0, "agree"),
            ([0.9], 0, "one seed"),
            ([0.0, 0.01, -0.01], -0.05, "agree"), ([-0.2, -0.21, -0.2], -0.05, "disagree"),
            ([-0.04, -0.06, -0.05], -0.05, "not told apart")):
        assert lab.verdict(differences, 0.05, floor) == wanted, differences
    spread = [0.2, 0.0, 0.1]  # mean 0.1, deviation 0.1: 2.447 / sqrt(7) < 1 < 2.571 / sqrt(6)
    assert lab.seeds_needed(spread) == 7
    finding = replace(run.FINDINGS["rope-base"], primary={"more": lab.less("x", "y", "m")},
                      others={})
    arms = {label: {"points": {str(seed): [{"m": value + seed / 100}] for seed in range(5)}}
            for label, value in (("x", 0.9), ("y", 0.2))}
    row, = lab.judge(finding, arms, range(5))  # seeds differ, but in both arms alike
    assert row["verdict"] == row["new verdict"] == "agree" and row["high"] - row["low"] < 1e-9
    assert row["new"] == row["differences"][3:] and row["p"] == 2 / 2**5  # all signs alike
    row, = lab.judge(finding, {"x": arms["y"], "y": arms["x"]}, range(3))
    assert row["verdict"] == "disagree" and row["mean"] == pytest.approx(-0.7) and not row["new"]


@pytest.mark.parametrize("related", [False, True])
def test_two_documents_of_a_pack_share_all_pairs_or_no_symbol(related):
    whole, two = islice(packs.two_documents(0, 2048, related), 2)
    assert (whole.doc_lens, two.doc_lens) == ((2048,), (1024, 1024))
    assert (whole.input_ids == toy.PAIR).sum() == (two.input_ids == toy.PAIR).sum() == 16
    found = [set(part[np.isin(part, toy.SYMBOLS)]) for part in two.input_ids.reshape(2, -1)]
    assert len(found[0]) == len(found[1]) == 40 and len(found[0] & found[1]) == 40 * related
    unmasked = packs.without_mask(two)
    assert unmasked.doc_lens == (2048,) and (unmasked.loss_mask == two.loss_mask).all()


def test_without_masks_keeps_tokens_and_labels(tmp_path):
    """Only who sees whom changes: what was no label stays none."""
    rng = np.random.default_rng(0)
    ids = rng.integers(256, size=(3, 64)).astype(np.uint32)
    masks = [None, rng.random(64) < 0.5, None]
    lens = [(64,), (10, 1, 53), (20, 44)]
    before = [data.PackedSequence(*parts) for parts in zip(ids, lens, masks, strict=True)]
    data.write_packed(tmp_path / "x", iter(before), TOKENIZER, 64, "x", 0, data.PackReport())
    packed = data.PackedDataset(tmp_path / "x")
    after = [packs.without_mask(packed[i]) for i in range(len(packed))]
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
    before, text = data.PackedDataset(tmp_path / "x"), TOKENIZER.decode(packs.language_reference())
    for share, changed in ((1.0, [0, 1, 2, 3]), (0.5, [1, 3])):
        for i, after in enumerate(packs.prose_haystack(before, 0, share)):
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
               {"transform": packs.unrelated}, {"start": arm}, {"before": "experiments/bench.py"}]
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
                               "--mix recall_bare-256=1", 9, transform=packs.unrelated, every=3)}
    finding = lab.Finding("small", "Small", "Table 0", "trained is better", arms,
                          {"better": lab.less("trained", "stretched", "recall_bare@160")}, {},
                          lab.bars(("recall_bare@160",)), "a test", tasks="recall_bare",
                          lengths="160", shown=("recall_bare@160",))
    monkeypatch.setitem(run.FINDINGS, "small", finding)
    starts, results = small_start(tmp_path / "starts"), []
    for name in ("a", "b"):
        run.main(["small", "--seeds", "0", "--quick", "--jobs", "2", "--starts", str(starts),
                  "--lab", str(tmp_path / name)])
        printed = capsys.readouterr().out
        assert "| better (within 0.05: alike) |" in printed and "minutes on idle" in printed
        result = json.loads((tmp_path / name / "quick" / "small.json").read_text())
        result.pop("date")
        for arm in result["arms"].values():
            assert arm.pop("seconds").keys() == {"0"}
            arm["commands"] = [c.replace(str(tmp_path / name), "LAB") for c in arm["commands"]]
        results.append(result)
    assert results[0] == results[1]
    made = results[0]["arms"]["trained"]
    assert [point["step"] for point in made["points"]["0"]] == [2]  # --quick: two steps
    programs = [shlex.split(command)[2] for command in made["commands"]]
    assert programs == ["train.py", "experiments/tasks.py"]
    packed = data.PackedDataset(next(tmp_path.glob("a/*/packs/recall_bare-256")))
    assert len(packed) == 5
    run.main(["--table", "--out", str(tmp_path / "a" / "quick")])
    assert "| one seed |" in capsys.readouterr().out


def test_what_cannot_be_is_said_at_once(tmp_path):
    """Also by the program that fails."""
    arms = {"x": lab.Arm("train.py --stage nonsense --seq 2k --batch-tokens 2k", 1)}
    finding = replace(run.FINDINGS["rope-base"], arms=arms)
    place = lab.Lab(tmp_path, small_start(tmp_path / "starts"))
    with pytest.raises(RuntimeError, match=r"(?s)train.py --stage nonsense.*'nonsense' is unknown"):
        list(lab.train_seeds([finding], [0], place))
    with pytest.raises(ValueError, match="finding 'rope' is unknown; choose one of rope-base"):
        run.main(["rope"])
    with pytest.raises(ValueError, match="nothing to do"):
        run.main([])
