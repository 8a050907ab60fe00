"""How close are synthetic texts to real ones, and of what use are they?

Names are looked up when they are asked for: a table of results needs the verdicts of `usefulness`, and
neither Keras nor JAX.
"""

import importlib

MODULES = ("usefulness", "batches", "texts", "mauve", "embedders", "cache", "metrics")  # the light ones first


def __getattr__(name):
    """A module of this part, or a public name of one."""
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    for module in () if name.startswith("__") else map(__getattr__, MODULES):
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
