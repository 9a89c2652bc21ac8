"""eval.py with more tasks, for the lab: other recall, and chat.

    python experiments/tasks.py --model runs/tiny/checkpoints/ultra-56 --tasks few,recall_prose

`few` scatters 4 pairs in held-out code (as many keys as RULER's first multi-key needle task),
`recall` 16, as in training. `recall_prose` has held-out prose, docstrings, where `recall` has code.
`chat_value` and `chat_label` are sft.py's held-out questions about a context, asked in a
conversation; with them the results have "answer_bits", the loss on held-out answers. All other
options and results are eval.py's, but `few` and chat ask a quarter of --samples, so that `few` has
as many contexts as recall.
"""

from __future__ import annotations

import ast
import math
import sys
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import sft  # noqa: E402
from experiments import synthetic  # noqa: E402
from model import Transformer  # noqa: E402
from support import installed, scores, toy  # noqa: E402


def scattered_pairs(n_pairs: int, tokenizer: data.Tokenizer, length: int, n: int, questions: int,
                    seed: int) -> list[evaluation.Example]:
    """`recall` with another number of pairs: held-out code, and a question about every pair."""
    rng = np.random.default_rng((seed, length, n, n_pairs))
    room = evaluation.haystack_room(tokenizer, length, n_pairs)
    haystack = data.haystack_windows(tokenizer, rng, n, room, seed, held_out=True)
    return evaluation.ask_for_each(tokenizer, rng, haystack, n_pairs)


@cache
def held_out_prose(tokenizer: data.Tokenizer) -> np.ndarray:
    """The docstrings of the packages that training never sees, some 80,000 tokens."""
    texts = []
    for _, files in sorted(installed.list_repositories(held_out=True).items()):
        texts += [ast.get_docstring(installed.parse(path)) or "" for path in files[:200]]
    return tokenizer.encode("\n\n".join(text for text in texts if len(text) > 200))


def prose_recall(tokenizer: data.Tokenizer, length: int, n: int, questions: int,
                 seed: int) -> list[evaluation.Example]:
    """`recall` with held-out prose as its haystack."""
    rng = np.random.default_rng((seed, length, n))
    room = evaluation.haystack_room(tokenizer, length)
    text = held_out_prose(tokenizer)
    begins = rng.integers(len(text) - room + 1, size=(n, 1))
    return evaluation.ask_for_each(tokenizer, rng, text[begins + np.arange(room)])


def chat(kind: str, tokenizer: data.Tokenizer, length: int, n: int, questions: int,
         seed: int) -> list[evaluation.Example]:
    """First questions of held-out conversations, and the symbols of their answers."""
    examples = []
    conversations = sft.builtin_conversations(tokenizer, seed, [kind], 1024, held_out=True)
    for messages in islice(conversations, n):
        asked = sft.encode_chat(tokenizer, messages[:1], answer_next=True).input_ids
        answer = messages[1]["content"]
        question = evaluation.Question(asked[-1:], (tokenizer.decode(answer),))
        examples.append(evaluation.Example(asked[:-1], (question,), len(answer)))
    return examples


_exact = partial(evaluation.Task, score=scores.same, exact=True)
MORE_TASKS = {
    "few": _exact(partial(scattered_pairs, 4), category="recall", shared=4),
    "recall_prose": _exact(prose_recall, category="recall", shared=toy.N_PAIRS),
    "chat_value": _exact(partial(chat, "value"), category="chat", shared=1, only_length=1024),
    "chat_label": _exact(partial(chat, "label"), category="chat", shared=1, only_length=1024),
}


@torch.no_grad()
def answer_bits(model: Transformer, tokenizer: data.Tokenizer, seed: int) -> dict[str, float]:
    """Bits per token of held-out answers: in chat, and in long synthetic conversations of 8K."""
    kinds, bits = sft.question_kinds(tokenizer), {}
    for name, conversations in {
            "chat": sft.builtin_conversations(tokenizer, seed, kinds, 1024, held_out=True),
            "synthetic": synthetic.conversations(tokenizer, "llama3", 8192, seed,
                                                 synthetic.write_by_rule, held_out=True)}.items():
        read, nats, answered = 0, 0.0, 0
        while read < 2**17:
            document = sft.encode_chat(tokenizer, next(conversations))
            assert document.loss_mask is not None
            batch = evaluation.pad_document(document.input_ids, document.loss_mask, 1)
            loss, valid = model.loss(batch.input_ids, batch.labels, batch.doc_lens)
            read, nats, answered = read + len(document), nats + float(loss), answered + int(valid)
        bits[name] = nats / math.log(2) / answered
    return bits


def main() -> None:
    evaluation.TASKS.update(MORE_TASKS)
    plan, evaluate = evaluation.plan_jobs, evaluation.evaluate

    def fewer(*args: Any) -> list[tuple[str, int, int]]:
        return [(task, length, -(-n // 4) if task == "few" or task.startswith("chat_") else n)
                for task, length, n in plan(*args)]

    def with_answers(model: Transformer, config: Any, *args: Any) -> dict[str, Any]:
        tokenizer = data.tokenizer_for(config.model, config.tokenizer)
        more = answer_bits(model, tokenizer, config.seed) if "chat_" in config.tasks else {}
        return evaluate(model, config, *args) | {"answer_bits": more}

    evaluation.plan_jobs, evaluation.evaluate = fewer, with_answers
    evaluation.main()


if __name__ == "__main__":
    data.run_main(main)
