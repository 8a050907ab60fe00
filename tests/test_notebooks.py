"""Every notebook executes from top to bottom, in a kernel of its own, in a folder that has nothing to do with the repository."""
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if "templates" not in p.parts and ".ipynb_checkpoints" not in p.parts)


def runnable(notebook):
    """The notebook without the cells that are for hosted notebooks only."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and "#| eval: false" in cell.source:
            cell.source = ""
    return notebook


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_executes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = runnable(nbformat.read(ROOT / "nbs" / name, 4))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_executed_and_portable(name):
    notebook = nbformat.read(ROOT / "nbs" / name, 4)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [c for c in notebook.cells if c.cell_type == "code" and "#| eval: false" not in c.source]
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    shows = [c for c in code if c.source.strip().splitlines()[-1:] and "print(" in c.source and not c.source.startswith("#| export")]
    assert all(c.outputs for c in shows), "a cell that prints is stored without what it printed"


def test_tutorials_have_a_colab_badge_and_an_install_cell():
    for path in (ROOT / "nbs" / "tutorials").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert "colab-badge" in notebook.cells[0].source and path.name in notebook.cells[0].source
        assert any("%pip install" in c.source and "#| eval: false" in c.source for c in notebook.cells)
