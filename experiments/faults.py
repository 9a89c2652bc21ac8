"""Kill runs and damage files: is anything ever lost, or wrong without a word?

    python experiments/faults.py                              30 kills each, 500 mutations
    python experiments/faults.py --kills 0 --mutations 100    what the everyday tests run

**Kills.** A run of two stages is killed with SIGKILL at some moment, half of the time while it
writes a checkpoint; of two ranks sometimes only one. No checkpoint may be damaged or lost. The run
is resumed, and killed again, until it ends as an undisturbed run does, bit for bit.

**Mutations.** Files as a stranger could send them: cut, bits flipped, wrong types, endless nesting.
Each must load as the original does, or end in ValueError, in less than 5 s and 1 GiB. (We flip no
bits of safetensors: among a tensor's numbers nothing would show it.)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import data  # noqa: E402
import model as llama  # noqa: E402
import train  # noqa: E402
from support.run import whole_checkpoints  # noqa: E402

fork = multiprocessing.get_context("fork")
Process = multiprocessing.context.ForkProcess
NOT_REPEATED = {"tok_per_s", "mfu", "mem_gib", "time_s"}
MIX = {"recall_bare-256": 0.5, "icl-128": 0.5}
STAGES = [train.Stage("first", 256, 1e4, MIX, 30 * 1024, 1024, lr=3e-3, min_lr=3e-4),
          train.Stage("second", 512, 8e4, MIX, 30 * 1024, 1024, lr=3e-3, min_lr=3e-4)]

# --- 1. Runs, and how they are killed -------------------------------------------------------------


def start(work: Callable[[], object], output: Path, world: int = 1) -> list[Process]:
    """Fork the ranks of `work`, each as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank_main(rank: int) -> None:
        with open(output.with_suffix(f".{rank}.txt"), "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
        data.run_main(work)

    ranks = [fork.Process(target=rank_main, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def wait(ranks: list[Process], seconds: float) -> bool:
    """Whether all have ended by then."""
    end = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in ranks)


def result_of(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The last checkpoint's tensors, and what the log says that does not depend on the clock."""
    folder = run / "checkpoints" / f"{STAGES[-1].name}-{STAGES[-1].steps}"
    tensors = {f"{path.name}/{key}": value for path in sorted(folder.rglob("*.safetensors"))
               for key, value in load_file(path).items()}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in row.items() if k not in NOT_REPEATED} for row in rows]


def train_and_kill(run: Path, world: int, options: dict[str, Any], moment: float | None,
                   rng: random.Random, seen: Counter[str]) -> bool:
    """Start a run or go on with it, and kill it after `moment` seconds. Whether it ended before."""
    begun = (run / "config.json").exists()
    options = {"resume": str(run)} if begun else {**options, "out": str(run)}
    ranks = start(lambda: train.train(train.TrainConfig(**options)), run, world)
    ended = wait(ranks, 300 if moment is None else moment)
    in_save = rng.random() < 0.5
    while in_save and not ended and not any((run / "checkpoints").glob("*.writing")):
        ended = wait(ranks, 0.001)
    if ended:
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * world, f"a run ended with {codes}: see {run}.*.txt"
        return True
    time.sleep(rng.uniform(0, 0.03) if in_save else 0)
    victims = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
    for process in victims:
        process.kill()
    assert wait(ranks, 60), "a rank outlived the other by a minute"
    seen["one rank of two"] += len(victims) < world
    seen["while saving"] += any((run / "checkpoints").glob("*.writing"))
    return False


def kill_runs(world: int, kills: int, root: Path, rng: random.Random) -> dict[str, Any]:
    """Kill `kills` times; each run is resumed until it ends, and compared with an undisturbed."""
    options: dict[str, Any] = {"recipe": "faults", "eval": False, "save_every": 3}
    begin, seen = time.monotonic(), Counter[str]()
    train_and_kill(root / "whole", world, options, None, rng, seen)
    usual_s, (tensors, rows) = time.monotonic() - begin, result_of(root / "whole")
    killed = runs = 0
    while killed < kills:
        runs += 1
        run, newest = root / f"run-{runs}", 0
        while True:
            moment = rng.uniform(0, 1.2 * usual_s) if killed < kills else None
            if train_and_kill(run, world, options, moment, rng, seen):
                break
            killed += 1
            whole = whole_checkpoints(run, name_damaged=True)
            folders = list((run / "checkpoints").glob("*[0-9]"))
            before, newest = newest, whole[0][1]["tokens_seen"] if whole else 0
            assert len(whole) == len(folders), f"a kill has left a damaged checkpoint in {run}"
            assert newest >= before, f"the newest checkpoint went back from {before} to {newest}"
        found, found_rows = result_of(run)
        assert found_rows == rows and found.keys() == tensors.keys(), run
        assert all(torch.equal(found[key], tensors[key]) for key in tensors), run
    return {"ranks": world, "kills": killed, "runs": runs, **seen, "tensors": len(tensors),
            "seconds": time.monotonic() - begin}


# --- 2. Mutations ---------------------------------------------------------------------------------

STRANGE: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, 0.5, "", "x" * 10**6, "1e9",
                      "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], {"": {}}]


def mutate_json(text: str, rng: random.Random) -> str:
    """One change to a JSON object, of a kind that a text editor or an enemy would make."""
    entry = json.loads(text)
    nodes, spots = [entry], []
    for node in nodes:  # which grows
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            spots.append((node, key))
            if isinstance(value, dict | list):
                nodes.append(value)
    if not spots:  # an empty object
        return "[" * 10**5
    node, key = rng.choice(spots)
    kind, whole = rng.choice(["value", "value", "remove", "raw"]), node[key]
    if kind == "value":
        node[key] = rng.choice(STRANGE)
    elif kind == "remove" or not isinstance(node, dict):
        del node[key]
    else:  # what json.dumps would not write: a key twice, nesting, long numbers, and no numbers
        node[key] = "\0here\0"
        twice = f"{json.dumps(whole)}, {json.dumps(key)}: {json.dumps(rng.choice(STRANGE))}"
        raw = [twice, "[" * 10**5, "[" * 900 + "]" * 900, "9" * 400, "9" * 5000, "NaN", "1e999"]
        return json.dumps(entry).replace(json.dumps("\0here\0"), rng.choice(raw))
    return json.dumps(entry)


def mutate(path: Path, rng: random.Random) -> str:
    """Damage one file; say how."""
    content, header = bytearray(path.read_bytes()), path.suffix == ".safetensors"
    at = rng.randrange(min(len(content), rng.choice([2000, 10**9])))
    kind = rng.choice(["cut", "longer", *["inside"] * 5, "inside" if header else "flip"])
    if kind == "cut":
        del content[rng.choice([0, at]):]
    elif kind == "longer":
        content += bytes(rng.choice([1, 4, 4096]))
    elif kind == "inside" and header:  # a length, then a header in JSON
        length = int.from_bytes(content[:8], "little")
        text = mutate_json(content[8:8 + length].decode(), rng).encode()
        size = rng.choice([len(text), len(text), len(text), 2**63, 2**40, 10**8, 0])
        content = bytearray(size.to_bytes(8, "little") + text) + content[8 + length:]
    elif kind == "inside" and path.suffix == ".json":
        content = bytearray(mutate_json(content.decode(), rng).encode())
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return kind


def write_originals(root: Path) -> None:
    """What a stranger's files are made from: a pack, a checkpoint, and a run's configuration."""
    done = train.train(train.TrainConfig(recipe="faults", stage="first", steps=1, eval=False,
                                         out=str(root / "done")))
    (root / "run").mkdir()
    (done / "config.json").rename(root / "run" / "config.json")
    (done / "data" / "first" / "icl-128").rename(root / "pack")
    (done / "checkpoints" / "first-1").rename(root / "checkpoint")


def read(name: str, folder: Path) -> list[torch.Tensor]:
    """Read a folder as training would. Other settings and another tokenizer are as good as ours."""
    if name == "run":
        train.config_to_resume(train.TrainConfig(resume=str(folder)))
        return []
    if name == "pack":
        dataset = data.PackedDataset(folder)
        dataset.check_tokenizer(data.load_tokenizer())
        dataset.check_content()
        return [torch.from_numpy(dataset[i].input_ids.astype(int)) for i in range(len(dataset))]
    data.load_tokenizer.__wrapped__(str(folder)).encode("the thing in the tin")
    model = llama.load_pretrained(folder)
    optimizer = train.make_optimizer(model, 0.1)
    train.load_checkpoint(folder, model, optimizer)
    return [*model.state_dict().values(), *train.moments(model, optimizer).values()]


def try_mutations(root: Path, count: int) -> None:
    """Try mutations in this process, one after another; a report says how each ended."""
    write_originals(root)
    whole = {name: read(name, root / name) for name in ("pack", "checkpoint", "run")}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for seed in range(count):
        rng = random.Random(seed)
        name, folder = rng.choice(list(whole)), root / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / name, folder)
        path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        case = {"seed": seed, "file": f"{name}/{path.name}", "kind": mutate(path, rng)}
        signal.alarm(5)
        try:
            found = read(name, folder)
            same = len(found) == len(whole[name]) and all(map(torch.equal, found, whole[name]))
            case["end"] = "loaded" if same else "WRONG: accepted"
        except ValueError:
            case["end"] = "refused"
        except BaseException as error:
            case["end"] = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
        signal.alarm(0)
        with open(root / "mutations.jsonl", "a") as file:
            file.write(json.dumps(case) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30, help="kills for each number of ranks")
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--runs", default="runs/faults", help="folder of the runs (removed first)")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures"), help="of faults.json")
    args = parser.parse_args(argv)
    train.RECIPES["faults"] = STAGES
    shutil.rmtree(args.runs, ignore_errors=True)
    found: dict[str, Any] = {"command": " ".join(sys.argv), "kills": []}
    for world in (1, 2) if args.kills else ():
        root = Path(args.runs) / f"ranks-{world}"
        root.mkdir(parents=True)
        found["kills"].append(kill_runs(world, args.kills, root, random.Random(world)))
    root = Path(args.runs) / "mutations"
    root.mkdir(parents=True)
    (fuzzer,) = start(lambda: try_mutations(root, args.mutations), root)
    fuzzer.join()
    cases = [json.loads(line) for line in (root / "mutations.jsonl").read_text().splitlines()]
    assert fuzzer.exitcode == 0, f"code {fuzzer.exitcode} after {cases[-1:]}; see {root}.0.txt"
    ends = Counter(case["end"].partition(":")[0] for case in cases)
    wrong = [case for case in cases if case["end"].startswith("WRONG")]
    found["mutations"] = {"tried": len(cases), **ends, "wrong": wrong}
    print(json.dumps(found))
    (Path(args.out) / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"{len(wrong)} mutations ended in something else than ValueError")


if __name__ == "__main__":
    main()
