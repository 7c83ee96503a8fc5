"""Evaluation from real files: figures recomputed by hand, runs that are killed and go on, broken photos, BD-rate."""

import csv
import hashlib
import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hific_nb.baselines import BASELINES, get_baseline
from hific_nb.config import HificError
from hific_nb.data import find_images, image_to_tensor, read_image, sample_photo
from hific_nb.evaluation import (DISTS, KODAK_FIGURES, METRICS, EvaluationError, Metric, Records, VGG16Features, bd_rate, evaluate,
                                 find_contenders, find_metrics, parse_qualities, patch_features, rate_difference, register_metric)
from hific_nb.metrics import bpp, frechet_distance, kernel_distance, ms_ssim, patches, psnr
from hific_nb.zoo import figures_table, model_info, save_pretrained

from tiny import tiny_codec, tiny_model

FEW = {"jpeg": [10, 30, 60, 85], "webp": [5, 30, 60, 85]}
STABLE = ("photo", "codec", "quality", "bytes", "bpp", "psnr", "ms_ssim", "files")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "trip").mkdir()
    sample_photo("coffee").crop((180, 100, 372, 276)).save(folder / "cup.png")  # 192 x 176
    sample_photo("chelsea").crop((60, 20, 236, 212)).save(folder / "trip" / "cat.png")
    sample_photo("astronaut").crop((150, 0, 326, 180)).convert("RGBA").save(folder / "trip_cat.png")
    return folder


def stable(result): return [{k: r[k] for k in STABLE} for r in result.records]


def test_records_are_of_real_files(photos, tmp_path):
    tiny = tiny_codec()
    result = evaluate(photos, ["jpeg", "webp", tiny], tmp_path, qualities=FEW, metrics=["psnr", "ms_ssim"], device="cpu")
    assert len(result.records) == 3 * 9 and not result.failed and result.reused == 0
    assert {r["photo"] for r in result.records} == {"cup.png", "trip_cat.png", "trip_cat.png_2"}
    codecs = dict(jpeg=get_baseline("jpeg"), webp=get_baseline("webp"), tiny=tiny)
    sources = {hashlib.sha256(p.read_bytes()).hexdigest(): p for p in find_images(photos)}
    for r in result.records:
        data = (tmp_path / r["file"]).read_bytes()
        original = read_image(sources[r["photo_sha256"]]).convert("RGB")
        decoded = codecs[r["codec"]].decompress(data)
        assert r["bytes"] == len(data) and r["bpp"] == bpp(len(data), *original.size)
        assert r["psnr"] == pytest.approx(psnr(original, decoded)) and r["ms_ssim"] == pytest.approx(ms_ssim(original, decoded))
        assert r["encode_seconds"] > 0 and r["decode_seconds"] > 0 and not r["identical"]
        assert np.array_equal(np.asarray(result.decoded(r)), np.asarray(decoded))
    jpeg = [r for r in result.records if r["codec"] == "jpeg" and r["quality"] == 60]
    row = next(r for r in result.summary() if r["codec"] == "jpeg" and r["quality"] == 60)
    for name in ("bpp", "psnr", "ms_ssim", "bytes"): assert row[name] == pytest.approx(np.mean([r[name] for r in jpeg]))
    assert row["photos"] == 3 and row["encode_seconds"] == np.median([r["encode_seconds"] for r in jpeg])

    report = json.loads(result.save().read_text())
    assert report["summary"] == result.summary() and report["anchor"] == "jpeg" and len(report["records"]) == 27
    assert report["codecs"]["tiny"]["model"] == tiny.fingerprint.hex() and "Pillow" in report["codecs"]["jpeg"]["version"]
    assert report["rate_difference_percent"]["webp"]["psnr"] < 0
    with open(tmp_path / "records.csv", newline="") as file: rows = list(csv.DictReader(file))
    assert [float(r["psnr"]) for r in rows] == [r["psnr"] for r in result.records]
    with open(tmp_path / "summary.csv", newline="") as file: assert len(list(csv.DictReader(file))) == 9
    assert Image.open(tmp_path / "curves.png").width > 300
    assert len(result.markdown().splitlines()) == 2 + 9 + 2


def test_a_second_run_does_nothing_and_threads_change_nothing(photos, tmp_path, monkeypatch):
    arguments = dict(qualities={"jpeg": FEW["jpeg"]}, metrics=["psnr", "ms_ssim"], device="cpu")
    first = evaluate(photos, ["jpeg", tiny_codec()], tmp_path / "a", **arguments)
    threads, seen = torch.get_num_threads(), []
    second = evaluate(photos, ["jpeg", tiny_codec()], tmp_path / "b", **arguments, workers=3,
                      progress=lambda *step: seen.append(step))
    assert stable(first) == stable(second) and torch.get_num_threads() == threads
    assert [s[:2] for s in seen] == [(1, 3), (2, 3), (3, 3)]
    again = evaluate(photos, ["jpeg", tiny_codec()], tmp_path / "a", **arguments)
    assert again.reused == 15 and again.records == first.records
    other = evaluate(photos, ["jpeg", tiny_codec(1)], tmp_path / "a", **{**arguments, "qualities": {"jpeg": [10, 31]}})
    assert other.reused == 3  # another model, another quality: not what was measured
    more = evaluate(photos, ["jpeg"], tmp_path / "a", qualities={"jpeg": [10]}, metrics=["psnr"])
    assert more.reused == 3
    plain = replace(BASELINES["jpeg"], encode=lambda image, quality: BASELINES["jpeg"].encode(image, quality) + b"\0")
    assert evaluate(photos, [plain], tmp_path / "a", qualities={"jpeg": [10]}, metrics=["psnr"]).reused == 0  # a namesake
    monkeypatch.setitem(METRICS, "mean", Metric("mean", "mean", lambda device: lambda a, b: float(np.mean(b))))
    assert evaluate(photos, ["jpeg"], tmp_path / "a", qualities={"jpeg": [10]}, metrics=["psnr", "mean"]).reused == 0


def test_what_was_changed_is_done_again(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for p in find_images(photos)[:2]: (folder / p.name).write_bytes(p.read_bytes())
    def run(): return evaluate(folder, ["jpeg"], tmp_path / "out", qualities={"jpeg": [20, 50]}, metrics=["psnr"])
    first = run()
    assert run().reused == 4
    (tmp_path / "out" / first.records[0]["file"]).unlink()
    (tmp_path / "out" / first.records[1]["file"]).write_bytes(b"other")
    assert run().reused == 2 and stable_psnr(run()) == stable_psnr(first)
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    forged = lines[-1].replace('"psnr": ', '"psnr": 9')
    (tmp_path / "out" / "records.jsonl").write_text("\n".join([*lines[:-1], forged, "{}", "nonsense", lines[0][:50]]))
    assert len(Records(tmp_path / "out").found) in (3, 4) and stable_psnr(run()) == stable_psnr(first)
    sample_photo("rocket").crop((0, 0, 200, 170)).save(folder / "cup.png")  # another photo of the same name
    assert run().reused == 2 and stable_psnr(run()) != stable_psnr(first)


def stable_psnr(result): return [(r["photo"], r["quality"], r["psnr"]) for r in result.records]


SLOW = """
import sys, time
from hific_nb.baselines import BASELINES
from hific_nb.evaluation import evaluate
class Slow:
    name, qualities, extension, version = "slow", (10, 20, 30, 40, 50), ".jpg", "1"
    def compress(self, image, quality):
        if sys.argv[3] == "slow": time.sleep(0.15)
        return BASELINES["jpeg"].compress(image, quality)
    def decompress(self, data): return BASELINES["jpeg"].decompress(data)
result = evaluate(sys.argv[1], [Slow()], sys.argv[2], metrics=["psnr", "ms_ssim"], device="cpu")
result.save()
print(result.reused, len(result.records))
"""


def test_kill_and_continue(photos, tmp_path):
    """kill -9 in the middle, and a second process that continues; the result is that of a run without interruption."""
    records = tmp_path / "out" / "records.jsonl"
    root = str(Path(__file__).resolve().parent.parent)
    run = [sys.executable, "-c", SLOW, str(photos), str(tmp_path / "out")]
    process = subprocess.Popen([*run, "slow"], cwd=root)
    try:
        end = time.monotonic() + 120
        while not (records.exists() and len(records.read_bytes().splitlines()) >= 6):
            assert process.poll() is None and time.monotonic() < end, "it ended, or never got so far"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = len([line for line in records.read_text().splitlines() if line.endswith("}")])
    assert 6 <= finished < 15 and not (tmp_path / "out" / "metrics.json").exists()
    with open(records, "a") as file: file.write('{"photo": "cup.png", "codec": "slow", "qua')  # what a kill may leave
    done = subprocess.run([*run, "fast"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(finished), "15"]

    class Slow:
        name, qualities, extension, version = "slow", (10, 20, 30, 40, 50), ".jpg", "1"
        compress, decompress = BASELINES["jpeg"].compress, BASELINES["jpeg"].decompress

    fresh = evaluate(photos, [Slow()], tmp_path / "fresh", metrics=["psnr", "ms_ssim"], device="cpu")
    continued = json.loads((tmp_path / "out" / "metrics.json").read_text())["records"]
    assert stable(fresh) == [{k: r[k] for k in STABLE} for r in continued]
    assert not [p for p in (tmp_path / "out").rglob("*.tmp") if p.stat().st_mtime > records.stat().st_mtime]


class Moody:
    "Fails on wide pictures, and returns the wrong size at quality 2."
    name, qualities, extension = "moody", (1, 2), ".jpg"

    def compress(self, image, quality):
        if image.width > 180: raise RuntimeError("out of luck")
        return BASELINES["jpeg"].compress(image if quality == 1 else image.resize((8, 8)), 50)

    def decompress(self, data): return BASELINES["jpeg"].decompress(data)


def test_bad_photos_and_codecs_stop_nothing(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for p in find_images(photos): (folder / p.name).write_bytes(p.read_bytes())
    (folder / "a_broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "text.jpg").write_text("no photo")
    (folder / "half.png").write_bytes((folder / "cup.png").read_bytes()[:9000])
    for workers in (1, 2):
        result = evaluate(folder, ["jpeg", Moody()], tmp_path / f"out{workers}", qualities={"jpeg": [10, 50]}, metrics=["psnr"],
                          workers=workers)
        unread = {f["photo"] for f in result.failed if f["codec"] is None}
        assert unread == {"a_broken.png", "text.jpg", "half.png"}
        wrong = [(f["photo"], f["quality"]) for f in result.failed if f["codec"] == "moody"]
        assert wrong == [("cat.png", 2), ("cup.png", 1), ("cup.png", 2), ("trip_cat.png", 2)]
        assert "out of luck" in next(f["error"] for f in result.failed if f["photo"] == "cup.png")
        assert len(result.records) == 3 * 2 + 2
        # quality 2 never worked and is left out; the others count on the two photos that all of them finished
        rows = [(r["codec"], r["quality"], r["photos"]) for r in result.summary()]
        assert rows == [("jpeg", 10, 2), ("jpeg", 50, 2), ("moody", 1, 2)]
        assert json.loads(result.save().read_text())["failed"] == result.failed
    nothing = evaluate([folder / "text.jpg"], ["jpeg"], tmp_path / "none", metrics=["psnr"])
    assert nothing.records == [] and nothing.summary() == [] and nothing.save().is_file() and "codec" in nothing.markdown()


def test_what_is_refused(photos, tmp_path):
    for wrong in (dict(workers=0), dict(metrics=["vmaf"]), dict(qualities={"jpeg": [0]}), dict(qualities={"webp": [1]}),
                  dict(qualities={"jpeg": []}), dict(features=tmp_path / "nowhere.pth")):
        with pytest.raises(HificError) as caught: evaluate(photos, ["jpeg"], tmp_path / "out", **{"metrics": ["psnr"], **wrong})
        assert "\n" not in str(caught.value)
    for codecs in ([], ["jpg"], ["jpeg", "jpeg"], [object()]):
        with pytest.raises(HificError): evaluate(photos, codecs, tmp_path / "out")
    with pytest.raises(HificError): evaluate(tmp_path / "nowhere", ["jpeg"], tmp_path / "out")
    with pytest.raises(EvaluationError, match="one rate"): find_contenders([tiny_codec()], {"tiny": [50]})
    both = find_contenders({"a": tiny_codec(), "b": tiny_codec(1)})
    assert [c.label for c in both] == ["a", "b"] and both[0].identity != both[1].identity


def test_pictures_too_small_and_copies(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    sample_photo("coffee").crop((200, 100, 400, 300)).save(folder / "large.png")
    Image.new("RGB", (20, 20), "red").save(folder / "small.png")

    class Copy:
        name, extension = "copy", ".png"
        def compress(self, image): return image.tobytes() + image.width.to_bytes(2, "big")
        def decompress(self, data):
            width = int.from_bytes(data[-2:], "big")
            return Image.frombytes("RGB", (width, (len(data) - 2) // 3 // width), data[:-2])

    result = evaluate(folder, ["jpeg", Copy()], tmp_path / "out", qualities={"jpeg": [50]}, metrics=["psnr", "ms_ssim"])
    jpeg, copy = result.summary()
    assert copy["psnr"] is None and copy["ms_ssim"] == pytest.approx(1)  # infinite; of the large one alone
    large = next(r for r in result.records if r["photo"] == "large.png" and r["codec"] == "jpeg")
    assert jpeg["ms_ssim"] == large["ms_ssim"] and jpeg["psnr"] is not None and jpeg["photos"] == 2
    json.loads(result.save().read_text())


def test_a_rate_is_that_of_the_photos_that_a_value_is_of(photos, tmp_path):
    """MS-SSIM of two large photos, with small ones beside them and without: the same curve, the same BD-rate."""
    few, many = tmp_path / "few", tmp_path / "many"
    for folder in (few, many):
        folder.mkdir()
        for p in find_images(photos)[:2]: (folder / p.name).write_bytes(p.read_bytes())
    for k in range(3): sample_photo("coffee").crop((50 * k, 0, 50 * k + 64, 64)).save(many / f"small{k}.png")
    few, many = (evaluate(folder, ["jpeg", "webp"], tmp_path / f"{folder.name}-out", qualities=FEW, metrics=["psnr", "ms_ssim"])
                 for folder in (few, many))
    assert many.compare()["webp"]["ms_ssim"] == few.compare()["webp"]["ms_ssim"]
    assert many.compare()["webp"]["psnr"] != few.compare()["webp"]["psnr"]
    for row, alone in zip(many.summary(), few.summary()):
        assert (row["photos"], row["ms_ssim_photos"], row["ms_ssim_bpp"]) == (5, 2, alone["bpp"]) and row["bpp"] != alone["bpp"]
    assert "Means over 5 photos (MS-SSIM over the 2 large enough)" in many.markdown() and "large enough" not in few.markdown()
    assert many.plot(["ms_ssim"], published=False).axes[0].lines[0].get_xdata()[0] == few.summary()[0]["bpp"]


@pytest.mark.parametrize("place", ["inside", "the folder itself"])
def test_results_are_no_photos(photos, tmp_path, place):
    folder = tmp_path / "photos"
    folder.mkdir()
    for p in find_images(photos)[:2]: (folder / p.name).write_bytes(p.read_bytes())
    out = folder / "outputs" / "mine" if place == "inside" else folder
    def run(out): return evaluate(folder, ["jpeg"], out, qualities={"jpeg": [20, 50]}, metrics=["psnr"])
    for again in range(2):
        result = run(out)
        assert result.settings["photos"] == 2 and len(result.records) == 4 and result.reused == again * 4
        result.save()
    assert (out / "curves.png").exists() and run(tmp_path / "elsewhere").settings["photos"] == 2
    assert evaluate(tmp_path, ["jpeg"], tmp_path / "above", qualities={"jpeg": [20]}, metrics=["psnr"]).settings["photos"] == 2
    if place == "inside":
        other = run(folder / "outputs" / "other")
        assert other.settings["photos"] == 2 and other.settings["results_left_out"] == 5  # four files and the curves
        with pytest.raises(EvaluationError, match="results of evaluations"):
            evaluate(folder / "outputs", ["jpeg"], tmp_path / "nothing", metrics=["psnr"])
        taken_at_its_word = evaluate(out / "curves.png", ["jpeg"], tmp_path / "one", metrics=["psnr"], qualities={"jpeg": [50]})
        assert len(taken_at_its_word.records) == 1


def test_a_codec_is_believed_for_what_it_makes_not_for_its_name(photos, tmp_path):
    class Mine:
        name, extension = "mine", ".png"
        def __init__(self, colours): self.colours = colours
        def compress(self, image):
            file = io.BytesIO()
            image.quantize(self.colours).save(file, "PNG")
            return file.getvalue()
        def decompress(self, data): return Image.open(io.BytesIO(data)).convert("RGB")

    def run(colours, folder="out"): return evaluate(photos, [Mine(colours)], tmp_path / folder, metrics=["psnr"])
    class Dated(Mine):
        def compress(self, image): return super().compress(image) + str(time.perf_counter_ns()).encode()

    first, second = run(4), run(64)
    assert [evaluate(photos, [Dated(4)], tmp_path / "dated", metrics=["psnr"]).reused for _ in range(2)] == [0, 3]
    assert second.reused == 0 and stable_psnr(second) == stable_psnr(run(64, "afresh")) != stable_psnr(first)
    assert run(64).reused == 3


def test_qualities_are_numbers_of_any_kind_and_count_once(photos, tmp_path):
    asked = {"hific-lite": ["low", 22, np.int64(50)], "jpeg": [10.0, np.int64(20), 20]}
    named, jpeg = find_contenders(["hific-lite", "jpeg"], asked)
    assert named.qualities == (22, 50) and jpeg.qualities == (10, 20) and all(type(q) is int for q in jpeg.qualities)
    result = evaluate(find_images(photos)[:1], [tiny_codec(levels=True), "jpeg"], tmp_path, metrics=[],
                      qualities={"tiny": np.arange(0, 40, 20), "jpeg": np.array([10, 20])})
    assert not result.failed and len(result.records) == 4 and result.save().is_file()
    assert {line.count("|") for line in result.markdown().splitlines()[:6]} == {6}  # no metric: five cells in every row
    class Levels:
        name, extension, qualities = "levels", ".png", np.array([1, 2])
        def compress(self, image, quality): return get_baseline("jpeg").compress(image, quality)
        def decompress(self, data): return get_baseline("jpeg").decompress(data)

    own = evaluate(find_images(photos)[:1], [Levels()], tmp_path / "own", metrics=["psnr"])
    assert not own.failed and own.save().is_file()
    with pytest.raises(EvaluationError, match="no quality True"): find_contenders(["jpeg"], {"jpeg": [True]})
    with pytest.raises(EvaluationError, match="given twice"): parse_qualities("jpeg=10; jpeg=20")


def test_a_photo_deep_in_folders(photos, tmp_path):
    deep = tmp_path / "photos" / ("a" * 150) / ("ä" * 80)
    deep.mkdir(parents=True)
    for name in ("b.png", "c.png"): (deep / name).write_bytes(find_images(photos)[0].read_bytes())
    result = evaluate(tmp_path / "photos", ["jpeg"], tmp_path / "out", qualities={"jpeg": [20]}, metrics=["psnr"])
    assert not result.failed and len({r["photo"] for r in result.records}) == 2


def test_models_and_qualities_go_by_the_names_that_they_have_elsewhere(photos, tmp_path):
    named, = find_contenders(["hific-lite"], parse_qualities("hific-lite=low, 56.5,high"))
    assert named.qualities == (22, 56.5, 64) and named.label != "hific-lite" == named.spec
    with pytest.raises(HificError, match="0 ... 100"): find_contenders(["hific-lite"], {"hific-lite": [150]})
    with pytest.raises(HificError, match="one of low, med, high"): find_contenders(["hific-lite"], {"hific-lite": ["best"]})
    result = evaluate(find_images(photos)[:1], ["hific-lite", "jpeg"], tmp_path / "out", metrics=["psnr"], anchor="hific-lite",
                      qualities={"hific-lite": ["low"], "jpeg": [10]})
    assert result.anchor == named.label and not result.failed


def test_a_model_with_levels_gives_a_curve(photos, tmp_path):
    codec, photo = tiny_codec(levels=True), find_images(photos)[0]
    assert len(find_contenders([codec])[0].qualities) == 9
    result = evaluate(photo, [codec], tmp_path, qualities={"tiny": [0, 50, 100]}, metrics=["psnr"], device="cpu")
    assert [r["bytes"] for r in result.records] == [len(codec.compress(photo, quality=q)) for q in (0, 50, 100)]
    assert len({r["bytes"] for r in result.records}) == 3 and [r["quality"] for r in result.summary()] == [0, 50, 100]
    assert evaluate(photo, [codec], tmp_path, qualities={"tiny": [50, 75]}, metrics=["psnr"], device="cpu").reused == 1
    assert evaluate(photo, {"tiny": tiny_codec(1, levels=True)}, tmp_path, qualities={"tiny": [50]}, metrics=["psnr"]).reused == 0


def test_set_distances_from_files(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    sample_photo("astronaut").save(folder / "a.png")
    sample_photo("coffee").save(folder / "b.png")

    class Means:
        name, channels = "means", 12

        def __call__(self, x): return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) / 255  # (n, 12)

    result = evaluate(folder, ["jpeg"], tmp_path / "out", qualities={"jpeg": [2, 90]}, metrics=["psnr"], features=Means())
    bad, good = result.summary()
    originals = torch.cat([Means()(patches(read_image(p))) for p in find_images(folder)])
    assert bad["patches"] == len(originals) == 5 + 2
    jpeg = get_baseline("jpeg")
    pressed = torch.cat([Means()(patches(jpeg.decompress(jpeg.compress(p, 2)))) for p in find_images(folder)])
    assert bad["fid_means"] == pytest.approx(frechet_distance(originals, pressed), rel=1e-6, abs=1e-12)
    assert bad["kid_means"] == pytest.approx(kernel_distance(originals, pressed), rel=1e-6, abs=1e-12)
    assert bad["fid_means"] > good["fid_means"] >= 0
    again = dict(qualities={"jpeg": [2, 90]}, metrics=["psnr"])
    assert evaluate(folder, ["jpeg"], tmp_path / "out", **again, features=Means()).reused == 4
    assert evaluate(folder, ["jpeg"], tmp_path / "out", **again).reused == 4
    next((tmp_path / "out").rglob("original.means.npy")).write_bytes(b"")  # the first record that is done again restores it
    assert evaluate(folder, ["jpeg"], tmp_path / "out", **again, features=Means()).reused == 3


# ---------------------------------------------------------------------------------------------------- BD-rate

A = ([686.76, 309.58, 157.11, 85.95], [40.28, 37.18, 34.24, 31.42])
B = ([893.34, 407.8, 204.93, 112.75], [40.39, 37.21, 34.17, 31.24])
C = ([0.124, 0.198, 0.307, 0.461], [27.70, 29.36, 31.13, 32.95])
D = ([0.1826, 0.30, 0.3511, 0.5377], [27.56, 29.1, 29.65, 31.74])


@pytest.mark.parametrize("anchor, test, method, percent", [
    (A, B, "cubic", 31.3973740549095), (A, B, "pchip", 31.379878202397627), (B, A, "cubic", -23.894978328706085),
    (C, D, "cubic", 60.721947253965446), (C, D, "pchip", 60.20292158240319)])
def test_bd_rate_against_another_implementation(anchor, test, method, percent):
    """The figures are those of the package bjontegaard 1.3.0."""
    assert bd_rate(*anchor, *test, method) == pytest.approx(percent, abs=1e-8)
    assert bd_rate(anchor[0][::-1], anchor[1][::-1], *test, method) == pytest.approx(percent, abs=1e-8)


def test_a_curve_has_as_many_values_as_rates():
    with pytest.raises(EvaluationError, match="not 0"): rate_difference([1, 2], [30, 31], 0, 30.5)
    with pytest.raises(EvaluationError, match="not 2 for 3"): bd_rate([1, 2, 3], [30, 31], [1, 2], [30, 31])


def test_bd_rate_of_known_curves():
    value = np.linspace(25, 40, 7)
    rate = np.exp(0.2 * value)
    for factor in (0.3, 0.9, 1.0, 1.7):
        for method in ("pchip", "cubic"):
            assert bd_rate(rate, value, factor * rate, value, method) == pytest.approx(100 * (factor - 1), abs=1e-6)
            shifted = bd_rate(rate, value, rate[1:], value[1:] - 2, method)  # 2 dB worse at every rate
            assert shifted == pytest.approx(100 * (np.exp(0.4) - 1), abs=1e-6)
    assert bd_rate(rate, value, rate, value + 100) is None and bd_rate(rate[:1], value[:1], rate, value) is None
    assert bd_rate(rate[:3], value[:3], rate, value, "cubic") is None and bd_rate(rate[:3], value[:3], rate, value) == 0
    folded = np.append(rate, rate[-1] * 1.1), np.append(value, value[-1] - 3)  # more bits, worse: not part of the curve
    assert bd_rate(rate, value, *folded) == pytest.approx(0, abs=1e-12)
    for wrong in (([0, 1], [1, 2]), ([1, 2], [1, np.nan])):
        with pytest.raises(EvaluationError): bd_rate(*wrong, rate, value)
    with pytest.raises(EvaluationError, match="pchip"): bd_rate(rate, value, rate, value, "akima")
    assert rate_difference(rate, value, rate[3] * 0.7, value[3]) == pytest.approx(-30)
    assert rate_difference(rate, value, 1.0, 41) is None and rate_difference(rate[:1], value[:1], 1.0, 25) is None


def test_published_figures():
    assert KODAK_FIGURES["HiFiC (official)"]["lpips_alex"] == (0.0686, 0.0428, 0.0278)
    for figures in KODAK_FIGURES.values(): assert len({len(v) for v in figures.values()}) == 1


# ---------------------------------------------------------------------------------------------------- metrics with weights


@pytest.fixture
def weights(shared, monkeypatch):
    if not (shared / "weights" / "vgg_features_fp16.pth").is_file(): pytest.skip(f"no ImageNet weights in {shared}/weights")
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(shared / "weights"))
    return shared / "weights"


def test_dists_against_the_authors_code(shared, weights):
    """The figures are those of the package DISTS_pytorch 0.1 with the same VGG16."""
    measure = METRICS["dists"].make("cpu")
    pictures = {p.stem: read_image(p) for p in (shared / "golden" / "lpips").glob("*.png")}
    for name, want in (("ex_p0", 0.38791817), ("ex_p1", 0.22503453)):
        assert measure(pictures["ex_ref"], pictures[name]) == pytest.approx(want, abs=2e-4)
    assert measure(pictures["ex_p0"], pictures["ex_p0"]) == pytest.approx(0, abs=1e-5)
    kodak = read_image(shared / "data" / "kodak" / "kodim04.png").crop((0, 0, 300, 200))
    x = image_to_tensor(kodak)[None] / 255
    assert float(DISTS()(x, x.flip(-1))) == pytest.approx(0.20107049, abs=2e-4)


def test_metrics_by_name(shared, weights, monkeypatch, tmp_path):
    found, left_out = find_metrics()
    assert [m.name for m in found] == ["psnr", "ms_ssim", "lpips_alex", "lpips_vgg", "dists"] and not left_out
    pictures = {p.stem: read_image(p) for p in (shared / "golden" / "lpips").glob("*.png")}
    for name, p0 in (("lpips_alex", 0.7219), ("lpips_vgg", 0.5686)):
        assert METRICS[name].make("cpu")(pictures["ex_ref"], pictures["ex_p0"]) == pytest.approx(p0, abs=2e-3)
    assert METRICS["lpips_alex"].make("cpu")(*[Image.new("RGB", (9, 9))] * 2) is None
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found, left_out = find_metrics()
    assert [m.name for m in found] == ["psnr", "ms_ssim"] and set(left_out) == {"lpips_alex", "lpips_vgg", "dists"}
    assert all("HIFIC_LPIPS_WEIGHTS" in why for why in left_out.values())


def test_registering_a_metric(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("hific_nb.evaluation.METRICS", dict(METRICS))
    register_metric(Metric("worst", "largest error", lambda device: lambda a, b: float(
        np.abs(np.asarray(a, int) - np.asarray(b, int)).max()), higher_is_better=False))
    result = evaluate(photos, ["jpeg"], tmp_path, qualities={"jpeg": [10, 90]}, metrics=["worst"])
    low, high = result.summary()
    assert low["worst"] > high["worst"] > 0 and "largest error" in result.markdown()


def test_on_kodak(shared, weights, tmp_path):
    """Two photos by hand, LPIPS and all, from the files that were written."""
    chosen = [shared / "data" / "kodak" / f"kodim{n}.png" for n in ("04", "23")]
    result = evaluate(chosen, ["jpeg", "avif"], tmp_path, qualities={"jpeg": [10, 30], "avif": [25, 40]},
                      metrics=["psnr", "lpips_alex"], device="cpu")
    assert len(result.records) == 8 and not result.failed
    for r in result.records:
        opened = Image.open(tmp_path / r["file"])
        assert opened.format == {"jpeg": "JPEG", "avif": "AVIF"}[r["codec"]]
        assert r["bpp"] == (tmp_path / r["file"]).stat().st_size * 8 / (768 * 512)
        original = np.asarray(read_image(shared / "data" / "kodak" / r["photo"]), float)
        assert r["psnr"] == pytest.approx(10 * np.log10(255**2 / ((original - np.asarray(opened, float)) ** 2).mean()), abs=1e-9)
    rows = {(r["codec"], r["quality"]): r for r in result.summary()}
    assert rows["avif", 40]["lpips_alex"] < rows["jpeg", 10]["lpips_alex"] and rows["avif", 40]["bpp"] < rows["jpeg", 30]["bpp"]
    assert result.compare("jpeg")["avif"]["psnr"] < -30  # AVIF needs far fewer bits


def test_vgg16_features(weights, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee"): sample_photo(name).crop((150, 50, 406, 306)).save(folder / f"{name}.png")
    result = evaluate(folder, ["jpeg"], tmp_path / "out", qualities={"jpeg": [5]}, metrics=["psnr"], features="vgg16", device="cpu")
    (row,), extract = result.summary(), VGG16Features()
    assert row["patches"] == 2 and row["fid_vgg16"] > 0 and "kid_vgg16" in row and "fid" not in row
    assert "in features of vgg16" in result.markdown() and "(VGG16)" in result.markdown()
    stored = np.load(tmp_path / "out" / result.records[1]["features"])
    assert stored.shape == (1, 512) and stored.dtype == np.float32 and stored.min() >= 0
    assert np.allclose(stored, patch_features(extract, result.decoded(result.records[1])), atol=1e-4)


# ---------------------------------------------------------------------------------------------------- the job

JOB = Path(__file__).resolve().parent.parent / "nbs" / "jobs" / "evaluate.ipynb"


def run_job(run, parameters, cwd):
    run.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "papermill", JOB, run / "evaluate.ipynb", "-k", "python3", "--no-progress-bar"]
    for key, value in {**parameters, "run": run}.items(): command += ["-p", key, str(value)]
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    return done, json.loads((run / "evaluate.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_job(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for p in find_images(photos)[:2]: (folder / p.name).write_bytes(p.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run = tmp_path / "run"
    model = save_pretrained(tiny_model(), tmp_path / "one-rate")
    settings = dict(input=folder, models=model, baselines="jpeg, webp", qualities="jpeg=5,15,40,80; webp=10,70",
                    metrics="psnr, ms_ssim", workers=2)
    done, cells = run_job(run, settings, tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "metrics.json").read_text())
    assert len(report["records"]) == 2 * 7 and [f["photo"] for f in report["failed"]] == ["broken.png"]
    for r in report["records"]: assert r["bytes"] == (run / r["file"]).stat().st_size
    assert {"records.csv", "summary.csv", "curves.png", "records.jsonl", "files"} <= {p.name for p in run.iterdir()}
    outputs = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    text = "\n".join("".join(data.get("text/markdown", "")) for data in outputs)
    assert "| one-rate | - |" in text and "broken.png" in text and "bits against jpeg" in text
    assert sum("image/png" in data for data in outputs) >= 3  # curves, the comparison, and the slider's still
    assert "application/vnd.jupyter.widget-view+json" in cells[-1]["outputs"][-1]["data"]


def test_the_job_refuses_before_it_works(photos, tmp_path):
    done, _ = run_job(tmp_path / "run", dict(input=photos, models="", baselines="jpeg", metrics="psnr", anchor="avif"), tmp_path)
    assert done.returncode != 0 and "anchor" in done.stderr and not (tmp_path / "run" / "records.jsonl").exists()


def test_the_benchmark_adds_to_a_models_card(tmp_path, monkeypatch):
    """Qualities and metrics may be measured one after the other; the table in README.md follows. Other weights begin afresh."""
    spec = importlib.util.spec_from_file_location("kodak", Path(__file__).parent.parent / "benchmarks" / "kodak.py")
    kodak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kodak)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea", "coffee"): sample_photo(name).crop((0, 0, 170, 180)).save(photos / f"{name}.png")
    others = dict(dataset="others", bpp=9.0)
    folder = save_pretrained(tiny_model(levels=True), tmp_path / "tiny", description="t", figures=others, objective=dict(k_P=2.0))

    def measure(*arguments):
        monkeypatch.setattr(sys, "argv", ["kodak.py", "--model", str(folder), "--photos", str(photos), "--card", str(folder),
                                          "--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as end: kodak.main()
        assert end.value.code == 0
        return model_info(folder)

    first = measure("--qualities", "50", "0", "--metrics", "psnr")
    assert first.figures.keys() == {"dataset", "photos", "bpp", "ideal_bpp", "psnr", "levels"}
    assert (first.figures["dataset"], first.figures["photos"]) == ("photos", 2)
    both = measure("--qualities", "50", "100", "--metrics", "ms_ssim")
    points = {point["quality"]: point for point in both.figures["levels"]}
    assert list(points) == [0, 50, 100] and points[50] == {**first.points[1], "ms_ssim": points[50]["ms_ssim"]}
    assert points[0] == first.points[0] and "psnr" not in points[100]
    assert both.figures["bpp"] == points[50]["bpp"]
    assert (both.description, both.objective) == ("t", dict(k_P=2.0))
    table, text = figures_table(both), (folder / "README.md").read_text()
    assert table in text and "| 50 (med) |" in table and text.count("| quality |") == 1 and "## Training" in text
    kodak.update_card(folder, "00" * 8, dict(dataset="photos", photos=2), [dict(bpp=0.5)])
    assert model_info(folder).figures == dict(dataset="photos", photos=2, bpp=0.5)
