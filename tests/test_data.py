"""Reading photos: real files of every kind that cameras, scanners, print shops and the web produce, and broken ones."""

import csv
import gc
import io
import os
import pickle
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webserver
from PIL import Image, ImageCms, ImageFile

from hific_nb.config import HificError
from hific_nb.data import (
    SAMPLE_PHOTOS,
    ImageError,
    PhotoCrops,
    Prefetch,
    ShardCrops,
    expand_braces,
    find_images,
    find_shards,
    holdout_split,
    image_extensions,
    image_to_tensor,
    open_dataset,
    photo_fault,
    read_image,
    sample_photo,
    sample_photo_path,
    shard_members,
    split_alpha,
    tensor_to_image,
    write_shard,
)

web = webserver.web  # the fixture
pytestmark = pytest.mark.filterwarnings("error")  # a warning is part of the behaviour: tests that expect one say so
NO_AVIF = "this Pillow has no AVIF: pip install 'pillow>=11.3'"
HAS_AVIF = ".avif" in Image.registered_extensions()
AVIF = pytest.mark.skipif(not HAS_AVIF, reason=NO_AVIF)


@pytest.fixture(scope="module")
def photo():
    return sample_photo("chelsea").resize((96, 64), Image.Resampling.LANCZOS)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gap(a, b):
    a, b = np.asarray(a).astype(int), np.asarray(b).astype(int)
    assert a.shape == b.shape
    return abs(a - b)


def same(a, b):
    return a.mode == b.mode and a.size == b.size and not gap(a, b).any()


def png(depth, colour, rows, **chunks):
    """A PNG of any bit depth and colour type, written by hand; `rows` are packed bytes."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = len(rows[0]) * 8 // (depth * channels)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    for kind, data in chunks.items():
        out += chunk(kind.encode(), data)
    return out + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows))) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------ colour profiles

P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def xyz(values):
    return b"XYZ " + bytes(4) + fixed(*values)


def icc(space, tags, version=0x04300000, kind=b"mntr", pcs=b"XYZ "):
    head, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        head += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), version, kind, space, pcs, b"acsp")
    return (header + bytes(28) + fixed(*D50)).ljust(128, b"\0") + head + body


def display_p3():
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"wtpt": xyz(D50)}
    for name, column in zip((b"r", b"g", b"b"), P3):
        tags |= {name + b"XYZ": xyz(column), name + b"TRC": curve}
    return icc(b"RGB ", tags)


def linear_grey():
    return icc(b"GRAY", {b"wtpt": xyz(D50), b"kTRC": b"curv" + struct.pack(">IIH", 0, 1, 256)})  # gamma 1


def odd_inks():
    """A CMYK profile whose cyan ink prints red and whose magenta ink prints green: no plain formula gets it right."""
    inks = {(0, 0, 0, 0): (255, 255, 255), (1, 0, 0, 0): (200, 30, 30), (0, 1, 0, 0): (30, 150, 60)}
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    clut = b""
    for corner in np.ndindex(2, 2, 2, 2):
        colour = ImageCms.applyTransform(Image.new("RGB", (1, 1), inks.get(corner, (20, 20, 20))), lab)
        clut += bytes(colour.getpixel((0, 0)))
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + clut + ramp * 3
    return icc(b"CMYK", {b"wtpt": xyz(D50), b"A2B0": lut, b"A2B1": lut}, 0x02400000, b"prtr", b"Lab ")


def test_display_p3_becomes_srgb(photo):
    p3 = display_p3()
    got = read_image(saved(Image.new("RGB", (4, 4), (234, 51, 35)), icc_profile=p3))
    assert gap(got, Image.new("RGB", (4, 4), (255, 0, 0))).max() <= 2  # sRGB red in P3 numbers
    assert gap(read_image(saved(Image.new("RGB", (4, 4), (128, 128, 128)), icc_profile=p3)), got).max() > 100
    grey = read_image(saved(Image.new("RGB", (4, 4), (77, 77, 77)), icc_profile=p3))
    assert gap(grey, Image.new("RGB", (4, 4), (77, 77, 77))).max() <= 1  # equal numbers are grey in both spaces
    assert gap(read_image(saved(photo, icc_profile=p3)), photo).mean() > 1


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_profile_of_every_container(photo, kind, options):
    as_png = read_image(saved(photo, icc_profile=display_p3()))
    assert same(read_image(saved(photo, kind, icc_profile=display_p3(), **options)), as_png)


def test_alpha_is_not_colour_managed(photo):
    alpha = Image.linear_gradient("L").resize(photo.size)
    rgba = photo.copy()
    rgba.putalpha(alpha)
    got = read_image(saved(rgba, icc_profile=display_p3()))
    colour, kept = split_alpha(got)
    assert got.mode == "RGBA" and same(kept, alpha)
    assert same(colour, read_image(saved(photo, icc_profile=display_p3())))


def test_srgb_by_any_name_leaves_pixels_alone(photo):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert same(read_image(saved(photo, icc_profile=profile)), photo)
    # As cameras write it: the curve as a table, nearly sRGB's. A plain conversion moves some values by 1.
    x = np.arange(1024) / 1023
    table = np.rint(65535 * np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.42)).astype(">u2").tobytes()
    tags = {b"wtpt": xyz((0.95045, 1.0, 1.08905))}
    primaries = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
    for name, column in zip((b"r", b"g", b"b"), primaries):
        tags |= {name + b"XYZ": xyz(column), name + b"TRC": b"curv" + struct.pack(">II", 0, 1024) + table}
    camera = icc(b"RGB ", tags, 0x02100000)
    converted = ImageCms.profileToProfile(photo, ImageCms.getOpenProfile(io.BytesIO(camera)),
                                          ImageCms.createProfile("sRGB"), outputMode="RGB", renderingIntent=1)
    assert gap(converted, photo).max() == 1  # what a plain conversion would do
    assert same(read_image(saved(photo, icc_profile=camera)), photo)


def test_grey_profiles():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    got = np.asarray(read_image(saved(grey, icc_profile=linear_grey())))
    light = np.arange(256) / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert abs(got.reshape(256, 3) - srgb[:, None]).max() <= 1
    p3 = read_image(saved(grey, icc_profile=display_p3()))  # an RGB profile on grey pixels: common, and no error
    assert gap(p3, grey.convert("RGB")).max() <= 1
    alpha = Image.new("L", grey.size, 9)
    got = read_image(saved(Image.merge("LA", (grey, alpha)), icc_profile=linear_grey()))
    assert gap(got.getchannel("G"), Image.fromarray(srgb.round().astype(np.uint8).reshape(16, 16))).max() <= 1
    assert same(got.getchannel("A"), alpha)


@pytest.mark.parametrize("kind, options", [("TIFF", {}), ("JPEG", {"quality": 100})])
def test_cmyk_profile(kind, options):
    inks = Image.new("CMYK", (48, 16))
    inks.paste((255, 0, 0, 0), (16, 0, 32, 16))
    inks.paste((0, 255, 0, 0), (32, 0, 48, 16))
    got = read_image(saved(inks, kind, icc_profile=odd_inks(), **options))
    for x, colour in ((8, (255, 255, 255)), (24, (200, 30, 30)), (40, (30, 150, 60))):
        assert max(abs(a - b) for a, b in zip(got.getpixel((x, 8)), colour)) <= 6, (x, got.getpixel((x, 8)))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_without_profile_is_not_inverted(photo, kind):
    options = {"quality": 95} if kind == "JPEG" else {}
    assert gap(read_image(saved(photo.convert("CMYK"), kind, **options)), photo).mean() < 4


def test_lab_and_ycbcr(photo):
    change = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(photo, change)
    for source in (lab, saved(lab, "TIFF")):
        assert gap(read_image(source), photo).mean() < 1 and gap(read_image(source), photo).max() < 12
    for source in (photo.convert("YCbCr"), saved(photo.convert("YCbCr"), "TIFF")):
        assert gap(read_image(source), photo).max() <= 3
    assert gap(read_image(photo.convert("HSV")), photo).max() <= 12


def test_palette_with_profile(photo):
    palette = photo.quantize(64)
    want = read_image(saved(palette.convert("RGB"), icc_profile=display_p3()))
    assert same(read_image(saved(palette, icc_profile=display_p3())), want)


def test_bad_profiles_warn_and_are_ignored(tmp_path, photo):
    path = tmp_path / "holiday.png"
    for bad in (b"no profile at all", display_p3()[:150], odd_inks(), linear_grey()):
        path.write_bytes(saved(photo, icc_profile=bad))
        with pytest.warns(UserWarning, match="holiday.png.*colour profile is ignored"):
            assert same(read_image(path), photo)


# ------------------------------------------------------------------------------------------------ orientation

TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", pytest.param("AVIF", marks=AVIF)])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 do not exist, and occur
def test_orientation(photo, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    got = read_image(saved(photo, kind, exif=exif, **options))
    want = photo.transpose(TURNS[orientation]) if orientation in TURNS else photo
    assert got.size == want.size and gap(got, want).mean() < (4 if kind in ("JPEG", "AVIF") else 0.001)
    assert same(read_image(got), got)  # not turned once more


def test_damaged_exif_does_not_stop_reading(photo):
    data = saved(photo, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(read_image(data), photo)


# ------------------------------------------------------------------------------------------------ depth

def test_sixteen_bits_are_scaled():
    values = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    want = np.rint(values / 257).astype(np.uint8)
    maps = b"P5 64 32 65535\n" + values.astype(">u2").tobytes()
    big = bytearray(saved(Image.fromarray(values.astype(">u2")), "TIFF"))
    sources = [saved(Image.fromarray(values)), saved(Image.fromarray(values), "TIFF"), bytes(big), maps,
               Image.fromarray(values), Image.fromarray(values.astype(np.int32))]
    for source in sources:
        got = read_image(source)
        assert got.mode == "RGB"
        assert (np.asarray(got) == want[..., None]).all()


def test_sixteen_bit_colour(photo):
    high = np.asarray(photo).astype(np.uint16) * 257
    rows = [row.astype(">u2").tobytes() for row in high]
    assert same(read_image(png(16, 2, rows)), photo)
    alpha = np.full((*high.shape[:2], 1), 0x4321, np.uint16)
    got = read_image(png(16, 6, [row.astype(">u2").tobytes() for row in np.concatenate([high, alpha], -1)]))
    assert got.mode == "RGBA" and same(split_alpha(got)[0], photo)
    assert got.getpixel((0, 0))[3] == 0x43
    grey = high[..., :1]
    got = read_image(png(16, 4, [row.astype(">u2").tobytes() for row in np.concatenate([grey, alpha], -1)]))
    assert got.mode == "RGBA" and got.getpixel((5, 5)) == (photo.getpixel((5, 5))[0],) * 3 + (0x43,)


def test_float_grey():
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for values in (unit, unit * 255):
        for source in (Image.fromarray(values), saved(Image.fromarray(values), "TIFF")):
            assert (np.asarray(read_image(source))[..., 1].ravel() == np.arange(256)).all()
    for bad in (unit * 300, unit - 0.5, np.where(unit > 0.5, np.nan, unit)):
        with pytest.raises(ImageError, match="scale them to 0..1"):
            read_image(Image.fromarray(bad.astype(np.float32)))
    for bad in (np.full((4, 4), -1, np.int32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(ImageError, match="scale them to 0..65535"):
            read_image(Image.fromarray(bad))


# ------------------------------------------------------------------------------------------------ transparency, modes

def test_transparency_of_every_form(photo):
    alpha = Image.linear_gradient("L").resize(photo.size)
    rgba = photo.copy()
    rgba.putalpha(alpha)
    assert same(read_image(saved(rgba)), rgba)
    assert same(read_image(saved(rgba, "WEBP", lossless=True, exact=True)), rgba)
    grey = photo.convert("L")
    both = Image.merge("LA", (grey, alpha))
    want = Image.merge("RGBA", (grey, grey, grey, alpha))
    assert same(read_image(saved(both)), want) and same(read_image(both), want)
    flat = photo.quantize(16)
    for source in (flat.convert("PA"), rgba.convert("RGBa")):
        assert read_image(source).mode == "RGBA"
    premultiplied = split_alpha(read_image(rgba.convert("RGBa")))
    assert same(premultiplied[1], alpha) and gap(premultiplied[0], photo)[40:].max() < 4  # dark rows keep few bits
    assert read_image(saved(photo)).mode == read_image(saved(grey)).mode == read_image(saved(flat)).mode == "RGB"


def test_palette_transparency():
    flat = Image.new("P", (4, 1))
    flat.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    flat.putdata([0, 1, 2, 3])
    got = read_image(saved(flat, "PNG", transparency=bytes([255, 128, 0])))
    assert [got.getpixel((x, 0)) for x in range(4)] == [
        (10, 20, 30, 255), (40, 50, 60, 128), (70, 80, 90, 0), (100, 110, 120, 255)]
    for kind in ("GIF", "PNG"):
        got = read_image(saved(flat, kind, transparency=2))
        assert [got.getpixel((x, 0))[3] for x in range(4)] == [255, 255, 0, 255]
        assert got.getpixel((2, 0))[:3] == (70, 80, 90)


@pytest.mark.parametrize("depth, row, key, greys", [
    (1, b"\x50", 1, [0, 255, 0, 255, 0, 0, 0, 0]),
    (2, b"\x1b", 2, [0, 85, 170, 255]),
    (4, b"\x0a\xf7", 10, [0, 170, 255, 119]),
    (8, b"\x00\x0a\xff\x07", 10, [0, 10, 255, 7]),
    (16, b"\x00\x00\x0a\x0a\x0a\x0b\xff\xff", 0x0A0A, [0, 10, 10, 255]),
])
def test_one_transparent_grey(depth, row, key, greys):
    got = np.asarray(read_image(png(depth, 0, [row], tRNS=struct.pack(">H", key))))
    assert got.shape == (1, len(greys), 4) and got[0, :, 0].tolist() == greys
    scaled = {1: 255, 2: 85, 4: 17, 8: 1}.get(depth)
    want = [255 if g != key * scaled else 0 for g in greys] if scaled else [255, 0, 255, 255]
    assert got[0, :, 3].tolist() == want


def test_one_transparent_colour():
    row = bytes([1, 2, 3, 1, 2, 4, 9, 9, 9])
    got = np.asarray(read_image(png(8, 2, [row], tRNS=struct.pack(">HHH", 1, 2, 4))))
    assert got[0, :, 3].tolist() == [255, 0, 255] and got[0, 1, :3].tolist() == [1, 2, 4]
    deep = np.array([0x0102, 0x0203, 0x0304, 0x0902, 0x0203, 0x0304], ">u2").tobytes()
    got = np.asarray(read_image(png(16, 2, [deep], tRNS=struct.pack(">HHH", 0x0102, 0x0203, 0x0304))))
    assert got[0, :, 3].tolist() == [0, 255]


def test_one_bit(photo):
    bits = photo.convert("1")
    for source in (bits, saved(bits), saved(bits, "TIFF", compression="group4"), saved(bits, "BMP")):
        got = read_image(source)
        assert got.mode == "RGB" and (np.asarray(got)[..., 0] == np.asarray(bits) * 255).all()


@pytest.mark.parametrize("kind, options", [
    ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}),
    pytest.param("AVIF", {"quality": 95}, marks=AVIF),
])
def test_first_frame_of_animations(photo, kind, options):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    got = read_image(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert got.size == (32, 32) and gap(split_alpha(got)[0], frames[0]).mean() < 4


@pytest.mark.parametrize("kind", [
    "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", pytest.param("AVIF", marks=AVIF)])
def test_content_decides_not_the_extension(tmp_path, photo, kind):
    path = tmp_path / "photo.txt"
    path.write_bytes(saved(photo, kind))
    assert gap(read_image(path), photo).mean() < 8


def test_every_mode_of_pillow(photo):
    """Whatever mode an image has, it is read as RGB or RGBA, or refused by name."""
    for mode in "1 L P RGB RGBA CMYK YCbCr HSV LA PA RGBX RGBa La I F I;16".split():
        first = {"LA": "L", "La": "LA", "I": "L", "F": "L", "I;16": "L", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
        image = photo.convert(first).convert(mode)
        assert image.mode == mode
        got = read_image(image)
        assert got.mode == ("RGBA" if mode in ("RGBA", "LA", "PA", "RGBa", "La") else "RGB"), mode
        assert got.size == photo.size


# ------------------------------------------------------------------------------------------------ sources

def test_kinds_of_source(tmp_path, photo):
    path = tmp_path / "a.png"
    path.write_bytes(saved(photo))
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), photo):
        assert same(read_image(source), photo)
    with open(path, "rb") as file:
        assert same(read_image(file), photo) and not file.closed
        assert same(read_image(file), photo)  # from its beginning each time
    read, write = os.pipe()
    with open(write, "wb") as sink: sink.write(path.read_bytes())
    with open(read, "rb") as pipe: assert same(read_image(pipe), photo)  # cannot seek
    with open(path, encoding="latin-1") as text, pytest.raises(ImageError, match="mode 'rb'"): read_image(text)
    for nonsense in (None, 7, [1, 2], np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ImageError, match="path, bytes, a binary file or a PIL image"): read_image(nonsense)


def test_a_given_image_is_left_as_it_was(photo):
    exif = Image.Exif()
    exif[274] = 6
    given = Image.open(io.BytesIO(saved(photo, exif=exif, icc_profile=display_p3())))
    got = read_image(given)
    assert given.size == photo.size and given.getexif()[274] == 6 and given.info["icc_profile"]
    assert got.size == photo.size[::-1] and not got.info and 274 not in got.getexif()
    got.paste((0, 0, 0), (0, 0, *got.size))
    assert same(given.convert("RGB"), photo)
    plain = read_image(photo)
    plain.putpixel((0, 0), (1, 2, 3))
    assert photo.getpixel((0, 0)) != (1, 2, 3)


# ------------------------------------------------------------------------------------------------ what must be refused

def sentence(call, *args, **kwargs):
    with pytest.raises(ImageError) as caught: call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and isinstance(caught.value, (HificError, ValueError))
    return message


def test_errors_name_the_file(tmp_path, photo):
    (tmp_path / "text.jpg").write_text("this is a letter, not a photo\n" * 50)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(saved(photo)[:2000])
    (tmp_path / "header.jpg").write_bytes(saved(photo, "JPEG")[:10])
    for name in ("text.jpg", "empty.png", "half.png", "header.jpg", "missing.webp", "."):
        path = tmp_path / name
        assert str(path) in sentence(read_image, path)
    assert "does not exist" in sentence(read_image, tmp_path / "missing.webp")
    assert "is a folder" in sentence(read_image, tmp_path)
    assert "truncated" in sentence(read_image, tmp_path / "half.png")
    assert "not an image" in sentence(read_image, tmp_path / "text.jpg")
    sentence(read_image, "a\0b.png")
    sentence(read_image, b"")
    sentence(read_image, Image.new("RGB", (0, 5)))
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (tmp_path / "half.png").chmod(0)
        assert "permissions" in sentence(read_image, tmp_path / "half.png")


KINDS = {
    "baseline JPEG": ("JPEG", "RGB", {"quality": 90}), "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "CMYK JPEG": ("JPEG", "CMYK", {}), "PNG": ("PNG", "RGB", {}), "PNG with alpha": ("PNG", "RGBA", {}),
    "palette PNG": ("PNG", "P", {}), "16-bit PNG": ("PNG", "I;16", {}), "WebP": ("WEBP", "RGB", {}),
    "lossless WebP": ("WEBP", "RGBA", {"lossless": True}), "TIFF": ("TIFF", "RGB", {}),
    "LZW TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "JPEG TIFF": ("TIFF", "RGB", {"compression": "jpeg"}),
    "BMP": ("BMP", "RGB", {}), "GIF": ("GIF", "P", {}), "JPEG 2000": ("JPEG2000", "RGB", {}), "PPM": ("PPM", "RGB", {}),
    "TGA": ("TGA", "RGB", {"compression": "tga_rle"}), "AVIF": ("AVIF", "RGB", {}),
    "AVIF with alpha": ("AVIF", "RGBA", {}),
}


def specimen(photo, label):
    kind, mode, options = KINDS[label]
    if kind == "AVIF" and not HAS_AVIF: pytest.skip(NO_AVIF)
    image = photo.convert("L").convert(mode) if mode.startswith("I") else photo.convert(mode)
    return saved(image, kind, **options)


@pytest.mark.parametrize("label", KINDS)
@pytest.mark.parametrize("careless", [False, True])
def test_truncated_files_are_never_half_decoded(photo, label, careless, monkeypatch):
    """At every length all the pixels, or an error; also where the process has told Pillow to accept truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", careless)
    data = specimen(photo, label)
    whole = read_image(data)
    lengths = sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 30, len(data))})
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own about damaged metadata
        for n in lengths:
            try: got = read_image(data[:n])
            except ImageError: refused += 1
            else: assert same(got, whole), f"{n} of {len(data)} bytes gave other pixels"
    assert refused >= 58 and ImageFile.LOAD_TRUNCATED_IMAGES is careless


@pytest.mark.parametrize("label", KINDS)
def test_damaged_files_raise_nothing_but_image_errors(photo, label):
    rng = np.random.default_rng(list(label.encode()))
    data = specimen(photo, label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(120):
            bad = bytearray(data)
            for _ in range(rng.integers(1, 6)):  # most headers lie in the first 200 bytes
                bad[rng.integers(min(len(bad), rng.choice([40, 200, len(bad)])))] = rng.integers(256)
            try: assert read_image(bytes(bad), max_pixels=10**6).mode in ("RGB", "RGBA")
            except ImageError: pass


# ------------------------------------------------------------------------------------------------ too many pixels

def test_a_promise_of_gigapixels_is_refused_before_decoding(monkeypatch):
    forged = png(8, 2, [b"\0" * 3])
    forged = forged[:16] + struct.pack(">II", 60000, 60000) + forged[24:29] + struct.pack(
        ">I", zlib.crc32(forged[12:16] + struct.pack(">II", 60000, 60000) + forged[24:29])) + forged[33:]

    def no_decoding(self): raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_decoding)
    for limit in (None, 1000, 10**8):
        message = sentence(read_image, forged, limit)
        assert "max_pixels" in message and (limit is None or str(limit) in message)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", pytest.param("AVIF", marks=AVIF)])
def test_max_pixels_is_exact(photo, kind):
    data = saved(photo, kind)
    assert read_image(data, max_pixels=96 * 64).size == (96, 64)
    assert "max_pixels = 6143" in sentence(read_image, data, max_pixels=96 * 64 - 1)
    assert "96 x 64" in sentence(read_image, photo, max_pixels=100)  # an image in memory too
    assert "at least 1" in sentence(read_image, data, max_pixels=0)


def test_max_pixels_and_pillows_own_limit(photo, monkeypatch):
    data = saved(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "max_pixels = 2000" in sentence(read_image, data)  # Pillow's point of refusal is the default
    assert same(read_image(data, max_pixels=6144), photo)  # ours alone counts where it is given, above Pillow's too
    assert same(read_image(saved(photo, "GIF"), max_pixels=6144), read_image(saved(photo, "GIF"), max_pixels=10**9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert same(read_image(data), photo)  # between once and twice: Pillow would warn, which is an error here
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert same(read_image(data), photo) and Image.MAX_IMAGE_PIXELS is None


def test_threads_with_different_limits(photo):
    data, before, wrong = saved(photo), Image.MAX_IMAGE_PIXELS, []

    def work(limit):
        for _ in range(40):
            try: ok = read_image(data, limit).size == photo.size and limit >= 6144
            except ImageError: ok = limit < 6144
            if not ok: wrong.append(limit)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (10, 6143, 6144, 10**9)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and Image.MAX_IMAGE_PIXELS == before and type(Image.MAX_IMAGE_PIXELS) is type(before)


# ------------------------------------------------------------------------------------------------ tensors, samples

def test_tensors_and_back(photo):
    x = image_to_tensor(photo)
    assert x.shape == (3, 64, 96) and x.dtype == torch.uint8 and x.is_contiguous()
    assert x[:, 10, 20].tolist() == list(photo.getpixel((20, 10)))
    assert same(tensor_to_image(x), photo) and same(tensor_to_image(x.double() / 255), photo)
    values = torch.tensor([-1.0, 0.499 / 255, 0.501 / 255, 0.5, 254.4 / 255, 2.0]).reshape(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(tensor_to_image(values))[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]
    dim = torch.full((3, 8, 8), 0.4)
    dim[:, 0, 0] = 0.3
    assert np.asarray(tensor_to_image(dim)).max() == 102  # the contrast is not stretched
    assert same(tensor_to_image(image_to_tensor(photo).bfloat16() / 255), tensor_to_image((x.bfloat16() / 255).float()))
    rgba = photo.convert("RGBA")
    for bad in (rgba, photo.convert("L"), photo.convert("CMYK")):
        sentence(image_to_tensor, bad)
    for bad in (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 3), torch.zeros(3, 4, 4, dtype=torch.int32),
                torch.full((3, 2, 2), float("nan"))):
        sentence(tensor_to_image, bad)
    sentence(split_alpha, photo.convert("L"))


def test_sample_photos_need_no_network(monkeypatch):
    import socket

    def offline(*args, **kwargs): raise AssertionError("a sample photo asked for the network")

    monkeypatch.setattr(socket, "socket", offline)
    for name, text in SAMPLE_PHOTOS.items():
        image = sample_photo(name)
        assert same(read_image(sample_photo_path(name)), image)
        assert image.mode == "RGB" and f"{image.width} x {image.height}" in text
        assert "CC0" in text or "public domain" in text
    assert "chelsea" in sentence(sample_photo, "lena")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install scikit-image" in sentence(sample_photo)


# ------------------------------------------------------------------------------------------------ folders

def test_find_images(tmp_path):
    names = ["DSC_1.JPG", "b.jpeg", "c/d/e.PNG", "c/f.webp", "c/g.avif", "h.TIF", "i.bmp", "j.tiff", "k.Gif"]
    skipped = [".hidden.jpg", ".trash/x.jpg", "c/.thumbs/y.png", "a.txt", "movie.mpg", "paper.pdf", "plain", "z.jpg~"]
    for name in names + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert found == sorted(names)
    assert find_images(str(tmp_path / "a.txt")) == [tmp_path / "a.txt"]
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "l.png").touch()
    (tmp_path / "c" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(find_images(tmp_path)) == len(names) + 1  # by the folder or by its link: once
    assert tmp_path / "c/link/l.png" in find_images(tmp_path / "c")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").touch()
    assert "holds no images" in sentence(find_images, tmp_path / "none")
    assert "does not exist" in sentence(find_images, tmp_path / "gone")
    hidden_root = tmp_path / ".photos"
    hidden_root.mkdir()
    (hidden_root / "a.png").touch()
    assert len(find_images(hidden_root)) == 1  # the folder you name may be hidden
    assert {".jpg", ".avif", ".webp", ".jfif", ".jp2"} <= image_extensions()


def test_holdout_split(tmp_path):
    names = [f"p{i:03}.png" for i in range(105)]
    train, held = holdout_split(reversed(names))
    assert [p.name for p in held] == names[9::10] and len(train) == 95 and train == sorted(train)
    assert [p.name for p in holdout_split(names, every=50)[1]] == ["p049.png", "p099.png"]
    assert holdout_split(names[:9]) == ([Path(n) for n in names[:9]], []) and holdout_split([]) == ([], [])

    order = list(np.random.default_rng(0).permutation(names))
    for name in names: (tmp_path / name).touch()
    table = tmp_path / "manifest.csv"
    table.write_text("width,file\r\n" + "".join(f"3,{n}\r\n" for n in order), encoding="utf-8-sig")
    train, held = holdout_split(find_images(tmp_path))
    assert {p.name for p in held} == set(order[9::10]) and len(train) == 95
    (tmp_path / "p0000_new.png").touch()  # a new photo moves none of the others
    again = holdout_split(find_images(tmp_path))
    assert again[1] == held and len(again[0]) == 96
    (tmp_path / order[9]).unlink()  # nor does one that is gone
    assert set(holdout_split(find_images(tmp_path))[1]) == set(held) - {tmp_path / order[9]}
    elsewhere = tmp_path / "lists" / "m.csv"
    elsewhere.parent.mkdir()
    elsewhere.write_text("file\n" + "".join(f"../{n}\n" for n in order))
    assert set(holdout_split(find_images(tmp_path), manifest=elsewhere)[1]) == set(held) - {tmp_path / order[9]}
    elsewhere.write_text("path\na.png\n")
    assert "no column named file" in sentence(holdout_split, names, manifest=elsewhere)
    assert "cannot be read" in sentence(holdout_split, names, manifest=tmp_path / "gone.csv")
    assert "at least 2" in sentence(holdout_split, names, every=1)


def test_holdout_of_the_training_photos(shared):
    folder = shared / "data" / "train"
    paths = find_images(folder, {".jpg"})
    with open(folder / "manifest.csv", newline="") as file: lines = [row["file"] for row in csv.DictReader(file)]
    assert [p.relative_to(folder).as_posix() for p in paths] == sorted(lines)
    train, held = holdout_split(paths)
    assert {p.relative_to(folder).as_posix() for p in held} == set(lines[9::10])
    assert len(held) == len(lines) // 10 and sorted(train + held) == paths


def test_kodak_is_read_as_it_is(kodak):
    for path in kodak:
        with Image.open(path) as image: assert same(read_image(path), image.convert("RGB"))


# ------------------------------------------------------------------------------------------------ crops

@pytest.fixture
def folder(tmp_path):
    """Three usable photos of different sizes, one too small, one cut off."""
    for name, size in (("astronaut", (300, 260)), ("coffee", (200, 140)), ("rocket", (128, 128))):
        sample_photo(name).resize(size).save(tmp_path / f"{name}.png")
    sample_photo("chelsea").resize((500, 127)).save(tmp_path / "flat.png")
    whole = saved(sample_photo("retina").resize((300, 300)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    return tmp_path


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PhotoCrops(*args, **kwargs)


def test_crops_are_sent_to_other_processes(folder, tmp_path):
    crops = quietly(folder, 96, 4, seed=3)
    shard = write_shard(tmp_path / "a.tar", [(f"{n}.png", (folder / f"{n}.png").read_bytes()) for n in ("astronaut", "coffee")])
    for data in (crops, ShardCrops(str(shard), 96, 4, seed=3)):
        batch, sent = data.batch(7), pickle.dumps(data)
        assert torch.equal(pickle.loads(sent).batch(7), batch) and len(sent) < 5000  # without the photos


def test_crops_skip_what_cannot_be_used_and_say_so_once(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = PhotoCrops(folder, 128, 4)
        for step in range(20): crops.batch(step)
    said = sorted(str(w.message) for w in caught)
    assert len(said) == 2 and "1 of 5 photos" in said[0] and str(folder / "cut.jpg") in said[1]
    assert len(crops) == 3 and crops.broken == [folder / "cut.jpg"] and crops.too_small == [folder / "flat.png"]
    with warnings.catch_warnings(record=True) as caught:  # the same without memory, where they are met while drawing
        warnings.simplefilter("always")
        lazy = PhotoCrops(folder, 128, 4, memory_gb=0)
        for step in range(20): lazy.batch(step)
    assert len([w for w in caught if "cut.jpg" in str(w.message)]) == 1
    assert len(lazy) == 3


def test_crops_depend_on_seed_and_step_alone(folder):
    crops = quietly(folder, 96, 4, seed=3)
    steps = [7, 0, 1, 7, 123456]
    first = [crops.batch(s) for s in steps]
    assert torch.equal(first[0], first[3])
    others = [first[0], first[1], first[2], first[4], crops.batch(1007), crops.batch(2**40 + 7)]
    assert not any(torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])
    assert first[0].shape == (4, 3, 96, 96) and first[0].dtype == torch.uint8 and first[0].is_contiguous()
    for memory in (0, 0.00025, 1):  # nothing, one photo or everything in memory
        other = quietly(folder, 96, 4, seed=3, memory_gb=memory, threads=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the broken file, when it is met
            assert all(torch.equal(other.batch(s), batch) for s, batch in zip(reversed(steps), reversed(first)))
    assert not torch.equal(quietly(folder, 96, 4, seed=4).batch(7), first[0])
    assert 0 < len(quietly(folder, 96, 4, memory_gb=0.00025)._photos) < 3


def coordinates(width, height):
    """A picture that says where each pixel was: red = column, green = row (of at most 255), blue = 7."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8))


def test_scale_one_cuts_pixel_for_pixel(tmp_path):
    coordinates(90, 70).save(tmp_path / "c.png")
    crops = PhotoCrops(tmp_path, 64, 16, scale=(1, 1), flip=False)
    corners = set()
    for step in range(40):
        for crop in crops.batch(step):
            left, top = int(crop[0, 0, 0]), int(crop[1, 0, 0])
            assert torch.equal(crop, image_to_tensor(coordinates(90, 70).crop((left, top, left + 64, top + 64))))
            corners.add((left, top))
    assert {x for x, _ in corners} == set(range(27)) and {y for _, y in corners} == set(range(7))  # up to every edge
    mirrored = sum(int(c[0, 0, 0]) > int(c[0, 0, -1]) for s in range(40) for c in PhotoCrops(
        tmp_path, 64, 16, scale=(1, 1)).batch(s)) / 640
    assert 0.42 < mirrored < 0.58


def test_scales_fill_their_range_and_fit_the_photo(tmp_path):
    coordinates(250, 200).save(tmp_path / "c.png")
    crops = PhotoCrops(tmp_path, 64, 16, scale=(0.25, 1), flip=False, drop_flat=False)
    spans = []
    for step in range(30):
        for crop in crops.batch(step).float():
            across, down = (crop[0, 32, 60] - crop[0, 32, 3]) / 57, (crop[1, 60, 32] - crop[1, 3, 32]) / 57
            assert abs(across - down) < 0.1 and (crop[2] - 7).abs().max() == 0
            spans.append(float(across))
    assert min(spans) < 1.05 and 3 < max(spans) <= 200 / 64 + 0.05  # pixels a pixel: 1 to 4, at most the shorter side
    assert np.mean(np.array(spans) < 1.6) > 0.3


def test_shrinking_is_filtered(tmp_path):
    y, x = np.mgrid[:256, :256]
    Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).save(tmp_path / "checks.png")
    crop = PhotoCrops(tmp_path, 64, 4, scale=(0.5, 0.5)).batch(0)
    assert (crop[:, :, 1:-1, 1:-1].float() - 127.5).abs().max() < 2  # fine chequers become grey


def test_photos_are_equally_likely_whatever_their_size(tmp_path):
    for i, side in enumerate((64, 128, 512, 1024)):
        Image.new("RGB", (side, side), (i * 60, 0, 0)).save(tmp_path / f"{i}.png")
    crops = PhotoCrops(tmp_path, 64, 50, drop_flat=False)
    seen = torch.cat([crops.batch(s)[:, 0, 0, 0] for s in range(40)]).long() // 60
    share = torch.bincount(seen, minlength=4) / len(seen)
    assert (share - 0.25).abs().max() < 0.05


def test_transparent_photos_give_their_colours(tmp_path):
    image = coordinates(80, 80)
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    crop = PhotoCrops(tmp_path, 80, 1, scale=(1, 1), flip=False).batch(0)[0]
    assert torch.equal(crop, image_to_tensor(coordinates(80, 80)))


def test_no_photo_left_is_an_error(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "None of the 5 photos" in sentence(PhotoCrops, folder, 400)
        assert "None of the 1 photos" in sentence(PhotoCrops, [folder / "cut.jpg"], 64)
    sentence(PhotoCrops, [], 64)
    for bad in ({"crop_size": 0}, {"batch_size": 0}, {"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 1.5)}):
        sentence(PhotoCrops, folder, **bad)


def running():
    return [t for t in threading.enumerate() if t.name.startswith("PhotoCrops")]


def wait_until_gone():
    for _ in range(200):
        if not running(): return True
        time.sleep(0.01)
    return False


def test_prefetch(folder):
    crops = quietly(folder, 96, 4)
    stream = crops.prefetch(start_step=11, n_ahead=3)
    got = [next(stream) for _ in range(6)]
    assert [step for step, _ in got] == list(range(11, 17))
    assert all(torch.equal(batch, crops.batch(step)) for step, batch in got)
    assert 1 <= len(running()) <= crops.threads
    stream.close()
    assert not running()
    with pytest.raises(StopIteration): next(stream)
    stream = crops.prefetch(0)
    next(stream)
    del stream  # forgotten rather than closed
    gc.collect()
    assert wait_until_gone()


def test_prefetch_works_ahead_and_passes_errors_on(folder, monkeypatch):
    crops = quietly(folder, 96, 1, threads=1)
    made = []

    def batch(step):
        made.append((step, threading.current_thread().name))
        if step == 4: raise ImageError("step four is bad.")
        return torch.zeros(1)

    monkeypatch.setattr(crops, "batch", batch)
    stream = crops.prefetch(0, n_ahead=3)
    next(stream)
    for _ in range(200):
        if len(made) == 4: break
        time.sleep(0.01)
    assert [s for s, _ in made] == [0, 1, 2, 3] and all(name.startswith("PhotoCrops") for _, name in made)  # 3 ahead
    with pytest.raises(ImageError, match="step four"):
        for _ in range(10): next(stream)
    assert wait_until_gone()


def test_real_photos(shared):
    paths = find_images(shared / "data" / "train", {".jpg"})[::60]
    kept, lazy = quietly(paths, 192, 6, seed=5), quietly(paths, 192, 6, seed=5, memory_gb=0.005)
    assert len(kept._photos) == len(kept) > len(lazy._photos) > 0 and not kept.broken
    assert len(kept.too_flat) == 1  # seen: its mean value is 0.82
    batch = kept.batch(1000)
    assert torch.equal(batch, lazy.batch(1000))
    assert batch.float().std() > 20 and len({crop.sum().item() for crop in batch}) == 6


# ------------------------------------------------------------------------------------------------ which photos, which part

def test_photo_faults():
    """L3C's rules, and the grid that is looked at does not miss what a whole photo shows."""
    flat = np.full((300, 900, 3), 90, np.uint8)
    assert photo_fault(flat) == "flat" and photo_fault(flat, 400) == "small"
    rng = np.random.default_rng(0)
    for name in SAMPLE_PHOTOS:
        pixels = np.asarray(sample_photo(name))
        assert photo_fault(pixels, min(pixels.shape[:2])) is None and photo_fault(pixels, min(pixels.shape[:2]) + 1) == "small"
    grey = rng.integers(0, 256, (200, 200, 1)).repeat(3, 2)
    for value, fault in ((0.78, None), (0.82, "overexposed")):  # greys whose mean is just below and above 0.8
        assert photo_fault((255 * value + (grey - 127.5) * 0.3).clip(0, 255).astype(np.uint8)) == fault
    for saturation, fault in ((0.88, None), (0.92, "oversaturated")):
        pixels = np.stack([grey[..., 0] // 4 + 100] * 3, -1)
        pixels[..., 1:] = pixels[..., 1:] * (1 - saturation)
        assert photo_fault(pixels.astype(np.uint8)) == fault, saturation
    huge = np.zeros((3000, 40, 3), np.uint8)
    huge[::2] = 120
    assert photo_fault(huge) is None  # stripes of one pixel: the grid sees both kinds


def test_flat_photos_are_left_out_and_counted(folder):
    Image.new("RGB", (200, 200), (250, 250, 250)).save(folder / "page.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = PhotoCrops(folder, 128, 4)
        assert [p.name for p in crops.too_flat] == ["page.png"] and len(crops) == 3
        assert len([w for w in caught if "1 of 6 photos are flat" in str(w.message)]) == 1
        late = PhotoCrops(folder, 128, 4, memory_gb=0)
        assert all(torch.equal(late.batch(s), crops.batch(s)) for s in range(10)) and late.too_flat == crops.too_flat
        assert len(PhotoCrops(folder, 128, 4, drop_flat=False)) == 4


def test_shorter_side(tmp_path):
    coordinates(250, 200).save(tmp_path / "c.png")
    crops = PhotoCrops(tmp_path, 64, 16, shorter_side=(80, 100), flip=False, drop_flat=False)
    spans = [float((crop[0, 32, 60] - crop[0, 32, 3]) / 57) for step in range(10) for crop in crops.batch(step).float()]
    assert min(spans) >= 1.95 and max(spans) <= 2.55 and max(spans) - min(spans) > 0.3  # 200 pixels become 80 to 100
    small = PhotoCrops(tmp_path, 64, 4, shorter_side=(10, 20), flip=False, drop_flat=False).batch(0).float()
    assert 3 < (small[0, 0, 32, 60] - small[0, 0, 32, 3]) / 57 < 3.2  # never so small that the crop no longer fits
    large = PhotoCrops(tmp_path, 64, 4, shorter_side=(500, 900), flip=False, drop_flat=False).batch(0)
    assert (large[0, 0, 0].diff() == 1).all()  # never enlarged
    sentence(PhotoCrops, tmp_path, 64, shorter_side=(9, 8))


@pytest.mark.parametrize("memory_gb", [1, 0])
def test_ranks_share_a_batch(folder, memory_gb):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joint = PhotoCrops(folder, 96, 12, seed=3)
        for world in (2, 3, 4):
            parts = [PhotoCrops(folder, 96, 12, seed=3, rank=r, world=world, memory_gb=memory_gb) for r in range(world)]
            for step in (0, 5):
                assert torch.equal(torch.stack([p.batch(step) for p in parts], 1).flatten(0, 1), joint.batch(step))
        assert "shared evenly" in sentence(PhotoCrops, folder, 96, 12, world=5)
        sentence(PhotoCrops, folder, 96, 12, rank=2, world=2)


def test_waiting_is_measured():
    """Batches that are ready cost nothing; one that is not costs as long as it takes."""
    slow, held = threading.Event(), threading.Event()

    def make(step):
        if step == 3:
            held.set()
            slow.wait()
        return torch.tensor(step)

    with Prefetch(make, n_ahead=2, workers=1) as stream:
        for _ in range(3): next(stream)
        before = stream.wait_s
        held.wait()
        stream.wait_share()
        threading.Timer(0.2, slow.set).start()
        assert next(stream)[1] == 3
        assert stream.wait_s - before > 0.15 and 0.5 < stream.wait_share() <= 1
        before = stream.wait_s
        while not stream._ready[0].done(): time.sleep(0.01)
        next(stream)
        assert stream.wait_s - before < 0.1
        assert stream.wait_share() < 0.9


def test_prefetch_keeps_the_order_whichever_worker_is_first():
    rng = np.random.default_rng(0)

    def make(step):
        time.sleep(float(rng.random()) * 0.01)
        return step * 10

    with Prefetch(make, start_step=4, n_ahead=5, workers=5) as stream:
        assert [next(stream) for _ in range(30)] == [(s, s * 10) for s in range(4, 34)]
    assert not running()


# ------------------------------------------------------------------------------------------------ shards

def tile(number, side=64):
    """A picture whose number can be read from its mean."""
    texture = np.random.default_rng(number).integers(-8, 9, (side, side, 1))
    return saved(Image.fromarray((texture + 20 + 2 * number).repeat(3, 2).astype(np.uint8)))


def numbers(crops): return [round((float(crop.float().mean()) - 20) / 2) for crop in crops]


@pytest.fixture
def tars(tmp_path):
    """Five shards with tiles 0 to 9, 10 to 19, ..."""
    for k in range(5):
        write_shard(tmp_path / f"s{k}.tar", [(f"{k}{i}.png", tile(10 * k + i)) for i in range(10)])
    return f"{tmp_path}/s{{0..4}}.tar"


def steps_of(crops, steps): return [numbers(crops.batch(step)) for step in steps]


def test_a_shard_of_anybody(tmp_path):
    """What tar, WebDataset and macOS write: folders, long names, labels beside photos, hidden twins, several formats."""
    import tarfile

    photo = tile(5)
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        long = "train/" + "n" * (90 if kind == tarfile.USTAR_FORMAT else 180) + ".JPEG"
        with tarfile.open(path, "w", format=kind) as tar:
            folder = tarfile.TarInfo("train")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in (long, "train/0.cls", "train/._0.png", "train/0.png", "0.json", "übung.webp"):
                member = tarfile.TarInfo(name)
                member.size = len(photo)
                tar.addfile(member, io.BytesIO(photo))
            link = tarfile.TarInfo("train/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "0.png"
            tar.addfile(link)
        found = shard_members(path)
        assert [name for name, _, _ in found] == [long, "train/0.png", "übung.webp"]
        whole = path.read_bytes()
        assert all(whole[offset:offset + size] == photo for _, offset, size in found)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar: tar.add(path, "x.png")
    (tmp_path / "text.tar").write_text("not a tape archive " * 100)
    (tmp_path / "empty.tar").touch()
    for name in ("b.tar.gz", "text.tar", "gone.tar"): assert name in sentence(shard_members, tmp_path / name)
    cut = whole[:found[1][1] + 10]
    (tmp_path / "cut.tar").write_bytes(cut)
    with pytest.warns(UserWarning, match="damaged after 1 photos"): assert shard_members(tmp_path / "cut.tar") == found[:1]


def test_write_shard_is_whole_or_not_there(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("0.png", b"one")])
    before = path.read_bytes()

    def breaks_off():
        yield "0.png", b"two" * 1000
        raise OSError(28, "No space left on device")

    with pytest.raises(HificError, match="No space"): write_shard(path, breaks_off())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_find_shards(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "c.tar", ".hidden.tar", "a.txt"): (tmp_path / name).touch()
    folder = str(tmp_path)
    assert find_shards(folder) == find_shards(tmp_path) == find_shards(f"{folder}/*.tar")
    assert [p[len(folder) + 1:] for p in find_shards(folder)] == ["b-0.tar", "b-1.tar", "c.tar"]
    assert find_shards([f"{folder}/c.tar", folder + "/b-{1..1}.tar"]) == [f"{folder}/c.tar", f"{folder}/b-1.tar"]
    assert expand_braces("x{08..11}y{a,b}")[:3] == ["x08ya", "x08yb", "x09ya"] and len(expand_braces("{0..9}{0..9}")) == 100
    assert find_shards("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]
    for bad in (folder + "/b-{0..2}.tar", f"{folder}/x*.tar", "a{5..3}.tar", "{0..9999999}", []): sentence(find_shards, bad)


def test_a_pass_takes_every_photo_once(tars):
    crops = ShardCrops(tars, 64, 5, seed=1, window=2)
    passes = [sum(steps_of(crops, range(10 * e, 10 * e + 10)), []) for e in range(3)]
    for taken in passes:
        assert sorted(taken) == list(range(50))
        assert [len({n // 10 for n in taken[a:b]}) for a, b in ((0, 20), (20, 40), (40, 50))] == [2, 2, 1]  # windows
        assert taken != sorted(taken)
    assert passes[0] != passes[1] != passes[2]
    assert len({tuple(n // 10 for n in p[40:]) for p in passes} | {tuple(n // 10 for n in p[:20]) for p in passes}) > 2
    assert sum(steps_of(ShardCrops(tars, 64, 5, seed=2, window=2), range(10)), []) != passes[0]


def test_shards_depend_on_seed_and_step_alone(tars):
    """In any order of steps, by any number of threads, kept in memory or not: what makes a resumed run the same run."""
    first = ShardCrops(tars, 32, 4, seed=7, window=2, scale=(0.5, 1))
    batches = {step: first.batch(step) for step in range(40)}
    for settings in (dict(memory_gb=0), dict(threads=1)):
        other = ShardCrops(tars, 32, 4, seed=7, window=2, scale=(0.5, 1), **settings)
        assert all(torch.equal(other.batch(step), batches[step]) for step in (39, 3, 21, 0, 20))
        with other.prefetch(17, n_ahead=6) as stream:  # a run that was killed after step 16
            for step, batch in stream:
                assert torch.equal(batch, batches[step])
                if step == 39: break
    parts = [ShardCrops(tars, 32, 4, seed=7, window=2, scale=(0.5, 1), rank=r, world=2) for r in range(2)]
    for step in (0, 13): assert torch.equal(torch.stack([p.batch(step) for p in parts], 1).flatten(0, 1), batches[step])


def test_shards_of_unequal_size(tmp_path):
    for k, n in enumerate((6, 3, 9)): write_shard(tmp_path / f"{k}.tar", [(f"{i}.png", tile(10 * k + i)) for i in range(n)])
    crops = ShardCrops(tmp_path, 64, 6, window=3)
    assert crops.crops_per_shard == 6 and sorted(sum(steps_of(crops, range(3)), [])) == sorted(
        [*range(6), *range(10, 13), *range(20, 29)])
    apart = ShardCrops(tmp_path, 64, 6, window=1)
    counts = np.bincount(sum(steps_of(apart, range(3)), []), minlength=30)
    assert set(counts[:6]) == {1} and set(counts[10:13]) == {2} and sorted(counts[20:29]) == [0] * 3 + [1] * 6
    assert ShardCrops(tmp_path, 64, 6, crops_per_shard=9).crops_per_shard == 9


def test_what_cannot_be_used_in_shards_costs_one_warning(tmp_path):
    write_shard(tmp_path / "0.tar", [*((f"{i}.png", tile(i)) for i in range(6)), ("6.png", tile(6)[:300]), ("7.png", tile(7, 40)),
                                     ("8.png", saved(Image.new("RGB", (64, 64), (255, 255, 255))))])
    (tmp_path / "1.tar").write_bytes(b"no archive" * 99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = ShardCrops(tmp_path, 64, 3, window=2)
        taken = steps_of(crops, range(12))
        again = ShardCrops(tmp_path, 64, 3, window=2)
        with again.prefetch(0) as stream: assert [numbers(next(stream)[1]) for _ in range(12)] == taken
    assert set(sum(taken, [])) == set(range(6))
    assert crops.broken == ["0.tar/6.png"] and crops.too_small == ["0.tar/7.png"] and crops.too_flat == ["0.tar/8.png"]
    assert crops.missing == [str(tmp_path / "1.tar")]
    said = [str(w.message) for w in caught][:2]
    assert len(caught) == 4 and "1.tar" in said[0] and "0.tar/6.png" in said[1]  # two of each object
    write_shard(tmp_path / "1.tar", [("0.png", tile(0, 30))])
    only = ShardCrops(str(tmp_path / "1.tar"), 64, 2)
    assert "None of the 1 photos" in sentence(only.batch, 0)
    sentence(ShardCrops, tars_without_photos(tmp_path), 64)


def tars_without_photos(tmp_path): return str(write_shard(tmp_path / "texts.tar", [("a.txt", b"text")]))


def test_held_back_photos_of_shards(tars):
    crops = ShardCrops(tars, 64, 5, window=5, held_back_every=5)
    seen = set(sum(steps_of(crops, range(40)), []))
    held = numbers([image_to_tensor(read_image(file)) for file in crops.held_back(None)])
    assert held == [n for n in range(50) if n % 10 in (4, 9)] and seen == set(range(50)) - set(held)
    assert numbers([image_to_tensor(read_image(f)) for f in crops.held_back(3)]) == held[:3]
    assert ShardCrops(tars, 64, 5).held_back() == []


def test_open_dataset(tmp_path, folder, tars):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        photos = tmp_path / "photos"
        photos.mkdir()
        for path in folder.glob("*.png"): path.rename(photos / path.name)
        crops = open_dataset(photos, 96, 2, 5, held_back_every=2, memory_gb=0.1, window=3)
        train, held = holdout_split(find_images(photos), 2)
        assert isinstance(crops, PhotoCrops) and crops.paths == train and crops.held_back() == held and crops.seed == 5
        assert crops.held_back(1) == held[:1] and open_dataset(photos, 96, held_back_every=0).held_back() == []
        assert torch.equal(crops.batch(3), PhotoCrops(train, 96, 2, 5).batch(3))
    for spec in (tars, str(tmp_path), tmp_path, tmp_path / "s0.tar", [str(tmp_path / "s0.tar")], f"{tmp_path}/s?.tar"):
        if spec in (str(tmp_path), tmp_path): (tmp_path / "cut.jpg").unlink(missing_ok=True)
        crops = open_dataset(spec, 64, 5, 1, window=2, progress=print)
        assert isinstance(crops, ShardCrops) and crops.crops_per_shard == 9 and len(crops.held_back(1)) == 1
    both = open_dataset(tars, 64, 5, 1, held_back_every=0, window=2), ShardCrops(tars, 64, 5, 1, window=2)
    assert torch.equal(both[0].batch(3), both[1].batch(3))
    (tmp_path / "x.jpg").touch()
    assert "photos and shards" in sentence(open_dataset, tmp_path)
    assert "'widnow'" in sentence(open_dataset, tars, widnow=1)
    sentence(open_dataset, tmp_path / "gone")


# ------------------------------------------------------------------------------------------------ shards over HTTP

def put(shelf, tmp_path, prefix="/"):
    for k in range(5): shelf[f"{prefix}s{k}.tar"] = (tmp_path / f"s{k}.tar").read_bytes()


QUICK = dict(backoff=0.01, retries=3)


def test_shards_over_http_are_the_same_shards(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path, "/busy/torn/")
    near = ShardCrops(tars, 64, 5, seed=1, window=2)
    far = ShardCrops(address + "/busy/torn/s{0..4}.tar", 64, 5, seed=1, window=2, cache=tmp_path / "cache", **QUICK)
    with far.prefetch() as stream:
        for step, batch in stream:
            assert torch.equal(batch, near.batch(step))
            if step == 19: break
    assert set(shelf.asked.values()) == {2}  # a 503, then whole; two passes fetch each shard once
    again = ShardCrops(address + "/busy/torn/s{0..4}.tar", 64, 5, seed=1, window=2, cache=tmp_path / "cache")
    assert torch.equal(again.batch(11), near.batch(11)) and set(shelf.asked.values()) == {2}  # nor does the next run
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.endswith(".part")]


def test_a_torn_download_goes_on_where_it_ended(tars, tmp_path, web):
    shelf, address = web
    write_shard(tmp_path / "large.tar", [("0.png", tile(3)), ("0.bin", os.urandom(2_000_000)), ("1.png", tile(9))])
    shelf["/torn/s0.tar"] = (tmp_path / "large.tar").read_bytes()
    crops = ShardCrops(address + "/torn/s0.tar", 64, 2, cache=tmp_path / "cache", **QUICK)
    ((_, asked),) = shelf.ranges
    assert 800_000 < int(asked[6:-1]) <= 1_010_000  # from the middle, less a piece that was on its way
    assert sorted(numbers(crops.batch(0))) == [3, 9]
    assert next((tmp_path / "cache").glob("*.tar")).read_bytes() == shelf["/torn/s0.tar"]


def test_the_cache_is_bounded(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path)
    size = len(shelf["/s0.tar"])
    crops = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=1, cache=tmp_path / "cache", cache_gb=2.5 * size / 1e9,
                       memory_gb=0, **QUICK)
    near = ShardCrops(tars, 64, 5, window=1)
    for step in range(30):
        assert torch.equal(crops.batch(step), near.batch(step))
        wait_for(lambda: not [t for t in threading.enumerate() if t.name == "ShardCrops"])
        assert len(list((tmp_path / "cache").glob("[!.]*"))) <= 3  # 2.5 fit; the window and the next one, two, are always kept
    assert sum(shelf.asked.values()) > 6  # three passes over five shards: they had to be fetched again
    tight = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=2, cache=tmp_path / "cache", cache_gb=0, memory_gb=0, **QUICK)
    wide = ShardCrops(tars, 64, 5, window=2)
    assert all(torch.equal(tight.batch(s), wide.batch(s)) for s in (0, 3, 9, 27, 1))
    for path in (tmp_path / "cache").glob("[!.]*"): path.unlink()  # by hand, or another process that made room
    assert torch.equal(tight.batch(2), wide.batch(2))


def test_a_shard_that_goes_while_room_is_made(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "gone.tar").symlink_to(tmp_path / "nowhere")  # listed, but not there: as one that another process deletes just now
    crops = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=1, cache=cache, cache_gb=0, memory_gb=0, **QUICK)
    assert crops.batch(0).shape == (5, 3, 64, 64)


def test_a_kept_shard_that_goes_while_it_is_looked_at_is_fetched_again(tars, tmp_path, web, monkeypatch):
    shelf, address = web
    put(shelf, tmp_path)
    crops = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=1, cache=tmp_path / "cache", memory_gb=0, **QUICK)
    first, touch, taken = crops.batch(0), os.utime, []

    def utime(path, *times):
        if str(path).startswith(str(tmp_path / "cache")) and not taken:
            taken.append(Path(path))
            Path(path).unlink()  # as a thread does that makes room
        touch(path, *times)
    monkeypatch.setattr(os, "utime", utime)
    again = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=1, cache=tmp_path / "cache", memory_gb=0, **QUICK)
    assert torch.equal(again.batch(0), first) and taken and taken[0].exists()


def wait_for(condition):
    for _ in range(500):
        if condition(): return
        time.sleep(0.01)
    raise AssertionError("it did not happen within five seconds")


def test_the_next_window_is_fetched_ahead(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path)
    crops = ShardCrops(address + "/s{0..4}.tar", 64, 5, window=2, cache=tmp_path / "cache", **QUICK)
    crops.batch(0)
    order = [crops.shards[i] for i in crops._order(0, 0) + crops._order(0, 1)]
    wait_for(lambda: {address + path for path in shelf.asked} == {*order, crops.shards[0]})


def test_several_processes_fetch_a_shard_once(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path, "/slow/")
    made = []

    def one(rank):
        crops = ShardCrops(address + "/slow/s{0..1}.tar", 64, 4, window=2, cache=tmp_path / "cache", rank=rank, world=4)
        made.append((rank, numbers(crops.batch(0))))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    near = ShardCrops(f"{tmp_path}/s{{0..1}}.tar", 64, 4, window=2)
    assert sum((n for _, n in sorted(made)), []) == numbers(near.batch(0)) and set(shelf.asked.values()) == {1}


def test_servers_that_refuse_or_do_not_answer(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = ShardCrops(address + "/s{3..6}.tar", 64, 5, window=4, cache=tmp_path / "cache", **QUICK)
        taken = steps_of(crops, range(8))
    assert sorted(w.message.args[0].split("/")[-1][:6] for w in caught) == ["s5.tar", "s6.tar"] and len(crops.missing) == 2
    assert sorted(sum(taken, [])) == sorted([*range(30, 50)] * 2) and shelf.asked["/s5.tar"] == 1  # a 404 is final
    shelf["/mute/s0.tar"] = b"x"
    from hific_nb import data

    with pytest.raises(ImageError, match="in 3 tries"):
        data._fetch(address + "/mute/s0.tar", io.BytesIO(), retries=2, backoff=0.01, timeout=0.05)
    assert shelf.asked["/mute/s0.tar"] == 3
    gone = ShardCrops([str(tmp_path / "s0.tar"), "http://127.0.0.1:9/s.tar"], 64, 5, cache=tmp_path / "cache", retries=1,
                      backoff=0.01)
    assert "could not be fetched in 2 tries" in sentence(gone.batch, 0)  # not left out: the run would be another one
    shelf["/long"] = bytes(3000)
    with pytest.raises(ImageError, match="longer than"): data._fetch(address + "/long", io.BytesIO(), max_bytes=2000)


def test_closing_ends_a_download(tars, tmp_path, web):
    shelf, address = web
    put(shelf, tmp_path)
    shelf["/endless/s1.tar"] = b""
    crops = ShardCrops([str(tmp_path / "s0.tar"), address + "/endless/s1.tar"], 64, 5, cache=tmp_path / "cache", threads=2)
    stream = crops.prefetch()
    wait_for(lambda: shelf.asked["/endless/s1.tar"])
    stream.close()
    assert not running()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "ShardCrops"])


def test_import_is_light():
    """What speaks HTTP is loaded when it is needed."""
    import subprocess
    import sys

    code = "import sys, hific_nb.data; print(*(set(sys.modules) & {'requests', 'urllib3', 'matplotlib', 'skimage'}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded
