"""Line 13: what the base model may have read of the private rows."""

import json
import re

import numpy as np
import pandas as pd

import dpsynth.finetune
from parts import RUN, splits
from dpsynth.data import from_frame
from dpsynth.finetune import base_hash, contamination_note, finetune_run
from dpsynth.models import load_model, preset_hash


def test_overlap_with_a_corpus_is_estimated_and_stated(tmp_path):
    long = "one two three four five six seven eight nine ten " * 6
    data = from_frame(pd.DataFrame({"text": [f"{long} {i}" if i < 30 else f"row {i}" for i in range(40)], "label": [0, 1] * 20}), RUN,
                      test=pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "something else")), encoding="utf-8")
    settings = RUN.model_copy(update={"contamination_corpus": str(corpus), "access_share": 0.2})
    finetune_run(settings, data, tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    count = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())["overlaps"][0]
    assert abs(count - 30) < 20 and f"about {max(0, count)} units share 50 words with corpus.jsonl" in certificate["base_model"]["contamination"]
    assert "units that overlap the corpus" in [a["what"] for a in certificate["accesses"]]


def test_rows_that_the_base_model_finds_likely_are_estimated_and_stated(tmp_path, monkeypatch):
    reference = tmp_path / "fresh.jsonl"
    reference.write_text("".join(json.dumps({"text": f"zxqj {i}"}) + "\n" for i in range(60)), encoding="utf-8")
    monkeypatch.setattr(dpsynth.finetune, "row_losses", lambda model, records, *others: np.array([float(t.startswith("zxqj")) for t in records.texts]))
    settings = RUN.model_copy(update={"contamination_reference": str(reference), "access_share": 0.2})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    likely, other = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())["likelier"]
    assert abs(likely - 40) < 20 and abs(other) < 20
    assert "than the median text of fresh.jsonl (one-sided p = " in certificate["base_model"]["contamination"]
    assert "units the base model finds likely" in [a["what"] for a in certificate["accesses"]]


def test_a_model_without_files_here_is_known_by_its_arrays(micro, tmp_path, monkeypatch):
    before = base_hash(micro)
    weight = micro.causal_lm.weights[0]
    kept = weight.value
    weight.assign(kept + 1)
    changed = base_hash(micro)
    weight.assign(kept)
    assert len(before) == 64 and before != changed and base_hash(micro) == before
    assert base_hash(load_model("tiny")) == preset_hash("tiny")
    monkeypatch.setattr(dpsynth.finetune, "preset_hash", lambda name: "")  # as if it had been fetched
    finetune_run(RUN, splits(), tmp_path / "dp", progress=False)
    digest = base_hash(load_model("tiny"))
    assert json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())["base_model"]["hash"] == digest
    assert json.loads((tmp_path / "dp" / "private" / "identity.json").read_text())["base_model"] == digest


def test_likelihood_under_the_base_model_proves_nothing_for_equal_shares():
    settings = RUN.model_copy(update={"contamination_reference": "demo"})
    even, much = (contamination_note(settings, {"likelier": counts}) for counts in ([100, 100], [180, 20]))
    assert even.startswith("50% of about 200 units") and "p = 0.5" in even and float(re.search(r"p = ([\d.e-]+)", much)[1]) < 1e-6
