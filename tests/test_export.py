"""Exported models: other libraries compute and tokenize what dpsynth does, the certificate goes with them,
and what cannot be exported is refused before anything is written."""

import json
import shutil
import types

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'dpsynth[gguf]'")

import keras_hub
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from dpsynth.certificate import plain_words, read_certificate
from dpsynth.export import (
    NOT_PRIVATE,
    adapter_arrays,
    as_matrix,
    as_pair,
    check_family,
    export_run,
    hugging_face_name,
    load_trained,
    modules,
    write_keras,
    write_peft,
    write_transformers,
)
from dpsynth.finetune import prepare_model
from dpsynth.imports import CONTROL, UNUSED, USER_DEFINED, import_gguf
from dpsynth.manifest import write_release
from dpsynth.models import enable_lora, load_model, save_adapter
from dpsynth.runs import prepare_folder, read_settings
from dpsynth.settings import ModelError, Settings
from parts import MICRO, RUN
from small_gguf import write
from slow_safetensors import SlowSafetensors
from test_imports import FILES, HOSTILE, scores

MODELS = ["gemma3", "llama", "llama with sentencepiece", "llama 3.1 in 4 bits"]
TEXT = "hello world, the rows there are reading hello"


def disturbed(model, rank=4):
    """A model with adapters on all layers that change what it computes."""
    enable_lora(model, rank, "all")
    rng = np.random.default_rng(5)
    for variable in model.causal_lm.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (model with adapters, folder for transformers, folder for peft), each made once."""
    kept = {}

    def make(name):
        if name not in kept:
            place = tmp_path_factory.mktemp("made")
            import_gguf(write(place / "m.gguf", **FILES[name]), place / "m", progress=False)
            model = disturbed(load_model(str(place / "m")))
            for to, writer in (("transformers", write_transformers), ("peft", write_peft)):
                (place / to).mkdir()
                writer(model, place / to, Settings())
            kept[name] = model, place / "transformers", place / "peft"
        return kept[name]

    return make


def ids_of(model):
    ids = [model.start_id, *model.encode([TEXT])[0]]
    assert len(ids) > 12  # longer than the sliding window
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_for_transformers_computes_what_the_model_does(made, name):
    model, folder, _ = made(name)
    ids = ids_of(model)
    expected = scores(model, ids)
    assert np.abs(SlowSafetensors(folder).logits(ids) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_for_peft_on_its_base_is_the_merged_model(made, name):
    model, merged, folder = made(name)
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays, base, expected = (
        load_file(path)
        for path in (
            folder / "adapter_model.safetensors",
            folder / "base/model.safetensors",
            merged / "model.safetensors",
        )
    )
    seen = set()
    for name, weight in base.items():
        module, last = f"base_model.model.{name.removesuffix('.weight')}", name.split(".")[-2]
        if last in config["target_modules"]:
            down, up = arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
            rank, alpha = (
                config["rank_pattern"].get(last, config["r"]),
                config["alpha_pattern"].get(last, config["lora_alpha"]),
            )
            assert down.shape[0] == up.shape[1] == rank
            weight, seen = (
                weight + alpha / rank * (up @ down),
                seen | {f"{module}.lora_A.weight", f"{module}.lora_B.weight"},
            )
        assert np.abs(weight - expected[name]).max() < 1e-5, name
    assert seen == set(arrays) and config["rank_pattern"] == {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    assert config["base_model_name_or_path"] is None and all(
        layer.lora_enabled for layer in modules(model).values()
    )


@pytest.mark.parametrize("name", MODELS[:3])
def test_a_preset_computes_and_tokenizes_what_the_model_does(made, name, tmp_path):
    model, *_ = made(name)
    write_keras(model, tmp_path, Settings())
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype="float32")
    assert (
        type(again) is type(model.causal_lm)
        and again.backbone.token_embedding.tie_weights == model.causal_lm.backbone.token_embedding.tie_weights
    )
    loaded, ids = load_model(str(tmp_path)), ids_of(model)
    assert loaded.prompt_ids(TEXT) == model.prompt_ids(TEXT)
    assert np.abs(scores(loaded, ids) - scores(model, ids)).max() < 1e-4


@pytest.mark.parametrize("name", MODELS[:3])
def test_texts_become_the_same_pieces_everywhere(made, name):
    model, folder, _ = made(name)
    other, config = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        json.loads((folder / "tokenizer_config.json").read_text()),
    )
    other.encode_special_tokens = config["split_special_tokens"]
    for text in [*HOSTILE, TEXT, "aaaa" * 9, "\n" * 5, "hellohell ▁world"]:
        ids = other.encode(text).ids
        assert ids == model.prompt_ids(text), text
        assert other.decode(ids) == model.decode(ids[1:]), text


def test_a_blank_that_texts_get_in_front_is_there_too():
    from dpsynth.export import tokenizer_of_sentencepiece
    from dpsynth.models import load_tokenizer
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto.FromString(load_tokenizer("tiny").proto)
    message.normalizer_spec.add_dummy_prefix = True
    with pytest.raises(ModelError, match="BPE on unchanged texts"):
        # the blank would have to come before a user-defined piece too
        tokenizer_of_sentencepiece(message.SerializeToString())
    for piece in message.pieces:
        piece.type = CONTROL if piece.type == USER_DEFINED else piece.type
    proto = message.SerializeToString()
    ours, other = SentencePieceProcessor(model_proto=proto), tokenizer_of_sentencepiece(proto)
    other.encode_special_tokens = True
    for text in ("A film", " that", "", "two  lines <eos> <b>"):
        assert other.encode(text).ids == ours.encode(text) and other.decode(other.encode(text).ids) == text
    message.pieces[300].type = UNUSED
    with pytest.raises(ModelError, match="BPE on unchanged texts"):
        tokenizer_of_sentencepiece(message.SerializeToString())
    message = sentencepiece_model_pb2.ModelProto.FromString(proto)
    message.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(ModelError, match="BPE on unchanged texts"):
        tokenizer_of_sentencepiece(message.SerializeToString())


EXPECTED = {
    "transformers": {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
    },
    "keras": {
        "config.json",
        "metadata.json",
        "model.weights.h5",
        "preprocessor.json",
        "task.json",
        "tokenizer.json",
        "assets/tokenizer/vocabulary.spm",
    },
}
EXPECTED["peft"] = {
    "adapter_config.json",
    "adapter_model.safetensors",
    *(f"base/{name}" for name in EXPECTED["transformers"]),
}
PAPERS = {"README.md", "export.json", "manifest.json", "certificate.json", "certificate.md"}


@pytest.fixture
def private(run, tmp_path):
    """A copy of the private run, that a test may damage."""
    return prepare_folder(RUN, shutil.copytree(run, tmp_path / "dp"))


@pytest.mark.parametrize("to", EXPECTED)
def test_the_certificate_goes_with_the_weights_and_nothing_private_does(
    private, dpsynth, refused, to, tmp_path
):
    before = {*private.rglob("*"), private / ".lock"}
    done = dpsynth("export", private, "--to", to)
    folder = private / f"export-{to}"
    assert done.code == 0 and done.out.strip() == str(folder), done.err
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == EXPECTED[
        to
    ] | PAPERS
    assert {path for path in private.rglob("*") if folder not in (path, *path.parents)} == before
    release, card = private / "release", (folder / "README.md").read_text()
    assert all(
        (folder / name).read_bytes() == (release / name).read_bytes()
        for name in ("certificate.json", "certificate.md")
    )
    assert (
        plain_words(read_certificate(release / "certificate.json")) in card
        and NOT_PRIVATE not in card
        and str(private) not in card
    )
    verified = dpsynth("verify", folder)
    assert (
        verified.code == 0
        and all(name in verified.out.split("not here")[0] for name in EXPECTED[to])
        and "not covered" not in verified.out
    )
    changed = folder / sorted(EXPECTED[to])[-1]
    changed.write_bytes(changed.read_bytes() + b" ")
    assert changed.name in (told := refused("verify", folder)) and "export again" in told


def test_what_is_exported_is_what_the_run_samples_from(private):
    folder = export_run(RUN, private, "transformers", private.parent / "out")
    model = load_trained(RUN, private)
    ids = model.prompt_ids("[good]: row 3 was")
    expected = scores(model, ids)
    base = scores(load_model(MICRO), ids)
    assert np.abs(SlowSafetensors(folder).logits(ids) - expected).max() < 1e-4 < np.abs(base - expected).max()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (
        generation["top_p"] == RUN.top_p
        and generation["top_k"] == 0
        and generation["eos_token_id"] == list(model.stop_ids)
    )


def test_another_adapter_or_certificate_is_refused_and_leaves_nothing(private, refused):
    model = load_trained(RUN, private)
    model.assign([value + 1 for value in model.trainable])
    kept = (private / "release/adapter.npz").read_bytes()
    save_adapter(model, private / "release/adapter.npz")
    for to in EXPECTED:
        assert "adapter.npz: is not the file whose SHA-256 stands in certificate.json" in refused(
            "export", private, "--to", to
        )
    (private / "release/adapter.npz").write_bytes(kept)
    page = private / "release/certificate.md"
    page.write_text(page.read_text() + "\nand more\n")
    assert "certificate.md: is not the file" in refused("export", private, "--to", "keras")
    assert not [path for path in private.iterdir() if "export" in path.name]


def test_a_certificate_that_does_not_hold_is_not_passed_on(private, refused):
    path = private / "release/certificate.json"
    certificate = read_certificate(path)
    certificate["epsilon"] /= 2
    write_release(certificate, private / "release", {"adapter.npz": private / "release/adapter.npz"})
    assert "does not hold" in refused("export", private, "--to", "peft")


def test_another_base_model_is_refused(private, refused):
    certificate = read_certificate(private / "release/certificate.json")
    certificate["base_model"]["hash"] = 64 * "a"
    write_release(certificate, private / "release", {"adapter.npz": private / "release/adapter.npz"})
    assert "not the base model that the adapter was trained on" in refused("export", private, "--to", "peft")


def test_a_folder_that_is_in_use_is_left_alone(private, refused, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").write_text("mine")
    assert "is there already" in refused("export", private, "--to", "keras", "--out", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without privacy that tuned every weight, and the settings of others like it."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    settings = RUN.model_copy(update={"epsilon": float("inf"), "tuning": "full", "experiment": "plain"})
    prepare_folder(settings, folder)
    save_adapter(prepare_model(settings), folder / "release/adapter.npz")
    write_release(None, folder / "release", {"adapter.npz": folder / "release/adapter.npz"})
    return folder


def test_a_model_without_privacy_says_so_on_its_first_page(plain, dpsynth, tmp_path):
    assert dpsynth("export", plain, "--to", "transformers", "--out", tmp_path / "out").code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == EXPECTED["transformers"] | {"NOT_PRIVATE.md", "README.md", "export.json", "manifest.json"}
    assert NOT_PRIVATE in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/export.json").read_text())["private"] is False


def test_what_has_no_adapter_is_refused(plain, refused, tmp_path):
    assert "use --to transformers" in refused("export", plain, "--to", "peft")
    other = shutil.copytree(plain, tmp_path / "prompt")
    prepare_folder(read_settings(other).model_copy(update={"generator": "prompt"}), other)
    assert "nothing to export" in refused("export", other, "--to", "keras")
    (other / "release/adapter.npz").unlink()
    prepare_folder(read_settings(plain), other)
    assert "not fitted yet" in refused("export", other, "--to", "keras")


def test_other_families_are_refused_with_the_names_of_those_that_are_not():
    wrapped = lambda backbone: types.SimpleNamespace(
        causal_lm=types.SimpleNamespace(backbone=backbone), name="other"
    )
    gpt2 = keras_hub.models.GPT2Backbone(
        vocabulary_size=8, num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=8
    )
    with pytest.raises(ModelError, match=r"GPT2Backbone; Gemma3 \(texts only\) and Llama"):
        check_family(wrapped(gpt2))
    sizes = dict(
        vocabulary_size=8,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        head_dim=4,
    )
    norms = dict(use_query_key_norm=True, use_post_ffw_norm=True, use_post_attention_norm=True)
    for changed, word in (
        ({"use_query_key_norm": False}, "use_query_key_norm"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ):
        with pytest.raises(ModelError, match=word):
            check_family(wrapped(keras_hub.models.Gemma3Backbone(**{**sizes, **norms, **changed})))


def test_an_adapter_with_heads_is_one_product_of_a_higher_rank():
    rng = np.random.default_rng(0)
    array = lambda *shape: types.SimpleNamespace(value=rng.normal(size=shape).astype(np.float32))
    for equation, a, b, rank in (
        ("btd,ndh->btnh", (3, 5, 2), (2, 4), 6),
        ("bqm,muh->bquh", (5, 3, 2), (2, 4), 6),
        ("btnh,nhd->btd", (3, 4, 2), (2, 5), 2),
        ("btd,df->btf", (5, 2), (2, 7), 2),
    ):
        layer = types.SimpleNamespace(equation=equation, lora_kernel_a=array(*a), lora_kernel_b=array(*b))
        down, up = as_pair(layer)
        assert len(down) == rank and np.allclose(
            up @ down, as_matrix(layer, np.matmul(*adapter_arrays(layer))), atol=1e-6
        )


def test_names_on_hugging_face_are_those_of_the_same_model(tmp_path, monkeypatch):
    assert (
        hugging_face_name("gemma3_270m:english") == hugging_face_name("gemma3_270m") == "google/gemma-3-270m"
    )
    assert (
        hugging_face_name("hf://google/gemma-3-1b-pt") == "google/gemma-3-1b-pt"
        and hugging_face_name("tiny") == hugging_face_name(MICRO) == ""
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3_270m").mkdir()
    assert hugging_face_name("gemma3_270m") == ""  # a folder of this name is another model


@pytest.mark.parametrize("name", MODELS)
def test_transformers_and_peft_compute_the_same(made, name):
    torch, transformers, peft = (
        pytest.importorskip(package) for package in ("torch", "transformers", "peft")
    )
    model, folder, adapter = made(name)
    ids = ids_of(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(adapter / "base")
    assert [tokenizer(text).input_ids for text in HOSTILE] == [model.prompt_ids(text) for text in HOSTILE]
    for other in (merged, peft.PeftModel.from_pretrained(base, adapter)):
        with torch.no_grad():
            found = other(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(found - scores(model, ids)).max() < 1e-3
