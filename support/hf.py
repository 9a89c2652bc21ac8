"""A Hugging Face folder, in and out: config.json, and weights in safetensors files.

What our Transformer would compute differently from transformers is a ValueError. So is a tensor
that is missing, left over or of another shape, which the files' headers tell before any memory is
taken. Weights stored as pickle are never read, because reading a pickle can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.files import is_link, read_json, write_json


class Architecture(NamedTuple):
    """What an architecture adds to Llama, and its class in transformers."""

    class_name: str
    qkv_bias: bool = False  # query, key and value projections have biases
    qk_norm: bool = False  # every head's query and key pass an RMSNorm before RoPE


ARCHITECTURES = {  # by config.json's model_type
    "llama": Architecture("LlamaForCausalLM"),  # Llama-2, 3, 3.1, 3.2; SmolLM2
    "mistral": Architecture("MistralForCausalLM"),  # without its sliding window
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True),  # Qwen2, Qwen2.5
    "qwen3": Architecture("Qwen3ForCausalLM", qk_norm=True),
}
SIZES = {  # config.json's name -> ModelConfig's
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "ffn_dim", "max_position_embeddings": "max_seq_len"}
FIELDS = SIZES | {
    "model_type": "family", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
CONTEXT = "original_max_position_embeddings"  # the context before it was stretched
ROPE_NEEDS: dict[str, set[str]] = {
    "default": set(), "linear": {"factor"}, "yarn": {"factor", CONTEXT},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", CONTEXT}}
YARN_MAY_HAVE = {"beta_slow", "beta_fast", "attention_factor", "truncate"}
COMPANIONS = (  # files that belong to a model and are passed on unchanged
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BY_NAME = {str(dtype)[6:]: dtype for dtype in DTYPES.values()}


def parse_config(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn config.json's entry into ModelConfig's fields. Raises ValueError or TypeError."""
    kind = entry.get("model_type")
    window = entry.get("sliding_window", 4096)  # transformers' default; null means none
    entry = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0} | {
        key: value for key, value in entry.items() if value is not None}
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type is {kind!r}, only {', '.join(ARCHITECTURES)} are supported")
    supported = {"attention_bias": ARCHITECTURES[kind].qkv_bias, "mlp_bias": False,
                 "hidden_act": "silu", "partial_rotary_factor": 1, "quantization_config": {}}
    for key, value in supported.items():
        if entry.get(key, value) != value:
            raise ValueError(f"{key} is {entry[key]!r}, only {value!r} is supported")
    for key, type_ in (("rms_norm_eps", float), ("tie_word_embeddings", bool)):
        if type(entry[key]) is not type_:
            raise ValueError(f"{key} is {entry[key]!r}, not a {type_.__name__}")

    n_heads = whole_number(entry, "num_attention_heads")
    head_dim = 128 if kind == "qwen3" else whole_number(entry, "hidden_size") // n_heads
    entry = {"num_key_value_heads": n_heads, "head_dim": head_dim} | entry
    for key in SIZES:  # a stranger's file could ask for any number of layers
        whole_number(entry, key, most=2**10 if key == "num_hidden_layers" else 2**24)
    if n_heads % entry["num_key_value_heads"] or entry["head_dim"] % 2:
        raise ValueError(f"num_attention_heads={n_heads} is not divisible by num_key_value_heads="
                         f"{entry['num_key_value_heads']}, or head_dim={entry['head_dim']} by 2")
    slides = entry.get("use_sliding_window") if kind.startswith("qwen") else kind == "mistral"
    if slides and window is not None and window < entry["max_position_embeddings"]:
        raise ValueError(f"sliding_window={window} is in use; this model only has full attention")
    parse_rope(entry)
    return {ours: entry[theirs] for theirs, ours in FIELDS.items() if theirs in entry}


def whole_number(entry: dict[str, Any], key: str, most: int = 2**24) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{key} is {value!r}, not a whole number from 1 to {most:,}")
    return value


def parse_rope(entry: dict[str, Any]) -> None:
    """Bring both layouts (`rope_parameters` is the newer) to `rope_theta` and `rope_scaling`."""
    older, newer = entry.get("rope_scaling", {}), entry.get("rope_parameters", {})
    if older | newer != newer | older:
        raise ValueError(f"rope_scaling={older} and rope_parameters={newer} contradict each other")
    rope = {key: value for key, value in (older | newer).items() if value is not None}
    entry["rope_theta"] = rope.pop("rope_theta", entry["rope_theta"])
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    needs = ROPE_NEEDS.get(kind, set())
    if CONTEXT in needs:  # written down: the context may grow, this must not
        rope[CONTEXT] = entry.get(CONTEXT, rope.get(CONTEXT, entry["max_position_embeddings"]))
    others = rope.keys() - needs - (YARN_MAY_HAVE if kind == "yarn" else set())
    if kind not in ROPE_NEEDS or not needs <= rope.keys() or others:
        raise ValueError(f"rope_scaling of type {kind!r} has the entries {sorted(rope)}, needs are "
                         f"{sorted(needs)}, known types are {', '.join(ROPE_NEEDS)}")
    if rope.get("low_freq_factor", 1) >= rope.get("high_freq_factor", 4):
        raise ValueError(f"{rope}: high_freq_factor must be above low_freq_factor")
    entry["rope_scaling"] = None if kind == "default" else rope | {"rope_type": kind}


def write_config(folder: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json from ModelConfig's fields."""
    architecture = ARCHITECTURES[fields["family"]]
    entry = {theirs: fields[ours] for theirs, ours in FIELDS.items()}
    write_json(folder / "config.json", entry | {
        "architectures": [architecture.class_name], "torch_dtype": str(dtype)[6:],
        "attention_bias": architecture.qkv_bias, "mlp_bias": False, "hidden_act": "silu",
        "use_sliding_window": False, "sliding_window": None})
    ids = {key: entry[key] for key in ("bos_token_id", "eos_token_id") if entry[key] is not None}
    write_json(folder / "generation_config.json", ids)


def read_companions(folder: Path) -> dict[str, bytes]:
    """The files beside the weights that belong to the model. Raises ValueError for a link."""
    for path in filter(is_link, (folder / name for name in COMPANIONS)):
        raise ValueError(f"{path} is a link, and would be copied; put the file itself there")
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}


def own_tokenizer(folder: Path, needed: bool) -> str:
    """The folder, if a tokenizer is in it, or "". Raises ValueError if a large model needs one."""
    if (folder / "tokenizer.json").is_file():
        return str(folder)
    config = folder / "config.json"
    if needed and config.is_file() and read_json(config, {"vocab_size": int})["vocab_size"] > 1000:
        raise ValueError(f"{folder} has no tokenizer.json; name the model's own with --tokenizer")
    return ""


def chat_template(folder: Path) -> str:
    """The Jinja by which a folder's model writes conversations, or ""."""
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return str((config.is_file() and read_json(config).get("chat_template")) or "")


def check_weights(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Any]:
    """Find each parameter's file and its dtype there, reading the headers alone."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names a file that is not in its folder")
    elif not (folder / names[0]).exists() and any(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds weights as pickle alone, unsafe to read; get safetensors")
    expected = {key: tuple(weight.shape) for key, weight in parameters.items()}
    found = {}
    for path in (folder / name for name in names):
        try:
            with safe_open(path, framework="pt") as file:
                headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        for key, header in headers.items():
            if key not in parameters and key.endswith(("rotary_emb.inv_freq", "lm_head.weight")):
                continue  # older writers store what config.json says, and a tied table twice
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            wanted = expected.pop(key, None)  # None: it is left over, or there twice
            if shape != wanted or dtype not in DTYPES:
                raise ValueError(f"{path}: {key!r} is {dtype} {shape}; config.json needs {wanted} "
                                 f"in one of {', '.join(DTYPES)}")
            found[key] = path, DTYPES[dtype]
    if expected:
        raise ValueError(f"{folder} lacks {len(expected)} tensors, such as {min(expected)!r}")
    return found


def load_tensors(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Fill the parameters, under FSDP this rank's rows of each. A value must be finite."""
    for key, (path, _) in check_weights(folder, parameters).items():
        mine, rows = local_rows(parameters[key])
        # The mapped pages of an open file count as our memory, so we open it for each tensor anew.
        with safe_open(path, framework="pt") as file, torch.no_grad():
            mine.copy_(file.get_slice(key)[rows])
            if not mine.sum(dtype=torch.promote_types(mine.dtype, torch.float32)).isfinite():
                raise ValueError(f"{path}: {key!r} has values that are not finite; get it anew")


def local_rows(weight: Tensor) -> tuple[Tensor, slice]:
    """This rank's part of a weight, and its rows: FSDP2 gives ceil(n / ranks) rows to each rank."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0])
    mine, share = weight.to_local(), -(-weight.shape[0] // weight.device_mesh.size())
    begin = min(share * weight.device_mesh.get_local_rank(), weight.shape[0])
    return mine, slice(begin, begin + mine.shape[0])


def write_tensors(folder: Path, parameters: dict[str, Tensor], main: bool) -> None:
    """Write all parameters, gathered first: no rank waits for a `main` whose disk is full."""
    tensors = {}
    for key, weight in parameters.items():
        part = weight.detach()
        whole = part.full_tensor() if isinstance(part, DTensor) else part
        if main:
            tensors[key] = whole.cpu().contiguous()
    if main:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
