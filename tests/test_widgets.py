"""The comparison slider: what its output holds, and what it does in a real browser."""

import base64
import gc
import io
import json
import re
import sys
import threading
import time
import weakref
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from browser import chromium, collect_errors, jupyterlab, needs_browser, wait_for_kernel
from PIL import Image

from hific_nb.baselines import get_baseline
from hific_nb.codec import Codec
from hific_nb.data import ImageError, image_to_tensor, sample_photo, tensor_to_image
from hific_nb.metrics import ms_ssim, psnr
from hific_nb.model import load_model
from hific_nb.widgets import (GeneratorPair, NewestOnly, PictureFiles, WidgetError, bitrate_explorer, compare, comparison_picture,
                              download_buttons, gan_explorer, inside_explorer, rate_curve, split_view, step_slider,
                              trust_notebook, upload_button, worst_window)

GOLDEN = Path(__file__).resolve().parent / "golden"



@pytest.fixture(scope="module")
def photos():
    a = sample_photo("coffee").resize((15, 10)).resize((300, 200))  # smooth: a pixel's neighbours look like it
    return a, tensor_to_image(255 - image_to_tensor(a))


# ------------------------------------------------------------------------------------------------ without a browser

def test_output_for_every_reader(photos):
    widget = compare(*photos, labels=("before", "after"))
    data, _ = widget._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    still = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    assert still.getpixel((10, 22 + 30)) == photos[0].getpixel((10, 30))
    assert still.getpixel((306 + 10, 22 + 30)) == photos[1].getpixel((10, 30))
    assert "before" in data["text/plain"] and "after" in data["text/plain"]
    assert json.loads(json.dumps(data)) == data
    assert "http" not in widget._esm and "import " not in widget._esm  # nothing is fetched
    for got, want in ((widget.first, photos[0]), (widget.second, photos[1])):
        assert np.array_equal(Image.open(io.BytesIO(got)), want)


def test_position_stays_in_the_picture(photos):
    widget = compare(*photos)
    moves = []
    widget.observe(lambda change: moves.append(change["new"]), "position")
    widget.position = 0.75
    for wrong in (-0.1, 1.1, "left"):
        with pytest.raises(Exception, match="position"): widget.position = wrong
    assert moves == [0.75] and widget.position == 0.75


def test_sources_and_sizes(tmp_path, photos):
    path = tmp_path / "a.png"
    photos[0].save(path)
    widget = compare(path, path.read_bytes(), width=120)
    assert widget.first == widget.second and widget.width == 120
    big = compare(Image.new("RGB", (2400, 600)), Image.new("RGB", (2400, 600)))
    assert Image.open(io.BytesIO(big.first)).size == (1200, 300) and len(big.still) < 20_000
    glass = photos[0].copy()
    glass.putalpha(0)
    assert Image.open(io.BytesIO(compare(glass, photos[0]).first)).getpixel((9, 9)) == (255, 255, 255)
    for call in (compare, comparison_picture):
        with pytest.raises(WidgetError, match="300 x 200 and 10 x 10"): call(photos[0], photos[1].resize((10, 10)))
    for wrong in (dict(labels=("a", "b", "c")), dict(width=0)):
        with pytest.raises(WidgetError): compare(*photos, **wrong)


def test_without_anywidget(photos, monkeypatch):
    from hific_nb import widgets

    widgets._compare_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(WidgetError, match=r"pip install 'hific_nb\[notebooks\]'"): compare(*photos)
    assert comparison_picture(*photos).width > 0  # the still picture needs nothing
    monkeypatch.undo()
    widgets._compare_class.cache_clear()
    compare(*photos)


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (900, 2), (150, 40), (481, 321), (1500, 1000)])
def test_comparison_picture_of_any_size(size):
    rng = np.random.default_rng(0)
    a = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    b = a.copy()
    b.putpixel((size[0] - 1, size[1] - 1), (0, 0, 0))
    page = comparison_picture(a, b, ("x" * 500, ""))
    assert page.mode == "RGB" and page.width <= 2 * 480 + 6
    plain = comparison_picture(a, b, detail=False)
    assert page.height >= plain.height and plain.height <= 480 + 22
    if size == (1500, 1000):  # the marked corner is in the detail, three times as large
        assert page.getpixel((2 * 480 + 5, page.height - 1)) == (0, 0, 0)
        assert page.height == 22 + 320 + 6 + 3 * 96


def test_worst_window_against_the_definition():
    rng = np.random.default_rng(1)
    a, b = (Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)) for _ in range(2))
    error = ((np.asarray(a, float) - np.asarray(b, float)) ** 2).sum(-1)
    for width, height in ((1, 1), (4, 3), (17, 2), (17, 13), (99, 99)):
        left, top, right, bottom = worst_window(a, b, width, height)
        w, h = min(width, 17), min(height, 13)
        assert (right - left, bottom - top) == (w, h)
        sums = {(i, j): error[i:i + h, j:j + w].sum() for i in range(14 - h) for j in range(18 - w)}
        assert sums[top, left] == max(sums.values())


# ------------------------------------------------------------------------------------------------ the explorer's parts

@pytest.fixture(scope="module")
def leveled():
    return Codec(load_model(GOLDEN / "levels"), name="levels", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def cup():
    return sample_photo("coffee").resize((180, 164))


def test_split_view(photos):
    view = split_view(*photos, labels=("before", "after"))
    assert view.size == [300, 200] and view.labels == ["before", "after", ""] and view.third == b""
    assert np.array_equal(Image.open(io.BytesIO(view.second)), photos[1])
    data, _ = view._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))).width == 606
    for name, wrong in (("zoom", 150), ("left", 3), ("alone", -2), ("position", 1.5)):
        with pytest.raises(Exception, match=name): setattr(view, name, wrong)
    for wrong in (photos[:1], [photos[0]] * 4, (photos[0], photos[1].resize((10, 10)))):
        with pytest.raises(WidgetError): split_view(*wrong)
    for script in (view._esm, upload_button()._esm, download_buttons(None, [])._esm):
        assert "http" not in script and "import " not in script  # nothing is fetched


def test_upload_in_pieces():
    button, got = upload_button(max_bytes=10), []
    button.observe(lambda change: got.append(change["new"]), "file")
    def send(id, size, *parts):
        for part in parts: button._receive(button, dict(id=id, name=f"{id}.png", size=size), [memoryview(part)])

    send("a", 6, b"abc")
    send("b", 4, b"xy", b"zw")  # another view's, in between
    send("c", 2, b"too long")
    send("d", 11, b"0123456789", b"0")  # above max_bytes
    send("e", 0, b"")
    assert list(filter(None, got)) == [("b.png", b"xyzw"), ("e.png", b"")]


def test_newest_only():
    gate, done, faults = threading.Event(), [], []
    jobs = NewestOnly(faults.append)

    def job(i, fail=False):
        def work(deliver):
            gate.wait(20)
            if fail: raise WidgetError("no")
            deliver(done.append, i)
            deliver(done.append, -i)
        return work

    before = []
    for i in range(1, 6): jobs.submit(job(i), lambda i=i: before.append(i))
    assert not jobs.idle and before == [1, 2, 3, 4, 5]
    gate.set()
    assert jobs.wait(20) and done == [5, -5]
    jobs.submit(job(7, fail=True))
    assert jobs.wait(20) and [str(e) for e in faults] == ["no"] and done == [5, -5]
    jobs.submit(job(8))
    assert jobs.wait(20) and done[2:] == [8, -8]  # the thread outlives a failure
    gate.clear()
    jobs.submit(job(9))
    threading.Timer(0.2, gate.set).start()
    jobs.stop()
    jobs.submit(job(10))
    assert jobs.idle and done[4:] == []  # what was under way shows nothing any more


def test_figures_are_those_of_the_files(leveled, cup):
    files = PictureFiles(leveled, cup, keep=3)
    for level in (0, 4, 8):
        side = files.ours(level)
        assert side.data == leveled.compress(cup, quality=100 * level / 8)  # the networks ran once for all
        assert np.array_equal(side.image, leveled.decompress(side.data))
        assert np.array_equal(Image.open(io.BytesIO(side.png)), side.image)
        figures = files.measure(side, lpips=False)
        assert figures["bytes"] == len(side.data) and figures["bpp"] == 8 * len(side.data) / (180 * 164)
        assert figures["psnr"] == psnr(cup, side.image) and figures["ms_ssim"] == ms_ssim(cup, side.image)
    other = files.matched("jpeg", 3000)
    sizes = {q: len(get_baseline("jpeg").compress(cup, q)) for q in range(1, 101)}
    assert abs(len(other.data) - 3000) == min(abs(n - 3000) for n in sizes.values()) and other.fits
    assert not files.matched("jpeg", 300).fits  # smaller than any JPEG of it
    for level in (0, 4, 8): assert files.ours(level).figures["psnr"] == files.points["ours"][level]["psnr"]  # kept, pictures not
    assert [x for x, _ in files.curve("ours", "psnr")] == sorted(8 * len(files.ours(k).data) / (180 * 164) for k in (0, 4, 8))


def test_transparent_parts_lie_on_white(leveled, cup):
    glass = cup.copy()
    glass.putalpha(0)
    files = PictureFiles(leveled, glass)
    assert files.image.getextrema() == ((255, 255),) * 3
    assert leveled.decompress(files.ours(0).data).mode == "RGB"


def test_background_completes_curves_and_tables(leveled, cup):
    files = PictureFiles(leveled, cup.resize((40, 36)))
    for _ in files.steps(): pass
    assert len(files.points["ours"]) == 9
    for name, table in files.tables.items():
        assert set(table.sizes) == set(table.qualities)
        assert len(files.curve(name, "psnr")) == len(get_baseline(name).defaults)


def test_explorer_shows_the_last_question(leveled, cup, tmp_path):
    cup.save(tmp_path / "cup.png")
    explorer = bitrate_explorer(leveled, tmp_path / "cup.png", background=False)
    assert explorer.wait(60) and explorer.level == leveled.level_of() and not explorer.view.busy
    assert not explorer.slider.disabled and explorer.slider.max == 8
    shown, gate = [], threading.Event()
    explorer.observe(lambda change: shown.append(change["new"].ours.quality), "answer")
    files = explorer.answer.files
    slow = files.ours
    files.ours = lambda level: (gate.wait(20), slow(level))[1]
    for level in (0, 1, 2, 8): explorer.slider.value = level
    assert explorer.view.busy and explorer.level == 8 and not shown  # the sign is there before any answer
    gate.set()
    assert explorer.wait(60) and set(shown) == {8} and not explorer.view.busy
    answer = explorer.answer
    name, data = explorer._supply("ours.hfc")
    assert (name, data) == ("cup.hfc", leveled.compress(cup, quality=100))
    assert explorer.view.second == answer.ours.png and explorer.view.third == answer.other.png
    assert f"{len(data):,}" in explorer.table.value and f"{answer.ours.figures['psnr']:.3f} dB" in explorer.table.value
    explorer.unit = "kB"
    assert f"{len(data) / 1000:,.3f} kB" in explorer.table.value
    assert 'data-name="ours"' in explorer.curve.value and f'{answer.ours.figures["psnr"]:.6f}' in explorer.curve.value
    explorer.close()


def test_explorer_and_pictures(leveled, tmp_path):
    explorer = bitrate_explorer(leveled, max_pixels=20_000, background=False)
    assert explorer.wait(60) and explorer.picture == "coffee"
    assert "reduced to" in explorer.said.value and explorer.answer.files.image.width * explorer.answer.files.image.height <= 20_000
    before = explorer.answer
    assert not explorer.add_picture("<b>.txt", b"no picture") and "&lt;b&gt;.txt" in explorer.said.value
    assert explorer.answer is before and explorer.picture == "coffee"
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(buffer, "PNG")
    for name in ("red.png", "red.png (again)"):
        explorer.upload._receive(None, dict(id=name, name="red.png", size=len(buffer.getvalue())), [buffer.getvalue()])
        assert explorer.wait(60) and explorer.picture == explorer.chooser.value == name and explorer.view.size == [50, 40]
    data, _ = explorer._repr_mimebundle_()
    assert "image/jpeg" in data and "BitrateExplorer" in data["text/plain"]
    files = explorer.answer.files
    files.ours = lambda level: 1 / 0
    explorer.level = 0
    assert explorer.wait(60) and "ZeroDivisionError" in explorer.view.message and not explorer.view.busy
    explorer.close()
    with pytest.raises(ImageError): bitrate_explorer(leveled, tmp_path / "gone.png")


def test_two_uploads_at_once(leveled):
    explorer = bitrate_explorer(leveled, background=False)
    files = {}
    for name in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (50, 40), name).save(buffer, "PNG")
        files[name] = buffer.getvalue()
    half = 30
    for part in (slice(0, half), slice(half, None)):  # a piece of one, a piece of the other
        for name, data in files.items():
            explorer.upload._receive(None, dict(id=name, name=f"{name}.png", size=len(data)), [data[part]])
    assert explorer.wait(60) and list(explorer.pictures)[-2:] == ["red.png", "blue.png"] and explorer.picture == "blue.png"
    assert explorer.pictures["red.png"] == files["red"]  # kept as the file, not as pixels
    assert explorer.answer.files.original.figures["bytes"] == len(files["blue"])
    explorer.close()


def test_states_that_are_none(leveled):
    explorer = bitrate_explorer(leveled, background=False)
    assert explorer.wait(60)
    before = explorer.level, explorer.picture, explorer.baseline
    for name, wrong, said in (("level", 9, "0 ... 8"), ("picture", "nope", "coffee"), ("baseline", "", "jpeg"),
                              ("baseline", "gif", "jpeg")):
        with pytest.raises(Exception, match=f"There is no {name}.*{said}"): setattr(explorer, name, wrong)
    assert (explorer.level, explorer.picture, explorer.baseline) == before and explorer.slider.value == explorer.level
    explorer.close()


def test_a_baseline_that_cannot_store_the_picture_does_not_stop_the_others(leveled):
    files = PictureFiles(leveled, Image.new("RGB", (1, 16500)))  # WebP ends at 16383
    for _ in files.steps(levels=2): pass
    assert len(files.points["jpeg"]) == len(get_baseline("jpeg").defaults)
    assert not files.points["webp"] and not files.tables["webp"].sizes
    assert set(files.tables["jpeg"].sizes) == set(get_baseline("jpeg").qualities)


@pytest.mark.parametrize("make", [lambda codec: bitrate_explorer(codec, max_pixels=5000, background=False),
                                  lambda codec: bitrate_explorer(codec, max_pixels=5000),
                                  lambda codec: inside_explorer(codec, max_pixels=5000),
                                  lambda codec: gan_explorer(GeneratorPair(codec.model, codec.model), max_pixels=5000)],
                         ids=["bitrate", "with background", "inside", "gan"])
def test_a_closed_explorer_is_freed(leveled, make):
    import ipywidgets

    known = ipywidgets.widgets.widget._instances
    explorer = make(leveled)
    assert explorer.wait(60)
    mine, itself, size = {w.model_id for w in known.values() if w is explorer}, weakref.ref(explorer), len(known)
    explorer.close()
    assert mine and size - len(known) > 40  # all its parts, not itself alone
    del explorer
    for _ in range(100):  # threads are at their end
        gc.collect()
        if itself() is None: break
        time.sleep(0.1)
    assert itself() is None


def test_a_page_has_the_limit_that_hific_explore_was_given(leveled, cup, tmp_path, monkeypatch):
    cup.save(tmp_path / "cup.png")
    monkeypatch.setenv("HIFIC_EXPLORE_MAX_PIXELS", str(180 * 164 - 1))
    with pytest.raises(ImageError, match="max_pixels = 29519"): bitrate_explorer(leveled, tmp_path / "cup.png", background=False)
    monkeypatch.setenv("HIFIC_EXPLORE_MAX_PIXELS", str(180 * 164))
    explorer = bitrate_explorer(leveled, tmp_path / "cup.png", background=False)
    assert explorer.wait(60) and explorer.picture == "cup.png" and not explorer.view.message
    explorer.close()


def test_what_is_no_step_and_no_notebook(tmp_path):
    for name in ("step-000000005.jpg", "step-final.jpg"): Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert step_slider(tmp_path).labels == ["step 5"]
    with pytest.raises(WidgetError, match="at least 1"): step_slider(tmp_path, 0)
    assert not trust_notebook(tmp_path / "step-final.jpg")


def test_rate_curve():
    svg = rate_curve({"ours": [(0.1, 20.0), (0.2, 30.0), (9.0, 50.0)]}, {"ours": (0.2, 30.0)}, {"ours": "<me>"}, most=0.4)
    ring = re.search(r'class="current"[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)
    line = re.search(r'points="([^"]+)"', svg)[1].split()
    assert len(line) == 2 and line[1] == f"{ring[1]},{ring[2]}"  # what lies beyond the axis is left out
    assert float(ring[1]) == (52 + 500) / 2 and "&lt;me&gt;" in svg and "<me>" not in svg
    assert "circle" not in rate_curve({"ours": []}) and "svg" in rate_curve({})


# ------------------------------------------------------------------------------------------------ in a browser

MISSING = needs_browser("jupyterlab", "nbclient", "anywidget")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab whose root is tmp_path/"root", with settings of its own."""
    (tmp_path / "root").mkdir()
    with jupyterlab(tmp_path / "root", tmp_path) as url: yield url


SOURCE = """
from hific_nb.data import image_to_tensor, sample_photo, tensor_to_image
from hific_nb.widgets import compare
a = sample_photo("coffee").resize((15, 10)).resize((300, 200))
slider = compare(a, tensor_to_image(255 - image_to_tensor(a)), labels=("before", "after"))
slider
"""

LINE = """() => {
    const box = document.querySelector('.hific-compare-box');
    if (!box) return -1;
    const line = box.querySelector('.line').getBoundingClientRect(), all = box.getBoundingClientRect();
    return (line.x + line.width / 2 - all.x) / all.width;
}"""


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_slider_in_jupyterlab(lab, tmp_path, photos, monkeypatch):
    """An executed notebook, reopened. Not trusted: the still picture. Signed: the slider is there and moves without its
    kernel. Run again: Python follows the line, and the line follows Python."""
    from nbclient import NotebookClient

    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in (SOURCE.strip(), "print('position', slider.position)")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    assert "image/png" in nb.cells[0].outputs[0].data and nb.metadata.widgets  # as papermill saves it
    nbformat.write(nb, tmp_path / "root" / "mine.ipynb")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "d"))
    assert trust_notebook(tmp_path / "root" / "mine.ipynb")
    nb.cells[1].source += "  # sent by someone else"
    nbformat.write(nb, tmp_path / "root" / "sent.ipynb")

    with chromium() as browser:
        errors = []

        def opened(name):
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.set_default_timeout(90_000)
            collect_errors(page, errors)
            page.goto(f"{lab}/lab/workspaces/{name}/tree/{name}.ipynb?reset")
            return page

        page = opened("sent")
        page.wait_for_function("document.querySelector('.jp-RenderedImage img')?.naturalWidth == 606")
        assert page.locator(".hific-compare .hific-compare-box").count() == 0
        page.close()

        page = opened("mine")
        box, cells = page.locator(".hific-compare .hific-compare-box"), page.locator(".jp-CodeCell")

        def line(): return page.evaluate(LINE)
        def reaches(at): page.wait_for_function(f"Math.abs(({LINE})() - {at}) < 0.005")

        def pixel(x, y):
            "The colour on the screen at a share of the picture's width and height."
            shot = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
            return np.array(shot.getpixel((int(x * shot.width), int(y * shot.height))), int)

        def original(x, y): return np.array(photos[0].getpixel((int(x * 300), int(y * 200))), int)

        box.wait_for()
        page.wait_for_function(
            "[...document.querySelectorAll('.hific-compare-box img')].every(i => i.naturalWidth == 300)")
        assert box.locator("span").all_inner_texts() == ["before", "after"]
        assert abs(line() - 0.5) < 0.005
        for x, y in ((0.2, 0.7), (0.45, 0.3)): assert abs(pixel(x, y) - original(x, y)).max() < 12
        for x, y in ((0.55, 0.3), (0.8, 0.7)): assert abs(255 - pixel(x, y) - original(x, y)).max() < 12

        box.locator("input").focus()
        for _ in range(10): page.keyboard.press("ArrowRight")
        assert abs(line() - 0.7) < 0.005
        assert abs(pixel(0.55, 0.3) - original(0.55, 0.3)).max() < 12  # what was inverted is the original now
        page.keyboard.press("Shift+ArrowLeft")
        assert abs(line() - 0.6) < 0.005
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        assert abs(line() - 1) < 0.005
        page.keyboard.press("Home")
        assert abs(line()) < 0.005
        where = box.bounding_box()
        page.mouse.move(where["x"] + 0.1 * where["width"], where["y"] + 100)
        page.mouse.down()
        assert abs(line() - 0.1) < 0.01
        page.mouse.move(where["x"] + 0.3 * where["width"], where["y"] + 120, steps=5)
        assert abs(line() - 0.3) < 0.01
        page.mouse.up()

        wait_for_kernel(page)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        reaches(0.5)
        page.locator(".jp-OutputArea-output", has_text="position 0.5").wait_for()
        box.locator("input").focus()
        for _ in range(5): page.keyboard.press("ArrowRight")
        reaches(0.6)
        cells.nth(1).locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        page.locator(".jp-OutputArea-output", has_text="position 0.6").wait_for()
        page.keyboard.press("Enter")
        page.keyboard.press("Control+a")
        page.keyboard.insert_text("slider.position = 0.25")
        page.keyboard.press("Control+Enter")
        reaches(0.25)
        assert not errors, errors
