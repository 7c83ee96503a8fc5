"""Published checkpoints: `.pt` files in the layout of the guide become models that compress, or one sentence."""

import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from test_networks import ARRAYS, golden_weight

from hific_nb.cli import main
from hific_nb.codec import Codec
from hific_nb.config import ModelConfig
from hific_nb.data import sample_photo
from hific_nb.gan import Discriminator
from hific_nb.model import Model, load_model, save_model
from hific_nb.training import inherited_objective
from hific_nb.zoo import PUBLISHED, CheckpointError, ImportedModel, import_published

NARROW = ModelConfig(channels=(4, 6, 8, 10, 12), latent_channels=10, hyperprior_channels=8, n_residual_blocks=2)
ARGS = {"latent_channels": 10, "n_residual_blocks": 2, "likelihood_type": "gaussian", "normalize_input_image": False,
        "use_channel_norm": True, "sample_noise": False, "noise_dim": 32, "use_latent_mixture_model": False,
        "mixture_components": 4, "regime": "low", "model_type": "compression_gan", "n_steps": "1e6", "k_M": 0.075 * 2 ** -5,
        "lambda_schedule": {"vals": [2.0, 1.0], "steps": [50000]}, "image_dims": (3, 256, 256), "gpu": 0}


def published(path, config=NARROW, args=None, weights=None, discriminator=None, prefix="", more=None, **save):
    """A `.pt` file as the published code writes it, of a model of `config`; returns that model."""
    torch.manual_seed(0)
    model = Model(config).eval()
    state = {prefix + key: t for key, t in model.state_dict().items()} | (weights or {})
    optimizer = torch.optim.Adam(model.parameters())
    states = dict(compression_optimizer_state_dict=optimizer.state_dict(), hyperprior_optimizer_state_dict=optimizer.state_dict())
    content = dict(model_state_dict=state, **states, epoch=3, steps=np.float64(0.618), args=ARGS | (args or {}))
    if discriminator is not None: content["discriminator_state_dict"] = discriminator
    torch.save(content | (more or {}), path, **save)
    return model


def same(a, b):
    b = b.state_dict()
    return all(torch.equal(t, b[key]) for key, t in a.state_dict().items())


def picture(w=64, h=48):
    x = torch.from_numpy(np.array(sample_photo("coffee").resize((w, h)))).permute(2, 0, 1)[None] / 255
    return x.float()


# ---------------------------------------------------------------------------------------------- the golden arrays


@pytest.fixture(scope="module")
def golden(shared, tmp_path_factory):
    """The published arrays, and ours by a real `.pt` file at paper width; then the file and the weights are let go."""
    folder, path = shared / "golden", tmp_path_factory.mktemp("golden") / "HIFIC.pt"
    shapes = json.loads((folder / "published_layout_keys.json").read_text())
    weights = {key: golden_weight(key, shapes[key], j) for j, key in enumerate(sorted(shapes))}
    weights["perceptual_loss.model.net.slice1.0.weight"] = torch.zeros(64, 3, 11, 11)
    weights["Hyperprior.prior_entropy_model.CDF"] = torch.zeros(5, 5, dtype=torch.int32)
    args = ARGS | dict(latent_channels=220, n_residual_blocks=9)
    torch.save(dict(model_state_dict=weights, epoch=0, steps=0, args=args), path)
    del weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here is unknown
        model = import_published(path)
    path.unlink()
    y, x = np.mgrid[:128, :128].astype(np.float64)
    image = [0.5 + 0.25 * np.cos(0.05 * (c + 1) * x + 0.03 * y * (3 - c)) + 0.25 * np.sin(0.11 * y - 0.07 * x * (c + 1))
             for c in range(3)]
    prior = model.model.Hyperprior
    with torch.inference_mode():
        latents = model.model.Encoder(torch.from_numpy(np.stack(image).astype(np.float32))[None])
        z, out = prior.analysis_net(latents), prior(latents)
        mu, sigma = prior.synthesize(torch.round(z), latents.shape[2:])
        bits_y, bits_z = (bits.sum() for bits in prior.bit_maps(latents))
        grid = torch.linspace(-8, 8, 33).expand(320, 1, -1)
        ours = dict(y=latents, z=z, mu=mu, sigma=sigma, y_hat=out["y_hat"], recon=model.model.Generator(out["y_hat"]),
                    hyper_cdf_logits=prior.hyperlatent_likelihood.cdf_logits(grid)[:8, 0], bits_y=bits_y, bits_z=bits_z)
    with np.load(folder / "published_layout_gaussian9.npz") as file:
        return {name: t.double().numpy() for name, t in ours.items()}, dict(file)


@pytest.mark.parametrize("name", ARRAYS)
def test_golden_array(golden, name):
    ours, theirs = golden[0][name], golden[1][name].astype(np.float64)
    assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= 1e-4 * np.abs(theirs).max()


# ---------------------------------------------------------------------------------------------- every option


OPTIONS = {
    "plain": ({}, {}),
    "images in -1 ... 1": (dict(normalize_input_image=True), dict(normalize_input_image=True)),
    "logistic": (dict(likelihood="logistic"), dict(likelihood_type="logistic")),
    "instance norm": (dict(use_channel_norm=False), dict(use_channel_norm=False)),
    "noise": (dict(noise_channels=5), dict(sample_noise=True, noise_dim=5)),
    "blocks": (dict(n_residual_blocks=3), dict(n_residual_blocks=3)),
    "mixture": (dict(likelihood="mixture", mixture_components=3), dict(use_latent_mixture_model=True, mixture_components=3)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, tmp_path):
    config, args = OPTIONS[option]
    config = NARROW.replace(**config)
    original = published(tmp_path / "m.pt", config, args)
    imported = import_published(tmp_path / "m.pt")
    assert imported.config == config and not imported.training and imported.extra == []
    assert same(original, imported) and imported.args["regime"] == "low" and (imported.epoch, imported.steps) == (3, 0.618)
    x = picture()
    with torch.inference_mode():
        assert torch.equal(original.synthesis(original.analysis(x)), imported.synthesis(imported.analysis(x)))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_compresses(option, tmp_path):
    config, args = OPTIONS[option]
    published(tmp_path / "m.pt", NARROW.replace(**config), args)
    imported = import_published(tmp_path / "m.pt")
    codec = Codec(imported, device="cpu", dtype=torch.float32)
    data = codec.compress(sample_photo("coffee").resize((90, 70)))
    folder = save_model(imported.model, tmp_path / "folder", torch.float32)
    again = Codec.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert again.fingerprint == codec.fingerprint and again.decompress(data) == codec.decompress(data)


def test_what_stands_beside_the_model(tmp_path):
    known = {"perceptual_loss.model.net.slice1.0.weight": torch.zeros(2), "Hyperprior.hyperprior_entropy_model.CDF": torch.zeros(2)}
    odd = {"Encoder.extra": torch.zeros(1), "spectral": torch.zeros(1)}
    original = published(tmp_path / "m.pt", weights=known | odd)
    with pytest.warns(UserWarning, match="2 weights.*Encoder.extra, spectral"): imported = import_published(tmp_path / "m.pt")
    assert imported.extra == ["Encoder.extra", "spectral"] and same(original, imported) and imported.discriminator() is None


@pytest.mark.parametrize("place", ("beside", "inside"))
def test_the_discriminator_is_kept(place, tmp_path):
    torch.manual_seed(1)
    plain = Discriminator(10, (6, 8), 4).eval()
    names = {"parametrizations.weight.original": "weight_orig", "parametrizations.weight.0._u": "weight_u",
             "parametrizations.weight.0._v": "weight_v"}
    state = {}
    for key, t in plain.state_dict().items():
        for ours, theirs in names.items(): key = key.replace(ours, theirs)
        state[key] = t
    if place == "beside": published(tmp_path / "m.pt", discriminator=state, args=dict(normalize_input_image=True),
                                    config=NARROW.replace(normalize_input_image=True))
    else: published(tmp_path / "m.pt", weights={f"Discriminator.{key}": t for key, t in state.items()},
                    args=dict(normalize_input_image=True), config=NARROW.replace(normalize_input_image=True))
    found = import_published(tmp_path / "m.pt").discriminator().eval()
    x, y_hat = torch.rand(1, 3, 32, 32), torch.randn(1, 10, 2, 2)
    assert torch.equal(found(x, y_hat), plain(x, y_hat))


def test_from_another_device_and_from_several(tmp_path, monkeypatch):
    for name, options in (("zip", {}), ("old", dict(_use_new_zipfile_serialization=False))):
        with monkeypatch.context() as context:
            context.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
            original = published(tmp_path / f"{name}.pt", prefix="module.", **options)
        with pytest.raises(RuntimeError, match="CUDA"): torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert same(original, import_published(tmp_path / f"{name}.pt"))
    assert zipfile.is_zipfile(tmp_path / "zip.pt") and not zipfile.is_zipfile(tmp_path / "old.pt")


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_other_precisions(dtype, tmp_path):
    torch.manual_seed(0)
    state = {key: t.to(dtype) for key, t in Model(NARROW).state_dict().items()}
    published(tmp_path / "m.pt", weights=state)
    imported = import_published(tmp_path / "m.pt")
    assert all(t.dtype == torch.float32 and torch.equal(t, state[key].float()) for key, t in imported.state_dict().items())


def test_the_file_may_go(tmp_path):
    """Weights are copied, not mapped: the download can be deleted, or written over."""
    original = published(tmp_path / "m.pt")
    imported = import_published(tmp_path / "m.pt")
    size = (tmp_path / "m.pt").stat().st_size
    with open(tmp_path / "m.pt", "r+b") as file: file.write(bytes(size))
    assert same(original, imported)


def test_it_can_be_trained_on(tmp_path):
    published(tmp_path / "m.pt")
    imported = import_published(tmp_path / "m.pt").train()
    out = imported(picture())
    (out["recon"].square().mean() + out["bpp_noisy"].mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in imported.parameters())
    assert isinstance(imported, ImportedModel) and isinstance(imported.model, Model)


# ---------------------------------------------------------------------------------------------- what is refused


class Trap:
    def __init__(self, path): self.path = path

    def __reduce__(self): return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("options", ({}, dict(_use_new_zipfile_serialization=False)))
@pytest.mark.parametrize("where", ("args", "epoch", "model_state_dict"))
def test_nothing_is_executed(where, options, tmp_path):
    trap = Trap(tmp_path / "sprung")
    more = dict(epoch=trap) if where == "epoch" else {where: {"trap": trap}}
    published(tmp_path / "m.pt", more=more, **options)
    with pytest.raises(CheckpointError, match="exec"): import_published(tmp_path / "m.pt")
    assert not (tmp_path / "sprung").exists()


def test_the_allowance_for_numbers_is_no_more_than_that(tmp_path):
    published(tmp_path / "m.pt", args=dict(a=np.float32(1.5), b=np.int64(-3), c=np.bool_(True)))
    before = set(torch.serialization.get_safe_globals())
    imported = import_published(tmp_path / "m.pt")
    assert (imported.args["a"], imported.args["b"], imported.args["c"]) == (1.5, -3, True)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path / "m.pt", weights_only=True)
    published(tmp_path / "m.pt", args=dict(a=np.array([print], object)))
    with pytest.raises(CheckpointError): import_published(tmp_path / "m.pt")


def broken(name, path):
    weights = Model(NARROW).state_dict()
    key = "Hyperprior.synthesis_mu.conv2.weight"
    if name == "not there": return
    if name == "a page": path.write_bytes(b"<html>can't scan this file for viruses</html>")
    elif name == "empty": path.write_bytes(b"")
    elif name == "a folder": path.mkdir()
    elif name == "bare weights": torch.save(weights, path)
    elif name == "a list": torch.save([1, 2], path)
    elif name == "no args": torch.save(dict(model_state_dict=weights), path)
    elif name == "not tensors": published(path, weights={key: 3})
    elif name == "no names": published(path, weights={7: torch.zeros(1)})
    elif name == "no discriminator": published(path, discriminator=[1])
    elif name == "a tensor for a setting": published(path, args=dict(normalize_input_image=torch.zeros(2)))
    elif name == "cut":
        published(path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif name == "missing":
        published(path)
        content = torch.load(path, weights_only=False)
        del content["model_state_dict"][key]
        torch.save(content, path)
    elif name == "shape": published(path, weights={key: torch.zeros(8, 8, 5, 4)})
    elif name == "NaN": published(path, weights={key: torch.full((8, 8, 5, 5), torch.nan)})
    elif name == "more blocks than weights": published(path, args=dict(n_residual_blocks=9))
    elif name == "unknown density": published(path, args=dict(likelihood_type="cauchy"))
    elif name == "absurd setting": published(path, args=dict(n_residual_blocks="many"))


@pytest.mark.parametrize("name, words", {
    "not there": "Check the path", "a folder": "Check the path", "a page": "Google Drive", "empty": "get it again",
    "cut": "get it again", "bare weights": "no checkpoint", "a list": "no checkpoint", "no args": "no checkpoint",
    "not tensors": "no checkpoint", "no names": "no checkpoint", "no discriminator": "no checkpoint",
    "a tensor for a setting": "normalize_input_image must be a bool", "missing": r"synthesis_mu\.conv2\.weight is missing",
    "shape": r"has the shape \(8, 8, 5, 4\), not \(8, 8, 5, 5\)", "NaN": "is not finite",
    "more blocks than weights": r"resblock_2\.conv1\.weight is missing.*53 more", "unknown density": "cauchy",
    "absurd setting": "n_residual_blocks must be a int"}.items())
def test_one_sentence_for_what_is_no_checkpoint(name, words, tmp_path):
    broken(name, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=words) as caught: import_published(tmp_path / "m.pt")
    assert "\n" not in str(caught.value) and str(tmp_path / "m.pt") in str(caught.value)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path, capsys):
    path, folder = tmp_path / "m.pt", tmp_path / "models" / "mine"
    original = published(path, NARROW.replace(normalize_input_image=True), dict(normalize_input_image=True),
                         weights={"Encoder.odd": torch.zeros(1)})
    assert main(["import", str(path), str(folder)]) == 0
    said = capsys.readouterr()
    assert "Encoder.odd" in said.out and str(folder) in said.out and said.err == ""
    assert same(original, load_model(folder))  # float32: nothing was rounded
    assert inherited_objective(folder) == inherited_objective(path) == dict(target_bpp=0.14, lambda_above=2.0)
    assert main(["import", str(path), str(folder)]) == 1 and "--force" in capsys.readouterr().err
    assert main(["import", str(path), str(folder), "--half", "--force"]) == 0
    half = load_model(folder)
    assert all(torch.equal(t.half().float(), half.state_dict()[key]) for key, t in original.state_dict().items())
    sample_photo("coffee").resize((60, 40)).save(tmp_path / "photo.png")
    assert main(["compress", str(tmp_path / "photo.png"), "--model", str(folder), "--device", "cpu"]) == 0
    assert main(["decompress", str(tmp_path / "photo.hfc"), "--model", str(folder), "--out", str(tmp_path / "back.png")]) == 0
    (tmp_path / "page.pt").write_text("<html>")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "page.pt"), str(tmp_path / "other")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "other").exists()


def test_models_lists_the_published_files(capsys, shared):
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    guide = (shared / "reference" / "usage-guide.md").read_text()
    for p in PUBLISHED:
        assert p.name in said and p.address in said and f"({p.address})" in guide
        assert p.import_line in said and p.finetune_line in said
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["address"] for m in listed if "address" in m] == [p.address for p in PUBLISHED]
