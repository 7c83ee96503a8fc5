"""Seconds to compress and decompress one 768 x 512 photo: a warm call, PIL image in, bytes out, and back.

    python benchmarks/speed.py [--model hific-lite] [--threads 2] [--repeat 15]

The references run in the same process on the same photo: Pillow's AVIF and WebP at about the same number of bytes. Peak
memory is that of the whole process. The photo comes with scikit-image. Medians; the fastest call in brackets.
"""

import argparse
import io
import resource
import statistics
import time
from functools import partial

import torch
from PIL import Image, features

from hific_nb.codec import Codec
from hific_nb.data import sample_photo


def measure(function, repeat):
    for _ in range(3): function()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds)


def saved(photo, kind, quality):
    buffer = io.BytesIO()
    photo.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    photo = sample_photo("coffee").resize((768, 512), Image.Resampling.LANCZOS)
    codec = Codec.from_pretrained(args.model, device=args.device)
    data = codec.compress(photo)
    print(f"{codec}, {args.threads} threads, 768 x 512, {len(data):,} bytes")
    rows = [(codec.name, measure(lambda: codec.compress(photo), args.repeat),
             measure(lambda: codec.decompress(data), args.repeat))]
    for kind in ("AVIF", "WEBP"):
        if not features.check(kind.lower()):
            print(f"{kind}: skipped, this Pillow has no {kind}")
            continue
        quality = min(range(5, 96, 5), key=lambda q: abs(len(saved(photo, kind, q)) - len(data)))  # noqa: B023
        coded = saved(photo, kind, quality)
        rows.append((f"{kind}, {len(coded):,} bytes", measure(partial(saved, photo, kind, quality), args.repeat),
                     measure(partial(opened, coded), args.repeat)))
    base = rows[0]
    print(f"{'':<26}{'compress ms':>18}{'decompress ms':>18}{'ratio':>16}")
    for name, enc, dec in rows:
        print(f"{name:<26}{1e3 * enc[0]:>9.1f} ({1e3 * enc[1]:.1f}){1e3 * dec[0]:>11.1f} ({1e3 * dec[1]:.1f})"
              f"{enc[0] / base[1][0]:>9.2f} / {dec[0] / base[2][0]:.2f}")
    latents = codec.encode_latents(photo)
    z = torch.from_numpy(latents.hyperlatents)[None].float().to(codec.device)
    for name, function in (("encoder and hyperprior", lambda: codec.encode_latents(photo)),
                           ("entropy encoding", lambda: codec.encode(latents)),
                           ("exact table indexes", lambda: codec.index_synthesis(z, latents.symbols.shape[1:])),
                           ("entropy decoding and hyperprior", lambda: codec.decode_latents(data)),
                           ("generator", lambda: codec.generate(latents))):
        print(f"  of it: {name:<34}{1e3 * measure(function, args.repeat)[0]:.1f} ms")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
