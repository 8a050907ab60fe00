"""Line 14: what is released is what the certificate speaks of, and nothing that was damaged, shortened or
exchanged passes for it."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pandas as pd
import pytest

from parts import RUN, splits
from dpsynth.certificate import read_certificate
from dpsynth.manifest import (
    MANIFEST,
    add_to_manifest,
    check_listed,
    entry,
    read_manifest,
    certificate_hash_of,
    verify_release,
)
from dpsynth.runs import (
    audit_stage, evaluate_stage, fit_stage, load_generator, load_stage, sample_again,
    sample_stage
)
from dpsynth.runs import read_settings
from dpsynth.runs.run import Run
from dpsynth.settings import DataError, DpsynthError, ModelError, PrivacyError, SettingsError
from dpsynth.state import file_hash
from dpsynth.synthesizer import Synthesizer

SETTINGS = RUN.model_copy(
    update={
        "experiment": "made",
        "num_samples": 4,
        "num_mauve_samples": 2,
        "label_prior": "private",
        "access_share": 0.2,
        "validation_size": 0,
    }
)


def make(settings, folder):
    made = load_stage(Run(settings, folder), splits(settings=settings))
    sample_stage(Run(settings, folder), None, fit_stage(Run(settings, folder), made))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A private run with four rows, as many again by another seed, and two of a `Synthesizer`."""
    folder = make(SETTINGS, tmp_path_factory.mktemp("runs") / "made")
    sample_again(Run(SETTINGS, folder), 3, 7)
    Synthesizer.load(folder).sample(2, seed=5, progress=False)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same without differential privacy."""
    return make(
        SETTINGS.model_copy(update={"epsilon": float("inf"), "label_prior": "uniform"}),
        tmp_path_factory.mktemp("runs") / "plain",
    )


@pytest.fixture
def run(made, tmp_path):
    """A copy of the private run, that a test may damage."""
    return shutil.copytree(made, tmp_path / "made")


def change_a_row(path):
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        "".join([json.dumps({**json.loads(rows[0]), "text": "another"}) + "\n", *rows[1:]]), encoding="utf-8"
    )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": flip,
}


def test_a_release_says_what_it_covers_and_what_lies_there_uncovered(run, dpsynth):
    (run / "release" / "notes.txt").write_text("of no concern")
    (run / "release" / "synthetic-9.jsonl").write_text('{"text": "mine"}\n')
    code, out, err = dpsynth("verify", run)
    assert (code, err) == (0, "") and out.startswith(f"{run}: holds; epsilon ")
    covered, others, unsigned = out.splitlines()[1:]
    assert unsigned.startswith("  unsigned     whoever can change these files can write their hashes anew")
    for name in (
        "adapter.npz",
        "label_prior.json",
        "certificate.json",
        "certificate.md",
        "synthetic.jsonl",
        "synthetic.parquet",
        "rejected.jsonl",
        "sampling.json",
        "synthetic-7.jsonl",
        "sample-5-2/synthetic.jsonl",
        "sample-5-2/synthetic.parquet",
    ):
        assert f" {name}" in covered
    assert others == "  not covered  notes.txt, synthetic-9.jsonl"
    assert dpsynth("verify", run / "release").out.splitlines()[1:] == [covered, others, unsigned]
    (run / "release" / "adapter.npz").unlink()  # it need not be given away
    code, out, _ = dpsynth("verify", run / "release" / "certificate.json")
    assert code == 0 and "  not here     adapter.npz" in out.splitlines() and "notes" not in out


def enter(release, *names):
    """Write the hashes of changed files anew, as whoever changed them can."""
    add_to_manifest(
        release / MANIFEST, certificate_hash_of(release), {name: entry(release / name) for name in names}
    )


def test_what_follows_from_another_file_is_compared_with_it_whatever_the_manifest_says(run, refused):
    release = run / "release"
    page = (release / "certificate.md").read_text(encoding="utf-8")
    (release / "certificate.md").write_text(page.replace("ε = **", "ε = **0."), encoding="utf-8")
    enter(release, "certificate.md")
    assert "certificate.md: says something else than certificate.json" in refused("verify", run)
    (release / "certificate.md").write_text(page, encoding="utf-8")
    pd.DataFrame({"text": ["a row of somebody"]}).to_parquet(release / "synthetic.parquet", index=False)
    enter(release, "certificate.md", "synthetic.parquet")
    assert "synthetic.parquet: has other rows than synthetic.jsonl" in refused("verify", run)


def test_the_manifest_tells_rows_seeds_and_hashes_of_what_is_released_only(run):
    release = run / "release"
    certificate = read_certificate(release / "certificate.json")
    assert certificate["files"] == {
        name: file_hash(release / name) for name in ("adapter.npz", "label_prior.json")
    }
    for manifest, name, rows, seed in (
        (MANIFEST, "synthetic.jsonl", 4, 42),
        ("manifest-7.json", "synthetic-7.jsonl", 3, 7),
        (f"sample-5-2/{MANIFEST}", "synthetic.jsonl", 2, 5),
    ):
        told = read_manifest(release / manifest)
        assert told["files"][name] == {
            "sha256": file_hash((release / manifest).parent / name),
            "rows": rows,
            "seed": seed,
        }
        assert told["statement"] == certificate_hash_of(release)
    hashes = {file_hash(path) for path in (run / "private").rglob("*") if path.is_file()}
    assert hashes and not any(
        digest in path.read_text(encoding="utf-8") for digest in hashes for path in release.rglob("*.json*")
    )


@pytest.mark.parametrize(
    "name",
    [
        "adapter.npz",
        "label_prior.json",
        "certificate.json",
        "certificate.md",
        MANIFEST,
        "sampling.json",
        "synthetic.jsonl",
        "synthetic.parquet",
        "rejected.jsonl",
        "synthetic-7.jsonl",
        "manifest-7.json",
        "sample-5-2/synthetic.parquet",
    ],
)
def test_damage_is_one_line_that_names_the_file_and_the_remedy(run, refused, name, monkeypatch):
    monkeypatch.setattr(
        "dpsynth.manifest.release.verify", lambda certificate: {}
    )  # what its numbers say is another question
    path = run / "release" / name
    kept = path.read_bytes()
    for damage in DAMAGES.values():
        if kept or damage is not DAMAGES["flipped"]:
            path.write_bytes(kept)
            damage(path)
            if path.read_bytes() != kept:
                said = refused("verify", run)
                assert str(path) in said
                assert any(
                    way in said
                    for way in (
                        "restore it",
                        "reads format",
                        "not valid JSON",
                        "not a certificate",
                        "cannot be read",
                    )
                ), said


VERBS = {
    "adapter.npz": ("fit", "sample", "again", "audit", "load"),
    "label_prior.json": ("sample", "again", "synthesize"),
    "certificate.json": ("fit", "sample", "again", "evaluate", "audit", "load", "results"),
    MANIFEST: ("sample", "evaluate", "audit"),
    "sampling.json": ("sample",),
    "synthetic.jsonl": ("sample", "evaluate", "audit"),
    "synthetic.parquet": ("sample", "audit"),
    "sample-5-2/synthetic.parquet": ("resynthesize",),
    "sample-5-2/sampling.json": ("resynthesize",),
}


def does(verb, run):
    """Do in this process what a verb of the command line does."""
    settings = read_settings(run)
    if verb == "results":
        from dpsynth.runs import describe

        found = describe(run)
        assert found["status"] == "unreadable"
        raise DataError(found["reason"])
    return {
        "fit": lambda: fit_stage(Run(settings, run), splits(settings=settings)),
        "sample": lambda: sample_stage(Run(settings, run), None, load_generator(Run(settings, run))),
        "again": lambda: sample_again(Run(settings, run), 3, 8),
        "evaluate": lambda: evaluate_stage(Run(settings, run), splits(settings=settings)),
        "audit": lambda: audit_stage(Run(settings, run), splits(settings=settings), None),
        "load": lambda: Synthesizer.load(run),
        "synthesize": lambda: Synthesizer.load(run).sample(3, progress=False),
        "resynthesize": lambda: Synthesizer.load(run).sample(2, seed=5, progress=False),
    }[verb]()


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_that_reads_a_damaged_file_refuses_it(run, name):
    path, damages = run / "release" / name, list(DAMAGES)
    kept = path.read_bytes()
    for i, verb in enumerate(VERBS[name]):
        damage = damages[i % len(damages)]
        DAMAGES[damage](path)
        with pytest.raises(DpsynthError) as error:
            does(verb, run)
        said = str(error.value)
        assert str(path) in said and "\n" not in said and "restore it" in said, (verb, damage, said)
        path.write_bytes(kept)


def test_a_damaged_adapter_is_told_by_whoever_reads_it_alone(run, tmp_path):
    from dpsynth.finetune import prepare_model
    from dpsynth.models import load_adapter

    model = prepare_model(SETTINGS)
    for damage in DAMAGES.values():
        shutil.copy(run / "release" / "adapter.npz", tmp_path / "adapter.npz")
        damage(tmp_path / "adapter.npz")
        with pytest.raises(
            ModelError, match="adapter.npz: (damaged|the adapter was made for another model)"
        ) as error:
            load_adapter(model, tmp_path / "adapter.npz")
        assert "\n" not in str(error.value)


def test_files_of_another_run_are_refused_by_name(run, plain, refused, monkeypatch):
    monkeypatch.setattr("dpsynth.manifest.release.verify", lambda certificate: {})
    release = run / "release"
    for name, change in (
        ("adapter.npz", lambda path: shutil.copy(plain / "release" / "adapter.npz", path)),
        ("synthetic.jsonl", change_a_row),
        ("label_prior.json", lambda path: path.write_text("[0.9, 0.1]\n")),
        ("synthetic-7.jsonl", change_a_row),
    ):
        path = release / name
        kept = path.read_bytes()
        change(path)
        for certificate in (
            run,
            release,
            *([release / "certificate.json"] if name != "synthetic-7.jsonl" else []),
        ):
            said = refused("verify", certificate)
            assert f"{path}: is not the file whose SHA-256 stands in " in said
        path.write_bytes(kept)
    shutil.copy(plain / "release" / "adapter.npz", release / "adapter.npz")
    for read in (
        lambda: load_generator(Run(SETTINGS, run)),
        lambda: Synthesizer.load(run),
        lambda: fit_stage(Run(SETTINGS, run), splits(settings=SETTINGS)),
        lambda: audit_stage(Run(SETTINGS, run), splits(settings=SETTINGS), None),
    ):
        with pytest.raises(DataError, match="adapter.npz: is not the file"):
            read()
    for name in (
        "adapter.npz",
        "synthetic.jsonl",
        "sampling.json",
        "synthetic.parquet",
        "rejected.jsonl",
        MANIFEST,
    ):
        shutil.copy(plain / "release" / name, release / name)  # with its manifest
    assert "belongs to another certificate" in refused("verify", run) or "is not the file" in refused(
        "verify", run
    )
    with pytest.raises(DataError, match="belongs to another certificate"):
        Run(SETTINGS, run).rows()


@pytest.mark.parametrize("lines", [2, 0])
def test_rows_that_were_cut_off_are_not_counted_as_done(run, refused, lines):
    path = run / "release" / "synthetic.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text("".join(whole.splitlines(keepends=True)[:lines]), encoding="utf-8")
    for verb in (["sample"], ["evaluate"], ["audit"]):
        assert f"{path}: is not the file whose SHA-256 stands in manifest.json" in refused(*verb, run)
    (run / "release" / MANIFEST).rename(run / "kept")
    assert f"{run / 'release' / MANIFEST}: is missing" in refused("evaluate", run)
    (run / "kept").rename(run / "release" / MANIFEST)
    for name in ("synthetic.jsonl", "sampling.json"):
        (run / "release" / name).unlink()  # the remedy that it names
    sample_stage(Run(SETTINGS, run), None, load_generator(Run(SETTINGS, run)))
    assert path.read_text(encoding="utf-8") == whole and verify_release(run)


def test_real_rows_that_were_cut_off_are_found_too(tmp_path, refused):
    from dpsynth.generators import write_rows

    (tmp_path / "private").mkdir()
    path = tmp_path / "private" / "synthetic.jsonl"
    write_rows(splits().test, path)
    check_listed([path], None)
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(DataError, match="is not the file"):
        Run(RUN.model_copy(update={"generator": "real_test"}), tmp_path).rows()


def test_what_was_fitted_is_written_again_from_the_checkpoint(run, made):
    for name in ("adapter.npz", "label_prior.json", "certificate.json"):
        shutil.rmtree(run)
        shutil.copytree(made, run)
        DAMAGES["half"](run / "release" / name)
        (run / "release" / "adapter.npz").unlink(missing_ok=True)  # the remedy that it names
        fit_stage(Run(SETTINGS, run), splits(settings=SETTINGS))
        assert {p.name: p.read_bytes() for p in (run / "release").glob("*.*")} == {
            p.name: p.read_bytes() for p in (made / "release").glob("*.*")
        }


def test_a_release_is_signed_and_whoever_changes_it_is_found_out(run, dpsynth, refused, tmp_path):
    release, key = run / "release", tmp_path / "key"
    assert dpsynth("sign", "--new-key", key).code == 0 and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "is there already" in refused("sign", "--new-key", key)
    assert f"{release / MANIFEST}.sig: is missing" in refused("verify", run, "--key", f"{key}.pub")
    code, out, _ = dpsynth("sign", run, "--key", key)
    assert code == 0 and out.count(": signed") == 3
    assert (
        dpsynth("verify", run, "--key", f"{key}.pub").out.splitlines()[-1]
        == "  signed       manifest-7.json, manifest.json, sample-5-2/manifest.json"
    )
    for again in (
        "manifest-7.json.sig",
        "sample-5-2/manifest.json.sig",
    ):  # every manifest is signed, not the first alone
        signature = (release / again).read_bytes()
        (release / again).write_bytes(bytes(64))
        assert f"{again}: not a signature of " in refused("verify", run, "--key", f"{key}.pub")
        (release / again).write_bytes(signature)
    for public in ("key", "settings.yaml", "nowhere"):
        assert "--key" in refused("verify", run, "--key", tmp_path / public)
    assert "not a private Ed25519 key" in refused("sign", run, "--key", f"{key}.pub")
    dpsynth("sign", "--new-key", tmp_path / "another")
    assert "manifest.json.sig: not a signature of manifest.json with this key" in refused(
        "verify", run, "--key", tmp_path / "another.pub"
    )
    manifest = json.loads((release / MANIFEST).read_text())
    change_a_row(release / "synthetic.jsonl")
    assert "is not the file" in refused("verify", run, "--key", f"{key}.pub")
    from dpsynth.manifest import with_checksum

    lines = (release / "synthetic.jsonl").read_text(encoding="utf-8").splitlines()
    pd.DataFrame([json.loads(line) for line in lines]).to_parquet(release / "synthetic.parquet", index=False)
    for name in ("synthetic.jsonl", "synthetic.parquet"):
        manifest["files"][name]["sha256"] = file_hash(release / name)
    manifest.pop("sha256")
    (release / MANIFEST).write_text(json.dumps(with_checksum(manifest)))  # whoever rewrites the hashes too
    assert dpsynth("verify", run).code == 0 and "not a signature" in refused(
        "verify", run, "--key", f"{key}.pub"
    )
    for path in release.rglob("manifest*"):
        path.unlink()
    assert "is missing" in refused("verify", run, "--key", f"{key}.pub")
    shutil.copy(key, release / "key")
    assert "must not lie under" in refused("sign", run, "--key", release / "key")
    for wrong in (["sign"], ["sign", run], ["sign", "--key", key], ["sign", run, "--new-key", key]):
        assert "give RUN and --key FILE, or --new-key FILE" in refused(*wrong)


def test_an_audit_enters_its_result_into_the_manifest_and_takes_the_signature_away(run, dpsynth, tmp_path):
    dpsynth("sign", "--new-key", tmp_path / "key")
    dpsynth("sign", run, "--key", tmp_path / "key")
    before = certificate_hash_of(run / "release")
    with pytest.warns(
        UserWarning, match="its signature was removed, for it lists other files now; `dpsynth sign"
    ):
        audit_stage(Run(SETTINGS, run), splits(settings=SETTINGS), load_generator(Run(SETTINGS, run)).model)
    assert (
        read_certificate(run / "release" / "certificate.json")["audit"]
        and certificate_hash_of(run / "release") == before
    )
    found = verify_release(run)
    assert {"certificate.json", "certificate.md", "sample-5-2/synthetic.jsonl", "synthetic-7.jsonl"} <= set(
        found.covered
    )
    assert (
        not (run / "release" / f"{MANIFEST}.sig").exists()
        and (run / "release" / "manifest-7.json.sig").exists()
    )


def test_without_a_certificate_there_is_nothing_to_verify_or_sign(plain, refused, tmp_path, dpsynth):
    dpsynth("sign", "--new-key", tmp_path / "key")
    for verb in (["verify", plain], ["sign", plain, "--key", tmp_path / "key"]):
        assert "a run without differential privacy, or one that is not fitted, has none" in refused(*verb)
    with pytest.raises(DataError, match="adapter.npz: is not the file whose SHA-256 stands in manifest.json"):
        adapter = shutil.copytree(plain, tmp_path / "plain") / "release" / "adapter.npz"
        DAMAGES["flipped"](adapter)
        load_generator(Run(read_settings(tmp_path / "plain"), tmp_path / "plain"))


READ_ONLY = """
import os, sys
import pandas as pd
from dpsynth.synthesizer import Synthesizer
synthesizer = Synthesizer.load(sys.argv[1])
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
rows = synthesizer.sample(2, seed=5, progress=False)
other = synthesizer.sample(2, seed=6, progress=False)
os.seteuid(os.getuid())
rows.to_json(sys.argv[2], orient="records")
assert len(other) == 2 and not other.equals(rows)
"""


def test_rows_can_be_sampled_from_a_run_that_cannot_be_written(made, tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        run = f"{place}/made"
        shutil.copytree(made, run)
        os.chmod(place, 0o755)
        for path in (*os.walk(run),):
            os.chmod(path[0], 0o555)
            for name in path[2]:
                os.chmod(f"{path[0]}/{name}", 0o444)
        result = tmp_path_factory.mktemp("result") / "rows.json"
        before = sorted(os.listdir(f"{run}/release"))
        done = subprocess.run([sys.executable, "-c", READ_ONLY, run, result], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(os.listdir(f"{run}/release")) == before
        whole = pd.read_parquet(made / "release" / "sample-5-2" / "synthetic.parquet")
        assert pd.read_json(result)["text"].tolist() == whole["text"].tolist()


def test_a_certificate_that_is_older_or_none_is_told_in_a_line(run, refused):
    path = run / "release" / "certificate.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    assert "reads format 2" in refused("verify", run)
    with pytest.raises((DataError, SettingsError, PrivacyError), match="reads format 2"):
        load_generator(Run(SETTINGS, run))
