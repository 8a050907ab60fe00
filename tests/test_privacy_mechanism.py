"""Line 1: one mechanism, from whose fields everything is computed."""

import dataclasses

import pytest

from parts import mechanism
from dpsynth.privacy import (
    NOISE_STEP,
    calibrate_noise,
    compose,
    compute_epsilon,
    default_delta,
    make_mechanism,
    delta_note,
)
from dpsynth.settings import PrivacyError, Settings, SettingsError


@pytest.mark.parametrize("epsilon, sigma", [(10, 0.563), (3, 0.916), (1, 1.617)])
def test_noise_multiplier_of_the_tutorials_setting(epsilon, sigma):
    assert calibrate_noise(1024 / 25000, 73, epsilon, 1.5e-5) == pytest.approx(sigma, abs=0.002)


def test_calibrated_noise_never_exceeds_the_target():
    for epsilon in (0.5, 3.0, 9.0):
        sigma = calibrate_noise(0.05, 100, epsilon, 1e-5)
        assert (
            compute_epsilon(0.05, sigma, 100, 1e-5)
            <= epsilon
            < compute_epsilon(0.05, sigma - NOISE_STEP, 100, 1e-5)
        )


@pytest.mark.parametrize(
    "probability, steps, epsilon, delta, most",
    [
        (0.04096, 73, 10, 1.5e-5, 6),
        (0.2, 2, 8, 1e-3, 6),
        (1.0, 1, 1, 1e-5, 8),
        (0.2, 1, 1000, 1e-3, 10),
        (0.001, 5000, 0.1, 1e-6, 10),
        (0.5, 200, 0.01, 1e-7, 24),
        (0.2, 1, 1e6, 1e-3, 40),
    ],
)
def test_the_least_noise_is_found_with_few_compositions(probability, steps, epsilon, delta, most):
    compose.cache_clear()
    sigma = calibrate_noise(probability, steps, epsilon, delta)
    assert compose.cache_info().misses <= most
    assert sigma % NOISE_STEP == 0
    assert (
        compute_epsilon(probability, sigma, steps, delta)
        <= epsilon
        < compute_epsilon(probability, sigma - NOISE_STEP, steps, delta)
    )


def test_given_noise_multiplier_is_checked_without_tolerance():
    exact = mechanism().epsilon
    assert mechanism(target_epsilon=exact).epsilon == exact
    with pytest.raises(PrivacyError, match="spends epsilon"):
        mechanism(target_epsilon=exact - 1e-9)


def test_mechanism_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mechanism().expected_batch_size = 2


def test_steps_are_updates_not_microbatches():
    made = make_mechanism(
        Settings(epsilon=10, delta=1.5e-5, batch_size=1024, microbatch_size=2, epochs=3), 25000
    )
    assert made.steps == 73 and made.noise_multiplier == pytest.approx(0.563, abs=0.002)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expected_batch_size": 1001}, "more than the 1000"),
        ({"delta": 1e-3}, "not below 1/n"),
        ({"steps": 0}, "less than one update"),
    ],
)
def test_impossible_mechanisms_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        mechanism(**changes)


def test_small_noise_is_refused_quickly():
    import time

    began = time.process_time()
    with pytest.raises(PrivacyError, match="spends epsilon"):
        mechanism(noise_multiplier=0.01)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "units, delta",
    [
        (0, 1e-5),
        (1, 1e-5),
        (10, 1e-5),
        (40, 1e-5),
        (10_000, 1e-5),
        (25_000, 4e-6),
        (100_000, 1e-6),
        (10**6, 10**-7.2),
    ],
)
def test_the_default_delta_leaves_less_than_a_tenth_of_a_unit_to_be_published(units, delta):
    assert default_delta(units) == pytest.approx(delta) and default_delta(units) * units <= 0.1 * (1 + 1e-9)
    assert delta_note(default_delta(units), units) == "" and default_delta(max(units, 2)) <= min(
        max(units, 2) ** -1.2, 1e-5, 0.1 / max(units, 2)
    )


def test_a_given_delta_above_a_tenth_of_one_over_n_is_used_and_told():
    made = make_mechanism(Settings(epsilon=8, delta=4e-4, batch_size=50, epochs=2), 1000)
    assert (
        made.delta == 4e-4
        and delta_note(4e-4, 1000)
        == "delta is 0.4/n: so many units could be expected to be published outright"
    )
    with pytest.raises(SettingsError, match="not below 1/n"):
        make_mechanism(Settings(epsilon=8, delta=1e-3, batch_size=50), 1000)
