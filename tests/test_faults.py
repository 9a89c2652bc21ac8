"""Nothing is lost: kills, signals, full disks and hostile files.

Most tests run whole runs of a few steps in this process, and let the fault happen inside a step.
Kills and mutations are tried by experiments/faults.py, in processes of its own.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import read_log, weights

import data
import train
from support.cli import parse_cli
from support.run import SIGNALS, alone_in, newest_checkpoint
from train import Stage, TrainConfig

ROOT = Path(__file__).parent.parent
STEPS = 8


def stage(name: str, seq_len: int, theta: float) -> Stage:
    """A stage that costs nothing."""
    mix = {"recall_bare-256": 0.5, "icl-128": 0.5}
    return Stage(name, seq_len, theta, mix, STEPS * 1024, 1024, lr=3e-3, min_lr=3e-4)


@pytest.fixture(autouse=True)
def small_and_clean(monkeypatch):
    """Two small stages; no process group and no signal handler stays behind."""
    stages = [stage("base", 256, 1e4), stage("long", 512, 8e4)]
    monkeypatch.setitem(train.RECIPES, "tiny", stages)
    # As in a terminal: a shell may have started the tests with some of these ignored.
    outside = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for number, handler in outside.items():
        signal.signal(number, handler)


def run(folder: Path, **options) -> Path:
    options = {"stage": "base", "eval": False, "out": str(folder), **options}
    return train.train(TrainConfig(**options))


def resume(folder: Path, **options) -> Path:
    return train.train(TrainConfig(resume=str(folder), **options))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended with the same bits and the same log."""
    a, b = (weights(folder / "checkpoints" / f"base-{STEPS}") for folder in (one, other))
    assert read_log(one) == read_log(other) and len(read_log(one)) == STEPS
    assert a.keys() == b.keys() and len(a) > 50 and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def during(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """during(3, fault): `fault` happens inside the third step from now on."""
    def arrange(step: int, fault: Callable[[], None]) -> None:
        honest, calls = train.train_step, count(1)

        def step_with_fault(*args, **kwargs):
            if next(calls) == step:
                fault()
            return honest(*args, **kwargs)

        monkeypatch.setattr(train, "train_step", step_with_fault)
    return arrange


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with all its checkpoints, to be copied and damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.RECIPES, "tiny", [stage("base", 256, 1e4)])
        folder = run(tmp_path_factory.mktemp("finished") / "run", save_every=2, keep=0)
    dist.destroy_process_group()
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole) // 2], None],
                         ids=["cut", "gone"])
def test_every_damage_is_seen_and_the_checkpoint_before_is_taken(copy, capsys, damage):
    """Whatever file of the newest checkpoint is damaged, it is named, and base-6 is next."""
    newest = copy / "checkpoints" / f"base-{STEPS}"
    assert newest_checkpoint(copy)[0] == newest
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 5 and any(path.parent.name == "optimizer" for path in files)
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if damage:
            path.write_bytes(damage(whole))
        found, state = newest_checkpoint(copy)
        report = capsys.readouterr().out
        assert (found.name, state["step"]) == ("base-6", 6)
        assert report.count("\n") == 1 and str(path) in report
        path.write_bytes(whole)


@pytest.mark.parametrize("pattern, new", [
    (rb'(saved_offsets\\": \[)0', rb"\g<1>1"), (rb"exp_avg_sq", b"exp_avg_sp"), (rb'{"', b'["')])
def test_a_changed_header_is_refused(copy, pattern, new):
    """File sizes would not show it, but reading the moments does."""
    (path,) = (copy / "checkpoints" / f"base-{STEPS}" / "optimizer").iterdir()
    content = path.read_bytes()
    path.write_bytes(re.sub(pattern, new, content, count=1))
    assert path.read_bytes() != content and path.stat().st_size == len(content)
    with pytest.raises(ValueError, match="optimizer cannot be read"):
        resume(copy)


def test_no_whole_checkpoint_is_an_error_and_none_yet_is_a_beginning(copy, finished, capsys):
    for path in (copy / "checkpoints").glob("*/config.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no whole checkpoint"):
        resume(copy)
    shutil.rmtree(copy / "checkpoints")
    resume(copy)
    assert "start: from the beginning" in capsys.readouterr().out
    assert_same(copy, finished)


@pytest.mark.parametrize("left", ["old", "old and new", "writing", "damaged"])
def test_what_a_dead_writer_leaves(copy, finished, left):
    """A whole checkpoint is found, and all ends as if nothing had happened."""
    newest = copy / "checkpoints" / f"base-{STEPS}"
    if left == "old and new":
        shutil.copytree(newest, newest.with_suffix(".old"))
    elif left == "damaged":
        (newest / "model.safetensors").write_bytes(b"")
    else:
        newest.rename(newest.with_suffix(f".{left}"))
    found, _ = train.initial_weights(TrainConfig(resume=str(copy)))
    assert found.name == (f"base-{STEPS}" if left == "old and new" else "base-6")
    resume(copy, keep=0)
    assert set(names(copy)) - {"base-8.old"} == set(names(finished))  # swept by the next save
    assert_same(copy, finished)


def test_keep_leaves_the_newest_and_every_stages_last(tmp_path, monkeypatch):
    """With --save-every, and without it by the clock."""
    assert names(run(tmp_path / "two", stage="", save_every=1)) == ["base-8", "long-7", "long-8"]
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    assert names(run(tmp_path / "five", keep=5)) == [f"base-{i}" for i in range(4, 9)]
    with pytest.raises(ValueError, match="--keep -1"):
        run(tmp_path / "none", keep=-1)


@pytest.mark.parametrize("options, words", [
    ({"lr": 1.0}, "--lr: None then, 1.0 now"),
    ({"seed": 1, "clip": 2.0}, "--clip: 1.0 then, 2.0 now; --seed: 0 then, 1 now"),
    ({"tokenizer": "gpt2"}, "--tokenizer"), ({"steps": 99, "mix": "short=1"}, "--mix.*--steps"),
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


def test_an_option_named_at_its_default_is_given(copy):
    """It changes what the run had, where that may change; and what is not named stays."""
    def named(*options: str) -> TrainConfig:
        return train.config_to_resume(parse_cli(TrainConfig, "", ["--resume", str(copy), *options]))

    assert (named().keep, named().eval) == (0, False)
    again = named("--keep", "2", "--eval", "--clip", "1")
    assert (again.keep, again.eval, again.save_every) == (2, True, 2)
    with pytest.raises(ValueError, match="--stage: base then,  now"):
        named("--stage", "")


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
    data.pack_domain(folder, "icl-128", 17, data.load_tokenizer(), 256, seed=1)
    monkeypatch.setitem(train.RECIPES, "tiny", [stage("base", 256, 2e4)])
    words = r"icl-128: \w+ then, \w+ now; rope_theta: 10000.0 then, 200"
    with pytest.raises(ValueError, match=words):
        resume(copy)


def test_a_reader_that_goes_away(tmp_path):
    """As in `| head -1`: the run goes on to its end, and its exit code is 0."""
    process = start("train.py", "--stage", "base", "--no-eval", "--steps", "3", "--out",
                    str(tmp_path / "run"))
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0 and "Broken" not in error, error
    assert names(tmp_path / "run") == ["base-3"]


def test_a_step_that_cannot_be_logged(tmp_path, during, capsys):
    """A disk that is full for a moment costs a line of the log, not the run."""
    log = tmp_path / "run" / "log.jsonl"
    during(3, lambda: (log.rename(tmp_path / "away"), log.mkdir()))
    during(4, lambda: (log.rmdir(), (tmp_path / "away").rename(log)))
    run(tmp_path / "run")
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2, 4, 5, 6, 7, 8]
    assert "a step is missing in" in capsys.readouterr().err


def test_a_damaged_line_of_the_log_is_left_out(tmp_path, finished, capsys):
    """Resuming names the file, and goes on."""
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / f"base-{STEPS}")
    lines = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join([lines[0], lines[1][:40], "{}", *lines[3:]]) + "\n")
    resume(copy)
    assert "log.jsonl: left out 2 damaged lines" in capsys.readouterr().err
    assert [entry["step"] for entry in read_log(copy)] == [1, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_the_shell_ignores_stays_ignored(tmp_path, during, number):
    """nohup and `&` in a script: such a run trains to its end, whatever becomes of the terminal."""
    signal.signal(number, signal.SIG_IGN)
    during(3, lambda: os.kill(os.getpid(), number))
    run(tmp_path / "run")
    assert names(tmp_path / "run") == [f"base-{STEPS}"]
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_machine_that_is_wanted_back(tmp_path, during, finished, capsys, number):
    """The step is finished and saved, the exit code is 0, and the resumed run is undisturbed."""
    during(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        data.run_main(lambda: run(tmp_path / "run"))
    assert ended.value.code == 0 and names(tmp_path / "run") == ["base-3"]
    assert f"stopped as asked: go on with --resume {tmp_path / 'run'}" in capsys.readouterr().err
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", finished)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_machine_wanted_back_while_packing(tmp_path, finished, monkeypatch, capsys, number, code):
    """It ends at once. What is packed is whole, and a resumed run packs the rest and trains."""
    calls = count(1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(data.files, "check_ids",  # before meta.json of the second domain
                      lambda *_: next(calls) == 2 and os.kill(os.getpid(), number))
        data.run_main(lambda: run(tmp_path / "run", save_every=2, keep=0))
    assert ended.value.code == code and "it has no checkpoint yet" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/data/base").iterdir()] == ["recall_bare-256"]
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", finished)


@pytest.mark.parametrize("every, words", [(2, "interrupted: go on with --resume"),
                                          (None, "interrupted: it has no checkpoint yet")])
def test_a_second_ctrl_c_waits_for_nothing(tmp_path, during, capsys, every, words):
    """The run ends at once, says where to go on, and the last checkpoint is whole."""
    during(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as ended:
        data.run_main(lambda: run(tmp_path, save_every=every))
    asked, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 130 and words in error and "ends after this step" in asked
    assert not every or newest_checkpoint(tmp_path)[1]["step"] == 2


def test_moved_packs_are_the_same_packs(tmp_path, finished):
    """Data in another place are taken if their checksums are the same, and refused if not."""
    packs = shutil.copytree(finished / "data" / "base", tmp_path / "packs")
    run(tmp_path / "run", data=str(packs), save_every=2, keep=0)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"base-{STEPS}")
    moved = packs.rename(tmp_path / "moved")
    resume(tmp_path / "run", data=str(moved))
    assert_same(tmp_path / "run", finished)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"base-{STEPS}")
    shutil.rmtree(moved / "icl-128")
    data.pack_domain(moved / "icl-128", "icl-128", 17, data.load_tokenizer(), 256, seed=1)
    with pytest.raises(ValueError, match=r"icl-128: \w+ then, \w+ now"):
        resume(tmp_path / "run", data=str(moved))


def test_two_processes_do_not_train_in_one_folder(tmp_path, finished):
    """The second one is refused while the first one runs, and not after it."""
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / f"base-{STEPS}")
    before = (copy / "log.jsonl").read_bytes()
    with alone_in(copy, True), pytest.raises(ValueError, match="another process trains in"):
        resume(copy)
    assert (copy / "log.jsonl").read_bytes() == before  # which the first one goes on writing
    dist.destroy_process_group()
    resume(copy)


@pytest.mark.parametrize("words", ["clip -1.0", "clip inf", "lr nan", "lr 0.0", "lr -0.003",
                                   "loss-chunk-tokens -5", "weight-decay -1.0", "seed -1"])
def test_numbers_that_no_run_can_have(words):
    """They are refused before anything runs, with the option's name."""
    name, value = words.split()
    kind = int if name in ("loss-chunk-tokens", "seed") else float
    with pytest.raises(ValueError, match=f"--{words} must be .* and finite"):
        TrainConfig(**{name.replace("-", "_"): kind(value)})


def test_a_stage_of_no_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 8,192 tokens, less than a step of 4,194,304"):
        run(tmp_path / "run", batch_tokens=2**22)


def test_a_state_that_lies_is_damage(tmp_path, finished):
    """A step beyond the stage's last one: the checkpoint before is taken."""
    copy = shutil.copytree(finished, tmp_path / "run")
    path = copy / "checkpoints" / f"base-{STEPS}" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": STEPS + 1}))
    assert newest_checkpoint(copy)[1]["step"] == STEPS - 2


def test_a_full_disk(tmp_path, during, capsys):
    """The run ends in one line, and the checkpoint before is whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    during(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
    try:
        with pytest.raises(OSError, match=r"could not write .*base-4"):
            run(tmp_path / "run", save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "run") == ["base-2"]
    assert "rank 0 could not write" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "run")


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def try_faults(folder: Path, *options: str) -> dict:
    process = start("experiments/faults.py", "--runs", str(folder / "runs"), "--out", str(folder),
                    *options)
    out, error = process.communicate()
    assert process.returncode == 0, out[-3000:] + error[-3000:]
    return json.loads((folder / "faults.json").read_text())


def test_100_mutations(tmp_path):
    """Damaged files are refused, quickly, and in little memory."""
    found = try_faults(tmp_path, "--kills", "0", "--mutations", "100")["mutations"]
    assert found["wrong"] == [] and found["refused"] > 50


@pytest.mark.slow
def test_all_kills_and_mutations(tmp_path):
    """30 kills at one and at two ranks end with an undisturbed run's bits (about ten minutes)."""
    found = try_faults(tmp_path)
    one, two = found["kills"]
    assert one["kills"] == two["kills"] == 30 and one["tensors"] > 50
    assert min(one["while saving"], two["while saving"], two["one rank of two"]) >= 5
    assert found["mutations"]["tried"] == 500 and found["mutations"]["wrong"] == []


@pytest.mark.slow
def test_two_ranks_say_it_once(tmp_path):
    """A wrong setting and SIGTERM under torchrun: one line, and one checkpoint of all ranks."""
    folder = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    process = start(*torchrun, "--stage", "base", "--no-eval", "--out", str(folder),
                    "--save-every", "20", "--steps", "1000")
    while not (folder / "checkpoints" / "base-20").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert error.count("stopped as asked") == 1
    newest, state = newest_checkpoint(folder)
    assert len(list((newest / "optimizer").iterdir())) == 2
    assert len(read_log(folder)) == state["step"]
    process = start(*torchrun, "--resume", str(folder), "--lr", "1")
    _, error = process.communicate(timeout=60)
    assert error.count("train.py: error:") == 1 and "--lr: None then, 1.0 now" in error
