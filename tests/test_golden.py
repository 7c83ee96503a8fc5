"""The files in tests/golden, of version 1, decode for ever: to the symbols and (within rounding) the pixels that lie beside them.

A failure here is a mistake in the decoder, whatever else it seems to be: these files are never made again. See golden/make.py.
"""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import hfc_reader
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from hific_nb.codec import THUMBNAIL, Codec, file_info
from hific_nb.coders import CoderUnavailableError, coder_name, get_coder
from hific_nb.hfc import EXIF, ICC_PROFILE, MAX_NUMBER, MAX_TILE, TILE_UNIT, XMP, HfcReader, layout, pack, unpack
from hific_nb.hyperprior import read_symbols
from hific_nb.model import load_model

GOLDEN = Path(__file__).resolve().parent / "golden"
SPECIFICATION = GOLDEN.parent.parent / "docs" / "hfc.md"
FILES = sorted(p.stem for p in GOLDEN.glob("*.hfc"))
CODECS: dict = {}


MODELS = {hfc_reader.safetensors(p)[1]["fingerprint"]: p.parent for p in sorted(GOLDEN.glob("*/tables.safetensors"))}


def codec_of(data: bytes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Codec:
    "The golden model that a file names, loaded once."
    name = MODELS[unpack(data).fingerprint.hex()].name
    key = name, dtype, device
    if key not in CODECS: CODECS[key] = Codec(load_model(GOLDEN / name), name=name, device=device, dtype=dtype)
    return CODECS[key]


def content(name: str) -> tuple[bytes, dict]:
    with np.load(GOLDEN / f"{name}.npz") as found: return (GOLDEN / f"{name}.hfc").read_bytes(), dict(found)


def need_coder(data: bytes) -> None:
    try: get_coder(unpack(data).coder)
    except CoderUnavailableError as error: pytest.skip(str(error))


def compare(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    "The largest difference of a pixel; symbols must be the same."
    data, wanted = content(name)
    codec = codec_of(data, dtype, device)
    latents = codec.decode_latents(data)
    assert np.array_equal(latents.hyperlatents, wanted["hyperlatents"]) and np.array_equal(latents.symbols, wanted["symbols"]), name
    pixels = np.asarray(codec.generate(latents)).astype(int)[-48:, -64:]
    if not wanted["pixels"].size: return 0
    assert pixels.shape == wanted["pixels"].shape, name
    if pixels.shape[2] == 4: assert np.array_equal(pixels[..., 3], wanted["pixels"][..., 3]), name
    return int(np.abs(pixels - wanted["pixels"]).max())


def test_nothing_was_changed():
    listed = dict(reversed(line.split("  ")) for line in (GOLDEN / "SHA256SUMS").read_text().splitlines())
    there = {p.relative_to(GOLDEN).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in GOLDEN.rglob("*") if p.suffix in (".hfc", ".npz", ".json", ".safetensors")}
    assert there == listed, "golden files are added, never changed: git checkout tests/golden"
    assert len(FILES) >= 30 and sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 400_000


def test_there_is_a_file_of_every_kind():
    files = {name: unpack(content(name)[0]) for name in FILES}
    assert {coder_name(f.coder) for f in files.values()} == {"rans", "torchac", "constriction"}
    for coder in (1, 2, 3):
        of_it = [f for f in files.values() if f.coder == coder]
        assert {f.level is None for f in of_it} == {f.tile is None for f in of_it} == {True, False} == {
            any(t.alpha for t in f.tiles) for f in of_it}
        assert (1, 1) in {(f.width, f.height) for f in of_it}
    assert {f.fingerprint.hex() for f in files.values()} == set(MODELS)
    assert [name for name in FILES if not content(name)[1]["pixels"].size] == ["mixture-wild"]
    assert {f.payload[0] for f in files.values() if f.coder == 1 and f.payload} >= {1, 2, 4, 255}
    assert {None if f.alpha is None else bool(f.alpha) for f in files.values() if f.tile is None} == {None, False, True}
    assert {f.level for f in files.values()} >= {None, 0, 4, 8} and {f.tile for f in files.values()} >= {None, 1, 2}
    assert {name for f in files.values() for name in f.streams} == {ICC_PROFILE, EXIF, XMP, "zgld"}


@pytest.mark.parametrize("name", FILES)
def test_it_decodes(name):
    data, _ = content(name)
    need_coder(data)
    assert compare(name) <= 2
    file = unpack(data)
    assert pack(file) == data and b"".join(data[f.start:f.end] for f in layout(data)) == data
    info = file_info(GOLDEN / f"{name}.hfc")
    assert info["level"] == file.level and info["bytes"] == len(data) and info["tiles"] == len(file.tiles)
    picture = codec_of(data).decompress(GOLDEN / f"{name}.hfc")
    assert picture.info.get("icc_profile") == file.streams.get("iccp")
    assert picture.mode == ("RGB" if file.alpha is None else "RGBA") and picture.size == (file.width, file.height)


@pytest.mark.parametrize("name", FILES)
def test_the_specification_is_enough(name):
    "The reader that was written from docs/hfc.md finds every field, and of files by rANS every symbol."
    data, wanted = content(name)
    f, file = hfc_reader.read(data), unpack(data)
    assert (f.width, f.height, f.fingerprint, f.coder, f.level, f.tile) == (
        file.width, file.height, file.fingerprint, file.coder, file.level, file.tile)
    assert (f.payload, f.alpha, dict(f.streams), f.tiles) == (
        file.payload, file.alpha, file.streams, [(t.payload, t.alpha) for t in file.tiles])
    if f.coder != 1: return
    z, y = hfc_reader.symbols(f, hfc_reader.model_folder(MODELS[f.fingerprint.hex()]))
    assert np.array_equal(z, wanted["hyperlatents"]) and np.array_equal(y, wanted["symbols"])


@pytest.mark.parametrize("name", [name for name in FILES if "tile" in name or name == "everything"])
def test_a_tile_alone(name):
    data, wanted = content(name)
    need_coder(data)
    with open(GOLDEN / f"{name}.hfc", "rb") as f:
        reader = HfcReader(f)
        codec, latents = codec_of(data), codec_of(data).decode_latents(data)
        for k in reversed(range(reader.file.grid[0] * reader.file.grid[1])):
            left, top, right, bottom = reader.file.tile_box(k)
            area = np.s_[:, top // 16:-(-bottom // 16), left // 16:-(-right // 16)]
            decoder = get_coder(reader.file.coder).decoder(reader.tile(k).payload)
            symbols = read_symbols(decoder, latents.indexes[area], codec.coding.latents)
            decoder.close()
            assert np.array_equal(symbols, wanted["symbols"][area])


def test_in_bfloat16_and_float64():
    present = [name for name in FILES if not name.startswith(("torchac", "constriction"))]
    assert max(compare(name, torch.float64) for name in present) <= 2
    assert max(compare(name, torch.bfloat16) for name in present) <= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_a_gpu():
    present = [name for name in FILES if not name.startswith(("torchac", "constriction"))]
    assert max(compare(name, device="cuda") for name in present) <= 2
    assert max(compare(name, torch.bfloat16, "cuda") for name in present) <= 8


LONG = {"rans": "883bb438da719905", "torchac": "c613a7c599511771", "constriction": "94b4b047d4c70cb2"}


@pytest.mark.parametrize("name", LONG)
def test_streams_longer_than_a_block(name):
    """Of 2**20 + 5 symbols, too many for a file here: a coder that still writes these bytes, and reads what it writes, still
    cuts streams where the specification says."""
    try: coder = get_coder(name)
    except CoderUnavailableError as error: pytest.skip(str(error))
    tables, n = tiny.tables([1, 5, 40, 300, 1500]), 2**20 + 5
    indexes = (tiny.hashed(n, 1) % 5).astype(np.uint8)
    symbols = ((tiny.hashed(n, 2) - 32768) * (tables.slots[indexes] // 2 + 2) >> 15).astype(np.int32)
    data = coder.encode([(symbols[:70_000], indexes[:70_000], tables), (symbols, indexes, tables)])
    assert hashlib.sha256(data).hexdigest()[:16] == LONG[name]
    decoder = coder.decoder(data)
    assert np.array_equal(decoder.read(indexes[:70_000], tables), symbols[:70_000])
    assert np.array_equal(decoder.read(indexes, tables), symbols)
    decoder.close()


OTHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_golden
torch.set_num_threads(1)
print(json.dumps({name: test_golden.compare(name) for name in sys.argv[2:]}))
"""


@pytest.mark.parametrize("settings", [
    dict(ONEDNN_MAX_CPU_ISA="SSE41", ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE"), dict(ONEDNN_MAX_CPU_ISA="AVX2")])
def test_under_another_instruction_set(settings):
    names = [name for name in FILES if not name.startswith("torchac")]
    try: get_coder("constriction")
    except CoderUnavailableError: names = [name for name in names if not name.startswith("constriction")]
    done = subprocess.run([sys.executable, "-c", OTHER, str(GOLDEN.parent), *names], env=os.environ | settings, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert sorted(differences) == sorted(names) and max(differences.values()) <= 2


# ------------------------------------------------------------------------------------------------ the specification


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_golden_files_are_never_written_again(make):
    before = {p: p.read_bytes() for p in GOLDEN.iterdir() if p.is_file()}
    with pytest.raises(SystemExit, match="promise"): make.main(["17x33"])
    assert {p: p.read_bytes() for p in GOLDEN.iterdir() if p.is_file()} == before


def test_the_example_is_the_file(make):
    text = make.example()
    assert text.count("|") > 50
    assert text in SPECIFICATION.read_text(encoding="utf-8"), "put the output of make.py --example there"


def table(heading: str) -> list[list[str]]:
    "The rows of the first table behind a heading of the specification."
    lines = SPECIFICATION.read_text(encoding="utf-8").split(heading, 1)[1].splitlines()
    rows = [line for line in lines[:60] if line.startswith("|")]
    end = next((k for k in range(1, len(rows)) if set(rows[k]) <= set("|- ") and k > 1), len(rows) + 1) - 1
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:end]]


def test_the_fields_stand_in_the_order_of_the_specification():
    kinds = [row[1] for row in table("### 2.1 The first section")]

    def kind(field):
        name = "".join(c for c in field if not c.isdigit()).replace("  ", " ")
        if name in ("stream name", "stream bytes"): return "name, bytes"
        if name in ("tile bytes", "tile alpha bytes", "tile checksum"): return "tile bytes, tile alpha bytes, tile checksum"
        if name.startswith("stream "): return "named streams"
        return name
    seen = set()
    for name in FILES:
        section = [kind(f.name) for f in layout(content(name)[0])]
        section = section[:section.index("checksum") + 1]
        assert [kinds.index(k) for k in section] == sorted(kinds.index(k) for k in section)
        seen |= set(section)
    assert seen == set(kinds)


def test_numbers_of_the_specification():
    text = SPECIFICATION.read_text(encoding="utf-8")
    limits = dict(table("## 12. Limits"))
    assert limits["T"] == str(MAX_TILE) and MAX_NUMBER == 2**31 - 1 and TILE_UNIT == 64 and "units of 64 pixels" in text
    assert limits["width, height, level, size, bytes of a stream or tile"] == "2^31 - 1"
    assert [row[0].strip("`") for row in table("## 4. Named streams")] == [ICC_PROFILE, EXIF, XMP, THUMBNAIL]
    coders = table("## 6. Coders")
    assert [int(number) for number, _ in coders] == [1, 2, 3] and all(coder_name(k + 1) in coders[k][1].lower() for k in range(3))


def test_alpha_of_the_golden_files_is_what_the_specification_allows():
    for name in FILES:
        file = unpack(content(name)[0])
        streams = [(file.alpha, (file.width, file.height))] if file.alpha else []
        for k, tile in enumerate(file.tiles):
            left, top, right, bottom = file.tile_box(k)
            if tile.alpha: streams.append((tile.alpha, (right - left, bottom - top)))
        for png, size in streams:
            at, kinds = 8, []
            while at < len(png):
                length = int.from_bytes(png[at:at + 4], "big")
                kinds.append(png[at + 4:at + 8])
                at += 12 + length
            assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and set(kinds[1:-1]) == {b"IDAT"} and at == len(png)
            assert png[24:29] == b"\x08\0\0\0\0"
            picture = Image.open(io.BytesIO(png))
            assert picture.mode == "L" and picture.size == size
