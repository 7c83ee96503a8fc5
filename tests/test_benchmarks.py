"""The benchmarks that compare with something: what they compare with is what they say, and they run."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_networks import PAPER, golden_weight

from hific_nb.config import Objective, TrainConfig
from hific_nb.model import Model
from hific_nb.perceptual import LPIPS
from hific_nb.training import Team, Trainer


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training(): return load("training")


def test_the_plain_recipe_is_the_published_one(training, shared):
    "Its networks, from the golden weights and picture, against what the published code computed."
    with torch.device("meta"): model = training.PlainModel(PAPER)
    shapes = json.loads((shared / "golden" / "published_layout_keys.json").read_text())
    assert shapes.keys() == model.state_dict().keys()
    model.load_state_dict({key: golden_weight(key, shapes[key], j) for j, key in enumerate(sorted(shapes))}, assign=True)
    y, x = np.mgrid[:128, :128].astype(np.float64)
    image = [0.5 + 0.25 * np.cos(0.05 * (c + 1) * x + 0.03 * y * (3 - c)) + 0.25 * np.sin(0.11 * y - 0.07 * x * (c + 1))
             for c in range(3)]
    with torch.inference_mode(): found = model(torch.from_numpy(np.stack(image).astype(np.float32))[None])
    found |= dict(bits_y=found["quantized_y"], bits_z=found["quantized_z"])
    grid = torch.linspace(-8, 8, 33).expand(PAPER.hyperprior_channels, 1, -1)
    found["hyper_cdf_logits"] = model.Hyperprior.hyperlatent_likelihood.cdf_logits(grid)[:8, 0].detach()
    with np.load(shared / "golden" / "published_layout_gaussian9.npz") as file: golden = dict(file)
    assert found.keys() >= golden.keys()
    for name, theirs in golden.items():
        ours = found[name].double().numpy().reshape(theirs.shape)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


def test_both_sides_take_the_same_first_step(training):
    "In float32: the same loss, but for the noise of the rate, which is drawn in another order."
    objective, config, batch = Objective(), training.WIDTHS["tiny"], training.photos(2, 128)
    lpips = LPIPS(trained=False)
    plain = training.PlainTrainer(config, objective, torch.device("cpu"), lpips)
    torch.manual_seed(0)
    ours = Trainer(Model(config), objective, TrainConfig(batch_size=2, dtype="float32"), Team("cpu"), lpips)
    for name, weight in plain.model.state_dict().items(): assert torch.equal(weight, ours.model.state_dict()[name]), name
    theirs, record = plain(batch), ours(batch)
    for key in ("bpp", "mse", "perceptual"): assert record[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert record["bpp_noisy"] == pytest.approx(theirs["bpp_noisy"], rel=0.2)
    moved = [(p - q).abs().max() for p, q in zip(plain.model.Generator.parameters(), ours.model.Generator.parameters())]
    assert 0 < max(moved) < 2.1e-4  # two Adams, each a step of 1e-4 at most


def test_the_comparison_runs_and_is_written(training, tmp_path, capsys):
    training.main(["--width=tiny", "--batch=2", "--crop=128", "--steps=1", "--perceptual=none", "--sides", "plain", "ours",
                   f"--out={tmp_path / 'training.json'}"])
    result, = json.loads((tmp_path / "training.json").read_text())
    assert list(result["sides"]) == ["plain", "ours"] and result["width"] == "tiny"
    first = [side["first_step"]["record"] for side in result["sides"].values()]
    assert first[0]["mse"] == pytest.approx(first[1]["mse"], rel=0.01)   # ours may be in bfloat16
    assert all(side["flops"] > 1e7 and side["memory"] > 1e7 and side["seconds"] > 0 for side in result["sides"].values())
    assert result["sides"]["plain"]["times_plain"] == 1 and {"encoder", "generator, backward", "Adam"} <= result["split"].keys()
    assert "of a large matrix product's" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Soap", "Muon"])
def test_matrix_optimizers_do_not_care_for_the_axes(name):
    "A problem turned in both of its sides takes the turned path; Adam, which scales each weight by itself, does not."
    def paths(make):
        torch.manual_seed(0)
        left, right, aim = torch.randn(12, 12).double(), torch.randn(12, 12).double(), torch.randn(12, 12).double()
        turns = [torch.linalg.qr(torch.randn(12, 12).double())[0] for _ in range(2)]
        ends = []
        for u, v in ([torch.eye(12).double()] * 2, turns):
            weight = torch.nn.Parameter(u @ torch.eye(12).double() @ v)
            optimizer, start = make([weight], lr=0.01), weight.detach().clone()
            for _ in range(25):
                loss = (left @ (u.T @ weight @ v.T) @ right - aim).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends.append(u.T @ (weight.detach() - start) @ v.T)
        return (ends[0] - ends[1]).norm() / ends[0].norm()
    assert paths(torch.optim.Adam) > 0.5, paths(torch.optim.Adam)
    assert paths(getattr(load("optimizers"), name)) < 0.15
