"""Speed and length of the entropy coders on the latents of a 768 x 512 photo at paper width: 337,920 symbols.

    python benchmarks/coding.py [--repeat 15] [--out benchmarks/results/coding.json] [--compressai FOLDER]

One process, one thread. Symbols are Gaussian with log-normal scales, at about 2.1, 0.6 and 0.18 bit a symbol. Overhead is
that of the whole stream over sum(-log2 p) under the densities before they became tables. Speed is that of the fastest
call, by the processor time of its thread, in Msymbols/s and as a ratio to CompressAI's C++ rANS in the same run, or to
constriction where that is not installed. "coder" is the call alone, on the arrays that it takes; "tensors" begins with a
tensor of residuals and one of scales, whole numbers in float64 as the exact hyper-synthesis makes them, and ends with a
tensor: rounding, table indexes on both sides, casts and copies. What the first call of a fresh process waits for is
measured in processes of their own.

CompressAI gets float32 scales and a binary search for its indexes, which is faster than its own way of finding them.
It is measured if its compiled modules can be found: `pip install --no-deps compressai==1.2.8`, or with `--target FOLDER`
to leave the environment alone. Its tables (64 scales, the next larger one, 16 bits) are its own.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from hific_nb.coders import CoderUnavailableError, get_coder, list_coders
from hific_nb.config import HificError, write_atomic
from hific_nb.entropy_models import interval_likelihood, scale_grid, scale_tables, scale_thresholds
from hific_nb.hyperprior import ThresholdLookup

SHAPE = (220, 32, 48)
SPREADS = {2.1: -0.15, 0.6: -1.5, 0.18: -2.38}  # bits a symbol -> mean of the logarithm of the scales


UNIT = 2.0 ** -36  # one step of the integer scales of a stored model


def latents(spread, seed=9):
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=SHAPE) + spread).clip(0.11, 256)
    return torch.from_numpy(rng.normal(size=SHAPE) * scales).float(), torch.from_numpy(np.rint(scales / UNIT))


class Ours:
    "A coder of the package: the call alone, and from tensors to a tensor."

    def __init__(self, name):
        self.name, self.coder = name, get_coder(name)
        self.tables = scale_tables(scale_grid())
        self.lookup = ThresholdLookup(torch.from_numpy(np.rint(scale_thresholds(scale_grid()) / UNIT)))

    def scales(self, whole): return whole

    def indexes(self, scales): return self.lookup(scales)

    def plain(self, tensor): return tensor.numpy()

    def prepare(self, residuals, scales):
        return self.plain(torch.round(residuals).to(torch.int32).flatten()), self.plain(self.indexes(scales).flatten())

    def encode(self, symbols, indexes): return self.coder.encode([(symbols, indexes, self.tables)])

    def decode(self, data, symbols, indexes):
        decoder = self.coder.decoder(data)
        out = decoder.read(indexes, self.tables)
        decoder.close()
        return out

    def to_tensor(self, out): return torch.from_numpy(out).view(SHAPE).float()


class CompressAI(Ours):
    "CompressAI's C++ rANS with the tables of its Gaussian conditional; lists are what its calls take."

    def __init__(self, folder):
        self.name = "CompressAI"
        ans, cxx = (compiled(folder, name) for name in ("ans", "_CXX"))
        self.encoder, self.decoder = ans.RansEncoder(), ans.RansDecoder()
        grid = torch.from_numpy(scale_grid(levels=64))
        self.thresholds = grid[:-1].float()
        reach = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 1e-9, dtype=torch.float64)))
        self.cdfs, self.sizes, self.offsets = [], [], []
        for scale in grid:
            half = math.ceil(float(scale) * reach)
            v = torch.arange(-half, half + 1, dtype=torch.float64)
            p = interval_likelihood(v, torch.zeros_like(v), scale)
            tail = torch.special.ndtr((-half - 0.5) / scale) * 2
            cdf = cxx.pmf_to_quantized_cdf([*p.tolist(), float(tail)], 16)
            self.cdfs.append(cdf)
            self.sizes.append(len(cdf))
            self.offsets.append(-half)

    def scales(self, whole): return (whole * UNIT).float()

    def indexes(self, scales): return torch.bucketize(scales, self.thresholds, out_int32=True)

    def plain(self, tensor): return tensor.tolist()

    def encode(self, symbols, indexes):
        return self.encoder.encode_with_indexes(symbols, indexes, self.cdfs, self.sizes, self.offsets)

    def decode(self, data, symbols, indexes):
        return self.decoder.decode_with_indexes(data, indexes, self.cdfs, self.sizes, self.offsets)

    def to_tensor(self, out): return torch.tensor(out, dtype=torch.float32).view(SHAPE)


def compiled(folder, name):
    "A compiled module of CompressAI without the package around it, which wants much more than this."
    if not folder:
        found = importlib.util.find_spec("compressai")
        if found is None: raise HificError("not installed: pip install --no-deps compressai==1.2.8 (or --compressai FOLDER)")
        folder = found.submodule_search_locations[0]
    paths = sorted([*Path(folder).glob(f"compressai/{name}.*.so"), *Path(folder).glob(f"{name}.*.so")])
    if not paths: raise HificError(f"there is no compiled module {name} in {folder}")
    spec = importlib.util.spec_from_file_location(name, paths[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fastest(functions, repeat, seconds=1.0):
    "The least time of each function, in turns so that all see the same machine; slow ones are called less often."
    best = dict.fromkeys(functions, math.inf)
    for k in range(repeat):
        for key, function in functions.items():
            if k and best[key] * k > seconds: continue
            start = time.thread_time()
            function()
            best[key] = min(best[key], time.thread_time() - start)
    return best


def from_tensors(coder, residuals, scales): return coder.encode(*coder.prepare(residuals, scales))


def to_tensor(coder, data, scales): return coder.to_tensor(coder.decode(data, None, coder.plain(coder.indexes(scales).flatten())))


def measure(coders, repeat):
    rows = []
    for rate, spread in SPREADS.items():
        residuals, whole = latents(spread)
        rounded, n = torch.round(residuals), residuals.numel()
        ideal = -float(torch.log2(interval_likelihood(rounded.double(), torch.zeros(()), whole * UNIT)).sum())
        tasks, sizes = {}, {}
        for coder in coders:
            scales = coder.scales(whole)
            arrays = coder.prepare(residuals, scales)
            data = coder.encode(*arrays)
            if not torch.equal(coder.to_tensor(coder.decode(data, *arrays)), rounded):
                raise HificError(f"{coder.name} does not give back what it coded.")
            sizes[coder.name] = len(data)
            tasks |= {(coder.name, "coder", "encode"): partial(coder.encode, *arrays),
                      (coder.name, "coder", "decode"): partial(coder.decode, data, *arrays),
                      (coder.name, "tensors", "encode"): partial(from_tensors, coder, residuals, scales),
                      (coder.name, "tensors", "decode"): partial(to_tensor, coder, data, scales)}
        best = fastest(tasks, repeat)
        for coder in coders:
            row = dict(name=coder.name, rate=rate, bits_per_symbol=ideal / n, bytes=sizes[coder.name],
                       overhead_percent=100 * (8 * sizes[coder.name] / ideal - 1))
            for kind in ("coder", "tensors"):
                row[kind] = {way: n / best[coder.name, kind, way] / 1e6 for way in ("encode", "decode")}
            rows.append(row)
        print(f"  {rate} bit a symbol: done", flush=True)
    return rows


FIRST = """
import json, sys, time
import numpy as np
from hific_nb.coders import get_coder
from hific_nb.entropy_models import tables_from_pmfs
from hific_nb.rans import coding_tables
tables, zeros = tables_from_pmfs([[0.5]], [0]), np.zeros(100, np.int32)
coding_tables(tables)
coder = get_coder()
data = get_coder("rans-numpy").encode([(zeros, zeros, tables)])
def call():
    begin = time.perf_counter(), time.process_time()
    if sys.argv[1] == "encode": coder.encode([(zeros, zeros, tables)])
    else: coder.decoder(data).read(zeros, tables)
    return time.perf_counter() - begin[0], time.process_time() - begin[1]
first, second = call(), call()
print(json.dumps([a - b for a, b in zip(first, second)]))
"""


def first_call(repeat=5):
    """Seconds, and those of the processor, that the first call of a fresh process takes longer than the second: compiled
    before, and when the kernels must be compiled."""
    def run(way, folder=None):
        env = os.environ | ({"NUMBA_CACHE_DIR": folder} if folder else {})
        done = subprocess.run([sys.executable, "-c", FIRST, way], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    found = {}
    for way in ("encode", "decode"):
        run(way)
        with tempfile.TemporaryDirectory() as folder: cold = run(way, folder)
        wall, cpu = (min(times) for times in zip(*(run(way) for _ in range(repeat))))
        found[way] = dict(wait=wall, processor=cpu, wait_when_compiling=cold[0], processor_when_compiling=cold[1])
    return found


def table(rows, reference):
    base = {row["rate"]: row for row in rows if row["name"] == reference}
    print(f"\n{'':>4}{'':<14}{'bytes':>8}{'over ideal':>12}{'encode':>10}{'decode':>9}{'ratio to ' + reference:>24}"
          f"{'tensors: encode':>18}{'decode':>9}{'ratio':>16}")
    rate = None
    for row in rows:
        if row["rate"] != rate: print(f"{row['bits_per_symbol']:.3f} bit a symbol, Msymbols/s")
        rate, text = row["rate"], f"{'':>4}{row['name']:<14}{row['bytes']:>8,}{row['overhead_percent']:>10.3f} %"
        for kind, width in (("coder", 24), ("tensors", 16)):
            enc, dec = (row[kind][way] for way in ("encode", "decode"))
            ratio = "{:.2f} / {:.2f}".format(*(row[kind][way] / base[rate][kind][way] for way in ("encode", "decode")))
            text += f"{enc:>{10 if kind == 'coder' else 18}.1f}{dec:>9.1f}{ratio:>{width}}"
        print(text)


def processor():
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(package):
    try: return version(package)
    except PackageNotFoundError: return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--compressai", type=Path, help="folder where pip's --target put CompressAI")
    args = parser.parse_args()
    torch.set_num_threads(1)
    coders, skipped = [], {}
    for name in list_coders()[:4]:
        try: coders.append(Ours(name))
        except CoderUnavailableError as error: skipped[name] = str(error)
    try: coders.append(CompressAI(args.compressai))
    except (HificError, ImportError) as error: skipped["CompressAI"] = str(error)
    for name, reason in skipped.items(): print(f"{name}: skipped, {reason}")
    names = [coder.name for coder in coders]
    reference = next(name for name in ("CompressAI", "constriction", "rans") if name in names)
    rows = measure(coders, args.repeat)
    table(rows, reference)
    first = first_call()
    print("\nFirst call of a fresh process, seconds longer than the second one")
    for way, t in first.items():
        print(f"    {way}: {t['wait']:.3f} ({t['processor']:.3f} of the processor); when it must compile "
              f"{t['wait_when_compiling']:.1f} ({t['processor_when_compiling']:.1f})")
    if args.out:
        packages = ("torch", "numpy", "numba", "torchac", "constriction")
        about = dict(date=datetime.date.today().isoformat(), processor=processor(), threads=1, repeat=args.repeat,
                     symbols=math.prod(SHAPE), reference=reference, skipped=skipped, first_call=first,
                     versions={"python": platform.python_version()} | {p: installed(p) for p in packages})
        if "CompressAI" in names: about["versions"]["compressai"] = installed("compressai") or "1.2.8"

        def short(value):
            if isinstance(value, dict): return {k: short(v) for k, v in value.items()}
            return float(f"{value:.5g}") if isinstance(value, float) else value
        lines = ",\n  ".join(json.dumps(short(row)) for row in rows)
        text = json.dumps(short(about), indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n'
        write_atomic(args.out, text.encode())


if __name__ == "__main__":
    main()
