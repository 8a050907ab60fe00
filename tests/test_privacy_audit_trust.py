"""Line 15: the audit trusts nothing that was released.

What certificate, checks and ledger say has to be what settings, rows and counts give.
"""

import json
import shutil
import sqlite3

import pytest

from parts import RUN, splits
import dpsynth.privacy
from dpsynth import audit, certificate, runs
from dpsynth.certificate import Certificate, make_certificate, verify
from dpsynth.finetune import finetune_run
from dpsynth.runs import charges
from dpsynth.ledger import RUNS_LEDGER, group_privacy
from dpsynth.manifest import write_release
from dpsynth.privacy import make_mechanism, stored_run
from dpsynth.runs.run import Run
from dpsynth.settings import PrivacyError

COUNTED = RUN.model_copy(update={"label_prior": "private", "access_share": 0.05})


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The sensitivity holds and need not be computed; what groups are promised is what the lemma says."""

    def of_group(mechanism, units):
        epsilon, delta = group_privacy(mechanism.epsilon, mechanism.delta, units)
        return {"units": units, "epsilon": epsilon, "delta": delta}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.promises, "sensitivity_check", lambda *args: audit.Check("move", 1.0, 1.0, 1.0))
        patch.setattr(certificate.statement, "group_guarantee", of_group)
        yield


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The folder of a finished private run that estimated the shares of its labels."""
    folder = tmp_path_factory.mktemp("runs") / "dp"
    finetune_run(Run(COUNTED, folder), splits(), progress=False)
    return folder


@pytest.fixture
def copied(counted, tmp_path):
    """A copy of the run, with its ledger."""
    for name in (RUNS_LEDGER, f"{RUNS_LEDGER}.key"):
        shutil.copy(counted.parent / name, tmp_path / name)
    return shutil.copytree(counted, tmp_path / "dp")


def certified(folder):
    return json.loads((folder / "release" / "certificate.json").read_text())


def certificate_of(changes, told, num_units=40):
    """The certificate that this run would have with other settings; what does not follow from them is
    that of the run.
    """
    settings, composed = COUNTED.model_copy(update=changes), {**told["composed"], "epsilon": 0.0}
    other = make_certificate(
        make_mechanism(settings, num_units),
        settings,
        base=told["base_model"],
        files=told["files"],
        composed=composed,
    )
    kept = {name: told[name] for name in ("audit", "settings_hash", "code_hash", "versions")}
    return json.loads(json.dumps({**other, **kept}))


def put(folder, told):
    """Release another certificate, with a manifest that goes with it: whoever forges one can forge both."""
    write_release(Certificate(told), folder / "release", {})


def differing(told):
    """What a certificate says otherwise than the mechanism of this run."""
    mechanism = make_mechanism(COUNTED, 40)
    by_replacing = mechanism.epsilon_after(mechanism.steps, "epsilon_replace_one")
    true = {
        "epsilon": mechanism.epsilon,
        "epsilon_replace_one": by_replacing,
        "delta": mechanism.delta,
        "num_units": 40,
        "mechanism": mechanism.describe(),
        "accesses": certificate_of({}, told)["accesses"],
    }
    return audit.differing(told, true, 1e-6)


def audited(folder):
    return runs.audit_stage(Run(COUNTED, folder), splits(), None)


def test_what_ran_is_what_is_certified_recorded_and_charged(copied):
    found = audited(copied)
    assert found.replay.passed and not found.replay.notes and not certified(copied)["audit"]["refuted"], str(
        found
    )
    assert certificate_of({}, certified(copied)) == certified(copied)


@pytest.mark.parametrize(
    "changes, num_units, names",
    [
        ({"epsilon": 0.5}, 40, ("epsilon", "epsilon_replace_one", "mechanism.noise_multiplier")),
        ({"epochs": 0.2}, 40, ("mechanism.steps",)),
        ({}, 80, ("num_units",)),
        (
            {"batch_size": 4, "epochs": 0.2},
            40,
            ("mechanism.expected_batch_size", "mechanism.sampling_probability"),
        ),
        ({"access_share": 0.04}, 40, ("accesses.1.noise_multiplier",)),
    ],
)
def test_another_certificate_that_holds_by_itself_is_refuted(copied, changes, num_units, names):
    forged = certificate_of(changes, certified(copied), num_units)
    put(copied, forged)
    assert verify(copied / "release" / "certificate.json")["epsilon"] <= forged["epsilon"] + 1e-3
    found = audited(copied)
    broken, wrong = found.replay.broken, differing(forged)
    assert (
        found.verdict == "fails"
        and len(broken) == 1
        and broken[0].startswith("what the certificate says and")
    )
    assert set(names) <= {*wrong} and any(name in broken[0] for name in wrong)
    assert certified(copied)["audit"]["refuted"]
    with pytest.raises(PrivacyError, match="its own audit refutes it"):
        verify(copied / "release" / "certificate.json")


@pytest.mark.parametrize(
    "entry, value",
    [
        ("code_hash", "0" * 64),
        ("settings_hash", "0" * 64),
        ("canaries", 7),
        ("unit", "user"),
        ("base_model", {"hash": 64 * "a"}),
        ("versions", {"jax": "0.1"}),
    ],
)
def test_what_ran_cannot_be_told_otherwise(copied, entry, value):
    told = certified(copied)
    told[entry] = {**told[entry], **value} if isinstance(value, dict) else value
    put(copied, told)
    broken = audited(copied).replay.broken
    assert len(broken) == 1
    below = f".{next(iter(value))}" if isinstance(value, dict) else ""
    assert broken[0].startswith("what the certificate says") and broken[0].endswith(f": {entry}{below}")


def change_ledger(folder, change):
    with sqlite3.connect(folder.parent / RUNS_LEDGER) as db:
        for number, event in db.execute("SELECT id, event FROM releases").fetchall():
            db.execute("UPDATE releases SET event = ? WHERE id = ?", [change(event), number])


def test_a_ledger_that_knows_another_event_is_told(copied):
    noise = str(certified(copied)["mechanism"]["noise_multiplier"])
    change_ledger(
        copied,
        lambda event: event.replace(f'\\"noise_multiplier\\": {noise}', '\\"noise_multiplier\\": 30.0'),
    )
    found = audited(copied)
    assert (
        found.replay.broken == ["what the ledger charged this run for: training.0.noise_multiplier"]
        and found.verdict == "fails"
    )


def test_a_ledger_that_does_not_know_the_run_is_told(copied):
    with sqlite3.connect(copied.parent / RUNS_LEDGER) as db:
        db.execute("DELETE FROM releases")
    assert audited(copied).replay.broken == ["what the ledger charged this run for: counts, training"]


@pytest.mark.parametrize("away", [("", ".key"), ("",), (".key",)])
def test_a_ledger_that_is_not_at_hand_is_told(copied, away):
    for end in away:
        (copied.parent / f"{RUNS_LEDGER}{end}").unlink()
    found = audited(copied)
    assert charges(Run(COUNTED, copied)) is None and found.replay.passed
    for said in (str(found), found.summary, certified(copied)["audit"]["summary"], str(found.replay)):
        assert "the ledger is not at hand" in said


def test_a_run_by_other_code_is_held_to_what_it_recorded_and_to_its_target(copied, monkeypatch):
    monkeypatch.setattr(dpsynth.privacy.identity, "code_hash", lambda: "other")
    found = audited(copied)
    assert found.replay.passed and "other code or libraries made this run" in str(found)
    put(copied, certificate_of({"epsilon": 0.5}, certified(copied)))
    assert "what the certificate says" in audited(copied).replay.broken[0]
    state = stored_run(copied / "private").state(copied / "private")
    recorded = state.read_json("checks.json")
    state.write(
        "checks.json",
        json.dumps({**recorded, "mechanism": {**recorded["mechanism"], "noise_multiplier": 0.1}}),
    )
    with pytest.raises(PrivacyError, match="noise_multiplier 0.1 spends epsilon"):
        audited(copied)


def test_settings_that_were_changed_after_the_run_are_not_audited_as_its_own(copied):
    with pytest.raises(PrivacyError, match=r"other settings \(epsilon: 8.0, now 0.5\)"):
        runs.audit_stage(Run(COUNTED.model_copy(update={"epsilon": 0.5}), copied), splits(), None)


@pytest.mark.parametrize("name", ["identity.json", "counts.json", "checks.json"])
def test_an_audit_reads_only_what_the_run_sealed(copied, name):
    path = copied / "private" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PrivacyError, match=f"{name}: (it is )?damaged"):
        audited(copied)
