"""Jobs as papermill runs them."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hific_nb import Codec
from hific_nb.cli import main as cli_main
from hific_nb.config import ConfigError, job_parameters
from hific_nb.data import sample_photo, sample_photo_path, write_shard
from hific_nb.training import inherited_objective

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


def run_job(name, run, parameters, cwd, environment=None):
    """As `papermill nbs/jobs/NAME.ipynb run/NAME.ipynb -k python3 -p ...` from a folder that is not the clone."""
    run.mkdir(exist_ok=True)
    source, target = JOBS[0].parent / f"{name}.ipynb", run / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", source, target, "-k", "python3", "--no-progress-bar"]
    for key, value in {**parameters, "run": run}.items(): command += ["-p", key, str(value)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | (environment or {}))
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
    settings = dict(dataset=photos, n_steps="4", batch_size=1, crop_size=64, log_every=1, regime="high", dtype="float32",
                    perceptual="none")
    done, notebook = run_job("train", run, settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"train.ipynb", "run.json", "metrics.jsonl", "metrics.json", "checkpoints", "samples", "curves.png", "held_back.hfc",
            "held_back.png"} <= {p.name for p in run.iterdir()}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert "step_slider" in notebook["cells"][-1]["source"][-1] and "widget-view" in str(notebook["cells"][-1]["outputs"])
    assert "compare" in notebook["cells"][-3]["source"][-1] and "widget-view" in str(notebook["cells"][-3]["outputs"])
    report = json.loads((run / "metrics.json").read_text())
    assert report["steps"] == 4 and report["photo"]["bytes"] == (run / "held_back.hfc").stat().st_size
    codec = Codec.from_pretrained(run / "model")
    assert codec.fingerprint.hex() == report["fingerprint"]
    assert codec.decompress(run / "held_back.hfc").size == Image.open(run / "held_back.png").size
    assert cli_main(["compress", str(photos / "coffee.png"), "--model", str(run / "model"), "--out", str(tmp_path / "c.hfc")]) == 0
    assert cli_main(["decompress", str(tmp_path / "c.hfc")]) == 1  # not a shipped model: it must be named
    assert cli_main(["decompress", str(tmp_path / "c.hfc"), "--model", str(run / "model")]) == 0


@pytest.mark.parametrize("asked", ["TERM", "INT"])
def test_a_killed_papermill_leaves_a_checkpoint(tmp_path, asked):
    """papermill dies of SIGTERM, and its kernel would a second later; the run saves first, however long it takes."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for name in ("chelsea", "coffee"): sample_photo(name).save(photos / f"{name}.png")
    command = [sys.executable, "-m", "papermill", ROOT / "nbs" / "jobs" / "train.ipynb", tmp_path / "out.ipynb", "-k", "python3",
               "--no-progress-bar"]
    settings = dict(dataset=photos, run=run, n_steps=100000, batch_size=1, crop_size=64, log_every=1, perceptual="none",
                    dtype="float32")
    for key, value in settings.items(): command += ["-p", key, str(value)]
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "slow.py").write_text("import time, torch\nsave = torch.save\n"
                                     "def slowly(*args, **options): time.sleep(2.5); save(*args, **options)\ntorch.save = slowly\n")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | dict(IPYTHONDIR=str(tmp_path / "ipython")),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in a shell's background
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline: time.sleep(0.1)
    process.send_signal(getattr(signal, f"SIG{asked}"))
    process.communicate()
    deadline = time.monotonic() + 20
    while not list((run / "checkpoints").glob("step-*.pt")) and time.monotonic() < deadline: time.sleep(0.1)
    checkpoint, = (run / "checkpoints").glob("step-*.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] >= 5


def test_hific_train_makes_the_run_and_its_report(tmp_path, capfd):
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for name in ("chelsea", "coffee"): sample_photo(name).save(photos / f"{name}.png")
    few = ["--n-steps", "2", "--batch-size", "1", "--crop-size", "64", "--log-every", "1", "--perceptual", "none"]
    assert cli_main(["finetune", "--dataset", str(photos), "--run", str(run), *few]) == 0
    assert "step 2, loss" in capfd.readouterr().out and (run / "train.ipynb").exists() and (run / "model" / "config.json").exists()
    about = json.loads((run / "run.json").read_text())
    assert about["warm_start"] == "hific-lite" and about["warm_start_report"]["not_loaded"] == []
    moves = ("lambda_lowest_rate", "lambda_highest_rate", "level_balance", "k_M")
    taken = {name: value for name, value in inherited_objective("hific-lite").items() if name in moves}
    assert len(taken) == 4 and (taken | dict(perceptual="none", k_T=0, k_B=0)).items() <= about["objective"].items()
    assert f"Taken over from its objective: lambda_lowest_rate {taken['lambda_lowest_rate']}" in (run / "train.ipynb").read_text()
    assert cli_main(["train", "--dataset", str(photos), "--run", str(tmp_path / "other"), "--perceptual", "nothing"]) == 1
    assert "perceptual" in capfd.readouterr().err


def test_shards_too_small_to_hold_a_photo_back(tmp_path):
    """The run ends with its model and its report all the same."""
    write_shard(tmp_path / "few.tar", [(path.name, path.read_bytes()) for path in map(sample_photo_path, ("chelsea", "coffee"))])
    run = tmp_path / "run"
    settings = dict(dataset=tmp_path / "few.tar", n_steps="2", batch_size=1, crop_size=64, log_every=1, perceptual="none")
    done, notebook = run_job("train", run, settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No photo was held back" in str(notebook["cells"]) and (run / "model" / "config.json").exists()
    assert json.loads((run / "metrics.json").read_text())["held_back"] is None


def test_the_guides_two_commands(tmp_path):
    """The base model, then the GAN that begins from it, with every network setting of the guide, in absolute steps."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea", "coffee"): sample_photo(name).save(photos / f"{name}.png")
    drawing = dict(preset="hific", latent_channels=8, hyperprior_channels=8, n_residual_blocks=1, likelihood_type="logistic",
                   normalize_input_image=True, use_channel_norm=True)
    both = dict(regime="low", n_steps="2", batch_size=2, crop_size=64, log_every=1, dtype="float32",
                perceptual="ms-ssim", schedule_in="steps", rate_warmup=1, lr_drop_at=500000, **drawing)
    slim = ("from hific_nb import config\n"
            "config.MODEL_PRESETS['hific'] = config.model_preset('hific').replace(channels=[4, 4, 4, 8, 8])\n")
    (tmp_path / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (tmp_path / "ipython" / "profile_default" / "startup" / "slim.py").write_text(slim)  # the paper's widths take gigabytes
    environment = dict(IPYTHONDIR=str(tmp_path / "ipython"))
    done, _ = run_job("train", tmp_path / "base", both | dict(dataset=photos, model_type="compression"), tmp_path, environment)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "base" / "run.json").read_text())
    assert about["train"]["lr_drop_at"] == 1.0 and about["objective"]["rate_warmup"] == 0.5
    assert [about["model"][name] for name in ("latent_channels", "likelihood", "normalize_input_image")] == [8, "logistic", True]
    gan = dict(model_type="compression_gan", warm_start=tmp_path / "base", batch_size="auto", discriminator_channels="4,4,4,4")
    done, _ = run_job("train", tmp_path / "gan", both | gan, tmp_path, environment)  # the photos are those of the base model
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "gan" / "run.json").read_text())["dataset"] == str(photos)
    report = json.loads((tmp_path / "gan" / "metrics.json").read_text())
    assert report["warm_start"]["not_loaded"] == report["warm_start"]["left_over"] == []
    last = json.loads((tmp_path / "gan" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"D_real", "adversarial", "perceptual"} <= last.keys()
    assert 2 <= json.loads((tmp_path / "gan" / "run.json").read_text())["train"]["batch_size"] <= 64


WRONG = dict(model_type=["compresion", 1], n_steps=[1.5, 0, -1, "many"], batch_size=[0, 2.5, "many"], seed=[-1, 0.5, "x"],
             preset=["hifi", "warm_start"], latent_channels=[0, 2.5, "x"], hyperprior_channels=[0, "x"], n_residual_blocks=[-1],
             encoder_blocks=["1,x", "1,-2,3,3"], generator_blocks=["1;2", "1,2,3,-4"],
             use_channel_norm=["false", 2], noise_channels=[-1, "x"], mixture_components=[0, "x"],
             normalize_input_image=["true", 2],
             rate_levels=[-1, 1.5], level_offsets=["false", 2, True], realism_features=["fine", 0], regime=["hihg", 1],
             target_bpp=[-0.1, "x", [1]], k_M=[-1, "x"], k_P=[-1, "x"],
             perceptual=["lpip", 0], k_T=[-1, "x"], k_B=[-1, "x"], lpips_weights=["no/such/folder", 3], beta=[-1, "x"],
             realism_fade=[-0.1, "x"], gan_loss=["wasserstain", 0],
             lambda_lowest_rate=[-1, "x"], lambda_highest_rate=[-1, "x"], level_balance=[-1, "x"], rate_warmup=[-1, "x", [1]],
             warmup_target=[0, "x"], warmup_lambda=[0, "x"], schedule_in=["step"], learning_rate=[0, -1e-4, 5.0, "x"],
             lr_schedule=["cosin"], lr_drop_at=[-0.1, "x"], lr_drop=[0, 2, "x"], adam_beta1=[-0.1, 1, "x"], warmup_steps=[-1, 0.5],
             grad_clip=[-1, "x"], ema_decay=[1.0, -1, "x"], accumulate=[0, 1.5], train_encoder=["false", 2],
             discriminator_channels=["64,x", "0,1,1,1"], discriminator_rate=[0, "x"], spectral_norm=["false", 2],
             crop_size=[100, 32, 64.5, "x"], min_scale=[0, 1.5, "x"], drop_flat=["false", "yes", 2],
             memory_gb=[-1, "x"], device=["gpu", 1], processes=[0, 1.5, "x"], dtype=["float23"], compile=["yes", 2],
             checkpoint_minutes=[-1, "x"], keep_checkpoints=[0, 1.5], log_every=[0, 0.5], sample_every=[0, "x"])


def test_every_setting_of_a_training_is_checked_before_anything_runs(tmp_path):
    """The cells before the run, here instead of in a kernel, for each parameter and values that it cannot have."""
    cells = [cell for cell in json.loads((ROOT / "nbs/jobs/train.ipynb").read_text(encoding="utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    defaults, *before = ["".join(cell["source"]) for cell in cells[:3]]
    assert "parameters" in cells[0]["metadata"]["tags"] and "train(out" in "".join(cells[3]["source"])

    def configure(**given):
        names = {"__name__": "job"}
        exec(defaults, names)
        names |= dict(dataset=str(tmp_path), run=str(tmp_path / "run")) | given
        for cell in before: exec(cell, names)
    configure()
    declared = job_parameters(ROOT / "nbs/jobs/train.ipynb").keys()
    assert WRONG.keys() == declared - {"dataset", "run", "warm_start", "likelihood_type"}  # of these, below
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(ConfigError) as raised: configure(**{name: value})
            assert name in str(raised.value) or repr(value) in str(raised.value), (name, value, str(raised.value))


@pytest.mark.parametrize("settings", [dict(), dict(dataset="photos", n_steps="1.5"), dict(dataset="nowhere", n_steps="4"),
                                      dict(dataset="photos", regime="hihg"),
                                      dict(dataset="photos", likelihood_type="gausian"), dict(dataset="photos", batch_size="many")])
def test_train_settings_that_cannot_be(settings, tmp_path):
    (tmp_path / "photos").mkdir()
    sample_photo("chelsea").save(tmp_path / "photos" / "cat.png")
    done, _ = run_job("train", tmp_path / "run", settings, tmp_path)
    assert done.returncode != 0 and ("ConfigError" in done.stderr or "ImageError" in done.stderr), done.stderr[-500:]
