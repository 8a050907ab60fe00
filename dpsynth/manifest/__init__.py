"""Which files a certificate speaks of, that they are the files that lie there, and who says so."""

from .comparing import *
from .entries import *
from .keys import *
from .release import *
