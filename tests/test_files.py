"""Files are replaced as a whole, are on disk before they have their name, and nothing half-written is
left."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from dpsynth import files
from dpsynth.settings import DataError, ModelError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def through_numpy(path):
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.arange(3))


WRITERS = {
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "private": lambda path: files.write_private(path, "new"),
    "another's": through_numpy,
}


def calls_of(monkeypatch, work):
    """Names of the calls of `work` that reach the disk or change names, with the file's own name, in
    their order.
    """
    seen, names = [], {}
    with monkeypatch.context() as patch:
        real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "link")}

        def opened(path, *rest, **options):
            handle = real["open"](path, *rest, **options)
            names[handle] = os.path.basename(path)
            return handle

        patch.setattr(os, "open", opened)
        def synced(handle):
            if os.fstat(handle).st_size:  # an empty file is waited for, too: that says nothing of its content
                seen.append(("fsync", names[handle]))
            real["fsync"](handle)

        patch.setattr(os, "fsync", synced)
        for name in ("replace", "link"):
            call = lambda a, b, name=name: seen.append((name, os.path.basename(b))) or real[name](a, b)
            patch.setattr(os, name, call)
        work()
    return seen


@pytest.mark.parametrize("how", WRITERS)
def test_content_is_on_disk_before_its_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch, how):
    path = tmp_path / "folder" / "a"
    path.parent.mkdir()
    path.write_text("old")
    seen = calls_of(monkeypatch, lambda: WRITERS[how](path))
    assert seen[-3:] == [("fsync", ".a.tmp"), ("replace", "a"), ("fsync", "folder")]
    assert os.listdir(path.parent) == ["a"] and path.read_bytes() != b"old"
    assert mode(path) == (0o600 if how == "private" else 0o666 & ~umask())


def umask():
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), ValueError])
def test_what_was_not_finished_is_gone_and_the_old_file_stays(tmp_path, error, several):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error if isinstance(error, type) else OSError):
        with files.replacing(path, several=several) as temporary:
            temporary.write_text("half")
            raise error
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "old"


def test_a_new_file_is_whole_or_gone_and_never_another_ones(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_file(tmp_path / "key", private=True) as file:
        assert mode(tmp_path / "key") == 0o600
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    (tmp_path / "key").write_text("mine")
    with pytest.raises(FileExistsError), files.new_file(tmp_path / "key"):
        pass
    assert (tmp_path / "key").read_text() == "mine"


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with files.replacing(tmp_path / "a", several=True) as first:
        first.write_text("first")
        with files.replacing(tmp_path / "a", several=True) as second:
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_of_two_that_publish_a_file_the_first_one_stays(tmp_path, monkeypatch):
    def work():
        with files.publishing(tmp_path / "key") as mine:
            assert mode(mine) == 0o600
            mine.write_text("mine")
            with files.publishing(tmp_path / "key") as other:
                other.write_text("other")

    seen = [call for call, _ in calls_of(monkeypatch, work)]
    assert seen[-3:] == ["fsync", "link", "fsync"] and seen.count("link") == 2
    assert (tmp_path / "key").read_text() == "other" and os.listdir(tmp_path) == ["key"]
    assert mode(tmp_path / "key") == 0o600


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch, private):
    home = tmp_path / "home"
    with pytest.raises(KeyboardInterrupt), files.whole_folder(home / "model", private) as scratch:
        (scratch / "a").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(home) == []

    def work():
        with files.whole_folder(home / "model", private) as scratch:
            (scratch / "a").write_text("whole")
            assert mode(scratch) == 0o700 and not (home / "model").exists()

    seen = calls_of(monkeypatch, work)
    assert seen[0] == ("fsync", "a") and seen[-2:] == [("replace", "model"), ("fsync", "home")]
    assert os.listdir(home) == ["model"] and mode(home / "model") == (0o700 if private else 0o755)
    with pytest.raises(OSError), files.whole_folder(home / "model", private):
        pass
    assert (home / "model" / "a").read_text() == "whole" and os.listdir(home) == ["model"]


def test_a_killed_writer_of_a_private_folder_leaves_nothing_once_it_is_written_again(tmp_path):
    code = (
        "import os, sys; from dpsynth.files import whole_folder\n"
        "with whole_folder(sys.argv[1], private=True) as scratch:\n"
        "    (scratch / 'tokens').write_text('private'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "tokens"]).returncode == 9
    assert os.listdir(tmp_path) == [".tokens.partial"]
    with files.whole_folder(tmp_path / "tokens", private=True) as scratch:
        assert os.listdir(scratch) == []
    assert os.listdir(tmp_path) == ["tokens"]


def test_a_lock_is_held_by_one_and_ends_with_its_holder(tmp_path):
    path = tmp_path / ".lock"
    with files.lock_file(path):
        with pytest.raises(BlockingIOError), files.lock_file(path, wait=False):
            pass
    with files.lock_file(path, wait=False) as file:
        assert not file.closed


def test_a_damaged_json_file_is_named_and_not_quoted(tmp_path):
    path = tmp_path / "a.json"
    for content in (b'{"name": "Ada"', b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(ModelError) as error:
            files.load_json(path, "damaged; remove it", ModelError)
        assert str(error.value) == f"{path}: damaged; remove it"
    files.write_json(path, {"name": "Ada"})
    assert files.load_json(path) == json.loads(path.read_text()) == {"name": "Ada"}
    with pytest.raises(FileNotFoundError):
        files.load_json(tmp_path / "missing.json")


def test_a_private_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "a"
    with pytest.raises(DataError, match=f"^{path}: cannot be written .No such file or directory.$"):
        files.write_private(path, "new")
