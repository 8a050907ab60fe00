"""Private rows come in, are checked, and are split into units."""

from .checks import *
from .grids import *
from .libraries import *
from .loading import *
from .readers import *
from .records import *
from .splits import *
from .tables import *
from .tokens import *
