"""Execute a notebook and store its outputs in it: `python docs/notebooks/execute.py docs/notebooks/NAME.ipynb`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, **parameters: int) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a fresh run, in the folder of the notebook.

    Args:
        path: the notebook.
        parameters: other values for the variables of the cell with the tag "parameters".

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
        ValueError: the cell with the tag "parameters" does not set one of the parameters.
    """
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in parameters.items():
        cell.source, found = re.subn(rf"^{name} = \w+", f"{name} = {value}", cell.source, flags=re.MULTILINE)
        if not found:
            raise ValueError(f"expected a line that sets {name} in the cell of parameters, got {cell.source!r}")
    folder = {"metadata": {"path": str(path.resolve().parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=1800, resources=folder)
    client.record_timing = False
    client.coalesce_streams = True  # the lines that a cell prints become one output
    client.execute()
    notebook.metadata = {  # no version of Python, which differs between machines
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(execute(Path(name)), name)
