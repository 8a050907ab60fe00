"""Bars of the side-by-side records: training, sampling and memory, one picture for each record, in
benchmarks/plots/.

python tools/plot_benchmarks.py [RECORD.json …]      all of benchmarks/records/ that are side by side, unless
some are named
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS, THEIRS = "#1f6f8b", "#c2c2c2"
UNITS = {
    "training": ("rows_per_core_second", "rows a core-second (more is better)"),
    "sampling": ("tokens_per_core_second", "tokens a core-second (more is better)"),
    "memory": ("peak_gib", "GiB at most (less is better)"),
}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dpsynth", "font.size": 9}


def title(record):
    """What was measured, in a line."""
    said = record["arguments"]
    shape = (
        f"{said['rows']} rows of {said['length']} tokens"
        if record["name"] == "training"
        else f"texts of up to {said['length']} tokens, {said['batch']} at once"
        if record["name"] == "sampling"
        else f"microbatch of {said['microbatch']} × {said['length']} tokens"
    )
    return f"{record['name']}: {said['model']}, {shape}, {said['cores']} core{'s' * (said['cores'] > 1)}"


def draw(record, path):
    """Write the picture of one record."""
    key, unit = UNITS[record["name"]]
    figures = {name: contender[key] for name, contender in record["contenders"].items()}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 0.5 + 0.32 * len(figures)), layout="constrained")
        bars = axes.barh(
            list(figures),
            list(figures.values()),
            color=[OURS if "dpsynth" in name or name.startswith("batch_") else THEIRS for name in figures],
        )
        more = [">" if contender.get("ended") else "" for contender in record["contenders"].values()]
        axes.bar_label(
            bars,
            [f"{sign}{value:.3g}" for sign, value in zip(more, figures.values(), strict=True)],
            padding=3,
        )
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(unit)
        axes.set_title(title(record), loc="left", fontsize=9)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main():
    named = [pathlib.Path(name) for name in sys.argv[1:]] or sorted(
        (ROOT / "benchmarks" / "records").glob("*.json")
    )
    folder = ROOT / "benchmarks" / "plots"
    for path in named:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("name") in UNITS and "cores" in record["arguments"]:
            folder.mkdir(exist_ok=True)
            draw(record, folder / f"{path.stem}.svg")
            print(folder / f"{path.stem}.svg")


if __name__ == "__main__":
    main()
