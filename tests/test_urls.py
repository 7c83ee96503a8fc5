"""Addresses wherever a path goes: in memory, behind web servers with and without ranges, and what local paths never import."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from hific_nb import config
from hific_nb.cli import main, run_job
from hific_nb.codec import Codec
from hific_nb.config import (HificError, file_size, find_urls, is_url, join_path, local_or_url, open_file, path_name, read_file,
                             write_atomic)
from hific_nb.data import (ImageError, PhotoCrops, ShardCrops, fetch_photos, find_images, find_shards, holdout_split, open_dataset,
                           read_image, read_photo_list, sample_photo, shard_members, write_shard)
from hific_nb.evaluation import EvaluationError, evaluate
from hific_nb.hfc import HfcError, HfcFile, HfcReader, Tile, pack, read_hfc, write_hfc
from hific_nb.model import load_model
from hific_nb.zoo import UnknownModelError, find_model, load_pretrained

GOLDEN = Path(__file__).resolve().parent / "golden"
aiohttp = pytest.importorskip("aiohttp", reason="http needs: pip install '.[urls]'")


@pytest.fixture
def memory():
    "fsspec's memory, empty before and after."
    store = fsspec.filesystem("memory")
    def clear():
        store.store.clear()
        store.pseudo_dirs[:] = [""]
    clear()
    yield store
    clear()


class Handler(BaseHTTPRequestHandler):
    """The files of `server.files` (path -> bytes), pages of links for what ends with a slash, and notes of what was sent."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        server, path = self.server, self.path.split("?")[0]
        data, status, headers = server.files.get(path), 200, {}
        if path.startswith("/down/"): return self.send_error(503)
        if path.startswith("/secret/"): return self.send_error(403)
        if data is None and path.endswith("/"):
            below = [p[len(path):] for p in server.files if p.startswith(path)]
            names = sorted({path + p.split("/")[0] + "/" * ("/" in p) for p in below})
            if names: data = "".join(f'<a href="{n}">{n}</a>' for n in ["/", "/elsewhere/", f"{path}?C=N;O=D", *names]).encode()
        if data is None: return self.send_error(404)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if server.ranges: headers["Accept-Ranges"] = "bytes"
        if found and server.ranges:
            start, end = int(found[1]), int(found[2])
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start:end + 1], 206
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            server.sent.append((path, len(data)))
            self.wfile.write(data)
        return None

    def log_message(self, *args): pass


@pytest.fixture(params=["ranges", "no ranges"])
def web(request, monkeypatch):
    "(server with .files, .sent and .ranges, its address)"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.files, server.sent, server.ranges = True, {}, [], request.param == "ranges"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def photo(): return sample_photo("coffee").resize((120, 90))


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ what an address is

@pytest.mark.parametrize("text", ["s3://b/x", "gs://b/x", "https://h/x.png?y=1", "memory://x", "abfs+x.y-z://b", "S3://B/x"])
def test_addresses(text):
    assert is_url(text) and local_or_url(text) == text and isinstance(local_or_url(text), str)


@pytest.mark.parametrize("path", ["x.png", "/a/b.png", "C:/x.png", "C:\\x.png", "c://x.png", "D:", "a:b", "s3:/b/x", "x/s3://b", "",
                                  "1st://b", b"s3://b/x", Path("x")])
def test_paths(path):
    assert not is_url(path)
    assert isinstance(local_or_url(path if isinstance(path, (str, Path)) else path.decode().replace("://", "")), Path)


def test_file_addresses_are_paths(tmp_path, photo):
    path = tmp_path / "a photo #1.png"
    photo.save(path)
    url = path.as_uri()
    assert "%20" in url and not is_url(url) and local_or_url(url) == path
    assert local_or_url(url.replace("file://", "file://localhost")) == path == local_or_url("FILE" + url[4:])
    assert np.array_equal(read_image(url), photo) and find_images(tmp_path.as_uri()) == [path]
    write_atomic(url, b"new")
    assert path.read_bytes() == read_file(url) == b"new" and file_size(url) == 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(HificError, match="another machine"): local_or_url("file://host/a.png")
    with pytest.raises(HificError, match="another machine"): local_or_url("file://")


def test_an_address_that_became_a_path_is_named(tmp_path, monkeypatch):
    for call in (read_image, find_images, lambda p: write_atomic(p, b"")):
        with pytest.raises(HificError, match="give it as text"): call(Path("s3://bucket/a.png"))
    monkeypatch.chdir(tmp_path)
    Path("a1:").mkdir()  # a folder may be called so
    Path("a1:/x").write_bytes(b"x")
    assert read_file(Path("a1:/x")) == b"x"


def test_local_paths_import_nothing(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    data = (GOLDEN / "17x33.hfc").read_bytes()
    (tmp_path / "a.hfc").write_bytes(data)
    said = subprocess.run([sys.executable, "-c", f"""
import sys
sys.modules["fsspec"] = None
from pathlib import Path
from hific_nb.config import HificError, open_file, write_atomic
from hific_nb.data import find_images, read_image, open_dataset
from hific_nb.hfc import read_hfc, write_hfc
folder = Path({str(tmp_path)!r})
read_image(find_images(folder)[0]); open_dataset(folder, 16, 2); write_hfc(folder/"b.hfc", read_hfc(folder/"a.hfc"))
for work in (lambda: open_file("s3://b/x"), lambda: write_atomic("memory://x", b""), lambda: read_image("https://h/x.png")):
    try: work()
    except HificError as error: print(error)
"""], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert len(lines) == 3 and all("pip install 'hific_nb[urls]'" in line for line in lines) and "s3://b/x" in lines[0]


def test_missing_packages_and_unknown_stores(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(HificError, match="gcsfs"): open_file("gs://bucket/a.png")
    with pytest.raises(ImageError, match="gcsfs"): read_image("gs://bucket/a.png")
    with pytest.raises(HificError, match="nowhere"): read_file("nowhere://a")


# ------------------------------------------------------------------------------------------------ one file

def test_a_remote_file_is_a_file(memory):
    """Any mixture of reads and seeks gives what a local file gives."""
    data = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
    memory.pipe_file("/x", data)
    rng, local = np.random.default_rng(1), io.BytesIO(data)
    with open_file("memory://x") as file:
        assert file.readable() and file.seekable() and not file.writable() and file.name == "memory://x"
        for _ in range(200):
            offset, whence, size = int(rng.integers(0, 310_000)), int(rng.integers(0, 3)), int(rng.choice([0, 1, 100, 70_000, -1]))
            if whence: offset = -offset if whence == 2 else int(rng.integers(0, 9))
            try: there = local.seek(offset, whence)
            except ValueError: continue
            assert file.seek(offset, whence) == there and file.read(size) == local.read(size) and file.tell() == local.tell()
    assert file_size("memory://x") == 300_000 and read_file("memory://x") == data
    memory.pipe_file("/empty", b"")
    assert open_file("memory://empty").read() == read_file("memory://empty") == b""


def test_faults_are_oserrors_with_reasons(memory, web):
    server, address = web
    memory.pipe_file("/folder/x", b"x")
    for url, kind in (("memory://gone", FileNotFoundError), ("memory://folder", OSError), (address + "/gone", FileNotFoundError)):
        for call in (open_file, read_file):
            with pytest.raises(kind) as caught: call(url)
            assert caught.value.strerror and caught.value.filename == url
    for url in (address + "/down/x", address + "/secret/x", "http://127.0.0.1:9/x"):
        with pytest.raises(OSError) as caught: read_file(url)
        assert caught.value.strerror and not isinstance(caught.value, FileNotFoundError), caught.value
        with pytest.raises(ImageError, match=re.escape(url)): read_image(url)
    with pytest.raises(ImageError, match="does not exist"): read_image(address + "/gone.png")
    with pytest.raises(HfcError, match="does not exist"): read_hfc("memory://gone.hfc")


def test_only_what_is_read_is_fetched(web):
    """The header of a large file with tiles, and one of them; of a server without ranges, all of it once."""
    server, address = web
    noise = np.random.default_rng(0)
    tiles = tuple(Tile(noise.bytes(3000)) for _ in range(200))
    data = pack(HfcFile(1280, 640, bytes(8), 1, b"first", tile=1, tiles=tiles))
    server.files["/x.hfc"] = data
    with open_file(address + "/x.hfc") as stream: assert HfcReader(stream).tile(150) == tiles[150]
    fetched = sum(size for _, size in server.sent)
    if server.ranges: assert fetched <= 2 * 65_536 + 3000 < len(data) / 4
    else: assert fetched == len(data)
    assert read_hfc(address + "/x.hfc") == read_hfc(data)


def test_a_file_that_ends_early_is_noticed(memory, monkeypatch):
    memory.pipe_file("/x", bytes(100_000))
    with open_file("memory://x") as file:
        memory.pipe_file("/x", bytes(10))  # another one took its place
        with pytest.raises(OSError, match="10 bytes came|0 bytes came"): file.read(80_000)


def test_writing_is_whole_or_not_at_all(memory, monkeypatch, web):
    _, address = web
    assert write_atomic("memory://a/b/c.bin", b"first") == "memory://a/b/c.bin"
    write_atomic("memory://a/b/c.bin", bytearray(b"second"))
    assert read_file("memory://a/b/c.bin") == b"second" and find_urls("memory://a") == ["memory://a/b/c.bin"]

    def refuse(*args, **kwargs): raise OSError(errno.ENOSPC, "quota exceeded")
    with monkeypatch.context() as m:
        m.setattr(type(memory), "pipe_file", refuse)
        with pytest.raises(HificError, match="Cannot write memory://a/b/c.bin: quota exceeded"):
            write_atomic("memory://a/b/c.bin", b"x")
    assert read_file("memory://a/b/c.bin") == b"second"
    with pytest.raises(HificError, match="Cannot write http"): write_atomic(address + "/x", b"x")
    made = []
    with monkeypatch.context() as m:  # a store with folders that must be made
        pipe = type(memory).pipe_file
        m.setattr(type(memory), "makedirs", lambda self, path, exist_ok=False: made.append(path))
        m.setattr(type(memory), "pipe_file", lambda self, path, data, **o: pipe(self, path, data) if made else refuse_missing())
        def refuse_missing(): raise FileNotFoundError("no folder")
        write_atomic("memory://new/folder/x", b"x")
    assert made == ["/new/folder"] and read_file("memory://new/folder/x") == b"x"


# ------------------------------------------------------------------------------------------------ folders

def test_folders_of_a_store(memory, photo):
    for name in ("b/IMG_1.JPG", "a.png", "a b.PNG", "notes.txt", ".hidden/x.png", "b/.x.png", "a/z.webp"):
        memory.pipe_file(f"/set/{name}", png(photo))
    memory.pipe_file("/settle/x.png", b"")  # a neighbour whose name begins alike
    wanted = [f"memory://set/{name}" for name in ("a b.PNG", "a.png", "a/z.webp", "b/IMG_1.JPG")]
    assert find_images("memory://set") == find_images("memory://set/") == wanted
    assert find_images("memory://set/notes.txt") == ["memory://set/notes.txt"]  # taken at your word
    for missing in ("memory://nothing", "memory://set/none.png"):
        with pytest.raises(ImageError, match="does not exist, or is empty"): find_images(missing)
    memory.pipe_file("/texts/a.txt", b"")
    with pytest.raises(ImageError, match="holds no images"): find_images("memory://texts")
    memory.pipe_file("/coded/a.hfc", b"")
    assert find_images("memory://coded", {".hfc"}) == ["memory://coded/a.hfc"]
    assert path_name("https://h/a/b.png?c=d/e") == "b.png" and join_path("s3://b/", "x") == "s3://b/x"


def test_folders_of_a_web_server(web, photo):
    """Downwards only: not to the parent, not to another order of the same page."""
    server, address = web
    server.files |= {f"/set/{name}": png(photo) for name in ("a.png", "deep/b.jpg", "deep/er/c.png", "notes.txt")}
    server.files["/elsewhere/d.png"] = png(photo)
    assert find_images(address + "/set/") == [f"{address}/set/{name}" for name in ("a.png", "deep/b.jpg", "deep/er/c.png")]
    assert find_images(address + "/set/a.png") == [address + "/set/a.png"]
    assert not any(path.startswith("/elsewhere") for path, _ in server.sent)
    assert np.array_equal(read_image(address + "/set/a.png"), photo)
    with pytest.raises(ImageError, match="cannot be looked into"): find_images(address + "/none/")


def test_holdout_of_addresses_is_that_of_paths(memory, tmp_path):
    names = [f"{k % 3}/{k:02}.png" for k in range(25)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        memory.pipe_file(f"/set/{name}", b"")

    def both(**options):
        local = holdout_split([tmp_path / n for n in names], **options)
        remote = holdout_split([f"memory://set/{n}" for n in names], **options)
        parts = [[p.relative_to(tmp_path).as_posix() for p in part] for part in local]
        assert parts == [[p.removeprefix("memory://set/") for p in part] for part in remote]
        return parts
    plain = both(every=5)
    assert len(plain[1]) == 5
    manifest = ("file\n" + "\n".join(reversed(names[:20]))).encode()
    (tmp_path / "manifest.csv").write_bytes(manifest)
    memory.pipe_file("/set/manifest.csv", manifest)
    listed = both(every=5)
    assert listed[1] != plain[1] and len(listed[1]) == 4
    named = holdout_split([f"memory://set/{n}" for n in names], 5, "memory://set/manifest.csv")
    assert named[1] == [f"memory://set/{n}" for n in listed[1]]
    with pytest.raises(ImageError, match="manifest"): holdout_split(["memory://set/x.png"], 2, "memory://gone/manifest.csv")


# ------------------------------------------------------------------------------------------------ training sets

def test_photos_behind_addresses_give_the_same_crops(memory, tmp_path):
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = sample_photo(name).resize((160, 120))
        image.save(tmp_path / f"{name}.png")
        memory.pipe_file(f"/set/{name}.png", png(image))
    for memory_gb in (1.0, 0.0):
        local, remote = (open_dataset(where, 64, 4, held_back_every=3, memory_gb=memory_gb) for where in (str(tmp_path), "memory://set"))
        assert isinstance(remote, PhotoCrops) and torch.equal(local.batch(3), remote.batch(3))
        assert [path_name(p) for p in remote.held_back()] == [p.name for p in local.held_back()] == ["coffee.png"]
    memory.pipe_file("/set/broken.png", b"nothing")
    with pytest.warns(UserWarning, match="memory://set/broken.png"): assert len(PhotoCrops("memory://set", 64, 2)) == 4


def test_shards_behind_addresses_give_the_same_crops(memory, tmp_path):
    members = [[(f"{s}{k}.png", png(sample_photo("coffee").resize((80 + 9 * k, 70 + s)))) for k in range(4)] for s in range(3)]
    for s, photos in enumerate(members):
        write_shard(tmp_path / f"{s}.tar", photos)
        assert write_shard(f"memory://set/{s}.tar", photos) == f"memory://set/{s}.tar"
        assert read_file(f"memory://set/{s}.tar") == (tmp_path / f"{s}.tar").read_bytes()
    memory.pipe_file("/set/below/9.tar", b"")
    settings = dict(window=2, held_back_every=4, cache=tmp_path / "cache", backoff=0.001, retries=1)
    local = open_dataset(str(tmp_path), 64, 4, **settings)
    for spec in ("memory://set/{0..2}.tar", "memory://set/*.tar", [f"memory://set/{s}.tar" for s in range(3)]):
        remote = open_dataset(spec, 64, 4, **settings)
        assert isinstance(remote, ShardCrops) and all(torch.equal(local.batch(k), remote.batch(k)) for k in (0, 5))
        assert len(remote.held_back()) == len(local.held_back()) == 3
    assert shard_members("memory://set/0.tar") == shard_members(tmp_path / "0.tar")
    memory.rm("/set/below", recursive=True)
    assert find_shards("memory://set") == find_shards("memory://set/*.tar") == [f"memory://set/{s}.tar" for s in range(3)]
    shutil.rmtree(tmp_path / "cache")
    with pytest.warns(UserWarning, match="memory://set/7.tar does not exist"):
        partly = ShardCrops(["memory://set/7.tar", "memory://set/1.tar"], 64, 2, cache=tmp_path / "cache")
    assert partly.missing == ["memory://set/7.tar"] and partly.batch(0).shape == (2, 3, 64, 64)
    memory.pipe_file("/set/a.png", members[0][0][1])
    with pytest.raises(ImageError, match="photos and shards"): open_dataset("memory://set", 64, 2)
    for wrong in ("memory://gone", "memory://gone/*.tar"):
        with pytest.raises(ImageError): open_dataset(wrong, 64, 2)


def test_lists_of_photos_behind_addresses(memory, web, tmp_path, photo):
    server, address = web
    server.files["/a.png"] = png(photo)
    memory.pipe_file("/list.txt", f"{address}/a.png\n".encode())
    assert [p.url for p in read_photo_list("memory://list.txt")] == [address + "/a.png"]
    pytest.importorskip("requests")
    counts = fetch_photos("memory://list.txt", tmp_path / "run", photos_per_shard=0, min_side=8, drop_flat=False, retries=0)
    assert counts["photos"] == 1 and np.array_equal(read_image(tmp_path / "run" / "photos" / "00000000.png"), photo)
    with pytest.raises(ImageError, match="memory://gone.txt"): list(read_photo_list("memory://gone.txt"))


# ------------------------------------------------------------------------------------------------ the codec, the command line

@pytest.fixture(scope="module")
def codec(): return Codec(load_model(GOLDEN / "levels"), name="levels", device="cpu")


def test_codec(memory, web, codec, photo):
    server, address = web
    memory.pipe_file("/a.png", png(photo))
    server.files["/a.png"] = png(photo)
    data = codec.compress(photo)
    assert codec.compress("memory://a.png") == codec.compress(address + "/a.png") == data
    assert write_hfc("memory://out/a.hfc", data) == "memory://out/a.hfc"
    assert np.array_equal(codec.decompress("memory://out/a.hfc"), codec.decompress(data))
    assert codec.info("memory://out/a.hfc") == codec.info(data)
    server.files["/tiles.hfc"] = tiles = codec.compress(photo, tile=64)
    assert np.array_equal(codec.decompress(address + "/tiles.hfc", (70, 10, 100, 60)), codec.decompress(tiles, (70, 10, 100, 60)))


def test_command_line(memory, tmp_path, photo, capsys):
    def hific(*arguments):
        status = main([str(a) for a in arguments])
        out, error = capsys.readouterr()
        return status, out, error

    for name in ("a.png", "trip/b.png"): memory.pipe_file(f"/set/{name}", png(photo))
    status, _, error = hific("compress", "memory://set")
    assert status == 0, error
    assert [p for p in find_urls("memory://set") if p.endswith(".hfc")] == ["memory://set/a.hfc", "memory://set/trip/b.hfc"]
    assert hific("compress", "memory://set/a.png", "--force")[0] == 0
    status, out, _ = hific("info", "memory://set", "--json")
    assert status == 0 and [json.loads(line)["file"] for line in out.splitlines()] == ["memory://set/a.hfc", "memory://set/trip/b.hfc"]
    assert hific("decompress", "memory://set", "--out", tmp_path / "out")[0] == 0
    assert read_image(tmp_path / "out" / "trip" / "b.png").size == photo.size
    photo.save(tmp_path / "local.png")
    assert hific("compress", tmp_path / "local.png", "--out", "memory://new/there.hfc")[0] == 0
    assert hific("compress", tmp_path / "local.png", "--out", "memory://new/folder/")[0] == 0
    assert find_images("memory://new", {".hfc"}) == ["memory://new/folder/local.hfc", "memory://new/there.hfc"]
    status, _, error = hific("compress", "memory://nothing")
    assert status == 1 and "memory://nothing does not exist" in error
    status, _, error = hific("info", "memory://set/a.png")
    assert status == 1 and "no .hfc file" in error
    with pytest.raises(SystemExit): main(["info", "file://host/a.hfc"])
    assert "another machine" in capsys.readouterr().err


def test_the_job_of_compression(web, tmp_path, photo):
    "In a process of its own, over a folder of a web server."
    server, address = web
    server.files |= {"/set/a.png": png(photo), "/set/trip/a.png": png(photo)}
    if not server.ranges: pytest.skip("once is enough")
    assert run_job("compress", tmp_path, dict(input=address + "/set/", metrics=False)) is not None, "papermill is missing"
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["name"] for row in report["images"]] == ["a", "trip_a"] and not report["failed"]
    assert report["images"][0]["original_bytes"] == len(png(photo)) and (tmp_path / "trip_a.hfc").is_file()


def test_evaluation(memory, tmp_path, photo):
    for name in ("a.png", "trip/a.png"): memory.pipe_file(f"/set/{name}", png(photo.resize((200, 180))))
    result = evaluate("memory://set", ["jpeg"], tmp_path / "all", qualities=dict(jpeg=[50]), metrics=["psnr"])
    assert not result.failed and [r["photo"] for r in result.records] == ["a.png", "trip_a.png"]
    assert result.original(result.records[1]).size == (200, 180) and result.save().is_file()
    again = evaluate(["memory://set/trip/a.png", "memory://set/a.png"], ["jpeg"], tmp_path / "all", qualities=dict(jpeg=[50]),
                     metrics=["psnr"])
    assert again.reused == 2
    assert main(["evaluate", "memory://set/trip/a.png", "--models", "", "--baselines", "jpeg", "--qualities", "jpeg=50",
                 "--metrics", "psnr", "-o", str(tmp_path / "one"), "--no-published"]) == 0
    photo.save(tmp_path / "x.png")
    with pytest.raises(EvaluationError, match="not both"):
        evaluate([tmp_path / "x.png", "memory://set/a.png"], ["jpeg"], tmp_path / "no")


def test_models(memory, monkeypatch, tmp_path, web):
    """Fetched once for its content; another model under the same address is another folder in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server, address = web
    def publish(kind):
        for p in (GOLDEN / kind).iterdir():
            memory.pipe_file(f"/zoo/mine/{p.name}", p.read_bytes())
            server.files[f"/zoo/mine/{p.name}"] = p.read_bytes()
    publish("levels")
    folder, name = find_model("memory://zoo/mine")
    assert name == "mine" and folder.is_relative_to(tmp_path)
    codec, wanted = Codec.from_pretrained("memory://zoo/mine", device="cpu"), Codec(load_model(GOLDEN / "levels"), device="cpu")
    assert codec.fingerprint == wanted.fingerprint and codec.name == "mine"
    asked = []
    with monkeypatch.context() as m:
        m.setattr("hific_nb.zoo.read_file", lambda path: (asked.append(path_name(path)), read_file(path))[1])
        load_pretrained("memory://zoo/mine")
        assert find_model(address + "/zoo/mine")[0] == folder and "weights.safetensors" not in asked and "config.json" in asked
    publish("one-rate")
    assert find_model("memory://zoo/mine")[0] != folder and load_pretrained("memory://zoo/mine").config.rate_levels == 0
    memory.rm("/zoo/mine/config.json")
    with pytest.raises(UnknownModelError, match="memory://zoo/mine has no whole model"): find_model("memory://zoo/mine")


def test_threads_share_a_store(memory, web):
    from concurrent.futures import ThreadPoolExecutor

    server, address = web
    server.files |= {f"/{k}": bytes([k]) * (1000 + k) for k in range(32)}
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda k: read_file(f"{address}/{k}"), range(32)))
    assert got == [bytes([k]) * (1000 + k) for k in range(32)]


def test_one_door_alone_opens_stores():
    """No module but config.py imports fsspec."""
    for path in Path(config.__file__).parent.glob("*.py"):
        assert path.name == "config.py" or not re.search(r"^\s*(import|from) fsspec", path.read_text(), re.MULTILINE), path
    assert os.path.basename(config.__file__) == "config.py"
