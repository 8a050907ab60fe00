"""Line 14, the private half: what a run keeps under `private/` belongs to that run, and nothing else is
read."""

import json
import math
import os
import shutil

import pytest

from parts import RUN, SECRET, groups_of_rows, splits
import dpsynth.finetune
from dpsynth.data import TokenStore, from_frame
from dpsynth.finetune import Trainer, finetune_run
from dpsynth.ledger import RUNS_LEDGER
from dpsynth.privacy import Randomness, bind_run, load_secret, read_identity, run_identity
from dpsynth.runs.run import Run
from dpsynth.settings import PrivacyError
from dpsynth.state import State, path_hash, private_files

LONGER = RUN.model_copy(update={"epochs": 1.6})  # eight updates
PERSONS = RUN.model_copy(update={"unit": "user", "batch_size": 2})


def of_persons(frame):
    return from_frame(frame, PERSONS, test=frame[:4])


def stopped(monkeypatch, settings, rows, folder, after):
    """The folder of a run that was stopped after so many updates, each of them in its checkpoint."""
    update = Trainer.update

    def until(trainer):
        if trainer.session.step == after:
            raise KeyboardInterrupt
        update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", until)
        patch.setitem(dpsynth.finetune.train.__kwdefaults__, "seconds_between", -1.0)
        with pytest.raises(KeyboardInterrupt):
            finetune_run(Run(settings, folder), rows, progress=False)
    return folder


def without(folder, *names):
    for name in names:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    return folder


# what was reproduced: a run went on with the state of another once the file that ties them was deleted


def test_updates_without_noise_are_not_continued_as_private_ones(tmp_path, monkeypatch):
    folder = stopped(
        monkeypatch, LONGER.model_copy(update={"epsilon": math.inf}), splits(), tmp_path / "dp", after=6
    )
    without(folder, "private/identity.json")
    with pytest.raises(PrivacyError, match="checkpoint.npz: left by a run, and private.identity.json"):
        finetune_run(Run(LONGER.model_copy(update={"epsilon": 1.0}), folder), splits(), progress=False)
    assert not (folder / "release" / "certificate.json").exists()


def test_a_training_on_other_rows_is_not_certified(run, tmp_path):
    names = ("private/identity.json", "release/adapter.npz", "release/certificate.json")
    folder = without(shutil.copytree(run, tmp_path / "dp"), *names)
    with pytest.raises(PrivacyError, match="checkpoint.npz: left by a run, and private.identity.json"):
        finetune_run(Run(RUN, folder), splits("an entirely different row"), progress=False)
    assert not (folder / "release" / "certificate.json").exists()


def test_the_tokens_of_rows_in_another_order_are_not_dealt_to_persons(tmp_path, monkeypatch):
    frame = groups_of_rows(["a", "b", "c"])
    folder = stopped(monkeypatch, PERSONS, of_persons(frame), tmp_path / "dp", after=0)
    without(folder, "private/identity.json")
    assert (folder / "private" / "tokens").exists()
    with pytest.raises(PrivacyError, match="(canary_coins|tokens): left by a run, and private.identity.json"):
        finetune_run(Run(PERSONS, folder), of_persons(frame[::-1]), progress=False)
    assert not (folder / "release" / "certificate.json").exists()


# every file, and every way in which it can be wrong

DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\n",
    "flipped": lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
}


def damage(path, how):
    path.write_bytes(DAMAGES[how](path.read_bytes()))


def complaint(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def state_of(folder, run="run", secret=SECRET):
    return State(folder, secret, run)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "seal, words",
    [
        (False, "it is damaged, or was changed since this run wrote it"),
        (True, "its seal in seals/ is damaged|has no seal|is damaged, or was"),
    ],
)
def test_a_file_or_seal_that_is_damaged_is_refused(tmp_path, how, seal, words):
    state = state_of(tmp_path)
    state.write("counts.json", json.dumps({"units": [41]}))
    state.write("other.json", "{}")
    damage(tmp_path / ("seals/counts.json" if seal else "counts.json"), how)
    if seal and how == "longer":
        return  # an empty line is no seal
    with pytest.raises(PrivacyError, match=words) as error:
        state.read_json("counts.json")
    assert complaint(error).startswith(f"{tmp_path / 'counts.json'}: ") and "backup" in complaint(error)
    assert state.read_json("other.json") == {}


def test_a_folder_is_sealed_with_all_its_files(tmp_path):
    seal = lambda partial: state_of(tmp_path).seal("tokens", partial)
    for change in (
        lambda folder: damage(folder / "ids.npy", "flipped"),
        lambda folder: (folder / "ids.npy").unlink(),
        lambda folder: (folder / "more").write_bytes(b""),
        lambda folder: (folder / "ids.npy").rename(folder / "other.npy"),
    ):
        TokenStore.write(tmp_path / "tokens", [([1], [2, 3])] * 3, seal)
        assert len(TokenStore(state_of(tmp_path).check("tokens"))) == 3
        change(tmp_path / "tokens")
        with pytest.raises(PrivacyError, match="tokens: it is damaged.*made again from the rows"):
            state_of(tmp_path).check("tokens")


@pytest.mark.parametrize(
    "copied, words",
    [
        (("checkpoint.npz",), "it has no seal in"),
        (("checkpoint.npz", "seals/checkpoint.npz"), "it is of another run"),
    ],
)
@pytest.mark.parametrize("other", [{"run": "other rows"}, {"secret": bytes(range(32, 64))}])
def test_what_another_run_wrote_is_refused(tmp_path, copied, words, other):
    (tmp_path / "mine" / "seals").mkdir(parents=True)
    state_of(tmp_path / "theirs", **other).write("checkpoint.npz", b"theirs")
    for name in copied:
        shutil.copy(tmp_path / "theirs" / name, tmp_path / "mine" / name)
    with pytest.raises(PrivacyError, match=f"checkpoint.npz: {words}"):
        state_of(tmp_path / "mine").check("checkpoint.npz")
    state_of(tmp_path / "mine").write("counts.json", "{}")
    mark = (
        (tmp_path / "mine" / "seals" / "counts.json").read_text().split()[0]
    )  # says whose seal it is, and can be copied
    seal = (tmp_path / "theirs" / "seals" / "checkpoint.npz").read_text().split()[1]
    (tmp_path / "mine" / "seals" / "checkpoint.npz").write_text(f"{mark} {seal}\n")
    with pytest.raises(PrivacyError, match="checkpoint.npz: it is damaged"):
        state_of(tmp_path / "mine").check("checkpoint.npz")


def test_a_file_under_the_name_of_another_is_refused(tmp_path):
    state = state_of(tmp_path)
    for name, content in (("counts.json", "[1]"), ("checks.json", "[2]")):
        state.write(name, content)
    for part in ("", "seals"):
        shutil.copy(tmp_path / part / "counts.json", tmp_path / part / "checks.json")
    with pytest.raises(PrivacyError, match="checks.json: it is damaged"):
        state.check("checks.json")


def killed_at(monkeypatch, call, work):
    """Do some work that is killed at the n-th call that changes names or waits for the disk; returns
    whether it was.
    """
    left = [call]

    def count(whole):
        def counting(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return whole(*arguments)

        return counting

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, count(getattr(os, name)))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def test_however_often_a_process_is_killed_what_is_there_can_be_read(tmp_path, monkeypatch):
    state, contents, calls = state_of(tmp_path), [b"0"], 0
    state.write("checkpoint.npz", contents[0])
    while killed_at(monkeypatch, calls := calls + 1, lambda: state.write("checkpoint.npz", b"last")):
        for again in range(1, calls + 1):  # and killed again before anything is put in order
            contents.append(f"{calls} {again}".encode())
            killed_at(monkeypatch, again, lambda: state.write("checkpoint.npz", contents[-1]))
            assert state_of(tmp_path).read("checkpoint.npz") in (*contents, b"last")
    assert calls > 9 and state.read("checkpoint.npz") == b"last"
    assert len((tmp_path / "seals" / "checkpoint.npz").read_text().splitlines()) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_identity_or_secret_is_told_by_name(tmp_path, how):
    private = tmp_path / "run" / "private"
    private.mkdir(parents=True)
    identity = run_identity(json.dumps({"epsilon": 8}), "fingerprint", "hash", {"microbatch_size": 8})
    mine = bind_run(private, identity)
    either, secret = (
        "identity.json: damaged, or not of a run with the secret beside it",
        "secret: damaged, it does not hold 32",
    )
    for name, words in (("identity.json", either), ("secret", either if how == "flipped" else secret)):
        whole = (private / name).read_bytes()
        damage(private / name, how)
        for look in (lambda: bind_run(private, identity), lambda: Run(FULL, tmp_path / "run").begun_release):
            with pytest.raises(PrivacyError, match=words) as error:
                look()
            assert "backup, or use another folder" in complaint(error)
        (private / name).write_bytes(whole)
        assert bind_run(private, identity) == mine


@pytest.mark.parametrize(
    "left",
    [
        "identity.json",
        "checkpoint.npz",
        "tokens",
        "counts.json",
        "canary_coins",
        "checks.json",
        "losses.jsonl",
    ],
)
def test_a_secret_that_is_lost_where_a_run_has_begun_is_not_made_anew(tmp_path, left):
    (tmp_path / left).write_text("")
    with pytest.raises(PrivacyError, match=f"secret: missing, and {left} was made with it"):
        load_secret(tmp_path)
    assert not (tmp_path / "secret").exists()


@pytest.mark.parametrize(
    "name", ["adapter.npz", "certificate.json", "label_prior.json", "synthetic.jsonl", "sampling.json"]
)
def test_what_a_run_released_is_not_adopted_either(tmp_path, name):
    private, release = tmp_path / "private", tmp_path / "release"
    release.mkdir()
    (release / name).write_text("")
    with pytest.raises(PrivacyError, match=f"{name}: left by a run, and private.identity.json"):
        bind_run(private, {"data": "rows"}, finished=name == "adapter.npz")
    assert not (private / "identity.json").exists()


# a run with all that it can keep

FULL = LONGER.model_copy(
    update={"canaries": 10, "monitor": "private", "label_prior": "private", "access_share": 0.05}
)
KEPT = {"identity.json", "tokens", "checkpoint.npz", "canary_coins", "counts.json", "losses.jsonl"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that was stopped after four of its updates, and the model as it is before
    training.
    """
    with pytest.MonkeyPatch.context() as patch:
        loaded = dpsynth.finetune.prepare_with_hash(FULL)
        folder = stopped(patch, FULL, splits(settings=FULL), tmp_path_factory.mktemp("runs") / "dp", after=4)
    assert set(private_files(folder / "private")) == KEPT
    return folder, loaded


def resumed(folder):
    finetune_run(Run(FULL, folder), splits(settings=FULL), progress=False)
    return {path.name: path.read_bytes() for path in (folder / "release").iterdir()}


def charged(*_):
    raise AssertionError("it was charged")


def test_whatever_is_damaged_is_named_before_anything_is_charged_and_what_can_be_made_again_is(
    begun, tmp_path, monkeypatch
):
    folder, loaded = begun
    monkeypatch.setattr(dpsynth.finetune.run, "prepare_with_hash", lambda settings: loaded)
    monkeypatch.setattr(dpsynth.runs.Account, "charge", charged)
    for name in sorted(KEPT):
        for how in ("half", "flipped", "foreign"):
            copy = shutil.copytree(folder, tmp_path / f"{name} {how}" / "dp")
            path = copy / "private" / name
            if how == "foreign":
                (copy / "private" / "seals" / name).unlink()
            else:
                damage(path / "ids.npy" if path.is_dir() else path, how)
            with pytest.raises(PrivacyError) as error:
                resumed(copy)
            assert complaint(error).startswith(f"{path}: ") and "from a backup" in complaint(error)


def test_what_can_be_made_again_gives_the_same_bytes(begun, tmp_path):
    folder, _ = begun
    whole, without_state = (shutil.copytree(folder, tmp_path / name / "dp") for name in ("whole", "without"))
    without(without_state / "private", "checkpoint.npz", "tokens", "canary_coins", "losses.jsonl")
    for copy in (whole, without_state):
        shutil.copy(folder.parent / RUNS_LEDGER, copy.parent / RUNS_LEDGER)
        shutil.copy(folder.parent / f"{RUNS_LEDGER}.key", copy.parent / f"{RUNS_LEDGER}.key")
    assert resumed(whole) == resumed(without_state)
    checks, private = json.loads((whole / "private" / "checks.json").read_text()), whole / "private"
    assert checks["updates"] == checks["noised_updates"] == 10 and checks["grid"] == 2.0**20
    told = json.loads((whole / "release" / "certificate.json").read_text())
    assert {name: checks["mechanism"][name] for name in told["mechanism"]} == told["mechanism"]
    assert checks["realised_std"] == pytest.approx(told["mechanism"]["noise_multiplier"], rel=0.05)
    sealed = {path.name for path in (private / "seals").iterdir()}
    assert {path.name for path in private.iterdir()} == sealed | {"seals", "secret"} and sealed == KEPT | {
        "checks.json"
    }
    hashes = {path_hash(path) for path in private.rglob("*")}
    seals = {word for path in (private / "seals").iterdir() for word in path.read_text().split()}
    assert (
        len(seals) == 2 + len(sealed) and not seals & hashes
    )  # two marks, and of each file what only the secret gives
    hashes |= seals
    others = [path for path in whole.rglob("*") if path.is_file() and private not in path.parents]
    assert len(others) > 3 and not any(
        word in path.read_text(errors="replace") for path in others for word in hashes
    )


# what a run draws follows from its secret and from every part of its identity, and from nothing that is
# public


def test_a_run_is_another_run_where_any_part_of_its_identity_is_another(tmp_path):
    whole = run_identity(json.dumps({"epsilon": 8}), "fingerprint of rows", "hash", {"microbatch_size": 8})
    others = [whole, *({**whole, part: json.dumps({"other": 1})} for part in whole)]
    assert len(others) == 7 and {"data", "settings"} < set(whole)
    ids = [bind_run(tmp_path / str(i) / "private", identity) for i, identity in enumerate(others)]
    assert len(set(ids)) == len(ids)
    first = [Randomness(SECRET, name).integers("batch", 0, 4).tolist() for name in ids]
    assert len({tuple(words) for words in first}) == len(ids)


def test_the_identity_of_a_run_names_its_rows_by_its_secret(run):
    assert read_identity(run / "private")["data"] == splits().train.fingerprint(load_secret(run / "private"))


def test_a_secret_has_32_bytes_of_its_own(tmp_path):
    secrets = [load_secret(tmp_path / str(i)) for i in range(200)]
    assert {len(secret) for secret in secrets} == {32}
    values = sum(len(set(secret)) for secret in secrets) / 200  # four random bytes, eight times, have 4
    assert values == pytest.approx(256 * (1 - (255 / 256) ** 32), abs=0.6)  # 6 standard errors
    assert all(len({secret[i] for secret in secrets}) > 100 for i in range(32))
    assert len({secret[i : i + 4] for secret in secrets for i in range(29)}) > 5790


def test_a_secret_with_few_values_is_refused(tmp_path):
    for content in (os.urandom(4) * 8, bytes(32), bytes(range(15)) * 3):
        (tmp_path / "secret").write_bytes(content[:32])
        with pytest.raises(PrivacyError, match="secret: damaged, it does not hold 32 random bytes"):
            load_secret(tmp_path)


def test_coins_of_canaries_follow_from_the_secret_and_not_from_the_public_seed(tmp_path, begun, monkeypatch):
    thrown, count = [], 200
    settings = RUN.model_copy(update={"canaries": count})

    def rows(settings, records, included):
        thrown.append(included)
        raise KeyboardInterrupt

    monkeypatch.setattr(dpsynth.finetune.run, "prepare_with_hash", lambda settings: begun[1])
    monkeypatch.setattr(dpsynth.finetune.run, "with_canaries", rows)
    for i in range(3):
        if i == 2:  # the secret of the second run, elsewhere
            (tmp_path / "2" / "private").mkdir(parents=True)
            shutil.copy(tmp_path / "1" / "private" / "secret", tmp_path / "2" / "private" / "secret")
        with pytest.raises(KeyboardInterrupt):
            finetune_run(Run(settings, tmp_path / str(i)), splits(settings=settings), progress=False)
    assert (thrown[1] == thrown[2]).all() and 60 < (thrown[0] == thrown[1]).sum() < 140
