"""Weights in and out: a folder is Hugging Face's in both directions, or it is refused by name.

The other side is transformers itself: it writes a small random checkpoint for every family and
scaling, and loads what we write. Weights are large, so that a wrong angle, bias or norm shows.
"""

import json
import logging
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, YARN, one_thread, random_ids, random_model, tiny_config  # noqa: F401
from test_parallel import join_world, spawn_world
from test_train import leave_no_process_group  # noqa: F401

import data
import model as m
import train
from support import hf
from support.files import whole_folder, write_json

INDEX = "model.safetensors.index.json"

# --- 1. Families, against transformers ------------------------------------------------------------

CONTEXT = 32  # the trained context of the checkpoints below; every scaling reaches beyond it
SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "llama3": {**LLAMA3, "original_max_position_embeddings": CONTEXT},
}
# Our name, and what else its config.json says.
ARCHITECTURES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {},
                 "qwen3": {"head_dim": 16}}
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
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
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
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(folder, output_loading_info=True)
    transformers.logging.disable_propagation()
    assert all(record.levelno < logging.WARNING for record in caplog.records), caplog.text
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
    """Logits of texts and packs are theirs; our folder loads there without warning, to the bit."""
    context = 4 * CONTEXT if scaling == "llama3" else CONTEXT  # as in the released models
    theirs = their_model(transformers, family, scaling, tie_word_embeddings=family == "qwen3",
                         max_position_embeddings=context)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = m.load_pretrained(tmp_path / "theirs")
    assert ours.config.family == family
    assert_same_logits(ours, theirs, (1, 17, 4 * CONTEXT))

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
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
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


# --- 2. There and back in our own hands -----------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_save_and_load_keep_every_bit(tmp_path, family, tie, dtype):
    """Config, names, dtypes and bits; a tied table is stored once and is one parameter again."""
    model = random_model(dtype, tie_embeddings=tie, rope_scaling=LLAMA3, rope_theta=8e6,
                         norm_eps=1e-6, family=family, bos_token_id=1, eos_token_id=[2, 3])
    m.save_pretrained(model, tmp_path / "model")
    loaded = m.load_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    found = loaded.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert found[name].dtype == dtype and torch.equal(found[name], weight)
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) is not tie
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) is tie
    wide = m.load_pretrained(tmp_path / "model", dtype=torch.float64)
    assert torch.equal(wide.norm.weight, model.norm.weight.double())


def test_what_lies_beside_the_weights_comes_along(folder, tmp_path):
    """Tokenizer and generation settings pass through byte by byte; other files stay behind."""
    (folder / "tokenizer.json").write_bytes(b"\xff not ours to read")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    (folder / "modeling_evil.py").touch()
    m.save_pretrained(m.load_pretrained(folder), tmp_path / "copy")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    for name in names - {"config.json"}:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_a_checkpoint_of_training_is_complete(transformers, tmp_path, caplog):
    """Weights, tokenizer, and how texts begin and end; a run from that folder hands it all on."""
    options = {"stage": "base", "steps": 1, "mix": "icl-256=1", "eval": False}
    first = train.train(train.TrainConfig(out=str(tmp_path / "first"), **options))
    folder = first / "checkpoints" / "base-1"
    theirs, tokenizer = their_load(transformers, folder, caplog), data.load_tokenizer("bytes")
    assert_same_logits(m.load_pretrained(folder), theirs, (1, 17, 256))
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf("naïve\n 🙂").input_ids == [tokenizer.bos_id, *tokenizer.encode("naïve\n 🙂")]
    assert (hf.bos_token_id, hf.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    settings = theirs.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    again = train.TrainConfig(out=str(tmp_path / "second"), init=str(folder), **options)
    second = train.train(again)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        passed_on = second / "checkpoints" / "base-1" / name
        assert passed_on.read_bytes() == (folder / name).read_bytes()


def test_info_and_export(folder, tmp_path, capsys, monkeypatch):
    """A preset's numbers, by hand; and a checkpoint's model alone, in 16 bits."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
        m.main()
        return capsys.readouterr().out

    told = run("info", "llama3-8b", "--length", "64K")
    assert "8,030,261,248 parameters, 525,336,576 of them the embedding table" in told
    # 2 bytes x 8,030,261,248; 2 bytes x keys and values x 32 layers x 8 heads x 128 x 65,536
    assert "text of 65,536 tokens in bfloat16: weights 14.958, keys and values 8.000" in told
    assert "n_heads=4, n_kv_heads=2" in run("info", folder)
    assert run("info", "--help") == run("--help") and "model.py info llama3-8b" in run("--help")
    with pytest.raises(ValueError, match="info PRESET-OR-FOLDER"):
        run("info", folder, "--depth", "3")

    (folder / "optimizer").mkdir()
    save_file({"exp_avg": torch.zeros(1)}, folder / "optimizer" / "0.safetensors")
    run("export", folder, tmp_path / "out")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    model, exported = m.load_pretrained(folder), m.load_pretrained(tmp_path / "out")
    assert exported.config == model.config
    for a, b in zip(model.parameters(), exported.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="out exists already"):  # it would replace what is there
        run("export", folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (folder / "vocab.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"vocab\.json is a link, and would be copied"):
        run("export", folder, tmp_path / "other")


def test_an_export_has_a_card(transformers, tmp_path, monkeypatch, caplog):
    """What the run around a checkpoint knows; of any other folder, what config.json says."""
    monkeypatch.setitem(train.RECIPES, "tiny", [
        train.Stage(name, 256, theta, {"icl-128": 3, "short": 0}, 2048, 1024, 3e-3, 3e-4)
        for name, theta in (("base", 1e4), ("long", None))])
    run = train.train(train.TrainConfig(eval=False, out=str(tmp_path / "run")))
    (run / "config.json").write_text('{"init": "/home/ann/smollm2/"}')
    sums = [data.PackedDataset(run / "data" / name / "icl-128").meta["sha256"]
            for name in ("base", "long")]
    row = dict.fromkeys(("task", "category"), "icl") | {"length": 256, "n": 26, "chance": 0}
    found = {"model": "long", "bits_per_byte": [],
             "results": [row | {"score": 0.5, "low": 0.25, "high": 0.75}]}
    checkpoint, cards = run / "checkpoints" / "long-2", []
    (run / "eval").mkdir(exist_ok=True)
    for source, of in ((checkpoint, "long-2"), (checkpoint, "long-1"), (tmp_path / "0", "")):
        settings = {"settings": {"model": f"runs/run/{of}"}}
        write_json(run / "eval" / "long.json", found | settings)
        m.export(source, tmp_path / f"{len(cards)}")
        cards.append((tmp_path / f"{len(cards)}" / "README.md").read_text())
    their_load(transformers, tmp_path / "0", caplog)
    step = "2 of 2 steps of 1,024 tokens in sequences of 256, "
    rate = "learning rate up to 0.003, seed 0; data:\n  - 100.0% icl-128, sha256 "
    assert cards[2].startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert ("\n145,472 parameters in bfloat16: 2 layers of width 64, MLPs of 192,\n8 heads for "
            "queries and 4 for keys and values, each of 16,\nand a vocabulary of 348 tokens. RoPE: "
            "theta 10,000, scaling none.\n") in cards[2]
    assert cards[1] == cards[2] + (
        "\n## Training\n\nThe run began with the weights of `smollm2`.\n\n"
        f"- base: {step}RoPE's theta 10,000, {rate}{sums[0]}\n- long: {step}{rate}{sums[1]}\n")
    assert cards[0] == cards[1] + (
        "\n## Scores\n\nOf this checkpoint before the export:\n\n    task  length   n  chance"
        "                long\n    icl      256  26       0  0.500 [0.25, 0.75]\n")


# --- 3. Many ranks --------------------------------------------------------------------------------

def rank_reads_and_writes(rank, world, folder):
    """A rank reads its own rows, looks at how much that was, and writes the whole again."""
    join_world(rank, world, folder)
    parallel = m.init_parallel(2)
    model = train.shard_model(m.empty_pretrained(folder / "model"), parallel, torch.float32)
    m.load_weights(model, folder / "model")
    rows = {name: hf.local_rows(weight)[1] for name, weight in model.named_parameters()}
    whole = load_file(folder / "model" / "model.safetensors")
    same = all(torch.equal(hf.local_rows(weight)[0], whole["model." + name][rows[name]])
               for name, weight in model.named_parameters())
    logits = model.logits(random_ids(16, seed=rank // 2).chunk(2)[rank % 2], (5, 11), parallel)
    if rank == 0:
        (folder / "again").mkdir()
    dist.barrier()
    m.write_model(model, folder / "again", main=rank == 0)
    found = {"same": same, "rows": sum(r.stop - r.start for r in rows.values()),
             "logits": logits.tolist()}
    (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_each_rank_reads_its_rows_and_all_write_the_whole(tmp_path):
    """97 and 6 rows over four ranks, 25 25 25 22 and 2 2 2 0: bits, logits, and what is written."""
    model = random_model(torch.float32, tie_embeddings=True, family="qwen3", head_dim=6)
    m.save_pretrained(model, tmp_path / "model")
    ranks = spawn_world(rank_reads_and_writes, 4, tmp_path)
    assert all(rank["same"] for rank in ranks)
    rows = sum(weight.shape[0] for weight in model.parameters())
    assert sum(rank["rows"] for rank in ranks) == rows
    assert max(rank["rows"] for rank in ranks) < 0.3 * rows
    for i in (0, 1):
        found = torch.tensor(ranks[2 * i]["logits"] + ranks[2 * i + 1]["logits"])
        with torch.no_grad():
            expected = model.logits(random_ids(16, seed=i), (5, 11))
        torch.testing.assert_close(found, expected, **CLOSE)
    again = m.load_pretrained(tmp_path / "again")
    assert again.config == model.config
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- 4. Folders that are wrong --------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A saved model to spoil."""
    m.save_pretrained(random_model(torch.float32), tmp_path / "model")
    return tmp_path / "model"


def changed(entries, changes):
    """Entries after changes; None removes one."""
    return {key: value for key, value in {**entries, **changes}.items() if value is not None}


def edit_config(folder, **changes):
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(entries, changes)))


def edit_weights(folder, **changes):
    save_file(changed(load_file(folder / "model.safetensors"), changes),
              folder / "model.safetensors")


def test_both_layouts_of_a_hugging_face_config(folder):
    """theta and scaling side by side, or (newer) together in `rope_parameters`."""
    scaled = replace(m.read_config(folder), rope_theta=8e6, rope_scaling=LLAMA3)
    for changes in ({"rope_theta": 8e6, "rope_scaling": LLAMA3},
                    {"rope_parameters": {**LLAMA3, "rope_theta": 8e6}},  # both, and they agree
                    {"rope_theta": None, "rope_scaling": None}):
        edit_config(folder, **changes)
        assert m.read_config(folder) == scaled
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 8e6})
    assert m.read_config(folder) == replace(scaled, rope_scaling=None)
    edit_config(folder, rope_parameters={"type": "linear", "factor": 4.0, "rope_theta": 8e6})
    assert m.read_config(folder).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_the_trained_context_of_a_scaling_is_written_down(folder):
    """Where it is left out it is the checkpoint's context, not that of a longer stage to come."""
    edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    model = m.load_pretrained(folder)
    frequencies = m.rope_frequencies(model.config)[0]
    model.set_rope(model.config.rope_theta, 4096)
    assert torch.equal(m.rope_frequencies(model.config)[0], frequencies)


def test_what_a_config_leaves_out(folder):
    """A missing or null entry means what it means in transformers: old Llamas have no GQA."""
    edit_config(folder, head_dim=None, num_key_value_heads=None, rms_norm_eps=None)
    config = m.read_config(folder)
    assert (config.head_dim, config.n_kv_heads, config.norm_eps) == (8, 4, 1e-6)
    null = json.loads((folder / "config.json").read_text()) | {"head_dim": None}
    (folder / "config.json").write_text(json.dumps({**null, "num_key_value_heads": None}))
    assert m.read_config(folder) == config
    edit_config(folder, model_type="qwen3", attention_bias=None)
    assert m.read_config(folder).head_dim == 128


@pytest.mark.parametrize("family, entries, window", [
    ("mistral", {"sliding_window": 100}, 100),
    ("mistral", {"sliding_window": 128}, None),  # as long as the context: it changes nothing
    ("mistral", {"sliding_window": None, "max_position_embeddings": 8192}, 4096),  # left out
    ("qwen2", {"use_sliding_window": False, "sliding_window": 100}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 99}, 99),
    ("llama", {"sliding_window": 100}, None),  # transformers does not look at it
])
def test_a_sliding_window_is_refused_if_it_is_used(folder, family, entries, window):
    """In use means: some layer may have it, and texts of the model's context would feel it."""
    edit_config(folder, attention_bias=None, model_type=family, **entries)
    if window:
        with pytest.raises(ValueError, match=f"sliding_window={window} is in use"):
            m.read_config(folder)
    else:
        assert m.read_config(folder).family == family


NORM = "model.norm.weight"


@pytest.mark.parametrize("changes, complaint", [
    ({NORM: None}, "lacks 1 tensors, such as 'model.norm.weight'"),
    ({"extra": torch.zeros(1)}, r"'extra' is F32 \(1,\); config.json needs None"),
    ({NORM: torch.zeros(31)}, r"'model.norm.weight' is F32 \(31,\); config.json needs \(32,\)"),
    ({NORM: torch.ones(32).long()}, "is I64 .* in one of F64, F32, BF16, F16"),
])
def test_other_tensors_are_refused(folder, changes, complaint):
    """No half-loaded model: an error that names the tensor."""
    edit_weights(folder, **changes)
    with pytest.raises(ValueError, match=complaint):
        m.load_pretrained(folder)


@pytest.mark.parametrize("weight_map, complaint", [
    ({"a": "missing.safetensors"}, "missing.safetensors is not a whole safetensors file"),
    ({"a": 7}, "7 is not a whole safetensors file"),
    ({"a": "../model.safetensors"}, "names a file that is not in its folder"),
    ({"a": "copy.safetensors", "b": "model.safetensors"}, "'lm_head.weight' .* needs None"),
    (None, f"{INDEX} has no weight_map"),
])
def test_a_wrong_index_is_refused(folder, weight_map, complaint):
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=complaint):
        m.load_pretrained(folder)


def test_cut_files_and_pickles_are_refused_before_training(folder, tmp_path):
    """The error comes before there is a run folder."""
    config = train.TrainConfig(init=str(folder), stage="base", out=str(tmp_path / "run"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole"):
        train.train(config)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as pickle alone"):
        train.train(config)
    assert not (tmp_path / "run").exists()


def test_what_older_writers_store_besides_is_skipped(folder):
    """RoPE's frequencies, which config.json gives (Llama-2), and the tied table's second copy."""
    expected = m.load_pretrained(folder)
    edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert m.load_pretrained(folder).config == expected.config
    edit_config(folder, tie_word_embeddings=True)
    loaded = m.load_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, expected.embed_tokens.weight)


@pytest.mark.parametrize("changes, complaint", [
    ({"model_type": "mixtral"}, "'mixtral', only llama, mistral, qwen2, qwen3 are supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"attention_bias": True}, "attention_bias is True, only False"),
    ({"rope_parameters": {"full_attention": YARN}}, "full_attention"),
    ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "contradict"),
    ({"rope_scaling": {"type": "longrope"}}, "type 'longrope' has .* known types are default"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type 'dynamic' has .* known types are"),
    ({"rope_scaling": {**YARN, "mscale": 0.7}}, "entries .*'mscale'"),
    ({"rope_scaling": {"type": "linear"}}, r"has the entries \[\], needs are \['factor'\]"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
    ({"rope_scaling": {**YARN, "factor": "4"}}, "'str'"),  # Python's own words
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "not all positive and finite"),
    ({"rope_theta": 0}, "not all positive and finite"),
    ({"rope_theta": 10**400}, "int too big"),
    ({"num_attention_heads": None}, "num_attention_heads is None, not a whole number"),
    ({"num_key_value_heads": 3}, "not divisible"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a whole number"),
    ({"head_dim": 15}, "head_dim=15 by 2"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not a bool"),
])
def test_configs_of_other_models_are_refused(folder, changes, complaint):
    """What this model can't represent is an error, not a guess."""
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json is not a model .*{complaint}"):
        m.load_pretrained(folder)


# --- 5. Whole or not at all -----------------------------------------------------------------------

def test_a_folder_is_replaced_whole_or_not_at_all(folder):
    """What a crash left is cleared or put back; a failed write leaves the old files alone."""
    folder.rename(folder.with_name("model.old"))  # a writer died between two renames
    folder.with_name("model.writing").mkdir()
    with pytest.raises(RuntimeError, match="disk full"), whole_folder(folder) as aside:
        assert m.load_pretrained(folder).config == tiny_config()  # the old one
        (aside / "config.json").write_text("half")
        raise RuntimeError("disk full")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert m.load_pretrained(folder).config == tiny_config()
    with whole_folder(folder) as aside:
        (aside / "new").touch()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["new"]
