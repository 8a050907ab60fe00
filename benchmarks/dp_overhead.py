"""Time of a private training step against a plain one, at equal work: same rows, same microbatches, same
model.

    python benchmarks/dp_overhead.py --json OUT

Contenders: `plain` adds the gradient of each row, one after the other, as the package does on one CPU;
`plain_batched` takes the gradient of a microbatch's loss at once, as everybody does; `private` clips each row
onto the grid, sums, draws the noise and divides. All then apply Adam. Runs alternate; `dp_over_non_dp` is the
median of `private` over that of the faster plain one.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from unittest import mock

import numpy as np

from dpsynth import finetune
from dpsynth.data import TokenStore
from dpsynth.finetune import Trainer
from dpsynth.models import load_model, setup_tuning
from dpsynth.privacy import Mechanism, Randomness
from dpsynth.settings import Settings


def token_rows(model, count, length):
    """Rows that fill the sequence, of random ordinary tokens."""
    rng, prompt = np.random.default_rng(0), model.prompt_ids("[imdb][positive]:")
    for _ in range(count):
        yield prompt, rng.integers(300, model.vocabulary_size, length - len(prompt)).tolist()


def make_trainer(settings, store, epsilon):
    """A trainer whose batches always hold every row, so that both contenders do the same work."""
    model = load_model("tiny", seed=0)
    setup_tuning(model, settings)
    noise = 1.0 if epsilon < np.inf else 0.0
    mechanism = Mechanism(
        num_units=len(store),
        expected_batch_size=len(store),
        steps=100,
        noise_multiplier=noise,
        delta=1e-5,
        target_epsilon=np.inf,
    )
    return Trainer(model, store, settings, mechanism, Randomness(os.urandom(32), "benchmark"))


CONTENDERS = ("plain", "plain_batched", "private")


def timed(trainer):
    began = time.perf_counter()
    trainer.update()
    for array in trainer.trainable:
        array.block_until_ready()
    return time.perf_counter() - began


def compare(settings, rows, repeats):
    """Medians in seconds of `repeats` alternating updates of all contenders."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model("tiny")
        store = TokenStore.write(
            pathlib.Path(folder) / "tokens", token_rows(model, rows, settings.sequence_length)
        )
        trainers = {
            name: make_trainer(settings, store, 1.0 if name == "private" else np.inf) for name in CONTENDERS
        }
        for name, trainer in trainers.items():  # compiles
            with contextlib.ExitStack() as patches:
                for module in (finetune.loss, finetune.clipping, finetune.trainer):
                    patches.enter_context(
                        mock.patch.object(module, "one_by_one", lambda alone=name != "plain_batched": alone)
                    )
                timed(trainer)
        times = {name: [] for name in trainers}
        for _ in range(repeats):
            for name, trainer in trainers.items():
                times[name].append(timed(trainer))
    return {
        name: {"median_seconds": statistics.median(t), "rows_per_second": rows / statistics.median(t)}
        for name, t in times.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--microbatch", type=int, default=16)
    args = parser.parse_args()
    report = {
        "name": "dp_overhead",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "contenders": {},
        "ratios": {},
    }
    print(f"{'tuning':8} {'contender':14} {'s/update':>9} {'rows/s':>8}")
    for tuning in ("lora", "full"):
        settings = Settings(tuning=tuning, sequence_length=args.length, microbatch_size=args.microbatch)
        result = compare(settings, args.rows, args.repeats)
        for name, figures in result.items():
            print(f"{tuning:8} {name:14} {figures['median_seconds']:9.3f} {figures['rows_per_second']:8.1f}")
        report["contenders"][tuning] = result
        ratio = result["private"]["median_seconds"] / min(
            result[name]["median_seconds"] for name in CONTENDERS[:2]
        )
        report["ratios"]["dp_over_non_dp" if tuning == "lora" else "dp_over_non_dp_full"] = ratio
    print(report["ratios"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
