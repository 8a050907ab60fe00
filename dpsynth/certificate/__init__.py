"""The statement that leaves with the data: what was protected, how well, and at what cost."""

from .audits import *
from .base_models import *
from .checks import *
from .curves import *
from .page import *
from .json_schema import *
from .statement import *
