"""Every decision of an experiment: names, types, defaults, and what is raised where one is wrong."""

from .environment import *
from .errors import *
from .flat import *
from .reading import *
from .resolved import *
from .themes import EXPERIMENT, THEMES, fields_table
