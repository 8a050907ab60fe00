"""keras_hub models as pure functions of their weights: from a name to a model and its released file."""

from .environment import *  # first: it refuses another backend before Keras is imported

from .adapter_file import *
from .adapters import *
from .devices import *
from .hubs import *
from .language_model import *
from .loading import *
from .presets import *
from .spelling import *
