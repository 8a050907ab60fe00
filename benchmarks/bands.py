"""Correlated noise against independent noise: held-out loss after the same training, at the same ε.

    python benchmarks/bands.py --json OUT [--seeds 5] [--epsilons 1 4 10] [--rows 2000]

Contenders: `plain` is DP-SGD (1 band), `auto` the number of bands that `bands: auto` chooses from public numbers. Both fine-tune the bundled model on
the built-in reviews with Adam; seeds and contenders alternate. Reported is the mean loss on test reviews (nats per token), its standard deviation over
seeds, and the difference of paired runs with its standard error. Where `auto` chooses 1 band the two are the same and are run once.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import tempfile

import numpy as np

from dpsynth.data import TokenStore, load
from dpsynth.finetune import Trainer, prepare_model, row_losses, tokenize
from dpsynth.formats import TextFormat
from dpsynth.privacy import Randomness, make_mechanism
from dpsynth.settings import Settings


def settings_of(args, epsilon, bands):
    return Settings(data="demo", train_size=args.rows, test_size=200, prompt="[film][{label}]:", sequence_length=args.length, batch_size=args.batch,
                    epochs=args.epochs, learning_rate=args.learning_rate, tuning=args.tuning, lora_rank=8, lora_targets="all", epsilon=epsilon, bands=bands)


def held_out(settings, splits, store, seed):
    """Held-out loss after one private training, and the number of bands it had."""
    model, fmt = prepare_model(settings.model_copy(update={"seed": seed})), TextFormat(settings.prompt, settings.labels)
    mechanism = make_mechanism(settings, len(store))
    trainer = Trainer(model, store, settings, mechanism, Randomness(os.urandom(32), f"bands {seed}"))
    while trainer.session.step < mechanism.steps:
        trainer.update()
    return float(row_losses(model, splits.test, fmt, settings, trainer.trainable).mean()), mechanism.bands


def compare(args, epsilon, splits, store):
    """Losses of both contenders over the seeds."""
    losses, bands = {"plain": [], "auto": []}, 1
    for seed in range(args.seeds):
        for name, setting in (("plain", "1"), ("auto", "auto")):
            if name == "auto" and seed and bands == 1:
                losses["auto"].append(losses["plain"][-1])
                continue
            loss, used = held_out(settings_of(args, epsilon, setting), splits, store, seed)
            bands = used if name == "auto" else bands
            losses[name].append(loss)
            print(f"epsilon {epsilon:g} seed {seed} {name}: {loss:.4f} ({used} bands)", flush=True)
    gain = np.array(losses["plain"]) - np.array(losses["auto"])
    return {"epsilon": epsilon, "bands": bands, **{n: {"mean": statistics.mean(v), "sd": statistics.pstdev(v), "losses": v} for n, v in losses.items()},
            "gain": float(gain.mean()), "gain_standard_error": float(gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        tokenize(model, splits.train, TextFormat(settings.prompt, settings.labels), pathlib.Path(folder) / "tokens", settings.sequence_length)
        store = TokenStore(pathlib.Path(folder) / "tokens")
        results = [compare(args, epsilon, splits, store) for epsilon in args.epsilons]
    print("| ε | bands | plain | auto | gain (paired) |\n|---|---|---|---|---|")
    for r in results:
        error = "" if r["gain_standard_error"] is None else f" ± {r['gain_standard_error']:.4f}"
        print(f"| {r['epsilon']:g} | {r['bands']} | {r['plain']['mean']:.4f} ± {r['plain']['sd']:.4f} | {r['auto']['mean']:.4f} ± {r['auto']['sd']:.4f} | "
              f"{r['gain']:.4f}{error} |")
    if args.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        args.json.write_text(json.dumps({"name": "bands", "machine": machine, "contenders": results, "ratios": {}, "settings": vars(args) | {"json": None}},
                                        indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
