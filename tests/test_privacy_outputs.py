"""Line 11: nothing that is released holds anything else that was computed from private rows."""

import json
import stat

import numpy as np
import pandas as pd
import pytest

from parts import RUN, groups_of_rows, splits
from dpsynth import evaluation
from dpsynth.data import from_frame
from dpsynth.finetune import finetune_run, prepare_model, row_losses, some_rows
from dpsynth.formats import make_format
from dpsynth.manifest import certificate_hash_of
from dpsynth.runs import evaluate_stage, fit_stage, load_stage, sample_stage
from dpsynth.runs.run import Run
from dpsynth.settings import DataError
from dpsynth.files import write_private
from dpsynth.state import file_hash


def without_hashes(file):
    """A file's content without the hashes of what is released with it, which follow from that alone; any
    other hash stays.
    """
    content, release = file.read_bytes(), file.parent
    if release.name == "release":
        known = [
            *map(file_hash, release.iterdir()),
            certificate_hash_of(release),
            json.loads((release / "manifest.json").read_text())["sha256"],
        ]
        for digest in known:
            content = content.replace(digest.encode(), b"")
    return content


def test_an_outlier_row_changes_no_released_byte_that_is_not_a_dp_output(run, tmp_path):
    folder = tmp_path / "dp"
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "secret").write_bytes((run / "private" / "secret").read_bytes())
    finetune_run(Run(RUN, folder), splits("\u2603 " * 500 + "a row of another world"), progress=False)
    for name in ("certificate.json", "certificate.md", "manifest.json"):
        assert without_hashes(folder / "release" / name) == without_hashes(run / "release" / name)
    assert (folder / "release" / "adapter.npz").stat().st_size == (
        run / "release" / "adapter.npz"
    ).stat().st_size


@pytest.mark.parametrize(
    "settings, ordinary, outlier",
    [
        (
            RUN,
            pd.DataFrame([{"text": f"row {i} was fine", "label": i % 2} for i in range(40)]),
            pd.DataFrame(
                [
                    {
                        "text": "\u2603 \U0001f600 zxq " * 500 if i == 7 else f"row {i} was fine",
                        "label": i % 2,
                    }
                    for i in range(40)
                ]
            ),
        ),
        (
            RUN.model_copy(
                update={"unit": "user", "batch_size": 4, "epochs": 1, "audit_fraction": 0.2, "train_size": 9}
            ),
            groups_of_rows(["a plain row"]),
            groups_of_rows(["\u2603 \U0001f600 zxq " * 200 + str(i) for i in range(40)]).replace(
                {"user": {"u9": "lena"}}
            ),
        ),  # her hash would keep her out
        (
            RUN.model_copy(update={"duplicates": "drop"}),
            pd.DataFrame([{"text": f"row {i} was fine", "label": 0} for i in range(40)]),
            pd.DataFrame([{"text": f"row {i if i != 7 else 8} was fine", "label": 0} for i in range(40)]),
        ),
    ],
)
def test_an_outlier_unit_shows_in_no_file_but_in_dp_outputs(tmp_path, settings, ordinary, outlier):
    secret, trained = bytes(range(32)), set()
    for name, frame in (("a", ordinary), ("b", outlier)):
        folder = tmp_path / name / "dp"
        (folder / "private").mkdir(parents=True)
        (folder / "private" / "secret").write_bytes(secret)
        data = load_stage(Run(settings, folder), from_frame(frame, settings, test=ordinary[:10]))
        trained.add(data.train.fingerprint(secret))
        fit_stage(Run(settings, folder), data)
    assert len(trained) == 2
    shown = [
        {
            p.relative_to(tmp_path / name): p
            for p in (tmp_path / name / "dp").rglob("*")
            if p.is_file() and not {"private", "tokens"} & {*p.parts}
        }
        for name in "ab"
    ]
    assert shown[0].keys() == shown[1].keys() and len(shown[0]) >= 5
    for path, file in shown[0].items():
        if path.name == "metrics.json":
            one, two = (
                {
                    k: v
                    for k, v in json.loads(f.read_text()).items()
                    if not k.startswith(("seconds", "held_out"))
                }
                for f in (file, shown[1][path])
            )
            assert (
                one == two
                and one["train_units"]
                == json.loads((tmp_path / "a" / "dp" / "release" / "certificate.json").read_text())[
                    "num_units"
                ]
            )
        elif path.name == "adapter.npz":
            assert file.stat().st_size == shown[1][path].stat().st_size
        else:
            assert without_hashes(file) == without_hashes(shown[1][path]), path


def test_a_label_outside_the_public_set_stops_the_run_before_anything_is_charged_or_released(tmp_path):
    rows, folder, ledger = tmp_path / "rows.csv", tmp_path / "dp", tmp_path / "ledger.sqlite"
    labels = ["zxq disease" if i == 7 else "positive" for i in range(40)]
    pd.DataFrame({"text": [f"row {i} was fine" for i in range(40)], "label": labels}).to_csv(
        rows, index=False
    )
    settings = RUN.model_copy(update={"data": str(rows), "ledger": str(ledger)})
    with pytest.raises(DataError, match="line 9, column label: not one of negative, positive$"):
        fit_stage(Run(settings, folder), load_stage(Run(settings, folder)))
    assert not ledger.exists() and not list((folder / "release").iterdir())
    assert not any(b"zxq" in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_monitoring_stays_private_and_is_certified(tmp_path):
    settings = RUN.model_copy(update={"monitor": "private"})
    finetune_run(Run(settings, tmp_path / "dp"), splits(), progress=False)
    assert (tmp_path / "dp" / "private" / "losses.jsonl").exists()
    assert "operator" in json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())["monitor"]


def test_the_loss_that_is_reported_is_of_test_rows(run):
    rows = [{"text": f"row {i} was {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]
    others = pd.DataFrame(
        {"text": [f"{i} ships under sail, far from any coast" for i in range(10)], "label": [0, 1] * 5}
    )
    data = from_frame(pd.DataFrame(rows), RUN, test=others)
    model, figures = finetune_run(Run(RUN, run), data, progress=False)
    fmt, chosen = (
        make_format(RUN),
        data.test.take(some_rows(RUN.validation_size, 10, RUN.seed)),
    )
    for name, weights in (("held_out_loss", model), ("held_out_loss_untuned", prepare_model(RUN))):
        assert figures[name] == pytest.approx(row_losses(weights, chosen, fmt, RUN).mean(), rel=1e-5)
        of_training = row_losses(
            weights, data.train.take(some_rows(RUN.validation_size, 40, RUN.seed)), fmt, RUN
        ).mean()
        assert figures[name] != pytest.approx(of_training, rel=1e-5)
    assert figures["held_out_loss"] != figures["held_out_loss_untuned"]


class Embedder:
    name, length, key = "e", 8, ["e"]

    def __call__(self, texts, progress):
        return np.array([[len(text), text.count("o")] for text in texts], np.float32), "mean"


def test_vectors_of_rows_lie_in_private_folders_under_names_that_nobody_can_guess(tmp_path, monkeypatch):
    settings = RUN.model_copy(
        update={
            "generator": "real_train",
            "num_samples": 12,
            "num_mauve_samples": 8,
            "num_mauve_trials": 1,
            "experiment": "use_train",
        }
    )
    (tmp_path / ".embeddings").mkdir()
    (tmp_path / ".embeddings" / "abc-mean.npy").write_bytes(b"of an earlier version")
    names = []
    monkeypatch.setattr(evaluation.metrics, "open_embedder", lambda *options: Embedder())
    for name in ("use_train", "again"):
        folder = tmp_path / name
        data = load_stage(Run(settings, folder), splits())
        sample_stage(Run(settings, folder), data, None)
        evaluate_stage(Run(settings, folder), data)
        names.append({file.name for file in (folder / "private" / "embeddings").glob("*.npy")})
    kept = [path for path in tmp_path.rglob("*") if path.suffix == ".npy"]
    shared = tmp_path / ".private" / "embeddings"
    assert sorted(path.parent for path in kept) == sorted(
        [shared, *(tmp_path / name / "private" / "embeddings" for name in ("use_train", "again"))]
    )
    assert not names[0] & names[1] and not (tmp_path / ".embeddings").exists()
    for folder in {path.parent for path in kept} | {shared.parent, tmp_path / "again" / "private"}:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in [*kept, *(path.parent / "key" for path in kept)]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("lies_there", ["file", "link"])
def test_a_private_file_is_not_written_into_what_lies_there(tmp_path, lies_there):
    temporary, elsewhere = tmp_path / ".a.json.tmp", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    temporary.symlink_to(elsewhere) if lies_there == "link" else temporary.write_text("open to all")
    elsewhere.chmod(0o644), temporary.chmod(0o644)
    write_private(tmp_path / "a.json", "{}")
    assert (
        stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600 and not (tmp_path / "a.json").is_symlink()
    )
    assert (tmp_path / "a.json").read_text() == "{}" and elsewhere.read_text() == "mine"
