"""A reader of `.hfc` files of version 1, written from docs/hfc.md alone: plain Python, nothing of the package, no NumPy.

    read(data) -> File                         every field, or Refused
    symbols(file, model_folder(path)) -> (hyperlatents, latents), lists of channels of rows; coder 1 only

Slow and short. The numbers in brackets are sections of the specification.
"""

import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal, localcontext
from pathlib import Path


class Refused(Exception):
    "The file breaks a rule; the message says which."


def must(ok, rule):
    if not ok: raise Refused(rule)


# ---------------------------------------------------------------------------------------------- the container [1-4]


@dataclass
class File:
    size: int
    fingerprint: bytes
    coder: int
    flags: int
    width: int
    height: int
    level: int | None = None
    tile: int | None = None
    alpha: bytes | None = None  # b"": 255 everywhere
    streams: list = field(default_factory=list)  # (name, bytes), ancillary ones and those that `known` names
    payload: bytes = b""
    tiles: list = field(default_factory=list)  # (latents' stream, alpha stream)


class Bytes:
    def __init__(self, data, begin, end): self.data, self.at, self.end = data, begin, end

    def take(self, n):
        must(self.at + n <= self.end, "fields must end before the checksum")
        self.at += n
        return self.data[self.at - n:self.at]

    def byte(self): return self.take(1)[0]

    def varint(self, least=0, most=2**31 - 1):
        value, last = 0, 128
        for k in range(5):
            last = self.byte()
            value += last % 128 * 128**k
            if last < 128: break
        must(last < 128 and value <= 2**31 - 1, "a varint has at most five bytes and 31 bits")
        must(last > 0 or k == 0, "a varint has the shortest form")
        must(least <= value <= most, "a number is out of range")
        return value


def is_name(name): return len(name) == 4 and all(65 <= c <= 90 or 97 <= c <= 122 for c in name)


def read(data, known=()):
    must(data[:3] == bytes.fromhex("894846"), "magic")
    must(data[3:4] == b"\1", "version")
    start = Bytes(data, 4, len(data))
    size = start.varint()
    end = start.at + size
    must(4 <= size and end <= len(data), "the first section is cut")
    must(struct.unpack("<I", data[end - 4:end])[0] == zlib.crc32(data[:end - 4]), "checksum of the first section")
    head = Bytes(data, start.at, end - 4)
    file = File(size, head.take(8), head.byte(), head.byte(), head.varint(1), head.varint(1))
    flags = file.flags
    must(flags < 32 and flags & 24 != 24, "flags")
    if flags & 1: file.level = head.varint()
    if flags & 2: file.tile = head.varint(1, 65535)
    alpha_bytes = head.varint(1) if flags & 18 == 16 else 0
    directory = [(head.take(4), head.varint()) for _ in range(head.varint(1))] if flags & 4 else []
    must(all(is_name(name) for name, _ in directory), "names are letters")
    must(all(a[0] < b[0] for a, b in zip(directory, directory[1:])), "names increase")
    for name, _ in directory: must(name[0] >= 97 or name.decode() in known, f"unknown critical stream {name.decode()}")
    index = []
    if flags & 2:
        side = 64 * file.tile
        for _ in range(math.ceil(file.width / side) * math.ceil(file.height / side)):
            latents = head.varint()
            alpha = head.varint() if flags & 16 else 0
            index.append((latents, alpha, *struct.unpack("<I", head.take(4))))
        must(not flags & 16 or any(alpha for _, alpha, _ in index), "some tile has alpha")
    if flags & 24: file.alpha = head.take(alpha_bytes)
    file.streams = [(name.decode(), head.take(n)) for name, n in directory]
    file.payload = head.take(head.end - head.at)
    rest = Bytes(data, end, len(data))
    for latents, alpha, checksum in index:
        must(rest.at + latents + alpha <= len(data), "a tile is cut")
        must(zlib.crc32(data[rest.at:rest.at + latents + alpha]) == checksum, "checksum of a tile")
        file.tiles.append((rest.take(latents), rest.take(alpha)))
    must(rest.at == len(data), "nothing follows the last byte")
    return file


# ---------------------------------------------------------------------------------------------- the model's folder [5]


def safetensors(path):
    data = Path(path).read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8:begin]), {}
    about = header.pop("__metadata__", {})
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        kind, width = {"F16": ("e", 2), "F32": ("f", 4), "F64": ("d", 8), "I32": ("i", 4)}[entry["dtype"]]
        values = struct.unpack(f"<{(high - low) // width}{kind}", data[begin + low:begin + high])
        tensors[name] = (entry["shape"], values)
    return tensors, about


def nested(shape, values):
    "Lists of lists of numbers."
    if not shape: return values[0]
    step = len(values) // shape[0]
    return [nested(shape[1:], values[k * step:(k + 1) * step]) for k in range(shape[0])]


@dataclass
class Row:
    offset: int
    starts: list  # and 2^P at the end
    precision: int


def rows_of(tensors, kind):
    precision, = tensors[f"{kind}.precision"][1]
    rows, at, frequencies = [], 0, tensors[f"{kind}.frequencies"][1]
    for slots, offset in zip(tensors[f"{kind}.slots"][1], tensors[f"{kind}.offset"][1]):
        starts = [0]
        for f in frequencies[at:at + slots]: starts.append(starts[-1] + f)
        at += slots
        assert starts[-1] == 2**precision and slots >= 2
        rows.append(Row(offset, starts, precision))
    return rows


def model_folder(path):
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    tables, about = safetensors(path / "tables.safetensors")
    weights, _ = safetensors(path / "weights.safetensors")
    mixture = config.get("likelihood") == "mixture"
    network = "synthesis_DLMM_params" if mixture else "synthesis_std"
    layers = [[nested(*weights[f"Hyperprior.{network}.{name}.{part}"]) for part in ("weight", "bias")]
              for name in ["conv1", "conv2", "conv3"] + ["conv_out"] * mixture]
    if mixture: layers[3][0] = [[[[kernels[i][0][0]]] for kernels in layers[3][0]] for i in range(config["latent_channels"])]
    return dict(C=config["latent_channels"], N=config["hyperprior_channels"], levels=config.get("rate_levels", 0),
                K=config.get("mixture_components", 4) if mixture else 0, min_scale=config.get("min_scale", 0.11),
                fingerprint=bytes.fromhex(about["fingerprint"]), scales=tables["scales"][1],
                rows={kind: rows_of(tables, kind) for kind in ("hyperlatents", "latents")},
                layers=[integers(k, *layer) for k, layer in enumerate(layers)])


# ---------------------------------------------------------------------------------------------- table rows [10]


def integers(k, weight, bias):
    "Layer k = 0, 1, 2 (and 3) as integers: (w, a, b)."
    B, F, S = (1023, 0, 2) if k == 0 else (2**24 - 1, 12, 2 if k == 1 else 1)
    K, outputs = len(weight[0][0]), range(len(bias))
    for b in range(24, 11, -1):
        w = [[[[round(v * 2**b) for v in line] for line in kernel] for kernel in kernels] for kernels in weight]
        a = [round(v * 2 ** (b + F)) for v in bias]
        most = 0
        for o in outputs:
            for py in range(S):
                for px in range(S):
                    m = sum(abs(kernels[o][ky][kx]) for kernels in w for ky in range(py, K, S) for kx in range(px, K, S))
                    most = max(most, B * m + abs(a[o]))
        if most < 2**52: return w, a, b
    raise AssertionError("no such model")


def layer(x, w, a, S):
    H, W, K = len(x[0]), len(x[0][0]), len(w[0][0])
    out = []
    for o in range(len(a)):
        plane = []
        for Y in range(S * H):
            ys = [(ky, (Y + K // 2 - ky) // S) for ky in range(K) if (Y + K // 2 - ky) % S == 0 and 0 <= (Y + K // 2 - ky) // S < H]
            line = []
            for X in range(S * W):
                xs = [(kx, (X + K // 2 - kx) // S) for kx in range(K)
                      if (X + K // 2 - kx) % S == 0 and 0 <= (X + K // 2 - kx) // S < W]
                line.append(a[o] + sum(w[i][o][ky][kx] * x[i][y][xx] for i in range(len(x)) for ky, y in ys for kx, xx in xs))
            plane.append(line)
        out.append(plane)
    return out


def sums(z, model):
    "What the last layer gives, and its b."
    x = [[[min(max(v, -1023), 1023) for v in line] for line in plane] for plane in z]
    for k, (w, a, b) in enumerate(model["layers"]):
        x = layer(x, w, a, 2 if k < 2 else 1)
        if k + 1 == len(model["layers"]): return x, b
        n, least = b + (12 if k else 0) - 12, 0 if k < 2 else 1 - 2**24
        x = [[[min(max((2 * v + 2**n) // 2 ** (n + 1), least), 2**24 - 1) for v in line] for line in plane] for plane in x]


def latent_rows(z, model):
    "For each latent the row of its table, before it is cut to h x w."
    x, b = sums(z, model)
    scales = model["scales"]
    thresholds = [round(math.sqrt(s * t) * 2 ** (b + 12)) for s, t in zip(scales, scales[1:])]
    return [[[sum(t <= v for t in thresholds) for v in line] for line in plane] for plane in x]


# ---------------------------------------------------------------------------------------------- mixtures [14]


def falling(bits, i, n):
    "round(2^bits * exp(-i / n)), exactly."
    with localcontext() as context:
        context.prec = 60
        return int(((Decimal(-i) / n).exp() * 2**bits + Decimal("0.5")).to_integral_value(ROUND_FLOOR))


W = [falling(16, i, 256) for i in range(3073)]
V = {i: falling(20, i, 128) for i in range(-590, 1025)}
S = {j: (2**61 // (2**30 + falling(30, j, 64)) + 1) // 2 for j in range(1409)}
S |= {-j: 2**30 - S[j] for j in range(1, 1409)}


class Mixture:
    "The mixture of one latent, and what the answers said of its symbol."
    def __init__(self, l, m, s):
        self.g, self.m, self.V = [W[min(max(l) - x, 3072)] for x in l], m, [V[x] for x in s]
        heaviest = [g * min(v, 2**22) for g, v in zip(self.g, self.V)]
        self.c, self.all = (m[heaviest.index(max(heaviest))] + 512) // 1024, 2**16 * sum(self.g)
        self.value = self.below = None
        self.low = self.n = 1

    def M(self, v):
        total = 0
        for g, m, inverse in zip(self.g, self.m, self.V):
            a = min(max((1024 * v - 512 - m) * inverse, -22 * 2**30), 22 * 2**30) + 22 * 2**30
            j = a // 2**24 - 1408
            total += g * (S[j] + ((S[j + 1] - S[j]) * (a % 2**24) // 2**24 if j < 1408 else 0))
        return total // 2**14

    def mass(self, d): return self.M(self.c - d + 1) if self.below else self.all - self.M(self.c + d)


def mixtures(z, model):
    "The mixture of each latent, a function of channel, row, column."
    x, b = sums(z, model)
    C, K = model["C"], model["K"]
    s0 = min(i for i in range(-590, 1025) if V[i] <= 2**20 / model["min_scale"])
    bounds = ((256, -2**20, 2**20), (1024, -2**25, 2**25), (128, s0, 1024))

    def at(c, i, j):
        found = []
        for kind, (n, least, most) in enumerate(bounds):
            values = [x[(kind * C + c) * K + k][i][j] for k in range(K)]
            found.append([min(max((2 * v * n + 2 ** (b + 12)) // 2 ** (b + 13), least), most) for v in values])
        return Mixture(*found)
    return at


def answers(stream, rows, block):
    "The symbols of one block of mixtures."
    def ask(asked):
        which = []
        for _, u, t in asked:
            p = (u + 1) * 2**24 // (u + t + 2)
            which.append(rows[sum(r * r * (768 - 2 * r) <= p for r in range(1, 256))])
        return [(q, said != 0) for (q, *_), said in zip(asked, stream.part(which))]

    away = [q for q, yes in ask([(q, q.M(q.c) + q.all - q.M(q.c + 1), q.M(q.c + 1) - q.M(q.c)) for q in block]) if yes]
    for q, yes in ask([(q, q.M(q.c), q.all - q.M(q.c + 1)) for q in away]): q.below = yes
    far, d = away, 2
    while d <= 2**14:
        far = [q for q, yes in ask([(q, q.mass(d), q.mass(d // 2) - q.mass(d)) for q in far]) if yes]
        for q in far: q.low = q.n = d
        d *= 2
    near = [q for q in away if q.low < 2**14]
    while still := [q for q in near if q.n > 1]:
        for q in still: q.n //= 2
        asked = [(q, q.mass(q.low + q.n) - q.mass(q.low + 2 * q.n), q.mass(q.low) - q.mass(q.low + q.n)) for q in still]
        for q, yes in ask(asked): q.low += q.n * yes
    for q in block: q.value = q.c
    for q in near: q.value = q.c - q.low if q.below else q.c + q.low
    for q, value in zip(far, stream.part([rows[0]] * len(far))): q.value = value
    return [q.value for q in block]


# ---------------------------------------------------------------------------------------------- rANS [7]


class Rans:
    def __init__(self, data):
        self.x, self.words, self.at = [], (), 0
        if not data: return
        lanes = data[0]
        must(lanes >= 1 and len(data) >= 1 + 4 * lanes and (len(data) - 1 - 4 * lanes) % 2 == 0, "length of a stream")
        self.x = list(struct.unpack(f"<{lanes}I", data[1:1 + 4 * lanes]))
        self.words = struct.unpack(f"<{(len(data) - 1 - 4 * lanes) // 2}H", data[1 + 4 * lanes:])
        must(min(self.x) >= 2**16, "a state is too small")

    def refilled(self, x):
        if x >= 2**16: return x
        must(self.at < len(self.words), "the words run out")
        self.at += 1
        return x * 2**16 + self.words[self.at - 1]

    def part(self, rows):
        must(self.x or not rows, "an empty stream has no symbols")
        return [self.symbol(i % len(self.x), row) for i, row in enumerate(rows)]

    def symbol(self, lane, row):
        x, c = self.x[lane], row.starts
        v = x % 2**row.precision
        s = next(k for k in range(len(c) - 1) if c[k] <= v < c[k + 1])
        x = self.refilled((c[s + 1] - c[s]) * (x >> row.precision) + v - c[s])
        value = row.offset + s
        if s == len(c) - 2:
            count, x = x % 16, self.refilled(x >> 4)
            must(count <= 9, "an escape has at most nine digits")
            rest = 0
            for k in range(count):
                digit, x = x % 16, self.refilled(x >> 4)
                must(digit or k, "the first digit of an escape is not 0")
                rest = 16 * rest + digit
            value = row.offset - 1 - (rest - 1) // 2 if rest % 2 else row.offset + s + rest // 2
            must(-2**31 <= value < 2**31, "a symbol has 32 bits")
        self.x[lane] = x
        return value

    def close(self):
        must(self.at == len(self.words) and all(x == 2**16 for x in self.x), "a stream ends where its symbols do")


# ---------------------------------------------------------------------------------------------- symbols [5, 6]


def grid(values, channels, height, width):
    values = iter(values)
    return [[[next(values) for _ in range(width)] for _ in range(height)] for _ in range(channels)]


def symbols(file, model):
    "The hyperlatents and the symbols of the latents of a file by coder 1."
    must(file.fingerprint == model["fingerprint"], "another model")
    must((file.level is None) == (model["levels"] == 0), "a level, if and only if the model has levels")
    must(file.level is None or file.level < model["levels"], "a level that the model has")
    must(file.coder == 1, "this reader knows one coder")
    C, N, h, w = model["C"], model["N"], math.ceil(file.height / 16), math.ceil(file.width / 16)
    hz, wz = math.ceil(h / 4), math.ceil(w / 4)
    stream = Rans(file.payload)
    z = grid(stream.part([row for row in model["rows"]["hyperlatents"] for _ in range(hz * wz)]), N, hz, wz)
    rows = mixtures(z, model) if model["K"] else latent_rows(z, model)
    y = [[[None] * w for _ in range(h)] for _ in range(C)]
    if file.tile is None: areas = [(0, 0, w, h)]
    else:
        side = 64 * file.tile
        columns = math.ceil(file.width / side)
        areas = []
        for k in range(len(file.tiles)):
            left, top = k % columns * side, k // columns * side
            right, bottom = min(left + side, file.width), min(top + side, file.height)
            areas.append((left // 16, top // 16, math.ceil(right / 16), math.ceil(bottom / 16)))
    for number, (left, top, right, bottom) in enumerate(areas):
        if file.tile is not None:
            stream.close()
            stream = Rans(file.tiles[number][0])
        table = model["rows"]["latents"]
        strip = 4 * max(1, 2**20 // (4 * C * (right - left))) if model["K"] else bottom - top
        for begin in range(top, bottom, strip):
            places = [(c, i, j) for c in range(C) for i in range(begin, min(begin + strip, bottom)) for j in range(left, right)]
            if model["K"]:
                found = []
                for k in range(0, len(places), 2**16): found += answers(stream, table, [rows(*p) for p in places[k:k + 2**16]])
            else: found = stream.part([table[rows[c][i][j]] for c, i, j in places])
            for (c, i, j), value in zip(places, found): y[c][i][j] = value
    stream.close()
    return z, y
