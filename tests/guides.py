"""Runs notebooks from the scripts beside them: `python tests/guides.py notebooks/12_linen.py`."""

import base64
import io
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def is_kept(output):
    """Not progress, which is on standard error, nor what says where an object or a file lies."""
    if output.output_type == "stream":
        return output.name != "stderr"
    shown = output.get("data", {})
    text = shown.get("text/plain", "")
    return set(shown) != {"text/plain"} and not text.startswith("Wrote ")


def made_small(output):
    """The same, a figure with 64 colours."""
    if "image/png" in output.get("data", {}):
        image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        small = io.BytesIO()
        image = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        image.save(small, "png", optimize=True)
        output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def run(script, before="", after=""):
    """The notebook of a script, executed.

    Args:
      script: path of the script.
      before: code that runs first, of which nothing is left in the notebook.
      after: code that runs last.

    Returns:
      The notebook with what it prints and draws, and nothing that is another one in another run:
      times, ids, progress, and where an object lies in memory.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the outputs that are kept are those of a CPU
    notebook = jupytext.read(script)
    first, last = (nbformat.v4.new_code_cell(source) for source in (before, after))
    notebook.cells = [first, *notebook.cells, last]
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", record_timing=False, coalesce_streams=True
    ).execute(cwd=str(script.parent))
    del notebook.cells[0], notebook.cells[-1]
    codes = 0
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
        if cell.cell_type == "code":
            codes += 1
            cell["execution_count"] = codes
            cell["outputs"] = [made_small(output) for output in cell.outputs if is_kept(output)]
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output["execution_count"] = codes
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return notebook


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument).resolve()
        nbformat.write(run(path), path.with_suffix(".ipynb"))
