"""Model folders: there and back, in this process and another, and every way in which one can be broken."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hific_nb import model as room
from hific_nb.codec import Codec
from hific_nb.config import ConfigError, HificError, ModelConfig
from hific_nb.data import sample_photo
from hific_nb.entropy_models import get_density, register_density, tables_from_pmfs
from hific_nb.model import (Coding, Model, ModelError, load_model, model_fingerprint, save_model, store_difference,
                            store_packed)
from hific_nb.transforms import LightEncoder, register_transform
from hific_nb.zoo import find_model, model_info

import tiny

ROOT = Path(__file__).resolve().parent.parent
FILES = ("config.json", "weights.safetensors", "tables.safetensors")
LIGHT = ModelConfig(transform="light", channels=(4, 4, 6, 6), encoder_blocks=(0, 0, 1, 0), generator_blocks=(0, 1, 0, 0),
                    latent_channels=6, hyperprior_channels=5)
PAPER = ModelConfig(channels=(4, 4, 6, 6, 8), n_residual_blocks=1, latent_channels=6, hyperprior_channels=5)
CONFIGS = {"light": LIGHT, "paper": PAPER, "logistic": LIGHT.replace(likelihood="logistic"),
           "range and noise": PAPER.replace(normalize_input_image=True, noise_channels=2),
           "instance norm": PAPER.replace(use_channel_norm=False), "min_scale": LIGHT.replace(min_scale=0.2)}


def made(config=LIGHT, seed=0):
    torch.manual_seed(seed)
    return Model(config)


def name_of(model):
    return model_fingerprint(model, model.coding).hex()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_model(made(), tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def copied(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(config, tmp_path):
    model = made(config)
    loaded = load_model(save_model(model, tmp_path / "a"))
    assert loaded.config == config and not loaded.training
    for (key, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert after.dtype == torch.float32 and torch.equal(before.half().float(), after), key
    save_model(loaded, tmp_path / "b")
    assert [(tmp_path / "a" / f).read_bytes() for f in FILES] == [(tmp_path / "b" / f).read_bytes() for f in FILES]
    built = Coding.from_model(loaded)
    for part in ("hyperlatents", "latents"):
        for field in ("cdf", "slots", "offset"):
            stored = getattr(getattr(loaded.coding, part), field)
            assert np.array_equal(stored, getattr(getattr(built, part), field)), (part, field)
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(x)["recon"], load_model(tmp_path / "b")(x)["recon"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precisions(dtype, tmp_path):
    model = made()
    loaded = load_model(save_model(model, tmp_path, dtype))
    for before, after in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(before.to(dtype).float(), after)


def test_a_model_is_saved_alike_however_it_lies_in_memory(good, tmp_path):
    for i, model in enumerate((made().to(memory_format=torch.channels_last), made().double(), made().train(),
                               made().requires_grad_(False))):
        save_model(model, tmp_path / str(i))
        assert [(good / f).read_bytes() for f in FILES] == [(tmp_path / str(i) / f).read_bytes() for f in FILES]


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = made().train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    save_model(model, tmp_path)
    assert model.training and not hasattr(model, "coding")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_loading_uses_up_no_random_numbers_and_minds_no_settings_of_numpy():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    with np.errstate(all="raise"): load_model(find_model("hific-lite")[0])  # packed: weights near 0 underflow
    assert torch.equal(torch.rand(3), wanted)


def test_images_must_be_batches(good):
    with pytest.raises(ModelError, match=r"\(B, 3, H, W\)"): load_model(good)(torch.rand(3, 64, 64))


def test_a_loaded_model_goes_on_training(good):
    model = load_model(good).train()
    out = model(torch.rand(1, 3, 32, 32))
    (out["recon"].square().mean() + out["bpp_noisy"].mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- stored in fewer bytes


@pytest.fixture
def beside(tmp_path):
    "A folder, packed, and one that differs in its generator alone and leaves the rest to it, packed as well; their names."
    model = made(LIGHT.replace(channels=(12, 16, 24, 24), latent_channels=24))
    save_model(model, tmp_path / "base")
    with torch.no_grad():
        for p in model.Generator.parameters(): p += 0.01 * torch.randn_like(p)
    save_model(model, tmp_path / "other")
    names = [name_of(load_model(tmp_path / name)) for name in ("base", "other")]
    sizes = [(tmp_path / "base" / FILES[1]).stat().st_size]
    store_difference(tmp_path / "other", tmp_path / "base")
    sizes.append((tmp_path / "other" / FILES[1]).stat().st_size)
    for name in ("other", "base"): store_packed(tmp_path / name)  # before what it is packed against, which must not matter
    return tmp_path, names, sizes


def test_packed_weights_are_the_same_and_fewer_bytes(beside):
    folder, names, sizes = beside
    for name, fingerprint, size in zip(("base", "other"), names, sizes):
        path = folder / name / FILES[1]
        packed = path.read_bytes()
        assert name_of(load_model(folder / name)) == fingerprint and len(packed) < size
        assert store_packed(folder / name) == folder / name and path.read_bytes() == packed
    assert model_info(folder / "base").parameters == sum(t.numel() for t in load_model(folder / "base").state_dict().values())
    save_model(load_model(folder / "other"), folder / "whole")
    assert name_of(load_model(folder / "whole")) == names[1]
    with pytest.raises(ModelError, match="nothing to lend"): store_difference(folder / "whole", folder / "other")
    store_difference(folder / "whole", folder / "base")  # a base that is packed
    assert name_of(load_model(folder / "whole")) == names[1]


def test_weights_packed_near_those_of_another_model(beside):
    """The same to the bit, also near one that is a part itself; with a step, fewer bytes and close to it."""
    folder, names, _ = beside
    model = load_model(folder / "other")
    with torch.no_grad():
        for p in model.parameters(): p += 0.01 * p.abs().mean() * torch.randn_like(p)
    save_model(model, folder / "third")
    whole, sizes = name_of(load_model(folder / "third")), []
    for near, step in ((None, 0), ("other", 0), ("base", 0), ("other", 0.25)):
        there = load_model(store_packed(folder / "third", near and folder / near, step))
        assert (name_of(there) == whole) == (not step)
        sizes.append((folder / "third" / FILES[1]).stat().st_size)
    assert sizes[1] < sizes[2] < sizes[0] and sizes[3] < 0.7 * sizes[1]
    old, new = (torch.cat([p.flatten() for p in m.parameters()]) for m in (load_model(folder / "other"), model))
    moved = torch.cat([p.flatten() for p in there.parameters()])
    assert 0 < (moved - new).norm() < 0.1 * (new - old).norm()
    assert all(torch.equal(p.half().float(), p) for p in there.parameters())
    assert model_info(folder / "third").parameters == sum(t.numel() for t in there.state_dict().values())

    before = (folder / "base" / FILES[1]).read_bytes()
    with pytest.raises(ModelError, match="from each other"): store_packed(folder / "base", folder / "third")  # which rests on it
    assert (folder / "base" / FILES[1]).read_bytes() == before
    with safe_open(folder / "base" / FILES[1], "pt") as f: about = f.metadata()
    save_file(load_file(folder / "base" / FILES[1]), folder / "base" / FILES[1], about | {"near": "third"})
    with pytest.raises(ModelError, match="from each other"): load_model(folder / "third")


def test_weights_cannot_be_packed_near_anything(beside, tmp_path):
    folder, _, _ = beside
    save_model(load_model(folder / "base"), folder / "free")
    for name, near, step, why in (("free", None, 0.25, "say from which model"), ("free", folder / "free", 0, "must lie beside"),
                                  ("free", tmp_path.parent, 0, "must lie beside"), ("free", folder / "gone", 0, "has no weights"),
                                  ("other", folder / "base", 0, "leaves weights to 'base' already"),
                                  ("free", folder / "base", -1, "A step is"), ("free", folder / "base", float("nan"), "A step is")):
        before = (folder / name / FILES[1]).read_bytes()
        with pytest.raises(ModelError, match=why): store_packed(folder / name, near, step)
        assert (folder / name / FILES[1]).read_bytes() == before


def test_packed_weights_beside_a_base_of_another_type(tmp_path):
    """No difference is taken from float32, neither when they are packed nor when they are read."""
    model = made()
    save_model(model, tmp_path / "rough")
    save_model(load_model(tmp_path / "rough"), tmp_path / "base", torch.float32)
    tensors = load_file(tmp_path / "base" / FILES[1])
    name, key = name_of(load_model(tmp_path / "rough")), "Encoder.layers.0.weight"
    part = {k: t.half() for k, t in tensors.items() if k == key}
    save_file(part, tmp_path / "rough" / FILES[1], {"base": "base"})
    assert name_of(load_model(store_packed(tmp_path / "rough"))) == name
    with safe_open(tmp_path / "rough" / FILES[1], "pt") as f: assert key in json.loads(f.metadata()["packed"])


@pytest.mark.parametrize("name", ["base", "other"])
def test_packed_weights_that_were_altered(beside, name):
    folder, names, _ = beside
    path, fingerprint = folder / name / FILES[1], names[name == "other"]
    good, wrong = path.read_bytes(), 0
    for k in (*range(0, 400, 20), *range(400, len(good), len(good) // 100)):
        path.write_bytes(good[:k] + bytes([good[k] ^ 1 << k % 8]) + good[k + 1:])
        wrong += not loads_or_fails_well(folder / name, fingerprint)
    assert wrong > 20
    path.write_bytes(good)
    with safe_open(path, "pt") as f: about, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    shapes, key = json.loads(about["packed"]), "Generator.layers.0.weight"
    for change in ({key: [10 ** 6, 10 ** 6]}, {key: [1]}, {key: [-1]}, {key: "all"}, {"nobody": [1]}, None, "[1", 7):
        text = change if isinstance(change, str) else json.dumps(shapes | change if isinstance(change, dict) else change)
        save_file(tensors, path, about | {"packed": text})
        with pytest.raises(ModelError, match="get the model folder again") as error: load_model(folder / name)
        assert "\n" not in str(error.value)


# ---- a generator that is told the level


def test_level_offsets_reach_the_generator_alone(tmp_path):
    """Each level's own, between anchors too; whole, in pieces, as a box and of a file of the model without them."""
    plain = tiny.tiny_model(levels=True)
    model = Model(plain.config.replace(level_offsets=True)).eval()
    assert model.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["Generator.level_offset"]
    model.coding = plain.coding
    before, same = Codec(plain, device="cpu", dtype=torch.float32), Codec(model, device="cpu", dtype=torch.float32)
    with torch.no_grad(): model.Generator.level_offset[1] += 1
    told = Codec(model, device="cpu", dtype=torch.float32).read_files_of(plain)
    photo = sample_photo("coffee").resize((600, 424))
    changed = []
    for level in range(tiny.LEVELS):
        data = before.encode(before.quantize(before.analyse(photo), level))
        latents, picture = before.decode_latents(data), told.decompress(data)
        assert np.array_equal(told.decode_latents(data).symbols, latents.symbols)
        assert np.array_equal(np.asarray(same.generate(latents)), np.asarray(before.generate(latents)))  # zeros
        with torch.no_grad():
            by_model = model.synthesis(model.told(latents.y_hat, torch.tensor([level])))[..., :424, :600]
        assert np.abs(np.asarray(picture, int) - by_model[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).numpy()).max() <= 1
        pieces, box = told.decompress(data, memory="16MiB"), (37, 50, 210, 301)
        assert np.abs(np.asarray(pieces, int) - np.asarray(picture, int)).max() <= 1
        assert np.abs(np.asarray(told.decompress(data, box=box), int) - np.asarray(picture.crop(box), int)).max() <= 1
        changed.append(np.abs(np.asarray(picture, int) - np.asarray(before.generate(latents), int)).mean())
    position = [level * 5 / (tiny.LEVELS - 1) for level in range(tiny.LEVELS)]  # six anchors
    assert [c > 0 for c in changed] == [0 < p < 2 for p in position]
    again = load_model(save_model(model, tmp_path / "told"))
    assert again.config.level_offsets and torch.equal(again.Generator.level_offset, model.Generator.level_offset)
    with pytest.raises(ConfigError, match="rate_levels"): plain.config.replace(rate_levels=0, regime_levels=(), level_offsets=True)


# ---- fingerprints


def test_fingerprint_in_a_second_process(good, tmp_path):
    model = load_model(good)
    code = ("import sys; from hific_nb.model import *\n"
            "m = load_model(sys.argv[1]); print(model_fingerprint(m, m.coding).hex())\n"
            "m = load_model(save_model(m, sys.argv[2])); print(model_fingerprint(m, m.coding).hex())")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, good, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name_of(model)] * 2


def test_the_codec_of_a_folder_and_of_the_same_model_in_memory_are_one(good):
    loaded = load_model(good)
    in_memory = Model(LIGHT)
    in_memory.load_state_dict(loaded.state_dict())
    assert Codec(loaded).fingerprint.hex() == Codec(in_memory.eval()).fingerprint.hex() == name_of(loaded)


def test_any_changed_weight_changes_the_fingerprint(good):
    model, names = load_model(good), set()
    names.add(name_of(model))
    for tensor in model.state_dict().values():
        flat, i = tensor.view(-1), random.Random(tensor.numel()).randrange(tensor.numel())
        kept = flat[i].clone()
        flat[i] = torch.nextafter(kept, torch.tensor(float("inf")))
        names.add(name_of(model))
        flat[i] = kept
    assert len(names) == 1 + len(model.state_dict())


def test_settings_and_tables_change_the_fingerprint(good):
    model = load_model(good)
    names = {name_of(model)}
    for change in (dict(normalize_input_image=True), dict(likelihood="logistic"), dict(min_scale=0.12)):
        model.config = LIGHT.replace(**change)
        names.add(name_of(model))
    model.config = LIGHT
    arrays = model.coding.tensors()
    for key in ("latents.offset", "hyperlatents.offset"):
        names.add(model_fingerprint(model, Coding.from_tensors(arrays | {key: arrays[key] - np.int32(1)})).hex())
    names.add(model_fingerprint(model, Coding.from_tensors(arrays | {"scales": np.nextafter(arrays["scales"], 999)})).hex())
    assert len(names) == 7


def test_the_fingerprint_is_what_it_was():
    """Files name their model by it: whoever changes this value makes every file unreadable."""
    model = Model(LIGHT.replace(hyperprior_channels=2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((torch.arange(p.numel()).reshape(p.shape) % 7 - 3) / 2 ** (3 + i % 3))
    pmfs = [np.array([0.25, 0.5, 0.125]), np.array([0.5, 0.25])]
    coding = Coding(tables_from_pmfs(pmfs, [-1, 0]), tables_from_pmfs(pmfs, [-1, 2]), np.array([0.5, 2.0]))
    assert model_fingerprint(model, coding).hex() == "16a467699f113e7d"


# ---- folders that are broken


def loads_or_fails_well(folder, name):
    """Whether the folder loads; if so it is the same model, and if not a ModelError of one line says so."""
    try:
        loaded = load_model(folder)
    except ModelError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return False
    assert name_of(loaded) == name
    return True


@pytest.mark.parametrize("file", FILES)
def test_flipped_bits(copied, file):
    """A flip is an error, or it changed nothing that counts (the name of the fingerprint, say)."""
    name, data, rng = name_of(load_model(copied)), (copied / file).read_bytes(), random.Random(0)
    header = min(len(data), 1200)  # where a flip does the strangest things
    positions = [rng.randrange(header) for _ in range(60)] + [rng.randrange(len(data)) for _ in range(40)]
    survived = 0
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        (copied / file).write_bytes(flipped)
        survived += loads_or_fails_well(copied, name)
    assert survived < 20


@pytest.mark.parametrize("file", FILES)
def test_truncated_files(copied, file):
    name, data = name_of(load_model(copied)), (copied / file).read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 2):
        (copied / file).write_bytes(data[:size])
        assert not loads_or_fails_well(copied, name), size
    (copied / file).write_bytes(data + b"more")
    assert not loads_or_fails_well(copied, name)
    (copied / file).unlink()
    assert not loads_or_fails_well(copied, name)
    (copied / file).mkdir()
    assert not loads_or_fails_well(copied, name)


@pytest.mark.parametrize("file", FILES[1:])
def test_files_of_another_model(good, copied, tmp_path, file):
    other = save_model(made(seed=1), tmp_path / "other")
    shutil.copy(other / file, copied / file)
    with pytest.raises(ModelError, match="fingerprint"):
        load_model(copied)


def test_the_drawing_that_is_not_registered_is_named(copied):
    config = json.loads((copied / "config.json").read_text())
    for change, advice in ((dict(transform="mine"), "register_transform"), (dict(likelihood="mine"), "register_density")):
        (copied / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=advice):
            load_model(copied)


def test_a_giant_config_takes_no_memory(copied):
    """Weights of many GB are promised by the config; a process that believed it would be killed."""
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | dict(hyperprior_channels=4096, channels=[4096] * 4)))
    code = """
import sys
from hific_nb.model import ModelError, load_model
def peak(): return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
try: load_model(sys.argv[1])
except ModelError as error: print(peak() - before)
"""
    if not os.path.exists("/proc/self/status"): pytest.skip("no /proc here to read the peak memory from")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, copied], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # kB on Linux


@pytest.mark.parametrize("whole", range(len(FILES)))
def test_a_save_that_is_interrupted(copied, monkeypatch, whole):
    """The disk fills up after `whole` files: the old model is still there, or the mixture is refused; never another model."""
    name, written = name_of(load_model(copied)), []

    def write(path, data):
        if len(written) == whole:
            raise HificError("No space left on the disk.")
        written.append(path)
        Path(path).write_bytes(data)

    monkeypatch.setattr(room, "write_atomic", write)
    with pytest.raises(HificError, match="No space"):
        save_model(made(seed=1), copied)
    assert loads_or_fails_well(copied, name) == (whole < 2)


def test_a_folder_without_a_fingerprint_is_taken_as_it_is(good, copied):
    from safetensors.torch import load_file, save_file
    save_file(load_file(copied / "tables.safetensors"), copied / "tables.safetensors")
    assert name_of(load_model(copied)) == name_of(load_model(good))


# ---- parts of one's own


class Mine(LightEncoder):
    pass


class Window(nn.Module):
    """A part that cannot be drawn without numbers, and has a buffer of whole numbers and one that is not saved."""

    def __init__(self, config):
        super().__init__()
        window = torch.hann_window(16)
        self.gain = float(window.sum())  # not on the meta device
        self.register_buffer("seen", torch.tensor(2 ** 24 + 1))
        self.register_buffer("window", window, persistent=False)
        self.conv = nn.Conv2d(config.latent_channels, 3, 1)

    def forward(self, y):
        return nn.functional.interpolate(self.conv(y), scale_factor=16) * self.window.repeat(y.shape[-1]) / self.gain


@pytest.fixture
def registries():
    """Names registered in a test are gone after it."""
    from hific_nb import entropy_models, transforms
    kept = dict(transforms._TRANSFORMS), dict(entropy_models._DENSITIES)
    yield
    for registry, names in zip((transforms._TRANSFORMS, entropy_models._DENSITIES), kept):
        registry.clear()
        registry.update(names)


def test_registered_parts_round_trip(registries, tmp_path):
    register_transform("windowed", Mine, Window)
    register_density("wide", lambda x: get_density("logistic")(x / 2))
    config = LIGHT.replace(transform="windowed", likelihood="wide")
    model = made(config)
    model.Generator.seen += 1
    loaded = load_model(save_model(model, tmp_path))
    assert type(loaded.Encoder) is Mine and type(loaded.Generator) is Window and loaded.config == config
    assert loaded.Generator.seen == 2 ** 24 + 2 and torch.equal(loaded.Generator.window, torch.hann_window(16))
    plain = made(LIGHT.replace(likelihood="logistic"))
    assert not np.array_equal(loaded.coding.latents.cdf, Coding.from_model(plain).latents.cdf)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert loaded(x)["recon"].shape == x.shape
    loaded.Generator.seen -= 1
    assert name_of(loaded) != name_of(load_model(tmp_path))


def test_parts_without_a_name_are_not_saved(tmp_path):
    for parts in (dict(encoder=Mine(LIGHT)), dict(generator=nn.Sequential()), dict(hyperprior=nn.Identity())):
        model = Model(LIGHT, **parts)
        with pytest.raises(ModelError, match="registered"):
            save_model(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_hyperprior_without_tables_is_named():
    with pytest.raises(ModelError, match="hyperlatent_likelihood"):
        Coding.from_model(Model(LIGHT, hyperprior=nn.Identity()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_float16_cannot_hold(tmp_path, value):
    model = made()
    with torch.no_grad():
        model.Encoder.layers[0].weight[0, 0, 0, 0] = value
    with pytest.raises(ModelError, match="Encoder.layers.0.weight is not finite"):
        save_model(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
