"""Line 10: every run is charged, once, whether or not it ends."""

import json
import math
import re
import shutil
import sys

import pytest

import dpsynth.finetune
import dpsynth.privacy
from parts import RUN, groups_of_rows, splits
from dpsynth.certificate import read_certificate, verify
from dpsynth.data import from_frame
from dpsynth.finetune import Trainer, finetune_run
from dpsynth.runs import Account
from dpsynth.ledger import RUNS_LEDGER, Ledger, ledger_command
from dpsynth.runs import Survey, announce, spending, warn_of_untold
from dpsynth.runs.run import Run
from dpsynth.settings import BudgetError, PrivacyError


def test_a_run_is_charged_once_and_stays_charged(run, tmp_path):
    from dpsynth.ledger import Ledger
    from dpsynth.settings import BudgetError

    ledger = Ledger(run.parent / ".ledger.sqlite")
    (dataset,) = ledger.datasets()
    assert [r.state for r in ledger.charged(dataset)] == ["finished"] and dataset.units == 40
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert certificate["composed"] == {
        "epsilon": pytest.approx(certificate["epsilon"], rel=1e-3),
        "delta": certificate["delta"],
        "releases": 1,
        "looked": False,
        "other_units": 0,
        "without_privacy": 0,
        "ledger": "the ledger of this folder of runs",
        "basis": "what the ledger holds; it cannot be recomputed from this certificate alone",
    }
    finetune_run(Run(RUN, run), splits(), progress=False)
    assert len(ledger.charged(dataset)) == 1
    ledger.set_cap(dataset, 10.0)
    with pytest.raises(BudgetError, match="over the cap 10"):  # one more row is the same budget
        finetune_run(Run(RUN, run.parent / "again"), splits("an entirely different row"), progress=False)
    assert not (run.parent / "again" / "release" / "adapter.npz").exists()
    ledger.set_cap(dataset, math.inf)


PLAIN = RUN.model_copy(update={"epsilon": math.inf, "experiment": "plain"})


def survey(settings):
    return Survey(settings, load=lambda settings: splits(settings=settings))


def test_a_training_that_ends_in_an_error_is_abandoned_and_stays_charged(tmp_path, monkeypatch):
    whole = dpsynth.privacy.Session._grid_noise
    monkeypatch.setattr(dpsynth.privacy.Session, "_grid_noise", lambda self, count: 0 * whole(self, count))
    with pytest.raises(PrivacyError, match="the noise was 0 times"):
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    (known,) = ledger.charged(ledger.datasets()[0])
    assert known.state == "abandoned" and ledger.spent(ledger.datasets()[0]) > 7


def test_a_run_without_privacy_is_charged_and_certificates_of_the_same_data_say_so(tmp_path):
    assert spending([survey(PLAIN)], tmp_path) == [
        "privacy: 1 run(s) WITHOUT privacy on frame: with those there is no guarantee"
    ]
    finetune_run(Run(PLAIN, tmp_path / "plain"), splits(), progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    (release,) = ledger.charged(ledger.datasets()[0])
    assert release.parts == ['{"kind": "not_private"}'] and release.state == "finished"
    (line,) = spending([survey(RUN)], tmp_path)
    assert "1 run(s) on frame bring what is spent to epsilon 8" in line or "epsilon 7.99" in line
    assert re.search(
        r"0 earlier run\(s\) included; these charge (8|7.99\d) of it, and it has no cap; and 1 run\(s\) "
        r"WITHOUT privacy on frame: with those "
        "there is no guarantee$",
        line,
    )
    finetune_run(Run(RUN, tmp_path / "dp_ft"), splits(), progress=False)
    assert spending([survey(PLAIN), survey(RUN)], tmp_path) == []
    certificate = read_certificate(tmp_path / "dp_ft" / "release" / "certificate.json")
    assert certificate["composed"]["epsilon"] == pytest.approx(certificate["epsilon"], rel=1e-3)
    assert (certificate["composed"]["releases"], certificate["composed"]["without_privacy"]) == (1, 1)
    assert (
        "and 1 release(s) WITHOUT privacy: with those there is no guarantee"
        in (tmp_path / "dp_ft" / "release" / "certificate.md").read_text()
    )
    verify(certificate)


def test_a_certificate_composes_runs_of_its_own_unit_and_counts_the_others(tmp_path):
    by_user = RUN.model_copy(
        update={
            "experiment": "by_user",
            "unit": "user",
            "batch_size": 5,
            "epochs": 2.0,
            "max_records_per_unit": 3,
        }
    )
    rows = groups_of_rows(["a", "b", "c"])
    said = []
    for settings in (RUN, by_user):
        finetune_run(
            Run(settings, tmp_path / settings.experiment),
            from_frame(rows, settings, test=rows[:3].assign(user="x")),
            progress=False,
        )
        certificate = read_certificate(tmp_path / settings.experiment / "release" / "certificate.json")
        composed = certificate["composed"]
        assert composed["epsilon"] == pytest.approx(certificate["epsilon"], rel=1e-3)
        said.append((certificate["unit"], composed["releases"], composed["other_units"]))
    assert said == [("row", 1, 0), ("user", 1, 1)]
    assert "and 1 that protect other units: what those cost is not in it" in certificate.markdown()


def test_asking_what_a_sweep_spends_leaves_no_trace(tmp_path):
    assert len(spending([survey(RUN), survey(PLAIN)], tmp_path)) == 1 and list(tmp_path.iterdir()) == []
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    (line,) = spending([survey(RUN), survey(PLAIN)], tmp_path)
    assert (
        "1 run(s) on frame" in line
        and "1 run(s) WITHOUT privacy on frame" in line
        and ledger.datasets() == []
    )


def test_a_cap_refuses_a_run_without_privacy_before_it_trains(tmp_path, monkeypatch):
    data = splits()
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    ledger.set_cap(ledger.register("mine", data.train.ledger_names()), 1000.0)
    monkeypatch.setattr(dpsynth.finetune.run, "tokenize", lambda *arguments: pytest.fail("it trains"))
    for refused in (
        lambda: spending([survey(PLAIN)], tmp_path),
        lambda: finetune_run(Run(PLAIN, tmp_path / "plain"), data, progress=False),
    ):
        with pytest.raises(BudgetError, match="asks inf.* over the cap 1000"):
            refused()
    assert not (tmp_path / "plain" / "release" / "NOT_PRIVATE.md").exists()


def test_a_run_that_was_killed_after_it_was_charged_resumes_under_a_cap_of_itself(tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dpsynth.finetune.run, "train", lambda *arguments, **others: die())
        with pytest.raises(KeyboardInterrupt):
            finetune_run(Run(RUN, tmp_path / "dp_ft"), splits(), progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    ledger.set_cap(ledger.datasets()[0], 8.0)
    assert spending([survey(RUN)], tmp_path) == []
    finetune_run(Run(RUN, tmp_path / "dp_ft"), splits(), progress=False)
    assert [r.state for r in ledger.charged(ledger.datasets()[0])] == ["finished"]


def test_a_run_that_was_killed_between_its_two_charges_is_asked_for_the_second_only(tmp_path, monkeypatch):
    counted = RUN.model_copy(update={"label_prior": "private"})

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dpsynth.finetune.estimates, "noisy_counts", die)
        with pytest.raises(KeyboardInterrupt):
            finetune_run(Run(counted, tmp_path / "dp_ft"), splits(), progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    ledger.set_cap(ledger.datasets()[0], 8.01)
    assert len(spending([survey(counted)], tmp_path)) == 1


def test_a_finished_run_is_charged_to_no_other_ledger(tmp_path):
    counted = RUN.model_copy(update={"label_prior": "private"})
    finetune_run(Run(counted, tmp_path / "dp_ft"), splits(), progress=False)
    moved = counted.model_copy(update={"ledger": str(tmp_path / "other.sqlite")})
    finetune_run(Run(moved, tmp_path / "dp_ft"), splits(), progress=False)
    other = Ledger(tmp_path / "other.sqlite")
    assert (
        not any(other.charged(dataset) for dataset in other.datasets())
        and spending([survey(moved)], tmp_path) == []
    )


def test_a_stopped_run_is_charged(tmp_path, monkeypatch):
    from dpsynth.ledger import Ledger

    monkeypatch.setattr(Trainer, "update", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    ledger = Ledger(tmp_path / ".ledger.sqlite")
    assert [r.state for r in ledger.charged(ledger.datasets()[0])] == ["started"]


# what is said of it


def on_a_terminal(monkeypatch, is_one):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: is_one, raising=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_charged_is_said_before_and_what_is_left_on_a_terminal_only(
    tmp_path, monkeypatch, capsys, terminal
):
    on_a_terminal(monkeypatch, terminal)
    data = splits()
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    earlier = ledger.registered(Account(Run(RUN, tmp_path / "dp_ft"), data.train, "").dataset)
    ledger.set_cap(earlier, 20.0)
    ledger.plan("a", earlier, {"kind": "epsilon_delta", "epsilon": 3.0, "delta": 0.0})
    ledger.start("a")
    announce(Run(RUN, tmp_path / "dp_ft"), data.train)
    public, *private = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"privacy: dp_ft will charge epsilon (8|7.99\d) at delta 1e-05 to frame in the ledger of this folder "
        r"of runs",
        public,
    )
    if terminal:
        assert (
            re.fullmatch(
                r"privacy: 1 run\(s\) on frame bring what is spent to epsilon 1[01]\S* at delta 1e-05, 1 "
                r"earlier run\(s\) included; these charge "
                r"(8|7.99\d) of it, and (9|9.0\d+|8.99\d) of the cap 20 is then left",
                private[0],
            )
            and len(private) == 1
        )
    else:
        assert private == []
    ledger.set_cap(earlier, 10.0)
    with pytest.raises(BudgetError, match="over the cap 10"):
        announce(Run(RUN, tmp_path / "dp_ft"), data.train)


def test_a_run_that_was_charged_announces_nothing(run, capsys):
    announce(Run(RUN, run), splits().train)
    assert capsys.readouterr().err == ""


def test_rows_that_have_spent_more_than_the_certificate_composes_are_told_on_a_terminal_and_nowhere_else(
    run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(run.parent, tmp_path / "runs")
    folder = tmp_path / "runs" / run.name
    ledger = Ledger(tmp_path / "runs" / RUNS_LEDGER)
    on_a_terminal(monkeypatch, True)
    warn_of_untold(Run(RUN, folder))
    assert capsys.readouterr().err == ""
    other = ledger.register("elsewhere", splits().train.ledger_names()[:5], 1e-5)
    ledger.plan("e", other, {"kind": "epsilon_delta", "epsilon": 3.0, "delta": 0.0})
    ledger.start("e")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    warn_of_untold(Run(RUN, folder))
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(
        r"for you only: rows of frame have spent epsilon 1[01]\S* at delta 1e-05 in all; the certificate "
        r"composes (8|7.99\d), "
        r"of what was released as frame with the unit row; `dpsynth ledger` lists the rest\n",
        err,
    )
    on_a_terminal(monkeypatch, False)
    warn_of_untold(Run(RUN, folder))
    assert capsys.readouterr() == ("", "") and files == {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    text = ledger_command("frame", path=ledger.path)
    told = next(line for line in text.splitlines() if line.split()[:3] == ["frame", "row", "1"])
    assert float(told.split()[3]) == pytest.approx(8, abs=0.01) and "what certificates say" in text
    assert re.search(
        "the worst unit of frame has spent 1[01].*: this adds up all that touched it, under any name", text
    )


def test_a_ledger_that_says_what_the_certificate_says_explains_no_difference(run):
    text = ledger_command("frame", path=run.parent)
    assert "what certificates say" in text and "the worst unit" not in text
