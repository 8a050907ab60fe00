"""The package, its notebooks, its documentation and its packaging say the same."""

import ast
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import h5py
import nbformat
import pytest

BIN = pathlib.Path(sys.executable).parent
REPO = pathlib.Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info")
LEFT_OUT_AT_THE_TOP = ("build", "dist", "runs", "data")


def call(*command, cwd, **options):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the working tree."""
    here = pathlib.Path(__file__).resolve().parent.parent
    target = tmp_path_factory.mktemp("copy") / "dpsynth"
    everywhere, at_the_top = shutil.ignore_patterns(*LEFT_OUT), shutil.ignore_patterns(*LEFT_OUT_AT_THE_TOP)

    def ignored(folder, names):
        return everywhere(folder, names) | (at_the_top(folder, names) if folder == str(here) else set())

    shutil.copytree(here, target, symlinks=True, ignore=ignored)
    return target


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob(pattern)}


@pytest.fixture(scope="module")
def tracked():
    """Texts that are part of the project: path and content."""
    here = pathlib.Path(__file__).resolve().parent.parent
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=here,
            capture_output=True,
            text=True,
        ).stdout
    except FileNotFoundError:
        listed = ""
    paths = [here / line for line in listed.splitlines()] or [
        p
        for p in here.rglob("*")
        if not any(part in LEFT_OUT for part in p.parts)
        and p.relative_to(here).parts[0] not in LEFT_OUT_AT_THE_TOP
    ]
    texts = (".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".ini", ".json", ".in", "")
    return {
        p.relative_to(here).as_posix(): p.read_text(encoding="utf-8")
        for p in paths
        if p.is_file() and p.suffix in texts and p.name != "LICENSE"
    }


def test_modules_are_what_the_notebooks_export(copy, repo):
    before = contents(repo / "dpsynth", "*.py")
    call(BIN / "nbdev-export", cwd=copy)
    assert contents(copy / "dpsynth", "*.py") == before


def test_notebooks_are_clean(copy, repo):
    call(BIN / "nbdev-clean", cwd=copy)
    assert contents(copy / "nbs", "*.ipynb") == {
        n: b for n, b in contents(repo / "nbs", "*.ipynb").items() if ".ipynb_checkpoints" not in n
    }


WITHOUT_OUTPUT = ("#|export", "#|exporti", "#|default_exp", "#|eval:false")
CLEAN_UP = "folder.cleanup()"


def says_nothing(source):
    """Whether nothing is to be seen of a cell by its nature: only imports and definitions, an assertion,
    or a folder that is removed.
    """
    tree = ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.M))
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    return asserts or source == CLEAN_UP or all(isinstance(node, quiet) for node in tree.body)


def unexecuted(notebook):
    """Sources of the cells of a notebook that lack their output; all of its code cells if it has none at
    all.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells = [
        c
        for c in cells
        if not any(line.replace(" ", "").startswith(WITHOUT_OUTPUT) for line in c.source.splitlines())
    ]
    if not any(cell.outputs for cell in cells):
        return [cell.source for cell in cells]
    return [cell.source for cell in cells if not cell.outputs and not says_nothing(cell.source)]


NOTEBOOKS = [
    path
    for path in (REPO / "nbs").rglob("*.ipynb")
    if not {"templates", ".ipynb_checkpoints"} & {*path.parts}
]


@pytest.mark.parametrize("name", sorted(path.relative_to(REPO).as_posix() for path in NOTEBOOKS))
def test_notebook_is_stored_with_its_outputs(repo, name):
    assert unexecuted(nbformat.read(repo / name, 4)) == []


def test_a_notebook_without_outputs_is_noticed():
    cell = nbformat.v4.new_code_cell
    said = cell("print(3)", outputs=[nbformat.v4.new_output("stream", text="3\n")])
    quiet = [
        cell(source)
        for source in ("#| export\nf(3)", "#| eval: false\n%pip install x", "import os", "x = 3", "assert x")
    ]
    assert unexecuted(nbformat.v4.new_notebook(cells=[said, *quiet])) == []
    assert unexecuted(nbformat.v4.new_notebook(cells=[said, *quiet, cell("x")])) == ["x"]
    assert unexecuted(nbformat.v4.new_notebook(cells=quiet)) == ["import os", "x = 3", "assert x"]


def test_readme_is_the_front_page(repo):
    call(sys.executable, "tools/make_readme.py", "--check", cwd=repo)


def test_table_of_what_the_privacy_tests_notice_is_todays(repo):
    """Also: each text that is to be broken is there once."""
    tool = runpy.run_path(str(repo / "tools" / "break_lines.py"))
    assert all(entry.broken(repo) for entry in tool["BREAKS"])
    table = subprocess.run(
        [sys.executable, "tools/break_lines.py", "--table"],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert table.strip() and (repo / "tests" / "README.md").read_text(encoding="utf-8").endswith(table)


@pytest.mark.parametrize(
    "name", ["audit_power", "bands", "copies", "dp_overhead", "dp_overhead_256", "exchange", "sampling"]
)
def test_records_of_measurements_have_their_form(repo, name):
    record = json.loads((repo / "benchmarks" / "records" / f"{name}.json").read_text())
    assert record["name"] == name.removesuffix("_256") and {"machine", "contenders", "ratios"} <= set(record)
    assert (
        record["contenders"]
        and isinstance(record["contenders"], dict)
        and all(isinstance(r, float) for r in record["ratios"].values())
    )
    assert (
        record["ratios"].get("ours_over_keras_hub", 4) >= 4
        and record["ratios"].get("dp_over_non_dp", 1) <= 1.10
    )
    assert "256" not in name or record["ratios"]["dp_over_non_dp_full"] <= 1.10


@pytest.mark.parametrize("source, packaged", [("nbs/templates/experiment.ipynb", "experiment.ipynb")])
def test_packaged_copies_are_copies(repo, source, packaged):
    assert (repo / source).read_bytes() == (repo / "dpsynth" / "assets" / packaged).read_bytes()


def test_packaged_demo_is_the_demo(repo):
    assert contents(repo / "configs" / "demo", "*.yaml") == contents(
        repo / "dpsynth" / "assets" / "configs" / "demo", "*.yaml"
    )


TINY = REPO / "dpsynth" / "assets" / "tiny"


@pytest.fixture(scope="module")
def pretraining():
    """The figures that were written when the bundled model was exported."""
    return json.loads((TINY / "pretraining.json").read_text(encoding="utf-8"))


def stored_parameters(path):
    """How many numbers a file of Keras weights holds."""
    sizes = []
    with h5py.File(path) as file:
        file.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    return sum(sizes)


def test_bundled_model_is_small(pretraining):
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["config"]
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 12_000_000
    assert (
        4_000_000 <= pretraining["parameters"] <= 6_000_000
        and stored_parameters(TINY / "model.weights.h5") == pretraining["parameters"]
    )
    assert 4096 <= config["vocabulary_size"] <= 8192


def test_bundled_model_is_fully_trained(pretraining):
    assert pretraining["tokens_seen"] >= 60_000_000
    assert set(pretraining["corpora"]) == {"held_novels", "held_wiki", "novels", "wiki", "reviews"}


def test_card_of_the_bundled_model_says_what_it_is(pretraining):
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for word in (
        "**Licence**",
        "CC BY-SA",
        "**Data**",
        "python tools/pretrain_tiny.py all",
        "bits per byte",
        "Differential privacy",
    ):
        assert word in card, word
    for name, corpus in pretraining["corpora"].items():
        assert f"| {name} | {corpus['documents']:,} | {corpus['tokens']:,} |" in card
    for name, loss in pretraining["held_out"].items():
        assert f"| {name} | {loss['nats_per_token']:.3f} | {loss['bits_per_byte']:.3f} |" in card
    assert (
        f"{pretraining['parameters']:,} parameters" in card
        and f"{pretraining['tokens_seen']:,} tokens" in card
    )
    phases = pretraining["phases"]
    assert sum(p["updates"] for p in phases) == pretraining["updates"]
    assert sum(p["updates"] * p["tokens_per_update"] for p in phases) == pretraining["tokens_seen"]
    assert (
        ", then ".join(f"{p['updates']:,} updates of {p['tokens_per_update']:,} tokens" for p in phases)
        in card
    )


GENERATED = (
    "README.md",
    "dpsynth/_modidx.py",
    "dpsynth/files.py",
    "dpsynth/cli/parser.py",
    "dpsynth/assets/experiment.ipynb",
    "dpsynth/assets/configs/demo/dp_ft.yaml",
)
WRITTEN = (
    "dpsynth/__init__.py",
    "dpsynth/_version.py",
    "configs/demo/dp_ft.yaml",
    "dpsynth/cli/__init__.py",
    "dpsynth/cli/__main__.py",
    "nbs/26_cli/11_parser.ipynb",
    "nbs/templates/experiment.ipynb",
)


@pytest.mark.skipif(not shutil.which("git") or not (REPO / ".git").exists(), reason="not a clone")
def test_generated_files_are_marked_as_such(repo):
    said = call("git", "check-attr", "linguist-generated", "--", *GENERATED, *WRITTEN, cwd=repo)
    assert [line.split(": ")[0] for line in said.splitlines() if line.endswith(": true")] == list(GENERATED)


def test_the_demo_of_the_wheel_needs_every_experiment(repo):
    tool = runpy.run_path(str(repo / "tools" / "wheel_demo.py"))
    done = [{"experiment": name, "status": "done", "mauve_mean": 0.5} for name in sorted(tool["EXPERIMENTS"])]
    assert len(done) == 6
    tool["check_rows"](done)
    for rows in (
        done[1:],
        [{**done[0], "status": "failed"}, *done[1:]],
        [{**done[0], "mauve_mean": None}, *done[1:]],
    ):
        with pytest.raises(SystemExit, match=done[0]["experiment"]):
            tool["check_rows"](rows)


def test_no_undefined_or_unused_names(repo):
    call(
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--select",
        "F",
        "dpsynth",
        "tests",
        "tools",
        cwd=repo,
    )


@pytest.mark.parametrize(
    "module", ["dpsynth.runs.sweep", "dpsynth.runs.table", "dpsynth.evaluation.usefulness"]
)
def test_a_table_of_results_waits_for_no_model_library(module):
    code = (
        f"import sys, {module}; print({{'jax', 'keras', 'sklearn', 'tensorflow'}} & "
        f"{{*sys.modules}} or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stdout + done.stderr


def module_name(path):
    """`dpsynth.data.readers` of dpsynth/data/readers.py; a package has the name of its folder."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for path in sorted((REPO / "dpsynth").rglob("*.py"))
    if path.name != "_modidx.py"
}
PACKAGES = {name.rpartition(".")[0] for name in SOURCES} - {""}


def statements(body):
    """What runs when a module is imported: not the bodies of functions."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from statements(getattr(node, inner, []))


def names_imported(name, source):
    """Full names of all that a module imports when it is imported, of modules and of what is in them."""
    place = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    for node in statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = place[: len(place) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def imported_by(name, sources):
    """Modules of `sources` that must be whole before `name` is; a package around `name` need not be."""
    wanted = set()
    for found in names_imported(name, sources[name]):
        wanted |= {found.rsplit(".", up)[0] for up in range(found.count("."))} & set(sources)
    return {module for module in wanted if not f"{name}.".startswith(f"{module}.")}


def circle_of(sources):
    """Names of modules that import each other in a circle; an empty list where none do."""
    edges, done = {name: sorted(imported_by(name, sources)) for name in sources}, set()

    def follow(name, path):
        if name in path:
            return path[path.index(name) :]
        found = next(filter(None, (follow(n, [*path, name]) for n in edges[name] if n not in done)), [])
        done.add(name)
        return found

    return next(filter(None, (follow(name, []) for name in edges if name not in done)), [])


def reading_order():
    """Names of the modules that notebooks make, in the order in which the notebooks are read."""
    paths = [p for p in (REPO / "nbs").rglob("*.ipynb") if p.relative_to(REPO / "nbs").parts[0][:2].isdigit()]
    made = (nbformat.read(path, 4).cells for path in sorted(paths))
    found = (re.search(r"#\| default_exp (\S+)", "\n".join(c.source for c in cells)) for cells in made)
    return [f"dpsynth.{match[1]}" for match in found]


def public_names(source):
    """What `__all__` of a module lists."""
    found = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
    return ast.literal_eval(found[1]) if found else []


def imported_before_it_is_read(order, sources):
    """Pairs of a module and a later one that it imports, by name or through the package that hands it on."""
    place = {name: at for at, name in enumerate(order)}
    owner = {
        f"{above}.{public}": name
        for name in order
        for above in (name, name.rpartition(".")[0])
        if above != "dpsynth"
        for public in public_names(sources[name])
    }
    for name in order:
        found = {owner.get(n, n) for n in names_imported(name, sources[name])} & set(order)
        yield from ((name, other) for other in sorted(found) if place[other] > place[name])


def test_notebooks_are_numbered_in_the_order_in_which_they_build_on_each_other():
    early = ("dpsynth.finetune.estimates", "dpsynth.audit.contamination")
    assert list(imported_before_it_is_read(reading_order(), SOURCES)) == [early]
    assert list(
        imported_before_it_is_read(
            ["dpsynth.b", "dpsynth.a"], {"dpsynth.a": "", "dpsynth.b": "from . import a"}
        )
    )


def test_no_modules_import_each_other():
    assert circle_of(SOURCES) == []


@pytest.mark.parametrize(
    "name, line",
    [
        ("dpsynth.imports.gguf_file", "from ..models import load_model"),
        ("dpsynth.imports.gguf_file", "from dpsynth.models.loading import load_model"),
        ("dpsynth.imports.vocabulary", "from . import tokenizers"),
        ("dpsynth.settings", "if True:\n    import dpsynth.cli"),
    ],
)
def test_a_circle_of_imports_is_noticed(name, line):
    assert name in circle_of({**SOURCES, name: f"{line}\n{SOURCES[name]}"})
    later = f"{SOURCES[name]}\ndef later():\n    {line.splitlines()[-1].strip()}"
    assert circle_of({**SOURCES, name: later}) == []


def test_every_module_imports_from_elsewhere(tmp_path):
    modules = [name for name in SOURCES if not name.rpartition(".")[2].startswith("_")]
    call(
        sys.executable,
        "-c",
        "import importlib, sys; [importlib.import_module(m) for m in sys.argv[1:]]",
        *modules,
        cwd=tmp_path,
    )


def test_wheel_is_complete(copy, repo):
    call(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        copy.parent / "wheel",
        cwd=copy,
    )
    (wheel,) = (copy.parent / "wheel").glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    wanted = [
        p.relative_to(repo).as_posix()
        for p in (repo / "dpsynth").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    assert not set(wanted) - set(inside)
    assert any(name.startswith("dpsynth/assets/tiny/") for name in inside)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("METADATA"))).decode()
    assert (
        "Requires-Dist: jax-privacy<2.1,>=2.0" in metadata
        and 'extra == "dev"' in metadata
        and "License-Expression: Apache-2.0" in metadata
    )
    assert "nbdev" not in "".join(
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    )


def test_package_imports_no_notebook_tool(repo):
    for path in (repo / "dpsynth").rglob("*.py"):
        assert (
            not re.search(
                r"^\s*(from|import) (nbdev|fastcore|execnb)", path.read_text(encoding="utf-8"), flags=re.M
            )
            or path.name == "_modidx.py"
        ), path


def test_only_one_module_imports_keras_hub_at_the_top(repo):
    assert not [
        p.name
        for p in (repo / "dpsynth").rglob("*.py")
        if re.search(r"^(from|import) keras_hub", p.read_text(encoding="utf-8"), flags=re.M)
    ]


def test_no_path_of_any_machine_and_no_registry(tracked):
    """Paths of one machine do not exist on others; the client's own settings say where packages come from."""
    homes = "|".join(f"/{name}/" for name in ("root", "work", "Users", "home/[a-z]"))
    hosts = "|".join(["pypi" + r"\.org", "python" + "hosted", "--index" + "-url", "--extra-index" + "-url"])
    bad = {
        name: found.group()
        for name, text in tracked.items()
        if (found := re.search(rf"(?<![\w.:/-])({homes})|{hosts}", text))
    }
    assert not bad
