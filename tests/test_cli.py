"""The command `hific` as a shell runs it: exit status, one line for each failure, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from hific_nb.cli import main
from hific_nb.config import HificError, write_atomic
from hific_nb.data import sample_photo


HIFIC = [sys.executable, "-c", "import sys; from hific_nb.cli import main; sys.exit(main())"]  # the console script, spelt out


def hific(*arguments, cwd):
    return subprocess.run([*HIFIC, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    small = sample_photo("chelsea").resize((90, 60))
    small.save(folder / "a.jpg")
    small.save(folder / "a.png")
    small.save(folder / "deep" / "er" / "B.JPEG", "JPEG")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:500])
    return folder


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "hific_nb.cli", "info", "gone.hfc"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "hific: gone.hfc does not exist: check the path.\n"


def test_a_folder_in_another_process(photos, tmp_path):
    done = hific("compress", photos, "--out", tmp_path / "small", cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "broken.jpg" in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr and "1 of 4 files failed" in done.stderr
    files = sorted(p.relative_to(tmp_path / "small").as_posix() for p in (tmp_path / "small").rglob("*") if p.is_file())
    assert files == ["a.jpg.hfc", "a.png.hfc", "deep/er/B.hfc", "manifest.csv"]
    done = hific("decompress", tmp_path / "small", "--out", tmp_path / "back", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    with Image.open(tmp_path / "back" / "deep" / "er" / "B.png") as image: assert image.size == (90, 60)
    done = hific("info", tmp_path / "small" / "a.jpg.hfc", "--json", cwd=tmp_path)
    info = json.loads(done.stdout)
    assert info["bytes"] == (tmp_path / "small" / "a.jpg.hfc").stat().st_size and info["model"].startswith("hific-lite-")


def test_bad_files_leave_nothing_behind(photos, tmp_path, capsys):
    assert main(["compress", str(photos / "a.png"), "--out", str(tmp_path / "a.hfc")]) == 0
    data = (tmp_path / "a.hfc").read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, content in (("cut", data[:-5]), ("text", b"hello"), ("flip", data[:60] + b"\0\0" + data[62:])):
        (bad / f"{name}.hfc").write_bytes(content)
    capsys.readouterr()
    assert main(["decompress", str(bad)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(f"{name}.hfc" in line for name, line in zip(("cut", "flip", "text"), lines)) and len(lines) == 4
    assert sorted(p.name for p in bad.iterdir()) == ["cut.hfc", "flip.hfc", "manifest.csv", "text.hfc"]
    assert main(["info", str(bad)]) == 1


def test_nothing_is_overwritten(photos, tmp_path, capsys):
    target = tmp_path / "a.hfc"
    target.write_bytes(b"precious")
    assert main(["compress", str(photos / "a.png"), "--out", str(target)]) == 1
    assert target.read_bytes() == b"precious" and "--force" in capsys.readouterr().err
    assert main(["compress", str(photos / "a.png"), "--out", str(target), "--force"]) == 0
    assert target.read_bytes() != b"precious"
    original = (photos / "a.png").read_bytes()
    assert main(["compress", str(photos / "deep")]) == 0
    Path(photos / "deep" / "er" / "B.hfc").rename(photos / "a.hfc")
    assert main(["decompress", str(photos / "a.hfc")]) == 1 and (photos / "a.png").read_bytes() == original


def test_reconstruct_writes_what_decoding_would_give(photos, tmp_path):
    photo = str(photos / "a.png")
    assert main(["compress", photo, "--reconstruct", "--out", str(tmp_path / "r")]) == 0
    assert main(["compress", photo, "--out", str(tmp_path / "r")]) == 0
    assert main(["decompress", str(tmp_path / "r" / "a.hfc")]) == 0
    assert (tmp_path / "r" / "a.png").read_bytes() == (tmp_path / "r" / "a.reconstruction.png").read_bytes()


@pytest.mark.parametrize("arguments", [
    ["compress", "nowhere.jpg"], ["compress", "."], ["decompress", "nowhere.hfc"], ["decompress", "."], ["info", "nowhere.hfc"],
    ["compress", "x" * 300 + ".jpg"], ["compress", "http://127.0.0.1:9/x.jpg"], ["compress", "photo.png", "--quality", "none"],
    ["compress", "photo.png", "--reconstruct", "--metrics"], ["compress", "photo.png", "--reconstruct", "--tile", "64"],
    ["compress", "photo.png", "--model", "hific-large"], ["compress", "photo.png", "--device", "toaster"], ["demo", "nowhere.jpg"]])
def test_one_sentence_for_a_mistake(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "photo.png" in arguments: Image.new("RGB", (8, 8)).save("photo.png")
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_pipes(photos, tmp_path):
    """In, by the system's name of standard input; out, to a reader who has soon seen enough."""
    plain = hific("compress", photos / "a.png", "--out", tmp_path / "a.hfc", cwd=tmp_path)
    def piped(content, *arguments):
        return subprocess.run([*HIFIC, *map(str, arguments)], input=content, capture_output=True, cwd=tmp_path)
    done = piped((photos / "a.png").read_bytes(), "compress", "/dev/stdin", "--out", "b.hfc")
    assert (done.returncode, done.stderr) == (0, b"") and plain.returncode == 0
    assert (tmp_path / "b.hfc").read_bytes() == (tmp_path / "a.hfc").read_bytes()
    assert done.stdout.decode().partition("b.hfc  ")[2] == plain.stdout.partition("a.hfc  ")[2] != ""
    done = piped((tmp_path / "a.hfc").read_bytes(), "decompress", "/dev/stdin", "--out", "b.png")
    assert (done.returncode, done.stderr) == (0, b"")
    with Image.open(tmp_path / "b.png") as image: assert image.size == (90, 60)
    done = piped(b"<html>", "compress", "/dev/stdin", "--out", "c.hfc")
    assert done.returncode == 1 and done.stderr.decode().count("\n") == 1 and b"not an image" in done.stderr
    with subprocess.Popen([*HIFIC, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        reader.stdout.close()
        assert reader.stderr.read() == b"" and reader.wait() == 141


def test_what_a_result_is_called(photos, tmp_path, capsys):
    """An ending says what is in a file, a slash that it is a folder, a link stays a link, and a pipe is no place for a file."""
    picture = str(photos / "a.png")
    for arguments, ending in ((["compress", picture, "--out", "a.png"], ".hfc"),
                              (["compress", picture, "--reconstruct", "--out", "a.hfc"], ".png")):
        assert main(arguments) == 1 and f"would be a {ending} file" in capsys.readouterr().err
    assert main(["compress", picture, "--out", f"{tmp_path}/small.v1/"]) == 0 and (tmp_path / "small.v1" / "a.hfc").is_file()
    target, link = tmp_path / "target.hfc", tmp_path / "link.hfc"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert main(["compress", picture, "--out", str(link), "--force"]) == 0
    assert link.is_symlink() and target.read_bytes() == (tmp_path / "small.v1" / "a.hfc").read_bytes()
    os.mkfifo(tmp_path / "pipe.hfc")
    assert main(["compress", picture, "--out", str(tmp_path / "pipe.hfc"), "--force"]) == 1
    assert "a pipe or a device" in capsys.readouterr().err and (tmp_path / "pipe.hfc").is_fifo()
    long = tmp_path / ("\N{SNOWMAN}" * 83 + ".hfc")  # 253 bytes
    assert main(["compress", picture, "--out", str(long)]) == 0 and long.read_bytes() == target.read_bytes()
    for place in (target / "below a file", photos, tmp_path / ("x" * 300)):
        with pytest.raises(HificError, match="Cannot write"): write_atomic(place, b"x")
    assert not [p for p in tmp_path.rglob("*.tmp")]


def test_names_that_are_no_text(photos, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "a.png").rename(photos / name)
    done = subprocess.run([*HIFIC, "compress", os.fsencode(photos / name), "--out", str(tmp_path / "a.hfc")], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and b"Traceback" not in done.stderr and (tmp_path / "a.hfc").is_file()


def test_a_full_disk_keeps_what_was_there(photos, tmp_path):
    """The file system refuses to grow any file: the old result stays, no temporary file is left, status 1."""
    target = tmp_path / "a.hfc"
    target.write_bytes(b"old")
    program = ("import resource, signal, sys\nfrom hific_nb.cli import main\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               # once without the limit, so that compiled code is cached
               "from hific_nb import Codec; Codec.from_pretrained('hific-lite').compress(sys.argv[1])\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\n"
               "sys.exit(main(['compress', sys.argv[1], '--out', sys.argv[2], '--force']))")
    done = subprocess.run([sys.executable, "-c", program, photos / "a.png", target], capture_output=True, text=True)
    assert done.returncode == 1 and "Cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.hfc"]


def test_killed_in_the_middle(photos, tmp_path):
    """kill -9 at whatever moment: every .hfc file that is there is whole."""
    many = tmp_path / "many"
    many.mkdir()
    picture = (photos / "a.png").read_bytes()
    for i in range(300): (many / f"{i:03}.png").write_bytes(picture)
    process = subprocess.Popen([*HIFIC, "compress", many], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(many.glob("*.hfc"))) < 3 and time.monotonic() < deadline: time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted(many.glob("*.hfc"))
    assert 3 <= len(done) < 300, "killed too late or never started"
    assert main(["info", str(many)]) == 0
    assert len({p.read_bytes() for p in done}) == 1  # one photo, one file


def test_demo_without_papermill(tmp_path, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "papermill" else real(name, *a))
    assert main(["demo", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"coffee.hfc", "coffee.png", "coffee.comparison.png", "metrics.json"}
    row = json.loads((tmp_path / "run" / "metrics.json").read_text())["images"][0]
    assert row["bytes"] == (tmp_path / "run" / "coffee.hfc").stat().st_size and f"{row['bytes']:,} bytes" in printed
    assert "hific_nb[notebooks]" in printed


@pytest.mark.parametrize("arguments", [["demo", "--out"], ["train", "--dataset", ".", "--run"],
                                       ["fetch", "--source", "l", "--run"]])
def test_a_run_folder_that_cannot_be(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*arguments, "file"]) == 1
    assert capsys.readouterr().err == "hific: Cannot make the folder file: File exists.\n"


def test_evaluate(photos, tmp_path, capsys):
    arguments = ["evaluate", str(photos), "--out", str(tmp_path / "out"), "--models", "", "--baselines", "jpeg,webp", "--qualities",
                 "jpeg=5,20,50,80; webp=10,80", "--metrics", "psnr,ms_ssim"]
    assert main(arguments) == 1  # one photo is broken
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["broken.jpg"] and "bits against jpeg" in shown.out
    assert "| webp | 80 |" in shown.out and "18 records, 0 of them from before" in shown.out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(r["bytes"] == (tmp_path / "out" / r["file"]).stat().st_size for r in report["records"])
    (photos / "broken.jpg").unlink()
    assert main([*arguments, "--workers", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["failed"] == [] and again["records"] == report["records"]
    assert main([*arguments, "--limit", "1", "--anchor", "webp"]) == 0 and "6 records, 6 of them" in capsys.readouterr().out
    for wrong in (["--qualities", "jpeg"], ["--metrics", "vmaf"], ["--anchor", "avif"], ["--baselines", "gif"]):
        assert main([*arguments, *wrong]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
