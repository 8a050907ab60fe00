"""What a certificate says, and that it can be recomputed."""

import html
import json
import math
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from parts import IMDB, RUN, certificate_of, splits
from dpsynth.certificate import Certificate, base_model, false_negatives, make_certificate, read_certificate, verify, write_certificate
from dpsynth.ledger import accesses_event, compose, group_privacy
from dpsynth.privacy import make_mechanism
from dpsynth.settings import PrivacyError, Settings


def test_certificate_verifies_and_a_false_one_does_not(tmp_path):
    certificate = certificate_of()
    assert certificate.get("base_model", {}).get("name") == "tiny"
    write_certificate(certificate, tmp_path)
    checked = verify(tmp_path / "certificate.json")
    assert checked["epsilon"] == pytest.approx(certificate["epsilon"], abs=1e-3) and checked["epsilon"] <= 10
    assert checked["epsilon_replace_one"] == pytest.approx(certificate["epsilon_replace_one"], abs=1e-3)
    assert checked["epsilon_replace_one"] > checked["epsilon"]
    training, *others = certificate["accesses"]
    cheaper, banded = {**training, "noise_multiplier": 0.4}, {**training, "bands": 73}
    audit = {"summary": "found", "epsilon_bound": 50.0, "delta": certificate["delta"]}
    for lie, words in (({"epsilon": 5.0}, "claims epsilon "), ({"delta": 1e-7}, "claims"), ({"delta": 1e-3}, "not below 1/n"),
                       ({"mechanism": {**certificate["mechanism"], "steps": 20}}, "not among"), ({"epsilon_replace_one": 10.0}, "replace_one"),
                       ({"num_units": 40000}, "not q times the number of units"), ({"composed": {**certificate["composed"], "epsilon": 9.0}}, "claims"),
                       ({"curve": [{"epsilon": 1.0, "delta": 1e-2}]}, "claims"), ({"groups": [{"units": 2, "epsilon": 1.0, "delta": 1e-2}]}, "2 units"),
                       ({"accesses": [cheaper, *others], "mechanism": {**certificate["mechanism"], "noise_multiplier": 0.4}}, "claims"),
                       ({"accesses": [{**training, "epsilon": 0.5}, *others]}, "claims epsilon 0.5 at delta 1.5e-05 for fine-tuning, but spends 9.99"),
                       ({"accesses": [{**training, "added": True}, *others]}, "only a count may be `added`"),
                       ({"accesses": [training, {**training, "noise_multiplier": 100.0, "steps": 10**6, "added": True, "epsilon": 0.01}, *others]}, "only a count"),
                       ({"adjacency": "adding or removing one unit"}, "do not go with whether the number of training units is public"),
                       ({"mechanism": {**certificate["mechanism"], "sampler": "cyclic poisson"}}, "1 band.s. do not go with cyclic poisson"),
                       ({"released": [*certificate["released"], "label_prior.json"]}, "shares of the labels are released, and not paid for"),
                       ({"base_model": {**certificate["base_model"], "contamination": "about 7 (noise of scale 1)"}}, "counted, and not paid for"),
                       ({"canaries": 10**6}, "more canaries than units"), ({"max_records_per_unit": 50}, "a unit of one row has several"),
                       ({"accesses": [banded, *others], "mechanism": {**certificate["mechanism"], "bands": 73}}, "do not go with poisson"),
                       ({"accesses": [banded, *others], "mechanism": {**certificate["mechanism"], "bands": 73, "sampler": "cyclic poisson"}},
                        "73 bands are too many"),
                       ({"audit": audit}, "its own audit refutes it: epsilon is at least 50"), ({"audit": {"summary": "", "refuted": True}}, "refutes it")):
        with pytest.raises(PrivacyError, match=words):
            verify({**certificate, **lie})
    for weaker in ({"epsilon_bound": 9.0}, {"delta": 1e-6}):
        verify({**certificate, "audit": {**audit, **weaker}})


def test_more_bands_than_updates_do_not_verify():
    certificate = certificate_of(IMDB.model_copy(update={"epochs": 0.1, "bands": "1"}))
    verify(certificate)
    training, *others = certificate["accesses"]
    with pytest.raises(PrivacyError, match="4 bands are too many"):
        verify({**certificate, "accesses": [{**training, "bands": 4}, *others],
                "mechanism": {**certificate["mechanism"], "bands": 4, "sampler": "cyclic poisson"}})


def test_a_count_that_is_said_to_be_cheaper_than_it_was_does_not_verify():
    certificate = full_certificate()
    verify(certificate)
    units, labels = (next(a for a in certificate["accesses"] if a["what"] == what) for what in ("number of training units", "label histogram"))
    assert units["added"] and units["epsilon"] == pytest.approx(1 / units["noise_multiplier"]) and not labels["added"]
    for access in (units, labels):
        others = [a for a in certificate["accesses"] if a is not access]
        with pytest.raises(PrivacyError, match=f"claims epsilon 0.001 at delta 0.0001 for {access['what']}, but spends 0.1"):
            verify({**certificate, "accesses": [*others, {**access, "epsilon": 0.001}]})


def test_a_number_of_units_that_nobody_paid_for_does_not_verify():
    certificate = full_certificate()
    count, others = next(a for a in certificate["accesses"] if a.get("added")), [a for a in certificate["accesses"] if not a.get("added")]
    for accesses in (others, [*others, {**count, "added": False}], [*others, count, count]):
        with pytest.raises(PrivacyError, match="the number of training units is not paid for"):
            verify({**certificate, "accesses": accesses})


def test_an_added_training_is_refused_by_the_schema(tmp_path):
    certificate = certificate_of()
    training, *others = certificate["accesses"]
    with pytest.raises(jsonschema.ValidationError):
        write_certificate(Certificate({**certificate, "accesses": [{**training, "added": True}, *others]}), tmp_path)


def test_the_number_that_is_stated_is_that_before_or_after_copies_are_dropped():
    for unit_count, which in (("public", "before"), ("private", "after")):
        settings = IMDB.model_copy(update={"duplicates": "drop", "unit_count": unit_count})
        assert certificate_of(settings)["duplicates"].endswith(f"the number of units is that {which}")


def test_what_composition_assumes_of_earlier_runs_is_said_where_there_are_any():
    said = [any("earlier ones" in line for line in c["accountant"]["assumptions"]) for c in (certificate_of(), full_certificate())]
    assert said == [False, True]


def test_certificates_that_were_kept_still_verify(repo):
    kept = sorted((repo / "dpsynth" / "assets" / "records").rglob("certificate.json"))
    assert kept and all(verify(path)["epsilon"] > 0 for path in kept)


def test_an_epsilon_that_promises_nothing_is_stated_and_verified(tmp_path):
    settings = EVERYTHING.model_copy(update={"epsilon": 1000.0, "bands": "1"})
    certificate = make_certificate(make_mechanism(settings, 1000), settings, base=base_model("tiny", "hash", "not checked"))
    write_certificate(certificate, tmp_path)
    text = (tmp_path / "certificate.md").read_text(encoding="utf-8")
    assert "at most 100.0% of the units" in text and "(no guarantee)" in text and "<svg" in certificate._repr_html_()
    assert 950 < verify(tmp_path / "certificate.json")["epsilon"] <= 1000
    assert all(math.isfinite(leaf) for leaf in leaves(dict(certificate)) if isinstance(leaf, float))
    steep = [{"epsilon": 1000.0, "delta": 0.25}]
    assert false_negatives(steep, [0.0, 1e-300, 0.5, 1.0]).tolist() == [0.75, 0.0, 0.0, 0.0]


def test_certificate_lists_every_access_and_what_is_not_covered():
    certificate = certificate_of(IMDB.model_copy(update={"monitor": "private"}))
    assert all(isinstance(a["epsilon"], float) or a["epsilon"] == "public" for a in certificate["accesses"])
    assert "operator" in certificate["monitor"] and any("test split" in item for item in certificate["not_covered"])


EVERYTHING = Settings(epsilon=8, delta=1e-4, batch_size=64, epochs=2, experiment="all", unit="user", unit_count="private", label_prior="private",
                      canaries=60, tuned_on="the demo", monitor="private")


def full_certificate():
    """A certificate in which every part says something."""
    composed = {"epsilon": 11.5, "delta": 1e-4, "releases": 3, "other_units": 4, "without_privacy": 2, "ledger": "the owner's ledger"}
    certificate = make_certificate(make_mechanism(EVERYTHING, 1000), EVERYTHING, base=base_model("vault_gemma_1b_en", "0123abcd", "nothing found"),
                                   composed=composed)
    certificate["audit"] = {"summary": "no attack succeeded"}
    return certificate


def leaves(part):
    if isinstance(part, dict):
        return [leaf for value in part.values() for leaf in leaves(value)]
    return [leaf for value in part for leaf in leaves(value)] if isinstance(part, list) else [part]


@pytest.mark.parametrize("form", ["markdown", "_repr_html_"])
def test_page_and_card_say_all_that_the_json_says(form):
    certificate = full_certificate()
    text = html.unescape(getattr(certificate, form)())
    numbers = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*(?:e-?\d+)?", text)]
    for name, part in certificate.items():
        if name not in ("format", "private"):
            said = [leaf for leaf in leaves(part) if not isinstance(leaf, bool)]
            missing = [leaf for leaf in said if not (leaf in text if isinstance(leaf, str) else any(math.isclose(leaf, n, rel_tol=5e-3) for n in numbers))]
            assert not missing, name
    assert text.count("added to the rest and not composed") == sum(a.get("added", False) for a in certificate["accesses"]) == 1


def test_releases_without_privacy_are_said_beside_the_composition(tmp_path):
    certificate = full_certificate()
    write_certificate(certificate, tmp_path)
    assert "over 3 run(s), and 4 that protect other units: what those cost is not in it, and 2 release(s) WITHOUT privacy: with those there is no guarantee, by the owner's ledger" in certificate.markdown()
    assert "cannot be recomputed from this certificate alone" in certificate["composed"]["basis"]
    assert any("other ledgers than the owner's ledger" in item for item in certificate["not_covered"])
    assert verify(tmp_path / "certificate.json")["epsilon"] <= certificate["epsilon"] == read_certificate(tmp_path / "certificate.json")["epsilon"]
    assert "WITHOUT" not in certificate_of().markdown()


def test_a_number_of_units_that_is_public_and_canaries_among_them_are_said():
    public, private = certificate_of(IMDB.model_copy(update={"canaries": 60})), full_certificate()
    assert "the number of units is public" in public["adjacency"] and "public" not in private["adjacency"]
    assert public["canaries"] == 60 and "(public), at most 1 row(s) of each; 60 of them are canaries" in public.markdown()
    assert "1,000 (estimated)" in private.markdown() and "OpenDP" in private["randomness"]["counts"] and "OpenDP" not in public["randomness"]["counts"]
    assert any("label_prior.json" in item for item in private["released"]) and not any("label_prior" in item for item in public["released"])


def test_what_is_known_of_a_base_model_belongs_to_its_exact_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = ["vault_gemma_1b_en", "kaggle://keras/vaultgemma/keras/vault_gemma_1b_en/2"]
    for name in (*known, "/models/vault_gemma_1b_en", "vault_gemma_tuned_on_ours", "my/gemma3_1b", "medgemma_4b"):
        entry = base_model(name, "hash", "not checked")
        assert (entry["own_guarantee"] is not None) == (name in known) and ("not known" in entry["trained_on"]) == (name not in known)
    (tmp_path / "vault_gemma_1b_en").mkdir()
    assert base_model("vault_gemma_1b_en", "hash", "not checked")["own_guarantee"] is None
    for name in ("gemma3_1b", "gemma3_instruct_27b_text", "gemma3_270m", "kaggle://keras/gemma3/keras/gemma3_1b"):
        assert "not published" in base_model(name, "hash", "not checked")["trained_on"]


def test_groups_are_bounded_by_their_own_accounting():
    certificate = certificate_of()
    for group in certificate["groups"]:
        assert group["delta"] == certificate["delta"]
        assert group["epsilon"] == compose([accesses_event(certificate["accesses"])], group["delta"], group=group["units"]) > certificate["epsilon"]
    assert group_privacy(certificate["epsilon"], certificate["delta"], 2)[1] > 0.1 > certificate["groups"][0]["delta"]
    banded = certificate_of(IMDB.model_copy(update={"bands": "4"}))
    assert (banded["groups"][0]["epsilon"], banded["groups"][0]["delta"]) == group_privacy(banded["epsilon"], banded["delta"], 2)
    verify(banded)


def test_certificate_without_a_part_is_refused(tmp_path):
    whole = certificate_of()
    for part in whole:
        broken = Certificate(whole)
        del broken[part]
        with pytest.raises(jsonschema.ValidationError, match=part):
            write_certificate(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_verification_is_a_short_script_on_dp_accounting_alone(tmp_path, repo):
    source = (repo / "dpsynth" / "verify.py").read_text(encoding="utf-8")
    code = [line for line in source.splitlines() if line.strip() and not line.startswith(("#", "__all__"))]  # the last is the exporter's
    assert len(code) < 45 and "dpsynth" not in "".join(line for line in code if "import" in line)
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


def test_what_cannot_be_stated_is_found_before_the_training_is_charged(tmp_path, monkeypatch):
    import dpsynth.finetune
    from dpsynth.ledger import RUNS_LEDGER, Ledger

    def fails(*args, **options):
        raise OverflowError("math range error")

    with monkeypatch.context() as broken:
        broken.setattr(Certificate, "markdown", fails)
        broken.setattr(dpsynth.finetune, "_train_into", fails)
        with pytest.raises(OverflowError):
            dpsynth.finetune.finetune_run(RUN, splits(), tmp_path / "dp", progress=False)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    (reserved,) = ledger.releases(ledger.datasets()[0])["state"]
    assert reserved == "abandoned" and not ledger.charged(ledger.datasets()[0])
    loose = RUN.model_copy(update={"epsilon": 1000.0})
    dpsynth.finetune.finetune_run(loose, splits(), tmp_path / "loose", progress=False)
    assert 900 < verify(tmp_path / "loose" / "release" / "certificate.json")["epsilon"] <= 1000


def test_run_releases_an_adapter_and_a_certificate_that_verifies(run):
    from dpsynth.certificate import verify
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert verify(certificate)["epsilon"] <= 8 and certificate["num_units"] == 40 - 0
    assert {p.name for p in (run / "release").iterdir()} == {"adapter.npz", "certificate.json", "certificate.md"}


def test_how_many_units_a_large_delta_could_publish_is_told_wherever_the_claim_is(tmp_path, dpsynth):
    told = "elta is 0.25/n: so many units could be expected to be published outright"
    for delta, said in ((1e-5, False), (1e-4, False), (2.5e-4, True)):
        certificate = certificate_of(Settings(epsilon=8, delta=delta, batch_size=64, epochs=1), 1000)
        write_certificate(certificate, tmp_path)
        pages = (certificate.markdown().split("|")[0], certificate._repr_html_().split("<table>")[0], " ".join(certificate["not_covered"]),
                 dpsynth("verify", tmp_path / "certificate.json").out)
        assert {told in page for page in pages} == {said}
