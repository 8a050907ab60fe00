"""Line 9: whatever else is read from private rows is paid for or public."""

import json
import math

import numpy as np
import pytest

from parts import IMDB, RUN, splits
from dpsynth.certificate import base_model, make_certificate, verify
from dpsynth.finetune import finetune_run, label_shares
from dpsynth.pipeline import fit_stage, load_stage
from dpsynth.privacy import Access, calibrate_noise, compose, make_mechanism, noisy_counts
from dpsynth.settings import SettingsError


def test_counts_and_training_together_meet_the_target():
    plain = make_mechanism(IMDB, 25000)
    paid = make_mechanism(IMDB.model_copy(update={"label_prior": "private", "unit_count": "private"}), 25000)
    assert [a.what for a in paid.others] == ["number of training units", "label histogram"]
    assert paid.noise_multiplier > plain.noise_multiplier and 9.95 < paid.epsilon <= 10
    assert paid.epsilon == compose(paid.accesses, paid.delta) < sum(compose((a,), paid.delta) for a in paid.accesses)
    settings = IMDB.model_copy(update={"label_prior": "private", "unit_count": "private"})
    certificate = make_certificate(paid, settings, base=base_model("tiny", "", "no"))
    assert sum(a["epsilon"] == "public" for a in certificate["accesses"]) == 3 and len(certificate["accesses"]) == 6
    verify(certificate)


def test_noisy_counts_have_the_promised_noise():
    drawn = np.array(noisy_counts([100] * 20000, 5.0))
    a = math.exp(-1 / 5.0)
    assert drawn.dtype.kind == "i" and drawn.mean() == pytest.approx(100, abs=0.3)
    assert drawn.var() == pytest.approx(2 * a / (1 - a) ** 2, rel=0.05)
    assert noisy_counts([0] * 50, 5.0) != noisy_counts([0] * 50, 5.0)


def test_counts_that_spend_all_are_refused():
    with pytest.raises(SettingsError, match="spent before training by label histogram"):
        calibrate_noise(0.05, 100, 1.0, 1e-5, others=(Access("label histogram", "discrete_laplace", 0.5),))


def test_label_shares_are_shares_whatever_the_noise_did():
    assert label_shares([30, 10]) == [0.75, 0.25] and label_shares([-3, 7]) == [0, 1] and label_shares([-3, -1]) == [0.5, 0.5]


def test_an_exact_number_of_units_that_was_paid_to_be_hidden_is_in_no_file(tmp_path):
    settings = RUN.model_copy(update={"unit_count": "private", "access_share": 0.2})
    fit_stage(settings, tmp_path / "dp", load_stage(settings, tmp_path / "dp", splits(settings=settings)))
    metrics = json.loads((tmp_path / "dp" / "metrics.json").read_text())
    assert "train_units" not in metrics and 40 not in metrics.values()


def test_counts_are_estimated_once_and_used(tmp_path):
    settings = RUN.model_copy(update={"label_prior": "private", "unit_count": "private", "access_share": 0.2})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    counts = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())
    assert [certificate["num_units"]] == counts["units"] and len(counts["labels"]) == 2
    assert json.loads((tmp_path / "dp" / "release" / "label_prior.json").read_text()) == label_shares(counts["labels"])
    before = (tmp_path / "dp" / "private" / "counts.json").read_bytes()
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    assert (tmp_path / "dp" / "private" / "counts.json").read_bytes() == before
