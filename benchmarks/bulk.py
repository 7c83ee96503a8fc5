"""Files a second through a folder: `run_bulk` against one warm process that compresses one picture after another.

    python benchmarks/bulk.py --photos FOLDER [--model hific-lite] [--repeat 4] [--workers 2] [--out benchmarks/results/bulk.json]

Both read the same files and write theirs. One by one: `codec.compress(path)` and `write_hfc`, with all cores in PyTorch's hands,
after a warm-up. Bulk: worker processes, whose start is measured apart ("start"): the rate is that from the first row of a pass over
`--repeat` copies of the folder's list to its last. "busy" is processor time of the processes over wall time and cores. On a GPU,
one process with batches, and the GPU's own utilization.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from hific_nb.bulk import BulkSettings, Worker, _cores, plan, rows_by_processes
from hific_nb.codec import Codec
from hific_nb.data import find_images
from hific_nb.hfc import write_hfc


def processor_seconds(children: tuple[int, ...]) -> float:
    "User and system time so far of this process and of those."
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for pid in children:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def children() -> tuple[int, ...]:
    return tuple(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


class GpuBusy:
    "Mean utilization of the first GPU in percent, by nvidia-smi twice a second; None without."
    def __enter__(self):
        self.samples, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if torch.cuda.is_available(): self._thread.start()
        return self

    def _look(self):
        while not self._stop.wait(0.5):
            try: self.samples.append(float(subprocess.run(
                ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0"],
                capture_output=True, text=True, check=True).stdout.split()[0]))
            except (OSError, subprocess.CalledProcessError, ValueError): return

    def __exit__(self, *_): self._stop.set()

    @property
    def percent(self): return sum(self.samples) / len(self.samples) if self.samples else None


def one_by_one(photos, folder, args):
    codec = Codec.from_pretrained(args.model, device=args.device)
    for path in photos[:4]: codec.compress(path)
    start, used = time.perf_counter(), processor_seconds(())
    for k in range(args.repeat):
        for path in photos: write_hfc(folder / f"{path.stem}.{k}.hfc", codec.compress(path))
    seconds = time.perf_counter() - start
    return dict(files_per_second=args.repeat * len(photos) / seconds, seconds=seconds,
                busy=(processor_seconds(()) - used) / seconds / _cores()), str(codec)


def bulk(photos, folder, args):
    items = [replace(item, file=f"{k}/{item.file}", target=str(folder / str(k) / Path(item.target).name))
             for k in range(args.repeat) for item in plan(args.photos, photos, folder, ".hfc")]
    settings, begun = BulkSettings(model=args.model, device=args.device), time.perf_counter()
    gpu = torch.cuda.is_available() and args.device != "cpu"
    rows = Worker(settings, threads=min(8, _cores())).rows(items) if gpu else rows_by_processes(items, settings, args.workers)
    with GpuBusy() as utilization:
        warm = 2 * args.workers  # rows until every worker is at work
        for k, row in enumerate(rows, 1):
            if row.get("error"): raise SystemExit(row["error"])
            if k == warm: pids, start, used = children(), time.perf_counter(), processor_seconds(children())
            if k == len(items) - args.workers:  # then the first has no more to do
                seconds, done = time.perf_counter() - start, k - warm
                used = processor_seconds(pids) - used
    return dict(files_per_second=done / seconds, seconds=seconds, start=start - begun, busy=used / seconds / _cores(),
                gpu_percent=utilization.percent)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--device")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--workers", type=int, default=_cores())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    photos = find_images(args.photos)
    with tempfile.TemporaryDirectory() as folder:
        first, codec = one_by_one(photos, Path(folder), args)
        second = bulk(photos, Path(folder), args)
        same = all((Path(folder) / "0" / f"{p.stem}.hfc").read_bytes() == (Path(folder) / f"{p.stem}.0.hfc").read_bytes()
                   for p in photos)
    result = dict(codec=codec, photos=len(photos), repeat=args.repeat, cores=_cores(), workers=args.workers,
                  processor=platform.processor() or platform.machine(), torch=torch.__version__, date=str(date.today()),
                  one_by_one=first, bulk=second, ratio=second["files_per_second"] / first["files_per_second"], same_bytes=same)
    print(f"{codec}, {len(photos)} photos {args.repeat} times, {_cores()} cores")
    print(f"one by one {first['files_per_second']:6.2f} files/s, cores {100 * first['busy']:.0f} % busy")
    print(f"bulk       {second['files_per_second']:6.2f} files/s, cores {100 * second['busy']:.0f} % busy, first rows after "
          f"{second['start']:.1f} s" + (f", GPU {second['gpu_percent']:.0f} %" if second["gpu_percent"] is not None else ""))
    print(f"{result['ratio']:.2f} times; the same bytes: {'yes' if same else 'NO'}")
    if args.out: args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__": main()
