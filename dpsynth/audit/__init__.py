"""Attacks on what was released: they can refute an ε, they never confirm one."""

from .attacks import *
from .canaries import *
from .contamination import *
from .pictures import *
from .pool import *
from .replay import *
from .report import *
from .tests import *
from .words import *
