"""Large pictures: pieces that add up to the whole, regions that read no more than they need, budgets that are kept."""

import io
import json
import os
import subprocess
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms

from hific_nb import Codec
from hific_nb import codec as room
from hific_nb.codec import REGIONS, Chain, CodecError, file_info, memory_bytes, plan_pieces
from hific_nb.config import HificError, ModelConfig
from hific_nb.data import ImageError, image_to_tensor, read_image, sample_photo
from hific_nb.hfc import ChecksumError, CorruptError, TooLargeError, layout, pack, unpack
from hific_nb.model import Model
from hific_nb.transforms import build_transforms, reach, register_transform

LIGHT = tiny.CONFIG.replace(channels=(6, 6, 8, 8), encoder_blocks=(1, 1, 1, 2), generator_blocks=(1, 1, 1, 2))
PAPER = ModelConfig(channels=(6, 6, 8, 8, 12), n_residual_blocks=3, latent_channels=4, hyperprior_channels=3)
DRAWINGS = {"light": LIGHT, "paper": PAPER, "noise": PAPER.replace(noise_channels=5), "-1 ... 1": PAPER.replace(
    normalize_input_image=True)}
LEAST = 2 ** 24  # bytes, the smallest budget


def drawn(config, seed=0, **options):
    "A codec with random weights that make latents of some size."
    torch.manual_seed(seed)
    model = Model(config).eval()
    with torch.no_grad():
        for net in (model.Encoder, model.Hyperprior.analysis_net): list(net.parameters())[-2].mul_(20)
    return Codec(model, name="drawn", device="cpu", dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def poster():
    "1100 x 700: no side a multiple of 16."
    return sample_photo("coffee").resize((1100, 700))


@pytest.fixture(scope="module")
def lite():
    return Codec.from_pretrained("hific-lite")


def pixels(image): return np.asarray(image).astype(int)


# ---------------------------------------------------------------------------------------------------------- the planner


@pytest.mark.parametrize("size, most, margin, unit", [((40, 70), 1e9, 9, 1), ((40, 70), 900, 9, 1), ((41, 1), 300, 2, 4),
                                                      ((625, 625), 20_000, 4, 1), ((33, 4096), 5000, 8, 32), ((9, 9), 0, 3, 4)])
def test_pieces_cover_everything_once(size, most, margin, unit):
    pieces, seen = plan_pieces(size, most, margin, unit), np.zeros(size, int)
    for rows, columns in pieces:
        seen[slice(*rows), slice(*columns)] += 1
        assert rows[0] % unit == columns[0] % unit == 0
    assert (seen == 1).all()
    cells = [np.prod([min(n, b - a + 2 * margin) for (a, b), n in zip(piece, size)]) for piece in pieces]
    assert max(cells) <= most or all(b - a <= unit for piece in pieces for a, b in piece)
    assert len(pieces) == 1 or size[0] * size[1] > most


def test_pieces_are_planned_with_the_least_work():
    def work(pieces, margin): return sum(np.prod([min(n, b - a + 2 * margin) for (a, b), n in zip(p, (64, 96))]) for p in pieces)
    for most in (500, 1000, 3000):
        grids = []
        for tall in range(1, 65):
            for across in range(1, 97):
                grid = [((y, min(y + tall, 64)), (x, min(x + across, 96)))
                        for y in range(0, 64, tall) for x in range(0, 96, across)]
                if max(np.prod([min(n, b - a + 10) for (a, b), n in zip(p, (64, 96))]) for p in grid[:2]) <= most:
                    grids.append(work(grid, 5))
        assert work(plan_pieces((64, 96), most, 5), 5) <= 1.1 * min(grids)


@pytest.mark.parametrize("text, value", [("2GB", 2e9), ("1.5 GiB", 1.5 * 2 ** 30), ("800m", 8e8), (2 ** 31, 2 ** 31), ("1e9", None),
                                         ("1MB", None), (None, None), (True, None), (-1, None), ("GB", None)])
def test_budgets(text, value):
    if value is not None: assert memory_bytes(text) == value
    else:
        with pytest.raises(CodecError, match="memory must be"): memory_bytes(text)


# ----------------------------------------------------------------------------------------------------- parts of a network


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_part_is_what_the_whole_has_there(name):
    torch.manual_seed(1)
    encoder, generator = (net.eval().requires_grad_(False) for net in build_transforms(DRAWINGS[name]))
    assert not any(reach(layer) is None for net in (encoder, generator) for layer in net.fine_layers() + net.coarse_layers())
    inputs = {encoder: torch.rand(1, 3, 22 * 16, 27 * 16), generator: torch.randn(1, 4, 22, 27)}
    for net, x in inputs.items():
        coarse_first, whole = net is generator, net(x)
        middle = net.coarse(x) if coarse_first else x
        chain, size = Chain(net.fine_layers()), tuple(middle.shape[2:])
        def read(rows, columns, middle=middle): return middle[..., slice(*rows), slice(*columns)]
        full = chain.part(read, (0, 22 * 16 if coarse_first else 22), (0, 27 * 16 if coarse_first else 27), size)
        finished = full if coarse_first else net.coarse(full)
        assert torch.allclose(finished, whole, atol=1e-5), "the layers are the network"
        step = 16 if coarse_first else 1
        for rows, columns in (((0, 5), (0, 27)), ((9, 10), (11, 20)), ((21, 22), (26, 27)), ((3, 22), (0, 1))):
            rows, columns = ((a * step + 3 * (a > 0) * (step > 1), b * step) for a, b in (rows, columns))
            part = chain.part(read, rows, columns, size)
            assert torch.allclose(part, full[..., slice(*rows), slice(*columns)], atol=2e-5), (rows, columns)
        cuts = room._cuts(net, 4)
        x = full if not coarse_first else x
        assert torch.allclose(net.coarse(x, lambda layer, x, cuts=cuts: cuts.through(layer, x, 30_000)), net.coarse(x), atol=2e-5)


def test_a_shorter_margin_is_seen():
    "The test above can fail: with a margin less, parts differ."
    torch.manual_seed(1)
    generator = build_transforms(LIGHT)[1].eval().requires_grad_(False).double()
    chain, x = Chain(generator.fine_layers()), torch.randn(1, 8, 12, 12).double()
    def read(rows, columns): return x[..., slice(*rows), slice(*columns)]
    whole = chain.part(read, (0, 192), (0, 192), (12, 12))
    for i, (margin, down, up) in enumerate(chain.reaches):
        if not margin: continue
        short = Chain(chain.layers)
        short.reaches[i] = margin - 1, down, up
        part = short.part(read, (80, 96), (96, 112), (12, 12))
        assert (chain.part(read, (80, 96), (96, 112), (12, 12)) - whole[..., 80:96, 96:112]).abs().max() < 1e-12
        assert (part - whole[..., 80:96, 96:112]).abs().max() > 1e-9, i


# ------------------------------------------------------------------------------------------------------ pieces and whole


@pytest.mark.parametrize("name", DRAWINGS)
def test_pieces_are_the_whole(name, poster):
    codec = drawn(DRAWINGS[name])
    whole, parts = codec.encode_latents(poster, memory="1GB"), codec.encode_latents(poster, memory=LEAST)
    with mock.patch.object(codec, "_encode_pieces", wraps=codec._encode_pieces) as used:
        codec.encode_latents(poster, memory="1GB")
        assert not used.called
        codec.encode_latents(poster, memory=LEAST)
        assert used.called
    assert np.abs(whole.symbols).max() >= 2, "weights that make symbols of some size"
    differs = parts.symbols != whole.symbols
    assert np.abs(parts.symbols - whole.symbols).max() <= 1 and differs.mean() < 1e-4
    assert (parts.hyperlatents != whole.hyperlatents).mean() < 1e-4
    data = codec.encode(whole, 128)
    a, b = codec.decompress(data, memory="1GB"), codec.decompress(data, memory=LEAST)
    assert np.ptp(pixels(a)) > 10 and np.abs(pixels(a) - pixels(b)).max() <= 1 and (pixels(a) != pixels(b)).mean() < 1e-3
    assert np.array_equal(pixels(codec.generate(whole)), pixels(a))


@contextmanager
def cut_to(cells, area=None):
    "Pieces of about so many latents, whatever the budget."
    def plan(size, most, margin=0, unit=1): return plan_pieces(size, min(most, cells), margin, unit)
    with mock.patch.object(room, "plan_pieces", plan): yield


@pytest.mark.parametrize("cells", [200, 500, 900])
def test_hyperprior_and_tables_in_parts(cells, poster):
    "Symbols of a file do not depend on how the decoder is cut; all of the encoder, cut small, writes the same but for roundings."
    codec = tiny.tiny_codec(levels=True)
    whole = codec.encode_latents(poster)
    for tile in (0, 64, 192):
        data = codec.encode(whole, tile)
        with cut_to(cells):
            assert len(codec._areas(whole.symbols.shape[1:])) > 3
            cut, sent = codec.decode_latents(data), codec.encode_latents(poster, memory=LEAST)
            assert np.array_equal(cut.symbols, whole.symbols) and np.array_equal(cut.indexes, whole.indexes)
            assert torch.allclose(cut.y_hat, whole.y_hat, atol=1e-4)
            assert (sent.symbols != whole.symbols).mean() < 1e-4
            if np.array_equal(sent.symbols, whole.symbols): assert codec.encode(sent, tile) == data
            assert np.abs(pixels(codec.decompress(data, memory=LEAST)) - pixels(codec.generate(whole))).max() <= 1


def test_mixtures_in_parts(poster):
    model = tiny.tiny_model(mixture=True)
    codec = Codec(model, name="mixture", device="cpu", dtype=torch.float32)
    whole = codec.encode_latents(poster.crop((0, 0, 500, 300)))
    for tile in (0, 128):
        data = codec.encode(whole, tile)
        with cut_to(300): cut = codec.decode_latents(data)
        assert np.array_equal(cut.symbols, whole.symbols)
        box = 130, 250, 340, 299
        assert np.abs(pixels(codec.decompress(data, box)) - pixels(codec.generate(whole).crop(box))).max() <= 1


def borders(size, seams, reach=8):
    "A mask of the pixels within `reach` of a seam, given as edges of rows and columns."
    near = np.zeros(size, bool)
    for edge in seams[0]: near[max(0, edge - reach): edge + reach] = True
    for edge in seams[1]: near[:, max(0, edge - reach): edge + reach] = True
    return near


def test_seams_cannot_be_found(lite):
    "RMS of (pieces - whole) near borders against elsewhere, before pixels are rounded; and what a seam looks like."
    photo, budget = sample_photo("retina").crop((300, 300, 1324, 1068)), 2 ** 25
    latents = lite.encode_latents(photo)
    whole = lite.model.synthesis(latents.y_hat.to(lite.dtype).contiguous(memory_format=torch.channels_last)).float()[0].numpy()

    def pieced():
        out, edges = np.zeros_like(whole), (set(), set())
        def y_hat(rows, columns): return latents.y_hat[room._slices(rows, columns)]
        for (left, top), part in lite._paint_pieces(y_hat, (48, 64), (0, 768), (0, 1024), budget):
            out[:, top: top + part.shape[2], left: left + part.shape[3]] = part[0].float().numpy()
            edges[0].add(top), edges[1].add(left)
        return out, borders(whole.shape[1:], [edge - {0} for edge in edges])

    def ratio(out, near):
        error = (out - whole) ** 2
        return error[:, near].mean() ** 0.5, error[:, ~near].mean() ** 0.5

    with torch.inference_mode():
        out, near = pieced()
        at, elsewhere = ratio(out, near)
        assert 0.01 < near.mean() < 0.5
        assert at <= 1.05 * elsewhere or at < 1e-4, "a fortieth of a grey level cannot be seen"
        assert np.abs(out - whole).max() < 1 / 32
        with mock.patch.object(Chain, "needs", lambda self, span, size: [  # a margin of nothing
                (span[0] // 16, -(-span[1] // 16)) if i == 0 else span for i in range(len(self.layers) + 1)]
                if any(up > 1 for _, _, up in self.reaches) else [span] * (len(self.layers) + 1)), \
                mock.patch.object(Chain, "part", lambda self, read, r, c, size: torch.nn.Sequential(*self.layers)(
                    read(self.needs(r, 0)[0], self.needs(c, 0)[0]))):
            at, elsewhere = ratio(*pieced())
        assert at > 3 * elsewhere and at > 1e-2


def test_hific_lite_in_its_own_precision(lite):
    "bfloat16 where the machine has it: the promise of the issue, on a photo."
    photo = sample_photo("retina").crop((200, 200, 1224, 968))
    whole, parts = (lite.encode_latents(photo, memory=m) for m in ("1GB", LEAST))
    assert np.abs(parts.symbols - whole.symbols).max() <= 1 and (parts.symbols != whole.symbols).mean() < 1e-4
    data = lite.compress(photo, tile=256)
    a, b = (pixels(lite.decompress(data, memory=m)) for m in ("1GB", LEAST))
    assert np.abs(a - b).max() <= 1 and (a != b).mean() < 1e-3


def test_rates_are_found_in_pieces(poster):
    codec = tiny.tiny_codec(levels=True)
    sizes = [len(codec.compress(poster, quality=100 * k / 8, tile=64)) for k in range(9)]
    for options in (dict(max_bytes=sizes[5]), dict(bpp=8 * sizes[3] / (1100 * 700)), dict(max_bytes=sizes[7] - 1)):
        whole = codec.compress(poster, tile=64, **options)
        with mock.patch.object(codec, "_collected", wraps=codec._collected) as all_symbols, \
                mock.patch.object(codec, "_encode_pieces", wraps=codec._encode_pieces) as once:
            parts = codec.compress(poster, tile=64, memory=LEAST, **options)
        assert once.call_count == 1, "the encoder runs once"
        assert all(call.args[2] == (2, 2) for call in all_symbols.call_args_list), "only the thumbnail's symbols are all in memory"
        assert file_info(parts)["level"] == file_info(whole)["level"] and abs(len(parts) - len(whole)) < 20
    assert codec.encode_latents(poster, max_bytes=sizes[5], tile=64).level == 5


def test_alpha_and_profile_in_pieces(poster):
    codec = tiny.tiny_codec()
    glass = poster.copy()
    glass.putalpha(tiny.glass(*poster.size))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for tile in (0, 192):
        data = codec.compress(glass, tile=tile, memory=LEAST, streams={"iccp": icc})
        assert file_info(data)["width"] == 1100
        back = codec.decompress(data, memory=LEAST)
        assert back.mode == "RGBA" and np.array_equal(pixels(back)[..., 3], pixels(glass)[..., 3])
        assert back.info["icc_profile"] == icc
        box = 100, 190, 777, 400
        part = codec.decompress(data, box)
        assert part.info["icc_profile"] == icc and np.array_equal(pixels(part)[..., 3], pixels(glass.crop(box))[..., 3])
        assert np.abs(pixels(part) - pixels(back.crop(box))).max() <= 1
        small = codec.decompress(data, thumbnail=True)
        assert small.mode == "RGBA" and small.info["icc_profile"] == icc and max(small.size) == (28 if tile else 256)


def test_kinds_of_input_in_pieces(poster, tmp_path):
    codec = tiny.tiny_codec()
    data = codec.compress(poster, memory=LEAST)
    poster.save(tmp_path / "a.png")
    turned = poster.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png"), image_to_tensor(poster),
                   tmp_path / "turned.png"):
        assert codec.compress(source, memory=LEAST) == data
    exact = codec.encode_latents(image_to_tensor(poster).double() / 255, memory=LEAST)
    assert (exact.symbols != codec.decode_latents(data).symbols).mean() < 1e-3
    assert np.array_equal(pixels(poster), pixels(Image.open(tmp_path / "a.png"))), "the picture given is left as it was"


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "icc", "I;16", "lzw", "turned", "cut"])
def test_tiffs_are_read_as_pillow_reads_them(kind, tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(room, "TILED_FROM", 2 ** 16)
    photo, path = sample_photo("astronaut").crop((0, 0, 500, 400)), tmp_path / "photo.TIF"
    glass = photo.copy()
    glass.putalpha(tiny.glass(*photo.size))
    if kind == "turned": photo.save(path, tiffinfo={274: 3})
    elif kind == "lzw": photo.save(path, compression="tiff_lzw")
    elif kind == "I;16": tifffile.imwrite(path, np.asarray(photo.convert("L")).astype(np.uint16) * 257, photometric="minisblack")
    elif kind == "icc":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        photo.save(path, compression="tiff_adobe_deflate", icc_profile=profile)
    else:
        image = {"L": photo.convert("L"), "RGBA": glass}.get(kind, photo)
        extra = dict(extrasamples=["unassalpha"]) if kind == "RGBA" else {}
        tifffile.imwrite(path, np.asarray(image), photometric="minisblack" if kind == "L" else "rgb", tile=(64, 96),
                         compression="zlib", **extra)
    if kind == "cut":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ImageError): room._Pixels(path, 2 ** 20).read((0, 400), (0, 500))
        return
    with pytest.warns(UserWarning) if kind == "icc" else mock.MagicMock():
        wanted = read_image(path)
        got = room._Pixels(path, 2 ** 20)
        assert isinstance(got.image, room._Tiff) == (kind in ("L", "RGB", "RGBA", "icc"))
        for rows, columns in (((0, 400), (0, 500)), ((63, 129), (95, 97)), ((399, 400), (1, 500))):
            part = wanted.crop((columns[0], rows[0], columns[1], rows[1])).convert("RGB")
            assert np.array_equal(got.read(rows, columns).permute(1, 2, 0).numpy(), np.asarray(part))
        assert (got.alpha is None) == (kind != "RGBA") or np.array_equal(got.alpha, wanted.getchannel("A"))
        with pytest.raises(ImageError, match="max_pixels"): room._Pixels(path, 1000)


def whole(path): return room._Pixels(path, 2 ** 30)


def test_large_jpegs_and_pngs_are_read_in_parts(tmp_path, poster):
    pytest.importorskip("pyvips", reason="libvips is not here")
    for name, options in {"a.png": {}, "a.jpg": dict(quality=60), "fine.jpg": dict(quality=95, subsampling=0),
                          "half.jpg": dict(quality=90, subsampling=1), "progressive.jpg": dict(progressive=True)}.items():
        for image in (poster, poster.convert("L")):
            image.save(path := tmp_path / name, **options)
            parts = room._Pixels(path, 2 ** 30, 10 ** 6)
            assert isinstance(parts.image, room._Vips) and type(whole(path).image) is Image.Image
            for box in (((0, 700), (0, 1100)), ((611, 700), (3, 1100)), ((1, 2), (0, 1))):
                assert torch.equal(parts.read(*box), whole(path).read(*box)), (name, box)
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # a profile that does not fit is ignored by both
    poster.save(tmp_path / "profile.png", icc_profile=wide)
    with pytest.warns(UserWarning, match="profile"):
        assert torch.equal(room._Pixels(tmp_path / "profile.png", 2 ** 30, 10).read((9, 99), (8, 88)),
                           whole(tmp_path / "profile.png").read((9, 99), (8, 88)))


def test_what_libvips_would_read_otherwise_is_left_to_pillow(tmp_path, poster):
    pytest.importorskip("pyvips", reason="libvips is not here")
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.asarray(poster.convert("L")).astype(np.uint16) * 257
    glass = poster.copy()
    glass.putalpha(99)
    for name, image, options in (("turned.jpg", poster, dict(exif=turned)), ("turned.png", poster, dict(exif=turned)),
                                 ("alpha.png", glass, {}), ("deep.png", Image.fromarray(deep), {}),
                                 ("p.png", poster.quantize(9), {}), ("key.png", poster, dict(transparency=(1, 2, 3))),
                                 ("cmyk.jpg", poster.convert("CMYK"), {})):
        image.save(path := tmp_path / name, **options)
        assert type(room._Pixels(path, 2 ** 30, 10).image) is Image.Image, name
    poster.save(path := tmp_path / "late.png")
    data = path.read_bytes()
    exif = turned.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + exif
    path.write_bytes(data[:-12] + len(exif).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:])
    assert room._Pixels(path, 2 ** 30, 10).size == whole(path).size == (700, 1100)
    for name in ("cut.png", "cut.jpg"):
        poster.save(path := tmp_path / name)
        path.write_bytes(path.read_bytes()[:-9000])
        with pytest.warns(UserWarning, match="libvips cannot"), pytest.raises(ImageError, match="whole copy"):
            room._Pixels(path, 2 ** 30, 10)
    with pytest.raises(ImageError, match="max_pixels"): room._Pixels(tmp_path / "p.png", 1000, 10)


def test_the_budget_that_a_picture_breaks_is_named(tmp_path, poster, monkeypatch):
    poster.save(path := tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    room._Pixels(path, 2 ** 30, 8 * 1100 * 700)  # nothing is said of what fits
    with pytest.warns(UserWarning, match=r"a\.png .*pip install 'hific_nb\[large\]'"): room._Pixels(path, 2 ** 30, 2 ** 20)


def test_networks_that_cannot_be_cut(poster):
    "Instance norm sees everything, and of a stranger nothing is known: they run whole, and a box is cut from that."
    class Blocks(torch.nn.Module):
        def __init__(self, config): super().__init__()
        def forward(self, x): return torch.nn.functional.avg_pool2d(x, 16) * 32

    class Paint(torch.nn.Module):
        def __init__(self, config): super().__init__()
        def forward(self, y): return torch.nn.functional.interpolate(y / 32, scale_factor=16)

    register_transform("blocks of a test", Blocks, Paint)
    for config in (PAPER.replace(use_channel_norm=False),
                   ModelConfig(transform="blocks of a test", latent_channels=3, hyperprior_channels=4)):
        torch.manual_seed(0)
        codec = Codec(Model(config).eval(), device="cpu", dtype=torch.float32, memory=LEAST)
        data = codec.compress(poster, tile=128)
        whole, box = codec.decompress(data), (33, 401, 350, 600)
        assert np.array_equal(pixels(codec.decompress(data, box)), pixels(whole.crop(box)))


# ----------------------------------------------------------------------------------------------------------------- regions


@pytest.fixture(scope="module")
def region_files(poster):
    codec = tiny.tiny_codec()
    return codec, {tile: codec.compress(poster, tile=tile) for tile in (0, 64, 256)}


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (1099, 699, 1100, 700), (0, 0, 1100, 700), (64, 64, 128, 128), (63, 65, 129, 127),
                                 (500, 0, 508, 700), (0, 333, 1100, 334), [17, 18, 400, 300]])
def test_a_box_is_the_crop_of_the_whole(region_files, box):
    codec, files = region_files
    for data in files.values():
        part, whole = codec.decompress(data, box), codec.decompress(data)
        assert part.size == (box[2] - box[0], box[3] - box[1]) and np.abs(pixels(part) - pixels(whole.crop(box))).max() <= 1


def test_a_box_reads_what_it_needs(region_files, tmp_path):
    codec, files = region_files
    data, path, touched = files[64], tmp_path / "a.hfc", []
    path.write_bytes(data)

    class Watched(io.FileIO):
        def read(self, size=-1):
            piece = super().read(size)
            touched.append((self.tell() - len(piece), self.tell()))
            return piece

    box = 500, 300, 580, 350
    with mock.patch("hific_nb.hfc.open_file", Watched): part = codec.decompress(path, box)
    assert np.abs(pixels(part) - pixels(codec.decompress(data).crop(box))).max() <= 1
    fields = {f.name: f for f in layout(data)}
    index = fields["checksum"].end
    file = unpack(data)
    margin = 16 * (codec._generator.margin + codec._generator.coarse.margin + 1)
    allowed = file.tiles_in((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin))
    names = {k for k in range(len(file.tiles)) for a, b in touched if a <= fields[f"tile {k}"].start < b}
    assert set(file.tiles_in(box)) <= names <= set(allowed) and len(names) < len(file.tiles) / 4
    read = sum(b - a for a, b in touched)
    assert read <= index + sum(len(file.tiles[k].payload) for k in allowed) < 0.6 * len(data)


def test_damage_outside_the_box(region_files):
    codec, files = region_files
    data, fields = files[64], {f.name: f for f in layout(files[64])}
    at = fields["tile 190"].start
    broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]
    with pytest.raises(ChecksumError, match="tile 190"): codec.decompress(broken)
    box = 10, 10, 200, 200
    assert np.array_equal(pixels(codec.decompress(broken, box)), pixels(codec.decompress(data, box)))
    left, top, right, bottom = unpack(data).tile_box(190)
    with pytest.raises(ChecksumError, match="tile 190"): codec.decompress(broken, (left, top, right, bottom))
    assert np.array_equal(pixels(codec.decompress(data[:-1000], box)), pixels(codec.decompress(data, box))), "a file still arriving"


@pytest.mark.parametrize("box, said", [
    ((0, 0, 1101, 5), "1100 x 700"), ((0, 5, 3, 5), "left < right"), ((-1, 0, 3, 5), "0 <= left"), ((5, 0, 3, 5), "left < right"),
    ((0, 0, 10), "four whole numbers"), ((0, 0, 2.5, 3), "four whole numbers"), ("box", "four whole"), (7, "four whole numbers")])
def test_boxes_that_cannot_be(region_files, box, said):
    codec, files = region_files
    for data in (files[0], files[64]):
        with pytest.raises(CodecError, match=said): codec.decompress(data, box)
    with pytest.raises(CodecError, match=said): codec.generate(codec.decode_latents(files[0]), box)


def test_max_pixels_is_for_the_box(region_files):
    codec, files = region_files
    small = tiny.tiny_codec(max_pixels=40_000)
    with pytest.raises(TooLargeError, match="max_pixels"): small.decompress(files[64])
    assert small.decompress(files[64], (0, 0, 200, 200)).size == (200, 200)
    assert small.decompress(files[64], thumbnail=True).size == (28, 18)
    with pytest.raises(TooLargeError, match="box"): small.decompress(files[64], (0, 0, 200, 201))
    with pytest.raises(TooLargeError, match="max_pixels"):
        tiny.tiny_codec(max_pixels=1100 * 700 // REGIONS).decompress(files[64], (0, 0, 2, 2))


def test_sides_beyond_65535():
    codec = tiny.tiny_codec()
    ramp = np.zeros((40, 70_000, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(70_000) // 300, np.arange(40)[:, None] * 6
    data = codec.compress(image_to_tensor(Image.fromarray(ramp)), tile=128, memory=LEAST)
    assert file_info(data)["width"] == 70_000
    whole = codec.decompress(data, memory=LEAST)
    box = 69_800, 3, 70_000, 40
    assert np.abs(pixels(codec.decompress(data, box)) - pixels(whole.crop(box))).max() <= 1
    assert codec.decompress(data, thumbnail=True).size == (511, 1)


@pytest.mark.parametrize("box", [None, (3, 100, 1098, 699)])
def test_pictures_are_written_in_strips(poster, tmp_path, box):
    codec, path = tiny.tiny_codec(), tmp_path / "a.png"
    glass, icc = poster.copy(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    glass.putalpha(tiny.glass(*poster.size))
    for image, tile, streams in ((poster, 64, {}), (glass, 64, {"iccp": icc}), (poster, 0, {})):
        data = codec.compress(image, tile=tile, streams=streams)
        with mock.patch.object(codec, "_decode", wraps=codec._decode) as strips, \
                mock.patch.object(codec, "_budget", lambda memory: 2 ** 20):
            assert codec.decompress_to(path, data, box, memory=LEAST) == codec.decompress(data, box).size
        assert tile == 0 or strips.call_count > 9, "strips, and the comparison"
        written, wanted = Image.open(path), codec.decompress(data, box)
        assert written.mode == wanted.mode and np.abs(pixels(written) - pixels(wanted)).max() <= 1
        assert written.info.get("icc_profile") == streams.get("iccp")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"], "no temporary file is left"
    before = path.read_bytes()
    data = codec.compress(poster, tile=64)
    at = {f.name: f for f in layout(data)}["tile 190"].start
    with pytest.raises(ChecksumError): codec.decompress_to(path, data[:at] + b"?" + data[at + 1:])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1, "a broken file leaves what was there"
    with pytest.raises(HificError, match="Check the folder"): codec.decompress_to(tmp_path / "none" / "a.png", data)
    with pytest.raises(TooLargeError, match="box"): tiny.tiny_codec(max_pixels=1000 * 700).decompress_to(path, data)


# -------------------------------------------------------------------------------------------------------------- thumbnails


def test_thumbnails(lite, poster, region_files):
    codec, files = region_files
    data = lite.compress(poster, tile=256)
    info, small = file_info(data), lite.decompress(data, thumbnail=True)
    assert small.size == (28, 18) and info["streams"]["thmb"] < 200
    reference = poster.resize(small.size, Image.Resampling.BOX)
    assert np.abs(pixels(small) - pixels(reference)).mean() < 20, "it looks like the photo"
    plain = lite.compress(poster, tile=256, thumbnail=False)
    assert file_info(plain)["streams"] == {} and len(plain) < len(data)
    made = lite.decompress(plain, thumbnail=True)
    assert made.size == (256, 163) and np.abs(pixels(made) - pixels(poster.resize(made.size, Image.Resampling.BOX))).mean() < 12
    assert file_info(lite.compress(poster))["streams"] == {}, "an ordinary photo has no thumbnail unless one is asked for"
    assert "thmb" in file_info(lite.compress(poster, thumbnail=True))["streams"]
    with pytest.raises(CodecError, match="not for both"): codec.decompress(files[64], (0, 0, 1, 1), thumbnail=True)
    file = unpack(files[64])
    with pytest.raises(CorruptError):  # what claims to be a thumbnail is read as carefully as any file
        broken = pack(replace(unpack(file.streams["thmb"]), coder=77))
        codec.decompress(pack(replace(file, streams={"thmb": broken})), thumbnail=True)
    forged = pack(replace(unpack(file.streams["thmb"]), width=5000, height=5000))
    with pytest.raises(TooLargeError): codec.decompress(pack(replace(file, streams={"thmb": forged})), thumbnail=True)


def test_what_the_index_costs(lite):
    "At most 0.5 % of the file, thumbnail included; the rest that tiles cost are the beginnings of their streams."
    photo, wall = sample_photo("coffee"), Image.new("RGB", (2400, 2000))
    for i in range(20): wall.paste(photo.rotate(180 * (i % 2)), (600 * (i % 4), 400 * (i // 4)))
    data = lite.compress(wall)
    index = sum(f.end - f.start for f in layout(data) if f.name.startswith("tile ") and f.name.endswith(("bytes", "checksum")))
    info = file_info(data)
    assert info["tiles"] == 20 and index < 0.002 * len(data) and index + info["streams"]["thmb"] < 0.005 * len(data)
    assert len(data) - info["streams"]["thmb"] - len(lite.compress(wall, tile=0)) < 0.01 * len(data)


def test_the_command_line(lite, tmp_path, capsys):
    from hific_nb.cli import main

    photo, data = tmp_path / "a.png", tmp_path / "a.hfc"
    sample_photo("coffee").save(photo)
    assert main(["compress", str(photo), "--tile", "128", "--memory", "16MiB"]) == 0
    assert "thmb" in file_info(data)["streams"]
    assert main(["decompress", str(data), "--box", "100,50,333,250", "--memory", "2GB"]) == 0
    assert main(["decompress", str(data), "--thumbnail"]) == 0
    box, small = (Image.open(tmp_path / f"a.{kind}.png") for kind in ("box", "thumbnail"))
    assert np.array_equal(pixels(box), pixels(lite.decompress(data, (100, 50, 333, 250)))) and small.size == (15, 10)
    assert main(["compress", str(photo), "--tile", "128", "--no-thumbnail", "--force"]) == 0
    assert file_info(data)["streams"] == {}
    capsys.readouterr()
    assert main(["decompress", str(data), "--box", "0,0,9999,1", "--force"]) == 1 and "600 x 400" in capsys.readouterr().err
    assert main(["compress", str(photo), "--memory", "plenty", "--force"]) == 1 and "memory must be" in capsys.readouterr().err
    for wrong in ("1,2,3", "a,b,c,d", "1 2 3 4"):
        with pytest.raises(SystemExit): main(["decompress", str(data), "--box", wrong])
        assert "left,top,right,bottom" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ memory


PROGRAM = """
import ctypes, json, sys
import numpy as np, torch
from PIL import Image
sys.path.insert(0, sys.argv[1])
import tiny
from hific_nb import codec as room
from hific_nb.data import sample_photo
torch.set_num_threads(1)
def line(name): return 1024 * int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith(name)))
codec, out = tiny.tiny_codec(), {}
codec.decompress(codec.compress(Image.new("RGB", (256, 256)), tile=64))
photo = sample_photo("coffee").resize((3600, 2400))
for memory in sys.argv[2:]:
    if memory == "2GB": room.PIECE = 2 ** 40  # the whole at once
    for name, function, what in (("compress", codec.compress, photo), ("decompress", codec.decompress, None)):
        ctypes.CDLL(None).malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")
        before = line("VmRSS")
        result = function(data if what is None else what, memory=memory)
        out[f"{name} {memory}"] = line("VmHWM") - before
        if what is not None: data = result
print(json.dumps(out))
"""


def test_the_budget_is_kept():
    "Nine megapixels in a process of their own: what a budget adds to the picture's own memory."
    if not os.path.exists("/proc/self/clear_refs"): pytest.skip("no /proc here to read the peak memory from")
    done = subprocess.run([sys.executable, "-c", PROGRAM, os.path.dirname(__file__), "64MB", "2GB"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, picture = json.loads(done.stdout), 4 * 3600 * 2400
    for way in ("compress", "decompress"):
        assert peak[f"{way} 64MB"] < 64e6 + picture + 30e6, peak
        assert peak[f"{way} 2GB"] > peak[f"{way} 64MB"] + 50e6, "without pieces it takes more: the test can fail"
