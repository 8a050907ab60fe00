"""The training step and a private fine-tuning in a run folder, resumable to the bit."""

from .clipping import *
from .estimates import *
from .loop import *
from .loss import *
from .prepare import *
from .run import *
from .trainer import *
