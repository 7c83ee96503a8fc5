"""The explorers in a real browser: by Voilà, by JupyterLab, by `hific explore`. Every figure on the page is computed again here."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import ARGUMENTS, CHROMIUM, collect_errors, needs_browser, wait_for_kernel
from PIL import Image

from hific_nb.baselines import get_baseline
from hific_nb.codec import Codec
from hific_nb.data import read_image, sample_photo
from hific_nb.metrics import ms_ssim, psnr
from hific_nb.model import load_model

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "explore" / "bitrate_vs_quality.ipynb"
MODEL = ROOT / "tests" / "golden" / "levels"  # 9 levels; its pictures are noise, its files and figures real
SHOTS = ROOT / "outputs" / "explore"
MISSING = needs_browser("voila", "jupyterlab", "anywidget")

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "cup.png"
    sample_photo("coffee").resize((240, 176)).save(path)  # above 160: MS-SSIM is defined
    return path


@pytest.fixture(scope="module")
def codec():
    torch.set_num_threads(1)
    return Codec(load_model(MODEL), name="levels", device="cpu")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command, url, folder, **more):
    """A server of its own settings, up when `url` answers; ended with its kernels."""
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(folder / "c"), JUPYTER_RUNTIME_DIR=str(folder / "r"),
               JUPYTER_DATA_DIR=str(folder / "d"), IPYTHONDIR=str(folder / "i"), JUPYTERLAB_WORKSPACES_DIR=str(folder / "w"),
               JUPYTERLAB_SETTINGS_DIR=str(folder / "s"), OMP_NUM_THREADS="1", HIFIC_EXPLORE_MODEL=str(MODEL),
               PYTHONPATH=str(ROOT), **more)
    log = folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=folder,
                                   start_new_session=True)
    try:
        for _ in range(900):
            try:
                with contextlib.suppress(urllib.error.HTTPError): urllib.request.urlopen(url, timeout=60).read(100)
                break  # any answer is one
            except OSError:
                if process.poll() is not None: break
                time.sleep(0.1)
        assert process.poll() is None, log.read_text()[-3000:]
        yield log
    finally:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """An explorer in the browser, and what is said in the console."""
    def __init__(self, browser, url, viewport=(1100, 1250), **options):
        self.page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]}, **options)
        self.page.set_default_timeout(60_000)
        self.errors = []
        collect_errors(self.page, self.errors)
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(
            f"{message.text} {message.location.get('url', '')}"))
        self.outside = []
        self.page.on("request", lambda r: r.url.startswith(("http:", "https:", "ws:", "wss:")) and "//127.0.0.1:" not in r.url
                     and self.outside.append(r.url))
        self.page.goto(url)

    def at(self, name): return self.page.locator(name).first

    def settled(self, **figures):
        "Wait for an answer in full; figures are {row: text of its heading}."
        for row, text in figures.items(): self.at(f"tr.hific-{row} th:has-text({text!r})").wait_for()
        self.page.wait_for_function("""() => {
            const box = document.querySelector('.hific-split-box'), table = document.querySelector('.hific-figures');
            return box && table && box.getAttribute('aria-busy') === 'false' && !table.textContent.includes('…')
                && !document.querySelector('.hific-split-box span.right').textContent.includes('…');
        }""")

    def figure(self, row, name) -> str: return self.at(f"tr.hific-{row} td.{name}").inner_text()

    def download(self, name) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting: self.at(f".hific-download-box button:text-is({name!r})").click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    def shown(self, k) -> Image.Image:
        "The picture that the browser holds in its k-th place."
        data = self.page.evaluate("""async (k) => {
            const url = document.querySelectorAll('.hific-split-box img')[k].src;
            return [...new Uint8Array(await (await fetch(url)).arrayBuffer())];
        }""", k)
        return Image.open(io.BytesIO(bytes(data))).convert("RGB")

    def seen(self) -> np.ndarray:
        "What is on the screen in the box."
        self.at(".hific-split-box").scroll_into_view_if_needed()
        place = {side: round(value) for side, value in self.at(".hific-split-box").bounding_box().items()}
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=place))).convert("RGB")).astype(int)

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def check(self):
        assert not self.errors, self.errors
        assert not self.outside, self.outside
        self.page.close()


def check_figures(page, codec, original, baseline="avif"):
    """What the page shows against what its downloads are."""
    name, data = page.download("ours.hfc")
    decoded = codec.decompress(data)
    assert np.array_equal(np.asarray(page.shown(1)), np.asarray(decoded)) and name.endswith(".hfc")
    assert np.array_equal(np.asarray(page.shown(0)), np.asarray(original))
    png = Image.open(io.BytesIO(page.download("ours.png")[1]))
    assert np.array_equal(np.asarray(png), np.asarray(decoded))
    kind = get_baseline(baseline)
    name, rival = page.download(baseline + kind.extension)
    other = kind.decompress(rival)
    assert np.array_equal(np.asarray(page.shown(2)), np.asarray(other)) and name.endswith(kind.extension)
    for row, file, image in (("ours", data, decoded), ("other", rival, other)):
        assert page.figure(row, "bytes") == f"{len(file):,}"
        rate = page.figure(row, "rate")
        assert rate == f"{8 * len(file) / (original.width * original.height):.4f} bpp" or rate == f"{len(file) / 1000:,.3f} kB"
        assert page.figure(row, "psnr") == f"{psnr(original, image):.3f} dB"
        value = ms_ssim(original, image)
        assert page.figure(row, "ms_ssim") == ("–" if value is None else f"{value:.4f}")
    return data


BOX = "document.querySelector('.hific-split-box')"


def test_page_by_voila(chromium, codec, photo, tmp_path):
    """`hific explore`: the whole page, its slider, keys, uploads and downloads."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-c", "from hific_nb.cli import main; import sys; sys.exit(main())", "explore", photo, "--model",
               MODEL, "--port", port, "--no-browser"]
    with server(command, url + "voila/static/", tmp_path) as log:
        page = Page(chromium, url, accept_downloads=True)
        page.settled(ours="level 4")
        assert url in log.read_text()
        original = read_image(photo)
        first = check_figures(page, codec, original)
        assert first == codec.compress(original, quality=50)
        page.shot("voila-first")

        # the slider changes picture and figures
        page.at(".hific-level .noUi-handle").focus()
        for _ in range(4): page.page.keyboard.press("ArrowRight")
        page.settled(ours="level 8")
        assert check_figures(page, codec, original) == codec.compress(original, quality=100) != first
        current = page.at(".hific-curve circle.current[data-name=ours]")
        assert abs(float(current.get_attribute("data-value")) - float(page.figure("ours", "psnr").split()[0])) < 0.001
        page.at(".hific-baseline button:text-is('JPEG')").click()
        page.settled(other="JPEG")
        check_figures(page, codec, original, "jpeg")
        page.at(".hific-unit button:text-is('kB')").click()
        page.at("tr.hific-ours td.rate:has-text('kB')").wait_for()
        check_figures(page, codec, original, "jpeg")
        for _ in range(9): page.page.keyboard.press("Tab")  # whatever has the focus, nothing breaks

        # the line and the keys
        box, known = page.at(".hific-split-box"), [np.asarray(page.shown(k)).astype(int) for k in range(3)]
        assert page.page.evaluate(f"{BOX}.clientWidth") == 240  # a small picture is not enlarged
        half = page.seen()
        assert np.abs(half[40:140, 10:100] - known[0][40:140, 10:100]).max() <= 2
        assert np.abs(half[40:140, 140:230] - known[1][40:140, 140:230]).max() <= 2
        where = box.bounding_box()
        page.page.mouse.move(where["x"] + 120, where["y"] + 90)
        page.page.mouse.down()
        page.page.mouse.move(where["x"] + 200, where["y"] + 90, steps=3)
        page.page.mouse.up()
        assert np.abs(page.seen()[40:140, 10:180] - known[0][40:140, 10:180]).max() <= 2
        for _ in range(10): page.page.keyboard.press("Shift+ArrowLeft")
        assert np.abs(page.seen()[40:140, 20:] - known[1][40:140, 20:]).max() <= 2
        for k in range(3):
            page.page.keyboard.press(str(k + 1))
            assert np.abs(page.seen()[40:140] - known[k][40:140]).max() <= 2
        page.page.keyboard.press("x")
        wanted = np.minimum(255, 4 * np.abs(known[0] - known[1]))
        assert np.abs(page.seen()[40:140] - wanted[40:140]).max() <= 6
        page.shot("voila-difference")
        page.page.keyboard.press("Escape")

        # zoom: whole pixels, both sides from the same place, wherever they are panned to
        page.at(".hific-zoom button:text-is('400 %')").click()
        page.page.wait_for_function(f"{BOX}.clientWidth > 800")
        box.focus()
        page.page.keyboard.press("End")
        page.page.keyboard.press("l")
        page.page.keyboard.press("k")
        page.page.wait_for_timeout(100)
        places = page.page.evaluate("[...document.querySelectorAll('.hific-split-box img')].map(i => i.style.cssText.match("
                                    "/left: [^;]+; top: [^;]+; width: [^;]+/)[0])")
        assert len(set(places)) == 1 and "width: 960px" in places[0]
        for key, k in (("1", 0), ("2", 1)):
            page.page.keyboard.press(key)
            seen = page.seen()
            top = -float(re.search(r"top: (-?[\d.]+)px", places[0])[1])
            left = -float(re.search(r"left: (-?[\d.]+)px", places[0])[1])
            for y, x in ((100, 50), (200, 400), (300, 640)):
                assert np.abs(seen[y, x] - known[k][int((y + 0.5 + top) // 4), int((x + 0.5 + left) // 4)]).max() <= 2
        page.page.keyboard.press("0")
        page.shot("voila-400")

        # uploads
        upload = page.page.locator(".hific-upload-box input")
        notes = tmp_path / "notes.jpg"
        notes.write_text("no picture at all")
        upload.set_input_files(notes)
        page.at(".hific-said [role=alert]:has-text('notes.jpg')").wait_for()
        mine = tmp_path / "mine.png"
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (480, 500, 3), dtype=np.uint8)).save(mine)  # noise: more than one message long
        assert mine.stat().st_size > 600_000
        upload.set_input_files(mine)
        page.page.wait_for_function("document.querySelector('.hific-said').textContent.includes('500 x 480')")
        page.settled()
        check_figures(page, codec, read_image(mine), "jpeg")
        assert page.at(".hific-picture select").evaluate("s => s.selectedOptions[0].text") == "mine.png"
        page.check()


def test_page_by_jupyterlab(chromium, codec, photo, tmp_path):
    """The notebook, opened and run; and a finger instead of a mouse."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(NOTEBOOK, root / "explore.ipynb")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--expose-app-in-browser", "--ServerApp.port_retries=0",
               "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with server(command, url + "/api", tmp_path, HIFIC_EXPLORE_PICTURE=str(photo)):
        page = Page(chromium, url + "/lab/workspaces/t/tree/explore.ipynb?reset", accept_downloads=True, has_touch=True)
        wait_for_kernel(page.page)
        page.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.settled(ours="level 4")
        original = read_image(photo)
        check_figures(page, codec, original)
        box = page.at(".hific-split-box")
        box.scroll_into_view_if_needed()
        where = box.bounding_box()
        page.page.touchscreen.tap(where["x"] + 60, where["y"] + 60)
        page.page.wait_for_function(f"Math.abs(parseFloat({BOX}.querySelector('.line').style.left) - 60) < 2")
        box.focus()
        cells = page.page.locator(".jp-Cell").count()
        for key in ("1", "2", "3", "x", "x", "d", "d", "a", "b", "0", "ArrowRight"): page.page.keyboard.press(key)
        assert page.page.locator(".jp-Cell").count() == cells  # the keys are not the notebook's
        page.at(".hific-level .noUi-handle").focus()
        for _ in range(4): page.page.keyboard.press("ArrowLeft")  # faster than answers come: the last one counts
        page.settled(ours="level 0")
        assert check_figures(page, codec, original) == codec.compress(original, quality=0)
        page.shot("jupyterlab")
        page.check()


def test_one_rate_is_said(codec):
    """What has no levels has nothing to slide; the shipped model is looked at, not a stand-in."""
    from hific_nb.widgets import bitrate_explorer

    plain = Codec.from_pretrained("hific-lite", device="cpu")
    explorer = bitrate_explorer(plain, background=False)
    assert explorer.slider.disabled == (plain.levels == 0)
    assert ("has one rate" in explorer.note.value) == (plain.levels == 0)
    explorer.close()


def test_explore_says_what_is_wrong(tmp_path, capsys):
    from hific_nb.cli import main

    notes = tmp_path / "notes.jpg"
    notes.write_text("no picture")
    wrong = ([str(notes)], "notes.jpg"), ([str(tmp_path / "gone.png")], "gone.png"), (["--model", "hific-lyte"], "lyte")
    for arguments, text in wrong:
        assert main(["explore", "--no-browser", *arguments]) == 1
        assert text in capsys.readouterr().err
