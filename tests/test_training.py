"""Trainings that are cut short by every means, in real processes on real photos."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hific_nb.config import ModelConfig, Objective, TrainConfig
from hific_nb.data import sample_photo
from hific_nb.training import TrainingError, train

TINY = ModelConfig(transform="light", channels=(8, 8, 12, 16), encoder_blocks=(0, 0, 1, 1), generator_blocks=(0, 0, 1, 1),
                   latent_channels=16, hyperprior_channels=8)
SHORT = TrainConfig(n_steps=40, batch_size=2, crop_size=64, learning_rate=2e-3, dtype="float32", log_every=1, ema_decay=0.9,
                    checkpoint_minutes=0.0)
OBJECTIVE = Objective.for_regime("high", perceptual="none")
PROGRAM = f"""
import sys, torch
from hific_nb.config import ModelConfig, Objective, TrainConfig
from hific_nb.training import train
torch.set_num_threads(1)
try: train(sys.argv[1], sys.argv[2], ModelConfig.from_dict({TINY.to_dict()}), Objective.from_dict({OBJECTIVE.to_dict()}),
           TrainConfig.from_dict({SHORT.to_dict()}), on_record=lambda r: print(r["step"], flush=True))
except KeyboardInterrupt as stop: print("stopped:", stop); sys.exit(130)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea", "coffee", "rocket"): sample_photo(name).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, photos):
    run = tmp_path_factory.mktemp("runs") / "straight"
    subprocess.run([sys.executable, "-c", PROGRAM, run, photos], check=True, capture_output=True)
    return run


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_at(run, photos, step, with_signal):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, run, photos], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == str(step):
            os.kill(process.pid, with_signal)
            break
    rest = process.stdout.read()
    return process.wait(), rest


def test_kill_9_and_go_on(photos, uninterrupted, tmp_path):
    run = tmp_path / "killed"
    for step in (3, 17, 30):
        status, _ = stop_at(run, photos, step, signal.SIGKILL)
        assert status == -signal.SIGKILL
        torch.load(run / "checkpoint.pt", weights_only=True)  # whole, at whatever moment
        with open(run / "metrics.jsonl", "a") as f: f.write('{"step": 31, "lo')  # a line that was being written
    subprocess.run([sys.executable, "-c", PROGRAM, run, photos], check=True, capture_output=True)
    assert losses(run) == losses(uninterrupted) and len(losses(run)) == SHORT.n_steps
    for name in ("config.json", "weights.safetensors", "tables.safetensors"):
        assert (run / "model" / name).read_bytes() == (uninterrupted / "model" / name).read_bytes()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(photos, uninterrupted, tmp_path, asked):
    run = tmp_path / "asked"
    begun = time.monotonic()
    status, printed = stop_at(run, photos, 10, asked)
    assert status == 130 and "goes on from there" in printed and time.monotonic() - begun < 60
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert 10 <= step < SHORT.n_steps and len(losses(run)) == step
    subprocess.run([sys.executable, "-c", PROGRAM, run, photos], check=True, capture_output=True)
    assert losses(run) == losses(uninterrupted)


def test_a_finished_run_is_left_alone(photos, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    records = []
    folder = train(uninterrupted, photos, TINY, OBJECTIVE, SHORT, on_record=records.append)
    assert folder == uninterrupted / "model" and records == [] and (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_it_learns(uninterrupted):
    values = losses(uninterrupted)
    assert sum(values[-5:]) < 0.8 * sum(values[2:7])


def test_other_settings_are_refused(photos, uninterrupted):
    for changed in (dict(objective=Objective.for_regime("low", perceptual="none")), dict(train_config=SHORT.replace(seed=1)),
                    dict(model_config=TINY.replace(latent_channels=17))):
        arguments = dict(model_config=TINY, objective=OBJECTIVE, train_config=SHORT) | changed
        with pytest.raises(TrainingError, match="other settings"):
            train(uninterrupted, photos, **arguments)


def test_warm_start_begins_where_the_other_ended(photos, uninterrupted, tmp_path):
    few = SHORT.replace(n_steps=3, learning_rate=1e-6)
    warm, cold = [], []
    train(tmp_path / "warm", photos, TINY, OBJECTIVE, few, warm_start=uninterrupted / "model", on_record=warm.append)
    train(tmp_path / "cold", photos, TINY, OBJECTIVE, few, on_record=cold.append)
    assert warm[0]["mse"] < 0.7 * cold[0]["mse"]


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path):
    run = tmp_path / "wild"
    with pytest.raises(TrainingError, match="learning rate"):
        train(run, photos, TINY, OBJECTIVE, SHORT.replace(learning_rate=0.99, n_steps=4000, log_every=500))
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists(): assert all(t.isfinite().all() for t in torch.load(checkpoint, weights_only=True)["model"].values())


def test_broken_photos_cost_one_warning(photos, tmp_path):
    for path in photos.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes((photos / "coffee.png").read_bytes()[:2000])
    with pytest.warns(UserWarning, match="broken.png") as caught:
        train(tmp_path / "run", tmp_path, TINY, OBJECTIVE, SHORT.replace(n_steps=3, checkpoint_minutes=5.0))
    assert sum("broken.png" in str(w.message) for w in caught) == 1


def test_a_folder_without_photos(tmp_path):
    from hific_nb.config import HificError

    (tmp_path / "empty").mkdir()
    with pytest.raises(HificError, match="no images"):
        train(tmp_path / "run", tmp_path / "empty", TINY, OBJECTIVE, SHORT)


def test_the_shipped_models_photos_are_held_back_alike(shared):
    """Every tenth line of the manifest, in every run."""
    from hific_nb.data import find_images, holdout_split

    training, held_back = holdout_split(find_images(shared / "data" / "train"))
    lines = (Path(shared) / "data" / "train" / "manifest.csv").read_text().splitlines()[1:]
    assert {p.relative_to(shared / "data" / "train").as_posix() for p in held_back} == {line.split(",")[0] for line in lines[9::10]}
    assert len(training) + len(held_back) == len(lines) and not set(training) & set(held_back)
