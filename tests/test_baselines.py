"""Baselines: real files, the quality that meets given bytes, and what is refused."""

import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from hific_nb.baselines import (BASELINES, Baseline, BaselineError, RateTable, get_baseline, list_baselines, match_bytes,
                                register_baseline)
from hific_nb.config import HificError
from hific_nb.data import read_image, sample_photo, sample_photo_path
from hific_nb.metrics import psnr

FORMATS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "jpegxl": "JXL"}


def needed(name):
    baseline = BASELINES[name]
    if not baseline.available: pytest.skip(f"{name} is not installed")
    return baseline


@pytest.fixture(scope="module")
def photo():
    return sample_photo("coffee").crop((180, 100, 340, 228))  # 160 x 128


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_files_of_the_format(name, photo):
    baseline = needed(name)
    last = (0, 0)
    for quality in (baseline.qualities[0], 40, 90):
        data = baseline.compress(photo, quality)
        assert baseline.compress(photo, quality) == data
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == FORMATS[name] and opened.size == photo.size
            assert np.array_equal(np.asarray(opened.convert("RGB")), np.asarray(baseline.decompress(data)))
        now = (len(data), psnr(photo, baseline.decompress(data)))
        assert now > last and now[1] > last[1]
        last = now
    assert last[1] > 35
    for side in ((1, 1), (17, 3)):
        tiny = photo.resize(side)
        assert baseline.decompress(baseline.compress(tiny, 50)).size == side


@pytest.mark.parametrize("name", FORMATS)
def test_metadata_do_not_count(name, photo):
    baseline = needed(name)
    tagged = photo.copy()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 200
    tagged.info.update(icc_profile=profile, exif=exif.tobytes(), comment=b"c" * 500, xmp=b"x" * 900)
    assert baseline.compress(tagged, 50) == baseline.compress(photo, 50)
    opened = Image.open(sample_photo_path("rocket"))  # a JPEG file object: JPEG XL would keep its bytes, JPEG its comment
    assert baseline.compress(opened, 30) == baseline.compress(read_image(sample_photo_path("rocket")), 30)
    assert baseline.compress(sample_photo_path("rocket"), 30) == baseline.compress(opened, 30)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_refused(name, photo):
    baseline = needed(name)
    for quality in (-1, 101, 50.5, "50", None):
        with pytest.raises(BaselineError, match="quality"): baseline.compress(photo, quality)
    for wrong in (photo.convert("RGBA"), b"no picture", "nowhere.png"):
        with pytest.raises(HificError): baseline.compress(wrong, 50)
    data = baseline.compress(photo, 50)
    other = BASELINES["webp" if name == "jpeg" else "jpeg"].compress(photo, 50)
    for wrong in (b"", b"text", data[: len(data) // 2], other):
        with pytest.raises(BaselineError) as caught: baseline.decompress(wrong)
        assert "\n" not in str(caught.value)


def test_sides_beyond_the_format():
    with pytest.raises(BaselineError, match="20000 x 1"): get_baseline("webp").compress(Image.new("RGB", (20000, 1)), 50)


def test_qualities_of_numpy(photo):
    baseline = needed("jpeg")
    assert baseline.compress(photo, np.int64(50)) == baseline.compress(photo, 50.0) == baseline.compress(photo, 50)
    for wrong in (True, 50.5, np.int64(0)):
        with pytest.raises(BaselineError, match="no quality"): baseline.compress(photo, wrong)


@pytest.mark.parametrize("name", FORMATS)
def test_match_against_all_qualities(name, photo):
    """Real encoders, with their flat places and dips: against the whole table, from a few encodings."""
    baseline = needed(name)
    small = photo.crop((0, 0, 64, 64))
    sizes = RateTable(baseline, small).build()
    assert list(sizes) == list(baseline.qualities)
    complete = RateTable(baseline, small)
    complete.build()
    for n_bytes in np.geomspace(min(sizes.values()), 0.9 * max(sizes.values()), 7).astype(int):
        want = max(q for q, size in sizes.items() if size <= n_bytes)
        exact = complete.match(int(n_bytes))
        assert exact.quality == want and exact.fits and exact.bytes == sizes[want] == len(exact.data)
        table = RateTable(baseline, small)
        quick = table.match(int(n_bytes))
        assert quick.fits and quick.bytes <= n_bytes and len(table.sizes) <= 9
        # a right crossing, if not the last one: the next quality does not fit
        index = baseline.qualities.index(quick.quality) + 1
        assert quick.quality == want or sizes[baseline.qualities[index]] > n_bytes
        near = complete.match(int(n_bytes), "nearest")
        assert abs(near.bytes - n_bytes) == min(abs(size - n_bytes) for size in sizes.values())
    least = complete.match(min(sizes.values()) - 1)
    assert not least.fits and least.quality == baseline.qualities[0]
    assert least.image.size == small.size and least.image is least.image


class Made:
    def __init__(self, sizes): self.sizes, self.qualities, self.calls = sizes, tuple(range(len(sizes))), []

    def compress(self, image, quality):
        self.calls.append(quality)
        return bytes(int(self.sizes[quality]))


def test_match_on_made_up_sizes():
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 64, 101):
        sizes = np.cumsum(rng.integers(0, 30, n)) + 20
        for limit in rng.integers(10, sizes[-1] + 20, 25):
            made = Made(sizes)
            match = RateTable(made, None).match(int(limit))
            fits = [q for q in range(n) if sizes[q] <= limit]
            assert match.quality == (fits[-1] if fits else 0) and match.fits == bool(fits)
            assert len(made.calls) == len(set(made.calls)) <= np.ceil(np.log2(n + 1)) + 2 + (not fits)
    dips = np.array([10, 20, 30, 40, 35, 33, 50, 60])  # the crossing of 36 is at 2 | 3, but 5 fits, too
    assert RateTable(Made(dips), None).match(36).quality == 5
    assert RateTable(Made(dips), None).match(34).quality == 5  # 4 does not fit, 5 is seen by looking ahead
    with pytest.raises(BaselineError): RateTable(Made(dips), None).match(0)
    with pytest.raises(BaselineError, match="nearest"): RateTable(Made(dips), None).match(5, "closest")


def test_a_table_uses_what_it_knows():
    made = Made(np.arange(1, 102) * 10)
    table = RateTable(made, None)
    assert table.build(range(0, 101, 10)).keys() == set(range(0, 101, 10))
    made.calls.clear()
    assert table.match(505).quality == 49 and len(made.calls) <= 4 + 2  # between 40 and 50 only, and two ahead
    made.calls.clear()
    assert table.match(505).quality == 49 and made.calls == []
    stopped = RateTable(made, None)
    assert len(stopped.build(stop=lambda: len(stopped.sizes) >= 5)) == 5
    assert max(np.diff(list(stopped.sizes))) < 64  # coarse to fine: it knows something everywhere
    kept = RateTable(Made(np.full(50, 1000)), None, memory=5000)
    kept.build()
    assert len(kept.sizes) == 50 and sum(map(len, kept._files.values())) <= 5000


def test_tables_from_several_threads(photo):
    table, before = RateTable("jpeg", photo), set(threading.enumerate())  # those of other tests' explorers may be among them
    with ThreadPoolExecutor(4) as pool:
        pool.submit(table.build)
        found = list(pool.map(lambda n: table.match(n).bytes, [2000, 3000, 4000] * 5))
    assert all(size <= n for size, n in zip(found, [2000, 3000, 4000] * 5))
    assert len(table.sizes) == 100 and set(threading.enumerate()) <= before


def test_match_bytes(photo):
    matches = match_bytes(photo, 2500)
    assert set(matches) == set(list_baselines())
    for name, match in matches.items():
        assert match.fits and match.bytes <= 2500 and match.baseline.name == name
        assert psnr(photo, match.image) > 20
    assert match_bytes(photo, 60, ["jpeg"])["jpeg"].fits is False


def test_registering(photo):
    grey = Baseline("grey", "Grey", ".jpg", lambda im, q: BASELINES["jpeg"].compress(im.convert("L").convert("RGB"), q),
                    BASELINES["jpeg"].decode, tuple(range(10, 91)), (50,))
    try:
        assert register_baseline(grey) is get_baseline("grey") and "grey" in list_baselines()
        with pytest.raises(BaselineError, match="replace"): register_baseline(grey)
        assert match_bytes(photo, 2000, ["grey"])["grey"].bytes <= 2000
    finally: BASELINES.pop("grey", None)
    for wrong in (dict(qualities=()), dict(qualities=(1, 2), defaults=(3,))):
        with pytest.raises(BaselineError): register_baseline(Baseline("x", "X", ".x", None, None, **wrong))
    with pytest.raises(BaselineError, match="jpeg"): get_baseline("jpg")


def test_a_baseline_that_is_not_installed():
    """In a process of its own, where the plugin cannot be imported: the others work, this one says what to type."""
    code = """
import sys
import hific_nb.baselines
assert not {"pillow_jxl", "matplotlib"} & set(sys.modules)
sys.modules["pillow_jxl"] = None
from hific_nb.baselines import BaselineError, get_baseline, list_baselines
assert list_baselines() == ["jpeg", "webp", "avif"], list_baselines()
assert "jpegxl" in list_baselines(available=False)
try: get_baseline("jpegxl")
except BaselineError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'hific_nb[baselines]'" in done.stdout


def test_on_kodak_at_equal_bytes(kodak):
    """What everybody knows: AVIF beats WebP beats JPEG in PSNR at equal bytes, and each really has these bytes."""
    for path in kodak[3:24:12]:
        image = read_image(path).crop((0, 0, 384, 256))
        matches = match_bytes(image, 3500, ["jpeg", "webp", "avif"])
        assert all(0.8 * 3500 < match.bytes <= 3500 for match in matches.values())
        values = [psnr(image, matches[name].image) for name in ("jpeg", "webp", "avif")]
        assert values == sorted(values) and values[2] > values[0] + 1
