"""Mixtures of logistics, and the single logistic: their rate is that of a numeric integral, and what they code comes back,
through every coder and from processes with other instruction sets.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hific_nb.codec import Codec
from hific_nb.coders import CoderUnavailableError, get_coder
from hific_nb.config import ConfigError, HificError, ModelConfig
from hific_nb.entropy_models import (
    LIKELIHOOD_FLOOR,
    add_uniform_noise,
    decision_rows,
    decision_tables,
    get_density,
    interval_likelihood,
    mixture_log_likelihood,
    register_density,
    scale_grid,
    scale_tables,
    scale_thresholds,
)
from hific_nb.hyperprior import (
    FixedPointMixtures,
    Hyperprior,
    IntegerMixture,
    IntegerSynthesis,
    MixtureSynthesis,
    _powers,
    ask_symbols,
    read_symbols,
    symbol_parts,
)
from hific_nb.model import Model, ModelError, load_model, save_model
from hific_nb.rans import CorruptStreamError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(likelihood="mixture", latent_channels=8, hyperprior_channels=12)
few = settings(deadline=None, max_examples=40, derandomize=True)


def fill(network, seed=0):
    "Random weights (not torch's: its normal numbers depend on the vector unit) that make mixtures of every shape."
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for conv in network.children():
            terms = conv.in_channels * conv.kernel_size[0] ** 2 / conv.stride[0] ** 2  # of one output
            conv.weight.copy_(torch.from_numpy(rng.standard_normal(conv.weight.shape) * (2 / terms) ** 0.5))
            conv.bias.copy_(torch.from_numpy(0.3 * rng.standard_normal(conv.bias.shape)))
        logits, means, log_scales = network.conv_out.bias.view(3, -1)
        means.mul_(8)
        log_scales.sub_(1)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    hyperprior = Hyperprior(CONFIG).eval()
    fill(hyperprior.synthesis_DLMM_params)
    return hyperprior


@pytest.fixture(scope="module")
def picture(prior):
    "Hyperlatents (1, 12, 9, 7), and symbols (8, 34, 26) drawn from the float mixtures that they tell."
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.integers(-3, 4, (1, 12, 9, 7)))
    with torch.no_grad(): logits, means, log_scales = (v[0].double().numpy() for v in prior.synthesize(z.float(), (34, 26)))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    edges = np.cumsum(weights / weights.sum(1, keepdims=True), 1)
    chosen = (rng.random((8, 1, 34, 26)) > edges).sum(1, keepdims=True).clip(0, 3)
    mean, log_scale = (np.take_along_axis(v, chosen, 1)[:, 0] for v in (means, log_scales))
    u = rng.random(mean.shape)
    return z, np.rint(mean + np.exp(log_scale) * np.log(u / (1 - u))).astype(np.int32)


# ---------------------------------------------------------------------------------------------- the rate is an integral


def integral(f, low, high, n):
    "Simpson's rule in float64."
    t = np.linspace(low, high, 2 * n + 1)
    w = np.ones(2 * n + 1)
    w[1:-1:2], w[2:-1:2] = 4, 2
    return float((w * f(t)).sum() * (high - low) / (6 * n))


def logistic_pdf(x): return np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))) ** 2


mixtures = st.lists(st.tuples(st.floats(-3, 3), st.floats(-12, 12), st.floats(-2.2, 3)), min_size=1, max_size=5)


@few
@given(mixtures, st.integers(-25, 25))
@example([(0.0, 0.0, -2.2)], 4)
@example([(0.0, -3.0, -2.0), (-1.0, 4.2, -0.5), (-3.0, 0.5, 2.2)], 12)
def test_the_likelihood_of_a_mixture_is_the_integral_of_its_density(components, y):
    logits, means, log_scales = np.array(components).T
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()

    def pdf(t): return sum(w * logistic_pdf((t - m) / math.exp(s)) / math.exp(s)
                           for w, m, s in zip(weights, means, log_scales))
    exact = max(integral(pdf, y - 0.5, y + 0.5, 400), LIKELIHOOD_FLOOR)
    parameters = [torch.tensor(v, dtype=torch.float32)[:, None] for v in (logits, means, log_scales)]
    ours = mixture_log_likelihood(torch.tensor([float(y)]), *parameters, dim=0).exp().item()
    assert abs(ours / exact - 1) < 2e-4
    if len(components) == 1:  # the single logistic, the other way
        single = interval_likelihood(torch.tensor(float(y)), parameters[1][0], parameters[2][0].exp(), get_density("logistic"))
        assert abs(single.item() - exact) < 2e-4 * exact + 3e-8


@pytest.mark.parametrize("likelihood", ["logistic", "mixture"])
def test_the_rate_in_training_is_an_integral_too(likelihood):
    """Latents that have the density that is predicted cost its differential entropy under noise, and its entropy when rounded."""
    weights, means, scales = [0.5, 0.3, 0.2], [-2.3, 0.4, 5.1], [0.3, 1.0, 2.0]
    if likelihood == "logistic": weights, means, scales = [1.0], [0.4], [1.3]

    def cdf(t): return sum(w / (1 + np.exp(-(t - m) / s)) for w, m, s in zip(weights, means, scales))
    def noisy(t): return cdf(t + 0.5) - cdf(t - 0.5)  # the density of y + u
    def bits_of(p): return -p * np.log2(np.maximum(p, 1e-300))
    expected_noisy = integral(lambda t: bits_of(noisy(t)), -60, 60, 20_000)
    expected_rounded = bits_of(noisy(np.arange(-60.0, 61))).sum()

    rng, n = np.random.default_rng(0), 200_000
    k, u = rng.choice(len(weights), n, p=weights), rng.random(n)
    y = torch.from_numpy(np.array(means)[k] + np.array(scales)[k] * np.log(u / (1 - u))).float()
    torch.manual_seed(0)
    if likelihood == "mixture":
        parameters = [torch.tensor(v)[:, None].expand(-1, n) for v in (weights, means, scales)]
        def bits(v): return mixture_log_likelihood(v, parameters[0].log(), parameters[1], parameters[2].log(), dim=0) / -math.log(2)
    else:
        def bits(v): return -torch.log2(interval_likelihood(v, torch.tensor(0.4), torch.tensor(1.3), get_density("logistic")))
    for values, expected in ((add_uniform_noise(y), expected_noisy), (y.round(), expected_rounded)):
        found = bits(values).double()
        error = found.std().item() / n ** 0.5
        assert error < 0.01 and abs(found.mean().item() - expected) < 4 * error


@few
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), st.sampled_from((-80.0, -4.6, -2.2, 0.0, 8.0, 80.0)),
       st.floats(-1e3, 1e3), st.floats(-1e6, 1e6))
def test_gradients_are_finite_everywhere(latents, log_scale, logit, mean):
    y = torch.tensor(latents, requires_grad=True)
    parameters = [torch.tensor(v)[:, None].expand(2, len(latents)).clone().requires_grad_()
                  for v in ([0.0, logit], [0.0, mean], [0.0, log_scale])]
    value = mixture_log_likelihood(y, *parameters, dim=0)
    value.sum().backward()
    assert value.isfinite().all() and (value >= math.log(LIKELIHOOD_FLOOR) - 1e-3).all() and (value <= 1e-6).all()
    assert all(v.grad.isfinite().all() for v in (y, *parameters))


def test_a_mixture_has_a_name_of_its_own():
    for name in ("mixture", "logistic"):
        with pytest.raises(ConfigError): register_density(name, get_density("gaussian"))
    with pytest.raises(ConfigError): get_density("mixture")


# ---------------------------------------------------------------------------------------------- the hyperprior


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic", "mixture"])
def test_the_hyperprior_gives_the_same_for_every_likelihood(likelihood):
    torch.manual_seed(0)
    hyperprior = Hyperprior(CONFIG.replace(likelihood=likelihood))
    y = (4 * torch.randn(2, 8, 7, 5)).requires_grad_()
    out = hyperprior(y)
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(
        y_hat=(2, 8, 7, 5), z_hat=(2, 12, 2, 2), mean=(2, 8, 7, 5), scale=(2, 8, 7, 5), bits_noisy=(2,), bits_quantized=(2,))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in out.values())
    about = 0 if likelihood == "mixture" else out["mean"]
    symbols = torch.round(y - about).detach()
    assert torch.allclose(out["y_hat"], symbols + about)
    maps = hyperprior.bit_maps(y)
    exact = hyperprior.symbol_bits(symbols, out["z_hat"])
    for bits, m in zip(exact, maps): assert torch.allclose(bits.float(), m, rtol=1e-3, atol=1e-3) and bits.dtype == torch.float64
    assert torch.allclose(sum(m.sum((1, 2, 3)) for m in maps), out["bits_quantized"])
    (out["bits_noisy"].sum() + out["y_hat"].sum()).backward()
    assert y.grad.isfinite().all() and all(p.grad.isfinite().all() for p in hyperprior.parameters())
    with torch.autocast("cpu", torch.bfloat16): inside = hyperprior(y)
    assert torch.equal(inside["z_hat"], out["z_hat"]) and inside["bits_quantized"].dtype == torch.float32


def test_a_mixture_learns_what_one_bell_cannot_say():
    """Latents that are -4 or 4, by the throw of a coin: a bit each, and no mean and scale come near it."""
    rates = {}
    for likelihood in ("gaussian", "mixture"):
        torch.manual_seed(0)
        hyperprior = Hyperprior(ModelConfig(likelihood=likelihood, latent_channels=2, hyperprior_channels=4))
        optimizer, rng = torch.optim.Adam(hyperprior.parameters(), 0.02), np.random.default_rng(0)
        for _ in range(250):
            y = torch.from_numpy(rng.choice([-4.0, 4.0], (4, 2, 8, 8))).float()
            loss = hyperprior(y)["bits_noisy"].sum() / y.numel()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hyperprior.parameters(), 1.0)
            optimizer.step()
        rates[likelihood] = hyperprior(y)["bits_quantized"].sum().item() / y.numel()
    assert 0.99 < rates["mixture"] < 1.3 < 2 < rates["gaussian"], rates


def test_the_layout_of_the_published_code():
    """Parameter names and the order of channels: (3, C, K), which is logits, means, log scales."""
    hyperprior = Hyperprior(ModelConfig(likelihood="mixture", latent_channels=64))
    names = {k for k in hyperprior.state_dict() if k.startswith("synthesis")}
    assert names == {f"synthesis_DLMM_params.{conv}.{kind}" for conv in ("conv1", "conv2", "conv3", "conv_out")
                     for kind in ("weight", "bias")}
    network = hyperprior.synthesis_DLMM_params
    assert network.conv_out.weight.shape == (768, 64, 1, 1) and network.conv3.weight.shape == (320, 64, 3, 3)
    with torch.no_grad():
        network.conv_out.weight.zero_()
        network.conv_out.bias.copy_(torch.arange(768.0) / 200)
        logits, means, log_scales = hyperprior.synthesize(torch.zeros(1, 320, 1, 1), (4, 3))
    assert logits.shape == (1, 64, 4, 4, 3)
    for i, v in enumerate((logits, means, log_scales)):
        expected = (torch.arange(256.0) + 256 * i).view(64, 4) / 200
        torch.testing.assert_close(v[0, :, :, 1, 1], expected)


def test_the_bounds_of_log_scales():
    hyperprior = Hyperprior(CONFIG)
    for bias, expected in ((-50.0, math.log(CONFIG.min_scale)), (50.0, 8.0)):
        with torch.no_grad():
            hyperprior.synthesis_DLMM_params.conv_out.weight.zero_()
            hyperprior.synthesis_DLMM_params.conv_out.bias.fill_(bias)
            assert torch.allclose(hyperprior.synthesize(torch.zeros(1, 12, 1, 1), (4, 4))[2], torch.tensor(expected))


# ---------------------------------------------------------------------------------------------- whole numbers


def whole(components):
    "Parameters (K, n) in the units of FixedPointMixtures."
    return [np.rint(np.array(v) * steps).astype(np.int32).reshape(len(components), -1)
            for v, steps in zip(zip(*components), (256, 1024, 128))]


@few
@given(mixtures, st.lists(st.integers(-2 ** 31, 2 ** 31 - 1) | st.integers(-40, 40), min_size=1, max_size=8))
@example([(0.0, 0.0, -4.6), (0.0, 3.0, -4.6)], [0, 3, -2 ** 31, 2 ** 31 - 1, 2 ** 14, -2 ** 14, 2 ** 14 - 1])
@example([(0.0, 0.0, 8.0)] * 64, [5, -300, 2 ** 13 + 1])
def test_questions_find_any_symbol_at_the_price_of_its_mass(components, symbols):
    columns = [np.repeat(v, len(symbols), 1) for v in whole(components)]
    m, symbols, p = FixedPointMixtures(*columns), np.array(symbols, np.int64), np.ones(len(symbols))

    def answer(yes, no, which, least):
        said = symbols[which] < m.center[which] if least is None else np.abs(symbols - m.center)[which] >= least
        assert (yes >= 0).all() and (no >= 0).all() and ((yes + no) <= 2 ** 38).all()
        assert (decision_rows(yes, no) <= 255).all()
        p[which] *= np.where(said, yes, no) / np.maximum(yes + no, 1)
        return said

    assert np.array_equal(ask_symbols(m, answer, lambda which: symbols[which]), symbols)
    near = np.abs(symbols - m.center) < 2 ** 14
    mass = (m.below(symbols.clip(-2 ** 17, 2 ** 17) + 1) - m.below(symbols.clip(-2 ** 17, 2 ** 17))) / m.total
    assert np.allclose(p[near], mass[near], rtol=1e-9, atol=0)


@few
@given(mixtures)
def test_masses_rise_and_are_those_of_the_floats(components):
    columns = [np.repeat(v, 401, 1) for v in whole(components)]
    m, values = FixedPointMixtures(*columns), np.arange(-200, 201)
    masses = m.below(values)
    assert (np.diff(masses) >= 0).all() and masses.min() >= 0 and (masses <= m.total).all()
    logits, means, log_scales = (torch.tensor(v / steps, dtype=torch.float64) for v, steps in zip(columns, (256, 1024, 128)))
    exact = (torch.softmax(logits, 0) * torch.sigmoid((torch.from_numpy(values) - 0.5 - means) / log_scales.exp())).sum(0)
    assert np.abs(masses / m.total - exact.numpy()).max() < 2e-3  # weights in steps of 1/256 of e


def test_the_lists_are_rounded_exactly():
    getcontext().prec = 50
    for steps, first, count, bits in ((256, 0, 3073, 16), (128, -590, 1615, 20), (64, 0, 1409, 30)):
        exact = [(Decimal(-i) / steps).exp() * 2 ** bits for i in range(first, first + count)]
        assert _powers(steps, first, count, bits).tolist() == [int(v.to_integral_value("ROUND_HALF_UP")) for v in exact]


def scatter(x, weight, bias, stride):
    "The definition of a transposed convolution, in int64: (C_in, H, W), (C_in, C_out, k, k), (C_out,)."
    (_, H, W), (_, c_out, k, _) = x.shape, weight.shape
    out = np.zeros((c_out, stride * H + k, stride * W + k), np.int64)
    for ky in range(k):
        for kx in range(k):
            kernel = np.einsum("io,ihw->ohw", weight[:, :, ky, kx], x)
            out[:, ky: ky + stride * H: stride, kx: kx + stride * W: stride] += kernel
    return out[:, k // 2: k // 2 + stride * H, k // 2: k // 2 + stride * W] + bias[:, None, None]


def test_the_network_in_whole_numbers_is_what_64_bit_integers_say(prior):
    network = prior.synthesis_DLMM_params
    exact = IntegerMixture(network, CONFIG.min_scale)
    assert all(bound < 2 ** 52 for bound in exact.bounds)
    z = np.random.default_rng(2).integers(-9, 10, (1, 12, 3, 2))
    x = z[0]
    for i, (conv, bits, (_, _, stride, shift)) in enumerate(zip(network.children(), exact.weight_bits, exact.layers)):
        weight, bias = (np.rint(p.double().numpy() * 2.0 ** s).astype(np.int64)
                        for p, s in ((conv.weight, bits), (conv.bias, bits + (exact.FRACTION if i else 0))))
        if i == 3: x = np.einsum("oi,ihw->ohw", weight[:, :, 0, 0], x) + bias[:, None, None]
        else: x = scatter(x, weight, bias, stride)
        if i < 3: x = np.clip((x + (1 << shift >> 1)) >> shift, 0 if i < 2 else -exact.ACTIVATION_BOUND, exact.ACTIVATION_BOUND)
    point = exact.weight_bits[3] + exact.FRACTION
    found = exact.parameters(torch.from_numpy(z))
    with torch.no_grad(): floats = prior.synthesize(torch.from_numpy(z).float(), (12, 8))
    for row, raw, value, bits, (low, high) in zip(found, x.reshape(3, 8, 4, 12, 8), floats, (8, 10, 7),
                                                  ((-2 ** 20, 2 ** 20), (-2 ** 25, 2 ** 25), (-282, 1024))):
        rounded = np.clip((raw + (1 << point - bits - 1)) >> point - bits, low, high)
        assert np.array_equal(row.transpose(1, 0, 2, 3), rounded)
        assert np.abs(rounded / 2 ** bits - value[0].numpy()).max() < 0.51 / 2 ** bits + 1e-3  # and near the floats


@pytest.mark.parametrize("name", ["rans", "rans-numpy", "torchac", "constriction"])
def test_what_is_coded_comes_back(prior, picture, name):
    coder, tables = get_coder(name), decision_tables()
    try: coder.require()
    except CoderUnavailableError as error: pytest.skip(str(error))
    z, symbols = picture
    symbols = symbols.copy()
    symbols[0, 0, :4] = 2 ** 31 - 1, -2 ** 31, 40_000, -16_500  # spelled out
    indexes = IntegerMixture(prior.synthesis_DLMM_params, CONFIG.min_scale)(z, symbols.shape[1:])
    data = coder.encode(symbol_parts(symbols, indexes, tables))
    decoder = coder.decoder(data)
    assert np.array_equal(read_symbols(decoder, indexes, tables), symbols)
    decoder.close()
    area = (slice(None), slice(8, 23), slice(4, 26))  # a tile
    decoder = coder.decoder(coder.encode(symbol_parts(symbols[area], indexes[area], tables)))
    assert np.array_equal(read_symbols(decoder, indexes[area], tables), symbols[area])


def test_the_rate_is_that_of_the_floats(prior, picture):
    """Fixed-point mixtures and tables of yes and no cost under 0.5 % against the float density, the bytes of the file counted."""
    z, symbols = picture
    ideal = prior.symbol_bits(torch.from_numpy(symbols)[None], z)[0].sum().item()
    indexes, tables = IntegerMixture(prior.synthesis_DLMM_params, CONFIG.min_scale)(z, symbols.shape[1:]), decision_tables()
    data = get_coder("rans").encode(symbol_parts(symbols, indexes, tables))
    assert ideal / symbols.size > 1  # not a trivial picture
    assert 0.997 * ideal < 8 * len(data) < 1.005 * ideal + 8 * 5, 8 * len(data) / ideal


def test_a_logistic_is_coded_at_its_rate():
    grid, rng = scale_grid(), np.random.default_rng(0)
    tables = scale_tables(grid, "logistic")
    scale = np.exp(rng.uniform(math.log(0.11), math.log(20), 100_000))
    u = rng.random(len(scale))
    symbols = np.rint(scale * np.log(u / (1 - u))).astype(np.int32)
    rows = np.searchsorted(scale_thresholds(grid), scale, side="right").astype(np.uint8)
    p = interval_likelihood(torch.from_numpy(symbols).double(), torch.zeros(()), torch.from_numpy(scale), get_density("logistic"))
    ideal, coder = -torch.log2(p).sum().item(), get_coder("rans")
    data = coder.encode(symbol_parts(symbols.reshape(1, 100, -1), rows.reshape(1, 100, -1), tables))
    decoder = coder.decoder(data)
    assert np.array_equal(read_symbols(decoder, rows.reshape(1, 100, -1), tables).ravel(), symbols)
    decoder.close()
    assert 0.997 * ideal < 8 * len(data) < 1.005 * ideal


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 4), (5, 3), (17, 9)])
def test_any_size_in_any_strips(prior, size):
    exact, tables, coder = IntegerMixture(prior.synthesis_DLMM_params, CONFIG.min_scale), decision_tables(), get_coder("rans")
    rng = np.random.default_rng(3)
    z = torch.from_numpy(rng.integers(-5, 6, (1, 12, -(-size[0] // 4), -(-size[1] // 4))))
    symbols, answers = rng.integers(-30, 31, (8, *size)).astype(np.int32), []
    for exact.STRIP, exact.BLOCK in ((2 ** 20, 2 ** 16), (1, 2 ** 16), (200, 7), (1, 1)):
        indexes = exact(z, size)
        assert indexes.shape == symbols.shape
        parts = symbol_parts(symbols, indexes, tables)
        decoder = coder.decoder(coder.encode(parts))
        assert np.array_equal(read_symbols(decoder, indexes, tables), symbols)
        decoder.close()
        answers.append(sorted(zip(*(np.concatenate(v).tolist() for v in zip(*((s, r) for s, r, _ in parts))))))
    assert all(a == answers[0] for a in answers)  # the same questions, in another order


@pytest.mark.parametrize("gain", [1e-3, 1.0, 30.0])
def test_forged_hyperlatents_stay_within_the_bounds(gain):
    config = ModelConfig(likelihood="mixture", latent_channels=5, hyperprior_channels=7, mixture_components=3)
    network, rng, tables = MixtureSynthesis(config), np.random.default_rng(0), decision_tables()
    with torch.no_grad():
        for p in network.parameters(): p.copy_(torch.from_numpy(gain * rng.standard_normal(p.shape)))
    exact = IntegerMixture(network, 0.01)
    assert all(bound < 2 ** 52 for bound in exact.bounds)
    symbols = rng.integers(-2 ** 31, 2 ** 31, (5, 12, 16)).astype(np.int32)
    for values in (2.0 ** 31, -2.0 ** 31, float("inf"), float("nan")):
        for signs in (np.ones((1, 7, 3, 4)), rng.choice([-1, 1], (1, 7, 3, 4))):
            z = torch.from_numpy(values * signs)
            sums = exact._sums(z)
            assert torch.equal(sums, sums.round()) and sums.abs().max() <= exact.bounds[3]
            logits, means, log_scales = exact.parameters(z)
            assert np.abs(logits).max() <= 2 ** 20 and np.abs(means).max() <= 2 ** 25
            assert -590 <= log_scales.min() and log_scales.max() <= 1024
    indexes = exact(z, (12, 16))
    decoder = get_coder("rans").decoder(get_coder("rans").encode(symbol_parts(symbols, indexes, tables)))
    assert np.array_equal(read_symbols(decoder, indexes, tables), symbols)


def test_damaged_streams_are_noticed_or_give_symbols(prior, picture):
    z, symbols = picture
    indexes, tables = IntegerMixture(prior.synthesis_DLMM_params, CONFIG.min_scale)(z, symbols.shape[1:]), decision_tables()
    data, rng, noticed = get_coder("rans").encode(symbol_parts(symbols, indexes, tables)), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.integers(1, 5)):
            if damaged: damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        try:
            decoder = get_coder("rans").decoder(bytes(damaged))
            found = read_symbols(decoder, indexes, tables)
            assert found.shape == symbols.shape and found.dtype == np.int32
            decoder.close()
        except CorruptStreamError: noticed += 1
    assert noticed >= 55


def test_what_cannot_be_exact_is_refused(prior):
    def broken(change):
        network = fill(MixtureSynthesis(CONFIG))
        with torch.no_grad(): change(network)
        return IntegerMixture(network, CONFIG.min_scale)

    for attempt in (lambda: broken(lambda n: n.conv_out.weight.mul_(1e7)), lambda: broken(lambda n: n.conv3.bias.fill_(math.nan)),
                    lambda: broken(lambda n: n.conv_out.bias.fill_(1e15)),
                    lambda: IntegerSynthesis(prior.synthesis_DLMM_params, scale_thresholds(scale_grid())),
                    lambda: IntegerMixture(Hyperprior(CONFIG.replace(likelihood="gaussian")).synthesis_std, 0.11),
                    lambda: IntegerMixture(prior.synthesis_DLMM_params, 0.11)(torch.zeros(1, 12, 1, 1), (5, 4)),
                    lambda: IntegerMixture(prior.synthesis_DLMM_params, 0.11)(torch.zeros(1, 12, 2, 2), (8, 8))[:, 1:4, :4],
                    lambda: IntegerMixture(prior.synthesis_DLMM_params, 0.11)(torch.zeros(1, 12, 2, 2), (8, 8))[:2, :4, :4]):
        with pytest.raises(HificError): attempt()


# ---------------------------------------------------------------------------------------------- from photo to file and back


@pytest.mark.parametrize("rate_levels", [0, 5])
def test_a_model_with_mixtures_makes_files(tmp_path, rate_levels):
    torch.manual_seed(0)
    config = ModelConfig(transform="light", channels=(4, 4, 4, 4), n_residual_blocks=0, latent_channels=6, hyperprior_channels=8,
                         likelihood="mixture", rate_levels=rate_levels)
    model = Model(config)
    with torch.no_grad():
        model.Encoder.layers[-1].weight.mul_(20)
        model.Hyperprior.analysis_net.conv3.weight.mul_(8)
    codec = Codec(load_model(save_model(model, tmp_path / "model")), device="cpu", dtype=torch.float32)
    rng = np.random.default_rng(0)
    photo = torch.from_numpy(rng.integers(0, 256, (3, 150, 205), np.uint8))
    latents = codec.encode_latents(photo)
    assert latents.symbols.std() > 0.3 and latents.symbols.shape == (6, 10, 13)
    elsewhere = Codec(load_model(tmp_path / "model"), device="cpu", dtype=torch.float32)
    for tile in (0, 64, 128):
        data = codec.encode(latents, tile)
        back = elsewhere.decode_latents(data)
        assert np.array_equal(back.symbols, latents.symbols) and np.array_equal(back.hyperlatents, latents.hyperlatents)
        assert torch.equal(back.y_hat, latents.y_hat) and elsewhere.decompress(data).size == (205, 150)
        if not tile: assert len(data) <= codec.ideal_bits(latents) / 8 * 1.005 + 40
    if not rate_levels: assert torch.equal(latents.y_hat[0], torch.from_numpy(latents.symbols).float())  # whole numbers
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"mixture_components": 4', '"mixture_components": 3'))
    with pytest.raises(ModelError, match="conv_out"): load_model(tmp_path / "model")


# ---------------------------------------------------------------------------------------------- on every machine

SETTINGS = {
    "as it is": {},
    "SSE4.1": dict(ONEDNN_MAX_CPU_ISA="SSE41"),
    "no vectors, MKL's oldest": dict(ONEDNN_MAX_CPU_ISA="SSE41", ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE",
                                     NPY_DISABLE_CPU_FEATURES="AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"),
}
WORKER = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")  # NumPy's, about features that this processor lacks anyway
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
from hific_nb.coders import get_coder
from hific_nb.config import ModelConfig
from hific_nb.entropy_models import decision_tables
from hific_nb.hyperprior import IntegerMixture, MixtureSynthesis, read_symbols

tensors = load_file(Path(sys.argv[1]) / "in.safetensors")
z, data = tensors.pop("z"), tensors.pop("data").numpy().tobytes()
network = MixtureSynthesis(ModelConfig(likelihood="mixture", latent_channels=8, hyperprior_channels=12))
network.load_state_dict(tensors)
exact, size = IntegerMixture(network, 0.11), (34, 26)
digests, floats = {}, {}
for threads, onednn in ((1, True), (1, False), (2, True)):
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn
    for layout in (torch.contiguous_format, torch.channels_last):
        at = z.contiguous(memory_format=layout)
        decoder = get_coder("rans").decoder(data)
        symbols = read_symbols(decoder, exact(at, size), decision_tables())
        decoder.close()
        whole = exact.parameters(at).tobytes() + symbols.tobytes()
        digests[f"{threads} {onednn} {layout}"] = hashlib.sha256(whole).hexdigest()
        with torch.inference_mode(): raw = network(at.float())
        floats[f"{threads} {onednn} {layout}"] = hashlib.sha256(raw.contiguous().numpy().tobytes()).hexdigest()
print(json.dumps(dict(digests=digests, floats=floats)))
"""


def test_mixtures_are_the_same_on_every_machine(prior, picture, tmp_path):
    """One process encodes; others, under other settings, compute the same mixtures and read the same symbols. Floats differ."""
    z, symbols = picture
    exact = IntegerMixture(prior.synthesis_DLMM_params, CONFIG.min_scale)
    data = get_coder("rans").encode(symbol_parts(symbols, exact(z, symbols.shape[1:]), decision_tables()))
    tensors = dict(prior.synthesis_DLMM_params.state_dict(), z=z, data=torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "in.safetensors")
    expected = hashlib.sha256(exact.parameters(z).tobytes() + symbols.tobytes()).hexdigest()
    floats = set()
    for name, variables in SETTINGS.items():
        env = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR")}
        env |= dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT)) | variables
        done = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        result = json.loads(done.stdout.splitlines()[-1])
        assert set(result["digests"].values()) == {expected}, name
        floats |= set(result["floats"].values())
    assert len(floats) > 1  # the negative control: this is not for want of differences
