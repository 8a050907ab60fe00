"""Does the same run release the same bytes under two versions of the code?

    python tools/compare_releases.py OLD NEW

OLD and NEW are checkouts. In each, in a process of its own, a private fine-tuning runs with the same secret:
canaries, a column as the unit, and shares of the labels that are estimated. Batches and noise are keyed by
the hash of the code, so that hash is held fixed in both; so are the estimated counts, whose noise comes from
the system. Prints the SHA-256 of every released file, and exits with 1 if one differs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

RUN = """
import json, pathlib, sys
import pandas as pd
import dpsynth, dpsynth.synthesizer, dpsynth.finetune
from dpsynth.data import from_frame
from dpsynth.demo import reviews
try:
    from dpsynth.runs import Run, fit_stage, sample_stage
except ImportError:  # of a version whose stages took settings and folder
    from dpsynth.pipeline import fit_stage, sample_stage
    Run = None
from dpsynth.settings import Settings

fixed = {"code_hash": lambda: "0" * 64, "noisy_counts": lambda counts, scale: [int(c) + 3 for c in counts]}
for name, module in list(sys.modules.items()):
    for function in fixed if name.split(".")[0] == "dpsynth" else ():
        if function in vars(module):
            setattr(module, function, fixed[function])
folder = pathlib.Path(sys.argv[1])
(folder / "private").mkdir(parents=True)
(folder / "private" / "secret").write_bytes(bytes(range(32)))
rows = [{**row, "user": f"user {i % 150}"} for i, row in enumerate(reviews(300, seed=1))]
settings = Settings(experiment="dp_ft", model="tiny", tuning="lora", lora_rank=2, sequence_length=48,
                    batch_size=24, epochs=1,
                    epsilon=8, unit="user", canaries=40, label_prior="private",
                    label_names="negative,positive",
                    prompt="[{label}]:", num_samples=12, num_mauve_samples=6, validation_size=0,
                    data_name="compared", ledger="runs")
splits = from_frame(pd.DataFrame(rows)[["text", "label", "user"]], settings, name="compared")
run = (Run(settings, folder),) if Run else (settings, folder)
sample_stage(*run, splits, fit_stage(*run, splits))
"""


def release(checkout, folder):
    """SHA-256 of each file that the run releases under the code of a checkout, a dict."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DPSYNTH_COMPILE_CACHE": "off"}
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True, cwd=folder.parent, env=environment)
    files = sorted(path for path in (folder / "release").rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for name, checkout in (("old", args.old), ("new", args.new)):
            home = pathlib.Path(scratch) / name / "run"
            home.parent.mkdir()
            found.append(release(checkout.resolve(), home))
        old, new = found
        for name in sorted({*old, *new}):
            print(
                f"{'equal ' if old.get(name) == new.get(name) else 'DIFFER'} {name} "
                f"{new.get(name, 'missing')[:16]}"
            )
    print(json.dumps({"files": len(old), "equal": old == new}))
    sys.exit(old != new)


if __name__ == "__main__":
    main()
