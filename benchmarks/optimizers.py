"""Adam against optimizers that look at whole matrices, on the same first steps of a training: a try for the training diary.

    python benchmarks/optimizers.py soap --photos ../shared/data/train --out benchmarks/results/optimizers.json

A run of 400 steps from a shipped model, cosine schedule, batches and noise the same for all. Held-back photos are then looked at by
the averaged weights: rate (from likelihoods), MSE (0 ... 255), LPIPS, and the Lagrangian of each level. muon: orthogonalized
momentum (Jordan et al. 2024), the rate scaled as Liu et al. 2025 (2502.16982) do. soap: Adam in the eigenbases of Shampoo
(Vyas et al. 2024, 2409.11321), renewed every ten steps, one-sided where a side is long. --level-balance: another balance.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hific_nb.config import Objective, TrainConfig, write_atomic
from hific_nb.data import open_dataset
from hific_nb.perceptual import build_perceptual
from hific_nb.training import Team, Trainer, _keep_pages, _reconstruct, inherited_objective, load_warm_start, watched_crops

LEVELS = (0, 19, 45, 68, 100)


class MatrixOptimizer(torch.optim.Optimizer):
    "Weights of convolutions as matrices (first side, rest); everything else by Adam."
    def __init__(self, params, lr): super().__init__(list(params), dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None: continue
                state = self.state[p]
                if p.ndim < 2 or len(p) <= 4: change = self.adam(state, p.grad)
                else: change = self.matrix(state, p.grad.reshape(len(p), -1)).reshape(p.shape)
                p.sub_(change, alpha=group["lr"])

    @staticmethod
    def adam(state, g, betas=(0.9, 0.999)):
        if "m" not in state: state |= dict(t=0, m=torch.zeros_like(g), v=torch.zeros_like(g))
        state["t"] += 1
        state["m"].lerp_(g, 1 - betas[0])
        state["v"].mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        size = (state["v"] / (1 - betas[1] ** state["t"])).sqrt_().add_(1e-8)
        return state["m"] / (1 - betas[0] ** state["t"]) / size


class Muon(MatrixOptimizer):
    def matrix(self, state, g, momentum=0.95):
        if "m" not in state: state["m"] = torch.zeros_like(g)
        state["m"].lerp_(g, 1 - momentum)
        x = g.lerp(state["m"], momentum).bfloat16()
        if turned := len(x) > x.shape[1]: x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):  # Newton and Schulz: all singular values towards 1
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.T if turned else x).to(g.dtype) * (0.2 * max(x.shape) ** 0.5)


class Soap(MatrixOptimizer):
    def matrix(self, state, g, decay=0.95, every=10, longest=400):
        if "sides" not in state:
            state |= dict(sides=[g.new_zeros(n, n) if n <= longest else None for n in g.shape], bases=None, steps=0)
        sides = state["sides"]
        for side, x in zip(sides, (g, g.T)):
            if side is not None: side.lerp_(x @ x.T, 1 - decay)
        if state["bases"] is None:
            state["bases"] = [None if s is None else self.eigenbasis(s) for s in sides]
            return torch.zeros_like(g)  # the first gradient only shows where to look
        change = self.turn(self.adam(state, self.turn(g, state["bases"]), (decay, decay)), state["bases"], back=True)
        state["steps"] += 1
        if state["steps"] % every == 0: self.renew(state)
        return change

    @staticmethod
    def eigenbasis(side):
        scaled = side.double() / side.trace().clamp(min=1e-30) + 1e-9 * torch.eye(len(side)).double()
        return torch.linalg.eigh(scaled)[1].flip(1).to(side.dtype).contiguous()

    @staticmethod
    def turn(x, bases, back=False):
        left, right = bases
        if left is not None: x = (left if back else left.T) @ x
        if right is not None: x = x @ (right.T if back else right)
        return x

    def renew(self, state):
        "A step of the power method, sorted; the mean turns with the bases, the squares are only sorted."
        mean = self.turn(state["m"], state["bases"], back=True)
        for axis, side in enumerate(state["sides"]):
            if side is None: continue
            basis = state["bases"][axis]
            order = (basis.T @ side @ basis).diag().argsort(descending=True)
            state["v"] = state["v"].index_select(axis, order)
            state["bases"][axis] = torch.linalg.qr(side @ basis[:, order])[0]
        state["m"] = self.turn(mean, state["bases"])


def look(trainer, crops):
    "{level: figures} of the averaged weights."
    found = {}
    for level in LEVELS:
        rows = []
        for crop in crops:
            x, out = _reconstruct(trainer.kept, crop, level, trainer.dtype)
            mse = (255 * (out["recon"] - x)).square().mean()
            rows.append(torch.stack([out["bpp_quantized"].mean(), mse, trainer.perceptual(out["recon"], x).mean()]))
        bpp, mse, lpips = torch.stack(rows).mean(0).tolist()
        loss = trainer.objective.lambda_of_level(level, 101) * bpp + trainer.objective.k_M * mse + trainer.objective.k_P * lpips
        found[level] = dict(bpp=round(bpp, 4), mse=round(mse, 2), lpips=round(lpips, 4), loss=round(loss, 4))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", choices=("adam", "muon", "soap"))
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="hific-lite-base-v1")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--level-balance", type=float)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    _keep_pages()
    own = {} if args.level_balance is None else dict(level_balance=args.level_balance)
    config = TrainConfig(n_steps=args.steps, batch_size=6, crop_size=192, learning_rate=args.learning_rate, lr_schedule="cosine",
                         lr_drop=0.02, warmup_steps=30, grad_clip=5.0, ema_decay=0.99)
    trainer = Trainer(load_warm_start(args.model)[0], Objective.from_dict(inherited_objective(args.model) | own), config,
                      Team("cpu"), build_perceptual("lpips"))
    if args.optimizer != "adam":
        trainer.optimizer = dict(muon=Muon, soap=Soap)[args.optimizer](trainer.weights, args.learning_rate)
    photos = open_dataset(args.photos, config.crop_size, config.batch_size, memory_gb=1.0)
    crops, batches = watched_crops(photos.held_back(24), 24, 384), photos.prefetch(0)
    rows, start = [dict(step=0, levels=look(trainer, crops))], time.perf_counter()
    for step in range(1, args.steps + 1):
        trainer(next(batches)[1])
        if step in (args.steps // 2, args.steps): rows.append(dict(step=step, levels=look(trainer, crops)))
    batches.close()
    result = dict(level_balance=trainer.objective.level_balance, model=args.model, learning_rate=args.learning_rate,
                  seconds=round(time.perf_counter() - start), threads=torch.get_num_threads(), rows=rows)
    print(json.dumps(result))
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = args.optimizer + ("" if args.level_balance is None else f", level_balance {args.level_balance:g}")
    write_atomic(args.out, (json.dumps(known | {name: result}, indent=1) + "\n").encode())


if __name__ == "__main__": main()
