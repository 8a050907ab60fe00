"""Correlated noise against independent noise: held-out loss after the same training, at the same ε.

    python benchmarks/bands.py --json OUT [--seeds 5] [--epsilons 1 4 10] [--rows 2000]

Contenders: `plain` is DP-SGD (1 band), `auto` the number of bands that `bands: auto` chooses from public
numbers. Both fine-tune the bundled model on the built-in reviews with Adam; seeds and contenders alternate.
Reported is the mean loss on test reviews (nats per token), its standard deviation over seeds, and the
difference of paired runs with its standard error. Trainings that the record has already are not repeated.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile

import numpy as np

from dpsynth.data import TokenStore, load
from dpsynth.finetune import Trainer, prepare_model, row_losses, tokenize
from dpsynth.formats import make_format
from dpsynth.privacy import Randomness, make_mechanism
from dpsynth.settings import Settings


def settings_of(args, epsilon, bands):
    return Settings(
        data="demo",
        train_size=args.rows,
        test_size=200,
        prompt="[film][{label}]:",
        sequence_length=args.length,
        batch_size=args.batch,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        tuning=args.tuning,
        lora_rank=8,
        lora_targets="all",
        epsilon=epsilon,
        bands=bands,
    )


def held_out(settings, splits, store, seed):
    """Held-out loss after one private training, and the number of bands it had."""
    model, fmt = (
        prepare_model(settings.model_copy(update={"seed": seed})),
        make_format(settings),
    )
    mechanism = make_mechanism(settings, len(store))
    trainer = Trainer(model, store, settings, mechanism, Randomness(os.urandom(32), f"bands {seed}"))
    while trainer.session.step < mechanism.steps:
        trainer.update()
    return float(row_losses(model, splits.test, fmt, settings, trainer.trainable).mean()), mechanism.bands


def summary(runs, epsilon):
    """One line of the table: both contenders at one ε, with the seeds that both have."""
    losses = {
        name: {r["seed"]: r["loss"] for r in runs if (r["epsilon"], r["contender"]) == (epsilon, name)}
        for name in ("plain", "auto")
    }
    seeds = sorted(losses["plain"].keys() & losses["auto"].keys())
    gain = np.array([losses["plain"][seed] - losses["auto"][seed] for seed in seeds])
    found = {name: [of[seed] for seed in seeds] for name, of in losses.items()}
    return {
        "epsilon": epsilon,
        "bands": next(r["bands"] for r in runs if (r["epsilon"], r["contender"]) == (epsilon, "auto")),
        **{
            name: {
                "mean": statistics.mean(of),
                "sd": statistics.stdev(of) if len(of) > 1 else None,
                "losses": of,
            }
            for name, of in found.items()
        },
        "gain": float(gain.mean()),
        "gain_standard_error": float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None,
    }


def measure(args, splits, store, runs):
    """Train what is missing, seeds and contenders in turn; the record is written after each."""
    for epsilon, seed, (name, setting) in itertools.product(
        args.epsilons, range(args.seeds), (("plain", "1"), ("auto", "auto"))
    ):
        if any((r["epsilon"], r["seed"], r["contender"]) == (epsilon, seed, name) for r in runs):
            continue
        loss, bands = held_out(settings_of(args, epsilon, setting), splits, store, seed)
        runs.append({"epsilon": epsilon, "seed": seed, "contender": name, "loss": loss, "bands": bands})
        print(f"epsilon {epsilon:g} seed {seed} {name}: {loss:.4f} ({bands} bands)", flush=True)
        write(args, runs)


def write(args, runs):
    """The record, whatever is in it so far."""
    both = [
        e for e in args.epsilons if {r["contender"] for r in runs if r["epsilon"] == e} == {"plain", "auto"}
    ]
    lines = {e: summary(runs, e) for e in both}
    record = {
        "name": "bands",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "contenders": {f"epsilon {e:g}": line for e, line in lines.items()},
        "ratios": {
            f"auto_over_plain_epsilon_{e:g}": line["auto"]["mean"] / line["plain"]["mean"]
            for e, line in lines.items()
        },
        "settings": {**vars(args), "json": None},
        "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return record


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1, 4, 10])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row at most")
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    args = parser.parse_args()
    settings = settings_of(args, 8.0, "1")
    splits, model = load(settings), prepare_model(settings)
    with tempfile.TemporaryDirectory() as folder:
        tokenize(
            model,
            splits.train,
            make_format(settings),
            pathlib.Path(folder) / "tokens",
            settings.sequence_length,
        )
        store = TokenStore(pathlib.Path(folder) / "tokens")
        runs = json.loads(args.json.read_text())["runs"] if args.json and args.json.exists() else []
        measure(args, splits, store, runs)
        results = write(args, runs)["contenders"].values()
    show = lambda side: f"{side['mean']:.4f}" + ("" if side["sd"] is None else f" ± {side['sd']:.4f}")
    print("| ε | bands | plain | auto | gain (paired) |\n|---|---|---|---|---|")
    for r in results:
        error = "" if r["gain_standard_error"] is None else f" ± {r['gain_standard_error']:.4f}"
        print(
            f"| {r['epsilon']:g} | {r['bands']} | {show(r['plain'])} | {show(r['auto'])} |"
            f" {r['gain']:.4f}{error} |"
        )


if __name__ == "__main__":
    main()
