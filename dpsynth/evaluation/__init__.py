"""How close are synthetic texts to real ones, and of what use are they?"""

from .batches import *
from .cache import *
from .embedders import *
from .mauve import *
from .metrics import *
from .texts import *
from .usefulness import *
