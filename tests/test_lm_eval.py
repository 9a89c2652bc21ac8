"""lm-evaluation-harness, where it is installed, runs a folder that we have written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import random_model

import data
import model as m

LOCAL_TASK = """task: which_line_follows
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_evaluation_harness_runs_an_exported_folder(tmp_path):
    """A task of local data, no network: its accuracy and every log-likelihood are ours."""
    tokenizer = data.load_tokenizer("bytes")
    model = random_model(torch.float32, vocab_size=tokenizer.vocab_size, family="qwen2",
                         max_seq_len=256)
    model.files = data.tokenizer_files(tokenizer)
    m.save_pretrained(model, tmp_path / "model")
    lines = [line for line in Path(m.__file__).read_text().splitlines() if 20 < len(line) < 60][:48]
    rows = [{"text": lines[i], "choices": ["\n" + line for line in lines[i + 1:i + 5]],
             "answer": i % 4} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(LOCAL_TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    options = (f"--model hf --model_args pretrained={tmp_path}/model,dtype=float32,"
               f"add_bos_token=True --device cpu --include_path {tmp_path} --output_path "
               f"{tmp_path}/out --tasks which_line_follows --log_samples")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *options.split()], capture_output=True,
                          text=True, cwd=tmp_path, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-2000:]
    samples = [json.loads(line) for path in (tmp_path / "out").rglob("samples_*.jsonl")
               for line in path.read_text().splitlines()]
    assert len(samples) == len(rows)
    correct = 0
    for sample in samples:
        scores = []
        for choice in sample["doc"]["choices"]:
            prompt = [*tokenizer.begin, *tokenizer.encode(sample["doc"]["text"]).tolist()]
            answer = tokenizer.encode(choice).tolist()
            ids = torch.tensor(prompt + answer)
            with torch.no_grad():
                logs = model.logits(ids, (len(ids),)).log_softmax(-1)[len(prompt) - 1:-1]
            scores.append(float(logs.gather(1, torch.tensor(answer)[:, None]).sum()))
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(scores, rel=1e-4)
        correct += scores.index(max(scores)) == sample["doc"]["answer"]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    accuracy = results["results"]["which_line_follows"]["acc,none"]
    assert accuracy == pytest.approx(correct / len(rows))
