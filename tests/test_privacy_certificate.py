"""What a certificate says, and that it can be recomputed."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from parts import IMDB, certificate_of
from dpsynth.certificate import Certificate, false_negatives, verify, write_certificate
from dpsynth.ledger import group_privacy
from dpsynth.settings import PrivacyError


def test_certificate_verifies_and_a_false_one_does_not(tmp_path):
    certificate = certificate_of()
    write_certificate(certificate, tmp_path)
    checked = verify(tmp_path / "certificate.json")
    assert checked["epsilon"] == pytest.approx(certificate["epsilon"], abs=1e-3) and checked["epsilon"] <= 10
    assert checked["epsilon_replace_one"] == pytest.approx(certificate["epsilon_replace_one"], abs=1e-3)
    assert checked["epsilon_replace_one"] > checked["epsilon"]
    training = certificate["accesses"][0]
    cheaper = {**training, "noise_multiplier": 0.4}
    for lie, words in (({"epsilon": 5.0}, "claims epsilon "), ({"delta": 1e-7}, "claims"), ({"delta": 1e-3}, "not below 1/n"),
                       ({"mechanism": {**certificate["mechanism"], "steps": 20}}, "not among"), ({"epsilon_replace_one": 10.0}, "replace_one"),
                       ({"num_units": 40000}, "over the number of units"), ({"composed": {**certificate["composed"], "epsilon": 9.0}}, "claims"),
                       ({"curve": [{"epsilon": 1.0, "delta": 1e-2}]}, "claims"), ({"groups": [{"units": 2, "epsilon": 1.0, "delta": 1e-2}]}, "2 units"),
                       ({"accesses": [cheaper], "mechanism": {**certificate["mechanism"], "noise_multiplier": 0.4}}, "claims")):
        with pytest.raises(PrivacyError, match=words):
            verify({**certificate, **lie})


def test_certificate_lists_every_access_and_what_is_not_covered():
    certificate = certificate_of(IMDB.model_copy(update={"monitor": "private"}))
    assert all(isinstance(a["epsilon"], float) or a["epsilon"] == "public" for a in certificate["accesses"])
    assert "operator" in certificate["monitor"] and any("test split" in item for item in certificate["not_covered"])


def test_certificate_without_a_part_is_refused(tmp_path):
    import jsonschema
    whole = certificate_of()
    for part in whole:
        broken = Certificate(whole)
        del broken[part]
        with pytest.raises(jsonschema.ValidationError, match=part):
            write_certificate(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verification_is_a_short_script_on_dp_accounting_alone(tmp_path, repo):
    source = (repo / "dpsynth" / "verify.py").read_text(encoding="utf-8")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) < 40 and "dpsynth" not in "".join(line for line in code if "import" in line)
    (tmp_path / "verify.py").write_text(source)
    write_certificate(certificate_of(), tmp_path)
    done = subprocess.run([sys.executable, "-I", "verify.py", "certificate.json"], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout)["epsilon"] == pytest.approx(10, abs=0.02), done.stderr


def test_the_curve_bounds_what_an_attacker_can_reach():
    curve = certificate_of()["curve"]
    assert [p["delta"] for p in curve] == sorted((p["delta"] for p in curve), reverse=True)
    assert [p["epsilon"] for p in curve] == sorted(p["epsilon"] for p in curve)
    rates = np.linspace(0, 1, 21)
    missed = false_negatives(curve, rates)
    assert (missed <= 1 - rates + 1e-12).all() and (np.diff(missed) <= 1e-12).all()
    assert group_privacy(2.0, 1e-6, 1) == (2.0, 1e-6) and group_privacy(0.5, 1e-6, 2)[1] == pytest.approx(1e-6 * (1 + math.exp(0.5)))


def test_run_releases_an_adapter_and_a_certificate_that_verifies(run):
    from dpsynth.certificate import verify
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert verify(certificate)["epsilon"] <= 8 and certificate["num_units"] == 40 - 0
    assert {p.name for p in (run / "release").iterdir()} == {"adapter.npz", "certificate.json", "certificate.md"}
