"""Bring the `parameters` cell of the template notebook up to date with the settings, and the copy of the
template in the package with it."""

import pathlib
import shutil

import nbformat

from dpsynth.settings import parameters_cell

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "nbs" / "templates" / "experiment.ipynb"


def main():
    notebook = nbformat.read(TEMPLATE, 4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if cell.source != parameters_cell():
        cell.source = parameters_cell()
        nbformat.write(notebook, TEMPLATE)
    shutil.copyfile(TEMPLATE, ROOT / "dpsynth" / "assets" / "experiment.ipynb")


if __name__ == "__main__":
    main()
