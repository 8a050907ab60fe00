"""Keep the record of finished runs: what may be shown of them, as small text.

    python tools/keep_records.py runs/demo dpsynth/assets/records/demo

Copies of every run in a folder of runs its settings, status, numbers, its certificate or the note that it is
not private, and the first 50 rows where they are synthetic. Nothing is copied from `private/`, where the rows
are real. `dpsynth results` reads such a record like the runs themselves. A run that is not done, or an
experiment that the record would lose, is an error, and then nothing is changed. With `--add`, for a sweep
that takes days or several machines, runs that are not done are left out and experiments that only the record
has stay in it.
"""

import argparse
import itertools
import pathlib
import shutil
import sys
import tempfile

from dpsynth.files import write_json
from dpsynth.runs import read_json

ROWS = 50
FILES = ("settings.yaml", "metrics.json", "release/certificate.json", "release/NOT_PRIVATE.md")


def keep(run, target):
    """Copy what is kept of one run folder."""
    (target / "release").mkdir(parents=True)
    for name in FILES:
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)
    status = read_json(run / "status.json")
    write_json(
        target / "status.json", {name: status[name] for name in ("state", "reason", "started", "finished")}
    )
    rows = run / "release" / "synthetic.jsonl"
    if rows.exists():
        with rows.open(encoding="utf-8", newline="\n") as lines:
            (target / "release" / "synthetic.jsonl").write_text(
                "".join(itertools.islice(lines, ROWS)), encoding="utf-8"
            )
    elif not any((target / "release").iterdir()):
        (target / "release").rmdir()


def keep_all(runs, target, add=False):
    """Replace the record `target` by that of the runs in a folder, or add those that are done to it;
    returns the names of the experiments.
    """
    found = sorted(path.parent for path in runs.glob("*/settings.yaml"))
    undone = [run.name for run in found if read_json(run / "status.json").get("state") != "done"]
    if add:
        found, undone = [run for run in found if run.name not in undone], []
    lost = {path.parent.name for path in target.glob("*/settings.yaml")} - {run.name for run in found}
    if not found or undone or (lost and not add):
        sys.exit(
            f"error: {runs}: "
            + (
                f"not done: {', '.join(undone)}"
                if undone
                else f"missing: {', '.join(sorted(lost))}"
                if lost
                else "no runs"
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for run in found:
            keep(run, pathlib.Path(scratch) / "new" / run.name)
        for name in lost:
            shutil.copytree(target / name, pathlib.Path(scratch) / "new" / name)
        if target.exists():
            target.rename(pathlib.Path(scratch) / "old")
        (pathlib.Path(scratch) / "new").rename(target)
    return sorted({run.name for run in found} | lost)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--add", action="store_true")
    args = parser.parse_args()
    print(*keep_all(args.runs, args.target, args.add), sep="\n")


if __name__ == "__main__":
    main()
