"""Folders and names of every kind: two folders into one, names that meet, bytes that are no text, results among the pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_bulk import CPU, table

import hific_nb.pillow  # noqa: F401 - .hfc files are pictures then, and must not be taken for photos all the same
from hific_nb.bulk import MANIFEST, BulkError, BulkSettings, Manifest, inputs_among, output_paths, run_bulk
from hific_nb.cli import main
from hific_nb.codec import Codec
from hific_nb.data import find_images, sample_photo

BACK = BulkSettings("decompress", model=None, device="cpu")


@pytest.fixture(scope="module")
def codec(): return Codec.from_pretrained("hific-lite", device="cpu")


def photo(path: Path, sample: str = "coffee", size=(64, 48), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_photo(sample).resize(size).save(path, **options)
    return path


def counts(result) -> tuple: return result.done, result.skipped, result.failed


# ---- two folders into one

def test_two_folders_into_one(tmp_path, codec):
    "Neither takes the other's results for its own: not where the photo looks changed, and not where it looks the same."
    out, one, two = tmp_path / "out", photo(tmp_path / "one" / "a.bmp"), photo(tmp_path / "two" / "a.bmp", "chelsea")
    photo(two.parent / "b.bmp")
    assert counts(run_bulk(one.parent, out, CPU)) == (1, 0, 0)
    os.utime(two, ns=(1, 1))
    os.utime(one, ns=(1, 1))
    run_bulk(one.parent, out, CPU)
    assert one.stat().st_size == two.stat().st_size
    for _ in range(2):  # of the same size and time
        assert counts(run_bulk(two.parent, out, CPU))[2] == 1
        assert (out / "a.hfc").read_bytes() == codec.compress(one) and "--force" in table(out)["a.bmp"]["error"]
    os.utime(two)  # of another time
    assert counts(run_bulk(two.parent, out, CPU)) == (0, 1, 1) and (out / "a.hfc").read_bytes() == codec.compress(one)
    assert counts(run_bulk(one.parent, out, CPU)) == (0, 1, 0) and not table(out)["a.bmp"]["error"]
    assert counts(run_bulk(two.parent, out, BulkSettings(device="cpu", force=True))) == (2, 0, 0)
    assert (out / "a.hfc").read_bytes() == codec.compress(two)
    assert counts(run_bulk(one.parent, out, CPU)) == (0, 0, 1) and (out / "a.hfc").read_bytes() == codec.compress(two)


def test_two_folders_of_files_decoded_into_one(tmp_path, codec):
    for name, sample in (("one", "coffee"), ("two", "chelsea")):
        source = photo(tmp_path / name / "a.png", sample)
        source.with_suffix(".hfc").write_bytes(codec.compress(source))
    out = tmp_path / "out"
    assert counts(run_bulk(tmp_path / "one", out, BACK)) == (1, 0, 0)
    decoded = (out / "a.png").read_bytes()
    assert counts(run_bulk(tmp_path / "two", out, BACK)) == (0, 0, 1) and (out / "a.png").read_bytes() == decoded


def test_moved_together_they_go_on(tmp_path, monkeypatch):
    "Input and output moved: nothing is made again. The input alone: its results are recognised. A changed photo is made again."
    project = tmp_path / "project"
    photo(project / "in" / "sea" / "a.png")
    monkeypatch.chdir(tmp_path)
    run_bulk("project/in", "project/out", CPU)
    project.rename(tmp_path / "elsewhere")
    assert counts(run_bulk(tmp_path / "elsewhere" / "in", tmp_path / "elsewhere" / "out", CPU)) == (0, 1, 0)
    (tmp_path / "elsewhere" / "in").rename(tmp_path / "photos")
    assert counts(run_bulk(tmp_path / "photos", tmp_path / "elsewhere" / "out", CPU)) == (1, 0, 0)
    assert counts(run_bulk(tmp_path / "photos", tmp_path / "elsewhere" / "out", CPU)) == (0, 1, 0)
    photo(tmp_path / "photos" / "sea" / "a.png", "chelsea")
    assert counts(run_bulk(tmp_path / "photos", tmp_path / "elsewhere" / "out", CPU)) == (1, 0, 0)


def test_a_manifest_of_an_earlier_version(tmp_path):
    "Its rows have no place: they count by size and time stamp, as they did."
    source = photo(tmp_path / "in" / "a.png")
    run_bulk(source.parent, tmp_path / "out", CPU)
    manifest = tmp_path / "out" / MANIFEST
    text = manifest.read_text()
    assert " of ../in/a.png," in text
    manifest.write_text(text.replace(" of ../in/a.png,", ","))
    assert counts(run_bulk(source.parent, tmp_path / "out", CPU)) == (0, 1, 0)
    photo(source, "chelsea")
    assert counts(run_bulk(source.parent, tmp_path / "out", CPU)) == (1, 0, 0) and " of ../in/a.png," in manifest.read_text()


def test_folders_behind_addresses_into_one(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name, sample in (("one", "coffee"), ("two", "chelsea")):
        store.pipe_file(f"/names/{name}/a.jpg", photo(tmp_path / "a.jpg", sample).read_bytes())
    assert counts(run_bulk("memory://names/one", "memory://names/out", CPU)) == (1, 0, 0)
    assert counts(run_bulk("memory://names/two", "memory://names/out", CPU)) == (0, 0, 1)
    assert counts(run_bulk("memory://names/one", "memory://names/out", CPU)) == (0, 1, 0)
    for done in (1, 0):  # compressed in place, and decoded there
        for settings in (CPU, BACK): assert counts(run_bulk("memory://names/one", None, settings)) == (done, 1 - done, 0)
    assert sorted(store.ls("/names/one", detail=False)) == [f"/names/one/{n}" for n in ("a.hfc", "a.jpg", "a.png", MANIFEST)]
    store.rm("/names", recursive=True)


# ---- names that meet

def test_names_are_given_once(tmp_path, codec):
    for name, sample in (("a.jpg", "coffee"), ("a.png", "chelsea"), ("a.jpg.png", "rocket")): photo(tmp_path / "in" / name, sample)
    assert counts(run_bulk(tmp_path / "in", tmp_path / "out", CPU)) == (3, 0, 0)
    for name in ("a.jpg", "a.png", "a.jpg.png"):
        assert (tmp_path / "out" / f"{name}.hfc").read_bytes() == codec.compress(tmp_path / "in" / name)


@pytest.mark.parametrize("names", [["a.jpg", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg.png", "a.jpg.gif", "a.jpg.png.webp"],
                                   ["a", "a.jpg", "a.jpg.jpg"], ["a.jpg", "b/a.png", "b/a.png.jpg", "b/a.jpg"]])
def test_targets_are_unique_in_any_order(names):
    for root in (Path("in"), "s3://bucket/in"):
        files = [root / name if isinstance(root, Path) else f"{root}/{name}" for name in names]
        found = dict(zip(files, map(str, output_paths(files, root, None, ".hfc"))))
        assert len(set(found.values())) == len(files)
        assert found == dict(zip(files[::-1], map(str, output_paths(files[::-1], root, None, ".hfc"))))


# ---- figures

def test_errors_keep_the_figures_of_what_is_there(tmp_path):
    source, out = photo(tmp_path / "in" / "a.png"), tmp_path / "out"
    run_bulk(source.parent, out, BulkSettings(device="cpu", metrics=True))
    before = table(out)["a.png"]
    assert run_bulk(source.parent, out, BulkSettings(device="cpu", tile=64)).failed == 1
    after = table(out)["a.png"]
    assert "other settings" in after["error"] and after | {"error": ""} == before
    assert counts(run_bulk(source.parent, out, BulkSettings(device="cpu", metrics=True))) == (0, 1, 0)
    assert table(out)["a.png"] == before
    data = source.read_bytes()
    source.write_bytes(data[:300])  # what was made of the whole one is still there
    for settings in (CPU, BulkSettings(device="cpu", force=True)):
        assert run_bulk(source.parent, out, settings).failed == 1
        assert table(out)["a.png"]["sha256"] == before["sha256"] and "whole copy" in table(out)["a.png"]["error"]
    (out / "a.hfc").write_bytes(b"not it")  # no figures of a result that is not the one of the row
    assert run_bulk(source.parent, out, CPU).failed == 1 and not table(out)["a.png"]["sha256"]


# ---- names that are no text

@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_are_no_text(tmp_path, codec, workers):
    names = [os.fsdecode(b"caf\xe9.jpg"), "r\r.jpg", "n\nl, \"q\".jpg", "r\r\n.jpg", "plain.jpg"]
    for name in names: photo(tmp_path / "in" / name, format="JPEG")
    assert counts(run_bulk(tmp_path / "in", tmp_path / "out", CPU, workers=workers)) == (5, 0, 0)
    assert counts(run_bulk(tmp_path / "in", tmp_path / "out", CPU, workers=workers)) == (0, 5, 0)
    assert sorted(Manifest(tmp_path / "out").known) == sorted(names)
    data = codec.compress(tmp_path / "in" / "plain.jpg")
    assert all((tmp_path / "out" / (name[:-4] + ".hfc")).read_bytes() == data for name in names)
    half = tmp_path / "out" / f".{os.fsdecode(b'caf')}.hfc.0123abcd.tmp"  # what is left of a write that was killed
    half.write_bytes(b"half")
    assert counts(run_bulk(tmp_path / "out", tmp_path / "back", BACK, workers=workers)) == (5, 0, 0)
    assert counts(run_bulk(tmp_path / "in", tmp_path / "out", CPU)) == (0, 5, 0) and not half.exists()


def test_rows_that_do_not_read_are_passed_over(tmp_path):
    manifest = Manifest(tmp_path)
    for name in ("a", "b"): manifest.add(dict(file=name, bytes=1))
    manifest.close()
    with open(manifest.path, "ab") as f: f.write(b"r\rr,1,,,,,,,,,,,\n\xff\xfe,torn\n" + b"c,1,,,,,,,,,,,\n" + b'"open,1\n')
    assert sorted(Manifest(tmp_path).known) == ["a", "b", "c"]


def test_a_table_that_excel_saved(tmp_path):
    "Ends of lines become \\r\\n, and a mark stands before the first."
    run_bulk(photo(tmp_path / "in" / "a.png").parent, tmp_path / "out", CPU)
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes().replace(b"\n", b"\r\n"))
    assert counts(run_bulk(tmp_path / "in", tmp_path / "out", CPU)) == (0, 1, 0) and b"\r" not in manifest.read_bytes()


# ---- one file, and settings

def test_the_manifest_of_one_file_lies_beside_the_result(tmp_path, monkeypatch):
    photo(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for out, folder in (("x.hfc", "."), ("deep/x.hfc", "deep"), ("small", "small"), (None, ".")):
        for _ in range(2): assert main(["compress", "a.png", "--metrics", "--device", "cpu", *(["--out", out] if out else [])]) == 0
        target = Path(out) if out and out.endswith(".hfc") else Path(folder, "a.hfc")
        assert target.is_file() and table(folder)["a.png"]["psnr"] and table(folder)["a.png"]["output"] == str(target)


@pytest.mark.parametrize("tile", [100, -64, 64.0])
def test_a_bad_tile_is_found_before_the_work(tmp_path, tile):
    with pytest.raises(BulkError, match="multiple of 64"): BulkSettings(tile=tile)


def test_a_bad_tile_from_a_shell(tmp_path, capsys):
    photo(tmp_path / "a.png")
    assert main(["compress", str(tmp_path), "--tile", "100", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("hific: The side of tiles") and not (tmp_path / MANIFEST).exists()


# ---- results among the pictures

def test_results_are_no_pictures(tmp_path, codec):
    "Compressed and decoded in place, again and again: each photo is done once, under one name."
    root = tmp_path / "r"
    for name in ("a.jpg", "sea/b.jpg"): photo(root / name)
    photo(root / "own.png", "rocket")
    for _ in range(3):
        run_bulk(root, None, CPU)
        run_bulk(root, None, BACK)
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert files == ["a.hfc", "a.jpg", "a.png", MANIFEST, "own.hfc", "own.png", "sea/b.hfc", "sea/b.jpg", "sea/b.png"]
    assert counts(run_bulk(root, None, CPU)) == (0, 3, 0)
    assert counts(run_bulk(root, tmp_path / "out", CPU)) == (3, 0, 0)
    photo(root / "a.png", "chelsea")  # somebody's now
    assert "a.png" in [path.name for path in inputs_among(root, find_images(root))]


def test_decoded_elsewhere_they_are_pictures(tmp_path):
    root = photo(tmp_path / "in" / "a.png").parent
    run_bulk(root, tmp_path / "small", CPU)
    run_bulk(tmp_path / "small", tmp_path / "back", BACK)
    for skipped in (0, 1): assert counts(run_bulk(tmp_path / "back", None, CPU)) == (1 - skipped, skipped, 0)


def test_looks_at_a_file_are_no_pictures(tmp_path):
    for name in ("a.jpg", "a.png"): photo(tmp_path / name)
    for name in ("a.jpg.reconstruction.png", "a.reconstruction.png", "a.box.png", "a.thumbnail.png", "the.box.png"):
        photo(tmp_path / name)
    assert [p.name for p in inputs_among(tmp_path, find_images(tmp_path))] == ["a.jpg", "a.png", "the.box.png"]
    alone = tmp_path / "a.box.png"
    assert inputs_among(alone, [alone]) == [alone]  # asked for by its name
    other = photo(tmp_path / "other" / "b.png").parent
    (other / MANIFEST).write_text("somebody's table\n")
    assert [p.name for p in inputs_among(other, find_images(other))] == ["b.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_picture(tmp_path):
    photo(tmp_path / "in" / "b.png")
    os.mkfifo(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "link.png").symlink_to("b.png")
    (tmp_path / "in" / "lost.png").symlink_to("nowhere.png")
    run = "from hific_nb.cli import main; import sys; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", run, "compress", "in", "--out", "out", "--device", "cpu"], cwd=tmp_path,
                          timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "2 done, 0 were done before, 1 failed" in done.stdout and "lost.png" in done.stderr  # a link to nothing is said
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "a.hfc")
    with pytest.raises(BulkError, match="nothing but pipes"): run_bulk(tmp_path / "pipes", None, BACK)
