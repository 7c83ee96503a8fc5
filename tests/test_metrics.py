"""The metrics against independent implementations, on real photos, and what they must refuse."""

import io
import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio

from hific_nb.config import HificError
from hific_nb.data import find_images, image_to_tensor, read_image, sample_photo
from hific_nb.metrics import MetricError, bpp, ideal_bits, image_metrics, ms_ssim, psnr


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


def test_on_kodak(shared):
    for path in find_images(shared / "data" / "kodak")[::8]:
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
