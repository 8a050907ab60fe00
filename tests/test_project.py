"""What must hold for the repository as a whole: generated files are up to date, the package stands alone, nothing is dead."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from dpsynth.settings import Settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".ipynb", ".toml", ".ini", ".yaml", ".yml", ".txt", ".sh", ""}


def tracked():
    """Files of the project: what git knows, or everything but build products where there is no git."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project's files, to be exported and cleaned."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    for path in tracked():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    return folder


def differing(folder, pattern):
    return [p.relative_to(folder).as_posix() for p in sorted(folder.glob(pattern))
            if not (ROOT / p.relative_to(folder)).exists() or p.read_bytes() != (ROOT / p.relative_to(folder)).read_bytes()]


def command(name, folder):
    path = pathlib.Path(sys.executable).parent / name
    done = subprocess.run([str(path)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_export_changes_nothing(copy):
    for path in (copy / "dpsynth").glob("*.py"):
        if path.name not in ("__init__.py", "_version.py"):
            path.unlink()
    command("nbdev-export", copy)
    assert differing(copy, "dpsynth/*.py") == []


def test_clean_changes_nothing(copy):
    command("nbdev-clean", copy)
    assert differing(copy, "nbs/**/*.ipynb") == []


def test_readme_is_the_index_notebook():
    assert subprocess.run([sys.executable, "tools/make_readme.py", "--check"], cwd=ROOT).returncode == 0, "run `make export`"


def test_packaged_copies_are_the_sources():
    assert (ROOT / "dpsynth/assets/experiment.ipynb").read_bytes() == (ROOT / "nbs/templates/experiment.ipynb").read_bytes()
    packaged, source = (ROOT / "dpsynth/assets/configs/demo", ROOT / "configs/demo")
    assert {p.name: p.read_bytes() for p in packaged.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}


def test_no_undefined_or_unused_names():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F", "dpsynth", "tests", "benchmarks", "tools"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_modules_import_from_elsewhere(tmp_path):
    names = [p.stem for p in (ROOT / "dpsynth").glob("*.py") if not p.stem.startswith("_")]
    code = "import importlib\n" + "\n".join(f"importlib.import_module('dpsynth.{n}')" for n in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_slow():
    code = "import sys, dpsynth; print([m for m in ('jax', 'keras', 'tensorflow', 'pandas', 'nbdev', 'fastcore') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_package_needs_neither_nbdev_nor_fastcore():
    for path in (ROOT / "dpsynth").glob("*.py"):
        assert not re.search(r"^\s*(import|from)\s+(nbdev|fastcore)", path.read_text(), re.M), path


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_read(name):
    used = re.compile(rf"\.{name}\b")
    readers = [p.name for p in (ROOT / "dpsynth").glob("*.py") if p.name != "settings.py" and used.search(p.read_text())]
    if name in ("label_names", "label_prior", "profile"):  # read by Settings.labels, Settings.prior and resolve
        readers += [p.name for p in [ROOT / "dpsynth/settings.py"] if len(used.findall(p.read_text())) >= 1]
    assert readers, f"setting {name} is read by nothing"


def test_files_name_no_absolute_path_of_a_machine():
    pattern = re.compile(r"/(home|root|Users)/\w|/work/")
    for path in tracked():
        if path.suffix in TEXT and path.stat().st_size < 2_000_000 and path != pathlib.Path(__file__):
            found = pattern.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_wheel_has_the_template_the_model_and_the_demo_configurations(copy, tmp_path):
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in ("experiment.ipynb", "tiny/model.weights.h5", "tiny/config.json", "tiny/tokenizer.json", "configs/demo/dp_ft.yaml"):
        assert f"dpsynth/assets/{wanted}" in names
    assert any(n.startswith("dpsynth/assets/tiny/assets/tokenizer/") for n in names)


def test_bundled_weights_are_small():
    assert (ROOT / "dpsynth/assets/tiny/model.weights.h5").stat().st_size <= 12e6
