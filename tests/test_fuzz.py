"""A hundred thousand broken files: each is refused by name, or read as what it claims to be; see tests/fuzzing.py."""

import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import fuzzing
import numpy as np
import pytest
import tiny

from hific_nb.coders import list_coders
from hific_nb.data import sample_photo
from hific_nb.hfc import CorruptError, HfcFile, TruncatedError, layout, pack, pack_varint, unpack

INPUTS = int(os.environ.get("HIFIC_FUZZ_INPUTS", 100_000))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")


@pytest.fixture(scope="module")
def codecs():
    return fuzzing.Codecs(tiny.tiny_codec(), tiny.tiny_codec(levels=True))


@pytest.fixture(scope="module")
def codec(codecs):
    return codecs.one_rate


# ------------------------------------------------------------------------------------------------ what is mutated


def test_the_tiny_model_is_the_same_everywhere(codec):
    assert tiny.digest(codec.model) == tiny.DIGEST, "seeds would make other inputs, and kept files would not be read"
    assert tiny.tiny_codec(seed=1).fingerprint != codec.fingerprint == tiny.tiny_codec().fingerprint
    assert sum(p.numel() for p in codec.model.parameters()) < 10_000


def test_the_specimens_are_files_of_every_kind(codecs, codec):
    files = tiny.specimens(codec) | tiny.leveled_specimens(codecs.leveled)
    lanes = {unpack(data).payload[0] for data in files.values()}
    alpha = {unpack(data).alpha if unpack(data).alpha is None else bool(unpack(data).alpha) for data in files.values()}
    assert {1, 2, 4, 255} <= lanes and alpha == {None, True, False}
    for name, data in files.items():
        assert fuzzing.examine(codecs, data, both=True) == "accepted", name
        assert fuzzing.seal(data) == fuzzing.seal(data, resize=True) == data and fuzzing.sealed(data)
        blank = bytearray(data)
        for f in layout(data):
            if f.name.endswith("checksum"): blank[f.start:f.end] = bytes(4)
        assert fuzzing.seal(bytes(blank)) == data and not fuzzing.sealed(bytes(blank))
        assert len(data) < 8000 and unpack(data).pixels <= fuzzing.MAX_PIXELS
    contents = [unpack(data) for data in files.values()]
    assert {f.level for f in contents} >= {None, 0, 4, 8} and {len(f.tiles) for f in contents} >= {0, 1, 4, 12}
    assert any(f.streams for f in contents) and {b""} < {tile.alpha for f in contents for tile in f.tiles}
    drawn = tiny.draw(codec, 200, 170, 5)
    back = codec.decode_latents(codec.encode(drawn))
    assert np.array_equal(back.symbols, drawn.symbols) and np.array_equal(back.hyperlatents, drawn.hyperlatents)
    for symbols, indexes, tables in tiny.coding_parts(codec, drawn):
        slot = symbols - tables.offset[indexes]
        assert 0.03 < ((slot < 0) | (slot >= tables.slots[indexes] - 1)).mean() < 0.6, "escapes occur, and others do"
    assert len(np.unique(drawn.indexes)) > 8
    assert unpack(tiny.long_specimen(codec)).payload[0] == 4


@pytest.mark.parametrize("size", [(1, 1), (250, 200), (17, 15)])
def test_the_tiny_model_is_a_model(codec, size):
    photo = sample_photo("coffee").resize(size)
    latents = codec.encode_latents(photo)
    back = codec.decode_latents(codec.compress(photo))
    assert np.array_equal(back.symbols, latents.symbols) and codec.generate(back).size == size
    assert np.ptp(latents.symbols) > (10 if latents.symbols.size > 100 else 0)


# ---------------------------------------------------------------------------------------------------- the fuzzer


def check(report, inputs, flags=""):
    assert not report["failures"], fuzzing.describe(report["failures"], flags)
    assert report["inputs"] == inputs


def test_a_hundred_thousand_inputs():
    report = fuzzing.fuzz(0, INPUTS)
    print(report)
    check(report, INPUTS)
    assert 0.45 < report["sealed"] / INPUTS < 0.55  # all odd seeds, but for forged sizes
    # The garbage must get everywhere: a fuzzer that is always turned away at the door finds nothing.
    reached = report["outcomes"]
    assert not [name for name in reached if "unknown" in name]
    missing = [reason for reason in fuzzing.REASONS if not any(reason in name for name in reached)]
    assert not missing or INPUTS < 10_000
    assert reached["accepted"] > 0.02 * INPUTS
    deep = sum(reached.get(f"CorruptError: {r}", 0) for r in ("ends too early", "no encoder writes", "does not end where"))
    assert deep > 0.15 * INPUTS


def test_long_streams():
    "Of 65,536 latents and more, for which the encoder itself takes four lanes."
    check(fuzzing.fuzz(0, max(INPUTS // 500, 20), long=True), max(INPUTS // 500, 20), " --long")


def test_other_coders():
    "Their packages are optional; a file that names one is no reason to crash either."
    present = [name for name in list_coders() if name not in ("rans", "rans-numpy") and fuzzing.available(name)]
    if not present: pytest.skip("neither torchac nor constriction is installed")
    report = fuzzing.fuzz(0, INPUTS // 10, coders=present)
    print(report)
    check(report, INPUTS // 10, f" --coders {' '.join(present)}")
    assert report["outcomes"]["accepted"] > 0.01 * INPUTS // 10


def test_compiled_code_reads_nothing_outside_its_arrays(tmp_path):
    "With bounds checks compiled in, which raise where the usual code would read on."
    report = fuzzing.fuzz(10 ** 6, 10 ** 6 + INPUTS // 20, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
    check(report, INPUTS // 20)


@pytest.mark.parametrize("bug, said", [
    ("shape", "another shape"), ("wrong symbol", "code to other bytes"), ("wrong exception", "IndexError"),
    pytest.param("memory", "MB of memory", marks=linux), pytest.param("reservation", "MemoryError", marks=linux),
    pytest.param("leak", "leak", marks=linux), ("slow", "seconds, twice"), ("stuck", "It was stuck"),
    pytest.param("crash", "SIGSEGV", marks=linux), ("exit", "ended with code 0")])
def test_planted_bugs_are_found(codecs, bug, said):
    report = fuzzing.fuzz(0, 2000, planted=bug, patience=6)
    (failure,) = report["failures"]
    assert said in failure["what"] and report["inputs"] < 2000
    files = tiny.specimens(codecs.one_rate) | tiny.leveled_specimens(codecs.leveled)
    data = fuzzing.Mutator(codecs, files)(failure["seed"])
    assert data.hex() == failure["hex"], "the seed and the bytes are of the same input"
    assert str(failure["seed"]) in fuzzing.describe([failure]) and failure["hex"] in fuzzing.describe([failure])
    if bug == "wrong symbol":  # what is printed shows the bug again, and with it gone is all right
        for flags, code in ((["--plant", bug], 1), ([], 0)):
            done = subprocess.run([sys.executable, fuzzing.__file__, "--hex", *flags], input=failure["hex"], text=True,
                                  capture_output=True)
            assert done.returncode == code, done.stderr


# ------------------------------------------------------------------------------------------------- what it found


def test_text_in_the_alpha_channel_is_not_unpacked(codec):
    "A PNG may carry text; a million characters take a kilobyte in the file and, with one emoji among them, four megabytes."
    file = unpack(tiny.specimens(codec)["alpha"])
    text = b"k\0\1\0\0\0" + zlib.compress(b"x" * 999_000 + "\U0001F600".encode())
    chunk = struct.pack(">I", len(text)) + b"iTXt" + text + struct.pack(">I", zlib.crc32(b"iTXt" + text))
    for at in (33, len(file.alpha) - 12):  # before and after the pixels
        alpha = file.alpha[:at] + chunk + file.alpha[at:]
        with pytest.raises(CorruptError, match="alpha"):
            codec.decode_latents(pack(HfcFile(file.width, file.height, file.fingerprint, 1, file.payload, alpha)))


def test_messages_show_no_addresses(codec):
    file = unpack(tiny.specimens(codec)["alpha"])
    with pytest.raises(CorruptError) as raised:
        codec.decode_latents(pack(HfcFile(file.width, file.height, file.fingerprint, 1, file.payload, b"\x89PNG")))
    assert "0x" not in str(raised.value) and "BytesIO" not in str(raised.value)


def test_a_promise_takes_no_memory(codec, tmp_path):
    "A file on disk of a hundred bytes whose header promises two gigabytes."
    data = bytearray(tiny.specimens(codec)["17x15"])
    path = tmp_path / "a.hfc"
    path.write_bytes(data[:4] + pack_varint(2 ** 31 - 1) + data[5:13] + b"\1\0\5\5" + bytes(80))
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedError): codec.decode_latents(path)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 23
    finally: tracemalloc.stop()
