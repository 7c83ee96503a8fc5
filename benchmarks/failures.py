"""What a model does badly, in pictures: printed text, a small face, a drawn screen; the original and two rates side by side.

    python benchmarks/failures.py --model hific-lite-base --out hific_nb/models/hific-lite-base-v1/failures.jpg

The photos are those of scikit-image; the screen is drawn here. Whole pictures are coded, and a detail of each is shown.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hific_nb.codec import Codec
from hific_nb.data import read_image, sample_photo, sample_photo_path


def drawn_screen():
    "A window with a menu, thin lines, flat colours and small type."
    screen = Image.new("RGB", (640, 400), (236, 238, 242))
    pen = ImageDraw.Draw(screen)
    pen.rectangle((0, 0, 640, 26), (52, 61, 85))
    for i, word in enumerate(("File", "Edit", "View", "Run", "Help")):
        pen.text((12 + 56 * i, 6), word, (245, 245, 245), ImageFont.load_default(13))
    pen.rectangle((16, 40, 330, 384), (255, 255, 255), (170, 175, 185))
    words = "for step in range(n_steps): loss = rate + lambda_ * distortion(x, x_hat); loss.backward()".split()
    colours = ((163, 21, 21), (0, 0, 160), (20, 110, 40), (40, 40, 40))
    for row in range(19):
        x = 26 + 14 * (row % 4)
        for k in range(4):
            word = words[(3 * row + k) % len(words)]
            pen.text((x, 48 + 17 * row), word, colours[(row + k) % 4], ImageFont.load_default(12))
            x += 8 + int(pen.textlength(word, ImageFont.load_default(12)))
    pen.rectangle((346, 40, 624, 384), (255, 255, 255), (170, 175, 185))
    for k in range(9): pen.line((360, 60 + 36 * k, 610, 60 + 36 * k), (205, 210, 220))
    heights = (40, 90, 70, 130, 160, 120, 210, 190, 250)
    for k, height in enumerate(heights):
        pen.rectangle((366 + 27 * k, 348 - height, 384 + 27 * k, 348), ((66, 118, 196), (222, 132, 60))[k % 2])
    return screen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hific-lite-base")
    parser.add_argument("--rates", nargs="+", default=["low", "med"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    codec = Codec.from_pretrained(args.model)
    page = read_image(sample_photo_path("retina").parent/"page.png").convert("RGB")
    pictures = {"printed text": (page, (110, 60)), "a face": (sample_photo("astronaut").resize((256, 256)), (45, 15)),
                "a screen": (drawn_screen(), (20, 36))}
    side, head, font = 168, 22, ImageFont.load_default(13)
    sheet = Image.new("RGB", ((1 + len(args.rates)) * (2 * side + 8), len(pictures) * (side + head + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, (picture, (x, y))) in enumerate(pictures.items()):
        versions = [(f"{name}: the original", picture)]
        for rate in args.rates:
            data = codec.compress(picture, quality=rate)
            rate_text = f"{8 * len(data) / picture.width / picture.height:.2f} bits per pixel"
            versions.append((f"{rate}, {rate_text}", codec.decompress(data)))
        for column, (text, shown) in enumerate(versions):
            at = column * (2 * side + 8), row * (side + head + 8)
            pen.text((at[0] + 2, at[1] + 3), text, "black", font)
            detail = shown.crop((x, y, x + side, y + side // 2)).resize((2 * side, side), Image.Resampling.NEAREST)
            sheet.paste(detail, (at[0], at[1] + head))
    sheet.save(args.out, quality=88, optimize=True)


if __name__ == "__main__":
    main()
