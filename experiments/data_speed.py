"""How fast the data side is: tokenizing against bare tiktoken, packing, and what training reads.

    python experiments/data_speed.py                                about two minutes on two cores
    python experiments/data_speed.py --tokenizer DIR                with a tokenizer.json or tokenizer.model

Each number is the best of three. The goals: tokenizing at 80% of `encode_ordinary_batch` on the same
cores, packing 100M tokens/s per core at 900 tokens a document, and 200M tokens/s per core from a packed
folder to training's batches of 64K. "Per core" is by CPU time; by the clock, packing waits for the disk.
"""

import contextlib
import io
import json
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import data
from data import Mixture, PackedDataset, TokenizeConfig, load_tokenizer, make_batch, option, parse_cli

SEQ_LEN = 65_536


@dataclass(frozen=True)
class SpeedConfig:
    megabytes: int = option(64, "text to tokenize", int)
    million_tokens: int = option(64, "tokens to pack and to read", int)
    tokenizer: str = option("", "tokenizer (default: one trained here, where `tokenizers` is installed)")


def best_of_three(work: Callable[[Path], object]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU, of the fastest of three runs, each in a folder of its own."""
    clock, cpu = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter(), time.process_time()
            work(Path(folder))
            clock.append(time.perf_counter() - begin[0])
            cpu.append(time.process_time() - begin[1])
    return min(clock), min(cpu)


def source_texts(megabytes: int) -> list[str]:
    """Source files of the standard library and of installed packages, over again if there are too few."""
    paths = sysconfig.get_paths()
    texts, size = [], 0
    while size < megabytes * 10**6:
        for path in sorted({p for key in ("stdlib", "purelib") for p in Path(paths[key]).rglob("*.py")}):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                texts.append(text)
                size += len(text.encode())
            if size >= megabytes * 10**6:
                break
    return texts


def train_tokenizer(folder: Path) -> str:
    """A byte-level BPE of 32,768 tokens with Llama-3's split, so that speeds are of a real table's kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(data.LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(source_texts(4), trainers.BpeTrainer(
        vocab_size=32_768, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(folder / "tokenizer.json"))
    return str(folder)


def tokenize_speed(spec: str, megabytes: int) -> None:
    """From a JSONL file to shards on disk, against tiktoken on the same texts, already in memory."""
    texts, encoding, cores = source_texts(megabytes), load_tokenizer(spec).encoding, os.cpu_count() or 1
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with contextlib.redirect_stdout(io.StringIO()):
            bare = size / best_of_three(lambda _: encoding.encode_ordinary_batch(texts, num_threads=cores))[0]
            ours = size / best_of_three(lambda out: data.tokenize(TokenizeConfig(
                input=str(source), tokenizer=spec, out=str(out / "documents"), workers=cores)))[0]
    print(f"tokenize, {cores} threads, {size:.0f} MB: encode_ordinary_batch {bare:.1f} MB/s, "
          f"data.py tokenize (read, encode, write) {ours:.1f} MB/s = {ours / bare:.0%}")


def write_documents(folder: Path, tokens: int, doc_len: int) -> Path:
    """A tokenized folder of random documents, geometric lengths about `doc_len`, in shards of 16M tokens."""
    tokenizer, rng, shards = load_tokenizer(), np.random.default_rng(0), []
    for n in range(-(-tokens // 2**24)):
        lens = rng.geometric(1 / doc_len, size=min(tokens, 2**24) // doc_len)
        part = folder / f"{n:05d}"
        part.mkdir(parents=True)
        rng.integers(256, size=lens.sum(), dtype=np.uint32).tofile(part / "input_ids.bin")
        np.cumsum(lens).astype(np.int64).tofile(part / "doc_ends.bin")
        shards.append({"rows": len(lens), "documents": len(lens), "tokens": int(lens.sum()), "bad": 0,
                       "max_id": 255})
        (part / "meta.json").write_text(json.dumps(shards[-1]))
    total = {key: sum(shard[key] for shard in shards) for key in ("rows", "documents", "tokens", "bad")}
    (folder / "meta.json").write_text(json.dumps(total | {
        "format": data.DOCUMENTS_FORMAT, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint, "max_id": 255, "shards": len(shards)}))
    return folder


def pack(documents: Path, out: Path) -> PackedDataset:
    tokenizer, report = load_tokenizer(), data.PackReport()
    sequences = data.pack_tokenized(str(documents), "short", "short", SEQ_LEN, 0, report)
    data.write_packed(out, sequences, tokenizer, SEQ_LEN, "short", 0, report)
    return PackedDataset(out)


def pack_speed(documents: Path, tokens: int) -> None:
    """One thread, from a tokenized folder to a packed one: shuffled, cut at 64K, on disk, hashed."""
    clock, cpu = best_of_three(lambda out: pack(documents, out / "packed"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"pack, 1 thread, 900 tokens a document, sequences of 64K: {tokens / cpu / 1e6:.0f}M tokens/s "
          f"per core, {tokens / clock / 1e6:.0f}M by the clock, peak RSS {peak:.2f} GiB")


def loader_speed(documents: Path) -> None:
    """One thread, from a packed folder to batches of one sequence of 64K: ids, labels, document lengths."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = pack(documents, Path(folder, "short"))
        mixture = Mixture({"short": dataset}, {"short": 1.0}, 0)

        def read(_: Path) -> None:
            for sequence in mixture.draw(len(dataset)):
                make_batch([sequence])  # and let go of it, as training does

        clock, cpu = best_of_three(read)
        tokens = len(dataset) * SEQ_LEN
        print(f"load, 1 thread, batches of 64K: {tokens / cpu / 1e6:.0f}M tokens/s per core, "
              f"{tokens / clock / 1e6:.0f}M by the clock")


def main() -> None:
    config = parse_cli(SpeedConfig, __doc__)
    tokens = config.million_tokens * 10**6
    with tempfile.TemporaryDirectory() as folder:
        documents = write_documents(Path(folder, "documents"), tokens, 900)
        pack_speed(documents, tokens)
        loader_speed(documents)
        tokenize_speed(config.tokenizer or train_tokenizer(Path(folder)), config.megabytes)


if __name__ == "__main__":
    data.run_main(main)
