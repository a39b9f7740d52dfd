"""The notebook runs from top to bottom, on a tiny model."""

import importlib.util

import pytest

from tests.conftest import ROOT
from tests.tiny import tiny_folder

pytestmark = pytest.mark.full
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_it_runs(tmp_path, monkeypatch):
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        pytest.skip("nbclient or ipykernel not installed: pip install -c constraints.txt -e '.[full]'")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in book.cells if cell.cell_type == "code")
    assert 'MODEL = "sample"' in settings.source and "STEPS = 30" in settings.source
    model = tiny_folder(tmp_path / "bert", "bert", max_position_embeddings=128)
    settings.source = f"MODEL, STEPS, OUTPUT = {str(model)!r}, 8, {str(tmp_path / 'out')!r}"
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [str(output) for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/svg+xml" in text for text in shown) == 2
    assert any("text/markdown" in text and "## Kept units" in text for text in shown)
    assert "'label':" in shown[-1] and "'score':" in shown[-1]
    for sparsity in ("0.4", "0.7"):
        assert (tmp_path / "out" / sparsity / "report.html").is_file()
