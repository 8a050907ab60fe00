"""Differentially private synthetic data with a guarantee anyone can check.

The names below are what most programs need. They are looked up when they are asked for: `import dpsynth`
loads neither Keras nor JAX.
"""

import importlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from dpsynth._version import __version__

FACE = {  # name -> (module, its name there); none is the name of a module of the package
    "Synthesizer": ("synthesizer", "Synthesizer"),
    "Settings": ("settings", "Settings"),
    "load": ("data", "load"),
    "make_mechanism": ("privacy", "make_mechanism"),
    "verify": ("manifest", "verify_release"),
    "run_audit": ("audit", "audit_files"),
    "evaluate": ("evaluation", "evaluate"),
    **{
        name: ("settings", name)
        for name in (
            "DpsynthError",
            "SettingsError",
            "DataError",
            "ModelError",
            "BudgetError",
            "PrivacyError",
        )
    },
}
__all__ = [*FACE]


def _names_of(package, modules):
    """The `__getattr__` of a part whose modules are imported, in this order, once a name is asked for."""

    def find(name):
        if name in modules:
            return importlib.import_module(f".{name}", package)
        for module in () if name.startswith("__") else map(find, modules):
            if name in module.__all__:
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def __getattr__(name):
    """What stands behind a name of the face."""
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, theirs = FACE[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), theirs)


def __dir__():
    return sorted({*globals(), *FACE})
