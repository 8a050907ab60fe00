"""What is reported while one waits: on a clock, in steps of several updates, and nothing else computed from
private rows."""

import re
import subprocess
import sys
import time

import pytest

from parts import trainer
from dpsynth import progress
from dpsynth.cli import main
from dpsynth.finetune import train
from dpsynth.progress import GRAIN, Progress, in_words, progress_line, reported_steps
from dpsynth.files import write_json
from dpsynth.runs import metrics, prepare_folder, read_status, timed
from dpsynth.settings import Settings


@pytest.mark.parametrize("total, begun", [(40, 0), (43, 0), (43, 13), (7, 0), (1, 0), (100, 98)])
def test_each_told_step_covers_several_updates_of_this_attempt(total, begun):
    seen = [reported_steps(done, total, begun) for done in range(begun, total + 1)]
    assert (
        seen == sorted(seen)
        and seen[-1] == total
        and all(now <= done for now, done in zip(seen, range(begun, total + 1)))
    )
    changes = [
        begun,
        *(done for done, (a, b) in zip(range(begun + 1, total), zip(seen, seen[1:])) if a != b),
        total,
    ]
    assert all(after - before >= GRAIN for before, after in zip(changes, changes[1:])) or len(changes) == 2


def test_what_is_shown_does_not_depend_on_how_long_each_update_took():
    """Two trainings whose updates took very different times, but in groups as long: the same line at each
    tick.
    """
    even, uneven = ([0.0, 8, 16, 24, 32], [0.0, 9.9, 17.1, 27.9, 32])
    lines = []
    for counts in (even, uneven):
        bar = Progress("fine-tune", 32, facts=lambda now: f"epsilon={now}")
        for tick, done in enumerate(counts):
            bar.done = int(done)
            lines.append(progress_line(bar.state_at(tick * 10.0)))
    assert lines[:3] == lines[5:8] and lines[1].startswith(
        "fine-tune, 8 of 32 updates, epsilon=8, about 30 s left"
    )


def test_time_left_is_a_mean_over_all_told_updates_and_rounded():
    bar = Progress("fine-tune", 400)
    assert bar.state_at(0.0)["left"] is None
    bar.done = 7
    assert bar.state_at(10.0)["left"] is None
    bar.done = 103
    assert (
        bar.state_at(50.0)["left"] == pytest.approx((400 - 96) * 50 / 96, abs=5)
        and bar.state_at(60.0)["left"] == bar.state_at(50.0)["left"] - 10
    )
    assert [in_words(s) for s in (3, 44, 100, 725, 5 * 3600.0)] == [
        "10 s",
        "40 s",
        "2 minutes",
        "12 minutes",
        "5 hours",
    ]


PUBLIC = r"fine-tune, (0|8|16|24) of 24 updates, sigma=1 epsilon=[\d.]+/20(, about (\d+ s|\d+ minutes) left)?"


def test_a_training_tells_updates_noise_and_epsilon_and_nothing_else(micro, store, tmp_path, monkeypatch):
    """Neither a count of clipped gradients, nor a loss, nor how large a batch was, nor a figure of a
    single update.
    """
    states = []
    monkeypatch.setattr(progress, "TICK", 0.02)
    token = progress.REPORT.set(states.append)
    one = trainer(micro, store, steps=24, target_epsilon=20.0, delta=1e-3)
    one.update = _fast(one)
    train(one, tmp_path / "checkpoint.npz", progress=False)
    progress.REPORT.reset(token)
    assert states[-1]["done"] == 24 and len({state["done"] for state in states}) >= 2
    for state in states:
        assert re.fullmatch(PUBLIC, progress_line(state)), state
        assert set(state) == {"stage", "done", "total", "unit", "facts", "left"}


def _fast(one):
    """An update that draws nothing, clips as many gradients as it likes, and takes times of its own."""

    def update():
        one.notes = one.notes + [one.session.step * 3 + 1, 0]
        one.session.step += 1
        time.sleep(0.001 + 0.01 * (one.session.step % 3))

    return update


def test_files_of_a_run_are_written_at_ticks_only(tmp_path, monkeypatch):
    """Updates come at any time; the file beside them is written at multiples of the tick."""
    monkeypatch.setattr(progress, "TICK", 0.2)
    written = []
    monkeypatch.setattr(
        metrics,
        "write_json",
        lambda path, value: written.append((time.monotonic(), path.name, value)) or write_json(path, value),
    )
    with timed(tmp_path, "fit"):
        began = time.monotonic()
        with Progress("fine-tune", 64, show=False) as bar:
            while bar.done < 64:
                time.sleep(0.013)
                bar.update()
    seen = [
        (at - began, value) for at, name, value in written if name == ".progress.json" and "done" in value
    ]
    assert len(seen) >= 4 and all(
        value["done"] % GRAIN == 0 and value["updates"] == {"done": value["done"], "total": 64}
        for _, value in seen
    )
    assert all((at + 0.01) % 0.2 < 0.15 for at, _ in seen[:-1]) and not (tmp_path / ".progress.json").exists()


def test_no_terminal_gets_a_line_a_minute(capsys):
    bar = Progress("sample", 500, unit="rows", grain=1)
    for tick in range(14):
        bar.done = tick * 7
        bar._show_state(tick * 10.0)
    assert capsys.readouterr().err.splitlines() == [
        "sample, 42 of 500 rows, about 11 minutes left",
        "sample, 84 of 500 rows, about 10 minutes left",
    ]


def test_results_watch_shows_how_far_and_ends_with_the_runs(tmp_path, monkeypatch, capsys):
    folder = prepare_folder(Settings(experiment="a"), tmp_path / "a")
    write_json(
        folder / ".progress.json",
        {"stage": "fit", "done": 16, "total": 40, "unit": "updates", "facts": "epsilon=1/8", "left": 120.0},
    )
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    write_json(
        folder / "status.json",
        {"state": "running", "reason": "", "started": progress.now(), "pid": other.pid},
    )
    assert read_status(folder)["reason"] == "fit, 16 of 40 updates, epsilon=1/8, about 2 minutes left"

    def end(seconds):
        other.kill()
        other.wait()

    monkeypatch.setattr("time.sleep", end)
    assert main(["results", str(tmp_path), "--watch"]) == 0
    out = capsys.readouterr().out
    assert (
        "running: fit, 16 of 40 updates" in out
        and "killed" in out
        and "running" not in out.partition("killed")[2]
    )
    assert main(["results", "--records", "demo", "--watch"]) == 2
