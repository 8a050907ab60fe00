"""Where rows come from: each generator is prepared, fitted and sampled from in the same way."""

from .fine_tuned import *
from .generator import *
from .making import *
from .prompted import *
from .real_rows import *
