"""What is known before a run: embedders that cannot be loaded, and how much memory it will need."""

import pytest

from parts import RUN, splits
from dpsynth import finetune, generators, models, runs
from dpsynth.runs import memory
from dpsynth.finetune import make_plain_sum, make_private_sum
from dpsynth.formats import make_format
from dpsynth.models import LanguageModel, Unreachable, by_shapes, load_model, setup_tuning
from dpsynth.privacy import Mechanism, Randomness, Session
from dpsynth.settings import ModelError, Settings, SettingsError

import jax
import jax.numpy as jnp
import numpy as np


def survey(lenient=False, **changes):
    return runs.survey(
        RUN.model_copy(update={"experiment": "x", **changes}),
        lenient=lenient,
        load=lambda settings: splits(settings=settings),
    )


def test_a_model_that_cannot_be_sampled_is_refused_before_it_is_paid_for(monkeypatch):
    monkeypatch.setattr(
        LanguageModel, "empty_cache", lambda self, batch, length: jnp.zeros((batch, 4))
    )  # as of a recurrent model
    with pytest.raises(ModelError, match="x: model '.*micro': its cache is not a list of positions"):
        survey()


# ---- embedders


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("dpsynth.evaluation.embedders._require", lambda *names: None)
    monkeypatch.setattr(models.hubs, "in_hub_cache", lambda repository: False)
    monkeypatch.setattr(
        models.hubs, "_refusal", lambda repository: ConnectionError("Name or service not known")
    )


def test_training_rows_are_not_sent_to_a_service_unasked():
    with pytest.raises(
        SettingsError,
        match="^x: setting send_training_rows: real_train would send training rows to the service 'vertex:x'",
    ):
        survey(generator="real_train", embedder="vertex:x")


@pytest.mark.parametrize("setting", ["embedder", "second_embedder"])
def test_an_embedder_out_of_reach_stops_a_run_and_is_noted_by_a_check(no_network, setting):
    wrong = {setting: "sentence-transformers:all-MiniLM-L6-v2"}
    with pytest.raises(Unreachable, match="^x: embedder .* Hugging Face cannot be reached"):
        survey(**wrong)
    assert [
        line
        for line in survey(lenient=True, **wrong).unknown
        if "all-MiniLM-L6-v2" in line and "cannot be reached" in line
    ]


@pytest.mark.parametrize("name", ["sentence-transformers:./typo", "no-such", "./no/such"])
def test_an_embedder_that_is_nowhere_stops_a_check_too(no_network, name):
    for lenient in (False, True):
        with pytest.raises(ModelError) as raised:
            survey(lenient, second_embedder=name)
        assert type(raised.value) is ModelError


# ---- memory


SHAPE = Settings(tuning="lora", lora_rank=4, microbatch_size=4, sequence_length=96, epsilon=8)
MECHANISM = Mechanism(num_units=1000, expected_batch_size=64, steps=10, noise_multiplier=1.0, delta=1e-5)


def planned(settings):
    """Bytes that XLA plans for what is neither weights nor batch, while a microbatch is summed; nothing
    runs.
    """
    model = load_model("tiny")
    setup_tuning(model, settings)
    summed = (
        make_private_sum(model, Session(MECHANISM, Randomness(bytes(32), "x")))
        if settings.private
        else make_plain_sum(model)
    )
    shape, units = jax.ShapeDtypeStruct, settings.microbatch_size
    total = [shape(array.shape, "int32" if settings.private else "float32") for array in model.trainable]
    batch = {
        "tokens": shape((units, 1, settings.sequence_length), "int32"),
        **{f"{n}_length": shape((units, 1), "int32") for n in ("prompt", "total")},
    }
    return (
        summed.lower(total, shape((2,), "int32"), model.trainable, model.frozen, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def estimated(settings):
    """The same by `estimate_memory`."""
    total, trained = models.count_parameters(settings)
    alone = (
        runs.LIBRARY_BYTES
        + runs.functions_compiled(settings) * runs.COMPILED
        + 4 * total
        + 16 * trained
    )
    return (
        runs.estimate_memory(settings.model_copy(update={"sample_batch_size": 1}), total, trained) - alone
    )


@pytest.mark.parametrize(
    "one_by_one, changes",
    [(True, {}), (False, {"tuning": "full"}), (False, {"epsilon": float("inf")})],
    ids=str,
)
def test_memory_is_what_the_compiler_plans_within_a_factor_of_two(monkeypatch, one_by_one, changes):
    for module in (finetune.loss, finetune.clipping, memory):
        monkeypatch.setattr(module, "one_by_one", lambda: one_by_one)
    settings = SHAPE.model_copy(update=changes)
    assert 0.5 < planned(settings) / estimated(settings) < 2


def test_one_unit_at_a_time_needs_memory_once(monkeypatch):
    many = SHAPE.model_copy(update={"microbatch_size": 400})
    assert estimated(many) == estimated(SHAPE)
    monkeypatch.setattr(memory, "one_by_one", lambda: False)
    assert estimated(many) == pytest.approx(100 * estimated(SHAPE))
    assert estimated(SHAPE.model_copy(update={"unit": "user", "max_records_per_unit": 3})) > 2.5 * estimated(
        SHAPE
    )


def test_computing_again_saves_memory_on_accelerators_only(monkeypatch):
    again = SHAPE.model_copy(update={"rematerialize": True})
    assert estimated(again) == estimated(SHAPE)
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    assert estimated(again) < estimated(SHAPE) / 2


def test_sampling_counts_the_cache_of_each_row():
    cached = by_shapes(SHAPE, lambda model: runs.sampling_bytes(model, SHAPE))
    prompted = SHAPE.model_copy(update={"generator": "prompt", "sample_batch_size": 64})
    grown = prompted.model_copy(update={"sample_batch_size": 65})
    assert runs.estimate_memory(grown, 10, 0) - runs.estimate_memory(prompted, 10, 0) == cached
    model = load_model("tiny")
    assert cached > sum(array.nbytes for array in jax.tree.leaves(model.empty_cache(1, 96)))


# ---- real rows in the place of generated ones


def test_real_rows_are_cut_where_generated_ones_would_be():
    tokenizer, fmt = models.load_tokenizer(models.base_name(RUN)), make_format(RUN)
    prompts = [1 + len(tokenizer([prompt])[0]) for prompt in fmt.prompts]
    settings = RUN.model_copy(
        update={"generator": "real_train", "num_samples": 40, "sequence_length": max(prompts) + 3}
    )
    whole, cut = (
        generators.real_rows(settings.model_copy(update={"cut_real_rows": wanted}), splits(settings=settings))
        for wanted in (False, True)
    )
    lengths = np.array([len(tokenizer([text])[0]) for text in cut.texts])
    room = settings.sequence_length - np.array(prompts)[cut.labels]
    assert len(cut) == 40 and cut.labels.tolist() == whole.labels.tolist()
    assert (
        all(long.startswith(short) for long, short in zip(whole.texts, cut.texts))
        and whole.texts != cut.texts
    )
    assert (lengths <= room).all() and (lengths == room).any()
