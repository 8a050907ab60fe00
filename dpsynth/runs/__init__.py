"""One experiment in its folder: what it may do, what it did, how it ended; and many of them.

Names are looked up when they are asked for: a table of results needs neither Keras nor JAX.
"""

from dpsynth import _names_of

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

__getattr__ = _names_of(__name__, MODULES)
