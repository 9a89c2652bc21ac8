"""Take a real model's folder through everything, and hold the end against transformers.

    python experiments/real_model.py models/smollm2 --out runs/real

Tokenize and pack the code of this Python, train 3 steps at 2K tokens, fine-tune 3, ask four tasks
at 1K, export. Then compare with transformers: ids of 300,000 characters, logits, greedy text, ids
of a chat. Prints a Markdown table with seconds and memory, for docs/MEASURED.md. It needs the `dev`
extra; the folder is a Llama's with its tokenizer (SmolLM2-135M is small enough for a laptop).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sft  # noqa: E402
from model import generate, load_pretrained  # noqa: E402
from support import installed  # noqa: E402

CHAT = [{"role": "system", "content": "You answer in one line."},  # some templates add one if not
        {"role": "user", "content": "What is json?"}, {"role": "assistant", "content": "A module."},
        {"role": "user", "content": "And re?"}]


def commands(folder: str, out: Path, seq: str) -> list[list[str]]:
    """What a newcomer types, one command after the other."""
    packs, small = str(out / "packs"), ["--seq", seq, "--batch-tokens", seq, "--steps", "3"]
    return [
        ["data.py", "tokenize", "--input", str(out / "source"), "--format", "repos",
         "--tokenizer", folder, "--out", str(out / "docs")],
        ["data.py", "pack", "--from", str(out / "docs"), "--domain", f"code-{seq}", "--seq", seq,
         "--out", f"{packs}/code-{seq}"],
        ["train.py", "--init", folder, "--data", packs, "--mix", f"code-{seq}=1", *small,
         "--no-eval", "--out", str(out / "train")],
        ["sft.py", "--init", str(out / "train"), *small, "--no-eval", "--out", str(out / "sft")],
        ["eval.py", "--model", str(out / "sft/checkpoints/sft-3"), "--tasks", "few", "--lengths",
         "1k", "--samples", "4", "--bpb-length", "0", "--out", str(out / "eval")],
        ["model.py", "export", str(out / "sft/checkpoints/sft-3"), str(out / "exported"),
         "--dtype", "float32"]]


def run(command: list[str]) -> tuple[float, float]:
    """Run one command: its seconds, and the GiB of the largest process so far."""
    begin = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return time.monotonic() - begin, gib


def some_text(n: int) -> str:
    """So many characters of installed code."""
    return "\n".join(installed.join_files(files) for files in
                     list(installed.list_repositories(held_out=True).values()))[:n]


def compare(folder: Path) -> dict[str, str]:
    """What transformers makes of the exported folder, beside what we make of it."""
    import transformers

    ours, tokenizer = load_pretrained(folder), data.load_tokenizer(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    text = some_text(300_000)
    a, b = tokenizer.encode(text).tolist(), other(text, add_special_tokens=False)["input_ids"]
    same = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(a))
    ids = torch.tensor(a[:512])
    with torch.no_grad():
        apart = (ours.logits(ids, (512,)) - theirs(ids[None]).logits[0]).abs().max().item()
    written = generate(ours, a[:64], 32)
    wanted = theirs.generate(torch.tensor([a[:64]]), max_new_tokens=32, do_sample=False,
                             eos_token_id=None)[0, 64:].tolist()
    chat: Any = sft.encode_chat(tokenizer, CHAT, sft.template_for(tokenizer, folder),
                                answer_next=True).input_ids.tolist()
    theirs_chat = other.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    return {"ids of 300,000 characters": f"{len(a):,} and {len(b):,}, the same to {same:,}",
            "logits of 512 tokens, float32": f"at most {apart:.1e} apart",
            "32 tokens of greedy text": "the same" if written == wanted else "others",
            "ids of a chat": "the same" if chat == theirs_chat else f"{chat}, {theirs_chat}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a Hugging Face folder of a Llama, with its tokenizer")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real", help="a new folder")
    parser.add_argument("--seq", default="2k", help="tokens of a training sequence")
    args = parser.parse_args()
    source = args.out.resolve() / "source" / "code"
    source.mkdir(parents=True)
    (source / "all.py").write_text(some_text(2_000_000))
    print("| command | seconds | GiB |\n|---|---|---|")
    for command in commands(str(Path(args.folder).resolve()), args.out.resolve(), args.seq):
        seconds, gib = run(command)
        print(f"| {' '.join(command[:2])} | {seconds:.1f} | {gib:.2f} |", flush=True)
    scores = json.loads(next((args.out / "eval").glob("*.json")).read_text())["results"]
    print("| " + ", ".join(f"{row['task']} {row['score']:.2f}" for row in scores) + " | | |")
    for name, found in compare(args.out.resolve() / "exported").items():
        print(f"| {name}: {found} | | |")


if __name__ == "__main__":
    data.run_main(main)
