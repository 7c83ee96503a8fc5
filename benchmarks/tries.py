"""What was tried around a variable-rate model, measured again: the figures of `nbs/explore/training_diary.ipynb`.

    python benchmarks/tries.py dead_zone --model hific-lite-base --photos ../shared/data/kodak --out benchmarks/results/tries.json
    python benchmarks/tries.py averaging --run outputs/base --photos ../shared/data/kodak --out benchmarks/results/tries.json

dead_zone: latents within (0.5 + width) of their predicted mean are coded as the mean, and so on for every other symbol;
from real files of a shipped model.
averaging: the weights of a run's newest checkpoint, as they are and averaged; rates estimated from likelihoods.
LPIPS weights are found as everywhere (HIFIC_LPIPS_WEIGHTS, torch's cache, or a download). Each adds its rows to --out.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hific_nb.codec import Codec
from hific_nb.config import ModelConfig, write_atomic
from hific_nb.data import find_images, image_to_tensor, read_image
from hific_nb.metrics import psnr
from hific_nb.model import GAIN_UNIT, Model
from hific_nb.perceptual import LPIPS

LEVELS = (0, 10, 20, 35, 50, 65, 80, 100)


def unit(image): return image_to_tensor(image)[None].float() / 255


@torch.inference_mode()
def dead_zone(args, lpips):
    codec, rows = Codec.from_pretrained(args.model), []
    photos = [read_image(path) for path in find_images(args.photos)[::args.every]]
    analysed = [codec.analyse(photo, thumbnail=False) for photo in photos]
    for width in (0.0, 0.06, 0.12, -0.06):
        for level in LEVELS:
            figures = []
            for photo, analysis in zip(photos, analysed):
                plain = codec.quantize(analysis, level)
                gains, inverse = (torch.from_numpy(g[level]).float()[:, None, None] * GAIN_UNIT
                                  for g in (codec.coding.gains, codec.coding.inverse_gains))
                y = analysis.y * gains
                mean = codec.model.Hyperprior.means(torch.from_numpy(plain.hyperlatents)[None].float(), y.shape[2:])
                rest = y - mean
                symbols = rest.sign() * (rest.abs() + 0.5 - width).floor()
                latents = replace(plain, symbols=symbols[0].to(torch.int32).numpy(), y_hat=(mean + symbols) * inverse)
                out = codec.generate(latents)
                figures.append((8 * len(codec.encode(latents)) / photo.width / photo.height, psnr(photo, out),
                                lpips(unit(photo), unit(out)).item()))
            rows.append(dict(width=width, level=level, photos=len(photos), **mean_of(figures)))
            print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def averaging(args, lpips):
    config = ModelConfig.from_dict(json.loads((args.run/"run.json").read_text())["model"])
    newest = max((args.run/"checkpoints").glob("step-*.pt"))
    state, rows = torch.load(newest, weights_only=True, map_location="cpu"), []
    averaged = {name.removeprefix("module."): t for name, t in state["averaged"].items() if name.startswith("module.")}
    photos = [unit(read_image(path)) for path in find_images(args.photos)[::args.every]]
    for weights, tensors in (("averaged", averaged), ("as they are", state["model"])):
        model = Model(config)
        model.load_state_dict(tensors)
        for level in LEVELS:
            figures = []
            for x in photos:
                out = model.eval()(x, torch.tensor([level]))
                recon = out["recon"].clamp(0, 1)
                figures.append((out["bpp_quantized"].item(), -10 * np.log10((recon - x).square().mean().item()),
                                lpips(recon, x).item()))
            rows.append(dict(weights=weights, step=state["step"], level=level, photos=len(photos), **mean_of(figures)))
            print(rows[-1], flush=True)
    return rows


def mean_of(figures): return dict(zip(("bpp", "psnr", "lpips"), np.mean(figures, 0).round(4).tolist()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dead_zone", "averaging"))
    parser.add_argument("--model", default="hific-lite-base")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--every", type=int, default=6, help="every how many-th photo")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {"dead_zone": dead_zone, "averaging": averaging}[args.what](args, LPIPS("alex"))
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_atomic(args.out, (json.dumps(known | {args.what: rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
