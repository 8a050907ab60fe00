"""Runs the cells of a notebook in a process that is forked from one in which the libraries are imported already.

A kernel of its own for each notebook costs some four seconds of imports and messages. `DPSYNTH_KERNELS=1` (`make test-all`) uses
such kernels all the same.
"""

import multiprocessing
import os
import pathlib
import traceback

PRELOADED = ["forked", "dpsynth.models", "dpsynth.evaluation", "dpsynth.audit", "dpsynth.synthesizer", "matplotlib.pyplot"]
LIMIT = 600  # seconds for a notebook
ERRORS = "errors.txt"

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def run_cells(sources, folder):
    """In the child: run the cells one after the other; what fails is written to a file, and ends it with 1."""
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.enable_gui = lambda gui=None: None  # `%matplotlib inline` asks for one
    for source in sources:
        result = shell.run_cell(source, store_history=False, silent=True)
        if error := result.error_before_exec or result.error_in_exec:
            text = "".join(traceback.format_exception(error))
            pathlib.Path(folder, ERRORS).write_text(f"{source}\n\n{text}", encoding="utf-8")
            os._exit(1)
    os._exit(0)


def run_notebook(sources, folder):
    """Run cells in a process of their own; raises AssertionError with the cell that failed."""
    process = context.Process(target=run_cells, args=(sources, str(folder)))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"not done after {LIMIT} s")
    errors = pathlib.Path(folder, ERRORS)
    assert not process.exitcode, errors.read_text(encoding="utf-8") if errors.exists() else process.exitcode
