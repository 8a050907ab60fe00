"""One file on this machine that knows every release made from a data set."""

from .composition import *
from .datasets import *
from .events import *
from .file import *
from .ledger import *
from .releases import *
from .spending import *
from .views import *
