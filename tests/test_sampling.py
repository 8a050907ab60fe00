"""What the sampling notebook cannot check about itself: exactness, independence, and crashes."""

import dataclasses
import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from dpsynth import sampling
from dpsynth.formats import Rejected, TextFormat
from dpsynth.models import TINY, LanguageModel, adapted_layers, load_model, setup_tuning
from dpsynth.settings import DataError, ModelError, Settings, SettingsError

import jax
import jax.numpy as jnp

FORMAT = TextFormat("[demo][{label}]:", ("bad", "a longer label"))
PROMPTS = FORMAT.prompts


@pytest.fixture(scope="module")
def model():
    """The bundled model, made to end texts at frequent pieces, whatever its weights have learned."""
    model = load_model("tiny")
    model.stop_ids = (
        model.end_id,
        *{i for text in (" the", ".", ",", " of", " and", " to") for i in model.encode([text])[0]},
    )
    return model


ASSIGNMENT = sampling.assign_prompts(11, (0.5, 0.5), 3)


def decode(model, assignment=ASSIGNMENT, **options):
    """Samples by index; tests share sizes where they can, because each size is a compilation."""
    options = {"seed": 3, "max_length": 32, "batch_size": 7, "top_p": 0.95, **options}
    return {
        sample.index: sample
        for sample in sampling.sample_stream(model, PROMPTS, assignment, progress=False, **options)
    }


# prompts


@pytest.mark.parametrize("prior", [(1.0,), (0.5, 0.5), (0.0, 1.0), (0.7, 0.2, 0.1)])
def test_assignment_is_prefix_stable_and_meets_the_prior(prior):
    assignment = sampling.assign_prompts(2000, prior, 5)
    assert (sampling.assign_prompts(77, prior, 5) == assignment[:77]).all()
    assert np.abs(np.bincount(assignment, minlength=len(prior)) / 2000 - prior).max() < 0.005


def test_assignment_depends_on_the_seed():
    assert (sampling.assign_prompts(50, (0.5, 0.5), 1) != sampling.assign_prompts(50, (0.5, 0.5), 2)).any()


# choosing a token


def nucleus_by_sorting(weights, top_p):
    """Reference: full stable sort in float64."""
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order].astype("float64")) / weights.astype("float64").sum()
    kept = order[: int(np.searchsorted(total, top_p, side="left")) + 1]
    return np.isin(np.arange(len(weights)), kept) & (weights > 0)


def random_weights(case, size=1500):
    scores = np.random.default_rng(case).normal(size=size) * (1, 3, 6, 0.1)[case % 4]
    return np.exp(scores - scores.max()).astype("float32")


CASES = {
    **{f"random {i}": random_weights(i) for i in range(8)},
    "ties": np.repeat(np.float32([4, 2, 1, 1, 2, 4, 1, 1]), 40),
    "all equal": np.ones(1000, "float32"),
    "one token": np.eye(1, 700, 123, dtype="float32")[0],
    "bfloat16 ties": np.asarray(jnp.asarray(random_weights(1)).astype("bfloat16"), "float32"),
}


@pytest.mark.parametrize("top_p", [0.013, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_nucleus_is_that_of_a_full_sort(case, top_p):
    weights = CASES[case]
    mask = np.asarray(
        jax.jit(jax.vmap(sampling.in_nucleus, (None, 0, None)), static_argnums=2)(
            weights, np.arange(len(weights)), top_p
        )
    )
    assert (mask == nucleus_by_sorting(weights, top_p)).all()


@pytest.mark.parametrize(
    "case,top_p",
    [("random 1", 0.4), ("random 2", 0.95), ("ties", 0.5), ("one token", 0.9), ("random 4", 1.0)],
)
def test_samples_have_the_distribution_of_the_nucleus(case, top_p):
    weights = CASES[case]
    draw = jax.jit(jax.vmap(lambda key: sampling.sample_nucleus(key, jnp.asarray(weights), top_p)))
    tokens = draw(jax.random.split(jax.random.key(0), 20000))
    counts = np.bincount(tokens, minlength=len(weights))
    expected = weights * nucleus_by_sorting(weights, top_p)
    expected = 20000 * expected / expected.sum()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


def test_top_k_keeps_the_first_of_equals():
    scores = jnp.array([1.0, 2.0, 2.0, 5.0, 2.0])
    assert np.isfinite(sampling.keep_top_k(scores, 3)).tolist() == [False, True, True, True, False]
    assert np.isfinite(sampling.keep_top_k(scores, 1)).tolist() == [False, False, False, True, False]


def test_top_p_counts_the_mass_left_by_top_k():
    logits, allowed = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), jnp.ones(4, bool)
    choice = sampling.Choice(top_k=2, top_p=0.57)  # .4/.7 is .571
    keys = jax.random.split(jax.random.key(0), 200)
    tokens = jax.vmap(lambda key: sampling.choose(key, logits, jnp.zeros(4, bool), allowed, choice))(keys)
    assert set(tokens.tolist()) == {0}


def test_temperature_and_penalty_shape_the_choice():
    logits, allowed, seen = jnp.array([2.0, 1.9, -1.0]), jnp.ones(3, bool), jnp.array([True, False, True])
    greedy = sampling.Choice(temperature=0.5, repetition_penalty=1.2, top_k=1)
    assert int(sampling.choose(jax.random.key(0), logits, seen, allowed, greedy)) == 1
    assert sampling.penalize(logits, seen, 2.0).tolist() == [1.0, pytest.approx(1.9), -2.0]


def test_unsamplable_tokens_have_no_chance(model):
    mask = sampling.samplable(model, model.vocabulary_size + 5)
    assert (
        not mask[[model.pad_id, model.start_id]].any()
        and not mask[-5:].any()
        and mask[list(model.stop_ids)].all()
    )


def test_scores_that_are_not_numbers_end_the_loop():
    assert 0 <= int(sampling.sample_nucleus(jax.random.key(0), jnp.full(10, jnp.nan), 0.5)) < 10


# the engine


def test_products_are_reordered_and_equal():
    def attend(weights, values):
        return jnp.einsum("bkgts,bskh->btkgh", weights, values)

    weights, values = (
        jax.random.normal(jax.random.key(0), (2, 3, 4, 1, 9)),
        jax.random.normal(jax.random.key(1), (2, 9, 3, 50)),
    )
    reordered = sampling.reorder_products(attend)
    assert jnp.allclose(reordered(weights, values), attend(weights, values), atol=1e-5)
    products = [
        next(e for e in jax.make_jaxpr(f)(weights, values).eqns if e.primitive.name == "dot_general")
        for f in (attend, reordered)
    ]
    assert [p.invars[0].aval.shape for p in products] == [(2, 9, 3, 50), (2, 3, 4, 1, 9)]


def greedy_by_full_forward(model, prompt, max_length):
    """Reference: the whole text through the model at every token, no cache."""
    ids, allowed = model.prompt_ids(prompt), sampling.samplable(model, model.vocabulary_size)
    weights = model.trainable, model.frozen
    forward = jax.jit(
        lambda weights, tokens, mask: model.logits(*weights, model.hidden(*weights, tokens, mask))
    )
    new = []
    while len(ids) + len(new) < max_length and (not new or new[-1] not in model.stop_ids):
        row = ids + new
        tokens = np.array([row + [0] * (max_length - len(row))], "int32")
        logits = np.asarray(
            forward(weights, tokens, (np.arange(max_length) < len(row))[None].astype("int32"))
        )[0, len(row) - 1]
        new.append(int(np.argmax(np.where(allowed, logits, -np.inf))))
    return new


def test_greedy_rows_equal_an_uncached_forward(model):
    rows = decode(model, top_k=1)
    for prompt, text in enumerate(PROMPTS):
        sample = next(sample for sample in rows.values() if sample.prompt == prompt)
        expected = greedy_by_full_forward(model, text, 32)
        stopped = expected[-1] in model.stop_ids
        assert sample.text == model.decode(expected[:-1] if stopped else expected)
        assert (sample.finished, sample.tokens) == (stopped, len(expected))


def test_rows_do_not_depend_on_the_batch_size(model):
    assert decode(model, batch_size=2) == decode(model)


def test_short_caches_and_moved_rows_change_nothing(model, monkeypatch):
    options = {"max_length": 64, "batch_size": 8, "assignment": sampling.assign_prompts(16, (0.5, 0.5), 3)}
    plain, reaches, sizes = decode(model, **options), set(), set()
    reach, build = sampling.Decoder._reach, sampling.shrink
    monkeypatch.setattr(sampling.decode, "MANY_ROWS", 1)
    monkeypatch.setattr(
        sampling.Decoder, "_reach", lambda self, slots: reaches.add(reach(self, slots)) or reach(self, slots)
    )
    monkeypatch.setattr(sampling.decode, "shrink", lambda slots, size: sizes.add(size) or build(slots, size))
    assert decode(model, **options) == plain
    assert reaches == {32, 64} and sizes == {2}


def test_rows_do_not_depend_on_other_rows(model):
    rows, among_others = decode(model), decode(model, np.append(ASSIGNMENT[:5], 1 - ASSIGNMENT[5:]))
    assert [among_others[i] for i in range(5)] == [rows[i] for i in range(5)]
    assert among_others[5] != rows[5] and len({sample.text for sample in rows.values()}) > 6


def test_the_seed_decides(model):
    assert decode(model) == decode(model) != decode(model, seed=4)


def test_rows_end_at_stop_tokens_or_at_the_limit(model):
    rows = [sample for seed in range(3) for sample in decode(model, seed=seed).values()]
    assert {sample.finished for sample in rows} == {True, False}
    for sample in rows:
        room = 32 - len(model.prompt_ids(PROMPTS[sample.prompt]))
        assert 1 <= sample.tokens <= room and (sample.finished or sample.tokens == room)


def test_repetition_penalty_forbids_repeats_when_huge(model):
    ids = model.encode([decode(model, repetition_penalty=1e6, top_k=1)[0].text])[0]
    assert len(set(ids)) > 0.8 * len(ids)


def test_a_stream_can_begin_at_a_block(model, monkeypatch):
    monkeypatch.setattr(sampling.decode, "BLOCK", 11)
    assignment = sampling.assign_prompts(22, (0.5, 0.5), 3)
    whole, rest = decode(model, assignment), decode(model, assignment, start=11)
    assert sorted(rest) == [*range(11, 22)] and all(whole[i] == rest[i] for i in rest)
    with pytest.raises(DataError, match="inside a block"):
        decode(model, assignment, start=5)


def test_a_prompt_without_room_names_the_setting(model):
    with pytest.raises(SettingsError, match="sequence_length: 8 leaves no room"):
        decode(model, max_length=8)


def test_adapters_are_merged_and_left_in_place():
    model = load_model("tiny")
    setup_tuning(model, Settings(tuning="lora", lora_rank=2, lora_targets="all"))
    model.assign([value + 0.1 for value in model.trainable])
    expected = greedy_by_full_forward(model, PROMPTS[0], 32)
    rows = decode(model, top_k=1)
    text = model.decode([i for i in expected if i not in model.stop_ids])
    assert {sample.text for sample in rows.values() if sample.prompt == 0} == {text}
    assert all(layer.lora_enabled for layer in adapted_layers(model))


def test_another_family_with_another_cache():
    import keras_hub

    tokenizer = keras_hub.models.GemmaTokenizer(
        proto=str(pathlib.Path(TINY) / "assets" / "tokenizer" / "vocabulary.spm")
    )
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=6144,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=32,
        intermediate_dim=64,
        head_dim=16,
    )
    gemma = LanguageModel(
        keras_hub.models.GemmaCausalLM(backbone, keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)),
        "gemma",
    )
    assert sampling.position_axes(gemma) == 3
    rows = decode(gemma, top_k=1)
    expected = greedy_by_full_forward(gemma, PROMPTS[rows[1].prompt], 32)
    assert rows[1].text == gemma.decode([i for i in expected if i not in gemma.stop_ids])


def test_a_cache_without_positions_is_refused(model):
    recurrent = type(
        "Recurrent",
        (),
        {"name": "recurrent", "empty_cache": staticmethod(lambda batch, length: jnp.zeros((batch, 4)))},
    )
    with pytest.raises(ModelError, match="recurrent"):
        sampling.position_axes(recurrent)


# files


SETTINGS = Settings(
    num_samples=33, num_mauve_samples=4, sequence_length=32, prompt=FORMAT.prompt, sample_batch_size=7
)


@dataclasses.dataclass(frozen=True)
class Picky(TextFormat):
    """Rejects texts of 0, 4, 8, … letters."""

    def decode(self, text):
        return Rejected("multiple of 4") if len(text) % 4 == 0 else super().decode(text)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sampling.decode, "BLOCK", 11)
    monkeypatch.setattr(sampling.decode, "SPARE_BLOCK", 11)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def make(model, folder, settings=SETTINGS, fmt=Picky(FORMAT.prompt, FORMAT.labels)):
    return sampling.sample_to_file(model, settings, fmt, folder, progress=False)


def test_boundaries_cover_every_index_once():
    for n in (1, 5, 64, 512, 513, 10000, 300000):
        edges = sampling.boundaries(n)
        assert edges[0] == 0 and n in edges and edges[-1] == max(2 * n, n + 100)
        assert max(np.diff(edges)) <= sampling.BLOCK and min(np.diff(edges)) > 0


def test_files_hold_the_rows_and_the_rejections(model, small_blocks, tmp_path):
    made = make(model, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "synthetic.jsonl").read_bytes().splitlines()]
    rejected = [json.loads(line) for line in (tmp_path / "a" / "rejected.jsonl").read_bytes().splitlines()]
    assert [*contents(tmp_path / "a")] == [
        "manifest.json",
        "rejected.jsonl",
        "sampling.json",
        "synthetic.jsonl",
        "synthetic.parquet",
    ]
    assert (
        len(rows) == made["rows"] == 33
        and sum(made["rejected"].values()) == len(rejected)
        and made["rejected"]["multiple of 4"] > 0
    )
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows) and [*rows[0]] == [
        "index",
        "label",
        "text",
    ]
    assert {row["index"] for row in rows}.isdisjoint(row["index"] for row in rejected)
    labels = sampling.assign_prompts(66, (0.5, 0.5), SETTINGS.seed)
    assert all(row["label"] == FORMAT.labels[labels[row["index"]]] for row in rows + rejected)
    assert pd.read_parquet(tmp_path / "a" / "synthetic.parquet").to_dict("records") == rows
    assert (
        made["tokens"] > 0
        and made["seconds"] > 0
        and made["tokens_per_second"] > 0
        and 0 < made["unfinished"] < 1
    )


def killed_after(model, folder, monkeypatch, writes):
    """Run until the `writes`-th write, which is torn in the middle of a line."""
    real, count = sampling.append_lines, iter(range(1000))

    def torn(path, rows):
        written = real(path, rows)
        if next(count) == writes:
            with path.open("ab") as file:
                file.write(b'{"index": 99, "te')
            raise KeyboardInterrupt
        return written

    with monkeypatch.context() as patch:
        patch.setattr(sampling.rows, "append_lines", torn)
        with pytest.raises(KeyboardInterrupt):
            make(model, folder)


@pytest.mark.parametrize("writes", [0, 3, 4, 7])
def test_a_killed_run_ends_with_the_same_bytes(model, small_blocks, tmp_path, monkeypatch, writes):
    make(model, tmp_path / "whole")
    killed_after(model, tmp_path / "killed", monkeypatch, writes)
    assert not (tmp_path / "killed" / "synthetic.jsonl").exists()
    made = make(model, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and made["rows"] == 33


def test_a_run_continues_rather_than_starting_again(model, small_blocks, tmp_path, monkeypatch):
    killed_after(model, tmp_path, monkeypatch, 4)
    before = (tmp_path / "synthetic.jsonl.part").read_bytes()
    blocks = len(json.loads((tmp_path / "sampling.json").read_text())["blocks"])
    firsts = []
    real = sampling.Decoder.block
    monkeypatch.setattr(
        sampling.Decoder,
        "block",
        lambda self, first, assignment: firsts.append(first) or real(self, first, assignment),
    )
    make(model, tmp_path)
    assert blocks == 2 and firsts[0] == 22
    assert (tmp_path / "synthetic.jsonl").read_bytes().startswith(before[: before[:200].rfind(b"\n")])


@pytest.mark.parametrize("keep", [0, 0.3, 0.8])
def test_a_file_cut_anywhere_is_made_whole(model, small_blocks, tmp_path, monkeypatch, keep):
    make(model, tmp_path / "whole")
    killed_after(model, tmp_path / "cut", monkeypatch, 5)
    part = tmp_path / "cut" / "synthetic.jsonl.part"
    part.write_bytes(part.read_bytes()[: int(keep * part.stat().st_size)])
    make(model, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_was_changed_while_a_sampling_was_interrupted_is_made_again(
    model, small_blocks, tmp_path, monkeypatch
):
    make(model, tmp_path / "whole")
    killed_after(model, tmp_path / "changed", monkeypatch, 5)
    part, state = (tmp_path / "changed" / name for name in ("synthetic.jsonl.part", "sampling.json"))
    written = part.read_bytes()
    part.write_bytes(written.replace(b'"text": "', b'"text": "not ', 1))  # a whole line still
    kept = state.read_text()
    for damaged in (kept[:-20], "", "\0" * len(kept), kept.replace('"rows": ', '"rows": 1', 1), "[]"):
        state.write_text(damaged)
        with pytest.raises(
            DataError,
            match="sampling.json: damaged; restore it, or remove it and sample again, which gives the same "
                  "rows",
        ):
            make(model, tmp_path / "changed")
    state.write_text(kept)
    make(model, tmp_path / "changed")
    assert contents(tmp_path / "changed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["replacing", "save_state"])
def test_a_run_killed_while_it_finishes(model, small_blocks, tmp_path, monkeypatch, step):
    make(model, tmp_path / "whole")
    real, calls = getattr(sampling.rows, step), []

    def dying(*arguments):
        if (
            (tmp_path / "killed" / "synthetic.parquet").exists()
            or step == "replacing"
            and "parquet" in str(arguments[0])
        ):
            raise KeyboardInterrupt
        calls.append(real(*arguments))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sampling.rows, step, dying)
        with pytest.raises(KeyboardInterrupt):
            make(model, tmp_path / "killed")
    make(model, tmp_path / "killed")
    assert calls and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_complete_folder_is_left_alone(model, small_blocks, tmp_path, monkeypatch):
    first = make(model, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(sampling.rows, "Decoder", None)
    again = make(model, tmp_path)
    assert contents(tmp_path) == before and again["seconds"] == 0
    assert {k: v for k, v in again.items() if "second" not in k} == {
        k: v for k, v in first.items() if "second" not in k
    }


def test_other_settings_or_weights_are_refused(model, small_blocks, tmp_path, monkeypatch):
    killed_after(model, tmp_path, monkeypatch, 3)
    with pytest.raises(DataError, match="begun with temperature 1.0, not 0.5"):
        make(model, tmp_path, SETTINGS.model_copy(update={"temperature": 0.5}))
    values = model.trainable
    model.assign([value * 1.01 for value in values])
    with pytest.raises(DataError, match="other model weights"):
        make(model, tmp_path)
    model.assign(values)
    assert (
        make(model, tmp_path, SETTINGS.model_copy(update={"sample_batch_size": 5, "utility": False}))["rows"]
        == 33
    )


def test_rows_of_unknown_origin_are_not_overwritten(model, tmp_path):
    (tmp_path / "synthetic.jsonl").write_text('{"index": 0, "text": "mine"}\n')
    with pytest.raises(DataError, match="cannot be checked"):
        make(model, tmp_path)


class FakeDecoder:
    """Yields texts without a model."""

    def __init__(self, *arguments, **options):
        pass

    def block(self, first, assignment):
        for i, prompt in enumerate(assignment):
            yield sampling.Sample(first + i, int(prompt), f"text {first + i}", True, 3)


def test_too_many_rejections_say_why(model, small_blocks, tmp_path, monkeypatch):
    class Never(TextFormat):
        def decode(self, text):
            return Rejected("never")

    monkeypatch.setattr(sampling.rows, "Decoder", FakeDecoder)
    small = SETTINGS.model_copy(update={"num_samples": 5})
    with pytest.raises(
        DataError, match=r"only 0 of 105 samples made rows, 5 were wanted; rejected: \{'never': 105\}"
    ):
        make(model, tmp_path, small, Never(FORMAT.prompt, FORMAT.labels))


def test_one_row_does_not_hang_on_the_first_two_samples(model, tmp_path, monkeypatch):
    class Seldom(TextFormat):
        def decode(self, text):
            return super().decode(text) if text == "text 40" else Rejected("seldom")

    monkeypatch.setattr(sampling.rows, "Decoder", FakeDecoder)
    made = make(
        model, tmp_path, SETTINGS.model_copy(update={"num_samples": 1}), Seldom(FORMAT.prompt, FORMAT.labels)
    )
    assert made["rows"] == 1 and made["rejected"] == {"seldom": 40}
    assert [
        json.loads(line)["index"] for line in (tmp_path / "synthetic.jsonl").read_bytes().splitlines()
    ] == [40]


def test_no_label_column_no_label(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling.rows, "Decoder", FakeDecoder)
    settings = Settings(
        num_samples=4, num_mauve_samples=2, sequence_length=20, prompt="A review:", label_column=""
    )
    make(model, tmp_path, settings, TextFormat("A review:", ("",)))
    rows = [json.loads(line) for line in (tmp_path / "synthetic.jsonl").read_bytes().splitlines()]
    assert rows == [{"index": i, "text": f"text {i}"} for i in range(4)]
    assert pd.read_parquet(tmp_path / "synthetic.parquet").to_dict("records") == rows


def test_unfinished_is_a_share_of_the_rows_that_are_kept(model, tmp_path, monkeypatch):
    class LongReplacements(FakeDecoder):
        def block(self, first, assignment):
            for sample in super().block(first, assignment):
                yield dataclasses.replace(
                    sample, text=sample.text * (sample.index > 0), finished=sample.index in (1, 2, 3, 5)
                )

    monkeypatch.setattr(sampling.rows, "Decoder", LongReplacements)
    made = make(model, tmp_path, SETTINGS.model_copy(update={"num_samples": 5}), FORMAT)
    assert [
        json.loads(line)["index"] for line in (tmp_path / "synthetic.jsonl").read_bytes().splitlines()
    ] == [1, 2, 3, 4, 5]
    assert made["rows"] == 5 and made["rejected"] == {"empty": 1} and made["unfinished"] == 1 / 5
    assert (
        make(model, tmp_path, SETTINGS.model_copy(update={"num_samples": 5}), FORMAT)["unfinished"] == 1 / 5
    )


def test_large_runs_have_blocks_of_equal_size(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling.rows, "Decoder", FakeDecoder)
    made = make(model, tmp_path, SETTINGS.model_copy(update={"num_samples": 1300}), FORMAT)
    assert made["rows"] == 1300 and made["rejected"] == {} and made["unfinished"] == 0
    assert len(json.loads((tmp_path / "sampling.json").read_text())["blocks"]) == 3
