"""Every notebook runs, in under a minute, and is what the script beside it says."""

import resource
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert [script.name[:2] for script in SCRIPTS] == ["00", "01", "02", "03", "04", "05", "06"]


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
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert 0.5 < kernels_seconds() - start < 60
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
