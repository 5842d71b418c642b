"""Run the tutorials and keep their outputs: python docs/tutorials/run.py [NOTEBOOK ...] (default: all).

Warnings and the times of cells are left out, so that a notebook changes little where its results do not. What trainings
print stays, with its `train_runtime`.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
TIME_LIMIT = 900
"""Of a cell, in seconds."""


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in the repository's folder, and return it with its outputs; raise `CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER.parents[1])}}
    NotebookClient(notebook, timeout=TIME_LIMIT, record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [of for of in cell.outputs if of.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for asked in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(asked), asked)
        print(asked)
