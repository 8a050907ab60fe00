"""Line 4: a unit's gradient does not depend on its batch-mates."""

import numpy as np
import pytest

from parts import trainer
from dpsynth.finetune import example_loss, flatten
from dpsynth.settings import ModelError

import jax
import jax.numpy as jnp
import keras


def loss_of(model):
    """The compiled loss of one row, of its tokens, the length of its prompt and its own."""
    loss = jax.jit(lambda *of: example_loss(model, *of))
    return lambda *row: float(loss(model.trainable, model.frozen, *row))


def test_loss_is_normalised_by_the_rows_own_length(micro):
    row = micro.prompt_ids("[x]:") + micro.response_ids(["some words here"])[0]
    start = len(micro.prompt_ids("[x]:"))
    loss = loss_of(micro)
    values = [loss(jnp.array(row + [0] * (n - len(row))), start, len(row)) for n in (len(row), 40, 90)]
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    weights, tokens = (micro.trainable, micro.frozen), jnp.array([row[:-1]])
    forward = jax.jit(
        lambda tokens: micro.logits(*weights, micro.hidden(*weights, tokens, jnp.ones_like(tokens)))[0]
    )
    logp = np.asarray(jax.nn.log_softmax(forward(tokens)))
    expected = -np.mean([logp[i, row[i + 1]] for i in range(start - 1, len(row) - 1)])
    assert values[0] == pytest.approx(float(expected), abs=1e-4)


def test_large_vocabularies_are_scored_in_chunks_with_the_same_loss(micro, monkeypatch):
    row = jnp.array(
        micro.prompt_ids("[x]:") + micro.response_ids(["some words here, quite a few of them"])[0]
    )
    whole = loss_of(micro)(row, 4, len(row))
    for name in ("CHUNK_SCORES", "ALONE_SCORES"):
        monkeypatch.setattr(f"dpsynth.finetune.loss.{name}", 3 * micro.vocabulary_size)
    assert loss_of(micro)(row, 4, len(row)) == pytest.approx(whole, abs=1e-5)


def test_gradient_of_a_unit_is_unchanged_by_its_batch_mates(micro, store):
    one = trainer(micro, store)
    alone = flatten(one.gradient_sum(np.array([0])))
    for mates in ([1], [5, 1], [2, 3, 4, 5]):
        together = flatten(one.gradient_sum(np.array([0, *mates])))
        others = flatten(one.gradient_sum(np.array(mates)))
        assert (together == others + alone).all()


def test_layers_that_mix_examples_are_refused():
    from dpsynth.models import refuse_cross_example_layers

    with pytest.raises(ModelError, match="mixes the examples"):
        refuse_cross_example_layers(keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]))


def test_a_mixture_of_experts_is_refused():
    from keras_hub.models import MixtralBackbone

    from dpsynth.models import refuse_cross_example_layers

    backbone = MixtralBackbone(
        vocabulary_size=64,
        num_layers=1,
        num_query_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        num_key_value_heads=1,
        num_experts=2,
        top_k=1,
    )
    with pytest.raises(ModelError, match="mixes the examples"):
        refuse_cross_example_layers(backbone)
