"""The comparison slider: what its output holds, and what it does in a real browser."""

import base64
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest
from PIL import Image

from hific_nb.data import image_to_tensor, sample_photo, tensor_to_image
from hific_nb.widgets import WidgetError, compare, comparison_picture, trust_notebook, worst_window

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


# ------------------------------------------------------------------------------------------------ in a browser

def needs_browser():
    missing = [name for name in ("jupyterlab", "nbclient", "anywidget") if importlib.util.find_spec(name) is None]
    if missing: return f"{missing[0]} is missing: pip install '.[notebooks,dev]'"
    if importlib.util.find_spec("playwright") is None: return "playwright is missing: pip install playwright"
    if CHROMIUM is None: return "no chromium: apt-get install -y chromium"
    return None


ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab whose root is tmp_path/"root", with settings of its own."""
    (tmp_path / "root").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / "w"), JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "s"),
               JUPYTER_CONFIG_DIR=str(tmp_path / "c"), JUPYTER_RUNTIME_DIR=str(tmp_path / "r"),
               JUPYTER_DATA_DIR=str(tmp_path / "d"), IPYTHONDIR=str(tmp_path / "i"))
    log = open(tmp_path / "lab.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path / 'root'}", "--expose-app-in-browser",
         "--ServerApp.port_retries=0", "--LabApp.news_url=", "--LabApp.check_for_updates_class="
         "jupyterlab.handlers.announcements.NeverCheckForUpdate"],
        stdout=log, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url + "/api", timeout=2).read()
                break
            except OSError:
                if server.poll() is not None: break
                time.sleep(0.1)
        else: pytest.fail("JupyterLab did not start: " + (tmp_path / "lab.log").read_text()[-2000:])
        if server.poll() is not None: pytest.fail((tmp_path / "lab.log").read_text()[-2000:])
        yield url
    finally:
        server.terminate()  # on SIGTERM it ends its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


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


@pytest.mark.skipif(needs_browser() is not None, reason=str(needs_browser()))
def test_slider_in_jupyterlab(lab, tmp_path, photos, monkeypatch):
    """An executed notebook, reopened. Not trusted: the still picture. Signed: the slider is there and moves without its
    kernel. Run again: Python follows the line, and the line follows Python."""
    from nbclient import NotebookClient
    from playwright.sync_api import sync_playwright

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

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(40_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        box, cells = page.locator(".hific-compare .hific-compare-box"), page.locator(".jp-CodeCell")

        def line(): return page.evaluate(LINE)
        def reaches(at): page.wait_for_function(f"Math.abs(({LINE})() - {at}) < 0.005")

        def pixel(x, y):
            "The colour on the screen at a share of the picture's width and height."
            shot = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
            return np.array(shot.getpixel((int(x * shot.width), int(y * shot.height))), int)

        def original(x, y): return np.array(photos[0].getpixel((int(x * 300), int(y * 200))), int)

        page.goto(lab + "/lab/workspaces/t/tree/sent.ipynb?reset")
        page.wait_for_function("document.querySelector('.jp-RenderedImage img')?.naturalWidth == 606")
        assert box.count() == 0

        page.evaluate("""async () => {
            await window.jupyterapp.commands.execute('application:close');
            await window.jupyterapp.commands.execute('docmanager:open', { path: 'mine.ipynb' });
        }""")
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

        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')  # now with a kernel
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
        browser.close()
