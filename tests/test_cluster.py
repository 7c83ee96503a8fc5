"""Beyond one machine, on one: Ray with two workers of which one is killed, pictures and results in a bucket on loopback.

All of it in one child process with one start of Ray, which takes longer than the pictures do.
"""

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hific_nb.codec import Codec
from hific_nb.data import sample_photo

NEEDED = ("ray", "moto", "flask", "flask_cors", "s3fs")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
              pytest.mark.skipif(sys.platform == "win32", reason="kills processes as POSIX does")]

DRIVER = '''
import json, os, signal, sys, time
from pathlib import Path
import ray.data
from hific_nb.bulk import BulkSettings, _start_ray, run_bulk
from hific_nb.cli import main

def actors():
    "Processes of this user whose title says that they are an actor which compresses."
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and session in (entry / "environ").read_bytes() \\
                    and (title := (entry / "cmdline").read_bytes()).startswith(b"ray::") and b"MapBatches(RayWorker)" in title:
                found.append(int(entry.name))
        except OSError: pass
    return sorted(found)

killed = []
def on_row(row, k, n):
    if k >= 3 and not killed and (found := actors()):
        os.kill(found[0], signal.SIGKILL)
        killed.append([found[0], k, len(found)])

session = b"HIFIC_TEST_SESSION=" + os.environ["HIFIC_TEST_SESSION"].encode()
settings = BulkSettings(device="cpu")
_start_ray(ray)
try:
    result = run_bulk("s3://photos/in", "s3://photos/out", settings, engine="ray", workers=2, on_row=on_row)
    again = main(["compress", "s3://photos/in", "--out", "s3://photos/out", "--engine", "ray", "--device", "cpu"])
    print("RESULT", json.dumps(dict(done=result.done, failed=result.failed, killed=killed, again=again)))
finally: ray.shutdown()
'''


@pytest.fixture(scope="module")
def bucket():
    "A server of moto's on loopback with the bucket `photos`: (fsspec's file system, settings of the environment)."
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1",
                    AWS_ENDPOINT_URL=f"http://{host}:{port}", FSSPEC_S3_ENDPOINT_URL=f"http://{host}:{port}", NO_PROXY="127.0.0.1")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        import s3fs

        store = s3fs.S3FileSystem(endpoint_url=settings["AWS_ENDPOINT_URL"], skip_instance_cache=True)
        store.mkdir("photos")
        yield store
    finally:
        for name, value in before.items():
            if value is None: os.environ.pop(name)
            else: os.environ[name] = value
        server.stop()


@pytest.fixture(scope="module")
def pictures(bucket):
    "40 pictures of their own size, name -> bytes, and one that is broken; all in the bucket."
    found = {}
    for k in range(40):
        buffer = io.BytesIO()
        sample_photo("coffee").resize((160 + k, 120)).save(buffer, "PNG")
        found[f"{'deep/' if k % 2 else ''}{k:02}.png"] = buffer.getvalue()
    found["broken.png"] = found["00.png"][:500]
    for name, data in found.items(): bucket.pipe_file(f"photos/in/{name}", data)
    return found


def rows_of(bucket, path):
    return {row["file"]: row for row in csv.DictReader(io.StringIO(bucket.cat_file(path).decode()))}


def test_two_workers_one_killed_and_a_bucket(bucket, pictures, tmp_path):
    short = Path(f"/tmp/hific-ray-{os.getpid()}")  # sockets want short paths
    short.mkdir()
    environment = os.environ | dict(HIFIC_TEST_SESSION=tmp_path.name, OMP_NUM_THREADS="1", RAY_TMPDIR=str(short))
    process = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=os.setpgrp)
    try: out, err = process.communicate(timeout=300)
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)  # whatever happened, nothing of Ray stays
        except ProcessLookupError: pass
        import shutil

        shutil.rmtree(short, ignore_errors=True)
    line = next((line for line in out.splitlines() if line.startswith("RESULT ")), None)
    assert line, f"{out[-2000:]}\n{err[-4000:]}"
    result = json.loads(line[7:])
    assert (result["done"], result["failed"]) == (40, 1) and result["killed"], result
    assert result["killed"][0][2] == 2 and result["killed"][0][1] < 41, "two actors were at work, in the middle"
    assert result["again"] == 1 and "0 done, 40 were done before, 1 failed" in out  # the command goes on: nothing twice
    codec, rows = Codec.from_pretrained("hific-lite", device="cpu"), rows_of(bucket, "photos/out/manifest.csv")
    assert sorted(rows) == sorted(pictures) and "broken.png" in [name for name, row in rows.items() if row["error"]]
    for name, data in pictures.items():
        if name != "broken.png": assert bucket.cat_file(f"photos/out/{name[:-4]}.hfc") == codec.compress(data), name


def test_the_local_engine_and_a_bucket(bucket, pictures, tmp_path):
    "Without Ray: the same bytes, by worker processes, and what one engine has done the other recognises."
    from hific_nb.bulk import BulkSettings, run_bulk

    result = run_bulk("s3://photos/in", "s3://photos/local", BulkSettings(device="cpu"), workers=1)
    assert (result.done, result.failed) == (40, 1)
    codec = Codec.from_pretrained("hific-lite", device="cpu")
    assert bucket.cat_file("photos/local/deep/01.hfc") == codec.compress(pictures["deep/01.png"])
    assert not bucket.exists("photos/local/manifest.parts")
