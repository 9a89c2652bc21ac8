"""Long synthetic conversations, made from long documents: the ablation of Table 8 (section 5, A.5).

    python experiments/synthetic.py --seq 2k --out synthetic.jsonl        --writer DIR: a model asks
    python sft.py --init runs/tiny --seq 2k --mix chat=0.57,synthetic.jsonl=0.1,recall-2k=0.33

"qa" asks about one chunk of a document, "rag" does so with the chunks in random order, "summary"
asks what the document is about. Each conversation has exactly --seq tokens: around the chunk stands
as much of the document as fits, so packing cuts none and no answer is lost. Without a writer a rule
asks what a function in the text does, and its docstring answers.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data import Tokenizer, option, parse_length
from model import generate, load_pretrained
from sft import CHAT_TEMPLATES, encode_chat

KINDS = {"qa": 0.4, "rag": 0.3, "summary": 0.3}  # of the synthetic tokens (section 5)
LAYOUTS = ("Use the text to answer the question.\n\n{text}\n\nQuestion: {question}",
           "Read the text below, then reply. Question: {question}\n\n{text}")
SUMMARY = "What is this text about? Give its main points."
WRITE_SUMMARY = "Summarize this in a few sentences:\n\n"
WRITE_PAIR = """Write one question about the passage below, and the answer. Only the passage should
answer it, and it must make sense to someone who was never shown the passage. First reason about the
passage. Use this form:\nReasoning: ...\nQuestion: ...\nAnswer: ...\n\n"""  # after Table 16
DOCUMENTED = re.compile(r'^def (\w+)\(.*?\).*?:\n +"""(\w[^"\n]{10,80})', re.MULTILINE)

Written = tuple[str, str, str] | None  # question, answer, and the chunk of the text to be seen


def write_by_rule(kind: str, text: str, rng: np.random.Generator) -> Written:
    found = list(DOCUMENTED.finditer(text))
    if not found:
        return None
    if kind == "summary":
        return SUMMARY, " ".join(each[2] for each in found[:4]), text[:found[:4][-1].end()]
    one = found[int(rng.integers(len(found)))]
    return f"What does {one[1]} do?", one[2], one[0]


def write_by_model(ask: Callable[[str], str], kind: str, text: str,
                   rng: np.random.Generator) -> Written:
    """A pair about an eighth of the text, or a summary of summaries; None for another form."""
    chunks = [text[len(text) * i // 8:len(text) * (i + 1) // 8] for i in range(8)]
    if kind == "summary":  # of three quarters: question and answer need room
        notes = [ask(WRITE_SUMMARY + chunk) for chunk in chunks[:6]]
        summary = ask(WRITE_SUMMARY + "\n\n".join(notes)).strip()
        return (SUMMARY, summary, "".join(chunks[:6])) if summary else None
    chunk = chunks[int(rng.integers(8))]
    reply = re.search(r"Question:\s*(\S.*?)\s*Answer:\s*(\S.*)", ask(WRITE_PAIR + chunk), re.DOTALL)
    return (reply[1], reply[2].strip(), chunk) if reply else None


def shuffle_chunks(text: str, chunk: str, rng: np.random.Generator) -> str:
    """The text cut into chunks as long as `chunk`, which stays whole, in random order."""
    rest, size = text.replace(chunk, "", 1), len(chunk)
    chunks = [chunk, *(rest[i:i + size] for i in range(0, len(rest), size))]
    return "\n\n".join(chunks[i] for i in rng.permutation(len(chunks)))


def fit(text: str, chunk: str, missing: Callable[[str], int],
        rng: np.random.Generator) -> str | None:
    """A window of the text, around the chunk, that leaves no token missing; None if none does."""
    at = text.index(chunk)
    begin = max(0, at - int(rng.integers(max(0, missing(chunk)) + 1)))  # the chunk at any depth
    end = at + len(chunk)
    for _ in range(100):
        n = missing(text[begin:end])
        if n == 0:
            return text[begin:end]
        begin -= max(0, end + n - len(text))
        end = min(end + n, len(text))  # a character is at most one token, mostly: we come closer
        if begin < 0 or end < at + len(chunk):
            break
    return None


def conversations(tokenizer: Tokenizer, template: str, seq_len: int, seed: int,
                  write: Callable[..., Written],
                  held_out: bool = False) -> Iterator[list[dict[str, str]]]:
    """Conversations of exactly `seq_len` tokens about pieces of the embedded code."""
    rng = np.random.default_rng(seed)
    for document in data.code_repos(tokenizer, seed, held_out):
        for begin in range(1, len(document) - seq_len, seq_len):
            text = tokenizer.decode(document.input_ids[begin:begin + seq_len])
            kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
            written = write(kind, text, rng)
            if written is None:
                continue
            question, answer, chunk = written
            text = shuffle_chunks(text, chunk, rng) if kind == "rag" else text
            messages = partial(ask_about, str(rng.choice(LAYOUTS)), question, answer)
            window = fit(text, chunk, lambda part, m=messages: seq_len - len(
                encode_chat(tokenizer, m(part), template)), rng)
            if window is not None:
                yield messages(window)


def ask_about(layout: str, question: str, answer: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": layout.format(text=text, question=question)},
            {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class SyntheticConfig:
    out: str = option("synthetic.jsonl", "the file to write")
    seq: int = option(2048, "tokens of a conversation", parse_length)
    conversations: int = option(300, "how many, at most", parse_length)
    writer: str = option("", "model folder that writes questions and answers (default: a rule)")
    tokenizer: str = option("bytes", "the tokenizer that sft.py will use")
    template: str = option("llama3", f"one of {', '.join(CHAT_TEMPLATES)}, as in sft.py")
    seed: int = option(0, "seed of documents, questions and windows", int)


def main() -> None:
    config = data.parse_cli(SyntheticConfig, __doc__)
    tokenizer, write = data.load_tokenizer(config.tokenizer), write_by_rule
    if config.writer:
        model, end = load_pretrained(config.writer), CHAT_TEMPLATES[config.template].end

        def ask(text: str) -> str:
            messages = [{"role": "user", "content": text}]
            prompt = encode_chat(tokenizer, messages, config.template, answer_next=True).input_ids
            ids = generate(model, prompt.tolist(), 256, [tokenizer.special_id(end)])
            return tokenizer.decode(ids).removesuffix(end)

        write = partial(write_by_model, ask)
    made = conversations(tokenizer, config.template, config.seq, config.seed, write)
    with open(config.out, "w", encoding="utf-8") as file:
        for messages in islice(made, config.conversations):
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    data.run_main(main)
