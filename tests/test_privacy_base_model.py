"""Line 13: what the base model may have read of the private rows."""

import json
import re

import numpy as np
import pandas as pd

import dpsynth.finetune
from parts import MICRO, RUN, splits
from dpsynth.certificate import contamination_text
from dpsynth.data import from_frame
from dpsynth.demo import reviews
from dpsynth.finetune import base_hash, contamination_found, finetune_run, likelier_units
from dpsynth.formats import make_format
from dpsynth.models import LanguageModel, load_model, preset_hash
from dpsynth.privacy import LIKELIER, count_accesses
from dpsynth.runs.run import Run


def test_overlap_with_a_corpus_is_estimated_and_stated(tmp_path):
    long = "one two three four five six seven eight nine ten " * 6
    data = from_frame(
        pd.DataFrame(
            {"text": [f"{long} {i}" if i < 30 else f"row {i}" for i in range(40)], "label": [0, 1] * 20}
        ),
        RUN,
        test=pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}),
    )
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (long, "something else")), encoding="utf-8"
    )
    settings = RUN.model_copy(update={"contamination_corpus": str(corpus), "access_share": 0.2})
    finetune_run(Run(settings, tmp_path / "dp"), data, progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    count, others = (
        max(0, n) for n in json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())["overlaps"]
    )
    assert abs(count - 30) < 20 and others < 20
    told = (
        f"about {count} of about {count + others} units of 50 words or more share a run of 50 with "
        f"corpus.jsonl"
    )
    assert told in certificate["base_model"]["contamination"]
    assert "units that overlap the corpus" in [a["what"] for a in certificate["accesses"]]


def shuffled(text, seed):
    return " ".join(np.random.default_rng(seed).permutation(text.split()))


def test_rows_that_the_base_model_finds_likely_are_estimated_and_stated(tmp_path):
    sense = [{"text": row["text"], "label": i % 2} for i, row in enumerate(reviews(80, seed=3))]
    nonsense = [{**row, "text": shuffled(row["text"], i)} for i, row in enumerate(sense)]
    reference = tmp_path / "fresh.jsonl"
    reference.write_text("".join(json.dumps(row) + "\n" for row in nonsense[40:]), encoding="utf-8")
    settings = RUN.model_copy(update={"contamination_reference": str(reference), "access_share": 0.2})
    data = from_frame(pd.DataFrame(sense[:40]), settings, test=pd.DataFrame(sense[40:50]))
    finetune_run(Run(settings, tmp_path / "dp"), data, progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    likely, other = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())["likelier"]
    exact = likelier_units(settings, data.train, load_model(MICRO, seed=settings.seed), make_format(settings))
    assert abs(likely - exact[0]) < 12 and abs(other - exact[1]) < 12  # noise of scale 0.6
    assert " texts of fresh.jsonl (one-sided p = " in certificate["base_model"]["contamination"]
    assert "units the base model finds likely" in [a["what"] for a in certificate["accesses"]]
    reference.write_text("".join(json.dumps(row) + "\n" for row in sense[40:]), encoding="utf-8")
    model = load_model("tiny")
    assert likelier_units(settings, data.train, model, make_format(settings))[0] in range(
        10, 31
    )  # rows like the reference: about half
    unlikely = from_frame(pd.DataFrame(nonsense[:40]), settings, test=pd.DataFrame(sense[40:50])).train
    assert likelier_units(settings, unlikely, model, make_format(settings)) == [0, 40]


def test_a_model_without_files_here_is_known_by_its_arrays(micro, tmp_path, monkeypatch):
    fetched = LanguageModel(micro.causal_lm, "kaggle://fetched")
    before = base_hash(fetched)
    weight = fetched.causal_lm.weights[0]
    kept = weight.value
    weight.assign(kept + 1)
    changed = base_hash(fetched)
    weight.assign(kept)
    assert len(before) == 64 and before != changed and base_hash(fetched) == before
    assert base_hash(load_model("tiny")) == preset_hash("tiny")
    monkeypatch.setattr(dpsynth.finetune.prepare, "preset_hash", lambda name: "")  # as if it had been fetched
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    digest = base_hash(load_model(MICRO))
    assert (
        json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())["base_model"]["hash"]
        == digest
    )
    assert json.loads((tmp_path / "dp" / "private" / "identity.json").read_text())["base_model"] == digest


def test_likelihood_under_the_base_model_proves_nothing_for_equal_shares():
    settings = RUN.model_copy(update={"contamination_reference": "demo"})
    even, much = (
        contamination_text(
            contamination_found(settings, {"likelier": counts}),
            {LIKELIER: count_accesses(settings)["likelier"].noise_multiplier},
        )
        for counts in ([100, 100], [180, 20])
    )
    assert (
        even.startswith("about 100 of about 200 units (50%)")
        and "p = 0.5" in even
        and float(re.search(r"p = ([\d.e-]+)", much)[1]) < 1e-6
    )
