"""A fuzzer of `.hfc` files: mutations of real ones, decoded in a child process that is watched.

    python tests/fuzzing.py 0 100000             the inputs of these seeds; a report in JSON
    python tests/fuzzing.py --hex < input.txt    one input, as a failure printed it

An input is all right if it raises `HfcError` with one short line, or gives latents of the shape its header claims which
code to the same bytes again. Anything else is a failure: another exception, a warning, a crash, more than 2 seconds, more than
64 MB above the memory before.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import io
import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

SECONDS, MEGABYTES = 2, 64
MAX_PIXELS, LONG_PIXELS = 2 ** 16, 2 ** 22
CRUMB = 1 << 21  # bytes in which the child leaves the input it is at, for the case that it cannot speak any more


# ------------------------------------------------------------------------------------------------------- mutations

NUMBERS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 1024, 4096, 16383, 16384, 65535, 65536,
           65537, 2 ** 20, 2 ** 21, 2 ** 24, 2 ** 28, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 35, 2 ** 63, 2 ** 64]
SIDES = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 129, 200, 255, 256]
NAMES = [b"iccp", b"exif", b"xmpm", b"zzzz", b"aaaa", b"AAAA", b"Exif", b"ABCD", b"Zkey", b"\0\0\0\0", b"exi ", b"\xffabc"]
STATES = [0, 1, 2 ** 16 - 1, 2 ** 16, 2 ** 16 + 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1]
EXTREMES = [-2 ** 31, -2 ** 31 + 1, 2 ** 31 - 1, -1024, -1023, 1023, 1024, 2 ** 24, -2 ** 24, 0, 1, -1]
CHUNKS = [b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"tEXt",
          b"zTXt", b"iTXt", b"bKGD", b"sBIT", b"tIME", b"hIST", b"IEND", b"IDAT", b"abcd", b"ABCD", b"\0\0\0\0", b"cICP"]


def first_section(data: bytes) -> tuple[int, int]:
    "Where a file's size ends, and where its first section does as its size has it, never beyond the file."
    at = 4
    while at < len(data) and data[at] > 127: at += 1
    size = sum((byte & 127) << 7 * k for k, byte in enumerate(data[4:at + 1][:9]))
    return min(at + 1, len(data)), min(at + 1 + size, len(data))


def seal(data: bytes, resize: bool = False) -> bytes:
    """The bytes with checksums that fit, where there is room for them: of the tiles that the index names, and of the first section.

    resize: the size, too, is made to fit; the first section takes up all of the file that the index does not give to tiles.
    """
    from hific_nb.hfc import HfcError, layout, pack_varint

    def fields():
        try: return layout(data)
        except HfcError: return []
    if resize:
        start, _ = first_section(data)
        tiles = sum(f.value for f in fields() if f.name.startswith("tile ") and f.name.endswith("bytes"))
        data = data[:4] + pack_varint(max(len(data) - start - tiles, 0)) + data[start:]
    found, out = fields(), bytearray(data)
    parts = {f.name: data[f.start:f.end] for f in found}
    for f in found:
        if f.name.startswith("tile ") and f.name.endswith(" checksum"):
            tile = f.name.removesuffix(" checksum")
            out[f.start:f.end] = zlib.crc32(parts[tile] + parts.get(f"{tile} alpha", b"")).to_bytes(4, "little")
    start, end = first_section(data)
    if end - 4 >= start: out[end - 4:end] = zlib.crc32(out[:end - 4]).to_bytes(4, "little")
    return bytes(out)


def sealed(data: bytes) -> bool:
    start, end = first_section(data)
    return end - 4 >= start and zlib.crc32(data[:end - 4]) == int.from_bytes(data[end - 4:end], "little")


class Codecs:
    "The codecs of two models; a file goes to the one it names."

    def __init__(self, one_rate, leveled): self.one_rate, self.leveled = one_rate, leveled

    def of(self, data: bytes): return self.leveled if self.leveled.fingerprint in data[:20] else self.one_rate


def damage(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    "One blow to bytes of any meaning."
    kind, n = rng.randrange(9), len(data)
    at = rng.randrange(n + 1)
    if rng.random() < 0.4: at = min(at, rng.randrange(32))  # where headers and states are
    size = min(rng.choice([1, 1, 2, 3, 4, 8, 16, 64, 300]), n - at)
    out = bytearray(data)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            if n: out[rng.choice([at % n, rng.randrange(n)])] ^= 1 << rng.randrange(8)
    elif kind == 1: out[at:at + size] = rng.randbytes(size)
    elif kind == 2: del out[at:]
    elif kind == 3: del out[at:at + size]
    elif kind == 4: out[at:at] = rng.randbytes(rng.choice([1, 2, 4, 17, 300]))
    elif kind == 5: out[at:at] = out[at:at + size] * rng.choice([1, 1, 3])
    elif kind == 6: out[at:at + size] = bytes([rng.choice([0, 1, 127, 128, 255])]) * size
    elif kind == 7:
        other = rng.choice(others)
        return bytes(out[:at]) + other[rng.choice([min(at, len(other)), rng.randrange(len(other) + 1)]):]
    elif n: out[at:], out[:at] = out[:n - at], out[n - at:]
    return bytes(out)


class Mutator:
    "Inputs from seeds: mutations of files that `codecs` wrote; those of odd seeds get checksums that fit."

    def __init__(self, codecs: Codecs, files: dict[str, bytes]):
        from hific_nb.hfc import layout, unpack

        self.codecs, self.files = codecs, list(files.values())
        self.fields = [{f.name: data[f.start:f.end] for f in layout(data)} for data in self.files]
        self.contents = [unpack(data) for data in self.files]
        self.payloads = [stream for file in self.contents for stream in (file.payload, *(tile.payload for tile in file.tiles))]
        self.bomb = zlib.compress(bytes(1 << 24), 9)
        self.kinds = [self.of_bytes, self.of_header, self.of_stream, self.of_symbols, self.of_alpha]
        self.latents = [codecs.of(data).decode_latents(data) for data in self.files]

    def __call__(self, seed: int) -> bytes:
        rng = random.Random(seed)
        kind, which = rng.choices(self.kinds, [3, 4, 6, 2, 2])[0], rng.randrange(len(self.files))
        data = kind(rng, which)
        return seal(data, kind == self.of_bytes and rng.random() < 0.7) if seed % 2 else data

    def of_bytes(self, rng, which) -> bytes:
        data = self.files[which]
        for _ in range(rng.choice([1, 1, 2, 5])): data = damage(rng, data, self.files)
        return data

    def number(self, rng, near: int = 0) -> bytes:
        from hific_nb.hfc import pack_varint

        value = rng.choice([rng.choice(NUMBERS), rng.getrandbits(rng.randrange(1, 70)), max(0, near + rng.randrange(-3, 4))])
        form = bytearray(pack_varint(value))
        wrong = rng.randrange(12)
        if wrong == 0: form[-1:] = bytes([form[-1] | 128]) + b"\x80" * rng.choice([0, 1, 9]) + b"\0"  # longer than needed
        elif wrong == 1: form = b"\xff" * rng.choice([1, 2, 5, 10, 400])
        return bytes(form)

    def of_header(self, rng, which) -> bytes:
        from hific_nb.hfc import pack_varint

        fields, near = dict(self.fields[which]), self.contents[which].width

        def put(name, value, flag, after):
            "A field, at its place if it was not there, with or (seldom) without its flag."
            nonlocal fields
            if name not in fields:
                names = list(fields)
                at = names.index(next(n for n in after if n in fields)) + 1
                fields = {n: fields.get(n, value) for n in (*names[:at], name, *names[at:])}
            fields[name] = value
            if rng.random() < 0.9: fields["flags"] = bytes([fields["flags"][0] | flag])
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(["version", "fingerprint", "coder", "flags", "sides", "sides", "sides", "width", "height", "level",
                               "level", "tile", "tile", "alpha bytes", "streams", "stream", "index", "index", "size"])
            if name in ("version", "coder"): fields[name] = bytes([rng.choice([0, 1, 2, 3, 127, 128, 255, rng.randrange(256)])])
            elif name == "flags":
                fields[name] = bytes([rng.choice([fields[name][0] ^ 1 << rng.randrange(8), rng.randrange(256)])])
            elif name == "fingerprint":
                models = self.codecs.one_rate.fingerprint, self.codecs.leveled.fingerprint
                fields[name] = rng.choice([bytes(8), rng.randbytes(8), *models, *models, damage(rng, fields[name], self.payloads)])
            elif name == "sides":  # such as the reader takes: the coder meets symbols that were meant for another shape
                fields["width"], fields["height"] = (pack_varint(rng.choice(SIDES)) for _ in range(2))
            elif name == "level":
                few = pack_varint(rng.randrange(12)), pack_varint(rng.choice([9, 100, 127, 128]))
                put(name, rng.choice([*few, self.number(rng)]), 1, ["height"])
            elif name == "tile":
                put(name, rng.choice([pack_varint(rng.randrange(5)), self.number(rng, 65535)]), 2, ["level", "height"])
            elif name == "alpha bytes":
                put(name, self.number(rng, len(fields.get("alpha", b""))), 16, ["tile", "level", "height"])
            elif name == "streams":
                few = pack_varint(rng.randrange(4))
                put(name, rng.choice([few, self.number(rng)]), 4, ["alpha bytes", "tile", "level", "height"])
            elif name == "stream" and "stream 0 name" in fields:
                named = rng.choice([n for n in fields if n.startswith("stream ") and n.endswith((" name", " bytes"))])
                fields[named] = self.number(rng, 10) if named.endswith("bytes") else rng.choice([*NAMES, rng.randbytes(4)])
            elif name == "stream":
                put("streams", b"\1", 4, ["alpha bytes", "tile", "level", "height"])
                put("stream 0 name", rng.choice([*NAMES, rng.randbytes(4)]), 4, ["streams"])
                put("stream 0 bytes", pack_varint(3), 4, ["stream 0 name"])
                put("stream 0", rng.randbytes(rng.choice([3, 3, 3, 2, 4])), 4, ["stream 0 bytes"])
            elif name == "index" and "tile 0 bytes" in fields:
                named = rng.choice([n for n in fields if n.startswith("tile ") and n.endswith(("bytes", "checksum"))])
                fields[named] = rng.randbytes(4) if named.endswith("checksum") else self.number(
                    rng, len(fields[named.replace(" alpha bytes", "").replace(" bytes", "")]))
            elif name == "size": fields["size"] = self.number(rng, sum(map(len, fields.values())))
            elif name in ("width", "height"): fields[name] = self.number(rng, near)
        if fields["size"] == self.fields[which]["size"]:  # it is made to fit, most of the time
            names = list(fields)
            inside = names[names.index("size") + 1:names.index("checksum") + 1]
            fields["size"] = pack_varint(sum(len(fields[n]) for n in inside) + (rng.random() < 0.05))
        return b"".join(fields.values())

    def file(self, which: int, rng, **changes) -> bytes:
        "A file with other content and lengths that fit; what is not given is as in a specimen. Its checksum does not fit."
        from dataclasses import replace

        from hific_nb.hfc import pack

        data = pack(replace(self.contents[which], **changes))
        end = first_section(data)[1]
        return data[:end - 4] + rng.randbytes(4) + data[end:]

    def in_place(self, which: int, rng, change) -> bytes:
        "The file whose payload, or whose stream of one of the tiles, is `change` of what it was."
        from hific_nb.hfc import Tile

        file = self.contents[which]
        k = rng.randrange(-1, len(file.tiles))
        if k < 0: return self.file(which, rng, payload=change(file.payload, 0))
        tiles = list(file.tiles)
        tiles[k] = Tile(change(tiles[k].payload, k + 1), tiles[k].alpha)
        return self.file(which, rng, tiles=tuple(tiles))

    def of_stream(self, rng, which) -> bytes:
        return self.in_place(which, rng, lambda payload, k: self.broken(rng, payload))

    def broken(self, rng, payload: bytes) -> bytes:
        for _ in range(rng.choice([1, 1, 2, 4])):
            kind = rng.randrange(7)
            lanes = payload[0] if payload else 0
            if kind == 0: payload = bytes([rng.choice([0, 1, 2, 3, 4, 5, 8, 254, 255])]) + payload[1:]
            elif kind == 1 and lanes:
                at = 1 + 4 * rng.randrange(lanes)
                state = struct.pack("<I", rng.choice([*STATES, rng.getrandbits(32)]))
                payload = payload[:at] + state + payload[at + 4:]
            elif kind == 2:
                start = 1 + 4 * lanes
                at = start + 2 * rng.randrange(max(1, (len(payload) - start) // 2))
                word = struct.pack("<H", rng.choice([0, 1, 0x7FFF, 0xFFFF, rng.getrandbits(16)]))
                payload = payload[:at] + word * rng.choice([1, 1, 2, 40]) + payload[at + rng.choice([0, 2, 2, 2]):]
            elif kind == 3: payload = payload[:len(payload) - rng.choice([1, 2, 2, 4, 6, 20])]
            elif kind == 4:
                lanes = rng.choice([0, 1, 1, 4, 255])
                payload = bytes([lanes]) + rng.randbytes(4 * lanes + 2 * rng.choice([0, 1, 10, 400]))
            elif kind == 5: payload = rng.choice([b"", b"\x01", payload + bytes(2), rng.choice(self.payloads)])
            else: payload = damage(rng, payload, self.payloads)
        return payload

    def of_symbols(self, rng, which) -> bytes:
        "A right stream of symbols that no encoder chooses, or of another number of them."
        import tiny
        from hific_nb.coders import get_coder
        from hific_nb.rans import rans_encode

        file, latents = self.contents[which], self.latents[which]
        codec = self.codecs.of(self.files[which])
        streams = [tiny.coding_parts(codec, latents)] if file.tile is None else tiny.tile_parts(codec, latents, file)

        def other(_, k):
            parts = []
            for symbols, indexes, tables in streams[k]:
                symbols, n = symbols.copy(), len(symbols)
                for _ in range(rng.choice([0, 1, 3, 30])): symbols[rng.randrange(n)] = rng.choice(EXTREMES)
                if rng.random() < 0.2: symbols[:] = rng.choice(EXTREMES)
                if rng.random() < 0.1: indexes = (indexes + rng.randrange(1, tables.rows)) % tables.rows
                keep = rng.choice([n, n, n, n, n - 1, n // 2, 0])
                parts.append((symbols[:keep], indexes[:keep], tables))
            if rng.random() < 0.1: parts.reverse()
            if rng.random() < 0.1: parts.append(parts[0])
            lanes = rng.choice([None, 1, 2, 3, 4, 4, 5, 255])
            return rans_encode(parts, lanes) if file.coder == 1 else get_coder(file.coder).encode(parts)
        return self.in_place(which, rng, other)

    def of_alpha(self, rng, which) -> bytes:
        "An alpha stream with every kind of damage that keeps it a PNG, and some that do not."
        import tiny

        from hific_nb.hfc import Tile

        file = self.contents[which]
        k = rng.randrange(len(file.tiles)) if file.tiles else None
        left, top, right, bottom = (0, 0, file.width, file.height) if k is None else file.tile_box(k)
        w, h = right - left, bottom - top

        def put(alpha):
            if k is None: return self.file(which, rng, alpha=alpha)
            tiles = list(file.tiles)
            tiles[k] = Tile(tiles[k].payload, alpha)
            return self.file(which, rng, alpha=b"", tiles=tuple(tiles))
        if rng.random() < 0.1: return put(rng.choice([b"", b"\x89PNG", rng.randbytes(50), self.strange(rng)]))
        header = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
        chunks = [[b"IHDR", header], [b"IDAT", zlib.compress(b"".join(b"\0" + bytes([y & 255]) * w for y in range(h)), 1)],
                  [b"IEND", b""]]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            kind, at = rng.randrange(8), rng.randrange(len(chunks))
            if kind == 0:
                new = bytearray(header)
                spot = rng.choice([0, 4, 8, 9, 10, 11, 12])
                if spot < 8: new[spot:spot + 4] = struct.pack(">I", rng.choice([0, 1, w, h, 10 ** 5, 2 ** 31, rng.getrandbits(32)]))
                else: new[spot] = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
                chunks[0] = [b"IHDR", bytes(new)]
            elif kind == 1: chunks.insert(at, [rng.choice(CHUNKS), rng.randbytes(rng.choice([0, 1, 4, 13, 26, 256, 768]))])
            elif kind == 2: chunks.insert(rng.randrange(len(chunks) + 1), list(chunks[at]))
            elif kind == 3 and len(chunks) > 1: del chunks[at]
            elif kind == 4: chunks[at] = [chunks[at][0], damage(rng, chunks[at][1], self.payloads)]
            elif kind == 5:
                raw = rng.choice([b"", bytes((w + 1) * h - 1), bytes((w + 1) * h + 1), bytes(4 * w * h), rng.randbytes(64)])
                chunks[min(1, len(chunks) - 1)] = [b"IDAT", rng.choice([zlib.compress(raw, 1), self.bomb])]
            elif kind == 6: rng.shuffle(chunks)
            elif rng.random() < 0.05:
                text = "x" * 999999 + "\U0001F600"  # a million characters in a kilobyte, of four bytes each once they are read
                packed, name = b"\0\1\0\0\0" + zlib.compress(text.encode()), rng.choice([b"iTXt", b"zTXt"])
                chunks[at:at] = [[name, bytes([65 + k]) + packed] for k in range(rng.choice([1, 20, 63]))]
        out = bytearray(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks:
            crc = zlib.crc32(name + content) ^ (rng.random() < 0.03)
            size = len(content) if rng.random() > 0.03 else rng.choice([0, len(content) + 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1])
            out += struct.pack(">I", size) + name + content + struct.pack(">I", crc)
        alpha = bytes(out)
        if rng.random() < 0.15: alpha = damage(rng, alpha, [tiny.png(tiny.glass(9, 9))])
        return put(alpha)

    def strange(self, rng) -> bytes:
        "A picture, but no grey PNG."
        from PIL import Image

        kind, mode = rng.choice([("PNG", "RGB"), ("PNG", "1"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "L"),
                                 ("GIF", "L"), ("BMP", "L"), ("TIFF", "L"), ("PPM", "L")])
        buffer = io.BytesIO()
        Image.new(mode, (17, 15)).save(buffer, kind)
        return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------- one input

REASONS = ["ends within its header", "ends after", "goes on after its end", "is empty", "no .hfc file", "checksum does not fit",
           "checksum of tile", "format version", "out of range", "contradicts itself", "more than max_pixels", "without its stream",
           "was written with", "rate level", "no coder", "alpha channel",
           "cut or damaged at its", "impossible state", "no symbols where", "ends too early", "no encoder writes",
           "does not end where"]


def attempt(codec, data: bytes):
    "What decoding gives: latents, or the `HfcError`."
    from hific_nb.hfc import HfcError

    try: return codec.decode_latents(data)
    except HfcError as error: return error


def container(data: bytes):
    "Every field of a file that is one, else None."
    from hific_nb.hfc import HfcError, unpack

    try: f = unpack(data)
    except HfcError: return None
    return (f.width, f.height, f.fingerprint, f.coder, f.level, f.tile, f.alpha, f.payload, sorted(f.streams.items()),
            [(tile.payload, tile.alpha) for tile in f.tiles])


def independent(data: bytes):
    import hfc_reader

    try: f = hfc_reader.read(data)
    except hfc_reader.Refused: return None
    return (f.width, f.height, f.fingerprint, f.coder, f.level, f.tile, f.alpha, f.payload, f.streams, f.tiles)


def same(a, b) -> bool:
    if isinstance(a, Exception) or isinstance(b, Exception): return type(a) is type(b) and str(a) == str(b)
    return (a.symbols == b.symbols).all() and (a.hyperlatents == b.hyperlatents).all()


def examine(codecs: Codecs, data: bytes, both: bool = False, path: Path | None = None) -> str:
    """What became of an input, in a word; raises where it is not all right.

    both: decode by the plain path, too, and read the container with the reader that was written from the specification, and
    compare. path: write it there and read it from the disk, too.
    """
    import numpy as np
    import tiny
    import torch

    from hific_nb.coders import get_coder
    from hific_nb.hfc import layout, unpack
    from hific_nb.rans import rans_encode

    codec = codecs.of(data)
    got = attempt(codec, data)
    if both:
        assert container(data) == independent(data), "the specification has it otherwise"
        plain = lambda name: get_coder("rans-numpy" if name == 1 else name)
        with mock.patch("hific_nb.codec.get_coder", plain):
            assert same(attempt(codec, data), got), "the plain path decodes otherwise"
    if path is not None:
        path.write_bytes(data)
        disk = attempt(codec, path)  # of two faults, it may name the other
        assert isinstance(disk, Exception) and isinstance(got, Exception) or same(disk, got), "the file on disk decodes otherwise"
    if isinstance(got, Exception):
        text = str(got)
        assert "\n" not in text and 20 < len(text) < 400 and text.isprintable(), f"an odd message: {text!r}"
        (reason, *_) = [r for r in reversed(REASONS) if r in text] or ["unknown"]
        return f"{type(got).__name__}: {reason}"
    claimed = {f.name: f.value for f in layout(data)}
    config, file = codec.model.config, unpack(data)
    W, H = claimed["width"], claimed["height"]
    h, w = -(-H // 16), -(-W // 16)
    assert (got.width, got.height) == (W, H) and 0 < W * H <= codec.max_pixels, "other sides"
    for array, shape in ((got.symbols, (config.latent_channels, h, w)),
                         (got.hyperlatents, (config.hyperprior_channels, -(-h // 4), -(-w // 4)))):
        assert isinstance(array, np.ndarray) and array.dtype == np.int32 and array.shape == shape, "another shape"
    assert got.indexes.shape == got.symbols.shape and got.y_hat.shape == (1, *got.symbols.shape), "another shape"
    assert got.y_hat.dtype == torch.float32, "another type"
    assert (got.alpha is None) == (claimed["flags"] & 24 == 0) and (got.alpha is None or (got.alpha.size, got.alpha.mode) == (
        (W, H), "L")), "another alpha channel"
    assert got.level == file.level == claimed.get("level") and got.streams == file.streams, "another level, or other streams"
    if claimed["coder"] == 1:
        parts = [tiny.coding_parts(codec, got)] if file.tile is None else tiny.tile_parts(codec, got, file)
        for part, stream in zip(parts, (file.payload, *(tile.payload for tile in file.tiles)), strict=True):
            assert rans_encode(part, stream[0]) == stream, "the symbols code to other bytes"
    return "accepted"


# ------------------------------------------------------------------------------------------- the child, and its plants

def memory() -> tuple[int, int]:
    "Resident bytes of this process, now and at their peak; (0, 0) where there is no /proc."
    try: status = Path("/proc/self/status").read_text()
    except OSError: return 0, 0
    return tuple(1024 * int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))


class Peak:
    "The peak of resident memory, read in microseconds."

    def __init__(self):
        try: Path("/proc/self/clear_refs").write_text("5")  # from here on
        except OSError: pass
        try: self.file = os.open("/proc/self/status", os.O_RDONLY)
        except OSError: self.file = None

    def __call__(self) -> int:
        if self.file is None: return 0
        status = os.pread(self.file, 4096, 0)
        at = status.index(b"VmHWM:") + 6
        return 1024 * int(status[at:status.index(b"kB", at)])


def limit_addresses(more: int) -> None:
    "From here on, memory that is asked for but never touched, which no peak shows, raises MemoryError."
    try:
        import resource

        size = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError): pass


def smaller(latents):
    from dataclasses import replace

    return replace(latents, symbols=latents.symbols[:, :, 1:])


LEAKED: list = []
PLANTS = {  # bugs in the decoder, for one input in some dozens: the fuzzer must find each
    "shape": smaller,
    "wrong symbol": lambda out: out + 1,
    "wrong exception": lambda out: [][len(out)],
    "memory": lambda out: (b"x" * 200_000_000)[:0] or out,
    "reservation": lambda out: bytes(8_000_000_000)[:0] or out,
    "leak": lambda out: LEAKED.append(b"x" * 20_000_000) or out,
    "slow": lambda out: time.sleep(SECONDS + 0.1) or out,
    "stuck": lambda out: ctypes.PyDLL(None).sleep(3600) or out,  # in C, and with the interpreter's lock
    "crash": lambda out: ctypes.string_at(1) and out,
    "exit": lambda out: os._exit(0),
}


def plant(name: str | None):
    "A context in which the decoder has that bug; None: in which it has none."
    if name is None: return contextlib.nullcontext()
    from hific_nb.codec import Codec
    from hific_nb.rans import RansDecoder

    home, method, share = (Codec, "decode_latents", 4) if name == "shape" else (RansDecoder, "read", 40)
    original = getattr(home, method)

    def planted(self, *args):
        out = original(self, *args)
        symbols = out.symbols if name == "shape" else out
        return PLANTS[name](out) if zlib.crc32(symbols.tobytes()) % share == 0 else out
    return mock.patch.object(home, method, planted)


def available(name: str) -> bool:
    from hific_nb.coders import UnknownCoderError, get_coder

    try: get_coder(name)
    except UnknownCoderError: return False
    return True


def prepare(long: bool = False, others: list[str] | None = None) -> tuple[Codecs, dict[str, bytes]]:
    """The codecs, and the specimens that its inputs are made of: files by rANS, or by the `others`.

    Optional coders that are not under test are forgotten: a file can name them, and the first use of torchac compiles.
    """
    import tiny
    import torch

    from hific_nb import coders

    torch.set_num_threads(1)
    codec, leveled = (tiny.tiny_codec(levels=levels, max_pixels=LONG_PIXELS if long else MAX_PIXELS) for levels in (False, True))
    codecs = Codecs(codec, leveled)
    for name in set(coders.list_coders()) - {"rans", "rans-numpy", *(others or ())}: del coders._CODERS[name]
    if others: return codecs, {k: v for name in others for k, v in tiny.specimens_of(codec, coders.get_coder(name)).items()}
    return codecs, {"long": tiny.long_specimen(codec)} if long else tiny.specimens(codec) | tiny.leveled_specimens(leveled)


def check_bounds_checks():
    "That compiled code runs with NUMBA_BOUNDSCHECK=1: a row that the tables do not have must raise."
    import numpy as np
    import tiny

    from hific_nb import rans

    ready = rans.coding_tables(tiny.tables([8]))
    try:
        rans._compiled("decode")(np.zeros(1, np.int32), np.array([1], np.uint32), ready.rows, ready.decoding, ready.buckets,
                                 ready.bucket_bits, ready.precision, np.array([1 << 20]), np.zeros(9, np.uint16), 0)
    except IndexError: return
    raise SystemExit("compiled code does not check its bounds")


def child(first: int, last: int, crumb: Path | None, planted: str | None, long: bool, coders: list[str], most: int = 5) -> dict:
    "Runs the inputs of the seeds first ... last - 1 and reports; stops after `most` failures."
    import tiny

    codecs, files = prepare(long, coders)
    if os.environ.get("NUMBA_BOUNDSCHECK") == "1": check_bounds_checks()
    mutate, outcomes, failures = Mutator(codecs, files), Counter(), []
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        for data in {**tiny.specimens(codecs.one_rate), **files}.values():  # everything is loaded and compiled
            assert examine(codecs, data, True, Path(folder, "a.hfc")) == "accepted"
        peak = Peak()
        limit_addresses(512 << 20)
        start = peak()
        trail = mmap.mmap(-1, CRUMB) if crumb is None else mmap.mmap(os.open(crumb, os.O_RDWR), CRUMB)
        began, fitting, longest = time.perf_counter(), 0, 0.0
        with plant(planted):
            for seed in range(first, last):
                data = mutate(seed)
                trail[8:16 + len(data)] = struct.pack("<Q", len(data)) + data
                trail[:8] = struct.pack("<q", seed + 1)
                fitting += sealed(data)
                again, wrong = seed % 8 == 1 and not long, None
                path, before = Path(folder, "a.hfc") if seed % 17 == 3 else None, peak()
                for _ in range(2):  # a second time only if the first was slow: others may have held the processor
                    tick = time.perf_counter()
                    try: outcome = examine(codecs, data, again, path)
                    except KeyboardInterrupt: raise
                    except BaseException: wrong = traceback.format_exc(limit=-4)
                    took = time.perf_counter() - tick
                    if wrong or took <= SECONDS: break
                else: wrong = f"It took {took:.1f} seconds, twice."
                now = peak()
                if not wrong and now - before > MEGABYTES << 20: wrong = f"It took {(now - before) / 2 ** 20:.0f} MB of memory."
                elif not wrong and now - start > MEGABYTES << 20:
                    wrong = f"It and those before it took {(now - start) / 2 ** 20:.0f} MB of memory: is there a leak?"
                if wrong:
                    failures.append(dict(seed=seed, what=wrong.strip(), hex=data.hex()))
                    if len(failures) >= most or planted: break
                    start = peak()
                else: outcomes[outcome] += 1
                longest = max(longest, took)
    return dict(inputs=sum(outcomes.values()) + len(failures), sealed=fitting, seconds=time.perf_counter() - began,
                slowest=longest, megabytes=(peak() - start) / 2 ** 20, outcomes=dict(sorted(outcomes.items())), failures=failures)


# --------------------------------------------------------------------------------------------------- the parent

def fuzz(first: int, last: int, planted: str | None = None, long: bool = False, coders: tuple | list = (),
         patience: float = 20, **environment) -> dict:
    "The report of a child that runs these seeds; what it cannot report itself, its parent adds."
    with tempfile.TemporaryDirectory() as folder:
        crumb = Path(folder, "crumb")
        crumb.write_bytes(bytes(CRUMB))
        command = [sys.executable, __file__, str(first), str(last), "--crumb", str(crumb)]
        command += ["--plant", planted] * bool(planted) + ["--long"] * long + ["--coders", *coders] * bool(coders)
        env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"} | environment
        with open(Path(folder, "out"), "w+") as out, open(Path(folder, "err"), "w+") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
            seen, since, stuck = b"", time.monotonic(), False
            while process.poll() is None:
                try: process.wait(0.2)
                except subprocess.TimeoutExpired: pass
                with open(crumb, "rb") as f: now = f.read(8)
                if now != seen: seen, since = now, time.monotonic()
                elif time.monotonic() - since > patience + 120 * (seen == bytes(8)):  # before the first, it starts
                    stuck = True
                    process.kill()
                    process.wait()
            for stream in (out, err): stream.seek(0)
            try: report = json.loads(out.read())
            except ValueError:
                left = crumb.read_bytes()
                seed, size = struct.unpack("<qQ", left[:16])
                code = process.returncode
                ended = (f"It was stuck for {patience} seconds." if stuck else f"The process ended by {signal.Signals(-code).name}."
                         if code < 0 else f"The process ended with code {code}.")
                report = dict(inputs=max(seed - first, 0), outcomes={}, failures=[dict(
                    seed=seed - 1, what=f"{ended}\n{err.read()[-2000:]}".strip(), hex=left[16:16 + size].hex())])
    return report


def describe(failures: list[dict], flags: str = "") -> str:
    return "\n\n".join(f"seed {f['seed']}: {f['what']}\nagain: python tests/fuzzing.py {f['seed']} {f['seed'] + 1}{flags}\n"
                       f"or: python tests/fuzzing.py --hex{flags} <<< {f['hex']}" for f in failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, metavar="FIRST LAST")
    parser.add_argument("--hex", action="store_true", help="one input from standard input")
    parser.add_argument("--long", action="store_true", help="files of 65,536 symbols")
    parser.add_argument("--plant", choices=PLANTS, help="a bug that must be found")
    parser.add_argument("--coders", nargs="+", default=[], help="files by these, in place of rANS")
    parser.add_argument("--crumb", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.enable()
    if options.hex:
        data, (codecs, _) = bytes.fromhex(sys.stdin.read()), prepare(options.long, options.coders)
        with plant(options.plant): print(examine(codecs, data, both=True))
        return
    if len(options.seeds) != 2: parser.error("give the first seed and the one after the last")
    print(json.dumps(child(*options.seeds, options.crumb, options.plant, options.long, options.coders), indent=2))


if __name__ == "__main__": main()
