"""Each test is named after the line of the privacy contract it holds: mechanism, sampling, adjacency, loss, clipping, noise, stop."""
import dataclasses
import json
import math
import pathlib
import pickle

import numpy as np
import pytest
from scipy import stats

from dpsynth.privacy import (Mechanism, Randomness, Session, bind_run, calibrate_noise, compute_epsilon, grid_bits, load_secret, make_certificate,
                             make_mechanism, run_identity, verify)
from dpsynth.settings import PrivacyError, Settings, SettingsError

SECRET = bytes(range(32))


def mechanism(**changes):
    return Mechanism(**{"num_units": 1000, "expected_batch_size": 50, "steps": 200, "noise_multiplier": 1.0, "delta": 1e-4, "target_epsilon": 20.0, **changes})


@pytest.mark.parametrize("epsilon, sigma", [(10, 0.563), (3, 0.916), (1, 1.617)])
def test_noise_multiplier_of_the_tutorials_setting(epsilon, sigma):
    assert calibrate_noise(1024 / 25000, 73, epsilon, 1.5e-5) == pytest.approx(sigma, abs=0.002)


def test_calibrated_noise_never_exceeds_the_target():
    for epsilon in (0.5, 3.0, 9.0):
        sigma = calibrate_noise(0.05, 100, epsilon, 1e-5)
        assert compute_epsilon(0.05, sigma, 100, 1e-5) <= epsilon < compute_epsilon(0.05, sigma - 2e-4, 100, 1e-5)


def test_given_noise_multiplier_is_checked_without_tolerance():
    exact = mechanism().epsilon
    assert mechanism(target_epsilon=exact).epsilon == exact
    with pytest.raises(PrivacyError, match="spends epsilon"):
        mechanism(target_epsilon=exact - 1e-9)


def test_mechanism_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mechanism().expected_batch_size = 2


def test_steps_are_updates_not_microbatches():
    made = make_mechanism(Settings(epsilon=10, delta=1.5e-5, batch_size=1024, microbatch_size=2, epochs=3), 25000)
    assert made.steps == 73 and made.noise_multiplier == pytest.approx(0.563, abs=0.002)


@pytest.mark.parametrize("changes, message", [({"expected_batch_size": 1001}, "more than the 1000"), ({"delta": 1e-3}, "not below 1/n"),
                                              ({"steps": 0}, "less than one update")])
def test_impossible_mechanisms_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        mechanism(**changes)


def test_inclusion_is_binomial_and_at_most_once_per_update():
    made, randomness = mechanism(steps=400), Randomness(SECRET, "run")
    counts = np.zeros(made.num_units, int)
    for step in range(made.steps):
        batch = made.batch(randomness, step)
        assert np.unique(batch).size == batch.size
        counts[batch] += 1
    expected = stats.binom(made.steps, made.sampling_probability)
    edges = expected.ppf([0.1, 0.25, 0.5, 0.75, 0.9]).astype(int)
    observed = np.bincount(np.searchsorted(edges, counts), minlength=6)
    cumulative = np.diff(np.concatenate([[0.0], expected.cdf(edges), [1.0]]))
    assert stats.chisquare(observed, cumulative * made.num_units).pvalue > 1e-4


def test_batch_sizes_vary_and_average_to_the_expected_size():
    made, randomness = mechanism(), Randomness(SECRET, "run")
    sizes = [made.batch(randomness, step).size for step in range(made.steps)]
    assert np.std(sizes) > 3 and np.mean(sizes) == pytest.approx(50, abs=2)


def test_every_unit_is_drawn_when_the_batch_is_the_dataset():
    made = mechanism(expected_batch_size=1000, target_epsilon=math.inf)
    assert made.batch(Randomness(SECRET, "run"), 0).size == 1000


def test_division_is_by_the_expected_batch_size():
    session = Session(mechanism(noise_multiplier=0.0, target_epsilon=math.inf), Randomness(SECRET, "run"))
    session.batch()
    total = np.array([session.grid * 50], np.int64).astype(np.int32)
    assert session.release(total)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.25)])
def test_noise_has_the_promised_standard_deviation_and_is_normal(clip, bound):
    made = mechanism(clip=clip, l2_clip_norm=bound)
    session = Session(made, Randomness(SECRET, "run"))
    session.batch()
    noise = session.release(np.zeros(200_000, np.int32)) * made.expected_batch_size
    assert noise.std() == pytest.approx(made.noise_multiplier * bound, rel=0.01)
    assert stats.kstest(noise / noise.std(), "norm").pvalue > 1e-3


def test_noise_tail_and_resolution():
    noise = Randomness(SECRET, "run").gaussians("noise", 0, 2_000_000)
    assert np.unique(noise).size == noise.size and np.abs(noise).max() > 4.5
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_noise_is_independent_over_steps_runs_secrets_and_from_batches():
    base = Randomness(SECRET, "run").gaussians("noise", 0, 100_000)
    for other in (Randomness(SECRET, "run").gaussians("noise", 1, 100_000), Randomness(SECRET, "other").gaussians("noise", 0, 100_000),
                  Randomness(bytes(32), "run").gaussians("noise", 0, 100_000), Randomness(SECRET, "run").gaussians("batch", 0, 100_000)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.015


def test_the_same_step_draws_the_same_numbers_again():
    one, two = Randomness(SECRET, "run"), Randomness(SECRET, "run")
    assert (one.gaussians("noise", 7, 99) == two.gaussians("noise", 7, 99)).all()
    assert (mechanism().batch(one, 3) == mechanism().batch(two, 3)).all()


def test_step_after_the_last_is_refused():
    session = Session(mechanism(steps=2), Randomness(SECRET, "run"))
    for _ in range(2):
        session.batch()
        session.release(np.zeros(3, np.int32))
    with pytest.raises(PrivacyError, match="all 2 updates are done"):
        session.batch()
    with pytest.raises(PrivacyError):
        session.release(np.zeros(3, np.int32))


def test_a_sum_is_released_once():
    session = Session(mechanism(), Randomness(SECRET, "run"))
    session.batch()
    session.release(np.zeros(3, np.int32))
    with pytest.raises(PrivacyError, match="released once"):
        session.release(np.zeros(3, np.int32))


def test_sum_wraps_so_that_a_large_batch_cannot_exceed_the_accounted_range():
    assert 2 * 1024 * 2 ** grid_bits(1024) <= 2**31 and grid_bits(10**6) < grid_bits(1024) == 20


def test_secret_is_private_to_its_file(tmp_path):
    secret = load_secret(tmp_path / "private")
    assert len(secret) == 32 and secret == load_secret(tmp_path / "private") != load_secret(tmp_path / "other")
    assert (tmp_path / "private" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    randomness = Randomness(secret, "run")
    assert secret.hex() not in repr(randomness) and str(secret) not in repr(vars(randomness).get("run_id"))
    with pytest.raises(PrivacyError):
        pickle.dumps(randomness)


@pytest.mark.parametrize("part, value, words", [("settings", json.dumps({"epsilon": 9}), "settings .epsilon: 8, now 9"), ("data", "other", "training rows"),
                                                ("code", "other", "dpsynth code"), ("base_model", "other", "base model")])
def test_changed_settings_data_or_code_refuse_to_resume(tmp_path, part, value, words):
    private = tmp_path / "run" / "private"
    private.mkdir(parents=True)
    identity = run_identity(json.dumps({"epsilon": 8}), "fingerprint", "hash")
    assert bind_run(private, identity) == bind_run(private, identity)
    with pytest.raises(PrivacyError, match=words):
        bind_run(private, {**identity, part: value})


def test_certificate_verifies_and_a_false_one_does_not(tmp_path):
    made = make_mechanism(Settings(epsilon=10, delta=1.5e-5), 25000)
    certificate = make_certificate(made, name="imdb", base_model="tiny")
    path = pathlib.Path(tmp_path) / "certificate.json"
    path.write_text(json.dumps(certificate))
    checked = verify(path)
    assert checked["epsilon"] == pytest.approx(certificate["epsilon"], abs=1e-3) and checked["epsilon"] <= 10
    assert checked["epsilon_replace_one"] == pytest.approx(certificate["epsilon_replace_one"], abs=1e-3)
    assert checked["epsilon_replace_one"] > checked["epsilon"]
    for lie in ({"epsilon": 5.0}, {"delta": 1e-7}, {"mechanism": {**certificate["mechanism"], "noise_multiplier": 0.4}},
                {"mechanism": {**certificate["mechanism"], "steps": 200}}):
        with pytest.raises(PrivacyError, match="claims"):
            verify({**certificate, **lie})


def test_certificate_lists_every_access_and_what_is_not_covered():
    certificate = make_certificate(mechanism(), name="x", base_model="tiny", monitor="private")
    assert all(isinstance(a["epsilon"], float) or a["epsilon"] == "public" for a in certificate["accesses"])
    assert "operator" in certificate["monitor"] and any("test split" in item for item in certificate["not_covered"])
