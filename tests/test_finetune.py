"""A model that goes on training on other photos: what becomes of the files that the old one wrote."""

import json

import numpy as np
import pytest
import torch

from hific_nb.codec import Codec, CodecError
from hific_nb.config import Objective, TrainConfig, find_job
from hific_nb.data import sample_photo
from hific_nb.hfc import ModelMismatchError
from hific_nb.model import ModelError
from hific_nb.training import inherited_objective, train
from hific_nb.zoo import load_pretrained, model_info, save_pretrained, write_card

from test_import import published
from tiny import tiny_model

# Twelve steps: from the ninth on, averaging turns a weight of -0.0 that stays into 0.0, which must not reach the model folder.
SHORT = TrainConfig(n_steps=12, batch_size=1, crop_size=64, learning_rate=1e-3, dtype="float32", log_every=1, ema_decay=0.9)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folders of hific-lite after some steps: its generator alone, and all of it."""
    root = tmp_path_factory.mktemp("finetune")
    (root / "photos").mkdir()
    sample_photo("rocket").save(root / "photos" / "rocket.png")
    config, objective = load_pretrained("hific-lite").config, Objective.for_regime("med", k_P=0.0)
    return [train(root / name, root / "photos", config, objective, SHORT.replace(train_encoder=name == "all"),
                  warm_start="hific-lite", device="cpu") for name in ("generator", "all")]


def test_a_tuned_generator_paints_the_files_of_the_old_model(tuned):
    old, new = (Codec.from_pretrained(name, device="cpu", dtype=torch.float32) for name in ("hific-lite", tuned[0]))
    photo = sample_photo("coffee").crop((100, 100, 260, 230))
    data = old.compress(photo)
    assert new.fingerprint != old.fingerprint
    weights = [load_pretrained(name).Hyperprior.state_dict().values() for name in ("hific-lite", tuned[0])]
    assert all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(*weights))
    sent, received = old.encode_latents(photo), new.decode_latents(data)
    assert np.array_equal(sent.symbols, received.symbols) and torch.equal(sent.y_hat, received.y_hat)
    before, after = (np.asarray(c.decompress(data), int) for c in (old, new))
    assert 0 < np.abs(before - after).mean() < 40  # another picture, of the same thing
    assert np.array_equal(after, np.asarray(new.decompress(new.compress(photo))))  # what it would have written itself
    assert len(new.compress(photo)) == len(data)
    with pytest.raises(ModelMismatchError, match="a model with fingerprint"): old.decompress(new.compress(photo))  # not shipped
    assert np.array_equal(np.asarray(old.read_files_of(tuned[0]).decompress(new.compress(photo))), before)


def test_a_tuned_encoder_breaks_with_the_old_files(tuned):
    old, new = (Codec.from_pretrained(name, device="cpu", dtype=torch.float32) for name in ("hific-lite", tuned[1]))
    data = old.compress(sample_photo("coffee").crop((0, 0, 64, 64)))
    with pytest.raises(ModelMismatchError, match="hific-lite"): new.decompress(data)
    with pytest.raises(CodecError, match="more than encoder and generator"): new.read_files_of("hific-lite")


def test_models_say_what_they_were_trained_for(tuned, tmp_path):
    for folder in tuned:
        assert model_info(folder).objective == Objective.for_regime("med", k_P=0.0).to_dict()
        kept = Codec.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / folder.parent.name)
        assert model_info(kept).objective == model_info(folder).objective
        for source in (folder, folder.parent, kept):  # a model, a run, a copy
            assert inherited_objective(source) == dict(
                lambda_lowest_rate=6.0, lambda_highest_rate=0.04, level_balance=0.5, k_M=Objective().k_M, k_P=0.0,
                perceptual="lpips", k_T=0.0, k_B=0.0, realism_features="squeeze", realism_fade=0.0)
    assert inherited_objective(save_pretrained(tiny_model(levels=True), tmp_path / "silent")) == {}
    one_rate = save_pretrained(tiny_model(), tmp_path / "one-rate", objective=Objective.for_regime("high", k_P=3.0).to_dict())
    assert inherited_objective(one_rate) == dict(
        target_bpp=0.45, lambda_above=0.5, lambda_below=0.0625, k_M=Objective().k_M, k_P=3.0, perceptual="lpips", k_T=0.0, k_B=0.0,
        realism_features="squeeze", realism_fade=0.0)
    write_card(one_rate, objective=["k_P"])
    with pytest.raises(ModelError, match="card.json is damaged"): inherited_objective(one_rate)


def test_a_run_takes_over_what_moves_the_rates(tmp_path):
    """The cells of the job before the run: what the warm start says, what the user says, and what is there without either."""
    cells = [cell for cell in json.loads(find_job("train").read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    defaults, *before = ["".join(cell["source"]) for cell in cells[:3]]

    def objective(**given):
        names = {"__name__": "job"}
        exec(defaults, names)
        names |= dict(dataset=str(tmp_path), run=str(tmp_path / "run")) | given
        for cell in before: exec(cell, names)
        return names["objective"]

    plain = Objective.for_regime("low")
    moved = dict(lambda_lowest_rate=16.0, lambda_highest_rate=0.02, level_balance=0.5, k_P=5.0)
    folder = save_pretrained(tiny_model(levels=True), tmp_path / "tiny", objective=moved | dict(level_balance=0.25, beta=9.0))
    shipped = dict(warm_start="hific-lite-base-v1", preset="warm_start")
    mine = dict(k_P=2.0, level_balance=0.0)
    second = dict(k_P=8.0, perceptual="lpips-pair", k_T=2.5, k_B=720.0, realism_features="whole", realism_fade=1.5)
    painter, plainly = dict(warm_start="hific-lite-gan-v2"), dict(perceptual="none", k_P=1.0)
    published(tmp_path / "published.pt", args=dict(regime="med"))
    own = Objective.for_regime("high", k_M=0.01, k_P=3.0, perceptual="ms-ssim")
    one_rate = dict(warm_start=str(save_pretrained(tiny_model(), tmp_path / "one", objective=own.to_dict())))
    theirs = dict(warm_start=str(tmp_path / "published.pt"))
    for given, wanted in (({}, {}), (shipped, moved), (shipped | mine, moved | mine),
                          (dict(warm_start=str(folder), preset="warm_start"), moved | dict(level_balance=0.25)),
                          (painter, moved | second | dict(level_balance=0.1)),
                          (painter | dict(k_T=0.0), moved | second | dict(level_balance=0.1, k_T=0.0)),
                          (painter | plainly, moved | dict(level_balance=0.1) | plainly),  # nor the terms that want networks
                          (shipped | dict(preset="hific-lite"), {}),  # a model of one rate has no use for it
                          (one_rate, dict(target_bpp=0.45, lambda_above=0.5, k_M=0.01, k_P=3.0, perceptual="ms-ssim")),
                          (one_rate | dict(regime="med", k_M=0.02),
                           dict(target_bpp=0.3, lambda_above=1.0, k_M=0.02, k_P=3.0, perceptual="ms-ssim")),
                          (one_rate | dict(target_bpp=0.3), dict(target_bpp=0.3, lambda_above=1.0, k_M=0.01, k_P=3.0,
                                                                 perceptual="ms-ssim")),
                          (theirs, dict(target_bpp=0.3, lambda_above=1.0))):
        assert objective(**given) == plain.replace(**wanted), given
