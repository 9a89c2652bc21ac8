"""Training: recipes add up, steps are exact, runs repeat and resume bit for bit, models learn.

Runs are whole runs: `train.train(config)` in this process, on one rank, in a temporary folder.
"""

import json
import math
import shutil
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import eval as evaluation
import model as model_module
import train
from experiments import tiny_seeds
from support import report
from train import RECIPES, Stage, TrainConfig

ROOT = Path(__file__).parent.parent
NOT_REPEATED = {"tok_per_s", "mfu", "mem_gib", "time_s"}  # what depends on the machine's mood


@pytest.fixture(autouse=True)
def leave_no_process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def three_stages(monkeypatch):
    """The tiny recipe at lengths that cost nothing: the curriculum, without the wait."""
    mix = {"recall_bare-256": 0.3, "icl-128": 0.3, "short": 0.4}
    stages = [Stage(name, seq_len, theta, mix, 4 * 2048, 2048, lr=3e-3, min_lr=3e-4)
              for name, seq_len, theta in (("base", 256, 1e4), ("long", 512, 8e4),
                                           ("ultra", 1024, 6.4e5))]
    monkeypatch.setitem(RECIPES, "tiny", stages)


def run(folder: Path, **options) -> Path:
    """A run of few steps without evaluation, unless `options` say otherwise."""
    defaults = {"stage": "base", "steps": 4, "eval": False, "out": str(folder)}
    return train.train(TrainConfig(**{**defaults, **options}))


def read_log(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in NOT_REPEATED} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights and Adam's moments."""
    return {f"{path.name}/{key}": value for path in sorted(folder.rglob("*.safetensors"))
            for key, value in load_file(path).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_shares_add_up_and_every_stage_is_longer(recipe):
    """Mixtures sum to 1; lengths and theta only grow, theta at least eightfold."""
    stages = RECIPES[recipe]
    for stage in stages:
        assert sum(stage.mixture.values()) == pytest.approx(1)
        assert stage.batch_tokens % stage.seq_len == 0 and stage.steps > 0
    for before, after in pairwise(stages):
        assert after.seq_len > before.seq_len and after.rope_theta >= 8 * before.rope_theta


def test_prolong_recipe_has_the_papers_numbers():
    """Table 9: shares, lengths, theta, tokens, batches, rates."""
    first, second = RECIPES["prolong"]
    assert (first.seq_len, second.seq_len) == (65_536, 524_288)
    assert (first.rope_theta, second.rope_theta) == (8e6, 1.28e8)
    assert first.tokens == second.tokens == 20 * 2**30
    assert (first.batch_tokens, second.batch_tokens) == (4 * 2**20, 8 * 2**20)
    assert (first.lr, first.min_lr, first.warmup) == (1e-5, 1e-6, 0.1)
    assert (second.lr, second.min_lr) == (5e-6, 5e-7)  # the authors' script; the paper says 1e-5
    assert first.mixture["code_repos-64k"] == 0.30
    assert first.mixture["fineweb"] == pytest.approx(0.37 * 0.27)
    assert second.mixture["books-512k"] == pytest.approx(0.30 * 0.17)
    assert second.mixture["code_repos-512k"] == second.mixture["code_repos-64k"] == 0.15


def test_learning_rate_warms_up_and_decays():
    """Tenth of the steps in a line to the peak, then a cosine to the lowest."""
    stage = Stage("s", 8, 1e4, {"short": 1.0}, tokens=8 * 100, batch_tokens=8, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(stage, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and max(rates) == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_a_stage_at_another_length():
    """Longest documents follow the length, shorter ones stay, theta is the one given."""
    ultra = RECIPES["tiny"][-1]
    longer = train.stage_at_length(ultra, 65_536, 4e7)
    shorter = train.stage_at_length(ultra, 1024, None)
    assert {"recall-64k", "recall-2k"} <= longer.mixture.keys() and longer.seq_len == 65_536
    assert "recall-1k" in shorter.mixture
    assert (longer.rope_theta, shorter.rope_theta) == (4e7, None)
    assert sum(shorter.mixture.values()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_is_where_it_should_be(tmp_path, dtype):
    """Weights and moments are kept in float32 whatever is computed in; bfloat16 really is used."""
    folder = run(tmp_path / "run", dtype=dtype)
    for key, value in weights(folder / "checkpoints" / "base-4").items():
        assert value.dtype == torch.float32, key
    loss = read_log(folder)[0]["loss"]
    exact = read_log(run(tmp_path / "exact", dtype="float64"))[0]["loss"]
    error = abs(loss - exact)
    assert error < 1e-5 if dtype == "float32" else 1e-5 < error < 3e-2


def test_resumed_is_uninterrupted(tmp_path, three_stages):
    """Stopped inside its second stage, a second run goes on to the same bits and log."""
    options = {"stage": "", "save_every": 2, "keep": 0}
    whole = run(tmp_path / "whole", **options)
    stopped = run(tmp_path / "stopped", **options)
    for path in (stopped / "checkpoints").iterdir():  # as if it had died after long step 3
        if path.name not in ("base-2", "base-4", "long-2"):
            shutil.rmtree(path)
    log = stopped / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:7]) + lines[7][:20])
    train.train(TrainConfig(resume=str(stopped)))
    assert read_log(whole) == read_log(stopped) and len(read_log(whole)) == 12
    for row in read_log(whole):
        assert row["domains"].keys() <= {"recall_bare-256", "icl-128", "short"}
        loss_sums, counts = zip(*row["domains"].values(), strict=True)
        assert sum(loss_sums) / sum(counts) == pytest.approx(row["loss"], rel=1e-12)
        assert sum(counts) == row["valid_tokens"]
    for path in (whole / "checkpoints").iterdir():
        if path.name not in ("base-2", "base-4", "long-2"):
            assert_same(weights(path), weights(stopped / "checkpoints" / path.name))


def test_an_evaluation_between_steps_leaves_no_trace(tmp_path):
    """With --eval-every a run learns the same, and its checkpoints hold the same, to the bit."""
    options = {"save_every": 2, "keep": 0}
    plain = run(tmp_path / "plain", **options)
    evaluated = run(tmp_path / "evaluated", eval_every=2, **options)
    log = read_log(evaluated)
    assert [row.pop("eval", None) is not None for row in log] == [False, True, False, True]
    assert log == read_log(plain)
    for name in ("base-2", "base-4"):
        before, after = (weights(folder / "checkpoints" / name) for folder in (plain, evaluated))
        assert_same(before, after)


def test_the_printed_loss_is_a_mean_by_group(tmp_path, capsys):
    """The line shows each group's loss over the last steps, not that of the one step."""
    log = read_log(run(tmp_path / "run", mix="recall-256=0.5,recall_bare-256=0.2,icl-256=0.3"))
    pairs = [p for row in log for name, p in row["domains"].items() if name.startswith("recall")]
    mean, said = sum(p[0] for p in pairs) / sum(p[1] for p in pairs), capsys.readouterr().out
    assert f"step 4/4 | loss: recall {mean:.3g}, icl" in said and "; activations kept" in said
    assert "4 steps of 1,024 tokens, in sequences of 256; RoPE's theta 10,000\n" in said


def test_loss_png_draws_the_log_and_the_evaluations(tmp_path, monkeypatch):
    """Groups by tokens with a border after each stage, and recall at the stages' lengths."""
    log = [{"stage": stage, "seq_len": seq_len, "tokens_seen": tokens, "domains": domains}
           for stage, seq_len, tokens, domains in (
               ("base", 256, 10, {"recall-256": [8.0, 2]}),
               ("base", 256, 20, {"recall_bare-256": [1.0, 1], "short": [3.0, 1]}),
               ("long", 2048, 40, {"code_repos-2k": [5.0, 5], "recall-2k": [1.0, 2]}))]
    log[1]["eval"] = {"recall@256": 0.25, "icl@256": 0.9}
    rows = [{"task": task, "length": length, "score": 0.5}
            for task in ("recall", "icl") for length in (256, 512, 2048)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "long.json").write_text(json.dumps({"model": "long", "results": rows}))
    figure = report.new_figure(9, 6)
    monkeypatch.setattr(report, "new_figure", lambda *size: figure)
    assert report.draw_losses(tmp_path)
    assert (tmp_path / "figures" / "loss.png").stat().st_size > 10_000
    above, below = figure.axes
    curves = [line.get_xydata().tolist() for line in above.lines]
    for curve in ([[10, 4], [20, 3]], [[40, 0.5]], [[40, 1]], [[20, 0], [20, 1]]):
        assert curve in curves  # recall of base and of long, text of long, the border after base
    points = {line.get_label(): line.get_xydata().tolist() for line in below.lines[2:]}
    assert points == {"at 256": [[20, 0.25], [40, 0.5]], "at 2k": [[40, 0.5]]}


def test_a_checkpoint_without_moments_gets_no_name(tmp_path):
    """A weight that the optimizer has not stepped has no moments, and the run could not go on."""
    model = model_module.Transformer(model_module.preset_config("tiny", 295)).init_weights(0)
    parallel = model_module.init_parallel()
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight has no Adam moments"):
        train.save_checkpoint(tmp_path / "x", model, train.make_optimizer(model, 0.1), {}, parallel)
    assert list(tmp_path.iterdir()) == []


def test_adams_moments_go_on_and_the_rate_starts_over(tmp_path, three_stages):
    """--init from a run of ours carries Adam's state; from its weights alone, not."""
    base = run(tmp_path / "base")
    options = {"stage": "long", "steps": 1}
    carried = run(tmp_path / "carried", init=str(base), **options)
    bare = shutil.copytree(base / "checkpoints" / "base-4", tmp_path / "bare",
                           ignore=shutil.ignore_patterns("optimizer", "state.json"))
    fresh = run(tmp_path / "fresh", init=str(bare), **options)
    steps = []
    for folder in (carried, fresh):
        tensors = weights(folder / "checkpoints" / "long-1")
        steps += [int(value) for key, value in tensors.items() if key.endswith("/norm.weight/step")]
    assert steps == [5, 1]
    one, other = (read_log(folder)[0] for folder in (carried, fresh))
    assert one["loss"] == other["loss"] and one["lr"] == RECIPES["tiny"][1].lr


def test_a_diverging_run_stops_and_names_its_sequences(tmp_path, monkeypatch):
    """An infinite loss ends the run before any weight is touched; the last checkpoint is whole."""
    honest, calls = model_module.chunked_cross_entropy, count(1)

    def poisoned(*args):
        return honest(*args) + (math.inf if next(calls) == 4 else 0)

    monkeypatch.setattr(model_module, "chunked_cross_entropy", poisoned)
    words = r"stage base step 4: loss is inf.*recall_bare-256\[\d+\]"
    with pytest.raises(train.Diverged, match=words):
        run(tmp_path / "run", steps=6, save_every=3)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["base-3"]


def test_a_packed_folder_of_ones_own(tmp_path):
    """--data reads folders that data.py packed, and the mixture's names are theirs."""
    data.pack_domain(tmp_path / "packs" / "mine", "icl-256", 20, data.load_tokenizer(), 256, seed=0)
    folder = run(tmp_path / "run", data=str(tmp_path / "packs"), mix="mine=1")
    assert len(read_log(folder)) == 4 and not (folder / "data").exists()


def test_an_embedded_domain_without_long_documents_is_left_out(tmp_path, monkeypatch, capsys):
    """The rest of the mixture fills its share; with nothing left it is an error (see bad input)."""
    monkeypatch.setitem(data.LONG_DOMAINS, "textbooks", lambda t, seed: iter([t.document("short")]))
    mixture = "recall_bare-256=0.5,textbooks-256=0.5"
    folder = run(tmp_path / "run", mix=mixture, steps=3, save_every=2)
    said = capsys.readouterr().out
    assert said.count("left out of the mixture: domain textbooks-256: none of its 1 documents") == 1
    assert "100.0% recall_bare-256" in said and len(read_log(folder)) == 3
    train.train(TrainConfig(resume=str(folder)))  # the mixture that it resumes with is the same


def test_a_tiny_model_learns_what_it_could_not_do(tmp_path):
    """Recall of 16 pairs goes from nothing to nearly all in the base stage (some two minutes)."""
    tokenizer, folder = data.load_tokenizer(), run(tmp_path / "run", steps=None)
    config = model_module.preset_config("tiny", tokenizer.vocab_size)
    before = model_module.Transformer(config).init_weights(0)
    after = model_module.load_pretrained(folder / "checkpoints" / "base-2500")
    scores = [evaluation.run_task(m, tokenizer, "recall_bare", 160, 208)["score"]
              for m in (before, after)]
    assert scores[0] <= 0.01 and scores[1] >= 0.9


@pytest.mark.slow
def test_the_tiny_recipe_keeps_its_promises(tmp_path):
    """Three seeds of the whole recipe, every one of them, n >= 200 (tables in docs/LOG.md)."""
    runs = tiny_seeds.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "figures")])
    for run in runs:
        assert run["seconds"] < 600 and run["first_figure_s"] < 240 and run["peak_rss_gib"] < 1.5
        assert min(run["n"].values()) >= 200
        base, long, ultra = run["scores"].values()
        assert base["recall_bare@160"] >= 0.95 and base["recall@1k"] <= 0.2
        assert all(long[f"recall@{length}"] >= 0.95 for length in ("256", "512", "1k", "2k"))
        assert long["recall@16k"] <= 0.5
        assert all(score >= 0.9 for score in ultra.values())
        assert all(ultra[f"recall@{length}"] >= 0.93 for length in ("256", "512", "1k", "2k", "4k"))


@pytest.mark.parametrize("arguments, words", [
    ("--sequence 2k", "unrecognized arguments"),
    ("--recipe huge", "recipe 'huge'"),
    ("--stage middle", "'middle' is unknown"),
    ("--rope-theta nan", "--rope-theta nan"),
    ("--rope-theta 0", "--rope-theta 0"),
    ("--mix recall-2k", "not NAME=SHARE"),
    ("--mix gossip-2k=1 --stage long", "domain 'gossip-2k'"),
    ("--mix code_repos-2k=1 --stage long", "fills a sequence of 2,048 tokens"),
    ("--mix recall-2k=1 --stage base", "must fill sequences of 256"),
    ("--data empty", "has no meta.json"),
    ("--batch-tokens 1000", "not a whole number of sequences"),
    ("--micro-batch-tokens 768 --stage base", "micro_batch_tokens=768"),
    ("--seq-parallel-size 3", "seq_parallel_size=3"),
    ("--attention magic --steps 1", "backend 'magic'"),
    ("--tokenizer klingon", "tokenizer 'klingon'"),
    ("--init nowhere", "nowhere"),
    ("--out run", "holds a run already"),
])
def test_bad_input_ends_in_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    """Whatever is wrong with the command, one line says what; nothing is half-written."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "run" / "config.json").write_text("{}")
    too_short = {"code_repos": lambda t, seed: iter([t.document("short")])}
    monkeypatch.setattr(data, "LONG_DOMAINS", data.LONG_DOMAINS | too_short)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        data.run_main(train.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and words in error
    assert not list(tmp_path.rglob("*.writing")) and not list(tmp_path.rglob("checkpoints"))
