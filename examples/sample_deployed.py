"""Sample images from an exported model with numpy and openvino alone.

    python sample_deployed.py EXPORTED_FOLDER images.npy --count 16

Needs `loader.py` of `tfmq_exp/deploy` beside it, or in Python's path. The noise schedule is that of the shipped model of digits:
linear betas, 1000 training timesteps; DDIM without noise (arXiv 2010.02502, eq. 12).
"""

import argparse
from pathlib import Path

import numpy as np
from loader import Deployed

TRAIN, BETA_START, BETA_END = 1000, 1e-4, 0.02


def sample(unet: Deployed, count: int, seed: int) -> np.ndarray:
    """Images in [-1, 1], from pure noise."""
    alphas = np.cumprod(1 - np.linspace(BETA_START, BETA_END, TRAIN))
    shape = unet.compiled.input("sample").shape[1:]
    x = np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)
    for t, following in zip(unet.timesteps, [*unet.timesteps[1:], 0], strict=True):
        noise = unet(x, t)
        clean = (x - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        x = (np.sqrt(alphas[following]) * clean + np.sqrt(1 - alphas[following]) * noise).astype(np.float32)
    return x.clip(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    np.save(args.out, sample(Deployed(args.folder, batch=args.count), args.count, args.seed))
