"""Training crops a second, by where the photos come from: memory, a folder, tar shards, shards behind an address.

    python benchmarks/data.py [--photos FOLDER] [--threads 1 2] [--seconds 3] [--step 0.1] [--out benchmarks/results/data.json]

Batches of eight crops of 256 x 256, cut at a scale of 0.5 to 1. Without --photos, 96 pieces of scikit-image's photos, enlarged to
1024 x 768 and saved as JPEG of quality 90. All ways are measured in turns in one process, three times each, and the best counts:
ratios travel, absolute figures do not. "plain" is the loop that everyone writes first: open, convert, cut, in the training's own
thread. Crops are counted by the clock, and by the seconds that the processor spent on this process, which other processes
disturb less. Files lie in the page cache: a disk can only be slower. "http" are the shards from a server on loopback, with a
cache that holds two windows, so that they are fetched again and again. The share of the time that a device waits is measured with
one that takes --step seconds for a batch.
"""

import argparse
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, __version__ as pillow_version

from hific_nb.config import write_atomic
from hific_nb.data import SAMPLE_PHOTOS, PhotoCrops, ShardCrops, find_images, photo_fault, sample_photo, write_shard

BATCH, CROP, PER_SHARD, WINDOW = 8, 256, 16, 2


def make_photos(folder, n=96):
    rng = np.random.default_rng(0)
    photos = [sample_photo(name) for name in SAMPLE_PHOTOS]
    i = 0
    while i < n:
        photo = photos[int(rng.integers(len(photos)))]
        width = int(rng.integers(200, min(photo.width, photo.height * 4 // 3) + 1))
        left, top = (int(rng.integers(0, side + 1)) for side in (photo.width - width, photo.height - width * 3 // 4))
        box = (left, top, left + width, top + width * 3 // 4)
        piece = photo.resize((1024, 768), Image.Resampling.BICUBIC, box=box)
        if photo_fault(np.asarray(piece)): continue  # else the sets would leave it out
        piece.save(folder / f"{i:03}.jpg", quality=90)
        i += 1
    return find_images(folder)


class Plain:
    "The loop that everyone writes first."

    def __init__(self, paths): self.paths, self.rng = paths, np.random.default_rng(0)

    def __iter__(self): return self

    def __next__(self):
        crops = []
        for _ in range(BATCH):
            photo = Image.open(self.paths[self.rng.integers(len(self.paths))]).convert("RGB")
            side = min(round(CROP / self.rng.uniform(0.5, 1)), *photo.size)
            left, top = (int(self.rng.integers(0, full - side + 1)) for full in photo.size)
            piece = photo.crop((left, top, left + side, top + side)).resize((CROP, CROP), Image.Resampling.LANCZOS)
            crops.append(torch.from_numpy(np.array(piece)).permute(2, 0, 1))
        return None, torch.stack(crops)

    def close(self): pass


def crops_per_second(batches, seconds):
    for _ in range(2): next(batches)  # warm
    start, spent = time.perf_counter(), time.process_time()
    n = 0
    while time.perf_counter() - start < seconds:
        next(batches)
        n += BATCH
    return np.array([n / (time.perf_counter() - start), n / (time.process_time() - spent)])


def share_waited(batches, step, seconds):
    "The share of the time that is waited by a device that takes `step` seconds a batch."
    next(batches)
    time.sleep(4 * step)  # what is ahead at the start is not the point
    waited = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        time.sleep(step)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - start)


def serve(folder):
    "A file server in a process of its own, and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", folder],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: break
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{port}"


def processor():
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(paths, folder, address, threads, seconds, step, repeat=3):
    common = dict(crop_size=CROP, batch_size=BATCH)
    shards = dict(common, window=WINDOW, memory_gb=0)
    count = len(list(folder.glob("*.tar")))
    size = (folder / "000.tar").stat().st_size
    sets = {"memory": lambda t: PhotoCrops(paths, memory_gb=4, threads=t, **common),
            "folder": lambda t: PhotoCrops(paths, memory_gb=0, threads=t, **common),
            "shards": lambda t: ShardCrops(str(folder), threads=t, **shards),
            "http": lambda t: ShardCrops(f"{address}/{{000..{count - 1:03}}}.tar", threads=t, cache=folder / f"cache{t}",
                                         cache_gb=2 * WINDOW * size / 1e9, **shards)}
    made = {(name, t): make(t) for name, make in sets.items() for t in threads}
    ways = {("plain", 0): lambda: Plain(paths)}
    for key, crops in made.items(): ways[key] = lambda crops=crops: crops.prefetch(0, n_ahead=2 * crops.threads)
    speed, waits = {key: np.zeros(2) for key in ways}, {}
    for k in range(repeat):
        for key, make in ways.items():
            batches = make()
            speed[key] = np.maximum(speed[key], crops_per_second(batches, seconds))
            if k == 0: waits[key] = share_waited(batches, step, seconds)
            batches.close()
    base = speed["plain", 0]
    return [dict(photos=name, threads=t, crops_per_second=speed[name, t][0], ratio=(speed[name, t] / base)[0],
                 crops_per_processor_second=speed[name, t][1], processor_ratio=(speed[name, t] / base)[1], waited=waits[name, t])
            for name, t in ways]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--photos", type=Path, help="a folder of photos to measure with")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--step", type=float, default=0.1, help="seconds that the device takes for a batch")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "photos").mkdir()
        paths = find_images(args.photos) if args.photos else make_photos(folder / "photos")
        for k in range(len(paths) // PER_SHARD):
            block = paths[k * PER_SHARD:(k + 1) * PER_SHARD]
            write_shard(folder / f"{k:03}.tar", [(f"{i:06}{p.suffix}", p.read_bytes()) for i, p in enumerate(block)])
        server, address = serve(folder)
        try: rows = measure(paths, folder, address, args.threads, args.seconds, args.step)
        finally: server.kill()
        kilobytes = sum(p.stat().st_size for p in paths) / len(paths) / 1e3
    print(f"{len(paths)} photos of {kilobytes:.0f} kB, {cores} cores; the device takes {args.step} s for {BATCH} crops\n")
    print(f"{'':<8}{'threads':>8}{'crops/s':>10}{'ratio':>8}{'a processor second':>20}{'ratio':>8}{'device waits':>14}")
    for row in rows:
        print(f"{row['photos']:<8}{row['threads']:>8}{row['crops_per_second']:>10.0f}{row['ratio']:>8.2f}"
              f"{row['crops_per_processor_second']:>20.0f}{row['processor_ratio']:>8.2f}{row['waited']:>13.1%}")
    if args.out:
        result = dict(date=datetime.date.today().isoformat(), processor=processor(), cores=cores, python=platform.python_version(),
                      torch=torch.__version__, pillow=pillow_version, photos=len(paths), kilobytes=kilobytes, batch=BATCH,
                      crop=CROP, seconds=args.seconds, repeat=3, step=args.step, load=os.getloadavg()[0], rows=rows)
        write_atomic(args.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
