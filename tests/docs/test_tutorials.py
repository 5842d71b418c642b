"""The notebooks of the documentation run from their first cell to the last, and show their outputs."""

import runpy
from pathlib import Path

import nbformat
import pytest
from paths import ROOT

from sails_align.core.errors import InputError
from sails_align.models.spec import model_path

FOLDER = ROOT / "docs" / "tutorials"
TUTORIALS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_cell_was_run_and_none_failed(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "execute_result" in kinds
    assert "error" not in kinds
    assert str(Path.home()) not in nbformat.writes(notebook), "paths of the machine that ran it"


@pytest.mark.documents
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "smollm2.ipynb":
        try:
            model_path("smollm2")
        except InputError as error:
            pytest.skip(str(error).splitlines()[0])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = runpy.run_path(str(FOLDER / "run.py"))["run"]
    notebook = run(FOLDER / name)  # which raises CellExecutionError
    results = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert any("EvaluationResult" in output.data["text/plain"] for output in results)
