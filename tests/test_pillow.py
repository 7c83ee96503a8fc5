"""`.hfc` as one of Pillow's formats: opened lazily, saved from every mode, broken files, threads, other programs' habits."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

import hific_nb.pillow as plugin
from hific_nb.codec import Codec
from hific_nb.config import HificError
from hific_nb.data import ImageError, PhotoCrops, find_images, open_dataset, read_image, sample_photo, shard_members, write_shard
from hific_nb.hfc import HfcReader
from hific_nb.model import load_model

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def codec():
    codec = Codec(load_model(GOLDEN / "levels"), name="levels", device="cpu")
    plugin.use_codec(codec)
    yield codec
    plugin._CODECS.clear()


@pytest.fixture(scope="module")
def cup(): return sample_photo("coffee").resize((150, 100))


def packed(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "HFC", **options)
    return buffer.getvalue()


def opened(image, **options): return Image.open(io.BytesIO(packed(image, **options)))


def test_nothing_heavy_is_imported_and_nothing_decoded(tmp_path, cup, codec):
    cup.save(tmp_path / "a.hfc", model=codec)
    said = subprocess.run([sys.executable, "-X", "importtime", "-c", f"""
import sys, hific_nb.pillow
from PIL import Image
im = Image.open({str(tmp_path / 'a.hfc')!r})
im.verify()
print(im.size, im.mode, im.info["fingerprint"], [m for m in ("torch", "numpy", "numba", "fsspec") if m in sys.modules])
"""], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"(150, 100) RGB {codec.fingerprint.hex()} []"


def test_open_reads_the_first_section_alone(cup, codec):
    """Of a file with tiles: a damaged tile is noticed when it is read, and not before."""
    data = packed(cup, model=codec, tile=64)
    head = len(data) - sum(len(t.payload) for t in HfcReader(io.BytesIO(data)).whole().tiles)

    class Counting(io.BytesIO):
        most = 0
        def read(self, n=-1):
            piece = super().read(n)
            self.most = max(self.most, self.tell())
            return piece

    file = Counting(data)
    image = Image.open(file, formats=["HFC"])  # other plugins may read on to see whether a file is theirs
    assert image.size == (150, 100) and image.info["tile"] == 64 and file.most <= max(head, 64)
    assert image.info["bytes"] == len(data) and image.info["bpp"] == 8 * len(data) / 15_000
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    for action in ("load", "verify"):
        with pytest.raises(plugin.HfcImageError, match="checksum of tile 5"): getattr(Image.open(io.BytesIO(damaged)), action)()


def test_info_says_what_the_file_says(cup, codec):
    info = opened(cup, model=codec, quality=100).info
    assert info["level"] == codec.levels - 1 and info["model"] is None and info["version"] == 1 and info["tile"] is None
    shipped = opened(cup).info
    assert shipped["model"] == Codec.from_pretrained("hific-lite", device="cpu").name and "icc_profile" not in shipped


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB",
                                  "I", "I;16", "I;16B", "F"])
def test_every_mode_is_what_the_data_room_makes_of_it(mode, cup, codec):
    small = cup.resize((40, 30))
    with_alpha = small.copy()
    with_alpha.putalpha(Image.linear_gradient("L").resize((40, 30)))
    if mode == "LAB":
        spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(small, *spaces, outputMode="LAB")
    elif mode in ("RGBA", "LA", "PA"): image = with_alpha.convert(mode)
    elif mode in ("RGBa", "La"): image = with_alpha.convert(mode[:-1] + "A").convert(mode)
    elif mode == "I;16": image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    elif mode == "I;16B": image = Image.frombytes("I;16B", (40, 30), (np.asarray(small.convert("L")).astype(">u2") * 257).tobytes())
    else: image = small.convert(mode)
    assert image.mode == mode
    before = image.tobytes()
    again, wanted = opened(image, model=codec), read_image(image)
    assert again.mode == wanted.mode == ("RGBA" if mode[-1] in "Aa" else "RGB") and again.size == (40, 30)
    assert np.array_equal(again, codec.reconstruct(wanted)) and image.tobytes() == before
    if wanted.mode == "RGBA": assert np.array_equal(again.getchannel("A"), wanted.getchannel("A"))


def test_profiles(cup, codec):
    """An RGB profile is kept beside untouched pixels, any other is applied; the image that is saved stays as it is."""
    image, profile = cup.copy(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = profile
    again = opened(image, model=codec)
    assert again.info["icc_profile"] == profile and np.array_equal(again, codec.reconstruct(cup))
    assert "icc_profile" not in opened(image, model=codec, icc_profile=None).info and image.info["icc_profile"] == profile
    assert opened(cup, model=codec, icc_profile=profile).info["icc_profile"] == profile and "icc_profile" not in cup.info
    buffer = io.BytesIO()
    again.save(buffer, "PNG")  # and goes on to the next format
    assert Image.open(buffer).info["icc_profile"] == profile
    assert "icc_profile" not in opened(image.convert("L"), model=codec).info


def test_pictures_are_upright_and_turned_once(cup, codec):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "me"
    buffer = io.BytesIO()
    cup.save(buffer, "PNG", exif=exif)
    lying = Image.open(buffer)
    again = opened(lying, model=codec, exif=lying.getexif(), xmp="<x/>")
    assert again.size == (100, 150) and again.getexif()[ExifTags.Base.Artist] == "me" and again.info["xmp"] == b"<x/>"
    assert ImageOps.exif_transpose(again).size == read_image(again).size == (100, 150)
    raw = codec.compress(cup, streams={"exif": exif.tobytes()})  # of a writer that left the tag in
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).size == (150, 100)
    assert opened(cup, model=codec, exif=b"no Exif at all").info["exif"] == b"no Exif at all"


def test_rates(cup, codec):
    sizes = [len(packed(cup, model=codec, quality=q)) for q in (0, 50, 100)]
    assert sizes == [len(codec.compress(cup, quality=q)) for q in (0, 50, 100)]
    most = (sizes[0] + sizes[2]) // 2
    assert len(packed(cup, model=codec, max_bytes=most)) <= most
    assert packed(cup, model=codec, bpp=8 * most / 15_000) == codec.compress(cup, bpp=8 * most / 15_000)
    assert packed(cup, model=codec, optimize=True, subsampling=0) == codec.compress(cup)  # of other formats
    assert packed(cup, model=GOLDEN / "levels", quality=50) == packed(cup, model=codec, quality=50)


def test_what_saving_refuses(tmp_path, cup, codec):
    for wrong, said in ((dict(quality=101), "0 ... 100"), (dict(quality=1, bpp=1.0), "one of"), (dict(tile=63), "64"),
                        (dict(max_bytes=9), "max_bytes")):
        with pytest.raises(plugin.HfcImageError, match=said): cup.save(tmp_path / "a.hfc", model=codec, **wrong)
    with pytest.raises(plugin.HfcImageError, match="no-such-model"): cup.save(tmp_path / "a.hfc", model="no-such-model")
    assert not (tmp_path / "a.hfc").exists()
    with pytest.raises(OSError, match="values from"): packed(Image.new("F", (3, 3), -1.0), model=codec)


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.glob("*.hfc")))
def test_golden_files_open(name):
    data = (GOLDEN / name).read_bytes()
    file = HfcReader(io.BytesIO(data)).file
    image = Image.open(GOLDEN / name)
    assert image.size == (file.width, file.height) and image.mode == ("RGB" if file.alpha is None else "RGBA")
    assert image.format == "HFC" and image.get_format_mimetype() == "image/x-hfc" and image.filename
    assert image.info["fingerprint"] == file.fingerprint.hex() and image.info["level"] == file.level
    image.verify()


def test_damage_is_an_oserror_that_speaks(cup, codec):
    """Cut anywhere, or with any bit changed: our sentence in Pillow's kind of error, or the file is not ours at all."""
    data = packed(cup.resize((20, 20)), model=codec)
    seen = set()
    for i in range(0, len(data), 3):
        for damaged in (data[:i], data[:i] + bytes([data[i] ^ 64]) + data[i + 1:]):
            with pytest.raises(OSError) as caught: Image.open(io.BytesIO(damaged)).load()
            unknown = isinstance(caught.value, UnidentifiedImageError)
            assert unknown == (not damaged.startswith(b"\x89HF")), (i, caught.value)
            assert unknown or isinstance(caught.value, HificError)
            seen.add(type(caught.value))
            with pytest.raises(ImageError): read_image(damaged)
    assert len(seen) == 2
    with pytest.raises(plugin.HfcImageError, match="goes on after its end"): Image.open(io.BytesIO(data + b"x")).load()


def test_pillows_limit_holds(cup, codec, monkeypatch):
    data = packed(cup, model=codec)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.warns(Image.DecompressionBombWarning): Image.open(io.BytesIO(data))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(Image.DecompressionBombError): Image.open(io.BytesIO(data))
    with pytest.raises(ImageError, match="max_pixels"): read_image(data, max_pixels=14_999)
    assert read_image(data, max_pixels=15_000).size == (150, 100)


def test_an_unknown_model_is_named(cup, codec):
    data = packed(cup, model=codec)
    plugin._CODECS.pop(codec.fingerprint)
    try:
        with pytest.raises(plugin.HfcImageError, match=f"{codec.fingerprint.hex()}.*use_codec"): Image.open(io.BytesIO(data)).load()
    finally: plugin.use_codec(codec)
    Image.open(io.BytesIO(data)).load()


def test_models_are_loaded_once(cup, monkeypatch):
    """By their name, by a file that needs them, and by eight threads at once."""
    plugin._CODECS.pop(bytes.fromhex(opened(cup).info["fingerprint"]))
    made, real = [], Codec.from_pretrained.__func__

    def counting(cls, name, *rest, **options):
        made.append(name)
        return real(cls, name, *rest, **options)
    monkeypatch.setattr(Codec, "from_pretrained", classmethod(counting))
    start = threading.Barrier(8)

    def work(k):
        start.wait()
        return np.asarray(opened(cup.resize((40 + k, 30))))
    with ThreadPoolExecutor(8) as pool: shapes = [a.shape for a in pool.map(work, range(8))]
    assert shapes == [(30, 40 + k, 3) for k in range(8)] and len(made) == 1


def test_threads_share_an_image(cup, codec, monkeypatch):
    image, decoded, real = opened(cup, model=codec), [], Codec.decompress
    monkeypatch.setattr(Codec, "decompress", lambda self, *a, **o: (decoded.append(1), real(self, *a, **o))[1])
    with ThreadPoolExecutor(6) as pool: pixels = list(pool.map(lambda _: np.asarray(image), range(6)))
    assert len(decoded) == 1 and all(np.array_equal(p, pixels[0]) for p in pixels)


def test_alpha_and_limits_do_not_deadlock(cup, codec):
    """Room 01 holds a lock while Pillow's settings are changed, decoding alpha takes it again: in any order."""
    glass = cup.copy()
    glass.putalpha(Image.linear_gradient("L").resize(cup.size))
    data = packed(glass, model=codec)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(lambda: Image.open(io.BytesIO(data)).copy()) for _ in range(6)]
        jobs += [pool.submit(read_image, data, 20_000) for _ in range(6)]
        modes = {job.result(timeout=60).mode for job in jobs}
    assert modes == {"RGBA"}


def test_habits_of_programs(tmp_path, cup, codec):
    path = tmp_path / "a.HFC"
    cup.save(path, model=codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(path) as image: copied = image.copy()
        with open(path, "rb") as file: crop = Image.open(file, formats=("HFC",)).crop((10, 10, 60, 50))
        thumb = Image.open(path)
        thumb.thumbnail((50, 50))
        assert pickle.loads(pickle.dumps(Image.open(path))).tobytes() == copied.tobytes()
        assert copy.deepcopy(copied) == copied and Image.open(path).convert("L").size == (150, 100)
    assert crop.tobytes() == copied.crop((10, 10, 60, 50)).tobytes() and thumb.size == (50, 33)
    with Image.open(path) as image: pass
    with pytest.raises((OSError, ValueError)): image.load()  # closed before
    seen = [Image.open(path).getpixel((3, 3)) for _ in range(20)]
    assert len(set(seen)) == 1 and len(os.listdir("/proc/self/fd")) < 200
    loaded = Image.open(path)
    loaded.save(path, model=codec)  # onto itself
    assert Image.open(path).size == (150, 100)

    class Pipe(io.RawIOBase):  # neither read nor seek
        got = b""
        def writable(self): return True
        def write(self, data): self.got += bytes(data); return len(data)
    pipe = Pipe()
    cup.save(pipe, "hfc", model=codec)
    assert pipe.got == codec.compress(cup)
    parser = ImageFile.Parser()  # of what comes over a network, piece by piece
    for start in range(0, len(pipe.got), 50): parser.feed(pipe.got[start:start + 50])
    assert parser.close().tobytes() == copied.tobytes()


def test_a_thumbnail_is_taken_from_the_file(cup, codec, monkeypatch):
    large = cup.resize((1500, 1000))
    data, sizes, decode = packed(large, model=codec, tile=512), [], Codec._decode
    monkeypatch.setattr(Codec, "_decode", lambda self, file, *rest: (sizes.append(file.width), decode(self, file, *rest))[1])
    image = Image.open(io.BytesIO(data))
    image.thumbnail((12, 12))
    assert image.size == (12, 8) and image.mode == "RGB" and len(sizes) == 1 and sizes[0] < 60
    small = Image.open(io.BytesIO(data))
    assert small.draft("RGB", (24, 24)) == ("RGB", (0, 0, *small.size)) and small.info["bytes"] == len(data)
    assert np.array_equal(small, codec.decompress(data, thumbnail=True))
    assert Image.open(io.BytesIO(data)).draft("RGB", (1000, 1000)) is None and opened(cup, model=codec).draft("RGB", (9, 9)) is None


def test_folders_and_shards_of_hfc(tmp_path, cup, codec):
    for k in range(3): cup.rotate(90 * k, expand=True).save(tmp_path / f"{k}.hfc", model=codec)
    paths = find_images(tmp_path)
    assert [p.name for p in paths] == ["0.hfc", "1.hfc", "2.hfc"]
    assert np.array_equal(read_image(paths[0]), codec.decompress(paths[0]))
    crops = PhotoCrops(paths, 64, 4)
    assert crops.batch(0).shape == (4, 3, 64, 64) and len(crops) == 3
    shard = write_shard(tmp_path / "a.tar", [(p.name, p.read_bytes()) for p in paths])
    assert [m[0] for m in shard_members(shard)] == ["0.hfc", "1.hfc", "2.hfc"]
    assert open_dataset(str(shard), 64, 3, held_back_every=0).batch(0).shape == (3, 3, 64, 64)


def test_without_the_import_the_data_room_names_it(tmp_path, cup, codec):
    cup.save(tmp_path / "a.hfc", model=codec)
    said = subprocess.run([sys.executable, "-c", f"""
from hific_nb.data import ImageError, find_images, read_image
for call in (find_images, lambda folder: read_image(folder + "/a.hfc")):
    try: call({str(tmp_path)!r})
    except ImageError as error: print(error)
"""], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2 and all("import hific_nb.pillow first" in line for line in said)
