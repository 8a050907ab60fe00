"""What every reader takes in the same way, what it refuses, and that no message quotes a row."""

import bz2
import decimal
import gzip
import io
import json
import lzma
import pathlib
import sys
import warnings
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from parts import RUN
from dpsynth import audit, data, runs
from dpsynth.data import as_frame, from_frame, left_out, load
from dpsynth.formats import TextFormat
from dpsynth.models import check_spelling, control_ids, load_tokenizer, plain_ids
from dpsynth.runs import read_settings, survey
from dpsynth.sampling import samplable
from dpsynth.settings import (
    EARLIER,
    DataError,
    DpsynthError,
    Settings,
    SettingsError,
    dump_settings,
    load_settings,
    make_settings,
    parse_overrides,
)
from dpsynth.synthesizer import Synthesizer, _records

LABELS = [i % 2 for i in range(40)]
TEXTS = [f"row {i}, a film" for i in range(40)]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(function, *arguments, kind=DpsynthError, **options):
    with pytest.raises(kind) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(name, content):
    with open(name, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return name


def excel(name, frame, **options):
    pytest.importorskip("openpyxl")
    frame.to_excel(name, index=False, **options)
    return name


def rows_of(settings):
    """All rows of a data set, in their order."""
    train = load(settings.model_copy(update={"test_data": settings.data})).train
    return train.texts, train.labels.tolist()


# ---- labels are what they are, whoever wrote them --------------------------------------------

WRITTEN = {
    "csv of floats": lambda t: write("a.csv", t.assign(label=t.label.astype(float)).to_csv(index=False)),
    "csv of truth values": lambda t: write("a.csv", t.assign(label=t.label.astype(bool)).to_csv(index=False)),
    "csv of Excel's truth values": lambda t: write(
        "a.csv", t.assign(label=t.label.map({0: "FALSE", 1: "TRUE"})).to_csv(index=False)
    ),
    "tsv of small truth values": lambda t: write(
        "a.tsv", t.assign(label=t.label.map({0: "false", 1: "true"})).to_csv(index=False, sep="\t")
    ),
    "jsonl of truth values": lambda t: write(
        "a.jsonl", t.assign(label=t.label.astype(bool)).to_json(orient="records", lines=True)
    ),
    "json of floats": lambda t: write(
        "a.json", json.dumps([{"text": x, "label": float(y)} for x, y in zip(t.text, t.label)])
    ),
    "json of texts": lambda t: write(
        "a.json", json.dumps([{"text": x, "label": f"{y}.0"} for x, y in zip(t.text, t.label)])
    ),
    "parquet of truth values": lambda t: (
        t.assign(label=t.label.astype(bool)).to_parquet("a.parquet") or "a.parquet"
    ),
    "parquet of small floats": lambda t: (
        t.assign(label=t.label.astype("float32")).to_parquet("a.parquet") or "a.parquet"
    ),
    "parquet of decimals": lambda t: (
        t.assign(label=[decimal.Decimal(y) for y in t.label]).to_parquet("a.parquet") or "a.parquet"
    ),
    "parquet of categories": lambda t: (
        t.assign(label=t.label.astype("category")).to_parquet("a.parquet") or "a.parquet"
    ),
    "excel of numbers": lambda t: excel("a.xlsx", t),
    "excel of truth values": lambda t: excel("a.xlsx", t.assign(label=t.label.astype(bool))),
}


@pytest.mark.parametrize(
    "names", ["negative,positive", "false,true", ["False", "True"], [False, True], "0,1", [0.0, 1.0]]
)
@pytest.mark.parametrize("writer", WRITTEN)
def test_a_label_is_read_as_every_writer_has_it(writer, names):
    path = WRITTEN[writer](pd.DataFrame({"text": TEXTS, "label": LABELS}))
    if "truth" not in writer and str(names).lower().count("true"):
        return  # numbers are positions there, and so they are where names are words of any other kind
    assert rows_of(make_settings({"data": path, "epsilon": 1, "label_names": names})) == (TEXTS, LABELS)


@pytest.mark.parametrize(
    "values",
    [
        [False, True],
        np.array([False, True]),
        pd.array([False, True], "boolean"),
        [np.False_, np.True_],
        ["false", "TRUE"],
        pd.Categorical([False, True]),
        np.array([0, 1], "float32"),
        ["0.0", "1.0"],
        [b"0", b"1"],
    ],
)
def test_a_label_of_a_frame_is_read_as_that_of_a_file(values):
    frame = pd.DataFrame({"text": ["a", "b"], "label": values})
    assert from_frame(frame, Settings(), test=frame).train.labels.tolist() == [0, 1]
    write("stored.jsonl", data.as_lines(as_frame(frame), Settings()))
    assert rows_of(Settings(data="stored.jsonl")) == (["a", "b"], [0, 1])


def test_a_truth_value_is_no_position_among_three():
    frame = pd.DataFrame({"text": list("abc"), "label": [True, False, True]})
    assert "not one of 0 to 2 (a, b, c)" in refusal(from_frame, frame, Settings(label_names="a,b,c"))


CRAFTS = ("Arts, Crafts & Sewing", "Books")


@pytest.mark.parametrize(
    "names",
    [
        CRAFTS,
        list(CRAFTS),
        json.dumps(CRAFTS),
        '"Arts, Crafts & Sewing",Books',
        "['Arts, Crafts & Sewing', Books]",
    ],
)
def test_a_label_with_a_comma_has_a_name(names):
    write("x.csv", "text,label\n" + "".join(f'a{i},"{CRAFTS[i % 2]}"\n' for i in range(40)))
    settings = make_settings({"data": "x.csv", "epsilon": 1, "label_names": names})
    assert settings.labels == CRAFTS and rows_of(settings)[1] == LABELS
    dump_settings(settings, "settings.yaml")
    assert load_settings("settings.yaml") == settings and make_settings(settings.model_dump()) == settings
    assert type(settings.label_names) is str  # a papermill parameter
    assert make_settings(parse_overrides([f"label_names={json.dumps(CRAFTS)}"])).labels == CRAFTS


def test_names_with_commas_that_were_not_quoted_are_shown_one_by_one():
    write("x.csv", 'text,label\na,"Arts, Crafts & Sewing"\nb,Books\n')
    said = refusal(load, Settings(data="x.csv", label_names="Arts, Crafts & Sewing,Books"))
    assert said.endswith("not one of 'Arts', 'Crafts & Sewing', 'Books'; write names with commas as a list")


@pytest.mark.parametrize(
    "text, names",
    [
        ("[a, b]", ("a", "b")),
        ("[1, 2]", ("1", "2")),
        ("[yes, no]", ("yes", "no")),
        ("[true, false]", ("true", "false")),
        ("\n- 'x: y'\n- \"- z\"", ("x: y", "- z")),
    ],
)
def test_names_may_be_a_list_in_yaml(text, names):
    write("x.yaml", f"label_names: {text}\nlabel_prior: [1, 3]\n")
    assert load_settings("x.yaml").labels == names and load_settings("x.yaml").prior() == (0.25, 0.75)


@pytest.mark.parametrize("names", ["[a, ", [None], [["a"]], {"a": 1}, ["a", "a"], [], 'a\nb\n"c'])
def test_a_list_of_names_that_is_none_is_one_line(names):
    assert "label_names" in refusal(make_settings, {"label_names": names}, kind=SettingsError)


# ---- files -----------------------------------------------------------------------------------

SIGNS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
@pytest.mark.parametrize("header", ["yes", "none"])
@pytest.mark.parametrize("sign", SIGNS)
def test_what_is_between_the_fields_is_found_or_told(sign, header, name):
    frame = pd.DataFrame({"text": [f"{t}; not|short\tat all" for t in TEXTS], "label": LABELS})
    frame.to_csv(name, index=False, sep=SIGNS[sign], header=header == "yes")
    columns = {} if header == "yes" else {"header": "none", "text_column": "0", "label_column": "1"}
    for sep in ("auto", sign, SIGNS[sign]):
        assert rows_of(make_settings({"data": name, "epsilon": 1, "sep": sep, **columns})) == (
            frame.text.tolist(),
            LABELS,
        )


def test_excels_semicolons_are_read_by_an_audit_too():
    for i, name in enumerate(("a.csv", "b.csv")):
        write(name, "text;label\n" + "".join(f'"row {j}, {i}";{j % 2}\n' for j in range(25)))
    assert list(audit.read_audit_rows("a.csv")) == ["text", "label"]
    assert "expected 2 fields" in refusal(audit.read_audit_rows, write("c.csv", "text,label\n1,2\n1\n" * 25))


def test_quotes_may_be_part_of_the_texts():
    text = 'text\tlabel\n"Never closed\t0\nso they "said"\t1\n'
    write("x.tsv", text)
    assert rows_of(Settings(data="x.tsv", quoting="none")) == (['"Never closed', 'so they "said"'], [0, 1])
    assert "quoting: none" in refusal(load, Settings(data="x.tsv")) and "quoting: none" in refusal(
        load, Settings(data="x.tsv", quoting="standard")
    )


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}


def zipped(content, *names):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("ending", [*PACKED, ".zip"])
def test_packed_files_are_read(kind, ending):
    frame, content = pd.DataFrame({"text": TEXTS, "label": LABELS}), io.BytesIO()
    if kind == "parquet":
        frame.to_parquet(content)
    elif kind in ("csv", "tsv"):
        frame.to_csv(content, index=False, sep="," if kind == "csv" else "\t")
    else:
        frame.to_json(content, orient="records", lines=kind == "jsonl")
    pack = PACKED.get(ending, lambda content: zipped(content, "a", "__MACOSX/a"))
    assert rows_of(Settings(data=write(f"x.{kind}{ending}", pack(content.getvalue())))) == (TEXTS, LABELS)
    assert audit.read_audit_rows(f"x.{kind}{ending}").text.tolist() == TEXTS
    said = refusal(load, Settings(data=write(f"y.{kind}{ending}", content.getvalue())))
    assert said == f"y.{kind}{ending}: cannot be unpacked; it is damaged, or not what its ending says"
    assert f"y.{kind}{ending}" in refusal(
        load, Settings(data=write(f"y.{kind}{ending}", pack(content.getvalue())[:-20]))
    )


def test_an_archive_of_several_files_is_refused():
    write("x.csv.zip", zipped(b"text,label\n", "a", "b"))
    assert "(it holds 2 files, one is expected)" in refusal(load, Settings(data="x.csv.zip"))


def test_excel():
    frame = pd.DataFrame({"text": TEXTS, "label": LABELS})
    excel("x.xlsx", frame)
    assert rows_of(Settings(data="x.xlsx")) == (TEXTS, LABELS)
    assert audit.read_audit_rows("x.xlsx").text.tolist() == TEXTS
    excel("y.xlsx", frame, header=False)
    assert rows_of(Settings(data="y.xlsx", header="none", text_column="0", label_column="1")) == (
        TEXTS,
        LABELS,
    )
    frame = frame.astype(object)
    frame.loc[3, "text"], frame.loc[4, "text"] = 7, None
    assert (
        refusal(load, Settings(data=excel("z.xlsx", frame)))
        == "z.xlsx, line 5, column text: expected a text, got int (and 1 more such rows)"
    )
    with pd.ExcelWriter("two.xlsx") as book:
        for name in "ab":
            frame.to_excel(book, sheet_name=name)
    assert "two.xlsx: 2 sheets have rows" in refusal(load, Settings(data="two.xlsx"))
    assert "not an Excel file" in refusal(load, Settings(data=write("no.xlsx", "text,label\n")))


def test_excel_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert 'needs the extra `excel`: pip install "dpsynth[excel]"' in refusal(
        load, Settings(data=write("x.xlsx", "PK"))
    )


# ---- rows without a text or a label ----------------------------------------------------------

GAPS = {1: {"text": ""}, 2: {"text": None}, 3: {"label": None}, 4: {"text": "  "}}


def with_gaps(gaps, n=60):
    return pd.DataFrame(
        [{"text": f"row {i}", "label": i % 2, "user": f"u{i // 3}", **gaps.get(i, {})} for i in range(n)]
    ).astype(object)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "frame"])
@pytest.mark.parametrize("unit", ["row", "user"])
def test_gaps_are_left_out_on_request_and_move_no_other_row(kind, unit):
    settings = Settings(missing="drop", unit=unit, audit_fraction=0.2, columns="ignore")
    splits = []
    for gaps in ({}, GAPS):
        frame = with_gaps(gaps)
        if kind != "frame":
            path = {
                "csv": lambda: write("x.csv", frame.to_csv(index=False)),
                "parquet": lambda: frame.astype("string").to_parquet("x.parquet") or "x.parquet",
                "jsonl": lambda: write("x.jsonl", frame.to_json(orient="records", lines=True)),
            }[kind]()
            splits.append(load(settings.model_copy(update={"data": path})))
        else:
            splits.append(from_frame(frame, settings))
    whole, gappy = splits
    lost = {f"row {i}" for i in GAPS}
    for side in ("train", "test", "kept_out"):
        assert getattr(gappy, side).texts == [text for text in getattr(whole, side).texts if text not in lost]
    assert gappy.train.public_units == whole.train.public_units
    assert gappy.train.source["missing_dropped"] == len(set(whole.train.texts) & lost) > 0
    if kind != "frame":
        assert (
            ": missing"
            in (said := refusal(load, settings.model_copy(update={"data": path, "missing": "refuse"})))
            or ": empty" in said
        )


def test_a_unit_of_gaps_alone_still_counts():
    settings, gaps = Settings(missing="drop", unit="user"), {i: {"text": None} for i in range(30)}
    frame = with_gaps(gaps)
    assert (
        from_frame(frame, settings, test=frame).train.public_units == 20
        and from_frame(frame, settings, test=frame).train.num_units == 10
    )
    assert "column user: missing" in refusal(from_frame, frame.assign(user=None), settings)
    assert "leaves out every row" in refusal(from_frame, frame.assign(text=None), settings)


def test_a_row_is_named_as_its_file_has_it():
    write("x.csv", "text,label\n" + "".join(f'"two\nlines {i}",1\n' for i in range(20)))
    train = load(Settings(data="x.csv", train_size=5)).train
    assert [train.place(i) for i in range(5)] == [
        f"line {2 + 2 * int(text.split()[-1])}" for text in train.texts
    ]
    assert train.take([3, 0]).place(1) == train.place(0)
    frame = pd.DataFrame({"text": TEXTS, "label": LABELS})
    train = from_frame(frame, Settings()).train
    assert [train.place(i) for i in range(3)] == [
        f"row {TEXTS.index(text)} (from 0)" for text in train.texts[:3]
    ]


# ---- columns that no setting names -----------------------------------------------------------

LEFT = {
    "csv": lambda t: write("x.csv", t.to_csv(index=False)),
    "tsv": lambda t: write("x.tsv", t.to_csv(index=False, sep="\t")),
    "json": lambda t: write("x.json", t.to_json(orient="records")),
    "jsonl": lambda t: write("x.jsonl", t.to_json(orient="records", lines=True)),
    "parquet": lambda t: t.to_parquet("x.parquet") or "x.parquet",
    "xlsx": lambda t: excel("x.xlsx", t),
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_column_that_would_vanish_is_refused_by_position_unless_that_is_meant(kind):
    path = LEFT[kind](pd.DataFrame({"stars": 5, "text": TEXTS, "label": LABELS, "city": "York"}))
    line = f"x.{kind}: no setting names columns 0, 3 of 4 (from 0), so they are left out"
    said = refusal(load, Settings(data=path))
    assert said == f"{line} and missing in the synthetic rows; set columns: ignore if this is intended"
    assert left_out(load(Settings(data=path, columns="ignore")).train) == line
    assert "no setting names column 3 of 4 (from 0)" in refusal(
        load, Settings(data=path, test_data=path, unit="stars")
    )


def test_check_and_run_and_fit_tell_which_columns_are_left_out(dpsynth, refused, caught):
    table = pd.DataFrame({"text": TEXTS, "label": LABELS, "stars": 5})
    write("x.csv", table.to_csv(index=False))
    write(
        "x.yaml", yaml.safe_dump({**RUN.model_dump(), "experiment": "x", "data": "x.csv", "embed_length": 32})
    )
    line = "no setting names column 2 of 3 (from 0), so it is left out"
    assert line in refused("check", "x.yaml") and line in refused("run", "x.yaml")
    code, out, _ = dpsynth("check", "x.yaml", "--set", "columns=ignore")
    assert code == 0 and f"  columns      x.csv: {line}\n" in out
    from dpsynth.runs import preflight

    assert (
        preflight([load_settings("x.yaml", ["columns=ignore"])], pathlib.Path("runs"))[0] == f"x.csv: {line}"
    )
    for given in (table, "x.csv"):
        assert line in refusal(Synthesizer("run", epsilon=8).fit, given, "rows")
        with pytest.warns(UserWarning, match="column 2 of 3"):
            Synthesizer("run", epsilon=8, columns="ignore").fit(given, "rows")


# ---- tables in memory ------------------------------------------------------------------------

TABLE = pd.DataFrame({"text": TEXTS, "label": LABELS})


def dataset(table):
    return pytest.importorskip("datasets").Dataset.from_pandas(table)


def polars(table):
    return pytest.importorskip("polars").DataFrame(table.to_dict("list"))


class Stream:
    """A table of a library that nobody here knows, which gives a stream of Arrow."""

    def __init__(self, table):
        self.__arrow_c_stream__ = pa.Table.from_pandas(table).__arrow_c_stream__


TABLES = {
    "stream of Arrow": Stream,
    "list of dicts": lambda t: t.to_dict("records"),
    "tuple of dicts": lambda t: tuple(t.to_dict("records")),
    "dict of lists": lambda t: t.to_dict("list"),
    "dict of arrays": lambda t: {name: t[name].to_numpy() for name in t},
    "dict of Series": lambda t: dict(t.items()),
    "Arrow table": pa.Table.from_pandas,
    "Arrow batch": pa.RecordBatch.from_pandas,
    "datasets": dataset,
    "Polars": polars,
    "extension types": lambda t: t.convert_dtypes(),
    "Arrow types": lambda t: t.convert_dtypes(dtype_backend="pyarrow"),
    "categories": lambda t: t.astype("category"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_fit_takes_every_table(caught, kind):
    Synthesizer("run", epsilon=8).fit(TABLES[kind](TABLE), "rows")
    first = caught.splits
    Synthesizer("other", epsilon=8).fit(TABLE, "rows")
    assert (
        first.train.texts == caught.splits.train.texts
        and first.train.labels.tolist() == caught.splits.train.labels.tolist()
    )
    assert load(read_settings("run")).train.fingerprint(bytes(16)) == first.train.fingerprint(bytes(16))


def test_fit_takes_columns_that_are_numbers(caught):
    table = pd.DataFrame([[f"row {i} a film", i % 2] for i in range(40)])
    Synthesizer("run", text_column=0, label_column=1, epsilon=8).fit(table, "rows")
    assert (
        caught.settings.text_column == "0"
        and load(read_settings("run")).train.texts == caught.splits.train.texts
    )
    synthesizer = Synthesizer("run2", text_column=0, label_column=1, epsilon=8).fit(table, "rows")
    assert _records(synthesizer.settings, table, "rows").texts == table[0].tolist()


# ---- no message quotes a row -----------------------------------------------------------------

SECRET, NUMBER, DATE, KEY = "sesame77", 918273645, "1987-06-05", "keyword88"
PLACE = "/home/sesame77/keyword88.csv"


def quoted(said):
    """The parts of private rows that a message shows."""
    return [part for part in (SECRET, str(NUMBER), DATE, KEY) if part.lower() in said.lower()]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns):
    held = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), held)
    return held.getvalue()


LEAKS = {  # what is wrong -> file, content, settings
    "no header": ("a.csv", f"{SECRET} and more,positive\n{PLACE},negative\n", {}),
    "no header, semicolons": ("a.csv", f"{SECRET} and more;positive\n{PLACE};negative\n", {}),
    "no header, tabs": ("a.tsv", f"{SECRET}\tpositive\n{PLACE}\tnegative\n", {}),
    "no header, one column": ("a.csv", f"{SECRET}\n{PLACE}\n", {"label_column": ""}),
    "no header, and it is said": ("a.csv", f"{SECRET},positive\n{PLACE},negative\n", {"header": "none"}),
    "header with a private name": ("a.csv", f"text,label,{SECRET}\na,1,{KEY}\nb,0,{NUMBER}\n", {}),
    "header like the name": ("a.csv", f"Text,{SECRET}\na,1\n", {}),
    "two columns of one name": ("a.csv", f"text,label,{SECRET},{SECRET}\na,1,2,3\nb,0,2,3\n", {}),
    "label of another name": ("a.csv", f"text,label\na,{SECRET}\nb,1\n", {}),
    "label that is a text": ("a.csv", f"label,text\n{SECRET} is ill,1\n{KEY},0\n", {}),
    "label that is a number": ("a.csv", f"text,label\na,{NUMBER}\nb,1\n", {}),
    "label that is a date": ("a.jsonl", jsonl({"text": "a", "label": DATE}), {}),
    "label that is a list": ("a.jsonl", jsonl({"text": "a", "label": [SECRET]}), {}),
    "label that is an object": ("a.jsonl", jsonl({"text": "a", "label": {KEY: SECRET}}), {}),
    "label like a comma list": ("a.csv", f'text,label\na,"{SECRET}, {KEY}"\n', {"label_names": "x, y,z"}),
    "fields too many": ("a.csv", f"text,label\n{SECRET}, {KEY},1\n", {}),
    "fields too few": ("a.csv", f"text,label\n{SECRET}\n", {}),
    "quote that stays open": ("a.csv", f'text,label\n"{SECRET},1\n{KEY},0\n', {}),
    "quote in the middle": ("a.tsv", f'text\tlabel\n"{SECRET}" {KEY}\t1\n', {}),
    "rows merged by quotes": ("a.tsv", f'text\tlabel\n"{SECRET}\t1\n{KEY}"\t0\n', {}),
    "not UTF-8": ("a.csv", f"text,label\n{SECRET} caf".encode() + b"\xe9,1\n", {}),
    "empty text": ("a.csv", f"text,label,who\n,1,{SECRET}\n", {"unit": "who"}),
    "empty unit": ("a.csv", f"text,label,who\n{SECRET},1,\n", {"unit": "who"}),
    "unit of a wrong type": (
        "a.jsonl",
        jsonl({"text": SECRET, "label": 1, "who": {KEY: [NUMBER]}}),
        {"unit": "who"},
    ),
    "unit that is half a number": (
        "a.jsonl",
        jsonl({"text": SECRET, "label": 1, "who": NUMBER + 0.5}),
        {"unit": "who"},
    ),
    "one row": ("a.csv", f"text,label\n{SECRET},1\n", {}),
    "one unit": ("a.csv", f"text,label,who\n{KEY},1,{SECRET}\n{KEY},0,{SECRET}\n", {"unit": "who"}),
    "keys of another name": ("a.jsonl", jsonl({KEY: SECRET, "label": 1}), {}),
    "a key more": ("a.jsonl", jsonl({"text": "a", "label": 1, KEY: SECRET}, {"text": "b", "label": 1}), {}),
    "a key twice": ("a.jsonl", f'{{"text": "a", "label": 1, "{KEY}": 1, "{KEY}": "{SECRET}"}}\n', {}),
    "a key twice in a list": (
        "a.json",
        f'[{{"text": "a", "label": 1, "{KEY}": 1, "{KEY}": "{SECRET}"}}]',
        {},
    ),
    "a text instead of an object": ("a.jsonl", f'"{SECRET}"\n', {}),
    "an object instead of a list": ("a.json", json.dumps({KEY: SECRET}), {}),
    "broken JSON": ("a.jsonl", f'{{"text": "{SECRET}", {KEY}: 1}}\n', {}),
    "broken JSON in a text": ("a.json", f'[{{"text": "{SECRET}\\q", "{KEY}": 1}}]', {}),
    "nested text": ("a.jsonl", jsonl({"text": {KEY: [SECRET, {KEY: NUMBER}]}, "label": 1}), {}),
    "text that is a number": ("a.jsonl", jsonl({"text": NUMBER, "label": 1}), {}),
    "number too long": ("a.jsonl", f'{{"text": {NUMBER}{"0" * 5000}, "label": 1}}\n', {}),
    "half a surrogate pair": ("a.jsonl", f'{{"text": "{SECRET}\\ud83d", "label": 1}}\n', {}),
    "columns of Parquet": ("a.parquet", parquet(**{KEY: [SECRET], "label": [1]}), {}),
    "numbers in Parquet": ("a.parquet", parquet(text=[NUMBER], label=[1]), {}),
    "objects in Parquet": ("a.parquet", parquet(text=[{KEY: SECRET}], label=[1]), {}),
    "dates in Parquet": ("a.parquet", parquet(text=pa.array([DATE]).cast(pa.date32()), label=[1]), {}),
    "bytes in Parquet": ("a.parquet", parquet(text=[SECRET.encode() + b"\xe9"], label=[1]), {}),
    "texts in Parquet that are no texts": (
        "a.parquet",
        parquet(
            text=pa.Array.from_buffers(
                pa.string(), 1, [None, pa.py_buffer(np.array([0, 9], "<i4")), pa.py_buffer(b"sesame77\xe9")]
            ),
            label=[1],
        ),
        {},
    ),
    "a text called Parquet": ("a.parquet", f"text,label\n{SECRET},1\n", {}),
    "a text called packed": ("a.csv.gz", f"text,label\n{SECRET},1\n", {}),
    "a text called an archive": (
        "a.csv.zip",
        zipped(f"text,label\n{SECRET},x\n", f"{KEY}.csv", f"{SECRET}.csv"),
        {},
    ),
    "packed and broken": ("a.csv.gz", gzip.compress(f"{SECRET},{KEY}\n".encode()), {}),
    "a text called Excel": ("a.xlsx", f"text,label\n{SECRET},1\n", {}),
    "a text without an ending": ("a", f"{SECRET}\n", {}),
    "gaps alone": ("a.csv", f"text,label\n{SECRET},\n{KEY},\n", {"missing": "drop"}),
}


@pytest.mark.parametrize("case", LEAKS)
def test_no_reader_quotes_a_row(case, refused, capfd):
    name, content, changes = LEAKS[case]
    write(name, content)
    settings = {**RUN.model_dump(), "experiment": "x", "data": name, **changes}
    write("x.yaml", yaml.safe_dump(settings))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        told = [
            refused("check", "x.yaml"),
            refused("run", "x.yaml"),
            refusal(load, make_settings(settings)),
            refusal(Synthesizer("run", **{**settings, "data": "demo", "experiment": "run"}).fit, name),
        ]
        files = ["--synthetic", name, "--train", name, "--holdout", name]
        told += [
            refused("audit", *files),
            refused("audit", *files, "--columns", "text,label", "--unit-column", "who"),
        ]
    told += [str(warning.message) for warning in warned] + list(capfd.readouterr())
    assert not [(said, quoted(said)) for said in told if quoted(said)] and "a" in told[0]


@pytest.mark.parametrize(
    "given",
    [
        [SECRET, KEY],
        [{"text": SECRET}, KEY],
        [[SECRET, 1]],
        {"text": SECRET},
        {SECRET: [KEY]},
        {"text": [SECRET], "label": [1, 0]},
        {"text": {KEY: SECRET}},
        pd.Series([SECRET, KEY], name=SECRET),
        pd.Series([SECRET]).array,
        np.array([[SECRET, KEY]]),
        {SECRET, KEY},
        iter([SECRET]),
        (SECRET,),
        NUMBER,
        SECRET.encode(),
        pa.table({KEY: [SECRET]}),
        pa.array([SECRET]),
        pa.table({"text": [SECRET], "label": [KEY]}),
        f"{SECRET}\n{KEY}",
        f"{SECRET} " * 999,
        None,
        [],
        {},
        pd.DataFrame({SECRET: [KEY], "label": [1]}),
        pd.concat({SECRET: pd.DataFrame({KEY: [1]})}, axis=1),
        pd.DataFrame({"text": [SECRET] * 3, "label": [KEY, 1, 0]}),
        pd.DataFrame([[SECRET, KEY, 1]], columns=["text", "text", "label"]),
        pd.DataFrame({"text": [pd.Timestamp(DATE)], "label": [1]}),
        pd.DataFrame({"text": [pd.Interval(NUMBER, NUMBER + 1)], "label": 1}),
        pd.DataFrame({"text": [SECRET], "label": [1], KEY: [1]}),
        pd.DataFrame({"text": pd.Categorical([SECRET]), "label": pd.Categorical([KEY])}),
        pd.DataFrame(),
        pd.DataFrame({"text": [], "label": []}),
    ],
    ids=lambda given: type(given).__name__,
)
def test_fit_quotes_no_row(given, capfd):
    told = [refusal(Synthesizer("run", epsilon=8).fit, given, "rows"), *capfd.readouterr()]
    assert not [(said, quoted(said)) for said in told if quoted(said)]
    assert not (pathlib.Path("run") / "private").exists()


def test_an_audit_names_no_column_that_may_be_a_row():
    frames = {
        what: pd.DataFrame({"text": TEXTS, "label": LABELS, **more})
        for what, more in (("synthetic", {}), ("train", {SECRET: 1, "stars": 2}), ("holdout", {KEY: 1}))
    }
    frames["train"] = frames["train"].rename(columns={"stars": "label2"})
    said = " ".join(audit.pool._left_out(frames, ["text"]))
    assert not quoted(said) and said.endswith(
        ": label; column 2, 3 (from 0) of train; column 2 (from 0) of holdout"
    )
    assert not quoted(
        refusal(audit.pool._common, {**frames, "synthetic": frames["synthetic"][["text"]]}, ["label"])
    )


def test_a_library_that_quotes_a_row_is_not_quoted(tmp_path, dpsynth, monkeypatch):
    (tmp_path / "set").mkdir()
    write("set/train.csv", f"text,label\n{SECRET},1\n{KEY},0,{NUMBER},more\n")
    pytest.importorskip("datasets")
    said = refusal(load, Settings(data=f"hf:{tmp_path / 'set'}", data_dir=str(tmp_path / "cache")))
    assert not quoted(said) and "cannot be downloaded" in said

    def fails(*arguments, **options):
        raise ValueError(f"cannot handle {SECRET}")

    monkeypatch.setattr(runs.surveys, "survey", fails)
    write("x.yaml", "epsilon: 1\n")
    for verb in (["check", "x.yaml"], ["run", "x.yaml"]):
        code, out, err = dpsynth(*verb)
        assert (
            code == 1
            and not quoted(out + err)
            and "error: ValueError in test_readers.py, line" in err
            and err.count("\n") == 1
        )
    assert (
        not quoted(runs.one_line("ValueError", SECRET))
        and runs.one_line("DataError", "a, row 1") == "a, row 1"
    )


def test_a_notebook_keeps_no_message_that_may_quote_a_row(tmp_path):
    import nbformat

    from dpsynth.runs import remove_times

    cell = nbformat.v4.new_code_cell(
        "fit()",
        outputs=[
            nbformat.v4.new_output("error", ename=name, evalue=SECRET, traceback=[SECRET])
            for name in ("KeyError", "DataError")
        ],
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    remove_times(tmp_path / "notebook.ipynb")
    first, second = nbformat.read(tmp_path / "notebook.ipynb", 4).cells[0].outputs
    assert (
        not quoted(first.evalue + "".join(first.traceback))
        and first.ename == "KeyError"
        and second.evalue == SECRET
    )


# ---- decisions -------------------------------------------------------------------------------


def test_epsilon_is_a_decision_outside_the_demo(refused, caught):
    write("yelp.csv", "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)))
    write("c.yaml", "data: yelp.csv\nbatch_size: 8\n")
    for verb in ("check", "run"):
        said = refused(verb, "c.yaml")
        assert (
            "setting 'epsilon': has no default outside the demo data" in said
            and "`epsilon: 8`" in said
            and "`epsilon: inf` trains WITHOUT" in said
        )
    for given in ("yelp.csv", TABLE, "tfds:imdb_reviews", "hf:imdb"):
        assert "'epsilon': has no default" in refusal(Synthesizer("run").fit, given, kind=SettingsError)
    assert not caught.__dict__
    Synthesizer("run", epsilon="inf").fit("yelp.csv")
    assert not caught.settings.private
    assert (
        make_settings({}).epsilon == 10
        and make_settings({"data": "yelp.csv", "generator": "real_test"}).generator == "real_test"
    )
    assert (
        load_settings("c.yaml", ["epsilon=3"]).epsilon == 3
        and make_settings(Settings(data="yelp.csv").model_dump()).epsilon == 10
    )  # a notebook's cell


def test_fewer_samples_need_no_other_change():
    assert (
        make_settings({"num_samples": 100}).num_mauve_samples
        == 100
        == make_settings({**Settings().model_dump(), "num_samples": 100}).num_mauve_samples
    )
    assert make_settings({"num_samples": 20000}).num_mauve_samples == 5000
    write("c.yaml", "num_samples: 500\nnum_mauve_samples: 400\n")
    assert [load_settings("c.yaml", [f"num_samples={n}"]).num_mauve_samples for n in (450, 300)] == [400, 300]
    assert "num_mauve_samples: 400 is more than num_samples" in refusal(
        load_settings, "c.yaml", ["num_samples=300", "num_mauve_samples=400"]
    )
    assert "num_mauve_samples" in refusal(make_settings, {"num_samples": 10, "num_mauve_samples": 20})


@pytest.mark.parametrize("keep", [0, 1, 300, -40])
def test_a_run_folder_whose_settings_were_emptied_or_cut_is_refused(refused, dpsynth, keep):
    from dpsynth.runs import prepare_folder

    folder = prepare_folder(Settings(experiment="dp_ft"), pathlib.Path("runs/dp_ft"))
    content = (folder / "settings.yaml").read_text()
    (folder / "settings.yaml").write_text(content[:keep])
    assert "settings.yaml: damaged" in refusal(Synthesizer.load, folder, kind=SettingsError)
    for verb in (["fit"], ["sample"], ["sample", "--rows", 5], ["evaluate"], ["audit"]):
        assert "settings.yaml: damaged" in refused(*verb, folder)
    write("dp_ft.yaml", "epsilon: 10\n")
    assert "settings.yaml: damaged" in refused("run", "dp_ft.yaml")
    code, out, _ = dpsynth("results", "runs")
    assert code == 0 and "unreadable: runs/dp_ft/settings.yaml: damaged" in out.replace(
        str(folder), "runs/dp_ft"
    )


def test_a_run_from_before_a_setting_is_read_as_it_was_made(tmp_path):
    values = {name: value for name, value in Settings().model_dump().items() if name not in EARLIER}
    write("settings.yaml", yaml.safe_dump(values))
    assert read_settings(tmp_path) == Settings(columns="ignore")


# ---- control tokens in texts -----------------------------------------------------------------

SPELT = [
    "<unk>",
    "<bos> <eos>",
    "a<start_of_turn>user",
    "<end_of_turn>",
    "<img><img>",
    "<pad>x<pad>",
    "see <<start_of_image>>",
    "[PAD] [CLS]",
    "<0x41>",
    "the <unk> said <unk>",
    "</s><s>",
    "<end_of_turn",
    "<|endoftext|>",
]


def test_control_tokens_in_texts_are_letters_both_ways(micro):
    tokenizer, fmt = load_tokenizer("tiny"), TextFormat("[{label}]:", ("a", "b"))
    allowed = samplable(micro, micro.vocabulary_size)
    for text, ids in zip(SPELT, plain_ids(tokenizer, SPELT)):
        assert tokenizer.detokenize(ids) == text == fmt.decode(text)["text"]
        assert (
            not set(ids) & set(control_ids(tokenizer).values()) and allowed[ids].all()
        )  # what is trained on can be sampled
    assert (
        micro.encode(SPELT) == plain_ids(tokenizer, SPELT) == [ids[:-1] for ids in micro.response_ids(SPELT)]
    )
    assert micro.prompt_ids("<start_of_turn>user")[1] == tokenizer.token_to_id(
        "<start_of_turn>"
    )  # in a prompt it is meant
    assert micro.encode(["plain text"]) == [list(map(int, tokenizer(["plain text"])[0]))]


class Blanks:
    """A tokenizer of signs that puts a blank before each part, as SentencePiece with a dummy prefix does."""

    special_tokens = ["<s>"]

    def get_vocabulary(self):
        return ["<s>", *map(chr, range(32, 127))]

    def token_to_id(self, token):
        return self.get_vocabulary().index(token)

    def __call__(self, texts):
        return [[self.token_to_id(sign) for sign in f" {text}"] for text in texts]

    def detokenize(self, ids):
        return "".join(self.get_vocabulary()[i] for i in ids).removeprefix(" ")


def test_a_tokenizer_that_cannot_write_them_as_letters_refuses_the_row():
    frame = pd.DataFrame({"text": [*TEXTS, f"{SECRET} <s> {KEY}"], "label": 1})
    records = from_frame(frame, Settings(), test=frame).train
    check_spelling(Blanks(), records.take(range(40)))
    said = refusal(check_spelling, Blanks(), records.take([5, 40]), kind=DataError)
    assert said.startswith("frame, row 40 (from 0): the text spells a control token") and not quoted(said)


def test_a_survey_refuses_such_a_row_before_anything_is_charged(monkeypatch):
    from dpsynth import finetune, models

    write("x.csv", "text,label\n" + "".join(f"row {i} <unk>,{i % 2}\n" for i in range(40)))
    settings = RUN.model_copy(update={"data": "x.csv", "embed_length": 32})
    assert survey(settings).mechanism is not None
    monkeypatch.setattr(
        models.spelling, "plain_ids", lambda tokenizer, texts: [[tokenizer.token_to_id("<unk>")]] * len(texts)
    )
    assert "x.csv, line " in refusal(survey, settings, kind=DataError)
    monkeypatch.setattr(runs.Account, "charge", lambda *arguments: pytest.fail("charged"))
    assert "x.csv, line " in refusal(
        finetune.finetune_run, runs.Run(settings, "run"), load(settings), kind=DataError
    )
