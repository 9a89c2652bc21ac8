"""experiments/gpu.py and simulate_ranks.py end to end on a toy; without a GPU, no number of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
JOBS, WAYS = ["check", "attention", "3b-64k", "3b-short"], ["recompute", "attention"]


def run(script, *arguments):
    return subprocess.run([sys.executable, f"experiments/{script}.py", *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True)


def test_all_jobs_run_on_a_toy(tmp_path):
    out = tmp_path / "gpu.json"
    done = run("gpu", "--tiny", "--jobs", ",".join(JOBS), "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["jobs"]
    assert list(found) == JOBS and "failed" not in str(found)
    assert sum(isinstance(error, float) for error in found["check"].values()) >= 9
    for job in JOBS[2:]:
        assert len(found[job]["steps"]) == 2 and found[job]["tok_per_s"] > 0
        assert torch.cuda.is_available() or found[job]["peak_gib"] == "not run here"


@pytest.mark.slow
def test_each_way_to_keep_activations_is_a_case(tmp_path):
    done = run("simulate_ranks", "--tiny", "--seq", "64k", "--seq-parallel-size", 1, "--steps", 1,
               "--activations", ",".join(WAYS), "--out", tmp_path / "ranks.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(json.loads((tmp_path / "ranks.json").read_text())["jobs"]) == WAYS


def test_an_unknown_job_is_one_line():
    done = run("gpu", "--tiny", "--jobs", "check,warp")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'warp'" in done.stderr
