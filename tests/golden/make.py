"""Makes golden files of version 1, which every later release must decode: `python tests/golden/make.py [--example] [NAME ...]`

Without names, what is missing is made. What is there is never written again: version 1 is a promise, and a file that cannot be
decoded any more shows a mistake in the decoder. For each name there is NAME.hfc, and NAME.npz with what it decodes to:
hyperlatents, symbols, and the pixels of a corner. SHA256SUMS lists all of them. --example prints the example of docs/hfc.md.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tiny  # noqa: E402
from safetensors.torch import save as to_safetensors  # noqa: E402

from hific_nb.codec import Codec  # noqa: E402
from hific_nb.config import write_atomic  # noqa: E402
from hific_nb.data import sample_photo  # noqa: E402
from hific_nb.hfc import layout, pack, unpack  # noqa: E402
from hific_nb.model import load_model, model_fingerprint  # noqa: E402

MODELS = {"one-rate": {}, "levels": dict(levels=True), "mixture": dict(levels=True, mixture=True)}
EXAMPLE = "level-tiles-exif"
NOTES = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", "xmpm": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", "zgld": b""}


def profile() -> bytes:
    "sRGB with the time of its making left out."
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[24:36] = bytes(12)
    return bytes(data)


def make_model(folder: Path, kind: dict) -> None:
    "A tiny model as a folder, its weights in float16 or, with levels, float32; its tables are of whole numbers."
    model, dtype = tiny.tiny_model(**kind), torch.float32 if kind else torch.float16
    *_, (_, last) = ((n, m) for n, m in model.Generator.named_modules() if hasattr(m, "bias"))
    last.weight.data.mul_(2.0 ** -4)  # pixels that are black or white would hide what is wrong with them
    last.bias.data.zero_()
    for p in model.parameters(): p.data = p.data.to(dtype).float()
    folder.mkdir(parents=True)
    tables = {name: torch.from_numpy(np.array(array)) for name, array in model.coding.tensors().items()}
    about = {"fingerprint": model_fingerprint(model, model.coding).hex()}
    write_atomic(folder/"config.json", model.config.to_json().encode())
    write_atomic(folder/"weights.safetensors", to_safetensors({k: t.to(dtype) for k, t in model.state_dict().items()}))
    write_atomic(folder/"tables.safetensors", to_safetensors(tables, metadata=about))
    load_model(folder)


def codec_of(name: str, coder: str = "rans") -> Codec:
    return Codec(load_model(HERE/name), name=name, device="cpu", dtype=torch.float32, coder=coder)


def specimens() -> dict:
    "Name -> a function that gives the bytes."
    def drawn(size, salt, model="one-rate", tile=0, coder="rans", **others):
        def make():
            codec = codec_of(model, coder)
            return codec.encode(tiny.draw(codec, *size, salt, **others), tile)
        return make

    def photo(size, model="one-rate", coder="rans", **options):
        def make(): return codec_of(model, coder).compress(sample_photo("coffee").crop((140, 60, 460, 300)).resize(size), **options)
        return make

    def mixed(size, tile=0, quality=50, coder="rans", wild=()):
        def make():
            codec = codec_of("mixture", coder)
            latents = codec.encode_latents(sample_photo("coffee").crop((140, 60, 460, 300)).resize(size), quality=quality)
            symbols = latents.symbols.copy()
            symbols.ravel()[:len(wild)] = wild
            return codec.encode(replace(latents, symbols=symbols), tile)
        return make

    def lanes(n, size, salt):
        def make():
            codec = codec_of("one-rate")
            return tiny.packed(codec, tiny.draw(codec, *size, salt), tiny.Lanes(n))
        return make

    def glass(*size): return dict(alpha=tiny.glass(*size))

    def half(*size):
        alpha = tiny.glass(*size)
        alpha.paste(255, (0, 0, 64, size[1]))
        return dict(alpha=alpha)

    def opaque(*size): return dict(alpha=Image.new("L", size, 255))
    found = {f"{w}x{h}": drawn((w, h), salt) for salt, (w, h) in enumerate(
        [(1, 1), (17, 33), (300, 1), (1, 70), (16, 16), (64, 64), (65, 129), (150, 99)])}
    found |= {f"lanes-{n}": lanes(n, size, n) for n, size in ((2, (50, 30)), (4, (90, 70)), (255, (31, 33)))}
    for coder in ("torchac", "constriction"):
        found |= {f"{coder}-{w}x{h}": drawn((w, h), 100 + w, coder=coder) for w, h in ((1, 1), (17, 33), (65, 129))}
        found[f"{coder}-tiles-alpha"] = drawn((130, 70), 110, tile=64, coder=coder, **half(130, 70))
        found[f"{coder}-level"] = drawn((65, 40), 120, "levels", coder=coder, level=3)
    return found | {
        "alpha": drawn((40, 23), 200, **glass(40, 23)),
        "opaque": drawn((33, 47), 201, **opaque(33, 47)),
        "icc": photo((60, 40), streams={"iccp": profile()}),
        "streams": drawn((20, 30), 202, streams=NOTES),
        "tiles": drawn((140, 70), 203, tile=64),
        "tile": drawn((33, 20), 204, tile=128),
        "tiles-alpha": drawn((140, 80), 205, tile=64, **half(140, 80)),
        "tiles-opaque-streams": drawn((70, 65), 206, tile=64, streams=NOTES, **opaque(70, 65)),
        "photo": photo((96, 64)),
        "photo-tiles": photo((97, 81), tile=64),
        "level-0": photo((64, 48), "levels", quality=0),
        "level-4": photo((17, 33), "levels", quality=50),
        "level-8": photo((80, 64), "levels", quality=100),
        "level-1x1": drawn((1, 1), 207, "levels", level=8),
        EXAMPLE: drawn((70, 5), 208, "levels", tile=64, level=6, streams={"exif": NOTES["exif"][:10]}),
        "mixture-1x1": mixed((1, 1)),
        "mixture-65x50": mixed((65, 50), quality=80),
        "mixture-wild": mixed((60, 40), wild=(70_000, -300, 2**14, -2**31, 2**31 - 1, 17)),
        "mixture-tiles": mixed((130, 70), tile=64),
        "constriction-mixture": mixed((40, 33), coder="constriction"),
        "everything": drawn((130, 70), 209, "levels", tile=64, level=7, streams=NOTES | {"iccp": profile()}, **half(130, 70)),
    }


def corner(pixels: np.ndarray) -> np.ndarray:
    "What is kept of a picture (H, W, 3 or 4): 64 x 48 pixels at the lower right, where odd sides show."
    return pixels[-48:, -64:]


def expected(codec: Codec, data: bytes) -> dict[str, np.ndarray]:
    latents = codec.decode_latents(data)
    pixels = corner(np.asarray(codec.generate(latents)))
    if np.abs(latents.symbols.astype(np.int64)).max() > 10_000: pixels = pixels[:0]  # of these, rounding makes anything
    return dict(hyperlatents=latents.hyperlatents, symbols=latents.symbols, pixels=pixels)


def sums() -> str:
    "The SHA-256 of every golden file, a line each."
    kept = sorted(p for p in HERE.rglob("*") if p.suffix in (".hfc", ".npz", ".json", ".safetensors"))
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(HERE).as_posix()}\n" for p in kept)


def make(name: str) -> None:
    path = HERE/f"{name}.hfc"
    if path.exists(): sys.exit(f"{path.name} is there, and version 1 is a promise: golden files are never written again.")
    data = specimens()[name]()
    file = unpack(data)
    assert pack(file) == data
    (codec,) = [codec for codec in map(codec_of, MODELS) if codec.fingerprint == file.fingerprint]
    np.savez_compressed(HERE/f"{name}.npz", **expected(codec, data))
    write_atomic(path, data)
    print(f"{name}: {len(data)} bytes")


def example() -> str:
    "The example of the specification: a golden file, field by field."
    data = (HERE/f"{EXAMPLE}.hfc").read_bytes()
    lines = [f"`tests/golden/{EXAMPLE}.hfc`, {len(data)} bytes, of the model in `tests/golden/levels`:", "",
             "| at | bytes | field | value |", "| --- | --- | --- | --- |"]
    for f in layout(data):
        text = data[f.start:f.end].hex(" ")
        value = f.value if isinstance(f.value, int) else f"`{f.value.decode()}`" if f.name.endswith("name") else ""
        lines.append(f"| {f.start} | `{text}` | {f.name} | {value} |")
    with np.load(HERE/f"{EXAMPLE}.npz") as found: z, y = found["hyperlatents"], found["symbols"]
    for what, a in (("hyperlatents", z), ("symbols of the latents", y)):
        lines += ["", f"The {what}, {a.shape[0]} channels of {a.shape[1]} x {a.shape[2]}:", ""]
        lines += [f"    {' '.join(map(str, channel.ravel()))}" for channel in a]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    if names == ["--example"]:
        print(example())
        return
    for folder, kind in MODELS.items():
        if not (HERE/folder).exists(): make_model(HERE/folder, kind)
    for name in names or [name for name in specimens() if not (HERE/f"{name}.hfc").exists()]: make(name)
    write_atomic(HERE/"SHA256SUMS", sums().encode())


if __name__ == "__main__": main(sys.argv[1:])
