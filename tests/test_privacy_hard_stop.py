"""Line 7: no update after the last, no second draw, no resuming of a changed run; a self-check of what was
done."""

import json

import jax
import numpy as np
import pytest

from parts import RUN, SECRET, mechanism, splits, trainer
import dpsynth.finetune
import dpsynth.privacy
from dpsynth.finetune import computation, finetune_run, flatten, self_check, train
from dpsynth.ledger import RUNS_LEDGER, Ledger
from dpsynth.privacy import Randomness, Session, bind_run, run_identity
from dpsynth.runs.run import Run
from dpsynth.settings import PrivacyError, SettingsError


def test_step_after_the_last_is_refused():
    session = Session(mechanism(steps=2), Randomness(SECRET, "run"))
    for _ in range(2):
        session.batch()
        session.release(np.zeros(3, np.int32))
    with pytest.raises(PrivacyError, match="all 2 updates are done"):
        session.batch()
    with pytest.raises(PrivacyError):
        session.release(np.zeros(3, np.int32))


def test_a_sum_is_released_once():
    session = Session(mechanism(), Randomness(SECRET, "run"))
    session.batch()
    session.release(np.zeros(3, np.int32))
    with pytest.raises(PrivacyError, match="released once"):
        session.release(np.zeros(3, np.int32))


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("settings", json.dumps({"epsilon": 9}), "settings .epsilon: 8, now 9"),
        ("data", "other", "training rows"),
        ("code", "other", "dpsynth code"),
        ("base_model", "other", "base model"),
        ("libraries", json.dumps({"jax": "0"}), "libraries .*, now "),
        ("computation", json.dumps({"microbatch_size": 4}), "devices .microbatch_size: 8, now 4"),
        (
            "computation",
            json.dumps({"microbatch_size": 8, "device": "h100"}),
            "devices .device: None, now h100",
        ),
    ],
)
def test_changed_settings_data_or_code_refuse_to_resume(tmp_path, part, value, words):
    private = tmp_path / "run" / "private"
    private.mkdir(parents=True)
    identity = run_identity(json.dumps({"epsilon": 8}), "fingerprint", "hash", {"microbatch_size": 8})
    assert bind_run(private, identity) == bind_run(private, identity)
    with pytest.raises(PrivacyError, match=words) as error:
        bind_run(private, {**identity, part: value})
    assert "\n" not in str(error.value)
    free = part in ("code", "libraries", "computation")
    assert not free or bind_run(private, {**identity, part: value}, finished=True) == bind_run(
        private, identity
    )


def test_every_module_that_decides_a_release_is_in_the_identity_of_a_run():
    names = set(dpsynth.privacy.code_modules())
    assert {
        f"{name}.py"
        for name in (
            "state",
            "audit/replay",
            "audit/contamination",
            "demo/writing",
            "files",
            "manifest/entries",
            "settings/flat",
            "ledger/store",
            "runs/folder",
            "runs/stages",
            "runs/surveys",
            "runs/__init__",
            "canaries",
            "finetune/run",
            "finetune/clipping",
            "data/readers",
            "privacy/session",
            "__init__",
        )
    } <= names
    assert not names & {"cli/checking.py", "runs/sweep.py", "synthesizer.py", "_modidx.py"} and not any(
        name.startswith("evaluation/") for name in names
    )


def test_every_update_beyond_the_last_is_refused(micro, store):
    one = trainer(micro, store, steps=1)
    one.update()
    after = flatten(one.trainable)
    with pytest.raises(PrivacyError):
        one.update()
    assert (flatten(one.trainable) == after).all()


def test_resume_ends_with_the_same_bits(micro, store, tmp_path):
    straight, broken, resumed = (trainer(micro, store) for _ in range(3))
    train(straight, tmp_path / "a.npz", progress=False)
    for _ in range(2):
        broken.update()
    broken.save(tmp_path / "b.npz")
    broken.update()  # lost by the crash
    train(resumed, tmp_path / "b.npz", progress=False)
    assert (flatten(straight.trainable) == flatten(resumed.trainable)).all()


@pytest.mark.parametrize("other", [{"run": "other rows"}, {"secret": bytes(range(32, 64))}])
def test_a_checkpoint_of_another_run_is_not_restored(micro, store, tmp_path, other):
    theirs, mine = trainer(micro, store, **other), trainer(micro, store)
    theirs.update()
    theirs.save(tmp_path / "checkpoint.npz")
    with pytest.raises(PrivacyError, match="checkpoint.npz: it is of another run"):
        train(mine, tmp_path / "checkpoint.npz", progress=False)
    assert mine.session.step == 0


def test_self_check_finds_missing_noise_missing_updates_and_an_idle_model(micro, store):
    good, silent, halved, short, made_up_for = (trainer(micro, store) for _ in range(5))
    before = good.trainable
    silent.session._grid_noise = lambda count: np.zeros(count, np.int32)
    whole = halved.session._grid_noise
    halved.session._grid_noise = lambda count: whole(count) // 2
    made_up_for.session._grid_noise = lambda count: np.rint(
        whole(count) * (0 if made_up_for.session.step == 0 else (4 / 3) ** 0.5)
    ).astype(np.int32)
    for one in (good, silent, halved, made_up_for):
        for _ in range(4):
            one.update()
    short.update()
    assert self_check(good, before)["unusable"] == 0
    for bad, start, words in (
        (silent, before, "noise was 0 "),
        (halved, before, "noise was 0.5"),
        (made_up_for, before, "3 of 4 updates had noise"),
        (short, before, "1 of 4 updates"),
        (good, good.trainable, "changed no weight"),
    ):
        with pytest.raises(PrivacyError, match=words):
            self_check(bad, start)


def test_a_finished_run_loads_and_changed_epsilon_or_data_refuses(run):
    finetune_run(Run(RUN, run), splits(), progress=False)
    for settings, data in (
        (RUN.model_copy(update={"epsilon": 9.0}), splits()),
        (RUN, splits("an entirely different row")),
    ):
        with pytest.raises(PrivacyError, match="started with other"):
            finetune_run(Run(settings, run), data, progress=False)


def test_a_run_that_is_not_finished_keeps_its_microbatches_and_devices(tmp_path, monkeypatch):
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    smaller = RUN.model_copy(update={"microbatch_size": 4})
    finetune_run(Run(smaller, tmp_path / "dp"), splits(), progress=False)
    for file in (tmp_path / "dp" / "release" / "adapter.npz", tmp_path / "dp" / "private" / "checkpoint.npz"):
        file.unlink()
    with pytest.raises(
        PrivacyError, match="started with other microbatches or devices .microbatch_size: 8, now 4"
    ):
        finetune_run(Run(smaller, tmp_path / "dp"), splits(), progress=False)
    known = computation(RUN)
    assert set(known) == {
        "microbatch_size",
        "rematerialize",
        "backend",
        "device",
        "devices",
        "platform",
        "processor",
        "xla_flags",
        "matmul_precision",
    }
    assert known["microbatch_size"] == 8 and known["devices"] >= 1 and len(known["processor"]) == 64
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2")
    with pytest.raises(PrivacyError, match="devices .xla_flags: .*, now --xla_cpu_max_isa=SSE4_2"):
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(
        dpsynth.finetune.run, "computation", lambda settings: {**known, "backend": "elsewhere"}
    )
    with pytest.raises(PrivacyError, match="devices .backend: .*, now elsewhere"):
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    assert not (tmp_path / "dp" / "release" / "adapter.npz").exists()


@pytest.mark.parametrize(
    "failure, words",
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
            "setting microbatch_size: memory does not hold 4 units of 32 tokens",
        ),
        (MemoryError(), "setting microbatch_size: memory does not hold"),
        (None, "setting model: gradients of .*micro on invented rows are NaN"),
    ],
)
def test_what_no_training_can_survive_is_found_before_it_is_charged(tmp_path, monkeypatch, failure, words):
    whole = dpsynth.finetune.make_private_sum

    def broken(model, session):
        def run(total, notes, *others):
            if failure:
                raise failure
            total, notes = whole(model, session)(total, notes, *others)
            return [0 * t for t in total], notes + 1

        return run

    monkeypatch.setattr(dpsynth.finetune.trainer, "make_private_sum", broken)
    with pytest.raises(SettingsError, match=words) as error:
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    assert str(error.value).endswith("the training is not charged") and "\n" not in str(error.value)
    ledger = Ledger(tmp_path / RUNS_LEDGER)
    assert not ledger.charged(ledger.datasets()[0]) and not list((tmp_path / "dp" / "release").iterdir())
    monkeypatch.undo()
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    assert len(ledger.charged(ledger.datasets()[0])) == 1


def test_a_finished_run_loads_under_other_libraries_and_an_unfinished_one_refuses(tmp_path, monkeypatch):
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    monkeypatch.setattr(dpsynth.privacy.identity, "code_hash", lambda: "other")
    finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
    (tmp_path / "dp" / "release" / "adapter.npz").unlink()
    with pytest.raises(PrivacyError, match="other dpsynth code"):
        finetune_run(Run(RUN, tmp_path / "dp"), splits(), progress=False)
