"""Two models of some thousand weights, of one rate and of several, the same on every machine, and real `.hfc` files of them.

Nothing here depends on a random generator, on a library's transcendental functions or on floating-point sums: weights,
scales and tables come from whole numbers, so that the model, and a file written with it, stay what they are.
"""

import hashlib
import io
import zlib

import numpy as np
import torch
from PIL import Image

from hific_nb.codec import Codec, Latents
from hific_nb.coders import Coder
from hific_nb.config import ModelConfig
from hific_nb.entropy_models import IndexedTables, decision_probabilities, decision_tables
from hific_nb.hfc import HfcFile, pack
from hific_nb.model import Coding, Model
from hific_nb.rans import rans_encode

CONFIG = ModelConfig(transform="light", channels=(4, 4, 4, 4), encoder_blocks=(0, 0, 0, 0), generator_blocks=(0, 0, 0, 0),
                     n_residual_blocks=0, use_channel_norm=False, latent_channels=4, hyperprior_channels=3)
PRECISION, ROWS, LEVELS = 14, 24, 9
DIGEST = "b6e485254ae463ad"  # of all weights and tables, of the model of one rate
# A gain for the weights, and a bias, of the layers where the plain rule would leave everything near zero.
GAINS = {"Encoder.layers.4": (8, 0), "Hyperprior.analysis_net.conv3": (8, 0), "Hyperprior.synthesis_std.conv3": (2, 4)}


def hashed(n: int, salt: int) -> np.ndarray:
    "n numbers in 0 ... 65535 that look like chance: a multiplicative hash of their place."
    x = (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(salt * 40503)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return (x >> np.uint64(16)).astype(np.int64)


def tables(widths, offsets=None) -> IndexedTables:
    "Rows that fall off from the middle like 1 / (1 + (v / width)^2), by whole numbers alone, out to 3 widths, then escape."
    rows = []
    for width in widths:  # in eighths
        m = max(1, 3 * width // 8)
        weight = [2 ** 20 * width * width // (width * width + 64 * v * v) for v in range(-m, m + 1)] + [2 ** 14]
        room = 2 ** PRECISION - len(weight)
        freq = [1 + room * w // sum(weight) for w in weight]
        freq[m] += 2 ** PRECISION - sum(freq)
        rows.append(freq)
    slots = np.array([len(f) for f in rows], np.int32)
    cdf = np.full((len(rows), max(slots) + 1), 2 ** PRECISION, np.uint32)
    for r, f in enumerate(rows): cdf[r, : len(f) + 1] = np.concatenate(([0], np.cumsum(f)))
    return IndexedTables(cdf, slots, np.array([-(s - 2) // 2 for s in slots], np.int32), PRECISION).validate()


def tiny_gains() -> tuple[np.ndarray, np.ndarray]:
    "Gains of 2/3 ... 16, half as large again at each level and a little apart between channels; and what undoes them."
    wobble = 64 + hashed(LEVELS * CONFIG.latent_channels, 7).reshape(LEVELS, -1) % 8
    gains = np.array([2 * 2 ** 16 * 3 ** level // (3 * 2 ** level) for level in range(LEVELS)])[:, None] * wobble // 64
    return gains.astype(np.int32), (2 ** 32 // gains).astype(np.int32)


def tiny_model(seed: int = 0, levels: bool = False, mixture: bool = False) -> Model:
    "The model of a seed; its tables are `model.coding`."
    config = CONFIG.replace(rate_levels=LEVELS, regime_levels=(1, 4, 7)) if levels else CONFIG
    model = Model(config.replace(likelihood="mixture", mixture_components=2) if mixture else config).eval()
    with torch.no_grad():
        for name, t in model.state_dict().items():
            layer, _, kind = name.rpartition(".")
            gain, bias = GAINS.get(layer, (1, 0))
            spread = 1 if kind == "bias" else gain * 4 / t[0].numel() ** 0.5
            step = 2.0 ** np.round(np.log2(spread))  # a power of two: every weight is exact in float16
            values = (hashed(t.numel(), zlib.crc32(name.encode()) + seed) // 64 - 512) / 1024 * step
            t.copy_(torch.from_numpy(values + (bias if kind == "bias" else 0)).view(t.shape))
    scales = 0.125 * np.cumprod(np.array([1.0] + [1.375] * (ROWS - 1)))
    latents = (decision_tables(), decision_probabilities()) if mixture else (tables([max(1, int(8 * s)) for s in scales]), scales)
    model.coding = Coding(tables([8 + 16 * c for c in range(CONFIG.hyperprior_channels)]), *latents,
                          *(tiny_gains() if levels else ()))
    return model


def digest(model: Model) -> str:
    "16 hex digits over the weights and tables."
    arrays = {name: t.numpy() for name, t in model.state_dict().items()} | model.coding.tensors()
    content = b"".join(name.encode() + np.ascontiguousarray(a).astype("<f8").tobytes() for name, a in sorted(arrays.items()))
    return hashlib.sha256(content).hexdigest()[:16]


def tiny_codec(seed: int = 0, levels: bool = False, **options) -> Codec:
    "Its codec on the CPU, in float32."
    return Codec(tiny_model(seed, levels), name="tiny", device="cpu", dtype=torch.float32, **options)


def draw(codec: Codec, width: int, height: int, salt: int, alpha: Image.Image | None = None, **others) -> Latents:
    "Latents as an encoder might make them, escapes included, but from whole numbers."
    N, C = CONFIG.hyperprior_channels, CONFIG.latent_channels
    h, w = -(-height // 16), -(-width // 16)
    shape = (N, -(-h // 4), -(-w // 4))
    z = (hashed(int(np.prod(shape)), salt).reshape(shape) % 41 - 20) // np.array([4, 2, 1])[:, None, None]
    indexes = codec.index_synthesis(torch.from_numpy(z)[None].to(codec.device), (h, w)).cpu().numpy()
    u = hashed(C * h * w, salt + 1).reshape(C, h, w) - 32768
    wide = 1 + 7 * (hashed(C * h * w, salt + 2).reshape(C, h, w) % 16 == 0)
    symbols = np.rint(u / 32768 * 2 * codec.coding.scales[indexes] * wide)
    return Latents(width, height, symbols.astype(np.int32), z.astype(np.int32), indexes, torch.zeros(1, C, h, w), alpha, **others)


def coding_parts(codec: Codec, latents: Latents) -> list[tuple]:
    "What an entropy coder is given for latents: hyperlatents, then latents, each (symbols, indexes, tables)."
    z = latents.hyperlatents
    return [(z.ravel(), np.repeat(np.arange(z.shape[0]), z.shape[1] * z.shape[2]), codec.coding.hyperlatents),
            (latents.symbols.ravel(), latents.indexes.ravel(), codec.coding.latents)]


def packed(codec: Codec, latents: Latents, coder: Coder) -> bytes:
    "The file of latents by another coder than the codec's own."
    return pack(HfcFile(latents.width, latents.height, codec.fingerprint, coder.id, coder.encode(coding_parts(codec, latents)),
                        png(latents.alpha) if latents.alpha else None))


def tile_parts(codec: Codec, latents: Latents, file: HfcFile) -> list[list[tuple]]:
    "The parts of each stream of a file with tiles: hyperlatents, then latents tile by tile."
    first, (symbols, indexes, tables) = coding_parts(codec, latents)
    symbols, indexes = symbols.reshape(latents.symbols.shape), indexes.reshape(latents.symbols.shape)
    parts = [[first]]
    for k in range(file.grid[0] * file.grid[1]):
        left, top, right, bottom = file.tile_box(k)
        area = np.s_[:, top // 16:-(-bottom // 16), left // 16:-(-right // 16)]
        parts.append([(symbols[area].ravel(), indexes[area].ravel(), tables)])
    return parts


class Lanes(Coder):
    "rANS with a number of lanes of one's choice, which every reader takes from the stream."
    name, id = "rans", 1

    def __init__(self, lanes: int): self.lanes = lanes

    def encode(self, parts): return rans_encode(parts, self.lanes)

    def decoder(self, data): raise NotImplementedError


def glass(width: int, height: int) -> Image.Image:
    "An alpha channel with an edge, a ramp and a pattern."
    a = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)
    a[:, width // 2:] = 255
    a[height // 2:, ::3] = 0
    return Image.fromarray((a % 256).astype(np.uint8))


def specimens(codec: Codec) -> dict[str, bytes]:
    "Files of every kind within 2**16 pixels: sides, lanes, alpha."
    files = {f"{w}x{h}": codec.encode(draw(codec, w, h, salt)) for salt, (w, h) in enumerate(
        [(1, 1), (300, 1), (1, 70), (17, 15), (64, 64), (65, 129), (150, 99), (256, 256), (8192, 8)])}
    for lanes, (w, h) in {2: (50, 30), 4: (200, 170), 255: (31, 33)}.items():
        files[f"{lanes} lanes"] = packed(codec, draw(codec, w, h, 20 + lanes), Lanes(lanes))
    files["alpha"] = codec.encode(draw(codec, 40, 23, 31, glass(40, 23)))
    files["alpha, 4 lanes"] = packed(codec, draw(codec, 90, 70, 32, glass(90, 70)), Lanes(4))
    files["opaque"] = codec.encode(draw(codec, 33, 47, 33, Image.new("L", (33, 47), 255)))
    files["tiles"] = codec.encode(draw(codec, 150, 99, 34), 64)
    files["a tile"] = codec.encode(draw(codec, 33, 20, 35), 128)
    half = glass(200, 130)
    half.paste(255, (0, 0, 64, 130))  # the first tiles are opaque, and their alpha is not coded
    files["tiles, alpha"] = codec.encode(draw(codec, 200, 130, 36, half), 64)
    files["tiles, opaque, streams"] = codec.encode(draw(codec, 70, 65, 37, Image.new("L", (70, 65), 255), streams=NOTES), 64)
    files["streams"] = codec.encode(draw(codec, 20, 30, 38, streams=NOTES))
    return files


NOTES = {"exif": b"Exif\0\0II*\0", "zzzz": b"", "iccp": bytes(range(256))}


def leveled_specimens(codec: Codec) -> dict[str, bytes]:
    "Files of a model with rate levels."
    files = {f"level {level} {w}x{h}": codec.encode(draw(codec, w, h, 60 + level, level=level), tile)
             for level, (w, h), tile in ((0, (64, 64), 0), (4, (17, 33), 0), (8, (130, 70), 64))}
    files["level, alpha, streams"] = codec.encode(draw(codec, 70, 50, 70, glass(70, 50), level=5, streams=NOTES))
    return files


def specimens_of(codec: Codec, coder: Coder) -> dict[str, bytes]:
    "Files by a coder that is not the codec's own."
    return {f"{coder.name} {w}x{h}": packed(codec, draw(codec, w, h, 50 + w), coder)
            for w, h in ((1, 1), (17, 15), (64, 64), (65, 129), (200, 150), (256, 256))}


def long_specimen(codec: Codec) -> bytes:
    "One with so many symbols that the encoder itself takes four lanes; `codec.max_pixels` must allow 2048 x 2048."
    return codec.encode(draw(codec, 2048, 2048, 40))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
