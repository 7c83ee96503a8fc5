"""The metrics against independent implementations, on real photos, and what they must refuse."""

import io
import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio

from hific_nb.config import HificError
from hific_nb.data import image_to_tensor, read_image, sample_photo
from hific_nb.metrics import (InceptionFeatures, MetricError, bpp, frechet_distance, ideal_bits, image_metrics, kernel_distance,
                              ms_ssim, patches, psnr)


@pytest.fixture(scope="module")
def photo():
    return sample_photo("astronaut").crop((0, 0, 320, 256))


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return read_image(buffer.getvalue()), len(buffer.getvalue())


def reference_ms_ssim(a, b):
    """Wang, Simoncelli and Bovik 2003 in float64, channel by channel; sides must be multiples of 16."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    taps = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    taps /= taps.sum()

    def mean(x): return correlate1d(correlate1d(x, taps, 0), taps, 1)[5:-5, 5:-5]

    values = []
    for x, y in ((a[..., c], b[..., c]) for c in range(3)):
        value = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my = mean(x), mean(y)
            vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
            like = (2 * cov + 58.5225) / (vx + vy + 58.5225)
            if scale == 4: like = like * (2 * mx * my + 6.5025) / (mx * mx + my * my + 6.5025)
            value *= max(like.mean(), 0) ** weight
            h, w = (n // 2 for n in x.shape)
            x, y = (v.reshape(h, 2, w, 2).mean((1, 3)) for v in (x, y))
        values.append(value)
    return float(np.mean(values))


@pytest.mark.parametrize("quality", [2, 25, 95])
def test_against_other_implementations(photo, quality):
    pressed, _ = jpeg(photo, quality)
    a, b = np.asarray(photo), np.asarray(pressed)
    assert abs(psnr(photo, pressed) - peak_signal_noise_ratio(a, b, data_range=255)) < 1e-9
    assert abs(ms_ssim(photo, pressed) - reference_ms_ssim(photo, pressed)) < 1e-5


def test_on_kodak(kodak):
    for path in kodak[::8]:
        image = read_image(path)
        last = None
        for quality in (10, 50, 90):
            pressed, size = jpeg(image, quality)
            row = image_metrics(image, pressed, size)
            assert abs(row["ms_ssim"] - reference_ms_ssim(image, pressed)) < 1e-5
            assert abs(row["psnr"] - peak_signal_noise_ratio(np.asarray(image), np.asarray(pressed))) < 1e-9
            assert row["bpp"] == size * 8 / (768 * 512)
            if last: assert all(row[k] > last[k] for k in ("bpp", "psnr", "ms_ssim"))
            last = row


def test_inputs_agree(photo):
    """PIL images, uint8 tensors, floats of any width, single pictures and batches: one and the same number."""
    pressed, _ = jpeg(photo, 30)
    a, b = image_to_tensor(photo), image_to_tensor(pressed)
    for metric, within in ((psnr, 1e-5), (ms_ssim, 1e-6)):
        want = metric(photo, pressed)
        for other in ((a, b), (photo, b), (a[None], b[None]), (a / 255, b / 255), (a.double() / 255, pressed),
                      (torch.stack([a, b, a]), torch.stack([b, a, b]))):
            assert abs(metric(*other) - want) < within
        assert isinstance(want, float)
    assert abs(psnr(photo, (b / 255).half()) - psnr(photo, pressed)) < 0.01
    learned = (b / 255).requires_grad_()
    assert isinstance(psnr(a, learned), float) and learned.grad is None


def test_a_batch_is_the_mean_of_its_pictures(photo):
    a = image_to_tensor(photo)
    good, bad = image_to_tensor(jpeg(photo, 90)[0]), image_to_tensor(jpeg(photo, 5)[0])
    for metric in (psnr, ms_ssim):
        both = metric(torch.stack([a, a]), torch.stack([good, bad]))
        assert abs(both - (metric(a, good) + metric(a, bad)) / 2) < 1e-5
    assert psnr(torch.stack([a, a]), torch.stack([a, bad])) == math.inf


def test_known_values():
    flat = torch.full((3, 200, 200), 100, dtype=torch.uint8)
    assert psnr(flat, flat) == math.inf
    assert abs(psnr(flat, flat + 1) - 48.130803608679) < 1e-9
    assert abs(psnr(flat, flat + 100) - 20 * math.log10(2.55)) < 1e-9
    assert psnr(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)) == 0
    assert abs(ms_ssim(flat, flat) - 1) < 1e-6
    luminance = (2 * 100 * 110 + 6.5025) / (100**2 + 110**2 + 6.5025)  # flat pictures differ in luminance alone
    assert abs(ms_ssim(flat, flat + 10) - luminance**0.1333) < 1e-5  # float32 windows
    assert psnr(torch.full((3, 4, 4), -0.3), torch.zeros(3, 4, 4)) == math.inf  # clamped, as decoders do


@pytest.mark.parametrize("size, there", [((160, 300), False), ((300, 160), False), ((161, 161), True), ((1, 1), False)])
def test_ms_ssim_needs_room(size, there):
    x = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (ms_ssim(x, x) is not None) is there
    row = image_metrics(x, x ^ 1, 10)
    assert (row["ms_ssim"] is not None) is there and json.loads(json.dumps(row, allow_nan=False)) == row


def test_ms_ssim_of_opposites_is_zero(photo):
    x = image_to_tensor(photo)
    assert ms_ssim(x, 255 - x) == 0.0
    noise = torch.rand(3, 256, 320, generator=torch.Generator().manual_seed(0))
    value = ms_ssim(x, noise)
    assert 0 <= value < 0.3 and not math.isnan(value)


def test_what_is_refused(photo):
    x = image_to_tensor(photo)
    for wrong in ((x, x[:, :-1]), (x, x[None].expand(2, -1, -1, -1)), (x.float(), x.float()), (x / 255, x.float()),
                  (x.int(), x.int()), (x[0], x[0]), (x.permute(1, 2, 0), x.permute(1, 2, 0)), (np.asarray(photo),) * 2,
                  (x / 255 * float("nan"),) * 2, (x[:, :0], x[:, :0]), ("photo.png", "photo.png")):
        for metric in (psnr, ms_ssim, image_metrics):
            with pytest.raises(MetricError) as caught: metric(*wrong)
            assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(HificError, match="split_alpha"): psnr(photo.convert("RGBA"), photo)
    with pytest.raises(HificError, match="RGB"): psnr(photo.convert("L"), photo.convert("L"))
    assert issubclass(MetricError, ValueError)


def test_bpp():
    assert bpp(1000, 100, 80) == 1.0 and bpp(0, 1, 1) == 0.0
    for wrong in ((-1, 10, 10), (10, 0, 10), (10, 10, -1)):
        with pytest.raises(MetricError): bpp(*wrong)


def test_ideal_bits():
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    symbols = np.random.default_rng(1).choice(50, 20000, p=p)
    entropy = -(p * np.log2(p)).sum()
    assert abs(ideal_bits(p[symbols]) / 20000 - entropy) < 0.05
    assert abs(ideal_bits(torch.from_numpy(p[symbols]).reshape(100, 200)) - ideal_bits(p[symbols])) < 1e-6
    assert abs(ideal_bits([p[symbols[:7]], torch.from_numpy(p[symbols[7:]])]) - ideal_bits(p[symbols])) < 1e-6
    tiny = torch.full((1_000_000,), 0.9999, dtype=torch.float32)  # float32 sums of many small terms drift
    assert abs(ideal_bits(tiny) + 1e6 * math.log2(float(tiny[0]))) < 1e-6
    assert ideal_bits([]) == 0 and ideal_bits(torch.ones(3)) == 0
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(MetricError, match=r"\(0, 1\]"): ideal_bits(torch.tensor([0.5, wrong]))


def test_real_files_are_close_to_ideal():
    from hific_nb.coders import get_coder
    from hific_nb.entropy_models import tables_from_pmfs

    p = np.random.default_rng(0).dirichlet(np.full(40, 2.0))
    symbols = np.random.default_rng(1).choice(40, 50000, p=p).astype(np.int32)
    data = get_coder("rans").encode([(symbols, np.zeros(50000, np.int32), tables_from_pmfs([p], [0]))])
    ideal = ideal_bits(p[symbols]) / 8
    assert ideal * 0.999 < len(data) < ideal * 1.005 + 40


def test_image_metrics(photo):
    pressed, size = jpeg(photo, 60)
    row = image_metrics(photo, pressed, size)
    assert row == dict(width=320, height=256, bytes=size, bpp=bpp(size, 320, 256), psnr=psnr(photo, pressed),
                       ms_ssim=ms_ssim(photo, pressed), identical=False)
    copy = image_metrics(photo, photo)
    assert copy["identical"] and copy["psnr"] is None and copy["bpp"] is None and copy["bytes"] is None
    json.dumps(copy, allow_nan=False)
    with pytest.raises(MetricError, match="One picture"):
        image_metrics(*[image_to_tensor(photo).expand(2, -1, -1, -1)] * 2)


def test_patches_of_the_protocol():
    x = torch.randint(0, 256, (3, 700, 1100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cut = patches(x)
    assert cut.shape == (2 * 4 + 1 * 3, 3, 256, 256) and cut.dtype == torch.uint8
    assert torch.equal(cut[5], x[:, 256:512, 256:512]) and torch.equal(cut[8], x[:, 128:384, 128:384])
    assert torch.equal(cut[-1], x[:, 128:384, 640:896])
    for (h, w), n in {(256, 256): 1, (255, 999): 0, (512, 512): 5, (383, 640): 2, (512, 768): 8, (1024, 256): 4}.items():
        assert len(patches(x.new_zeros(3, h, w))) == n
    with pytest.raises(MetricError): patches(x / 255)
    with pytest.raises(MetricError): patches(x[None])


def test_frechet_distance_by_the_textbook():
    rng = np.random.default_rng(0)
    for n, m, d in ((400, 300, 20), (30, 40, 60), (20, 500, 60), (2, 2, 5)):  # also fewer samples than dimensions
        a = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
        b = rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
        sa, sb = np.cov(a.T), np.cov(b.T)
        # The root by eigenvalues of a symmetric product: sound also for singular covariances, unlike sqrtm.
        half = (lambda w, v: (v * np.sqrt(np.maximum(w, 0))) @ v.T)(*np.linalg.eigh(sa))
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ sb @ half), 0)).sum()
        want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb) - 2 * cross
        assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
        assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(want, rel=1e-6)
    a = rng.normal(size=(500, 6))
    assert np.trace(sqrtm(np.cov(a.T) @ np.cov(a.T)).real) == pytest.approx(np.trace(np.cov(a.T)))
    assert frechet_distance(a, a) < 1e-9
    turned = a @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(a @ np.diag([9, 1, 1, 1, 1, 1]), turned) > 10


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(0)
    values = [kernel_distance(*rng.normal(size=(2, 20, 16))) for _ in range(400)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    apart = [kernel_distance(rng.normal(size=(20, 16)), rng.normal(size=(20, 16)) + 0.7) for _ in range(400)]
    large = kernel_distance(rng.normal(size=(3000, 16)), rng.normal(size=(2500, 16)) + 0.7)  # in several pieces
    assert np.mean(apart) == pytest.approx(large, abs=4 * np.std(apart) / 20 + 0.02 * large)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    def k(x, y): return (x @ y / 3 + 1) ** 3
    want = (sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 20
            + sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 12
            - 2 * sum(k(x, y) for x in a for y in b) / 20)
    assert kernel_distance(a, b) == pytest.approx(want)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_set_distances_refuse(distance):
    a = np.ones((4, 3))
    for wrong in ((a, a[:, :2]), (a[:1], a), (a[0], a), (a, a * np.inf), (np.ones((4, 0)), np.ones((4, 0)))):
        with pytest.raises(MetricError): distance(*wrong)


def invented_inception():
    """Weights that follow from their names and places alone, under the names of the published file."""
    weights = {}
    state = InceptionFeatures().network.state_dict()
    for j, key in enumerate(sorted(k for k in state if not k.endswith("num_batches_tracked"))):
        i = np.arange(state[key].numel(), dtype=np.float64)
        w = np.cos(0.7 * i * (1 + 1e-3 * j) + 1.3 * j + (0.001 * i * i) % 6.283185307179586)
        if ".conv." in key: w *= 1.4 / np.sqrt(np.prod(state[key].shape[1:]))
        else: w = 0.1 * w + (key.split(".")[-1] in ("weight", "running_var"))
        weights[key] = torch.from_numpy(w.reshape(state[key].shape)).float()
    return weights


def test_inception_is_the_network_of_the_fid(tmp_path):
    """The figures are those of torch-fidelity 0.4.0's own network with the same weights and input (largest difference 6e-8)."""
    weights = invented_inception()
    file = tmp_path / "pt_inception.pth"
    torch.save({**weights, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, file)
    yy, xx = np.mgrid[:256, :256]
    image = np.stack([0.5 + 0.25 * np.cos(0.05 * (c + 1) * xx + 0.03 * yy * (3 - c))
                      + 0.25 * np.sin(0.11 * yy - 0.07 * xx * (c + 1)) for c in range(3)])
    features = InceptionFeatures(file)(torch.from_numpy(np.rint(image * 255).astype(np.uint8))[None])[0]
    assert features.shape == (2048,)
    assert features[::256].tolist() == pytest.approx([0.00717, 0.05714, 0.00263, 0.00665, 0, 0.001, 0.00592, 0], abs=2e-5)
    assert float(features.mean()) == pytest.approx(0.0578156, abs=1e-6)
    for broken, reason in ((dict(list(weights.items())[3:]), "lacks"), ({}, "lacks"), ({"a": 1}, "does not hold")):
        torch.save(broken, file)
        with pytest.raises(MetricError, match=reason): InceptionFeatures(file)
    file.write_bytes(b"text")
    with pytest.raises(MetricError, match="get it again"): InceptionFeatures(file)
