"""Makes the golden files of a model with mixtures. They are frozen: a change of what it writes is a new version of the format."""

from pathlib import Path

import numpy as np
import torch

from hific_nb.codec import Codec, Latents
from hific_nb.config import ModelConfig
from hific_nb.model import Model, load_model, save_model

HERE = Path(__file__).resolve().parent
CONFIG = ModelConfig(transform="light", channels=(4, 4, 4, 4), n_residual_blocks=0, use_channel_norm=False, latent_channels=4,
                     hyperprior_channels=3, likelihood="mixture", mixture_components=3)


def main():
    rng, model = np.random.default_rng(0), Model(CONFIG)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.from_numpy(rng.standard_normal(p.shape) * p[0].numel() ** -0.5))
        model.Hyperprior.synthesis_DLMM_params.conv_out.bias.copy_(torch.from_numpy(rng.normal(0, 2, 36)))
    codec = Codec(load_model(save_model(model, HERE/"model")), device="cpu", dtype=torch.float32)
    z = rng.integers(-6, 7, (3, 2, 3)).astype(np.int32)
    symbols = np.rint(rng.standard_t(1.5, (4, 7, 9)) * 3).astype(np.int32)
    symbols[0, 0, :5] = 2 ** 31 - 1, -2 ** 31, 20_000, -16_390, 16_390
    indexes = codec.index_synthesis(torch.from_numpy(z)[None], (7, 9))
    latents = Latents(137, 100, symbols, z, indexes, torch.zeros(1, 4, 7, 9))
    for name, tile in (("whole", 0), ("tiles", 64)): (HERE/f"{name}.hfc").write_bytes(codec.encode(latents, tile))
    np.savez(HERE/"content.npz", symbols=symbols, hyperlatents=z)


if __name__ == "__main__": main()
