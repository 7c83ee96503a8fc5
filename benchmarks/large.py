"""Large pictures: peak memory, seconds, and what a region costs, each measured in a child process of its own.

    python benchmarks/large.py [--model hific-lite] [--megapixels 100] [--memory 1GiB] [--threads 1] [--blocks 9]
                               [--whole-megapixels 6] [--out benchmarks/results/large.json]

The picture is a photo that scikit-image carries, enlarged and laid out mirrored, with a gradient over it so that no two places are
equal; it is a PNG on the disk, and the child compresses the path. Memory is the peak of the child's resident memory (VmHWM, reset
before each step) above what it has after the model is loaded and a small photo went both ways. Seconds are by the clock, and of
the processor, which other processes disturb less. A smaller picture is coded in turns, in one process: as a whole, in the pieces
that the codec takes by itself, and in those of a budget that has as many bytes a pixel as the large picture's.

--model hific is the paper's drawing with random weights (of memory and time that says all); --blocks 1 leaves out residual
blocks, 88 % of its work, and none of its memory.
"""

import argparse
import ctypes
import datetime
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from hific_nb import Codec
from hific_nb import codec as room
from hific_nb.codec import memory_bytes
from hific_nb.config import model_preset, write_atomic
from hific_nb.data import sample_photo
from hific_nb.hfc import HfcReader, layout
from hific_nb.model import Model


def picture(megapixels: float) -> Image.Image:
    "4 : 3, of that many megapixels."
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    size = round(height * 4 / 3), height
    photo = sample_photo("coffee").resize((2400, 1600), Image.Resampling.BICUBIC)
    large, (w, h) = Image.new("RGB", size), photo.size
    for i, left in enumerate(range(0, size[0], w)):
        for j, top in enumerate(range(0, size[1], h)):
            turned = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else photo
            turned = turned.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if j % 2 else turned
            shade = 0.7 + 0.3 * ((37 * i + 91 * j) % 64) / 64
            large.paste(turned.point(lambda v, shade=shade: int(v * shade)), (left, top))
    return large


def status(name: str) -> int:
    "Bytes of a line of /proc/self/status."
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))


def build(model: str, blocks: int, **options) -> Codec:
    if model != "hific": return Codec.from_pretrained(model, device="cpu", **options)
    torch.manual_seed(0)
    return Codec(Model(model_preset(model).replace(n_residual_blocks=blocks)), name=model, device="cpu", **options)


def measured(function, *args, **options) -> tuple[dict, object]:
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    clock, work = time.perf_counter(), time.process_time()
    result = function(*args, **options)
    return dict(seconds=round(time.perf_counter() - clock, 2), cpu_seconds=round(time.process_time() - work, 2),
                peak=status("VmHWM")), result


def in_turns(codec: Codec, job: dict) -> dict:
    "CPU seconds a megapixel, the least of some: whole, in the pieces that the codec takes by itself, and by a small budget."
    image, piece, seconds, data = Image.open(job["whole"]).convert("RGB"), room.PIECE, {}, b""
    megapixels = image.width * image.height / 1e6
    for _ in range(job["repeat"]):
        for name, memory in (("whole", 2 ** 40), ("pieces", job["memory"]), ("small budget", job["share"])):
            room.PIECE = 2 ** 40 if name == "whole" else piece
            figures, data = measured(codec.compress, image, memory=memory)
            seconds.setdefault(f"compress, {name}", []).append(figures["cpu_seconds"] / megapixels)
            figures, _ = measured(codec.decompress, data, memory=memory)
            seconds.setdefault(f"decompress, {name}", []).append(figures["cpu_seconds"] / megapixels)
    return {name: round(min(values), 4) for name, values in seconds.items()}


def child(job: dict) -> dict:
    torch.set_num_threads(job["threads"])
    codec = build(job["model"], job["blocks"], memory=job["memory"], max_pixels=2 ** 40)
    photo = sample_photo("coffee")
    codec.decompress(codec.compress(photo))
    loaded, out = status("VmRSS"), dict(steps={})

    def step(name, function, *args, **options):
        out["steps"][name], result = measured(function, *args, **options)
        out["steps"][name]["above_model"] = out["steps"][name].pop("peak") - loaded
        print(name, out["steps"][name], file=sys.stderr, flush=True)
        return result

    if "whole" in job: return in_turns(codec, job)
    data = step("compress", codec.compress, job["picture"])
    path = Path(job["file"])
    path.write_bytes(data)
    image = step("decompress", codec.decompress, path)
    width, height = image.size
    del image
    touched = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            piece = super().read(size)
            touched.append(len(piece))
            return piece

    with Watched(path) as stream:
        reader = HfcReader(stream)
        box = width // 2, height // 3, width // 2 + 1000, height // 3 + 800
        for k in reader.file.tiles_in(tuple(edge + d for edge, d in zip(box, (-144, -144, 144, 144)))): reader.tile(k)
    step("box of 1000 x 800", codec.decompress, path, box)
    step("thumbnail", codec.decompress, path, thumbnail=True)
    grid = reader.file.grid
    index = sum(f.end - f.start for f in layout(data) if re.fullmatch(r"tile \d+ .*(bytes|checksum)", f.name))
    return out | dict(width=width, height=height, bytes=len(data), bpp=round(8 * len(data) / width / height, 4),
                      tiles=grid[0] * grid[1], index_bytes=index, thumbnail_bytes=len(reader.file.streams.get("thmb", b"")),
                      box_bytes=sum(touched), model_loaded=loaded)


def run_child(job: dict) -> dict:
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    if done.returncode: raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--megapixels", type=float, default=100)
    parser.add_argument("--whole-megapixels", type=float, default=6)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    job = dict(model=args.model, blocks=args.blocks, memory=args.memory, threads=args.threads, repeat=args.repeat)
    with tempfile.TemporaryDirectory() as folder:
        def saved(name, megapixels):
            picture(megapixels).save(path := os.path.join(folder, name), compress_level=1)
            return path
        result = {}
        if args.megapixels:
            large = dict(picture=saved("large.png", args.megapixels), file=os.path.join(folder, "large.hfc"))
            result["large"] = run_child(job | large)
        if args.whole_megapixels:
            share = max(2 ** 24, int(memory_bytes(args.memory) * args.whole_megapixels / (args.megapixels or 100)))
            rows = run_child(job | dict(whole=saved("small.png", args.whole_megapixels), share=share))
            result["cpu_seconds_a_megapixel"] = rows | dict(megapixels=args.whole_megapixels, small_budget=share)
    result |= dict(date=str(datetime.date.today()), processor=processor(), threads=args.threads, python=platform.python_version(),
                   torch=torch.__version__, model=args.model, blocks=args.blocks, memory=args.memory,
                   dtype=str(build(args.model, 1).dtype) if args.model != "hific" else None)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())


def processor() -> str:
    lines = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{lines[0]}, {len(lines)} cores"


if __name__ == "__main__":
    main()
