"""The audit table: the same training with more and less privacy, attacked in the same ways.

    python tools/audit_table.py --out runs/audit [--set key=value …] [--json FILE]

Runs, on the built-in reviews with canaries among the training rows and as many rows kept out as are trained on: DP at ε = 1 and 8, the ε = 8 run
with its noise switched off on purpose (no certificate is made for it), training without DP, and without DP with every canary ten times. Finished runs
are not repeated. Prints a Markdown table.
"""
import argparse
import json
import math
import pathlib
import unittest.mock

import numpy as np

from dpsynth import finetune, privacy
from dpsynth.pipeline import audit_stage, fit_stage, load_stage, sample_stage
from dpsynth.runs import read_json
from dpsynth.settings import make_settings, parse_overrides

COMMON = {"data": "demo", "audit_fraction": 0.5, "canaries": 400, "sequence_length": 96, "prompt": "[film][{label}]:", "tuning": "full", "epochs": 6.0,
          "batch_size": 256, "learning_rate": 0.001, "num_samples": 1000, "num_mauve_samples": 500, "validation_size": 0, "ledger": "runs"}
RUNS = {"dp_eps1": {"epsilon": 1.0}, "dp_eps8": {"epsilon": 8.0}, "noise_off": {"epsilon": 8.0}, "non_dp": {"epsilon": math.inf},
        "non_dp_x10": {"epsilon": math.inf, "canary_copies": 10}}


def switch_off():
    """Patches that make a private training silent: no noise, and no look back that would find this out."""
    return (unittest.mock.patch.object(privacy.Session, "_grid_noise", lambda self, count: np.zeros(count, np.int32)),
            unittest.mock.patch.object(finetune, "self_check", lambda trainer, before: {}))


def run(name, settings, folder):
    """Train, sample and attack; returns the figures of one line."""
    if not (folder / "private" / "audit.json").exists():
        splits = load_stage(settings, folder)
        silent, blind = switch_off()
        if name == "noise_off":
            with silent, blind:
                model = fit_stage(settings, folder, splits)
            for certificate in (folder / "release").glob("certificate.*"):
                certificate.unlink()
        else:
            model = fit_stage(settings, folder, splits)
        sample_stage(settings, folder, splits, model)
        audit_stage(settings, folder, splits, model)
    return {"run": name, "epsilon": settings.epsilon if settings.private and name != "noise_off" else None,
            "canaries": read_json(folder / "metrics.json")["audit"], "rows": read_json(folder / "private" / "audit.json")}


def attack(report, word):
    """`estimate [low, high]` of the attack whose name has this word."""
    found = next(a for a in report["attacks"] if word in a["name"])
    return f"{found['statistic']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"


def table(lines):
    head = "| run | claimed ε | ε at least (95 %) | could show | AUC on canaries | data only: AUC | data only: TPR at 1 % FPR | verdict |\n" + "|---" * 8 + "|"
    rows = [f"| {x['run']} | {'-' if x['epsilon'] is None else x['epsilon']:} | {x['canaries']['epsilon_bound']:.2f} | {x['canaries']['largest']:.2f} | "
            f"{x['canaries']['auc']:.3f} [{x['canaries']['auc_interval'][0]:.3f}, {x['canaries']['auc_interval'][1]:.3f}] | "
            f"{attack(x['rows'], 'AUC')} | {attack(x['rows'], 'TPR')} | {x['rows']['verdict']} |" for x in lines]
    return "\n".join([head, *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/audit"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    overrides = parse_overrides(args.set)
    lines = [run(name, make_settings({**COMMON, **values, **overrides, "experiment": name}), args.out / name) for name, values in RUNS.items()]
    print(table(lines))
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
