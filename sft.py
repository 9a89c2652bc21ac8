"""Fine-tuning: a long-context base model becomes one that answers.

A conversation is written in the form of the model's family, and only the answers are trained:

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nIs json.dumps a class?<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\nNo.<|eot_id|>
                                                   ^^^^^^^^^^^^^ loss mask: answer and end of turn

Conversations are short; we pack them end to end, and attention stays inside each. The paper finds
that short ones are enough: 8B parameters keep their long-context ability, and to replace even 1% by
long synthetic ones costs some of it (Table 8; experiments/synthetic.py writes such). Our 140,000
parameters forget more, so a third of the tiny stage's tokens are recall documents.

One sequence may hold 3 trained tokens and the next 500, so the loss must be the average over the
trained tokens of the whole step (A.3). train.train_step computes that for every stage: fine-tuning
is a stage like any other. This file makes its data and calls train.run_stage.

    python sft.py --init runs/tiny                      questions about the installed Python
    python sft.py --init runs/tiny --data mine.jsonl    "messages", or ShareGPT's "conversations"
    torchrun --nproc-per-node 8 sft.py --init DIR --data hub:HuggingFaceH4/ultrachat_200k:train_sft
    python sft.py --chat runs/sft
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import data
import train
from data import IGNORE_INDEX, Document, PackedSequence, PackReport, Tokenizer, option, parse_length
from model import KVCache, Transformer, empty_pretrained, load_pretrained, stream
from support import hf, installed, toy
from support.chats import Message, ask_about_context, read_chats
from support.cli import choose, print_tokens
from support.scores import wilson_interval
from support.texts import read_rows
from train import Run, RunConfig, Stage, usual_recipe

# --- 1. A conversation becomes a document -----------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
    """How a family of models writes a turn. "<|...|>" are special tokens."""

    begin: str  # before the first turn
    header: str
    gap: str  # line breaks between header and text
    end: str  # of a turn: trained in answers, and where generation stops
    after: str
    strip: bool  # remove the white space around a turn's text

    @property
    def jinja(self) -> str:
        """The same for transformers and vLLM, which read chat_template.jinja beside the weights."""
        text = "{{ message['content']" + (" | trim }}" if self.strip else " }}")
        header = self.header.format(role="{{ message['role'] }}")
        answer = self.header.format(role="assistant") + self.gap
        return (self.begin + "{% for message in messages %}"
                + header + self.gap + text + self.end + self.after + "{% endfor %}"
                + "{% if add_generation_prompt %}" + answer + "{% endif %}")


CHAT_TEMPLATES = {
    "llama3": ChatTemplate("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>",
                           "\n\n", "<|eot_id|>", "", strip=True),
    "chatml": ChatTemplate("", "<|im_start|>{role}", "\n", "<|im_end|>", "\n", strip=False),
}


def template_for(tokenizer: Tokenizer, folder: Path) -> str:
    """The family that a model's chat template shows, or without one its special tokens."""
    shown = hf.chat_template(folder) or tokenizer.specials
    for name, form in CHAT_TEMPLATES.items():
        if form.end in shown:
            return name
    raise ValueError(f"{folder} shows none of {', '.join(CHAT_TEMPLATES)}; name one by --template")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], template: str = "llama3",
                answer_next: bool = False) -> Document:
    """Encode a conversation, with a loss mask over the answers and their ends of turn.

    The ids are those of the family's own template. A message is plain text: "<|eot_id|>" in it is
    ten letters. `answer_next=True` adds the header of the answer that the model is to write.
    """
    form = choose("template", template, CHAT_TEMPLATES)
    ids: list[int] = []
    trained: list[bool] = []

    def add(part: np.ndarray, is_trained: bool = False) -> None:
        ids.extend(part.tolist())
        trained.extend([is_trained] * len(part))

    encode = tokenizer.encode_with_specials
    add(encode(form.begin))
    for message in messages:
        is_answer = message["role"] == "assistant" and message.get("train", True)
        gap, text = encode_text(tokenizer, form, message["content"])
        add(encode(form.header.format(role=message["role"])))
        add(gap)
        add(text, is_answer)
        add(encode(form.end), is_answer)
        add(encode(form.after))
    if answer_next:
        add(encode(form.header.format(role="assistant") + form.gap))
    return Document(np.array(ids, np.uint32), np.array(trained, bool))


def encode_text(tokenizer: Tokenizer, form: ChatTemplate,
                content: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode gap and text as one string, then split: a token with line breaks of both is gap."""
    if not isinstance(content, str):
        return tokenizer.encode(form.gap), content
    ids = tokenizer.encode(form.gap + (content.strip() if form.strip else content))
    n_gap, gap_bytes = 0, 0
    while gap_bytes < len(form.gap):
        gap_bytes += len(tokenizer.encoding.decode_single_token_bytes(int(ids[n_gap])))
        n_gap += 1
    return ids[:n_gap], ids[n_gap:]


# --- 2. Conversations -------------------------------------------------------------------
#
# support/chats.py reads conversations from files. Without a file we ask five kinds of question that
# every Python installation can answer:
#
#     kind      json.JSONDecoder: a class or a function?             class
#     package   json.JSONDecoder is in which package?                json
#     summary   What does json.dumps do?                             Serialize ``obj`` to a JSON ...
#     value     ~QX7KA def main(): ~CPLM3 ... The value of C?        ?CPLM3
#     label     ~A3~N7~X5~C3 ... The label of N?                     ~N7
#
# The last two are recall and ICL; ~, ? and A ... 7 are special tokens.

QUESTION_KINDS = {"kind": 0.25, "package": 0.4, "summary": 0.1, "value": 0.15, "label": 0.1}


def question_kinds(tokenizer: Tokenizer) -> list[str]:
    """The kinds that a tokenizer can write: only "bytes" has the symbols of the last two."""
    symbols = tokenizer.spec == "bytes"
    return [kind for kind in QUESTION_KINDS if symbols or kind not in ("value", "label")]


def builtin_conversations(tokenizer: Tokenizer, seed: int, kinds: Sequence[str], max_context: int,
                          held_out: bool = False) -> Iterator[list[Message]]:
    """Conversations without end, of the kinds named, in the shares of QUESTION_KINDS."""
    rng = np.random.default_rng((seed, held_out))
    shares = np.array([QUESTION_KINDS[kind] for kind in kinds])
    while True:
        kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
        if kind in ("value", "label"):
            window = partial(data.haystack_windows, tokenizer, rng, 1, seed=0, held_out=held_out)
            turns = list(ask_about_context(kind, rng, tokenizer.encode, window, max_context))
        else:
            turns = installed.ask_about_name(kind, rng, held_out)
        messages = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield messages


def score_answers(model: Transformer, tokenizer: Tokenizer, template: str, n: int,
                  seed: int) -> list[dict[str, Any]]:
    """Ask `n` held-out questions of each kind; return rows like eval.py's.

    The score is the share of answers that greedy decoding would give. A summary can be worded in
    many ways, so there we count the single tokens.
    """
    device, rows = model.embed_tokens.weight.device, []
    for kind in question_kinds(tokenizer):
        right: list[bool] = []
        conversations = builtin_conversations(tokenizer, seed, [kind], 1024, held_out=True)
        for messages in islice(conversations, n):
            document = encode_chat(tokenizer, messages[:2], template)
            sequence = PackedSequence(document.input_ids, (len(document),), document.loss_mask)
            batch = data.make_batch([sequence])
            ids, labels = batch.input_ids.to(device), batch.labels.to(device)
            is_right = model.is_right(ids, labels, batch.doc_lens)[labels != IGNORE_INDEX]
            right += is_right.tolist() if kind == "summary" else [bool(is_right.all())]
        low, high = wilson_interval(sum(right), len(right))
        rows.append({"task": f"chat_{kind}", "length": 1024, "category": "chat", "n": len(right),
                     "score": sum(right) / len(right), "low": low, "high": high,
                     "chance": 0.5 if kind == "kind" else 0.0, "by_depth": [], "predictions": []})
    return rows


# --- 3. The stage -----------------------------------------------------------------------

STAGES = {  # stages like those of train.RECIPES; the RoPE base stays the model's
    "tiny": Stage("sft", 16_384, None, {"chat": 0.67, "recall-16k": 0.33}, tokens=210 * 16_384,
                  batch_tokens=16_384, lr=3e-3, min_lr=3e-4, warmup=0.05),
    "prolong": Stage("sft", 65_536, None, {"chat": 1.0}, tokens=2**30, batch_tokens=4 * 2**20,
                     lr=2e-5, min_lr=2e-6, warmup=0.05),  # Table 9
}


@dataclass(frozen=True)
class SftConfig(RunConfig):
    recipe: str = option("", f"one of {', '.join(STAGES)} (default: as train.py)")
    data: str = option("builtin", "conversations: builtin, a file, or hub:NAME:SPLIT, a data set")
    mix: str = option("", "other mixture: chat=0.9,more.jsonl=0.1; `chat` is --data")
    template: str = option("", f"one of {', '.join(CHAT_TEMPLATES)} (default: the model's own)")
    on_bad: str = option("stop", "at a damaged conversation: stop or skip")
    seq: int | None = option(None, "tokens of a packed sequence", parse_length)
    chat: str = option("", "talk to the model in this folder instead of training")
    max_new_tokens: int = option(512, "longest answer in --chat", parse_length)


def stage_of(config: SftConfig, context: int) -> Stage:
    """The recipe's stage with the command's changes, within a context."""
    stage = choose("recipe", config.recipe, STAGES)
    seq_len = config.seq or min(stage.seq_len, context)
    if seq_len > context:
        raise ValueError(f"sequences of {seq_len:,} tokens are longer than the model's context of "
                         f"{context:,}; choose --seq within it")
    stage = train.stage_at_length(stage, seq_len, None)
    if config.mix:
        shares = data.parse_mixture(config.mix)
        mixture = {Path(name).name: share for name, share in shares.items()}
        if len(mixture) < len(shares):
            raise ValueError(f"--mix {config.mix} has two files of one name; rename one")
        stage = replace(stage, mixture=mixture)
    return train.scheduled(stage, config)


def conversations_of(source: str, tokenizer: Tokenizer, config: SftConfig, seq_len: int,
                     left_out: list[str]) -> Iterator[Document]:
    """The built-in conversations, or those of a file or a data set (hub:NAME:SPLIT)."""
    encode = partial(encode_chat, tokenizer, template=config.template)
    if source == "builtin":
        kinds, most = question_kinds(tokenizer), min(1024, seq_len // 2)
        return map(encode, builtin_conversations(tokenizer, config.seed, kinds, most))
    if source.startswith("hub:"):
        name, _, split = source[4:].partition(":")
        rows = read_rows(name, "hub", split=split or "train")
    else:
        rows = read_rows(source)
    return read_chats(rows, config.on_bad, left_out, encode, seq_len)


def pack_conversations(run: Run, stage: Stage, config: SftConfig) -> Path:
    """Pack what the stage will draw into the run's folder, and say what became of it."""
    root, seq_len = run.folder / "data" / stage.name, stage.seq_len
    sources = {"chat": config.data}
    for name in data.parse_mixture(config.mix) if config.mix else ():
        if name.endswith(".jsonl"):
            sources[Path(name).name] = name
    for name, share in stage.mixture.items() if run.parallel.main else ():
        if name not in sources or (root / name).exists():
            continue  # an embedded domain, or packed before this run was resumed
        left_out, packed = list[str](), PackReport()
        documents = conversations_of(sources[name], run.tokenizer, config, seq_len, left_out)
        drawn = stage.tokens / seq_len * share / sum(stage.mixture.values())
        if sources[name] == "builtin" and run.tokenizer.spec != "bytes":
            drawn = min(drawn, 2**20 / seq_len)  # a million tokens: its few names soon repeat
        sequences = islice(data.pack_sft(documents, seq_len, packed), math.ceil(drawn) + 1)
        data.write_packed(root / name, sequences, run.tokenizer, seq_len, name, config.seed, packed)
        run.print0(f"{name}: {packed.documents_in:,} conversations, {packed.tokens_in:,} tokens, "
                   f"{packed.tokens_dropped:,} of them cut off; {len(left_out):,} rows left out"
                   + "".join(f"\n  {row}" for row in left_out[:5]))
    if run.parallel.main:
        train.pack_domains(stage, root, run.tokenizer, config.seed)
    dist.barrier()
    return root


def fine_tune(config: SftConfig) -> Path:
    """Evaluate, fine-tune, evaluate again; return the run folder."""
    config = train.config_to_resume(config) if config.resume else config
    source, state = train.initial_weights(config)
    base, _ = train.initial_weights(replace(config, resume=""))
    if source is None or base is None:
        raise ValueError("--init is missing: name the model to fine-tune, as in --init runs/tiny")
    model = empty_pretrained(source, torch.float32)
    tokenizer = data.tokenizer_for(source, config.tokenizer)
    config = replace(config, recipe=config.recipe or usual_recipe(tokenizer),
                     template=config.template or template_for(tokenizer, source))
    stage = stage_of(config, model.config.max_seq_len)
    template = choose("template", config.template, CHAT_TEMPLATES)
    end = tokenizer.special_id(template.end)
    resumed = state if config.resume else None  # Adam starts afresh, whatever --init has (Table 9)
    with train.start_run(config, "runs/sft", model, tokenizer, [stage], source, resumed) as run:
        model.config = replace(model.config, eos_token_id=end)
        model.files.pop("generation_config.json", None)  # the base model stops at another token
        model.files["chat_template.jinja"] = template.jinja.encode()
        answers = partial(score_answers, tokenizer=tokenizer, template=config.template,
                          n=config.samples or 200, seed=config.seed)
        if config.eval:
            train.evaluate_checkpoint(run, "before", base, answers)
        train.run_stage(run, stage, pack_conversations(run, stage, config), resumed)
        if config.eval:
            train.evaluate_checkpoint(run, stage.name, run.checkpoint(stage, stage.steps), answers)
    return run.folder


# --- 4. Talk to it ----------------------------------------------------------------------


def answer(model: Transformer, tokenizer: Tokenizer, messages: Sequence[Message], template: str,
           max_new_tokens: int, cache: KVCache) -> Iterator[int]:
    """Write the next turn, token by token. The model reads only what the cache does not hold."""
    end_id = tokenizer.special_id(choose("template", template, CHAT_TEMPLATES).end)
    ids = encode_chat(tokenizer, messages, template, answer_next=True).input_ids.tolist()
    cache.pending = ids[cache.length:]
    for token in stream(model, [], max_new_tokens, [end_id], cache=cache):
        if token != end_id:
            yield token


def chat(config: SftConfig) -> None:
    """Talk on the terminal. Ctrl-C stops an answer; between answers it leaves, like Ctrl-D."""
    folder = train.initial_weights(RunConfig(init=config.chat))[0] or Path(config.chat)
    model, tokenizer = load_pretrained(folder), data.tokenizer_for(folder, config.tokenizer)
    template = config.template or template_for(tokenizer, folder)
    messages, cache, limit = list[Message](), KVCache(), config.max_new_tokens
    print(f"{folder}: Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            typed: str | np.ndarray = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if tokenizer.spec == "bytes":  # "~KABCD" is a pair for the tiny model
            typed = toy.read_typed(str(typed), tokenizer.encode)
        messages.append({"role": "user", "content": typed})
        ids: list[int] = []
        written = answer(model, tokenizer, messages, template, limit, cache)
        try:
            for token in print_tokens(tokenizer, written, tokenizer.eos_id):
                ids.append(token)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        messages.append({"role": "assistant", "content": np.array(ids, np.uint32)})
        if cache.length + limit > model.config.max_seq_len:
            print("(the context is full: a new conversation)", file=sys.stderr)
            messages, cache = [], KVCache()


def main() -> None:
    config = data.parse_cli(SftConfig, __doc__)
    chat(config) if config.chat else fine_tune(config)


if __name__ == "__main__":
    data.run_main(main)
