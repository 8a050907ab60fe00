"""What all tests share: the environment, the place of the repository, and the command line as a function."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import collections
import pathlib
import tempfile

import pytest

os.environ["DPSYNTH_LEDGER"] = os.path.join(tempfile.mkdtemp(), "ledger.sqlite")  # never the ledger of whoever runs the tests

REPO = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])  # for processes that tests start

Outcome = collections.namedtuple("Outcome", "code out err")


@pytest.fixture(scope="session")
def repo():
    return REPO


@pytest.fixture
def dpsynth(capsys):
    """Run a command line in this process: exit code, stdout, stderr."""
    from dpsynth.cli import main

    def call(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

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
