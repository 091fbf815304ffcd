"""The example notebook runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from barcast.backtest.result import BacktestResult
from barcast.backtest.sample import example_notebook

FIGURE = "application/vnd.plotly.v1+json"


def test_it_is_shipped_without_outputs() -> None:
    """What lies in the package was not run: no outputs, no counts."""
    notebook = nbformat.read(example_notebook(), as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert example_notebook().stat().st_size < 20_000


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, those with a figure show one, and what it keeps can be read again."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(example_notebook(), as_version=4)
    there = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=there).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        shown = [kind for output in cell.outputs for kind in output.get("data", {})]
        assert shown, cell.source
        assert (FIGURE in shown) == cell.source.startswith("plot."), cell.source
        assert "error" not in [output.output_type for output in cell.outputs]
    kept = BacktestResult.load(tmp_path / "result")
    assert set(kept.portfolio["strategy"]) >= {"band", "median-drift"}
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
