"""Line 12: what is not private says so."""

import json
import math

import pytest

from parts import RUN, splits
from dpsynth import generators, runs
from dpsynth.finetune import finetune_run
from dpsynth.runs.run import Run
from dpsynth.settings import SettingsError


@pytest.mark.parametrize("generator", ["prompt", "real_train"])
def test_what_is_not_fine_tuned_is_not_trained(tmp_path, generator):
    with pytest.raises(SettingsError, match="generator"):
        finetune_run(
            Run(RUN.model_copy(update={"generator": generator}), tmp_path / "dp"), splits(), progress=False
        )
    assert not (tmp_path / "dp").exists()


def test_a_model_trained_without_privacy_says_so_beside_its_weights(tmp_path):
    finetune_run(
        Run(RUN.model_copy(update={"epsilon": math.inf}), tmp_path / "run"), splits(), progress=False
    )
    assert (tmp_path / "run" / "release" / "NOT_PRIVATE.md").exists()
    assert "without differential privacy" in (tmp_path / "run" / "release" / "NOT_PRIVATE.md").read_text()
    assert not (tmp_path / "run" / "release" / "certificate.json").exists()


REASONS = {"prompt": "a prompted model", "real_train": "real training rows", "real_test": "real test rows"}


@pytest.mark.parametrize("generator", REASONS)
def test_rows_that_no_guarantee_covers_are_marked_with_their_reason(tmp_path, monkeypatch, generator):
    def sampled(model, settings, fmt, folder, certificate_hash):
        (folder / "synthetic.jsonl").write_text(json.dumps({"text": "a row", "label": "positive"}) + "\n")
        return {"rejected": {}}

    monkeypatch.setattr(generators.prompted, "sample_to_file", sampled)
    settings = RUN.model_copy(update={"generator": generator})
    folder = runs.prepare_folder(settings, tmp_path / "run")
    runs.sample_stage(Run(settings, folder), splits(), None)
    (mark,), (rows,) = folder.rglob("NOT_PRIVATE.md"), folder.rglob("synthetic.jsonl")
    assert mark.parent == rows.parent and mark.parent.name == (
        "release" if generator == "prompt" else "private"
    )
    assert [other for other in REASONS if REASONS[other] in mark.read_text()] == [
        generator
    ] and "There is no certificate" in mark.read_text()


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_rows_of_a_fine_tuned_model_are_marked_if_it_was_trained_without_privacy(
    tmp_path, monkeypatch, epsilon
):
    monkeypatch.setattr(
        generators.prompted,
        "sample_to_file",
        lambda model, settings, fmt, folder, certificate_hash: [
            (folder / "synthetic.jsonl").write_text('{"text": "a row"}\n'),
            {"rejected": {}},
        ][1],
    )
    settings = RUN.model_copy(update={"epsilon": epsilon})
    folder = runs.prepare_folder(settings, tmp_path / "run")
    runs.sample_stage(Run(settings, folder), None, None)
    marks = [mark.read_text() for mark in folder.rglob("NOT_PRIVATE.md")]
    assert len(marks) == (epsilon == math.inf) and all(
        "without differential privacy" in mark for mark in marks
    )


def test_without_privacy_there_is_no_certificate(tmp_path):
    finetune_run(
        Run(RUN.model_copy(update={"epsilon": math.inf}), tmp_path / "plain"), splits(), progress=False
    )
    assert not (tmp_path / "plain" / "release" / "certificate.json").exists()
