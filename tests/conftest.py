"""What all tests share: the environment, the place of the repository, and the command line as a function."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
for library in (
    "OMP",
    "OPENBLAS",
):  # a process for each core: threads that wait for one another would take the time of the other tests
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import collections
import pathlib
import tempfile
import types

import pytest

os.environ["DPSYNTH_COMPILE_CACHE"] = (
    "off"  # each test compiles what it runs, and leaves nothing in the cache of whoever runs it
)
os.environ["DPSYNTH_LEDGER"] = os.path.join(
    tempfile.mkdtemp(), "ledger.sqlite"
)  # never the ledger of whoever runs the tests

REPO = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
)  # for processes that tests start

Outcome = collections.namedtuple("Outcome", "code out err")


LONG = ("test_kill.py", "test_notebooks.py", "test_cli.py")


def pytest_collection_modifyitems(items):
    """The longest files come first, so that none of them is left to run alone at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def repo():
    return REPO


@pytest.fixture
def dpsynth(capfd):
    """Run a command line in this process: exit code, and all that reached file descriptors 1 and 2, from
    libraries in C++ too.
    """
    from dpsynth.cli import main

    def call(*arguments):
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def refused(dpsynth):
    """Run a command line that must be refused; returns the one line that says why."""

    def call(*arguments):
        code, _, err = dpsynth(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture(scope="module")
def micro():
    """The model of `parts.MICRO`, loaded anew for each file."""
    from parts import MICRO

    from dpsynth.models import load_model

    return load_model(MICRO, seed=3)


@pytest.fixture(scope="module")
def store(micro, tmp_path_factory):
    """The tokens of 24 short rows."""
    from dpsynth.data import TokenStore

    texts = [
        "short",
        "a rather longer text about nothing at all " * 2,
        "x y z",
        "one more row of words",
        "ok",
        "the end " * 9,
    ] * 4
    prompt = micro.prompt_ids("[x][positive]:")
    return TokenStore.write(
        tmp_path_factory.mktemp("store") / "tokens", ((prompt, ids) for ids in micro.response_ids(texts))
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished private run on forty rows."""
    from parts import RUN, splits

    from dpsynth.finetune import finetune_run
    from dpsynth.runs.run import Run

    folder = tmp_path_factory.mktemp("runs") / "dp"
    finetune_run(Run(RUN, folder), splits(), progress=False)
    return folder


@pytest.fixture
def caught(monkeypatch):
    """What `fit` hands to the training, which does not take place."""
    from dpsynth import synthesizer as module

    found = types.SimpleNamespace()

    def pretend(run, splits, progress):
        found.__dict__.update(settings=run.settings, splits=splits)
        return types.SimpleNamespace(model="model")

    monkeypatch.setattr(module, "fit_stage", pretend)
    monkeypatch.setattr(module, "survey", lambda settings, load: None)
    monkeypatch.setattr(module, "announce", lambda *run: None)
    return found
