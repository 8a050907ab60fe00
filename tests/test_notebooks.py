"""Every notebook runs from top to bottom, in a process of its own, in a folder that is not the
repository's."""

import pathlib

import nbclient
import nbformat
import pytest

from dpsynth.runs import kernel_manager

NBS = pathlib.Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(
    p.relative_to(NBS).as_posix()
    for p in NBS.rglob("*.ipynb")
    if "templates" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
SKIPPED = ("#| eval: false", "#| eval:false")


def read(name):
    return nbformat.read(NBS / name, 4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path):
    notebook = read(name)
    notebook.cells = [cell for cell in notebook.cells if not any(mark in cell.source for mark in SKIPPED)]
    (tmp_path / "run" / "private").mkdir(parents=True)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        kernel_manager_class=kernel_manager(tmp_path / "run"),
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()


@pytest.mark.parametrize("name", [*NOTEBOOKS, "templates/experiment.ipynb"])
def test_notebook_is_stored_as_it_should_be(name):
    notebook = read(name)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    if name.startswith("templates"):
        assert not outputs
    else:
        assert outputs, "stored without having been executed"
