"""The copy test: verbatim copies of training rows mixed into a fresh sample must fail the audit, fresh
samples must pass it.

    python benchmarks/copies.py --json OUT

Two kinds of rows: generated film reviews, and a table of 8 numeric columns. Copies are 100 %, 50 %, 10 % and
1 % of the synthetic rows; then 20 fresh samples, each with training and held-out rows of its own, all of
which must pass: at the level of the audit, .01 for all attacks together, twenty honest audits do with a
probability of .82. Beside each verdict stands what a score on a scale of 0 to 10 would have said that
*averages* over rows and over components: the mean of the distance ratio (training over held-out rows), of one
minus the membership advantage, and of the share of training rows not copied.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

import numpy as np
import pandas as pd

from dpsynth.audit import audit_files
from dpsynth.demo import reviews

SHARES = (1.0, 0.5, 0.1, 0.01)
COLUMNS = 8


def text_rows(rows, seed):
    """`(train, holdout, fresh)`: reviews divided at random, and reviews of another seed."""
    real = pd.DataFrame(reviews(2 * rows, seed=seed))[["text"]].sample(frac=1, random_state=seed)
    return real[:rows], real[rows:], pd.DataFrame(reviews(rows, seed=seed + 10_000))[["text"]]


def table_rows(rows, seed):
    """`(train, holdout, fresh)`: correlated normal and log-normal columns."""
    rng, mix = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(COLUMNS, COLUMNS)) / 2
    values = rng.normal(size=(3 * rows, COLUMNS)) @ mix
    values[:, ::2] = np.exp(values[:, ::2])
    frame = pd.DataFrame(values, columns=[f"x{i}" for i in range(COLUMNS)])
    return frame[:rows], frame[rows : 2 * rows], frame[2 * rows :]


def averaged_score(report):
    """0 to 10, as an average over rows and components; for comparison only."""
    (arrays,) = report.details.values()
    near, far = (float(np.mean(d)) for d in arrays["distance"])
    auc = next(a.statistic for a in report.attacks if a.name.endswith("(AUC)"))
    return 10 * float(
        np.mean([min(1.0, near / far), 1 - 2 * abs(auc - 0.5), 1 - report.attacks[0].statistic])
    )


def judged(kind, share, synthetic, train, holdout):
    """One line of the table."""
    began = time.perf_counter()
    report = audit_files(synthetic, train, holdout)
    seconds = time.perf_counter() - began
    return {
        "kind": kind,
        "copies": share,
        "rows": len(synthetic),
        "verdict": report.verdict,
        "attacks_that_succeed": len(report.failed),
        "worst": report.worst.name,
        "worst_p": report.worst.adjusted_p,
        "epsilon_bound": report.epsilon_bound,
        "sees_copies_from": report.attacks[0].detectable,
        "averaged_score": averaged_score(report),
        "seconds": seconds,
    }


def copy_lines(kind, make, rows):
    """The verdict for every share of copies."""
    train, holdout, fresh = make(rows, 0)
    for share in SHARES:
        count = round(share * rows)
        yield judged(kind, share, pd.concat([train[:count], fresh[count:]]), train, holdout)


def fresh_lines(kind, make, rows, draws):
    """The verdicts for fresh samples."""
    for seed in range(1, draws + 1):
        train, holdout, fresh = make(rows, seed)
        yield judged(kind, 0.0, fresh, train, holdout)


def show(line):
    print(
        f"{line['kind']:6} {line['copies']:7.0%} {line['rows']:6,} {line['verdict']:11}"
        f" {line['attacks_that_succeed']:8} "
        f"{line['worst_p']:9.2g} {line['epsilon_bound']:7.2f} {line['averaged_score']:8.1f}"
        f" {line['seconds']:6.1f}  {line['worst']}"
    )


def named(lines):
    """The lines by a name of their own: what was copied, or the number of the fresh sample."""
    return {
        f"{line['kind']}, {line['copies']:.0%} copied" + (f", {i}" if line["copies"] == 0 else ""): line
        for i, line in enumerate(lines)
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--text-rows", type=int, default=2000)
    parser.add_argument("--table-rows", type=int, default=5000)
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    lines, passed, correct = [], {}, True
    print("rows    copies number verdict      attacks   worst p  eps >= averaged      s  worst attack")
    for kind, make, rows in (("text", text_rows, args.text_rows), ("table", table_rows, args.table_rows)):
        copied, fresh = [], []
        for into, made in (
            (copied, copy_lines(kind, make, rows)),
            (fresh, fresh_lines(kind, make, rows, args.draws)),
        ):
            for line in made:
                show(line)
                into.append(line)
        passed[kind] = sum(line["verdict"] == "passes" for line in fresh)
        correct &= all(line["verdict"] == "fails" for line in copied) and passed[kind] == args.draws
        lines += copied + fresh
    for kind, count in passed.items():
        print(f"{kind}: {count} of {args.draws} fresh samples pass")
    print("as it should be" if correct else "WRONG: a copy passed, or a fresh sample failed")
    if args.json:
        report = {
            "name": "copies",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "contenders": named(lines),
            "ratios": {f"fresh_{kind}_passed": count / args.draws for kind, count in passed.items()},
            "correct": bool(correct),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
