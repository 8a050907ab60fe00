"""Each test is named after the line of the privacy contract it holds: mechanism, sampling, adjacency, loss, clipping, noise, stop."""
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from dpsynth.certificate import Certificate, base_model, false_negatives, group_guarantee, make_certificate, verify, write_certificate
from dpsynth.privacy import (Access, Mechanism, Randomness, Session, bind_run, calibrate_noise, compose, compute_epsilon, grid_bits, load_secret,
                             make_mechanism, noise_filter, noisy_counts, run_identity, strategy, with_noise)
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


IMDB = Settings(epsilon=10, delta=1.5e-5, experiment="imdb")


def certificate_of(settings=IMDB, num_units=25000):
    return make_certificate(make_mechanism(settings, num_units), settings, base=base_model("tiny", "hash", "not checked"))


def test_certificate_verifies_and_a_false_one_does_not(tmp_path):
    certificate = certificate_of()
    write_certificate(certificate, tmp_path)
    checked = verify(tmp_path / "certificate.json")
    assert checked["epsilon"] == pytest.approx(certificate["epsilon"], abs=1e-3) and checked["epsilon"] <= 10
    assert checked["epsilon_replace_one"] == pytest.approx(certificate["epsilon_replace_one"], abs=1e-3)
    assert checked["epsilon_replace_one"] > checked["epsilon"]
    training = certificate["accesses"][0]
    cheaper = {**training, "noise_multiplier": 0.4}
    for lie, words in (({"epsilon": 5.0}, "claims epsilon "), ({"delta": 1e-7}, "claims"), ({"delta": 1e-3}, "not below 1/n"),
                       ({"mechanism": {**certificate["mechanism"], "steps": 20}}, "not among"), ({"epsilon_replace_one": 10.0}, "replace_one"),
                       ({"accesses": [cheaper], "mechanism": {**certificate["mechanism"], "noise_multiplier": 0.4}}, "claims")):
        with pytest.raises(PrivacyError, match=words):
            verify({**certificate, **lie})


def test_certificate_lists_every_access_and_what_is_not_covered():
    certificate = certificate_of(IMDB.model_copy(update={"monitor": "private"}))
    assert all(isinstance(a["epsilon"], float) or a["epsilon"] == "public" for a in certificate["accesses"])
    assert "operator" in certificate["monitor"] and any("test split" in item for item in certificate["not_covered"])


def test_certificate_without_a_part_is_refused(tmp_path):
    import jsonschema
    whole = certificate_of()
    for part in whole:
        broken = Certificate(whole)
        del broken[part]
        with pytest.raises(jsonschema.ValidationError, match=part):
            write_certificate(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verification_is_a_short_script_on_dp_accounting_alone(tmp_path, repo):
    source = (repo / "dpsynth" / "verify.py").read_text(encoding="utf-8")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) < 40 and "dpsynth" not in "".join(line for line in code if "import" in line)
    (tmp_path / "verify.py").write_text(source)
    write_certificate(certificate_of(), tmp_path)
    done = subprocess.run([sys.executable, "-I", "verify.py", "certificate.json"], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["epsilon"] == pytest.approx(10, abs=0.02), done.stderr


def test_the_curve_bounds_what_an_attacker_can_reach():
    curve = certificate_of()["curve"]
    assert [p["delta"] for p in curve] == sorted((p["delta"] for p in curve), reverse=True)
    assert [p["epsilon"] for p in curve] == sorted(p["epsilon"] for p in curve)
    rates = np.linspace(0, 1, 21)
    missed = false_negatives(curve, rates)
    assert (missed <= 1 - rates + 1e-12).all() and (np.diff(missed) <= 1e-12).all()
    assert group_guarantee(2.0, 1e-6, 1) == (2.0, 1e-6) and group_guarantee(0.5, 1e-6, 2)[1] == pytest.approx(1e-6 * (1 + math.exp(0.5)))


# ---- correlated noise ----------------------------------------------------------------------------------------------

def banded(bands=4, **changes):
    return mechanism(num_units=1000, expected_batch_size=50, steps=40, bands=bands, noise_multiplier=2.0, **changes)


def test_with_bands_a_unit_takes_part_at_most_once_in_as_many_updates():
    made, randomness = banded(), Randomness(SECRET, "run")
    batches = [made.batch(randomness, step) for step in range(made.steps)]
    last, counts = np.full(made.num_units, -10), np.zeros(made.num_units)
    for step, batch in enumerate(batches):
        assert (step - last[batch] >= made.bands).all()
        last[batch] = step
        counts[batch] += 1
    assert np.mean([b.size for b in batches]) == pytest.approx(50, abs=3) and counts.mean() == pytest.approx(2, abs=0.1)


def test_correlated_noise_is_what_the_strategy_makes_of_independent_noise():
    made = banded()
    session, c = Session(made, Randomness(SECRET, "run")), strategy(40, 4)
    assert np.linalg.norm(c) == pytest.approx(1) and len(c) == 4
    noise = []
    for _ in range(made.steps):
        session.batch()
        noise.append(session.release(np.zeros(20000, np.int32)) * made.expected_batch_size)
    noise = np.array(noise)
    fresh = sum(weight * np.pad(noise, ((lag, 0), (0, 0)))[:40] for lag, weight in enumerate(c))
    assert fresh.std() == pytest.approx(made.noise_multiplier, rel=0.01)
    assert abs(np.corrcoef(fresh[10], fresh[11])[0, 1]) < 0.03 < abs(np.corrcoef(noise[10], noise[11])[0, 1])
    assert noise[-1].std() == pytest.approx(2.0 * np.linalg.norm(noise_filter(40, 4)), rel=0.03)
    assert session.realised_noise == pytest.approx(1, abs=0.01)


def test_bands_resume_with_the_same_bits():
    made = banded(3)
    straight, broken = (Session(made, Randomness(SECRET, "run")) for _ in range(2))
    rest = []
    for step in range(8):
        straight.batch()
        out = straight.release(np.zeros(50, np.int32))
        rest.append(out)
        if step < 5:
            broken.batch()
            broken.release(np.zeros(50, np.int32))
    resumed = Session(made, Randomness(SECRET, "run"))
    resumed.restore(broken.state())
    for step in range(5, 8):
        resumed.batch()
        assert (resumed.release(np.zeros(50, np.int32)) == rest[step]).all()


def test_bands_are_accounted_as_fewer_larger_samples_and_chosen_by_public_numbers():
    one, four = (compute_epsilon(0.05, 2.0, 40, 1e-4, bands=b) for b in (1, 4))
    assert four > one
    assert four == pytest.approx(compute_epsilon(0.2, 2.0, 10, 1e-4), rel=1e-6)
    base = make_mechanism(Settings(epsilon="inf", delta=1.5e-5), 25000)
    assert with_noise(base, 10, 16).epsilon <= 10
    for wrong in (21, 41, 0):
        with pytest.raises(SettingsError, match="bands"):
            banded(wrong)


# ---- paid access ---------------------------------------------------------------------------------------------------

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


def test_small_noise_is_refused_quickly():
    import time
    began = time.process_time()
    with pytest.raises(PrivacyError, match="spends epsilon"):
        mechanism(noise_multiplier=0.01)
    assert time.process_time() - began < 20
