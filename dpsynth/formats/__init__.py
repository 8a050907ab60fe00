"""How rows are written as text for a language model, and read back."""

from .format import *
from .making import *
from .text import *
