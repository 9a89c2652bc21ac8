"""How fast, and in how much memory? Ours against transformers, tiktoken and the machine's limit.

    python experiments/bench.py            about five minutes on two cores; needs the `dev` extra

1. Forward and backward of a Llama of 4.6M parameters over 8,192 tokens in 16 documents, against
   transformers' LlamaForCausalLM (sdpa) with the same weights: given the same packed sequence, and
   given the documents as a batch of 16 x 512. They take turns within one process, and we compare
   medians of paired rounds, because a shared machine's speed drifts.
2. Time per token and peak memory from 4K to 64K tokens at a fixed document length.
3. Tokenizing a JSONL file to disk with the tokenizer "bytes", against tiktoken on texts in memory;
   and reading packed sequences as training does.

Writes docs/figures/bench.json and bench.png, and prints a table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from model import (  # noqa: E402
    MemoryOptions,
    ModelConfig,
    Transformer,
    device_peak_flops,
    flops_per_step,
    save_pretrained,
)

CONFIG = ModelConfig(vocab_size=512, dim=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=32,
                     ffn_dim=704, max_seq_len=8192, tie_embeddings=True)  # 4.6M parameters
DOC_LENS = (512,) * 16
ROUNDS = 7


def tokens(n: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(0))


def our_step(dtype: torch.dtype, doc_lens: tuple[int, ...],
             compiled: bool = False, activations: str = "keep") -> Callable[[], None]:
    """A function that runs our forward and backward once."""
    model = Transformer(CONFIG).init_weights(0).to(dtype)
    model.set_memory_options(MemoryOptions(activations=activations))
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
    """The same weights in transformers; `packed` as one row with positions, or a row a document."""
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


def ratios(seconds: dict[str, list[float]], suffix: str) -> dict[str, float]:
    """How many times as fast we are, as it comes or " compiled": medians over the rounds."""
    pairs = {"float32, both packed": ("float32, packed", "float32"),
             "our bfloat16, their float32, packed": ("float32, packed", "bfloat16"),
             "float32, they as a batch": ("float32, batch", "float32"),
             "bfloat16, they as a batch": ("bfloat16, batch", "bfloat16")}
    found = {}
    for name, (their, our) in pairs.items():
        rounds = zip(seconds[f"transformers {their}"], seconds[f"ours {our}{suffix}"], strict=True)
        found[name] = statistics.median(theirs / ours for theirs, ours in rounds)
    return found


# --- 2. Length, in a process of its own, whose peak is its own ------------------------------------


def measure_alone(n: int, repeat: int) -> dict[str, Any]:
    """Median seconds and peak resident memory (GiB) of a step of `n` tokens, blocks recomputed."""
    step, seconds = our_step(torch.float32, (512,) * (n // 512), activations="recompute"), []
    for _ in range(repeat):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()  # getrusage's peak would begin with the parent's
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    return {"tokens": n, "rss_gib": peak, "seconds": statistics.median(seconds[1:])}


def alone(n: int) -> dict[str, Any]:
    repeat = 2 if n > 2**15 else 6
    command = [sys.executable, __file__, json.dumps({"n": n, "repeat": repeat})]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# --- 3. The data side -----------------------------------------------------------------------------


def best_of_three(work: Callable[[Path], object]) -> float:
    """Seconds of the fastest of three runs, each in a folder of its own."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            begin = time.perf_counter()
            work(Path(folder))
            seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_data(folder: Path, megabytes: int = 32) -> dict[str, float]:
    """Our share of tiktoken's speed, and tokens per second from a packed folder to batches."""
    tokenizer, cores, texts, size = data.load_tokenizer(), os.cpu_count() or 1, [], 0.0
    for document in data.code_repos(tokenizer, 0):
        texts.append(tokenizer.decode(document.input_ids[1:-1]))
        size += len(document) / 1e6
        if size > megabytes:
            break
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encode = tokenizer.encoding.encode_ordinary_batch
    bare = best_of_three(lambda _: encode(texts, num_threads=cores))
    ours = best_of_three(lambda out: data.tokenize(data.TokenizeConfig(
        input=str(source), out=str(out / "documents"), workers=cores)))
    data.pack_domain(folder / "packed", "code_repos-64k", 100, tokenizer, 2**16, 0)
    packed = data.PackedDataset(folder / "packed")
    read = best_of_three(lambda _: [data.make_batch([sequence]).labels.sum()
                                    for sequence in map(packed.__getitem__, range(len(packed)))])
    return {"tokenize_mb_per_s": size / ours, "share_of_tiktoken": bare / ours,
            "read_tokens_per_s": len(packed) * packed.seq_len / read}


# --- 4. Table and picture -------------------------------------------------------------------------


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_side = measure_data(Path(folder))
        seconds = compare(Path(folder) / "model")
    lengths = [2**i for i in range(12, 17)]
    scaling = [alone(n) for n in lengths]
    cpu = torch.device("cpu")
    peak = {name: device_peak_flops(cpu, getattr(torch, name)) for name in ("float32", "bfloat16")}
    per_token = [row["seconds"] / row["tokens"] for row in scaling]
    middle = statistics.median(per_token)
    line = statistics.correlation(lengths, [row["rss_gib"] for row in scaling])
    result = {
        "command": "python experiments/bench.py", "torch": torch.__version__, "seconds": seconds,
        "matmul_peak_flops": peak, "ratios": ratios(seconds, ""),
        "ratios_compiled": ratios(seconds, " compiled"),  # ours; theirs as it comes
        "scaling": scaling, "memory_r2": line**2, "data": data_side,
        "time_per_token_spread": [min(per_token) / middle, max(per_token) / middle]}
    for name, each in seconds.items():
        rate = sum(DOC_LENS) / statistics.median(each)
        flops = flops_per_step(CONFIG, DOC_LENS) / sum(DOC_LENS) * rate
        share = flops / peak["bfloat16" if "bfloat16" in name else "float32"]
        print(f"{name:<32} {rate:>8,.0f} tok/s  {share:>6.1%} of this machine's matmul peak")
    for name, value in result["ratios"].items():
        print(f"{name:<40} {value:5.2f} x, compiled {result['ratios_compiled'][name]:5.2f} x")
    for row, cost in zip(scaling, per_token, strict=True):
        print(f"{row['tokens']:>8,} tokens: {cost * 1e6:6.1f} us/token, {row['rss_gib']:6.3f} GiB")
    low, high = result["time_per_token_spread"]
    print(f"time per token: {low:.2f} to {high:.2f} of the median; memory's R^2 {line**2:.4f}")
    print(f"tokenizing: {data_side['tokenize_mb_per_s']:.1f} MB/s, "
          f"{data_side['share_of_tiktoken']:.0%} of tiktoken's speed; "
          f"reading: {data_side['read_tokens_per_s'] / 1e6:.0f}M tokens/s")
    out = ROOT / "docs" / "figures"
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / "bench.png")


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, cost, memory) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    rates = {name: sum(DOC_LENS) / statistics.median(each)
             for name, each in result["seconds"].items()}
    names = list(rates)[::-1]
    speed.barh(names, [rates[name] for name in names],
               color=["C0" if name.startswith("ours") else "C7" for name in names])
    speed.set(title="8,192 tokens in 16 documents", xlabel="tokens/s, forward and backward")
    lengths = [row["tokens"] for row in result["scaling"]]
    per_token = [row["seconds"] / row["tokens"] * 1e6 for row in result["scaling"]]
    cost.plot(lengths, per_token, marker="o")
    cost.set_xscale("log", base=2)
    cost.set(ylim=(0, 1.2 * max(per_token)), title="documents of 512 tokens",
             ylabel="microseconds per token")
    cost.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    memory.plot(lengths, [row["rss_gib"] for row in result["scaling"]], marker="o")
    memory.set(ylim=(0, None), title="float32", ylabel="peak resident memory, GiB")
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
