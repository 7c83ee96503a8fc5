"""Training steps a second: the published recipe written plainly, and ours, from the same weights on the same photos.

    python benchmarks/training.py [--width paper] [--batch 4] [--crop 256] [--threads 1] [--steps 3] [--device cpu]
                                  [--sides plain ours] [--out benchmarks/results/training.json]

Each side is a child process that lives through the whole comparison; they take turns, a step each, so that whatever else the
machine does hits all of them. The first step of a side is not counted: it allocates, and compiles. Steps are measured by the
clock and by the seconds that the processor spent on the process, which other processes disturb less; medians of both.

plain: float32, eager, NCHW, torch's allocator as it comes, ChannelNorm as its formula, LPIPS (AlexNet) of both pictures, two Adams
    as torch makes them by default (on a CPU a loop over the tensors, on a GPU "foreach"). tests/test_benchmarks.py compares it
    with the golden arrays of the published code. Only the drawing "hific" is written out; with --width lite "plain" is the
    package's own network in the plain loop.
ours: hific_nb.training.Trainer with its defaults, under the allocator settings of ALLOCATOR.
allocator: the same with the allocator as it comes.
compiled: ours with TrainConfig(compile=True).

All sides report the loss of their first step, from the same weights and photos; the noise of the rate is drawn in another order,
so that bpp_noisy agrees statistically alone. Memory is the peak of the child (VmHWM), on a GPU what torch allocated there.
LPIPS needs its weights (see hific_nb.perceptual.find_weights); --perceptual none goes without.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hific_nb.config import ModelConfig, Objective, TrainConfig, model_preset, write_atomic
from hific_nb.data import SAMPLE_PHOTOS, sample_photo
from hific_nb.model import Model
from hific_nb.perceptual import build_perceptual
from hific_nb.training import Team, Trainer

# glibc gives large blocks back to the kernel when they are freed and gets them as fresh pages, a fault each, in the next layer.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
WIDTHS = {"paper": model_preset("hific"), "lite": model_preset("hific-lite"),
          "tiny": ModelConfig(channels=(4, 6, 8, 10, 12), latent_channels=10, hyperprior_channels=8, n_residual_blocks=2)}
SIDES = ("plain", "ours", "allocator", "compiled")


# ---------------------------------------------------------------------------------------------- the plain version


class PlainChannelNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        return self.gamma * (x - mean) * torch.rsqrt(var + 1e-3) + self.beta


class PlainEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        w = config.channels
        self.conv_block1 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, w[0], 7), PlainChannelNorm(w[0]), nn.ReLU())
        for i in range(1, 5):
            down = nn.Conv2d(w[i - 1], w[i], 3, stride=2)
            layers = nn.ReflectionPad2d((0, 1, 1, 0)), down, PlainChannelNorm(w[i]), nn.ReLU()
            setattr(self, f"conv_block{i + 1}", nn.Sequential(*layers))
        self.conv_block_out = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(w[4], config.latent_channels, 3))

    def forward(self, x):
        for i in range(1, 6): x = getattr(self, f"conv_block{i}")(x)
        return self.conv_block_out(x)


class PlainBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pad, self.relu = nn.ReflectionPad2d(1), nn.ReLU()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3), PlainChannelNorm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3), PlainChannelNorm(channels)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(self.pad(x))))
        return x + self.norm2(self.conv2(self.pad(y)))


class PlainGenerator(nn.Module):
    def __init__(self, config):
        super().__init__()
        w, C, self.blocks = config.channels, config.latent_channels, config.n_residual_blocks
        conv = nn.Conv2d(C, w[4], 3)
        self.conv_block_init = nn.Sequential(PlainChannelNorm(C), nn.ReflectionPad2d(1), conv, PlainChannelNorm(w[4]))
        for i in range(self.blocks): setattr(self, f"resblock_{i}", PlainBlock(w[4]))
        for i in range(4):
            up = nn.ConvTranspose2d(w[4 - i], w[3 - i], 3, stride=2, padding=1, output_padding=1)
            setattr(self, f"upconv_block{i + 1}", nn.Sequential(up, PlainChannelNorm(w[3 - i]), nn.ReLU()))
        self.conv_block_out = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(w[0], 3, 7))

    def forward(self, y):
        head = x = self.conv_block_init(y)
        for i in range(self.blocks): x = getattr(self, f"resblock_{i}")(x)
        x = x + head
        for i in range(4): x = getattr(self, f"upconv_block{i + 1}")(x)
        return self.conv_block_out(x)


class PlainHyperAnalysis(nn.Module):
    def __init__(self, C, N):
        super().__init__()
        self.conv1 = nn.Conv2d(C, N, 3, padding=1)
        self.conv2 = nn.Conv2d(N, N, 5, stride=2, padding=2, padding_mode="reflect")
        self.conv3 = nn.Conv2d(N, N, 5, stride=2, padding=2, padding_mode="reflect")

    def forward(self, y): return self.conv3(F.relu(self.conv2(F.relu(self.conv1(y)))))


class PlainHyperSynthesis(nn.Module):
    def __init__(self, C, N):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(N, N, 5, stride=2, padding=2, output_padding=1)
        self.conv2 = nn.ConvTranspose2d(N, N, 5, stride=2, padding=2, output_padding=1)
        self.conv3 = nn.ConvTranspose2d(N, C, 3, padding=1)

    def forward(self, z): return self.conv3(F.relu(self.conv2(F.relu(self.conv1(z)))))


class PlainFactorized(nn.Module):
    "Four layers of 3, 3, 3, 1 units for each channel."
    def __init__(self, N):
        super().__init__()
        for k, (n, m) in enumerate(((1, 3), (3, 3), (3, 3), (3, 1))):
            setattr(self, f"H_{k}", nn.Parameter(torch.zeros(N, m, n)))
            setattr(self, f"a_{k}", nn.Parameter(torch.zeros(N, m, 1)))
            setattr(self, f"b_{k}", nn.Parameter(torch.zeros(N, m, 1)))

    def cdf_logits(self, x):
        for k in range(4):
            x = F.softplus(getattr(self, f"H_{k}")) @ x + getattr(self, f"b_{k}")
            x = x + torch.tanh(getattr(self, f"a_{k}")) * torch.tanh(x)
        return x

    def likelihood(self, z):
        B, N, h, w = z.shape
        x = z.permute(1, 0, 2, 3).reshape(N, 1, -1)
        upper, lower = self.cdf_logits(x + 0.5), self.cdf_logits(x - 0.5)
        sign = -torch.sign(upper + lower).detach()  # both on the side of the sigmoid where floats are dense
        p = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        return p.clamp(min=1e-9).reshape(N, B, h, w).permute(1, 0, 2, 3)


def gaussian_likelihood(y, mean, scale):
    def cdf(v): return 0.5 * torch.erfc(-v / math.sqrt(2))

    distance = (y - mean).abs()
    return (cdf((0.5 - distance) / scale) - cdf((-0.5 - distance) / scale)).clamp(min=1e-9)


class ScaleBound(torch.autograd.Function):
    "max(x, bound), which lets a gradient through that would raise x."
    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(x >= bound)
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, grad): return grad * (ctx.saved_tensors[0] | (grad < 0)), None


class PlainHyperprior(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, N = config.latent_channels, config.hyperprior_channels
        self.analysis_net = PlainHyperAnalysis(C, N)
        self.synthesis_mu, self.synthesis_std = PlainHyperSynthesis(C, N), PlainHyperSynthesis(C, N)
        self.hyperlatent_likelihood = PlainFactorized(N)

    def forward(self, y):
        z = self.analysis_net(y)
        z_hat = z + (z.round() - z).detach()
        mean, scale = self.synthesis_mu(z_hat), ScaleBound.apply(self.synthesis_std(z_hat), 0.11)
        y_hat = mean + (y - mean) + ((y - mean).round() - (y - mean)).detach()
        found = dict(z=z, mu=mean, sigma=scale, y_hat=y_hat)
        for name, latents, hyperlatents in (("noisy", y + torch.rand_like(y) - 0.5, z + torch.rand_like(z) - 0.5),
                                            ("quantized", y_hat, z_hat)):
            found[f"{name}_y"] = -torch.log2(gaussian_likelihood(latents, mean, scale)).sum()
            found[f"{name}_z"] = -torch.log2(self.hyperlatent_likelihood.likelihood(hyperlatents)).sum()
        return found


class PlainModel(nn.Module):
    "Parameters have the names of the published checkpoints."
    def __init__(self, config):
        super().__init__()
        self.Encoder, self.Generator, self.Hyperprior = PlainEncoder(config), PlainGenerator(config), PlainHyperprior(config)

    def forward(self, x):
        y = self.Encoder(x)
        found = self.Hyperprior(y)
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        return found | dict(y=y, recon=self.Generator(found["y_hat"]), bpp_noisy=(found["noisy_y"] + found["noisy_z"]) / pixels,
                            bpp_quantized=(found["quantized_y"] + found["quantized_z"]) / pixels)


class PlainLPIPS(nn.Module):
    "AlexNet's features of both pictures to unit length, squared differences, a weight for each channel, means."
    TAPS = (1, 4, 7, 9, 11)

    def __init__(self, source):
        super().__init__()
        self.features, self.mean, self.std = source.stack.features, source.stack.mean, source.stack.std
        self.weights = [getattr(source, f"weight{i}").view(1, -1, 1, 1) for i in range(len(self.TAPS))]

    def maps(self, x):
        x, found = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS: found.append(x / torch.sqrt((x ** 2).sum(1, keepdim=True) + 1e-8))
        return found

    def forward(self, x, y):
        distance = 0
        for a, b, weight in zip(self.maps(x), self.maps(y), self.weights):
            distance = distance + ((a - b) ** 2 * weight.to(a.device)).sum(1).mean((1, 2))
        return distance


class PlainTrainer:
    "Stage 1 of the recipe, a step at a time."
    def __init__(self, config, objective, device, lpips):
        torch.manual_seed(0)
        source = Model(config)
        self.model = source
        if config.transform == "hific":
            with torch.device("meta"): self.model = PlainModel(config)
            self.model.load_state_dict(source.state_dict(), assign=True)
            for p in self.model.parameters(): p.requires_grad_(True)
        self.model.to(device).train()
        self.objective, self.device = objective, device
        self.lpips = None if lpips is None else PlainLPIPS(lpips.to(device))
        prior = list(self.model.Hyperprior.hyperlatent_likelihood.parameters())
        rest = [p for p in self.model.parameters() if all(p is not q for q in prior)]
        self.optimizers = [torch.optim.Adam(rest, lr=1e-4), torch.optim.Adam(prior, lr=1e-4)]

    def __call__(self, batch):
        x, o = batch.to(self.device).float() / 255, self.objective
        out = self.model(x)
        noisy, quantized = out["bpp_noisy"].mean(), out["bpp_quantized"].mean()
        weight = o.lambda_at(quantized.item(), 0.0)
        mse = ((255 * out["recon"] - 255 * x) ** 2).mean()
        distance = x.new_zeros(()) if self.lpips is None else self.lpips(out["recon"], x).mean()
        loss = weight * noisy + o.k_M * mse + o.k_P * distance
        for optimizer in self.optimizers: optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers: optimizer.step()
        return dict(loss=loss.item(), bpp=quantized.item(), bpp_noisy=noisy.item(), mse=mse.item(), perceptual=distance.item())


# ---------------------------------------------------------------------------------------------- a side, in its own process


def photos(batch, crop):
    "Crops of scikit-image's photos, always the same: uint8 (batch, 3, crop, crop)."
    rng, names, found = np.random.default_rng(0), list(SAMPLE_PHOTOS), []
    for i in range(batch):
        photo = np.asarray(sample_photo(names[i % len(names)]))
        top, left = (int(rng.integers(0, side - crop + 1)) for side in photo.shape[:2])
        found.append(torch.from_numpy(photo[top: top + crop, left: left + crop].copy()).permute(2, 0, 1))
    return torch.stack(found)


class Stopwatch:
    "Where the seconds of our step go: marks as its parts begin and end, forward and backward."
    def __init__(self, trainer):
        self.marks, self.cuda = [], trainer.device.type == "cuda"
        model = trainer.model
        parts = dict(encoder=model.Encoder, hyperprior=model.Hyperprior, generator=model.Generator)
        if trainer.perceptual is not None: parts["perceptual"] = trainer.perceptual
        self.hooks = [trainer.optimizer.register_step_pre_hook(lambda *_: self.mark("gradient norms")),
                      trainer.optimizer.register_step_post_hook(lambda *_: self.mark("Adam"))]
        for name, part in parts.items():
            self.hooks += [part.register_forward_pre_hook(lambda *_: self.mark("other")),
                           part.register_forward_hook(lambda _, __, out, name=name: self._after(name, out))]
        # The backward pass runs through the parts in the order perceptual, generator, hyperprior, encoder.
        order = [name for name in ("perceptual", "generator", "hyperprior", "encoder") if name in parts]
        self.before = dict(zip(order, ["other", *(f"{name}, backward" for name in order)]))  # what ends where a part's begins
        last = next(model.Encoder.parameters())  # the gradient of the first layer comes last
        self.hooks.append(last.register_post_accumulate_grad_hook(lambda _: self.mark("encoder, backward")))

    def _after(self, name, out):
        self.mark(name)
        tensor = out["y_hat"] if isinstance(out, dict) else out
        if tensor.requires_grad: tensor.register_hook(lambda _: self.mark(self.before[name]))

    def mark(self, what):
        if self.cuda: torch.cuda.synchronize()
        self.marks.append((what, time.process_time()))

    def seconds(self, step):
        "What `step()` spends on each part."
        self.marks = []
        self.mark("begin")
        step()
        self.mark("other")
        for hook in self.hooks: hook.remove()
        total = {}
        for (_, before), (what, after) in zip(self.marks, self.marks[1:]): total[what] = total.get(what, 0.0) + after - before
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def matrix_peak(device, dtype):
    "Floating-point operations a second of a large square matrix product, the best of five."
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        start = clocks(device)[0 if device.type == "cuda" else 1]
        a @ b
        best = min(best, clocks(device)[0 if device.type == "cuda" else 1] - start)
    return 2 * n ** 3 / best


def clocks(device):
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def peak_memory(device):
    if device.type == "cuda": return torch.cuda.max_memory_allocated()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def side(args):
    "Answers each line of the standard input with a line of JSON: `step`, `split` (the parts of our step), `end`."
    torch.set_num_threads(args.threads)
    device, config = torch.device(args.device), WIDTHS[args.width]
    objective = Objective.for_regime("low", perceptual=args.perceptual)
    batch, lpips = photos(args.batch, args.crop), build_perceptual(args.perceptual)
    if args.side == "plain": trainer, dtype = PlainTrainer(config, objective, device, lpips), torch.float32
    else:
        torch.manual_seed(0)
        train_config = TrainConfig(batch_size=args.batch, crop_size=args.crop, compile=args.side == "compiled")
        trainer = Trainer(Model(config), objective, train_config, Team(args.device), lpips)
        dtype = trainer.dtype
    flops = None
    for line in sys.stdin:
        wanted, answer = line.strip(), {}
        if wanted == "step":
            # The first step, which is not measured, counts operations; the counter sees nothing of a compiled one.
            counter = FlopCounterMode(display=False) if flops is None and args.side != "compiled" else nullcontext()
            wall, cpu = clocks(device)
            with counter: record = trainer(batch)
            end = clocks(device)
            if isinstance(counter, FlopCounterMode): flops = counter.get_total_flops()
            answer = dict(wall=end[0] - wall, cpu=end[1] - cpu, record=record)
        elif wanted == "split": answer = Stopwatch(trainer).seconds(lambda: trainer(batch))
        elif wanted == "end":
            answer = dict(memory=peak_memory(device), flops=flops, matrix_peak=matrix_peak(device, dtype), dtype=str(dtype))
        print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------------------------------------- the comparison


class Child:
    def __init__(self, name, args):
        self.name, self.rows = name, []
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        for key in ALLOCATOR: environment.pop(key, None)
        if name not in ("plain", "allocator"): environment |= ALLOCATOR
        options = [f"--{key}={getattr(args, key)}" for key in ("width", "batch", "crop", "threads", "device", "perceptual")]
        self.process = subprocess.Popen([sys.executable, __file__, "--side", name, *options], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer: raise SystemExit(f"The side {self.name!r} ended with status {self.process.wait()}.")
        return json.loads(answer)

    def step(self):
        self.rows.append(self.ask("step"))
        return self.rows[-1]


def compare(args):
    children = [Child(name, args) for name in args.sides]
    try:
        for i in range(1 + args.steps):
            for child in children:
                row = child.step()
                print(f"{f'step {i}' if i else 'first step':<11}{child.name:<9}{row['wall']:8.2f} s, processor {row['cpu']:8.2f} s"
                      f", loss {row['record']['loss']:.4f}", flush=True)
        sides, split = {}, None
        for child in children:
            if child.name == "ours": split = child.ask("split")
            wall, cpu = (statistics.median(row[clock] for row in child.rows[1:]) for clock in ("wall", "cpu"))
            first = child.rows[0]
            sides[child.name] = dict(seconds=wall, processor_seconds=cpu, steps_per_second=1 / wall,
                                     images_per_second=args.batch / wall,
                                     all_seconds=[[row["wall"], row["cpu"]] for row in child.rows[1:]],
                                     first_step=dict(seconds=first["wall"], processor_seconds=first["cpu"],
                                                     record={key: first["record"].get(key) for key in RECORD}))
            sides[child.name] |= child.ask("end")
    finally:
        for child in children: child.process.kill()
        for child in children: child.process.wait()
    if "plain" in sides:
        for about in sides.values():
            about["times_plain"] = sides["plain"]["seconds"] / about["seconds"]
            about["times_plain_processor"] = sides["plain"]["processor_seconds"] / about["processor_seconds"]
    return dict(date=datetime.date.today().isoformat(), processor=processor(), device=device_name(args.device),
                versions=dict(python=platform.python_version(), torch=torch.__version__), width=args.width, batch=args.batch,
                crop=args.crop, threads=args.threads, steps=args.steps, perceptual=args.perceptual, allocator=ALLOCATOR,
                load=list(os.getloadavg()), sides=sides, split=split)


RECORD = ("loss", "bpp", "bpp_noisy", "mse", "perceptual")


def processor():
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: return platform.processor()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = [flag for flag in about.get("flags", "").split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    return ", ".join([about.get("model name", platform.machine()), *wanted])


def device_name(device): return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def table(result):
    "The result as lines of text."
    lines = [f"{result['width']}, batch {result['batch']}, crop {result['crop']}, {result['device']}, {result['threads']} threads",
             f"{'':<10}{'s a step':>10}{'processor s':>13}{'images/s':>10}{'ratio':>8}{'of processor':>14}{'GB':>8}{'TFLOP/s':>9}"]
    clock = "seconds" if result["device"] != "cpu" else "processor_seconds"  # other processes must not look like our slowness
    for name, about in result["sides"].items():
        lines.append(f"{name:<10}{about['seconds']:>10.3f}{about['processor_seconds']:>13.3f}{about['images_per_second']:>10.3f}"
                     f"{about.get('times_plain', math.nan):>8.2f}{about.get('times_plain_processor', math.nan):>14.2f}"
                     f"{about['memory'] / 1e9:>8.2f}")
        if about["flops"]:
            rate = about["flops"] / about[clock]
            lines[-1] += f"{rate / 1e12:>9.3f}, {rate / about['matrix_peak']:.0%} of a large matrix product's"
    lines.append("first step from the same weights: " + "; ".join(
        f"{name} " + ", ".join(f"{key} {value:.5g}" for key, value in about["first_step"]["record"].items() if value is not None)
        for name, about in result["sides"].items()))
    if "compiled" in result["sides"]:
        lines.append(f"compiling and the first step: {result['sides']['compiled']['first_step']['seconds']:.0f} s")
    if result["split"]:
        whole = sum(result["split"].values())
        lines += ["our step, by the processor's seconds:"]
        lines += [f"  {name:<22}{seconds:8.3f} s{seconds / whole:7.0%}" for name, seconds in result["split"].items()]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="paper")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--perceptual", choices=("lpips", "none"), default="lpips")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["plain", "ours"])
    parser.add_argument("--out")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.side: return side(args)
    result = compare(args)
    print(table(result))
    if args.out:  # in place of an earlier run of the same comparison
        def key(run): return [run[name] for name in ("width", "batch", "crop", "threads", "device")] + list(run["sides"])

        runs = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else []
        runs = [run for run in runs if key(run) != key(result)] + [result]
        write_atomic(args.out, (json.dumps(runs, indent=1) + "\n").encode())


if __name__ == "__main__": main()
