"""jobs/sweep on a tiny grid: a run that fails does not end it, and what is finished is not run again."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hific_nb.config import job_parameters
from hific_nb.data import sample_photo

JOBS = Path(__file__).resolve().parent.parent / "nbs" / "jobs"
SHARED = dict(n_steps=2, batch_size=1, log_every=1, dtype="float32")
if "perceptual" in job_parameters(JOBS / "train.ipynb"): SHARED["perceptual"] = "none"


def sweep(folder, **parameters):
    """As `papermill nbs/jobs/sweep.ipynb ...` in the folder: the finished process, and the executed notebook's cells."""
    target = folder / "sweep.ipynb"
    command = [sys.executable, "-m", "papermill", JOBS / "sweep.ipynb", target, "-k", "python3", "--no-progress-bar"]
    for key, value in parameters.items(): command += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done, json.loads(target.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea", "coffee"): sample_photo(name).resize((192, 128)).save(folder / f"{name}.png")
    return str(folder)


def test_a_failure_and_a_second_call(photos, tmp_path):
    grid = {"crop_size": [100, 64], "seed": [3]}  # 100 is no multiple of 16: that run fails
    done, cells = sweep(tmp_path, dataset=photos, run="out", grid=grid, settings=SHARED)
    assert done.returncode == 0, done.stderr[-1000:]
    out = tmp_path / "out"
    first = json.loads((out / "metrics.json").read_text())["runs"]
    assert [r["status"] for r in first] == ["failed", "finished"]
    assert [(r["crop_size"], r["seed"]) for r in first] == [(100, 3), (64, 3)]
    assert "ConfigError" in first[0]["error"] and "crop_size" in first[0]["error"]
    good = out / first[1]["run"]
    assert {"train.ipynb", "log.txt", "metrics.json", "parameters.json", "model"} <= {p.name for p in good.iterdir()}
    of_run, settings = (json.loads((good / name).read_text()) for name in ("metrics.json", "run.json"))
    assert first[1]["figures"]["held_back.bpp"] == of_run["held_back"]["bpp"] > 0
    assert settings["train"]["crop_size"] == 64 and settings["train"]["seed"] == 3
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert float(rows[1]["held_back.psnr"]) == first[1]["figures"]["held_back.psnr"] and rows[0]["held_back.psnr"] == ""
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    shown = json.dumps([cell.get("outputs") for cell in cells])
    assert "1 of 2 runs finished, 1 failed" in shown and "| crop_size | seed | status |" in shown and "image/png" in shown

    # again: what is finished stays as it is, what failed is tried again
    before = {p: p.stat().st_mtime_ns for p in good.rglob("*")}
    tried = (out / first[0]["run"] / "log.txt").stat().st_mtime_ns
    done, _ = sweep(tmp_path, dataset=photos, run="out", grid=grid, settings=SHARED)
    assert done.returncode == 0, done.stderr[-1000:]
    second = json.loads((out / "metrics.json").read_text())["runs"]
    assert [r["status"] for r in second] == ["failed", "finished before"]
    assert second[1]["figures"] == first[1]["figures"] and (out / second[0]["run"] / "log.txt").stat().st_mtime_ns > tried
    assert {p: p.stat().st_mtime_ns for p in good.rglob("*")} == before

    # other settings in the same folder are no reason to show old figures as theirs; and nothing but failures is one
    done, _ = sweep(tmp_path, dataset=photos, run="out", grid={**grid, "crop_size": [64]}, settings={**SHARED, "n_steps": 3})
    assert done.returncode != 0 and "All 1 runs failed" in done.stderr and "n_steps" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in good.rglob("*")} == before


@pytest.mark.parametrize("parameters, message", [
    (dict(grid={"run": ["a"]}), "Unknown parameter"), (dict(grid="{regime"), "not valid JSON"),
    (dict(grid={"seed": [0]}, settings={"seed": 1}), "given twice")])
def test_grids_that_cannot_be(parameters, message, tmp_path):
    done, _ = sweep(tmp_path, dataset="nowhere", run="out", **parameters)
    assert done.returncode != 0 and "ConfigError" in done.stderr and message in done.stderr, done.stderr[-500:]
    assert not (tmp_path / "out").exists()
