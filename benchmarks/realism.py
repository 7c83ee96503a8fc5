"""Distortion against perception: stage 1, GAN, and the blends between them, from one file a photo and level.

    python benchmarks/realism.py --photos ../shared/data/train ../shared/data/kodak --held-back ../shared/data/train \
        --weights ../shared/weights --card hific_nb/models/hific-lite-gan-v2

Each photo is encoded once a level and decoded by both generators, by networks between their weights (room 17,
`GeneratorPair`), and as blends of the two pictures. Of each: PSNR, LPIPS (AlexNet) and `patch_distance` as means over photos, and
the Fréchet and kernel distances of all 256 x 256 patches, laid as in HiFiC's paper, in features of VGG16. Of a folder named by
--held-back, only the photos count that training held back. `fid_vgg16` and `kid_vgg16` are of VGG16's last convolution, as in room
16; `stages` has both for the last convolution of each of its five resolutions, from grain to objects. The kernel distance, and its
change from stage 1, come with their standard errors, by leaving out a tenth of the photos at a time. With --card, the figures are
written into card.json of that model folder as well: the explorer what_the_gan_adds draws them. Pictures are blended at the levels
of --pixels alone: it is the features that take the time. A model with an encoder of its own is measured with --own-files: it
encodes each photo into at most as many bytes as stage 1 took, and nothing is blended.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from hific_nb.codec import Codec, hardware_bfloat16
from hific_nb.config import write_atomic
from hific_nb.data import find_images, holdout_split, image_to_tensor, read_image, split_alpha
from hific_nb.evaluation import patch_features
from hific_nb.metrics import bpp, frechet_distance, kernel_distance, psnr
from hific_nb.perceptual import LPIPS, FeatureStack
from hific_nb.training import _keep_pages
from hific_nb.widgets import GeneratorPair, PictureBlends, patch_distance
from hific_nb.zoo import find_model


def jackknife(originals, decoded, photo, than=None, groups=10):
    "The standard error of the kernel distance, or of its difference from that of `than`: groups of photos are left out in turn."
    group = np.unique(photo, return_inverse=True)[1] % groups
    def distance(features, g): return kernel_distance(originals[group != g], features[group != g])
    left = np.array([distance(decoded, g) - (0 if than is None else distance(than, g)) for g in range(groups)])
    return float(np.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum()))


STAGES = {"conv1_2": 64, "conv2_2": 128, "conv3_3": 256, "conv4_3": 512, "conv5_3": 512}  # layers of VGG16, widths


def by_stage(features, stages):
    "Features of a list of pictures, (n, sum of widths) each -> {layer: (N, width)}."
    ends = np.cumsum([0, *stages.values()])
    features = np.concatenate([np.empty((0, ends[-1])), *(f for f in features if len(f))])
    return {name: features[:, a:b] for name, a, b in zip(stages, ends, ends[1:])}


class Measure:
    "The networks that look: LPIPS of two pictures, features of a picture's patches."
    stages = STAGES

    def __init__(self, weights, device):
        self.device, self.lpips = device, LPIPS("alex", weights).to(device)
        self.features = FeatureStack("vgg", weights).to(device, memory_format=torch.channels_last)
        self.dtype = torch.bfloat16 if hardware_bfloat16(device) else torch.float32

    @torch.inference_mode()
    def distance(self, a, b):
        if min(a.size) < 31: return None
        return float(self.lpips(*(image_to_tensor(x)[None].to(self.device).float() / 255 for x in (a, b))))

    def patches(self, image):
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32):
            return patch_features(self.means, image)

    def means(self, x):
        maps = self.features((x.to(self.device).float() / 255).contiguous(memory_format=torch.channels_last))
        return torch.cat([m.float().mean((2, 3)) for m in maps], 1)


class OneFile(PictureBlends):
    def bytes(self, share, level): return len(self.data(level))


class Rivals:
    "Two models with an encoder each, in the place of a `GeneratorPair`."
    def __init__(self, *names, device, refine=0, weights=None):
        self.refine, self.weights = refine, weights
        self.codecs = [Codec.from_pretrained(name, device=device) for name in names]
        self.codec, self.names = self.codecs[0], tuple(find_model(name)[1] for name in names)
        self.fingerprints = tuple(codec.fingerprint for codec in self.codecs)


class TwoFiles:
    "One picture under `Rivals`: the file of the first at a level, and of the second one of at most as many bytes."
    def __init__(self, rivals, image): self.rivals, self.image, self.files = rivals, image, {}

    def file(self, share, level):
        key = share, level
        if key not in self.files:
            codec = self.rivals.codecs[int(share)]
            analysis = codec.analyse(self.image, thumbnail=False)
            if share: level = codec.find_level(analysis, max_bytes=self.bytes(0, level))
            if share and self.rivals.refine:
                latents = codec.refine(self.image, analysis, level, self.rivals.refine, weights=self.rivals.weights)
            else: latents = codec.quantize(analysis, level)
            self.files[key] = codec.encode(latents)
        return self.files[key]

    def bytes(self, share, level): return len(self.file(share, level))

    def picture(self, share, way, level): return self.rivals.codecs[int(share)].decompress(self.file(share, level))


def measure_set(name, paths, pair, looking, levels, shares, pixel_levels, progress):
    "One folder: photos, patches and rows of figures."
    wanted = [(label, level, share, way) for label, level in levels.items() for share in shares
              for way in (("",) if share in (0, 1) else ("weights", "pixels") if label in pixel_levels else ("weights",))]
    kept = {key: [] for key in wanted}
    originals, photo, features = [], [], {key: [] for key in wanted}
    for k, path in enumerate(paths):
        image = split_alpha(read_image(path))[0]
        blends, own = (TwoFiles if isinstance(pair, Rivals) else OneFile)(pair, image), looking.patches(image)
        originals.append(own)
        photo += [k] * len(own)
        for key in wanted:
            label, level, share, way = key
            decoded = blends.picture(share, way or "weights", level)
            kept[key].append((bpp(blends.bytes(share, level), *image.size), psnr(image, decoded), looking.distance(image, decoded),
                              patch_distance(image, decoded)))
            features[key].append(looking.patches(decoded))
        progress(name, k + 1, len(paths))
    originals, patches, rows = by_stage(originals, looking.stages), len(photo), []
    last = list(looking.stages)[-1]
    for key in wanted:
        label, level, share, way = key
        rates, quality, lpips, fine = ([v for v in values if v is not None] for values in zip(*kept[key]))
        decoded, stage1 = (by_stage(features[k], looking.stages) for k in (key, (label, level, 0, "")))
        found = dict(level=label, rate_level=level, share=share, way=way, bpp=np.mean(rates), psnr=np.mean(quality),
                     patches=np.mean(fine), lpips_alex=np.mean(lpips) if lpips else None)
        if patches > 1:
            stages = {name: dict(fid=frechet_distance(own, decoded[name]), kid=kernel_distance(own, decoded[name]))
                      for name, own in originals.items()}
            found |= dict(fid_vgg16=stages[last]["fid"], kid_vgg16=stages[last]["kid"], stages=stages)
        if len(set(photo)) > 10:
            found |= dict(kid_error=jackknife(originals[last], decoded[last], photo))
            if share: found |= dict(kid_change_error=jackknife(originals[last], decoded[last], photo, stage1[last]))
        rows.append({name: float(value) if isinstance(value, np.floating) else value for name, value in found.items()})
    return dict(name=name, photos=len(paths), patches=patches, rows=rows)


def rounded(x):
    if isinstance(x, float): return float(f"{x:.6g}")
    if isinstance(x, dict): return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="hific-lite-base")
    parser.add_argument("--gan", default="hific-lite-gan")
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folders, each a set of its own")
    parser.add_argument("--held-back", type=Path, nargs="*", default=[], help="those of them that were trained on")
    parser.add_argument("--levels", nargs="+", default=["low", "med", "high"], help="names, or qualities 0 ... 100")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], help="of the GAN; 0 is always measured")
    parser.add_argument("--own-files", action="store_true", help="the second model encodes for itself; shares 0 and 1")
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement of the second model's files; with --own-files")
    parser.add_argument("--pixels", nargs="*", default=["med"], help="levels at which pictures are blended, too")
    parser.add_argument("--limit", type=int, help="photos of each folder, spread over all")
    parser.add_argument("--weights", type=Path, help="folder with AlexNet's and VGG16's; default: as LPIPS finds them")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/realism.json"))
    parser.add_argument("--card", type=Path, help="model folder of the GAN")
    args = parser.parse_args(arguments)
    _keep_pages()
    if args.refine and not args.own_files: parser.error("--refine goes with --own-files.")
    if args.own_files: pair = Rivals(args.base, args.gan, device=args.device, refine=args.refine, weights=args.weights)
    else: pair = GeneratorPair(args.base, args.gan, device=args.device)
    looking = Measure(args.weights, str(pair.codec.device))
    levels = {text: pair.codec.level_of(text if text.isalpha() else float(text)) if pair.codec.levels else None
              for text in args.levels}
    shares = [0.0, 1.0] if args.own_files else sorted({0.0, *args.shares})
    start, sets = time.time(), []

    def progress(name, done, total):
        print(f"\r{name}: {done} of {total} photos, {time.time() - start:.0f} s", end="" if done < total else "\n", flush=True)

    for folder in args.photos:
        paths = sorted(find_images(folder))
        if folder in args.held_back: paths = holdout_split(paths)[1]
        if args.limit: paths = paths[:: max(1, len(paths) // args.limit)][: args.limit]
        name = f"{folder.name}, held back" if folder in args.held_back else folder.name
        sets.append(measure_set(name, paths, pair, looking, levels, shares, args.pixels, progress))
    result = dict(base=pair.names[0], gan=pair.names[1], fingerprints=[f.hex() for f in pair.fingerprints],
                  features="VGG16, its last convolution, mean over a patch of 256 x 256",
                  dtype=str(looking.dtype).removeprefix("torch."), date=datetime.date.today().isoformat(),
                  machine=f"{platform.machine()}, {os.cpu_count()} cores", python=platform.python_version(),
                  torch=torch.__version__, seconds=round(time.time() - start), sets=sets)
    result = rounded(result)
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    if args.card:
        card = json.loads((args.card/"card.json").read_text())
        if card["fingerprint"] != result["fingerprints"][1]:
            parser.error(f"{args.card} is not the folder of {args.gan}: its fingerprint is {card['fingerprint']}.")
        write_atomic(args.card/"card.json", (json.dumps(card | dict(realism=result), indent=1) + "\n").encode())
    for s in result["sets"]:
        print(f"\n{s['name']}: {s['photos']} photos, {s['patches']} patches")
        for row in s["rows"]:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items() if value is not None and key != "stages"))
        for row in s["rows"]:
            if not row["share"] or "stages" not in row: continue
            first = next(r for r in s["rows"] if r["level"] == row["level"] and not r["share"])
            for distance in ("fid", "kid"):
                pairs = [(row["stages"][name][distance], first["stages"][name][distance]) for name in row["stages"]]
                each = " / ".join(f"{a / b - 1:+.0%}" for a, b in pairs)
                print(f"  level {row['level']}, share {row['share']:g} {row['way']}: {distance} {each}, "
                      f"of the sums {sum(a for a, _ in pairs) / sum(b for _, b in pairs) - 1:+.1%}")


if __name__ == "__main__":
    main()
