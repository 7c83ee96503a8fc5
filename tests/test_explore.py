"""The explorers in a real browser: by Voilà, by JupyterLab, by `hific explore`. Every figure on the page is computed again here."""

import io
import re
import shutil
import socket

import browser
import numpy as np
import pytest
import torch
from browser import ROOT, explore, jupyterlab, needs_browser, wait_for_kernel
from PIL import Image

from hific_nb.baselines import get_baseline
from hific_nb.codec import Codec
from hific_nb.data import read_image, sample_photo
from hific_nb.metrics import ms_ssim, psnr
from hific_nb.model import load_model

NOTEBOOK = ROOT / "nbs" / "explore" / "bitrate_vs_quality.ipynb"
MODEL = ROOT / "tests" / "golden" / "levels"  # 9 levels; its pictures are noise, its files and figures real
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


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as opened: yield opened


class Page(browser.Page):
    """The explorer of bitrate against quality in the browser."""
    def settled(self, **figures):
        "Wait for an answer in full; figures are {row: text of its heading}."
        for row, text in figures.items(): self.at(f"tr.hific-{row} th:has-text({text!r})").wait_for()
        self.page.wait_for_function("""() => {
            const box = document.querySelector('.hific-split-box'), table = document.querySelector('.hific-figures');
            return box && table && box.getAttribute('aria-busy') === 'false' && !table.textContent.includes('…')
                && !document.querySelector('.hific-split-box span.right').textContent.includes('…');
        }""")

    def figure(self, row, name) -> str: return self.at(f"tr.hific-{row} td.{name}").inner_text()


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
ASKED = f"""() => {{  // a key on the slider, and the sign: before, and after, in one breath
    const before = {BOX}.getAttribute('aria-busy'), key = {{ key: 'ArrowRight', bubbles: true, cancelable: true }};
    document.querySelector('.hific-level .noUi-handle').dispatchEvent(new KeyboardEvent('keydown', key));
    return [before, {BOX}.getAttribute('aria-busy')];
}}"""


PRESSED = """() => [...document.querySelectorAll(".widget-toggle-button[aria-pressed=true]")].map((b) => b.textContent.trim())"""


def test_page_by_voila(chromium, codec, photo, tmp_path):
    """`hific explore`: the whole page, its slider, keys, uploads and downloads."""
    with explore(tmp_path, photo, "--model", MODEL) as (url, log):
        page = Page(chromium, url, accept_downloads=True)
        page.settled(ours="level 4")
        assert url in log.read_text()
        original = read_image(photo)
        first = check_figures(page, codec, original)
        assert first == codec.compress(original, quality=50)
        page.shot("voila-first")

        page.check_names()
        assert page.page.evaluate(PRESSED) == ["AVIF", "bpp", "fit", "PSNR"]
        # the sign is there before Python can have heard of the question
        assert page.page.evaluate(ASKED) == ["false", "true"]
        page.settled(ours="level 5")
        assert page.page.evaluate(f"{BOX}.querySelector('.busy').style.display") == "none"
        page.at(".hific-level .noUi-handle").focus()
        page.page.keyboard.press("ArrowLeft")
        page.settled(ours="level 4")

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
    with jupyterlab(root, tmp_path, HIFIC_EXPLORE_MODEL=str(MODEL), HIFIC_EXPLORE_PICTURE=str(photo)) as url:
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
        notes, mine = tmp_path / "notes.jpg", tmp_path / "mine.png"
        notes.write_text("no picture at all")
        page.page.locator(".hific-upload-box input").set_input_files(notes)
        page.at(".hific-said [role=alert]:has-text('notes.jpg')").wait_for()
        original.crop((20, 0, 200, 170)).save(mine)
        page.page.locator(".hific-upload-box input").set_input_files(mine)
        page.page.wait_for_function("document.querySelector('.hific-said').textContent.includes('180 x 170')")
        page.settled()
        check_figures(page, codec, read_image(mine))
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["explore", "--no-browser", "--port", port]) == 1 and port in capsys.readouterr().err
    wrong = (([str(notes)], "notes.jpg"), ([str(tmp_path / "gone.png")], "gone.png"), (["--model", "hific-lyte"], "lyte"),
             (["--port", "80000"], "ports end at 65535"))
    for arguments, text in wrong:
        assert main(["explore", "--no-browser", *arguments]) == 1
        assert text in capsys.readouterr().err
