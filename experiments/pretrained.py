"""Make `pretrained/`: the tiny model after each stage and after fine-tuning, to try at once.

    python train.py
    python sft.py --init runs/tiny --steps 100
    python experiments/pretrained.py runs/tiny runs/sft

Weights are rounded to bfloat16 (290 KB a model), and each model gets its card. We evaluate the
rounded models; their scores go to pretrained/README.md.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import model as llama  # noqa: E402
from data import format_length  # noqa: E402
from support.run import read_state  # noqa: E402

LENGTHS = "256,2k,8k,16k"
SAMPLES = 208
NAMES = ("tiny-base", "tiny-long", "tiny-ultra", "tiny-sft")


def checkpoints(run: Path, tuned: Path) -> dict[str, Path]:
    """The last checkpoint of each stage, by the name that its model gets."""
    found = {}
    for folder in (*(run / "checkpoints").glob("*[0-9]"), *(tuned / "checkpoints").glob("*[0-9]")):
        state = read_state(folder)
        if state["step"] == state["steps"]:
            found[f"tiny-{state['stage']}"] = folder
    if missing := set(NAMES) - found.keys():
        raise ValueError(f"{run} and {tuned} have not finished {', '.join(sorted(missing))}")
    return {name: found[name] for name in NAMES}


def score(folder: Path) -> dict[str, float]:
    """Recall and ICL of a model, {"recall@2k": 0.98, ...}."""
    config = evaluation.EvalConfig(model=str(folder), lengths=LENGTHS, samples=SAMPLES)
    result = evaluation.evaluate(llama.load_pretrained(folder), config, folder.name)
    return {f"{row['task']}@{format_length(row['length'])}": row["score"]
            for row in result["results"]}


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("name the two runs: experiments/pretrained.py runs/tiny runs/sft")
    scores = {}
    for name, checkpoint in checkpoints(Path(sys.argv[1]), Path(sys.argv[2])).items():
        out = ROOT / "pretrained" / name
        with tempfile.TemporaryDirectory() as aside:  # written whole before the old one goes
            llama.export(str(checkpoint), f"{aside}/{name}")
            out.mkdir(parents=True, exist_ok=True)
            for file in Path(aside, name).iterdir():
                (out / file.name).write_bytes(file.read_bytes())
        scores[name] = score(out)
    lines = ["# The tiny model after each stage", "",
             "Made by `experiments/pretrained.py` from a run of `python train.py` and one of",
             f"`python sft.py --init runs/tiny --steps 100` ({date.today()}). Share of {SAMPLES}",
             "questions answered; the weights are in bfloat16.", "",
             "| | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    for key in next(iter(scores.values())):
        cells = [f"{scores[name][key]:.3f}" for name in scores]
        lines.append(f"| {key.replace('@', ' at ')} | " + " | ".join(cells) + " |")
    (ROOT / "pretrained" / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
