"""One file on this machine that knows every release made from a data set."""

from .composition import *
from .datasets import *
from .events import *
from .file import *
from .releases import *
from .spending import *
from .store import *
from .views import *
