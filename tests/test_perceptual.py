"""LPIPS: the published distances, gradients, where weights come from, and that nothing which decodes asks for them."""

import hashlib
import http.server
import subprocess
import sys
import threading

import pytest
import torch
from pytorch_msssim import ms_ssim
from skimage import data
from torch.nn import functional as F

from hific_nb import perceptual
from hific_nb.config import ConfigError, HificError
from hific_nb.data import image_to_tensor, read_image, sample_photo
from hific_nb.metrics import psnr
from hific_nb.perceptual import (
    FILES,
    LPIPS,
    FeatureStack,
    MSSSIMDistance,
    PerceptualError,
    TextureDistance,
    build_perceptual,
    find_weights,
    get_weights,
    linear_weights,
)

GOLDEN = {"alex": (0.7219, 0.1376), "vgg": (0.5686, 0.4217), "squeeze": (0.7110, 0.1479)}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No weights of this machine, and no way to the network, but what a test provides."
    torch.manual_seed(0)
    monkeypatch.delenv("HIFIC_LPIPS_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(perceptual, "ADDRESS", "http://127.0.0.1:9/")  # the port that discards


@pytest.fixture(scope="module")
def weights(shared):
    pytest.importorskip("torchmetrics", reason="the linear layers of LPIPS come with torchmetrics")
    return shared / "weights"


@pytest.fixture(scope="module")
def golden(shared):
    return [picture(shared / "golden" / "lpips" / f"{name}.png") for name in ("ex_ref", "ex_p0", "ex_p1")]


def picture(source):
    return image_to_tensor(read_image(source))[None].float() / 255


@pytest.fixture(scope="module")
def pair():
    x = image_to_tensor(sample_photo("coffee").crop((100, 50, 228, 146)))[None].float() / 255
    return x, (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("net", GOLDEN)
def test_golden_distances(net, weights, golden):
    metric, (reference, *distorted) = LPIPS(net, weights), golden
    for wanted, y in zip(GOLDEN[net], distorted):
        assert metric(reference, y).item() == pytest.approx(wanted, abs=1e-3)
    both = torch.cat(distorted)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.autocast("cpu", torch.bfloat16):
            d = metric.to(memory_format=layout)(reference.expand_as(both).contiguous(memory_format=layout), both)
        assert d.dtype == torch.float32 and d.tolist() == pytest.approx(GOLDEN[net], rel=0.02)


@pytest.mark.parametrize("net", GOLDEN)
def test_gradient(net, pair):
    """Against differences of the distance itself, in float64, in both arguments; with no weights at all."""
    metric = LPIPS(net, trained=False).double()
    x, y = (t[..., :40, :48].double() for t in pair)
    direction = torch.randn_like(x)
    h = 1e-6 / direction.norm()
    for at in (lambda t: metric(t, y).sum(), lambda t: metric(y, t).sum()):
        free = x.clone().requires_grad_()
        slope, = torch.autograd.grad(at(free), free)
        with torch.no_grad(): difference = (at(x + h * direction) - at(x - h * direction)) / (2 * h)
        assert (slope * direction).sum().item() == pytest.approx(difference.item(), rel=1e-4)


def test_what_needs_no_gradient_costs_none(pair):
    metric, (x, y) = LPIPS("alex", trained=False), pair
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        metric.stack(x)
        assert not kept  # the original leaves nothing behind
        metric(y.clone().requires_grad_(), x).sum().backward()
    assert kept and all(not p.requires_grad and p.grad is None for p in metric.parameters())
    assert not metric(x, y).requires_grad


def test_where_all_features_are_dead():
    metric = LPIPS("alex", trained=False)
    for p in metric.stack.features[0].parameters(): p.zero_()  # every map behind is 0
    x, y = torch.rand(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64)
    metric(x, y).sum().backward()
    assert x.grad.isfinite().all()


def test_batches_and_symmetry(pair):
    metric, (x, y) = LPIPS("squeeze", trained=False), pair
    d = metric(torch.cat([x, y, x]), torch.cat([y, x, x]))
    assert d.shape == (3,) and d[0] > 0 and d[2] == 0
    assert d[0].item() == pytest.approx(d[1].item(), rel=1e-5) == pytest.approx(metric(x, y).item(), rel=1e-5)
    assert torch.allclose(metric.layers(x, y).sum(1), d[:1])


def test_feature_stack_is_reusable(weights, pair):
    relu, pool = FeatureStack("vgg", weights, taps=(29,)), FeatureStack("vgg", weights)
    assert torch.equal(relu(pair[0])[0], pool(pair[0])[-1]) and relu(pair[0])[0].shape == (1, 512, 6, 8)
    assert set(relu.state_dict()) == {f"features.{i}.{kind}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
                                      for kind in ("weight", "bias")}


@pytest.mark.parametrize("net, smallest", (("alex", 31), ("vgg", 16), ("squeeze", 17)))
def test_smallest_sides(net, smallest):
    metric = LPIPS(net, trained=False)
    assert metric.stack.smallest == smallest and metric(*torch.rand(2, 1, 3, smallest, 99)).isfinite().all()
    for wrong in ((1, 3, 99, smallest - 1), (3, 99, 99), (1, 1, 99, 99)):
        with pytest.raises(PerceptualError, match="sides of at least"): metric(torch.rand(wrong), torch.rand(wrong))
    with pytest.raises(PerceptualError, match="differ in size"): metric(torch.rand(1, 3, 64, 64), torch.rand(2, 3, 64, 64))


# ---------------------------------------------------------------------------------------------- MS-SSIM, and names


@pytest.mark.parametrize("shape", ((176, 200), (161, 163), (255, 257)))
def test_ms_ssim_is_the_measure(shape):
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 20, 20), shape, mode="bilinear")
    y = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    wanted = 1 - ms_ssim(x, y, data_range=1, size_average=False)
    torch.testing.assert_close(MSSSIMDistance()(x, y), wanted, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16): torch.testing.assert_close(MSSSIMDistance()(x, y), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", (11, 64, 161))
def test_ms_ssim_can_be_trained_on(side):
    """From a picture that is anti-correlated with the original everywhere, where the plain measure has no slope."""
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), (side, side), mode="bilinear")
    y, distance = (1 - x).requires_grad_(), MSSSIMDistance()
    before = distance(y, x)
    optimizer = torch.optim.Adam([y], lr=0.05)
    for _ in range(12):
        optimizer.zero_grad()
        loss = distance(y, x).sum()
        loss.backward()
        assert y.grad.isfinite().all() and y.grad.any()
        optimizer.step()
    assert loss < 0.9 * before.item()
    assert distance(x, x).abs().max() < 1e-5


def test_ms_ssim_of_too_small_crops():
    with pytest.raises(HificError, match="at least 11"): MSSSIMDistance()(torch.rand(1, 3, 10, 64), torch.rand(1, 3, 10, 64))


def test_by_name(weights, pair):
    assert build_perceptual("none") is None and isinstance(build_perceptual("ms-ssim"), MSSSIMDistance)
    lpips = build_perceptual("lpips", weights)
    assert lpips(*pair).shape == (1,) and lpips(*pair).item() == pytest.approx(LPIPS("alex", weights)(*pair).item())
    for wrong in ("LPIPS", "", "ssim"):
        with pytest.raises(ConfigError, match="ms-ssim"): build_perceptual(wrong)
    with pytest.raises(ConfigError, match="squeeze"): LPIPS("resnet")


# ---------------------------------------------------------------------------------------------- where weights come from


def test_order_of_the_search(tmp_path, monkeypatch):
    cache, named, other = tmp_path / "torch" / "hub" / "checkpoints", tmp_path / "named", tmp_path / "other"
    for folder in (cache, named, other): folder.mkdir(parents=True)
    assert find_weights("alex") is None
    (cache / FILES["alex"]).touch()
    assert find_weights("alex") == find_weights("alex", named) == cache / FILES["alex"]
    (other / "alex_features_fp32.pth").touch()
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(other))
    assert find_weights("alex") == get_weights("alex") == other / "alex_features_fp32.pth"
    (named / FILES["alex"]).touch()
    assert find_weights("alex", named) == named / FILES["alex"]
    assert find_weights("vgg") is None
    monkeypatch.setenv("HIFIC_LPIPS_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(PerceptualError, match="HIFIC_LPIPS_WEIGHTS"): find_weights("alex")


def test_one_error_that_names_the_choices(tmp_path):
    with pytest.raises(PerceptualError) as caught: build_perceptual("lpips")
    message = str(caught.value)
    for choice in (FILES["alex"], "HIFIC_LPIPS_WEIGHTS", str(tmp_path / "torch"), 'perceptual="ms-ssim"', 'perceptual="none"'):
        assert choice in message
    assert "\n" not in message and not list((tmp_path / "torch").rglob("*.*"))


def test_without_torchmetrics(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PerceptualError, match="pip install torchmetrics.*ms-ssim"): linear_weights("alex")


@pytest.mark.parametrize("content", (b"", b"no weights", "other"))
def test_files_that_are_no_weights(content, tmp_path):
    path = tmp_path / FILES["alex"]
    if content == "other": torch.save({"features.0.weight": torch.zeros(1)}, path)
    else: path.write_bytes(content)
    with pytest.raises(PerceptualError, match=FILES["alex"]): FeatureStack("alex", tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self): return (exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",))

    torch.save({"features.0.weight": Trap()}, tmp_path / FILES["alex"])
    with pytest.raises(PerceptualError): FeatureStack("alex", tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def server(monkeypatch, tmp_path):
    "Serves `server.content`, and breaks off after `server.limit` bytes."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content[: server.limit])

        def log_message(self, *args): pass

    torch.save(FeatureStack("squeeze", trained=False).state_dict(), tmp_path / "made.pth")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.limit, server.asked = (tmp_path / "made.pth").read_bytes(), None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(perceptual, "ADDRESS", f"http://127.0.0.1:{server.server_port}/models/")
    server.name = f"squeezenet1_1-{hashlib.sha256(server.content).hexdigest()[:8]}.pth"
    monkeypatch.setitem(perceptual.FILES, "squeeze", server.name)
    yield server
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    stack = FeatureStack("squeeze")
    assert server.asked == [f"/models/{server.name}"]
    kept = tmp_path / "torch" / "hub" / "checkpoints" / server.name
    assert kept.read_bytes() == server.content and list(kept.parent.iterdir()) == [kept]
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(stack(x)[-1], FeatureStack("squeeze")(x)[-1]) and len(server.asked) == 1  # from the cache


@pytest.mark.parametrize("fault", ("other content", "breaks off"))
def test_a_download_that_fails_leaves_nothing(fault, server, tmp_path):
    if fault == "breaks off": server.limit = 1000
    else: server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    with pytest.raises(PerceptualError, match="ms-ssim") as caught: FeatureStack("squeeze")
    assert fault != "other content" or "another file" in str(caught.value)
    assert not list((tmp_path / "torch" / "hub" / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------- never needed for decoding


def test_decoding_never_asks_for_it():
    program = ("import sys; import hific_nb.codec, hific_nb.zoo, hific_nb.cli; "
               "sys.exit(any(name in sys.modules for name in ('hific_nb.perceptual', 'torchmetrics')))")
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_texture_distance_forgives_a_move_and_minds_a_blur(weights):
    """On real weights, and on any device and dtype the same to rounding; windows of their own for every picture."""
    ground = torch.from_numpy(data.grass()[:256, :256].copy()).float().div(255).expand(1, 3, -1, -1)
    grass, beside = ground[..., :192, :192], ground[..., 64:, 64:]
    blurred = F.avg_pool2d(F.pad(grass, (2,) * 4, mode="reflect"), 5, 1)
    distance = TextureDistance(folder=weights)
    assert distance(grass, grass) == 0
    assert psnr(grass, beside) < psnr(grass, blurred) - 6 and distance(beside, grass) < distance(blurred, grass)
    assert TextureDistance(folder=weights, window=16)(beside, grass) > distance(beside, grass)
    with torch.autocast("cpu", torch.bfloat16): rough = distance(blurred, grass)
    assert rough.dtype == torch.float32 and torch.allclose(rough, distance(blurred, grass), rtol=0.05)
    with pytest.raises(PerceptualError, match="differ in size"): distance(grass, ground)
