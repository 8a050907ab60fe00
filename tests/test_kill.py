"""A run that is killed at five random moments and started again makes the rows that an undisturbed run with its secret makes."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dpsynth.runs import read_json
from dpsynth.settings import Settings

SETTINGS = {"experiment": "dp_ft", "train_size": 200, "test_size": 60, "batch_size": 24, "epochs": 2.0, "epsilon": 8.0, "sequence_length": 48,
            "tuning": "lora", "lora_rank": 1, "prompt": "[film][{label}]:", "num_samples": 96, "sample_batch_size": 16, "num_mauve_samples": 40,
            "num_mauve_trials": 3, "embed_length": 32, "ledger": "runs", "validation_size": 4}

WORKER = """
import pathlib, sys, time
from dpsynth import finetune, pipeline, sampling
from dpsynth.runs import read_settings
folder = pathlib.Path(sys.argv[1])
settings = read_settings(folder)
print("start", flush=True)
update = finetune.Trainer.update
def slow(trainer):
    print("fit", flush=True)
    time.sleep(0.05)
    update(trainer)
    trainer.save(folder / "private" / "checkpoint.npz")
finetune.Trainer.update = slow
splits = pipeline.load_stage(settings, folder)
model = pipeline.fit_stage(settings, folder, splits)
print("sample", flush=True)
pipeline.sample_stage(settings, folder, splits, model)
print("evaluate", flush=True)
pipeline.evaluate_stage(settings, folder, splits)
print("done", flush=True)
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill_in(folder, stage, count, wait):
    """Start a run and kill it `wait` seconds after the `count`-th time that it says `stage`; returns the stages it went through."""
    process, seen = start(folder), []
    for line in process.stdout:
        seen.append(line.strip())
        if seen.count(stage) == count:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL, seen
    return seen


def prepared(folder, secret):
    (folder / "private").mkdir(parents=True, mode=0o700)
    (folder / "private" / "secret").write_bytes(secret)
    (folder / "settings.yaml").write_text(yaml.safe_dump(Settings(**SETTINGS).model_dump()))
    return folder


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path):
    chance, secret = random.Random(os.urandom(8)), os.urandom(32)
    whole, killed = (prepared(tmp_path / name / "dp_ft", secret) for name in ("whole", "killed"))
    assert start(whole).wait() == 0
    assert "sample" not in kill_in(killed, "fit", chance.randint(2, 6), chance.random() / 10)
    assert "sample" not in kill_in(killed, "fit", chance.randint(2, 6), chance.random() / 10)
    assert "evaluate" not in kill_in(killed, "sample", 1, chance.random())
    resumed = kill_in(killed, "sample", 1, chance.random())
    assert "fit" not in resumed and "evaluate" not in resumed
    kill_in(killed, "evaluate", 1, chance.random())
    assert start(killed).wait() == 0
    for name in ("synthetic.jsonl", "adapter.npz", "certificate.json"):
        assert (killed / "release" / name).read_bytes() == (whole / "release" / name).read_bytes(), name
    assert read_json(killed / "metrics.json")["mauve_mean"] == read_json(whole / "metrics.json")["mauve_mean"]
