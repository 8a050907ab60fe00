"""`dpsynth run`, killed at five random moments and started again, releases the bytes that an undisturbed run
with its secret releases.

The runs are real ones: a runner, and a kernel that is a session of its own. A `sitecustomize` for their
processes slows the work, so that a random moment is in the stage it is meant for, lets a checkpoint be
written each second instead of each half minute, and makes ten blocks of what would be one; nothing is changed
in how work is stored and resumed. What is not killed is run from this process.
"""

import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import yaml

from parts import MICRO
from dpsynth.runs import BusyError, locked, read_json, read_status

SETTINGS = {
    "model": MICRO,
    "train_size": 200,
    "test_size": 60,
    "sequence_length": 32,
    "prompt": "[film][{label}]:",
    "tuning": "lora",
    "lora_rank": 1,
    "batch_size": 8,
    "microbatch_size": 8,
    "epochs": 2.0,
    "epsilon": 2.0,
    "validation_size": 0,
    "num_samples": 160,
    "sample_batch_size": 16,
    "num_mauve_samples": 40,
    "num_mauve_trials": 3,
    "embedder": "tiny",
    "embed_length": 32,
    "ledger": "runs",
}
BLOCKS = 10

PACED = """
import sys, time
from importlib.machinery import PathFinder, SourceFileLoader

def slow(owner, name, seconds):
    work = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: (time.sleep(seconds), work(*arguments, **options))[1])

def loop(module):
    module.train.__kwdefaults__["seconds_between"] = 1.0

def trainer(module):
    slow(module.Trainer, "update", 0.15)

def decode(module):
    module.BLOCK = 16

def rows(module):
    slow(module, "decode_block", 0.5)

def mauve(module):
    slow(module, "mauve_score", 1.0)

CHANGES = {"dpsynth.finetune.loop": loop, "dpsynth.finetune.trainer": trainer,
           "dpsynth.sampling.decode": decode,
           "dpsynth.sampling.rows": rows, "dpsynth.evaluation.mauve": mauve}

class Paced(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        CHANGES[module.__name__](module)

class Finder:
    def find_spec(name, path=None, target=None):
        if name in CHANGES:
            spec = PathFinder.find_spec(name, path)
            spec.loader = Paced(name, spec.origin)
            return spec

sys.meta_path.insert(0, Finder)
"""
CALL = "import sys; from dpsynth.cli import main; sys.exit(main())"
PATIENCE = 900  # seconds until something that must happen counts as not happening


def wait(longest):
    """Sleep for a random part of so many seconds."""
    seconds = random.SystemRandom().uniform(0, longest)
    print(f"waited {seconds:.3f} s")  # pytest shows it where the test fails
    time.sleep(seconds)


def lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Run:
    """One run folder, and the processes that are or were at it."""

    def __init__(self, home, name):
        self.config, self.out, self.log = home / "dp_ft.yaml", home / name, home / f"{name}.log"
        self.folder = self.out / "dp_ft"
        self.private, self.release = self.folder / "private", self.folder / "release"
        self.checkpoint, self.adapter = self.private / "checkpoint.npz", self.release / "adapter.npz"
        self.rows = self.release / "synthetic.jsonl"
        self.command = ["run", str(self.config), "--out", str(self.out)]
        self.processes = []

    def start(self):
        with open(self.log, "wb") as log:
            self.runner = psutil.Popen([sys.executable, "-c", CALL, *self.command], stdout=log, stderr=log)
        self.processes.append(self.runner)

    def code(self):
        """The exit code of the runner, once it has ended."""
        return self.runner.wait(PATIENCE)

    def wait_until(self, happened):
        """Wait for something that happens while a kernel is at work."""
        until = time.monotonic() + PATIENCE
        while not happened():
            assert lives(self.runner) and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def kernel(self):
        """The process of the kernel."""
        children = self.runner.children(recursive=True)
        self.processes += children
        return next(process for process in children if any("ipykernel" in part for part in process.cmdline()))

    def wait_until_gone(self):
        until = time.monotonic() + PATIENCE
        while any(map(lives, self.processes)):
            assert time.monotonic() < until, self.processes
            time.sleep(0.02)

    def end(self):
        """Kill all processes, the runner first, and wait until they are gone."""
        if self.processes and lives(self.runner):
            self.processes += self.runner.children(recursive=True)
        for process in filter(lives, self.processes):
            process.kill()
        self.wait_until_gone()

    def kill(self, longest):
        """Kill runner and kernel at a random moment of the next `longest` seconds."""
        wait(longest)
        self.end()
        assert self.code() == -signal.SIGKILL and read_status(self.folder)["state"] == "killed"

    def stage(self):
        """Where the run is, by its files."""
        return "training" if not self.adapter.exists() else "evaluation" if self.rows.exists() else "sampling"

    def step(self):
        """Updates in the checkpoint."""
        if not self.checkpoint.exists():
            return 0
        with np.load(self.checkpoint) as file:
            return int(file["step"])

    def blocks(self):
        return read_json(self.release / "sampling.json").get("blocks", [])

    def metrics(self):
        return read_json(self.folder / "metrics.json")

    def released(self):
        return {path.name: path.read_bytes() for path in self.release.iterdir()}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make a `Run`; what is left of its processes when the test ends is killed."""
    (tmp_path / "paced").mkdir()
    (tmp_path / "paced" / "sitecustomize.py").write_text(PACED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "paced"), prepend=os.pathsep)
    (tmp_path / "dp_ft.yaml").write_text(yaml.safe_dump(SETTINGS))
    made = []

    def make(name):
        made.append(Run(tmp_path, name))
        return made[-1]

    yield make
    for run in made:
        run.end()


def kill_the_runner_alone(run, dpsynth):
    """The kernel is stopped meanwhile, as it would end itself when it finds out: until then, however
    long, it holds the run.
    """
    kernel = run.kernel()
    kernel.suspend()
    run.runner.kill()
    assert run.code() == -signal.SIGKILL
    with pytest.raises(BusyError), locked(run.folder):
        pass
    before = run.checkpoint.read_bytes()
    code, out, err = dpsynth(*run.command)
    assert code == 1 and "dp_ft: running elsewhere (" in out + err
    assert run.checkpoint.read_bytes() == before
    kernel.resume()
    run.wait_until_gone()


@pytest.mark.slow
def test_killed_at_five_random_moments(make, dpsynth, refused):
    run, undisturbed = make("killed"), make("undisturbed")

    run.start()
    run.wait_until((run.private / "tokens").exists)
    run.kill(1.5)
    assert run.stage() == "training"
    undisturbed.private.mkdir(parents=True, mode=0o700)
    shutil.copy(run.private / "secret", undisturbed.private / "secret")

    before = run.step()
    run.start()
    run.wait_until(lambda: run.step() > before)
    wait(1.0)
    kill_the_runner_alone(run, dpsynth)
    assert run.stage() == "training"
    assert "was made with epsilon=2, not 3" in refused(*run.command, "--set", "epsilon=3")

    before, changed = run.step(), run.checkpoint.stat().st_mtime_ns
    run.start()
    run.wait_until(lambda: run.checkpoint.stat().st_mtime_ns != changed)
    assert run.step() > before > 0
    run.wait_until(run.blocks)
    run.kill(1.0)
    assert run.stage() == "sampling" and 0 < len(run.blocks()) < BLOCKS

    blocks, trained = run.blocks(), run.adapter.stat().st_mtime_ns
    run.start()
    run.wait_until(lambda: len(run.blocks()) > len(blocks))
    run.kill(1.0)
    assert (
        run.stage() == "sampling" and run.blocks()[: len(blocks)] == blocks
    )  # their seconds too: they were not decoded again

    run.start()
    run.wait_until(lambda: "num_samples" in run.metrics())
    run.kill(2.0)
    assert run.stage() == "evaluation" and "mauve_mean" not in run.metrics()

    sampled = run.rows.stat().st_mtime_ns
    for each in (run, undisturbed):
        code, out, err = dpsynth(*each.command)
        assert code == 0, out + err
    assert (run.adapter.stat().st_mtime_ns, run.rows.stat().st_mtime_ns) == (trained, sampled)
    assert len(run.rows.read_text().splitlines()) == SETTINGS["num_samples"] and len(run.blocks()) >= BLOCKS
    assert run.released() == undisturbed.released()
    assert run.metrics()["mauve_mean"] == undisturbed.metrics()["mauve_mean"]
