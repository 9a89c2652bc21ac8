"""Weights in and out: a folder is Hugging Face's in both directions, or it is refused by name.

The other side is transformers itself: for every family and every way of stretching RoPE it writes a small
random checkpoint, and its logits are ours; it loads what we write without a warning, and they are ours again.
Weights are large enough for attention to choose, so that a wrong angle, bias or norm shows at once.
"""

import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, YARN, one_thread, random_ids, random_model, tiny_config  # noqa: F401

import data
import eval as evaluation
import model as m
import train

INDEX = "model.safetensors.index.json"

# --- 1. Families, against transformers ------------------------------------------------------------------

CONTEXT = 32  # the trained context of the checkpoints below; every scaling reaches beyond it
SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},  # theta for 128 tokens: exact at 128
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": CONTEXT},
}
ARCHITECTURES = {  # our name, and what else its config.json says
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 through two layers, logits of up to 7: 1.2e-5 seen


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def their_model(transformers, family, scaling="plain", **changes):
    """A random model of a family, made by transformers; biases and gains are random, too."""
    config = transformers.AutoConfig.for_model(family, **{
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": CONTEXT,
        "rope_theta": 5e4, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "bos_token_id": 1,
        "eos_token_id": 2, "rope_scaling": SCALINGS[scaling] and dict(SCALINGS[scaling]),
        **ARCHITECTURES[family], **changes})
    model, generator = transformers.AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.25, generator=generator)
            if name.endswith("norm.weight"):
                weight.mul_(0.4).add_(1)
    return model


def their_load(transformers, folder, caplog):
    """Load with transformers, and fail for any warning it logs or raises."""
    transformers.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    transformers.logging.disable_propagation()
    assert not caplog.records, caplog.text
    assert not any(info.values()), info  # missing, unexpected or mismatched keys
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs, lengths):
    for n in lengths:
        ids = random_ids(n, seed=n)
        torch.testing.assert_close(ours.logits(ids, (n,)), theirs(ids[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_family_there_and_back(transformers, tmp_path, caplog, family, scaling):
    """Their folder gives us their logits: for one token, some, and beyond the trained context. A pack gives
    those of its documents. Our folder loads there without a warning, the same bits and the same logits.
    """
    context = 4 * CONTEXT if scaling == "llama3" else CONTEXT  # as in the released models
    theirs = their_model(transformers, family, scaling, tie_word_embeddings=family == "qwen3",
                         max_position_embeddings=context)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = m.load_pretrained(tmp_path / "theirs")
    assert ours.config.family == family
    lengths = (4 * CONTEXT,) if scaling == "dynamic" else (1, 17, 4 * CONTEXT)
    assert_same_logits(ours, theirs, lengths)

    doc_lens = (7, 1, 12, 7, 5)
    ids = random_ids(sum(doc_lens))
    with torch.no_grad():
        alone = torch.cat([ours.logits(part, (len(part),)) for part in ids.split(doc_lens)])
        torch.testing.assert_close(ours.logits(ids, doc_lens), alone, **CLOSE)

    m.save_pretrained(ours, tmp_path / "ours")
    again = their_load(transformers, tmp_path / "ours", caplog)
    assert type(again) is type(theirs)
    entry = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert entry["architectures"] == [type(theirs).__name__]  # by which vLLM finds the class
    assert_same_logits(ours, again, (1, 17, 4 * CONTEXT))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_greedy_generation_is_theirs(transformers, tmp_path, family):
    """64 tokens, each the likeliest after those before it: the same 64."""
    theirs = their_model(transformers, family, max_position_embeddings=128, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    prompt = random_ids(20)
    expected = theirs.generate(prompt[None], max_new_tokens=64, do_sample=False)[0, 20:].tolist()
    assert m.generate(m.load_pretrained(tmp_path), prompt.tolist(), 64) == expected
    assert len(set(expected)) > 5  # not one token over and over


def test_dynamic_is_plain_for_short_texts_there(transformers, tmp_path):
    """What a fixed theta gives up: up to the trained context transformers keeps the trained theta."""
    theirs, plain = (their_model(transformers, "llama", scaling) for scaling in ("dynamic", "plain"))
    theirs.save_pretrained(tmp_path)
    ours, ids = m.load_pretrained(tmp_path), random_ids(CONTEXT)
    assert ours.config.max_seq_len == 4 * CONTEXT and ours.config.rope_scaling is None
    assert ours.config.rope_theta == pytest.approx(5e4 * 13 ** (8 / 6))  # 4 * 4 - (4 - 1) = 13, head_dim 8
    with torch.no_grad():
        assert torch.equal(theirs(ids[None]).logits, plain(ids[None]).logits)
        assert (ours.logits(ids, (CONTEXT,)) - theirs(ids[None]).logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_and_dtypes_of_hugging_face(transformers, tmp_path, dtype):
    """A folder of many shards in 16 bits: the same bits, in that dtype or in the one asked for."""
    theirs = their_model(transformers, "qwen2", tie_word_embeddings=True).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / INDEX).exists()
    ours, wide = m.load_pretrained(tmp_path), m.load_pretrained(tmp_path, torch.float32)
    for name, weight in theirs.model.named_parameters():
        assert ours.get_parameter(name).dtype == dtype
        assert torch.equal(ours.get_parameter(name), weight)
        assert torch.equal(wide.get_parameter(name), weight.float())
    assert ours.lm_head.weight is ours.embed_tokens.weight


# --- 2. There and back in our own hands -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_save_and_load_keep_every_bit(tmp_path, family, tie, dtype):
    """Config, names, dtypes and bits; a tied table is stored once and is one parameter again."""
    model = random_model(dtype, tie_embeddings=tie, rope_scaling=LLAMA3, rope_theta=8e6, norm_eps=1e-6,
                         family=family, bos_token_id=1, eos_token_id=[2, 3])
    m.save_pretrained(model, tmp_path / "model")
    loaded = m.load_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], weight)
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) is not tie
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) is tie
    wide = m.load_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(wide.norm.weight, model.norm.weight.double())


@pytest.mark.parametrize("shard_bytes, files", [(1, 21), (20_000, 8), (10**9, 1)])
def test_large_models_are_saved_in_shards(tmp_path, shard_bytes, files):
    """No file is larger than asked, unless one tensor is; the index names each tensor's file."""
    model = random_model(torch.float32)
    m.save_pretrained(model, tmp_path / "model", shard_bytes=shard_bytes)
    found = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(found) == files
    stored = {}
    for path in found:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes
        stored |= dict.fromkeys(tensors, path.name)
    if files > 1:
        index = json.loads((tmp_path / "model" / INDEX).read_text())
        assert index["weight_map"] == stored
        assert index["metadata"] == {"total_size": sum(p.nbytes for p in model.parameters())}
    loaded = m.load_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_changed_theta_is_saved(tmp_path):
    """A stage's theta goes with the weights: forgotten, the checkpoint would load and be wrong."""
    model, ids = random_model(), random_ids(60)
    model.set_rope(8e6, 512)
    m.save_pretrained(model, tmp_path / "model")
    assert torch.equal(m.load_pretrained(tmp_path / "model").logits(ids, (60,)), model.logits(ids, (60,)))


def test_what_lies_beside_the_weights_comes_along(folder, tmp_path):
    """Tokenizer and generation settings pass through byte by byte; other files, code too, stay behind."""
    (folder / "tokenizer.json").write_bytes(b"\xff not ours to read")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    (folder / "modeling_evil.py").touch()
    m.save_pretrained(m.load_pretrained(folder), tmp_path / "copy")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    for name in names - {"config.json"}:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_a_checkpoint_of_training_is_complete(transformers, tmp_path, caplog):
    """Weights, configuration, tokenizer, and how texts begin and end: loaded there without a warning, and
    what was started from that folder hands it on.
    """
    options = {"stage": "base", "steps": 1, "mix": "icl-256=1", "eval": False}
    first = train.train(train.TrainConfig(out=str(tmp_path / "first"), **options))
    dist.destroy_process_group()
    folder = first / "checkpoints" / "base-1"
    theirs, tokenizer = their_load(transformers, folder, caplog), data.load_tokenizer("bytes")
    assert_same_logits(m.load_pretrained(folder), theirs, (1, 17, 256))
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf("naïve\n 🙂").input_ids == [tokenizer.bos_id, *tokenizer.encode("naïve\n 🙂")]
    assert (hf.bos_token_id, hf.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    settings = theirs.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    second = train.train(train.TrainConfig(out=str(tmp_path / "second"), init=str(folder), **options))
    dist.destroy_process_group()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        passed_on = second / "checkpoints" / "base-1" / name
        assert passed_on.read_bytes() == (folder / name).read_bytes()


def test_info_and_export(folder, tmp_path, capsys, monkeypatch):
    """A preset's and a folder's numbers, by hand; and a checkpoint's model alone, in 16 bits."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
        m.main()
        return capsys.readouterr().out

    told = run("info", "llama3-8b", "--length", "64k")
    assert "8,030,261,248 parameters, 525,336,576 of them the embedding table" in told
    assert "text of 65,536 tokens" in told
    # 2 bytes x 8,030,261,248; 2 bytes x keys and values x 32 layers x 8 heads x 128 x 65,536 = 8 GiB
    assert "bfloat16  weights   14.958   keys and values    8.000" in told
    told = run("info", folder)
    assert "on disk: float32, 1 files" in told and "generation_config.json" in told

    save_file({"layers.0.mlp.up_proj.weight/exp_avg": torch.zeros(1)}, folder / "optimizer.safetensors")
    run("export", folder, tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    model, exported = m.load_pretrained(folder), m.load_pretrained(tmp_path / "out")
    assert exported.config == model.config
    for a, b in zip(model.parameters(), exported.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit) as refused:  # it would replace what is there
        run("export", folder, tmp_path / "out")
    assert refused.value.code == 2 and "out exists already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_eval_goes_on_with_a_text(tmp_path, capsys, monkeypatch):
    """`--prompt FILE` prints what `generate` writes, letter by letter, and then how fast."""
    tokenizer = data.load_tokenizer("bytes")
    model = random_model(torch.float32, vocab_size=tokenizer.vocab_size + 5)
    m.save_pretrained(model, tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("naïve")
    ids = [*tokenizer.begin, *tokenizer.encode("naïve")]
    for options, expected in (([], m.generate(model, ids, 12)),
                              (["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"],
                               m.generate(model, ids, 12, temperature=1.5, top_p=0.9, seed=3))):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(tmp_path / "model"), "--prompt",
                                          str(tmp_path / "prompt.txt"), "--max-new-tokens", "12", *options])
        evaluation.main()
        out, err = capsys.readouterr()
        spell = tokenizer.encoding.decode_single_token_bytes
        known = b"".join(spell(i) if i < tokenizer.vocab_size else b"\xff" for i in expected)
        assert tokenizer.eos_id not in expected
        assert out == known.decode(errors="replace") + "\n"
        assert "7 tokens read in" in err and "12 written" in err and "tok/s after the first" in err
    vocab = {chr(c): i for i, c in enumerate([*range(33, 127), *range(161, 173), *range(174, 324)])}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"content": "</s>", "id": 256, "special": True}], "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    with pytest.raises(ValueError, match=r"tokenizer.json is another tokenizer than 'bytes'"):
        evaluation.main()
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"prompt.txt is not UTF-8 text"):
        evaluation.main()


LOCAL_TASK = """task: which_line_follows
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                    reason="lm-evaluation-harness is not installed: pip install -e '.[dev,lm-eval]'")
def test_lm_evaluation_harness_runs_an_exported_folder(tmp_path):
    """Its command line, a task of local data, no network: its accuracy and every log-likelihood are ours."""
    tokenizer = data.load_tokenizer("bytes")
    model = random_model(torch.float32, vocab_size=tokenizer.vocab_size, family="qwen2", max_seq_len=256)
    model.files = data.tokenizer_files(tokenizer)
    m.save_pretrained(model, tmp_path / "model")
    lines = [line for line in Path(m.__file__).read_text().splitlines() if 20 < len(line) < 60][:48]
    rows = [{"text": lines[i], "choices": ["\n" + line for line in lines[i + 1:i + 5]], "answer": i % 4}
            for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(LOCAL_TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={tmp_path / 'model'},dtype=float32,add_bos_token=True", "--device", "cpu",
               "--include_path", tmp_path, "--tasks", "which_line_follows",
               "--output_path", tmp_path / "out", "--log_samples"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, env={
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    samples = [json.loads(line) for path in (tmp_path / "out").rglob("samples_*.jsonl")
               for line in path.read_text().splitlines()]
    assert len(samples) == len(rows)
    correct = 0
    for sample in samples:
        scores = []
        for choice in sample["doc"]["choices"]:
            prompt = [*tokenizer.begin, *tokenizer.encode(sample["doc"]["text"]).tolist()]
            answer = tokenizer.encode(choice).tolist()
            ids = torch.tensor(prompt + answer)
            with torch.no_grad():
                logs = model.logits(ids, (len(ids),)).log_softmax(-1)[len(prompt) - 1:-1]
            scores.append(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()))
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(scores, rel=1e-4)
        correct += scores.index(max(scores)) == sample["doc"]["answer"]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["results"]["which_line_follows"]["acc,none"] == pytest.approx(correct / len(rows))


# --- 3. Many ranks ------------------------------------------------------------------------------------------


def rank_reads_and_writes(rank, world, folder):
    """What each rank does: read its own rows, look at how much that was, and write the whole again."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank,
                            world_size=world)
    parallel = m.init_parallel(2)
    model = train.shard_model(m.empty_pretrained(folder / "model"), parallel, torch.float32)
    m.load_weights(model, folder / "model")
    rows = {name: m.local_rows(weight)[1] for name, weight in model.named_parameters()}
    whole = load_file(folder / "model" / "model.safetensors")
    same = all(torch.equal(m.local_rows(weight)[0], whole["model." + name][rows[name]])
               for name, weight in model.named_parameters())
    logits = model.logits(random_ids(16, seed=rank // 2).chunk(2)[rank % 2], (5, 11), parallel)
    if rank == 0:
        (folder / "again").mkdir()
    dist.barrier()
    m.write_model(model, folder / "again", main=rank == 0, shard_bytes=20_000)
    (folder / f"{rank}.json").write_text(json.dumps({
        "same": same, "rows": sum(r.stop - r.start for r in rows.values()), "logits": logits.tolist()}))
    dist.barrier()
    dist.destroy_process_group()


def test_each_rank_reads_its_rows_and_all_write_the_whole(tmp_path):
    """Four ranks and tables of 97 and 6 rows, 25 25 25 22 and 2 2 2 0: every rank has its own, to the bit;
    together they have the logits of one process, and write the same tensors.
    """
    model = random_model(torch.float32, tie_embeddings=True, family="qwen3", head_dim=6)
    m.save_pretrained(model, tmp_path / "model")
    mp.spawn(rank_reads_and_writes, args=(4, tmp_path), nprocs=4)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert all(rank["same"] for rank in ranks)
    assert sum(rank["rows"] for rank in ranks) == sum(weight.shape[0] for weight in model.parameters())
    assert max(rank["rows"] for rank in ranks) < 0.3 * sum(weight.shape[0] for weight in model.parameters())
    for i in (0, 1):
        found = torch.tensor(ranks[2 * i]["logits"] + ranks[2 * i + 1]["logits"])
        with torch.no_grad():
            torch.testing.assert_close(found, model.logits(random_ids(16, seed=i), (5, 11)), **CLOSE)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = m.load_pretrained(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def status_bytes(field):
    """A line of /proc/self/status: VmRSS, what this process has in memory now, or VmHWM, its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def peak_of(action):
    """Bytes of host memory that `action` adds at its peak. Mapped pages of files count."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    result = action()
    return result, status_bytes("VmHWM") - before


def rank_measures(rank, world, folder, shard_bytes):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank,
                            world_size=world)
    parallel = m.init_parallel()

    def load():
        model = train.shard_model(m.empty_pretrained(folder / "model"), parallel, torch.bfloat16)
        return m.load_weights(model, folder / "model")

    model, loading = peak_of(load)
    if rank == 0:
        (folder / "again").mkdir()
    dist.barrier()
    _, saving = peak_of(lambda: m.write_model(model, folder / "again", rank == 0, shard_bytes))
    (folder / f"{rank}.json").write_text(json.dumps({"loading": loading, "saving": saving}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("name, shard_bytes", [("smollm2-135m", 40 * 10**6), ("llama3.2-1b", 300 * 10**6)])
def test_two_ranks_never_hold_the_whole_model(tmp_path, name, shard_bytes):
    """bfloat16 in its own dtype: loading adds at most 0.75 of the checkpoint's size to a rank (to one process
    alone, the model and one tensor); saving, at most three files' tensors and the largest tensor twice.
    """
    with torch.device("meta"):
        model = m.Transformer(m.preset_config(name, 1)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.lm_head.weight = model.embed_tokens.weight
    m.save_pretrained(model, tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    table = model.embed_tokens.weight.nbytes
    del model
    alone, peak = peak_of(lambda: m.load_pretrained(tmp_path / "model"))
    print(f"{name}, {size / 1e6:,.0f} MB: one process {peak / size:.3f} of that", end="; ")
    assert sum(weight.nbytes for weight in alone.parameters()) < peak <= size + table
    del alone
    mp.spawn(rank_measures, args=(2, tmp_path, shard_bytes), nprocs=2)
    peaks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    print(f"two: loading {[round(p['loading'] / size, 3) for p in peaks]}, "
          f"saving {[round(p['saving'] / size, 3) for p in peaks]}")
    assert max(peak["loading"] for peak in peaks) <= 0.75 * size
    assert max(peak["saving"] for peak in peaks) <= 3 * shard_bytes + 2 * table
    files = list((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 5
    assert sum(path.stat().st_size for path in files) == pytest.approx(size, rel=1e-3)


# --- 4. Folders that are wrong ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A saved model to spoil."""
    m.save_pretrained(random_model(torch.float32), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    """Change entries of config.json; None removes one."""
    entry = {**json.loads((folder / "config.json").read_text()), **changes}
    entry = {key: value for key, value in entry.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(entry))


def edit_weights(folder, **changes):
    """Change tensors; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors")


def write_index(folder, *shards):
    """An index that looks for one tensor in each of `shards`."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(shards)}}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def twice(folder):
    """A second shard that holds the same tensors."""
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    write_index(folder, "model.safetensors", "more.safetensors")


def test_both_layouts_of_a_hugging_face_config(folder):
    """theta and scaling side by side, or (newer) together in `rope_parameters`; head_dim by division."""
    scaled = replace(m.read_config(folder), rope_theta=8e6, rope_scaling=LLAMA3)
    edit_config(folder, rope_theta=8e6, rope_scaling=LLAMA3)
    assert m.read_config(folder) == scaled
    edit_config(folder, rope_parameters={**LLAMA3, "rope_theta": 8e6})  # both, and they agree
    assert m.read_config(folder) == scaled
    edit_config(folder, rope_theta=None, rope_scaling=None)
    assert m.read_config(folder) == scaled
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 8e6})
    assert m.read_config(folder) == replace(scaled, rope_scaling=None)
    edit_config(folder, rope_parameters={"type": "linear", "factor": 4.0, "rope_theta": 8e6})
    assert m.read_config(folder).rope_scaling == {"type": "linear", "factor": 4.0}


def test_the_trained_context_of_a_scaling_is_written_down(folder):
    """Where it is left out it is the context: but of the checkpoint, not of a longer stage to come."""
    edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    model = m.load_pretrained(folder)
    frequencies = m.rope_frequencies(model.config)[0]
    model.set_rope(model.config.rope_theta, 4096)
    assert torch.equal(m.rope_frequencies(model.config)[0], frequencies)


def test_what_a_config_leaves_out(folder):
    """A missing or null entry means what it means in transformers: old Llamas have no GQA, for example."""
    edit_config(folder, head_dim=None, num_key_value_heads=None, rms_norm_eps=None)
    config = m.read_config(folder)
    assert (config.head_dim, config.n_kv_heads, config.norm_eps) == (8, 4, 1e-6)
    entry = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entry, "head_dim": None, "num_key_value_heads": None}))
    assert m.read_config(folder) == config
    edit_config(folder, model_type="qwen3", attention_bias=None)
    assert m.read_config(folder).head_dim == 128


@pytest.mark.parametrize("entries, window", [
    ({"model_type": "mistral", "sliding_window": 100}, 100),
    ({"model_type": "mistral", "sliding_window": 128}, None),  # as long as the context: changes nothing
    ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 100}, None),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 99, "max_window_layers": 2}, None),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 99, "max_window_layers": 1}, 99),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 100,
      "layer_types": ["full_attention", "sliding_attention"]}, 100),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0,
      "layer_types": ["full_attention", "full_attention"]}, None),
    ({"model_type": "llama", "sliding_window": 100}, None),  # transformers does not look at it
])
def test_a_sliding_window_is_refused_if_it_is_used(folder, entries, window):
    """In use means: some layer has it, and texts of the model's context would feel it."""
    edit_config(folder, **{"attention_bias": None, **entries})
    if window:
        with pytest.raises(ValueError, match=rf"sliding_window={window} is in use \(max.* is 128\)"):
            m.read_config(folder)
    else:
        assert m.read_config(folder).family == entries["model_type"]


def test_a_missing_window_is_4096_there(folder):
    """transformers gives a Mistral whose config.json leaves the entry out a window; null means none."""
    edit_config(folder, model_type="mistral", sliding_window=None, max_position_embeddings=8192)
    with pytest.raises(ValueError, match="sliding_window=4096 is in use"):
        m.read_config(folder)
    entry = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entry, "sliding_window": None}))
    assert m.read_config(folder).max_seq_len == 8192


SPOILED_WEIGHTS = {
    "a tensor missing": (lambda f: edit_weights(f, **{"model.norm.weight": None}),
                         "lacks 1 tensors, the first is 'model.norm.weight'"),
    "a tensor too many": (lambda f: edit_weights(f, extra=torch.zeros(1)), "holds 'extra'"),
    "another shape": (lambda f: edit_weights(f, **{"model.norm.weight": torch.zeros(31)}),
                      r"'model.norm.weight' is \(31,\), config.json says \(32,\)"),
    "not floating point": (lambda f: edit_weights(f, **{"model.norm.weight": torch.ones(32).long()}),
                           "'model.norm.weight' is I64, not one of F64, F32, BF16, F16"),
    "a tensor twice": (twice, "'lm_head.weight' is in both .*model.safetensors and .*more.safetensors"),
    "cut data": (lambda f: cut(f / "model.safetensors", -10), "model.safetensors is not a whole"),
    "cut header": (lambda f: cut(f / "model.safetensors", 5), "model.safetensors is not a whole"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "pickle alone": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                     r"weights as pickle alone \(pytorch_model.bin\)"),
    "a missing shard": (lambda f: write_index(f, "shard-1.safetensors"), "shard-1.safetensors"),
    "a shard above": (lambda f: write_index(f, "../x.safetensors"), "'../x.safetensors', which is not"),
    "a shard elsewhere": (lambda f: write_index(f, "/x.safetensors"), "'/x.safetensors', which is not"),
    "the folder itself": (lambda f: write_index(f, ".."), "'..', which is not a file"),
    "a shard with no name": (lambda f: write_index(f, ""), "'', which is not a file"),
    "a shard that is no name": (lambda f: write_index(f, 7), "7, which is not a file"),
    "no index": (lambda f: (f / INDEX).write_text("[1"), f"{INDEX} is not a readable"),
    "no weight map": (lambda f: (f / INDEX).write_text("[1]"), f"{INDEX} is not a readable"),
}


@pytest.mark.parametrize("spoil, complaint", SPOILED_WEIGHTS.values(), ids=SPOILED_WEIGHTS.keys())
def test_spoiled_weights_are_refused(folder, spoil, complaint):
    """No half-loaded model: an error that names the file or the tensor."""
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        m.load_pretrained(folder)


@pytest.mark.parametrize("spoiled", ["a tensor missing", "cut data", "a shard above", "pickle alone"])
def test_spoiled_weights_are_refused_before_training(folder, tmp_path, spoiled):
    """Not a process group, not a run folder: the error comes first."""
    spoil, complaint = SPOILED_WEIGHTS[spoiled]
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        train.train(train.TrainConfig(init=str(folder), stage="base", out=str(tmp_path / "run")))
    assert not dist.is_initialized() and not (tmp_path / "run").exists()


def test_what_older_writers_store_besides_is_skipped(folder):
    """RoPE's frequencies, which config.json gives (Llama-2), and the tied table's second copy."""
    expected = m.load_pretrained(folder)
    edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert m.load_pretrained(folder).config == expected.config
    edit_config(folder, tie_word_embeddings=True)
    loaded = m.load_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, expected.embed_tokens.weight)


SPOILED_CONFIGS = {
    "no file": (lambda f: (f / "config.json").unlink(), "config.json is not a readable"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not a readable"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not a readable"),
    "not an object": (lambda f: (f / "config.json").write_text("[]"), "model_type is 'list'"),
    "no family": (lambda f: edit_config(f, model_type=["llama"]), r"model_type is \['llama'\]"),
    "another family": (lambda f: edit_config(f, model_type="mixtral"),
                       "model_type is 'mixtral', only llama, mistral, qwen2, qwen3 are supported"),
    "experts": (lambda f: edit_config(f, num_local_experts=8), "num_local_experts is 8"),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config is"),
    "part of a head": (lambda f: edit_config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "interleaved": (lambda f: edit_config(f, rope_interleaved=True), "rope_interleaved is True"),
    "RoPE per layer": (lambda f: edit_config(f, rope_parameters={"full_attention": YARN}), "full_attention"),
    "no RoPE": (lambda f: edit_config(f, rope_scaling="linear"), "rope_scaling='linear'.*must be objects"),
    "two RoPEs": (lambda f: edit_config(f, rope_scaling=YARN, rope_parameters=LLAMA3), "contradict"),
    "unknown RoPE": (lambda f: edit_config(f, rope_scaling={"type": "longrope", "short_factor": [1.0]}),
                     "type 'longrope' is not supported"),
    "another dynamic": (lambda f: edit_config(f, rope_scaling={"type": "dynamic", "factor": 2, "alpha": 1.0}),
                        "'dynamic' has an unknown entry 'alpha'"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=None), "'num_attention_heads' is missing"),
    "biases": (lambda f: edit_config(f, attention_bias=True), "attention_bias is True, only False"),
    "more biases": (lambda f: edit_config(f, mlp_bias=True), "mlp_bias is True, only False"),
    "no size": (lambda f: edit_config(f, intermediate_size=None), "config.json .*ffn_dim"),
    "wrong size": (lambda f: edit_config(f, num_key_value_heads=3), "n_kv_heads=3"),
    "a size for nobody": (lambda f: edit_config(f, num_hidden_layers=10**9), "n_layers=1000000000 must be"),
    "no epsilon": (lambda f: edit_config(f, rms_norm_eps="1e-6"), "norm_eps='1e-6' must be"),
    "perhaps tied": (lambda f: edit_config(f, tie_word_embeddings="no"), "tie_embeddings='no' must be"),
}


@pytest.mark.parametrize("spoil, complaint", SPOILED_CONFIGS.values(), ids=SPOILED_CONFIGS.keys())
def test_configs_of_other_models_are_refused(folder, spoil, complaint):
    """What this model can't represent is an error, not a guess."""
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        m.load_pretrained(folder)


# --- 5. Whole or not at all -------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole(folder):
    """The new folder holds the new files alone, and nothing lies beside it."""
    (folder.parent / "model.writing").mkdir()  # left by a crash
    (folder.parent / "model.writing" / "half").touch()
    with m.replaced_folder(folder) as temporary:
        assert (folder / "config.json").exists()  # still the old one
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new").write_text("new")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert [path.name for path in folder.rglob("*")] == ["sub", "new"]


def test_a_crash_between_the_two_renames(folder):
    """The old folder, then called model.old, is put back by the next writer, who then may fail."""
    (folder.rename(folder.with_name("model.old")).parent / "model.writing").mkdir()
    with pytest.raises(RuntimeError, match="disk full"), m.replaced_folder(folder):
        raise RuntimeError("disk full")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert m.load_pretrained(folder).config == tiny_config()


@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_write_leaves_nothing(folder, existed):
    """An exception on the way passes through; the old folder has its bytes, and nothing else is there."""
    path = folder if existed else folder.with_name("another")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(RuntimeError, match="disk full"), m.replaced_folder(path) as temporary:
        (temporary / "config.json").write_text("half")
        raise RuntimeError("disk full")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_save_that_stops_at_a_shard_leaves_the_old_model(folder, monkeypatch, fails_at):
    """The disk is full at the first or the third of several shards."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    written = []

    def save(tensors, path, metadata):
        written.append(path)
        if len(written) == fails_at:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(OSError, match="No space left"):
        m.save_pretrained(random_model(torch.float32, seed=1), folder, shard_bytes=20_000)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
