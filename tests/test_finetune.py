"""A model that goes on training on other photos: what becomes of the files that the old one wrote."""

import numpy as np
import pytest
import torch

from hific_nb.codec import Codec, CodecError
from hific_nb.config import Objective, TrainConfig
from hific_nb.data import sample_photo
from hific_nb.hfc import ModelMismatchError
from hific_nb.training import train
from hific_nb.zoo import load_pretrained

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
