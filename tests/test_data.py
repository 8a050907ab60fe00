"""What the notebook of dpsynth.data cannot check about itself: real files, real libraries, crashes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from dpsynth import data
from dpsynth.data import Records, TokenStore, from_frame, load
from dpsynth.settings import DataError, Settings

KEY = bytes(range(32))


def table(n, prefix="review"):
    texts = [f'{prefix} {i}, “é” \u2028 "quoted"\nnext' for i in range(n)]
    return pd.DataFrame({"text": texts, "label": [i % 2 for i in range(n)]})


def save(frame, path):
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=kind == ".jsonl", force_ascii=False)
    return str(path)


def message(settings, function=load):
    with pytest.raises(DataError) as caught:
        function(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# files


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path, frame = tmp_path / f"train.{kind.lower()}", table(20)
    save(frame, path)
    path = path.rename(tmp_path / f"renamed.{kind}")
    splits = load(Settings(data=str(path), test_data=save(table(6, "held"), tmp_path / "test.parquet")))
    assert splits.train.texts == frame["text"].tolist()
    assert splits.train.labels.tolist() == frame["label"].tolist() and splits.train.labels.dtype == np.int64
    assert list(splits.train.frame.columns) == ["text", "label"]
    assert len(splits.test) == 6 and splits.test.name == "test.parquet"
    assert (
        json.loads(json.dumps(splits.train.source))["rows"] == 20 and splits.train.source["held_out"] is False
    )


def test_byte_order_mark_crlf_and_long_fields(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + f"text,label\r\n{long},0\r\nNA,1\r\n".encode())
    train = load(Settings(data=path, test_data=path)).train
    assert train.texts == [long, "NA"]


def test_columns_and_labels_are_found_by_role(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "Fine.", "mood": "good"}\n{"mood": 0, "body": "Dull."}\n')
    train = load(
        Settings(data=path, test_data=path, text_column="body", label_column="mood", label_names="bad, good")
    ).train
    assert (
        train.texts == ["Fine.", "Dull."]
        and train.labels.tolist() == [1, 0]
        and train.label_names == ("bad", "good")
    )


def test_unlabelled_rows(tmp_path):
    path = write(tmp_path / "a.csv", "text\nFine.\nDull.\n")
    train = load(Settings(data=path, test_data=path, label_column="")).train
    assert (
        train.labels.tolist() == [0, 0]
        and list(train.frame.columns) == ["text"]
        and train.label_names == ("",)
    )


def test_binary_parquet_columns_are_decoded(tmp_path):
    path = save(
        pd.DataFrame({"text": [b"caf\xc3\xa9", b"bar"], "label": [b"positive", b"negative"]}),
        tmp_path / "a.parquet",
    )
    assert load(Settings(data=path, test_data=path)).train.texts == ["café", "bar"]
    path = save(pd.DataFrame({"text": [b"bar", b"caf\xe9"], "label": [0, 1]}), tmp_path / "b.parquet")
    assert message(Settings(data=path)) == f"{path}, row 1 (from 0), column text: not valid UTF-8"


BROKEN = {
    "long.csv": (
        "text,label\nDull.,0\na, b, c,0\n",
        "long.csv, line 3: expected 2 fields, saw 4; quote a text that contains ','",
    ),
    "short.csv": ("text,label\nDull.,0\nA joy.\n", "short.csv, line 3: expected 2 fields, saw 1"),
    "short.tsv": ('text\tlabel\n"two\nlines"\t0\nA joy.\n', "short.tsv, line 4: expected 2 fields, saw 1"),
    "open.csv": (
        'text,label\nDull.,0\n"A joy.,1\nFine.,1\n',
        "open.csv, line 3: broken row (unexpected end of data); if quotes are part of the texts, set"
        " quoting: none",
    ),
    "latin.csv": (
        b"text,label\nDull.,0\ncaf\xe9,1\n",
        "latin.csv, line 3: not valid UTF-8; save the file as UTF-8",
    ),
    "empty.csv": ("", "empty.csv: empty file"),
    "header.csv": ("text,label\n", "header.csv: no rows"),
    "twice.csv": ("text,label,text\na,0,b\n", "twice.csv: column 'text' occurs 2 times; rename one"),
    "blank.csv": (
        "text,label\nDull.,0\n ,0\n,1\n",
        "blank.csv, line 3, column text: empty (and 1 more such rows)",
    ),
    "meh.csv": (
        "text,label\nDull.,negative\n\nHm.,meh\n",
        "meh.csv, line 4, column label: not one of negative, positive",
    ),
    "case.csv": (
        "text,label\nDull.,Negative\n",
        "case.csv, line 2, column label: not one of negative, positive",
    ),
    "unlabelled.csv": ("text,label\nDull.,\n", "unlabelled.csv, line 2, column label: missing"),
    "columns.csv": (
        "review,stars\nDull.,1\n",
        "columns.csv: no column 'text' among its 2; set text_column; if its first line is a row, set"
        " header: none and name columns by position, 0 to 1",
    ),
    "target.csv": (
        "text,stars\nDull.,1\n",
        "target.csv: no column 'label' among its 2; set label_column; if its first line is a row, set"
        " header: none and name columns by position, 0 to 1",
    ),
    "bad.jsonl": (
        '{"text": "a", "label": 1}\n\n{"text": }\n',
        "bad.jsonl, line 3: not JSON (Expecting value at column 10)",
    ),
    "list.jsonl": ('["a", 1]\n', 'list.jsonl, line 1: expected an object such as {"text": …}, got list'),
    "none.jsonl": ('{"text": "a", "label": 1}\n\n{"label": 1}\n', "none.jsonl, line 3, column text: missing"),
    "number.jsonl": (
        '{"text": 7, "label": 1}\n',
        "number.jsonl, line 1, column text: expected a text, got int",
    ),
    "pair.jsonl": ('{"text": "\\ud83d", "label": 1}\n', "pair.jsonl, line 1, column text: not valid UTF-8"),
    "two.jsonl": (
        '{"text": "a", "label": 2}\n',
        "two.jsonl, line 1, column label: not one of 0 to 1 (negative, positive)",
    ),
    "list label.jsonl": (
        '{"text": "a", "label": [true]}\n',
        "list label.jsonl, line 1, column label: not one of negative, positive",
    ),
    "nil.jsonl": ("", "nil.jsonl: no rows"),
    "void.jsonl": ("{}\n", "void.jsonl: no column 'text' among its 0; set text_column"),
    "object.json": ('{"text": "a"}', "object.json: expected a list of objects, got dict"),
    "mixed.json": (
        '[{"text": "a", "label": 1}, 3]',
        'mixed.json, row 1 (from 0): expected an object such as {"text": …}, got int',
    ),
    "bad.json": ('[{"text": "a",\n "label": }]', "bad.json, line 2: not JSON (Expecting value at column 11)"),
    "row.json": (
        '[{"text": "a", "label": 1}, {"text": "b", "label": 9}]',
        "row.json, row 1 (from 0), column label: not one of 0 to 1 (negative, positive)",
    ),
    "twice.jsonl": (
        '{"text": "a", "label": 1}\n{"text": "b", "label": 1, "text": "z"}\n',
        "twice.jsonl, line 2: key 'text' occurs more than once; rename or remove one",
    ),
    "twice.json": (
        '[{"text": "a", "label": 1},\n {"label": 1, "text": "b", "label": 0}]',
        "twice.json, row 1 (from 0): key 'label' occurs more than once; rename or remove one",
    ),
    "deep.jsonl": (
        '{"text": "a", "label": 1}\n{"text": ' + "[" * 100_000,
        "deep.jsonl, line 2: lists or objects nested too deep; a row needs a text and a label, each plain",
    ),
    "deep.json": (
        '[{"text":' * 100_000,
        "deep.json: lists or objects nested too deep; a row needs a text and a label, each plain",
    ),
    "long.jsonl": (
        '{"text": "a", "label": 1' + "0" * 5000 + "}\n",
        "long.jsonl, line 1: a number with too many digits; write it as a text",
    ),
    "a.txt": (
        "text,label\n",
        "a.txt: unknown kind of file; expected .csv, .tsv, .json, .jsonl, .parquet, .xlsx, also packed"
        " (.gz, .bz2, .xz, .zip, .zst)",
    ),
    "a.csv.gz": ("text,label\n", "a.csv.gz: cannot be unpacked; it is damaged, or not what its ending says"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_says_where(tmp_path, name):
    content, expected = BROKEN[name]
    write(tmp_path / name, content)
    assert message(Settings(data=name)) == expected


def test_missing_file_folder_and_not_parquet(tmp_path):
    assert message(Settings(data="no.csv")).startswith("no.csv: no such file")
    (tmp_path / "folder.csv").mkdir()
    assert message(Settings(data="folder.csv")).startswith("folder.csv: a folder")
    write(tmp_path / "a.parquet", "text,label\n")
    assert message(Settings(data="a.parquet")).startswith("a.parquet: not a Parquet file")
    save(table(3), tmp_path / "b.csv")
    assert message(Settings(data="b.csv", test_data="no.csv")).startswith("no.csv: no such file")


def test_many_rows_are_named_by_the_line_an_editor_shows(tmp_path):
    rows = ["text,label"] + [f"row {i},{'meh' if i == 15 else 1}" for i in range(100)]
    write(tmp_path / "reviews.csv", "\n".join(rows))
    assert (
        message(Settings(data="reviews.csv"))
        == "reviews.csv, line 17, column label: not one of negative, positive"
    )


def test_names_that_are_numbers_are_never_positions(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,3\n")
    assert load(Settings(data=path, test_data=path, label_names="1,2,3")).train.labels.tolist() == [0, 2]
    path = save(pd.DataFrame({"text": ["a", "b"], "label": [1, 0]}), tmp_path / "a.parquet")
    assert "not one of 1, 2, 3" in message(Settings(data=path, label_names="1,2,3"))


def test_whole_numbers_are_labels_with_and_without_a_point():
    frame = pd.DataFrame({"text": list("abcd"), "label": pd.Series([0.5, 1.0, 1, "1.0"], dtype=object)})
    assert from_frame(frame, Settings(label_names="0.5,1.0"), test=frame).train.labels.tolist() == [
        0,
        1,
        1,
        1,
    ]
    assert "row 0 (from 0), column label: not one of 0.5, 1.0" in message(
        None, lambda _: from_frame(frame.assign(label=0.0), Settings(label_names="0.5,1.0"))
    )


def test_a_missing_label_is_never_a_label_that_is_called_none(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": "None"}\n{"text": "b", "label": null}\n')
    assert message(Settings(data=path, label_names="None,some")) == f"{path}, line 2, column label: missing"


def test_a_key_twice_inside_a_value_that_is_not_read_is_no_matter(tmp_path):
    path = write(
        tmp_path / "a.json",
        '[{"text": "a", "label": 1, "more": {"x": 1, "x": 2}}, {"text": "b", "label": 0}]',
    )
    assert load(Settings(data=path, test_data=path, columns="ignore")).train.texts == ["a", "b"]


# quotes that are no quotes

UNQUOTED = [f"film number {i} was fine" for i in range(40)]
UNQUOTED[5], UNQUOTED[10] = '"An opening quote that never closes', 'they said so and left"'

MERGED = {
    "text first": ("tsv", ["text", "label"], lambda i, text: [text, str(i % 2)]),
    "text last, labels of one word": (
        "tsv",
        ["label", "text"],
        lambda i, text: [("negative", "positive")[i % 2], text],
    ),
    "text in the middle": ("tsv", ["id", "text", "label"], lambda i, text: [str(i), text, str(i % 2)]),
    "commas": ("csv", ["text", "label"], lambda i, text: [text, str(i % 2)]),
    "no labels, text last": ("tsv", ["user", "text"], lambda i, text: [f"u{i}", text]),
    "no labels, an empty column": (
        "tsv",
        ["text", "stars", "city"],
        lambda i, text: [text, str(i % 5), "York" if i % 3 else ""],
    ),
}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("case", MERGED)
def test_a_stray_quote_never_merges_rows(tmp_path, case, ending):
    kind, header, row = MERGED[case]
    mark = "\t" if kind == "tsv" else ","
    lines = [mark.join(fields) for fields in (header, *(row(i, text) for i, text in enumerate(UNQUOTED)))]
    path = write(tmp_path / f"a.{kind}", ending.join(lines) + ending)
    first, last = (13, 23) if ending == "\n\n" else (7, 12)
    settings = Settings(data=path, label_column="label" if "label" in header else "", columns="ignore")
    said = message(settings)
    assert said.startswith(
        f"{path}, line {first}: a quoted field goes on to line {last} and has the form of 6 rows; set"
        f" quoting: none"
    )
    apart = load(settings.model_copy(update={"quoting": "none"}))
    assert sorted(apart.train.texts + apart.test.texts) == sorted(UNQUOTED)
    assert len(load(settings.model_copy(update={"quoting": "standard"})).train.texts) < 32
    cured = [line.replace(t, '"' + t.replace('"', '""') + '"') for line, t in zip(lines, ["?", *UNQUOTED])]
    write(tmp_path / f"a.{kind}", ending.join(cured) + ending)
    splits = load(settings)
    assert sorted(splits.train.texts + splits.test.texts) == sorted(UNQUOTED)


def test_a_stray_quote_alone_and_one_behind_a_text_of_two_lines(tmp_path):
    path = write(tmp_path / "a.tsv", 'label\ttext\n1\t"\n0\tfine\n1\t"\n')
    assert "a.tsv, line 2: a quoted field goes on to line 4 and has the form of 3 rows" in message(
        Settings(data=path)
    )
    path = write(tmp_path / "c.tsv", 'user\ttext\nu1\t"\nu2\tfine\nu3\t"\n')
    assert "c.tsv, line 2: a quoted field goes on to line 4 and has the form of 3 rows" in message(
        Settings(data=path, label_column="")
    )
    path = write(tmp_path / "b.tsv", 'title\ttext\tlabel\n"two\nlines"\t"so\t1\na title\tfine"\t0\n')
    assert "b.tsv, line 3: a quoted field goes on to line 4 and has the form of 2 rows" in message(
        Settings(data=path)
    )


RIGHTLY_QUOTED = {
    "one comma in each line": ("text,label", '"Good, but\nlong, slow\nsad",1'),
    "a word before each comma": ("label,text", 'positive,"I saw it.\nHowever, it ended.\n\nSoon, too"'),
    "commas and blank lines": ("text,label", '"Well,\n\nno,\n",1'),
    "a single column": ("text", '"Good\nbut\nlong"'),
    "no labels, numbers before the text": ("id,text", '17,"Roses are red\nviolets, blue"'),
    "no labels, names before the text": ("user,text", 'anna-17,"Roses are red\nViolets, blue\nand I, too"'),
    "no labels, names after the text, a comma elsewhere": (
        "text,user",
        '"Well,Anna\nnot,I\nsay",Ben\n"A, b",Zoe',
    ),
    "no labels, a comma at the end": ("text,stars", '"Well,\nno",3'),
    "no tab": ("text\tlabel", '"Good, 1\nbut\nlong"\t1'),
    "a tab in a line": ("text\tlabel", '"Good\t1\nbut\t long\nsad"\t1'),
}


@pytest.mark.parametrize("case", RIGHTLY_QUOTED)
def test_a_text_of_several_lines_is_one_text(tmp_path, case):
    header, row = RIGHTLY_QUOTED[case]
    path = write(tmp_path / f"a.{'tsv' if 'tab' in case else 'csv'}", f"{header}\n{row}\n")
    settings = Settings(
        data=path, test_data=path, label_column="label" if "label" in header else "", columns="ignore"
    )
    records = load(settings.model_copy(update={"quoting": "standard"})).train
    assert records.texts == row.split('"')[1::2]
    try:
        assert load(settings).train.texts == records.texts
    except DataError as error:  # each line has as many fields as the header: only the owner can tell
        assert "quoting: standard if all these lines are one text" in str(error)


# splits


def test_held_out_rows_are_disjoint_reproducible_and_seeded(tmp_path):
    path = save(table(100), tmp_path / "a.csv")
    first, again, other = (load(Settings(data=path, test_fraction=0.3, seed=s)) for s in (1, 1, 2))
    assert len(first.train) == 70 and len(first.test) == 30
    assert not set(first.train.texts) & set(first.test.texts)
    assert first.test.texts == again.test.texts != other.test.texts
    kept, held = (
        [table(100)["text"].tolist().index(t) for t in side.texts] for side in (first.train, first.test)
    )
    assert kept == sorted(kept) and held == sorted(held) and held != list(range(30))


def test_sizes_take_a_random_subset_in_order(tmp_path):
    path, whole = save(table(200), tmp_path / "a.csv"), table(200)["text"].tolist()
    small, large = (load(Settings(data=path, test_data=path, train_size=n, test_size=7)) for n in (20, 50))
    order = [whole.index(t) for t in small.train.texts]
    assert len(order) == 20 and order == sorted(order) and order != list(range(20))
    assert set(small.train.texts) < set(large.train.texts)
    assert len(small.test) == 7 and small.train.source["rows"] == 200 and small.train.source["used"] == 20


def test_which_rows_are_taken_does_not_depend_on_what_is_in_them(tmp_path):
    frame = table(100)
    changed = frame.copy()
    changed.loc[40, "text"] = frame.loc[3, "text"]
    a, b = (
        from_frame(f, Settings(train_size=50, duplicates="drop", label_column="")) for f in (frame, changed)
    )
    assert (
        len(set(a.train.texts) ^ set(b.train.texts)) <= 1 and len(set(a.test.texts) ^ set(b.test.texts)) <= 2
    )


def groups(*sizes, renamed=None):
    return pd.DataFrame(
        {
            "text": [f"row {i} of {u}" for u, n in enumerate(sizes) for i in range(n)],
            "user": [f"u{u}" for u, n in enumerate(sizes) for _ in range(n)],
        }
    ).replace({"user": renamed or {}})


def test_a_unit_of_many_rows_moves_no_other_unit_in_or_out():
    settings = Settings(unit="user", train_size=40, label_column="", audit_fraction=0.2)
    a, b = (from_frame(groups(*[5] * 99, last), settings, test=groups(3)) for last in (1, 3000))
    units = lambda splits: [set(side.frame["unit"]) - {"u99"} for side in (splits.train, splits.kept_out)]
    assert (
        units(a) == units(b)
        and a.train.num_units == b.train.num_units == 32
        and a.kept_out.num_units == b.kept_out.num_units == 8
    )


@pytest.mark.parametrize("unit", [0, 13, 99])
@pytest.mark.parametrize("name", ["u100", "anna", "an older sister"])
def test_a_unit_that_is_renamed_stays_where_it_was_and_moves_no_other(unit, name):
    settings = Settings(
        unit="user", train_size=40, test_size=15, label_column="", test_fraction=0.2, audit_fraction=0.2
    )
    one, other = (from_frame(groups(*[2] * 100, renamed=new), settings) for new in ({}, {f"u{unit}": name}))
    for side, size in (("train", 32), ("test", 15), ("kept_out", 8)):
        a, b = getattr(one, side), getattr(other, side)
        assert a.texts == b.texts and a.units.tolist() == b.units.tolist() and a.num_units == size


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_number_is_the_same_unit_in_every_kind_of_file(tmp_path, kind):
    frame = pd.DataFrame({"text": list("abcd"), "user": [7, 8, 7, 2**53 + 1]})
    path = save(frame, tmp_path / f"a.{kind}")
    units = (
        load(Settings(data=path, test_data=path, unit="user", label_column="")).train.frame["unit"].tolist()
    )
    assert units == ["7", "8", "7", "9007199254740993"]


def test_a_number_is_the_same_unit_however_a_frame_holds_it():
    settings, names = Settings(unit="user", label_column=""), []
    for users in (
        [7, 8],
        [7.0, 8.0],
        ["7", "8"],
        pd.array([7, 8], "Int64"),
        pd.Series([np.int64(7), b"8"], dtype=object),
    ):
        frame = pd.DataFrame({"text": ["a", "b"], "user": users})
        names.append(
            (train := from_frame(frame, settings, test=frame).train).ledger_names() + [train.fingerprint(KEY)]
        )
    assert names[0][:2] == [b"unit 7", b"unit 8"] and all(other == names[0] for other in names)


@pytest.mark.parametrize(
    "value, problem",
    [
        (None, "missing"),
        (float("nan"), "missing"),
        (pd.NA, "missing"),
        ("", "empty"),
        (7.5, "float"),
        (2.0**53, "float"),
        (float("inf"), "float"),
        (True, "bool"),
        (np.True_, "bool"),
        ([7], "list"),
        ({"id": 7}, "dict"),
    ],
)
def test_what_is_no_unit(value, problem):
    frame = pd.DataFrame({"text": ["a", "b"], "user": pd.Series([7, value], dtype=object)})
    said = message(None, lambda _: from_frame(frame, Settings(unit="user", label_column="")))
    assert said.startswith("frame, row 1 (from 0), column user: ")
    assert problem in said and ("expected a text or a whole number, got" in said) == (
        problem not in ("missing", "empty")
    )


def test_units_are_dealt_by_their_order_wherever_their_rows_stand():
    settings = Settings(unit="user", label_column="", test_fraction=0.3)
    apart, together = pd.concat([groups(*[1] * 20), groups(*[2] * 20)]), groups(*[3] * 20)
    a, b = (from_frame(f, settings) for f in (apart, together))
    assert (
        set(a.test.frame["unit"]) == set(b.test.frame["unit"]) != {f"u{i}" for i in range(6)}
        and a.test.num_units == 6
    )
    larger = from_frame(apart, settings.model_copy(update={"train_size": 9})).train.frame["unit"]
    smaller = from_frame(apart, settings.model_copy(update={"train_size": 4})).train.frame["unit"]
    assert set(smaller) < set(larger) and (smaller.nunique(), larger.nunique()) == (4, 9)
    refused = message(None, lambda _: from_frame(groups(5), settings))
    assert refused == "frame: 1 unit cannot be divided by test_fraction; give it more units, or set test_data"


def test_a_unit_that_is_renamed_moves_only_itself_where_their_number_is_private():
    settings = Settings(
        unit="user", unit_count="private", delta=1e-4, label_column="", test_fraction=0.3, audit_fraction=0.2
    )
    others = {
        tuple(
            tuple(t for t in side.texts if not t.endswith(" of 13")) for side in (s.train, s.test, s.kept_out)
        )
        for s in (from_frame(groups(*[2] * 50, renamed={"u13": f"name {i}"}), settings) for i in range(9))
    }
    assert len(others) == 1


@pytest.mark.parametrize("unit", ["row", "user"])
def test_one_more_unit_moves_no_other_where_their_number_is_private(unit):
    settings = Settings(
        unit=unit, unit_count="private", delta=1e-4, label_column="", test_fraction=0.3, audit_fraction=0.2
    )
    a, b = (from_frame(groups(*[2] * n), settings) for n in (100, 101))
    for x, y in zip((a.train, a.test, a.kept_out), (b.train, b.test, b.kept_out)):
        assert set(x.texts) <= set(y.texts) and len(y) - len(x) <= 2
    message_of = message(
        None, lambda _: from_frame(groups(*[2] * 10), settings.model_copy(update={"train_size": 5}))
    )
    assert message_of.startswith("train_size: choosing that many units needs their exact number")


def test_the_public_number_of_units_does_not_depend_on_what_rows_say():
    frame = pd.DataFrame({"text": list("abcdefgh")})
    sizes = {
        from_frame(
            f, Settings(duplicates="drop", label_column="", audit_fraction=0.25), test=frame
        ).train.public_units
        for f in (frame, frame.replace("a", "b"), frame.assign(text="a"))
    }
    assert sizes == {6}


def test_rows_kept_out_for_an_audit_have_no_copies_among_themselves_or_the_training_rows():
    frame = pd.DataFrame({"text": [f"text {i % 150}" for i in range(200)]})
    splits = from_frame(frame, Settings(duplicates="drop", label_column="", audit_fraction=0.5), test=frame)
    texts, once = splits.train.texts + splits.kept_out.texts, {f"text {i}" for i in range(50, 150)}
    assert (
        len(texts) == len(set(texts))
        and set(splits.kept_out.texts) <= once
        and 30 < len(splits.kept_out) < 70
    )
    repeated = [splits.train.texts[i] for i in splits.train.source["repeated"]]
    assert (
        set(splits.train.texts) - set(repeated) == once - set(splits.kept_out.texts)
        and 25 < len(repeated) <= 50
    )


def test_a_row_that_was_kept_out_decides_nothing_about_the_rows_that_are_trained_on():
    settings = Settings(duplicates="drop", label_column="", audit_fraction=0.5)
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(60)]})
    splits = from_frame(frame, settings, test=frame)
    copied, key = splits.train.texts[-1], bytes(32)
    first_kept_out = frame["text"].tolist().index(splits.kept_out.texts[0])
    assert first_kept_out < frame["text"].tolist().index(copied)
    frame.loc[first_kept_out, "text"] = copied
    again = from_frame(frame, settings, test=frame)
    assert (
        again.train.fingerprint(key) == splits.train.fingerprint(key)
        and again.train.public_units == splits.train.public_units == 30
    )
    assert again.kept_out.texts == splits.kept_out.texts[1:] and again.train.source["repeated"] == [29]


def test_a_row_is_charged_under_its_text_however_it_is_read():
    names = [
        set(
            from_frame(
                table(20).assign(user="one"), Settings(**how), test=table(2).assign(user="two")
            ).train.ledger_names()
        )
        for how in ({}, {"label_column": ""}, {"label_names": "positive,negative"}, {"unit": "user"})
    ]
    assert len(names[0]) == 20 and names[0] == names[1] == names[2] < names[3] and len(names[3]) == 21


def test_one_row_cannot_be_split(tmp_path):
    write(tmp_path / "a.csv", "text,label\nFine.,1\n")
    assert (
        message(Settings(data="a.csv"))
        == "a.csv: 1 row cannot be divided by test_fraction; give it more rows, or set test_data"
    )


@pytest.mark.parametrize("duplicates, left, dropped", [("keep", 6, 0), ("drop", 4, 2)])
def test_copies_are_counted_and_dropped_on_request(duplicates, left, dropped):
    train = pd.DataFrame({"text": ["a", "b", "a", "a", "c", "a"], "label": [0, 1, 0, 1, 1, 0]})
    test = pd.DataFrame({"text": ["b", "b", "z"], "label": [1, 1, 0]})
    splits = from_frame(train, Settings(duplicates=duplicates), test=test)
    assert len(splits.train) == left and len(splits.test) == 3
    found = {k: splits.train.source[k] for k in ("duplicates", "duplicates_dropped", "train_rows_in_test")}
    assert found == {"duplicates": 2, "duplicates_dropped": dropped, "train_rows_in_test": 1}


def test_from_frame_ignores_the_index_and_names_the_row():
    frame = table(4).set_index(pd.Index([7, 7, 7, 7], name="line"))
    assert from_frame(frame, Settings(), test=frame).train.texts == table(4)["text"].tolist()
    frame = frame.assign(label=[0.0, 1.0, np.nan, 1.0])
    assert (
        message(None, lambda _: from_frame(frame, Settings(), name="visits"))
        == "visits, row 2 (from 0), column label: missing"
    )
    assert "no column 'text' among its 1; set text_column" in message(
        None, lambda _: from_frame(frame[["label"]], Settings())
    )


def test_columns_of_a_frame_may_be_numbered():
    frame, settings = (
        pd.DataFrame({0: ["a", "b"], 1: [0, 1], 2: [7, 8]}),
        Settings(text_column="0", label_column="1", unit="2"),
    )
    train = from_frame(frame, settings, test=frame).train
    assert (
        train.texts == ["a", "b"]
        and train.labels.tolist() == [0, 1]
        and train.frame["unit"].tolist() == ["7", "8"]
    )
    assert list(frame.columns) == [0, 1, 2]
    twice = pd.concat([frame, frame[[0]].set_axis(["0"], axis=1)], axis=1)
    assert (
        message(None, lambda _: from_frame(twice, settings)) == "frame: column '0' occurs 2 times; rename one"
    )


def test_nullable_and_categorical_columns():
    frame = pd.DataFrame(
        {"text": pd.array(["a", "b"], "string"), "label": pd.Categorical(["positive", "negative"])}
    )
    assert from_frame(frame, Settings(), test=frame).train.labels.tolist() == [1, 0]
    frame["label"] = pd.array([1, None], "Int64")
    assert "row 1 (from 0), column label: missing" in message(None, lambda _: from_frame(frame, Settings()))


# records


def test_repr_shows_no_row():
    records = from_frame(table(10), Settings()).train
    assert "review" not in repr(records) and "8 rows" in repr(records) and "duplicates" not in repr(records)


def test_take_keeps_order_and_renumbers():
    records = from_frame(table(10), Settings(), test=table(2)).train.take([5, 2])
    assert records.texts == [table(10)["text"][i] for i in (5, 2)] and records.frame.index.tolist() == [0, 1]


def test_fingerprint():
    records = from_frame(table(30), Settings(), test=table(2)).train
    print_ = records.fingerprint(KEY)
    assert len(print_) == 64 and int(print_, 16)
    assert records.take(range(30)).fingerprint(KEY) == print_
    others = [
        records.take(np.random.default_rng(0).permutation(30)),
        records.take([*range(30), 3]),
        records.take([*range(30), 3, 3]),
        records.take(range(29)),
    ]
    relabelled = Records(records.frame.assign(label=1 - records.frame["label"]), "x", records.label_names, {})
    assert len({r.fingerprint(KEY) for r in (records, relabelled, *others)}) == 6
    assert records.fingerprint(KEY[::-1]) != print_
    for key in (b"", b"short", bytes(65)):
        with pytest.raises(DataError, match="16 to 64 bytes"):
            records.fingerprint(key)


# libraries


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with two prepared TensorFlow data sets, one of them under the name of the tutorial's."""

    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
    )

    def rows(n, prefix):
        return tf.data.Dataset.from_tensor_slices(
            {"text": [f"{prefix} {i} é" for i in range(n)], "label": np.arange(n) % 2}
        )

    for name, splits in (
        ("imdb_reviews", {"train": rows(30, "train"), "test": rows(8, "test")}),
        ("alone", {"train": rows(10, "only")}),
    ):
        config = {"config": "plain_text"} if name == "imdb_reviews" else {}
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name, version="1.0.0", features=features, split_datasets=splits, data_dir=folder, **config
        )
    return str(folder)


def test_tfds_keeps_the_official_split(prepared):
    splits = load(Settings(data="tfds:imdb_reviews", data_dir=prepared))
    assert sorted(splits.train.texts) == sorted(f"train {i} é" for i in range(30))
    assert sorted(splits.test.texts) == sorted(f"test {i} é" for i in range(8))
    assert all(
        int(text.split()[1]) % 2 == label for text, label in zip(splits.train.texts, splits.train.labels)
    )
    assert splits.train.source["kind"] == "tfds" and splits.train.source["held_out"] is False
    assert load(Settings(data="tfds:imdb_reviews", data_dir=prepared)).train.texts == splits.train.texts


def test_tfds_without_a_test_split_holds_rows_out(prepared, tmp_path):
    splits = load(Settings(data="tfds:alone", data_dir=prepared))
    assert (len(splits.train), len(splits.test)) == (8, 2) and splits.train.source["held_out"]
    replaced = load(
        Settings(data="tfds:alone", data_dir=prepared, test_data=save(table(3), tmp_path / "t.csv"))
    )
    assert (len(replaced.train), len(replaced.test)) == (10, 3)


def test_tfds_column_that_is_not_there(prepared):
    assert message(Settings(data="tfds:alone", data_dir=prepared, text_column="body")) == (
        "tfds:alone: no column 'body' among its 2; set text_column"
    )


def test_tfds_unknown_or_unreachable(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    said = message(Settings(data="tfds:no_such_set", data_dir=str(tmp_path)))
    assert said.startswith(f"tfds:no_such_set: not found in {tmp_path}") and "set data_dir" in said

    def offline(*args, **kwargs):
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tfds, "load", offline)
    said = message(Settings(data="tfds:imdb_reviews"))
    assert "ConnectionError: Max retries exceeded)" in said and "download it once" in said


def test_hf_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message(Settings(data="hf:imdb")) == 'hf:imdb: needs the extra `hf`: pip install "dpsynth[hf]"'
    assert message(Settings(data="hf:")) == "data: hf: names no data set; write hf:NAME"


def test_hf_folder(tmp_path):
    (tmp_path / "set").mkdir()
    save(table(12), tmp_path / "set" / "train.parquet")
    save(table(4, "held"), tmp_path / "set" / "test.parquet")
    splits = load(Settings(data=f"hf:{tmp_path / 'set'}", data_dir=str(tmp_path / "cache")))
    assert splits.train.texts == table(12)["text"].tolist() and len(splits.test) == 4
    assert "no column 'body'" in message(
        Settings(data=f"hf:{tmp_path / 'set'}", data_dir=str(tmp_path / "cache"), text_column="body")
    )
    assert "set data_dir" in message(
        Settings(data=f"hf:{tmp_path / 'nowhere'}", data_dir=str(tmp_path / "cache"))
    )


def test_demo():
    splits = load(Settings(train_size=40, test_size=20))
    assert len(splits.train) == 40 and len(splits.test) == 20 and splits.train.name == "demo"
    assert splits.train.source["rows"] == 4000 and splits.test.source["rows"] == 2000
    assert set(splits.train.labels) == {0, 1}
    assert load(Settings(train_size=40, seed=1)).train.texts != splits.train.texts


def test_slow_libraries_are_imported_only_on_demand():
    code = (
        "import sys, dpsynth.data; print({'tensorflow', 'tensorflow_datasets', 'datasets', "
        "'keras', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "set()"


# tokens


def environment():
    return {**os.environ, "PYTHONPATH": str(pathlib.Path(data.__file__).parents[2])}


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(1, 9, rng.integers(0, 4)).tolist(),
            rng.integers(1, 60_000, rng.integers(1, 12)).tolist(),
        )
        for _ in range(n)
    ]


def test_store_returns_what_was_written(tmp_path):
    rows = pairs(50)
    store = TokenStore.write(tmp_path / "store", iter(rows))
    again = TokenStore(tmp_path / "store")
    assert len(again) == 50 and isinstance(store._ids, np.memmap)
    for i, (prompt, response) in enumerate(rows):
        ids, prompt_length = again.row(i)
        assert ids.tolist() == prompt + response and ids.dtype == np.int32 and prompt_length == len(prompt)
    assert again.lengths.tolist() == [len(p) + len(r) for p, r in rows]
    assert again.prompt_lengths.tolist() == [len(p) for p, _ in rows]
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("length", [1, 6, 40])
def test_batch_against_rows_one_by_one(tmp_path, length):
    store = TokenStore.write(tmp_path / "store", pairs(30))
    indices = [3, -1, 29, 0, 3, -1]
    batch = store.batch(indices, length)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((6, length), np.int32),
        "prompt_length": ((6,), np.int32),
        "total_length": ((6,), np.int32),
    }
    for i, tokens, prompt, total in zip(
        indices, batch["tokens"], batch["prompt_length"], batch["total_length"]
    ):
        ids, prompt_length = store.row(i) if i >= 0 else (np.zeros(0, int), 0)
        assert tokens.tolist() == (ids.tolist() + [0] * length)[:length]
        assert (prompt, total) == (min(prompt_length, length), min(len(ids), length))


def test_batch_edges(tmp_path):
    store = TokenStore.write(tmp_path / "store", pairs(3))
    assert store.batch([], 4)["tokens"].shape == (0, 4)
    assert not store.batch([-1], 4)["tokens"].any()
    for indices in ([-2, 0], [0, 3]):
        with pytest.raises(IndexError):
            store.batch(indices, 4)
    with pytest.raises(IndexError):
        store.row(3)


def test_a_row_or_a_store_without_tokens_is_refused(tmp_path):
    for rows, expected in (([], "no rows"), ([([1], [2]), ([], [])], "row 1 ")):
        with pytest.raises(DataError, match=expected):
            TokenStore.write(tmp_path / "store", rows)
        assert not list(tmp_path.iterdir())


def test_killed_while_writing_leaves_no_store(tmp_path):
    code = (
        "import os, sys; from dpsynth.data import TokenStore\n"
        "def rows():\n    for i in range(5000):\n        yield [2], list(range(1, 100))\n    os._exit(9)\n"
        "TokenStore.write(sys.argv[1], rows())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], env=environment())
    assert done.returncode == 9 and not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="no token store here"):
        TokenStore(tmp_path / "store")
    assert len(TokenStore.write(tmp_path / "store", pairs(4))) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_failed_write_keeps_the_old_store_and_a_good_one_replaces_it(tmp_path):
    def fails_half_way():
        yield [2], [3]
        raise RuntimeError("tokenizer")

    TokenStore.write(tmp_path / "store", pairs(4))
    with pytest.raises(RuntimeError, match="tokenizer"):
        TokenStore.write(tmp_path / "store", fails_half_way())
    assert len(TokenStore(tmp_path / "store")) == 4
    assert len(TokenStore.write(tmp_path / "store", pairs(7))) == 7


def test_a_damaged_store_is_an_error(tmp_path):
    folder = tmp_path / "store"
    TokenStore.write(folder, pairs(4))
    np.save(folder / "offsets.npy", np.array([0, 1, 2, 3, 4]))
    with pytest.raises(DataError, match="do not fit together"):
        TokenStore(folder)
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        TokenStore(folder)
