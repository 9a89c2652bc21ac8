"""Kill runs and damage files: is anything ever lost, or wrong without a word?

    python experiments/faults.py                                        30 kills each, 2,000 mutations
    python experiments/faults.py --kills 3 --ranks 1 --mutations 200    what the everyday tests run

**Kills.** A run of two stages and 60 steps that saves every third is killed with SIGKILL at a random moment,
half of the time while a checkpoint is being written. Of two ranks sometimes only one is killed, and the other
must end by itself. After each kill there must be a whole checkpoint if ever there was one, and not an
older one than at the kill before. The run is resumed, and killed again, until it gets to its end: with the
weights, moments and log of a run that nobody disturbed, to the last bit.

**Mutations.** Files as a stranger could send them: bits flipped, cut, keys twice, numbers too large, types
wrong, nesting without end, paths that lead elsewhere. Each must load as the original does, or end in
ValueError, in less than 5 s and 1 GiB.

Prints a table and writes docs/figures/faults.json. Processes are forked from this one, which has imported
torch and nothing else, so a kill costs no start of Python.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from model import Transformer, init_parallel, load_pretrained, preset_config, save_pretrained  # noqa: E402

MIX = {"recall_bare-256": 0.5, "icl-128": 0.5}
STAGES = [train._tiny(name, seq_len, theta, steps=30, batch_tokens=1024, mixture=MIX)
          for name, seq_len, theta in (("first", 256, 1e4), ("second", 512, 8e4))]
NOT_REPEATED = {"tok_per_s", "mfu", "mem_gib", "time_s"}

# --- 1. Runs, and how they are killed ------------------------------------------------------------------


def fork(work: Callable[[], object], output: Path) -> int:
    """Run `work` as a script does, in a process of its own; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(output, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        data.run_main(lambda: train.run_and_exit("train.py", work))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(config: train.TrainConfig, world: int, output: Path) -> list[int]:
    """Fork the ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
        train.RECIPES["faults"] = STAGES
        train.train(config)

    return [fork(lambda rank=rank: work(rank), output.with_suffix(f".{rank}.txt")) for rank in range(world)]


def wait(pids: list[int], seconds: float, codes: dict[int, int] | None = None) -> list[int] | None:
    """Their exit codes, or None if one is still running then; `codes` remembers those that have ended."""
    codes = {} if codes is None else codes
    end = time.monotonic() + seconds
    while True:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if len(codes) == len(pids):
            return [codes[pid] for pid in pids]
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def newest_whole(run: Path) -> int:
    """Tokens seen at the newest checkpoint whose every byte is as it was written; 0 if there is none."""
    newest = 0
    for folder, state in train.list_checkpoints(run):
        if isinstance(state, str):
            raise AssertionError(f"a kill has left a damaged checkpoint: {state}")
        assert all(train._sha256(folder / name) == entry["sha256"] for name, entry in state["files"].items())
        newest = max(newest, state["tokens_seen"])
    return newest


def result_of(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The last checkpoint's tensors, and what the log says that does not depend on the clock."""
    folder = run / "checkpoints" / f"{STAGES[-1].name}-{STAGES[-1].steps}"
    tensors = {f"{path.name}/{key}": value for path in sorted(folder.glob("*.safetensors"))
               for key, value in load_file(path).items()}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in row.items() if key not in NOT_REPEATED} for row in rows]


def kill_runs(world: int, kills: int, root: Path, rng: random.Random) -> dict[str, Any]:
    """Kill until it has been done `kills` times; every run is resumed until it ends, and compared."""
    options: dict[str, Any] = {"recipe": "faults", "eval": False, "save_every": 3}
    begin = time.monotonic()
    codes = wait(start(train.TrainConfig(**options, out=str(root / "whole")), world, root / "whole"), 300)
    assert codes == [0] * world, f"the undisturbed run ended with {codes}: see {root}"
    usual_s, whole = time.monotonic() - begin, result_of(root / "whole")
    seen: Counter[str] = Counter()
    survivors_s: list[float] = []
    runs = killed = 0
    while killed < kills:
        runs += 1
        run, newest = root / f"run-{runs}", 0
        while True:
            known = (run / "config.json").exists()
            config = train.TrainConfig(**({"resume": str(run)} if known else {**options, "out": str(run)}))
            ranks = start(config, world, root / f"run-{runs}")
            in_save, ended = rng.random() < 0.5, {}  # type: bool, dict[int, int]
            codes = wait(ranks, rng.uniform(0, 1.2 * usual_s) if killed < kills else 300, ended)
            while codes is None and in_save and not any((run / "checkpoints").glob("*.writing")):
                codes = wait(ranks, 0.001, ended)
            if codes is not None:
                assert codes == [0] * world, f"a run ended with {codes}: see {root / f'run-{runs}'}.*.txt"
                break
            time.sleep(rng.uniform(0, 0.03) if in_save else 0)
            victims = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
            for pid in victims:
                if pid not in ended:
                    os.kill(pid, signal.SIGKILL)
            died = time.monotonic()
            codes = wait(ranks, 60, ended)
            assert codes is not None, "a rank outlived the other by a minute"
            if len(victims) < world:
                survivors_s.append(time.monotonic() - died)
                seen["one rank of two"] += 1
            killed += 1
            seen["while saving" if any((run / "checkpoints").glob("*.writing")) else "elsewhere"] += 1
            before, newest = newest, newest_whole(run)
            seen["before the first checkpoint"] += newest == 0
            assert newest >= before, f"the newest whole checkpoint went back from {before} to {newest}"
        tensors, rows = result_of(run)
        assert rows == whole[1], "a resumed run has another log"
        assert tensors.keys() == whole[0].keys()
        assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors), "... has other weights"
    return {"ranks": world, "kills": killed, "runs": runs, **seen, "tensors": len(whole[0]),
            "longest_survivor_s": max(survivors_s, default=0.0), "seconds": time.monotonic() - begin}


# --- 2. Mutations -------------------------------------------------------------------------------------

STRANGE: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -1e308, 0.5, "", "x" * 10**6, "1e9",
                      "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], {"": {}}]


def mutate_json(text: str, rng: random.Random) -> str:
    """One change to a JSON object, of a kind that a text editor or an enemy would make."""
    entry = json.loads(text)
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            spots.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(entry)
    node, key = rng.choice(spots)
    kind = rng.choice(["value", "value", "value", "remove", "rename", "twice", "nest", "digits", "nan"])
    if kind == "value":
        node[key] = rng.choice(STRANGE)
    elif kind == "remove" or not isinstance(node, dict):
        del node[key]
    elif kind == "rename":
        node[rng.choice([key + "_", "", "../" + key, key.upper()])] = node.pop(key)
    else:
        mark = "\0here\0"
        whole, node[key] = node[key], mark
        depth = rng.choice([10, 900, 100_000])
        nested = ['{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth, "[" * depth]
        new = {"twice": json.dumps(whole) + f", {json.dumps(key)}: " + json.dumps(rng.choice(STRANGE)),
               "nest": rng.choice(nested), "digits": "9" * rng.choice([20, 400, 5000]),
               "nan": rng.choice(["NaN", "-Infinity", "1e999"])}[kind]
        return json.dumps(entry, indent=1).replace(json.dumps(mark), new)
    return json.dumps(entry, indent=1)


def mutate(path: Path, rng: random.Random) -> str:
    """Damage one file; say how."""
    content = bytearray(path.read_bytes())
    kinds = ["flip", "flip", "cut", "longer", "zeros", "empty"]
    kinds += 12 * {".json": ["json"], ".safetensors": ["header"]}.get(path.suffix, [])
    kind = rng.choice(kinds)
    if kind == "flip":
        at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 2000))
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)):]
    elif kind == "longer":
        content += bytes(rng.choice([1, 4, 4096]))
    elif kind == "zeros":
        at = rng.randrange(len(content))
        content[at:at + 16] = bytes(len(content[at:at + 16]))
    elif kind == "empty":
        content = bytearray()
    elif kind == "json":
        content = bytearray(mutate_json(content.decode(), rng).encode())
    else:  # safetensors: 8 bytes of length, then the header in JSON
        length = int.from_bytes(content[:8], "little")
        header = mutate_json(content[8:8 + length].decode(), rng).encode()
        size = rng.choice([len(header), len(header), len(header), 2**63, 2**40, 10**8, 0])
        content = bytearray(size.to_bytes(8, "little") + header) + content[8 + length:]
    path.write_bytes(content)
    return kind


class Originals:
    """What a stranger's files are made from, and how each of them is read."""

    def __init__(self, root: Path) -> None:
        self.root, self.parallel, self.tokenizer = root, init_parallel(), data.load_tokenizer()
        rng = np.random.default_rng(0)
        sequences = [data.PackedSequence(rng.integers(256, size=64).astype(np.uint32), (40, 24),
                                         rng.random(64) < 0.5, "") for _ in range(20)]
        data.write_packed(root / "pack", sequences, self.tokenizer, 64, "pack", 0, data.PackReport())
        self.model = Transformer(preset_config("tiny", self.tokenizer.vocab_size)).init_weights(0)
        save_pretrained(self.model, root / "weights", shard_bytes=200_000)
        optimizer = train.make_optimizer(self.model, 0.1)
        for weight in self.model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = {"stage": "s", "step": 1, "steps": 2, "tokens_seen": 64, "drawn": {"pack": 3},
                 "made_of": {"seed": 0}}
        train.save_checkpoint(root / "checkpoint", self.model, optimizer, state, self.parallel)
        (root / "run").mkdir()
        (root / "run" / "config.json").write_text(json.dumps(train.asdict(train.TrainConfig())))
        words = [bytes([i]) for i in range(256)] + [b"th", b"in", b"the", b" t", b" the"]
        lines = [base64.b64encode(word).decode() + f" {i}\n" for i, word in enumerate(words)]
        for name in ("tokenizer-table", "tokenizer"):
            (root / name).mkdir()
        (root / "tokenizer-table" / "tokenizer.model").write_text("".join(lines))
        tokenizer = self.read("tokenizer-table", root / "tokenizer-table")
        for name, content in data.tokenizer_files(tokenizer).items():
            if name.endswith(".json"):
                (root / "tokenizer" / name).write_bytes(content)
        self.whole = {name: self.read(name, root / name) for name in
                      ("pack", "weights", "checkpoint", "run", "tokenizer", "tokenizer-table")}

    def read(self, name: str, folder: Path) -> Any:
        """Read a folder as training would, into something that `same` can compare."""
        if name == "pack":
            dataset = data.PackedDataset(folder)
            dataset.check_tokenizer(self.tokenizer)
            dataset.check_content()
            sequences = [dataset[i] for i in range(len(dataset))]
            return [(s.input_ids.tolist(), s.doc_lens, s.loss_mask.tolist()) for s in sequences]
        if name.startswith("tokenizer"):
            tokenizer = data.load_tokenizer.__wrapped__(str(folder))
            tokenizer.encode("the thing in the tin")
            return tokenizer
        if name == "run":
            return train.config_to_resume(train.TrainConfig(resume=str(folder)))
        model, found = load_pretrained(folder), {}
        if name == "checkpoint":
            optimizer = train.make_optimizer(model, 0.1)
            found = train.read_state(folder, self.parallel)
            train.load_checkpoint(folder, model, optimizer)
            found |= {f"{i}/{key}": value for i, weight in enumerate(model.parameters())
                      for key, value in optimizer.state[weight].items()}
        return {**found, **model.state_dict()}

    def same(self, name: str, found: Any) -> bool:
        """Whether what was read is the original. (Another tokenizer or another run's settings are right.)"""
        whole = self.whole[name]
        if not isinstance(whole, dict):
            return name != "pack" or bool(found == whole)
        return found.keys() == whole.keys() and all(
            torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
            for key, value in whole.items())


def try_mutations(originals: Originals, count: int, seed: int, report: Path) -> None:
    """Try `count` mutations in this process, one after another; the report says how each ended."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with open(report, "w", buffering=1) as file:
        tried = 0
        for i in itertools.count(seed):
            if tried == count:
                return
            rng = random.Random(i)
            name = rng.choice(list(originals.whole))
            folder = originals.root / "mutated"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(originals.root / name, folder)
            # weights alone carry no sums: there, only what describes them can be told from what is meant
            files = [path for path in sorted(folder.iterdir()) if path.name != "generation_config.json"]
            path = rng.choice(files)
            kind = mutate(path, rng)
            if name == "weights" and path.suffix == ".safetensors" and kind in ("flip", "zeros"):
                continue
            if name == "checkpoint" and path.name == "state.json" and kind == "json" and rng.random() < 0.5:
                kind = reseal(path)
            tried += 1
            file.write(f'{{"i": {i}, "file": "{name}/{path.name}", "kind": "{kind}", "end": ')
            begin = time.monotonic()
            signal.alarm(10)
            try:
                found = originals.read(name, folder)
                right = originals.same(name, found) or kind == "resealed"
                end = "loaded" if right else "WRONG: accepted"
            except ValueError:
                end = "refused"
            except BaseException as error:
                end = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
            signal.alarm(0)
            if time.monotonic() - begin > 5:
                end = f"WRONG: took {time.monotonic() - begin:.1f} s"
            file.write(json.dumps(end) + "}\n")


def reseal(path: Path) -> str:
    """Give a mutated state.json the sum that its content has: somebody meant it."""
    try:
        state = json.loads(path.read_text())
        state["sha256"] = train._sum_of_state(state)
        path.write_text(json.dumps(state))
        return "resealed"
    except (ValueError, TypeError, RecursionError):
        return "json"


def fuzz(count: int, root: Path) -> dict[str, Any]:
    """Try mutations in a process that may die; say what became of them."""
    begin = time.monotonic()
    report = root / "mutations.jsonl"
    fuzzer = fork(lambda: try_mutations(Originals(root), count, 0, report), root / "fuzz.txt")
    code = wait([fuzzer], 3600)
    lines = report.read_text().splitlines() if report.exists() else []
    if code != [0] or not lines:
        raise AssertionError(f"code {code} at {lines[-1:]}: {(root / 'fuzz.txt').read_text()[-2000:]}")
    tried = [json.loads(line) for line in lines]
    return {"tried": len(tried), "seconds": time.monotonic() - begin,
            "loaded": sum(each["end"] == "loaded" for each in tried),
            "refused": sum(each["end"] == "refused" for each in tried),
            "wrong": [each for each in tried if each["end"].startswith("WRONG")],
            "by_file": dict(Counter(each["file"] for each in tried))}


# --- 3. The table -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills for each number of ranks")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--runs", default="runs/faults", help="where the run folders go (removed first)")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures"), help="where faults.json goes")
    args = parser.parse_args(argv)
    shutil.rmtree(args.runs, ignore_errors=True)
    kills = []
    for world in map(int, args.ranks.split(",") if args.kills else ()):
        root = Path(args.runs) / f"ranks-{world}"
        root.mkdir(parents=True)
        kills.append(kill_runs(world, args.kills, root, random.Random(args.seed + world)))
        print(" | ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in kills[-1].items()), flush=True)
    root = Path(args.runs) / "mutations"
    root.mkdir(parents=True)
    mutations = fuzz(args.mutations, root) if args.mutations else {"wrong": []}
    print(" | ".join(f"{key} {value}" for key, value in mutations.items() if key not in ("wrong", "by_file")))
    for each in mutations["wrong"]:
        print(each)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    command = f"python experiments/faults.py --kills {args.kills} --mutations {args.mutations}"
    record = {"command": command, "commit": commit.stdout.strip(), "date": str(date.today()),
              "kills": kills, "mutations": mutations}
    (out / "faults.json").write_text(json.dumps(record, indent=1) + "\n")
    if mutations["wrong"]:
        raise SystemExit(f"{len(mutations['wrong'])} mutations ended in something else than ValueError")


if __name__ == "__main__":
    main()
