"""Compare settings on the built-in reviews, before any real data is touched: hyper-parameters looked up on
private rows would cost ε.

    python tools/tune.py --json FILE 'lora8: {tuning: lora, lora_rank: 8}' 'all: {tuning: full, learning_rate:
    0.001}' …

Each argument is a name and the settings that differ from `COMMON`, in YAML. One after the other is trained,
sampled and scored; a name that the file has already is not repeated. Prints a Markdown table of all that the
file has.
"""

import argparse
import json
import pathlib
import tempfile
import time

import yaml

from dpsynth.runs import evaluate_stage, fit_stage, load_stage, sample_stage
from dpsynth.runs.run import Run
from dpsynth.settings import make_settings

# `tiny` and the plain accuracy are what the record in benchmarks/records was measured with: one table, one
# scale.
COMMON = {
    "data": "demo",
    "train_size": 8000,
    "test_size": 1200,
    "validation_size": 200,
    "prompt": "[film][{label}]:",
    "sequence_length": 96,
    "embedder": "tiny",
    "embed_length": 96,
    "num_samples": 500,
    "num_mauve_samples": 500,
    "num_mauve_trials": 3,
    "microbatch_size": 8,
    "sample_batch_size": 64,
    "tuning": "lora",
    "lora_targets": "all",
    "lora_rank": 8,
    "lr_schedule": "linear",
    "ledger": "runs",
}
FIGURES = {
    "updates": "steps",
    "noise multiplier": "noise_multiplier",
    "held-out loss": "held_out_loss",
    "MAUVE": "mauve_mean",
    "±": "mauve_std",
    "accuracy": "utility_accuracy",
    "seconds of training": "seconds_fit",
}


def measure(name, changes, folder):
    """Train, sample and score one variant; a dict of its figures."""
    settings = make_settings({**COMMON, **changes, "experiment": name})
    run = Run(settings, folder)
    splits, begun = load_stage(run), time.monotonic()
    generator = fit_stage(run, splits)
    seconds = time.monotonic() - begun
    sample_stage(run, splits, generator)
    found = evaluate_stage(run, splits) | json.loads((folder / "metrics.json").read_text())
    return (
        {"name": name, "settings": changes}
        | {key: found.get(key) for key in FIGURES.values()}
        | {"seconds_fit": seconds}
    )


def table(rows):
    """Markdown."""
    show = lambda value: f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)
    lines = [["variant", "settings that differ", *FIGURES]] + [["---"] * (len(FIGURES) + 2)]
    lines += [
        [
            r["name"],
            ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in r["settings"].items()),
            *(show(r[key]) for key in FIGURES.values()),
        ]
        for r in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help="'name: {setting: value, …}'")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json.exists() else {"common": COMMON, "variants": []}
    for variant in args.variants:
        ((name, changes),) = yaml.safe_load(variant).items()
        if name in [row["name"] for row in found["variants"]]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, changes, pathlib.Path(folder) / "run")
        found["variants"].append(row)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["variants"]))


if __name__ == "__main__":
    main()
