"""How fast, and in how much memory? Ours against Hugging Face transformers, and against the machine's limit.

    python experiments/bench.py            about ten minutes on two cores; needs the `dev` extra

1. Forward and backward of a Llama of 4.6M parameters over 8,192 tokens in 16 documents, against transformers'
   LlamaForCausalLM (sdpa) with the same weights: given the same packed sequence, and given the documents as a
   batch of 16 x 512. In turn within one process, medians of paired rounds: a shared machine's speed drifts.
2. Time per token and peak memory from 4K to 256K tokens at a fixed document length: flat, and a line.
3. A step of 128K tokens under three combinations of levers: peak memory of a process of its own.

Writes docs/figures/bench.json and bench.png, and prints a table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import (  # noqa: E402
    MemoryOptions,
    ModelConfig,
    Transformer,
    device_peak_flops,
    flops_per_step,
    save_pretrained,
)

CONFIG = ModelConfig(vocab_size=512, dim=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=704,
                     max_seq_len=8192, tie_embeddings=True)  # 4.6M parameters
DOC_LENS = (512,) * 16
CPU = torch.device("cpu")
ROUNDS = 7


def tokens(n: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(0))


def our_step(dtype: torch.dtype, doc_lens: tuple[int, ...], compiled: bool = False,
             levers: MemoryOptions | None = None) -> Callable[[], None]:
    """A function that runs our forward and backward once."""
    model = Transformer(CONFIG).init_weights(0).to(dtype)
    model.set_memory_options(levers or MemoryOptions(), CPU)
    if compiled:
        model.compile_blocks()
    ids = tokens(sum(doc_lens))

    def step() -> None:
        loss, valid = model.loss(ids, ids, doc_lens)
        (loss / valid).backward()
        model.zero_grad(set_to_none=True)

    return step


# --- 1. Against transformers ----------------------------------------------------------------------


def their_step(dtype: torch.dtype, packed: bool, folder: Path) -> Callable[[], None]:
    """The same weights in transformers; `packed` in one row with positions, or documents as rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.train()
    ids = tokens(sum(DOC_LENS)).view(1 if packed else len(DOC_LENS), -1)
    positions = torch.cat([torch.arange(n) for n in DOC_LENS])[None] if packed else None

    def step() -> None:
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def compare(folder: Path) -> dict[str, list[float]]:
    """Seconds of every contestant's every round; they take turns."""
    save_pretrained(Transformer(CONFIG).init_weights(0), folder)
    f32, bf16 = torch.float32, torch.bfloat16
    steps = {"ours float32": our_step(f32, DOC_LENS),
             "ours float32 compiled": our_step(f32, DOC_LENS, compiled=True),
             "ours bfloat16": our_step(bf16, DOC_LENS),
             "ours bfloat16 compiled": our_step(bf16, DOC_LENS, compiled=True),
             "transformers float32, packed": their_step(f32, True, folder),
             "transformers float32, batch": their_step(f32, False, folder),
             "transformers bfloat16, batch": their_step(bf16, False, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(ROUNDS + 1):  # the first one warms up
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if round:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, float]:
    """How many times as fast we are, as it comes or " compiled": the medians over rounds."""
    pairs = {"float32, both packed": ("float32, packed", "float32"),
             "our bfloat16, their float32, packed": ("float32, packed", "bfloat16"),
             "float32, they as a batch": ("float32, batch", "float32"),
             "bfloat16, they as a batch": ("bfloat16, batch", "bfloat16")}
    return {name: statistics.median(a / b for a, b in zip(seconds[f"transformers {their}"],
                                                          seconds[f"ours {our}{ours}"], strict=True))
            for name, (their, our) in pairs.items()}


# --- 2. and 3. In a process of its own, whose peak is its own -------------------------------------


def measure_alone(n: int, activations: str, tile: int, dtype: str, repeat: int) -> dict[str, Any]:
    """Median seconds and peak resident memory (GiB) of a step of `n` tokens."""
    def peak() -> float:  # Linux: this process's own peak; getrusage would begin with its parent's
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20

    step = our_step(getattr(torch, dtype), (512,) * (n // 512), levers=MemoryOptions(8192, activations, tile))
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"tokens": n, "activations": activations, "tile": tile, "dtype": dtype, "rss_gib": peak(),
            "seconds": statistics.median(seconds[1:] or seconds)}


def alone(**job: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps(job)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def line_fit(x: list[float], y: list[float]) -> float:
    """R squared of a straight line through the points."""
    return statistics.correlation(x, y) ** 2


# --- 4. Table and picture --------------------------------------------------------------------------


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        seconds = compare(Path(folder) / "model")
    lengths = [2**i for i in range(12, 19)]
    scaling = [alone(n=n, activations="recompute", tile=0, dtype="float32", repeat=2 if n > 2**15 else 6)
               for n in lengths]
    levers = [alone(n=2**17, activations=a, tile=t, dtype="bfloat16", repeat=1)
              for a, t in (("keep", 0), ("recompute", 0), ("recompute", 8192))]
    n = sum(DOC_LENS)
    peak = {dtype: device_peak_flops(CPU, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    per_token = [row["seconds"] / row["tokens"] for row in scaling]
    result = {
        "command": "python experiments/bench.py", "torch": torch.__version__, "seconds": seconds,
        "matmul_peak_flops": peak,
        "ratios": ratios(seconds, ""),
        "ratios_compiled": ratios(seconds, " compiled"),  # ours; theirs as it comes
        "scaling": scaling, "memory_r2": line_fit(lengths, [row["rss_gib"] for row in scaling]),
        "time_per_token_spread": [min(per_token) / statistics.median(per_token),
                                  max(per_token) / statistics.median(per_token)],
        "levers_128k": levers,
    }
    for name, each in seconds.items():
        rate = n / statistics.median(each)
        flops = flops_per_step(CONFIG, DOC_LENS) / n * rate
        share = flops / peak["bfloat16" if "bfloat16" in name else "float32"]
        print(f"{name:<32} {rate:>8,.0f} tok/s  {share:>6.1%} of this machine's matmul peak")
    for name, value in result["ratios"].items():
        print(f"{name:<40} {value:5.2f} x, compiled {result['ratios_compiled'][name]:5.2f} x")
    for row in scaling:
        print(f"{row['tokens']:>8,} tokens: {row['seconds'] / row['tokens'] * 1e6:6.1f} us/token, "
              f"{row['rss_gib']:6.3f} GiB")
    low, high = result["time_per_token_spread"]
    print(f"time per token: {low:.2f} to {high:.2f} of the median; memory's R^2 {result['memory_r2']:.4f}")
    for row in levers:
        print(f"128K tokens, {row['activations']}, tiles {row['tile']}: {row['rss_gib']:.2f} GiB resident, "
              f"{row['seconds']:.0f} s")
    out = ROOT / "docs" / "figures"
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / "bench.png")


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, cost, memory) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    rates = {name: sum(DOC_LENS) / statistics.median(each) for name, each in result["seconds"].items()}
    names = list(rates)[::-1]
    speed.barh(names, [rates[name] for name in names],
               color=["C0" if name.startswith("ours") else "C7" for name in names])
    speed.set(title="8,192 tokens in 16 documents", xlabel="tokens/s, forward and backward")
    lengths = [row["tokens"] for row in result["scaling"]]
    per_token = [row["seconds"] / row["tokens"] * 1e6 for row in result["scaling"]]
    cost.plot(lengths, per_token, marker="o")
    cost.set_xscale("log", base=2)
    cost.set(ylim=(0, 1.2 * max(per_token)), title="documents of 512 tokens", ylabel="microseconds per token")
    cost.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    memory.plot(lengths, [row["rss_gib"] for row in result["scaling"]], marker="o")
    memory.set(ylim=(0, None), title="blocks recomputed, float32", ylabel="peak resident memory, GiB")
    memory.set_xticks(lengths[-3:], [f"{n // 1024}K" for n in lengths[-3:]])
    for axes in (cost, memory):
        axes.grid(alpha=0.3)
        axes.set_xlabel("tokens in all")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure_alone(**json.loads(sys.argv[1]))))
    else:
        main()
