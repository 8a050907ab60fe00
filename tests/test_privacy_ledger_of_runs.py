"""Line 10: every run is charged, once, whether or not it ends."""

import json
import math

import pytest

from parts import RUN, splits
from dpsynth.finetune import Trainer, finetune_run


def test_a_run_is_charged_once_and_stays_charged(run, tmp_path):
    from dpsynth.ledger import Ledger
    from dpsynth.settings import BudgetError
    ledger = Ledger(run.parent / ".ledger.sqlite")
    (dataset,) = ledger.datasets()
    assert [r.state for r in ledger.charged(dataset)] == ["finished"] and dataset.units == 40
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert certificate["composed"] == {"epsilon": pytest.approx(certificate["epsilon"], rel=1e-3), "delta": certificate["delta"], "releases": 1,
                                       "ledger": "the ledger of this folder of runs"}
    finetune_run(RUN, splits(), run, progress=False)
    assert len(ledger.charged(dataset)) == 1
    ledger.set_cap(dataset, 10.0)
    with pytest.raises(BudgetError, match="over the cap 10"):  # one more row is the same budget
        finetune_run(RUN, splits("an entirely different row"), run.parent / "again", progress=False)
    assert not (run.parent / "again" / "release" / "adapter.npz").exists()
    ledger.set_cap(dataset, math.inf)


def test_a_stopped_run_is_charged(tmp_path, monkeypatch):
    from dpsynth.ledger import Ledger
    monkeypatch.setattr(Trainer, "update", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        finetune_run(RUN, splits(), tmp_path / "dp", progress=False)
    ledger = Ledger(tmp_path / ".ledger.sqlite")
    assert [r.state for r in ledger.charged(ledger.datasets()[0])] == ["started"]
