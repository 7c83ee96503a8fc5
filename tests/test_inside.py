"""Inside the codec: its numbers against a decoder written here, its page in a real browser, the notebooks as they are read."""

import ast
import base64
import configparser
import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import threading
from bisect import bisect_right
from pathlib import Path

import browser
import nbformat
import numpy as np
import pytest
import torch
from browser import ROOT, explore, jupyterlab, needs_browser, wait_for_kernel
from PIL import Image

from hific_nb.codec import Codec
from hific_nb.coders import table_bits
from hific_nb.data import read_image, sample_photo
from hific_nb.hfc import (ChecksumError, CorruptError, HfcError, ModelMismatchError, NotHfcError, TruncatedError, VersionError,
                          layout)
from hific_nb.metrics import psnr
from hific_nb.model import load_model
from hific_nb.widgets import Changed, PictureInside, WidgetError, inside_explorer, value_picture

EXPLORE = ROOT / "nbs" / "explore"
NOTEBOOK = EXPLORE / "inside_the_codec.ipynb"
EXPLORERS = [EXPLORE / f"{name}.ipynb" for name in ("bitrate_vs_quality", "inside_the_codec", "finetune")]
MODEL = ROOT / "tests" / "golden" / "levels"  # 9 levels; its pictures are noise, its files and figures real


@pytest.fixture(scope="module", autouse=True)
def one_thread(): torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lite(): return Codec(load_model(ROOT / "tests" / "golden" / "one-rate"), name="lite", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def shipped(): return Codec.from_pretrained("hific-lite", device="cpu", dtype=torch.float32)  # where it must have been trained


@pytest.fixture(scope="module")
def leveled(): return Codec(load_model(MODEL), name="levels", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def cup(): return sample_photo("coffee").resize((90, 57))


@pytest.fixture(scope="module")
def inside(lite, cup): return PictureInside(lite, cup)


def tables_of(inside):
    "(symbols, rows, tables) of hyperlatents and latents, from what room 13 says of a file and not from what is tested."
    codec, latents = inside.codec, inside.codec.decode_latents(inside.data)
    z = latents.hyperlatents
    return {"hyperlatents": (z, np.arange(len(z)).repeat(z[0].size).reshape(z.shape), codec.coding.hyperlatents),
            "latents": (latents.symbols, latents.indexes, codec.coding.latents)}


# ------------------------------------------------------------------------------------------------ numbers

@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 17), (90, 57), (200, 64)])
def test_bytes_add_up(lite, leveled, size):
    image = sample_photo("astronaut").resize(size)
    for codec, level in ((lite, None), (leveled, 0), (leveled, 8)):
        if level is not None and codec is lite: continue
        inside = PictureInside(codec, image, level)
        assert inside.data == (codec.compress(image) if level is None else codec.compress(image, quality=100 * level / 8))
        assert math.isclose(sum(inside.sizes.values()), len(inside.data)) and 0 < inside.sizes["coder"] < 2 + 4 * inside.lanes
        for kind, (symbols, rows, tables) in tables_of(inside).items():
            ideal = table_bits([(symbols.ravel(), rows.ravel(), tables)])
            assert math.isclose(inside.bits[kind].sum(), ideal) and math.isclose(8 * inside.sizes[kind], ideal)
            spread = inside.bit_map(kind).repeat(16, 0).repeat(16, 1)[:size[1], :size[0]]
            assert math.isclose(spread.sum(), ideal)
        fields = inside.fields()
        assert [f.start for f in fields] == [0, *(f.end for f in fields[:-1])] and fields[-1].end == len(inside.data)


def walk(inside):
    "Every step of a file's decoder: (row, before, v, start, frequency, value, words, after), in a plain loop."
    data, parts = inside.data, tables_of(inside)
    begin = next(f.start for f in layout(data) if f.name == "payload")
    lanes = data[begin]
    states = [int.from_bytes(data[begin + 1 + 4 * k: begin + 5 + 4 * k], "little") for k in range(lanes)]
    at = begin + 1 + 4 * lanes
    for _, rows, tables in parts.values():
        cdf = [tables.cdf[r, : tables.slots[r] + 1].tolist() for r in range(tables.rows)]
        for i, row in enumerate(rows.ravel().tolist()):
            x, words = states[i % lanes], []

            def refill(x, words=words):
                nonlocal at
                if x >= 1 << 16: return x
                words.append((at, int.from_bytes(data[at: at + 2], "little")))
                at += 2
                return x << 16 | words[-1][1]

            v = x % (1 << tables.precision)
            slot = bisect_right(cdf[row], v) - 1
            start, frequency = cdf[row][slot], cdf[row][slot + 1] - cdf[row][slot]
            after = refill(frequency * (x >> tables.precision) + v - start)
            value = slot + int(tables.offset[row])
            if slot == tables.slots[row] - 1:  # escaped
                count, after = after & 15, refill(after >> 4)
                rest = 0
                for _ in range(count): rest, after = rest << 4 | after & 15, refill(after >> 4)
                value = int(tables.offset[row]) + (-(rest >> 1) - 1 if rest & 1 else slot + (rest >> 1))
            states[i % lanes] = after
            yield row, x, v, start, frequency, value, tuple(words), after
    assert at == len(data) - 4 and set(states) == {1 << 16}


def seen(step): return step.row, step.before, step.v, step.start, step.frequency, step.value, step.words, step.after


def test_every_symbol_through_rans(lite):
    inside = PictureInside(lite, sample_photo("coffee").resize((210, 140)))
    steps = list(walk(inside))
    traced = [inside.trace(n) for n in range(inside.symbols)]
    assert [seen(t) for t in traced] == steps
    assert math.isclose(sum(t.bits for t in traced), sum(b.sum() for b in inside.bits.values()))
    assert any(t.digits for t in traced) and any(t.words for t in traced)
    for kind, (symbols, _, _) in tables_of(inside).items():
        assert [t.value for t in traced if t.kind == kind] == symbols.ravel().tolist()
        assert all(symbols[t.place] == t.value and inside.number_of(kind, t.place) == t.number for t in traced if t.kind == kind)
    readers = {at: t.number for t in traced for at, _ in t.words}
    for at in (*range(0, len(inside.data), 61), *range(len(inside.data) - 6, len(inside.data)), *range(18, 28)):
        assert inside.reader_of(at) == readers.get(at, readers.get(at - 1))
    ordered = sorted(set(readers.values()))
    for number in (0, 1, ordered[5], ordered[5] - 1, ordered[-2], ordered[-1], inside.symbols - 1):
        assert inside.next_reader(number) == next((n for n in ordered if n > number), None)
    for wrong in (-1, inside.symbols):
        with pytest.raises(WidgetError): inside.trace(wrong)


def test_lanes_of_a_long_stream(shipped):
    inside = PictureInside(shipped, sample_photo("coffee").resize((480, 320)))
    assert inside.lanes == 4 and inside.symbols > 1 << 16
    steps, z = list(walk(inside)), inside.latents.hyperlatents.size
    rng = np.random.default_rng(0)
    for n in [0, 1, 2, 3, z - 1, z, z + 1, z + 3, inside.symbols - 1, *rng.integers(0, inside.symbols, 60).tolist()]:
        step = inside.trace(n)
        assert seen(step) == steps[n] and step.lane == (n if n < z else n - z) % 4
        if step.words: assert inside.reader_of(step.words[0][0] + 1) == n


# ------------------------------------------------------------------------------------------------ changes

def test_changed_files_decode_to_what_is_shown(lite, leveled, shipped, cup):
    for codec, level in ((lite, None), (leveled, 2)):
        inside = PictureInside(codec, cup, level)
        other = PictureInside(codec, sample_photo("chelsea").resize(cup.size), level)
        off = [int(c) for c in inside.by_cost[1:3]]
        for options in (dict(off=off), dict(other=other), dict(other=other, take="symbols"), dict(off=off, other=other)):
            change = inside.changed(**options)
            latents = codec.decode_latents(change.data)
            assert change.size == len(change.data) and np.array_equal(codec.decompress(change.data), change.image)
            swapped, symbols = options.get("take", "hyperlatents"), other if options.get("take") else inside
            z = other if swapped == "hyperlatents" and "other" in options else inside
            assert np.array_equal(latents.hyperlatents, z.latents.hyperlatents)
            wanted = symbols.latents.symbols.copy()
            wanted[options.get("off", [])] = 0
            assert np.array_equal(latents.symbols, wanted) and latents.level == level
        assert len(inside.changed(off=off).data) < len(inside.data)
        assert np.array_equal(inside.changed().image, inside.picture) and inside.changed().data == inside.data
    mine, other = (PictureInside(shipped, image) for image in (cup, sample_photo("chelsea").resize(cup.size)))
    foreign = mine.changed(other=other)  # what does not fit costs bytes, and quality
    assert foreign.size > len(mine.data) and psnr(cup, foreign.image) < psnr(cup, mine.picture)


def test_other_steps(lite, inside):
    "Coarser rounding: the picture and the size, by their definitions."
    def picture(latents):
        y_hat = torch.from_numpy(latents.astype(np.float32))[None]
        return lite.generate(type(inside.latents)(inside.image.width, inside.image.height, *[None] * 3, y_hat))

    free = inside.changed(step=0)
    assert free.size is free.data is None and np.array_equal(free.image, picture(inside.y))
    z, z_rows, z_tables = tables_of(inside)["hyperlatents"]
    sizes = []
    for step in (0.5, 2.0, 4.0):
        change = inside.changed(step=step)
        symbols = np.rint((inside.y - inside.mean) / step).astype(np.int32)
        assert np.array_equal(change.image, picture(inside.mean + np.float32(step) * symbols)) and change.data is None
        rows = np.abs(np.log(inside.scale / step)[..., None] - np.log(lite.coding.scales)).argmin(-1)
        ideal = table_bits([(z.ravel(), z_rows.ravel(), z_tables), (symbols.ravel(), rows.ravel(), lite.coding.latents)])
        assert 24 + ideal / 8 <= change.size < 24 + ideal / 8 + 2 + 4 * inside.lanes
        sizes.append(change.size)
    assert sizes[0] > len(inside.data) > sizes[1] > sizes[2]


def test_gains_of_a_level(leveled, cup):
    inside = PictureInside(leveled, cup, 7)
    y = leveled.analyse(cup, thumbnail=False).y[0].numpy()
    gain = inside.y.reshape(len(y), -1).sum(1) / y.reshape(len(y), -1).sum(1)
    assert np.allclose(inside.y, y * gain[:, None, None], rtol=1e-5) and (gain > 1).any()
    assert np.array_equal(np.rint(inside.y - inside.mean), inside.latents.symbols)
    assert np.allclose((inside.mean + inside.latents.symbols) * inside._gains("inverse_gains"), inside.latents.y_hat[0].numpy(),
                       rtol=1e-5, atol=1e-6)


def test_damage(inside):
    fields = {f.name: f for f in inside.fields()}
    expected = dict(magic=NotHfcError, version=VersionError, fingerprint=ModelMismatchError, coder=CorruptError, lanes=CorruptError)
    for name, error in expected.items():
        change = inside.damaged(fields[name].start, 1)
        assert isinstance(change.refused, HfcError) and isinstance(change.trusted, error), name
    assert isinstance(inside.damaged(fields["size"].start, 1).refused, (TruncatedError, ChecksumError, CorruptError))
    repaired = inside.damaged(fields["checksum"].start, 255)  # nothing but the checksum is wrong
    assert isinstance(repaired.refused, ChecksumError) and repaired.trusted is None
    assert np.array_equal(repaired.image, inside.picture)
    words = fields["words"]
    for at in range(words.start, words.end, 31):
        change = inside.damaged(at, 1 << at % 8)
        assert isinstance(change.refused, ChecksumError) and isinstance(change.trusted, CorruptError)
        assert change.image.size == inside.image.size and change.data is None
    early, late = (inside.damaged(at, 1).image for at in (words.start, words.end - 1))
    assert psnr(inside.picture, early) < psnr(inside.picture, late)
    side = inside.damaged(fields["width"].start, 1)  # 91 pixels: as many latents, so it decodes
    assert side.trusted is None and side.image.size == inside.image.size
    for at, flip in ((-1, 1), (len(inside.data), 1), (5, 0), (5, 256)):
        with pytest.raises(WidgetError): inside.damaged(at, flip)


def test_refusals(lite, leveled, inside, cup):
    for codec in (Codec(load_model(ROOT / "tests" / "golden" / "mixture"), device="cpu"),):
        with pytest.raises(WidgetError, match="mean"): PictureInside(codec, cup)
    for other in (PictureInside(lite, cup.crop((0, 0, 40, 40))), PictureInside(leveled, cup)):
        with pytest.raises(WidgetError, match="equal size"): inside.changed(other=other)
    for wrong in (dict(step=-1), dict(take="means")):
        with pytest.raises(WidgetError): inside.changed(**wrong)


# ------------------------------------------------------------------------------------------------ the explorer, by code

def test_looking_keeps_together(lite, cup, tmp_path):
    cup.save(tmp_path / "cup.png")
    explorer = inside_explorer(lite, tmp_path / "cup.png")
    assert explorer.wait(60) and explorer.picture == "cup.png" and explorer.change is None and not explorer.view.busy
    inside = explorer.inside
    asked = explorer._jobs._number
    explorer.channel, explorer.place = 2, [1, 2]
    assert explorer.number == inside.number_of("latents", (2, 1, 2)) == explorer.symbol.value
    explorer.symbol.value = inside.number_of("latents", (3, 2, 4))
    assert (explorer.channel, explorer.place) == (3, [2, 4]) and all(
        maps.at == [2, 4] for maps in (explorer.photo, explorer.plain, explorer.maps, explorer.heat, explorer.loss))
    explorer.number = 5  # a hyperlatent: no place among the latents
    assert (explorer.channel, explorer.place) == (3, [2, 4])
    for box in explorer.BOXES:
        explorer.boxes.chosen = box
        assert explorer.box == box and explorer.panel.children == tuple(explorer.panels[box])
    explorer.box = "prediction"
    explorer.maps.at = [0, 5]
    assert f'class="symbol">{inside.latents.symbols[3, 0, 5]}<' in explorer.where.value
    assert f"{inside.bits['latents'][3, 0, 5]:.4f} bits" in explorer.where.value
    assert explorer._jobs._number == asked  # nothing was asked of the networks
    data, _ = explorer._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))).width == 960 and "InsideExplorer" in data["text/plain"]
    explorer.close()


def test_changes_by_code(leveled, cup, tmp_path):
    cup.save(tmp_path / "cup.png")
    explorer = inside_explorer(leveled, tmp_path / "cup.png")
    assert explorer.wait(60) and explorer.level == leveled.level_of() == explorer.slider.value
    explorer.level = 8
    assert explorer.wait(60) and explorer.inside.data == leveled.compress(cup, quality=100)
    explorer.keep.value = 1
    assert explorer.wait(60) and explorer.off == [int(c) for c in explorer.inside.by_cost[1:]]
    assert explorer._supply("changed.hfc")[1] == explorer.inside.changed(off=explorer.off).data
    assert f"{explorer.change.size:,}" in explorer.table.value and "3 of 4 channels off" in explorer.table.value
    explorer.donor = "chelsea"
    assert explorer.wait(60) and "hyperlatents of chelsea" in explorer.table.value
    explorer.flip = 3  # damage is of the file as it was
    assert explorer.wait(60) and isinstance(explorer.change.refused, ChecksumError) and explorer.file.changed == [explorer.byte, 3]
    explorer.reset()
    assert explorer.wait(60) and explorer.change is None and explorer.keep.value == 4 and explorer.view.third == b""
    assert explorer.download.names == ["file.hfc", "file.png"] and explorer.undo.disabled

    shown, gate = [], threading.Event()
    explorer.observe(lambda change: change["new"] is not None and shown.append(change["new"]), "change")
    inside = explorer.inside
    inside.changed = lambda off, *rest: (gate.wait(20), Changed(cup, len(off)))[1]
    for off in ([0], [0, 1], [0, 1, 2]): explorer.off = off
    assert explorer.view.busy and not shown
    gate.set()
    assert explorer.wait(60) and [change.size for change in shown] == [3]  # the newest question only
    inside.changed = lambda *_: 1 / 0
    explorer.off = [1]
    assert explorer.wait(60) and "ZeroDivisionError" in explorer.view.message and not explorer.view.busy

    assert not explorer.add_picture("<i>.txt", b"no picture") and "&lt;i&gt;.txt" in explorer.said.value
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(buffer, "PNG")
    explorer.reset()
    explorer.upload._receive(None, dict(id=1, name="red.png", size=len(buffer.getvalue())), [buffer.getvalue()])
    assert explorer.wait(60) and explorer.picture == "red.png" and explorer.view.size == [20, 30] and not explorer.view.message
    assert explorer.inside.y.shape[1:] == (2, 2) and max(explorer.place) < 2 and explorer.byte < len(explorer.inside.data)
    explorer.close()


def test_states_that_no_control_has(leveled, cup, tmp_path):
    cup.save(tmp_path / "cup.png")
    explorer = inside_explorer(leveled, tmp_path / "cup.png")
    assert explorer.wait(60)
    for box, name, value in (("prediction", "step", 3.0), ("prediction", "step", 0.3), ("file", "flip", 4)):
        explorer.box = box
        setattr(explorer, name, value)
        assert explorer.wait(60) and getattr(explorer, name) == value and not explorer.view.message and explorer.change is not None
        assert explorer.steps.value == 1.0 if name == "flip" else explorer.steps.value is None
        explorer.reset()
        assert explorer.wait(60)
    explorer.place, explorer.channel = [500, 500], 9999
    for box in explorer.BOXES: explorer.box = box  # the last latent there is
    assert explorer._looked_at() == tuple(n - 1 for n in explorer.inside.y.shape)
    explorer.place = [100, -4]
    assert explorer._looked_at()[2] == 0
    with pytest.raises(Exception, match="place"): explorer.place = [1]
    with pytest.raises(Exception, match="There is no donor"): explorer.donor = "nobody's"
    explorer.add_picture("tall", Image.new("RGB", (8, 3000)))
    assert explorer.wait(60) and "image/jpeg" in explorer._repr_mimebundle_()[0]
    explorer.close()


def test_large_pictures_are_reduced(lite):
    explorer = inside_explorer(lite, max_pixels=5000)
    assert explorer.wait(60) and "reduced from 600 × 400" in explorer.said.value
    assert explorer.inside.image.width * explorer.inside.image.height <= 5000
    explorer.close()


def test_what_other_front_ends_need(lite, cup):
    "VS Code and a page of saved state get all from the state: no module but anywidget's and ipywidgets' own, no address."
    from ipywidgets.embed import dependency_state

    explorer = inside_explorer(lite)
    assert explorer.wait(60)
    for box in explorer.BOXES: explorer.box = box
    state = dependency_state([explorer], drop_defaults=False)
    modules = {model["model_module"] for model in state.values()}
    assert modules == {"@jupyter-widgets/base", "@jupyter-widgets/controls", "anywidget"}
    scripts = {model["state"]["_esm"] for model in state.values() if model["model_module"] == "anywidget"}
    assert len(scripts) == 6  # of which one at least is a part of the page that is open
    for script in scripts:
        assert "export default" in script and not any(word in script for word in ("import ", "require", "http", "fetch("))
    json.dumps(state, default=lambda value: None)
    local = Path(sysconfig.get_path("data"), "share", "jupyter", "nbextensions", "anywidget", "index.js")
    assert 'define(["@jupyter-widgets/base"]' in local.read_text()  # what VS Code loads instead of asking a CDN
    explorer.close()


# ------------------------------------------------------------------------------------------------ the notebooks, as they are saved

@pytest.mark.parametrize("path", EXPLORERS, ids=lambda p: p.stem)
def test_notebook_reads_without_scripts(path):
    nb = nbformat.read(path, as_version=4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    pictures = [o.data[kind] for o in outputs for kind in ("image/png", "image/jpeg") if kind in o.data]
    assert pictures and path.stat().st_size < 400_000
    for data in pictures: assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) >= 80
    for o in outputs: assert not ("Explorer" in o.data.get("text/plain", "") and len(o.data) == 1)


@pytest.mark.parametrize("path", EXPLORERS, ids=lambda p: p.stem)
def test_first_cell_installs_what_is_missing(path, monkeypatch):
    """In Colab. Where the package is, the cell does nothing."""
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    ran = []
    monkeypatch.setattr(subprocess, "check_call", ran.append)
    exec(first, {})
    assert not ran
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hific_nb" else find(name))
    exec(first, {})
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    where = f"git+https://github.com/{settings['DEFAULT']['user']}/{settings['DEFAULT']['repo']}.git"
    assert ran[0][:4] == [sys.executable, "-m", "pip", "install"] and any(where in str(part) for part in ran[0])
    ast.parse(first)


# ------------------------------------------------------------------------------------------------ in a browser

MISSING = needs_browser("voila", "jupyterlab", "anywidget")
needs_chromium = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BOX = "document.querySelector('.hific-split-box')"
VALUES = """async ([name, k]) => {
    const url = document.querySelectorAll(name + ' img.values')[k].src;
    return [...new Uint8Array(await (await fetch(url)).arrayBuffer())];
}"""


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as opened: yield opened


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "cup.png"
    sample_photo("coffee").resize((240, 168)).save(path)
    return path


class Page(browser.Page):
    "The page of the inside."
    def settled(self, **rows):
        "Wait for an answer; rows are {row of the table: bytes}."
        for row, size in rows.items(): self.at(f".hific-table tr.hific-{row} td.bytes:text-is('{size:,}')").wait_for()
        self.page.wait_for_function(f"{BOX}?.getAttribute('aria-busy') === 'false' && document.querySelector('.hific-table td')")

    def open(self, name):
        self.at(f".hific-boxes-row button[data-name={name}]").click()
        self.check_names()

    def values(self, name, k=0) -> np.ndarray:
        "What the k-th map of a widget is made of."
        data = bytes(self.page.evaluate(VALUES, [f".hific-maps.hific-{name}", k]))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def text(self, name) -> str: return self.at(name).inner_text()

    def fits(self): assert self.page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")


def check_change(page, codec, inside, change):
    "The changed row, picture and file of the page against a change made here."
    page.settled(file=len(inside.data), changed=change.size)
    assert page.text(".hific-table tr.hific-changed td.psnr") == f"{psnr(inside.image, change.image):.3f} dB"
    assert np.array_equal(page.shown(2), change.image)
    if change.data is None: return
    name, data = page.download("changed.hfc")
    assert data == change.data and name == "cup.changed.hfc" and np.array_equal(codec.decompress(data), page.shown(2))


@needs_chromium
def test_page_by_voila(chromium, photo, tmp_path):
    """`hific explore --page inside_the_codec`: every box, and everything in it that can be broken."""
    codec, original = Codec(load_model(MODEL), device="cpu"), read_image(photo)
    inside = PictureInside(codec, original)
    with explore(tmp_path, photo, "--model", MODEL, "--page", "inside_the_codec") as (url, _):
        page = Page(chromium, url, accept_downloads=True, viewport=(1100, 1500))
        page.settled(file=len(inside.data))
        name, data = page.download("file.hfc")
        assert data == inside.data == codec.compress(original) and name == "cup.hfc"
        assert np.array_equal(page.shown(0), original) and np.array_equal(page.shown(1), inside.picture)
        assert page.text(".hific-table tr.hific-file td.psnr") == f"{psnr(original, inside.picture):.3f} dB"

        # the rate level, and the sign that is there at once
        asked = f"""() => {{
            const key = {{ key: 'ArrowRight', bubbles: true, cancelable: true }};
            document.querySelector('.hific-level .noUi-handle').dispatchEvent(new KeyboardEvent('keydown', key));
            return {BOX}.getAttribute('aria-busy');
        }}"""
        assert page.page.evaluate(asked) == "true"
        inside = PictureInside(codec, original, codec.level_of() + 1)
        page.settled(file=len(inside.data))
        assert page.download("file.hfc")[1] == inside.data

        # latents: by keys, switched off
        page.open("latents")
        order = [int(c) for c in inside.by_cost]
        page.at(f".hific-channels-box [data-channel='{order[0]}']").click()
        page.page.keyboard.press("ArrowRight")
        page.at(f".hific-channels-box [data-channel='{order[1]}'][aria-selected=true]").wait_for()
        page.at(f".hific-plain figcaption:has-text('channel {order[1]}')").wait_for()
        most = float(np.abs(inside.y[order[1]]).max())
        page.page.keyboard.press("Space")
        check_change(page, codec, inside, inside.changed(off=[order[1]]))
        colours = ("#2c5f9e", "#7ba7d0", "#f4f4f2", "#e0906f", "#a82a31")
        assert np.array_equal(page.values("plain"), value_picture(inside.y[order[1]], -most, most, colours))
        page.shot("inside-latents")
        page.at(".hific-undo").click()
        page.page.wait_for_selector(".hific-table tr.hific-changed", state="detached")

        # prediction: a place by click, a step, a swap
        page.open("prediction")
        field = page.at(".hific-prediction .field")
        where, (_, h, w) = field.bounding_box(), inside.y.shape
        page.page.mouse.click(where["x"] + where["width"] * 3.5 / w, where["y"] + where["height"] * 2.5 / h)
        c = order[1]
        page.at(f".hific-where td:text-is('{c}, 2, 3')").wait_for()
        assert page.text(".hific-where td.symbol") == str(inside.latents.symbols[c, 2, 3])
        assert page.text(".hific-where td.bits") == f"{inside.bits['latents'][c, 2, 3]:.4f} bits"
        page.at(".hific-prediction .field").focus()
        page.page.keyboard.press("ArrowDown")
        page.at(f".hific-where td:text-is('{c}, 3, 3')").wait_for()
        page.at(".hific-step button:text-is('4')").click()
        check_change(page, codec, inside, inside.changed(step=4))
        page.at(".hific-step button:has-text('1, the')").click()
        page.at(".hific-donor select").select_option("chelsea")
        from PIL import ImageOps

        other = PictureInside(codec, ImageOps.fit(sample_photo("chelsea"), original.size, Image.Resampling.LANCZOS), inside.level)
        check_change(page, codec, inside, inside.changed(other=other))
        page.shot("inside-prediction")
        page.at(".hific-undo").click()
        page.page.wait_for_selector(".hific-table tr.hific-changed", state="detached")

        # bits: the column adds up to the file
        page.open("bits")
        page.at(".hific-costs tr.sum").wait_for()
        cells = [page.text(f".hific-costs tr.hific-{kind} td.bytes") for kind in ("hyperlatents", "latents", "coder", "container")]
        assert cells == [f"{size:,.2f}" for size in inside.sizes.values()]
        assert page.text(".hific-costs tr.sum td.bytes") == f"{len(inside.data):,.2f}" == f"{sum(inside.sizes.values()):,.2f}"
        shown, bits = page.values("heat").astype(int).sum(-1), inside.bit_map("latents")  # the brighter, the dearer
        assert (np.diff(shown.ravel()[np.argsort(bits.ravel())]) >= -6).all() and shown.max() > shown.min() + 300
        page.shot("inside-bits")

        # rANS: the numbers of the stream
        page.open("rANS")
        number = inside.number_of("latents", (c, 3, 3))
        for _ in range(2):
            s = inside.trace(number)
            page.at(f".hific-coded :text('number {s.number:,} of')").wait_for()
            for name, value in (("before", s.before), ("v", s.v), ("frequency", s.frequency), ("next", s.next), ("after", s.after)):
                assert page.text(f".hific-coded .{name}").split()[0] == f"{value:,}"
            assert page.text(".hific-coded .value") == str(s.value)
            if not s.digits: assert page.text(".hific-coded .back") == f"{s.before:,}"
            page.at(".hific-next-word").click()
            number = inside.next_reader(number)
        page.shot("inside-rans")

        # the file: every byte, and a flipped bit
        page.open("file")
        page.at(".hific-bytes-box .legend button:text-is('width')").click()
        at = next(f.start for f in inside.fields() if f.name == "width")
        page.at(f".hific-bytes-box .byte.at[data-at='{at}']").wait_for()
        page.page.keyboard.press("PageUp")
        page.page.keyboard.press("Home")
        page.at(".hific-bytes-box .byte.at[data-at='0']").wait_for()
        hexes = page.page.locator(".hific-bytes-box .byte").all_inner_texts()
        assert bytes.fromhex("".join(hexes)) == inside.data[: len(hexes)] and len(hexes) == 12 * 16
        page.at(".hific-bytes-box").focus()
        for _ in range(4): page.page.keyboard.press("ArrowDown")
        page.at(".hific-fact :text('byte 64')").wait_for()
        assert f"after symbol {inside.reader_of(64):,}:" in page.text(".hific-fact")
        page.at(".hific-flip button:text-is('highest bit')").click()
        page.at(".hific-fault b:text-is('ChecksumError')").wait_for()
        check_change(page, codec, inside, inside.damaged(64, 128))
        assert page.text(".hific-bytes-box .byte.changed") == f"{inside.data[64] ^ 128:02x}"
        page.shot("inside-file")
        page.open("picture")
        page.at(".hific-loss figcaption:has-text('byte 64')").wait_for()
        page.at(".hific-undo").click()

        # uploads, and a narrow screen
        notes, mine = tmp_path / "notes.jpg", tmp_path / "mine.png"
        notes.write_text("no picture at all")
        page.page.locator(".hific-upload-box input").set_input_files(notes)
        page.at(".hific-said [role=alert]:has-text('notes.jpg')").wait_for()
        original.crop((0, 0, 100, 70)).save(mine)
        page.page.locator(".hific-upload-box input").set_input_files(mine)
        smaller = PictureInside(codec, read_image(mine), inside.level)
        page.settled(file=len(smaller.data))
        assert page.download("file.hfc") == ("mine.hfc", smaller.data)
        page.page.set_viewport_size({"width": 390, "height": 1600})
        for name in ("latents", "prediction", "rANS", "file"):
            page.open(name)
            page.page.wait_for_timeout(150)
            page.fits()
            page.shot(f"inside-phone-{name}")
        page.check()


@needs_chromium
def test_page_by_jupyterlab(chromium, photo, tmp_path):
    """The notebook, opened and run; the keys of the page are not the notebook's."""
    codec, original = Codec(load_model(MODEL), device="cpu"), read_image(photo)
    inside = PictureInside(codec, original)
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(NOTEBOOK, root / "inside.ipynb")
    with jupyterlab(root, tmp_path, HIFIC_EXPLORE_MODEL=str(MODEL), HIFIC_EXPLORE_PICTURE=str(photo)) as url:
        page = Page(chromium, url + "/lab/workspaces/t/tree/inside.ipynb?reset", accept_downloads=True, has_touch=True)
        wait_for_kernel(page.page)
        page.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.settled(file=len(inside.data))
        assert page.download("file.hfc")[1] == inside.data and np.array_equal(page.shown(1), inside.picture)
        cells = page.page.locator(".jp-Cell").count()
        page.open("latents")
        first = int(inside.by_cost[0])
        page.at(f".hific-channels-box [data-channel='{first}']").click()
        for key in ("d", "d", "a", "b", "Space"): page.page.keyboard.press(key)
        check_change(page, codec, inside, inside.changed(off=[first]))
        page.open("prediction")
        field = page.at(".hific-prediction .field")
        field.scroll_into_view_if_needed()
        where, (_, h, w) = field.bounding_box(), inside.y.shape
        page.page.touchscreen.tap(where["x"] + where["width"] * 1.5 / w, where["y"] + where["height"] * 1.5 / h)
        page.at(f".hific-where td:text-is('{first}, 1, 1')").wait_for()
        page.open("file")
        page.at(".hific-bytes-box").focus()
        for key in ("Home", "ArrowRight", "x", "d", "d", "ArrowDown"): page.page.keyboard.press(key)
        page.at(".hific-bytes-box .byte.at[data-at='17']").wait_for()
        assert page.page.locator(".jp-Cell").count() == cells
        notes = tmp_path / "notes.jpg"
        notes.write_text("no picture at all")
        page.page.locator(".hific-upload-box input").set_input_files(notes)
        page.at(".hific-said [role=alert]:has-text('notes.jpg')").wait_for()
        page.shot("inside-jupyterlab")
        page.check()
