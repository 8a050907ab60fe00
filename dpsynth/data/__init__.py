"""Private rows come in from a file, a data set library or a table in memory, are checked, and split into units."""

from .checks import *
from .grids import *
from .libraries import *
from .loading import *
from .readers import *
from .records import *
from .splits import *
from .tables import *
from .tokens import *
