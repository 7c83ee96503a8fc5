"""Fetching lists of addresses into shards, from a server on loopback that misbehaves as servers do."""

import base64
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
import webserver

from hific_nb import data
from hific_nb.config import HificError
from hific_nb.data import ImageError, ShardCrops, fetch_photos, find_images, open_dataset, read_photo_list, sample_photo

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(backoff=0.01, min_side=48)
web = webserver.web  # the fixture


def jpeg(number, size=(64, 48)):
    "A photo like no other of these."
    buffer = io.BytesIO()
    sample_photo("coffee").resize(size, box=(number % 400, number % 250, number % 400 + 200, number % 250 + 150)).save(
        buffer, "JPEG", quality=90)
    return buffer.getvalue()


def text_list(path, urls):
    path.write_text("# a list\n\n" + "".join(f"{url}\n" for url in urls))
    return path


def members(shard):
    with tarfile.open(shard) as tar: return {m.name: tar.extractfile(m).read() for m in tar}


def files(run): return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}


# ------------------------------------------------------------------------------------------------ lists

def test_lists(tmp_path):
    digest = "ab" * 32
    path = tmp_path / "list.txt"
    path.write_text(f"\ufeffhttps://host/a,b.jpg#part  # the first\n\n  http://host/c {digest.upper()}\n#http://host/d\n")
    first, second = read_photo_list(path)
    assert (first.url, first.name, first.digest) == ("https://host/a,b.jpg#part", "00000000", "")
    assert (second.index, second.url, second.digest) == (1, "http://host/c", f"sha256:{digest}")
    for line in ("ftp://host/a", "photo.jpg", "http://host/a 123", f"http://host/a {digest} x"):
        path.write_text(f"http://host/0\n{line}\n")
        with pytest.raises(ImageError, match="line 2"): list(read_photo_list(path))
    table = tmp_path / "images.csv"
    md5 = base64.b64encode(hashlib.md5(b"x").digest()).decode()
    rows = [dict(ImageID="0a/..b", Subset="train", OriginalURL="https://host/1.jpg", License="by/2.0", Author="Ä, B",
                 OriginalMD5=md5, Thumbnail300KURL="https://host/t1.jpg"),
            dict(ImageID="", Subset="train", OriginalURL="https://host/2.jpg", License="", Author="", OriginalMD5="",
                 Thumbnail300KURL="")]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    one, two = read_photo_list(table)
    assert one.digest == "md5:" + hashlib.md5(b"x").hexdigest() and (one.license, one.author) == ("by/2.0", "Ä, B")
    assert one.name == "0a___b" and two.name == "00000001" and two.digest == ""  # a name cannot lead out of its folder
    with pytest.raises(ImageError, match="line 3: ''"): list(read_photo_list(table, "Thumbnail300KURL"))
    with pytest.raises(ImageError, match="no column URL: name one of ImageID"): list(read_photo_list(table, "URL"))
    with pytest.raises(ImageError, match="cannot be read"): list(read_photo_list(tmp_path / "gone.csv"))
    kodak = list(read_photo_list("kodak"))
    assert kodak[23].url == "http://r0k.us/graphics/kodak/kodak/kodim24.png" and len({p.digest for p in kodak}) == 24


def test_the_sums_of_kodak(shared):
    for photo in read_photo_list("kodak"):
        file = shared / "data" / "kodak" / f"{photo.name}.png"
        assert photo.digest == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ what becomes of each

def test_every_photo_or_a_reason(web, tmp_path):
    shelf, address = web
    for i in range(8): shelf[f"/{i}.jpg"] = jpeg(i)
    shelf |= {"/busy/a.jpg": jpeg(20), "/torn/b.jpg": jpeg(21), "/cut.jpg": jpeg(22)[:900], "/page.html": b"<html>moved</html>",
              "/mute/c.jpg": b"x", "/long.jpg": jpeg(23) + bytes(200_000), "/small.jpg": jpeg(24, (64, 30))}
    white = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(white, "PNG")
    shelf["/white.png"] = white.getvalue()
    paths = [*(f"/{i}.jpg" for i in range(4)), "/busy/a.jpg", "/gone.jpg", "/cut.jpg", "/torn/b.jpg", "/mute/c.jpg", "/page.html",
             "/white.png", "/long.jpg", "/small.jpg", *(f"/{i}.jpg" for i in range(4, 8))]
    told = []

    def progress(counts):
        assert threading.current_thread() is threading.main_thread()
        told.append(counts)

    counts = fetch_photos(text_list(tmp_path / "l", (address + p for p in paths)), tmp_path / "run", photos_per_shard=6, workers=4,
                          retries=2, timeout=0.3, max_mb=0.1, progress=progress, **QUICK)
    good = [p for p in paths if p[1:2].isdigit() or p in ("/busy/a.jpg", "/torn/b.jpg")]
    assert counts == dict(done=17, total=17, photos=10, failed=5, dropped=2, bytes=sum(len(shelf[p]) for p in good), shards=3,
                          why_dropped={"flat": 1, "small": 1})
    assert told[-1]["done"] == 17 and all(a["done"] <= b["done"] for a, b in zip(told, told[1:], strict=False))
    packed = {}
    for k in range(3): packed |= members(tmp_path / "run" / f"photos-{k:06}.tar")
    assert packed == {f"{paths.index(p):08}.jpg": shelf[p] for p in good}  # the bytes that were served
    with open(tmp_path / "run" / "manifest.csv", newline="") as file: rows = list(csv.DictReader(file))
    assert [r["url"] for r in rows] == [address + p for p in good] and {r["shard"] for r in rows} == {
        f"photos-{k:06}.tar" for k in range(3)}
    assert all(hashlib.sha256(packed[r["file"]]).hexdigest() == r["sha256"] for r in rows)
    assert {(r["width"], r["height"]) for r in rows} == {("64", "48")}
    failed = dict(line.split("  # ") for line in (tmp_path / "run" / "failed.txt").read_text().splitlines())
    assert {url.removeprefix(address) for url in failed} == {"/gone.jpg", "/cut.jpg", "/mute/c.jpg", "/page.html", "/long.jpg"}
    for path, why in (("/gone.jpg", "HTTP 404"), ("/cut.jpg", "truncated"), ("/mute/c.jpg", "in 3 tries"),
                      ("/page.html", "not an image"), ("/long.jpg", "longer than 0.1 MB")): assert why in failed[address + path]
    assert [p.url for p in read_photo_list(tmp_path / "run" / "failed.txt")] == list(failed)  # a list to try again
    asked = {"/busy/a.jpg": 2, "/torn/b.jpg": 2, "/mute/c.jpg": 3}
    assert all(shelf.asked[p] == asked.get(p, 1) for p in paths)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "fetch.json", "manifest.csv", "failed.txt", *(
        f"photos-{k:06}.{kind}" for k in range(3) for kind in ("tar", "json"))}


def test_open_images_table(web, tmp_path):
    shelf, address = web
    lines = ["ImageID,Subset,OriginalURL,License,Author,OriginalMD5"]
    for i in range(3):
        shelf[f"/{i}.jpg"] = jpeg(i)
        md5 = base64.b64encode(hashlib.md5(jpeg(i if i < 2 else 99)).digest()).decode()
        lines.append(f"id{i},train,{address}/{i}.jpg,by/2.0,Somebody,{md5}")
    shelf["/lists/train.csv"] = "\n".join(lines).encode()
    run = tmp_path / "run"
    counts = fetch_photos(address + "/lists/train.csv", run, **QUICK)
    assert (counts["photos"], counts["failed"]) == (2, 1) and "checksum" in (run / "failed.txt").read_text()
    assert set(members(run / "photos-000000.tar")) == {"id0.jpg", "id1.jpg"}
    assert "by/2.0,Somebody" in (run / "manifest.csv").read_text()
    del shelf["/lists/train.csv"]
    assert fetch_photos(address + "/lists/train.csv", run, **QUICK) == counts  # the list is kept with the photos


def test_shrinking_as_l3c_does(web, tmp_path):
    shelf, address = web
    for name, size in (("a", (200, 150)), ("b", (110, 160)), ("c", (118, 90))):
        shelf[f"/{name}.jpg"] = jpeg(1, size)
    urls = text_list(tmp_path / "l", (f"{address}/{name}.jpg" for name in "abc"))
    for quality, kind in ((90, "JPEG"), (0, "PNG")):
        run = tmp_path / kind
        counts = fetch_photos(urls, run, longer_side=96, quality=quality, **QUICK)
        found = [Image.open(io.BytesIO(b)) for b in members(run / "photos-000000.tar").values()]
        assert [i.size for i in found] == [(96, 72), (66, 96)] and {i.format for i in found} == {kind}
        assert counts["why_dropped"] == {"small": 1}  # 118 / 96 is less than 1.25
    want = data.read_image(shelf["/a.jpg"]).resize((96, 72), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(found[0]), np.asarray(want))


def test_kodak_as_files(web, tmp_path, kodak, monkeypatch):
    shelf, address = web
    for path in kodak: shelf[f"/{path.name}"] = path.read_bytes()
    shelf["/kodim07.png"] = shelf["/kodim08.png"]
    monkeypatch.setattr(data, "_KODAK", (address + "/kodim{:02}.png", data._KODAK[1][:9]))
    counts = fetch_photos("kodak", tmp_path / "run", photos_per_shard=0, drop_flat=False, **QUICK)
    assert (counts["photos"], counts["failed"], counts["shards"]) == (8, 1, 0)
    assert {p.name: p.read_bytes() for p in find_images(tmp_path / "run" / "photos")} == {
        f"kodim{i:02}.png": shelf[f"/kodim{i:02}.png"] for i in range(1, 10) if i != 7}


# ------------------------------------------------------------------------------------------------ whatever happens

def test_kill_and_go_on(web, tmp_path):
    """Killed twice, in the middle: no half shard, nothing is fetched twice but what was on its way, and the same result."""
    shelf, address = web
    for i in range(60): shelf[f"/slow/{i}.jpg"] = jpeg(i)
    shelf["/busy/slow/7.jpg"] = shelf.pop("/slow/7.jpg")
    urls = [f"{address}{'/busy' if i == 7 else ''}/slow/{i}.jpg" for i in range(60)] + [f"{address}/gone.jpg"]
    settings = dict(photos_per_shard=8, workers=2, **QUICK)
    listed, run = text_list(tmp_path / "l", urls), tmp_path / "run"
    code = f"from hific_nb.data import fetch_photos; fetch_photos({str(listed)!r}, {str(run)!r}, **{settings!r})"
    for shards, asked in ((1, 18), (4, 40)):
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 60
        while sum(shelf.asked.values()) < asked and time.monotonic() < deadline: time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        whole = sorted(run.glob("photos-*.tar"))
        assert shards <= len(whole) < 7
        for shard in whole: assert all(data.read_image(photo) for photo in members(shard).values()) and len(members(shard)) == 8
    counts = fetch_photos(listed, run, **settings)
    assert counts["photos"] == 60 and counts["failed"] == 1
    again = sum(n - 1 - ("busy" in path) for path, n in shelf.asked.items())
    assert again <= 2 * 2  # two kills, two on their way each
    before = sum(shelf.asked.values())
    assert fetch_photos(listed, run, **settings) == counts and sum(shelf.asked.values()) == before  # finished: nothing to do
    straight = tmp_path / "straight"
    fetch_photos(listed, straight, **settings)
    assert files(straight) == files(run)


def test_an_outage_stops_the_run_and_loses_no_photo(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shelf = webserver.Shelf()
    for i in range(50): shelf[f"/{i}.jpg"] = jpeg(i)
    with webserver.serving(shelf) as address: port = int(address.rsplit(":", 1)[1])
    listed = text_list(tmp_path / "l", (f"{address}/{i}.jpg" for i in range(50)))
    settings = dict(photos_per_shard=60, workers=1, retries=0, **QUICK)
    with pytest.raises(HificError, match="The last 20 photos could not be reached.*goes on from here"):
        fetch_photos(listed, tmp_path / "run", **settings)
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix == ".tar"]
    with webserver.serving(shelf, port): counts = fetch_photos(listed, tmp_path / "run", **settings)
    assert counts["photos"] == 50


def test_a_full_disk(web, tmp_path, monkeypatch):
    shelf, address = web
    for i in range(6): shelf[f"/{i}.jpg"] = jpeg(i)
    listed = text_list(tmp_path / "l", (f"{address}/{i}.jpg" for i in range(6)))
    write = Path.write_bytes

    def full(self, content):
        if self.name == "00000003": raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HificError, match="No space left on device.: make room"):
        fetch_photos(listed, tmp_path / "run", photos_per_shard=2, workers=1, **QUICK)
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert fetch_photos(listed, tmp_path / "run", photos_per_shard=2, workers=1, **QUICK)["photos"] == 6
    assert shelf.asked["/0.jpg"] == 1 and shelf.asked["/3.jpg"] == 2


def test_interrupted_from_the_keyboard(web, tmp_path):
    shelf, address = web
    for i in range(30): shelf[f"/slow/{i}.jpg"] = jpeg(i)
    shelf["/endless/x.jpg"] = b""
    listed = text_list(tmp_path / "l", [address + "/endless/x.jpg", *(f"{address}/slow/{i}.jpg" for i in range(30))])

    def progress(counts):
        if counts["done"] >= 5: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): fetch_photos(listed, tmp_path / "run", workers=3, progress=progress, **QUICK)
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]  # also the one that was receiving


def test_one_run_one_list_one_setting(web, tmp_path):
    shelf, address = web
    for i in range(10): shelf[f"/slow/{i}.jpg"] = jpeg(i)
    listed, run = text_list(tmp_path / "l", (f"{address}/slow/{i}.jpg" for i in range(10))), tmp_path / "run"
    first = threading.Thread(target=fetch_photos, args=(listed, run), kwargs=dict(limit=5, photos_per_shard=4, workers=1, **QUICK))
    first.start()
    while not shelf.asked: time.sleep(0.005)
    with pytest.raises(HificError, match="Another run"): fetch_photos(listed, run, photos_per_shard=4, **QUICK)
    first.join()
    assert len(members(run / "photos-000001.tar")) == 1
    more = fetch_photos(listed, run, limit=9, photos_per_shard=4, **QUICK)  # a limit may be raised
    assert more["photos"] == 9 and [len(members(s)) for s in sorted(run.glob("*.tar"))] == [4, 4, 1]
    assert shelf.asked["/slow/0.jpg"] == 1
    before = files(run)
    for other in (dict(photos_per_shard=5), dict(photos_per_shard=4, longer_side=9)):
        with pytest.raises(HificError, match="other settings"): fetch_photos(listed, run, **(QUICK | other))
    text_list(listed, [f"{address}/slow/1.jpg"])
    with pytest.raises(HificError, match="another list"): fetch_photos(listed, run, photos_per_shard=4, **QUICK)
    assert files(run) == before


def stored(run):
    if (run / "photos").is_dir(): return {p.name: p.read_bytes() for p in (run / "photos").iterdir()}
    return {name: data for shard in sorted(run.glob("*.tar")) for name, data in members(shard).items()}


@pytest.mark.parametrize("per_shard", [0, 1000])
def test_a_limit_adds_and_takes_nothing_away(web, tmp_path, per_shard):
    shelf, address = web
    for i in range(6): shelf[f"/{i}.jpg"] = jpeg(i)
    listed, run = text_list(tmp_path / "l", [*(f"{address}/{i}.jpg" for i in range(6)), f"{address}/0.jpg"]), tmp_path / "run"
    def fetch(limit): return fetch_photos(listed, run, limit=limit, photos_per_shard=per_shard, **QUICK)
    assert [fetch(limit)["photos"] for limit in (3, 5, 2)] == [3, 5, 5]
    assert all(shelf.asked[f"/{i}.jpg"] == 1 for i in range(5)) and len(stored(run)) == 5
    assert fetch(0)["photos"] == len(stored(run)) == 7 and shelf.asked["/0.jpg"] == 2 and shelf.asked["/1.jpg"] == 1
    afresh = tmp_path / "afresh"
    fetch_photos(listed, afresh, photos_per_shard=per_shard, **QUICK)
    assert stored(run) == stored(afresh) and (run / "manifest.csv").read_bytes() == (afresh / "manifest.csv").read_bytes()


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("per_shard", [0, 1000])
def test_a_lost_record_or_photo_costs_no_others(web, tmp_path, per_shard, limit):
    shelf, address = web
    for i in range(8): shelf[f"/{i}.jpg"] = jpeg(i)
    listed, run = text_list(tmp_path / "l", (f"{address}/{i}.jpg" for i in range(8))), tmp_path / "run"
    def fetch(limit): return fetch_photos(listed, run, limit=limit, photos_per_shard=per_shard, **QUICK)
    fetch(0)
    before, table = stored(run), (run / "manifest.csv").read_bytes()
    del shelf["/1.jpg"], shelf["/5.jpg"]  # no longer to be had
    (run / "photos-000000.json").write_text("")
    assert fetch(limit)["photos"] == 8 and stored(run) == before and (run / "manifest.csv").read_bytes() == table
    if per_shard:
        shard = run / "photos-000000.tar"
        with tarfile.open(shard) as tar: last = tar.getmembers()[7]
        shard.write_bytes(shard.read_bytes()[: last.offset_data + 100])
    else: (run / "photos" / "00000007.jpg").unlink()
    assert fetch(limit)["photos"] == 8 and stored(run) == before and (run / "manifest.csv").read_bytes() == table
    assert shelf.asked["/7.jpg"] == 2 and shelf.asked["/1.jpg"] == 1


@pytest.mark.parametrize("per_shard", [0, 4])
def test_what_is_gone_is_fetched_again(web, tmp_path, per_shard):
    shelf, address = web
    for i in range(8): shelf[f"/{i}.jpg"] = jpeg(i)
    listed, run = text_list(tmp_path / "l", (f"{address}/{i}.jpg" for i in range(8))), tmp_path / "run"
    def fetch(): return fetch_photos(listed, run, photos_per_shard=per_shard, **QUICK)
    counts, before = fetch(), stored(run)
    if per_shard:
        shard = run / "photos-000000.tar"
        with tarfile.open(shard) as tar: third = tar.getmembers()[2]
        shard.write_bytes(shard.read_bytes()[: third.offset_data + 100])  # cut off within the third
    else:
        (run / "photos" / "00000002.jpg").unlink()
        (run / "photos" / "00000003.jpg").write_bytes(b"half")
    assert fetch() == counts and stored(run) == before
    assert [shelf.asked[f"/{i}.jpg"] for i in range(8)] == [1, 1, 2, 2, 1, 1, 1, 1]
    (run / "photos-000000.json").write_text('{"lines": 2, "pho')
    assert fetch() == counts and stored(run) == before and sum(shelf.asked.values()) == 10  # nothing was asked for
    (run / "fetch.json").write_text('{"li')
    with pytest.raises(HificError, match="fetch.json is damaged: delete it"): fetch()
    (run / "fetch.json").unlink()
    assert fetch() == counts


@pytest.mark.parametrize("wrong", [dict(workers=0), dict(limit=-1), dict(limit="many"), dict(photos_per_shard=2.5), dict(max_mb=0),
                                   dict(quality=101), dict(drop_flat="true"), dict(retries=True), dict(min_side=0)])
def test_settings_that_cannot_be(wrong, tmp_path):
    listed = text_list(tmp_path / "l", ["http://127.0.0.1:9/"])
    with pytest.raises(ImageError) as error: fetch_photos(listed, tmp_path / "run", **wrong)
    assert next(iter(wrong)) in str(error.value) and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the job, and what it is for

def test_job_then_training_set(web, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import papermill
    shelf, address = web
    for i in range(12): shelf[f"/{i}.jpg"] = jpeg(i)
    shelf["/cut.jpg"] = jpeg(12)[:900]
    shelf["/list.txt"] = "".join(f"{address}/{name}.jpg\n" for name in [*range(12), "cut", "gone"]).encode()
    run = tmp_path / "run"
    run.mkdir()
    settings = dict(source=address + "/list.txt", run=str(run), photos_per_shard=5, min_side=48, backoff=0.01)
    papermill.execute_notebook(ROOT / "nbs" / "jobs" / "fetch.ipynb", run / "fetch.ipynb", settings, kernel_name="python3",
                               progress_bar=False, cwd=tmp_path)
    report = json.loads((run / "metrics.json").read_text())
    assert (report["photos"], report["failed"], report["shards"], report["dataset"]) == (12, 2, 3, str(run))
    shown = [str(o) for cell in json.loads((run / "fetch.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    assert any("14 of 14: 12 photos" in o for o in shown)  # the line ends at its final state
    assert any("failed: it cannot be had | 1" in o and f"-p dataset {run}" in o for o in shown)
    assert any("image/png" in o for o in shown)
    crops = open_dataset(run, 48, 4, held_back_every=0)
    assert isinstance(crops, ShardCrops) and crops.batch(0).shape == (4, 3, 48, 48) and not crops.broken
    for path in run.glob("*.tar"): shelf[f"/shards/{path.name}"] = path.read_bytes()
    far = open_dataset(address + "/shards/photos-{000000..000002}.tar", 48, 4, held_back_every=0, cache=tmp_path / "cache")
    assert all((far.batch(step) == crops.batch(step)).all() for step in range(6))  # served by any server, the same set
