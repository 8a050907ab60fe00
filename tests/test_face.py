"""`import dpsynth` is quick, and gives the names that most programs need."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import dpsynth

ERRORS = ("DpsynthError", "SettingsError", "DataError", "ModelError", "BudgetError", "PrivacyError")
NAMES = {"Synthesizer", "Settings", "load", "make_mechanism", "verify", "run_audit", "evaluate", *ERRORS}


def in_a_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_quick_and_loads_no_library():
    """The least of three is compared, so that a busy machine is no failure; Python's own start is not
    counted.
    """
    code = (
        "import sys, time; began = time.perf_counter(); import dpsynth; print(time.perf_counter() - began);"
        "print({'jax', 'keras', 'tensorflow', 'numpy', 'pandas', 'pydantic', 'scipy'} & {*sys.modules} or"
        " 'none')"
    )
    said = [in_a_process(code).split("\n") for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in said) < 0.5 and {loaded for _, loaded, *_ in said} == {
        "none"
    }


def test_settings_and_errors_load_no_model_library():
    code = (
        "import sys, dpsynth; dpsynth.Settings(epsilon=3); dpsynth.DataError;"
        "print({'jax', 'keras', 'tensorflow', 'pandas'} & {*sys.modules} or 'none')"
    )
    assert in_a_process(code) == "none\n"


def test_each_name_is_there_and_stays_what_it_is():
    assert set(dpsynth.__all__) == NAMES and NAMES <= {*dir(dpsynth)}
    before = {name: getattr(dpsynth, name) for name in NAMES}
    for package in ("audit", "certificate", "privacy.verify", "manifest", "evaluation", "data", "settings"):
        importlib.import_module(f"dpsynth.{package}")
    assert all(callable(found) for found in before.values())
    assert {name: getattr(dpsynth, name) for name in NAMES} == before


def test_no_name_is_that_of_a_module():
    places = {path.stem for path in pathlib.Path(dpsynth.__file__).parent.iterdir()}
    assert not NAMES & places and {"privacy", "settings", "manifest"} <= places


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dpsynth' has no attribute 'verfy'"):
        dpsynth.verfy
    with pytest.raises(ImportError):
        from dpsynth import no_such_name  # noqa: F401


def test_verify_checks_a_release_and_its_files():
    record = pathlib.Path(dpsynth.__file__).parent / "assets" / "records" / "demo" / "dp_ft"
    assert dpsynth.verify(record / "release" / "certificate.json").claims["epsilon"] < 10
