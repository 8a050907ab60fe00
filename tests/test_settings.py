"""Settings, configurations, template and documentation are one thing in several forms."""

import hashlib
import math
import re

import nbformat
import pytest
import yaml

from dpsynth.settings import (
    ELSEWHERE,
    Settings,
    SettingsError,
    affects_result,
    dump_settings,
    evaluation_settings,
    load_settings,
    make_settings,
    parameters_cell,
    parse_overrides,
    resolve,
    result_settings,
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
WITH_EXAMPLES = (
    "48e6ecc230bd21c65b10a7ea267b7fe8ea9c04840db303221129b52bb78bbcfd"  # SHA-256 of the tutorial's prompt
)
SIX = [*TUTORIAL, "use_train", "upper_bound"]


SAME = {
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


def translated(config):
    """The settings that an entry of the tutorial stands for."""
    return {
        **{ours: config[theirs] for theirs, ours in SAME.items() if theirs in config},
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
        "As an IMDb movie reviewer, generate a realistic, one paragraph movie review in the same format and"
        " similar style as the "
        "examples below. Make up concrete names for characters or other details in your review. Only provide "
        "the review text.\n\n"
        "Here are three examples of positive movie reviews:\n\n"
        "* `This is the kind of film for a snowy Sunday afternoon"
    )
    assert prompt.endswith(
        "page 3 on the script.`\n\nNow it's your turn, generate one {label} movie review which is similar to "
        "the {label} examples above:"
    )
    assert len(re.findall(r"^\* `.*`$", prompt, flags=re.M)) == 6
    assert (
        'The "romance" with John' in prompt
        and 'horrific "comedy\'s" ever made.<br /><br />While' in prompt
        and len(prompt) == 2745
    )
    assert hashlib.sha256(prompt.encode()).hexdigest() == WITH_EXAMPLES


def test_imdb_tiny_has_the_prompts_of_imdb(repo):
    prompts = {n: load_settings(repo / "configs" / "imdb" / f"{n}.yaml").prompt for n in SIX}
    tiny = {p.stem: load_settings(p).prompt for p in (repo / "configs" / "imdb_tiny").glob("*.yaml")}
    assert tiny == {n: prompts["dp_ft" if n.startswith("dp_ft") else n] for n in tiny} and set(SIX) <= set(
        tiny
    )


@pytest.mark.parametrize("folder", ["imdb", "demo", "imdb_tiny", "imdb_gemma"])
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
    assert [n for n in sorted(found) if found[n].private] == [
        n for n in sorted(found) if n.startswith("dp_ft")
    ]
    assert (
        len(
            {
                (s.num_samples, s.num_mauve_samples, s.num_mauve_trials, s.embedder, s.pooling, s.seed)
                for s in found.values()
            }
        )
        == 1
    )
    assert all(s.experiment == n for n, s in found.items())


def test_dp_and_non_dp_differ_in_epsilon_alone(repo):
    for folder in ("imdb", "demo", "imdb_tiny", "imdb_gemma"):
        one, other = (
            load_settings(repo / "configs" / folder / f"{n}.yaml").model_dump()
            for n in ("dp_ft", "non_dp_ft")
        )
        assert {k for k in one if one[k] != other[k]} == {"experiment", "epsilon"}


def test_imdb_tiny_has_three_epsilons(repo):
    found = {
        n: load_settings(repo / "configs" / "imdb_tiny" / f"{n}.yaml").epsilon
        for n in ("dp_ft", "dp_ft_eps3", "dp_ft_eps1")
    }
    assert found == {"dp_ft": 10, "dp_ft_eps3": 3, "dp_ft_eps1": 1}


@pytest.mark.parametrize(
    "value", [2, 0.001, True, "a 'quoted' \"text\"\nwith lines: # and \\ signs", "inf", "1e-3"]
)
def test_yaml_keeps_texts(tmp_path, value):
    settings = make_settings({"prompt": f"{value}{{label}}"})
    dump_settings(settings, tmp_path / "dp_ft.yaml")
    assert load_settings(tmp_path / "dp_ft.yaml") == settings


@pytest.mark.parametrize("text, value", [("inf", math.inf), (".inf", math.inf), ("1e1", 10.0), ("3", 3.0)])
def test_yaml_numbers_are_numbers(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(f"epsilon: {text}\n")
    assert load_settings(tmp_path / "x.yaml").epsilon == value


@pytest.mark.parametrize(
    "line, value",
    [
        ("monitor: off", "off"),
        ("bands: 4", "4"),
        ("tuned_on: 2024", "2024"),
        ("tuned_on: 2024-05-01", "2024-05-01"),
        ("data: 010", "010"),
        ("text_column: no", "no"),
        ("batch_size: 010", 10),
        ("batch_size: 1e3", 1000),
        ("epsilon: .INF", math.inf),
        ("utility: no", False),
        ("utility: true", True),
    ],
)
def test_a_setting_means_what_is_written(tmp_path, line, value):
    name, text = line.split(": ")
    more = "epsilon: 3\n" if name == "data" else ""
    (tmp_path / "x.yaml").write_text(f"{line}\n{more}")
    (tmp_path / "y.yaml").write_text(more)
    read = [load_settings(tmp_path / "x.yaml"), load_settings(tmp_path / "y.yaml", [f"{name}={text}"])]
    assert [getattr(s, name) for s in read] == [value, value] and type(getattr(read[0], name)) is type(value)


def test_numbers_are_texts_where_a_text_is_meant():
    assert (make_settings({"bands": 4}).bands, make_settings({"tuned_on": 2024}).tuned_on) == ("4", "2024")


@pytest.mark.parametrize(
    "line",
    [
        "epsilon: yes",
        "epsilon: true",
        "batch_size: true",
        "batch_size: 10:24",
        "learning_rate: 1:30.5",
        "bands: true",
        "data:",
        "data: null",
    ],
)
def test_what_was_mistyped_is_no_number_and_no_text(tmp_path, line):
    (tmp_path / "x.yaml").write_text(f"{line}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "x.yaml")
    assert f"setting '{line.split(':')[0]}'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", ["epsilon=[3", "epsilon=@3", "batch_size=%", "epsilom={", "epsilon"])
def test_a_broken_override_is_one_line_that_names_it(pair):
    with pytest.raises(SettingsError) as caught:
        parse_overrides([pair])
    assert repr(pair) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_may_hold_what_yaml_could_not():
    assert parse_overrides(["prompt=[x][{label}]: @%", "epsilon= 3"]) == {
        "prompt": "[x][{label}]: @%",
        "epsilon": "3",
    }


@pytest.mark.parametrize("text", ["epsilon: 3\nseed: [1\n", "epsilon: 3\nseed: @1\n", "true: 3\n", "- 3\n"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "x.yaml")
    assert "x.yaml" in str(caught.value) and "\n" not in str(caught.value)
    assert "seed" not in text or ", line " in str(caught.value)


@pytest.mark.parametrize(
    "text, line",
    [
        ("epsilon: 3\nseed: 1\n\n# note\nepsilon: 10\n", 5),
        ("epsilon: 3\n'epsilon': 3\n", 2),
        ("{epsilon: 3, epsilon: 10}", 1),
    ],
)
def test_a_setting_may_be_in_a_file_once(tmp_path, text, line):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "x.yaml")
    assert f"x.yaml, line {line}: setting 'epsilon' is there twice, first in line 1" in str(caught.value)
    (tmp_path / "x.yaml").write_text("epsilon: 3\nseed: 1\n")
    assert load_settings(tmp_path / "x.yaml", ["epsilon=10"]).epsilon == 10


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"epsilom": 3}, "did you mean 'epsilon'"),
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": "nan"}, "epsilon"),
        ({"epsilon": True}, "epsilon"),
        ({"batch_size": False}, "batch_size"),
        ({"tuned_on": True}, "tuned_on"),
        ({True: 3}, "strings"),
        ({"delta": 1}, "delta"),
        ({"top_p": 0}, "top_p"),
        ({"generator": "magic"}, "generator"),
        ({"experiment": "a/b"}, "experiment"),
        ({"experiment": ""}, "experiment"),
        ({"experiment": "."}, "experiment"),
        ({"experiment": ".."}, "experiment"),
        ({"experiment": ".hidden"}, "experiment"),
        ({"experiment": "-rf"}, "experiment"),
        ({"label_names": "negative,positive,"}, "label_names"),
        ({"label_names": "a, a"}, "label_names"),
        ({"label_names": ""}, "set label_column to an empty text"),
        ({"prompt": "review:"}, "{label}"),
        ({"label_prior": "1,2,3"}, "label_prior: expected `uniform`, `private`"),
        ({"label_prior": "inf,1"}, "label_prior"),
        ({"utility": "perhaps"}, "utility"),
        ({"num_samples": 10, "num_mauve_samples": 20}, "num_mauve_samples"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(SettingsError) as caught:
        make_settings(wrong)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"label_names": "film"},
        {"label_names": "1,2"},
        {"label_names": "", "label_column": "", "prompt": "A review:"},
    ],
)
def test_one_label_or_none_are_fine(values):
    assert make_settings(values).labels == tuple(values["label_names"].split(","))


@pytest.mark.parametrize("name", ["dp_ft", "_a", "3", "a.b-c", "é"])
def test_names_of_experiments(name):
    assert make_settings({"experiment": name}).experiment == name


MEANT = {
    **{theirs: {ours} for theirs, ours in SAME.items()},
    "BATCH_SIZE": {"batch_size", "microbatch_size"},
    "GRADIENT_ACCUMULATION_STEPS": {"batch_size"},
    "FINETUNE_MODEL": {"generator"},
    "USE_DP": {"epsilon"},
    "EPSILON": {"epsilon"},
    "USE_MIXED_PRECISION": {"dtype"},
    "TEST_RUN": {"profile"},
    "MAX_TRAIN_SIZE": {"train_size"},
    "SAVE_ROOT_DIR": set(),
}


def message(name):
    with pytest.raises(SettingsError) as caught:
        make_settings({name: 1})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({*MEANT}.union(*TUTORIAL.values())))
def test_a_name_of_the_tutorial_leads_to_its_settings(name):
    for spelling in {name, name.lower()} - set(Settings.model_fields):
        assert {n for n in Settings.model_fields if repr(n) in message(spelling)} == MEANT[name]
        assert MEANT[name] or "`dpsynth run --out`" in message(spelling)


@pytest.mark.parametrize("name, ours", sorted(ELSEWHERE.items()))
def test_a_name_of_another_tool_leads_to_its_setting(name, ours):
    assert name not in Settings.model_fields and f"did you mean {ours!r}" in message(name)


@pytest.mark.parametrize("bound", [1e-40, 1e30])
def test_a_clipping_norm_that_float32_cannot_scale_is_refused(bound):
    with pytest.raises(SettingsError, match="l2_clip_norm"):
        make_settings({"l2_clip_norm": bound})


def test_the_order_of_rows_is_no_setting():
    assert "each row is learnt by itself" in message("order_training_examples_by")


def test_the_case_of_a_name_does_not_hide_it():
    assert "did you mean 'label_column'" in message("Label_Column") and "did you mean 'top_k'" in message(
        "TOP_K"
    )
    assert "`dpsynth settings` lists all" in message("zzz")


def test_every_setting_is_documented_and_in_the_parameters_cell():
    values = {}
    exec(parameters_cell(), values)
    assert {n: values[n] for n in Settings.model_fields} == Settings().model_dump()
    assert all(f"| `{name}` |" in settings_table() for name in Settings.model_fields)


def test_stored_table_of_the_documentation_is_todays(repo):
    cells = nbformat.read(repo / "nbs" / "02_settings" / "06_resolved.ipynb", 4).cells
    (cell,) = [c for c in cells if c.cell_type == "code" and "Markdown(settings_table())" in c.source]
    assert [output.data["text/markdown"] for output in cell.outputs] == [settings_table()]


def test_every_setting_is_read_by_something(repo):
    source = "".join(
        p.read_text(encoding="utf-8") for p in (repo / "dpsynth").rglob("*.py") if p.parent.name != "settings"
    )
    through = {  # read by a method of Settings, or by its name
        "label_names": "settings.labels",
        "label_prior": "settings.prior()",
        "profile": "resolve(",
        "tuned_on": '_tuned_on(f["choices"]["tuned_on"]',
        "test_fraction": '_hold_out(train, name, "test_fraction", settings',
    }
    assert [
        n
        for n in Settings.model_fields
        if not re.search(rf"settings\.{n}\b", source) and through.get(n, "\0") not in source
    ] == []


MEASURING = [
    "validation_size",
    "embedder",
    "second_embedder",
    "pooling",
    "embed_length",
    "num_mauve_samples",
    "num_mauve_trials",
    "send_training_rows",
    "utility",
]


def test_what_does_not_affect_the_result_is_memory_speed_bookkeeping_and_measuring():
    assert list(evaluation_settings(Settings())) == MEASURING
    without = [
        "columns",
        "microbatch_size",
        "rematerialize",
        "ledger",
        "data_name",
        "id_column",
        "sample_batch_size",
        *MEASURING,
    ]
    assert sorted(n for n in Settings.model_fields if not affects_result(n)) == sorted(without)


def test_measuring_otherwise_is_the_same_run():
    base = Settings()
    other = Settings(
        second_embedder="gemma3_1b", pooling="last", num_mauve_trials=2, utility=False, validation_size=0
    )
    assert result_settings(base) == result_settings(other)
    changed = {n: v for n, v in evaluation_settings(other).items() if evaluation_settings(base)[n] != v}
    assert changed == {
        "second_embedder": "gemma3_1b",
        "pooling": "last",
        "num_mauve_trials": 2,
        "utility": False,
        "validation_size": 0,
    }


@pytest.mark.parametrize(
    "decision",
    [
        "seed=1",
        "test_size=9",
        "test_fraction=0.3",
        "test_data=t.csv",
        "duplicates=drop",
        "tuned_on=demo",
        "canary_texts=t.csv",
    ],
)
def test_what_decides_on_rows_or_is_certified_is_no_measuring(decision):
    base, other = Settings(), make_settings(parse_overrides([decision]))
    assert result_settings(other) != result_settings(base) and evaluation_settings(
        other
    ) == evaluation_settings(base)


def test_nothing_that_makes_rows_reads_a_measuring_setting(repo):
    allowed = dict.fromkeys(MEASURING, {"evaluation", "runs", "synthesizer"}) | {
        "validation_size": {"finetune", "runs"}
    }
    for name in MEASURING:
        readers = {
            p.relative_to(repo / "dpsynth").parts[0].removesuffix(".py")
            for p in (repo / "dpsynth").rglob("*.py")
            if re.search(rf"settings\.{name}\b", p.read_text(encoding="utf-8"))
        }
        assert readers - {"settings"} <= allowed[name], name
    assert (repo / "dpsynth" / "finetune" / "loop.py").read_text(encoding="utf-8").count(
        "settings.validation_size"
    ) == 1


def test_smoke_profile_is_small_and_keeps_decisions():
    big = make_settings(
        {"profile": "smoke", "epsilon": 3, "model": "gemma3_1b", "num_samples": 30, "num_mauve_samples": 30}
    )
    small = resolve(big)
    assert (small.epsilon, small.model, small.num_samples) == (3, "tiny", 30) and small.batch_size == 64
    assert resolve(small) == small


def test_smoke_profile_trains_the_bundled_model_in_its_own_type():
    big = make_settings({"profile": "smoke", "model": "gemma3_1b", "dtype": "bfloat16", "tuning": "auto"})
    assert (resolve(big).model, resolve(big).dtype) == ("tiny", "float32")
    assert resolve(big.model_copy(update={"profile": "full"})).dtype == "bfloat16"


def test_settings_file_is_plain_yaml(tmp_path):
    dump_settings(Settings(), tmp_path / "s.yaml")
    assert set(yaml.safe_load((tmp_path / "s.yaml").read_text())) == set(Settings.model_fields)
