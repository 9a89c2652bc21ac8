"""Nothing is lost: kills, signals, full disks, vanished data, divergence and hostile files.

Most tests run whole runs of a few steps in this process, and let the fault happen inside a step. Kills and
mutations are tried by experiments/faults.py in processes of its own: a few here, thousands with `-m slow`.
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import model as model_module
import train
from train import TrainConfig

ROOT = Path(__file__).parent.parent
STEPS = 8
NOT_REPEATED = {"tok_per_s", "mfu", "mem_gib", "time_s"}


@pytest.fixture(autouse=True)
def small_and_clean(monkeypatch):
    """Two stages that cost nothing; no process group and no handler stays behind."""
    mix = {"recall_bare-256": 0.5, "icl-128": 0.5}
    monkeypatch.setitem(train.RECIPES, "tiny", [
        train._tiny(name, seq_len, theta, STEPS, 1024, mix) for name, seq_len, theta in
        (("base", 256, 1e4), ("long", 512, 8e4))])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def run(folder: Path, **options) -> Path:
    return train.train(TrainConfig(**{"stage": "base", "eval": False, "out": str(folder), **options}))


def resume(folder: Path, **options) -> Path:
    return train.train(TrainConfig(resume=str(folder), **options))


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in NOT_REPEATED} for row in lines]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def tensors(folder: Path, checkpoint: str = f"base-{STEPS}") -> dict[str, torch.Tensor]:
    """Weights and Adam's moments."""
    paths = (folder / "checkpoints" / checkpoint).glob("*.safetensors")
    return {f"{path.name}/{key}": value for path in paths for key, value in load_file(path).items()}


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended with the same bits and the same log."""
    a, b = tensors(one), tensors(other)
    assert rows(one) == rows(other) and len(rows(one)) == STEPS
    assert a.keys() == b.keys() and len(a) > 50 and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def during(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """during(3, fault): `fault` happens inside the third step from now on."""
    def arrange(step: int, fault: Callable[[], None]) -> None:
        honest, calls = train.train_step, []

        def step_with_fault(*args, **kwargs):
            calls.append(1)
            if len(calls) == step:
                fault()
            return honest(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", step_with_fault)
    return arrange


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with all its checkpoints, to be copied and damaged."""
    mix = {"recall_bare-256": 0.5, "icl-128": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.RECIPES, "tiny", [train._tiny("base", 256, 1e4, STEPS, 1024, mix)])
        folder = run(tmp_path_factory.mktemp("finished") / "run", save_every=2, keep=0)
    dist.destroy_process_group()
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# --- Checkpoints ---


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


DAMAGES = {"cut": lambda content: content[:len(content) // 2], "longer": lambda content: content + b" ",
           "flipped": flip, "gone": None}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_seen_and_the_checkpoint_before_is_taken(copy, capsys, damage):
    """Whatever file of the newest checkpoint is damaged, and however: it is named, and base-6 is next."""
    parallel, newest = model_module.init_parallel(), copy / "checkpoints" / f"base-{STEPS}"
    assert train.newest_checkpoint(copy, parallel)[0] == newest
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        if DAMAGES[damage]:
            path.write_bytes(DAMAGES[damage](whole))
        else:
            path.unlink()
        found, state = train.newest_checkpoint(copy, parallel)
        report = capsys.readouterr().out
        if path.name == "state.json" and damage in ("gone", "longer"):  # no checkpoint; a blank is nothing
            assert (found == newest) == (damage == "longer") and report == ""
        else:
            assert (found.name, state["step"]) == ("base-6", 6)
            assert report.count("\n") == 1 and str(path) in report
        path.write_bytes(whole)
    assert len(list(newest.iterdir())) >= 4


def test_a_run_goes_on_before_its_damaged_checkpoint(copy, finished, capsys):
    """The damaged one is written again on the way, and everything is as if nothing had happened."""
    (copy / "checkpoints" / f"base-{STEPS}" / "model.safetensors").write_bytes(b"")
    resume(copy)
    assert f"base-{STEPS}/model.safetensors has 0 bytes" in capsys.readouterr().out
    assert_same(copy, finished)


def test_no_whole_checkpoint_is_an_error_and_none_yet_is_a_beginning(copy, finished, capsys):
    for path in (copy / "checkpoints").glob("*/config.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        resume(copy)
    shutil.rmtree(copy / "checkpoints")
    resume(copy)
    assert "no checkpoint yet: from its beginning" in capsys.readouterr().out
    assert_same(copy, finished)


@pytest.mark.parametrize("left", ["old", "old and new", "writing"])
def test_what_a_dead_writer_leaves(copy, finished, left):
    """At each point between a replacement's renames there is a whole checkpoint, and it is found."""
    newest = copy / "checkpoints" / f"base-{STEPS}"
    if left == "old":
        newest.rename(newest.with_suffix(".old"))
    elif left == "old and new":
        shutil.copytree(newest, newest.with_suffix(".old"))
    else:
        newest.rename(newest.with_suffix(".writing"))
    found, _ = train.initial_weights(TrainConfig(resume=str(copy)))
    assert found.name == ("base-6" if left == "writing" else f"base-{STEPS}")
    assert resume(copy) and tensors(copy).keys() == tensors(finished).keys()
    assert [name for name in names(copy) if "writing" in name] == []


def test_keep_leaves_the_newest_and_every_stages_last(tmp_path):
    assert names(run(tmp_path / "two", stage="", save_every=1)) == ["base-8", "long-7", "long-8"]
    assert names(run(tmp_path / "five", save_every=1, keep=5)) == [f"base-{i}" for i in range(4, 9)]
    with pytest.raises(ValueError, match="keep=-1"):
        run(tmp_path / "none", keep=-1)


def test_saving_takes_at_most_a_twentieth(tmp_path, capsys):
    """By default: half an hour apart, or 19 times as long as the slowest took. The cost is printed."""
    now, cost, saved_at = [0.0], 300.0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "monotonic", lambda: now[0])
        made = train.Run(TrainConfig(), tmp_path, *[None] * 5)
        for step in range(2000):
            now[0] += 60.0
            if made.due(step):
                saved_at.append(now[0])
                now[0] += cost
                made.saves.append(cost)
                made.saved_at = now[0]
    assert saved_at[0] == 31 * 60 and len(saved_at) > 10
    assert 0.04 < cost * len(saved_at) / now[0] <= 0.05
    run(tmp_path / "run", save_every=2)
    assert "checkpoints: 4 saved in" in capsys.readouterr().out


# --- Resume ---


@pytest.mark.parametrize("options, words", [
    ({"lr": 1.0}, r"drop --lr \(None then, 1.0 now\)"),
    ({"seed": 1, "clip": 2.0}, r"drop --clip \(1.0 then, 2.0 now\), --seed \(0 then, 1 now\)"),
    ({"tokenizer": "gpt2"}, "--tokenizer"), ({"steps": 99}, "--steps"), ({"mix": "short=1"}, "--mix"),
])
def test_other_settings_are_refused_with_a_list(copy, options, words):
    with pytest.raises(ValueError, match=words):
        resume(copy, **options)


def test_harmless_settings_may_change(copy, finished):
    """How often to save, what to evaluate, how sequences are dealt: not what is learned."""
    for name in ("base-8", "base-6"):
        shutil.rmtree(copy / "checkpoints" / name)
    resume(copy, save_every=1, keep=1, samples=16, attention="sdpa", micro_batch_tokens=1024)
    assert names(copy) == ["base-8"]
    assert_same(copy, finished)


def test_changed_data_and_recipe_are_refused(copy, monkeypatch):
    """The same names with other bytes in them, and a recipe that has been edited."""
    folder = copy / "data" / "base" / "icl-128"
    changed = data.PackedDataset(folder)[0].input_ids.copy()
    changed[5] ^= 1
    with open(folder / "input_ids.bin", "r+b") as file:
        file.write(changed.tobytes())
    with pytest.raises(ValueError, match="icl-128 is not as it was packed"):
        resume(copy)
    shutil.rmtree(folder)
    tokenizer, report = data.load_tokenizer(), data.PackReport()
    sequences = data.pack_builtin("icl-128", tokenizer, 256, 1, report)
    data.write_packed(folder, (next(sequences) for _ in range(17)), tokenizer, 256, "icl-128", 1, report)
    mix = {"recall_bare-256": 0.5, "icl-128": 0.5}
    monkeypatch.setitem(train.RECIPES, "tiny", [train._tiny("base", 256, 2e4, STEPS, 1024, mix)])
    with pytest.raises(ValueError, match=r"icl-128: \w+ then, \w+ now; stage rope_theta: 10000.0 then, 200"):
        resume(copy)


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_machine_that_is_wanted_back(tmp_path, during, finished, capsys, number):
    """The step is finished and saved, the exit code is 0, and the resumed run is the undisturbed one."""
    during(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run")
    assert ended.value.code == 0 and names(tmp_path / "run") == ["base-3"]
    assert f"stopped as asked; go on with --resume {tmp_path / 'run'}" in capsys.readouterr().out
    dist.destroy_process_group()
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", finished)


def test_ctrl_c_says_where_to_go_on(tmp_path, during, capsys):
    """Once: gone, with one line, and the last checkpoint whole; a second one would not wait for anything."""
    for every, words in ((2, f"interrupted; go on with --resume {tmp_path}"), (None, "has no checkpoint")):
        during(4, lambda: os.kill(os.getpid(), signal.SIGINT))
        folder = tmp_path / str(every)
        # As in a terminal: a shell that started the tests in the background had SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(SystemExit) as ended:
                train.run_and_exit("train.py", lambda f=folder, n=every: run(f, save_every=n))
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        finally:
            signal.signal(signal.SIGINT, before)
        error = capsys.readouterr().err
        assert ended.value.code == 130 and words in error and error.count("\n") == 1
    assert train.newest_checkpoint(tmp_path / "2", model_module.init_parallel())[1]["step"] == 2


# --- Divergence ---


def poison(monkeypatch, calls_that_diverge: range) -> None:
    honest, calls = model_module.chunked_cross_entropy, []

    def poisoned(*args):
        calls.append(1)
        total, valid = honest(*args)
        return total * (math.nan if len(calls) in calls_that_diverge else 1), valid

    monkeypatch.setattr(model_module, "chunked_cross_entropy", poisoned)


def test_a_diverging_step_can_be_skipped(tmp_path, monkeypatch, capsys):
    """It is told with its sequences, changes no weight, and the run goes on."""
    poison(monkeypatch, range(3, 5))
    folder = run(tmp_path / "run", on_diverge="skip", save_every=2, keep=0)
    report = capsys.readouterr().out
    assert report.count("skipped: stage base step") == 2 and "icl-128[" in report
    assert [row["step"] for row in rows(folder)] == [1, 2, 5, 6, 7, 8]
    before, after = tensors(folder, "base-2"), tensors(folder, "base-4")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(value).all() for value in tensors(folder).values())


def test_skipping_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    poison(monkeypatch, range(3, 99))
    with pytest.raises(train.Diverged, match="stage base step 6: loss is nan"):
        run(tmp_path / "run", on_diverge="skip", save_every=2)
    with pytest.raises(ValueError, match="choose stop or skip"):
        run(tmp_path / "other", on_diverge="pray")


# --- Disks and data ---


@pytest.mark.parametrize("fault", ["no room", "file too large"])
@pytest.mark.parametrize("choice", ["continue", "stop"])
def test_a_full_disk(tmp_path, during, monkeypatch, capsys, finished, fault, choice):
    """Said before a byte is written, or when the kernel refuses one; the old checkpoint stays whole."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def begin() -> None:
        if fault == "no room":
            usage = shutil.disk_usage(tmp_path)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))

    def end() -> None:
        monkeypatch.setattr(shutil, "disk_usage", honest)
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

    honest = shutil.disk_usage
    during(7, end)
    during(3, begin)
    try:
        if choice == "continue":
            run(tmp_path / "run", save_every=2, keep=0)
            assert names(tmp_path / "run") == ["base-2", "base-8"]
            assert_same(tmp_path / "run", finished)
        else:
            with pytest.raises(OSError, match=r"could not write .*base-4"):
                run(tmp_path / "run", save_every=2, on_save_error="stop")
            assert names(tmp_path / "run") == ["base-2"]
    finally:
        end()
    said = capsys.readouterr()
    assert ("0.00 are free" if fault == "no room" else "rank 0 could not write") in said.err
    assert said.out.count("going on without") == (2 if choice == "continue" else 0)
    assert train.newest_checkpoint(tmp_path / "run", model_module.init_parallel())


@pytest.mark.parametrize("fault", ["cut", "gone", "folder gone"])
def test_data_that_vanishes(tmp_path, during, fault):
    """Reading a memory map beyond its file's end would be a SIGBUS; here it is a ValueError with its name."""
    folder = tmp_path / "run" / "data" / "base" / "icl-128"

    def vanish() -> None:
        if fault == "cut":
            os.truncate(folder / "input_ids.bin", 100)
        elif fault == "gone":
            (folder / "doc_lens.bin").unlink()
        else:
            shutil.rmtree(folder)

    during(3, vanish)
    with pytest.raises(ValueError, match=r"icl-128/\w+.bin has \d+ bytes where meta.json says"):
        run(tmp_path / "run", save_every=2)
    assert "base-2" in names(tmp_path / "run")


# --- Kills and hostile files: experiments/faults.py ---


def try_faults(folder: Path, *options: str) -> dict:
    command = [sys.executable, str(ROOT / "experiments" / "faults.py"), "--runs", str(folder / "runs"),
               "--out", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "faults.json").read_text())


def test_three_kills_and_200_mutations(tmp_path):
    """Killed runs end with the undisturbed run's bits; damaged files are refused, quickly, in little room."""
    found = try_faults(tmp_path, "--kills", "3", "--ranks", "1", "--mutations", "200")
    assert found["kills"][0]["kills"] == 3 and found["kills"][0]["tensors"] > 50
    assert found["mutations"]["wrong"] == [] and found["mutations"]["refused"] > 100


@pytest.mark.slow
def test_all_kills_and_mutations(tmp_path):
    """30 kills at one and at two ranks, and 2,000 mutations (about ten minutes)."""
    found = try_faults(tmp_path)
    assert [(each["ranks"], each["kills"]) for each in found["kills"]] == [(1, 30), (2, 30)]
    assert all(each["while saving"] >= 5 for each in found["kills"])
    assert found["kills"][1]["one rank of two"] >= 5 and found["kills"][1]["longest_survivor_s"] < 15
    assert found["mutations"]["tried"] > 1900 and found["mutations"]["wrong"] == []


# --- More than one rank ---


def torchrun(ranks: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "train.py", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_a_run_moves_between_grids(tmp_path):
    """(1,1) -> (2,1) -> (1,2) -> (2,2) -> (1,1): each goes on from the one before; losses equal to 1e-5."""
    folder, options = tmp_path / "run", ["--stage", "base", "--steps", "10", "--no-eval", "--save-every", "2",
                                         "--keep", "0"]
    grids = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 1)]
    for leg, (dp, sp) in enumerate(grids):
        where = ["--resume", str(folder)] if leg else ["--out", str(folder), *options]
        process = torchrun(dp * sp, *where, "--seq-parallel-size", str(sp))
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        if leg == 0:
            whole = rows(folder)
        else:
            assert f"start: {folder / 'checkpoints' / f'base-{2 * leg}'}, with Adam's moments" in out
        for row, wanted in zip(rows(folder), whole, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-5), (dp, sp, row["step"])
            assert row["tokens_seen"] == wanted["tokens_seen"]
        for path in (folder / "checkpoints").iterdir():  # the next grid goes on from what this one wrote
            if int(path.name.partition("-")[2]) > 2 * leg + 2:
                shutil.rmtree(path)


@pytest.mark.slow
def test_two_ranks_say_it_once(tmp_path):
    """A wrong setting and SIGTERM under torchrun: one line, and a checkpoint that all ranks agree on."""
    folder = tmp_path / "run"
    process = torchrun(2, "--stage", "base", "--no-eval", "--out", str(folder), "--save-every", "20")
    while not (folder / "checkpoints" / "base-20").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.count("stopped as asked") == 1
    newest, state = train.newest_checkpoint(folder, model_module.init_parallel())
    assert state["world_size"] == 2 and len(rows(folder)) == state["step"], newest
    process = torchrun(2, "--resume", str(folder), "--lr", "1")
    _, error = process.communicate(timeout=60)
    assert error.count("train.py: error: --resume") == 1 and "drop --lr" in error
