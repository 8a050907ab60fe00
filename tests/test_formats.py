"""Formats: what a row becomes as text and what text becomes as a row, made in one place and asked by
everyone."""

import pathlib
import re
import types

import pandas as pd
import pytest

from dpsynth.data import Records
from dpsynth.finetune import tokenize
from dpsynth.formats import Rejected, TextFormat, make_format, rows_of
from dpsynth.sampling import Sample, to_row
from dpsynth.settings import Settings, SettingsError

LABELLED = make_format(Settings(prompt="[film][{label}]:", label_names="bad,good"))
PLAIN = make_format(Settings(prompt="A review:", label_column=""))


@pytest.mark.parametrize(
    "fmt, row",
    [
        (LABELLED, {"label": "good", "text": "A warm film."}),
        (LABELLED, {"label": "bad", "text": "It spells {label} and <eos>, é, 漢 and\n\ntwo lines"}),
        (PLAIN, {"text": "Dull."}),
    ],
)
def test_a_row_is_what_its_prompt_and_its_response_say(fmt, row):
    prompt, response = fmt.encode(row)
    assert {**fmt.given[fmt.prompts.index(prompt)], **fmt.decode(response)} == row
    assert fmt.grammar() is None


def test_the_prompt_follows_from_the_label_and_nothing_else():
    assert LABELLED.prompts == ["[film][bad]:", "[film][good]:"] and PLAIN.prompts == ["A review:"]
    assert {LABELLED.encode({"label": "good", "text": text})[0] for text in "abc"} == {"[film][good]:"}
    with pytest.raises(SettingsError, match="placeholder"):
        TextFormat("no label", ("bad", "good"))


def test_records_give_rows_as_they_are_released():
    labelled = pd.DataFrame({"text": ["a", "b"], "label": [1, 0], "unit": ["u", "v"]})
    assert list(rows_of(Records(labelled, "rows", ("bad", "good"), {}))) == [
        {"label": "good", "text": "a"},
        {"label": "bad", "text": "b"},
    ]
    assert list(rows_of(Records(labelled[["text"]], "rows", ("",), {}))) == [{"text": "a"}, {"text": "b"}]


class Spelt:
    """Another format: the first word is the prompt, the rest with a mark is the response."""

    prompts, given = ["one", "two"], [{"first": "one"}, {"first": "two"}]

    def encode(self, row):
        first, _, rest = row["text"].partition(" ")
        return first, f"={rest}"

    def decode(self, text):
        return {"rest": text[1:]} if text.startswith("=") else Rejected("no mark")


def test_training_and_sampling_ask_the_format_alone(tmp_path):
    """Neither composes a prompt or reads a label by itself: another format gives other tokens and rows."""
    letters = lambda text: [ord(character) for character in text]
    model = types.SimpleNamespace(
        prompt_ids=letters, response_ids=lambda texts: [[*letters(text), 0] for text in texts]
    )
    records = Records(pd.DataFrame({"text": ["two ab", "one c", "two "]}), "rows", ("",), {})
    store = tokenize(model, records, Spelt(), tmp_path / "tokens", sequence_length=6, batch=2)
    rows = [(ids.tolist(), prompt) for ids, prompt in map(store.row, range(3))]
    assert rows == [(letters("two=ab"), 3), ([*letters("one=c"), 0], 3), ([*letters("two="), 0], 3)]
    samples = [Sample(0, 1, "=ab", True, 3), Sample(1, 0, "c", True, 1)]
    assert [to_row(sample, Spelt()) for sample in samples] == [
        {"index": 0, "first": "two", "rest": "ab"},
        {"index": 1, "first": "one", "reason": "no mark"},
    ]


def test_one_place_makes_the_format(repo):
    for path in sorted((repo / "dpsynth").rglob("*.py")):
        made = re.search(
            r"\bTextFormat\(|settings\.prompt\b.*(replace|format)", path.read_text(encoding="utf-8")
        )
        assert not made or path.relative_to(repo / "dpsynth") == pathlib.Path("formats/making.py"), path
