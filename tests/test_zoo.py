"""The shipped models are what their cards say."""

import hashlib
import json

import pytest

from hific_nb.model import load_model, model_fingerprint
from hific_nb.zoo import ALIASES, list_models, model_folder, name_of_fingerprint

MODELS = list_models()


def test_models_are_shipped():
    assert "hific-lite-v0" in {m.name for m in MODELS}
    assert all(model_folder(alias).name == name for alias, name in ALIASES.items())


@pytest.mark.parametrize("info", MODELS, ids=lambda m: m.name)
def test_the_card_is_true(info):
    model = load_model(info.folder)
    assert model_fingerprint(model, model.coding).hex() == info.fingerprint
    assert name_of_fingerprint(bytes.fromhex(info.fingerprint)) == info.name
    assert sum(p.numel() for p in model.parameters()) == info.parameters <= 7_500_000
    card = json.loads((info.folder / "card.json").read_text())
    assert hashlib.sha256((info.folder / "weights.safetensors").read_bytes()).hexdigest() == card["weights_sha256"]
    text = (info.folder / "README.md").read_text()
    figures = info.figures
    for shown in (info.fingerprint, f"{figures['bpp']:.3f}", f"{figures['psnr']:.2f}", f"{figures['ms_ssim']:.4f}",
                  "CC BY-SA 4.0", "papermill nbs/jobs/train.ipynb"):
        assert shown in text, f"the card of {info.name} does not show {shown}"


@pytest.mark.parametrize("info", MODELS, ids=lambda m: m.name)
def test_weights_are_half_precision_and_small(info):
    assert info.weight_bytes < 16e6
    assert info.weight_bytes == pytest.approx(2 * info.parameters, rel=0.01)
