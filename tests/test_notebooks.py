"""Every notebook is what the script beside it says, holds its outputs, and runs.

Their figures hold to what those of the commands do. Only the guides that are quick run among the
other tests, in this process; all of them run in the slow ones.
"""

import re

import jupytext
import nbformat
import pytest
from guides import NOTEBOOKS, SCRIPTS, run

QUICK = ("10_choosing", "16_microbatches", "17_precision", "18_devices", "20_metrics")
MOST_BYTES = 250_000  # of a notebook, nearly all of it figures

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


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def kept(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def without_numbers(text):
    """Rounding moves their last digits, and what is left for spaces."""
    return re.sub(r"[-+]?\d[-+\d.e]*|\s", "", text)


def printed(notebook):
    texts = [output["text"] for output in outputs(notebook) if output.output_type == "stream"]
    return without_numbers("".join(texts))


def test_there_are_scripts_and_notebooks():
    assert {path.stem for path in SCRIPTS} == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert set(QUICK) <= {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_pairs_agree(script):
    """In code and text; and outputs were made by running all cells from the top."""
    notebook = kept(script)
    assert cells(notebook) == cells(jupytext.read(script)), "python tests/guides.py SCRIPT mends it"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert kinds
    assert {output.name for output in outputs(notebook) if "name" in output} <= {"stdout"}
    assert script.with_suffix(".ipynb").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", QUICK)
def test_quick_guides_run(name, capsys):
    namespace = {}
    for number, (kind, source) in enumerate(cells(jupytext.read(NOTEBOOKS / f"{name}.py"))):
        if kind == "code":
            exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
    assert without_numbers(capsys.readouterr().out) == printed(kept(NOTEBOOKS / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning:zmq")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script):
    draws = "plt." in script.read_text("utf-8")
    keep = KEEP.format(folder=str(NOTEBOOKS.parent / "tests"))
    notebook = run(script, before=keep, after=CHECK.format(draws=draws))
    assert printed(notebook) == printed(kept(script))
    images = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(images) == sum("image/png" in o.get("data", {}) for o in outputs(kept(script)))
