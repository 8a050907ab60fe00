"""Line 6: the noise: its size and shape, its independence, its secret, and the exact sum it is added to."""

from scipy import stats
import numpy as np
import pickle
import pytest

from parts import RUN, SECRET, SETTINGS, banded, mechanism, splits, trainer
from dpsynth.finetune import finetune_run, flatten
from dpsynth.privacy import Randomness, Session, grid_bits, load_secret
from dpsynth.runs.run import Run
from dpsynth.settings import PrivacyError


@pytest.mark.parametrize("clip, bound", [("normalize", 1.0), ("bound", 0.25)])
def test_noise_has_the_promised_standard_deviation_and_is_normal(clip, bound):
    made = mechanism(clip=clip, l2_clip_norm=bound)
    session = Session(made, Randomness(SECRET, "run"))
    session.batch()
    noise = session.release(np.zeros(200_000, np.int32)) * made.expected_batch_size
    assert noise.std() == pytest.approx(made.noise_multiplier * bound, rel=0.01)
    assert stats.kstest(noise / noise.std(), "norm").pvalue > 1e-3


def test_noise_tail_and_resolution():
    noise = Randomness(SECRET, "run").gaussians("noise", 0, 2_000_000)
    assert np.unique(noise).size == noise.size and np.abs(noise).max() > 4.5
    assert stats.kstest(noise, "norm").pvalue > 1e-3


def test_noise_is_independent_over_steps_runs_secrets_and_from_batches():
    base = Randomness(SECRET, "run").gaussians("noise", 0, 100_000)
    for other in (
        Randomness(SECRET, "run").gaussians("noise", 1, 100_000),
        Randomness(SECRET, "other").gaussians("noise", 0, 100_000),
        Randomness(bytes(32), "run").gaussians("noise", 0, 100_000),
        Randomness(SECRET, "run").gaussians("batch", 0, 100_000),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.015


def test_no_stream_serves_two_purposes_or_two_updates(monkeypatch):
    asked, words = [], Randomness._words
    monkeypatch.setattr(
        Randomness, "_words", lambda self, *stream: asked.append(stream[:2]) or words(self, *stream)
    )
    session = Session(banded(), Randomness(SECRET, "run"))
    for _ in range(3):
        session.batch()
        session.release(np.zeros(5, np.int32))
    drawn = [stream for stream in asked if stream != ("group", 0)]  # a unit keeps its group
    assert len(drawn) == len(set(drawn)) == 6


def test_the_same_step_draws_the_same_numbers_again():
    one, two = Randomness(SECRET, "run"), Randomness(SECRET, "run")
    assert (one.gaussians("noise", 7, 99) == two.gaussians("noise", 7, 99)).all()
    assert (mechanism().batch(one, 3) == mechanism().batch(two, 3)).all()


def test_sum_wraps_so_that_a_large_batch_cannot_exceed_the_accounted_range():
    assert 2 * 1024 * 2 ** grid_bits(1024) <= 2**31 and grid_bits(10**6) < grid_bits(1024) == 20


def test_secret_is_private_to_its_file(tmp_path):
    secret = load_secret(tmp_path / "private")
    assert len(secret) == 32 and secret == load_secret(tmp_path / "private") != load_secret(
        tmp_path / "other"
    )
    assert (tmp_path / "private" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    randomness = Randomness(secret, "run")
    assert secret.hex() not in repr(randomness) and str(secret) not in repr(vars(randomness).get("run_id"))
    with pytest.raises(PrivacyError):
        pickle.dumps(randomness)


def test_sum_is_bit_equal_in_any_order(micro, store):
    one, order = trainer(micro, store), np.arange(12)
    forward, backward = (flatten(one.gradient_sum(o)) for o in (order, order[::-1].copy()))
    assert forward.dtype == np.int32 and (forward == backward).all()


def test_neither_the_size_of_microbatches_nor_the_order_changes_a_bit_of_the_sum(micro, store):
    units = np.arange(13)  # one CPU takes 2, 3 and 4 of them a call, filled up by 1, 2 and 3
    sums = [
        flatten(
            trainer(micro, store, SETTINGS.model_copy(update={"microbatch_size": m})).gradient_sum(
                units
            )
        )
        for m in (1, 3, 7)
    ]
    sums.append(flatten(trainer(micro, store).gradient_sum(units[::-1].copy())))
    assert all((sums[0] == other).all() for other in sums[1:])


def test_other_secrets_and_other_runs_end_elsewhere(micro, store):
    ends = []
    for run, secret in (("a", bytes(32)), ("b", bytes(32)), ("a", bytes(range(32)))):
        one = trainer(micro, store, run=run, secret=secret)
        one.update()
        ends.append(flatten(one.trainable))
    assert all((ends[i] != ends[j]).mean() > 0.4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_secret_is_in_no_file_outside_private(run):
    secret = (run / "private" / "secret").read_bytes()
    forms = (secret, secret.hex().encode(), repr(secret)[2:-1].encode())
    for path in run.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert not any(form in path.read_bytes() for form in forms), path


def test_two_runs_of_the_same_settings_differ(run, tmp_path):
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    with (
        np.load(run / "release" / "adapter.npz") as one,
        np.load(tmp_path / "dp" / "release" / "adapter.npz") as two,
    ):
        assert all((one[n] != two[n]).any() for n in one.files)
