"""How close are synthetic texts to real ones, and of what use are they?

Names are looked up when they are asked for: a table of results needs the verdicts of `usefulness`, and
neither Keras nor JAX.
"""

from dpsynth import _names_of

MODULES = ("usefulness", "batches", "texts", "mauve", "embedders", "cache", "metrics")  # the light ones first

__getattr__ = _names_of(__name__, MODULES)
