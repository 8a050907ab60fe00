"""The training step on a model of one layer: per-row gradients, the grid, Poisson draws of any size, resume, and what leaves the run folder."""
import json
import math

import numpy as np
import pandas as pd
import pytest

from dpsynth.data import TokenStore, from_frame
from dpsynth.finetune import (Trainer, bucket_lengths, clip_to_grid, example_loss, finetune_run, flatten, label_shares, make_mean_loss,
                              make_private_sum, microbatches, rows_of_units, self_check, train)
from dpsynth.models import LanguageModel, load_model, setup_tuning
from dpsynth.privacy import Mechanism, Randomness
from dpsynth.settings import ModelError, PrivacyError, Settings, SettingsError

import jax
import jax.numpy as jnp
import keras
import keras_hub


@pytest.fixture(scope="module")
def micro():
    """A Gemma3 of one layer with the bundled tokenizer: everything real but the size."""
    keras.utils.set_random_seed(3)
    preprocessor = load_model("tiny").causal_lm.preprocessor
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=6144, image_size=16, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=16, intermediate_dim=32, head_dim=8,
        query_head_dim_normalize=True, use_query_key_norm=True, use_post_ffw_norm=True, use_post_attention_norm=True,
        use_sliding_window_attention=True, sliding_window_size=64, vision_encoder=None)
    return LanguageModel(keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor), "micro")


@pytest.fixture(scope="module")
def store(micro, tmp_path_factory):
    texts = ["short", "a rather longer text about nothing at all " * 2, "x y z", "one more row of words", "ok", "the end " * 9] * 4
    prompt = micro.prompt_ids("[x][positive]:")
    return TokenStore.write(tmp_path_factory.mktemp("store") / "tokens", ((prompt, ids) for ids in micro.response_ids(texts)))


SETTINGS = Settings(sequence_length=48, microbatch_size=4, batch_size=8, epochs=1, epsilon=8, learning_rate=0.01)


def trainer(micro, store, settings=SETTINGS, run="run", secret=bytes(range(32)), **changes):
    made = Mechanism(**{"num_units": len(store), "expected_batch_size": 8, "steps": 4, "noise_multiplier": 1.0, "delta": 1e-3, **changes})
    return Trainer(micro, store, settings, made, Randomness(secret, run))


def test_loss_is_normalised_by_the_rows_own_length(micro):
    row = micro.prompt_ids("[x]:") + micro.response_ids(["some words here"])[0]
    start = len(micro.prompt_ids("[x]:"))
    values = [float(example_loss(micro, micro.trainable, micro.frozen, jnp.array(row + [0] * (n - len(row))), start, len(row))) for n in (len(row), 40, 90)]
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    hidden = micro.hidden(micro.trainable, micro.frozen, jnp.array([row[:-1]]), jnp.ones((1, len(row) - 1), "int32"))
    logp = jax.nn.log_softmax(micro.logits(micro.trainable, micro.frozen, hidden)[0])
    expected = -np.mean([logp[i, row[i + 1]] for i in range(start - 1, len(row) - 1)])
    assert values[0] == pytest.approx(float(expected), abs=1e-4)


def test_large_vocabularies_are_scored_in_chunks_with_the_same_loss(micro, monkeypatch):
    row = jnp.array(micro.prompt_ids("[x]:") + micro.response_ids(["some words here, quite a few of them"])[0])
    whole = float(example_loss(micro, micro.trainable, micro.frozen, row, 4, len(row)))
    monkeypatch.setattr("dpsynth.finetune.CHUNK_SCORES", 3 * micro.vocabulary_size)
    assert float(example_loss(micro, micro.trainable, micro.frozen, row, 4, len(row))) == pytest.approx(whole, abs=1e-5)


def test_gradient_of_a_unit_is_unchanged_by_its_batch_mates(micro, store):
    one = trainer(micro, store)
    alone = flatten(one.gradient_sum(np.array([0])))
    for mates in ([1], [5, 1], [2, 3, 4, 5]):
        together = flatten(one.gradient_sum(np.array([0, *mates])))
        others = flatten(one.gradient_sum(np.array(mates)))
        assert np.abs(together.astype(np.int64) - others - alone).max() <= 8  # grid points of 2^-20: float rounding of other shapes


def test_sum_is_bit_equal_in_any_order(micro, store):
    one, order = trainer(micro, store), np.arange(12)
    forward, backward = (flatten(one.gradient_sum(o)) for o in (order, order[::-1].copy()))
    assert forward.dtype == np.int32 and (forward == backward).all()


def test_microbatch_size_changes_nothing_but_float_rounding(micro, store):
    sums = [flatten(trainer(micro, store, SETTINGS.model_copy(update={"microbatch_size": m})).gradient_sum(np.arange(12))) for m in (1, 4, 7)]
    for other in sums[1:]:
        assert np.abs(sums[0] - other).max() <= 16


@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.02)])
def test_one_extreme_unit_moves_the_sum_by_at_most_the_sensitivity(micro, store, clip, bound):
    one = trainer(micro, store, clip=clip, l2_clip_norm=bound)
    one.trainable = [a * 50 for a in one.trainable]  # extreme gradients
    without, with_it = (flatten(one.gradient_sum(np.array(i))).astype(np.float64) for i in ([1, 2], [1, 2, 0]))
    moved = np.linalg.norm(with_it - without) / one.session.grid
    assert 0 < moved <= one.session.mechanism.sensitivity == bound


def test_clipping_agrees_with_jax_privacy():
    from jax_privacy import clipped_grad
    data = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * np.array([[5], [0.01], [1], [3], [0], [2]], np.float32)
    loss = lambda w, x: jnp.sum(w * x)
    for clip, options in (("normalize", {"l2_clip_norm": 0.0, "rescale_to_unit_norm": True}), ("bound", {"l2_clip_norm": 1.5})):
        theirs = clipped_grad(loss, keep_batch_dim=False, dtype=jnp.float32, **options)(jnp.zeros(40), jnp.asarray(data))
        ours = sum(np.asarray(clip_to_grid([jnp.asarray(row)], clip, 1.5, 2.0**20)[0][0]) for row in data) / 2.0**20
        assert np.abs(ours - np.asarray(theirs)).max() < 6 * 2.0**-15


@pytest.mark.parametrize("gradient", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, np.nan], [0.0, 0.0], [1e30, 1e30]])
@pytest.mark.parametrize("clip", ["normalize", "bound"])
def test_unusable_gradients_count_as_zero(gradient, clip):
    points, notes = clip_to_grid([jnp.array(gradient, "float32")], clip, 1.0, 2.0**20)
    assert (np.asarray(points[0]) == 0).all() and bool(notes[1]) == (gradient != [0.0, 0.0])


def test_norm_on_the_grid_never_exceeds_the_bound():
    rng, clip = np.random.default_rng(1), jax.jit(lambda g: clip_to_grid([g], "normalize", 1.0, 2.0**20)[0][0])
    for size in (1, 7, 3000):
        for exponent in range(-12, 12):
            points = np.asarray(clip(jnp.asarray(rng.normal(size=size) * 10.0**exponent, jnp.float32))).astype(np.float64)
            assert np.linalg.norm(points) / 2.0**20 <= 1.0


def test_empty_draw_and_all_padding_microbatch_are_exactly_zero(micro, store):
    one = trainer(micro, store)
    assert not flatten(one.gradient_sum(np.array([], int))).any()
    total = [jnp.zeros(a.shape, "int32") for a in one.trainable]
    padding = one._batch(np.full(4, -1), 48)
    total, notes = make_private_sum(micro, one.session)(total, jnp.zeros(2, "int32"), one.trainable, one.frozen, padding)
    assert not flatten(total).any() and not notes.any()


def test_an_empty_draw_is_an_update_of_pure_noise(micro, store, monkeypatch):
    one = trainer(micro, store)
    monkeypatch.setattr(Mechanism, "batch", lambda *_: np.array([], int))
    before = flatten(one.trainable)
    one.update()
    assert one.session.step == 1 and (flatten(one.trainable) != before).mean() > 0.99


def test_every_update_beyond_the_last_is_refused(micro, store):
    one = trainer(micro, store, steps=1)
    one.update()
    after = flatten(one.trainable)
    with pytest.raises(PrivacyError):
        one.update()
    assert (flatten(one.trainable) == after).all()


def test_private_sum_without_noise_points_where_the_plain_gradient_points(micro, store):
    plain = trainer(micro, store, noise_multiplier=0.0, target_epsilon=math.inf)
    bounded = trainer(micro, store, clip="bound", l2_clip_norm=1e3)
    ours = flatten(bounded.gradient_sum(np.arange(6))) / bounded.session.grid
    assert ours == pytest.approx(flatten(plain.gradient_sum(np.arange(6))), abs=1e-2)


def test_resume_ends_with_the_same_bits(micro, store, tmp_path):
    straight, broken, resumed = (trainer(micro, store) for _ in range(3))
    train(straight, tmp_path / "a.npz", progress=False)
    for _ in range(2):
        broken.update()
    broken.save(tmp_path / "b.npz")
    broken.update()  # lost by the crash
    train(resumed, tmp_path / "b.npz", progress=False)
    assert (flatten(straight.trainable) == flatten(resumed.trainable)).all()


# ---- groups of rows as units ----------------------------------------------------------------------------------------

def test_rows_of_a_unit_are_chosen_by_the_unit_alone():
    units = np.array([0, 1, 0, 1, 1, 1, 2])
    table = rows_of_units(units, 2, seed=3)
    more = rows_of_units(np.append(units, [0, 0, 3]), 2, seed=3)
    assert (table[1:] == more[1:3]).all() and set(table[0]) == {0, 2} and table[2].tolist() == [6, -1]
    assert len({tuple(rows_of_units(units, 2, seed)[1]) for seed in range(9)}) > 1


def grouped(micro, store, units, settings=SETTINGS, **changes):
    made = Mechanism(**{"num_units": len(units), "expected_batch_size": 2, "steps": 3, "noise_multiplier": 1.0, "delta": 1e-3, "unit": "user", **changes})
    return Trainer(micro, store, settings, made, Randomness(bytes(32), "groups"), units)


def test_a_group_has_one_gradient_the_mean_of_its_rows(micro, store):
    units = np.array([[0, 1], [2, -1], [3, 4], [5, 6]])
    one = grouped(micro, store, units, clip="bound", l2_clip_norm=1e3)
    ours = flatten(one.gradient_sum(np.array([0, 1]))) / one.session.grid
    rows = trainer(micro, store, noise_multiplier=0.0, target_epsilon=math.inf)
    wanted = flatten(rows.gradient_sum(np.array([0, 1]))) / 2 + flatten(rows.gradient_sum(np.array([2])))
    assert ours == pytest.approx(wanted, abs=1e-2) and np.abs(wanted).max() > 0.1


def test_a_whole_group_moves_the_sum_by_at_most_the_sensitivity(micro, store):
    units = np.array([[0, 1, 2, 3, 4, 5], [6, -1, -1, -1, -1, -1]])
    one = grouped(micro, store, units)
    one.trainable = [a * 50 for a in one.trainable]
    without, with_it = (flatten(one.gradient_sum(np.array(i))).astype(np.float64) for i in ([1], [1, 0]))
    assert 0.9 < np.linalg.norm(with_it - without) / one.session.grid <= 1.0


def test_groups_are_drawn_and_counted_as_units(micro, store):
    units = np.array([[0, 1], [2, -1], [3, 4], [5, 6]])
    one, drawn = grouped(micro, store, units), []
    one.gradient_sum = lambda indices: drawn.extend(indices) or [jnp.zeros(a.shape, "int32") for a in one.trainable]
    for _ in range(3):
        one.update()
    assert set(drawn) <= {0, 1, 2, 3} and one.session.mechanism.sampling_probability == 0.5


# ---- a look back ---------------------------------------------------------------------------------------------------

def test_self_check_finds_missing_noise_missing_updates_and_an_idle_model(micro, store):
    good, silent, halved, short = (trainer(micro, store) for _ in range(4))
    before = good.trainable
    silent.session._grid_noise = lambda count: np.zeros(count, np.int32)
    whole = halved.session._grid_noise
    halved.session._grid_noise = lambda count: whole(count) // 2
    for one in (good, silent, halved):
        for _ in range(4):
            one.update()
    short.update()
    assert self_check(good, before)["unusable"] == 0
    for bad, start, words in ((silent, before, "noise was 0 "), (halved, before, "noise was 0.5"), (short, before, "1 of 4 updates"),
                              (good, good.trainable, "changed no weight")):
        with pytest.raises(PrivacyError, match=words):
            self_check(bad, start)


def test_label_shares_are_shares_whatever_the_noise_did():
    assert label_shares([30, 10]) == [0.75, 0.25] and label_shares([-3, 7]) == [0, 1] and label_shares([-3, -1]) == [0.5, 0.5]


def test_other_secrets_and_other_runs_end_elsewhere(micro, store):
    ends = []
    for run, secret in (("a", bytes(32)), ("b", bytes(32)), ("a", bytes(range(32)))):
        one = trainer(micro, store, run=run, secret=secret)
        one.update()
        ends.append(flatten(one.trainable))
    assert all((ends[i] != ends[j]).mean() > 0.4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_buckets_cover_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    for limit in (48, 96, 250, 512):
        parts = list(microbatches(np.arange(300), np.minimum(lengths, limit), bucket_lengths(limit), 16))
        assert sorted(i for _, p in parts for i in p if i >= 0) == list(range(300)) and all(len(p) == 16 for _, p in parts)
        assert all(min(lengths[i], limit) <= bucket for bucket, p in parts for i in p if i >= 0)


def test_training_without_privacy_lowers_the_loss(micro, store):
    one = trainer(micro, store, SETTINGS.model_copy(update={"learning_rate": 0.02}), noise_multiplier=0.0, target_epsilon=math.inf, steps=30)
    loss = make_mean_loss(micro)
    batch = store.batch(np.arange(8), 48)
    before = float(loss(one.trainable, one.frozen, batch).mean())
    for _ in range(30):
        one.update()
    assert float(loss(one.trainable, one.frozen, batch).mean()) < before - 0.5


# ---- a whole run folder --------------------------------------------------------------------------------------------

RUN = Settings(model="tiny", tuning="lora", lora_rank=1, lora_targets="value", sequence_length=32, batch_size=8, microbatch_size=8, epochs=0.4,
               epsilon=8, validation_size=4, prompt="[{label}]:", ledger="runs")


def splits(changed=None, settings=RUN):
    rows = [{"text": f"row {i} was {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]
    if changed:
        rows[0] = {"text": changed, "label": 1}
    return from_frame(pd.DataFrame(rows), settings, test=pd.DataFrame(rows[:10]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dp"
    finetune_run(RUN, splits(), folder, progress=False)
    return folder


def test_run_releases_an_adapter_and_a_certificate_that_verifies(run):
    from dpsynth.certificate import verify
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert verify(certificate)["epsilon"] <= 8 and certificate["num_units"] == 40 - 0
    assert {p.name for p in (run / "release").iterdir()} == {"adapter.npz", "certificate.json", "certificate.md"}


def test_the_secret_is_in_no_file_outside_private(run):
    secret = (run / "private" / "secret").read_bytes()
    forms = (secret, secret.hex().encode(), repr(secret)[2:-1].encode())
    for path in run.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert not any(form in path.read_bytes() for form in forms), path


def test_a_finished_run_loads_and_changed_epsilon_or_data_refuses(run):
    finetune_run(RUN, splits(), run, progress=False)
    for settings, data in ((RUN.model_copy(update={"epsilon": 9.0}), splits()), (RUN, splits("an entirely different row"))):
        with pytest.raises(PrivacyError, match="started with other"):
            finetune_run(settings, data, run, progress=False)


def test_an_outlier_row_changes_no_released_byte_that_is_not_a_dp_output(run, tmp_path):
    folder = tmp_path / "dp"
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "secret").write_bytes((run / "private" / "secret").read_bytes())
    finetune_run(RUN, splits("\u2603 " * 500 + "a row of another world"), folder, progress=False)
    for name in ("certificate.json", "certificate.md"):
        assert (folder / "release" / name).read_bytes() == (run / "release" / name).read_bytes()
    assert (folder / "release" / "adapter.npz").stat().st_size == (run / "release" / "adapter.npz").stat().st_size


def test_two_runs_of_the_same_settings_differ(run, tmp_path):
    finetune_run(RUN, splits(), tmp_path / "dp", progress=False)
    with np.load(run / "release" / "adapter.npz") as one, np.load(tmp_path / "dp" / "release" / "adapter.npz") as two:
        assert all((one[n] != two[n]).any() for n in one.files)


def test_monitoring_stays_private_and_is_certified(tmp_path):
    settings = RUN.model_copy(update={"monitor": "private"})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    assert (tmp_path / "dp" / "private" / "losses.jsonl").exists()
    assert "operator" in json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())["monitor"]


def test_counts_are_estimated_once_and_used(tmp_path):
    settings = RUN.model_copy(update={"label_prior": "private", "unit_count": "private", "access_share": 0.2})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    counts = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())
    assert certificate["num_units"] == counts["units"] and len(counts["labels"]) == 2
    assert json.loads((tmp_path / "dp" / "release" / "label_prior.json").read_text()) == label_shares(counts["labels"])
    before = (tmp_path / "dp" / "private" / "counts.json").read_bytes()
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    assert (tmp_path / "dp" / "private" / "counts.json").read_bytes() == before


def test_overlap_with_a_corpus_is_estimated_and_stated(tmp_path):
    settings = RUN.model_copy(update={"contamination_corpus": "corpus.csv", "access_share": 0.2})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False, overlaps=lambda settings, records: 10**6)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    count = json.loads((tmp_path / "dp" / "private" / "counts.json").read_text())["overlaps"]
    assert abs(count - 10**6) < 50 and f"about {count:,} units share 50 words with corpus.csv" in certificate["base_model"]["contamination"]
    assert "units that overlap the corpus" in [a["what"] for a in certificate["accesses"]]


def test_canaries_take_part_as_their_coins_say(tmp_path):
    from dpsynth.canaries import CanaryCoins
    settings = RUN.model_copy(update={"canaries": 60})
    finetune_run(settings, splits(), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    included = CanaryCoins.flip(60, tmp_path / "dp" / "private").included
    assert certificate["num_units"] == 100 and len(TokenStore(tmp_path / "dp" / "private" / "tokens")) == 40 + included.sum()
    assert 12 < included.sum() < 48


def test_a_run_is_charged_once_and_stays_charged(run, tmp_path):
    from dpsynth.ledger import Ledger
    from dpsynth.settings import BudgetError
    ledger = Ledger(run.parent / ".ledger.sqlite")
    (dataset,) = ledger.datasets()
    assert [r.state for r in ledger.charged(dataset)] == ["finished"] and dataset.units == 40
    certificate = json.loads((run / "release" / "certificate.json").read_text())
    assert certificate["composed"] == {"epsilon": pytest.approx(certificate["epsilon"], rel=1e-3), "delta": certificate["delta"], "releases": 1}
    finetune_run(RUN, splits(), run, progress=False)
    assert len(ledger.charged(dataset)) == 1
    ledger.set_cap(dataset, 10.0)
    with pytest.raises(BudgetError, match="over the cap 10"):  # one more row is the same budget
        finetune_run(RUN, splits("an entirely different row"), run.parent / "again", progress=False)
    assert not (run.parent / "again" / "release" / "adapter.npz").exists()
    ledger.set_cap(dataset, math.inf)


def test_a_stopped_run_is_charged(tmp_path, monkeypatch):
    from dpsynth.ledger import Ledger
    monkeypatch.setattr(Trainer, "update", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        finetune_run(RUN, splits(), tmp_path / "dp", progress=False)
    ledger = Ledger(tmp_path / ".ledger.sqlite")
    assert [r.state for r in ledger.charged(ledger.datasets()[0])] == ["started"]


def test_a_column_can_be_the_unit(tmp_path):
    settings = RUN.model_copy(update={"unit": "user", "max_records_per_unit": 3, "batch_size": 4})
    rows = pd.DataFrame({"text": [f"row {i} of a user" for i in range(40)], "label": [i % 2 for i in range(40)], "user": [f"u{i // 4}" for i in range(40)]})
    finetune_run(settings, from_frame(rows, settings, test=rows[:8]), tmp_path / "dp", progress=False)
    certificate = json.loads((tmp_path / "dp" / "release" / "certificate.json").read_text())
    assert (certificate["num_units"], certificate["unit"], certificate["max_records_per_unit"]) == (10, "user", 3)
    assert not any(b"u3" in p.read_bytes() for p in (tmp_path / "dp" / "release").iterdir() if p.suffix != ".npz")


def test_without_privacy_there_is_no_certificate(tmp_path):
    finetune_run(RUN.model_copy(update={"epsilon": math.inf}), splits(), tmp_path / "plain", progress=False)
    assert not (tmp_path / "plain" / "release" / "certificate.json").exists()


def test_layers_that_mix_examples_are_refused():
    from dpsynth.models import refuse_cross_example_layers
    with pytest.raises(ModelError, match="mixes the examples"):
        refuse_cross_example_layers(keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]))


def test_prompt_longer_than_the_sequence_is_refused(tmp_path):
    settings = RUN.model_copy(update={"sequence_length": 4})
    with pytest.raises(SettingsError, match="sequence_length"):
        finetune_run(settings, splits(settings=settings), tmp_path / "dp", progress=False)


def test_full_tuning_refuses_half_precision():
    with pytest.raises(SettingsError, match="float32"):
        setup_tuning(load_model("tiny", "bfloat16"), Settings(tuning="full", dtype="bfloat16"))
