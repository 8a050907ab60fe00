"""Line 5: one unit moves the sum by at most the sensitivity, whatever its gradient is."""

import math

import numpy as np
import pytest

from parts import trainer
from dpsynth.finetune import clip_to_grid, flatten

import jax
import jax.numpy as jnp


@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.02)])
def test_one_extreme_unit_moves_the_sum_by_at_most_the_sensitivity(micro, store, clip, bound):
    one = trainer(micro, store, clip=clip, l2_clip_norm=bound)
    one.trainable = [a * 50 for a in one.trainable]  # extreme gradients
    without, with_it = (
        flatten(one.gradient_sum(np.array(i))).astype(np.float64) for i in ([1, 2], [1, 2, 0])
    )
    moved = np.linalg.norm(with_it - without) / one.session.grid
    assert 0 < moved <= one.session.mechanism.sensitivity == bound


def test_clipping_agrees_with_jax_privacy():
    from jax_privacy import clipped_grad

    data = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * np.array(
        [[5], [0.01], [1], [3], [0], [2]], np.float32
    )
    loss = lambda w, x: jnp.sum(w * x)
    for clip, options in (
        ("normalize", {"l2_clip_norm": 0.0, "rescale_to_unit_norm": True}),
        ("bound", {"l2_clip_norm": 1.5}),
    ):
        theirs = clipped_grad(loss, keep_batch_dim=False, dtype=jnp.float32, **options)(
            jnp.zeros(40), jnp.asarray(data)
        )
        ours = (
            sum(np.asarray(clip_to_grid([jnp.asarray(row)], clip, 1.5, 2.0**20)[0][0]) for row in data)
            / 2.0**20
        )
        assert np.abs(ours - np.asarray(theirs)).max() < 6 * 2.0**-15


@pytest.mark.parametrize("gradient", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, np.nan], [0.0, 0.0]])
@pytest.mark.parametrize("clip", ["normalize", "bound"])
def test_unusable_gradients_count_as_zero(gradient, clip):
    points, notes = clip_to_grid([jnp.array(gradient, "float32")], clip, 1.0, 2.0**20)
    assert (np.asarray(points[0]) == 0).all() and bool(notes[1]) == (gradient != [0.0, 0.0])


def test_norm_on_the_grid_never_exceeds_the_bound():
    rng, clip = (
        np.random.default_rng(1),
        jax.jit(lambda g: clip_to_grid([g], "normalize", 1.0, 2.0**20)[0][0]),
    )
    for size in (1, 7, 3000):
        for exponent in range(-12, 12):
            points = np.asarray(
                clip(jnp.asarray(rng.normal(size=size) * 10.0**exponent, jnp.float32))
            ).astype(np.float64)
            assert np.linalg.norm(points) / 2.0**20 <= 1.0
    coarse = clip_to_grid([jnp.ones(100)], "normalize", 1.0, 16.0)[0][
        0
    ]  # 1.6 grid points each: rounded up, the norm is 1.25
    assert coarse.tolist() == [1] * 100


@pytest.mark.parametrize(
    "gradient",
    [
        np.full(2_000_000, 2e-23),
        np.append(np.full(1_000_000, 1e-19), 2e-19),
        np.full(9, 3e38),
        np.append(np.full(100, 1e-40), 1e-39),
        np.random.default_rng(2).normal(size=2_000_000) * 1e-25,
    ],
)
@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.5)])
def test_norm_on_the_grid_is_bounded_for_very_small_large_and_many_numbers(gradient, clip, bound):
    points = np.asarray(
        jax.jit(lambda g: clip_to_grid([g], clip, bound, 2.0**20)[0][0])(jnp.asarray(gradient, jnp.float32))
    ).astype(np.float64)
    assert np.linalg.norm(points) / 2.0**20 <= bound


def test_private_sum_without_noise_points_where_the_plain_gradient_points(micro, store):
    plain = trainer(micro, store, noise_multiplier=0.0, target_epsilon=math.inf)
    bounded = trainer(micro, store, clip="bound", l2_clip_norm=1e3)
    ours = flatten(bounded.gradient_sum(np.arange(6))) / bounded.session.grid
    assert ours == pytest.approx(flatten(plain.gradient_sum(np.arange(6))), abs=1e-2)


@pytest.mark.parametrize(
    "many",
    [jax.vmap, lambda clip: lambda units: jax.lax.map(clip, units)],
    ids=["side by side", "one by one"],
)
def test_norm_is_bounded_in_the_programs_that_sum_many_arrays_of_many_units(many):
    rng, grid = np.random.default_rng(4), 2.0**20
    shapes = ((2048, 256), (256, 4, 64), (1024,))
    units = [
        jnp.asarray(
            rng.normal(size=(4, *shape)) * np.array([1e-20, 1e-3, 1.0, 1e6]).reshape(4, *[1] * len(shape)),
            "float32",
        )
        for shape in shapes
    ]
    clipped = jax.jit(many(lambda unit: clip_to_grid(unit, "normalize", 1.0, grid)[0]))(units)
    norms = (
        np.sqrt(sum((np.asarray(array, np.float64) ** 2).reshape(4, -1).sum(1) for array in clipped)) / grid
    )
    assert (norms <= 1).all() and (norms > 0.999).all()


@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.02), ("bound", 300.0)])
@pytest.mark.parametrize("arrays", [1, 6, 300])
def test_squares_that_float32_drops_from_the_norm_stay_below_the_bound(clip, bound, arrays):
    small = (
        2.0**-12.5
    )  # its square is half of what the next float32 above 1 is away: 1 + small² is 1, each time it is added
    gradient = [jnp.array([bound * 2], "float32"), *([jnp.array([bound * 2 * small], "float32")] * arrays)]
    points = [
        int(n) for array in clip_to_grid(gradient, clip, bound, 2.0**20 / bound)[0] for n in np.asarray(array)
    ]
    assert len(set(points)) > 1 and sum(n * n for n in points) <= 2**40
