"""Training beside its privacy: buckets, the loss, the checks before, and what a run without privacy does."""

import json
import math
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from parts import RUN, SETTINGS, splits, trainer
import dpsynth.data
import dpsynth.privacy
from dpsynth.data import TokenStore, from_frame
from dpsynth.finetune import (
    LossLog,
    bucket_lengths,
    example_loss,
    finetune_run,
    flatten,
    make_mean_loss,
    microbatches,
    scores_at_once,
    some_rows,
    unit_loss,
)
from dpsynth.models import LanguageModel, load_model, setup_tuning
from dpsynth.runs import DATA_SETTINGS
from dpsynth.runs.run import Run
from dpsynth.settings import Settings, SettingsError

import jax


def test_buckets_cover_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    for limit in (48, 96, 250, 512):
        parts = list(microbatches(np.arange(300), np.minimum(lengths, limit), bucket_lengths(limit), 16))
        assert sorted(i for _, p in parts for i in p if i >= 0) == list(range(300)) and all(
            len(p) == 16 for _, p in parts
        )
        assert all(min(lengths[i], limit) <= bucket for bucket, p in parts for i in p if i >= 0)


def test_scores_in_chunks_give_the_losses_and_gradients_of_all_at_once(micro, store, monkeypatch):
    batch, seen = store.batch(np.arange(3), 48), []
    rows = tuple(jax.numpy.asarray(batch[name]) for name in ("tokens", "prompt_length", "total_length"))
    monkeypatch.setattr(
        micro, "logits", lambda *of: (seen.append(of[2].shape[1]), LanguageModel.logits(micro, *of))[1]
    )

    def found(alone, scores):
        """Losses of rows side by side, and gradients of one row alone and of a unit of three; whether
        scores are computed twice.
        """
        monkeypatch.setattr("dpsynth.finetune.loss.one_by_one", lambda: alone)
        monkeypatch.setattr(
            "dpsynth.finetune.loss.ALONE_SCORES" if alone else "dpsynth.finetune.loss.CHUNK_SCORES", scores
        )
        one = lambda trainable: example_loss(micro, trainable, micro.frozen, *(part[0] for part in rows))
        unit = lambda trainable: unit_loss(micro, trainable, micro.frozen, *rows)
        values = [
            make_mean_loss(micro)(micro.trainable, micro.frozen, batch),
            *(flatten(jax.jit(jax.grad(f))(micro.trainable)) for f in (one, unit)),
        ]
        seen.clear()
        return values, "remat" in str(jax.make_jaxpr(one)(micro.trainable))

    whole, twice = found(True, 1 << 26)
    assert seen == [47] and not twice
    monkeypatch.setattr("dpsynth.finetune.loss.CHUNK_SCORES", 2 * micro.vocabulary_size)
    for alone, positions in ((True, 10), (False, 4)):
        values, twice = found(alone, positions * micro.vocabulary_size)
        assert set(seen) == {positions} and twice
        for value, expected in zip(values, whole):
            np.testing.assert_allclose(value, expected, atol=1e-5)


def test_rows_that_are_computed_side_by_side_share_the_scores_that_are_held(monkeypatch):
    for alone, expected in ((True, [1 << 26, 1 << 24, 1 << 21, 1 << 21]), (False, 4 * [1 << 21])):
        monkeypatch.setattr("dpsynth.finetune.loss.one_by_one", lambda alone=alone: alone)
        assert [scores_at_once(rows) for rows in (1, 4, 32, 100)] == expected


def test_training_without_privacy_lowers_the_loss(micro, store):
    one = trainer(
        micro,
        store,
        SETTINGS.model_copy(update={"learning_rate": 0.02}),
        noise_multiplier=0.0,
        target_epsilon=math.inf,
        steps=30,
    )
    loss = make_mean_loss(micro)
    batch = store.batch(np.arange(8), 48)
    before = float(loss(one.trainable, one.frozen, batch).mean())
    for _ in range(30):
        one.update()
    assert float(loss(one.trainable, one.frozen, batch).mean()) < before - 0.5


def test_canaries_take_part_as_their_coins_say(tmp_path):
    from dpsynth.canaries import CanaryCoins
    from dpsynth.privacy import stored_run

    settings = RUN.model_copy(update={"canaries": 60})
    finetune_run(Run(settings, tmp_path / "dp"), splits(), progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    private = tmp_path / "dp" / "private"
    included = CanaryCoins.read(60, stored_run(private).state(private)).included
    assert (
        certificate["num_units"] == 100
        and len(TokenStore(tmp_path / "dp" / "private" / "tokens")) == 40 + included.sum()
    )
    assert 12 < included.sum() < 48


def test_prompt_longer_than_the_sequence_is_refused(tmp_path):
    settings = RUN.model_copy(update={"sequence_length": 4})
    with pytest.raises(SettingsError, match="sequence_length"):
        finetune_run(Run(settings, tmp_path / "dp"), splits(settings=settings), progress=False)


def test_full_tuning_refuses_half_precision():
    with pytest.raises(SettingsError, match="float32"):
        setup_tuning(load_model("tiny", "bfloat16"), Settings(tuning="full", dtype="bfloat16"))


def source_of_data():
    """The code of all modules that read and check rows."""
    folder = pathlib.Path(dpsynth.data.__file__).parent
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def test_splits_are_remembered_by_every_setting_that_loading_reads():
    read = set(re.findall(r"settings\.(\w+)", source_of_data())) & set(Settings.model_fields) | {
        "label_names"
    }
    assert read <= set(DATA_SETTINGS) and {"unit", "audit_fraction"} <= read


def test_what_stands_for_all_rows_is_not_the_first_ones():
    rows = some_rows(64, 1000, 42)
    assert len(rows) == len(set(rows.tolist())) == 64 and rows.max() > 500 and (np.diff(rows) > 0).all()
    assert some_rows(64, 10, 42).tolist() == list(range(10)) and len(some_rows(0, 10, 42)) == 0


def test_the_loss_on_a_file_sorted_by_label_is_that_of_both_labels(tmp_path, monkeypatch):
    import dpsynth.finetune

    seen = []
    whole = dpsynth.finetune.row_losses
    monkeypatch.setattr(
        dpsynth.finetune.loop,
        "row_losses",
        lambda model, records, *rest: seen.append(records.labels) or whole(model, records, *rest),
    )
    rows = pd.DataFrame({"text": [f"row {i}" for i in range(40)], "label": [int(i >= 20) for i in range(40)]})
    settings = RUN.model_copy(update={"validation_size": 8, "epochs": 0.2})
    finetune_run(Run(settings, tmp_path / "run"), from_frame(rows, settings, test=rows), progress=False)
    assert [set(labels.tolist()) for labels in seen] == 2 * [{0, 1}]  # of the model before and after


def test_no_progress_bar_is_a_widget(repo):
    for path in (repo / "dpsynth").rglob("*.py"):
        assert "tqdm.auto" not in path.read_text(encoding="utf-8") and "tqdm.notebook" not in path.read_text(
            encoding="utf-8"
        ), path


def test_steps_that_a_crash_repeats_are_logged_once(micro, store, tmp_path):
    one = trainer(micro, store)
    log = LossLog(one.randomness.state(tmp_path), one, rows=4)
    one.update()
    one.save(tmp_path / "checkpoint.npz")
    log(one)
    one.update()
    log(one)  # and then the process is killed
    again = trainer(micro, store)
    again.restore(tmp_path / "checkpoint.npz")
    again.update()
    LossLog(again.randomness.state(tmp_path), again, rows=4)(again)
    assert [json.loads(line)["step"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]
