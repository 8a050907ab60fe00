"""Differentially private synthetic data with a guarantee anyone can check."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from dpsynth._version import __version__
