"""Table indexes do not depend on the machine: other instruction sets, in processes of their own, without oneDNN, on one
thread or two, in another memory layout. The negative control: the float network does depend on it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hific_nb import Codec
from hific_nb.coders import table_bits
from hific_nb.config import ModelConfig, model_preset
from hific_nb.data import sample_photo
from hific_nb.entropy_models import scale_grid, scale_thresholds
from hific_nb.hyperprior import HYPERLATENT_BOUND, HyperSynthesis, IntegerSynthesis, ThresholdLookup
from hific_nb.model import Model, save_model

ROOT = Path(__file__).resolve().parent.parent
# What a process is told before it starts. Each then runs on one thread, on one without oneDNN, and on two.
SETTINGS = {
    "as it is": {},
    "SSE4.1": dict(ONEDNN_MAX_CPU_ISA="SSE41"),
    "AVX2": dict(ONEDNN_MAX_CPU_ISA="AVX2"),
    "no vectors": dict(ATEN_CPU_CAPABILITY="default"),
    "all of it, and MKL's oldest": dict(ONEDNN_MAX_CPU_ISA="SSE41", ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE"),
}
WORKER = """
import hashlib, json, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
from hific_nb.config import model_preset
from hific_nb.hyperprior import HyperSynthesis, IntegerSynthesis
from hific_nb.model import load_model, model_fingerprint, save_model

folder, out = map(Path, sys.argv[1:])
out.mkdir()
tensors = load_file(folder / "synthesis.safetensors")
z, thresholds = tensors.pop("z"), tensors.pop("thresholds")
synthesis = HyperSynthesis(model_preset("hific-lite"))
synthesis.load_state_dict(tensors)
exact = IntegerSynthesis(synthesis, thresholds.numpy())
size = (4 * z.shape[2], 4 * z.shape[3])
digests, runs = {}, {}
for threads, onednn in ((1, True), (1, False), (2, True)):
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn
    for layout in (torch.contiguous_format, torch.channels_last):
        part = z[:, :, :4].contiguous(memory_format=layout)
        indexes = exact(part, (16, size[1])).numpy()
        digests[f"{threads} {onednn} {layout}"] = hashlib.sha256(indexes.tobytes()).hexdigest()
    with torch.inference_mode():
        indexes = torch.searchsorted(thresholds, synthesis(z).double().contiguous(), right=True)
    np.save(out / f"float {threads} {onednn}.npy", indexes.to(torch.uint8).numpy())
np.save(out / "exact.npy", exact(z, size).numpy())
model = load_model(save_model(load_model(folder / "wide"), out / "model"))  # tables are built again here
print(json.dumps(dict(digests=digests, fingerprint=model_fingerprint(model, model.coding).hex())))
"""


@pytest.fixture(scope="module")
def synthesis():
    """hific-lite's hyper-synthesis of the scales with random weights, its scales spread over the tables: 1 +- 1.4."""
    rng = np.random.default_rng(0)  # torch's normal numbers depend on the vector unit
    network = HyperSynthesis(model_preset("hific-lite"))
    with torch.no_grad():
        for conv in network.children():
            terms = conv.weight.shape[0] * conv.kernel_size[0] ** 2 / conv.stride[0] ** 2  # of one output
            conv.weight.copy_(torch.from_numpy(rng.standard_normal(conv.weight.shape) * (2 / terms) ** 0.5))
            conv.bias.copy_(torch.from_numpy(0.1 * rng.standard_normal(conv.bias.shape)))
        network.conv3.weight.mul_(0.5)
        network.conv3.bias.add_(1)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def thresholds():
    return scale_thresholds(scale_grid())


@pytest.fixture(scope="module")
def found(synthesis, thresholds, tmp_path_factory):
    """Setting -> what a process under it computed, and the folder with its arrays."""
    folder = tmp_path_factory.mktemp("exactness")
    z = torch.from_numpy(np.random.default_rng(1).integers(-3, 4, (1, 96, 32, 48))).float()  # 3.1 million latents
    tensors = dict(synthesis.state_dict()) | dict(z=z, thresholds=torch.from_numpy(thresholds))
    save_file(tensors, folder / "synthesis.safetensors")
    torch.manual_seed(0)
    model = Model(ModelConfig(transform="light", channels=(4, 4, 4, 4), latent_channels=4, hyperprior_channels=192))
    with torch.no_grad():
        for p in model.Hyperprior.hyperlatent_likelihood.parameters():  # densities of many shapes
            p.add_(torch.randn(p.shape) * 0.5)
    save_model(model, folder / "wide", torch.float32)
    results = {}
    for i, (name, variables) in enumerate(SETTINGS.items()):
        env = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR")}
        env |= dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT)) | variables
        command = [sys.executable, "-c", WORKER, str(folder), str(folder / str(i))]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        results[name] = json.loads(done.stdout.splitlines()[-1]) | dict(folder=folder / str(i))
    return results


def test_indexes_are_the_same_on_every_machine(found):
    digests = {d for result in found.values() for d in result["digests"].values()}
    assert len(digests) == 1, {name: result["digests"] for name, result in found.items()}
    arrays = [np.load(result["folder"] / "exact.npy") for result in found.values()]
    assert all(np.array_equal(arrays[0], other) for other in arrays[1:])
    assert arrays[0].size == 128 * 128 * 192 and len(np.unique(arrays[0])) > 50  # and they are not all one table


def test_the_float_network_changes_its_mind(found):
    """Without this the test above might pass for lack of anything to find."""
    arrays = {(name, path.stem): np.load(path) for name, result in found.items()
              for path in sorted(result["folder"].glob("float*.npy"))}
    first, *others = arrays.values()
    changed = {key: int((array != first).sum()) for key, array in arrays.items()}
    assert max(changed.values()) > 0, changed
    assert max(changed.values()) < 1e-4 * first.size  # by rounding, not for being another network


def test_integers_are_close_to_floats(found):
    """What exactness costs: a neighbouring table for one latent in hundreds."""
    result = found["as it is"]["folder"]
    exact, floats = np.load(result / "exact.npy").astype(int), np.load(result / "float 1 True.npy")[0].astype(int)
    assert (exact == floats).mean() > 0.999 and np.abs(exact - floats).max() <= 1


def test_tables_and_fingerprint_are_built_alike_everywhere(found):
    assert len({result["fingerprint"] for result in found.values()}) == 1, found


CODEC = """
import hashlib, json, sys
import numpy as np, torch
from hific_nb import Codec
from hific_nb.data import sample_photo

name, *out = sys.argv[1:]
torch.set_num_threads(1)
if out == ["encode"]:
    photo = sample_photo("coffee").crop((100, 50, 301, 178))  # no side a multiple of 64
    with open(name, "wb") as f: f.write(Codec.from_pretrained("hific-lite", device="cpu", dtype=torch.float32).compress(photo))
    raise SystemExit
found, pictures = {}, {}
for dtype, layout, threads, onednn in (("float32", "channels_last", 1, True), ("float32", "contiguous_format", 2, False),
                                       ("float64", "contiguous_format", 2, True), ("bfloat16", "channels_last", 2, True),
                                       ("bfloat16", "contiguous_format", 1, True)):
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = onednn
    codec = Codec.from_pretrained("hific-lite", device="cpu", dtype=getattr(torch, dtype))
    codec.model.to(memory_format=getattr(torch, layout))
    latents = codec.decode_latents(name)
    arrays = latents.hyperlatents, latents.symbols, latents.indexes
    key = f"{dtype} {layout} {threads} {onednn}"
    found[key] = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
    pictures[key] = np.asarray(codec.generate(latents))
np.savez(out[0], **pictures)
print(json.dumps(found))
"""


def test_a_file_decodes_in_other_processes_whatever_the_generator_computes_in(tmp_path):
    """Encoded in one process; decoded in others under each setting, on one thread and two, without oneDNN, with weights in either
    memory layout and the generator in float32, float64 and bfloat16: the same symbols, and pixels that agree to rounding."""
    def python(*arguments, **variables):
        env = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR")}
        env |= dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT)) | variables
        done = subprocess.run([sys.executable, "-c", CODEC, *map(str, arguments)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, (variables, done.stderr)
        return done.stdout
    file = tmp_path / "photo.hfc"
    python(file, "encode")
    digests, pictures = set(), {}
    for i, (name, variables) in enumerate(list(SETTINGS.items())[:4]):
        digests |= set(json.loads(python(file, tmp_path / f"{i}.npz", **variables).splitlines()[-1]).values())
        with np.load(tmp_path / f"{i}.npz") as arrays: pictures |= {(name, key): arrays[key].astype(int) for key in arrays}
    assert len(digests) == 1
    reference = pictures["as it is", "float32 channels_last 1 True"]
    assert reference.shape == (128, 201, 3) and reference.std() > 20 and len(pictures) == 5 * 4
    for key, picture in pictures.items():
        assert np.abs(picture - reference).max() <= (8 if "bfloat16" in key[1] else 2), key


@pytest.mark.parametrize("quality", ["low", "high"])
def test_exact_indexes_cost_less_than_half_a_percent_in_rate(quality):
    """Of trained weights, on photos: the bits of the symbols under the integers' table rows and under the float network's."""
    codec = Codec.from_pretrained("hific-lite", device="cpu", dtype=torch.float32)
    coding, bits, same = codec.model.coding, np.zeros(2), []
    for photo in ("coffee", "chelsea", "rocket"):
        latents = codec.encode_latents(sample_photo(photo).resize((384, 256)), quality=quality)
        with torch.inference_mode():
            scales = codec.model.Hyperprior.synthesize(torch.from_numpy(latents.hyperlatents)[None].float(),
                                                       latents.symbols.shape[1:])[1]
        rows = np.searchsorted(scale_thresholds(coding.scales), scales[0].double().numpy(), side="right")
        same.append((rows == latents.indexes).mean())
        bits += [table_bits([(latents.symbols.ravel(), r.ravel(), coding.latents)]) for r in (latents.indexes, rows)]
    assert 0.98 < np.mean(same) < 1, "they are the same for most latents, and are not the same network"
    assert abs(bits[0] / bits[1] - 1) < 0.005


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 4), (5, 3), (17, 9)])
def test_any_size(synthesis, thresholds, size):
    exact = IntegerSynthesis(synthesis, thresholds)
    z = torch.randint(-20, 21, (1, 96, -(-size[0] // 4), -(-size[1] // 4)))
    indexes = exact(z, size)
    assert indexes.shape == (128, *size) and indexes.dtype == torch.uint8
    assert torch.equal(indexes, exact(z, (4 * z.shape[2], 4 * z.shape[3]))[:, : size[0], : size[1]])


def test_float16_weights_are_taken_as_they_are(thresholds, synthesis):
    """Stored weights are multiples of 2**-24; in a layer with room for 24 bits the integers are those weights exactly."""
    half = HyperSynthesis(model_preset("hific-lite"))
    half.load_state_dict({k: t.half().float() for k, t in synthesis.state_dict().items()})
    exact = IntegerSynthesis(half, thresholds)
    assert exact.weight_bits[0] == 24
    (py, px), taps, matrix = exact.layers[0][0][0]
    assert (py, px) == (0, 0) and len(taps) == 9
    stored = {float(v) for v in half.conv1.weight.detach()[:, :, 0::2, 0::2].double().flatten()}
    assert {float(v) for v in (matrix * 2.0 ** -24).flatten()} == stored


@pytest.mark.parametrize("gain", [1e-3, 1.0, 30.0])
def test_no_hyperlatents_leave_the_bounds(thresholds, gain):
    """Sums stay whole and below 2**52, for the loudest hyperlatents and for weights of any size that is accepted."""
    rng = np.random.default_rng(0)
    network = HyperSynthesis(ModelConfig(latent_channels=5, hyperprior_channels=7))
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.from_numpy(gain * rng.standard_normal(p.shape)))
    exact = IntegerSynthesis(network, thresholds)
    assert all(bound < 2 ** 52 for bound in exact.bounds)
    for values in (2.0 ** 31, -2.0 ** 31, float("inf"), float("nan")):
        for signs in (np.ones((1, 7, 3, 4)), rng.choice([-1, 1], (1, 7, 3, 4))):
            z = torch.from_numpy(values * signs)
            scales = exact.scales(z)
            assert torch.equal(scales, scales.round()) and scales.abs().max() <= exact.bounds[2]
            saturated = z.nan_to_num(0.0).clamp(-HYPERLATENT_BOUND, HYPERLATENT_BOUND)
            assert torch.equal(scales, exact.scales(saturated))


numbers = st.one_of(st.floats(allow_nan=False), st.integers(-2 ** 53, 2 ** 53).map(float))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_the_lookup_is_a_search(data):
    """Any thresholds, any numbers: those at the thresholds and beside them, and at and beside the edges of their codes."""
    thresholds = np.unique(np.array(data.draw(st.lists(numbers.filter(np.isfinite), max_size=40)), float) + 0.0)
    if data.draw(st.booleans()): thresholds = np.unique(np.abs(thresholds))
    codes = thresholds.view(np.int64) >> 48
    near = np.concatenate([thresholds, (codes << 48).view(np.float64), ((codes << 48) - 1).view(np.float64),
                           data.draw(st.lists(numbers)), [0.0, -0.0, np.inf, -np.inf]])
    with np.errstate(over="ignore"):
        near = np.concatenate([near, np.nextafter(near, np.inf), np.nextafter(near, -np.inf)])
    near = near[~np.isnan(near)]
    lookup = ThresholdLookup(torch.from_numpy(thresholds))
    found = lookup(torch.from_numpy(near[:, None, None]))
    assert found.dtype == torch.uint8 and np.array_equal(found[:, 0, 0], np.searchsorted(thresholds, near, side="right"))


@pytest.mark.parametrize("levels, one_comparison", [(96, True), (2, True), (160, False), (400, False)])
def test_the_lookup_of_any_grid(levels, one_comparison):
    thresholds = np.rint(scale_thresholds(scale_grid(levels=levels)) * 2.0 ** 36)
    scales = np.rint(np.exp2(np.random.default_rng(levels).uniform(30, 46, (6, 50, 60))))
    scales[0] = np.resize(np.concatenate([thresholds, thresholds - 1, thresholds + 1, [0, -5]]), (50, 60))
    lookup = ThresholdLookup(torch.from_numpy(thresholds))
    assert lookup.one_comparison == one_comparison
    found = lookup(torch.from_numpy(scales)[:, :, :59])
    assert found.dtype == (torch.uint8 if levels <= 256 else torch.int32)
    assert np.array_equal(found, np.searchsorted(thresholds, scales, side="right")[:, :, :59])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_finds_the_same_indexes(synthesis, thresholds):
    z = torch.from_numpy(np.random.default_rng(4).integers(-60, 61, (1, 96, 16, 24)))
    exact, gpu = IntegerSynthesis(synthesis, thresholds), IntegerSynthesis(synthesis, thresholds).to("cuda")
    assert torch.equal(exact.scales(z), gpu.scales(z.cuda()).cpu())
    assert torch.equal(exact(z, (64, 96)), gpu(z.cuda(), (64, 96)).cpu())
    x = exact.lookup.thresholds
    x = torch.cat([x, x - 1, x + 1, -x, x.new_tensor([0.0, -0.0, 2.0 ** 52, torch.inf])])[:, None, None]
    assert torch.equal(exact.lookup(x), gpu.lookup(x.cuda()).cpu())
