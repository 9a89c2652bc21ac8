"""The fine-tuning: from a long-context base model to one that answers.

A conversation is written the way the model's family writes it, and only the answers are trained:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nIs json.JSONDecoder a class?<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\nYes.<|eot_id|>
                                                       ^^^^^^^^^^ the loss mask: the answer and its end

Conversations are short, packed end to end (the tail that a cut leaves over is dropped), and attention stays
inside each. That is enough for 8B parameters: the paper finds that short instruction data keeps long-context
ability, and that even 1% of synthetic long instructions costs some (section 5, Table 8; --synthetic-share
repeats it). A model of 140,000 forgets: the tiny stage rehearses long recall beside the chat (--replay).

Answers are few and uneven. One rank may hold 3 trained tokens and the next 500, so the loss must be the
average over the trained tokens of the whole step (A.3): it is, and nothing here is special. Fine-tuning is a
stage like any other, trained by train.run_stage; this file makes the data.

    python sft.py --init runs/tiny                         questions about the installed Python; a table
    python sft.py --init runs/tiny --data mine.jsonl       rows with "messages", or ShareGPT's "conversations"
    torchrun --nproc-per-node 8 sft.py --recipe prolong --init D --data HuggingFaceH4/ultrachat_200k:train_sft
    python sft.py --chat runs/sft

Sources: ProLong sections 2.2, 5, A.3, A.5, Tables 8, 9, 16, 17 (the structure; the wording is ours).
"""

from __future__ import annotations

import ast
import codecs
import json
import math
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import train
from data import Document, PackReport, Tokenizer, option, parse_length
from eval import wilson_interval
from model import KVCache, Transformer, empty_pretrained, generate, load_pretrained, stream
from train import Run, RunConfig, Stage

Message = dict[str, Any]  # {"role": "user", "content": "..."}; content may also be token ids, uint32 (n,)

# --- 1. A conversation becomes a document ---------------------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
    """How a family of models writes a turn: head, text, end, after. "<|...|>" are special tokens."""

    begin: str  # before the first turn
    head: str
    end: str  # the end of a turn: trained in answers, and where generation stops
    after: str
    strip: bool  # white space around a turn's text is left out

    @property
    def jinja(self) -> str:
        """The same for transformers and vLLM, which look for it in chat_template.jinja beside the weights."""
        before, after = map(json.dumps, self.head.split("{role}"))
        text = "(message['content'] | trim)" if self.strip else "message['content']"
        turn = f"{before} + message['role'] + {after} + {text} + {json.dumps(self.end + self.after)}"
        return ("{{ " + json.dumps(self.begin) + " }}"
                "{% for message in messages %}{{ " + turn + " }}{% endfor %}"
                "{% if add_generation_prompt %}{{ " + f"{before} + 'assistant' + {after}" + " }}{% endif %}")


CHAT_TEMPLATES = {
    "llama3": ChatTemplate("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n",
                           "<|eot_id|>", after="", strip=True),
    "chatml": ChatTemplate("", "<|im_start|>{role}\n", "<|im_end|>", after="\n", strip=False),
}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def find_template(name: str) -> ChatTemplate:
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"template {name!r} is unknown; choose one of {', '.join(CHAT_TEMPLATES)}")
    return CHAT_TEMPLATES[name]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], template: str = "llama3",
                answer_next: bool = False, begin: bool = True) -> Document:
    """A conversation as token ids, with a mask over exactly the answers and their ends of turn.

    The ids are those of the family's own template. What a message says is text: "<|eot_id|>" in it is ten
    letters. `answer_next` adds the head of an answer, `begin` False leaves out what begins a conversation.
    Raises ValueError for an unknown template and for a tokenizer without the template's special tokens.
    """
    form = find_template(template)
    parts: list[tuple[list[int], bool]] = [(_special(tokenizer, form.begin if begin else ""), False)]
    for message in messages:
        text, answer = message["content"], message["role"] == "assistant"
        *front, last = re.split(r"(?<=\|>)", form.head.format(role=message["role"]))
        if isinstance(text, str):  # the head's last white space and the text are one piece to the tokenizer
            ids = tokenizer.encode(last + (text.strip() if form.strip else text)).tolist()
            sizes = np.cumsum([len(tokenizer.encoding.decode_single_token_bytes(i)) for i in ids])
            n_head = int(np.searchsorted(sizes, len(last))) + 1
        else:
            head = tokenizer.encode(last).tolist()
            ids, n_head = head + text.tolist(), len(head)
        parts += [(_special(tokenizer, "".join(front)), False), (ids[:n_head], False), (ids[n_head:], answer),
                  ([tokenizer.special_id(form.end)], answer), (_special(tokenizer, form.after), False)]
    if answer_next:
        parts.append((_special(tokenizer, form.head.format(role="assistant")), False))
    return Document(np.array([i for ids, _ in parts for i in ids], np.uint32),
                    np.array([trained for ids, trained in parts for _ in ids], bool))


def _special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a piece of a template, whose "<|...|>" are special tokens."""
    parts = re.split(r"(<\|\w+\|>)", text)  # text and special tokens in turn
    return [i for k, part in enumerate(parts)
            for i in ([tokenizer.special_id(part)] if k % 2 else tokenizer.encode(part).tolist())]


# --- 2. Conversations from files ------------------------------------------------------------------


@dataclass
class ChatReport:
    """What became of the conversations."""

    read: int = 0
    without_answer: int = 0  # nothing to train on: left out
    bad: list[str] = field(default_factory=list)  # what was wrong, and where


def to_messages(row: Any) -> list[Message]:
    """The messages of a row: Hugging Face's `messages`, or ShareGPT's `conversations`. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}, not an object")
    key = "messages" if row.get("messages") is not None else "conversations"
    role_key, text_key = ("role", "content") if key == "messages" else ("from", "value")
    if row.get(key) is None:
        raise ValueError(f"has neither 'messages' nor 'conversations', only {', '.join(row) or 'nothing'}")
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key!r} is not a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        role, text = (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(f"{key}[{i}] needs {role_key!r}, one of {', '.join(ROLES)}, and {text_key!r}, "
                             f"a text; it is {str(turn)[:80]}")
        messages.append({"role": ROLES[role], "content": text})
    return messages


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a .jsonl file (by lines), a .parquet file, or a hub data set as NAME or NAME:SPLIT.

    A line that is not JSON comes as its own exception, for the reader to judge.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for i, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{i}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield f"{path}:{i}", ValueError(f"is not JSON ({error})")
        return
    import datasets

    name, _, split = source.partition(":")
    arguments: dict[str, Any] = {"path": name, "split": split or "train"}
    if path.suffix == ".parquet":
        arguments = {"path": "parquet", "data_files": source, "split": "train"}
    try:
        if path.suffix != ".parquet" and (path.exists() or "/" not in name):
            raise ValueError("no file of such a kind, and data sets are OWNER/NAME")
        for i, row in enumerate(datasets.load_dataset(**arguments, streaming=True)):
            yield f"{name}[{i}]", row
    except Exception as error:  # the library and the network have many kinds
        raise ValueError(f"--data {source} is neither builtin, nor a .jsonl or .parquet file, nor a data set "
                         f"that can be read: {error}") from None


def chat_documents(rows: Iterable[tuple[str, Any]], tokenizer: Tokenizer, template: str, on_bad: str,
                   report: ChatReport) -> Iterator[Document]:
    """Encode rows that hold an answer. Raises ValueError at a bad row (`on_bad` "skip" counts it)."""
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad={on_bad!r} is unknown; choose stop or skip")
    encode_chat(tokenizer, [], template, answer_next=True)  # what it lacks is no row's fault
    for where, row in rows:
        report.read += 1
        try:
            if isinstance(row, ValueError):
                raise row
            messages = to_messages(row)
            document = encode_chat(tokenizer, messages, template)
        except ValueError as error:  # half a character, as JSON can spell it, is one too
            if on_bad == "stop":
                raise ValueError(f"{where} {error}; mend it, or choose --on-bad skip") from None
            report.bad.append(f"{where} {error}")
            continue
        if any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            yield document
        else:
            report.without_answer += 1
    if report.read == report.without_answer + len(report.bad):
        raise ValueError(f"none of {report.read} conversations can be trained on: {report.without_answer} "
                         f"have no answer, {len(report.bad)} are damaged"
                         + (f" (the first: {report.bad[0]})" if report.bad else ""))


# --- 3. Conversations that every Python installation can make ---------------------------------------
#
# Three kinds of question about real names, and two about the contexts of recall and ICL documents (data.py),
# whose symbols are special tokens: here ~ and ? stand for the marks, A ... 7 for the symbols.
#
#     kind      json.JSONDecoder: a class or a function?             class
#     package   json.JSONDecoder is in which package?                json
#     summary   What does json.dumps do?                             Serialize ``obj`` to a JSON ...
#     value     ~QX7KA def main(): ~CPLM3 ... The value of C?        ?CPLM3       And of Q?    ?QX7KA
#     label     ~A3~N7~X5~C3 ... The label of N?                     ~N7          And of B?    ~B3
#
# The last two answer in the form of the documents: fine-tuning gives an old ability a new occasion.

QUESTION_KINDS = {"kind": 0.25, "package": 0.4, "summary": 0.1, "value": 0.15, "label": 0.1}  # of conversations
FOLLOW_UPS = 8  # questions about one context, at most
Turns = list[tuple[Any, Any]]  # questions and answers: texts, or ids


@cache
def standard_names(held_out: bool) -> tuple[tuple[str, bool, str], ...]:
    """The standard library's public (dotted name, is it a class?, first line of its docstring).

    Read from the sources, nothing is imported. Packages are held out as a whole.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if others & {*parts} or parts[0].startswith("_") or data.is_held_out(parts[0]) != held_out:
            continue
        module = ".".join(part for part in parts if part != "__init__")
        names += [(f"{module}.{node.name}", isinstance(node, ast.ClassDef),
                   (ast.get_docstring(node) or "").partition("\n")[0].strip())
                  for tree in data.syntax_trees([path]) for node in tree.body
                  if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    return tuple(names)


def ask_about_name(family: str, rng: np.random.Generator, held_out: bool) -> Turns:
    wanted = bool(rng.integers(2))  # as many classes as functions, so that chance is a half
    names = [(name, is_class, summary) for name, is_class, summary in standard_names(held_out)
             if is_class == wanted and (summary or family != "summary")]
    name, _, summary = names[int(rng.integers(len(names)))]
    return [{"kind": (f"{name}: a class or a function?", "class" if wanted else "function"),
             "package": (f"{name} is in which package?", name.partition(".")[0]),
             "summary": (f"What does {name} do?", summary)}[family]]


def ask_about_context(family: str, tokenizer: Tokenizer, rng: np.random.Generator, held_out: bool,
                      longest: int) -> Turns:
    """A context of symbols and up to eight questions; an answer is a mark, the symbol asked for, the rest.

    A haystack has 16 to `longest` tokens, each octave as often: most are short.
    """
    if family == "value":
        pairs = data.recall_pairs(rng, 1, int(rng.integers(2, data.N_PAIRS + 1)))
        length = int(16 * (longest / 16) ** rng.random())
        haystack = data.haystack_windows(tokenizer, rng, 1, length, 0, held_out)
        (context,), _ = data.scatter_pairs(rng, pairs, haystack)
        answers = [np.append([data.QUESTION], pair) for pair in rng.permutation(pairs[0])[:FOLLOW_UPS]]
    else:
        (lines,) = data.icl_lines(rng, 1, int(rng.integers(12, 60)) + FOLLOW_UPS)
        context, answers = lines[:-FOLLOW_UPS].reshape(-1), list(lines[-FOLLOW_UPS:])
    asked = np.append(context, tokenizer.encode(f"\n\nThe {family} of ")), tokenizer.encode("And of ")
    return [(np.concatenate((asked[i > 0], answer[1:2], tokenizer.encode("?"))), answer)
            for i, answer in enumerate(answers)]


def families(tokenizer: Tokenizer) -> list[str]:
    """The families that a tokenizer can write: the symbols are special tokens of "bytes" alone."""
    return [name for name in QUESTION_KINDS if tokenizer.spec == "bytes" or name not in ("value", "label")]


def builtin_conversations(tokenizer: Tokenizer, seed: int, names: Sequence[str], longest: int,
                          held_out: bool = False) -> Iterator[list[Message]]:
    """Conversations without end, of the families `names` by their shares."""
    rng, shares = np.random.default_rng((seed, held_out)), np.array([QUESTION_KINDS[name] for name in names])
    while True:
        family = names[rng.choice(len(names), p=shares / shares.sum())]
        turns = (ask_about_context(family, tokenizer, rng, held_out, longest) if family in ("value", "label")
                 else ask_about_name(family, rng, held_out))
        yield [{"role": role, "content": content} for turn in turns
               for role, content in zip(("user", "assistant"), turn, strict=True)]


def builtin_documents(tokenizer: Tokenizer, config: SftConfig, seq_len: int) -> Iterator[Document]:
    names, longest = families(tokenizer), min(1024, seq_len // 2)
    conversations = builtin_conversations(tokenizer, config.seed, names, longest)
    return (encode_chat(tokenizer, messages, config.template) for messages in conversations)


@torch.no_grad()
def score_answers(model: Transformer, tokenizer: Tokenizer, template: str, n: int,
                  seed: int) -> list[dict[str, Any]]:
    """Held-out questions, one row a family: the share of first answers that greedy decoding would give.

    A summary is free text, so there it is the share of tokens foreseen. Rows are as in eval.py's results.
    """
    rows = []
    for name in families(tokenizer):
        right: list[bool] = []
        longest = 0
        for messages in islice(builtin_conversations(tokenizer, seed, [name], 1024, held_out=True), n):
            document = encode_chat(tokenizer, messages[:2], template)
            ids = torch.from_numpy(document.input_ids.astype(np.int64)).to(model.embed_tokens.weight.device)
            guesses = model.logits(ids, (len(ids),))[:-1].argmax(dim=-1)
            hits = (guesses == ids[1:])[torch.from_numpy(document.loss_mask)[1:]].tolist()
            right += hits if name == "summary" else [all(hits)]
            longest = max(longest, len(ids))
        low, high = wilson_interval(sum(right), len(right))
        rows.append({"task": f"chat_{name}", "length": longest, "category": "chat", "n": len(right),
                     "score": sum(right) / len(right), "low": low, "high": high,
                     "chance": 0.5 if name == "kind" else 0.0, "by_depth": [], "predictions": []})
    return rows


# --- 4. Long conversations, made up from long documents (A.5) ---------------------------------------
#
# Question answering puts a question about one chunk to the whole document; RAG hands over that chunk among
# others of the document, in random order; summarization asks for a summary of summaries of its parts. What we
# have of each is {"document": "", "pairs": [{"question": "", "answer": "", "chunk": ""}], "summary": ""}.

KINDS = {"qa": 0.4, "rag": 0.3, "summary": 0.3}  # of the synthetic tokens (section 5)
INSTRUCTIONS = ("Use the text to answer the question.", "Answer the question with what the text says.",
                "Here is a text, and a question about it.", "Read the text below, then reply.")
LAYOUTS = ("{instruction}\n\n{text}\n\nQuestion: {question}", "{instruction}\n\n{text}\n\n{question}",
           "{instruction}\n\n--- text begins ---\n{text}\n--- text ends ---\n\nQuestion: {question}",
           "{instruction} Question: {question}\n\n{text}", "{instruction}\n\n{question}\n\n{text}")
SUMMARY_QUESTION = "What is this text about? Give its main points."
WRITE_PAIR = """Below is a passage of a longer work. Write one question about it, and the answer.
(1) Only the passage should answer the question, and a thoughtful reader of the work should want to ask it.
(2) Both must make sense to someone who has the whole work, but was never shown the passage: don't mention it.
(3) Keep the answer short, and quote the work where that supports it.
--- passage begins ---
{chunk}
--- passage ends ---
First reason about the passage. Use this form:
Reasoning: the passage is about ...
Question: ...
Answer: ..."""
WRITE_SUMMARY = "Summarize this in a few sentences:\n\n{chunk}"


def write_source(chunks: list[str], rng: np.random.Generator, ask: Callable[[str], str]) -> dict[str, Any]:
    """Let a model write a pair about a random chunk, and a summary of summaries (Table 16, section 5)."""
    chunk = chunks[int(rng.integers(len(chunks)))]
    reply = ask(WRITE_PAIR.format(chunk=chunk))
    found = re.search(r"Question:\s*(\S.*?)\s*Answer:\s*(\S.*)", reply, re.DOTALL)
    pairs = [{"question": found[1], "answer": found[2].strip(), "chunk": chunk}] if found else []
    notes = [ask(WRITE_SUMMARY.format(chunk=chunk)) for chunk in chunks]
    while len(notes) > 1:
        parts = ["\n\n".join(notes[i:i + 4]) for i in range(0, len(notes), 4)]
        notes = [ask(WRITE_SUMMARY.format(chunk=part)) for part in parts]
    return {"document": "".join(chunks), "pairs": pairs, "summary": notes[0].strip()}


def write_sources(folder: Path, tokenizer: Tokenizer, template: str, seq_len: int, n: int,
                  seed: int) -> Iterator[dict[str, Any]]:
    """Sources about `n` long embedded documents, written by the model in `folder`."""
    model, rng, size = load_pretrained(folder), np.random.default_rng(seed), max(64, min(1024, seq_len // 8))
    end = find_template(template).end

    def ask(question: str) -> str:
        prompt = encode_chat(tokenizer, [{"role": "user", "content": question}], template, answer_next=True)
        ids = generate(model, prompt.input_ids.tolist(), 256, [tokenizer.special_id(end)])
        return tokenizer.decode(ids).removesuffix(end)

    documents = chain(data.textbooks(tokenizer, seed), data.code_repos(tokenizer, seed))
    long = (d.input_ids[1:1 + seq_len * 3 // 4] for d in documents if len(d) > seq_len * 3 // 4)
    for ids in tqdm(islice(long, n), f"{folder.name} writes", n, unit="document", disable=None):
        chunks = [tokenizer.decode(ids[i:i + size]) for i in range(0, len(ids), size)]
        yield write_source(chunks, rng, ask)


def synthetic_documents(sources: Iterable[dict[str, Any]], tokenizer: Tokenizer, template: str, seq_len: int,
                        seed: int) -> Iterator[Document]:
    """Long conversations without end, none longer than `seq_len`, in the shares of KINDS.

    A cut one would lose its answer, so what is left of a sequence is filled with untrained tokens. Raises
    ValueError if nothing fits.
    """
    rng, sources = np.random.default_rng(seed), list(sources)
    pairs = [(source["document"], pair.get("chunk", ""), pair.get("question", ""), pair.get("answer", ""))
             for source in sources for pair in source.get("pairs", [])]
    summaries = [(source["document"], "", SUMMARY_QUESTION, source["summary"])
                 for source in sources if source.get("summary")]
    items = {"qa": pairs, "rag": pairs, "summary": summaries}
    spent, room = dict.fromkeys(KINDS, 0.0), seq_len
    while spent := {kind: tokens for kind, tokens in spent.items() if items[kind]}:
        kind = min(spent, key=spent.__getitem__)
        item = items[kind][int(rng.integers(len(items[kind])))]
        document = long_conversation(tokenizer, rng, template, seq_len, kind == "rag", *item)
        if document is None:
            items[kind].remove(item)
            continue
        if len(document) > room:
            yield Document(np.zeros(room, np.uint32), np.zeros(room, bool))
            room = seq_len
        yield document
        room = room - len(document) or seq_len
        spent[kind] += len(document) / KINDS[kind]
    raise ValueError(f"the synthetic sources have no pair and no summary that fits into {seq_len:,} tokens; "
                     "choose a longer --seq, give --synthetic a file that has some, or take a --writer that "
                     "keeps to the form it is asked for")


def read_sources(path: str) -> Iterator[dict[str, Any]]:
    """What is known of documents, from a file. Raises ValueError for a row of another form."""
    for where, row in read_rows(path):
        texts = [row.get("document"), row.get("summary", "")] if isinstance(row, dict) else [None]
        pairs = row.get("pairs", []) if isinstance(row, dict) else []
        texts += [pair.get(key, "") for pair in pairs for key in ("question", "answer", "chunk")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where} needs 'document', a text, with 'pairs' of 'question' and 'answer', "
                             "or a 'summary'")
        yield row


def long_conversation(tokenizer: Tokenizer, rng: np.random.Generator, template: str, seq_len: int, rag: bool,
                      text: str, chunk: str, question: str, answer: str) -> Document | None:
    """One question to a text, within `seq_len` tokens with its answer; None if the chunk is longer."""
    frame = {"instruction": INSTRUCTIONS[int(rng.integers(len(INSTRUCTIONS)))], "question": question}
    layout = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    front, back = (tokenizer.encode(part.format(**frame)) for part in layout.split("{text}"))

    def conversation(*context: np.ndarray) -> Document:
        return encode_chat(tokenizer, [{"role": "user", "content": np.concatenate((front, *context, back))},
                                       {"role": "assistant", "content": answer}], template)

    before, gold, after = (tokenizer.encode(part) for part in
                           (text.partition(chunk) if chunk and chunk in text else ("", text, "")))
    spare = seq_len - len(conversation(gold))
    if spare < 0:
        return None
    if not rag:  # a window of the text, the chunk at a random depth in it
        n = min(len(before), max(spare - len(after), int(rng.integers(spare + 1))))
        return conversation(before[len(before) - n:], gold, after[:spare - n])
    gap, rest = tokenizer.encode("\n\n"), np.concatenate((before, after))
    others = [rest[i:i + len(gold)] for i in range(0, len(rest) - len(gold) + 1, len(gold))]
    found = [gold, *(others[i] for i in rng.permutation(len(others))[:spare // (len(gold) + len(gap))])]
    order = rng.permutation(len(found))
    return conversation(*(part for i in order for part in (found[i], gap if i != order[-1] else gap[:0])))


# --- 5. The stage -----------------------------------------------------------------------------------

STAGES = {  # stages like those of train.RECIPES; the RoPE base stays the model's
    # What 8B parameters keep by themselves, 140,000 must rehearse (docs/LOG.md): a third is long recall.
    "tiny": Stage("sft", 16_384, None, {"chat": 0.67, "recall-16k": 0.33}, tokens=210 * 16_384,
                  batch_tokens=16_384, lr=3e-3, min_lr=3e-4, warmup=0.05),
    "prolong": Stage("sft", 65_536, None, {"chat": 1.0}, tokens=2**30, batch_tokens=4 * 2**20, lr=2e-5,
                     min_lr=2e-6, warmup=0.05),  # Table 9
}


@dataclass(frozen=True)
class SftConfig(RunConfig):
    recipe: str = option("tiny", f"one of {', '.join(STAGES)}: lengths, rates and tokens")
    data: str = option("builtin", "conversations: builtin, a .jsonl or .parquet file, or hub NAME[:SPLIT]")
    template: str = option("llama3", f"one of {', '.join(CHAT_TEMPLATES)}")
    on_bad: str = option("stop", "at a damaged conversation: stop or skip")
    seq: int | None = option(None, "tokens of a packed sequence", parse_length)
    replay: float | None = option(None, "share of tokens in recall documents (default: the recipe's)", float)
    synthetic_share: float = option(0.0, "share of tokens in synthetic long conversations", float)
    synthetic: str = option("", ".jsonl of documents, pairs and summaries (default: the model writes them)")
    writer: str = option("", "model folder that writes pairs and summaries (default: --init)")
    documents: int = option(16, "embedded documents that the writer is asked about", parse_length)
    chat: str = option("", "talk to the model in this folder instead of training")
    max_new_tokens: int = option(512, "longest answer in --chat", parse_length)


def stage_of(config: SftConfig) -> Stage:
    """The recipe's stage with the command's changes. Raises ValueError for what cannot be."""
    if config.recipe not in STAGES:
        raise ValueError(f"recipe {config.recipe!r} is unknown; choose one of {', '.join(STAGES)}")
    stage = STAGES[config.recipe]
    if config.seq:
        stage = train.stage_at_length(stage, config.seq, head_dim=2)  # no RoPE base to scale here
    recall = f"recall-{data.format_length(stage.seq_len)}"
    replay = stage.mixture.get(recall, 0.0) if config.replay is None else config.replay
    share = config.synthetic_share
    mixture = {"chat": 1 - replay - share, "synthetic": share, recall: replay}
    if not all(0 <= part <= 1 for part in mixture.values()):
        raise ValueError(f"synthetic_share={share} and replay={replay} must be from 0 to 1, their sum too")
    mixture = {name: part for name, part in mixture.items() if part}
    return train.scheduled(replace(stage, mixture=mixture), config)


def pack_conversations(run: Run, stage: Stage, config: SftConfig, base: Path) -> Path:
    """Pack what the stage will draw into the run's folder, once, and say what became of it."""
    root, tokenizer, read = run.folder / "data" / stage.name, run.tokenizer, ChatReport()
    for name, share in stage.mixture.items() if run.parallel.main else ():
        if name in ("chat", "synthetic") and not (root / name).exists():
            documents = (
                make_synthetic(config, stage.seq_len, tokenizer, base, root) if name == "synthetic" else
                builtin_documents(tokenizer, config, stage.seq_len) if config.data == "builtin" else
                chat_documents(read_rows(config.data), tokenizer, config.template, config.on_bad, read))
            report, wanted = PackReport(), math.ceil(stage.tokens / stage.seq_len * share) + 1
            sequences = islice(data.pack_sft(documents, stage.seq_len, report), wanted)
            data.write_packed(root / name, sequences, tokenizer, stage.seq_len, name, config.seed, report)
            run.print0(f"{name}: {report.documents_in:,} conversations, {report.tokens_in:,} tokens, of which "
                    f"{report.tokens_dropped:,} were cut off")
    if run.parallel.main:
        train.pack_domains(stage, root, tokenizer, config.seed)  # what is left: recall
    if read.read:
        run.print0(f"{config.data}: {read.read:,} conversations read, left out {read.without_answer:,} without "
                f"an answer and {len(read.bad):,} damaged" + "".join(f"\n  {what}" for what in read.bad[:5]))
    dist.barrier()
    return root


def make_synthetic(config: SftConfig, seq_len: int, tokenizer: Tokenizer, base: Path,
                   folder: Path) -> Iterator[Document]:
    path = Path(config.synthetic or folder / "synthetic.jsonl")
    if not config.synthetic:  # written down, so that another run can take it as --synthetic
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            for source in write_sources(Path(config.writer or base), tokenizer, config.template, seq_len,
                                        config.documents, config.seed):
                file.write(json.dumps(source) + "\n")
    return synthetic_documents(read_sources(str(path)), tokenizer, config.template, seq_len, config.seed)


def fine_tune(config: SftConfig) -> Path:
    """Evaluate, fine-tune, evaluate again; return the run folder."""
    config = train.config_to_resume(config) if config.resume else config
    source, state = train.initial_weights(config)
    base, _ = train.initial_weights(replace(config, resume=""))
    if source is None or base is None:
        raise ValueError("--init is missing: name the model to fine-tune, as in --init runs/tiny")
    stage, done = stage_of(config), []  # type: tuple[Stage, list[dict[str, Any]]]
    model = empty_pretrained(source, torch.float32)
    if stage.seq_len > model.config.max_seq_len:
        raise ValueError(f"sequences of {stage.seq_len:,} tokens are longer than the model's context of "
                         f"{model.config.max_seq_len:,}; choose a --seq within it")
    resumed = state if config.resume else None  # else Adam begins anew, whatever the source has (Table 9)
    with train.start_run(config, "runs/sft", model, [stage], source, resumed) as run:
        end = run.tokenizer.special_id(find_template(config.template).end)
        model.config = replace(model.config, eos_token_id=end)  # where any library's generation should stop,
        model.files.pop("generation_config.json", None)  # also where the source said otherwise
        model.files["chat_template.jinja"] = find_template(config.template).jinja.encode()

        def answers(model: Transformer) -> list[dict[str, Any]]:
            return score_answers(model, run.tokenizer, config.template, config.samples, config.seed)

        if config.eval:
            train.evaluate_checkpoint(run, "before", base, done, answers)
        packed = pack_conversations(run, stage, config, base)
        train.run_stage(run, stage, packed, resumed)
        if config.eval:
            train.evaluate_checkpoint(run, stage.name, run.checkpoint(stage, stage.steps), done, answers)
    return run.folder


# --- 6. Talk to it ----------------------------------------------------------------------------------


class Conversation:
    """A model that remembers what was said: each turn reads only what is new, the rest is in its KV cache."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: str) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.form = find_template(template)
        self.stop = tokenizer.special_id(self.form.end)
        self.cache, self.owed = KVCache(), ""  # owed: what ends the last turn, as far as it is not written

    def ask(self, text: str, max_new_tokens: int) -> Iterator[int]:
        """The answer's tokens, as they come; whoever stops listening stops the answer, between two tokens."""
        turn = encode_chat(self.tokenizer, [{"role": "user", "content": text}], self.template, True,
                           begin=not self.cache.length)
        prompt = [*_special(self.tokenizer, self.owed), *turn.input_ids.tolist()]
        self.owed = self.form.end + self.form.after
        for token in stream(self.model, prompt, max_new_tokens, [self.stop], cache=self.cache):
            self.owed = ("" if token == self.stop else self.form.end) + self.form.after
            yield token


def chat(config: SftConfig) -> None:
    """A conversation on the terminal. Ctrl-C stops an answer; between answers it leaves, like Ctrl-D."""
    folder = train.initial_weights(RunConfig(init=config.chat))[0] or Path(config.chat)
    model, tokenizer = load_pretrained(folder), data.tokenizer_for(folder, config.tokenizer)
    talk, answering = Conversation(model, tokenizer, config.template), [False]

    def on_interrupt(*_: Any) -> None:
        if not answering[0]:  # a second time, or there is nothing to stop
            raise KeyboardInterrupt
        answering[0] = False

    signal.signal(signal.SIGINT, on_interrupt)
    print(f"{folder}: Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            text = input("> ")
            if talk.cache.length + 4 * len(text) > model.config.max_seq_len:
                print(f"({model.config.max_seq_len:,} tokens are full: a new conversation)", file=sys.stderr)
                talk = Conversation(model, tokenizer, config.template)
            utf8, count, begin = codecs.getincrementaldecoder("utf-8")("replace"), 0, time.perf_counter()
            answering[0] = True
            for token in talk.ask(text, config.max_new_tokens):
                count += 1
                if token != talk.stop:
                    piece = tokenizer.encoding.decode_single_token_bytes(token)
                    print(utf8.decode(piece), end="", flush=True)
                if not answering[0]:
                    break
            answering[0] = False
            print(f"\n({count} tokens, {count / (time.perf_counter() - begin):.0f} tok/s)", file=sys.stderr)


def main() -> None:
    config = data.parse_cli(SftConfig, __doc__)
    train.run_and_exit("sft.py", lambda: chat(config) if config.chat else fine_tune(config))


if __name__ == "__main__":
    data.run_main(main)
