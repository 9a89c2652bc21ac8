"""A model that is not the tiny one: it keeps its tokenizer, template, theta and context.

The folder has the form of SmolLM2's, with a tokenizer trained here and random weights.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import test_data_tokenizers as families
import torch
from test_eval import TEXT
from test_train import leave_no_process_group, read_log  # noqa: F401

import data
import eval as evaluation
import model as llama
import sft
import train

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A context of 1,024 tokens and a theta of 1e5."""
    root = tmp_path_factory.mktemp("real")
    with mock.patch.dict(families.SPECIAL, smollm=CHATML):
        tokenizer = data.load_tokenizer(str(families.train("smollm", root / "tokenizer")))
    model = llama.Transformer(llama.ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16,
        ffn_dim=48, max_seq_len=1024, rope_theta=1e5, tie_embeddings=True)).init_weights(0)
    model.files |= data.tokenizer_files(tokenizer)
    llama.save_pretrained(model, root / "model")
    return root / "model"


def one_step(folder: Path, out: Path, seq: int, **options) -> Path:
    config = train.TrainConfig(**{
        "init": str(folder), "seq": seq, "mix": f"code_repos-{seq}=1", "steps": 1, "eval": False,
        "batch_tokens": seq, "out": str(out), **options})
    return train.train(config) / "checkpoints" / "512k-1"


@pytest.mark.parametrize("seq, given, theta, context", [
    (512, None, 1e5, 1024), (1024, None, 1e5, 1024), (2048, None, 1e5 * 2 ** (16 / 14), 2048),
    (512, 3e5, 3e5, 1024), (2048, 3e5, 3e5, 2048)])
def test_theta_and_context_are_the_models_own(folder, tmp_path, capsys, seq, given, theta, context):
    """A shorter --seq changes neither; for a longer one theta follows the NTK rule, and we say so.
    The recipe is the paper's, and a resumed run has the same stage."""
    checkpoint = one_step(folder, tmp_path / "run", seq, rope_theta=given)
    found = llama.read_config(checkpoint)
    assert (found.rope_theta, found.max_seq_len) == (pytest.approx(theta), context)
    said = capsys.readouterr()
    assert f"theta {theta:,.0f}\n" in said.out
    assert ("NTK rule: 100,000 -> " in said.err) == (seq > 1024 and not given)
    assert read_log(tmp_path / "run")[0]["lr"] == 5e-6
    assert train.train(train.TrainConfig(resume=str(tmp_path / "run"))) == tmp_path / "run"


def test_after_training_it_is_asked_little_within_its_context(folder, tmp_path):
    """Four tasks, at a quarter of the context and at all of it; what has no room is left out."""
    one_step(folder, tmp_path / "run", 512, eval=True, samples=2)
    result = json.loads((tmp_path / "run" / "eval" / "512k.json").read_text())
    asked = {(row["task"], row["length"]) for row in result["results"]}
    assert {("json_kv", 1024), ("needle", 1024)} <= asked
    assert {task for task, _ in asked} <= set(evaluation.GROUPS["few"])
    assert {length for _, length in asked} <= {256, 1024}
    few = evaluation.plan_jobs(evaluation.EvalConfig(), data.tokenizer_for(folder), 4096)
    assert {(length, n) for _, length, n in few} == {(1024, 16), (4096, 16)}
    long = evaluation.plan_jobs(evaluation.EvalConfig(tasks="needle"), data.tokenizer_for(folder))
    assert long == [("needle", 16_384, 100), ("needle", 65_536, 100)]


def test_eval_warns_leaves_out_and_refuses(folder, tmp_path, monkeypatch, capsys):
    """Lengths beyond the context, tasks without room, no bits per byte, weights of NaN."""
    def ask(model: Path, *more: str) -> dict:
        monkeypatch.setattr("sys.argv", ["eval.py", "--model", str(model), "--samples", "1",
                                         "--out", str(tmp_path), "--bpb-length", "0", *more])
        evaluation.main()
        return json.loads((tmp_path / f"{model.name}.json").read_text())

    result, said = ask(folder, "--tasks", "text", "--lengths", "600,1100"), capsys.readouterr()
    asked = {(row["task"], row["length"]) for row in result["results"]}
    assert {task for task, _ in asked} <= set(TEXT)
    assert ("icl_6", 600) in asked and not {("icl_77", 600), ("json_kv", 600)} & asked
    assert "left out: task icl_77 needs" in said.err and "bits/byte" not in said.out
    assert "lengths up to 1,100 are beyond the model's context of 1,024\n" in said.err
    with pytest.raises(ValueError, match=r"icl_77 needs .* at the least"):
        ask(folder, "--tasks", "icl_77", "--lengths", "600")

    model = llama.load_pretrained(folder)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    llama.save_pretrained(model, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"model.norm.weight' has values that are not finite"):
        ask(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; name the model's own"):
        data.tokenizer_for(tmp_path / "broken")


def test_sft_takes_the_papers_recipe_and_the_folders_template(folder, tmp_path, monkeypatch):
    """At the model's own length, with built-in questions; --chat then needs no option."""
    run = sft.fine_tune(sft.SftConfig(init=str(folder), steps=1, batch_tokens=2048, eval=False,
                                      out=str(tmp_path / "run")))
    (row,), settings = read_log(run), json.loads((run / "config.json").read_text())
    assert (row["seq_len"], row["lr"], settings["template"]) == (1024, 2e-5, "chatml")
    assert "<|im_end|>" in (run / "checkpoints" / "sft-1" / "chat_template.jinja").read_text()
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=["What is json?", EOFError]))
    sft.chat(sft.SftConfig(chat=str(run), max_new_tokens=3))
    with pytest.raises(ValueError, match=r"recall-1k needs special tokens of .*; leave it out"):
        sft.fine_tune(sft.SftConfig(init=str(folder), recipe="tiny", steps=1, eval=False,
                                    out=str(tmp_path / "tiny")))


def test_the_template_is_that_of_the_folder(folder, tmp_path):
    """Its chat template says so; without one the special tokens do; another family is refused."""
    tokenizer, settings = data.tokenizer_for(folder), tmp_path / "tokenizer_config.json"
    assert sft.template_for(tokenizer, tmp_path) == "chatml"
    settings.write_text(json.dumps({"chat_template": "{{ '<|eot_id|>' }}"}))
    assert sft.template_for(tokenizer, tmp_path) == "llama3"
    settings.write_text(json.dumps({"chat_template": [{"name": "a", "template": "<|im_end|>"}]}))
    assert sft.template_for(tokenizer, tmp_path) == "chatml"
    (tmp_path / "chat_template.jinja").write_text("[INST] {{ text }} [/INST]")
    with pytest.raises(ValueError, match="shows none of llama3, chatml; name one by --template"):
        sft.template_for(tokenizer, tmp_path)
