"""What all tests share: the environment, the place of the repository, and the command line as a function."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import collections
import pathlib
import tempfile

import pytest

os.environ["DPSYNTH_LEDGER"] = os.path.join(tempfile.mkdtemp(), "ledger.sqlite")  # never the ledger of whoever runs the tests

REPO = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])  # for processes that tests start

Outcome = collections.namedtuple("Outcome", "code out err")


LONG = ("test_kill.py", "test_notebooks.py", "test_cli.py")


def pytest_collection_modifyitems(items):
    """The longest files come first, so that none of them is left to run alone at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def repo():
    return REPO


@pytest.fixture
def dpsynth(capfd):
    """Run a command line in this process: exit code, and all that reached file descriptors 1 and 2, from libraries in C++ too."""
    from dpsynth.cli import main

    def call(*arguments):
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def refused(dpsynth):
    """Run a command line that must be refused; returns the one line that says why."""

    def call(*arguments):
        code, _, err = dpsynth(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture(scope="module")
def micro():
    """A Gemma3 of one layer with the bundled tokenizer: everything real but the size."""
    from dpsynth.models import LanguageModel, load_model  # before keras: dpsynth selects Keras' JAX backend
    import keras
    import keras_hub

    keras.utils.set_random_seed(3)
    preprocessor = load_model("tiny").causal_lm.preprocessor
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=6144, image_size=16, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=16, intermediate_dim=32, head_dim=8,
        query_head_dim_normalize=True, use_query_key_norm=True, use_post_ffw_norm=True, use_post_attention_norm=True,
        use_sliding_window_attention=True, sliding_window_size=64, vision_encoder=None)
    return LanguageModel(keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor), "micro")


@pytest.fixture(scope="module")
def store(micro, tmp_path_factory):
    """The tokens of 24 short rows."""
    from dpsynth.data import TokenStore

    texts = ["short", "a rather longer text about nothing at all " * 2, "x y z", "one more row of words", "ok", "the end " * 9] * 4
    prompt = micro.prompt_ids("[x][positive]:")
    return TokenStore.write(tmp_path_factory.mktemp("store") / "tokens", ((prompt, ids) for ids in micro.response_ids(texts)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished private run on forty rows."""
    from parts import RUN, splits

    from dpsynth.finetune import finetune_run

    folder = tmp_path_factory.mktemp("runs") / "dp"
    finetune_run(RUN, splits(), folder, progress=False)
    return folder
