"""Models as functions: families that also see, presets that cannot be fetched, several devices, less
memory."""

import functools
import http.server
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from parts import MICRO, SETTINGS, one_layer, trainer
from dpsynth import finetune, models
from dpsynth.data import TokenStore
from dpsynth.models import LanguageModel, load_model, setup_tuning
from dpsynth.runs.run import Run
from dpsynth.settings import ModelError, Settings

import jax
import jax.numpy as jnp
import keras
import keras_hub


@pytest.fixture(scope="module")
def seeing():
    """A Gemma3 with a vision encoder, as the large presets have one, of one layer each."""
    keras.utils.set_random_seed(5)
    vision = keras_hub.models.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        output_dim=16,
    )
    return LanguageModel(one_layer(seed=5, vision=vision), "seeing")


def test_a_model_that_sees_reads_text_alone(seeing):
    tokens = jnp.array([seeing.prompt_ids("The play was better than I had feared")], "int32")
    weights = seeing.trainable, seeing.frozen
    whole = jax.jit(lambda *of: seeing.logits(*of, seeing.hidden(*of, tokens, jnp.ones_like(tokens))))(
        *weights
    )
    step = jax.jit(seeing.step)
    first, cache = step(*weights, tokens[:, :4], seeing.empty_cache(1, tokens.shape[1]), 0)
    second, _ = step(*weights, tokens[:, 4:], cache, 4)
    assert float(jnp.abs(jnp.concatenate([first, second], 1) - whole).max()) < 1e-3


def test_a_model_that_sees_is_fine_tuned(seeing, tmp_path):
    prompt = seeing.prompt_ids("[x][positive]:")
    store = TokenStore.write(
        tmp_path / "tokens",
        ((prompt, ids) for ids in seeing.response_ids(["a film", "another one", "and a third"] * 8)),
    )
    setup_tuning(
        seeing, SETTINGS.model_copy(update={"tuning": "lora", "lora_rank": 1, "lora_targets": "query,value"})
    )
    one = trainer(seeing, store)
    before = one.trainable
    one.update()
    assert len(before) == 4 and all(np.isfinite(a).all() for a in one.trainable)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, one.trainable))


KAGGLE = (
    "Preset gemma3_instruct_12b has no config.json. Make sure the URI or directory you are "
    "trying to load is a valid KerasHub preset"
)


@pytest.mark.parametrize(
    "name, error, environment, advice",
    [
        (
            "gemma3_instruct_1b",
            ConnectionError("Temporary failure in name resolution"),
            {"KAGGLE_API_TOKEN": "x"},
            "Kaggle cannot be reached",
        ),
        (
            "gemma3_instruct_1b",
            FileNotFoundError(KAGGLE),
            {},
            "no Kaggle credentials found: set KAGGLE_USERNAME and KAGGLE_KEY",
        ),
        (
            "gemma3_instruct_1b",
            FileNotFoundError(KAGGLE),
            {"KAGGLE_USERNAME": "x"},
            "no Kaggle credentials found",
        ),
        (
            "gemma3_instruct_1b",
            FileNotFoundError(KAGGLE),
            {"KAGGLE_USERNAME": "x", "KAGGLE_KEY": "y"},
            "accept the terms",
        ),
        (
            "kaggle://keras/gemma3/keras/x",
            ValueError("403 Client Error"),
            {"KAGGLE_API_TOKEN": "x"},
            "accept the terms on the model's page on kaggle",
        ),
    ],
)
def test_a_preset_that_cannot_be_fetched_says_what_is_missing(
    monkeypatch, tmp_path, name, error, environment, advice
):
    for key in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    for key, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(key, value)

    def refuse(*args, **kwargs):
        raise ValueError("cannot be loaded") from error

    monkeypatch.setattr(keras_hub.models.CausalLM, "from_preset", refuse)
    with pytest.raises(models.Unreachable, match=advice) as raised:
        load_model(name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hugging Face on this machine: `hub(status, code)` is what it answers from then on, in the headers
    that the real one uses.
    """
    answer = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    yield lambda status, code="": answer.update(status=status, code=code)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "status, code, token, kind, told",
    [
        (401, "GatedRepo", "", models.Unreachable, "no Hugging Face credentials found: set HF_TOKEN"),
        (
            403,
            "GatedRepo",
            "hf_x",
            models.Unreachable,
            "accept the terms on the model's page on huggingface.co",
        ),
        (401, "", "hf_x", models.Unreachable, "does not accept these credentials"),
        (404, "RepoNotFound", "hf_x", ModelError, "has no such model"),
        (401, "RepoNotFound", "", ModelError, "check the name, or set HF_TOKEN"),
        (503, "", "", models.Unreachable, "cannot be reached from this machine"),
    ],
)
def test_a_hub_that_refuses_is_understood(hub, monkeypatch, status, code, token, kind, told):
    hub(status, code)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match=told) as raised:
        load_model("hf://google/gemma-3-1b-it")
    assert (
        type(raised.value) is kind
        and "\n" not in str(raised.value)
        and "has no config.json" not in str(raised.value)
    )


@pytest.mark.parametrize("token", ["", "hf_x"])
def test_a_hub_that_cannot_be_reached_is_the_network_with_and_without_a_token(hub, monkeypatch, token):
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    began = time.monotonic()
    with pytest.raises(
        models.Unreachable, match="Hugging Face cannot be reached from this machine"
    ) as raised:
        load_model("hf://google/gemma-3-1b-it")
    assert time.monotonic() - began < 2 * models.PROBE_SECONDS and "credentials" not in str(raised.value)


def test_a_hub_that_has_the_model_is_not_in_the_way(hub):
    for status, code in ((200, ""), (404, "EntryNotFound")):
        hub(status, code)
        models.check_hub("it", "some/model")
    hub(404, "RepoNotFound")
    with pytest.raises(ModelError, match="^it cannot be loaded: Hugging Face has no such model"):
        models.check_hub("it", "some/model", "model")
    with pytest.raises(ModelError, match="cannot be the name of a Hugging Face repository"):
        models.check_hub("it", "a/b/c")


def test_what_is_in_the_cache_needs_no_hub(monkeypatch, tmp_path):
    cached = tmp_path / "models--some--model" / "snapshots" / ("1" * 40)
    cached.mkdir(parents=True)
    (cached.parent.parent / "refs").mkdir()
    (cached.parent.parent / "refs" / "main").write_text("1" * 40)
    (cached / "config.json").write_text("{}")
    monkeypatch.setattr(models.hubs, "_refusal", lambda repository: ConnectionError("no network"))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path),
    )
    with pytest.raises(models.Unreachable, match="no network"):
        models.check_hub("it", "some/model")  # a configuration alone does not load
    (cached / "model.safetensors").write_bytes(b"")
    models.check_hub("it", "some/model")


def test_an_embedder_folder_without_weights_is_found_without_loading(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(models.TINY, folder)
    models.check_embedder_preset(str(folder))
    models.check_embedder_preset.cache_clear()
    (folder / "model.weights.h5").unlink()
    with pytest.raises(ModelError, match="no weights"):
        models.check_embedder_preset(str(folder))


def test_a_preset_is_the_same_whatever_its_card_says_and_another_with_other_weights(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(models.TINY, folder)
    same = models.preset_hash("tiny")
    (folder / "README.md").write_text("another card")
    (folder / "pretraining.json").unlink()
    assert models.preset_hash(str(folder)) == same and models.preset_hash("gemma3_instruct_1b") == ""
    with (folder / "model.weights.h5").open("ab") as weights:
        weights.write(b"0")
    assert models.preset_hash(str(folder)) != same


def test_computing_again_keeps_less_and_gives_the_same_gradient(micro, store, monkeypatch):
    indices = np.arange(8)
    plain = trainer(micro, store).gradient_sum(indices)
    seen = []
    monkeypatch.setattr(
        jax,
        "checkpoint",
        lambda call, checkpoint=jax.checkpoint: seen.append(call) or checkpoint(call),
    )
    micro.rematerialize = True
    again = trainer(micro, store).gradient_sum(indices)
    micro.rematerialize = False
    assert seen and not any("call" in vars(block) for block in micro.causal_lm.backbone.transformer_layers)
    scale = max(float(jnp.abs(a).max()) for a in plain)
    assert all(float(jnp.abs(a - b).max()) <= 1e-4 * scale for a, b in zip(plain, again))


ON_DEVICES = """
import sys
import numpy as np
import jax
from dpsynth.evaluation import open_embedder
from dpsynth.sampling import sample_stream
from dpsynth.data import TokenStore
from dpsynth.finetune import Trainer
from dpsynth.models import load_model, setup_tuning
from dpsynth.runs import device_name
from dpsynth.privacy import Mechanism, Randomness
from dpsynth.settings import Settings

folder, preset, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert len(jax.devices()) == count and device_name().endswith(f"× {count}")
settings = Settings(sequence_length=32, microbatch_size=3, tuning="lora", lora_rank=2, learning_rate=0.01)
model = load_model(preset, seed=1)
setup_tuning(model, settings)
prompt = model.prompt_ids("[x]:")
texts = [f"Row {i} is the best of them." for i in range(20)]
store = TokenStore.write(f"{folder}/tokens{count}", ((prompt, ids) for ids in model.response_ids(texts)))
made = Mechanism(num_units=20, expected_batch_size=8, steps=2, noise_multiplier=0.5, delta=1e-2,
                 target_epsilon=50.0)
trainer = Trainer(model, store, settings, made, Randomness(bytes(32), "devices"))
assert count == 1 or len(trainer._batch(np.arange(4), 32)["tokens"].sharding.device_set) == count
total = [np.asarray(t) for t in trainer.gradient_sum(np.arange(7))]
trainer.update()
trainer.save(f"{folder}/checkpoint{count}.npz")
trainer.restore(f"{folder}/checkpoint{count}.npz")
trainer.update()
weights = [np.asarray(t) for t in trainer.trainable]
model.assign(trainer.trainable)
rows = list(sample_stream(model, ["[x]:", "[y]:"], np.arange(10) % 2, seed=0, max_length=16, batch_size=4,
                          progress=False))
texts = [row.text for row in sorted(rows, key=lambda row: row.index)]
vectors = open_embedder(preset, 32)(texts, False)[0]
np.savez(f"{folder}/found{count}.npz", *total, *weights, vectors, np.array(texts))
"""


def test_two_devices_do_what_one_does(tmp_path):
    for count in (1, 2):
        flags = f"--xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-c", ON_DEVICES, str(tmp_path), MICRO, str(count)],
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "found1.npz") as one, np.load(tmp_path / "found2.npz") as two:
        *arrays, vectors, texts = one.files
        assert two.files == one.files
        same = one[texts] == two[texts]
        assert same.mean() >= 0.7  # a rounding error may change a token, and then the rest of a row
        for name in (*arrays, vectors):
            ours, theirs = (
                found[name][same] if name == vectors else found[name].astype(float) for found in (one, two)
            )
            assert np.abs(ours - theirs).max() <= 1e-3 * max(1e-6, np.abs(ours).max()), name


LAYERS = {
    "dense": (lambda: keras.layers.Dense(6, activation="gelu"), (4, 5), True),
    "without bias": (lambda: keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 6)), (2, 4, 5), True),
    "two axes summed": (
        lambda: keras.layers.EinsumDense("btnh,nhd->btd", (None, 6), bias_axes="d", activation="relu"),
        (2, 4, 3, 5),
        True,
    ),
    "kernel's last axis summed": (
        lambda: keras.layers.EinsumDense("btd,fd->btf", (None, 6)),
        (2, 4, 5),
        False,
    ),
    "another class": (lambda: type("Mine", (keras.layers.Dense,), {})(6), (4, 5), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_apart_gives_what_the_layer_gives(name):
    make, shape, apart = LAYERS[name]
    layer, rng = make(), np.random.default_rng(3)
    inputs = jnp.array(rng.normal(size=shape), "float32")
    layer(inputs)
    layer.enable_lora(2, lora_alpha=3)
    layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
    assert models.takes_factored_lora(layer) == apart
    if apart:
        assert np.allclose(models.factored_lora_call(layer)(inputs), layer(inputs), atol=1e-5)
    holder = types.SimpleNamespace(causal_lm=keras.Sequential([keras.Input(shape[1:]), layer]))
    with models.adapters_apart(holder):
        assert ("call" in vars(layer)) == apart
    assert "call" not in vars(layer)


def test_no_example_has_a_gradient_of_a_kernels_size():
    model = load_model("tiny")
    setup_tuning(model, SETTINGS.model_copy(update={"tuning": "lora", "lora_rank": 2, "lora_targets": "all"}))
    rows = {
        "tokens": jnp.ones((3, 1, 16), "int32"),
        "prompt_length": jnp.ones((3, 1), "int32"),
        "total_length": jnp.full((3, 1), 16),
    }
    loss = lambda trainable, *row: finetune.unit_loss(model, trainable, model.frozen, *row)
    one_each = lambda trainable: jax.vmap(jax.grad(loss), (None, 0, 0, 0))(trainable, *rows.values())
    kernels = {math.prod(layer._kernel.shape) for layer in models.adapted_layers(model)}
    made = {
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(
            r"f32\[(3,[\d,]+)\] = dot_general", str(jax.make_jaxpr(one_each)(model.trainable))
        )
    }
    assert made and not made & {3 * kernel for kernel in kernels}


@pytest.mark.parametrize(
    "model, tuning, mode",
    [
        ("tiny", "auto", "full"),
        ("gemma3_1b", "auto", "lora"),
        ("tiny", "lora", "lora"),
        ("gemma3_1b", "full", "full"),
    ],
)
def test_what_is_trained_unless_told_otherwise(model, tuning, mode):
    assert models.tuning_mode(Settings(model=model, tuning=tuning)) == mode


# what is done once


def test_a_preset_is_read_for_its_hash_once_and_again_where_a_file_changed(tmp_path, monkeypatch):
    for name in ("config.json", "model.weights.h5", "README.md"):
        (tmp_path / name).write_text(name)
    read, hashed = [], models.presets.file_hash
    monkeypatch.setattr(models.presets, "file_hash", lambda path: read.append(path.name) or hashed(path))
    first = models.preset_hash(str(tmp_path))
    assert models.preset_hash(str(tmp_path)) == first and read == ["config.json", "model.weights.h5"]
    (tmp_path / "README.md").write_text("another card")
    assert models.preset_hash(str(tmp_path)) == first and len(read) == 2
    before = (tmp_path / "config.json").stat().st_mtime_ns
    (tmp_path / "config.json").write_text("CONFIG.JSON")  # as long as it was
    os.utime(tmp_path / "config.json", ns=(before + 1, before + 1))
    assert models.preset_hash(str(tmp_path)) != first and len(read) == 4


def test_the_base_model_of_an_audit_is_the_tuned_one_without_its_adapters(monkeypatch):
    from parts import RUN, splits
    from dpsynth.runs import audit_run
    from dpsynth.formats import make_format

    records, fmt = splits().test, make_format(RUN)
    base = finetune.row_losses(load_model(MICRO, seed=RUN.seed), records, fmt, RUN)
    tuned = finetune.prepare_model(RUN)
    tuned.assign([a + 0.5 for a in tuned.trainable])
    monkeypatch.setattr(audit_run, "prepare_model", lambda settings: pytest.fail("loaded again"))
    assert np.allclose(audit_run.base_losses(tuned, records, fmt, RUN), base, atol=1e-5)
    assert not np.allclose(finetune.row_losses(tuned, records, fmt, RUN), base, atol=1e-2)


@pytest.fixture
def programs(tmp_path):
    """A folder in which JAX keeps every program that it compiles from now on."""
    from jax.experimental.compilation_cache import compilation_cache

    known = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    yield tmp_path / "programs"
    for name, value in known.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_the_users_cache_unless_that_is_off(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("DPSYNTH_COMPILE_CACHE", "off")
    assert models.keep_programs() is None
    monkeypatch.delenv("DPSYNTH_COMPILE_CACHE")
    assert models.keep_programs() == str(tmp_path / "dpsynth" / "xla")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    jax.config.update("jax_compilation_cache_dir", str(programs))
    assert models.keep_programs() == str(programs)  # JAX's own setting comes first


def test_kept_programs_hold_no_row(programs, tmp_path):
    """The programs of a whole run are the same ones for other rows of the same shapes: what is compiled
    has no row in it.
    """
    from jax.experimental.compilation_cache import compilation_cache
    from parts import RUN, splits
    from dpsynth.runs import evaluate_stage, fit_stage, load_stage, sample_stage

    settings = RUN.model_copy(
        update={
            "num_samples": 6,
            "num_mauve_samples": 6,
            "num_mauve_trials": 1,
            "embedder": MICRO,
            "embed_length": 16,
            "utility": False,
        }
    )
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    kept = []
    for name, text in (("one", "row 0 was bad"), ("two", "now 7 can sad")):
        rows, folder = splits(text), tmp_path / name
        load_stage(Run(settings, folder), rows)
        model = fit_stage(Run(settings, folder), rows)
        sample_stage(Run(settings, folder), rows, model)
        evaluate_stage(Run(settings, folder), rows)
        kept.append({path.name for path in programs.iterdir() if path.name.endswith("-cache")})
    assert any("accumulate" in name for name in kept[0]) and any("decode_round" in name for name in kept[0])
    assert kept[0] == kept[1], kept[1] - kept[0]
