"""Folders at speed: the same bytes as one by one, nothing twice, nothing half, nothing lost."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import tiny_model

from hific_nb.bulk import (MANIFEST, BulkError, BulkSettings, Item, Manifest, Worker, encode_batch, plan, rows_by_processes,
                           run_bulk)
from hific_nb.cli import run_job
from hific_nb.codec import Codec, CodecError
from hific_nb.config import HificError
from hific_nb.data import find_images, sample_photo
from hific_nb.zoo import save_pretrained

HIFIC = [sys.executable, "-c", "import sys; from hific_nb.cli import main; sys.exit(main())"]
CPU = BulkSettings(device="cpu")


def table(folder) -> dict:
    with open(Path(folder) / MANIFEST, encoding="utf-8", newline="") as f: return {row["file"]: row for row in csv.DictReader(f)}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sea" / "side").mkdir(parents=True)
    sample_photo("coffee").resize((120, 80)).save(folder / "a.png")
    sample_photo("coffee").resize((120, 80)).save(folder / "a.jpg")
    sample_photo("chelsea").resize((97, 61)).save(folder / "sea" / "b.PNG")
    sample_photo("chelsea").resize((120, 80)).convert("RGBA").save(folder / "sea" / "side" / "c.webp", lossless=True)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:600])
    return folder


@pytest.fixture(scope="module")
def codec(): return Codec.from_pretrained("hific-lite", device="cpu")


def test_the_same_files_as_one_by_one(photos, tmp_path, codec):
    here = run_bulk(photos, tmp_path / "here", CPU)
    processes = run_bulk(photos, tmp_path / "processes", CPU, workers=2)
    assert (here.done, here.failed, processes.done, processes.failed) == (4, 1, 4, 1)
    names = sorted(p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*") if p.is_file())
    assert names == ["a.jpg.hfc", "a.png.hfc", "manifest.csv", "sea/b.hfc", "sea/side/c.hfc"]
    for folder in ("here", "processes"):
        for name, row in table(tmp_path / folder).items():
            if name == "broken.jpg": assert "whole copy" in row["error"] and not row["bytes"]
            else:
                data = Path(row["output"]).read_bytes()
                assert data == codec.compress(photos / name) and int(row["bytes"]) == len(data) and not row["error"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"))])
def test_a_batch_has_the_symbols_of_one_by_one(device):
    codec = Codec.from_pretrained("hific-lite", device=device)
    pictures = [sample_photo(name).resize((130, 70)).convert(mode) for name in ("coffee", "chelsea") for mode in ("RGB", "RGBA")]
    batch = encode_batch(codec, pictures)
    if batch is None: assert False in codec._exact_batches.values()  # rounding differs, so that there are no batches
    else: assert [codec.encode(latents) for latents in batch] == [codec.compress(picture) for picture in pictures]
    with pytest.raises(CodecError): encode_batch(codec, [pictures[0], pictures[0].resize((64, 64))])


def test_a_batch_that_rounds_differently_is_not_used(codec, monkeypatch):
    analysis = codec.model.analysis
    monkeypatch.setattr(codec.model, "analysis", lambda x: analysis(x) * (1.5 if len(x) > 1 else 1))
    codec._exact_batches.clear()
    assert encode_batch(codec, [sample_photo("coffee").resize((64, 64))] * 2) is None
    codec._exact_batches.clear()


def test_worker_with_batches_and_threads(photos, tmp_path, codec):
    items = plan(photos, find_images(photos), tmp_path / "out", ".hfc")
    rows = list(Worker(CPU, threads=3, batch=3, ahead=5).rows(items))
    assert [row["file"] for row in rows] == [item.file for item in items]
    for item, row in zip(items, rows):
        if item.file != "broken.jpg": assert Path(item.target).read_bytes() == codec.compress(item.source), row


def test_what_is_done_is_verified(photos, tmp_path):
    out = tmp_path / "out"
    run_bulk(photos, out, CPU)
    assert (again := run_bulk(photos, out, CPU)).skipped == 4 and again.done == 0 and again.failed == 1
    stamp = (out / "sea" / "b.hfc").stat().st_mtime_ns
    (out / "a.png.hfc").unlink()                                          # lost
    (out / "a.jpg.hfc").write_bytes(b"damaged")                           # not what was written
    sample_photo("coffee").resize((97, 61)).save(photos / "sea" / "side" / "c.webp")  # another photo now
    result, rows = run_bulk(photos, out, CPU), table(out)
    assert (result.done, result.skipped, result.failed) == (2, 1, 2)
    assert "exists" in rows["a.jpg"]["error"] and (out / "a.jpg.hfc").read_bytes() == b"damaged"
    assert rows["sea/side/c.webp"]["width"] == "97" and (out / "sea" / "b.hfc").stat().st_mtime_ns == stamp
    assert run_bulk(photos, out, BulkSettings(device="cpu", tile=64)).failed == 5   # other settings want --force
    assert (forced := run_bulk(photos, out, BulkSettings(device="cpu", tile=64, force=True))).done == 4 and forced.failed == 1
    (out / MANIFEST).unlink()                                             # no rows: made again, and recognised
    assert (unknown := run_bulk(photos, out, BulkSettings(device="cpu", tile=64))).done == 4 and unknown.failed == 1


def test_metrics_and_back(photos, tmp_path, codec):
    out = tmp_path / "out"
    run_bulk(photos, out, CPU)
    assert run_bulk(photos, out, BulkSettings(device="cpu", metrics=True)).done == 4  # what was not measured before
    rows = table(out)
    assert all(20 < float(rows[name]["psnr"]) < 40 and 0 < float(rows[name]["bpp"]) < 8 for name in rows if name != "broken.jpg")
    back = BulkSettings("decompress", model=None, device="cpu")
    assert run_bulk(out, tmp_path / "back", back).done == 4 and run_bulk(out, tmp_path / "back", back).skipped == 4
    with Image.open(tmp_path / "back" / "sea" / "side" / "c.png") as image:
        assert image.tobytes() == codec.decompress(out / "sea" / "side" / "c.hfc").tobytes()


def test_an_original_is_not_taken_for_a_result(photos, capsys):
    from hific_nb.cli import main

    original = (photos / "sea" / "b.PNG").rename(photos / "sea" / "b.png").read_bytes()
    (photos / "broken.jpg").unlink()
    assert main(["compress", str(photos), "--device", "cpu"]) == 0
    assert main(["decompress", str(photos), "--device", "cpu"]) == 1
    assert (photos / "sea" / "b.png").read_bytes() == original and "--force" in capsys.readouterr().err


def test_killed_and_gone_on(tmp_path):
    "kill -9 of the run in the middle: every file that is there is whole, and the same command does the rest alone."
    many, out = tmp_path / "many", tmp_path / "out"
    many.mkdir()
    for i in range(60): sample_photo("coffee").resize((160 + i, 100)).save(many / f"{i:02}.jpg")
    process = subprocess.Popen([*HIFIC, "compress", many, "--out", out, "--device", "cpu", "--workers", "2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.hfc"))) < 8 and time.monotonic() < deadline: time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with_row = Manifest(out).known
    found = sorted(out.glob("*.hfc"))
    assert 8 <= len(found) < 60, "killed too late or never started"
    codec = Codec.from_pretrained("hific-lite", device="cpu")
    for path in found[:4]: codec.decode_latents(path)
    (out / ".01.hfc.abc123.tmp").write_bytes(b"half")  # what a write leaves that is killed
    result = run_bulk(many, out, CPU)
    assert result.skipped >= len(with_row) >= 4 and result.done + result.skipped == 60 and result.failed == 0
    assert sorted(p.name for p in out.iterdir()) == [*(f"{i:02}.hfc" for i in range(60)), MANIFEST]
    assert len(table(out)) == 60 and all(not row["error"] for row in table(out).values())


def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(24): sample_photo("coffee").resize((200 + i, 150)).save(many / f"{i:02}.png")
    items = plan(many, find_images(many), tmp_path / "out", ".hfc")
    rows, killed = [], []
    for row in rows_by_processes(items, CPU, 2):
        rows.append(row)
        if len(rows) == 4 and not killed: killed = [kill_one_child()]
    assert killed and sorted(row["file"] for row in rows) == [item.file for item in items]
    assert not any(row.get("error") for row in rows) and len(list((tmp_path / "out").glob("*.hfc"))) == 24


def kill_one_child() -> int:
    "SIGKILL to a worker process of this process."
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid() \
                    and b"hific_nb.bulk" in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                return int(entry.name)
        except OSError: continue
    raise AssertionError("no worker process found")


def test_a_worker_killed_before_it_begins_loses_nothing(photos, tmp_path, monkeypatch):
    first = tmp_path / "first"
    in_workers(monkeypatch, tmp_path, f"import os, signal\ntry: os.close(os.open({str(first)!r}, os.O_CREAT | os.O_EXCL))\n"
                                      "except FileExistsError: pass\nelse: os.kill(os.getpid(), signal.SIGKILL)\n")
    result = run_bulk(photos, tmp_path / "out", CPU, workers=2)
    assert first.exists() and (result.done, result.failed) == (4, 1)  # the broken one


def in_workers(monkeypatch, tmp_path, code: str) -> None:
    "Lets worker processes run this code as they start."
    folder = tmp_path / "site"
    folder.mkdir()
    body = "".join(f"    {line}\n" for line in code.splitlines())
    (folder / "sitecustomize.py").write_text(f"import sys\nif any('hific_nb.bulk' in a for a in sys.orig_argv):\n{body}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))


def test_a_picture_that_kills_its_worker_is_given_up(tmp_path, monkeypatch):
    "A worker that dies on one picture, again and again: this one gets an error, the others are done."
    in_workers(monkeypatch, tmp_path,
               "import builtins, os\nreal = builtins.open\ndef deadly(file, *a, **k):\n"
               "    if str(file).endswith('poison.png'): os._exit(9)\n    return real(file, *a, **k)\nbuiltins.open = deadly\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b", "poison", "q", "r"): sample_photo("coffee").resize((64, 64)).save(photos / f"{name}.png")
    result = run_bulk(photos, tmp_path / "out", CPU, workers=2)
    assert (result.done, result.failed) == (4, 1) and "died" in table(tmp_path / "out")["poison.png"]["error"]


def test_settings_reach_workers_whatever_they_are_made_of(photos, tmp_path):
    model = tmp_path / "zoo" / "tiny"
    save_pretrained(tiny_model(levels=True), model)
    plain = run_bulk(photos, tmp_path / "a", BulkSettings(model=str(model), device="cpu", rate=dict(quality=25)), workers=2)
    other = run_bulk(photos, tmp_path / "b", BulkSettings(model=model, device="cpu", rate=dict(quality=np.int64(25))), workers=2)
    assert plain.done == other.done > 3
    assert [p.read_bytes() for p in sorted((tmp_path / "a").rglob("*.hfc"))] == [
        p.read_bytes() for p in sorted((tmp_path / "b").rglob("*.hfc"))]


def test_a_run_that_cannot_start_says_why(photos, tmp_path, monkeypatch):
    with pytest.raises(BulkError, match="no model 'hific-large'"):
        run_bulk(photos, tmp_path / "x", BulkSettings(model="hific-large", device="cpu"), workers=2)
    assert not (tmp_path / "x").exists()
    (photos / MANIFEST).write_text("guest,table\n")  # somebody's
    with pytest.raises(BulkError, match="no manifest of ours"): run_bulk(photos, None, CPU)
    assert (photos / MANIFEST).read_text() == "guest,table\n" and not list(photos.rglob("*.hfc"))
    with pytest.raises(BulkError, match="engine"): run_bulk(photos, tmp_path / "x", CPU, engine="spark")
    with pytest.raises(BulkError, match="action"): BulkSettings("shrink")
    with pytest.raises(BulkError, match="Name the model"): BulkSettings(model=None)
    with pytest.raises(BulkError, match="multiple of 64"): BulkSettings(tile=64 * 70000)
    with pytest.raises(BulkError, match="0 or more"): run_bulk(photos, tmp_path / "x", CPU, workers=-1)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(BulkError, match=r"pip install 'hific_nb\[cluster\]'"): run_bulk(photos, tmp_path / "x", CPU, engine="ray")


def test_memory_store_and_manifest_parts(photos, tmp_path, monkeypatch):
    "Photos and results behind addresses: rows lie in parts until the end, and a run that ends before goes on from them."
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for path in photos.rglob("*.*"):
        if path.is_file(): store.pipe_file(f"/bulk/in/{path.relative_to(photos).as_posix()}", path.read_bytes())
    monkeypatch.setattr("hific_nb.bulk._PART_SECONDS", 0.0)

    def stop(row, k, n):
        if k == 3: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): run_bulk("memory://bulk/in", "memory://bulk/out", CPU, on_row=stop)
    assert store.ls("/bulk/out/manifest.parts") and not store.exists("/bulk/out/manifest.csv")
    result = run_bulk("memory://bulk/in", "memory://bulk/out", CPU)
    assert result.skipped >= 2 and result.done + result.skipped == 4 and not store.find("/bulk/out/manifest.parts")
    rows = list(csv.DictReader(store.cat_file("/bulk/out/manifest.csv").decode().splitlines()))
    assert [row["file"] for row in rows] == ["a.jpg", "a.png", "broken.jpg", "sea/b.PNG", "sea/side/c.webp"]
    store.rm("/bulk", recursive=True)


def test_large_pictures_go_alone_and_queues_are_bounded(photos, tmp_path, monkeypatch, codec):
    monkeypatch.setattr("hific_nb.bulk.LARGE", 6000)
    worker = Worker(CPU, threads=2, batch=4, ahead=2)
    given = []

    def items():
        for item in plan(photos, find_images(photos), tmp_path / "out", ".hfc"):
            given.append(item.file)
            yield item

    for k, row in enumerate(worker.rows(items()), 1):
        assert len(given) - k <= 2 + 2 + 4, "no more is read ahead than asked for"
        if not row.get("error"): assert Path(row["output"]).read_bytes() == codec.compress(photos / row["file"])


def test_manifest_survives_a_torn_line(tmp_path):
    manifest = Manifest(tmp_path)
    for name in ("b, with \"quotes\"", "a"): manifest.add(dict(file=name, bytes=1))
    with open(manifest.path, "a") as f: f.write("torn,12")
    assert sorted(Manifest(tmp_path).known) == ["a", "b, with \"quotes\""]
    assert Item.from_json(Item("a", "b", "c", {"file": "a"}).to_json()).known == {"file": "a"}


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_compares_the_same_files(photos, tmp_path, capsys):
    for extra in ("broken.jpg", "a.jpg"): (photos / extra).unlink()
    result = benchmark("bulk").main(["--photos", str(photos), "--device", "cpu", "--repeat", "6", "--workers", "2"])
    assert result["same_bytes"] and result["ratio"] > 0 and "files/s" in capsys.readouterr().out


def test_the_gpu_benchmark_runs_here_too(capsys):
    gpu = benchmark("gpu")
    result = gpu.main(["--device", "cpu", "--megapixels", "0.02", "--repeat", "1"])
    assert result["symbols_that_differ"] == 0 and 0 < result["sizes"][0.02]["share_of_peak"] < 3
    if not torch.cuda.is_available(): assert gpu.main([]) is None and "No GPU here" in capsys.readouterr().out


def test_the_job(photos, tmp_path):
    run = tmp_path / "run"
    run_job("compress_cluster", run, dict(input=str(photos), engine="local", device="cpu"))
    assert json.loads((run / "summary.json").read_text())["failed"] == 1 and table(run / "files")["broken.jpg"]["error"]
    executed = (run / "compress_cluster.ipynb").read_text()
    assert "4 done" in executed and "broken.jpg" in executed
    with pytest.raises(HificError, match="Unknown parameter"): run_job("compress_cluster", run, dict(inputs="x"))
