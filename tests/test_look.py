"""What is told before money is spent: public numbers, what they mean, and only who asks sees what was counted
in the rows."""

import math
import re

import pandas as pd
import pytest
import yaml

from parts import MICRO, RUN, mechanism, splits
from dpsynth import data, runs
from dpsynth.runs import cost as costs
from dpsynth.certificate import read_certificate
from dpsynth.finetune import finetune_run, units_per_call
from dpsynth.runs import Account
from dpsynth.ledger import Ledger, was_looked_at
from dpsynth.runs import (
    advice,
    attacker_sentence,
    changed_mechanism,
    found_at_most,
    noise_to_signal,
    plan_rows,
    planned,
)
from dpsynth.runs.run import Run
from dpsynth.settings import Settings, SettingsError

SHORT = {
    "model": MICRO,
    "tuning": "lora",
    "lora_rank": 8,
    "lora_targets": "value",
    "sequence_length": 32,
    "batch_size": 8,
    "microbatch_size": 8,
    "epochs": 0.4,
    "epsilon": 8,
    "prompt": "[{label}]:",
    "delta": 1e-3,
    "num_samples": 16,
    "num_mauve_samples": 16,
    "test_data": "test.csv",
}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Two configurations of the same experiment on rows of the same number that have nothing in common,
    in two folders.
    """
    monkeypatch.chdir(tmp_path)
    rows = {
        "one": [(f"a short one {i}", "positive") for i in range(60)],
        "two": [
            ("the very same long text, again and again and again, " * 9, "negative" if i else "positive")
            for i in range(60)
        ],
    }
    test = pd.DataFrame(
        {"text": [f"a test row {i}" for i in range(12)], "label": ["positive", "negative"] * 6}
    )
    test.to_csv("test.csv", index=False)
    for name, texts in rows.items():
        (tmp_path / name).mkdir()
        pd.DataFrame(texts, columns=["text", "label"]).to_csv(tmp_path / name / "rows.csv", index=False)
        (tmp_path / name / "dp.yaml").write_text(
            yaml.safe_dump(
                {
                    **SHORT,
                    "data": str(tmp_path / name / "rows.csv"),
                    "ledger": str(tmp_path / f"{name}.sqlite"),
                }
            )
        )
    return [tmp_path / name / "dp.yaml" for name in rows]


def test_a_check_tells_nothing_that_was_counted_in_the_rows_but_their_number(configs, dpsynth, tmp_path):
    first, second = (dpsynth("check", config, "--no-time") for config in configs)
    assert first.code == 0 and first.err == "" and first.out == second.out
    assert "60 to train on, 12 to test on" in first.out and "at most" in first.out and "instead" in first.out
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_look_is_shown_on_demand_and_noted_first(configs, dpsynth, refused, tmp_path):
    out = dpsynth("check", configs[1], "--no-time", "--look").out
    assert "58 exact copies" in out and "negative 98.3%" in out and "fewer than 20 rows: positive (1)" in out
    assert "48% of the samples of another label" in out and "100% are cut" in out and "single bytes" in out
    assert (
        was_looked_at(Ledger(tmp_path / "two.sqlite"), "rows.csv") and not (tmp_path / "one.sqlite").exists()
    )
    told = refused("check", configs[0], "--no-time", "--look", "--set", "unit_count=private")
    assert "unit_count" in told and not (tmp_path / "one.sqlite").exists()
    (tmp_path / "one.sqlite").mkdir()  # where no ledger can be made there is no look
    assert "copies" not in dpsynth("check", configs[0], "--no-time", "--look").out


def test_certificates_of_data_that_was_looked_at_say_so(tmp_path):
    for number, looked in enumerate((False, True)):
        folder = tmp_path / str(number) / "dp"
        if looked:
            Account(Run(RUN, folder), splits().train, "").note_look()
        finetune_run(Run(RUN.model_copy(update={"validation_size": 0}), folder), splits(), progress=False)
        certificate = read_certificate(folder / "release" / "certificate.json")
        assert ("after a look at the rows" in certificate["hyper_parameters"]) == looked
        assert ("after a look at the rows" in certificate.markdown()) == looked


def test_what_an_attacker_finds_is_what_the_certificate_will_say(run):
    certificate = read_certificate(run / "release" / "certificate.json")
    made = runs.promised_mechanism(Run(RUN, run), splits())
    (shown,) = re.findall(r"finds at most ([\d.]+)% of the units", certificate.markdown())
    assert f"{found_at_most(made):.1%}" == f"{shown}%" and f"{shown}%" in attacker_sentence(made).replace(
        "100.0%", f"{shown}%"
    )


def test_advice_names_what_would_change():
    made = mechanism(target_epsilon=8.0, noise_multiplier=1.0)
    texts = advice(made)
    assert "at epsilon 4" in texts[0] and "batch_size of 100" in texts[1] and "400 updates" in texts[1]
    assert (
        noise_to_signal(changed_mechanism(made, batch_size=200)) < noise_to_signal(changed_mechanism(made))
        and changed_mechanism(made, epsilon=2).noise_multiplier > changed_mechanism(made).noise_multiplier
    )
    assert found_at_most(changed_mechanism(made, epsilon=2)) < found_at_most(
        changed_mechanism(made, epsilon=4)
    )


def test_a_plan_for_a_number_reads_no_file(monkeypatch, dpsynth, refused, configs):
    monkeypatch.setattr(data, "load", lambda settings: pytest.fail("rows are read"))
    monkeypatch.setattr("dpsynth.runs.plan.EPSILONS", (2.0,))
    out = dpsynth("plan", "--units", 4000, "--no-time", "--set", "epsilon=2").out
    rows = [line.split() for line in out.splitlines()[2:] if line.strip().startswith("2 ")]
    assert len(rows) == 6 and {row[2] for row in rows} == {"31", "125", "500"} and "finds at most" in out
    assert (
        "number of units" not in out
        and dpsynth("plan", "nowhere.csv", "--units", 4000, "--no-time", "--set", "epsilon=2").out == out
    )
    assert "--units" in refused("plan", configs[0], "--set", "unit_count=private")


def test_a_plan_reads_the_number_of_units_and_nothing_else(configs, dpsynth, monkeypatch):
    monkeypatch.setattr("dpsynth.runs.plan.EPSILONS", (8.0,))
    first, second = (dpsynth("plan", config, "--no-time").out for config in configs)
    assert first == second and "finds at most" in first
    with pytest.raises(SettingsError, match="private fine-tuning"):
        planned(Settings(generator="prompt"), 100)
    minutes = [row[-1] for row in plan_rows(planned(Settings(epsilon=8), 200), lambda batch: 0.6 * batch)]
    assert minutes and all(float(m.replace(",", "")) > 0 for m in minutes)


def test_an_estimate_is_measured_and_reads_no_training_row(monkeypatch):
    found = runs.survey(
        RUN.model_copy(update={"num_samples": 40, "num_mauve_samples": 40}),
        load=lambda settings: splits(settings=settings),
    )
    counted, read = costs.token_lengths, []
    monkeypatch.setattr(
        costs,
        "token_lengths",
        lambda survey, records, **more: read.append(records) or counted(survey, records, **more),
    )
    cost = costs.estimate(found)
    assert read and all(records is not found.splits.train for records in read)
    assert (
        cost["seconds"] == pytest.approx(cost["training"] + cost["sampling"])
        and cost["per_update"] > 0
        and cost["memory"] > 2**29
    )
    asked = []
    monkeypatch.setattr(
        costs,
        "_ask",
        lambda question: (
            asked.append(question)
            or {
                "load": 1.0,
                "microbatch": {"32": 0.5},
                "update": 0.25,
                "rounds": [0.125] * 9,
                "compiling": 3.0,
                "compiling_rounds": 0.0,
                "memory": 2**30,
                "device_memory": 0,
            }
        ),
    )
    cost = costs.estimate(found)
    size = units_per_call(found.settings)
    full = costs.expected_microbatches(8, size)
    looks = 2 * math.ceil(min(found.settings.validation_size, len(found.splits.test)) / size)
    assert cost["per_update"] == pytest.approx(0.25 + 0.5 * full) and cost["training"] == pytest.approx(
        1 + 3 + looks * 0.5 / 3 + found.mechanism.steps * cost["per_update"]
    )
    costs.measure(
        found.settings.model_copy(update={"epsilon": 3.0, "seed": 7, "epochs": 2.0}), 1, [32], [(32, 32)]
    )
    costs.measure(found.settings, 1, [32], [(32, 32)])
    assert asked[-1] == asked[-2]  # what makes no difference is not measured again


def test_a_trial_that_fails_is_a_line_of_the_check():
    with pytest.raises(SettingsError, match="no such folder"):
        costs.measure(RUN.model_copy(update={"model": "./no/such/preset"}), 1, [32], [])


def test_a_block_is_played_as_it_is_decoded(micro):
    """Number of rounds, for rows that all run to the limit."""
    from dpsynth.sampling import Choice, Decoder

    settings = Settings(
        num_samples=20,
        num_mauve_samples=2,
        sequence_length=40,
        sample_batch_size=8,
        label_column="",
        prompt="x",
    )
    prompt = len(micro.prompt_ids("x"))
    decoder, seen = Decoder(micro, ["x"], Choice(), seed=0, max_length=40, slots=8, rows=20), []
    decode_round, micro_stops = decoder.decode_round, micro.stop_ids
    decoder.decode_round = lambda *arguments: seen.append(arguments[-1]) or decode_round(*arguments)
    lengths = [prompt + sample.tokens for sample in decoder.block(0, [0] * 20)]
    played = costs.rounds_needed(settings, lengths, prompt)
    assert micro_stops and sum(played.values()) == pytest.approx(len(seen), abs=2)
