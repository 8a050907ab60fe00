"""A grammar that writes amateur reviews, so that every example runs without downloading anything."""

from .works import DOMAINS, LABELS
from .writing import *
