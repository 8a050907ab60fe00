"""A decode engine for any keras_hub language model: seeded for each sample, and resumable to the bit."""

from .choice import *
from .decode import *
from .products import *
from .prompts import *
from .rows import *
