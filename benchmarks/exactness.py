"""What exact table indexes cost: seconds beside the float network that they replace, and beside a whole compress and decompress.

    python benchmarks/exactness.py [--repeat 5] [--out benchmarks/results/exactness.json]

A 768 x 512 photo, one thread, the dtype that a Codec takes on this processor; "hific-lite" with its trained weights, "hific"
(the paper's width) with random ones, whose times are the same. "float" is the synthesis of the scales in float32 with a binary
search for the rows, "exact" the integer synthesis with its lookup. Seconds are the processor's of that one thread, the least of
the calls, which take turns. The rate is that of the symbols' bits under both rows, of three photos at quality "low".
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from coding import installed, processor
from PIL import Image

from hific_nb.codec import Codec
from hific_nb.coders import table_bits
from hific_nb.config import model_preset, write_atomic
from hific_nb.data import sample_photo
from hific_nb.entropy_models import scale_thresholds
from hific_nb.model import Model


def least(functions, repeat):
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeat + 1):  # the first calls fill caches
        for name, function in functions.items():
            start = time.thread_time()
            function()
            best[name] = min(best[name], time.thread_time() - start)
    return best


def float_rows(codec, latents):
    z = torch.from_numpy(latents.hyperlatents)[None].float()
    thresholds = torch.from_numpy(scale_thresholds(codec.coding.scales))
    with torch.inference_mode():
        scales = codec.model.Hyperprior.synthesis_std(z)[0, :, : latents.symbols.shape[1], : latents.symbols.shape[2]]
        return torch.searchsorted(thresholds.float(), scales.contiguous(), right=True)


def speed(name, codec, photo, repeat):
    latents = codec.encode_latents(photo)
    data, z = codec.encode(latents), torch.from_numpy(latents.hyperlatents)[None].float()
    best = least({"float": lambda: float_rows(codec, latents),
                  "exact": lambda: codec.index_synthesis(z, latents.symbols.shape[1:]),
                  "compress": lambda: codec.compress(photo), "decompress": lambda: codec.decompress(data)}, repeat)
    added = best["exact"] - best["float"]
    return dict(model=name, dtype=str(codec.dtype).removeprefix("torch."), seconds=best, added_ms=1e3 * added,
                added_percent={way: 100 * added / (best[way] - added) for way in ("compress", "decompress")})


def rate(codec):
    bits, same = np.zeros(2), []
    for name in ("coffee", "chelsea", "rocket"):
        latents = codec.encode_latents(sample_photo(name).resize((768, 512), Image.Resampling.LANCZOS), quality="low")
        rows = latents.indexes, float_rows(codec, latents).numpy()
        same.append((rows[0] == rows[1]).mean())
        bits += [table_bits([(latents.symbols.ravel(), r.ravel(), codec.coding.latents)]) for r in rows]
    return dict(rate_percent=100 * (bits[0] / bits[1] - 1), rows_the_same_percent=100 * float(np.mean(same)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photo = sample_photo("coffee").resize((768, 512), Image.Resampling.LANCZOS)
    lite = Codec.from_pretrained("hific-lite", device="cpu")
    rows = [speed("hific-lite", lite, photo, 3 * args.repeat) | rate(lite)]
    torch.manual_seed(0)
    rows.append(speed("hific", Codec(Model(model_preset("hific")), device="cpu"), photo, args.repeat))
    print(f"{'':<12}{'float ms':>10}{'exact ms':>10}{'added ms':>10}{'compress':>11}{'decompress':>13}{'rate':>12}")
    for row in rows:
        s, p = row["seconds"], row["added_percent"]
        costs = f"{row['rate_percent']:+.4f} %" if "rate_percent" in row else "-"
        print(f"{row['model']:<12}{1e3 * s['float']:>10.1f}{1e3 * s['exact']:>10.1f}{row['added_ms']:>10.1f}"
              f"{p['compress']:>+9.1f} %{p['decompress']:>+11.1f} %{costs:>12}")
    if args.out:
        about = dict(date=datetime.date.today().isoformat(), processor=processor(), threads=1, repeat=args.repeat,
                     versions={"python": platform.python_version(), "torch": installed("torch")}, rows=rows)
        write_atomic(args.out, (json.dumps(about, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
