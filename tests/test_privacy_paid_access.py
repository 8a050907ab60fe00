"""Line 9: whatever else is read from private rows is paid for or public."""

import dataclasses
import json
import math

import numpy as np
import pytest

import pandas as pd

import dpsynth.finetune
from parts import IMDB, RUN, certified, splits
from dpsynth.certificate import NOT_COVERED, verify
from dpsynth.data import from_frame
from dpsynth.finetune import finetune_run, label_shares
from dpsynth.runs import Account
from dpsynth.ledger import RUNS_LEDGER, Ledger, accesses_event, compose_events, ledger_command
from dpsynth.runs import Survey, announce, enough_rows, fit_stage, load_stage, spending
from dpsynth.privacy import Access, calibrate_noise, compose, count_accesses, make_mechanism, noisy_counts
from dpsynth.runs.run import Run
from dpsynth.settings import BudgetError, DataError, PrivacyError, Settings, SettingsError, make_settings


def test_counts_and_training_together_meet_the_target():
    plain = make_mechanism(IMDB, 25000)
    settings = IMDB.model_copy(update={"label_prior": "private"})
    paid = make_mechanism(settings, 25000)
    assert [(a.what, a.added) for a in paid.others] == [("label histogram", False)]
    assert paid.noise_multiplier > plain.noise_multiplier and 9.95 < paid.epsilon <= 10
    assert (
        paid.epsilon
        == compose(paid.accesses, paid.delta)
        < sum(compose((a,), paid.delta) for a in paid.accesses)
    )
    certificate = certified(paid, settings)
    assert (
        sum(a["epsilon"] == "public" for a in certificate["accesses"]) == 4
        and len(certificate["accesses"]) == 6
    )
    verify(certificate)


def test_what_follows_from_the_number_of_units_is_added_to_it_and_not_composed():
    settings = IMDB.model_copy(
        update={"label_prior": "private", "unit_count": "private", "access_share": 0.1}
    )
    paid = make_mechanism(settings, 25000)
    assert [(a.what, a.added) for a in paid.others] == [
        ("number of training units", True),
        ("label histogram", False),
    ]
    training, count, labels = paid.accesses
    rest = (training, labels)
    assert 8.95 < compose(rest, paid.delta) <= 9.0 and paid.epsilon_after(0) == pytest.approx(
        1.0 + compose((labels,), paid.delta)
    )
    assert paid.epsilon == pytest.approx(1.0 + compose(rest, paid.delta))
    assert paid.epsilon > compose((*rest, dataclasses.replace(count, added=False)), paid.delta) + 0.05
    certificate = certified(paid, settings)
    assert certificate["epsilon"] == paid.epsilon == verify(certificate)["epsilon"]
    assert [a["epsilon"] for a in certificate["accesses"][:2]] == [
        compose((training,), paid.delta),
        pytest.approx(1.0),
    ]
    for group in certificate["groups"][:1]:
        alone = compose_events([accesses_event(rest)], paid.delta, group=group["units"])
        assert group["epsilon"] == pytest.approx(group["units"] * 1.0 + alone)
    assert certificate["epsilon_replace_one"] == pytest.approx(
        2.0 + compose(rest, paid.delta, "epsilon_replace_one")
    )
    curve = {point["delta"]: point["epsilon"] for point in certificate["curve"]}
    assert curve[1e-5] == pytest.approx(1.0 + compose(rest, 1e-5))
    assert (
        sum(a["epsilon"] == "public" for a in certificate["accesses"]) == 3
        and len(certificate["accesses"]) == 6
    )


def test_a_cap_between_the_composed_and_the_added_cost_refuses_the_run(tmp_path):
    settings = IMDB.model_copy(update={"unit_count": "private", "access_share": 0.1})
    paid = make_mechanism(settings, 25000)
    composed = compose(tuple(dataclasses.replace(a, added=False) for a in paid.accesses), paid.delta)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    rows = ledger.register("rows", ["a", "b"], paid.delta)
    ledger.set_cap(rows, (composed + paid.epsilon) / 2)
    counts, training = accesses_event(paid.others), accesses_event([paid.training(paid.steps)])
    ledger.plan("run counts", rows, counts)
    ledger.start("run counts")
    with pytest.raises(BudgetError, match="over the cap"):
        ledger.plan("run training", rows, training)
    ledger.set_cap(rows, paid.epsilon + 1e-6)
    ledger.plan("run training", rows, training)
    ledger.start("run training")
    assert (
        ledger.spent(rows)
        == ledger.released_as("rows", paid.delta)[0]
        == pytest.approx(paid.epsilon, abs=1e-6)
    )


def test_a_count_with_more_epsilon_than_is_composed_is_refused():
    with pytest.raises(
        SettingsError, match="^setting access_share: epsilon 200 for each count is more than 50"
    ):
        count_accesses(Settings(epsilon=1000, access_share=0.2, label_prior="private"))
    assert count_accesses(Settings(epsilon=1000, access_share=0.2)) == {} and count_accesses(
        Settings(epsilon=1000, label_prior="private")
    )


def test_a_private_number_of_units_needs_a_delta_that_does_not_follow_from_it():
    with pytest.raises(
        SettingsError, match="^setting delta: give one, well below 1/n; .*unit_count: private"
    ) as error:
        make_settings({"unit_count": "private"})
    assert (
        "\n" not in str(error.value) and make_settings({"unit_count": "private", "delta": 1e-5}).delta == 1e-5
    )


def people(settings):
    """Twelve people with four rows each, of both labels; three of them repeat a text of 60 words in all
    their rows.
    """
    long = " ".join(f"word{i}" for i in range(60))
    rows = pd.DataFrame(
        [
            {
                "text": f"{long} {u} {i}" if u < 3 else f"row {i} of {u} was fine",
                "label": i % 2,
                "user": f"u{u}",
            }
            for u in range(12)
            for i in range(4)
        ]
    )
    return from_frame(
        rows, settings, test=pd.DataFrame({"text": ["a", "b"], "label": [0, 1], "user": ["x", "y"]})
    ), long


def test_counts_are_of_units_charged_before_and_drawn_with_the_noise_that_is_charged(tmp_path, monkeypatch):
    settings = RUN.model_copy(
        update={
            "unit": "user",
            "batch_size": 4,
            "max_records_per_unit": 3,
            "delta": 1e-3,
            "access_share": 0.1,
            "unit_count": "private",
            "label_prior": "private",
            "contamination_corpus": str(tmp_path / "corpus.jsonl"),
            "contamination_reference": str(tmp_path / "fresh.jsonl"),
        }
    )
    data, long = people(settings)
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (long, "something else")), encoding="utf-8"
    )
    (tmp_path / "fresh.jsonl").write_text(
        "".join(json.dumps({"text": f"zxqj {i}"}) + "\n" for i in range(9)), encoding="utf-8"
    )
    drawn, charged = [], []

    def record(counts, scale):
        ledger = Ledger(tmp_path / RUNS_LEDGER)
        charged.append(
            [release.title for dataset in ledger.datasets() for release in ledger.charged(dataset)]
        )
        drawn.append(([int(c) for c in counts], scale))
        return drawn[-1][0]

    monkeypatch.setattr(dpsynth.finetune.estimates, "noisy_counts", record)
    finetune_run(Run(settings, tmp_path / "dp"), data, progress=False)
    assert charged == 4 * [["dp_ft: counts"]]
    assert (
        [scale for _, scale in drawn]
        == [access.noise_multiplier for access in count_accesses(settings).values()]
        == 4 * [pytest.approx(1 / 0.8)]
    )
    counts = dict(zip(count_accesses(settings), (counts for counts, _ in drawn)))
    assert (
        counts["units"] == [12]
        and counts["overlaps"] == [3, 0]
        and sum(counts["labels"]) == 12
        and sum(counts["likelier"]) == 12
    )
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    counting, training = ledger.charged(ledger.datasets()[0])
    assert [r.run_id.partition(" ")[2] for r in (counting, training)] == [
        "counts",
        "training",
    ] and counting.run == training.run
    units, *parts = map(json.loads, counting.parts)
    noises = [1 / units["epsilon"], *(part["noise_multiplier"] for part in parts)]
    assert units["kind"] == "added" and noises == pytest.approx([scale for _, scale in drawn])
    paid = [
        a
        for a in json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())["accesses"]
        if a["epsilon"] != "public"
    ]
    assert (
        sorted(a["noise_multiplier"] for a in paid if a["mechanism"] == "discrete_laplace")
        == pytest.approx(sorted(noises))
        and len(paid) == 5
    )


HIDDEN = RUN.model_copy(update={"unit_count": "private", "delta": 1e-3, "batch_size": 30})


def some(count, settings=HIDDEN):
    rows = pd.DataFrame([{"text": f"row number {i} was good", "label": 1} for i in range(count)])
    return from_frame(rows, settings, test=pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}))


def told_before_a_run(settings, count, folder, capfd):
    """All that somebody sees who checks and begins a run on so many rows: lines, output, what the ledger
    says of the rows.
    """
    data = some(count, settings)
    found = Survey(settings, load=lambda settings: data)
    lines = spending([found], folder)
    announce(Run(settings, folder / settings.experiment), data.train)
    account = Account(Run(settings, folder / settings.experiment), data.train, "")
    account.register()
    shown = [line.split() for line in ledger_command("frame", path=account.ledger.path).splitlines()]
    return found.mechanism, found.unknown, lines, capfd.readouterr(), shown


@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 1000}, {"delta": 0.03, "noise_multiplier": 0.4, "epochs": 1e-4, "bands": "8"}],
)
def test_before_it_is_paid_for_nothing_follows_from_a_number_of_units_that_is_private(
    tmp_path, capfd, changes
):
    settings = HIDDEN.model_copy(update=changes)
    told = [told_before_a_run(settings, count, tmp_path / str(count), capfd) for count in (1, 29, 30)]
    assert all(one == told[0] for one in told)
    mechanism, unknown, lines, seen, shown = told[0]
    assert mechanism is None and lines == [
        "privacy: dp_ft on frame, whose number of units is private, will spend at most epsilon 8; "
        "whether a cap allows it is asked when it is charged"
    ]
    assert "privacy: dp_ft will charge at most epsilon 8" in seen.err and shown[1][:3] == [
        "frame",
        "private",
        "private",
    ]


@pytest.mark.parametrize(
    "exact, estimate, goes_on", [(29, 30, True), (40, 29, False), (30, 30, True), (1, 35, True)]
)
def test_whether_a_run_goes_on_depends_on_the_paid_estimate_alone(
    tmp_path, monkeypatch, exact, estimate, goes_on
):
    class Trained(Exception):
        pass

    def train(*arguments):
        raise Trained

    monkeypatch.setattr(dpsynth.finetune.estimates, "noisy_counts", lambda counts, scale: [estimate])
    monkeypatch.setattr(dpsynth.finetune.run, "_make_trainer", train)
    settings = HIDDEN.model_copy(update={"access_share": 0.1, "epochs": 2})
    with pytest.raises(Trained if goes_on else SettingsError) as refused:
        finetune_run(Run(settings, tmp_path / "dp"), some(exact, settings), progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    assert [release.title for release in ledger.charged(ledger.datasets()[0])] == ["dp_ft: counts"]
    if not goes_on:
        assert str(refused.value) == (
            "setting batch_size: 30 is more than the 29 training units (the number of units is the estimate"
            " that this run "
            "was charged for)"
        )


def test_units_are_held_out_without_asking_how_many_there_are():
    for count in range(1, 12):
        split = HIDDEN.model_copy(update={"audit_fraction": 0.4})
        frame = pd.DataFrame({"text": [f"row {i}" for i in range(count)], "label": 1})
        try:
            found = from_frame(frame, split, test=frame)
            assert len(found.train) + len(found.kept_out) == count and len(found.train)
        except DataError as error:
            assert "no unit is" in str(error) and "1 row" not in str(error)


def test_an_audit_asks_for_enough_units_by_the_estimate(tmp_path):
    (tmp_path / "release").mkdir()
    splits_of = lambda trained: dataclasses.replace(some(trained), kept_out=some(25).train)
    for estimate, enough in ((19, False), (20, True)):
        (tmp_path / "release" / "certificate.json").write_text(
            json.dumps({"num_units": estimate}), encoding="utf-8"
        )
        assert {enough_rows(Run(HIDDEN, tmp_path), splits_of(count)) for count in (5, 19, 20, 400)} == {
            enough
        }
    assert [enough_rows(Run(RUN, tmp_path), splits_of(count)) for count in (19, 20)] == [False, True]
    assert any("whether a run was refused" in line for line in NOT_COVERED)


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
    assert (
        label_shares([30, 10]) == [0.75, 0.25]
        and label_shares([-3, 7]) == [0, 1]
        and label_shares([-3, -1]) == [0.5, 0.5]
    )


def test_an_exact_number_of_units_that_was_paid_to_be_hidden_is_in_no_file(tmp_path):
    settings = RUN.model_copy(update={"unit_count": "private", "delta": 1e-3, "access_share": 0.2})
    fit_stage(
        Run(settings, tmp_path / "dp"), load_stage(Run(settings, tmp_path / "dp"), splits(settings=settings))
    )
    metrics = json.loads((tmp_path / "dp" / "metrics.json").read_text())
    assert "train_units" not in metrics and 40 not in metrics.values()
    (tmp_path / "dp" / "private" / "counts.json").unlink()
    with pytest.raises(
        PrivacyError, match="counts.json: the counts that this run was charged for are missing"
    ):
        fit_stage(Run(settings, tmp_path / "dp"), splits(settings=settings))


def test_counts_are_estimated_once_and_used(tmp_path):
    noisy = {"access_share": 0.05}  # so that two draws are seldom the same
    settings = RUN.model_copy(
        update={"label_prior": "private", "unit_count": "private", "delta": 1e-3, **noisy}
    )
    finetune_run(Run(settings, tmp_path / "dp"), splits(), progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    counts = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())
    assert [certificate["num_units"]] == counts["units"] and len(counts["labels"]) == 2
    assert json.loads((tmp_path / "dp" / "release" / "label_prior.json").read_text()) == label_shares(
        counts["labels"]
    )
    before = (tmp_path / "dp" / "private" / "counts.json").read_bytes()
    finetune_run(Run(settings, tmp_path / "dp"), splits(), progress=False)
    assert (tmp_path / "dp" / "private" / "counts.json").read_bytes() == before
