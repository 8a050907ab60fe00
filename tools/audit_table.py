"""The audit table: the same training with more and less privacy, attacked in the same ways.

    python tools/audit_table.py --out runs/audit [--again] [--set key=value …] [--json FILE]
    python tools/audit_table.py --null 200 [--json FILE]

Runs, on the built-in reviews with canaries among the training rows and as many rows kept out as are trained
on: DP at ε = 1 and 8, the ε = 8 run with its noise switched off on purpose (it never gets a certificate, and
is marked before it starts), training without DP, and without DP with every canary ten times. Finished runs
are not repeated; with `--again` they are audited once more, by the code as it is now, without any training.
Prints a Markdown table.

With `--null` nothing is trained: so many audits, judged as those of runs are, of an ε of 0 that holds.
Neither the training rows nor the coins had any influence on the rows, on the losses of the canaries (which
are drawn) or on the batches and the noise; each audit has data, coins and a secret of its own. Printed is how
many of them raise a false alarm.
"""

import argparse
import contextlib
import json
import math
import pathlib
import unittest.mock

import numpy as np

from dpsynth import finetune, manifest, privacy
from dpsynth.audit import (
    CHECK_LEVEL,
    audit_canaries,
    audit_canaries_in_rows,
    audit_files,
    exact_interval,
    replay_checks,
)
from dpsynth.canaries import make_canaries
from dpsynth.data import load
from dpsynth.demo import reviews
from dpsynth.runs import (
    Run, BOUND_ERROR, ERROR, Findings, ROWS_ERROR, audit_stage, fit_stage, load_generator, load_stage,
    read_kept, sample_stage
)
from dpsynth.runs import read_json
from dpsynth.settings import make_settings, parse_overrides

COMMON = {
    "data": "demo",
    "train_size": 2000,
    "audit_fraction": 0.5,
    "canaries": 400,
    "sequence_length": 96,
    "prompt": "[film][{label}]:",
    "tuning": "full",
    "epochs": 6.0,
    "batch_size": 256,
    "learning_rate": 0.001,
    "num_samples": 1000,
    "num_mauve_samples": 500,
    "validation_size": 0,
    "ledger": "runs",
}
RUNS = {
    "dp_eps1": {"epsilon": 1.0},
    "dp_eps8": {"epsilon": 8.0},
    "noise_off": {"epsilon": 8.0},
    "non_dp": {"epsilon": math.inf},
    "non_dp_x10": {"epsilon": math.inf, "canary_copies": 10},
}


SILENT = (
    "# Not private\n\nThe noise of this run was switched off on purpose, to see an audit find it. Nothing "
    "bounds what the adapter and the rows "
    "tell about the rows they were made from, whatever epsilon its settings name.\n\n"
    "There is no certificate.\n"
)


def fit_silently(run, splits):
    """As `fit_stage`, with no noise, no self-check that would find this out, and no certificate; the
    folder is marked first.
    """
    (run.release_folder / "NOT_PRIVATE.md").write_text(SILENT, encoding="utf-8")
    with contextlib.ExitStack() as patches:
        for owner, name, nothing in (
            (privacy.Session, "_grid_noise", lambda self, count: np.zeros(count, np.int32)),
            (finetune.run, "self_check", lambda trainer, before: {}),
            (finetune.run, "checked_fit", lambda release, name, private: release / name),
            (
                finetune.run,
                "write_release",
                lambda certificate, release, files: manifest.write_release(None, release, files),
            ),
        ):
            patches.enter_context(unittest.mock.patch.object(owner, name, nothing))
        return fit_stage(run, splits)


def audit_again(run):
    """Audit a run that was trained and sampled, from its folder alone."""
    return audit_stage(run, load(run.settings), load_generator(run).model)


def run(name, settings, folder, again=False):
    """Train, sample and attack; returns the figures of one line. `again`: attack a finished run once more."""
    one = Run(settings, folder)
    if not (folder / "private" / "audit.json").exists():
        splits = load_stage(one)
        generator = (fit_silently if name == "noise_off" else fit_stage)(one, splits)
        sample_stage(one, splits, generator)
        audit_stage(one, splits, generator.model)
    elif again:
        audit_again(one)
    numbers = read_json(folder / "metrics.json")
    return {
        "run": name,
        "epsilon": settings.epsilon if settings.private and name != "noise_off" else None,
        "canaries": numbers["audit"],
        "canaries_in_rows": numbers["audit_in_rows"],
        "rows": read_kept(one, "audit.json"),
        **read_kept(one, "findings.json"),
    }


def attack(report, word):
    """`estimate [low, high]` of the attack whose name has this word."""
    found = next(a for a in report["attacks"] if word in a["name"])
    return f"{found['statistic']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"


def bounds(found, *names):
    """The named ε of a canary audit, as texts."""
    return [f"{found[name]:.2f}" for name in names]


def share(found):
    """`AUC [low, high]` of a canary audit."""
    return f"{found['auc']:.3f} [{found['auc_interval'][0]:.3f}, {found['auc_interval'][1]:.3f}]"


SURE = f"{1 - BOUND_ERROR:.1%}"
HEADER = (
    "run",
    "claimed ε",
    f"ε at least ({SURE})",
    "could show",
    "if Gaussian, at least",
    "AUC on canaries",
    f"data only: ε at least ({SURE})",
    "data only: AUC on canaries",
    "data only: AUC",
    "data only: TPR at 1 % FPR",
    "attacks on rows",
    "verdict",
)


def table(lines):
    """Markdown: one line for each run."""
    cells = [
        (
            x["run"],
            "-" if x["epsilon"] is None else x["epsilon"],
            *bounds(x["canaries"], "epsilon_bound", "largest", "gaussian_bound"),
            share(x["canaries"]),
            *bounds(x["canaries_in_rows"], "epsilon_bound"),
            share(x["canaries_in_rows"]),
            attack(x["rows"], "AUC"),
            attack(x["rows"], "TPR"),
            x["rows"]["verdict"],
            x["verdict"],
        )
        for x in lines
    ]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (HEADER, ("---",) * len(HEADER), *cells))


NULL_ROWS, NULL_CANARIES = 150, 100
NOTHING = {
    "epsilon": 0.0,
    "epsilon_replace_one": 0.0,
    "delta": 1e-5,
}  # with a larger δ so few canaries could show no ε at all


def null_findings(seed):
    """`Findings` of one audit, without any training effect, of the claim that ε is 0."""
    texts = [row["text"] for row in reviews(4 * NULL_ROWS, seed=10_000 + seed)]
    order = np.random.default_rng(seed).permutation(2 * NULL_ROWS)
    train, holdout = [texts[i] for i in order[:NULL_ROWS]], [texts[i] for i in order[NULL_ROWS:]]
    synthetic, public = texts[2 * NULL_ROWS : 3 * NULL_ROWS], texts[3 * NULL_ROWS :]
    report = audit_files(
        synthetic,
        train,
        holdout,
        level=ROWS_ERROR,
        confidence=1 - BOUND_ERROR,
        delta=NOTHING["delta"],
        seed=seed,
    )
    chance = np.random.default_rng([seed, 1])
    included, losses = chance.random(NULL_CANARIES) < 0.5, chance.normal(6, 1, (2, NULL_CANARIES))
    options = {"delta": report.delta, "confidence": 1 - BOUND_ERROR, "seed": seed}
    by_rows = audit_canaries_in_rows(
        synthetic, make_canaries(NULL_CANARIES, public, seed=seed), included, **options
    )
    mechanism = privacy.Mechanism(
        num_units=NULL_ROWS, expected_batch_size=15, steps=60, noise_multiplier=1.0, delta=report.delta
    )
    replay = replay_checks(mechanism, privacy.Randomness(chance.bytes(32), "null"))
    return Findings(NOTHING, replay, audit_canaries(*losses, included, **options), by_rows, report)


def null_audit(seed):
    """Whether each part of one audit without any training effect raises an alarm."""
    found = null_findings(seed)
    return {
        f"the audit as a whole: it fails (at most {ERROR:.1%})": found.verdict == "fails",
        f"attacks on rows: one succeeds ({ROWS_ERROR:.1%})": found.report.verdict == "fails",
        f"rows kept out: an epsilon above 0 is shown ({BOUND_ERROR:.1%})": found.report.epsilon_bound > 0,
        f"canaries in the model: an epsilon above 0 is shown ({BOUND_ERROR:.1%})": found.model.refutes(0.0),
        f"canaries in the rows: an epsilon above 0 is shown ({BOUND_ERROR:.1%})": found.rows.refutes(0.0),
        f"replay: a promise is called broken "
        f"({ERROR - ROWS_ERROR - 3 * BOUND_ERROR:.1%})": not found.replay.passed,
        f"division: called not random ({CHECK_LEVEL:.1%}; a warning)": found.report.division.p_value
        <= CHECK_LEVEL,
    }


def null(draws):
    """Runs the null audits, prints the false alarms with their 95 % intervals, and returns them."""
    alarms = [null_audit(seed) for seed in range(draws)]
    counts = {name: sum(alarm[name] for alarm in alarms) for name in alarms[0]}
    for name, count in counts.items():
        low, high = exact_interval(count, draws)
        print(
            f"{name}: {count} of {draws} false alarms ({count / draws:.1%}, 95 % interval {low:.1%} to"
            f" {high:.1%})"
        )
    return {"draws": draws, "alarms": counts}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/audit"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--again", action="store_true", help="audit finished runs again")
    parser.add_argument("--null", type=int, metavar="N", help="N null audits instead of the table")
    args = parser.parse_args()
    if args.null:
        found = null(args.null)
    else:
        of_run = lambda name: make_settings(
            {**COMMON, **RUNS[name], **parse_overrides(args.set), "experiment": name}
        )
        found = [run(name, of_run(name), args.out / name, args.again) for name in RUNS]
        print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
