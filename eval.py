"""Evaluation: what a model can still do as its context grows.

Perplexity hardly notices whether a model finds one line in 16,000 tokens. So the paper measures
abilities (2410.02660, section 2): recall, re-ranking of passages, learning from examples (ICL), ...
A task makes contexts of the length asked for, and questions about them:

    context                                          question                       answer  depth
    {"58c1..": "f90a..", "07be..": "4d21..", ...}    Key: 07be.. Its value:         4d21..    0.2
    <begin> import os ~QX7KA def main(): ~CPLM3 ...  ?C                             PLM3      0.7

The first is for any model. The second is the same task in special tokens of the tokenizer "bytes",
for models of a few layers. The depth says where in the context the answer stands, from 0 to 1.
Lengths count the model's own tokens. All code in contexts is code that training never sees.

    python eval.py --model runs/tiny/checkpoints/ultra-56 --tasks recall,icl --lengths 1k,4k
    python eval.py --model DIR --tasks text --lengths 8k,32k --samples 100
    python eval.py --compare runs/a/eval/long-700.json,runs/b/eval/long-700.json

Text tasks follow HELMET (2410.02694) and RULER (2404.06654) in words of our own: their scores
compare models, but not with the tables in those papers.

Sources: sections 2.1-2.3, A.1, Table 13.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import data
import model as llama
from data import Tokenizer, load_tokenizer
from model import KVCache, Parallel, Transformer, generate, read, stream
from support import fitting, scores, tasks, toy
from support.cli import choose, format_length, option, parse_length, print_timed, warn
from support.files import open_record, write_json
from support.report import compare_files, draw_scores
from support.scores import cut_around, format_table, interval

# --- 1. What a task is ------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What follows the context, and the answers wanted then."""

    prompt_ids: np.ndarray
    answers: tuple[str, ...]
    depth: float | None = None  # where in the context the first answer stands
    chance: float = 0.0  # the score of a guess
    relevance: dict[str, int] | None = None  # re-ranking: how well each passage fits the query


@dataclass(frozen=True)
class Example:
    """A context, independent questions about it, and how many tokens an answer may have."""

    context_ids: np.ndarray
    questions: tuple[Question, ...]
    budget: int
    one_line: bool = False  # an answer ends with its line


@dataclass(frozen=True)
class Task:
    """A way to make examples of a given length, and a score for the answers."""

    examples: Callable[[Tokenizer, int, int, int, int], list[Example]]
    #                  (tokenizer, length, contexts, questions about each, seed)
    score: Callable[[str, Question], float]  # of what a model wrote, 0 to 1
    category: str  # we average over categories, not over tasks (section 2.1)
    shared: int = 7  # at most so many questions about a context; `exact` tasks: just so many
    exact: bool = False  # right only if greedy decoding writes the answer token by token
    only_length: int | None = None  # of a task that has one length


# --- 2. Recall and ICL in special tokens ------------------------------------------------
#
# support/toy.py draws the documents that the tiny recipe trains on. Here the haystack is
# held-out code, and we ask each question on its own.


def recall_examples(tokenizer: Tokenizer, length: int, n: int, questions: int, seed: int,
                    bare: bool = False) -> list[Example]:
    """16 pairs scattered in held-out code, or in blanks if `bare`, and a question about each."""
    rng = np.random.default_rng((seed, length, n))
    room = haystack_room(tokenizer, length)
    haystack = np.full((n, room), toy.BLANK, np.uint32)
    if not bare:
        haystack = data.haystack_windows(tokenizer, rng, n, room, seed, held_out=True)
    return ask_for_each(tokenizer, rng, haystack)


def haystack_room(tokenizer: Tokenizer, length: int, n_pairs: int = toy.N_PAIRS) -> int:
    """How many tokens are left beside begin of text, the pairs, a question and its answer."""
    toy.check_symbols(tokenizer.specials, "recall")
    needed = 1 + (n_pairs + 1) * toy.PAIR_LEN
    if length < needed:
        raise ValueError(f"recall of {n_pairs} pairs needs {needed} tokens, got {length}")
    return length - needed


def ask_for_each(tokenizer: Tokenizer, rng: np.random.Generator, haystack: np.ndarray,
                 n_pairs: int = toy.N_PAIRS) -> list[Example]:
    """Scatter pairs in each row of a haystack (n, room), and ask for every pair."""
    pairs = toy.recall_pairs(rng, len(haystack), n_pairs)  # (n, n_pairs, 1 + VALUE_LEN)
    contexts, starts = toy.scatter_pairs(rng, pairs, haystack)
    chance = len(toy.SYMBOLS) ** -toy.VALUE_LEN
    examples = []
    for i, context in enumerate(contexts):
        questions = []
        for pair, start in zip(pairs[i], starts[i], strict=True):
            prompt, answer = np.array([toy.QUESTION, pair[0]]), tokenizer.decode(pair[1:])
            questions.append(Question(prompt, (answer,), float(start / len(context)), chance))
        ids = np.concatenate(([tokenizer.bos_id], context))
        examples.append(Example(ids, tuple(questions), toy.VALUE_LEN))
    return examples


def icl_examples(tokenizer: Tokenizer, length: int, n: int, questions: int,
                 seed: int) -> list[Example]:
    """As many labelled lines as fit; the questions are new lines, to be labelled like those."""
    n_lines = (length - 1) // toy.ICL_LINE - 1
    n_topics = len(toy.TOPICS)
    toy.check_symbols(tokenizer.specials, "icl")
    if n_lines < n_topics:
        raise ValueError(f"icl needs room for {n_topics} lines, got {length} tokens")
    rng = np.random.default_rng((seed, length, n))
    examples = []
    for lines in toy.icl_lines(rng, n, n_lines + questions):
        ids = np.concatenate(([tokenizer.bos_id], lines[:n_lines].reshape(-1)))
        asked = [Question(line[:2], (tokenizer.decode(line[2:]),), chance=1 / n_topics)
                 for line in lines[n_lines:]]
        examples.append(Example(ids, tuple(asked), budget=1))
    return examples


# --- 3. Tasks in text -------------------------------------------------------------------
#
# support/tasks.py draws text, support/fitting.py makes it tokens that fill the length, and
# support/scores.py scores answers as HELMET and RULER do.


def text_task(name: str, draw: Callable[..., tasks.TextExample], rule: scores.Rule, category: str,
              **options: Any) -> Task:
    """A task that `draw` draws with these options."""
    draw = partial(draw, **options)

    def examples(tokenizer: Tokenizer, length: int, n: int, questions: int,
                 seed: int) -> list[Example]:
        made = []
        for i, depths in enumerate(fitting.spread_depths(n, questions)):
            rng = partial(data.generator, seed, name, length, i)
            made.append(make_example(fitting.fit(name, draw, rng, depths, tokenizer, length, rule)))
        return made

    return Task(examples, rule.score, category)


def make_example(encoded: fitting.Encoded) -> Example:
    questions = tuple(Question(*fields) for fields in encoded.questions)
    return Example(encoded.context_ids, questions, *encoded.rule[1:])


def file_task(path: Path) -> Task:
    """A task from a JSONL file, whose lines are asked as they are."""
    rule, rows = fitting.read_prompts(path)

    def examples(tokenizer: Tokenizer, length: int, n: int, questions: int,
                 seed: int) -> list[Example]:
        lines = sorted(data.generator(seed, path.name).permutation(len(rows))[:n].tolist())
        return [make_example(fitting.encode_prompt(tokenizer, rows[i], rule)) for i in lines]

    return Task(examples, rule.score, "file", shared=1, only_length=0)


@cache
def code_lines() -> list[str]:
    """Lines of held-out code, to hide needles in."""
    tokenizer = load_tokenizer()
    lines = tokenizer.decode(data.haystack_text(tokenizer, 0, True)).split("\n")
    return [line for line in lines if line.strip() and "<|" not in line and "\ufffd" not in line]


_needles = partial(text_task, draw=tasks.draw_needles, rule=scores.NEEDLES, category="ruler")
TASKS: dict[str, Task] = {
    "recall_bare": Task(partial(recall_examples, bare=True), scores.same, "recall", toy.N_PAIRS,
                        exact=True, only_length=160),
    "recall": Task(recall_examples, scores.same, "recall", toy.N_PAIRS, exact=True),
    "icl": Task(icl_examples, scores.same, "icl", 26, exact=True),
    "json_kv": text_task("json_kv", tasks.draw_json_kv, scores.RECALL, "recall"),
    "needle": _needles("needle", haystack=code_lines),
    "needle_noise": _needles("needle_noise", haystack=lambda: [tasks.FILLER.strip()]),
    "multikey_1": _needles("multikey_1", haystack=code_lines, n_keys=4),
    "multivalue": _needles("multivalue", haystack=code_lines, n_values=4),
    "multiquery": _needles("multiquery", haystack=code_lines, n_queries=4),
    "icl_6": text_task("icl_6", tasks.draw_icl, scores.ICL, "icl"),
    "icl_77": text_task("icl_77", tasks.draw_icl, scores.ICL, "icl", classes=77),
    "rerank": text_task("rerank", tasks.draw_rerank, scores.RERANK, "rerank"),
}
_tokens = [name for name, task in TASKS.items() if task.exact]
_text = [name for name in TASKS if name not in _tokens]
GROUPS = {"tokens": _tokens, "text": _text, "few": ["json_kv", "needle", "icl_6", "rerank"],
          "all": list(TASKS)}


def find_task(name: str) -> Task:
    """A task by its name, or from a file."""
    return file_task(Path(name)) if name.endswith(".jsonl") else choose("task", name, TASKS)


# --- 4. Asking the model ----------------------------------------------------------------


def answer_questions(model: Transformer, tokenizer: Tokenizer, example: Example, exact: bool,
                     parallel: Parallel | None = None) -> list[str]:
    """What the model writes for each question.

    The model reads the context once. Each question continues from its KV cache, then cut back.

    With `exact` we feed the right answer, and take the most likely token at each position. If all
    match, greedy decoding writes just this answer.
    """
    cache = KVCache()
    if not read(model, example.context_ids.tolist(), cache, parallel=parallel).isfinite().all():
        raise ValueError("the logits are not finite; try --dtype float32")
    context_length, written = cache.length, []
    stops = line_ends(tokenizer) if example.one_line else {tokenizer.eos_id}
    for question in example.questions:
        cache.length = context_length
        prompt = question.prompt_ids.tolist()
        if exact:
            answer = tokenizer.encode_with_specials(question.answers[0]).tolist()
            logits = read(model, prompt + answer[:-1], cache, last=len(answer), parallel=parallel)
            ids = logits.argmax(dim=-1).tolist()
        else:
            ids = generate(model, prompt, example.budget, stops, cache=cache, parallel=parallel)
        ids = [i for i in ids if i < tokenizer.vocab_size and i != tokenizer.eos_id]
        written.append(tokenizer.decode(ids))
    return written


@cache
def line_ends(tokenizer: Tokenizer) -> set[int]:
    """End of text, and all tokens with a line break."""
    ranks = tokenizer.encoding._mergeable_ranks
    return {tokenizer.eos_id} | {i for token, i in ranks.items() if b"\n" in token}


def run_task(model: Transformer, tokenizer: Tokenizer, task: str, length: int, n: int,
             seed: int = 0, progress: Callable[[int], Any] = lambda n: None,
             per_context: int = 1, parallel: Parallel | None = None,
             record: dict[tuple[Any, ...], Any] | None = None) -> dict[str, Any]:
    """Score one task at one length over at least `n` questions: a row of the results.

    We skip contexts whose predictions are in `record` already, and add the others to it.
    """
    chosen, record = find_task(task), {} if record is None else record
    questions = questions_each(chosen, length, per_context)
    examples = chosen.examples(tokenizer, length, -(-n // questions), questions, seed)
    if not length:  # of a file's ready prompts
        length = max(len(e.context_ids) + len(e.questions[0].prompt_ids) + e.budget
                     for e in examples)
    contexts = []
    for i, example in enumerate(examples):
        if (task, length, i) not in record:
            answers = answer_questions(model, tokenizer, example, chosen.exact, parallel)
            record[task, length, i] = [
                {"context": i, "around": tokenizer.decode(cut_around(example.context_ids, q.depth)),
                 "prompt": tokenizer.decode(q.prompt_ids), "answers": list(q.answers),
                 "written": written, "score": chosen.score(written, q), "chance": q.chance,
                 "depth": q.depth} for q, written in zip(example.questions, answers, strict=True)]
        contexts.append(record[task, length, i])
        progress(length)
    predictions = [p for context in contexts for p in context]
    low, high = interval([[p["score"] for p in context] for context in contexts])
    return {"task": "/".join(Path(task).with_suffix("").parts[-2:]), "length": length,
            "category": chosen.category, "n": len(predictions),
            "score": float(np.mean([p["score"] for p in predictions])), "low": low, "high": high,
            "chance": float(np.mean([p["chance"] for p in predictions])),
            "by_depth": scores.by_depth(predictions), "predictions": predictions}


def questions_each(task: Task, length: int, per_context: int) -> int:
    """How many questions share a context: in text `per_context`, but at most one per 256 tokens."""
    return task.shared if task.exact else max(1, min(per_context, task.shared, length // 256))


# --- 5. Bits per byte -------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: Transformer, tokenizer: Tokenizer, length: int, n: int, seed: int = 0,
                  parallel: Parallel | None = None) -> list[dict[str, Any]]:
    """Bits per byte of held-out code: how well a model predicts after so much context.

    Bytes, because tokenizers cut one text into different numbers of tokens. We sum the loss of `n`
    documents (1,024 at most) over positions 0-256, 256-512, ... and the last quarter. "short" are
    documents of 256 tokens. Source: Figure 1: this number may improve while abilities do not.
    """
    device = model.embed_tokens.weight.device
    rank, ranks = (parallel.sp_rank, parallel.sp_size) if parallel else (0, 1)
    edges = [0, *(2**i for i in range(8, 31) if 2**i < length), length]
    spans = [(f"{a and format_length(a)}-{format_length(b)}", a, b) for a, b in pairwise(edges)]
    spans.append(("last 1/4", length * 3 // 4, length))
    few, rows = min(length, 256), []
    for size, count, parts in ((length, n, spans), (few, n * length // few, [("short", 0, few)])):
        bits, n_bytes = torch.zeros(len(parts), dtype=torch.float64), [0] * len(parts)
        documents = data.pack_long(data.code_repos(tokenizer, seed, held_out=True), size)
        for document in islice(documents, min(count, 1024)):
            batch = pad_document(document.input_ids, np.ones(size, bool), ranks)
            ids, labels = (x.to(device) for x in batch.shard(rank, ranks))
            hidden = model(ids, batch.doc_lens, parallel)  # (T,) -> (T, C)
            position = torch.arange(1, len(ids) + 1, device=device) + rank * len(ids)  # of labels
            nats = llama.chunked_cross_entropy(hidden, model.lm_head.weight, labels)
            for i, (_, begin, end) in enumerate(parts):
                inside = (begin <= position) & (position < end)
                bits[i] += float(nats[inside].sum(dtype=torch.float64)) / math.log(2)
                text = tokenizer.decode(document.input_ids[max(begin, 1):end])
                n_bytes[i] += len(text.encode(errors="replace"))
        if parallel:
            bits = parallel.all_sum(bits).cpu() / parallel.dp_size
        for (name, begin, end), bit, byte in zip(parts, bits.tolist(), n_bytes, strict=True):
            rows.append({"name": name, "from": begin, "to": end, "bits_per_byte": bit / byte,
                         "bytes": byte})
    return rows


def pad_document(ids: np.ndarray, mask: np.ndarray, ranks: int) -> data.Batch:
    """A document as a batch. A second, masked document makes its length a multiple of `ranks`."""
    spare = -len(ids) % ranks
    doc_lens = (len(ids), spare) if spare else (len(ids),)
    padded = data.PackedSequence(np.pad(ids, (0, spare)), doc_lens, np.pad(mask, (0, spare)))
    return data.make_batch([padded])


@torch.no_grad()
def quick_scores(model: Transformer, tokenizer: Tokenizer, length: int, parallel: Parallel,
                 n: int = 2, seed: int = 0) -> dict[str, float]:
    """Recall and ICL during training: the share of right answers, about `n` contexts a dp rank.

    One forward pass reads a context with all its questions and answers, as in training. So a
    question also sees those before it. All ranks must call it.
    """
    found, device = {}, parallel.device
    for name in ("recall", "icl") if tokenizer.spec == "bytes" else ("json_kv", "icl_6"):
        task = TASKS[name]
        questions = questions_each(task, length, per_context=4)
        examples = task.examples(tokenizer, length, n * parallel.dp_size, questions, seed)
        wrong = torch.zeros(len(examples), questions)  # wrong tokens of each answer
        for i in range(parallel.dp_rank, len(examples), parallel.dp_size):
            text, answer_of = join_answers(tokenizer, examples[i], task.exact)
            batch = pad_document(text, answer_of >= 0, parallel.sp_size)
            ids, labels = batch.shard(parallel.sp_rank, parallel.sp_size)
            right = model.is_right(ids.to(device), labels.to(device), batch.doc_lens, parallel)
            missed = torch.where(~right.cpu() & (labels != data.IGNORE_INDEX))[0]
            for position in (missed + parallel.sp_rank * len(ids)).tolist():
                wrong[i, answer_of[position + 1]] += 1  # the label is the token after it
        all_right = parallel.all_sum(wrong) == 0
        found[f"{name}@{format_length(length)}"] = float(all_right.double().mean())
    return found


def join_answers(tokenizer: Tokenizer, example: Example,
                 exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Context, questions and answers in one row, and to which answer each token belongs, or -1."""
    ids, answer_of = [example.context_ids], [np.full(len(example.context_ids), -1)]
    for k, q in enumerate(example.questions):
        answer = tokenizer.encode_with_specials(q.answers[0] if exact else " " + q.answers[0])
        ids += [q.prompt_ids, answer]
        answer_of += [np.full(len(q.prompt_ids), -1), np.full(len(answer), k)]
    return np.concatenate(ids).astype(np.uint32), np.concatenate(answer_of)


# --- 6. A whole evaluation: every task at every length ----------------------------------


def length_or_0(text: str) -> int:
    return 0 if text == "0" else parse_length(text)


@dataclass(frozen=True)
class EvalConfig:
    model: str = option("", "folder of the model to evaluate")
    tasks: str = option("", "tasks or groups: tokens (for bytes), few (for others), text, all")
    lengths: str = option("", "as 2k,8k (default: for bytes 256 to 16k, else context / 4 and it)")
    samples: int | None = option(None, "questions a task and length (100; few: 16)", parse_length)
    per_context: int = option(4, "questions that may share a text context", parse_length)
    data: str = option("", "JSONL files in HELMET's or RULER's formats, with commas: more tasks")
    bpb_length: int = option(2048, "context of bits per byte; 0: none", length_or_0)
    dtype: str = option("", "float32, bfloat16 or float64 (default: as stored)")
    tokenizer: str = option("", "tokenizer (default: the model's own)")
    out: str = option("", "folder for results and figures (default: beside the model)")
    compare: str = option("", "instead: two results, A.json,B.json, to test against each other")
    seed: int = option(0, "seed of the questions", int)
    prompt: str = option("", "instead: continue the text in this file")
    max_new_tokens: int = option(128, "tokens to write after --prompt", parse_length)
    temperature: float = option(0.0, "0 writes the most likely token, above 0 draws one", float)


def plan_jobs(config: EvalConfig, tokenizer: Tokenizer,
              context: int = 2**16) -> list[tuple[str, int, int]]:
    """Every (task, length, questions), each drawn once, so that errors come at once.

    A group's tasks that have no room in a length are left out.
    """
    tiny, longest = tokenizer.spec == "bytes", min(context, 2**16)
    asked = config.tasks or ("" if config.data else "tokens" if tiny else "few")
    groups = [*asked.split(","), *config.data.split(",")]
    usual = "256,512,1k,2k,4k,8k,16k" if tiny else f"{longest // 4},{longest}"
    lengths = [parse_length(text) for text in (config.lengths or usual).split(",")]
    if max(lengths) > context:
        warn(f"lengths up to {max(lengths):,} are beyond the model's context of {context:,}")
    names = [name for group in groups if group for name in GROUPS.get(group, [group])]
    n, jobs = config.samples or (16 if "few" in groups else 100), []
    for name in dict.fromkeys(names):
        task = find_task(name)
        for length in lengths if task.only_length is None else [task.only_length]:
            questions = questions_each(task, length, config.per_context)
            try:
                task.examples(tokenizer, length, 1, questions, config.seed)
            except ValueError as error:
                if name in groups:
                    raise
                warn(f"left out: {error}")
                continue
            jobs.append((name, length, n))
    return jobs


def evaluate(model: Transformer, config: EvalConfig, name: str, parallel: Parallel | None = None,
             predictions: Path | None = None) -> dict[str, Any]:
    """Run all tasks at all lengths. Returns what eval/<name>.json holds.

    With a file for `predictions`, a stopped evaluation continues where it was.
    """
    tokenizer = data.tokenizer_for(config.model, config.tokenizer)
    jobs = plan_jobs(config, tokenizer, model.config.max_seq_len)
    settings = asdict(config) | {"tokenizer_fingerprint": tokenizer.fingerprint}
    times = [path.stat().st_mtime for path in Path(config.model).glob("*.safetensors")]
    record = open_record(predictions, settings | {"weights_of": max(times, default=0)}, parallel)
    total = sum(length * -(-n // questions_each(find_task(task), length, config.per_context))
                for task, length, n in jobs)
    main = parallel is None or parallel.main
    model.eval()
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"evaluate {name}", leave=False,
              disable=None if main else True) as bar:
        results = [run_task(model, tokenizer, task, length, n, config.seed,
                            bar.update, config.per_context, parallel, record)
                   for task, length, n in jobs]
    size = config.bpb_length
    bits = bits_per_byte(model, tokenizer, size, 16, config.seed, parallel) if size else []
    return {"model": name, "settings": settings, "results": results, "bits_per_byte": bits}


# --- 7. The command line ----------------------------------------------------------------


def continue_text(model: Transformer, config: EvalConfig) -> None:
    """Print how the model continues a file's text, and how fast."""
    tokenizer = data.tokenizer_for(config.model, config.tokenizer)
    try:
        text = Path(config.prompt).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt {config.prompt} is not UTF-8 text: {error}") from None
    ids = [*tokenizer.begin, *tokenizer.encode(text).tolist()]
    written = stream(model, ids, config.max_new_tokens, [tokenizer.eos_id], config.temperature,
                     config.seed)
    print_timed(tokenizer, written, tokenizer.eos_id, len(ids))


def main() -> None:
    config = data.parse_cli(EvalConfig, __doc__)
    if config.compare:
        return compare_files(config.compare, config.out)
    if not config.model:
        raise ValueError("--model is missing; name a folder, as runs/tiny/checkpoints/long-700")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}
    dtype = choose("--dtype", config.dtype, dtypes) if config.dtype else None
    folder, world = Path(config.model).resolve(), int(os.environ.get("WORLD_SIZE", 1))
    parallel = llama.init_parallel(world) if world > 1 else None  # all ranks share every text
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parallel.device if parallel else device
    model = llama.load_pretrained(folder, dtype=dtype, device=device)
    if config.prompt:
        return continue_text(model, config)
    out = Path(config.out or folder / "eval")
    predictions = out / f"{folder.name}.predictions.jsonl"
    evaluation = evaluate(model, config, folder.name, parallel, predictions)
    if parallel is None or parallel.main:
        write_json(out / f"{folder.name}.json", evaluation, indent=1)
        print(format_table([evaluation]))
        drawn = draw_scores([evaluation], out / f"{folder.name}.png")
        draw_scores([evaluation], out / f"{folder.name}-depth.png", by_depth=True)
        print(f"results in {out}" + ("" if drawn else "; no picture: install the `plots` extra"))
    if parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
