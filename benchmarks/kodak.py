"""Rate and quality of a model on a folder of photos, from real files: the figures of the model cards.

    python benchmarks/kodak.py --model hific-lite --photos ../shared/data/kodak [--card hific_nb/models/hific-lite-base-v1]

By `hific_nb.evaluation`, so it may be killed and started again. Beside what that measures, it fails unless the decoded
symbols are those that were coded, and every file is at most its ideal length x 1.005 + 40 bytes. With --card, the
means are written into card.json of that model folder, and the table below "## Figures" in its README.md is made anew. What the
card says of the same weights and photos, at other qualities and by other metrics, stays: a slow metric may be measured at a
few qualities. Models with rate levels: --qualities, and a row of figures for each.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import numpy as np

from hific_nb.codec import Codec
from hific_nb.config import write_atomic
from hific_nb.evaluation import evaluate
from hific_nb.metrics import bpp
from hific_nb.training import _keep_pages


def check(result, codec):
    """ideal_bpp of each record, and how many files are not what they must be."""
    ideals, wrong = [], 0
    for record in result.records:
        image = result.original(record)
        latents = codec.encode_latents(image, **({} if record["quality"] is None else {"quality": record["quality"]}))
        decoded = codec.decode_latents(result.out / record["file"])
        ideal = codec.ideal_bits(latents) / 8
        same = np.array_equal(decoded.symbols, latents.symbols) and np.array_equal(decoded.hyperlatents, latents.hyperlatents)
        fits = record["bytes"] <= 1.005 * ideal + 40
        wrong += not (same and fits)
        ideals.append(bpp(ideal, *image.size))
        figures = "  ".join(f"{name} {record[name]:.4f}" for name in result.metrics)
        print(f"{record['photo']:<14} {record['quality'] or '':>4} {record['bytes']:>7,} bytes  ideal {ideal:>9,.1f}  {figures}"
              f"{'' if same else '  SYMBOLS DIFFER'}{'' if fits else '  TOO LONG'}")
    return ideals, wrong


def update_card(folder, fingerprint, photos, points, description=None):
    """The means into card.json of a model folder, and into the table of its README.md.

    photos: dict(dataset, photos). points: a dict of means for each quality, of models with rate levels with `quality`.
    """
    from hific_nb.model import load_model
    from hific_nb.zoo import figures_table, model_info, write_card

    model, info, before = load_model(folder), model_info(folder), {}
    known = info.figures
    if info.fingerprint == fingerprint and photos.items() <= known.items():
        before = {point.get("quality"): point for point in known.get("levels") or [known]}
    for point in points: before[point.get("quality")] = before.get(point.get("quality"), {}) | point
    rows = sorted(before.values(), key=lambda point: point["bpp"])
    middle = {key: value for key, value in rows[len(rows) // 2].items() if key != "quality"}
    figures = photos | middle | (dict(levels=rows) if "quality" in rows[0] else {})
    write_card(folder, fingerprint=fingerprint, parameters=sum(p.numel() for p in model.parameters()),
               weights_sha256=hashlib.sha256((folder/"weights.safetensors").read_bytes()).hexdigest(), figures=figures,
               description=description or info.description)
    if not (readme := folder/"README.md").exists(): return
    text, table = readme.read_text(), figures_table(model_info(folder))
    made, found = re.subn(r"(## Figures\n[^|#]*)(\|.*\n)+", lambda m: m[1] + table + "\n", text, count=1)
    if not found: sys.exit(f"{readme} has no table below '## Figures': put one there, or delete the file.")
    write_atomic(readme, made.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/kodak"))
    parser.add_argument("--qualities", type=float, nargs="+", help="for a model with rate levels")
    parser.add_argument("--metrics", nargs="+", help="default: all whose weights are here")
    parser.add_argument("--features", help="for Fréchet and kernel distances: vgg16, or the path of Inception's weights")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--card", type=Path)
    parser.add_argument("--description")
    args = parser.parse_args()
    _keep_pages()
    codec = Codec.from_pretrained(args.model, device=args.device)
    print(codec)
    result = evaluate(args.photos, {"model": codec}, args.out, qualities={"model": args.qualities} if args.qualities else None,
                      metrics=args.metrics, features=args.features, workers=args.workers, device=args.device,
                      progress=lambda done, total, name: print(f"{done} of {total}: {name}", file=sys.stderr))
    result.save()
    ideals, wrong = check(result, codec)
    rows = result.summary()
    for row in rows:
        row["ideal_bpp"] = float(np.mean([v for v, r in zip(ideals, result.records) if r["quality"] == row["quality"]]))
    names = ("bpp", "ideal_bpp", *result.measured(rows))
    means = [{name: round(row[name], 4) for name in names if row[name] is not None} for row in rows]
    for row, mean in zip(rows, means): print(f"quality {row['quality']}: mean of {row['photos']} photos: {mean}")
    if args.card:
        points = [mean if row["quality"] is None else dict(quality=row["quality"], **mean) for row, mean in zip(rows, means)]
        update_card(args.card, codec.fingerprint.hex(), dict(dataset=args.photos.name, photos=rows[0]["photos"]), points,
                    args.description)
    sys.exit(1 if wrong or result.failed else 0)


if __name__ == "__main__":
    main()
