"""GGUF files of the Gemma3 and Llama families as presets; Gemma3 270M without an account."""

from .architectures import *
from .conversion import *
from .gguf_file import *
from .origin import *
from .packages import *
from .pieces import *
from .tokenizers import *
from .vocabulary import *
