"""What several test files build on: small mechanisms, trainers and rows."""

import tempfile

import pandas as pd

from dpsynth.certificate import base_model, make_certificate, released_files
from dpsynth.data import from_frame
from dpsynth.finetune import Trainer
from dpsynth.models import load_model
from dpsynth.privacy import Mechanism, Randomness, make_mechanism
from dpsynth.settings import Settings

import keras_hub

SECRET = bytes(range(32))


def one_layer(seed, vision=None):
    """A Gemma3 `CausalLM` of one layer with the bundled tokenizer: everything real but the size."""
    preprocessor = load_model("tiny", seed=seed).causal_lm.preprocessor
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=6144,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
        query_head_dim_normalize=True,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=64,
        vision_encoder=vision,
    )
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)


PLACE = tempfile.TemporaryDirectory()  # gone with this process
MICRO = f"{PLACE.name}/micro"
one_layer(seed=3).save_to_preset(MICRO)


def mechanism(**changes):
    return Mechanism(
        **{
            "num_units": 1000,
            "expected_batch_size": 50,
            "steps": 200,
            "noise_multiplier": 1.0,
            "delta": 1e-4,
            "target_epsilon": 20.0,
            **changes,
        }
    )


def banded(bands=4, **changes):
    return mechanism(
        num_units=1000, expected_batch_size=50, steps=40, bands=bands, noise_multiplier=2.0, **changes
    )


IMDB = Settings(epsilon=10, delta=1.5e-5, experiment="imdb")


def certified(mechanism, settings, base=None, **changes):
    """The certificate of a mechanism, whose model and files have some hashes."""
    files = {name: 64 * "0" for name in sorted(released_files(settings.label_prior))}
    return make_certificate(
        mechanism, settings, base=base or base_model("tiny", 64 * "0"), files=files, **changes
    )


def certificate_of(settings=IMDB, num_units=25000):
    return certified(make_mechanism(settings, num_units), settings)


SETTINGS = Settings(
    sequence_length=48, microbatch_size=4, batch_size=8, epochs=1, epsilon=8, learning_rate=0.01
)


def trainer(micro, store, settings=SETTINGS, run="run", secret=bytes(range(32)), **changes):
    made = Mechanism(
        **{
            "num_units": len(store),
            "expected_batch_size": 8,
            "steps": 4,
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            **changes,
        }
    )
    return Trainer(micro, store, settings, made, Randomness(secret, run))


def grouped(micro, store, units, settings=SETTINGS, **changes):
    made = Mechanism(
        **{
            "num_units": len(units),
            "expected_batch_size": 2,
            "steps": 3,
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "unit": "user",
            **changes,
        }
    )
    return Trainer(micro, store, settings, made, Randomness(bytes(32), "groups"), units)


RUN = Settings(
    model=MICRO,
    tuning="lora",
    lora_rank=8,
    lora_targets="value",
    sequence_length=32,
    batch_size=8,
    microbatch_size=8,
    epochs=0.4,
    epsilon=8,
    validation_size=4,
    prompt="[{label}]:",
    ledger="runs",
)


def splits(changed=None, settings=RUN):
    rows = [{"text": f"row {i} was {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]
    if changed:
        rows[0] = {"text": changed, "label": 1}
    return from_frame(pd.DataFrame(rows), settings, test=pd.DataFrame(rows[:10]))


def groups_of_rows(last):
    """Ten users with three rows each; the last one's rows are given."""
    rows = [
        {"text": f"row {i} was {'good' if i % 2 else 'bad'}", "label": i % 2, "user": f"u{i // 3}"}
        for i in range(27)
    ]
    return pd.DataFrame(rows + [{"text": text, "label": 1, "user": "u9"} for text in last])
