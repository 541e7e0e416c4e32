"""Training of a small network by Lightning: optimizer, averaged weights, checkpoints to resume from, and the export."""

import argparse
import csv
import functools
import hashlib
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.report.figures import mosaic


def cosine_with_warmup(step: int, *, warmup: int, total: int) -> float:
    """Learning-rate factor: linear from 0 to 1 over `warmup` steps, then a half cosine down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Training(pl.LightningModule):
    """Optimizer of every network: AdamW with linear warm-up and cosine decay."""

    def __init__(self, network: nn.Module, steps: int, weight_decay: float) -> None:
        super().__init__()
        self.network, self.steps, self.weight_decay = network, steps, weight_decay

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, functools.partial(cosine_with_warmup, warmup=200, total=self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_finished(module: Training, checkpoint: Path) -> bool:
    """Load the averaged weights of a checkpoint of the last step; False where it is of an earlier one, or there is none.

    Lightning trains no further from such a checkpoint, and would leave the module with the weights that are no average.
    """
    if not checkpoint.exists():
        return False
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["global_step"] > module.steps:
        raise ValueError(
            f"{checkpoint} is of step {state['global_step']}, beyond --steps {module.steps}: try another --out"
        )
    if state["global_step"] == module.steps:
        module.load_state_dict(state["state_dict"])
        return True
    return False


def train(
    name: str,
    module: Training,
    data: TensorDataset,
    held_out: TensorDataset | None,
    args: argparse.Namespace,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    ema_decay: float = 0.999,
) -> dict[str, float]:
    """Fit `module`, resuming from its last checkpoint under `args.out`. Returns what was measured.

    Args:
        name: of the network, and of its folder of checkpoints and logs.
        module: the network with its loss.
        data: images and labels to draw from, with replacement.
        held_out: images and labels to validate on; None for no validation.
        args: of the command line: `out`, `batch`.
        precision: of products and activations, by Lightning's names.
        ema_decay: share of the averaged weights that each step keeps; a training of few steps needs a smaller one.
    """
    folder = args.out / name
    sampler = RandomSampler(data, replacement=True, num_samples=module.steps * args.batch)
    trainer = pl.Trainer(
        max_steps=module.steps,
        precision=precision,
        accelerator="auto",
        devices=1,
        logger=CSVLogger(folder, name="log"),  # a resumed training starts another file, `export` joins them
        log_every_n_steps=50,
        val_check_interval=min(250, module.steps),
        callbacks=[
            EMAWeightAveraging(decay=ema_decay, use_buffers=False),
            ModelCheckpoint(
                folder,
                filename="last",
                every_n_train_steps=min(100, module.steps),
                save_weights_only=False,
                enable_version_counter=False,
            ),
            TQDMProgressBar(refresh_rate=10),
        ],
    )
    last = folder / "last.ckpt"
    loader = DataLoader(data, batch_size=args.batch, sampler=sampler)
    held_out_loader = None if held_out is None else DataLoader(held_out, batch_size=len(held_out))
    if not load_finished(module, last):
        trainer.fit(module, loader, held_out_loader, ckpt_path=last if last.exists() else None, weights_only=True)
    measured = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if held_out is not None:
        measured |= {k: float(v) for k, v in trainer.validate(module, held_out_loader, verbose=False)[0].items()}
    return measured


def export(name: str, module: Training, measured: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the (averaged) weights, the loss log and a record of how they were made."""
    args.weights.mkdir(parents=True, exist_ok=True)
    target = args.weights / f"{name}.safetensors"
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in module.network.state_dict().items()}
    write_atomically(target, lambda path: save_file(tensors, path))
    options = f"--steps {module.steps} --batch {args.batch} --seed {args.seed}"
    record = {
        "command": f"python scripts/train_digits.py {args.network} {options}",
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "measured": measured,
        "versions": {p: version(p) for p in ("torch", "diffusers", "pytorch-lightning", "scikit-learn")},
        "machine": platform.machine(),
    }
    write_json(args.weights / f"{name}.json", record)
    write_log(args.out / name, args.weights / f"{name}.log.csv")


def write_log(folder: Path, target: Path) -> None:
    """Join the logs of a training, which begins another file whenever it is resumed; the newest row of a step counts."""
    files = sorted((folder / "log").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    joined: dict[str, dict[str, str]] = {}  # a step's losses and its validation are rows of their own
    for row in (row for path in files for row in csv.DictReader(path.open(encoding="utf-8"))):
        joined.setdefault(row["step"], {}).update({key: value for key, value in row.items() if value})
    fields = [f for f in ("step", "loss", "held_out_accuracy") if any(f in row for row in joined.values())]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(joined.values())


def save_picture(images: np.ndarray, columns: int, path: Path) -> None:
    """Write uint8 images, [count, 1, height, width], as one picture of `columns` columns at three times their size."""
    picture = Image.fromarray(mosaic(images, columns=columns, gap=1))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)
