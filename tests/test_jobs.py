"""Jobs as papermill runs them."""

import json
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JOBS = sorted((ROOT / "nbs" / "jobs").glob("*.ipynb"))


def test_jobs_are_found():
    assert "compress" in {path.stem for path in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_unknown_parameter_is_refused(job, tmp_path, monkeypatch):
    """papermill itself only warns, and would run for hours with a default that was meant to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import papermill

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "out.ipynb"
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="no_such_parameter"):
        papermill.execute_notebook(job, out, {"no_such_parameter": 1}, kernel_name="python3", progress_bar=False,
                                   cwd=tmp_path, log_output=False)
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    injected = next(i for i, cell in enumerate(cells) if "injected-parameters" in cell["metadata"].get("tags", []))
    failed = [i for i, cell in enumerate(cells) if any(o["output_type"] == "error" for o in cell.get("outputs", []))]
    assert failed and failed[0] <= injected + 2, "refused, but not before the work began"
