"""The shipped models are what their cards say; models are found by name, folder and Hub address, and given away as folders."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hific_nb.pillow  # noqa: F401 - opens .hfc files
from hific_nb import zoo
from hific_nb.cli import main
from hific_nb.codec import Codec, CodecError, file_info
from hific_nb.evaluation import find_contenders
from hific_nb.hfc import ModelMismatchError, pack, read_hfc
from hific_nb.model import ModelError, load_model, model_fingerprint
from hific_nb.training import load_warm_start
from hific_nb.zoo import (ALIASES, MODEL_FILES, WITHDRAWN, HubError, UnknownModelError, WithdrawnModelError, figures_table,
                          list_models, load_pretrained, model_folder, model_info, name_of_fingerprint, save_pretrained)

from tiny import LEVELS, draw, tiny_codec, tiny_model

MODELS = list_models()


def test_models_are_shipped():
    assert "hific-lite-base-v1" in {m.name for m in MODELS}
    assert all(model_folder(alias).name == name for alias, name in ALIASES.items())


GONE = WITHDRAWN["hific-lite-v0"]
SENTENCE = ("The model 'hific-lite-v0' was withdrawn from the package: take 'hific-lite' for new files. For old ones, `git "
            "checkout 970d475707fa -- hific_nb/models/hific-lite-v0` in a clone of the repository brings its folder back.")


def test_a_withdrawn_model_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert GONE.name not in {m.name for m in MODELS} and model_folder(GONE.instead).is_dir()
    for ask in (Codec.from_pretrained, load_pretrained, model_info, load_warm_start, lambda name: find_contenders([name])):
        with pytest.raises(WithdrawnModelError) as error: ask(GONE.name)
        assert str(error.value) == SENTENCE
    save_pretrained(tiny_model(), tmp_path / GONE.name)  # a folder of that name is a folder
    assert Codec.from_pretrained(GONE.name, device="cpu").fingerprint == tiny_codec().fingerprint


def test_a_file_of_a_withdrawn_model(monkeypatch, tmp_path, capsys):
    codec = tiny_codec()
    data = pack(replace(read_hfc(codec.encode(draw(codec, 40, 30, 1))), fingerprint=bytes.fromhex(GONE.fingerprint)))
    assert file_info(data)["model"] == GONE.name
    with pytest.raises(ModelMismatchError) as error: codec.decompress(data)
    assert str(error.value) == SENTENCE
    (tmp_path / "old").mkdir()
    for name in ("a.hfc", "b.hfc"): (tmp_path / "old" / name).write_bytes(data)
    assert main(["decompress", str(tmp_path / "old" / "a.hfc")]) == 1
    assert SENTENCE in capsys.readouterr().err
    assert main(["decompress", str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--workers", "1"]) == 1
    assert capsys.readouterr().err.count(SENTENCE) == 2
    with Image.open(tmp_path / "old" / "a.hfc") as image, pytest.raises(OSError) as error: image.load()
    assert str(error.value) == SENTENCE


def test_the_commit_of_a_withdrawn_model_has_it():
    def git(*command): return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True)

    if git("cat-file", "-e", f"{GONE.commit}^{{commit}}").returncode: pytest.skip("no clone with its whole history")
    card = json.loads(git("show", f"{GONE.commit}:hific_nb/models/{GONE.name}/card.json").stdout)
    weights = git("show", f"{GONE.commit}:hific_nb/models/{GONE.name}/weights.safetensors").stdout
    assert card["fingerprint"] == GONE.fingerprint and card["weights_sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("info", MODELS, ids=lambda m: m.name)
def test_the_card_is_true(info):
    model = load_model(info.folder)
    assert model_fingerprint(model, model.coding).hex() == info.fingerprint
    assert name_of_fingerprint(bytes.fromhex(info.fingerprint)) == info.name
    assert sum(p.numel() for p in model.parameters()) == info.parameters <= 7_500_000
    card = json.loads((info.folder / "card.json").read_text())
    assert hashlib.sha256((info.folder / "weights.safetensors").read_bytes()).hexdigest() == card["weights_sha256"]
    text = (info.folder / "README.md").read_text()
    figures = info.figures
    for shown in (info.fingerprint, f"{figures['bpp']:.3f}", f"{figures['psnr']:.2f}", f"{figures['ms_ssim']:.4f}",
                  "CC BY-SA 4.0", "papermill nbs/jobs/train.ipynb"):
        assert shown in text, f"the card of {info.name} does not show {shown}"
    assert figures_table(info) in text, "the table is another than card.json's: python benchmarks/kodak.py --card makes it anew"


@pytest.mark.parametrize("info", MODELS, ids=lambda m: m.name)
def test_weights_are_half_precision_and_small(info):
    assert info.weight_bytes < 16e6
    own = sum(p.numel() for name, p in load_model(info.folder).named_parameters() if not info.base or name.startswith("Generator."))
    assert (0.3 if info.near else 1.2) * own < info.weight_bytes < 1.8 * own  # two bytes each, packed
    assert all(torch.equal(p.half().float(), p) for p in load_model(info.folder).parameters())


def test_a_model_that_leaves_weights_to_its_base_can_be_saved_and_sent_as_a_whole(tmp_path):
    gan = next(m for m in MODELS if m.base)
    assert gan.base in {m.name for m in MODELS} and f"beside {gan.base}" in str(gan)
    folder = save_pretrained(load_pretrained(gan.name), tmp_path / "whole")
    whole = model_info(folder)
    assert whole.base is None and whole.fingerprint == gan.fingerprint and load_pretrained(folder)
    shutil.copytree(gan.folder, tmp_path / "part")
    with pytest.raises(ModelError, match="put the folder of that model beside it"): load_model(tmp_path / "part")


def test_the_card_of_a_model_with_levels(tmp_path):
    points = [dict(quality=q, bpp=b, psnr=p, lpips_alex=a) for q, b, p, a in
              ((50, 0.36, 29.0, 0.1), (0, 0.09, 25.0, 0.2), (100, 0.91, 33.0, 0.03))]
    figures = dict(dataset="kodak", photos=24, levels=points, **{k: v for k, v in points[0].items() if k != "quality"})
    folder = save_pretrained(tiny_model(levels=True), tmp_path / "tiny", description="for every rate", figures=figures)
    info = model_info(folder)
    assert info.levels == LEVELS and info.regimes == dict(low=1, med=4, high=7)
    assert info.rates == (0.09, 0.91) and [p["quality"] for p in info.points] == [0, 50, 100]
    for shown in (f"{LEVELS} rate levels, 0.090 ... 0.910 bpp", "med is level 4", "for every rate",
                  "quality 100: 0.910 bpp, 33.00 dB PSNR, 0.0300 LPIPS (Alex)"):
        assert shown in str(info)
    text = (folder / "README.md").read_text()
    for shown in ("0.090 to 0.910 bpp", "| 50 (med) | 0.360 | 29.00 | 0.1000 |", info.fingerprint, "sensitive", "kodak, 24 photos"):
        assert shown in text
    assert json.loads((folder / "card.json").read_text())["figures"] == figures


def test_facts_that_no_card_holds_are_refused_before_anything_is_written(tmp_path):
    folder = save_pretrained(tiny_model(), tmp_path / "tiny", figures=dict(bpp=np.float32(0.25), photos=np.int64(3)))
    assert model_info(folder).figures == dict(bpp=0.25, photos=3)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for wrong in (dict(description=None), dict(figures=[1]), dict(figures=dict(bpp="x")), dict(objective="mse"),
                  dict(figures=dict(bpp=0.2, psnr=object())), dict(readme=b"text")):
        with pytest.raises(ModelError): save_pretrained(tiny_model(seed=1), folder, **wrong)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_without_a_card_is_known_by_its_headers(tmp_path):
    folder = save_pretrained(tiny_model(), tmp_path / "tiny", description="one rate")
    stated = model_info(folder)
    (folder / "card.json").unlink()
    found = model_info(folder)
    assert (found.fingerprint, found.parameters) == (stated.fingerprint, stated.parameters)
    assert found.description == "" and found.rates is None and found.points == [] and found.levels == 0
    assert load_pretrained(folder) is not None
    (folder / "card.json").write_text('{"figures": "many"}')
    with pytest.raises(ModelError, match="card.json is damaged"): model_info(folder)
    with pytest.raises(ModelError, match="card.json is damaged"): load_pretrained(folder)


def test_a_changed_file_is_noticed(tmp_path):
    folder = save_pretrained(tiny_model(), tmp_path / "tiny")
    other = save_pretrained(tiny_model(seed=1), tmp_path / "other")
    for name in MODEL_FILES[1:4]:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        with pytest.raises(ModelError, match="get the whole folder again|Get the whole folder again"): Codec.from_pretrained(folder)
        (folder / name).write_bytes(kept)
    assert Codec.from_pretrained(folder).fingerprint == tiny_codec().fingerprint


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_model(tmp_path, levels, dtype):
    """Its tables are not those that the weights would give on this machine: they must be kept, not made again."""
    codec = Codec(tiny_model(levels=levels), device="cpu", dtype=dtype)
    latents = draw(codec, 70, 50, 3, level=5 if levels else None)
    data = codec.encode(latents)
    first = codec.save_pretrained(tmp_path / "first", description="once")
    second = Codec.from_pretrained(first, dtype=torch.bfloat16).save_pretrained(tmp_path / "second")
    assert sorted(p.name for p in second.iterdir()) == sorted(MODEL_FILES)
    for name in MODEL_FILES[:4]: assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
    for folder in (first, second):
        again = Codec.from_pretrained(folder, device="cpu", dtype=dtype)
        assert again.fingerprint == codec.fingerprint and again.name == folder.name
        assert np.array_equal(again.decode_latents(data).symbols, latents.symbols)
        assert np.array_equal(np.asarray(again.decompress(data)), np.asarray(codec.decompress(data)))
    info = model_info(second)
    assert info.description == "once" and info.weight_bytes < 2 * info.parameters + 18_000  # half precision, and its header


def test_weights_that_half_precision_would_round_are_kept(tmp_path):
    model = tiny_model()
    with torch.no_grad(): next(model.Generator.parameters()).add_(1e-5)
    before = Codec(model, device="cpu", dtype=torch.bfloat16)
    folder = before.save_pretrained(tmp_path / "exact")
    assert load_model(folder).state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(load_model(folder).state_dict().values(), model.state_dict().values()))
    assert Codec.from_pretrained(folder).fingerprint == before.fingerprint


def test_a_model_that_was_trained_on_is_not_saved_as_the_old_one(tmp_path):
    model = tiny_model()
    codec = Codec(model, device="cpu")
    with torch.no_grad(): next(model.parameters()).add_(1)
    with pytest.raises(CodecError, match="has changed"): codec.save_pretrained(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_files_of_a_model_with_another_generator_or_hyperprior(tmp_path):
    old = tiny_codec()
    data = old.encode(draw(old, 40, 40, 1))
    repainted, retrained = tiny_model(), tiny_model()
    with torch.no_grad():
        next(repainted.Generator.parameters()).mul_(0.5)
        next(retrained.Hyperprior.synthesis_mu.parameters()).mul_(0.5)
    new = Codec(repainted, device="cpu", dtype=torch.float32)
    with pytest.raises(ModelMismatchError): new.decompress(data)  # only where it is asked for
    assert new.read_files_of(tiny_model()).decompress(data).size == (40, 40)
    assert not np.array_equal(np.asarray(new.decompress(data)), np.asarray(old.decompress(data)))
    assert np.array_equal(new.decode_latents(data).symbols, old.decode_latents(data).symbols)
    other = Codec(retrained, device="cpu")
    for wrong in (tiny_model(), save_pretrained(tiny_model(), tmp_path / "old"), tiny_model(levels=True), "hific-lite"):
        with pytest.raises(CodecError, match="more than encoder and generator"): other.read_files_of(wrong)
    with pytest.raises(ModelMismatchError): other.decompress(data)


@pytest.fixture
def gan(monkeypatch, tmp_path):
    """A second shipped model, which `hific-lite` means from now on: the first with another generator; and one of other latents."""
    shipped = tmp_path / "models"
    shipped.mkdir()
    (shipped / "hific-lite-base-v2").symlink_to(model_folder("hific-lite-base-v2"))
    for name, part in (("hific-lite-v1", "Generator"), ("hific-other-v1", "Hyperprior")):
        model = load_pretrained("hific-lite-base-v2")
        with torch.no_grad():
            for p in getattr(model, part).parameters(): p.copy_((0.9 * p).half())
        save_pretrained(model, shipped / name, description="as if", figures=dict(bpp=0.3, dists=0.1))
    monkeypatch.setattr(zoo, "MODELS_FOLDER", shipped)
    monkeypatch.setitem(zoo.ALIASES, "hific-lite", "hific-lite-v1")
    monkeypatch.setitem(zoo.ALIASES, "hific-lite-base", "hific-lite-base-v2")


def test_two_generators_for_the_same_latents(gan, tmp_path, capsys):
    """Each reads what the other wrote, without being asked to; files name who wrote them, and are decoded by that model."""
    options = dict(device="cpu", dtype=torch.float32)
    new, old, other = (Codec.from_pretrained(name, **options) for name in ("hific-lite", "hific-lite-base", "hific-other-v1"))
    assert (new.name, old.name) == ("hific-lite-v1", "hific-lite-base-v2") and new.fingerprint != old.fingerprint
    photo = Image.fromarray(np.add.outer(np.arange(130) * 2, np.arange(150)).astype(np.uint8)).convert("RGB")
    files, pictures = [c.compress(photo, tile=64, thumbnail=False) for c in (new, old)], []
    assert [file_info(data)["model"] for data in files] == [new.name, old.name]
    assert replace(read_hfc(files[0]), fingerprint=old.fingerprint) == read_hfc(files[1])
    for codec in (new, old):
        own, foreign = (np.asarray(codec.decompress(data)) for data in files)
        assert np.array_equal(own, foreign)
        part = codec.decompress(files[codec is new], (60, 50, 100, 80))
        assert np.array_equal(np.asarray(part), own[50:80, 60:100])
        pictures.append(own)
    assert not np.array_equal(*pictures)
    assert new.decompress(old.compress(photo, tile=64), thumbnail=True).size == (4, 4)  # a file in the file
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match="'hific-lite-v1'"): other.decompress(files[0])
        with pytest.raises(ModelMismatchError, match="'hific-other-v1'"): new.decompress(other.compress(photo))
    for k, data in enumerate(files): (tmp_path / f"{k}.hfc").write_bytes(data)
    for k, given, shown in ((0, [], 0), (1, [], 1), (1, ["--model", "hific-lite"], 0)):
        assert main(["decompress", str(tmp_path / f"{k}.hfc"), "--device", "cpu", "--force", *given]) == 0
        wanted = Codec.from_pretrained((new, old)[shown].name, device="cpu").decompress(files[k])  # in the dtype of this CPU
        with Image.open(tmp_path / f"{k}.png") as image: assert np.array_equal(np.asarray(image), np.asarray(wanted))
    capsys.readouterr()
    assert main(["models"]) == 0
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " M parameters" in line]
    assert said == ["hific-other-v1", "hific-lite-v1 (hific-lite)", "hific-lite-base-v2 (hific-lite-base)"]


def test_a_foreign_model_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr("hific_nb.codec.load_pretrained", lambda name: looked.append(name) or load_pretrained(name))
    shipped = Codec.from_pretrained("hific-lite-base-v1", device="cpu")
    data = shipped.compress(Image.new("RGB", (40, 30)))
    looked.clear()
    tiny = tiny_codec(levels=True)
    for _ in range(3):
        with pytest.raises(ModelMismatchError, match="'hific-lite-base-v1'"): tiny.decompress(data)
    repainted = load_pretrained("hific-lite-base-v1")
    with torch.no_grad(): next(repainted.Generator.parameters()).mul_(0.5)
    again = Codec(repainted, device="cpu")
    for _ in range(2): assert again.decompress(data).size == (40, 30)
    assert looked == ["hific-lite-base-v1"] * 2


HUB = """
import hashlib, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

root, out = Path(sys.argv[1]), {}
commits = {"someone/tiny": {"main": "a" * 40, "v1": "b" * 40}, "someone/forged": {"main": "c" * 40}}
asked = []

class Hub(BaseHTTPRequestHandler):
    def answer(self, data, status=200, **headers):
        self.send_response(status)
        for key, value in headers.items(): self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET": self.wfile.write(data)

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        asked.append(path)
        words = path.split("/")
        repo = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if repo not in commits: return self.answer(b"{}", 401, X_Error_Code="RepoNotFound")
        revision = words[5] if words[0] == "api" else words[3]
        commit = revision if revision in commits[repo].values() else commits[repo].get(revision)
        if commit is None: return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        files = sorted(p for p in (root/commit).iterdir())
        if words[0] == "api" and words[4] == "revision":
            return self.answer(json.dumps(dict(id=repo, sha=commit, siblings=[dict(rfilename=p.name) for p in files])).encode(),
                               Content_Type="application/json")
        if words[0] == "api" and words[4] == "tree":
            return self.answer(json.dumps([dict(type="file", path=p.name, size=p.stat().st_size,
                                                oid=hashlib.sha1(p.read_bytes()).hexdigest()) for p in files]).encode(),
                               Content_Type="application/json")
        data = (root/commit/words[4]).read_bytes()
        self.answer(data, X_Repo_Commit=commit, ETag='"' + hashlib.sha1(data).hexdigest() + '"')

    do_HEAD = do_GET

    def log_message(self, *args): pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(root/"home"), "NO_PROXY": "127.0.0.1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}

from hific_nb.codec import Codec
from hific_nb.zoo import load_pretrained, model_folder

def tried(name):
    try: load_pretrained(name)
    except Exception as error: return type(error).__name__ + ": " + str(error)
    return "no error"

codec = Codec.from_pretrained("someone/tiny", device="cpu")
out["first"] = dict(name=codec.name, fingerprint=codec.fingerprint.hex(), size=codec.decompress(root/"file.hfc").size)
out["files"] = sorted(p.name for p in model_folder("someone/tiny").iterdir())
out["asked"] = sorted({p.split("/")[-1] for p in asked if "/resolve/" in p})
out["v1"] = Codec.from_pretrained("someone/tiny@v1", device="cpu").fingerprint.hex()
out["commit"] = Codec.from_pretrained("someone/tiny@" + "a" * 40, device="cpu").fingerprint.hex()
out["nobody"], out["gone"], out["forged"] = tried("nobody/tiny"), tried("someone/tiny@gone"), tried("someone/forged")
before = len(asked)
os.makedirs("models")
out["mistyped"] = tried("models/tyni")
out["asked for a mistyped path"] = len(asked) - before
server.shutdown()
server.server_close()
before = len(asked)
out["cached"] = [Codec.from_pretrained(name, device="cpu").fingerprint.hex() for name in ("someone/tiny", "someone/tiny@v1")]
out["never seen"] = tried("someone/other")
out["asked when it was gone"] = len(asked) - before
(root/"out.json").write_text(json.dumps(out))
"""


def test_a_model_from_the_hub_and_from_its_cache(tmp_path):
    """The client itself, against a server on loopback that answers as the Hub does; then with the server gone."""
    pytest.importorskip("huggingface_hub")
    for commit, seed in (("a", 0), ("b", 1), ("c", 2)):
        folder = save_pretrained(tiny_model(seed=seed), tmp_path / (40 * commit))
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        (folder / "setup.py").write_text("raise SystemExit")
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-2] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    codec = tiny_codec()
    (tmp_path / "file.hfc").write_bytes(codec.encode(draw(codec, 33, 20, 5)))
    (tmp_path / "cwd").mkdir()
    done = subprocess.run([sys.executable, "-c", HUB, str(tmp_path)], cwd=tmp_path / "cwd", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}, timeout=300)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    one, two = (tiny_codec(seed).fingerprint.hex() for seed in (0, 1))
    assert out["first"] == dict(name="someone/tiny", fingerprint=one, size=[33, 20])
    assert out["files"] == out["asked"] == sorted(MODEL_FILES)
    assert out["v1"] == two != one and out["commit"] == one and out["cached"] == [one, two]
    assert out["nobody"].startswith("HubError: There is no folder 'nobody/tiny' here, and no public nobody/tiny")
    assert out["gone"].startswith("HubError: The repository someone/tiny") and "no revision 'gone'" in out["gone"]
    assert out["forged"].startswith("ModelError: The files in") and "fingerprint is another" in out["forged"]
    assert out["mistyped"].startswith("UnknownModelError") and out["asked for a mistyped path"] == 0
    assert out["never seen"].startswith("HubError") and "cannot be reached, and no copy is in its cache" in out["never seen"]
    assert out["asked when it was gone"] == 0


def test_the_hub_without_its_package_and_addresses_that_are_none(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match="pip install huggingface_hub"): Codec.from_pretrained("someone/tiny")
    for name in ("../someone/tiny", "someone/tiny/more", "someone/", Path("someone/tiny"), ".hidden/tiny", "someone/tiny@"):
        with pytest.raises(UnknownModelError) as error: model_folder(name)
        assert not isinstance(error.value, HubError)
