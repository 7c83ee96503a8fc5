"""Where the time of a picture goes on a GPU, and how far from the matrix peak the generator runs, at 0.4, 2 and 12 megapixels.

    python benchmarks/gpu.py [--model hific-lite | --preset hific] [--repeat 10] [--out benchmarks/results/gpu.json]

Medians of warm calls, the device waited for at every step. The peak is that of one large product of two square matrices in the
codec's dtype, measured here; the generator's operations are counted by PyTorch (a product and a sum are two). "file" checks
that the CPU finds the same latents in a file that the device wrote, and the other way round. `--preset hific` takes the
paper's width with random weights. Without a GPU this says so and ends; `--device cpu --megapixels 0.1` is a check of the script.
"""

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hific_nb.bulk import encode_batch
from hific_nb.codec import Codec
from hific_nb.config import model_preset
from hific_nb.data import sample_photo
from hific_nb.model import Model

SIZES = {0.4: (768, 512), 2.0: (1792, 1120), 12.0: (4000, 3000)}


def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def seconds(function, device, repeat):
    for _ in range(2): function()
    found = []
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def matrix_peak(device, dtype, repeat):
    "TFLOP/s of a large matrix product."
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, device, repeat) / 1e12


def look(codec, megapixels, repeat, peak):
    "Milliseconds of each step for a picture of that size, and the generator against the peak."
    device = codec.device
    side = (round((1.5 * megapixels * 1e6) ** 0.5), round((megapixels * 1e6 / 1.5) ** 0.5))
    width, height = SIZES.get(megapixels, side)
    photo = sample_photo("coffee").convert("RGB").resize((width, height))
    with torch.inference_mode():
        latents = codec.encode_latents(photo)
        data = codec.encode(latents)
        y_hat = latents.y_hat.to(device, codec.dtype).contiguous(memory_format=torch.channels_last)
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
        analysis = codec.analyse(photo, thumbnail=False)
        steps = {"encoder": lambda: codec.analyse(photo, thumbnail=False),
                 "hyperprior, symbols": lambda: codec.quantize(analysis),
                 "entropy encoding": lambda: codec.encode(latents),
                 "hyperprior, entropy decoding": lambda: codec.decode_latents(data),
                 "generator": lambda: codec.model.synthesis(y_hat),
                 "generator to picture": lambda: codec.generate(latents),
                 "compress": lambda: codec.compress(photo), "decompress": lambda: codec.decompress(data)}
        found = {name: 1e3 * seconds(step, device, repeat) for name, step in steps.items()}
        with FlopCounterMode(display=False) as counter: codec.model.synthesis(y_hat)
        flops = counter.get_total_flops() / (found["generator"] / 1e3) / 1e12
    memory = torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda" else None
    return dict(width=width, height=height, bytes=len(data), milliseconds=found, generator_tflops=flops,
                share_of_peak=flops / peak, gigabytes=memory)


def batches(codec, repeat):
    "Pictures a second through the encoder alone, by batch; where a batch would not round as one picture does, None."
    photo, found = sample_photo("coffee").convert("RGB").resize(SIZES[0.4] if codec.device.type == "cuda" else (192, 128)), {}
    for size in (1, 2, 4, 8, 16):
        exact = size == 1 or encode_batch(codec, [photo] * size) is not None
        found[size] = size / seconds(lambda: encode_batch(codec, [photo] * size), codec.device, repeat) if exact else None  # noqa: B023
    return found


def crossing(codec, other):
    "Symbols that differ between the devices, of files each wrote, as the other reads them: none, or the files do not decode."
    differ = 0
    for name in ("coffee", "chelsea", "rocket"):
        for writer, reader in ((codec, other), (other, codec)):
            latents = writer.encode_latents(sample_photo(name))
            read = reader.decode_latents(writer.encode(latents))
            differ += int(np.count_nonzero(read.symbols != latents.symbols))
    return differ


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--preset", help="random weights at this preset's width instead of a model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--megapixels", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: nothing was measured. --device cpu --megapixels 0.1 --repeat 2 checks the script.")
        return None
    torch.manual_seed(0)
    model = Model(model_preset(args.preset)) if args.preset else None
    def make(device): return Codec(model, device=device) if model else Codec.from_pretrained(args.model, device=device)
    codec = make(args.device)
    peak = matrix_peak(codec.device, codec.dtype, args.repeat)
    name = torch.cuda.get_device_name(codec.device) if codec.device.type == "cuda" else "CPU"
    print(f"{codec} on {name}, matrix peak {peak:.2f} TFLOP/s")
    sizes = {}
    for megapixels in args.megapixels:
        r = sizes[megapixels] = look(codec, megapixels, args.repeat, peak)
        print(f"{megapixels:g} megapixels ({r['width']} x {r['height']}, {r['bytes']:,} bytes)"
              + (f", {r['gigabytes']:.2f} GB" if r["gigabytes"] is not None else ""))
        for step, value in r["milliseconds"].items(): print(f"  {step:<30}{value:9.1f} ms")
        print(f"  generator: {r['generator_tflops']:.2f} TFLOP/s, {100 * r['share_of_peak']:.0f} % of the matrix peak")
    result = dict(codec=str(codec), device=name, torch=torch.__version__, date=str(date.today()), peak_tflops=peak, sizes=sizes,
                  batches=batches(codec, args.repeat), symbols_that_differ=crossing(codec, make("cpu")))
    print("encoder, pictures/s by batch: " + ", ".join(f"{k}: {v:.0f}" if v else f"{k}: rounds otherwise, not used"
                                                       for k, v in result["batches"].items()))
    print(f"files across devices: {result['symbols_that_differ']} symbols differ")
    if args.out: args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__": main()
