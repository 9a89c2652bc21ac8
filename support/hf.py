"""The configuration of a Hugging Face folder: which architecture, which shape, which RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from support.files import write_json


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
ROPE_ENTRIES: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", CONTEXT),
    "yarn": ("factor", "beta_slow", "beta_fast", "attention_factor", CONTEXT)}
ROPE_DEFAULTS = {"beta_slow": 1, "beta_fast": 32, "attention_factor": 1}
COMPANIONS = (  # files that belong to a model and are passed on unchanged
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja")


def parse_config(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn config.json's entry into ModelConfig's fields.

    Raises ValueError for what our Transformer would compute differently from transformers.
    """
    kind = entry.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"model_type is {kind!r}, only {', '.join(ARCHITECTURES)} are supported")
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    if "sliding_window" not in entry:
        defaults["sliding_window"] = 4096  # transformers' default; null in the file means none
    entry = defaults | {key: value for key, value in entry.items() if value is not None}
    supported = {
        "attention_bias": ARCHITECTURES[kind].qkv_bias, "mlp_bias": False, "hidden_act": "silu",
        "partial_rotary_factor": 1, "rope_interleaved": False, "num_experts": 0,
        "num_local_experts": 0, "quantization_config": {}}
    for key, value in supported.items():
        if entry.get(key, value) != value:
            raise ValueError(f"{key} is {entry[key]!r}, only {value!r} is supported")

    n_heads = number(entry, "num_attention_heads")
    entry.setdefault("num_key_value_heads", n_heads)
    head_dim = 128 if kind == "qwen3" else number(entry, "hidden_size") // n_heads
    entry.setdefault("head_dim", head_dim)
    for key in SIZES:  # no real model is larger; a stranger's file could ask for any memory
        number(entry, key, most=2**10 if key == "num_hidden_layers" else 2**24, kinds=(int,))
    if n_heads % entry["num_key_value_heads"]:
        raise ValueError(f"num_attention_heads={n_heads} is not divisible by num_key_value_heads="
                         f"{entry['num_key_value_heads']}; query heads share KV heads in groups")
    if entry["head_dim"] % 2:
        raise ValueError(f"head_dim={entry['head_dim']} is odd, but RoPE rotates pairs")
    number(entry, "rms_norm_eps", most=1)
    if entry["tie_word_embeddings"] not in (True, False):
        raise ValueError(f"tie_word_embeddings is {entry['tie_word_embeddings']!r}, not a boolean")

    slides = entry.get("use_sliding_window") if kind.startswith("qwen") else kind == "mistral"
    context = entry["max_position_embeddings"]
    if slides and entry.get("sliding_window", context) < context:
        raise ValueError(f"sliding_window={entry['sliding_window']} is in use (max_position_"
                         f"embeddings is {context}); this model only has full attention")
    parse_rope(entry)
    return {ours: entry[theirs] for theirs, ours in FIELDS.items() if theirs in entry}


def number(entry: dict[str, Any], key: str, above: float = 0, most: float = 1e12,
           kinds: tuple[type, ...] = (int, float)) -> Any:
    """A number of one of the kinds, in range. Raises ValueError for anything else."""
    value: Any = entry.get(key)
    if type(value) not in kinds or not above < value <= most:
        raise ValueError(f"{key} is {value!r}, not a number above {above} and at most {most:,}")
    return value


def parse_rope(entry: dict[str, Any]) -> None:
    """Bring both layouts to `rope_theta` beside `rope_scaling`; newer files have `rope_parameters`.

    transformers recomputes a "dynamic" theta for each text. Training needs one fixed value, so we
    take the theta of the longest text that the config allows, and make that length the context.
    """
    older, newer = entry.get("rope_scaling", {}), entry.get("rope_parameters", {})
    if not isinstance(older, dict) or not isinstance(newer, dict):
        raise ValueError(f"rope_scaling={older!r} and rope_parameters={newer!r} must be objects")
    rope = {key: value for key, value in (newer or older).items() if value is not None}
    if any(older[key] != rope[key] for key in older.keys() & rope.keys()):
        raise ValueError(f"rope_scaling={older} and rope_parameters={newer} contradict each other")
    entry["rope_theta"] = rope.pop("rope_theta", entry.get("rope_theta", 10_000.0))
    older_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", older_name)
    if not isinstance(kind, str) or kind not in ROPE_ENTRIES:
        raise ValueError(f"rope_scaling type {kind!r} is not supported; choose one of "
                         f"{', '.join(ROPE_ENTRIES)}")
    if CONTEXT in ROPE_ENTRIES[kind]:  # written down: the context may grow, this must not
        rope[CONTEXT] = entry.get(CONTEXT, rope.get(CONTEXT, entry["max_position_embeddings"]))
    unknown = rope.keys() - ROPE_ENTRIES[kind] - {"truncate"}
    if unknown:
        raise ValueError(f"rope_scaling of type {kind!r} has an unknown entry {min(unknown)!r}")
    theta = number(entry, "rope_theta", above=1)
    for key in ROPE_ENTRIES[kind]:
        number(ROPE_DEFAULTS | rope, key)
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if rope.get(low, 1) >= rope.get(high, 32):
            raise ValueError(f"{high}={rope.get(high, 32)} must be above {low}={rope.get(low, 1)}")
    if kind == "dynamic":
        factor, head_dim = rope["factor"], entry["head_dim"]
        stretch = factor**2 - (factor - 1)  # transformers' formula, for factor * context tokens
        entry["rope_theta"] = theta * stretch ** (head_dim / max(1, head_dim - 2))
        entry["max_position_embeddings"] = round(factor * entry["max_position_embeddings"])
    entry["rope_scaling"] = None if kind in ("default", "dynamic") else rope | {"rope_type": kind}


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
    """The files beside the weights that belong to the model."""
    return {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
