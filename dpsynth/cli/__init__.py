"""The command line: its verbs, their options, and what they print."""

from .arguments import *
from .auditing import *
from .certificates import *
from .checking import *
from .counted import *
from .entry import *
from .models import *
from .parser import *
from .planning import *
from .printing import *
from .stages import *
from .sweeps import *
