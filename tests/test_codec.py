"""A photo to a file and back through the shipped model: every promise of the README, on real photos and real damage."""

import io
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms

from hific_nb import Codec, HfcError
from hific_nb.codec import MAX_PIXELS, CodecError, MissingCoderError, file_info
from hific_nb.coders import CoderUnavailableError, get_coder
from hific_nb.config import HificError
from hific_nb.data import ImageError, image_to_tensor, read_image, sample_photo
from hific_nb.hfc import (ChecksumError, CorruptError, HfcFile, HfcReader, ModelMismatchError, NotHfcError, TooLargeError,
                          TruncatedError, UnknownStreamError, VersionError, layout, pack, unpack)
from hific_nb.zoo import list_models


@pytest.fixture(scope="module")
def codec():
    return Codec.from_pretrained("hific-lite")


@pytest.fixture(scope="module")
def photo():
    return sample_photo("coffee").crop((100, 50, 357, 210))  # 257 x 160: no side a multiple of 64


@pytest.fixture(scope="module")
def data(codec, photo):
    return codec.compress(photo)


def pixels(image):
    return np.asarray(image).astype(int)


def test_every_kodak_photo(codec, kodak, tmp_path):
    total = 0
    for path in kodak:
        latents = codec.encode_latents(path)
        data = codec.encode(latents)
        file = tmp_path / f"{path.stem}.hfc"
        file.write_bytes(data)
        decoded = codec.decode_latents(file)
        assert np.array_equal(decoded.symbols, latents.symbols) and np.array_equal(decoded.hyperlatents, latents.hyperlatents)
        assert np.array_equal(pixels(codec.generate(decoded)), pixels(codec.generate(latents)))
        assert len(data) <= codec.ideal_bits(latents) / 8 * 1.005 + 40, path.name
        total += len(data)
    (model,) = [m for m in list_models() if m.name == codec.name]
    # The card's figure comes from real files, made in bfloat16 or float32; between the two the rate hardly moves.
    assert 8 * total / (24 * 768 * 512) == pytest.approx(model.figures["bpp"], rel=0.02)


def test_decompress_is_reconstruct(codec, photo, data):
    assert codec.compress(photo) == data
    assert np.array_equal(pixels(codec.decompress(data)), pixels(codec.reconstruct(photo)))
    error = np.abs(pixels(codec.decompress(data)) - pixels(photo)).mean()
    assert error < 20, "the decoded picture must resemble the photo"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (16, 16), (17, 15), (63, 64), (64, 64), (65, 129)])
def test_any_size(codec, photo, size):
    small = photo.resize(size)
    latents = codec.encode_latents(small)
    decoded = codec.decode_latents(codec.encode(latents))
    assert np.array_equal(decoded.symbols, latents.symbols)
    assert codec.generate(decoded).size == size
    assert len(codec.compress(small)) <= codec.ideal_bits(latents) / 8 * 1.005 + 40


def test_kinds_of_input(codec, photo, data, tmp_path):
    path = tmp_path / "photo.PNG"
    photo.save(path)
    assert codec.compress(path) == codec.compress(str(path)) == codec.compress(path.read_bytes()) == data
    assert codec.compress(image_to_tensor(photo)) == data
    as_float = codec.decompress(codec.compress(image_to_tensor(photo).double() / 255))
    assert as_float.size == photo.size
    grey = codec.decompress(codec.compress(photo.convert("L")))
    assert grey.mode == "RGB" and np.ptp(pixels(grey), axis=2).mean() < 12, "grey stays nearly grey"


@pytest.mark.parametrize("tensor", [torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64),
                                    torch.full((3, 8, 8), 2.0), torch.full((3, 8, 8), float("nan")), torch.zeros(3, 0, 8),
                                    torch.zeros(3, 8, 8).to(torch.float8_e4m3fn)])
def test_tensors_that_are_no_picture(codec, tensor):
    with pytest.raises(ImageError):
        codec.compress(tensor)


def test_a_name_is_no_model():
    with pytest.raises(CodecError, match="from_pretrained\\('hific-lite'\\)"): Codec("hific-lite")


def test_alpha_is_kept_to_the_bit(codec, photo):
    rng = np.random.default_rng(0)
    for alpha in (rng.integers(0, 256, (160, 257)).astype(np.uint8), np.zeros((160, 257), np.uint8)):
        glass = photo.copy()
        glass.putalpha(Image.fromarray(alpha))
        back = codec.decompress(codec.compress(glass))
        assert back.mode == "RGBA" and np.array_equal(np.asarray(back)[..., 3], alpha)
    opaque = photo.copy()
    opaque.putalpha(255)
    data = codec.compress(opaque)
    assert len(data) == len(codec.compress(photo)) and codec.decompress(data).mode == "RGBA"
    assert file_info(data)["alpha_bytes"] == 0 and file_info(codec.compress(photo))["alpha_bytes"] is None


def reseal(data, position, value):
    body = bytearray(data[:-4])
    body[position] = value
    return bytes(body) + zlib.crc32(bytes(body)).to_bytes(4, "little")


def test_bad_files(codec, data, tmp_path):
    at = {f.name: f.start for f in layout(data)}
    for broken, kind in ((b"just a text file, named photo.hfc", NotHfcError), (b"", TruncatedError), (data[:-1], TruncatedError),
                         (data[: len(data) // 2], TruncatedError),
                         (data[:200] + bytes([data[200] ^ 1]) + data[201:], ChecksumError),
                         (reseal(data, at["fingerprint"], data[at["fingerprint"]] ^ 1), ModelMismatchError),
                         (reseal(data, at["coder"], 77), CorruptError), (reseal(data, 3, 0), VersionError)):
        path = tmp_path / "broken.hfc"
        path.write_bytes(broken)
        for source in (broken, path):
            with pytest.raises(kind) as raised:
                codec.decompress(source)
            assert isinstance(raised.value, HfcError) and "\n" not in str(raised.value) and len(str(raised.value)) < 300
    with pytest.raises(HfcError):
        codec.decompress(tmp_path / "missing.hfc")
    with pytest.raises(HfcError):
        codec.decompress(tmp_path)


def test_forged_payload_is_noticed(codec, data):
    """With a checksum that fits, only the coder's states can tell: they do not end where they began."""
    rng, noticed = np.random.default_rng(0), 0
    for position in rng.integers(40, len(data) - 8, 40):
        try: latents = codec.decode_latents(reseal(data, position, data[position] ^ 0x55))
        except CorruptError: noticed += 1
        else: assert latents.symbols.shape == (codec.model.config.latent_channels, 10, 17)
    assert noticed >= 38


def test_the_error_names_the_model(codec, data, tmp_path):
    from hific_nb.model import load_model, save_model
    from hific_nb.zoo import model_folder

    other = load_model(model_folder("hific-lite"))
    with torch.no_grad(): next(other.Hyperprior.synthesis_std.parameters()).mul_(1.01)  # its files hold other latents
    mine = Codec.from_pretrained(save_model(other, tmp_path / "mine"))
    with pytest.raises(ModelMismatchError, match=codec.name):
        mine.decompress(data)
    with pytest.raises(ModelMismatchError, match=mine.fingerprint.hex()):
        codec.decompress(mine.compress(Image.new("RGB", (20, 20))))


def test_gigapixel_header_takes_no_memory(codec, data):
    forged = pack(HfcFile(60_000, 60_000, codec.fingerprint, 1, unpack(data).payload))
    with pytest.raises(TooLargeError, match="max_pixels"):
        codec.decompress(forged)
    program = ("import sys; from PIL import Image; from hific_nb import Codec, HfcError\n"
               "def peak(): return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
               "codec = Codec.from_pretrained('hific-lite', max_pixels=2**16)\n"
               "codec.decompress(codec.compress(Image.new('RGB', (256, 256))))\n"
               "before = peak()\n"
               "try: codec.decompress(sys.stdin.buffer.read())\n"
               "except HfcError: print(peak() - before)\n")
    if not os.path.exists("/proc/self/status"): pytest.skip("no /proc here to read the peak memory from")
    done = subprocess.run([sys.executable, "-c", program], input=forged, capture_output=True)
    assert done.returncode == 0 and int(done.stdout) < 20_000, done.stderr.decode()  # kilobytes


def test_max_pixels_guards_both_ways(photo, data):
    guarded = Codec.from_pretrained("hific-lite", max_pixels=photo.width * photo.height - 1)
    with pytest.raises(ImageError, match="max_pixels"): guarded.compress(photo)
    with pytest.raises(ImageError, match="max_pixels"): guarded.compress(image_to_tensor(photo))
    with pytest.raises(TooLargeError, match="max_pixels"): guarded.decompress(data)
    just = Codec.from_pretrained("hific-lite", max_pixels=photo.width * photo.height)
    assert just.decompress(data).size == photo.size
    assert MAX_PIXELS >= 100_000_000


def test_damaged_alpha(codec, photo, data):
    file = unpack(data)
    for size, mode in (((10, 10), "L"), (photo.size, "RGB")):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        for alpha in (buffer.getvalue(), buffer.getvalue()[:-20], b"nonsense"):
            with pytest.raises(CorruptError, match="alpha"):
                codec.decompress(pack(replace(file, alpha=alpha)))


def test_options_that_are_none(codec, photo):
    small = photo.resize((64, 48))
    for options, word in ((dict(streams=["zabc"]), "dict"), (dict(streams={"thmb": b"junk"}), "thumbnail=True"),
                          (dict(tile=64 * 65536), "4,194,240 at most")):
        with pytest.raises(CodecError, match=word): codec.compress(small, **options)
    for options, word in ((dict(max_pixels="x"), "max_pixels"), (dict(max_pixels=0), "max_pixels"),
                          (dict(dtype=torch.float8_e4m3fn), "dtype")):
        with pytest.raises(CodecError, match=word): Codec(tiny.tiny_model(), device="cpu", **options)


def test_latents_that_no_file_can_hold():
    codec, other = tiny.tiny_codec(levels=True), tiny.tiny_codec(seed=1, levels=True)
    latents = codec.encode_latents(sample_photo("coffee").resize((70, 50)), quality=30)
    assert np.array_equal(codec.decode_latents(codec.encode(latents)).symbols, latents.symbols)
    assert codec.encode(replace(latents, fingerprint=None)) == codec.encode(codec.decode_latents(codec.encode(latents)))
    for changes, word in ((dict(level=500), "level"), (dict(level=None), "must name theirs"), (dict(width=90), "not .4, 4, 5"),
                          (dict(symbols=latents.symbols[:, 1:]), "symbols of the shape"),
                          (dict(hyperlatents=latents.hyperlatents[:2]), "hyperlatents of the shape"),
                          (dict(alpha=Image.new("L", (20, 13))), "alpha must"), (dict(streams={"exif": "abc"}), "must be bytes")):
        with pytest.raises(CodecError, match=word): codec.encode(replace(latents, **changes))
    with pytest.raises(CodecError, match="of another model"): other.encode(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autocast_around_it_changes_nothing(photo, dtype):
    codec = Codec(tiny.tiny_model(levels=True), device="cpu", dtype=dtype)
    data, latents = codec.compress(photo), codec.encode_latents(photo)
    picture, bits, batch = codec.decompress(data), codec.ideal_bits(latents), codec.analyse_batch([photo, photo])
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.compress(photo) == data and codec.ideal_bits(latents) == bits
        assert np.array_equal(pixels(codec.decompress(data)), pixels(picture))
        assert torch.equal(codec.decode_latents(data).y_hat, latents.y_hat)
        assert batch is None or torch.equal(codec.analyse_batch([photo, photo])[1].y, batch[1].y)


# ------------------------------------------------------------------------------------------- levels, tiles, streams


@pytest.fixture(scope="module")
def variable():
    return tiny.tiny_codec(levels=True)


def test_levels_go_through_a_file(variable, photo):
    sizes, seen = [], []
    for level in range(variable.levels):
        data = variable.compress(photo, quality=100 * level / (variable.levels - 1))
        latents = variable.decode_latents(data)
        assert latents.level == file_info(data)["level"] == unpack(data).level == level
        sent = variable.encode_latents(photo, quality=100 * level / (variable.levels - 1))
        assert np.array_equal(latents.symbols, sent.symbols) and torch.equal(latents.y_hat, sent.y_hat)
        sizes.append(len(data))
        seen.append(latents.y_hat)
        assert len(data) <= variable.ideal_bits(sent) / 8 * 1.1 + 40  # its tables are drawn, not fitted
    assert sizes == sorted(sizes) and sizes[-1] > 2 * sizes[0]
    finest = seen[-1]
    errors = [(y - finest).square().mean().item() for y in seen]
    assert all(a > b for a, b in zip(errors, errors[1:])), "the inverse gains bring every level back to the same latents"


def test_what_the_gains_do(variable, photo):
    "y_hat of a level is (mean + symbols) * inverse gain, and the symbols are those of y * gain."
    level = 6
    latents = variable.encode_latents(photo, quality=75)
    gain, inverse = (torch.from_numpy(g[level].astype(np.float64) / 2**16).float().view(1, -1, 1, 1)
                     for g in (variable.coding.gains, variable.coding.inverse_gains))
    with torch.inference_mode():
        sides = 0, -photo.width % 16, 0, -photo.height % 16
        x = torch.nn.functional.pad(image_to_tensor(photo)[None] / 255, sides, mode="replicate")
        y = variable.model.analysis(x) * gain
        z = torch.from_numpy(latents.hyperlatents)[None].float()
        mean = variable.model.Hyperprior.synthesis_mu(z)[..., : y.shape[2], : y.shape[3]]
        assert torch.equal(z, variable.model.Hyperprior.analysis_net(y).round().clamp(-1023, 1023))
        symbols = torch.from_numpy(latents.symbols)[None].float()
        assert ((y - mean - symbols).abs() <= 0.5001).all()
        assert torch.allclose(latents.y_hat, (mean + symbols) * inverse)


def test_rates_that_are_asked_for(variable, photo):
    assert [variable.level_of(q) for q in (0, 49.9, 50, 100, "low", "med", "high", None)] == [0, 4, 4, 8, 1, 4, 7, 4]
    files = [variable.compress(photo, quality=100 * k / 8) for k in range(9)]
    sizes, pixels_of = [len(f) for f in files], photo.width * photo.height
    with mock.patch.object(variable.model, "analysis", wraps=variable.model.analysis) as encoder, \
            mock.patch.object(variable, "quantize", wraps=variable.quantize) as passes:
        for k in range(9):
            for most in (sizes[k], sizes[k] + 1, sizes[k] - 1 if k else 10 ** 9):
                data = variable.compress(photo, max_bytes=most)
                assert data == files[max(i for i in range(9) if sizes[i] <= most)]
        assert encoder.call_count == 27 and passes.call_count <= 27 * 4
    for wanted in np.linspace(0.5 * sizes[0], 1.2 * sizes[-1], 25):
        data = variable.compress(photo, bpp=8 * wanted / pixels_of)
        assert abs(len(data) - wanted) == min(abs(size - wanted) for size in sizes)
    tiled = variable.compress(photo, max_bytes=sizes[4], tile=64)
    assert len(tiled) <= sizes[4] and unpack(tiled).level < 4, "the index counts"
    glass = photo.copy()
    glass.putalpha(tiny.glass(*photo.size))
    extra = len(variable.compress(glass, quality=0)) - sizes[0]
    assert extra > 100 and len(variable.compress(glass, max_bytes=sizes[3] + extra)) <= sizes[3] + extra


@pytest.mark.parametrize("options, said", [
    (dict(quality=-1), "0 ... 100"), (dict(quality=100.5), "0 ... 100"), (dict(quality=float("nan")), "0 ... 100"),
    (dict(quality="best"), "low, med, high"), (dict(quality=True), "0 ... 100"), (dict(bpp=0), "above 0"),
    (dict(bpp="a"), "above 0"),
    (dict(max_bytes=-3), "above 0"), (dict(max_bytes=40), "smaller"), (dict(quality=3, bpp=1), "one of"), (dict(tile=100), "64"),
    (dict(tile=-64), "64")])
def test_rates_that_cannot_be(variable, photo, options, said):
    with pytest.raises(CodecError, match=said): variable.compress(photo, **options)


def test_a_model_of_one_rate_says_so(photo):
    codec = tiny.tiny_codec()
    for options in (dict(quality=50), dict(bpp=0.2), dict(max_bytes=9999)):
        with pytest.raises(CodecError, match="rate levels"): codec.compress(photo, **options)


def test_levels_that_the_model_does_not_have(variable, photo):
    plain, leveled = tiny.tiny_codec(), variable.compress(photo, quality=0)
    assert variable.decode_latents(leveled).level == 0
    for bad in (replace(unpack(leveled), level=variable.levels), replace(unpack(leveled), level=None)):
        with pytest.raises(CorruptError, match="level"): variable.decode_latents(pack(bad))
    data = plain.compress(photo)
    assert plain.decode_latents(data).level is None
    with pytest.raises(CorruptError, match="level"): plain.decode_latents(pack(replace(unpack(data), level=0)))


@pytest.mark.parametrize("tile", [64, 128, 192, 256, 1024])
def test_tiles_change_no_symbol(codec, photo, data, tile):
    glass = photo.copy()
    alpha = tiny.glass(*photo.size)
    alpha.paste(255, (0, 0, tile, photo.height))
    glass.putalpha(alpha)
    tiled, whole = codec.compress(glass, tile=tile), codec.compress(glass)
    a, b = codec.decode_latents(tiled), codec.decode_latents(whole)
    assert np.array_equal(a.symbols, b.symbols) and np.array_equal(a.hyperlatents, b.hyperlatents)
    assert np.abs(pixels(codec.generate(a)) - pixels(codec.generate(b))).max() <= 8  # means are floats, the generator bfloat16
    assert np.array_equal(np.asarray(codec.decompress(tiled))[..., 3], np.asarray(alpha))
    file = unpack(tiled)
    assert file_info(tiled)["tile"] == tile and file_info(tiled)["tiles"] == len(file.tiles) == -(-257 // tile) * -(-160 // tile)
    assert all(t.alpha == b"" for k, t in enumerate(file.tiles) if file.tile_box(k)[2] <= tile), "opaque tiles hold no alpha"


def test_large_pictures_are_tiled_unless_asked_not_to_be():
    codec = tiny.tiny_codec(max_pixels=2**23)
    latents = tiny.draw(codec, 2560, 1728, 3)
    data = codec.encode(latents)
    assert file_info(data)["tile"] == 512 and file_info(data)["tiles"] == 20 and unpack(codec.encode(latents, 0)).tile is None
    assert np.array_equal(codec.decode_latents(data).symbols, latents.symbols)
    assert unpack(codec.encode(tiny.draw(codec, 2048, 2048, 3))).tile is None


def test_a_tile_is_decoded_from_its_own_bytes(codec, photo):
    "What a reader of regions does, with the count of the bytes it touched."
    data = codec.compress(photo, tile=64)
    latents = codec.decode_latents(data)
    touched = []

    class Watched(io.BytesIO):
        def read(self, size=-1):
            piece = super().read(size)
            touched.append((self.tell() - len(piece), self.tell()))
            return piece

    reader = HfcReader(Watched(data))
    head = sum(end - start for start, end in touched)
    ks = reader.file.tiles_in((70, 70, 120, 130))
    assert ks == [6, 11] and reader.file.tile_box(6) == (64, 64, 128, 128)
    for k in ks:
        part = latents.indexes[:, 4 * (k // 5): 4 * (k // 5) + 4, 4 * (k % 5): 4 * (k % 5) + 4]
        part = part[:, : 10 - 4 * (k // 5)]
        decoder = get_coder(reader.file.coder).decoder(reader.tile(k).payload)
        symbols = decoder.read(part.ravel(), codec.coding.latents).reshape(part.shape)
        decoder.close()
        assert np.array_equal(symbols, latents.symbols[:, 4 * (k // 5):, 4 * (k % 5):][:, : part.shape[1], : part.shape[2]])
    assert sum(end - start for start, end in touched) - head == sum(len(unpack(data).tiles[k].payload) for k in ks) < len(data) / 4


def test_damage_to_one_tile_leaves_the_others(codec, photo):
    data = codec.compress(photo, tile=64)
    where = next(f for f in layout(data) if f.name == "tile 7")
    broken = data[:where.start + 3] + bytes([data[where.start + 3] ^ 1]) + data[where.start + 4:]
    with pytest.raises(ChecksumError, match="tile 7"): codec.decode_latents(broken)
    reader = HfcReader(io.BytesIO(broken))
    assert reader.tile(6) == unpack(data).tiles[6] and reader.tile(8) == unpack(data).tiles[8]
    with pytest.raises(IndexError): reader.tile(15)


def wide_gamut():
    "A profile of RGB that is not sRGB: sRGB's own with another name would be taken for it, so its primaries are swapped."
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[132 + 12 * k: 136 + 12 * k]): 132 + 12 * k for k in range(int.from_bytes(profile[128:132], "big"))}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red + 4: red + 12], profile[green + 4: green + 12] = profile[green + 4: green + 12], profile[red + 4: red + 12]
    return bytes(profile)


def test_colours_in_a_profile_of_their_own(codec, photo, data):
    profile, swapped = wide_gamut(), photo.copy()
    swapped.info["icc_profile"] = profile
    converted = codec.compress(swapped)
    assert unpack(converted).streams == {} and converted != data, "by default, colours become sRGB"
    kept = codec.compress(swapped, streams={"iccp": profile})
    back = codec.decompress(kept)
    assert back.info["icc_profile"] == profile and swapped.info["icc_profile"] == profile
    assert np.array_equal(np.asarray(back), np.asarray(codec.decompress(data))), "the pixels are those without a profile"
    assert codec.compress(image_to_tensor(photo), streams={"iccp": profile}) == kept
    assert "icc_profile" not in codec.decompress(data).info
    for source in ("photo.png", photo.convert("L")):
        with pytest.raises(ImageError, match="profile"): codec.compress(source, streams={"iccp": profile})


def test_named_streams_are_carried(codec, photo, data):
    noted = codec.compress(photo, streams={"xmpm": b"<x/>", "exif": b"Exif\0\0II"})
    assert unpack(noted).streams == {"exif": b"Exif\0\0II", "xmpm": b"<x/>"} == codec.decode_latents(noted).streams
    assert file_info(noted)["streams"] == {"exif": 8, "xmpm": 4} and file_info(data)["streams"] == {}
    assert np.array_equal(np.asarray(codec.decompress(noted)), np.asarray(codec.decompress(data)))
    with pytest.raises(HfcError, match="four letters"): codec.compress(photo, streams={"thumbnail": b""})
    with pytest.raises(CodecError, match="write 'exif'"): codec.compress(photo, streams={"EXIF": b"Exif"})  # nobody could read it
    with pytest.raises(CodecError, match="'exif' must be bytes, not str"): codec.compress(photo, streams={"exif": "text"})
    with pytest.raises(UnknownStreamError, match="'Lock'"): codec.decompress(pack(replace(unpack(data), streams={"Lock": b""})))


def test_open_files_are_read_like_paths(codec, data, tmp_path):
    (tmp_path / "a.hfc").write_bytes(data)
    expected = codec.decompress(data)
    with open(tmp_path / "a.hfc", "rb") as file:
        for source in (file, io.BytesIO(data)):
            assert np.array_equal(pixels(codec.decompress(source)), pixels(expected)) and not source.closed
            assert codec.info(source) == file_info(data)
        assert file_info(file)["bytes"] == len(data)
    for source in (None, 3, expected, io.StringIO("x")):
        with pytest.raises(HfcError, match="path, bytes or a file"): codec.decompress(source)


def test_numbers_of_numpy_are_numbers(codec, photo):
    wanted = codec.compress(photo, quality=40, tile=64)
    assert wanted == codec.compress(photo, quality=np.int64(40), tile=np.int32(64)) == codec.compress(
        photo, quality=np.float32(40), tile=64)
    assert len(codec.compress(photo, max_bytes=np.int64(5000))) <= 5000
    for wrong in (dict(tile=64.0), dict(tile="64"), dict(tile=True), dict(bpp=float("inf")), dict(quality=np.bool_(True))):
        with pytest.raises(CodecError, match="must be"): codec.compress(photo, **wrong)
    with pytest.raises(ImageError, match="no pixels"): codec.compress(Image.new("RGB", (0, 10)))
    with pytest.raises(HificError, match="not by NoneType"): Codec.from_pretrained(None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_changes_nothing(codec, photo, data, dtype):
    expected = codec.decompress(data)
    torch.set_default_dtype(dtype)
    try:
        for own in (codec, Codec.from_pretrained("hific-lite")):
            assert own.compress(photo) == own.compress(photo, memory="16MiB") == data
            assert np.array_equal(pixels(own.decompress(data)), pixels(expected))
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [dict(device="cuda:99"), dict(device="toaster"), dict(dtype=torch.int32), dict(dtype="float16"),
                                     dict(coder="morse")])
def test_options_that_cannot_be(options):
    if options.get("device") == "cuda:99" and torch.cuda.is_available(): pytest.skip("there is a CUDA device here")
    with pytest.raises(HificError):
        Codec.from_pretrained("hific-lite", **options)


def test_unknown_model():
    with pytest.raises(HificError, match="hific-lite"):
        Codec.from_pretrained("hific-large")


def test_a_model_without_numbers(photo):
    from hific_nb.config import model_preset
    from hific_nb.model import Model

    model = Model(model_preset("hific-lite").replace(channels=(8, 8, 8, 8)))
    broken = Codec(model)
    torch.nn.init.constant_(next(broken.model.Encoder.parameters()), float("inf"))
    with pytest.raises(CodecError, match="finite"):
        broken.compress(photo)
    torch.nn.init.constant_(next(broken.model.Encoder.parameters()), 1e20)
    with pytest.raises(CodecError, match="32 bits"):
        broken.compress(photo)


def test_the_model_given_stays_as_it_was():
    from hific_nb.config import model_preset
    from hific_nb.model import Model

    model = Model(model_preset("hific-lite").replace(channels=(8, 8, 8, 8))).train()
    Codec(model, dtype=torch.bfloat16)
    assert model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_symbols_do_not_depend_on_the_generators_dtype(codec, photo, data, dtype):
    other = Codec.from_pretrained("hific-lite", dtype=dtype)
    a, b = codec.decode_latents(data), other.decode_latents(data)
    assert np.array_equal(a.symbols, b.symbols) and np.array_equal(a.indexes, b.indexes)
    assert np.abs(pixels(other.decompress(data)) - pixels(codec.decompress(data))).max() <= 8


def test_coders_write_the_same_file(photo, data):
    assert Codec.from_pretrained("hific-lite", coder="rans-numpy").compress(photo.crop((0, 0, 64, 48))) == \
        Codec.from_pretrained("hific-lite").compress(photo.crop((0, 0, 64, 48)))


@pytest.mark.parametrize("name", ["torchac", "constriction"])
def test_files_of_the_optional_coders_are_files_like_others(codec, photo, data, name):
    try: get_coder(name)
    except CoderUnavailableError as error: pytest.skip(str(error))
    other = Codec.from_pretrained("hific-lite", coder=name).compress(photo)
    assert other != data and abs(len(other) - len(data)) < 60 and file_info(other)["coder"] == name
    assert np.array_equal(codec.decode_latents(other).symbols, codec.decode_latents(data).symbols)
    for position in range(30, len(other) - 4, 97):
        try: codec.decode_latents(reseal(other, position, other[position] ^ 0x55))
        except HfcError: pass


def test_a_file_of_an_absent_coder_says_which_and_what_to_type(codec, data):
    file = unpack(data)
    other = pack(replace(file, coder=3))
    with mock.patch.dict(sys.modules, constriction=None):
        assert file_info(other)["coder"] == "constriction"
        with pytest.raises(MissingCoderError, match=r"pip install 'hific_nb\[coders\]'"): codec.decompress(other)


SETTINGS = [dict(ONEDNN_MAX_CPU_ISA="SSE41"), dict(ONEDNN_MAX_CPU_ISA="AVX2"), dict(ATEN_CPU_CAPABILITY="default"),
            dict(MKLDNN_ENABLED="0"), dict(OMP_NUM_THREADS="1"), dict(OMP_NUM_THREADS="2")]


def test_other_processes_decode_the_same_symbols(codec, photo, data, tmp_path):
    path = tmp_path / "photo.hfc"
    path.write_bytes(data)
    program = ("import hashlib, os, sys, torch; from hific_nb import Codec\n"
               "torch.backends.mkldnn.set_flags(os.environ.get('MKLDNN_ENABLED') != '0')\n"
               "codec = Codec.from_pretrained('hific-lite', dtype=torch.float32)\n"
               "print(hashlib.sha256(codec.decode_latents(sys.argv[1]).symbols.tobytes()).hexdigest())\n")
    import hashlib

    wanted = hashlib.sha256(codec.decode_latents(data).symbols.tobytes()).hexdigest()
    for setting in SETTINGS:
        done = subprocess.run([sys.executable, "-c", program, path], env=os.environ | setting, capture_output=True, text=True)
        assert done.stdout.strip() == wanted, (setting, done.stderr)


def test_real_formats_from_kodak(codec, shared, tmp_path):
    photo = read_image(shared / "data" / "kodak" / "kodim05.png").crop((0, 0, 200, 150))
    for name in ("a.jpg", "b.JPEG", "c.webp", "d.tif", "e.bmp", "f.png"):
        photo.save(tmp_path / name)
        assert codec.decompress(codec.compress(tmp_path / name)).size == (200, 150)
