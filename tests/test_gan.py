"""The discriminator and its losses where training will use them: gradients, mixed precision, norms, files, resuming."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hific_nb.config import ConfigError, HificError
from hific_nb.gan import (Discriminator, GanLosses, adversarial_loss, discriminator_loss, gan_losses, gan_statistics,
                          import_discriminator, register_gan_losses)

KINDS = ["non_saturating", "least_squares"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(B=2, C=6, h=3, w=2):
    return torch.rand(B, 3, 16 * h, 16 * w), torch.rand(B, 3, 16 * h, 16 * w), torch.randn(B, C, h, w).round()


@pytest.mark.parametrize("h, w", [(1, 1), (1, 5), (16, 16)])
@pytest.mark.parametrize("features", [0, 12])
def test_a_logit_for_each_latent(h, w, features):
    x, _, y_hat = batch(h=h, w=w)
    d = Discriminator(6, (8, 8, 8, 8), features).to(memory_format=torch.channels_last)
    logits = d(x.contiguous(memory_format=torch.channels_last), y_hat)
    assert logits.shape == (2, 1, h, w) and logits.isfinite().all()
    changed = (d.eval()(x, y_hat + 1) - d(x, y_hat)).abs().max()
    assert changed > 0 if features else changed == 0


def test_the_paper_s_widths_and_the_published_names():
    state = Discriminator(220).state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    assert shapes["context_conv.weight"] == (12, 220, 3, 3) and shapes["conv_out.weight"] == (1, 512, 1, 1)
    widths = (15, 64, 128, 256, 512)
    for i in range(4):
        assert shapes[f"conv{i + 1}.parametrizations.weight.original"] == (widths[i + 1], widths[i], 4, 4)
        assert shapes[f"conv{i + 1}.bias"] == (widths[i + 1],)
    assert sum(p.numel() for p in Discriminator(220).parameters()) == 2_793_117  # 2.8 million in the published code
    bare = set(Discriminator(220, spectral=False).state_dict())
    layers = ("context_conv", "conv1", "conv2", "conv3", "conv4", "conv_out")
    assert bare == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("make, message", [
    (lambda d: d(torch.rand(2, 3, 32, 40), torch.rand(2, 6, 2, 2)), "multiples of 16"),
    (lambda d: d(torch.rand(2, 3, 32, 32), torch.rand(2, 6, 2, 3)), "go together"),
    (lambda d: d(torch.rand(4, 3, 32, 32), torch.rand(2, 6, 2, 2)), "go together"),
    (lambda d: Discriminator(0), "latent_channels"), (lambda d: Discriminator(6, ()), "channels"),
    (lambda d: Discriminator(6, (8, 0)), "channels"), (lambda d: Discriminator(6, latent_features=-1), "latent_features"),
    (lambda d: gan_losses("non-saturating"), "non_saturating"),
    (lambda d: register_gan_losses("non_saturating", gan_losses()), "own")])
def test_what_is_refused(make, message):
    with pytest.raises(HificError, match=message): make(Discriminator(6, (4, 4)))


def test_pictures_are_seen_on_minus_one_to_one_or_as_they_are():
    x, _, y_hat = batch()
    d = Discriminator(6, (8, 8, 8, 8)).eval()
    as_is = Discriminator(6, (8, 8, 8, 8), normalize_input_image=False).eval()
    as_is.load_state_dict(d.state_dict())
    assert torch.allclose(d(x, y_hat), as_is(2 * x - 1, y_hat)) and not torch.allclose(d(x, y_hat), as_is(x, y_hat))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_against_closed_forms(kind):
    real, fake = 3 * torch.randn(2, 1, 5, 4), 3 * torch.randn(2, 1, 5, 4)
    r, f = real.double(), fake.double()
    if kind == "non_saturating":
        g, d = -torch.sigmoid(f).log().mean(), -torch.sigmoid(r).log().mean() - (1 - torch.sigmoid(f)).log().mean()
    else: g, d = ((f - 1) ** 2).mean() / 2, ((r - 1) ** 2).mean() / 2 + (f ** 2).mean() / 2
    assert math.isclose(gan_losses(kind).generator(fake), g, rel_tol=1e-6)
    assert math.isclose(gan_losses(kind).discriminator(real, fake), d, rel_tol=1e-6)


def test_sure_logits_neither_overflow_nor_lose_their_gradient():
    fake = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = gan_losses().generator(fake)
    loss.backward()
    assert loss == 5e3 and fake.grad.tolist() == [-0.5, 0]  # half each: it is a mean
    real = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = gan_losses().discriminator(real, fake.detach())
    loss.backward()
    assert loss == 1e4 and real.grad.tolist() == [-0.5, 0]


class Fixed(nn.Module):
    "A D that gives the mean of a picture as its logit, in bfloat16."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, y_hat): return (self.w * x.mean((1, 2, 3))).to(torch.bfloat16)[:, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_are_averaged_in_float32(kind):
    x, recon, y_hat = batch(B=64)
    d = Fixed()
    losses = gan_losses(kind)
    r, f = (d(v, y_hat).double() for v in (x, recon))
    loss, _ = discriminator_loss(d, x, recon, y_hat, kind)
    assert loss.dtype == torch.float32 and math.isclose(loss.item(), losses.discriminator(r, f).item(), rel_tol=1e-5)
    loss = adversarial_loss(d, recon, y_hat, kind)
    assert loss.shape == (64,) and loss.dtype == torch.float32
    assert math.isclose(loss.mean().item(), losses.generator(f).item(), rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_two_steps_go_where_they_should(kind):
    encoder, generator = nn.Conv2d(3, 6, 16, stride=16), nn.ConvTranspose2d(6, 3, 16, stride=16)
    d = Discriminator(6, (8, 8, 8, 8))
    x, _, _ = batch()
    y_hat = encoder(x)
    recon = generator(y_hat)

    # only the way through the picture: what the encoder gets is what it would get from a context of constants
    adversarial_loss(d.eval(), recon, y_hat, kind).mean().backward(retain_graph=True)
    assert all(p.grad is None and p.requires_grad for p in d.parameters())
    got = encoder.weight.grad.clone()
    expected, = torch.autograd.grad(gan_losses(kind).generator(d(recon, y_hat.detach())), encoder.weight, retain_graph=True)
    assert got.abs().max() > 0 and torch.allclose(got, expected)
    assert generator.weight.grad.abs().max() > 0

    encoder.zero_grad(set_to_none=True)
    generator.zero_grad(set_to_none=True)
    discriminator_loss(d.train(), x, recon, y_hat, kind)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in d.parameters())
    assert all(p.grad is None for m in (encoder, generator) for p in m.parameters())


def test_parameters_thaw_even_when_the_forward_pass_fails():
    d = Discriminator(6, (4, 4))
    d.conv_out.bias.requires_grad_(False)  # one that the user froze stays frozen
    with pytest.raises(HificError): adversarial_loss(d, torch.rand(1, 3, 30, 32), torch.rand(1, 6, 2, 2))
    assert [name for name, p in d.named_parameters() if not p.requires_grad] == ["conv_out.bias"]


def test_one_batch_of_both_is_two_batches_each_beside_its_own_context():
    x, recon, y_hat = batch(B=3)
    d = Discriminator(6, (8, 8, 8, 8)).eval()
    with torch.no_grad():
        d.context_conv.weight *= 20  # so that a context in the wrong place would show
        loss, statistics = discriminator_loss(d, x, recon, y_hat)
        real, fake = (torch.cat([d(v[i: i + 1], y_hat[i: i + 1]) for i in range(3)]) for v in (x, recon))
        swapped = gan_losses().discriminator(d(x, y_hat.roll(1, 0)), d(recon, y_hat.roll(1, 0)))
    assert math.isclose(loss, gan_losses().discriminator(real, fake), rel_tol=1e-5)
    assert not math.isclose(loss, swapped, rel_tol=1e-4)
    assert statistics == pytest.approx(gan_statistics(real, fake))


def test_statistics():
    real, fake = torch.tensor([2., 1., -1., 3.]), torch.tensor([-2., 1.])
    s = gan_statistics(real, fake)
    assert s["D_real"] == pytest.approx(torch.sigmoid(real).mean().item()) and s["D_accuracy"] == (3 / 4 + 1 / 2) / 2
    assert s["D_fake"] == pytest.approx(torch.sigmoid(fake).mean().item())
    s = gan_statistics(torch.tensor([0.75, 2.]), torch.tensor([-1., 0.25]), "least_squares")
    assert s == dict(D_real=0.875, D_fake=0.125, D_accuracy=1)
    assert gan_statistics(real.bfloat16(), fake.bfloat16())["D_accuracy"] == (3 / 4 + 1 / 2) / 2


def test_a_loss_of_one_s_own_is_used_everywhere():
    margin = GanLosses(lambda fake: -fake.mean(), lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    register_gan_losses("margin of a test", margin)
    register_gan_losses("margin of a test", margin)  # as when a cell is run again
    x, recon, y_hat = batch()
    d = Discriminator(6, (8, 8)).eval()
    with torch.no_grad():
        loss, _ = discriminator_loss(d, x, recon, y_hat, "margin of a test")
        assert math.isclose(loss, margin.discriminator(d(x, y_hat), d(recon, y_hat)), rel_tol=1e-5)
        assert math.isclose(adversarial_loss(d, recon, y_hat, "margin of a test").mean(), -d(recon, y_hat).mean(), rel_tol=1e-5)
    with pytest.raises(ConfigError, match="margin of a test"): gan_losses("margin")


def train_discriminator(d, steps, kind="non_saturating", lr=2e-3, seed=1):
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(d.parameters(), lr, betas=(0.5, 0.9))
    for _ in range(steps):
        x = torch.rand(4, 3, 32, 32, generator=random)
        recon = F.avg_pool2d(x, 3, stride=1, padding=1)
        loss, statistics = discriminator_loss(d, x, recon, F.avg_pool2d(x, 16), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), statistics


@pytest.mark.parametrize("kind", KINDS)
def test_norms_stay_near_one_while_the_weights_move_and_d_learns(kind):
    d = Discriminator(3, (8, 16))
    first = {k: v.clone() for k, v in d.state_dict().items()}
    _, statistics = train_discriminator(d, 80, kind)
    assert statistics["D_accuracy"] > 0.9  # noise against blurred noise
    d.eval()
    for conv, name in ((d.conv1, "conv1"), (d.conv2, "conv2")):
        original = conv.parametrizations.weight.original
        assert (original - first[f"{name}.parametrizations.weight.original"]).norm() > 0.1 * original.norm()
        assert 0.9 < torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) < 1.25  # one iteration a step lags behind
        conv.train()
        for _ in range(200): assert conv.weight is not None  # each read is a step of the iteration
        assert abs(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) - 1) < 0.01


def test_the_norm_is_that_of_float32_under_autocast():
    x, recon, y_hat = batch()
    d = Discriminator(6, (16, 16, 16, 16))
    twin = copy.deepcopy(d)
    plain = d(x, y_hat)
    with torch.autocast("cpu", torch.bfloat16):
        logits = twin(x, y_hat)
        loss, _ = discriminator_loss(twin, x, recon, y_hat)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.allclose(logits.float(), plain, atol=0.02)
    # the second forward pass of the twin, in float32 for d
    d(x, y_hat)
    for a, b in zip(d.buffers(), twin.buffers()): assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in twin.parameters())


def test_a_state_dict_resumes_bit_for_bit():
    def through_a_file(state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    d = Discriminator(3, (8, 16))
    train_discriminator(d, 3)
    twin = Discriminator(3, (8, 16))
    twin.load_state_dict(through_a_file(d.state_dict()))
    assert train_discriminator(d, 3, seed=2) == train_discriminator(twin, 3, seed=2)
    for a, b in zip(d.state_dict().values(), twin.state_dict().values()): assert torch.equal(a, b)


def test_evaluation_mode_moves_nothing():
    x, recon, y_hat = batch()
    d = Discriminator(6, (8, 8)).eval()
    before = {k: v.clone() for k, v in d.state_dict().items()}
    assert torch.equal(d(x, y_hat), d(x, y_hat))
    adversarial_loss(d, recon, y_hat)
    discriminator_loss(d, x, recon, y_hat)
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items())


class Published(nn.Module):
    "The published layout, drawn with the older spectral norm that its checkpoints were written with."
    def __init__(self, C, widths):
        super().__init__()
        self.context_conv = nn.Conv2d(C, 12, 3, padding=1, padding_mode="reflect")
        for i, (a, b) in enumerate(zip((15, *widths), widths)):
            conv = nn.Conv2d(a, b, 4, stride=2, padding=1, padding_mode="reflect")
            setattr(self, f"conv{i + 1}", nn.utils.spectral_norm(conv))
        self.conv_out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x, y):
        y = nn.Upsample(scale_factor=16)(F.leaky_relu(self.context_conv(y), 0.2))
        x = torch.cat((x, y), 1)
        for i in range(4): x = F.leaky_relu(getattr(self, f"conv{i + 1}")(x), 0.2)
        return self.conv_out(x)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_published_discriminator_gives_the_same_logits(normalize):
    x, _, y_hat = batch()
    published = Published(6, (8, 12, 16, 20))
    for _ in range(3): published(x, y_hat)
    d = import_discriminator(published.state_dict(), normalize_input_image=normalize)
    published.eval(), d.eval()
    assert torch.allclose(d(x, y_hat), published(2 * x - 1 if normalize else x, y_hat), atol=1e-5)
    for i in range(1, 5):  # the vectors of the power iteration came along
        ours, theirs = getattr(d, f"conv{i}").parametrizations.weight[0], getattr(published, f"conv{i}")
        assert torch.equal(ours._u, theirs.weight_u) and torch.equal(ours._v, theirs.weight_v)


@pytest.mark.parametrize("change", [lambda s: s.pop("conv2.weight_v"), lambda s: s.pop("context_conv.weight"),
                                    lambda s: s.pop("conv1.weight_orig"), lambda s: s.update(stray=torch.zeros(1)),
                                    lambda s: s.update({"conv2.weight_orig": torch.zeros(12, 9, 4, 4)}),
                                    lambda s: s.update({"context_conv.weight": torch.zeros(3)})])
def test_what_is_no_published_discriminator(change):
    state = dict(Published(6, (8, 12, 16, 20)).state_dict())
    change(state)
    with pytest.raises(HificError, match="discriminator_state_dict"): import_discriminator(state)
