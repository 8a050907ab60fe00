"""The accounting alone, against `dp_accounting` and against numbers written down: no model, no JAX, in
seconds.

These tests are what the mutation tool runs (see tests/README.md), so each of them pins one function by value.
"""

import hashlib
import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event, pld

from dpsynth import privacy
from dpsynth.ledger import (
    Neighbours,
    EpsilonQuery,
    loss_grid,
    accesses_event,
    compose_events as composed,
    event_from_dict,
    group_privacy,
    known_names,
    read_event,
    release_id,
)
from dpsynth.privacy import (
    verify,
    LABELS,
    LIKELIER,
    NOISE_STEP,
    OVERLAPS,
    Access,
    Mechanism,
    Randomness,
    below,
    calibrate_noise,
    check_batch_and_delta,
    compose,
    compute_epsilon,
    count_accesses,
    discretization_interval,
    make_mechanism,
    noisy_counts,
)
from dpsynth.settings import PrivacyError, Settings, SettingsError
from dpsynth.state import State
from dpsynth.privacy.verify import COUNT

ADD, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
TRAINING = Access("fine-tuning", "dp_sgd", 1.0, 0.05, 40)
LABEL_COUNT = Access(LABELS, "discrete_laplace", 4.0)
UNIT_COUNT = Access(COUNT, "discrete_laplace", 5.0, added=True)


def reference(events, delta, relation=ADD, interval=1e-3):
    """epsilon of events of the accountant, asked without any of our code."""
    accountant = pld.PLDAccountant(relation, interval)
    accountant.compose(dp_event.ComposedDpEvent(events))
    return accountant.get_epsilon(delta)


def sgd(probability, noise, steps):
    return dp_event.SelfComposedDpEvent(
        dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(noise)), steps
    )


def made(**changes):
    return Mechanism(
        **{
            "num_units": 1000,
            "expected_batch_size": 50,
            "steps": 40,
            "noise_multiplier": 1.0,
            "delta": 1e-4,
            "target_epsilon": 20.0,
            **changes,
        }
    )


@pytest.mark.parametrize(
    "noises, interval",
    [
        ((), 3e-4),
        ((1.0,), 3e-4),
        ((2.0, 0.999), 1e-3),
        ((0.3,), 1e-3),
        ((0.5, 3.0), 1e-3),
        ((0.1,), 9e-3),
        ((0.03, 5.0), 0.1),
    ],
)
def test_cells_are_wider_where_noise_is_less(noises, interval):
    accesses = [Access("", "dp_sgd", noise) for noise in noises] + [Access("", "discrete_laplace", 0.01)]
    assert discretization_interval(accesses) == pytest.approx(interval)


def test_an_access_is_one_full_update_unless_told():
    access = Access("what", "dp_sgd", 2.0)
    assert (access.sampling_probability, access.steps, access.bands, access.added) == (1.0, 1, 1, False)


@pytest.mark.parametrize("claim, relation", [("epsilon", ADD), ("epsilon_replace_one", REPLACE)])
@pytest.mark.parametrize("bands, probability, rounds", [(1, 0.05, 40), (3, 0.15, 14), (8, 0.4, 5)])
def test_training_is_composed_as_the_accountant_composes_it(claim, relation, bands, probability, rounds):
    ours = compute_epsilon(0.05, 1.2, 40, 1e-5, claim, bands)
    assert ours == pytest.approx(reference([sgd(probability, 1.2, rounds)], 1e-5, relation, 3e-4), abs=1e-6)


def test_a_sampling_probability_is_at_most_one():
    assert verify.event(
        {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "sampling_probability": 0.4, "bands": 3, "steps": 6},
        "epsilon",
    ) == sgd(1.0, 1.0, 2)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_a_count_is_a_discrete_laplace_and_for_a_replaced_unit_the_worst_of_twice_its_epsilon(scale):
    access = {"mechanism": "discrete_laplace", "noise_multiplier": scale}
    assert verify.event(access, "epsilon") == dp_event.DiscreteLaplaceDpEvent(1 / scale, 1)
    worst = verify.event(access, "epsilon_replace_one")
    assert worst.num_buckets == 2
    truth, lie = 1 - worst.noise_parameter / 2, worst.noise_parameter / 2
    assert math.log(truth / lie) == pytest.approx(2 / scale)


def test_counts_compose_with_training_and_those_that_others_follow_from_are_added():
    alone = compose((TRAINING,), 1e-5)
    both = compose((TRAINING, LABEL_COUNT), 1e-5)
    assert both == pytest.approx(
        reference([sgd(0.05, 1.0, 40), dp_event.DiscreteLaplaceDpEvent(0.25, 1)], 1e-5, ADD, 3e-4), abs=1e-6
    )
    assert alone < both < alone + 0.25
    assert compose((TRAINING, UNIT_COUNT), 1e-5) == pytest.approx(alone + 0.2, abs=1e-9)
    replaced = compose((TRAINING,), 1e-5, "epsilon_replace_one")
    assert compose((TRAINING, UNIT_COUNT), 1e-5, "epsilon_replace_one") == pytest.approx(
        replaced + 0.4, abs=1e-9
    )


def test_no_noise_is_no_bound():
    assert (
        compose((TRAINING, Access("other", "dp_sgd", 0.0)), 1e-5)
        == math.inf
        == compute_epsilon(0.05, 0.0, 40, 1e-5)
    )
    assert isinstance(compose((TRAINING,), 1e-5), float)


def test_what_the_accountant_is_told(monkeypatch):
    told = []
    for module in (privacy.accounting, privacy.mechanism):
        monkeypatch.setattr(
            module,
            "compose",
            lambda accesses, delta, claim="epsilon": told.append((accesses, delta, claim)) or 1.0,
        )
    compute_epsilon(0.05, 1.25, 40, 1e-5, "epsilon_replace_one", 2)
    assert told.pop() == ((Access("training", "dp_sgd", 1.25, 0.05, 40, 2),), 1e-5, "epsilon_replace_one")
    made(others=(LABEL_COUNT,)).epsilon_after(7, "epsilon_replace_one")
    assert told.pop() == (
        (Access("fine-tuning", "dp_sgd", 1.0, 0.05, 7, 1), LABEL_COUNT),
        1e-4,
        "epsilon_replace_one",
    )


@pytest.mark.parametrize(
    "epsilon, others",
    [
        (8.0, ()),
        (1.0, ()),
        (0.2, ()),
        (3.0, (LABEL_COUNT, UNIT_COUNT)),
        (60.0, ()),
        (4.0, ()),
        (6.0, ()),
        (30.0, ()),
        (150.0, ()),
    ],
)
def test_noise_is_the_least_that_meets_the_target(epsilon, others):
    noise = calibrate_noise(0.05, 40, epsilon, 1e-5, others=others)
    spent = [compose((Access("", "dp_sgd", n, 0.05, 40), *others), 1e-5) for n in (noise, noise - NOISE_STEP)]
    assert noise % NOISE_STEP == 0 and spent[0] <= epsilon < spent[1]


def test_noise_is_looked_for_by_what_training_and_counts_spend_together(monkeypatch):
    told = []
    monkeypatch.setattr(
        privacy.accounting,
        "compose",
        lambda accesses, delta: (
            told.append((accesses, delta))
            or (0.0 if len(accesses) == 1 else 4.0 / accesses[0].noise_multiplier)
        ),
    )
    assert calibrate_noise(0.05, 40, 8.0, 1e-5, 2, (LABEL_COUNT,)) == 0.5
    assert told[0] == ((LABEL_COUNT,), 1e-5)
    assert {(a.what, a.mechanism, a.sampling_probability, a.steps, a.bands) for (a, *_), _ in told[1:]} == {
        ("training", "dp_sgd", 0.05, 40, 2)
    }
    assert {accesses[1:] for accesses, _ in told[1:]} == {(LABEL_COUNT,)} and {
        delta for _, delta in told
    } == {1e-5}


def test_counts_that_spend_all_leave_nothing_to_train_with(monkeypatch):
    monkeypatch.setattr(privacy.accounting, "compose", lambda accesses, delta: 2.0)
    with pytest.raises(SettingsError, match="is spent before training"):
        calibrate_noise(0.05, 40, 2.0, 1e-5, others=(LABEL_COUNT,))


def test_noise_is_for_one_band_unless_told():
    mechanism = privacy.with_noise(made(noise_multiplier=0.0, target_epsilon=math.inf), 8.0)
    assert (mechanism.bands, mechanism.target_epsilon) == (1, 8.0)


def test_noise_for_bands_is_that_of_fewer_larger_samples():
    assert calibrate_noise(0.05, 40, 4.0, 1e-5, 4) == calibrate_noise(0.2, 10, 4.0, 1e-5)


def test_targets_that_cannot_be_met_are_named():
    with pytest.raises(
        SettingsError, match=r"^setting epsilon: 0\.25 is spent before training by label histogram$"
    ):
        calibrate_noise(0.05, 40, 0.25, 1e-5, others=(LABEL_COUNT,))
    with pytest.raises(
        SettingsError, match="is spent before training by label histogram, number of training units"
    ):
        calibrate_noise(0.05, 40, 0.3, 1e-5, others=(LABEL_COUNT, UNIT_COUNT))
    with pytest.raises(
        SettingsError,
        match=r"^setting epsilon: no noise reaches 1e-09 in 40 updates; use fewer epochs or a larger "
              r"epsilon$",
    ):
        calibrate_noise(0.05, 40, 1e-9, 1e-12)


def test_what_a_mechanism_follows_from():
    plain, bounded = made(), made(clip="bound", l2_clip_norm=0.25, bands=4, others=(LABEL_COUNT,))
    assert plain.sampling_probability == 0.05 and plain.sensitivity == 1.0 and bounded.sensitivity == 0.25
    assert plain.training(7) == Access("fine-tuning", "dp_sgd", 1.0, 0.05, 7, 1)
    assert bounded.accesses == (Access("fine-tuning", "dp_sgd", 1.0, 0.05, 40, 4), LABEL_COUNT)
    assert plain.epsilon == compute_epsilon(0.05, 1.0, 40, 1e-4) == plain.epsilon_after(40)
    assert plain.epsilon_after(5) == compute_epsilon(0.05, 1.0, 5, 1e-4)
    assert (
        plain.epsilon_after(40, "epsilon_replace_one")
        == compute_epsilon(0.05, 1.0, 40, 1e-4, "epsilon_replace_one")
        > plain.epsilon
    )
    assert bounded.epsilon_after(0) == compose((LABEL_COUNT,), 1e-4)
    assert bounded.describe() == {
        "sampler": "cyclic poisson",
        "sampling_probability": 0.05,
        "steps": 40,
        "expected_batch_size": 50,
        "bands": 4,
        "noise_multiplier": 1.0,
        "clip": "bound",
        "l2_clip": 0.25,
    }
    assert plain.describe()["sampler"] == "poisson"


def test_what_is_private():
    assert (
        made().private
        and made(target_epsilon=math.inf).private
        and made(target_epsilon=math.inf, noise_multiplier=1e-3).private
    )
    assert not made(target_epsilon=math.inf, noise_multiplier=0.0).private
    with pytest.raises(PrivacyError, match="spends epsilon inf, more than the target 20"):
        made(noise_multiplier=0.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "^setting epochs: less than one update; use more epochs or a smaller batch_size$"),
        (
            {"bands": 0},
            r"^setting bands: 0 is not between 1 and the smaller of updates \(40\) and units over batch "
            r"\(20\)$",
        ),
        ({"bands": 21}, r"units over batch \(20\)"),
        ({"bands": 4, "steps": 3}, r"smaller of updates \(3\)"),
        ({"expected_batch_size": 0}, "setting batch_size: 0"),
        ({"expected_batch_size": 1001}, "setting batch_size: 1001"),
        (
            {"delta": 1e-3},
            "^setting delta: 0.001 is not below 1/n = 0.001; with that probability one unit could be"
            " published whole$",
        ),
        ({"delta": 0.0}, "setting delta: 0 "),
    ],
)
def test_mechanisms_that_cannot_be(changes, message):
    with pytest.raises((SettingsError, PrivacyError), match=message):
        made(**changes)


def test_the_ends_of_what_can_be():
    assert (
        made(bands=20, noise_multiplier=9.0).bands == 20
        and made(bands=3, steps=3).bands == 3
        and made(steps=1).steps == 1
    )
    check_batch_and_delta(1000, 1000, 0.00099)
    check_batch_and_delta(1000, 1, 1e-300)


def test_a_target_is_met_where_it_is_spent_to_the_last():
    exact = made().epsilon
    assert made(target_epsilon=exact).target_epsilon == exact


def test_words_below_a_probability():
    words = np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert below(words, 0.25).tolist() == [True, True, False, False, False]
    assert (
        below(words, 1.0).dtype == bool
        and below(words, 1.0).all()
        and below(words, 1.5).all()
        and not below(words, 0.0).any()
    )


def test_units_are_drawn_from_their_own_stream():
    randomness, mechanism = Randomness(bytes(range(32)), "run"), made(bands=4, noise_multiplier=3.0)
    group = (randomness.integers("group", 0, 1000) % np.uint64(4)).astype(int)
    for step in (0, 1, 6):
        words = randomness.integers("batch", step, 1000)
        expected = np.flatnonzero((words < np.uint64(0.2 * 2**64)) & (group == step % 4))
        assert np.array_equal(mechanism.batch(randomness, step), expected)
    two = made(bands=2, noise_multiplier=3.0).batch(randomness, 1)
    halves = (randomness.integers("group", 0, 1000) % np.uint64(2)).astype(int)
    assert np.array_equal(
        two, np.flatnonzero((randomness.integers("batch", 1, 1000) < np.uint64(0.1 * 2**64)) & (halves == 1))
    )
    plain = made().batch(randomness, 3)
    assert np.array_equal(
        plain, np.flatnonzero(randomness.integers("batch", 3, 1000) < np.uint64(0.05 * 2**64))
    )
    assert len(made().batch(randomness, 3, 20_000)) == pytest.approx(1000, abs=150)


EVERY = Settings(
    epsilon=8,
    delta=1e-4,
    access_share=0.05,
    unit_count="private",
    label_prior="private",
    batch_size=50,
    epochs=2,
    contamination_corpus="a.txt",
    contamination_reference="b.txt",
)


def test_counts_that_settings_ask_for():
    assert count_accesses(EVERY) == {
        "units": Access(COUNT, "discrete_laplace", 2.5, added=True),
        "labels": Access(LABELS, "discrete_laplace", 2.5),
        "overlaps": Access(OVERLAPS, "discrete_laplace", 2.5),
        "likelier": Access(LIKELIER, "discrete_laplace", 2.5),
    }
    assert count_accesses(
        EVERY.model_copy(
            update={"unit_count": "public", "label_prior": "uniform", "contamination_corpus": ""}
        )
    ) == {"likelier": Access(LIKELIER, "discrete_laplace", 2.5)}
    assert count_accesses(Settings(epsilon=8)) == {}
    much = {
        "epsilon": 1000.0,
        "contamination_corpus": "",
        "contamination_reference": "",
        "unit_count": "public",
    }
    assert count_accesses(EVERY.model_copy(update=much))["labels"].noise_multiplier == 0.02
    with pytest.raises(
        SettingsError,
        match=r"^setting access_share: epsilon 50\.05 for each count is more than 50, the most "
        r"that is composed; use a smaller share$",
    ):
        count_accesses(EVERY.model_copy(update={**much, "epsilon": 1001.0}))
    assert count_accesses(Settings(epsilon=1e5)) == {}


def test_counts_get_the_noise_that_is_charged():
    drawn = np.array(noisy_counts(4000 * [7], 2.5)) - 7
    assert drawn.dtype.kind == "i" and abs(drawn.mean()) < 0.3
    assert drawn.std() == pytest.approx(math.sqrt(2) * 2.5, rel=0.1)


def test_noise_of_counts_that_opendp_does_not_promise_is_refused(monkeypatch):
    import opendp.prelude as dp

    real = dp.m.make_laplace
    monkeypatch.setattr(dp.m, "make_laplace", lambda *space, scale: real(*space, scale=scale / 2))
    with pytest.raises(
        PrivacyError, match=r"^counts: OpenDP states epsilon 0\.8 where 0\.4 is accounted for$"
    ):
        noisy_counts([1], 2.5)


def test_a_mechanism_follows_its_settings(monkeypatch):
    settings = Settings(
        epsilon=6,
        delta=1e-5,
        batch_size=50,
        epochs=2.5,
        clip="bound",
        l2_clip_norm=0.5,
        unit="user",
        label_prior="private",
    )
    mechanism = make_mechanism(settings, 1010)
    assert (mechanism.num_units, mechanism.expected_batch_size, mechanism.steps, mechanism.delta) == (
        1010,
        50,
        50,
        1e-5,
    )
    assert (
        mechanism.clip,
        mechanism.l2_clip_norm,
        mechanism.unit,
        mechanism.bands,
        mechanism.target_epsilon,
    ) == ("bound", 0.5, "user", 1, 6)
    assert mechanism.others == (Access(LABELS, "discrete_laplace", 1 / 0.12),)
    assert mechanism.noise_multiplier == calibrate_noise(50 / 1010, 50, 6, 1e-5, others=mechanism.others)
    given = make_mechanism(settings.model_copy(update={"noise_multiplier": 3.25, "bands": "2"}), 1010)
    assert given.noise_multiplier == 3.25 and given.bands == 2
    banded = make_mechanism(settings.model_copy(update={"bands": "4"}), 1010)
    assert banded.noise_multiplier == calibrate_noise(50 / 1010, 50, 6, 1e-5, 4, mechanism.others)
    chosen = []
    monkeypatch.setattr(privacy.making, "choose_bands", lambda *arguments: chosen.append(arguments) or 4)
    assert make_mechanism(settings.model_copy(update={"bands": "auto"}), 1010) == banded
    ((untuned, epsilon),) = chosen
    assert (
        epsilon == 6
        and untuned.noise_multiplier == 0
        and untuned.target_epsilon == math.inf
        and untuned.steps == 50
    )
    free = make_mechanism(Settings(epsilon=math.inf, batch_size=50, epochs=2), 1000)
    assert (
        free.noise_multiplier == 0
        and free.target_epsilon == math.inf
        and not free.private
        and free.steps == 40
    )
    with pytest.raises(SettingsError, match="setting batch_size"):
        make_mechanism(settings, 49)


# the ledger's composition


PURE = {"kind": "epsilon_delta", "epsilon": 0.3, "delta": 0.0}


@pytest.mark.parametrize("group, epsilon", [(1, 0.3), (2, 0.6), (5, 1.5)])
def test_a_stated_epsilon_grows_with_the_group(group, epsilon):
    assert composed([PURE], 1e-9, group=group) == pytest.approx(epsilon, abs=0.03)
    assert composed([PURE], 1e-9, group=group) >= epsilon - 1e-8


def test_what_is_too_large_to_compose_is_infinite():
    gaussian = {"kind": "gaussian", "noise_multiplier": 40.0}
    assert composed([gaussian], 1e-5, group=32) < math.inf == composed([gaussian], 1e-5, group=33)
    assert (
        composed([{**PURE, "epsilon": 100.0}], 1e-9)
        < math.inf
        == composed([{**PURE, "epsilon": 100.1}], 1e-9)
    )
    assert composed([{"kind": "laplace", "noise_multiplier": 0.01}], 1e-9) < math.inf
    assert composed([{"kind": "laplace", "noise_multiplier": 0.0099}], 1e-9) == math.inf


@pytest.mark.parametrize("group", [2, 3])
def test_a_group_is_a_mixture_of_how_many_of_it_are_drawn(group):
    """The hockey-stick divergence of the mixture, integrated numerically, one update, is what the ledger
    composes.
    """
    from scipy.stats import binom, norm

    probability, noise, delta = 0.3, 2.0, 1e-3
    epsilon = composed(
        [{"kind": "dp_sgd", "sampling_probability": probability, "noise_multiplier": noise, "steps": 1}],
        delta,
        group=group,
    )
    x = np.linspace(-40, 40, 400_001)
    mixture = sum(binom.pmf(j, group, probability) * norm.pdf(x, j, noise) for j in range(group + 1))
    alone = norm.pdf(x, 0, noise)
    leaks = [
        np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x)
        for p, q in ((mixture, alone), (alone, mixture))
    ]
    assert delta * 0.9 < max(leaks) <= delta * 1.001


def test_gaussians_are_one_with_less_noise():
    gaussian = {"kind": "gaussian", "noise_multiplier": 4.0}
    assert composed(4 * [gaussian], 1e-5) == pytest.approx(
        composed([{**gaussian, "noise_multiplier": 2.0}], 1e-5), abs=1e-9
    )
    assert composed([gaussian], 1e-5) == pytest.approx(
        reference([dp_event.GaussianDpEvent(4.0)], 1e-5), abs=2e-3
    )


@pytest.mark.parametrize(
    "kind, event",
    [
        ("laplace", dp_event.LaplaceDpEvent(2.0)),
        ("discrete_laplace", dp_event.DiscreteLaplaceDpEvent(0.5, 1)),
    ],
)
def test_laplace_mechanisms_compose_as_the_accountants(kind, event):
    assert composed(3 * [{"kind": kind, "noise_multiplier": 2.0}], 1e-5) == pytest.approx(
        reference(3 * [event], 1e-5, ADD, 3e-4), abs=2e-3
    )


@pytest.mark.parametrize("kind", ["laplace", "discrete_laplace"])
@pytest.mark.parametrize(
    "relation, group, changes",
    [("add_or_remove_one", 2, 2), ("replace_one", 1, 2), ("add_or_remove_one", 3, 3)],
)
def test_a_laplace_mechanism_of_several_changes_is_composed_by_its_epsilon_alone(
    kind, relation, group, changes
):
    """1/scale for each change and no delta: at any delta it is at most their sum, and at a small one
    nearly that.
    """
    spent = composed([{"kind": kind, "noise_multiplier": 4.0}], 1e-9, relation=relation, group=group)
    assert changes / 4 - 1e-3 <= spent <= changes / 4 + 0.03
    event = dp_event.LaplaceDpEvent(4.0) if kind == "laplace" else dp_event.DiscreteLaplaceDpEvent(0.25, 1)
    one = composed(
        [{"kind": kind, "noise_multiplier": 4.0}], 0.05
    )  # of a single change, the mechanism itself: less than its epsilon alone says
    assert one == pytest.approx(reference([event], 0.05, ADD, 3e-4), abs=2e-3)
    alone = composed([{**PURE, "epsilon": 0.25}], 0.05)
    assert (
        one < alone - 4e-3 if kind == "laplace" else one == pytest.approx(alone, abs=1e-6)
    )  # whole numbers: the loss is ε or -ε, as the worst there is


@pytest.mark.parametrize("relation, of", [("add_or_remove_one", ADD), ("replace_one", REPLACE)])
def test_the_ledger_composes_training_as_the_accountant_does(relation, of):
    training = {"kind": "dp_sgd", "sampling_probability": 0.05, "noise_multiplier": 1.2, "steps": 40}
    assert composed([training], 1e-5, relation=relation) == pytest.approx(
        reference([sgd(0.05, 1.2, 40)], 1e-5, of), abs=5e-3
    )


def test_correlated_noise_bounds_no_group():
    banded = {"kind": "dp_sgd", "sampling_probability": 0.05, "noise_multiplier": 2.0, "steps": 8, "bands": 2}
    assert composed([banded], 1e-5) < math.inf == composed([banded], 1e-5, group=2)
    assert composed([banded], 1e-5, relation="replace_one") < math.inf
    assert composed([{**banded, "bands": 1}], 1e-5, group=2) < math.inf


def test_the_grid_of_losses():
    one, several = Neighbours(), Neighbours(group=2)
    quiet, loud = ([read_event({"kind": "gaussian", "noise_multiplier": noise})] for noise in (0.1, 5.0))
    assert (
        loss_grid(loud, one) == 3e-4
        and loss_grid(quiet, one) == pytest.approx(9e-3)
        and loss_grid([*loud, *quiet], one) == loss_grid(quiet, one)
    )
    assert loss_grid(loud, several) == 0.02 and loss_grid(
        [read_event({"kind": "gaussian", "noise_multiplier": 0.03})], several
    ) == pytest.approx(0.1)
    assert loss_grid([read_event({"kind": "gaussian", "noise_multiplier": 0.0}), *loud], one) == 3e-4


def test_neighbours():
    assert [Neighbours().changes, Neighbours(group=3).changes, Neighbours("replace_one").changes] == [1, 3, 2]
    assert (Neighbours().relation, Neighbours().group) == ("add_or_remove_one", 1)
    with pytest.raises(
        PrivacyError, match=r"^relation 'swap': expected 'add_or_remove_one' or 'replace_one'$"
    ):
        Neighbours("swap")
    with pytest.raises(
        PrivacyError,
        match=r"^a group of 2 units is only accounted for under add_or_remove_one, not replace_one$",
    ):
        Neighbours("replace_one", 2)


def test_group_privacy_is_the_lemma():
    assert group_privacy(0.5, 1e-6, 3) == (1.5, pytest.approx(1e-6 * (1 + math.exp(0.5) + math.exp(1.0))))
    assert group_privacy(350.0, 0.0, 2) == (700.0, 0.0) and group_privacy(350.0, 1e-300, 2)[
        1
    ] == pytest.approx(1e-300 * (1 + math.exp(350)))
    assert group_privacy(351.0, 1e-300, 2) == (702.0, 1.0) and group_privacy(351.0, 0.0, 2) == (702.0, 0.0)
    assert group_privacy(0.0, 1e-6, 3) == (0.0, pytest.approx(3e-6)) and group_privacy(1.0, 0.9, 3) == (
        3.0,
        1.0,
    )


def test_a_stated_delta_is_no_less_than_what_is_stated():
    stated = {"kind": "epsilon_delta", "epsilon": 0.3, "delta": 1e-4}
    assert composed([stated], 0.9e-4) == math.inf and composed([stated], 1.1e-4) == pytest.approx(
        0.3, abs=0.03
    )
    assert composed(
        [stated, {"kind": "added", "epsilon": 0.25}, {"kind": "added", "epsilon": 0.25}], 1.1e-4
    ) == pytest.approx(0.8, abs=0.03)


def test_events_of_accesses():
    paid = [TRAINING, LABEL_COUNT, UNIT_COUNT]
    event = accesses_event(paid)
    assert event == [
        {"kind": "dp_sgd", "sampling_probability": 0.05, "noise_multiplier": 1.0, "steps": 40, "bands": 1},
        {"kind": "discrete_laplace", "noise_multiplier": 4.0},
        {"kind": "added", "epsilon": 0.2},
    ]
    assert accesses_event([{"what": "count", "epsilon": "public"}]) == []
    assert composed([event], 1e-5) == pytest.approx(compose(tuple(paid), 1e-5), abs=1e-6)
    parts = event_from_dict(event[:2]).events
    assert parts[0] == sgd(0.05, 1.0, 40) and parts[1] == dp_event.DiscreteLaplaceDpEvent(0.25, 1)
    kinds = [
        {"kind": "laplace", "noise_multiplier": 3.0},
        {"kind": "gaussian", "noise_multiplier": 3.0},
        PURE,
        {"kind": "not_private"},
    ]
    assert [event_from_dict(kind) for kind in kinds] == [
        dp_event.LaplaceDpEvent(3.0),
        dp_event.GaussianDpEvent(3.0),
        dp_event.UnsupportedDpEvent(),
        dp_event.NonPrivateDpEvent(),
    ]


def test_messages_offer_the_nearest_name():
    assert (
        known_names("laplce", ["gaussian", "laplace"])
        == "did you mean 'laplace'? known: 'gaussian', 'laplace'"
    )
    assert known_names("x", ["gaussian"]) == "known: 'gaussian'" and known_names("x", []) == "known: none"
    assert known_names("gauss", ["gaussian"]).startswith("did you mean 'gaussian'?")
    assert known_names("gaus", ["gaussian"]).startswith("did you mean 'gaussian'?") and known_names(
        "gas", ["gaussian"]
    ).startswith("did you mean")
    assert known_names("an", ["gaussian"]) == "known: 'gaussian'"
    for given, told in (
        (["gaussian"], r"\['gaussian'\]"),
        ("laplce", "'laplce'"),
        ({"kind": "laplce"}, "'laplce'"),
        ({"noise": 1}, "None"),
    ):
        near = "did you mean 'laplace'. " if "laplce" in told else ".*"
        with pytest.raises(
            SettingsError, match=f"^event kind {told} is not one; {near}known: 'dp_sgd', 'gaussian'"
        ):
            read_event(given)
    with pytest.raises(SettingsError, match=r"^event: an empty list releases nothing$"):
        composed([[]], 1e-5)
    with pytest.raises(
        SettingsError, match="^event gaussian: noise_multiplier: input should be greater than or equal to 0$"
    ):
        read_event({"kind": "gaussian", "noise_multiplier": -1})


def test_a_question_is_remembered_under_its_versions_events_delta_and_neighbours():
    from importlib import metadata

    import dpsynth

    question = EpsilonQuery(frozenset({("b", 1), ("a", 2)}), 1e-5, Neighbours(group=2))
    assert question.text == (
        f'[["{metadata.version("dp-accounting")}", "{dpsynth.__version__}"], [["a", 2], ["b", 1]], 1e-05, '
        '["add_or_remove_one", 2]]'
    )


def test_the_name_of_a_release_shows_neither_run_nor_secret():
    name = release_id("run", b"secret")
    assert len(name) == 32 and name == release_id("run", b"secret")
    assert len({name, release_id("run 2", b"secret"), release_id("run", b"secrets")}) == 3
    assert (
        name == hashlib.blake2b(b"run", digest_size=16, key=b"secret", person=b"dpsynth release").hexdigest()
    )
    assert name != hashlib.blake2b(b"run", digest_size=16, key=b"secret").hexdigest()


# default delta


@pytest.mark.parametrize(
    "units, delta",
    [(1, 1e-5), (100, 1e-5), (10_000, 1e-5), (25_000, 4e-6), (100_000, 1e-6), (10**6, 10**-7.2)],
)
def test_default_delta_is_a_tenth_of_a_unit_at_most(units, delta):
    assert privacy.default_delta(units) == pytest.approx(delta) and privacy.default_delta(
        units
    ) * units <= 0.1 * (1 + 1e-9)


def test_a_delta_above_a_tenth_of_a_unit_is_told():
    assert privacy.delta_note(1e-4, 1000) == "" == privacy.delta_note(1e-5, 1000)
    assert privacy.delta_note(1.5e-4, 1000).startswith("delta is 0.15/n")
    assert (
        privacy.delta_note(2.5e-4, 1000)
        == "delta is 0.25/n: so many units could be expected to be published outright"
    )


# the stand-alone recomputation


def claims(accesses, delta=1e-5, interval=3e-4):
    """A hand-made certificate of accesses (dicts, the training first), with what `verify.verify` reads."""
    relation = {"epsilon": ADD, "epsilon_replace_one": REPLACE}
    spent = {claim: verify.privacy_profile(accesses, claim, interval) for claim in relation}
    for access in accesses:
        access["epsilon"] = verify.privacy_profile([access], "epsilon", interval)(delta)
    return {
        "delta": delta,
        "num_units": 1000,
        "accountant": {"interval": interval},
        "adjacency": "zero-out, which is add/remove",
        "mechanism": {
            "sampler": "poisson",
            "sampling_probability": 0.05,
            "steps": 40,
            "bands": 1,
            "noise_multiplier": 1.0,
            "expected_batch_size": 50,
        },
        "accesses": [*accesses, {"what": COUNT, "epsilon": "public"}],
        **{claim: spent[claim](delta) for claim in relation},
        "curve": [{"delta": 1e-3, "epsilon": spent["epsilon"](1e-3)}],
        "composed": {"delta": delta, "epsilon": spent["epsilon"](delta)},
    }


def training(**changes):
    return {
        "what": "fine-tuning",
        "mechanism": "dp_sgd",
        "noise_multiplier": 1.0,
        "sampling_probability": 0.05,
        "steps": 40,
        "bands": 1,
        "added": False,
        **changes,
    }


def counted(what, scale, **changes):
    return {
        "what": what,
        "mechanism": "discrete_laplace",
        "noise_multiplier": scale,
        "sampling_probability": 1.0,
        "steps": 1,
        "bands": 1,
        "added": False,
        **changes,
    }


def test_verify_recomputes_what_it_is_told():
    certificate = claims([training(), counted(LABELS, 4.0)])
    found = verify.verify(certificate)
    assert list(found) == ["epsilon", "epsilon_replace_one", "delta"] and found["delta"] == 1e-5
    assert found["epsilon"] == pytest.approx(compose((TRAINING, LABEL_COUNT), 1e-5), abs=1e-9)
    assert found["epsilon_replace_one"] == pytest.approx(
        compose((TRAINING, LABEL_COUNT), 1e-5, "epsilon_replace_one"), abs=1e-9
    )


@pytest.mark.parametrize(
    "field, below, words",
    [
        ("epsilon", 2e-3, "it claims epsilon {:.6g} at delta 1e-05 for all accesses, but spends {:.6g}"),
        (
            "epsilon_replace_one",
            2e-3,
            "it claims epsilon_replace_one {:.6g} at delta 1e-05 for all accesses, but spends {:.6g}",
        ),
    ],
)
def test_a_claim_below_what_is_spent_is_refused(field, below, words):
    certificate = claims([training()])
    spent = certificate[field]
    verify.verify({**certificate, field: spent - 5e-4})
    with pytest.raises(ValueError) as refused:
        verify.verify({**certificate, field: spent - below})
    assert str(refused.value) == words.format(spent - below, spent)


def test_every_part_of_a_claim_is_recomputed():
    certificate = claims([training(), counted(LABELS, 4.0)])
    less = {**certificate["accesses"][1], "epsilon": certificate["accesses"][1]["epsilon"] - 2e-3}
    for lie, words in (
        (
            {"curve": [{"delta": 1e-3, "epsilon": certificate["curve"][0]["epsilon"] - 2e-3}]},
            "at delta 0.001 for all accesses",
        ),
        (
            {"composed": {**certificate["composed"], "epsilon": certificate["epsilon"] - 2e-3}},
            "claims epsilon .* for all accesses",
        ),
        (
            {"accesses": [certificate["accesses"][0], less, certificate["accesses"][2]]},
            f"for {LABELS}, but spends 0.2",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            verify.verify({**certificate, **lie})


def test_contradictions_are_refused_in_a_sentence():
    certificate = claims([training()])
    accesses, mechanism = certificate["accesses"], certificate["mechanism"]
    banded = {
        "accesses": [training(bands=41, epsilon=9.0), accesses[1]],
        "mechanism": {**mechanism, "bands": 41, "sampler": "cyclic poisson"},
    }
    wide = {
        "accesses": [training(bands=21, epsilon=9.0), accesses[1]],
        "mechanism": {**mechanism, "bands": 21, "sampler": "cyclic poisson"},
    }
    for lie, words in (
        ({"accesses": [{**accesses[0], "added": True}, accesses[1]]}, "only a count may be `added`"),
        (
            {"mechanism": {**mechanism, "sampler": "cyclic poisson"}},
            "1 band(s) do not go with cyclic poisson batches",
        ),
        ({"adjacency": "add/remove"}, f"its neighbours do not go with whether the {COUNT} is public"),
        (
            {"mechanism": {**mechanism, "steps": 39}},
            "the mechanism it describes is not among the accesses it charges for",
        ),
        ({"num_units": 1001}, "its batch is not q times the number of units"),
        ({"accesses": [*accesses, accesses[1]]}, f"the {COUNT} is not paid for"),
        (
            {"delta": 1e-3},
            "delta 0.001 is not below 1/n; a whole unit could be published with that probability",
        ),
        ({"delta": 0.0}, "delta 0 is not below 1/n; a whole unit could be published with that probability"),
        (banded, "41 bands are too many"),
        (wide, "21 bands are too many"),
    ):
        with pytest.raises(ValueError) as refused:
            verify.verify({**certificate, **lie})
        assert str(refused.value) == words
    hidden = {"adjacency": "add/remove", "accesses": [accesses[0]]}
    with pytest.raises(ValueError, match=f"^the {COUNT} is not paid for$"):
        verify.verify({**certificate, **hidden})


def test_bands_up_to_the_units_over_the_batch_verify():
    accesses = [training(bands=20, steps=40, noise_multiplier=3.0)]
    certificate = claims(accesses)
    certificate["mechanism"] |= {"bands": 20, "noise_multiplier": 3.0, "sampler": "cyclic poisson"}
    assert verify.verify(certificate)["epsilon"] == pytest.approx(
        reference([sgd(1.0, 3.0, 2)], 1e-5, ADD, 3e-4), abs=1e-6
    )


def test_a_number_of_units_that_is_paid_for_verifies():
    certificate = claims([training(), counted(COUNT, 5.0, added=True)])
    certificate |= {"adjacency": "add/remove", "accesses": certificate["accesses"][:2]}
    assert verify.verify(certificate)["epsilon"] == pytest.approx(compose((TRAINING,), 1e-5) + 0.2, abs=1e-9)


# what tells a run from all others


IDENTITY = {
    "settings": '{"seed": 1, "unit": "row"}',
    "data": "rows",
    "base_model": "weights",
    "code": "c",
    "libraries": '{"jax": "1"}',
    "computation": '{"devices": 1}',
}


def test_a_run_is_named_by_every_part_of_its_identity():
    assert privacy.run_id(IDENTITY) == privacy.run_id(dict(reversed(IDENTITY.items())))
    names = {privacy.run_id({**IDENTITY, part: "other"}) for part in IDENTITY} | {privacy.run_id(IDENTITY)}
    assert len(names) == len(IDENTITY) + 1 and {len(name) for name in names} == {64}


def test_an_identity_is_its_parts(monkeypatch):
    import json

    monkeypatch.setattr(privacy.identity, "code_hash", lambda: "the code")
    identity = privacy.run_identity("s", "d", "m", {"b": 2, "a": 1})
    assert identity == {
        "settings": "s",
        "data": "d",
        "base_model": "m",
        "code": "the code",
        "computation": '{"a": 1, "b": 2}',
        "libraries": json.dumps(privacy.versions(), sort_keys=True),
    }
    from importlib import metadata

    assert {"python", "dpsynth", *privacy.LIBRARIES} == set(privacy.versions())
    assert privacy.versions()["dp-accounting"] == metadata.version("dp-accounting")
    assert privacy.versions()["jax"] == metadata.version("jax")
    monkeypatch.setattr(privacy.identity, "_version", lambda name, otherwise: f"{name} or {otherwise}")
    assert (
        privacy.versions()["dpsynth"] == "dpsynth or source"
        and privacy.versions()["keras"] == "keras or none"
    )
    monkeypatch.undo()
    monkeypatch.setattr(privacy.identity, "LIBRARIES", ("no-such-library",))
    assert privacy.versions()["no-such-library"] == "none"


def test_the_hash_of_the_code_is_that_of_the_places_and_the_contents_of_its_files(monkeypatch, tmp_path):
    for name in (
        "b.py",
        "a.py",
        "cli.py",
        "data.txt",
        "data/readers.py",
        "evaluation/mauve.py",
        "data/deep/er.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    asked = []
    monkeypatch.setattr(privacy.identity.resources, "files", lambda name: asked.append(name) or tmp_path)
    assert list(privacy.code_modules()) == ["a.py", "b.py", "data/deep/er.py", "data/readers.py"]
    before = privacy.code_hash()
    assert set(asked) == {"dpsynth"}
    content = (
        place.encode() + b"\0# " + place.encode()
        for place in ("a.py", "b.py", "data/deep/er.py", "data/readers.py")
    )
    assert before == hashlib.sha256(b"".join(content)).hexdigest()
    (tmp_path / "data" / "readers.py").write_text("# changed")
    moved = privacy.code_hash()
    (tmp_path / "data" / "readers.py").rename(tmp_path / "readers.py")
    assert len({before, moved, privacy.code_hash()}) == 3


def test_every_module_of_the_package_is_covered_or_named_as_free():
    import pathlib

    import dpsynth

    root = pathlib.Path(dpsynth.__file__).parent
    modules = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    free = {
        place
        for place in modules
        if any(f"{place}/".startswith((f"{name}/", f"{name}.py/")) for name in privacy.NOT_RELEASING)
    }
    assert modules - set(privacy.code_modules()) == free and {"cli/parser.py", "_version.py"} < free


def test_a_folder_is_bound_to_its_run(tmp_path):
    folder = tmp_path / "run" / "private"
    assert (
        privacy.bind_run(folder, IDENTITY) == privacy.run_id(IDENTITY) == privacy.bind_run(folder, IDENTITY)
    )
    assert privacy.read_identity(folder) == IDENTITY
    for part, told in (
        ("settings", r"settings \(seed: 1, now 2\)"),
        ("data", "training rows"),
        ("base_model", "base model"),
        ("code", "dpsynth code"),
        ("libraries", r"libraries \(jax: 1, now 2\)"),
        ("computation", r"microbatches or devices \(devices: 1, now 2\)"),
    ):
        value = IDENTITY[part].replace("1", "2") if IDENTITY[part].startswith("{") else "other"
        changed = {**IDENTITY, part: value}
        with pytest.raises(
            PrivacyError,
            match=f"^{folder.parent}: this run was started with other {told}; use another output folder, or "
            "restore them to resume$",
        ):
            privacy.bind_run(folder, changed)
        if part in ("code", "libraries", "computation"):
            assert privacy.bind_run(folder, changed, finished=True) == privacy.run_id(IDENTITY)
    two = {"settings": '{"seed": 1, "unit": "user"}'}
    with pytest.raises(PrivacyError, match=r"other settings \(unit: row, now user\)"):
        privacy.bind_run(folder, {**IDENTITY, **two})
    assert privacy.identity._difference("settings", {}, two) == "settings (seed: None, now 1)"
    run = privacy.stored_run(folder)
    assert run.run_id == privacy.run_id(IDENTITY)
    assert (
        run.integers("x", 0, 4).tolist()
        == Randomness(privacy.load_secret(folder), run.run_id).integers("x", 0, 4).tolist()
    )
    State(folder, privacy.load_secret(folder), "identity").check("identity.json")
    assert privacy.differing_parts(IDENTITY, {"data": "rows", "code": "x"}) == ["code"]
    assert (
        privacy.differing_parts({}, {"data": "rows"}) == ["data"]
        and privacy.differing_parts({}, {"data": "rows"}, ("data",)) == []
    )


def test_a_folder_without_its_identity_is_bound_to_no_run(tmp_path):
    folder = tmp_path / "run" / "private"
    with pytest.raises(
        PrivacyError,
        match=f"^{folder}: of a finished run, and private/identity.json is missing, which says which run it "
              f"was",
    ):
        privacy.bind_run(folder, IDENTITY, finished=True)
    with pytest.raises(
        PrivacyError,
        match=f"^{folder}/identity.json: missing; restore it from a backup, or use another folder",
    ):
        privacy.read_identity(folder)
    (tmp_path / "run" / "release").mkdir(parents=True)
    for name in privacy.RELEASED:
        (tmp_path / "run" / "release" / name).touch()
        with pytest.raises(PrivacyError, match=f"release/{name}: left by a run, and private/identity.json"):
            privacy.bind_run(folder, IDENTITY)
        (tmp_path / "run" / "release" / name).unlink()
    folder.mkdir()
    (folder / "checkpoint.npz").touch()
    with pytest.raises(PrivacyError, match=f"^{folder}/checkpoint.npz: left by a run"):
        privacy.bind_run(folder, IDENTITY)
    (folder / "checkpoint.npz").unlink()
    privacy.bind_run(folder, IDENTITY)
    (folder / "identity.json").write_text("{}")
    with pytest.raises(
        PrivacyError,
        match=f"^{folder}/identity.json: damaged, or not of a run with the secret beside it; restore both",
    ):
        privacy.read_identity(folder)
    (folder / "secret").write_bytes(b"x" * 32)
    with pytest.raises(PrivacyError, match="secret: damaged"):
        privacy.read_identity(folder)
