"""Settings, configurations, template and documentation are one thing in several forms."""

import math
import re

import pytest
import yaml

from dpsynth.settings import (
    Settings,
    SettingsError,
    affects_result,
    dump_settings,
    load_settings,
    make_settings,
    parameters_cell,
    resolve,
    settings_table,
)

TRAINING = {
    "SEQUENCE_LENGTH": 512,
    "EPOCHS": 3,
    "BATCH_SIZE": 32,
    "GRADIENT_ACCUMULATION_STEPS": 32,
    "LORA_RANK": 32,
    "LEARNING_RATE": 0.003,
    "VALIDATION_SIZE": 64,
    "SEED": 42,
    "TOP_P": 0.95,
    "NUM_SAMPLES": 10000,
    "SAMPLE_BATCH_SIZE": 24,
    "NUM_MAUVE_SAMPLES": 5000,
    "NUM_MAUVE_TRIALS": 5,
    "USE_MIXED_PRECISION": False,
    "EPSILON": 10.0,
    "DELTA": 1.5e-5,
    "CLIPPING_NORM": 1.0,
    "GEMMA3_MODEL_TYPE": "gemma3_instruct_12b",
}
TUTORIAL = {
    "baseline_without_examples": {
        **TRAINING,
        "FINETUNE_MODEL": False,
        "USE_DP": False,
        "PROMPT": "As an IMDb movie reviewer, generate a realistic, one paragraph {label} movie review. "
        "Make up concrete names for characters or other details in your review. "
        "Just provide the review text itself, no ratings, sections, or extra info.",
    },
    "baseline_with_examples": {
        **TRAINING,
        "FINETUNE_MODEL": False,
        "USE_DP": False,
        "SEQUENCE_LENGTH": 1024,
        "BATCH_SIZE": 16,
        "GRADIENT_ACCUMULATION_STEPS": 64,
        "SAMPLE_BATCH_SIZE": 16,
    },
    "dp_ft": {**TRAINING, "FINETUNE_MODEL": True, "USE_DP": True, "PROMPT": "[imdb][{label}]:"},
    "non_dp_ft": {**TRAINING, "FINETUNE_MODEL": True, "USE_DP": False, "PROMPT": "[imdb][{label}]:"},
}
SIX = [*TUTORIAL, "use_train", "upper_bound"]


def translated(config):
    """The settings that an entry of the tutorial stands for."""
    plain = {
        "GEMMA3_MODEL_TYPE": "model",
        "SEQUENCE_LENGTH": "sequence_length",
        "EPOCHS": "epochs",
        "LORA_RANK": "lora_rank",
        "PROMPT": "prompt",
        "LEARNING_RATE": "learning_rate",
        "VALIDATION_SIZE": "validation_size",
        "SEED": "seed",
        "TOP_P": "top_p",
        "NUM_SAMPLES": "num_samples",
        "SAMPLE_BATCH_SIZE": "sample_batch_size",
        "NUM_MAUVE_SAMPLES": "num_mauve_samples",
        "NUM_MAUVE_TRIALS": "num_mauve_trials",
        "DELTA": "delta",
        "CLIPPING_NORM": "l2_clip_norm",
    }
    return {
        **{ours: config[theirs] for theirs, ours in plain.items() if theirs in config},
        "batch_size": config["BATCH_SIZE"] * config["GRADIENT_ACCUMULATION_STEPS"],
        "microbatch_size": config["BATCH_SIZE"],
        "generator": "finetune" if config["FINETUNE_MODEL"] else "prompt",
        "epsilon": config["EPSILON"] if config["USE_DP"] else math.inf,
        "dtype": "bfloat16" if config["USE_MIXED_PRECISION"] else "float32",
        "clip": "bound",
        "tuning": "lora",
        "data": "tfds:imdb_reviews",
    }


@pytest.mark.parametrize("name", TUTORIAL)
def test_imdb_configs_have_the_tutorials_values(repo, name):
    settings = load_settings(repo / "configs" / "imdb" / f"{name}.yaml").model_dump()
    wanted = translated(TUTORIAL[name])
    assert {k: settings[k] for k in wanted} == wanted


def test_prompt_with_examples_is_the_tutorials(repo):
    prompt = load_settings(repo / "configs" / "imdb" / "baseline_with_examples.yaml").prompt
    assert prompt.startswith(
        "As an IMDb movie reviewer, generate a realistic, one paragraph movie review in the same format and similar style as the "
        "examples below. Make up concrete names for characters or other details in your review. Only provide the review text.\n\n"
        "Here are three examples of positive movie reviews:\n\n* `This is the kind of film for a snowy Sunday afternoon"
    )
    assert prompt.endswith(
        "page 3 on the script.`\n\nNow it's your turn, generate one {label} movie review which is similar to the {label} examples above:"
    )
    assert len(re.findall(r"^\* `.*`$", prompt, flags=re.M)) == 6
    assert 'The "romance" with John' in prompt and 'horrific "comedy\'s" ever made.<br /><br />While' in prompt and len(prompt) == 2745


@pytest.mark.parametrize("folder", ["imdb", "demo", "imdb_tiny"])
def test_a_sweep_has_the_six_experiments(repo, folder):
    found = {p.stem: load_settings(p) for p in (repo / "configs" / folder).glob("*.yaml")}
    assert set(SIX) <= set(found)
    assert {n: s.generator for n, s in found.items() if n in SIX} == {
        "baseline_without_examples": "prompt",
        "baseline_with_examples": "prompt",
        "dp_ft": "finetune",
        "non_dp_ft": "finetune",
        "use_train": "real_train",
        "upper_bound": "real_test",
    }
    assert [n for n in sorted(found) if found[n].private] == [n for n in sorted(found) if n.startswith("dp_ft")]
    assert len({(s.num_samples, s.num_mauve_samples, s.num_mauve_trials, s.embedder, s.pooling, s.seed) for s in found.values()}) == 1
    assert all(s.experiment == n for n, s in found.items())


def test_dp_and_non_dp_differ_in_epsilon_alone(repo):
    for folder in ("imdb", "demo", "imdb_tiny"):
        one, other = (load_settings(repo / "configs" / folder / f"{n}.yaml").model_dump() for n in ("dp_ft", "non_dp_ft"))
        assert {k for k in one if one[k] != other[k]} == {"experiment", "epsilon"}


def test_imdb_tiny_has_three_epsilons(repo):
    found = {n: load_settings(repo / "configs" / "imdb_tiny" / f"{n}.yaml").epsilon for n in ("dp_ft", "dp_ft_eps3", "dp_ft_eps1")}
    assert found == {"dp_ft": 10, "dp_ft_eps3": 3, "dp_ft_eps1": 1}


@pytest.mark.parametrize("value", [2, 0.001, True, "a 'quoted' \"text\"\nwith lines: # and \\ signs", "inf", "1e-3"])
def test_yaml_keeps_texts(tmp_path, value):
    settings = make_settings({"prompt": f"{value}{{label}}"})
    dump_settings(settings, tmp_path / "dp_ft.yaml")
    assert load_settings(tmp_path / "dp_ft.yaml") == settings


@pytest.mark.parametrize("text, value", [("inf", math.inf), (".inf", math.inf), ("1e1", 10.0), ("3", 3.0)])
def test_yaml_numbers_are_numbers(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(f"epsilon: {text}\n")
    assert load_settings(tmp_path / "x.yaml").epsilon == value


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"epsilom": 3}, "did you mean 'epsilon'"),
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": "nan"}, "epsilon"),
        ({"delta": 1}, "delta"),
        ({"top_p": 0}, "top_p"),
        ({"generator": "magic"}, "generator"),
        ({"experiment": "a/b"}, "experiment"),
        ({"prompt": "review:"}, "{label}"),
        ({"label_prior": "1,2,3"}, "label_prior"),
        ({"utility": "perhaps"}, "utility"),
        ({"num_samples": 10, "num_mauve_samples": 20}, "num_mauve_samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(SettingsError) as caught:
        make_settings(wrong)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_setting_is_documented_and_in_the_parameters_cell():
    values = {}
    exec(parameters_cell(), values)
    assert {n: values[n] for n in Settings.model_fields} == Settings().model_dump()
    assert all(f"| `{name}` |" in settings_table() for name in Settings.model_fields)


def test_every_setting_is_read_by_something(repo):
    source = "".join(p.read_text(encoding="utf-8") for p in (repo / "dpsynth").glob("*.py") if p.name != "settings.py")
    through = {"label_names": "settings.labels", "label_prior": "settings.prior()", "profile": "resolve("}  # read by a method of Settings
    assert [n for n in Settings.model_fields if not re.search(rf"settings\.{n}\b", source) and through.get(n, "\0") not in source] == []


def test_what_does_not_affect_the_result_is_memory_speed_and_bookkeeping():
    assert [n for n in Settings.model_fields if not affects_result(n)] == ["microbatch_size", "ledger", "sample_batch_size"]


def test_smoke_profile_is_small_and_keeps_decisions():
    big = make_settings({"profile": "smoke", "epsilon": 3, "model": "gemma3_1b", "num_samples": 30, "num_mauve_samples": 30})
    small = resolve(big)
    assert (small.epsilon, small.model, small.num_samples) == (3, "tiny", 30) and small.batch_size == 64
    assert resolve(small) == small


def test_settings_file_is_plain_yaml(tmp_path):
    dump_settings(Settings(), tmp_path / "s.yaml")
    assert set(yaml.safe_load((tmp_path / "s.yaml").read_text())) == set(Settings.model_fields)
