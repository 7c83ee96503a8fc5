"""Jobs as papermill runs them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hific_nb import Codec
from hific_nb.cli import main as cli_main
from hific_nb.data import sample_photo

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


def run_job(name, run, parameters, cwd):
    """As `papermill nbs/jobs/NAME.ipynb run/NAME.ipynb -k python3 -p ...` from a folder that is not the clone."""
    run.mkdir(exist_ok=True)
    source, target = JOBS[0].parent / f"{name}.ipynb", run / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", source, target, "-k", "python3", "--no-progress-bar"]
    for key, value in {**parameters, "run": run}.items(): command += ["-p", key, str(value)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    cells = json.loads((run / f"{name}.ipynb").read_text(encoding="utf-8"))
    return done, cells


def test_compress_a_folder(tmp_path):
    photos = tmp_path / "photos"
    (photos / "trip").mkdir(parents=True)
    photo = sample_photo("chelsea").resize((180, 120))
    photo.save(photos / "cat.jpg", quality=95)
    photo.crop((0, 0, 100, 40)).save(photos / "trip" / "cat.png")
    photo.crop((0, 0, 64, 40)).save(photos / "trip_cat.png")  # a name that the one before is given, too
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run = tmp_path / "run"
    done, notebook = run_job("compress", run, dict(input=photos), tmp_path)
    assert done.returncode == 0, done.stderr
    made = {f"{name}{kind}" for name in ("cat", "trip_cat", "trip_cat.png") for kind in (".hfc", ".png", ".comparison.png")}
    assert {p.name for p in run.iterdir()} == {"compress.ipynb", "metrics.json", *made}
    report = json.loads((run / "metrics.json").read_text())
    assert [Path(f["file"]).name for f in report["failed"]] == ["broken.png"]
    codec = Codec.from_pretrained("hific-lite")
    for row in report["images"]:
        file = run / f"{row['name']}.hfc"
        assert row["bytes"] == file.stat().st_size
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (row["width"] * row["height"]))
        decoded = codec.decompress(file)
        assert np.abs(np.asarray(decoded).astype(int) - np.asarray(Image.open(run / f"{row['name']}.png"))).max() <= 2
        assert row["ideal_bpp"] < row["bpp"] and row["psnr"] > 15 and row["ms_ssim"] is None  # too small for five scales
        assert row["ratio"] == pytest.approx(row["original_bytes"] / row["bytes"])
        assert set(row["seconds"]) >= {"read", "encode", "entropy_encode", "entropy_decode", "generate"}
    assert report["mean"]["bpp"] == pytest.approx(sum(r["bpp"] for r in report["images"]) / 3)
    # live when it is opened again, a picture when it is only read
    last = notebook["cells"][-1]["outputs"][-1]["data"]
    assert "application/vnd.jupyter.widget-view+json" in last and "image/png" in last and notebook["metadata"]["widgets"]


def test_reconstruct_only(tmp_path):
    photo = tmp_path / "a.png"
    sample_photo("coffee").resize((200, 200)).save(photo)
    run = tmp_path / "run"
    done, _ = run_job("compress", run, dict(input=photo, reconstruct_only=True, metrics=False), tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((run / "metrics.json").read_text())["images"][0]
    assert not list(run.glob("*.hfc")) and "bpp" not in row and "psnr" not in row and row["ideal_bpp"] > 0
    assert np.array_equal(np.asarray(Image.open(run / "a.png")), np.asarray(Codec.from_pretrained("hific-lite").reconstruct(photo)))


def test_a_named_file_that_is_broken_stops_the_job(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    done, _ = run_job("compress", tmp_path / "run", dict(input=tmp_path / "a.png"), tmp_path)
    assert done.returncode != 0 and "ImageError" in done.stderr and not list((tmp_path / "run").glob("*.hfc"))


def test_train_then_compress_with_the_result(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea", "coffee", "rocket"): sample_photo(name).save(photos / f"{name}.png")
    run = tmp_path / "run"
    settings = dict(dataset=photos, n_steps="4", batch_size=1, crop_size=64, log_every=1, regime="high", dtype="float32")
    done, notebook = run_job("train", run, settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"train.ipynb", "run.json", "metrics.jsonl", "metrics.json", "checkpoint.pt", "curves.png", "held_back.hfc",
            "held_back.png"} <= {p.name for p in run.iterdir()}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    report = json.loads((run / "metrics.json").read_text())
    assert report["steps"] == 4 and report["photo"]["bytes"] == (run / "held_back.hfc").stat().st_size
    codec = Codec.from_pretrained(run / "model")
    assert codec.fingerprint.hex() == report["fingerprint"]
    assert codec.decompress(run / "held_back.hfc").size == Image.open(run / "held_back.png").size
    assert cli_main(["compress", str(photos / "coffee.png"), "--model", str(run / "model"), "--out", str(tmp_path / "c.hfc")]) == 0
    assert cli_main(["decompress", str(tmp_path / "c.hfc")]) == 1  # not a shipped model: it must be named
    assert cli_main(["decompress", str(tmp_path / "c.hfc"), "--model", str(run / "model")]) == 0


@pytest.mark.parametrize("settings", [dict(), dict(dataset="photos", n_steps="1.5"), dict(dataset="nowhere", n_steps="4"),
                                      dict(dataset="photos", regime="hihg")])
def test_train_settings_that_cannot_be(settings, tmp_path):
    (tmp_path / "photos").mkdir()
    sample_photo("chelsea").save(tmp_path / "photos" / "cat.png")
    done, _ = run_job("train", tmp_path / "run", settings, tmp_path)
    assert done.returncode != 0 and ("ConfigError" in done.stderr or "ImageError" in done.stderr), done.stderr[-500:]
