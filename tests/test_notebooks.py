"""Every notebook runs, in under a minute, and is what the script beside it says.

Its figures hold to what those of the commands do.
"""

import resource
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

# Inline figures are closed once they are shown: they are kept by a hook that runs before that.
KEEP = """
import sys, matplotlib.pyplot as plt
sys.path.insert(0, {folder!r})
from looks import check
figures = []
def keep():
    figures.extend(plt.figure(number) for number in plt.get_fignums())
get_ipython().events.register("post_execute", keep)
"""
CHECK = "assert figures or not {draws}\nfor figure in figures: check(figure)"
SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert [script.name[:2] for script in SCRIPTS] == [f"{i:02}" for i in range(9)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pairs_agree(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert cells(notebook) == cells(jupytext.read(script))
    assert not any(cell.get("outputs") for cell in notebook.cells)


def kernels_seconds():
    """Processor time of those that have ended: what others do on the machine does not enter."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning:zmq")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script):
    notebook = jupytext.read(script)
    start = kernels_seconds()
    keep = KEEP.format(folder=str(Path(__file__).parent))
    check = CHECK.format(draws="plt." in script.read_text(encoding="utf-8"))
    first, last = (nbformat.v4.new_code_cell(source) for source in (keep, check))
    notebook.cells = [first, *notebook.cells, last]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert 0.5 < kernels_seconds() - start < 60
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
