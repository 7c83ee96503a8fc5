"""The networks against the published ones: names, shapes and numbers; any size; nothing global in the light one."""

import json

import numpy as np
import pytest
import torch

from hific_nb.config import ConfigError, model_preset
from hific_nb.hyperprior import Hyperprior
from hific_nb.model import Model
from hific_nb.transforms import (
    ChannelNorm,
    HificEncoder,
    HificGenerator,
    LightEncoder,
    LightGenerator,
    Reflect,
    build_transforms,
    register_transform,
)

PAPER, LIGHT = model_preset("hific"), model_preset("hific-lite")
NARROW = PAPER.replace(channels=(4, 6, 8, 10, 12), latent_channels=10, hyperprior_channels=8, n_residual_blocks=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden"


@pytest.fixture(scope="module")
def published_shapes(golden):
    return {key: tuple(shape) for key, shape in json.loads((golden / "published_layout_keys.json").read_text()).items()}


def paper_model():
    with torch.device("meta"):
        return Model(PAPER)


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# ---------------------------------------------------------------------------------------------- the published networks


def test_names_and_shapes_are_the_published_ones(published_shapes):
    model = paper_model()
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == published_shapes


def test_parameter_counts():
    model = paper_model()
    counts = [round(parameters(part) / 1e6, 1) for part in (model.Encoder, model.Generator, model.Hyperprior)]
    assert counts == [7.4, 156.8, 17.3]
    with torch.device("meta"):
        assert parameters(Model(LIGHT)) <= 7.5e6


def golden_weight(key, shape, j):
    "The j-th tensor of the golden model, as the recipe defines it."
    last, size = key.split(".")[-1], int(np.prod(shape))
    assert last in ("weight", "gamma", "beta", "bias") or last[:2] in ("H_", "a_", "b_")
    factor = 1.4 / np.sqrt(np.prod(shape[1:])) if last == "weight" else 0.3 if last.startswith("H_") else 0.1
    out = np.empty(size, np.float32)
    for start in range(0, size, 1 << 18):  # in pieces that stay in the cache
        i = np.arange(start, min(start + (1 << 18), size), dtype=np.float64)
        w = np.cos(0.7 * i * (1 + 1e-3 * j) + 1.3 * j + (0.001 * i * i) % 6.283185307179586)
        out[start: start + len(i)] = w * factor + (last == "gamma")
    return torch.from_numpy(out.reshape(shape))


@pytest.fixture(scope="module")
def golden_run(golden, published_shapes):
    "What our networks compute from the golden weights and picture, beside what the published code computed."
    model = paper_model()
    weights = {key: golden_weight(key, published_shapes[key], j) for j, key in enumerate(sorted(published_shapes))}
    model.load_state_dict(weights, assign=True)  # 726 MB, not copied
    model.eval()
    y, x = np.mgrid[:128, :128].astype(np.float64)
    image = [0.5 + 0.25 * np.cos(0.05 * (c + 1) * x + 0.03 * y * (3 - c)) + 0.25 * np.sin(0.11 * y - 0.07 * x * (c + 1))
             for c in range(3)]
    prior, ours = model.Hyperprior, {}
    with np.load(golden / "published_layout_gaussian9.npz") as file: theirs = dict(file)
    with torch.inference_mode():
        ours["y"] = latents = model.analysis(torch.from_numpy(np.stack(image).astype(np.float32))[None])
        ours["z"] = z = prior.analysis_net(latents)
        ours["mu"], ours["sigma"] = prior.synthesize(torch.round(z), latents.shape[2:])
        out = prior(latents)
        ours["y_hat"] = out["y_hat"]
        ours["bits_y"], ours["bits_z"] = (bits.sum() for bits in prior.bit_maps(latents))
        grid = torch.linspace(-8, 8, 33).expand(PAPER.hyperprior_channels, 1, -1)
        ours["hyper_cdf_logits"] = prior.hyperlatent_likelihood.cdf_logits(grid)[:8, 0]
        ours["recon"] = model.synthesis(out["y_hat"])
        assert torch.allclose(out["bits_quantized"], ours["bits_y"] + ours["bits_z"])
    return {name: t.double().numpy() for name, t in ours.items()}, theirs


ARRAYS = ("y", "z", "mu", "sigma", "y_hat", "recon", "hyper_cdf_logits", "bits_y", "bits_z")


@pytest.mark.parametrize("name", ARRAYS)
def test_golden_array(golden_run, name):
    ours, theirs = golden_run[0][name], golden_run[1][name].astype(np.float64)
    assert ours.size == theirs.size > 0
    assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_golden_arrays_are_all_compared(golden_run):
    assert set(golden_run[1]) == set(ARRAYS)


# ---------------------------------------------------------------------------------------------- ChannelNorm


@pytest.mark.parametrize("channels", (2, 60, 120, 240, 480, 960, 220))
def test_channel_norm_is_its_formula(channels):
    norm = ChannelNorm(channels)
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)
    x = torch.randn(2, channels, 6, 5) * torch.logspace(-2, 2, 5) + torch.randn(2, 1, 6, 5)
    exact, gamma, beta = x.double(), norm.gamma.double(), norm.beta.double()
    mean, var = exact.mean(1, keepdim=True), exact.var(1, unbiased=True, keepdim=True)
    formula = gamma * (exact - mean) / torch.sqrt(var + 1e-3) + beta
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(norm(x.contiguous(memory_format=layout)).double(), formula, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.double()(x.double()), formula, rtol=1e-11, atol=1e-11)
    biased = gamma * (exact - mean) / torch.sqrt(exact.var(1, unbiased=False, keepdim=True) + 1e-3) + beta
    assert channels > 500 or not torch.allclose(biased, formula, rtol=1e-4, atol=1e-4)  # the test can tell them apart


# ---------------------------------------------------------------------------------------------- any size


@pytest.mark.parametrize("config", (
    NARROW, NARROW.replace(use_channel_norm=False), NARROW.replace(noise_channels=3), LIGHT,
), ids=("paper", "instance norm", "noise", "light"))
@pytest.mark.parametrize("h, w", ((1, 1), (1, 3), (2, 1), (5, 4), (9, 6)))
def test_any_size(config, h, w):
    model = Model(config).eval()
    with torch.inference_mode(): out = model(torch.rand(1, 3, 16 * h, 16 * w))
    assert out["recon"].shape == (1, 3, 16 * h, 16 * w)
    assert all(t.isfinite().all() for t in out.values())


@pytest.mark.parametrize("size", ((1, 1), (1, 7), (3, 2), (4, 5)))
def test_reflect_repeats_where_it_cannot_reflect(size):
    x = torch.randn(1, 2, *size)
    padded = Reflect(1, 2, 3, 0)(x)
    mode = ["reflect" if n > p else "symmetric" for n, p in zip(size, (3, 2))]
    expected = x.numpy()
    for axis, (before, after), how in ((2, (3, 0), mode[0]), (3, (1, 2), mode[1])):
        widths = [(0, 0)] * 4
        widths[axis] = (before, after)
        expected = np.pad(expected, widths, mode="reflect" if how == "reflect" else "edge")
    assert np.array_equal(padded.numpy(), expected)


def test_instance_norm_has_gain_and_offset():
    with torch.device("meta"):
        keys = HificEncoder(PAPER.replace(use_channel_norm=False)).state_dict()
    assert keys["conv_block1.2.weight"].shape == keys["conv_block1.2.bias"].shape == (60,)


# ---------------------------------------------------------------------------------------------- receptive fields


def test_the_light_encoder_sees_128_pixels_to_each_side():
    encoder, x = LightEncoder(LIGHT).eval(), torch.rand(1, 3, 16 * 22, 16 * 22)
    changed = x.clone()
    changed[..., :16, :16] = 1 - changed[..., :16, :16]
    with torch.inference_mode(): difference = (encoder(x) - encoder(changed)).abs().amax((0, 1))  # (22, 22)
    reach = 1 + 128 // 16
    assert difference[:2, :2].min() > 1e-3          # it does look
    assert difference[reach:].max() == difference[:, reach:].max() == 0


def test_the_light_generator_sees_8_latents_to_each_side():
    generator, y = LightGenerator(LIGHT).eval(), torch.randn(1, 128, 12, 12)
    changed = y.clone()
    changed[..., 0, 0] += 1
    with torch.inference_mode(): difference = (generator(y) - generator(changed)).abs().amax((0, 1))  # (192, 192)
    assert difference[:16, :16].min() > 0
    assert difference[9 * 16:].max() == difference[:, 9 * 16:].max() == 0


def test_nothing_in_hific_lite_normalizes():
    names = {type(module).__name__ for module in Model(LIGHT).modules()}
    assert not [name for name in names if "Norm" in name or "Pool" in name or "Attention" in name or "Linear" in name]


# ---------------------------------------------------------------------------------------------- extension, and refusals


def test_a_registered_pair_becomes_part_of_the_model():
    class Encoder(torch.nn.Conv2d):
        def __init__(self, config): super().__init__(3, config.latent_channels, 16, stride=16)

    class Generator(torch.nn.ConvTranspose2d):
        def __init__(self, config): super().__init__(config.latent_channels, 3, 16, stride=16)

    register_transform("test-patches", Encoder, Generator)
    model = Model(NARROW.replace(transform="test-patches"))
    assert isinstance(model.Encoder, Encoder) and isinstance(model.Generator, Generator)
    out = model(torch.rand(2, 3, 32, 48))
    (out["bpp_noisy"].sum() + out["recon"].square().mean()).backward()
    assert model.Encoder.weight.grad.abs().max() > 0 and model.Generator.weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", (
    lambda: build_transforms(PAPER.replace(transform="nobody-registered-this")),
    lambda: build_transforms(PAPER.replace(channels=(8, 8, 8, 8))),
    lambda: HificGenerator(PAPER.replace(channels=(8,) * 6)),
    lambda: build_transforms(LIGHT.replace(channels=(8,) * 5)),
    lambda: LightGenerator(LIGHT.replace(generator_blocks=(1, 2, 3))),
    lambda: LightEncoder(LIGHT.replace(channels=(1, 8, 8, 8))),
    lambda: ChannelNorm(1),
    lambda: register_transform("hific", LightEncoder, LightGenerator),
))
def test_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_gradients_reach_every_weight():
    for config in (NARROW, LIGHT.replace(channels=(8, 8, 8, 8), latent_channels=8, hyperprior_channels=8)):
        encoder, generator = build_transforms(config)
        generator(encoder(torch.rand(1, 3, 64, 64))).square().mean().backward()
        for net in (encoder, generator):
            assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_the_hyperprior_is_priced_in_float32_under_autocast():
    prior, y = Hyperprior(NARROW).eval(), 3 * torch.randn(1, 10, 8, 8)
    with torch.inference_mode():
        plain = prior(y)
        with torch.autocast("cpu", torch.bfloat16): half = prior(y)
    assert half["y_hat"].dtype == torch.float32 and torch.equal(half["y_hat"], plain["y_hat"])
    assert torch.equal(half["bits_quantized"], plain["bits_quantized"])
