"""What the ledger promises: composition per unit, caps, states, and that no kill and no race loses, doubles
or overdraws a charge."""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import time
import traceback

import dp_accounting
import pandas as pd
import psutil
import pytest
from dp_accounting import pld

from dpsynth.data import from_frame
from dpsynth.ledger import (
    EVENT_KINDS,
    Ledger,
    Neighbours,
    NewDataset,
    accesses_event,
    compose_events,
    default_path,
    event_from_dict,
    group_privacy,
    ledger_command,
    ledger_table,
    plot_ledger,
    read_event,
    release_id,
)
from dpsynth.privacy import Access, compute_epsilon
from dpsynth.settings import BudgetError, DataError, PrivacyError, Settings, SettingsError

DELTA = 1e-5
ADD, REPLACE = (
    dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    dp_accounting.NeighboringRelation.REPLACE_ONE,
)
TRAINING = {"kind": "dp_sgd", "sampling_probability": 0.05, "noise_multiplier": 1.5, "steps": 60, "bands": 1}
GAUSSIAN = {"kind": "gaussian", "noise_multiplier": 4.0}


def pure(epsilon):
    return {"kind": "epsilon_delta", "epsilon": epsilon, "delta": 0.0}


def rows(*numbers):
    return [f"row {n}" for n in itertools.chain(*numbers)]


def spend(ledger, dataset, event, run_id):
    ledger.plan(run_id, dataset, event)
    ledger.start(run_id)
    ledger.finish(run_id)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "books" / "ledger.sqlite")


@pytest.fixture
def film(ledger):
    return ledger.register("film", rows(range(100)), DELTA)


# events and composition


def accountant_epsilon(event, count, relation=ADD):
    accountant = pld.PLDAccountant(relation)
    accountant.compose(event_from_dict(event), count)
    return accountant.get_epsilon(DELTA)


@pytest.mark.parametrize(
    "event",
    [
        TRAINING,
        {**TRAINING, "bands": 4},
        GAUSSIAN,
        {"kind": "laplace", "noise_multiplier": 3.0},
        {"kind": "discrete_laplace", "noise_multiplier": 3.0},
        {"kind": "not_private"},
    ],
)
def test_composition_is_the_accountants(event):
    assert compose_events(2 * [event], DELTA) == pytest.approx(accountant_epsilon(event, 2), abs=2e-3)
    if event["kind"] in ("dp_sgd", "gaussian"):
        assert compose_events([event], DELTA, "replace_one") == pytest.approx(
            accountant_epsilon(event, 1, REPLACE), abs=2e-3
        )


def test_two_equal_releases_are_one_of_twice_the_steps_and_less_than_the_sum():
    both = compose_events([TRAINING, TRAINING], DELTA)
    assert (
        both == compose_events([{**TRAINING, "steps": 120}], DELTA) == compute_epsilon(0.05, 1.5, 120, DELTA)
    )
    assert compose_events([TRAINING], DELTA) < both < 1.6 * compose_events([TRAINING], DELTA)


def test_banded_training_is_rounds_of_a_larger_sample():
    event = event_from_dict({**TRAINING, "steps": 61, "bands": 4})
    assert (event.count, event.event.sampling_probability, event.event.event.noise_multiplier) == (
        16,
        0.2,
        1.5,
    )
    assert compose_events([{**TRAINING, "bands": 4}], DELTA) == compute_epsilon(0.05, 1.5, 60, DELTA, bands=4)


def test_parts_of_one_release_and_separate_releases_compose_alike():
    assert (
        compose_events([[GAUSSIAN, pure(0.5)]], DELTA)
        == compose_events([GAUSSIAN, pure(0.5)], DELTA)
        > compose_events([GAUSSIAN], DELTA)
    )


def test_stated_epsilons_add_only_where_they_must():
    assert compose_events([pure(1.0)], DELTA) == pytest.approx(1.0, abs=5e-3)
    assert compose_events(20 * [pure(0.1)], DELTA) < 1.9
    leaky = {"kind": "epsilon_delta", "epsilon": 1.0, "delta": DELTA}
    assert compose_events([leaky], DELTA) == pytest.approx(1.0, abs=5e-3)
    assert compose_events(2 * [leaky], DELTA) == math.inf > compose_events(2 * [leaky], 3 * DELTA)


@pytest.mark.parametrize("event", [{"kind": "laplace", "noise_multiplier": 2.0}, pure(0.5)])
def test_a_replacement_is_two_changes(event):
    assert compose_events([event], 1e-9, "replace_one") == pytest.approx(1.0, abs=5e-3)


def test_a_count_that_others_were_chosen_by_is_added_and_not_composed():
    count = {"kind": "added", "epsilon": 0.5}
    twice = compose_events(2 * [TRAINING], DELTA)
    assert compose_events(2 * [TRAINING, count], DELTA) == pytest.approx(1.0 + twice)
    assert 1.0 + twice > compose_events(2 * [TRAINING, pure(0.5)], DELTA) + 0.05
    assert compose_events([[TRAINING, count]], DELTA, "replace_one") == pytest.approx(
        1.0 + compose_events([TRAINING], DELTA, "replace_one")
    )
    assert compose_events([TRAINING, count], DELTA, group=3) == pytest.approx(
        1.5 + compose_events([TRAINING], DELTA, group=3)
    )
    assert (
        compose_events([count], 1e-9) == 0.5
        and compose_events([count, {"kind": "not_private"}], DELTA) == math.inf
    )
    with pytest.raises(dp_accounting.UnsupportedEventError):
        accountant_epsilon(count, 1)


def test_groups():
    assert compose_events([GAUSSIAN], DELTA, group=3) == pytest.approx(
        compose_events([{**GAUSSIAN, "noise_multiplier": 4 / 3}], DELTA), rel=1e-2
    )
    always = {**TRAINING, "sampling_probability": 1.0, "noise_multiplier": 20.0}
    assert compose_events([always], DELTA, group=2) == pytest.approx(
        compose_events([{**always, "noise_multiplier": 10.0}], DELTA), rel=1e-2
    )
    assert compose_events([pure(0.3)], DELTA, group=4) == pytest.approx(1.2, abs=0.03)
    one, two = (compose_events([TRAINING], DELTA, group=k) for k in (1, 2))
    assert 1.5 * one < two < 4 * one
    assert compose_events([{**TRAINING, "bands": 2}], DELTA, group=2) == math.inf


def test_group_privacy():
    assert group_privacy(2.0, 1e-6, 1) == (2.0, 1e-6) and group_privacy(0.0, 1e-6, 3) == (0.0, 3e-6)
    assert group_privacy(0.5, 1e-6, 2) == (1.0, pytest.approx(1e-6 * (1 + math.exp(0.5))))
    assert group_privacy(0.5, 0.3, 4) == (2.0, 1.0)
    assert group_privacy(400.0, 1e-300, 2) == (800.0, 1.0) and group_privacy(400.0, 0.0, 2) == (800.0, 0.0)
    assert group_privacy(math.inf, 0.0, 2) == (math.inf, 0.0)


@pytest.mark.parametrize(
    "event, other",
    [
        (
            TRAINING,
            {**TRAINING, "steps": 61, "bands": 4, "sampling_probability": 0.02, "noise_multiplier": 1.2},
        ),
        (
            {"kind": "discrete_laplace", "noise_multiplier": 3.0},
            {"kind": "discrete_laplace", "noise_multiplier": 2.0},
        ),
    ],
)
def test_events_are_those_that_certificates_are_verified_with(event, other, monkeypatch):
    from dpsynth.privacy import verify

    def epsilon(description):
        return read_event(description).loss(1, Neighbours(), 1e-3).get_epsilon_for_delta(DELTA)

    stated, epsilons = (
        verify.event({**other, "mechanism": other["kind"]}, "epsilon"),
        [epsilon(event), epsilon(other)],
    )
    monkeypatch.setattr(verify, "event", lambda access, claim: stated)
    assert event_from_dict(event) == stated and epsilon(event) == epsilons[1] != epsilons[0]


def test_no_noise_is_infinite_for_ever():
    for event in (
        {"kind": "not_private"},
        {**TRAINING, "noise_multiplier": 0.0},
        {**GAUSSIAN, "noise_multiplier": 0},
        {"kind": "laplace", "noise_multiplier": 1e-9},
    ):
        assert compose_events([event, pure(0.1)], DELTA) == math.inf


@pytest.mark.parametrize(
    "event, words",
    [
        ({"kind": "gausian", "noise_multiplier": 1}, "gausian.*did you mean 'gaussian'.*'laplace'"),
        ({"noise_multiplier": 1}, "None"),
        ("dp_sgd", "dp_sgd"),
        ({**TRAINING, "stpes": 3}, "stpes"),
        ({**TRAINING, "steps": 0}, "steps"),
        ({**TRAINING, "sampling_probability": 1.5}, "sampling"),
        ({"kind": "laplace", "noise_multiplier": 0}, "noise"),
        ({"kind": "added", "epsilon": 0}, "epsilon"),
        ({**GAUSSIAN, "noise_multiplier": math.nan}, "noise"),
    ],
)
def test_what_is_no_event_is_refused(event, words):
    with pytest.raises(SettingsError, match=words) as caught:
        read_event(event)
    assert "\n" not in str(caught.value)


def test_accesses_of_a_mechanism_or_certificate_are_an_event():
    training = Access("training", "dp_sgd", 1.5, 0.05, 60, 2)
    labels = {
        "what": "labels",
        "mechanism": "discrete_laplace",
        "noise_multiplier": 10.0,
        "sampling_probability": 1.0,
        "steps": 1,
        "epsilon": 0.1,
    }
    event = accesses_event([training, labels, {"what": "rows", "epsilon": "public"}])
    assert event == [{**TRAINING, "bands": 2}, {"kind": "discrete_laplace", "noise_multiplier": 10.0}]
    assert all(set(part) == set(EVENT_KINDS[part["kind"]].model_fields) for part in event)
    assert accesses_event(
        [{**labels, "added": True}, Access("units", "discrete_laplace", 4.0, added=True)]
    ) == [
        {"kind": "added", "epsilon": 0.1},
        {"kind": "added", "epsilon": 0.25},
    ]


# identity


def test_the_same_rows_in_another_order_are_the_same_data_set(ledger, film):
    again = ledger.register("another name", reversed(rows(range(100))), 1e-6)
    assert again == film and len(ledger.datasets()) == 1


@pytest.mark.parametrize(
    "numbers, shared",
    [(range(101), True), (range(60), True), (range(50, 200), True), (range(100, 200), False)],
)
def test_overlap_is_recognised(ledger, film, numbers, shared):
    spend(ledger, film, pure(1.0), "r")
    other = ledger.register("other", rows(numbers), DELTA)
    assert ledger.spent(other) == pytest.approx(1.0 if shared else 0.0, abs=5e-3)
    assert len(ledger.releases(other)) == shared


def test_spend_is_the_largest_over_units_not_the_sum_over_neighbours(ledger):
    left, middle, right = (
        ledger.register(name, rows(numbers), DELTA)
        for name, numbers in [("l", [1, 2]), ("m", [2, 3]), ("r", [3, 4])]
    )
    for number, dataset in enumerate((left, middle, right)):
        spend(ledger, dataset, pure(1.0), f"run {number}")
    assert [ledger.spent(d) for d in (left, middle, right)] == pytest.approx([2.0, 2.0, 2.0], abs=5e-3)
    assert ledger.spent(ledger.register("first", rows([1]), DELTA)) == pytest.approx(1.0, abs=5e-3)
    assert ledger.spent(ledger.register("all", rows([1, 2, 3, 4]), DELTA)) == pytest.approx(2.0, abs=5e-3)


def test_spend_is_that_of_a_count_unit_by_unit(ledger):
    """Random overlapping data sets with copies, interleaved with releases, against a dictionary."""
    chance, contents, charges, epsilons = random.Random(5), {}, [], [1.0, 2.0, 4.0, 8.0]
    for turn in range(24):
        if turn % 2 == 0:
            name = f"set {turn}"
            contents[name] = chance.choices(range(40), k=chance.randrange(1, 30))
            ledger.register(name, rows(contents[name]), DELTA)
        name, epsilon = chance.choice(list(contents)), chance.choice(epsilons)
        spend(ledger, name, pure(epsilon), f"run {turn}")
        charges.append((name, epsilon))
    for name, units in contents.items():
        naive = max(sum(e for other, e in charges if unit in contents[other]) for unit in units)
        assert ledger.spent(name, 1e-12) == pytest.approx(naive, rel=1e-3)
        known = ledger.dataset(name)
        assert (known.units, known.hashes, known.copies) == (
            len(units),
            len(set(units)),
            max(collections.Counter(units).values()),
        )


def test_a_trivial_common_row_carries_both_charges_and_the_others_do_not(ledger):
    ours, theirs = (
        ledger.register("ours", ["", *rows(range(9))], DELTA),
        ledger.register("theirs", ["", *rows(range(50, 59))], DELTA),
    )
    spend(ledger, ours, pure(1.0), "a")
    spend(ledger, theirs, pure(2.0), "b")
    assert [ledger.spent(d) for d in (ours, theirs)] == pytest.approx([3.0, 3.0], abs=5e-3)
    clean = ledger.register("clean", rows(range(9)), DELTA)
    assert ledger.spent(clean) == pytest.approx(1.0, abs=5e-3)


def test_copies_are_counted_and_their_contributor_is_told(ledger):
    copied = ledger.register("copied", rows([1, 1, 1, 2]), DELTA)
    assert (copied.units, copied.hashes, copied.copies) == (4, 2, 3)
    spend(ledger, copied, pure(0.5), "r")
    assert ledger.spent(copied) == pytest.approx(0.5, abs=5e-3)
    epsilon, copies = ledger.spent_by_copies(copied)
    assert copies == 3 and epsilon == pytest.approx(1.5, abs=0.03)
    assert ledger.register("once", rows([1, 2]), DELTA) != copied


def test_names_are_unique_and_the_nearest_is_offered(ledger, film):
    other = ledger.register("film", rows(range(5)), DELTA)
    assert (film.name, other.name) == ("film", "film~2") and ledger.dataset("film~2") == other
    with pytest.raises(
        SettingsError, match="'flim' is not in this ledger; did you mean 'film'\\? known: 'film', 'film~2'$"
    ):
        ledger.dataset("flim")
    second = Ledger(ledger.path.with_name("second.sqlite"))
    second.register("film", rows(range(5)), DELTA)
    with pytest.raises(SettingsError, match="not in this ledger"):
        second.plan("r", film, GAUSSIAN)


def test_bad_units_and_deltas_are_refused(ledger):
    with pytest.raises(DataError, match="unit 1"):
        ledger.register("x", ["a", 3])
    with pytest.raises(DataError, match="without units"):
        ledger.register("x", [])
    with pytest.raises(SettingsError, match="1/n"):
        ledger.register("x", rows(range(10)), 0.1)
    assert ledger.register("x", rows(range(10))).delta == 1e-5


def spend_in_parts(ledger, dataset, run_id):
    spend(ledger, dataset, pure(0.5), f"{run_id} counts")
    spend(ledger, dataset, pure(1.0), f"{run_id} training")


def released_after(folder, april, may):
    """What is said outside after one run on each of two lists of rows, while the rows of May have a past
    under another name.
    """
    ledger = Ledger(folder / "ledger.sqlite")
    spend(ledger, ledger.register("elsewhere", rows(range(100)), DELTA), pure(4.0), "else")
    for run_id, content in (("a", april), ("b", may)):
        spend_in_parts(ledger, ledger.register("members", content, DELTA), run_id)
    return ledger.released_as("members", DELTA)


@pytest.mark.parametrize("may", [range(100), range(1, 101), range(99), range(200, 300), range(50, 150)])
def test_what_may_be_published_depends_on_no_row(tmp_path, may):
    epsilon, *counts = released_after(tmp_path, rows(range(300, 400)), rows(may))
    assert (epsilon, *counts) == (pytest.approx(3.0, abs=5e-3), 2, 0, 0)
    for name, april in {
        "same": rows(may),
        "one more": [*rows(may), "one"],
        "other": rows(range(100)),
    }.items():
        assert released_after(tmp_path / name, april, rows(may)) == (epsilon, *counts)


def test_what_may_be_published_is_what_was_charged_under_the_name(ledger, film):
    assert ledger.released_as("film", DELTA) == (0.0, 0, 0, 0)
    ledger.plan("a training", film, pure(1.0))
    assert ledger.released_as("film", DELTA) == (0.0, 0, 0, 0)
    ledger.start("a training")
    ledger.abandon("a training")
    other = ledger.register("film", rows(range(50, 150)), DELTA)
    spend_in_parts(ledger, other, "b")
    epsilon, *counts = ledger.released_as(other.declared, DELTA)
    assert (other.name, other.declared, *counts) == ("film~2", "film", 2, 0, 0)
    assert epsilon == pytest.approx(2.5, abs=5e-3) and epsilon == ledger.spent(other)
    assert (
        ledger.released_as("film~2", DELTA) == (0.0, 0, 0, 0) and ledger.dataset("film~2").declared == "film"
    )


def test_caps_and_what_may_be_published_add_what_others_were_chosen_by(ledger, film):
    count, training = {"kind": "added", "epsilon": 0.5}, TRAINING
    added, composed = (compose_events([training, part], DELTA) for part in (count, pure(0.5)))
    assert composed < added
    ledger.set_cap(film, (added + composed) / 2)
    spend(ledger, film, count, "a counts")
    with pytest.raises(BudgetError, match="over the cap"):
        ledger.plan("a training", film, training)
    with pytest.raises(BudgetError, match="over the cap"):
        ledger.totals_after([(film, training)])
    ledger.set_cap(film, math.inf)
    spend(ledger, film, training, "a training")
    spend_in_parts(ledger, film, "b")
    spend(ledger, film, count, "c counts")
    rest = compose_events([training, pure(0.5), pure(1.0)], DELTA)
    assert ledger.released_as("film", DELTA) == (pytest.approx(1.0 + rest), 3, 0, 0)
    assert ledger.spent(film) == pytest.approx(1.0 + rest)
    assert ledger.spent(film, relation="replace_one") == pytest.approx(
        2.0 + compose_events([training, pure(0.5), pure(1.0)], DELTA, "replace_one")
    )


def test_what_was_released_without_privacy_is_counted_apart(ledger, film):
    spend_in_parts(ledger, film, "a")
    spend(ledger, film, {"kind": "not_private"}, "b training")
    epsilon, *counts = ledger.released_as("film", DELTA)
    assert (epsilon, *counts) == (pytest.approx(1.5, abs=5e-3), 1, 0, 1) and ledger.spent(film) == math.inf
    (total,) = ledger.totals_after([(film, pure(1.0)), (film, {"kind": "not_private"})])
    assert (total.epsilon, total.runs, total.earlier, total.without_privacy) == (
        pytest.approx(2.5, abs=5e-3),
        1,
        1,
        2,
    )


def test_the_release_of_a_run_is_found_by_its_name(ledger, film):
    ledger.plan("a training", film, pure(1.0))
    assert not ledger.release("a training").charged and ledger.release("b training") is None
    ledger.start("a training")
    assert ledger.release("a training").charged


def test_a_run_cannot_come_back_under_another_name(ledger, film):
    spend(ledger, film, GAUSSIAN, "r")
    renamed = ledger.register("cinema", rows(range(100)), DELTA)
    assert renamed == film and renamed.declared == "cinema"
    with pytest.raises(PrivacyError, match="under the name 'film', not 'cinema'"):
        ledger.plan("r", renamed, GAUSSIAN)


# units of rows and of groups


def by_person(numbers, people=10):
    """What is registered of rows that some people wrote in turn: the people, and the rows."""
    return [*(f"unit person {i}" for i in range(people)), *rows(numbers)]


@pytest.mark.parametrize("rows_first", [True, False])
def test_rows_and_groups_of_them_share_a_budget(ledger, rows_first):
    contents = [("by row", rows(range(100)), None), ("by person", by_person(range(100)), 10)]
    first, second = (
        ledger.register(name, units, DELTA, num_units=n)
        for name, units, n in (contents if rows_first else contents[::-1])
    )
    ledger.set_cap(first, 10.0)
    spend(ledger, first, pure(6.0), "a")
    with pytest.raises(
        BudgetError, match="epsilon 6 is spent or reserved, this asks 6, together 12 .* over the cap 10"
    ):
        ledger.plan("b", second, pure(6.0))
    ledger.plan("b", second, pure(3.0))
    one_more = ledger.register("one more", by_person(range(101), 11), DELTA, num_units=11)
    with pytest.raises(BudgetError, match="over the cap 10"):
        ledger.plan("c", one_more, pure(6.0))


def test_runs_that_protect_rows_and_runs_that_protect_persons_are_not_composed_in_what_is_said_outside(
    ledger,
):
    single = ledger.register("visits", rows(range(100)), DELTA)
    grouped = ledger.register("visits", by_person(range(100)), DELTA, num_units=10, unit="person")
    assert (single.unit, grouped.unit, grouped.declared) == ("row", "person", "visits")
    spend_in_parts(ledger, single, "a")
    spend(ledger, grouped, pure(2.0), "b training")
    spend(ledger, single, {"kind": "not_private"}, "c training")
    assert ledger.released_as("visits", DELTA) == (pytest.approx(1.5, abs=5e-3), 1, 1, 1)
    assert ledger.released_as("visits", DELTA, "person") == (pytest.approx(2.0, abs=5e-3), 1, 1, 1)
    assert ledger.spent(ledger.register("a part", rows(range(10)), DELTA)) == math.inf
    with pytest.raises(PrivacyError, match="with the unit 'row', not 'person'"):
        ledger.plan("a training", dataclasses.replace(single, unit="person"), pure(1.0))


@pytest.mark.parametrize(
    "settings",
    [{"unit": "user"}, {"unit": "user", "label_column": ""}, {"label_column": ""}, {"train_size": 30}],
)
def test_no_setting_makes_the_rows_of_a_file_new(ledger, settings):
    file = pd.DataFrame(
        {"text": [f"post {i}" for i in range(60)], "label": 1, "user": [f"u{i % 6}" for i in range(60)]}
    )
    first, second = (
        from_frame(file, Settings(**how), test=file[:1].assign(text="-", user="-")).train
        for how in ({}, settings)
    )
    before, after = (
        ledger.register("file", records.ledger_names(), num_units=records.num_units)
        for records in (first, second)
    )
    ledger.set_cap(before, 10.0)
    spend(ledger, before, pure(6.0), "a")
    with pytest.raises(BudgetError, match="over the cap 10"):
        ledger.plan("b", after, pure(6.0))
    assert after.units == (6 if "unit" in settings else len(second))


def test_people_are_counted_and_their_rows_are_not(ledger):
    people = ledger.register("people", by_person(range(1000)), num_units=10)
    assert (people.units, people.hashes, people.copies) == (10, 1010, 1) and people.delta == 1e-5
    line = ledger_table(ledger).set_index("dataset").loc["people"]
    assert line["units"] == 10 and "people: 10 units" in plot_ledger(ledger, people).axes[0].get_title()
    with pytest.raises(SettingsError, match="1/n = 0.1"):
        ledger.register("other", by_person(range(1000)), 0.1, num_units=10)
    spend(ledger, people, pure(1.0), "a")
    assert ledger.releases(people)["contents"].tolist() == [1010]


# states


def test_charge_is_made_by_start_and_never_goes_away(ledger, film):
    assert ledger.plan("r", film, pure(1.0), "the run").state == "planned"
    assert ledger.spent(film) == 0 and ledger.releases(film)["composed"][0] == pytest.approx(1.0, abs=5e-3)
    started = ledger.start("r")
    assert (started.state, started.charged, started.title) == ("started", True, "the run")
    assert ledger.abandon("r").charged and ledger.spent(film) == pytest.approx(1.0, abs=5e-3)
    assert ledger.start("r").state == "started"
    assert ledger.finish("r").state == ledger.finish("r").state == ledger.start("r").state == "finished"
    with pytest.raises(PrivacyError, match="cannot be taken back"):
        ledger.abandon("r")


def test_abandoning_a_reservation_frees_it(ledger, film):
    ledger.set_cap(film, 1.5)
    ledger.plan("a", film, pure(1.0))
    with pytest.raises(BudgetError):
        ledger.plan("b", film, pure(1.0))
    assert not ledger.abandon("a").held
    ledger.plan("b", film, pure(1.0))
    with pytest.raises(PrivacyError, match="given up; plan it again"):
        ledger.start("a")
    with pytest.raises(BudgetError):
        ledger.plan("a", film, pure(1.0))
    ledger.abandon("b")
    assert ledger.plan("a", film, pure(1.0)).state == "planned" and ledger.start("a").charged


def test_steps_out_of_order_are_refused(ledger, film):
    for step in (ledger.start, ledger.finish, ledger.abandon):
        with pytest.raises(PrivacyError, match="plan it before"):
            step("unknown")
    ledger.plan("r", film, GAUSSIAN)
    with pytest.raises(PrivacyError, match="without having started"):
        ledger.finish("r")


def test_a_resumed_run_is_charged_once(ledger, film):
    for _ in range(3):
        ledger.plan("r", film, GAUSSIAN)
        ledger.start("r")
    assert len(ledger.releases(film)) == 1 and ledger.spent(film) == compose_events([GAUSSIAN], DELTA)
    ledger.set_cap(film, ledger.spent(film))
    ledger.plan("r", film, GAUSSIAN)
    assert ledger.start("r").state == "started"


def test_a_run_with_another_event_or_other_rows_is_refused(ledger, film):
    spend(ledger, film, TRAINING, "r")
    with pytest.raises(PrivacyError, match="60.*not.*61"):
        ledger.plan("r", film, {**TRAINING, "steps": 61})
    other = ledger.register("other", rows(range(99)), DELTA)
    with pytest.raises(PrivacyError, match="'film', not 'other'"):
        ledger.plan("r", other, TRAINING)
    ledger.plan("r", film, [TRAINING])
    assert len(ledger.releases(film)) == 1


def test_equal_settings_with_other_secrets_are_two_releases():
    assert release_id("run", bytes(32)) == release_id("run", bytes(32))
    assert (
        len(
            {
                release_id("run", bytes(32)),
                release_id("run", bytes(31) + b"1"),
                release_id("run 2", bytes(32)),
            }
        )
        == 3
    )


# caps


def test_cap_refuses_before_it_is_crossed_and_says_everything(ledger, film):
    ledger.set_cap(film, 2.5)
    spend(ledger, film, pure(2.0), "a")
    with pytest.raises(
        BudgetError,
        match=r"'film': epsilon 2 is spent.*asks 1, together 3 at delta 1e-05, over the cap 2.5; use a "
        r"smaller",
    ) as caught:
        ledger.plan("b", film, pure(1.0))
    assert "\n" not in str(caught.value) and len(ledger.releases(film)) == 1
    assert ledger.remaining(film) == pytest.approx(0.5, abs=5e-3)
    ledger.plan("c", film, pure(0.4))
    assert ledger.remaining(film) == pytest.approx(0.1, abs=5e-3)
    with pytest.raises(BudgetError):
        ledger.plan("d", film, {"kind": "not_private"})
    ledger.set_cap(film, math.inf)
    assert ledger.remaining(film) == math.inf and ledger.plan("b", film, pure(1.0)).held


def test_an_exact_cap_is_met_and_the_least_excess_is_not(ledger, film):
    ledger.set_cap(film, compose_events([GAUSSIAN], DELTA))
    ledger.plan("a", film, GAUSSIAN)
    ledger.abandon("a")
    ledger.set_cap(film, math.nextafter(compose_events([GAUSSIAN], DELTA), 0))
    with pytest.raises(BudgetError):
        ledger.plan("a", film, GAUSSIAN)


def test_a_cap_goes_with_its_units(ledger, film):
    ledger.set_cap(film, 1.5)
    spend(ledger, film, pure(1.0), "a")
    plus, apart = (
        ledger.register("plus", rows(range(99, 300)), DELTA),
        ledger.register("apart", rows(range(100, 300)), DELTA),
    )
    with pytest.raises(BudgetError, match="cap 1.5 of data set 'film', which shares units"):
        ledger.plan("b", plus, pure(1.0))
    ledger.plan("b", apart, pure(1.0))
    assert ledger.remaining(apart) == math.inf and ledger.remaining(plus) == pytest.approx(0.5, abs=5e-3)


def test_the_strictest_cap_applies_each_over_its_own_units(ledger, film):
    wide = ledger.register("wide", rows(range(200)), DELTA)
    ledger.set_cap(film, 3.0)
    ledger.set_cap(wide, 5.0)
    spend(ledger, ledger.register("late", rows(range(150, 200)), DELTA), pure(2.5), "late")
    spend(ledger, wide, pure(2.0), "a")
    assert {limit.name: round(limit.spent, 2) for limit in ledger.limits(wide)} == {"film": 2.0, "wide": 4.5}
    with pytest.raises(BudgetError, match="over the cap 5;"):
        ledger.plan("b", wide, pure(0.8))
    with pytest.raises(BudgetError, match="over the cap 3;"):
        ledger.plan("b", film, pure(1.2))
    ledger.plan("b", film, pure(0.8))


def test_a_cap_that_was_lowered_stops_a_reservation(ledger, film):
    ledger.plan("a", film, pure(1.0))
    ledger.set_cap(film, 0.5)
    with pytest.raises(BudgetError):
        ledger.start("a")
    assert ledger.spent(film) == 0


@pytest.mark.parametrize(
    "epsilon, delta", [(0.0, None), (-1.0, None), (math.nan, None), (1.0, 0.5), (1.0, 0.0)]
)
def test_caps_that_are_none_are_refused(ledger, film, epsilon, delta):
    with pytest.raises(SettingsError):
        ledger.set_cap(film, epsilon, delta)


def test_a_sweep_is_stated_before(ledger, film):
    ledger.plan("earlier", film, pure(0.5))
    (total,) = ledger.totals_after(3 * [(film, pure(0.5))])
    assert (total.dataset, total.runs, total.earlier, total.delta) == (
        film,
        3,
        1,
        DELTA,
    ) and total.epsilon == pytest.approx(2.0, abs=5e-3)
    assert ledger.totals_after([(film, GAUSSIAN)], 1e-7)[0].epsilon == compose_events(
        [GAUSSIAN, pure(0.5)], 1e-7
    )
    assert ledger.totals_after([]) == [] and len(ledger.releases(film)) == 1
    ledger.set_cap(film, 1.9)
    with pytest.raises(
        BudgetError, match="epsilon 0.5.* is spent or reserved, this asks 1.5, together 2 at .* cap 1.9; use"
    ):
        ledger.totals_after(3 * [("film", pure(0.5))])
    assert ledger.totals_after(2 * [(film, pure(0.5))])[0].epsilon == pytest.approx(1.5, abs=5e-3)


def test_a_sweep_over_samples_of_one_file_is_stated_by_the_row_that_most_of_them_drew(ledger):
    contents = {"a": range(60), "b": range(30, 90), "c": [50, *range(200, 250)], "apart": range(300, 350)}
    samples = {name: ledger.register("file", rows(numbers), DELTA) for name, numbers in contents.items()}
    spend(ledger, samples["c"], pure(0.25), "earlier")
    planned = [
        (samples[name], pure(epsilon))
        for name, epsilon in {"a": 1.0, "b": 2.0, "c": 4.0, "apart": 3.0}.items()
    ]
    totals = dict(zip(contents, ledger.totals_after(planned)))
    for name, numbers in contents.items():
        spends = [
            (0.25, contents["c"]),
            *((event["epsilon"], c) for (_, event), c in zip(planned, contents.values())),
        ]
        worst = max(sum(epsilon for epsilon, c in spends if n in c) for n in numbers)
        assert totals[name].epsilon == pytest.approx(worst, rel=2e-3)
    assert {name: (total.runs, total.earlier) for name, total in totals.items()} == {
        "a": (3, 1),
        "b": (3, 1),
        "c": (3, 1),
        "apart": (1, 0),
    }
    for run_id, (dataset, event) in enumerate(planned):
        spend(ledger, dataset, event, f"run-{run_id}")
    assert [ledger.spent(dataset) for dataset in samples.values()] == [
        total.epsilon for total in totals.values()
    ]


def test_a_sweep_over_samples_of_one_file_is_stopped_by_a_cap_on_any_of_them(ledger):
    left, right = (
        ledger.register("file", rows(range(60)), DELTA),
        ledger.register("file", rows(range(59, 90)), DELTA),
    )
    old = ledger.register("old", rows([59, 1000]), DELTA)
    ledger.set_cap(old, 1.5)
    assert all(ledger.totals_after([(dataset, pure(1.0))]) for dataset in (left, right))
    with pytest.raises(BudgetError, match="together 2 .* over the cap 1.5 of data set 'old'"):
        ledger.totals_after([(left, pure(1.0)), (right, pure(1.0))])


# other processes

STORY = """
import sys, time
from dpsynth.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.plan(sys.argv[2], "film", {"kind": "epsilon_delta", "epsilon": 1.0, "delta": 0.0})
print("planned", flush=True)
time.sleep(60)
"""


def test_a_reservation_lives_as_long_as_its_process(ledger, film):
    ledger.set_cap(film, 1.5)
    process = subprocess.Popen(
        [sys.executable, "-c", STORY, str(ledger.path), "theirs"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "planned\n"
        with pytest.raises(BudgetError):
            ledger.plan("ours", film, pure(1.0))
    finally:
        process.kill()
    time.sleep(0.2)  # dead, but nobody has waited for it: a zombie
    assert ledger.totals_after([(film, pure(1.0))])[0].earlier == 0
    assert ledger.plan("ours", film, pure(1.0)).state == "planned"
    process.communicate()
    assert ledger.releases(film).set_index("run_id")["state"].to_dict() == {
        "theirs": "abandoned",
        "ours": "planned",
    }


@pytest.mark.parametrize(
    "change, freed",
    [
        ("host = 'elsewhere', pid = 0", False),
        ("pid_started = pid_started - 60", True),
        ("state = 'started', started = planned, pid = 0", False),
    ],
)
def test_only_reservations_known_to_be_dead_are_freed(ledger, film, change, freed):
    ledger.set_cap(film, 1.5)
    ledger.plan("a", film, pure(1.0))
    with sqlite3.connect(ledger.path) as db:
        db.execute(f"UPDATE releases SET {change}")
    db.close()
    if freed:
        assert ledger.plan("b", film, pure(1.0)).held
    else:
        with pytest.raises(BudgetError):
            ledger.plan("b", film, pure(1.0))


def test_charging_needs_no_accountant(ledger):
    """A run without a cap, or with remembered answers, is charged without the two seconds that
    dp_accounting takes to import.
    """
    code = """
import sys
from dpsynth.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.register("d", ["a", "b"], 1e-5)
ledger.plan("r", "d", {"kind": "gaussian", "noise_multiplier": 2.0})
ledger.start("r")
assert not {"dp_accounting", "jax", "pandas", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(ledger.path)], check=True)
    assert len(ledger.releases("d")) == 1


# asking without a trace


def test_asking_registers_nothing_and_makes_no_ledger(tmp_path):
    path = tmp_path / "new" / "ledger.sqlite"
    ledger, film = Ledger(path, make=False), NewDataset("film", rows(range(100)), DELTA)
    (total,) = ledger.totals_after(2 * [(film, pure(0.5))])
    assert (total.runs, total.earlier, total.dataset.name) == (
        2,
        0,
        "film",
    ) and total.epsilon == pytest.approx(1.0, abs=5e-3)
    assert (
        ledger.datasets() == []
        and ledger.release("r") is None
        and ledger.released_as("film", DELTA) == (0.0, 0, 0, 0)
    )
    assert list(tmp_path.iterdir()) == []
    ledger.plan("r", film, pure(0.5))
    assert [dataset.name for dataset in Ledger(path, make=False).datasets()] == ["film"] and ledger.release(
        "r"
    ).held


def test_newcomers_are_asked_about_like_registered_rows(ledger, film):
    spend(ledger, film, pure(0.5), "old")
    both = [
        NewDataset("left", rows(range(90, 200)), DELTA),
        NewDataset("right", rows(range(150, 300)), DELTA),
    ]
    asked = ledger.totals_after([(newcomer, pure(1.0)) for newcomer in both])
    assert [dataset.name for dataset in ledger.datasets()] == ["film"] and len(ledger.releases(film)) == 1
    known = [ledger.register(newcomer.name, newcomer.units, newcomer.delta) for newcomer in both]
    assert ledger.totals_after([(dataset, pure(1.0)) for dataset in known]) == asked
    assert [total.epsilon for total in asked] == pytest.approx([2.0, 2.0], abs=5e-3) and asked[0].earlier == 1
    ledger.set_cap(film, 1.4)
    with pytest.raises(BudgetError, match="over the cap 1.4 of data set 'film'"):
        ledger.totals_after([(NewDataset("more", rows(range(99, 120)), DELTA), pure(1.0))])
    assert len(ledger.datasets()) == 3
    with pytest.raises(SettingsError, match="not between 0 and 1/n"):
        NewDataset("x", rows(range(10)), 0.1)


def test_answers_are_remembered_where_there_is_a_ledger(ledger, monkeypatch):
    newcomer = NewDataset("film", rows(range(10)), DELTA)
    asked = ledger.totals_after([(newcomer, pure(0.25))])
    monkeypatch.setattr("dpsynth.ledger.store._answers", lambda question: pytest.fail("asked again"))
    assert ledger.totals_after([(newcomer, pure(0.25))]) == asked


def test_a_ledger_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file/ledger.sqlite: the ledger cannot be written"):
        Ledger(tmp_path / "file" / "ledger.sqlite", make=False).check_writable()
    ledger = Ledger(tmp_path / "new" / "ledger.sqlite", make=False)
    ledger.check_writable()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="let `ledger` name another file"):
        ledger.check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# the file


def test_files_are_private_and_rows_are_not_in_them(ledger, film):
    folder = ledger.path.parent
    with sqlite3.connect(ledger.path) as db:
        db.execute("SELECT * FROM units").fetchone()
        modes = dict.fromkeys(["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"], 0o600)
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
            **modes,
            "ledger.sqlite.key": 0o400,
        }
        with ledger._connect() as own:
            assert own.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: a commit is on disk
        assert (
            db.execute("PRAGMA journal_mode").fetchone()[0],
            len(db.execute("SELECT hash FROM units").fetchone()[0]),
        ) == ("wal", 16)
    db.close()
    everything = b"".join(path.read_bytes() for path in folder.iterdir() if path.suffix != ".key")
    assert b"row 7" not in everything and (folder / "ledger.sqlite.key").read_bytes() not in everything


def test_units_are_hashed_under_the_key(tmp_path):
    hashes = []
    for name in "ab":
        ledger = Ledger(tmp_path / name / "ledger.sqlite")
        ledger.register("d", ["same"], DELTA)
        with sqlite3.connect(ledger.path) as db:
            hashes.append(db.execute("SELECT hash FROM units").fetchone()[0])
        db.close()
    assert hashes[0] != hashes[1]


def test_only_the_users_own_folder_is_closed_to_others(tmp_path, monkeypatch):
    old = os.umask(0o022)
    try:
        Ledger(tmp_path / "runs" / ".ledger.sqlite")
        monkeypatch.setenv("DPSYNTH_LEDGER", str(tmp_path / "mine" / "ledger.sqlite"))
        Ledger()
        (tmp_path / "mine").chmod(0o750)
        Ledger()
        monkeypatch.setenv("DPSYNTH_LEDGER", str(tmp_path / "new" / "ledger.sqlite"))
        Ledger()
    finally:
        os.umask(old)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "runs": 0o755,
        "mine": 0o750,
        "new": 0o700,
    }


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("DPSYNTH_LEDGER", str(tmp_path / "mine.sqlite"))
    assert default_path() == Ledger().path == tmp_path / "mine.sqlite"
    monkeypatch.delenv("DPSYNTH_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "dpsynth" / "ledger.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == pathlib.Path.home() / ".local" / "share" / "dpsynth" / "ledger.sqlite"


def spoil_pages(path):
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def set_pragma(name, value):
    def spoil(path):
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA {name} = {value}")
        db.close()

    return spoil


def replace_key(path, content):
    key = path.with_name("ledger.sqlite.key")
    key.unlink()
    key.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda path: path.write_text("not a database, but long enough to be read as one" * 50),
            "cannot be used",
        ),
        (spoil_pages, "cannot be used"),
        (lambda path: path.write_bytes(b""), "not a ledger"),
        (set_pragma("application_id", 1), "not a ledger"),
        (set_pragma("user_version", 7), "version 7, this dpsynth knows 4; use the dpsynth that wrote it$"),
        (lambda path: path.with_name("ledger.sqlite.key").unlink(), "key of the ledger is missing"),
        (lambda path: replace_key(path, bytes(32)), "does not belong"),
        (lambda path: replace_key(path, b"short"), "32 bytes"),
        (lambda path: path.unlink(), "ledger.sqlite: the ledger is missing, but its key is there"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_clear_error(ledger, film, spoil, words):
    spend(ledger, film, pure(1.0), "r")
    spoil(ledger.path)
    for make in (True, False):
        with pytest.raises(PrivacyError, match=words) as caught:
            Ledger(ledger.path, make=make).spent("film")
        assert "\n" not in str(caught.value) and str(ledger.path) in str(caught.value)


def test_a_ledger_that_knew_no_units_keeps_its_runs_and_caps(ledger, film):
    ledger.set_cap(film, 9.0, 1e-5)
    spend(ledger, film, GAUSSIAN, "old")
    before = ledger.spent(film)
    with sqlite3.connect(ledger.path) as db:
        for table in ("datasets", "releases"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN unit")
        db.execute("PRAGMA user_version = 2")
    db.close()
    later = Ledger(ledger.path)
    spend(later, film, GAUSSIAN, "new")
    assert later.spent(film) > before > 0
    again = later.plan("old", film, GAUSSIAN)  # the run of then is known again
    assert again.charged
    for unit, runs in (("row", 2), ("user", 1)):
        assert later.released_as("film", 1e-5, unit)[1] == runs
    with pytest.raises(BudgetError, match="over the cap 9"):
        spend(later, film, pure(9.0), "too much")
    Ledger(ledger.path)


def test_a_ledger_that_disappears_is_not_replaced_by_an_empty_one(ledger, film):
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match="cannot be used"):
        ledger.plan("r", film, GAUSSIAN)
    assert not ledger.path.exists()


def test_a_ledger_whose_making_was_cut_short_is_made(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.with_name("ledger.sqlite.key").write_bytes(bytes(32))  # killed between the key and the file
    Ledger(path).register("film", ["a"])
    path.unlink()
    with pytest.raises(PrivacyError, match="restore it from a backup"):
        Ledger(path)
    assert not path.exists()


def test_a_ledger_that_is_held_for_too_long_says_so(ledger, film, monkeypatch):
    monkeypatch.setattr(Ledger, "wait", 0.2)
    with sqlite3.connect(ledger.path) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(PrivacyError, match="another process has held"):
            ledger.plan("r", film, GAUSSIAN)
    db.close()


# reading


@pytest.fixture
def varied(ledger, film):
    """A data set with a release in every state."""
    ledger.set_cap(film, 10.0)
    for state in ("finished", "started", "abandoned", "free", "planned"):
        ledger.plan(state, film, pure(1.0), f"a run that is {state}")
    for run_id in ("finished", "started", "abandoned"):
        ledger.start(run_id)
    ledger.finish("finished")
    ledger.abandon("abandoned")
    ledger.abandon("free")
    return ledger


def test_releases_and_table(varied):
    table = varied.releases("film").set_index("run_id")
    assert table["charged"].to_dict() == {
        "finished": True,
        "started": True,
        "abandoned": True,
        "free": False,
        "planned": False,
    }
    assert table["composed"].round(2).tolist() == [1, 2, 3, 3, 4] and set(table["contents"]) == {100}
    varied.register("bit", rows([7]), DELTA)
    line = ledger_table(varied).set_index("dataset").loc["bit"]
    assert (
        line["units"],
        line["releases"],
        round(line["spent"], 2),
        line["cap"],
        round(line["left"], 2),
    ) == (1, 3, 3, "10 (of film)", 6)


def test_plot_shows_every_state_and_the_cap(varied, tmp_path):
    figure = plot_ledger(varied, "film")
    axes = figure.axes[0]
    assert axes.get_legend_handles_labels()[1] == [
        "finished",
        "started, not finished",
        "abandoned, charged",
        "reserved",
        "given up, not charged",
        "cap 10 (film)",
    ]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 10
    figure.savefig(tmp_path / "ledger.png")
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    assert all(box.y0 >= 0 for box in boxes) and (tmp_path / "ledger.png").stat().st_size > 5000


def test_plot_of_nothing_and_of_the_infinite(ledger, film, tmp_path):
    plot_ledger(ledger, film).savefig(tmp_path / "empty.png")
    spend(ledger, film, pure(1.0), "a")
    spend(ledger, film, {"kind": "not_private"}, "b")
    figure = plot_ledger(ledger, film)
    assert "∞" in [text.get_text() for text in figure.axes[0].texts] and math.isfinite(
        figure.axes[0].get_ylim()[1]
    )


def test_command(varied, monkeypatch, tmp_path):
    monkeypatch.setenv("DPSYNTH_LEDGER", str(varied.path))
    header, line = ledger_command().splitlines()
    assert header.split() == ["dataset", "units", "copies", "releases", "spent", "delta", "cap", "left"]
    cells = line.split()
    assert cells[:4] + cells[5:7] == ["film", "100", "1", "3", "1e-05", "10"]
    assert (float(cells[4]), float(cells[7])) == pytest.approx((3, 6), abs=0.01)
    shown = ledger_command("film", cap=20, plot=tmp_path / "film.svg")
    assert "a run that is abandoned" in shown and "20" in shown and (tmp_path / "film.svg").exists()
    assert varied.limits("film")[0].epsilon == 20
    for wrong in (
        {"cap": 3},
        {"plot": "x.png"},
        {"dataset": "flim"},
        {"dataset": "film", "cap": 0},
        {"dataset": "film", "plot": tmp_path / "x.nope"},
        {"path": tmp_path},
        {"path": tmp_path / "nowhere" / "ledger.sqlite"},
    ):
        with pytest.raises(SettingsError) as caught:
            ledger_command(**wrong)
        assert "\n" not in str(caught.value)


def test_command_on_the_ledger_of_a_folder_of_runs(tmp_path):
    Ledger(tmp_path / ".ledger.sqlite").register("these", rows(range(10)), DELTA)
    assert "these" in ledger_command(path=tmp_path) == ledger_command(path=tmp_path / ".ledger.sqlite")
    with pytest.raises(SettingsError, match="nowhere: no ledger there"):
        ledger_command(path=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_command_on_an_empty_ledger_and_with_copies(monkeypatch, tmp_path):
    monkeypatch.setenv("DPSYNTH_LEDGER", str(tmp_path / "ledger.sqlite"))
    assert ledger_command() == "the ledger is empty" and list(tmp_path.iterdir()) == []
    ledger = Ledger()
    ledger.register("copied", rows([1, 1, 2]), DELTA)
    spend(ledger, "copied", pure(0.5), "r")
    assert "contributed all 2 of one, epsilon is 1" in ledger_command("copied")


# many processes, killed at random: the functions below run in a process of their own, which has imported
# nothing that must not fork

SLOTS, KILLS, CHARGE = 16, 110, pure(0.1)
DATASETS = {
    **{f"d{i}": [f"{'abcde'[i]} {j}" for j in range(20)] for i in range(5)},
    "left": ["l", "shared"],
    "right": ["r", "shared"],
}


def fork(work, *arguments):
    """Run `work` in a forked process; returns its number."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def charge(path, log, slot, generation):
    """Charge run after run until every data set is full.

    Even slots resume the runs of their predecessors, odd slots start new ones.
    """
    ledger, full = Ledger(path), set()
    first = max(0, len(log.read_text().splitlines()) - 2) if slot % 2 == 0 and log.exists() else 0
    with open(log, "a", buffering=1) as file:
        for number in itertools.count(first):
            run_id = f"{slot}-{generation if slot % 2 else 0}-{number}"
            name = list(DATASETS)[(slot + number) % len(DATASETS)]
            if len(full) == len(DATASETS):
                return
            try:
                ledger.plan(run_id, name, CHARGE)
            except BudgetError:
                full.add(name)
                continue
            ledger.start(run_id)
            file.write(f"{run_id}\n")
            ledger.abandon(run_id) if number % 5 == 4 else ledger.finish(run_id)


def storm(path, logs):
    """16 processes charge one ledger; at random times one is killed and another takes its place.

    Returns the number of kills.
    """
    chance, kills = random.Random(1), 0
    generations = collections.Counter()
    running = {slot: fork(charge, path, logs / str(slot), slot, 0) for slot in range(SLOTS)}
    while kills < KILLS:
        time.sleep(chance.expovariate(60))
        slot = chance.randrange(SLOTS)
        os.kill(running[slot], signal.SIGKILL)
        status = os.waitpid(running[slot], 0)[1]
        assert status in (0, signal.SIGKILL), "a process failed by itself"
        kills += status == signal.SIGKILL
        generations[slot] += 1
        running[slot] = fork(charge, path, logs / str(slot), slot, generations[slot])
    assert not any([os.waitpid(pid, 0)[1] for pid in running.values()])
    return kills


def prepare(path, room, cap):
    """The data sets, their caps, and every answer of the accountant that will be needed: what is tested
    is the file.
    """
    ledger = Ledger(path)
    for name, units in DATASETS.items():
        ledger.register(name, units, DELTA)
    for count in range(1, room + 2):
        ledger.totals_after(count * [("d0", CHARGE)])
    for name in DATASETS:
        ledger.set_cap(name, cap)


def test_sixteen_processes_and_a_hundred_kills(tmp_path):
    room = 50
    cap = (compose_events(room * [CHARGE], DELTA) + compose_events((room + 1) * [CHARGE], DELTA)) / 2
    path, logs = tmp_path / "ledger.sqlite", tmp_path / "logs"
    logs.mkdir()
    prepare(path, room, cap)
    code = "import pathlib, sys, test_privacy_ledger as t; print(t.storm(*map(pathlib.Path, sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", code, path, logs],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 100
    ledger = Ledger(path)
    for number, name in enumerate(DATASETS):  # room that was reserved by the dead is there again
        with pytest.raises(BudgetError):
            for again in itertools.count():
                ledger.plan(f"last {number} {again}", name, CHARGE)
                ledger.start(f"last {number} {again}")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        charged = collections.Counter(
            dict(
                db.execute("SELECT run_id, COUNT(*) FROM releases WHERE started IS NOT NULL GROUP BY run_id")
            )
        )
        counts = dict(
            db.execute(
                "SELECT name, COUNT(started) FROM datasets JOIN releases ON dataset = datasets.id GROUP BY"
                " name"
            )
        )
    db.close()
    saw = [line for log in logs.iterdir() for line in log.read_text().splitlines()]
    unseen = [
        run_id for run_id in set(charged) - set(saw) if not run_id.startswith("last")
    ]  # killed between charge and log
    assert len(saw) > 100 and not set(saw) - set(charged)
    assert set(charged.values()) == {1} and len(unseen) <= int(done.stdout)
    assert counts.pop("left") + counts.pop("right") == room and set(counts.values()) == {room}
    assert max(ledger.spent(name) for name in DATASETS) <= cap


def open_and_register(path, number):
    ledger = Ledger(path)
    ledger.register(f"set {number}", rows(range(number, number + 10)), DELTA)
    ledger.register("common", rows(range(5)), DELTA)


def race(path):
    return [os.waitpid(pid, 0)[1] for pid in [fork(open_and_register, path, number) for number in range(16)]]


def test_sixteen_processes_create_one_ledger(tmp_path):
    path = tmp_path / "new" / "ledger.sqlite"
    code = "import pathlib, sys, test_privacy_ledger as t; assert not any(t.race(pathlib.Path(sys.argv[1])))"
    subprocess.run(
        [sys.executable, "-c", code, path], cwd=pathlib.Path(__file__).parent, check=True, timeout=120
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["ledger.sqlite", "ledger.sqlite.key"]
    ledger = Ledger(path)
    assert len(ledger.datasets()) == 17
    spend(ledger, "common", pure(1.0), "r")
    assert [ledger.spent(f"set {n}") > 0 for n in range(16)] == 5 * [True] + 11 * [False]


def register_many(path, count):
    Ledger(path).register(f"rows to {count}", (f"row {i}" for i in range(count)), 1e-7)


def interrupt(path):
    """Kill a process during a registration, at 8 different times."""
    for attempt in range(8):
        pid = fork(register_many, path, 30_000 + attempt)
        time.sleep(0.03 + 0.03 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_killed_registration_is_whole_or_not_there(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path)
    code = "import pathlib, sys, test_privacy_ledger as t; t.interrupt(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, path], cwd=pathlib.Path(__file__).parent, check=True, timeout=120
    )
    ledger = Ledger(path)
    for dataset in ledger.datasets():
        with sqlite3.connect(path) as db:
            covered = db.execute(
                "SELECT SUM(cells.hashes) FROM memberships JOIN cells ON cells.id = cell WHERE dataset = ?",
                [dataset.id],
            ).fetchone()[0]
        db.close()
        assert covered == dataset.hashes
    register_many(path, 40_000)
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute(
            "SELECT (SELECT SUM(hashes) FROM cells), (SELECT COUNT(*) FROM units)"
        ).fetchone() == (40_000, 40_000)
    db.close()


def test_processes_are_known_by_number_and_start(ledger, film):
    ledger.plan("r", film, GAUSSIAN)
    release = ledger.plan("r", film, GAUSSIAN)
    assert (release.pid, release.pid_started) == (os.getpid(), psutil.Process().create_time())
