"""Rate and quality of a model on a folder of photos, from real files: the figures of the model cards.

    python benchmarks/kodak.py --model hific-lite --photos ../shared/data/kodak [--card hific_nb/models/hific-lite-v0]

Every photo is compressed to a file and decoded from it; what is measured is that file and that picture. Fails unless
the decoded symbols are those that were coded, and every file is at most its ideal length x 1.005 + 40 bytes. With
--card, the means are written into card.json of that model folder.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from hific_nb.codec import Codec
from hific_nb.config import write_atomic
from hific_nb.data import find_images, read_image
from hific_nb.metrics import bpp, ms_ssim, psnr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--card", type=Path)
    parser.add_argument("--description")
    args = parser.parse_args()
    codec = Codec.from_pretrained(args.model, device=args.device)
    print(codec)
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for photo in find_images(args.photos):
            image = read_image(photo)
            latents = codec.encode_latents(image)
            path = Path(folder, "photo.hfc")
            path.write_bytes(codec.encode(latents))
            size, ideal = path.stat().st_size, codec.ideal_bits(latents) / 8
            decoded_latents = codec.decode_latents(path)
            decoded = codec.generate(decoded_latents)
            same = np.array_equal(decoded_latents.symbols, latents.symbols) and np.array_equal(
                decoded_latents.hyperlatents, latents.hyperlatents)
            fits = size <= 1.005 * ideal + 40
            wrong += not (same and fits)
            rows.append((bpp(size, *image.size), 8 * ideal / image.width / image.height, psnr(image, decoded),
                         ms_ssim(image, decoded)))
            print(f"{photo.name:<14} {size:>7,} bytes  ideal {ideal:>9,.1f}  {rows[-1][0]:.4f} bpp  "
                  f"{rows[-1][2]:.2f} dB  MS-SSIM {rows[-1][3]:.4f}{'' if same else '  SYMBOLS DIFFER'}"
                  f"{'' if fits else '  TOO LONG'}")
    mean = dict(zip(("bpp", "ideal_bpp", "psnr", "ms_ssim"), (round(float(v), 4) for v in np.mean(rows, 0))))
    print(f"mean of {len(rows)} photos: {mean}")
    if args.card:
        from hific_nb.model import load_model

        model = load_model(args.card)
        card = json.loads((args.card/"card.json").read_text()) if (args.card/"card.json").exists() else {}
        card |= dict(fingerprint=codec.fingerprint.hex(), parameters=sum(p.numel() for p in model.parameters()),
                     weights_sha256=hashlib.sha256((args.card/"weights.safetensors").read_bytes()).hexdigest(),
                     figures=dict(dataset=args.photos.name, photos=len(rows), **mean))
        if args.description: card["description"] = args.description
        write_atomic(args.card/"card.json", (json.dumps(card, indent=2) + "\n").encode())
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
