"""What some steps of refinement (room 12) gain over plain files of the same model, on a folder of photos, from real files.

    python benchmarks/refinement.py --photos ../shared/data/kodak [--model hific-lite] [--steps 40] [--qualities 19 45 68]

LPIPS by AlexNet and by SqueezeNet are descended, with some MSE; LPIPS by VGG16 and MS-SSIM are not, and say what is more than
flattery. By `hific_nb.evaluation`, so it may be killed and started again. Prints a table, and writes it with --results.
"""

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch

from hific_nb.evaluation import evaluate

METRICS = ["lpips_alex", "lpips_vgg", "psnr", "ms_ssim"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="hific-lite")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--qualities", type=float, nargs="+", default=[19.0, 45.0, 68.0])
    parser.add_argument("--out", type=Path, default=Path("outputs/refinement"))
    parser.add_argument("--device")
    parser.add_argument("--results", type=Path, help="a .json file")
    args = parser.parse_args()
    names = {"plain": args.model, "refined": f"{args.model}+refine{args.steps}"}
    result = evaluate(args.photos, names, args.out, qualities=dict.fromkeys(names, args.qualities), metrics=METRICS,
                      device=args.device, progress=lambda done, total, name: print(f"{done} of {total}: {name}", file=sys.stderr))
    if result.failed: sys.exit(f"{len(result.failed)} photos failed.")
    rows = [{key: row[key] for key in ("codec", "quality", "bytes", "bpp", *METRICS, "encode_seconds")} for row in result.summary()]
    for row in rows:
        print("  ".join(f"{key} {value:.4f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    if args.results:
        about = dict(model=args.model, steps=args.steps, photos=result.summary()[0]["photos"], torch=torch.__version__,
                     processor=platform.processor() or platform.machine(), instructions=torch.backends.cpu.get_cpu_capability(),
                     threads=torch.get_num_threads(), date=str(date.today()))
        args.results.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__": main()
