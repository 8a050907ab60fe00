"""Line 8: correlated noise, its groups of units, its state and its accounting."""

import dataclasses

import numpy as np
import pytest

from parts import SECRET, banded
from dpsynth.privacy import (
    Randomness,
    Session,
    compute_epsilon,
    make_mechanism,
    noise_filter,
    realised_noise_error,
    strategy,
    with_noise,
)
from dpsynth.settings import PrivacyError, Settings, SettingsError


def test_with_bands_a_unit_takes_part_at_most_once_in_as_many_updates():
    made, randomness = banded(), Randomness(SECRET, "run")
    batches = [made.batch(randomness, step) for step in range(made.steps)]
    last, counts = np.full(made.num_units, -10), np.zeros(made.num_units)
    for step, batch in enumerate(batches):
        assert (step - last[batch] >= made.bands).all()
        last[batch] = step
        counts[batch] += 1
    assert np.mean([b.size for b in batches]) == pytest.approx(50, abs=3) and counts.mean() == pytest.approx(
        2, abs=0.1
    )


def test_the_group_of_a_unit_is_random_and_not_its_position():
    made = banded()
    took_part = []
    for run in range(200):
        group = np.full(made.num_units, -1)
        for step in range(made.steps):
            group[made.batch(Randomness(SECRET, f"run {run}"), step)] = step % made.bands
        took_part.append(group)
    first = np.array(took_part)[:, :50]
    counts = np.array([(first == g).sum(0) for g in range(made.bands)]).T
    assert (counts.min(1) > 20).all()


def test_a_checkpoint_of_another_correlation_is_refused():
    session = Session(banded(3), Randomness(SECRET, "run"))
    state = session.state()
    with pytest.raises(PrivacyError, match="another matrix"):
        session.restore({**state, "strategy": state["strategy"] + 1e-9})


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


@pytest.mark.parametrize("steps, bands", [(40, 1), (300, 2), (64, 8)])
def test_the_self_check_of_the_noise_knows_how_far_updates_are_correlated(steps, bands):
    w, drawn = noise_filter(steps, bands), np.random.default_rng(5).standard_normal((5000, steps))
    lower = np.array([[w[t - s] if s <= t else 0.0 for s in range(steps)] for t in range(steps)])
    ratios = np.sqrt(((drawn @ lower.T) ** 2).sum(1) / (lower**2).sum())
    assert realised_noise_error(dataclasses.replace(banded(bands), steps=steps), 1) == pytest.approx(
        ratios.std(), rel=0.06
    )


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
