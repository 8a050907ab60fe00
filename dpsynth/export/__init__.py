"""The fine-tuned model of a run as a folder that peft, transformers or keras_hub loads."""

from .families import *
from .folder import *
from .model_card import *
from .projections import *
from .to_keras import *
from .to_peft import *
from .to_transformers import *
from .tokenizer_files import *
