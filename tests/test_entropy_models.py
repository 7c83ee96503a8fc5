"""Densities and integer tables over random input: likelihoods against an oracle, frequencies against the optimum."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hific_nb.config import ConfigError
from hific_nb.entropy_models import (
    LIKELIHOOD_FLOOR,
    FactorizedDensity,
    IndexedTables,
    TableError,
    factorized_tables,
    gaussian_cdf,
    get_density,
    interval_likelihood,
    logistic_cdf,
    quantize_pmf,
    register_density,
    scale_grid,
    scale_tables,
    scale_thresholds,
    tables_from_pmfs,
)

few = settings(deadline=None, max_examples=60, derandomize=True)
fewer = settings(deadline=None, max_examples=15, derandomize=True)


def laplace_cdf(x):
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x < 0, tail, 1 - tail)


def cauchy_cdf(x):
    return torch.where(x < -1, -torch.atan(1 / x.clamp(max=-1)) / math.pi, 0.5 + torch.atan(x) / math.pi)


@pytest.fixture(scope="module", autouse=True)
def own_densities():
    register_density("test-laplace", laplace_cdf)
    register_density("test-cauchy", cauchy_cdf)


DENSITIES = ("gaussian", "logistic", "test-laplace", "test-cauchy")
probabilities = st.lists(st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e-5), st.floats(0, 1e9)),
                         min_size=1, max_size=60).filter(lambda p: sum(p) > 0)


def check_rows(tables):
    assert tables.validate() is tables
    for r in range(tables.rows):
        f = np.diff(tables.cdf[r].astype(np.int64))
        assert f.sum() == 2 ** tables.precision and (f[: tables.slots[r]] >= 1).all()
        assert (f[tables.slots[r]:] == 0).all()


# ---------------------------------------------------------------------------------------------- frequencies


@few
@given(probabilities, st.integers(6, 16))
@example([1.47, 6.53], 3)  # where rounding has the right sum and is not the best
@example([0.0, 1.0], 6)
@example([5e-324, 5e-324, 0.0], 6)
@example([1.0] * 60, 6)
@example([1e300, 1.0], 16)
def test_quantize_pmf_is_optimal(p, precision):
    f, p = quantize_pmf(p, np.int64(precision)), np.array(p)
    p = p / p.max()
    assert f.shape == p.shape and f.min() >= 1 and f.sum() == 2 ** precision
    # The objective is separable and convex, so a table is optimal if no unit is better off with another symbol.
    gain = (p * np.log2((f + 1) / f)).max()
    loss = np.where(f > 1, p * np.log2(f / np.maximum(f - 1, 1)), math.inf).min()
    assert gain <= loss * (1 + 1e-9) + 1e-18


@few
@given(st.integers(1, 16), st.data())
def test_quantize_pmf_fills_the_smallest_tables(precision, data):
    n = data.draw(st.integers(1, min(2 ** precision, 300)))
    f = quantize_pmf(np.random.default_rng(n).exponential(size=n) ** 4, precision)
    assert len(f) == n and f.min() >= 1 and f.sum() == 2 ** precision


@pytest.mark.parametrize("p, precision", (
    ([], 8), ([0, 0], 8), ([1, -1e-12], 8), ([1, math.nan], 8), ([1, math.inf], 8), ([1e308, 1e308], 8), ([[1.0]], 8),
    (np.ones(5), 2), ([1.0], 0), ([1.0], 17), ([1.0], 8.0), ([1.0], True),
), ids=str)
def test_quantize_pmf_refuses(p, precision):
    with pytest.raises(TableError):
        quantize_pmf(p, precision)


@few
@given(st.lists(st.tuples(probabilities, st.integers(-(2 ** 31) + 1, 2 ** 31 - 100)), min_size=1, max_size=5),
       st.integers(6, 16), st.floats(0, 1))
def test_tables_from_pmfs(rows, precision, share):
    pmfs = [np.array(p) / max(p) / sum(np.array(p) / max(p)) * share for p, _ in rows]
    tables = tables_from_pmfs(pmfs, [offset for _, offset in rows], precision)
    check_rows(tables)
    for r, (p, offset) in enumerate(rows):
        assert tables.offset[r] == offset and tables.slots[r] == len(p) + 1
        escape = tables.probability(r)[-1]
        # what the values lack belongs to the escape: at least its smallest frequency, and what forced ones leave
        assert 2.0 ** -precision <= escape <= 1 - share + 2 * 2.0 ** -precision
        assert escape >= 1 - share - (2 * len(p) + 2) * 2.0 ** -precision


@pytest.mark.parametrize("offsets", ([], [0, 0], [2 ** 31], [-(2 ** 40)]), ids=str)
def test_tables_from_pmfs_refuses(offsets):
    with pytest.raises(TableError):
        tables_from_pmfs([[1.0]], offsets)


# ---------------------------------------------------------------------------------------------- validation

GOOD = IndexedTables(np.array([[0, 1, 7, 8], [0, 5, 8, 8]], np.uint32), np.array([3, 2], np.int32),
                     np.array([-1, 40], np.int32), precision=3)


def is_usable(cdf, slots, offset, precision):
    "The rules of IndexedTables, one loop at a time."
    for row, n, first in zip(cdf.tolist(), slots.tolist(), offset.tolist()):
        if not 2 <= n < len(row) or row[0] != 0 or any(v != 2 ** precision for v in row[n:]): return False
        if any(b <= a for a, b in zip(row[:n], row[1: n + 1])) or first + n > 2 ** 31 - 1: return False
    return True


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.sampled_from(("cdf", "slots", "offset", "precision")), st.integers(0, 7),
       st.one_of(st.integers(0, 9), st.sampled_from((2 ** 31 - 1, 2 ** 31 - 3, 2 ** 32 - 1))))
def test_validate_accepts_what_is_usable_and_nothing_else(name, position, value):
    parts = dict(cdf=GOOD.cdf.copy(), slots=GOOD.slots.copy(), offset=GOOD.offset.copy(), precision=GOOD.precision)
    if name == "precision": parts[name] = value if value < 17 else 3
    else: parts[name].flat[position % parts[name].size] = min(value, np.iinfo(parts[name].dtype).max)
    tables = IndexedTables(**parts)
    if 1 <= parts["precision"] and is_usable(**parts): assert tables.validate() is tables
    else:
        with pytest.raises(TableError): tables.validate()


@pytest.mark.parametrize("change", (
    dict(precision=0), dict(precision=17), dict(precision=3.0), dict(precision=np.int64(3)), dict(slots=[3, 2]),
    dict(cdf=GOOD.cdf.astype(np.int32)), dict(slots=GOOD.slots.astype(np.int64)), dict(cdf=GOOD.cdf.ravel()),
    dict(offset=GOOD.offset.astype(float)),
    dict(offset=GOOD.offset[:1]), dict(slots=GOOD.slots[:, None]), dict(cdf=None),
    dict(cdf=np.array([[0, 1, 7, 8], [0, 8, 8, 8]], np.uint32), slots=np.array([3, 1], np.int32)),
    dict(cdf=np.zeros((0, 4), np.uint32), slots=GOOD.slots[:0], offset=GOOD.offset[:0]),
), ids=str)
def test_validate_refuses_the_wrong_kind(change):
    with pytest.raises(TableError):
        dataclasses.replace(GOOD, **change).validate()


# ---------------------------------------------------------------------------------------------- tables of densities


@fewer
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=4), st.sampled_from(DENSITIES), st.integers(1, 16))
@example([256.0], "logistic", 14)
@example([256.0], "test-cauchy", 14)
@example([0.11], "test-cauchy", 14)
@example([1e6], "gaussian", 16)
@example([256.0], "gaussian", 8)
@example([0.11], "gaussian", 1)
def test_scale_tables(scales, density, precision):
    tables, cdf = scale_tables(np.array(scales), density, precision), get_density(density)
    check_rows(tables)
    assert (tables.offset == -(tables.slots - 2) // 2).all()  # symmetric about 0
    for r, scale in enumerate(scales):
        reach = -int(tables.offset[r])
        full = 2 * (reach + 1) + 2 > 2 ** precision

        def p(v): return float(cdf(torch.tensor((0.5 - v) / scale, dtype=torch.float64))  # noqa: B023
                               - cdf(torch.tensor((-0.5 - v) / scale, dtype=torch.float64)))  # noqa: B023
        assert full or p(reach + 1) < 0.25 * 2.0 ** -precision  # the row reaches as far as it should
        assert reach == 0 or p(reach) >= 0.25 * 2.0 ** -precision


@pytest.mark.parametrize("density", DENSITIES)
def test_the_default_tables_cost_little_and_their_escapes_are_right(density):
    grid, cdf = scale_grid(), get_density(density)
    tables = scale_tables(grid, density)
    check_rows(tables)
    for r in (0, 10, 30, 50, 70, 95):
        v = torch.arange(tables.offset[r], -tables.offset[r] + 1, dtype=torch.float64).abs()
        p = (cdf((0.5 - v) / grid[r]) - cdf((-0.5 - v) / grid[r])).numpy()
        beyond = 2 * float(cdf(torch.tensor((tables.offset[r] - 0.5) / grid[r], dtype=torch.float64)))
        p = np.append(p, beyond)
        assert abs(p.sum() - 1) < 1e-9
        f = tables.probability(r)
        divergence = float((p * np.log2(p / f)).sum())
        entropy = float(-(p * np.log2(p)).sum())
        assert -1e-12 <= divergence <= 1.5e-4 + 0.006 * entropy
        assert f[-1] == 2.0 ** -14 or abs(f[-1] / beyond - 1) < 0.25
        mirrored = f[:-1][::-1]
        assert np.abs(f[:-1] - mirrored).max() <= 2.0 ** -14 * 1.01  # symmetric up to one unit


def test_the_nearest_scale_is_chosen():
    grid = scale_grid(0.11, 256, 96)
    scales = np.geomspace(0.01, 1000, 5000)
    index = np.searchsorted(scale_thresholds(grid), scales, side="right")
    assert (index == np.abs(np.log(scales)[:, None] - np.log(grid)).argmin(1)).all()


@pytest.mark.parametrize("make", (
    lambda: scale_grid(0), lambda: scale_grid(2, 1), lambda: scale_grid(levels=1), lambda: scale_tables(np.array([])),
    lambda: scale_tables(np.array([0.0])), lambda: scale_tables(np.array([1.0, math.nan])),
    lambda: scale_tables(scale_grid(), precision=0), lambda: factorized_tables(FactorizedDensity(1), precision=17),
))
def test_table_makers_refuse(make):
    with pytest.raises(TableError):
        make()


def random_density(channels, seed, spread):
    density = FactorizedDensity(channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in density.parameters(): p.copy_(spread * torch.randn(p.shape, generator=generator))
    return density


@fewer
@given(st.integers(0, 10 ** 6), st.sampled_from((0.1, 1.0, 3.0, 10.0, 300.0)), st.integers(1, 16))
def test_factorized_tables(seed, spread, precision):
    density = random_density(4, seed, spread)
    tables = factorized_tables(density, precision)
    check_rows(tables)
    assert (tables.offset >= -1023).all() and (tables.offset + tables.slots - 2 <= 1023).all()
    z = torch.arange(-1023.0, 1024, dtype=torch.float64).expand(1, 4, 1, -1)
    with torch.no_grad(): p = density.double()(z)[0, :, 0]
    for c in range(4):
        first, last = tables.offset[c] + 1023, tables.offset[c] + tables.slots[c] - 2 + 1023
        outside = np.delete(p[c].numpy(), np.s_[first: last + 1])
        if tables.slots[c] < 2 ** precision: assert outside.max(initial=0) < 0.25 * 2.0 ** -precision + 1e-9
        most = int(p[c].argmax())
        if p[c, most] > 2.0 ** -precision: assert first <= most <= last


def test_factorized_tables_refuse_a_broken_density():
    density = FactorizedDensity(2)
    with torch.no_grad(): density.b_1[1] = math.nan
    with pytest.raises(TableError):
        factorized_tables(density)


def test_all_tables_of_a_model_are_quick():
    density = random_density(320, 0, 0.5)
    start = time.process_time()
    scale_tables(scale_grid())
    factorized_tables(density)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------- likelihoods


def exact_gaussian(distance, scale):
    return (math.erfc((distance - 0.5) / scale / 2 ** 0.5) - math.erfc((distance + 0.5) / scale / 2 ** 0.5)) / 2


def exact_logistic(distance, scale):
    a, b = (distance - 0.5) / scale, (distance + 0.5) / scale
    return math.exp(-a) / (1 + math.exp(-a)) - math.exp(-b) / (1 + math.exp(-b))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(-2000, 2000), st.floats(-20, 20, width=32), st.floats(0.109375, 256, width=32),
       st.sampled_from((("gaussian", exact_gaussian), ("logistic", exact_logistic))))
def test_interval_likelihood(y, mean, scale, density):
    name, exact = density
    distance = abs(float(np.float32(y) - np.float32(mean)))  # what float32 keeps of the symbol and its mean
    p = interval_likelihood(torch.tensor(float(y)), torch.tensor(mean), torch.tensor(scale), get_density(name)).item()
    try: target = exact(distance, scale)
    except OverflowError: target = 0.0
    assert p >= 0.999 * LIKELIHOOD_FLOOR
    assert abs(p - max(target, LIKELIHOOD_FLOOR)) <= 2e-4 * target + 1e-13 + (3e-7 if target > 1e-4 else 0)


@fewer
@given(st.integers(0, 10 ** 6), st.sampled_from((0.1, 1.0, 5.0)))
def test_factorized_density_adds_up_and_keeps_its_tails_in_float32(seed, spread):
    density = random_density(3, seed, spread).double()
    z = torch.arange(-40.0, 41, dtype=torch.float64)
    with torch.no_grad():
        p = density(z.expand(1, 3, 1, -1))[0, :, 0]
        c = torch.sigmoid(density.cdf_logits(torch.tensor([-40.5, 40.5], dtype=torch.float64).expand(3, 1, -1)))[:, 0]
        in_float32 = density.float()(z.float().expand(1, 3, 1, -1))[0, :, 0]
    assert (p >= LIKELIHOOD_FLOOR).all()
    torch.testing.assert_close(p.sum(1), c[:, 1] - c[:, 0], rtol=0, atol=1e-6)
    likely = (p > 1e-8) & (spread <= 1)  # both tails included; steep layers would cancel digits of their own
    torch.testing.assert_close(in_float32.double()[likely], p[likely], rtol=0.02, atol=0)


def test_a_symmetric_density_prices_its_middle():
    density = FactorizedDensity(2)
    for k in range(4): torch.nn.init.zeros_(getattr(density, f"b_{k}"))
    with torch.no_grad(): p = density(torch.tensor([-1.0, 0.0, 1.0]).expand(1, 2, 1, 3))[0, :, 0]
    assert (p[:, 1] > p[:, 0]).all() and torch.allclose(p[:, 0], p[:, 2]) and (p[:, 1] > 0.01).all()
    check_rows(factorized_tables(density))


# ---------------------------------------------------------------------------------------------- densities by name


@pytest.mark.parametrize("name, cdf", (
    ("gaussian", laplace_cdf), ("logistic", laplace_cdf),
    ("test-falls", lambda x: 1 - gaussian_cdf(x)), ("test-shifted", lambda x: gaussian_cdf(x - 1)),
    ("test-flat", lambda x: torch.full_like(x, 0.5)), ("test-sum", lambda x: x.sum()),
    ("test-nan", lambda x: x * math.nan), ("test-twice", lambda x: 2 * logistic_cdf(x)), ("test-number", lambda x: 1.0),
), ids=lambda v: v if isinstance(v, str) else "")
def test_register_density_refuses(name, cdf):
    with pytest.raises(ConfigError):
        register_density(name, cdf)
    if name in ("gaussian", "logistic"): assert get_density(name) in (gaussian_cdf, logistic_cdf)
    else:
        with pytest.raises(ConfigError): get_density(name)
