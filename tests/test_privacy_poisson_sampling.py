"""Line 2: Poisson samples, padding that weighs nothing, division by the expected batch size."""

import math

from scipy import stats
import numpy as np
import pytest

from parts import SECRET, mechanism, trainer
from dpsynth.finetune import flatten, make_private_sum
from dpsynth.privacy import Mechanism, Randomness, Session

import jax.numpy as jnp


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


def test_empty_draw_and_all_padding_microbatch_are_exactly_zero(micro, store):
    one = trainer(micro, store)
    assert not flatten(one.gradient_sum(np.array([], int))).any()
    total = [jnp.zeros(a.shape, "int32") for a in one.trainable]
    padding = one._batch(np.full(4, -1), 48)
    total, notes = make_private_sum(micro, one.session)(
        total, jnp.zeros(2, "int32"), one.trainable, one.frozen, padding
    )
    assert not flatten(total).any() and not notes.any()


def test_an_empty_draw_is_an_update_of_pure_noise(micro, store, monkeypatch):
    one = trainer(micro, store)
    monkeypatch.setattr(Mechanism, "batch", lambda *_: np.array([], int))
    before = flatten(one.trainable)
    one.update()
    assert one.session.step == 1 and (flatten(one.trainable) != before).mean() > 0.99
