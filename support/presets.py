"""Shapes of models, by name. They are those of the released checkpoints, but for `tiny`.

`tiny` has enough heads for 8 ranks. Its vocabulary of 0 means: the tokenizer's.
"""

from __future__ import annotations

from typing import Any

# The scaling in the config.json of Llama-3.2.
_LLAMA32_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 0, "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4,
             "head_dim": 16, "ffn_dim": 192, "max_seq_len": 256, "tie_embeddings": True},
    "smollm2-135m": {"vocab_size": 49_152, "dim": 576, "n_layers": 30, "n_heads": 9,
                     "n_kv_heads": 3, "head_dim": 64, "ffn_dim": 1536, "max_seq_len": 8192,
                     "rope_theta": 1e5, "tie_embeddings": True},
    "llama3.2-1b": {"vocab_size": 128_256, "dim": 2048, "n_layers": 16, "n_heads": 32,
                    "n_kv_heads": 8, "head_dim": 64, "ffn_dim": 8192, "max_seq_len": 131_072,
                    "rope_theta": 5e5, "rope_scaling": _LLAMA32_ROPE, "tie_embeddings": True},
    "llama3.2-3b": {"vocab_size": 128_256, "dim": 3072, "n_layers": 28, "n_heads": 24,
                    "n_kv_heads": 8, "head_dim": 128, "ffn_dim": 8192, "max_seq_len": 131_072,
                    "rope_theta": 5e5, "rope_scaling": _LLAMA32_ROPE, "tie_embeddings": True},
    "llama3-8b": {"vocab_size": 128_256, "dim": 4096, "n_layers": 32, "n_heads": 32,
                  "n_kv_heads": 8, "head_dim": 128, "ffn_dim": 14_336, "max_seq_len": 8192,
                  "rope_theta": 5e5},
}
