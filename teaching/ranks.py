"""Ranks for the exercises: four processes with gloo, or threads where a sum is all they exchange.

A world of four processes has one group of four ranks, and two groups of two beside each other, as
in a grid of dp = 2 and sp = 2. An answer that asks for the world where it means its group is found.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from teaching.parts import Raised

WORLD = 4
SECONDS = 300  # to wait for an answer's ranks; one that waits for another gives up before
CONTEXT = mp.get_context("forkserver")  # torch is imported once, and every process begins with it
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "torch.utils.checkpoint",
                                "torch.nn.attention.bias"])

Job = Callable[[Callable[..., Any], Any, dist.ProcessGroup], Any]  # (answer, case, group) -> found


def run_world(job: Job, answer: Callable[..., Any], cases: list[tuple[int, Any]]) -> list[Any]:
    """Run job(answer, case, group) for each (number of ranks, case), on the ranks of a new world.

    Returns for each case what the four ranks found, in order, or the first one's error. What a job
    returns must be lists, dicts and numbers.
    """
    with (tempfile.TemporaryDirectory() as name,
          mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")):
        folder = Path(name)
        processes = [CONTEXT.Process(target=_work, args=(rank, folder, job, answer, cases))
                     for rank in range(WORLD)]
        for process in processes:
            process.start()
        until = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        for process in processes:
            process.kill()
        found = [_read(folder / f"{rank}.json", len(cases)) for rank in range(WORLD)]
    return [_together([found[rank][i] for rank in range(WORLD)]) for i in range(len(cases))]


def _read(path: Path, n: int) -> list[Any]:
    late = {"error": f"a rank ended early, or still waited after {SECONDS} seconds"}
    return json.loads(path.read_text()) if path.exists() else [late] * n


def _together(found: list[Any]) -> Any:
    errors = [result["error"] for result in found if "error" in result]
    if "NotImplementedError" in errors:
        return NotImplementedError()
    if any("imed out" in error for error in errors):
        return Raised("a rank waited a minute for a call that the others did not make")
    own = [error for error in errors if "onnection" not in error]  # which another's end would be
    return Raised((own or errors)[0]) if errors else found


def _work(rank: int, folder: Path, job: Job, answer: Callable[..., Any],
          cases: list[tuple[int, Any]]) -> None:
    """One rank: all cases, up to the first that raises. After it the ranks would not meet."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=SECONDS / 5)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank,
                            world_size=WORLD, timeout=patience)
    pairs = [dist.new_group(pair, timeout=patience) for pair in ([0, 1], [2, 3])]
    dist.barrier()  # nobody ends before all are there
    found: list[Any] = []
    for size, case in cases:
        try:
            found.append(job(answer, case, dist.group.WORLD if size == WORLD else pairs[rank // 2]))
        except NotImplementedError:
            found.append({"error": "NotImplementedError"})
        except (Exception, SystemExit) as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
        if failed := "error" in found[-1]:
            found += [found[-1]] * (len(cases) - len(found))
            break
    aside = folder / f"{rank}.writing"
    aside.write_text(json.dumps(found))
    aside.rename(folder / f"{rank}.json")
    while not failed and len(list(folder.glob("*.json"))) < WORLD:
        time.sleep(0.02)  # what was sent must arrive
    os._exit(0)  # nobody waits for a rank that still waits


UNEQUAL = "not every rank called all_sum as often as the others"


def run_threads(job: Callable[[Any], Any], ranks: int) -> list[Any]:
    """Run job(parallel) in a thread for each rank; what each returned, or raised.

    `parallel` has dp_rank, dp_size, and all_sum(tensor), which waits for all ranks.
    """
    given: list[list[Tensor]] = [[] for _ in range(ranks)]  # what each gave to its calls of all_sum
    found, ended, changed = [None] * ranks, [False] * ranks, threading.Condition()

    def all_sum(rank: int, value: Any) -> Tensor:
        with changed:
            given[rank].append(torch.as_tensor(value, dtype=torch.float64).detach().clone())
            n = len(given[rank])
            changed.notify_all()
            changed.wait_for(lambda: all(len(given[r]) >= n or ended[r] for r in range(ranks)))
            if any(len(g) < n for g in given):
                raise RuntimeError(UNEQUAL)
            return torch.stack([g[n - 1] for g in given]).sum(dim=0)

    def work(rank: int) -> None:
        parallel = SimpleNamespace(rank=rank, dp_rank=rank, dp_size=ranks, sp_rank=0, sp_size=1,
                                   device=torch.device("cpu"),
                                   all_sum=lambda value: all_sum(rank, value))
        try:
            found[rank] = job(parallel)
        except Exception as error:
            found[rank] = error
        with changed:
            ended[rank] = True
            changed.notify_all()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
