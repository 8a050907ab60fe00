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
        return np.asarray(hidden(tiny.model.trainable, tiny.model.frozen, tokens, mask))[0, :len(ids)]
    return states


def test_a_vector_is_the_mean_state_of_its_own_text(tiny, states):
    texts = ["A long story about nothing at all. " * 12, "Short.", "", "It was a dark and stormy night."]
    vectors, pooling = tiny(texts, False)
    assert vectors.shape == (4, tiny.model.hidden_dim) and vectors.dtype == np.float32 and pooling == "mean"
    for text, vector in zip(texts, vectors):
        np.testing.assert_allclose(vector, states(text).mean(0), atol=1e-3)


def test_last_pooling_is_the_last_state(tiny, states, monkeypatch):
    monkeypatch.setattr(evaluation, "load_embedder", lambda name: tiny.model)
    last = evaluation.embed(["It was a dark and stormy night."], "tiny", length=64, pooling="last", progress=False)[0]
    np.testing.assert_allclose(last, states("It was a dark and stormy night.")[-1], atol=1e-3)


def test_a_model_made_for_embedding_pools_by_itself(tiny, monkeypatch, tmp_path):
    import keras_hub
    from dpsynth.models import LanguageModel
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tiny.model.vocabulary_size, image_size=16, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=16,
        intermediate_dim=32, head_dim=8, vision_encoder=None, is_embedding_model=True, pooling_intermediate_dim=32, embedding_dim=12)
    parts = types.SimpleNamespace(preprocessor=types.SimpleNamespace(tokenizer=tiny.model.tokenizer), backbone=backbone,
                                  _flatten_layers=backbone._flatten_layers, trainable_variables=backbone.trainable_variables,
                                  non_trainable_variables=backbone.non_trainable_variables)
    monkeypatch.setattr(evaluation, "load_embedder", lambda name: LanguageModel(parts, name))
    for _ in range(2):  # computed, then from the cache
        vectors, pooling = evaluation.embed_with(evaluation.open_embedder("some_embedder", 64), ["a", "b c d"], tmp_path, False)
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
    evaluation.embed_with(fake, ["aa", "b", "a b"], tmp_path / "cache", False)  # the same characters, cut elsewhere
    assert fake.calls == 3
    other = Counting("other")
    evaluation.embed_with(other, texts, tmp_path / "cache", False)
    assert other.calls == 1
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert all(f.suffix == ".npy" and stat.S_IMODE(f.stat().st_mode) == 0o600 for f in (tmp_path / "cache").iterdir())


def test_a_cached_result_needs_no_model(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "load_embedder", lambda name: tiny.model)
    vectors = evaluation.embed(["a text"], "tiny", cache=tmp_path, progress=False)
    monkeypatch.setattr(evaluation, "load_embedder", lambda name: pytest.fail("loaded"))
    assert np.array_equal(evaluation.embed(["a text"], "tiny", cache=tmp_path, progress=False), vectors)


def test_length_pooling_and_weights_are_part_of_the_key(tmp_path):
    (tmp_path / "model.weights.h5").write_bytes(b"one")
    options = ((64, "mean"), (32, "mean"), (64, "last"))
    keys = lambda: [evaluation.cache_key(evaluation.open_embedder(str(tmp_path), *o), ["a"]) for o in options]
    before = keys()
    (tmp_path / "model.weights.h5").write_bytes(b"two")
    assert len({*before, *keys()}) == 6


def test_a_failed_write_leaves_no_result(tmp_path, monkeypatch):
    def half(file, array):
        file.write(b"\x93NUMPY")
        raise OSError("disk full")
    monkeypatch.setattr(evaluation.np, "save", half)
    with pytest.raises(OSError):
        evaluation.embed_with(Counting(), ["a"], tmp_path, False)
    assert not list(tmp_path.glob("*.npy"))


def test_no_texts_is_a_data_error():
    with pytest.raises(DataError, match="no texts"):
        evaluation.embed([], "tiny")


# ---- extras


@pytest.mark.parametrize("name, module, extra", [("sentence-transformers:all-MiniLM-L6-v2", "sentence_transformers", "embed"),
                                                 ("vertex:text-embedding-005", "google.genai", "vertex")])
def test_a_missing_extra_is_named(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install dpsynth\[{extra}\]"):
        evaluation.embed(["a"], name)


@pytest.mark.parametrize("name, module, extra", [("sentence-transformers:x", "sentence_transformers", "embed"), ("vertex:x", "google.genai", "vertex")])
def test_a_missing_extra_is_found_before_it_is_needed(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install dpsynth\[{extra}\]"):
        evaluation.open_embedder(name).check()


@pytest.fixture
def asked(monkeypatch):
    """The repositories that Hugging Face was asked for, with sentence-transformers installed or not."""
    repositories = []
    monkeypatch.setattr(evaluation, "_require", lambda *names: None)
    monkeypatch.setattr(evaluation, "check_hub", lambda subject, *names: repositories.append(names))
    return repositories


def test_a_sentence_embedder_is_looked_for_where_it_would_be_loaded_from(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("all-MiniLM-L6-v2", "BAAI/bge-small", "models/typo"):
        evaluation.open_embedder(f"sentence-transformers:{name}").check()
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"), ("BAAI/bge-small",), ("models/typo",)]
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
    evaluation.open_embedder("vertex:x").check()  # the client is content, and has looked for credentials itself
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
    with pytest.raises(evaluation.Unreachable, match="credentials were not found.*GOOGLE_CLOUD_PROJECT"):
        evaluation.open_embedder("vertex:x").check()
    monkeypatch.setitem(sys.modules, "google.auth", types.SimpleNamespace(default=lambda: None))
    evaluation.open_embedder("vertex:x").check()
    monkeypatch.setitem(sys.modules, "google.genai", types.SimpleNamespace(Client=refuse))
    with pytest.raises(evaluation.Unreachable, match="gcloud auth"):
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
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=SentenceTransformer))
    for length, used in ((64, 64), (500, 128)):
        vectors, pooling = evaluation.open_embedder("sentence-transformers:some/name", length)(["a", "b"], False)
        assert pooling == "model" and vectors.dtype == np.float32 and (vectors == used).all()


class Refusal(Exception):
    def __init__(self, code):
        super().__init__(f"{code} refused")
        self.code = code


def fake_vertex(monkeypatch, refusals=()):
    """A google.genai whose service refuses with these codes before it answers; returns the list of requests."""
    requests, refusals = [], list(refusals)

    def embed_content(model, contents, config):
        requests.append(list(contents))
        if refusals:
            raise Refusal(refusals.pop(0))
        return types.SimpleNamespace(embeddings=[types.SimpleNamespace(values=[float(len(t)), 1.0]) for t in contents])
    client = types.SimpleNamespace(models=types.SimpleNamespace(embed_content=embed_content))
    monkeypatch.setitem(sys.modules, "google.genai", types.SimpleNamespace(Client=lambda vertexai: client))
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: None)
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
    assert four.mean == pytest.approx(np.mean(four.scores)) and four.std == pytest.approx(np.std(four.scores, ddof=1))
    assert evaluation.mauve_repeated(p, q, size=200, trials=2, seed=8).scores != two.scores


def test_trials_draw_without_replacement_from_both_sides(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "mauve_score", lambda p, q, seed: drawn.append((p, q)) or 1.0)
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
    assert str(result) == f"{result.mean:.3f} ± 0.000 (1 trials of 90 texts)"


@pytest.mark.parametrize("p, q, message", [
    (gaussian(1), gaussian(50), "at least 2 synthetic"), (gaussian(50), gaussian(50, d=5), "different embedders"),
    (np.where(np.arange(50)[:, None] == 7, np.nan, gaussian(50)), gaussian(50), "row 7 of the synthetic")])
def test_vectors_that_cannot_be_compared(p, q, message):
    with pytest.raises(DataError, match=message):
        evaluation.mauve_repeated(p, q, size=50, trials=1, seed=0)


def test_only_the_advice_of_faiss_is_held_back(monkeypatch, capfd):
    import os
    import mauve

    def compute_mauve(**arguments):
        os.write(2, b"WARNING clustering 10 points to 2 centroids: please provide at least 78 training points\nsomething else\n")
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
    assert numbers == {"words_mean": pytest.approx(10 / 3), "words_median": 2.0, "distinct_1": pytest.approx(6 / 10),
                       "distinct_2": pytest.approx(5 / 7), "duplicate_texts": pytest.approx(1 / 3)}


def test_ngram_distance_is_total_variation():
    assert evaluation.ngram_distance(["a a a b"], ["a b b b"], 1) == pytest.approx(0.5)
    assert evaluation.ngram_distance(["a b", "c d"], ["c d", "a b"], 2) == 0  # no bigram across texts
    assert evaluation.ngram_distance(["a"], ["a b"], 2) == 1 and evaluation.ngram_distance(["a"], ["b"], 2) == 0


def test_ngram_distance_takes_linear_time():
    texts = [" ".join(str(20 * i + j) for j in range(20)) for i in range(20_000)]
    assert evaluation.ngram_distance(texts[::2], texts[1::2], 1) == pytest.approx(1)  # minutes if it were quadratic


def test_plot_lengths_is_a_figure():
    axes = evaluation.plot_lengths(["a b c"] * 10, ["a"] * 10).axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"synthetic", "reference"} and len(axes.patches) == 2


def test_utility_needs_labels_that_mean_something():
    test = records(200, seed=1)
    train = records(200)
    names = [NAMES[i] for i in test.labels]
    right = evaluation.train_on_synthetic(train.texts, [NAMES[i] for i in train.labels], test.texts, names)
    swapped = evaluation.train_on_synthetic(train.texts, [NAMES[1 - i] for i in train.labels], test.texts, names)
    assert right["accuracy"] == 1 and swapped["accuracy"] == 0 and right["num_train"] == 200
    assert right["majority"] == max(np.mean(test.labels), 1 - np.mean(test.labels))


@pytest.mark.parametrize("texts, labels", [(["a film"] * 4, ["x"] * 4), (["one", "two", "three", "four"], ["x", "y"] * 2)])
def test_a_classifier_that_cannot_be_trained_is_a_data_error(texts, labels):
    with pytest.raises(DataError):
        evaluation.train_on_synthetic(texts, labels, ["a"], ["x"])


# ---- evaluate


@pytest.fixture
def fake(monkeypatch):
    opened = []

    def open_embedder(name, length, pooling):
        opened.append(Counting(name))
        return opened[-1]
    monkeypatch.setattr(evaluation, "open_embedder", open_embedder)
    return opened


SMALL = Settings(num_samples=60, num_mauve_samples=50, num_mauve_trials=2, embedder="fake")


def test_evaluate_is_flat_and_json_able(fake, tmp_path):
    train, test = records(60), records(150, seed=1)
    labels = [NAMES[i] for i in train.labels]
    metrics = evaluation.evaluate(train.texts, labels, test, SMALL, tmp_path)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert 0 < metrics["mauve_mean"] < 1 and metrics["mauve_embedder"] == "fake" and metrics["mauve_pooling"] == "mean"
    assert (metrics["mauve_size"], metrics["mauve_trials"], len(metrics["mauve_scores"]), len(metrics["mauve_seeds"])) == (50, 2, 2, 2)
    assert metrics["utility_accuracy"] == 1 and metrics["statistics_size"] == 60 and "mauve2_mean" not in metrics
    assert any("below 1000" in line for line in metrics["warnings"])
    assert 0 <= metrics["unigram_distance_floor"] < 0.7


def test_the_reference_pool_is_as_large_as_the_sample(fake, monkeypatch):
    sizes, call = [], Counting.__call__
    monkeypatch.setattr(Counting, "__call__", lambda self, texts, progress: sizes.append(len(texts)) or call(self, texts, progress))
    evaluation.evaluate(records(60).texts, ["x"] * 60, records(150, seed=1), SMALL, None)
    assert sizes == [60, 60]


def test_a_second_embedder_is_reported_beside_the_first(fake):
    settings = SMALL.model_copy(update={"second_embedder": "other"})
    ours, real = records(60).texts, records(60, seed=1)
    metrics = evaluation.evaluate(ours, ["x"] * 60, real, settings, None)
    p, q = (Counting()(texts, False)[0] for texts in (ours, real.texts))
    expected = evaluation.mauve_repeated(p, q, size=50, trials=2, seed=settings.seed)
    assert metrics["mauve_embedder"] == "fake" and metrics["mauve2_embedder"] == "other"
    assert metrics["mauve_scores"] == metrics["mauve2_scores"] == list(expected.scores) and metrics["mauve_std"] == expected.std


@pytest.mark.parametrize("labels, change, told", [(["positive"] * 60, {}, True), (["positive"] * 60, {"label_column": ""}, False),
                                                  (["negative", "positive"] * 30, {"utility": False}, False)])
def test_utility_that_cannot_be_measured_is_none(fake, labels, change, told):
    metrics = evaluation.evaluate(records(60).texts, labels, records(60, seed=1), SMALL.model_copy(update=change), None)
    assert metrics["utility_accuracy"] is None and any("utility" in line for line in metrics["warnings"]) == told


def test_texts_without_any_common_word_are_reported_not_fatal(fake):
    texts = [f"{i}{'x' * i}" for i in range(60)]
    metrics = evaluation.evaluate(texts, ["negative", "positive"] * 30, records(60, seed=1), SMALL, None)
    assert metrics["utility_accuracy"] is None and any("utility not measured" in line for line in metrics["warnings"])


def test_nothing_to_evaluate_is_a_data_error(fake):
    with pytest.raises(DataError, match="0 synthetic"):
        evaluation.evaluate([], [], records(60), SMALL, None)


def test_cautions():
    independent = Settings(embedder="sentence-transformers:x")
    assert evaluation.cautions(5000, 10000, 10000, independent) == []
    assert any("all rows" in line for line in evaluation.cautions(5000, 5000, 5000, independent))
    assert any("not 5000" in line for line in evaluation.cautions(3000, 3000, 9000, independent))
    assert any("generator" in line for line in evaluation.cautions(5000, 10000, 10000, Settings()))
    assert any("sent to" in line for line in evaluation.cautions(5000, 10000, 10000, Settings(embedder="vertex:x")))


def test_importing_it_stays_light():
    code = ("import sys, dpsynth.evaluation; "
            "print({'mauve', 'faiss', 'torch', 'sentence_transformers', 'keras_hub', 'tensorflow'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
