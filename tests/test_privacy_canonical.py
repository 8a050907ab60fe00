"""Line 16: rows and persons are recognised in a canonical form, in the ledger and in units; an older ledger
keeps what it knows."""

import gzip
import json
import pathlib
import random
import sqlite3
import unicodedata

import pandas as pd
import pytest

from dpsynth.canonical import canonical, canonical_number
from dpsynth.certificate import NOT_COVERED
from dpsynth.data import from_frame, load
from dpsynth.finetune import rows_of_units
from dpsynth.ledger import Ledger
from dpsynth.runs import load_stage
from dpsynth.runs.run import Run
from dpsynth.settings import BudgetError, DataError, Settings

DELTA = 1e-5
TEST = pd.DataFrame({"text": ["t"], "label": [1], "user": ["z"], "id": ["z"]})


def pure(epsilon):
    return {"kind": "epsilon_delta", "epsilon": epsilon, "delta": 0.0}


def records(texts, settings=Settings(), **columns):
    return from_frame(
        pd.DataFrame({"text": texts, "label": 1, **columns}), settings, test=TEST, name="visits"
    ).train


def register(ledger, rows):
    return ledger.register(
        rows.name, rows.ledger_names(), DELTA, rows.public_units, "row", rows.earlier_names()
    )


def spend(ledger, dataset, epsilon, run_id):
    ledger.plan(run_id, dataset, pure(epsilon))
    ledger.start(run_id)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


# the form


@pytest.mark.parametrize(
    "spellings",
    [
        ("1", "1.0", "01.0", "+1", "1e0", "10E-1", " 1 ", "1.", "١", "１"),
        ("-1", "-1.0", "\u22121", "-01"),
        ("0", "-0", "0.00", "0e7"),
        ("0.5", ".5", "5e-1"),
        ("100000", "1e5", "1E+5"),
        ("Ann", "ann ", "\tANN", "Ａｎｎ", "ann\ufe0f", "a\u200bnn", "ann."),
        ("José", "Jose\u0301", "JOSÉ"),
        ("!!!", " !!! "),
        ("it was fine", "It was fine.", "It  was\r\nfine!", "\u201cIt was fine\u201d"),
        ("straße", "STRASSE"),
        ("1" + 5000 * "0", "1" + 5000 * "0" + ".0"),
    ],
)
def test_one_value_has_one_form_however_it_is_written(spellings):
    assert len({canonical(text) for text in spellings}) == 1


def test_different_values_have_different_forms():
    values = [
        "1",
        "-1",
        "1.5",
        "15.1",
        "2",
        "nan",
        "inf",
        "1e400",
        "1e401",
        "9007199254740993",
        "9007199254740992",
        "ann",
        "anna",
        "नमस्ते",
        "नमस्त",
        "!",
        "!!",
        "a",
        "å",
    ]
    assert len({canonical(value) for value in values}) == len(values)
    assert [canonical_number(text) for text in ("", ".", "e5", "1,5", "0x1", "nan", "1e9999999999")] == 7 * [
        None
    ]


def test_the_form_of_a_form_is_itself():
    chance, pool = (
        random.Random(3),
        [
            *map(chr, range(32, 700)),
            *"\u0300\u0301\u0307\u0345\u1e9e\ufb01\u2212\u0660\ufe0f\u200d\u3164\U0001f600\uac00\u1100\u1161",
            *"0123456789.eE+-" * 20,
        ],
    )
    for _ in range(5000):
        text = "".join(chance.choices(pool, k=chance.randrange(9)))
        form = canonical(text)
        assert (
            canonical(form)
            == form
            == canonical(unicodedata.normalize("NFD", text))
            == canonical(f" {text}\n")
        ), repr(text)


# rows


TEXTS = ["It was fine, Zoë said.", "Two goals\nafter rain", "12", "?!", "Nothing else"]
REWRITTEN = {
    "blanks": [f"  {text} " for text in TEXTS],
    "case": [text.upper() for text in TEXTS],
    "line ends": [text.replace("\n", "\r\n") for text in TEXTS],
    "decomposed": [unicodedata.normalize("NFD", text) for text in TEXTS],
    "a full stop less": [text.rstrip(".") for text in TEXTS],
    "a number in another type": [
        "It was fine, Zoë said.",
        "Two goals\nafter rain",
        "12.0",
        "?!",
        "Nothing else",
    ],
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_rewritten_rows_have_spent_what_they_had(ledger, how):
    before = register(ledger, records(TEXTS))
    ledger.set_cap(before, 5.0)
    spend(ledger, before, 4.0, "a")
    after = register(ledger, records(REWRITTEN[how]))
    assert after == before
    with pytest.raises(BudgetError, match="over the cap 5"):
        ledger.plan("b", after, pure(4.0))


def test_a_row_with_a_word_changed_is_known_by_its_id_only(ledger):
    edited = [text + " indeed" for text in TEXTS]
    spend(ledger, register(ledger, records(TEXTS)), 4.0, "a")
    assert ledger.spent(register(ledger, records(edited))) == 0
    assert any("a word changed" in line for line in NOT_COVERED)
    known = Settings(id_column="id")
    first = register(ledger, records(TEXTS, known, id=[1, 2, 3, 4, 5]))
    assert ledger.spent(first) == pytest.approx(4.0, abs=5e-3)  # asking for the ids makes no row new
    spend(ledger, first, 1.0, "b")
    assert ledger.spent(
        register(ledger, records(edited, known, id=["1.0", "2", "3", "4", "5"]))
    ) == pytest.approx(1.0, abs=5e-3)
    assert ledger.spent(register(ledger, records(edited, known, id=[6, 7, 8, 9, 10]))) == 0


def test_ids_are_read_and_checked_like_names_of_units(tmp_path):
    rows = pd.DataFrame({"text": ["a", "b", "c"], "label": 1, "id": [" K-1", "k2", "3.0"]})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.drop(columns="id").to_csv(tmp_path / "test.csv", index=False)
    assert load(
        Settings(data=str(tmp_path / "rows.csv"), test_data=str(tmp_path / "test.csv"), id_column="id")
    ).train.frame["id"].tolist() == ["k1", "k2", "3"]
    with pytest.raises(DataError, match="no column 'nowhere'.*set id_column"):
        from_frame(rows, Settings(id_column="nowhere"), test=TEST)
    with pytest.raises(DataError, match="row 1 .*column id: missing"):
        from_frame(rows.assign(id=["x", None, "y"]), Settings(id_column="id"), test=TEST)


# persons


PEOPLE = ["ann", "ann ", "Ann", "1", "1.0", " 01", "bob", "-1"]
BY_USER = Settings(unit="user", delta=1e-3)


def test_names_that_fall_together_are_one_person_with_one_gradient():
    rows = records([f"visit {i}" for i in range(8)], BY_USER, user=PEOPLE)
    assert (
        rows.units.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]
        and rows.num_units == rows.public_units == 4
        and rows.names_merged == 4
    )
    assert sorted(map(sorted, rows_of_units(rows.units, 4, 42).tolist())) == [
        [-1, -1, -1, 6],
        [-1, -1, -1, 7],
        [-1, 0, 1, 2],
        [-1, 3, 4, 5],
    ]
    assert [name for name in rows.ledger_names() if name.startswith(b"unit")] == [
        b"unit ann",
        b"unit 1",
        b"unit bob",
        b"unit -1",
    ]
    mixed = records(["a", "b", "c"], BY_USER, user=pd.Series([1, "1.0", 1.0], dtype=object))
    assert mixed.num_units == 1


def test_a_person_is_held_out_with_all_names():
    frame = pd.DataFrame(
        {
            "text": [f"visit {i}" for i in range(400)],
            "label": 1,
            "user": [f"{'Ab'[i % 2]}{i // 4}{' ' * (i % 4 > 1)}".replace("b", "a") for i in range(400)],
        }
    )
    for count in ({}, {"unit_count": "private", "delta": 1e-3}):
        splits = from_frame(frame, Settings(unit="user", audit_fraction=0.3, **count))
        sides = [set(side.frame["unit"]) for side in (splits.train, splits.kept_out, splits.test)]
        assert len(set().union(*sides)) == sum(map(len, sides)) == 100


def test_how_many_names_were_merged_is_told_under_private_only(tmp_path):
    frame = pd.DataFrame({"text": [f"visit {i}" for i in range(8)], "label": 1, "user": PEOPLE})
    load_stage(Run(BY_USER, tmp_path / "run"), from_frame(frame, BY_USER, test=frame))
    holders = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and "merged" in path.read_text(encoding="utf-8")
    ]
    assert (
        holders == [tmp_path / "run" / "private" / "names_merged.json"]
        and json.loads(holders[0].read_text())["names_merged"] == 4
    )


# a ledger that was written by version 0.1, with the bytes of rows and names hashed


ASSET, KEY = (
    pathlib.Path(__file__).with_name("ledger_of_version_3.sqlite.gz"),
    "cfdb95415c72bb79b5d7cd2241badedee84f257a57e6861323dfc31bf170f06f",
)
OLD_TEXTS = [
    "Anna went home.",
    "  a blank before",
    "Ünïcode, composed",
    "12",
    "plain",
    "Plain",
    "!!!",
    "two lines\nof a text",
]
OLD_PEOPLE = ["Ann", "ann ", "bob", "1", "1.0", "Cem"]


@pytest.fixture
def old(tmp_path):
    """A ledger of version 3: 4 spent on `visits` under a cap of 5, and 2 on `people`, whose unit is
    `user`.
    """
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(gzip.decompress(ASSET.read_bytes()))
    path.with_name("ledger.sqlite.key").write_bytes(bytes.fromhex(KEY))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        db.execute("PRAGMA journal_mode = WAL")
    db.close()
    return Ledger(path)


def consistent(ledger):
    """Whether each cell has as many units as it says, and each data set has some."""
    with sqlite3.connect(ledger.path) as db:
        cells = dict(db.execute("SELECT id, hashes FROM cells"))
        units = dict(db.execute("SELECT cell, COUNT(*) FROM units GROUP BY cell"))
        sets = {number for (number,) in db.execute("SELECT dataset FROM memberships")} >= {
            number for (number,) in db.execute("SELECT id FROM datasets")
        }
    db.close()
    return cells == units and sets


def test_the_data_sets_of_an_old_ledger_are_recognised_with_name_and_cap(old):
    visits = register(old, records(OLD_TEXTS))
    assert (visits.name, visits.units) == ("visits", 8) and len(old.datasets()) == 2 and consistent(old)
    assert old.spent(visits) == pytest.approx(4.0, abs=5e-3) and visits.copies == 2  # `plain` twice
    with pytest.raises(BudgetError, match="over the cap 5"):
        old.plan("b", visits, pure(4.0))
    assert (
        register(old, records(OLD_TEXTS))
        == register(old, records([text.upper() for text in OLD_TEXTS]))
        == visits
    )


@pytest.mark.parametrize("row", OLD_TEXTS)
def test_any_row_of_an_old_ledger_keeps_its_spending(old, row):
    with pytest.raises(BudgetError, match="over the cap 5 of data set 'visits'"):
        old.plan("b", register(old, records([row, "a new one", "and another"])), pure(4.0))
    assert consistent(old)
    again = register(old, records([f" {row.upper()}\r\n", "something else"]))
    assert old.spent(again) == pytest.approx(4.0, abs=5e-3) and consistent(old)


def test_units_of_an_old_ledger_keep_their_spending_and_fall_together(old):
    rows = records([f"visit {i}" for i in range(6)], BY_USER, user=OLD_PEOPLE)
    people = old.register(
        "people", rows.ledger_names(), DELTA, rows.public_units, "user", rows.earlier_names()
    )
    assert (
        (people.name, people.units, len(old.datasets())) == ("people", 4, 2)
        and old.spent(people) == pytest.approx(2.0, abs=5e-3)
        and consistent(old)
    )
    for name in ("ANN", "1.00", "cem"):
        later = records(["something new"], BY_USER, user=[name])
        known = old.register("later", later.ledger_names(), DELTA, 1, "user", later.earlier_names())
        assert old.spent(known) == pytest.approx(2.0, abs=5e-3)


def test_what_an_old_and_a_new_spelling_had_spent_comes_together(old):
    """The bytes of a new spelling were never in the old ledger, so it is a new row, until the old one
    comes and is seen to be the same.
    """
    shouted = register(old, records(["ANNA went home!", "new"]))
    assert old.spent(shouted) == 0
    spend(old, shouted, 0.5, "since")
    both = register(old, records(["Anna went home.", "third"]))
    assert old.spent(both) == old.spent(shouted) == pytest.approx(4.5, abs=5e-3) and consistent(old)
