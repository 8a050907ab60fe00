"""One mechanism from which the batches, the clipping, the noise and the accounting all follow."""

from .accounting import *
from .correlated import *
from .counts import *
from .identity import *
from .making import *
from .mechanism import *
from .randomness import *
from .session import *
