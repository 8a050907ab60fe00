"""What is set around a process: Keras' backend, JAX's numbers and platform, the encoding of stdout, and how
it is called."""

import io
import os
import subprocess
import sys
import types

import pytest

from parts import MICRO, RUN
from dpsynth.models import load_model, load_tokenizer
from dpsynth.runs import survey
from dpsynth.runs import prepare_folder
from dpsynth.settings import SettingsError, check_backend
from dpsynth.synthesizer import Synthesizer

import jax


def process(*arguments, module="dpsynth", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        timeout=600,
        env={**os.environ, **environment},
    )


@pytest.fixture
def config(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"row {i},{'negative' if i % 2 else 'positive'}\n" for i in range(60))
    )
    path = tmp_path / "dp.yaml"
    path.write_text(f"data: {tmp_path / 'rows.csv'}\nbatch_size: 8\nepsilon: 8\nmodel: {MICRO}\n")
    return path


@pytest.fixture(params=["JAX_ENABLE_X64", "KERAS_BACKEND", "JAX_PLATFORMS", "keras"])
def wrong(request, monkeypatch):
    """A wrong environment, as this process sees it; the word that has to be in the message."""
    if request.param == "JAX_ENABLE_X64":
        jax.config.update("jax_enable_x64", True)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))
    elif request.param == "KERAS_BACKEND":
        monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    elif request.param == "keras":
        monkeypatch.setitem(
            sys.modules,
            "keras",
            types.SimpleNamespace(config=types.SimpleNamespace(backend=lambda: "tensorflow")),
        )
    else:

        def no_device():
            raise RuntimeError("Unknown backend: 'tpux'\nand more")

        monkeypatch.setattr(jax, "devices", no_device)
    return {"JAX_PLATFORMS": "device"}.get(request.param, request.param)


def test_a_wrong_environment_is_refused_by_everything_that_computes(wrong, config, refused, tmp_path):
    folder = prepare_folder(RUN, tmp_path / "run")
    for command in (["run", config, "--out", tmp_path / "runs"], ["check", config], ["fit", folder]):
        assert wrong in refused(*command)
    for call in (
        lambda: Synthesizer(),
        lambda: survey(RUN),
        lambda: load_model(MICRO),
        lambda: load_tokenizer.__wrapped__(MICRO),
    ):
        with pytest.raises(SettingsError, match=wrong):
            call()
    assert not (tmp_path / "runs").exists() and not list((folder / "private").iterdir())


@pytest.mark.parametrize("name, value", [("KERAS_BACKEND", "torch"), ("JAX_PLATFORMS", "tpux")])
def test_a_process_of_its_own_says_it_in_one_line(config, name, value):
    done = process("check", config, "--no-time", **{name: value})
    assert (
        done.returncode == 2
        and done.stderr.count(b"\n") == 1
        and f"error: environment variable {name}".encode() in done.stderr
    ), done.stderr
    assert done.stdout == b"" and value.encode() in done.stderr


def test_the_right_backend_is_no_matter():
    assert check_backend() is None


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_stdout_shows_what_it_can(encoding, monkeypatch, tmp_path):
    from dpsynth.cli import main

    for command in (
        ["settings"],
        ["results", "--records", "demo"],
        ["ledger"],
        ["--help"],
        ["results", "--records", "demo", "--format", "markdown"],
    ):
        stream = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
        assert main(command) == 0
        sys.stdout.flush()
        assert len(stream.getvalue()) > 10, command


def test_both_modules_are_the_command_line():
    for module in ("dpsynth", "dpsynth.cli"):
        done = process("settings", module=module, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and b"`epsilon`" in done.stdout and done.stderr == b""
    assert process("dance", module="dpsynth.cli").returncode == 2


def test_sampling_says_nothing_that_is_not_its_own(run):
    """TensorFlow has its say in a process that has set nothing to quiet it."""
    prepare_folder(RUN, run)
    kept = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "dpsynth", "sample", str(run), "--rows", "3"],
        capture_output=True,
        text=True,
        timeout=600,
        env=kept,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
