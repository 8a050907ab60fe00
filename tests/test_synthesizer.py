"""The object around a run folder: what it refuses, what it chooses, what it stores, and what can be done with
the folder later."""

import json
import shutil
import stat
import warnings

import pandas as pd
import pytest

from parts import MICRO
import dpsynth.finetune
from dpsynth import synthesizer as module
from dpsynth.cli import main
from dpsynth.data import load
from dpsynth.ledger import RUNS_LEDGER, Ledger
from dpsynth.runs import check_same_rows
from dpsynth.runs import locked, read_settings
from dpsynth.runs.run import Run
from dpsynth.settings import DataError, PrivacyError, Settings, SettingsError, dump_settings
from dpsynth.synthesizer import Synthesizer

SMALL = {
    "model": MICRO,
    "tuning": "lora",
    "lora_rank": 1,
    "lora_targets": "value",
    "sequence_length": 32,
    "microbatch_size": 8,
    "epochs": 0.4,
    "epsilon": 8,
    "validation_size": 4,
    "num_mauve_trials": 1,
    "embedder": "tiny",
    "embed_length": 32,
    "ledger": "runs",
}


def table(rows=50):
    return pd.DataFrame(
        {
            "text": [f"row {i} was {'good' if i % 2 else 'bad'}" for i in range(rows)],
            "label": [i % 2 for i in range(rows)],
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "books.csv"
    pd.DataFrame({"text": ["a text of a book", "and another"]}).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "small"
    return Synthesizer(folder, **SMALL, contamination_corpus=corpus).fit(
        table(), "small table", progress=False
    )


# ---- refused before anything is read ---------------------------------------------------------


@pytest.mark.parametrize("generator", ["prompt", "real_train", "real_test"])
def test_other_generators_are_refused(generator, tmp_path):
    with pytest.raises(SettingsError, match=f"for {generator} use `dpsynth run`"):
        Synthesizer(tmp_path / "run", generator=generator, epsilon=8)
    (tmp_path / "run").mkdir()
    dump_settings(Settings(generator=generator), tmp_path / "run" / "settings.yaml")
    with pytest.raises(SettingsError, match=f"for {generator} use `dpsynth run`"):
        Synthesizer.load(tmp_path / "run")


def test_a_private_number_of_units_chooses_no_batch_size(caught, tmp_path):
    with pytest.raises(SettingsError, match="batch_size: give it where unit_count is private"):
        Synthesizer(tmp_path, unit_count="private", delta=1e-4)
    Synthesizer(tmp_path, unit_count="private", delta=1e-4, batch_size=16, epsilon=8).fit(table(), "rows")
    assert caught.settings.batch_size == 16


def test_labels_are_not_taken_from_the_rows(caught, tmp_path):
    rows = pd.DataFrame({"text": ["rain again", "two goals"] * 5, "label": ["weather", "sport"] * 5})
    rows.to_csv(tmp_path / "news.csv", index=False)
    for data in (rows, tmp_path / "news.csv"):
        with pytest.raises(
            DataError, match="column label: .*not one of negative, positive.*label_names=.*betray that row"
        ):
            Synthesizer(tmp_path / "run", epsilon=8).fit(data, "news")
    assert not (tmp_path / "run").exists()
    Synthesizer(tmp_path / "run", label_names="sport,weather", epsilon=8).fit(rows, "news")
    assert caught.splits.train.label_names == ("sport", "weather")


def test_other_errors_of_the_rows_pass_as_they_are(tmp_path):
    with pytest.raises(DataError, match="no such file") as error:
        Synthesizer(tmp_path / "run", epsilon=8).fit(tmp_path / "nowhere.csv")
    assert "label_names" not in str(error.value)


@pytest.mark.parametrize(
    "rows", [table(), table().to_dict("records"), table().to_dict("list"), table()["text"]]
)
def test_rows_in_memory_need_a_name(caught, tmp_path, rows):
    for named in ({}, {"name": ""}):
        with pytest.raises(
            SettingsError,
            match=r'^fit: rows in memory need a name, as in fit\(data, name="patients"\); [^\n]*$',
        ):
            Synthesizer(tmp_path / "run", epsilon=8).fit(rows, **named)
    assert not (tmp_path / "run").exists()


def test_a_table_is_charged_under_its_name_in_whatever_folder_it_is_fitted(caught, tmp_path):
    for day, rows, name in (
        ("monday", table(), "patients"),
        ("tuesday", table(60), "patients"),
        ("friday", table(), "a / b's rows: 2"),
    ):
        Synthesizer(tmp_path / day, epsilon=8).fit(rows, name=name)
        stored = load(read_settings(tmp_path / day))
        assert (
            caught.splits.train.name == stored.train.name == name
            and stored.train.texts == caught.splits.train.texts
        )
    Synthesizer(tmp_path / "set", data_name="patients", epsilon=8).fit(table())
    assert caught.splits.train.name == "patients"
    table().to_csv(tmp_path / "mine.csv", index=False)
    for given, called in (({}, "mine.csv"), ({"name": "patients"}, "patients")):
        Synthesizer(tmp_path / f"file {called}", epsilon=8).fit(tmp_path / "mine.csv", **given)
        assert caught.splits.train.name == called


# ---- chosen and handed on --------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, settings, size",
    [
        (50, {}, 5),
        (5, {}, 1),
        (50, {"batch_size": 7}, 7),
        (11_000, {}, 1024),
        (11_000, {"profile": "smoke"}, 50),
    ],
)
def test_the_batch_follows_from_the_number_of_units_unless_it_is_given(
    caught, tmp_path, rows, settings, size
):
    synthesizer = Synthesizer(tmp_path, **settings, epsilon=8).fit(table(rows), "rows")
    assert (
        synthesizer.settings.batch_size
        == caught.settings.batch_size
        == read_settings(tmp_path).batch_size
        == size
    )


def test_copies_that_are_dropped_do_not_change_the_batch(caught, tmp_path):
    Synthesizer(tmp_path, duplicates="drop", epsilon=8).fit(
        table().assign(text="the same text", label=1), "rows"
    )
    assert len(caught.splits.train) == 1 and caught.settings.batch_size == 5


def test_the_profile_is_applied(caught, tmp_path):
    Synthesizer(tmp_path, profile="smoke", model="gemma3_1b", sequence_length=512, epsilon=8).fit(
        table(600), "rows"
    )
    assert (caught.settings.model, caught.settings.sequence_length) == ("tiny", 96)
    assert len(caught.splits.train) == 400 and caught.settings.batch_size == 50


def test_overlaps_with_a_corpus_are_counted(fitted):
    assert "share a run of 50 with books.csv" in fitted.certificate["base_model"]["contamination"]


def test_two_processes_do_not_sample_the_same_rows(fitted):
    folder = fitted.folder / "release" / "sample-77-3"
    folder.mkdir()
    with locked(folder), pytest.raises(SettingsError, match="another process"):
        fitted.sample(3, seed=77, progress=False)
    assert len(fitted.sample(3, seed=77, progress=False)) == 3


@pytest.mark.parametrize("rows", [0, -1, 3.7, "5", None])
def test_rows_come_in_whole_numbers(fitted, rows):
    with pytest.raises(SettingsError, match="give a whole number, at least 1"):
        fitted.sample(rows)


def test_rows_that_are_cut_are_told(fitted, monkeypatch):
    monkeypatch.setattr(module, "sample_to_file", lambda *a, **_: (_cut(a[3]), {"unfinished": 0.25})[1])
    with pytest.warns(UserWarning, match="25% of the rows had not ended at sequence_length, 32 tokens"):
        fitted.sample(4, seed=78)


def _cut(folder):
    pd.DataFrame({"text": ["a"], "label": ["good"]}).to_parquet(folder / "synthetic.parquet")


def test_a_run_is_called_after_its_folder_and_takes_time(fitted):
    assert (fitted.settings.experiment, Synthesizer("a folder").settings.experiment) == (
        "small",
        "synthesizer",
    )
    numbers = json.loads((fitted.folder / "metrics.json").read_text())
    assert {name for name in numbers if name.startswith("seconds_")} == {"seconds_load", "seconds_fit"}
    assert (
        numbers["seconds"] == pytest.approx(numbers["seconds_load"] + numbers["seconds_fit"])
        and numbers["seconds_fit"] > 1
    )


def test_two_processes_do_not_fit_in_one_folder(caught, tmp_path):
    with locked(tmp_path), pytest.raises(SettingsError, match="another process"):
        Synthesizer(tmp_path, epsilon=8).fit(table(), "rows")
    assert not (tmp_path / "private").exists()


# ---- what later readers of the folder find ---------------------------------------------------


def test_a_frame_is_stored_privately_and_read_again(fitted):
    settings, key = read_settings(fitted.folder), bytes(16)
    stored = fitted.folder / "private" / "rows.jsonl"
    assert settings.data == str(stored.resolve()) and stat.S_IMODE(stored.stat().st_mode) == 0o600
    again = load(settings)
    check_same_rows(Run(settings, fitted.folder), again)  # what `dpsynth audit` asks first
    assert again.train.fingerprint(key) == fitted._splits.train.fingerprint(key)
    assert again.test.fingerprint(key) == fitted._splits.test.fingerprint(key)
    assert again.train.name == fitted._splits.train.name == "small table"  # the name it is charged under
    assert (
        json.loads((fitted.folder / "metrics.json").read_text())["epsilon"] == fitted.certificate["epsilon"]
    )


def test_only_the_columns_of_the_run_are_stored_whatever_their_types(caught, tmp_path):
    rows = table().assign(user=[f"u{i // 2}" for i in range(50)], secret="of no concern")
    rows["label"] = rows["label"].map({0: "negative", 1: 1}).astype(object)
    rows.loc[3, "text"] = 'two lines\nand a \u2028 "quote"'
    Synthesizer(tmp_path, unit="user", epsilon=8, columns="ignore").fit(
        rows.sample(frac=1, random_state=0), "rows"
    )
    settings, key = read_settings(tmp_path), bytes(16)
    assert load(settings).train.fingerprint(key) == caught.splits.train.fingerprint(key)
    assert "of no concern" not in (tmp_path / "private" / "rows.jsonl").read_text(encoding="utf-8")


def test_a_file_keeps_its_name(caught, tmp_path):
    table().to_csv(tmp_path / "mine.csv", index=False)
    synthesizer = Synthesizer(tmp_path / "run", epsilon=8).fit(tmp_path / "mine.csv")
    assert synthesizer.settings.data == read_settings(tmp_path / "run").data == str(tmp_path / "mine.csv")
    assert not list((tmp_path / "run" / "private").glob("*.jsonl"))


def test_a_refused_fit_leaves_the_folder_as_it_was(fitted, corpus):
    files = [
        fitted.folder / "settings.yaml",
        fitted.folder / "private" / "rows.jsonl",
        fitted.folder / "release" / "certificate.json",
    ]
    before = [path.read_bytes() for path in files]
    for changes, rows in (({"epsilon": 9}, table()), ({}, table().assign(text="other rows"))):
        with pytest.raises(PrivacyError, match="started with other"):
            Synthesizer(fitted.folder, **{**SMALL, "contamination_corpus": corpus, **changes}).fit(
                rows, "small table", progress=False
            )
    assert [path.read_bytes() for path in files] == before


# ---- sampling, reopening, evaluating ---------------------------------------------------------


def test_a_reopened_run_needs_settings_and_release_only(fitted, tmp_path):
    rows = fitted.sample(3, progress=False)
    assert (
        list(rows) == ["text", "label"] and len(rows) == 3 and fitted.sample(3, progress=False).equals(rows)
    )
    shutil.copytree(fitted.folder / "release", tmp_path / "copy" / "release")
    shutil.copy(fitted.folder / "settings.yaml", tmp_path / "copy")
    again = Synthesizer.load(tmp_path / "copy")
    assert (
        again.sample(3, progress=False).equals(rows) and again.certificate == fitted.certificate
    )  # other weights would be refused
    with pytest.raises(SettingsError, match="give reference="):
        again.evaluate(rows)
    real = table(30)
    made = pd.DataFrame(
        {"text": real["text"].str.upper(), "label": real["label"].map({0: "negative", 1: "positive"})}
    )
    with pytest.warns(UserWarning, match="'tiny' is no evidence"):
        numbers = again.evaluate(made, real)
    assert (
        numbers["mauve_size"] == 30 and numbers["utility_balanced_accuracy"] > 0.9
    )  # words are folded, so real labels are found again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.certificate
    with pytest.warns(UserWarning, match="evaluate: .* a classifier learns nothing about the label"):
        again.evaluate(made.assign(label=made["label"].to_numpy()[::-1]), real)
    with pytest.warns(UserWarning, match="beside this certificate: .*about the label"):
        again.certificate


@pytest.fixture
def named(caught, monkeypatch, tmp_path):
    """A pretended fit on a table with columns of other names; what it samples is its training table, what
    it evaluates goes to `caught`.
    """
    rows = pd.DataFrame({"id": range(50), "review": table()["text"], "stars": ["bad", "good"] * 25})

    def pretend(model, settings, fmt, folder, progress, certificate_hash):
        folder.mkdir(parents=True, exist_ok=True)
        made = pd.DataFrame({"index": rows["id"], "label": rows["stars"], "text": rows["review"]})
        made.drop(columns=[] if settings.label_column else "label").to_parquet(
            folder / "synthetic.parquet", index=False
        )
        return {"unfinished": 0.0}

    monkeypatch.setattr(module, "sample_to_file", pretend)
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda *found: (
            caught.__dict__.update(evaluated=found[:3]) or {"utility_verdict": None, "warnings": []}
        ),
    )
    names = {"text_column": "review", "label_column": "stars", "label_names": "bad,good"}
    return Synthesizer(tmp_path, **names, test_size=5, epsilon=8, columns="ignore").fit(rows, "films"), rows


def test_rows_have_the_columns_of_the_training_table(named, caught, tmp_path):
    synthesizer, rows = named
    assert synthesizer.sample(50).equals(rows[["review", "stars"]])
    unlabelled = Synthesizer(
        tmp_path / "unlabelled", text_column="review", label_column="", columns="ignore", epsilon=8
    ).fit(rows, "films")
    assert unlabelled.sample(50).equals(rows[["review"]])
    unlabelled.evaluate(rows)
    assert caught.evaluated[:2] == (rows["review"].tolist(), [""] * 50)


def test_rows_are_evaluated_under_the_names_of_the_table_and_of_the_released_files(named, caught):
    synthesizer, rows = named
    made = synthesizer.sample(50)
    (released,) = synthesizer.folder.rglob("synthetic.parquet")
    for given in (
        made,
        pd.read_parquet(released),
        rows,
        rows.assign(text="of no concern", stars=[0, 1] * 25),
    ):
        synthesizer.evaluate(given, rows)
        texts, labels, reference = caught.evaluated
        assert (texts, labels) == (rows["review"].tolist(), rows["stars"].tolist()) and len(reference) == 5


@pytest.mark.parametrize("missing", ["review", "stars"])
def test_a_missing_column_is_named(named, missing):
    synthesizer, rows = named
    for which, sides in (
        ("rows", (rows.drop(columns=missing), rows)),
        ("reference", (rows, rows.drop(columns=missing))),
    ):
        with pytest.raises(DataError, match=f"^{which}: no column '{missing}' among its 2; set .*$"):
            synthesizer.evaluate(*sides)


def test_rows_of_one_label(fitted):
    for label in ("negative", "positive"):
        assert set(fitted.sample(3, label=label, progress=False)["label"]) == {label}
    with pytest.raises(SettingsError, match="'neutral' is not one of negative, positive"):
        fitted.sample(3, label="neutral")
    with pytest.raises(SettingsError, match="0 rows were asked for"):
        fitted.sample(0)


def test_one_row_is_enough(fitted):
    assert len(fitted.sample(1, seed=3, progress=False)) == 1


def test_a_fit_that_was_killed_goes_on_from_the_shell(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpsynth.finetune.run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        Synthesizer(tmp_path / "mine", **SMALL).fit(table(), "mine", progress=False)
    monkeypatch.undo()
    assert main(["fit", str(tmp_path / "mine")]) == 0
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    (dataset,) = ledger.datasets()
    assert dataset.name == "mine" and [release.state for release in ledger.charged(dataset)] == ["finished"]


def test_what_needs_a_model_says_so(tmp_path):
    for call in (lambda s: s.sample(5), lambda s: s.certificate, lambda s: s.evaluate(table())):
        with pytest.raises(SettingsError, match="call fit first"):
            call(Synthesizer(tmp_path))
    with pytest.raises(SettingsError, match="not a run folder"):
        Synthesizer.load(tmp_path)
