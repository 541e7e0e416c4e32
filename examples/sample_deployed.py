"""Sample images from an exported model with numpy and openvino alone.

    python sample_deployed.py EXPORTED_FOLDER images.npy --count 16

Needs `tfmq_exp/deploy/openvino/runtime.py` next to it, or in Python's path. DDIM without noise (arXiv 2010.02502, eq. 12), for a model
without conditions; another sampler of `deployed.json` is refused, for its images would be others than those of the run.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from runtime import ExportedUNet

POWERS = {"linear": 1.0, "scaled_linear": 0.5}  # of betas that are spaced evenly


def alphas_of(sampling: dict[str, Any] | None) -> tuple[np.ndarray, float]:
    """Cumulative products of alphas, by timestep, and the one that the last step leads to.

    Raises:
        ValueError: a way of sampling that is not `sample`'s.
    """
    settings, schedule = (dict((sampling or {}).get(part, {})) for part in ("settings", "schedule"))
    how = f"{(sampling or {}).get('sampler')} {settings} on {schedule}"
    betas = [schedule.pop(name, None) for name in ("beta_start", "beta_end", "num_train_timesteps")]
    power = POWERS.get(schedule.pop("beta_schedule", ""))
    if not how.startswith("DDIM ") or settings["eta"] != 0 or power is None or schedule:
        raise ValueError(f"this script samples by DDIM with eta 0 and linear betas; the model was made for {how}")
    start, end, count = betas
    alphas = np.cumprod(1 - np.linspace(start**power, end**power, count) ** (1 / power))
    return alphas, 1.0 if settings["set_alpha_to_one"] else alphas[0]


def sample(network: ExportedUNet, count: int, seed: int) -> np.ndarray:
    """Images in [-1, 1], from pure noise."""
    table, last = alphas_of(network.manifest["sampling"])
    steps = [table[t] for t in network.timesteps]
    shape = network.compiled.input("sample").shape[1:]
    x = np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)
    for t, alpha, following in zip(network.timesteps, steps, [*steps[1:], last], strict=True):
        noise = network(x, t)
        clean = (x - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha)
        x = (np.sqrt(following) * clean + np.sqrt(1 - following) * noise).astype(np.float32)
    return x.clip(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        images = sample(ExportedUNet(args.folder, batch=args.count), args.count, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    np.save(args.out, images)
