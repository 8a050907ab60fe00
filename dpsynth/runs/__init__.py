"""One experiment in its folder: what it may do, what it did, how it ended; and many of them.

Names are looked up when they are asked for: a table of results needs neither Keras nor JAX.
"""

import importlib

MODULES = (  # the light ones first
    "folder",
    "metrics",
    "status",
    "account",
    "run",
    "scores",
    "results",
    "table",
    "pictures",
    "configs",
    "plan",
    "execution",
    "sweep",
    "surveys",
    "budget",
    "memory",
    "cost",
    "stages",
    "findings",
    "promises",
    "audit_run",
)


def __getattr__(name):
    """A module of this part, or a public name of one."""
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    for module in () if name.startswith("__") else map(__getattr__, MODULES):
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
