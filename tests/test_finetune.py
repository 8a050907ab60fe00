"""Training beside its privacy: buckets, the loss, the checks before, and what a run without privacy does."""

import inspect
import json
import math
import re

import numpy as np
import pytest

from parts import RUN, SETTINGS, splits, trainer
import dpsynth.data
import dpsynth.privacy
from dpsynth.data import TokenStore
from dpsynth.finetune import bucket_lengths, finetune_run, make_mean_loss, microbatches
from dpsynth.models import load_model, setup_tuning
from dpsynth.pipeline import DATA_SETTINGS
from dpsynth.settings import Settings, SettingsError


def test_buckets_cover_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    for limit in (48, 96, 250, 512):
        parts = list(microbatches(np.arange(300), np.minimum(lengths, limit), bucket_lengths(limit), 16))
        assert sorted(i for _, p in parts for i in p if i >= 0) == list(range(300)) and all(len(p) == 16 for _, p in parts)
        assert all(min(lengths[i], limit) <= bucket for bucket, p in parts for i in p if i >= 0)


def test_training_without_privacy_lowers_the_loss(micro, store):
    one = trainer(micro, store, SETTINGS.model_copy(update={"learning_rate": 0.02}), noise_multiplier=0.0, target_epsilon=math.inf, steps=30)
    loss = make_mean_loss(micro)
    batch = store.batch(np.arange(8), 48)
    before = float(loss(one.trainable, one.frozen, batch).mean())
    for _ in range(30):
        one.update()
    assert float(loss(one.trainable, one.frozen, batch).mean()) < before - 0.5


def test_canaries_take_part_as_their_coins_say(tmp_path):
    from dpsynth.canaries import CanaryCoins
    settings = RUN.model_copy(update={"canaries": 60})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    included = CanaryCoins.flip(60, tmp_path / "dp" / "private").included
    assert certificate["num_units"] == 100 and len(TokenStore(tmp_path / "dp" / "private" / "tokens")) == 40 + included.sum()
    assert 12 < included.sum() < 48


def test_prompt_longer_than_the_sequence_is_refused(tmp_path):
    settings = RUN.model_copy(update={"sequence_length": 4})
    with pytest.raises(SettingsError, match="sequence_length"):
        finetune_run(settings, splits(settings=settings), tmp_path / "dp", progress=False)


def test_full_tuning_refuses_half_precision():
    with pytest.raises(SettingsError, match="float32"):
        setup_tuning(load_model("tiny", "bfloat16"), Settings(tuning="full", dtype="bfloat16"))


def test_splits_are_remembered_by_every_setting_that_loading_reads():
    read = set(re.findall(r"settings\.(\w+)", inspect.getsource(dpsynth.data))) & set(Settings.model_fields) | {"label_names"}
    assert read <= set(DATA_SETTINGS) and {"unit", "audit_fraction"} <= read
