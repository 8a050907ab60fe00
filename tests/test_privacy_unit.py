"""Line 3: the unit is a row or a group of rows, and is drawn, counted and clipped as one."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from parts import RUN, grouped, trainer
from dpsynth.data import from_frame
from dpsynth.finetune import finetune_run, flatten, rows_of_units
from dpsynth.runs.run import Run

import jax.numpy as jnp


def test_rows_of_a_unit_are_chosen_by_the_unit_alone():
    units = np.array([0, 1, 0, 1, 1, 1, 2])
    table = rows_of_units(units, 2, seed=3)
    more = rows_of_units(np.append(units, [0, 0, 3]), 2, seed=3)
    assert (table[1:] == more[1:3]).all() and set(table[0]) == {0, 2} and table[2].tolist() == [6, -1]
    assert rows_of_units(units, 9, seed=3).shape == (3, 9) and rows_of_units(np.arange(5), 1, 0).tolist() == [
        [0],
        [1],
        [2],
        [3],
        [4],
    ]
    assert len({tuple(rows_of_units(units, 2, seed)[1]) for seed in range(9)}) > 1


def test_rows_of_a_unit_are_the_same_wherever_they_stand():
    for seed in range(9):
        alone, behind = (
            rows_of_units(np.zeros(6, int), 2, seed)[0],
            rows_of_units(np.array([0, 1, 1, 1, 1, 1, 1]), 2, seed)[1],
        )
        assert (behind - 1 == alone).all()


def test_a_group_has_one_gradient_the_mean_of_its_rows(micro, store):
    units = np.array([[0, 1], [2, -1], [3, 4], [5, 6]])
    one = grouped(micro, store, units, clip="bound", l2_clip_norm=1e3)
    ours = flatten(one.gradient_sum(np.array([0, 1]))) / one.session.grid
    rows = trainer(micro, store, noise_multiplier=0.0, target_epsilon=math.inf)
    wanted = flatten(rows.gradient_sum(np.array([0, 1]))) / 2 + flatten(rows.gradient_sum(np.array([2])))
    assert ours == pytest.approx(wanted, abs=1e-2) and np.abs(wanted).max() > 0.1


def test_a_whole_group_moves_the_sum_by_at_most_the_sensitivity(micro, store):
    units = np.array([[0, 1, 2, 3, 4, 5], [6, -1, -1, -1, -1, -1]])
    one = grouped(micro, store, units)
    one.trainable = [a * 50 for a in one.trainable]
    without, with_it = (flatten(one.gradient_sum(np.array(i))).astype(np.float64) for i in ([1], [1, 0]))
    assert 0.9 < np.linalg.norm(with_it - without) / one.session.grid <= 1.0


def test_groups_are_drawn_and_counted_as_units(micro, store):
    units = np.array([[0, 1], [2, -1], [3, 4], [5, 6]])
    one, drawn = grouped(micro, store, units), []
    one.gradient_sum = lambda indices: (
        drawn.extend(indices) or [jnp.zeros(a.shape, "int32") for a in one.trainable]
    )
    for _ in range(3):
        one.update()
    assert set(drawn) <= {0, 1, 2, 3} and one.session.mechanism.sampling_probability == 0.5


def test_a_column_can_be_the_unit(tmp_path):
    settings = RUN.model_copy(update={"unit": "user", "max_records_per_unit": 3, "batch_size": 4})
    rows = pd.DataFrame(
        {
            "text": [f"row {i} of a user" for i in range(40)],
            "label": [i % 2 for i in range(40)],
            "user": [f"u{i // 4}" for i in range(40)],
        }
    )
    finetune_run(Run(settings, tmp_path / "dp"), from_frame(rows, settings, test=rows[:8]), progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    assert (certificate["num_units"], certificate["unit"], certificate["max_records_per_unit"]) == (
        10,
        "user",
        3,
    )
    assert not any(
        b"u3" in p.read_bytes() for p in (tmp_path / "dp" / "release").iterdir() if p.suffix != ".npz"
    )
