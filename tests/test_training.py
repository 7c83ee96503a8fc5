"""Trainings that are cut short by every means, in real processes on real photos."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hific_nb.config import HificError, ModelConfig, Objective, TrainConfig
from hific_nb.data import PhotoCrops, sample_photo
from hific_nb.model import Model, load_model
from hific_nb.perceptual import FeatureBias
from hific_nb.training import (
    Trainer, TrainingError, _as_meant, _launch_command, _launched_alone, auto_batch_size, check_memory, memory_limit, prepare_run,
    read_records, step_memory, train)

TINY = ModelConfig(transform="light", channels=(8, 8, 12, 16), encoder_blocks=(0, 0, 1, 1), generator_blocks=(0, 0, 1, 1),
                   latent_channels=16, hyperprior_channels=8)
SHORT = TrainConfig(n_steps=40, batch_size=2, crop_size=64, learning_rate=2e-3, dtype="float32", log_every=1, ema_decay=0.9,
                    checkpoint_minutes=0.0, sample_every=20)
OBJECTIVE = Objective.for_regime("high", perceptual="none")
CRITIC = dict(model_type="compression_gan", discriminator_channels=(4, 8, 8, 8))
ACCELERATE = pytest.importorskip("accelerate", reason="training in several processes needs: pip install accelerate")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("chelsea", "coffee", "rocket"): sample_photo(name).save(folder / f"{name}.png")
    return folder


def start(run, photos, config=SHORT, model=TINY, objective=OBJECTIVE, **options):
    "A training in a process of its own, one thread, a line for each step."
    prepare_run(run, photos, model, objective, config, device="cpu", **options)
    return subprocess.Popen([sys.executable, "-m", "hific_nb.training", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(*arguments, **options):
    process = start(*arguments, **options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, photos):
    run = tmp_path_factory.mktemp("runs") / "straight"
    finish(run, photos)
    return run


def records(run): return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(module): return torch.cat([p.detach().flatten() for p in module.parameters()])


def losses(run): return [record["loss"] for record in records(run)]


def newest(run): return torch.load(max((run / "checkpoints").glob("step-*.pt")), weights_only=True)


def stop_at(run, photos, step, with_signal, **options):
    process = start(run, photos, **options)
    for line in process.stdout:
        if line.startswith(f"step {step},"):
            os.kill(process.pid, with_signal)
            break
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.parametrize("stage", [1, 2])
def test_kill_9_and_go_on(photos, uninterrupted, tmp_path, stage):
    straight, run, config = uninterrupted, tmp_path / "killed", SHORT
    if stage == 2:
        straight, config = tmp_path / "straight", SHORT.replace(n_steps=15, **CRITIC)
        finish(straight, photos, config)
    for step in (3, 17, 30) if stage == 1 else (6,):
        status, _ = stop_at(run, photos, step, signal.SIGKILL, config=config)
        assert status == -signal.SIGKILL
        newest(run)  # whole, at whatever moment
        with open(run / "metrics.jsonl", "a") as f: f.write('{"step": 31, "lo')  # a line that was being written
        (run / "checkpoints" / ".step-1.pt.tmp").write_bytes(b"half a checkpoint")
    finish(run, photos, config)
    assert losses(run) == losses(straight) and len(losses(run)) == config.n_steps
    for name in ("config.json", "weights.safetensors", "tables.safetensors"):
        assert (run / "model" / name).read_bytes() == (straight / "model" / name).read_bytes()
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == [f"step-{n:09d}.pt" for n in (config.n_steps - 1, config.n_steps)]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(photos, uninterrupted, tmp_path, asked):
    run, rarely = tmp_path / "asked", SHORT.replace(checkpoint_minutes=60.0)
    begun = time.monotonic()
    status, errors = stop_at(run, photos, 10, asked, config=rarely)
    assert status == 130 and "goes on from there" in errors and time.monotonic() - begun < 60
    assert 10 <= newest(run)["step"] < SHORT.n_steps
    finish(run, photos, rarely)
    assert losses(run) == losses(uninterrupted)


def test_a_finished_run_is_left_alone(photos, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    made = []
    folder = train(uninterrupted, photos, TINY, OBJECTIVE, SHORT, on_record=made.append)
    assert folder == uninterrupted / "model" and made == [] and (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_it_learns_and_leaves_a_report(uninterrupted):
    values = losses(uninterrupted)
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
    about = json.loads((uninterrupted / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__ and about["finished"] == 40
    assert about["memory"]["total"] > about["memory"]["photos"] == 2.0
    assert sorted(p.name for p in (uninterrupted / "samples").iterdir()) == ["step-000000020.jpg", "step-000000040.jpg"]
    assert "held_back" in records(uninterrupted)[19] and 0 <= records(uninterrupted)[5]["waiting"] <= 1


def test_tensorboard_shows_curves_and_pictures(uninterrupted):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted / "tensorboard"))
    events.Reload()
    shown = events.Scalars("loss")
    assert [e.step for e in shown] == list(range(1, 41))
    assert np.allclose([e.value for e in shown], losses(uninterrupted), rtol=1e-5)
    assert len(events.Images("original and reconstruction")) == 2 and "held_back/psnr" in events.Tags()["scalars"]


def test_other_settings_are_refused(photos, uninterrupted):
    for changed in (dict(objective=Objective.for_regime("low", perceptual="none")), dict(train_config=SHORT.replace(seed=1)),
                    dict(model_config=TINY.replace(latent_channels=17)), dict(warm_start=uninterrupted)):
        arguments = dict(model_config=TINY, objective=OBJECTIVE, train_config=SHORT) | changed
        with pytest.raises(TrainingError, match="other settings"):
            train(uninterrupted, photos, **arguments)


def test_what_was_wrong_the_first_time_may_be_put_right(photos, tmp_path, monkeypatch):
    """A folder without a step takes other settings; one that has begun takes those of its log and checkpoints alone."""
    run, few = tmp_path / "run", SHORT.replace(n_steps=2)
    with pytest.raises(HificError, match="nowhere"): train(run, tmp_path / "nowhere", TINY, OBJECTIVE, few)
    with pytest.raises(HificError, match="no-model"): train(run, photos, TINY, OBJECTIVE, few, warm_start="no-model")
    with monkeypatch.context() as patch:
        patch.setattr("hific_nb.training.memory_limit", lambda device, processes: 10 ** 6)
        with pytest.raises(TrainingError, match="Decrease"): train(run, photos, TINY, OBJECTIVE, few.replace(batch_size=64))
    train(run, photos, TINY, OBJECTIVE, few)
    before = (run / "metrics.jsonl").read_bytes()
    train(run, photos, TINY, OBJECTIVE, few.replace(keep_checkpoints=1, checkpoint_minutes=9.0, log_every=2, sample_every=2))
    assert json.loads((run / "run.json").read_text())["train"]["keep_checkpoints"] == 1
    with pytest.raises(TrainingError, match="n_steps.*whose warm_start may be"):
        train(run, photos, TINY, OBJECTIVE, few.replace(n_steps=3))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_generator_alone_needs_the_latents_of_a_model(photos, tmp_path):
    with pytest.raises(TrainingError, match="name it by warm_start"):
        train(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT.replace(train_encoder=False))
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_lacks_fields_that_came_since(photos, tmp_path):
    train(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT.replace(n_steps=2))
    path = tmp_path / "run" / "run.json"
    about = json.loads(path.read_text())
    del about["train"]["adam_beta1"], about["objective"]["level_balance"], about["model"]["rate_anchors"]
    path.write_text(json.dumps(about))
    train(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT.replace(n_steps=2))
    with pytest.raises(TrainingError, match="other settings .adam_beta1"):
        train(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT.replace(n_steps=2, adam_beta1=0.5))


def test_a_second_run_in_the_folder_is_kept_out(photos, tmp_path):
    run = tmp_path / "run"
    first = start(run, photos, SHORT.replace(n_steps=4000))
    try:
        first.stdout.readline()  # it has begun
        with pytest.raises(TrainingError, match="Another process"):
            train(run, photos, TINY, OBJECTIVE, SHORT.replace(n_steps=4000), device="cpu")
    finally:
        first.kill()
        first.communicate()


def test_warm_start_begins_where_the_other_ended(photos, uninterrupted, tmp_path):
    few = SHORT.replace(n_steps=3, learning_rate=1e-6)
    warm, cold = [], []
    train(tmp_path / "warm", photos, TINY, OBJECTIVE, few, warm_start=uninterrupted, on_record=warm.append)
    train(tmp_path / "cold", photos, TINY, OBJECTIVE, few, on_record=cold.append)
    assert warm[0]["mse"] < 0.7 * cold[0]["mse"]
    report = json.loads((tmp_path / "warm" / "run.json").read_text())["warm_start_report"]
    assert report["not_loaded"] == report["left_over"] == [] and len(report["loaded"]) == len(Model(TINY).state_dict())


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_warm_start_leaves_out_is_said_before_the_first_step(photos, uninterrupted, tmp_path, processes):
    """And nothing where the model has only grown."""
    few, said = SHORT.replace(n_steps=1), []
    with pytest.warns(UserWarning, match="begin anew: Encoder.* left over: Encoder.*leave preset away"):
        train(tmp_path / "narrow", photos, TINY.replace(latent_channels=12), OBJECTIVE, few, warm_start=uninterrupted, device="cpu",
              processes=processes)
    grown = TINY.replace(generator_blocks=(0, 0, 1, 2), rate_levels=5, rate_anchors=2, level_offsets=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tmp_path / "grown", photos, grown, OBJECTIVE, few, warm_start=uninterrupted, device="cpu", processes=processes,
              on_record=said.append)
    report = json.loads((tmp_path / "grown" / "run.json").read_text())["warm_start_report"]
    assert report["grown"] and set(report["not_loaded"]) > set(report["grown"]) and len(said) == 1


def test_a_discriminator_of_another_width_is_said_to_begin_anew(photos, uninterrupted, tmp_path):
    few = SHORT.replace(n_steps=1)
    train(tmp_path / "gan", photos, TINY, OBJECTIVE, few.replace(**CRITIC), warm_start=uninterrupted)
    with pytest.warns(UserWarning, match="begin anew: conv"):
        train(tmp_path / "wider", photos, TINY, OBJECTIVE, few.replace(**CRITIC | dict(discriminator_channels=(6, 8, 8, 8))),
              warm_start=tmp_path / "gan")


def test_stage_2_on_a_frozen_encoder_reads_the_files_of_stage_1(photos, uninterrupted, tmp_path):
    from hific_nb.codec import Codec

    config = SHORT.replace(n_steps=8, train_encoder=False, **CRITIC)
    train(tmp_path / "gan", photos, TINY, OBJECTIVE, config, warm_start=uninterrupted)
    before, after = (load_model(run / "model") for run in (uninterrupted, tmp_path / "gan"))
    same = [torch.equal(weights_of(getattr(before, part)), weights_of(getattr(after, part)))
            for part in ("Encoder", "Hyperprior", "Generator")]
    assert same == [True, True, False]
    assert {"D_real", "D_fake", "D_accuracy", "adversarial", "discriminator"} <= records(tmp_path / "gan")[0].keys()
    photo = sample_photo("coffee").crop((0, 0, 96, 80))
    codecs = [Codec(m, device="cpu", dtype=torch.float32) for m in (before, after)]
    file = codecs[0].compress(photo)
    decoded = codecs[1].read_files_of(before).decode_latents(file)
    assert np.array_equal(decoded.symbols, codecs[1].encode_latents(photo).symbols)


def test_the_discriminator_has_a_learning_rate_of_its_own():
    torch.manual_seed(0)
    start, moved = Trainer(Model(TINY), OBJECTIVE, SHORT.replace(**CRITIC)), []
    for rate in (1.0, 4.0):
        trainer = Trainer(Model(TINY), OBJECTIVE, SHORT.replace(warmup_steps=0, adam_beta1=0.5, discriminator_rate=rate, **CRITIC))
        trainer.load_state_dict(start.state_dict())
        trainer(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
        moved.append([(weights_of(getattr(trainer, part)) - weights_of(getattr(start, part))).abs().max().item()
                      for part in ("model", "discriminator")])
    assert moved[0][0] == moved[1][0] > 0 and moved[1][1] > 3 * moved[0][1] > 0


@pytest.mark.parametrize("level, fade", [(0, 1.0), (5, 1.0), (10, 1.0), (4, 2.0), (8, 2.0)])
def test_the_adversarial_loss_fades_with_the_rate(monkeypatch, level, fade):
    """All of beta at the first level, none at the last (of a faster fade: in the middle): the gradients of the generator tell."""
    torch.manual_seed(0)
    model = Model(TINY.replace(rate_levels=11, rate_anchors=2))
    batch = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.full(size, level))

    def gradient(**settings):
        trainer = Trainer(model, OBJECTIVE.replace(k_M=1e-5, **settings), SHORT.replace(**CRITIC))
        trainer.discriminator.load_state_dict(critic)
        trainer.gradients(batch)
        found = torch.cat([p.grad.flatten() for p in model.Generator.parameters()])
        model.zero_grad()
        return found

    critic = Trainer(model, OBJECTIVE, SHORT.replace(**CRITIC)).discriminator.state_dict()
    faded, same = gradient(beta=2.0, realism_fade=fade), gradient(beta=2.0 * max(0, 1 - fade * level / 10))
    assert (faded - same).norm() < 1e-3 * same.norm()
    assert level == 0 or (faded - gradient(beta=2.0)).norm() > 0.05 * same.norm()


def test_level_balance_weighs_the_adversarial_loss_as_well(monkeypatch):
    """With nothing but a discriminator in the objective, an image at the last level pulls as its Lagrangian is weighed."""
    torch.manual_seed(0)
    model, batch = Model(TINY.replace(rate_levels=11, rate_anchors=2)), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    objective = OBJECTIVE.replace(k_M=0.0, k_P=0.0, beta=1.0, lambda_lowest_rate=16.0, lambda_highest_rate=0.25)
    critic = None

    def gradients(levels, balance):
        nonlocal critic
        monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(levels))
        trainer = Trainer(model, objective.replace(level_balance=balance), SHORT.replace(**CRITIC))
        critic = critic or trainer.discriminator.state_dict()
        trainer.discriminator.load_state_dict(critic)
        trainer.gradients(batch)
        found = torch.cat([p.grad.flatten() for p in model.Generator.parameters()])
        model.zero_grad()
        return found

    for level, lmbda in ((0, 16.0), (10, 0.25)):
        plain, weighed = gradients([level] * 2, 0.0), gradients([level] * 2, 0.5)
        assert (weighed - plain / lmbda ** 0.5).norm() < 0.01 * weighed.norm()
    mixed = gradients([0, 10], 0.5)
    assert (mixed - gradients([0, 10], 0.0) / 4).norm() > 0.1 * mixed.norm()  # each by its own


def test_the_statistics_of_features_take_part_in_training(photos, shared, tmp_path, monkeypatch):
    """They are in the loss, as its parts say; and the running means go on where a run was stopped."""
    monkeypatch.setattr(FeatureBias.__init__, "__defaults__", (1, 0.99, 4, None, False))  # it counts from the third batch on
    model, config = TINY.replace(rate_levels=11, rate_anchors=2), SHORT.replace(n_steps=8, **CRITIC)

    def run(name, on_record=None, **terms):
        train(tmp_path / name, photos, model, OBJECTIVE.replace(**terms), config, lpips_weights=shared / "weights",
              on_record=on_record)
        return [{key: r.get(key) for key in ("step", "loss", "texture", "bias", "grad_norm")} for r in records(tmp_path / name)]

    def stop(record):
        if record["step"] == 5: raise KeyboardInterrupt

    without, both = run("without"), run("both", k_T=5.0, k_B=20.0)
    assert all(r["texture"] is r["bias"] is None for r in without)
    assert both[0]["bias"] == 0 < both[0]["texture"] and both[-1]["bias"] > 0
    assert both[0]["loss"] > without[0]["loss"] and both[0]["grad_norm"] != without[0]["grad_norm"]
    assert run("faded", k_T=5.0, realism_fade=1.0)[0]["texture"] < both[0]["texture"]
    with pytest.raises(KeyboardInterrupt): run("stopped", stop, k_T=5.0, k_B=20.0)
    assert run("stopped", k_T=5.0, k_B=20.0) == both


def test_a_second_stage_with_two_networks_and_a_level_that_is_told(photos, shared, tmp_path, monkeypatch):
    """The generator of a warm start without offsets begins as it was; of the bias, the finest layers have no part."""
    monkeypatch.setattr(FeatureBias.__init__, "__defaults__", (1, 0.99, 4, None, False))
    model, config = TINY.replace(rate_levels=11, rate_anchors=2), SHORT.replace(n_steps=6, train_encoder=False, **CRITIC)
    first = train(tmp_path / "first", photos, model, OBJECTIVE, SHORT.replace(n_steps=2))
    objective = OBJECTIVE.replace(perceptual="lpips-pair", k_P=2.0, k_T=5.0, k_B=20.0, realism_features="whole")
    run = tmp_path / "second"
    second = train(run, photos, model.replace(level_offsets=True), objective, config, warm_start=first,
                   lpips_weights=shared / "weights")
    before, after = load_model(first), load_model(second)
    report = json.loads((run / "run.json").read_text())["warm_start_report"]
    assert report["not_loaded"] == ["Generator.level_offset"] and report["left_over"] == []
    assert after.Generator.level_offset.abs().min() > 0 and torch.equal(weights_of(before.Hyperprior), weights_of(after.Hyperprior))
    moved = max((a - b).abs().max() for a, b in zip(after.Generator.layers.parameters(), before.Generator.layers.parameters()))
    assert after.Generator.level_offset.abs().max() > 5 * moved  # a learning rate of its own
    train(tmp_path / "one", photos, model.replace(level_offsets=True), objective.replace(perceptual="lpips"),
          config.replace(n_steps=1), warm_start=first, lpips_weights=shared / "weights")
    assert records(run)[-1]["bias"] > 0 and records(run)[0]["perceptual"] > 1.1 * records(tmp_path / "one")[0]["perceptual"] > 0
    state = torch.load(sorted((run / "checkpoints").iterdir())[-1], weights_only=True)["bias"]
    assert not state["bias0"].any() and not state["bias7"].any() and state["bias2"].any() and state["bias11"].any()
    rows = run.parent / "coarse"
    train(rows, photos, model.replace(level_offsets=True), objective.replace(realism_features="coarse"), config.replace(n_steps=1),
          warm_start=first, lpips_weights=shared / "weights")
    assert records(run)[0]["texture"] > 1.1 * records(rows)[0]["texture"] > 0  # crops as a whole take part


def test_steps_that_are_no_numbers_are_skipped_then_stop_the_run(photos, tmp_path, monkeypatch):
    objective = OBJECTIVE.replace(k_M=1e38)  # infinite gradients from some errors on
    with pytest.raises(TrainingError, match="10 steps one after the other.*learning rate"):
        train(tmp_path / "wild", photos, TINY, objective, SHORT.replace(n_steps=100))
    assert len(records(tmp_path / "wild")) <= 100
    assert all(t.isfinite().all() for t in newest(tmp_path / "wild")["model"].values())

    torch.manual_seed(0)
    trainer, crops = Trainer(Model(TINY), OBJECTIVE, SHORT), PhotoCrops(photos, crop_size=64, batch_size=2)
    true_loss = trainer._loss
    bad = {3, 4, 9}
    monkeypatch.setattr(trainer, "_loss", lambda x: tuple(v * float("nan") if torch.is_tensor(v) and trainer.step in bad else v
                                                          for v in true_loss(x)))
    before = None
    for step in range(12):
        if step in bad: before = weights_of(trainer.model).clone()
        trainer(crops.batch(step))
        if step in bad: assert torch.equal(before, weights_of(trainer.model))
    assert trainer.skipped == 3 and trainer.step == 12


def test_records_without_half_a_line(tmp_path):
    assert read_records(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "held_back": {"bpp": 1}\n')
    assert read_records(tmp_path) == [dict(step=1, loss=2.0)]


def test_a_full_disk_leaves_the_last_checkpoint(photos, tmp_path):
    """The system refuses to let a file grow, in the middle of a checkpoint."""
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    run = tmp_path / "run"
    train(run, photos, TINY, OBJECTIVE, SHORT.replace(n_steps=5))
    last = max((run / "checkpoints").glob("*.pt"))
    before = last.read_bytes()
    shutil.rmtree(run / "model")
    about = json.loads((run / "run.json").read_text())
    about["train"]["n_steps"], about["finished"] = 9, None
    (run / "run.json").write_text(json.dumps(about))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log, config = run / "metrics.jsonl", SHORT.replace(n_steps=9)

    def limited(most, at_step, **settings):
        def full(record):
            if record["step"] == at_step: resource.setrlimit(resource.RLIMIT_FSIZE, (most(), hard))
        try: train(run, photos, TINY, OBJECTIVE, config.replace(**settings), on_record=full)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def checkpoints(): return {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}

    with pytest.warns(UserWarning, match="Cannot write .*step-000000006.pt.*goes on, and tries again"), \
            pytest.raises(HificError, match="Cannot write .*step-000000009.pt"):
        limited(lambda: len(before) // 2, 6)
    assert checkpoints()[last.name] == before and all(name.endswith(".pt") for name in checkpoints())
    with pytest.warns(UserWarning, match="Cannot log step 8 .*goes on"), pytest.raises(HificError, match="step-000000009.pt"):
        limited(lambda: log.stat().st_size + 20, 7, checkpoint_minutes=9.0)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6, 7]  # no half a line
    train(run, photos, TINY, OBJECTIVE, config)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_damaged_checkpoint_falls_back_on_the_one_before(photos, uninterrupted, tmp_path):
    run = tmp_path / "run"
    stop_at(run, photos, 20, signal.SIGKILL)
    newest_path = max((run / "checkpoints").glob("step-*.pt"))
    newest_path.write_bytes(newest_path.read_bytes()[:3000])
    with pytest.warns(UserWarning, match="one before"): train(run, photos, TINY, OBJECTIVE, SHORT, device="cpu")
    assert len(losses(run)) == SHORT.n_steps
    assert np.allclose(losses(run), losses(uninterrupted), rtol=1e-3)  # this process may have other threads


def test_memory_is_estimated_before_it_is_taken(photos, tmp_path, monkeypatch):
    trainer = Trainer(Model(TINY), OBJECTIVE, SHORT)
    need = step_memory(trainer)
    weights = sum(p.numel() for p in trainer.model.parameters()) * 4
    assert need["fixed"] >= 5 * weights  # weights, gradients, two moments, averaged weights
    with pytest.raises(TrainingError, match="batch_size.*latent_channels.*hyperprior_channels.*crop_size"):
        check_memory(trainer, 0.0, need["fixed"] + need["per_image"])
    check_memory(trainer, 0.0, need["fixed"] + 2 * need["per_image"])
    monkeypatch.setattr("hific_nb.training.memory_limit", lambda device, processes: 10 ** 6)
    with pytest.raises(TrainingError, match="GB are free"):
        train(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT)


def test_a_batch_that_fits_is_found_once(photos, tmp_path, monkeypatch):
    """For all processes, which share the memory of a machine, and all parts; the same call again gives the batch of the run."""
    need = step_memory(Trainer(Model(TINY), OBJECTIVE, SHORT.replace(batch_size=1)))
    free = int((need["fixed"] + 8.5 * need["per_image"]) / 0.8)
    monkeypatch.setattr("hific_nb.training.memory_limit", lambda device, processes: free // processes)
    run, few = tmp_path / "run", SHORT.replace(n_steps=1, batch_size=1)
    def fitting(processes=1, **settings):
        return auto_batch_size(run, TINY, OBJECTIVE, few.replace(**settings), 0.0, device="cpu", processes=processes)
    one, two, parts = fitting(), fitting(2), fitting(accumulate=2)
    assert 7 <= one <= 9 and parts == 2 * one and 2 <= two < one and two % 2 == 0
    train(run, photos, TINY, OBJECTIVE, few.replace(batch_size=parts, accumulate=2), device="cpu", memory_gb=0.0)
    assert fitting(accumulate=2) == parts and fitting(2, accumulate=2) == parts


def test_processes_share_the_memory_of_a_machine():
    device = torch.device("cpu")
    if memory_limit(device) is None: pytest.skip("the system does not say how much memory is free")
    alone, shared = memory_limit(device), memory_limit(device, 4)
    assert 0.15 * alone < shared < 0.4 * alone


def test_broken_photos_cost_one_warning(photos, tmp_path):
    for path in photos.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes((photos / "coffee.png").read_bytes()[:2000])
    with pytest.warns(UserWarning, match="broken.png") as caught:
        train(tmp_path / "run", tmp_path, TINY, OBJECTIVE, SHORT.replace(n_steps=3, checkpoint_minutes=5.0))
    assert sum("broken.png" in str(w.message) for w in caught) == 1


def test_a_folder_without_photos(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HificError, match="no images"):
        train(tmp_path / "run", tmp_path / "empty", TINY, OBJECTIVE, SHORT)


def test_a_published_checkpoint_begins_both_networks(photos, tmp_path):
    """The guide's fine-tuning: a .pt file with a discriminator, in the published layout."""
    from hific_nb.gan import Discriminator

    drawing = ModelConfig(channels=(4, 4, 4, 8, 8), latent_channels=8, hyperprior_channels=8, n_residual_blocks=1)
    torch.manual_seed(3)
    model, critic = Model(drawing), Discriminator(8, (4, 8, 8, 8))
    names = {".parametrizations.weight.original": ".weight_orig", ".parametrizations.weight.0._u": ".weight_u",
             ".parametrizations.weight.0._v": ".weight_v"}
    published = {}
    for key, value in critic.state_dict().items():
        for ours, theirs in names.items(): key = key.replace(ours, theirs)
        published[key] = value
    settings = dict(latent_channels=8, n_residual_blocks=1, likelihood_type="gaussian", normalize_input_image=False, regime="low")
    torch.save(dict(model_state_dict=model.state_dict(), discriminator_state_dict=published, args=settings, epoch=0, steps=0.0),
               tmp_path / "published.pt")
    config = SHORT.replace(n_steps=2, learning_rate=1e-8, ema_decay=0.0, **CRITIC)
    train(tmp_path / "tuned", photos, drawing, OBJECTIVE, config, warm_start=tmp_path / "published.pt")
    state = newest(tmp_path / "tuned")
    report = json.loads((tmp_path / "tuned" / "run.json").read_text())["warm_start_report"]
    assert report["not_loaded"] == report["left_over"] == report["discriminator"]["not_loaded"] == []
    assert all(torch.allclose(state["model"][key], value, atol=1e-5) for key, value in model.state_dict().items())
    assert torch.allclose(state["discriminator"]["conv_out.weight"], critic.conv_out.weight, atol=1e-5)
    assert state["discriminator_range"] is False  # it looks at images as they are
    again = train(tmp_path / "again", photos, drawing, OBJECTIVE, config, warm_start=tmp_path / "tuned")
    assert again.exists() and newest(tmp_path / "again")["discriminator_range"] is False


def test_the_rate_ends_at_the_target_on_photos_held_back(shared, tmp_path):
    """A full short run: its schedules, its switch, and held-back photos that it was never trained on."""
    objective = Objective.for_regime("low", target_bpp=0.12, perceptual="none")
    config = SHORT.replace(n_steps=800, batch_size=4, crop_size=128, learning_rate=3e-3, lr_schedule="cosine", warmup_steps=20,
                           grad_clip=5.0, ema_decay=0.98, log_every=100, sample_every=800, checkpoint_minutes=60.0)
    train(tmp_path / "run", shared / "data" / "train" / "a", TINY, objective, config, device="cpu", memory_gb=0.5)
    last = records(tmp_path / "run")[-1]["held_back"]
    assert last["photos"] >= 10 and abs(last["bpp"] / 0.12 - 1) < 0.1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_the_same_step():
    torch.manual_seed(0)
    weights, losses = Model(TINY).state_dict(), []
    batch = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    for compiled in (False, True):
        model = Model(TINY)
        model.load_state_dict(weights)
        trainer = Trainer(model, OBJECTIVE, SHORT.replace(crop_size=128, compile=compiled, learning_rate=1e-4))
        losses.append([trainer(batch)["mse"] for _ in range(2)])  # the rate differs: noise is drawn in another order
    assert np.allclose(*losses, rtol=1e-3)
    with pytest.raises(TrainingError, match="at least 128"): Trainer(Model(TINY), OBJECTIVE, SHORT.replace(compile=True))


GRADIENTS = """
import sys, torch, hific_nb.hyperprior
from hific_nb.config import ModelConfig, Objective, TrainConfig
from hific_nb.data import PhotoCrops
from hific_nb.model import Model
from hific_nb.training import Team, Trainer
torch.set_num_threads(1)
hific_nb.hyperprior.add_uniform_noise = lambda x: x  # drawn for each part of a batch, else
photos, out, weights, configs = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
torch.manual_seed(0)
team = Team("cpu")
config = TrainConfig.from_dict(configs[1])
model = Model(ModelConfig.from_dict(configs[0]))
model.load_state_dict(torch.load(weights))
trainer = Trainer(model, Objective.from_dict(configs[2]), config, team)
batch = PhotoCrops(photos, crop_size=64, batch_size=4, rank=team.rank, world=team.world).batch(0)
record = trainer.gradients(batch)
both = [*trainer.weights, *trainer.critics]
torch.save(dict(gradient=torch.cat([p.grad.flatten() for p in both]), lmbda=record["lmbda"]), f"{out}-{team.rank}.pt")
"""


def test_two_processes_have_the_gradient_of_one(photos, tmp_path):
    """The averaged gradient of both networks, and one lambda though one half of the batch is below the target."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    torch.manual_seed(0)
    batch, model = PhotoCrops(photos, crop_size=64, batch_size=4).batch(0), Model(TINY)
    model.Encoder.layers[-1].weight.data *= 40  # latents that are not all rounded to 0
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad(): rates = model(batch.float() / 255)["bpp_quantized"]
    halves = rates[0::2].mean().item(), rates[1::2].mean().item()
    target = (max(halves) + rates.mean().item()) / 2  # one half above, the whole batch below
    objective = OBJECTIVE.replace(target_bpp=target, rate_warmup=0.0)
    assert max(halves) > target > rates.mean()
    settings = str([TINY.to_dict(), SHORT.replace(batch_size=4, **CRITIC).to_dict(), objective.to_dict()])
    one = [sys.executable, tmp_path / "gradients.py"]
    two = [*_launch_command(tmp_path, 2)[:-3], tmp_path / "gradients.py"]
    for name, command in (("one", one), ("two", two)):
        done = subprocess.run([*command, photos, tmp_path / name, tmp_path / "weights.pt", settings], capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    alone, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    assert alone["lmbda"] == both[0]["lmbda"] == both[1]["lmbda"] == 2 ** -4
    assert torch.equal(both[0]["gradient"], both[1]["gradient"])
    assert torch.allclose(alone["gradient"], both[0]["gradient"], rtol=1e-3, atol=1e-4 * alone["gradient"].abs().max().item())


def test_two_processes_resume_where_they_were_stopped(photos, tmp_path):
    """Stopped and resumed wherever that falls: the run has no end to reach while its log is read."""
    run, objective = tmp_path / "pair", OBJECTIVE.replace(rate_warmup=0.0)
    config = SHORT.replace(n_steps=1_000_000, accumulate=1, checkpoint_minutes=60.0, lr_drop=1.0)  # a step forgets n_steps

    class Enough(Exception): pass

    def part(until):
        "The steps that were heard of, and the one that the checkpoint is of."
        seen = []

        def watch(record):
            seen.append(record["step"])
            if record["step"] >= until: raise Enough
        with pytest.raises(Enough): train(run, photos, TINY, objective, config, processes=2, device="cpu", on_record=watch)
        return seen, newest(run)["step"]

    _, stopped = part(4)
    seen, last = part(stopped + 4)
    assert seen == list(range(stopped + 1, seen[-1] + 1)) and last >= seen[-1]
    straight = tmp_path / "straight"
    assert train(straight, photos, TINY, objective, config.replace(n_steps=last), processes=2, device="cpu").exists()
    ours, theirs = ({r["step"]: r["loss"] for r in records(folder)} for folder in (run, straight))
    assert list(theirs) == list(range(1, last + 1)) and set(seen) < set(ours) <= set(theirs)  # a signal may cut off a line
    assert np.allclose(list(ours.values()), [theirs[step] for step in ours], rtol=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a process was launched is read from /proc")
def test_accelerate_launch_on_cpus_starts_as_many_as_asked(photos, tmp_path):
    """`accelerate launch --cpu --num_processes 2`, which by itself starts one process and says nothing."""
    run = prepare_run(tmp_path / "run", photos, TINY, OBJECTIVE, SHORT.replace(n_steps=2), device="cpu")
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([sys.executable, *command, "-m", "hific_nb.training", run], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2, loss") == 1 and (run / "model" / "config.json").exists()
    assert json.loads((run / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("spectral", [True, False])
def test_the_settings_of_the_discriminator_reach_it(spectral):
    config = SHORT.replace(discriminator_rate=3.0, spectral_norm=spectral, **CRITIC)
    trainer = Trainer(Model(TINY), OBJECTIVE, config)
    assert trainer.discriminator.conv1.out_channels == 4 and hasattr(trainer.discriminator.conv1, "parametrizations") == spectral
    trainer(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    rates = [o.param_groups[0]["lr"] for o in (trainer.optimizer, trainer.critic_optimizer)]
    assert rates[1] == pytest.approx(3 * rates[0])
    again = Trainer(Model(TINY), OBJECTIVE, config)
    again.load_state_dict(trainer.state_dict())
    with pytest.raises(RuntimeError, match="conv1"):
        Trainer(Model(TINY), OBJECTIVE, config.replace(spectral_norm=not spectral)).load_state_dict(trainer.state_dict())


def test_what_accelerate_launch_was_asked_for():
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1"}
    assert _launched_alone(alone)
    for others in ({"WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}): assert not _launched_alone(alone | others)
    assert not _launched_alone({"MASTER_ADDR": "10.0.0.1"})  # of something else than Accelerate
    start = ["python", "accelerate", "launch"]
    rest = ["--num-processes=4", "-m", "hific_nb.training", "outputs/base"]
    assert _as_meant([*start, "--cpu", *rest]) == [*start, "--multi_gpu", *rest]
    for launched in ([], [*start, "--cpu", "train.py"], [*start, "--multi_gpu", "--num_processes", "2", "train.py"]):
        with pytest.raises(TrainingError, match="--multi_gpu in place"): _as_meant(launched)


def test_the_shipped_models_photos_are_held_back_alike(shared):
    """Every tenth line of the manifest, in every run."""
    from hific_nb.data import find_images, holdout_split

    training, held_back = holdout_split(find_images(shared / "data" / "train", {".jpg"}))
    lines = (Path(shared) / "data" / "train" / "manifest.csv").read_text().splitlines()[1:]
    assert {p.relative_to(shared / "data" / "train").as_posix() for p in held_back} == {line.split(",")[0] for line in lines[9::10]}
    assert len(training) + len(held_back) == len(lines) and not set(training) & set(held_back)
