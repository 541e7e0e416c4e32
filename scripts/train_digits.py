"""Train the two networks that the project ships: the digits denoiser and the digits classifier; and another denoiser.

    python scripts/train_digits.py all --out outputs/digits          # both, from nothing (about 1.5 h on two CPU cores)
    python scripts/train_digits.py denoiser --steps 7000             # one of them; run again after a crash to resume
    python scripts/train_digits.py pipeline                          # another denoiser, as a folder of diffusers

The pipeline differs in architecture and noise schedule, to try a setting that was chosen on the shipped one:

    python run.py model=diffusers path=outputs/digits/pipeline data=digits eval=digits protocol=digits

Writes checkpoints and logs under --out and, when training is complete, `<name>.safetensors`, `<name>.log.csv`,
`<name>.json` (how it was made, with hash) and for the denoiser `denoiser.png` (64 samples) under --weights.
"""

import argparse
import csv
import functools
import hashlib
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.core.files import write_atomically, write_json
from tfmq_exp.data.digits import load_images
from tfmq_exp.denoisers.digits import (
    IMAGE_SIZE,
    WEIGHTS,
    DigitClassifier,
    build_schedule,
    build_unet,
    load_denoiser,
)
from tfmq_exp.report.figures import mosaic
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard
from tfmq_exp.sampling.samplers import DDIM

HELD_OUT = 360  # a fifth of the digits, never seen by the classifier while it trains


def cosine_with_warmup(step: int, *, warmup: int, total: int) -> float:
    """Learning-rate factor: linear from 0 to 1 over `warmup` steps, then a half cosine down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Training(pl.LightningModule):
    """Optimizer of both networks: AdamW with linear warm-up and cosine decay."""

    def __init__(self, network: nn.Module, steps: int, weight_decay: float) -> None:
        super().__init__()
        self.network, self.steps, self.weight_decay = network, steps, weight_decay

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, functools.partial(cosine_with_warmup, warmup=200, total=self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DenoiserTraining(Training):
    """The simple loss of DDPM (arXiv 2006.11239, eq. 14): predict the noise at a uniformly drawn timestep."""

    def __init__(self, unet: Any, schedule: Any, steps: int) -> None:
        super().__init__(unet.to(memory_format=torch.channels_last), steps, weight_decay=0.0)
        self.schedule = schedule

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images = batch[0].float() / 127.5 - 1
        noise = torch.randn_like(images)
        t = torch.randint(0, self.schedule.config["num_train_timesteps"], (len(images),), device=images.device)
        timesteps: Any = t  # annotated as an IntTensor there
        noisy = self.schedule.add_noise(images, noise, timesteps).to(memory_format=torch.channels_last)
        loss = F.mse_loss(self.network(noisy, t).sample, noise)
        self.log("loss", loss, prog_bar=True)
        return loss


def build_pipeline() -> Any:
    """Another denoiser, 1.1 M parameters: scale and shift by the temporal feature, two layers in a block, a cosine schedule."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # after tfmq_exp, which silences its warnings

    unet = UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    return DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False))


class ClassifierTraining(Training):
    """Cross-entropy on randomly shifted, scaled and noised digits; accuracy on the held-out ones."""

    def __init__(self, steps: int) -> None:
        super().__init__(DigitClassifier(), steps, weight_decay=1e-2)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(augment(images)).logits, labels, label_smoothing=0.05)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        correct = (self.network(images).logits.argmax(1) == labels).float().mean()
        self.log("held_out_accuracy", correct, prog_bar=True)


def augment(images: Tensor) -> Tensor:
    """Random affine jitter: shift up to 1.5 pixels, rotation up to 12 degrees, scale within 10 %; uint8 in and out."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 2 * 12 * torch.pi / 180
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 2 * 1.5 / 8
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def train(
    name: str, module: Training, data: TensorDataset, held_out: TensorDataset | None, args: argparse.Namespace
) -> dict:
    """Fit `module`, resuming from its last checkpoint under `args.out`, and export it. Returns what was measured."""
    folder = args.out / name
    sampler = RandomSampler(data, replacement=True, num_samples=module.steps * args.batch)
    trainer = pl.Trainer(
        max_steps=module.steps,
        accelerator="auto",
        devices=1,
        logger=CSVLogger(folder, name="log"),  # a resumed training starts another file, `export` joins them
        log_every_n_steps=50,
        val_check_interval=min(250, module.steps),
        callbacks=[
            EMAWeightAveraging(decay=0.999, use_buffers=False),
            ModelCheckpoint(
                folder, filename="last", every_n_train_steps=100, save_weights_only=False, enable_version_counter=False
            ),
            TQDMProgressBar(refresh_rate=10),
        ],
    )
    last = folder / "last.ckpt"
    loader = DataLoader(data, batch_size=args.batch, sampler=sampler)
    held_out_loader = None if held_out is None else DataLoader(held_out, batch_size=len(held_out))
    trainer.fit(module, loader, held_out_loader, ckpt_path=last if last.exists() else None, weights_only=True)
    measured = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if held_out is not None:
        measured |= {k: float(v) for k, v in trainer.validate(module, held_out_loader, verbose=False)[0].items()}
    return measured


def export(name: str, module: Training, measured: dict, args: argparse.Namespace) -> None:
    """Write the (averaged) weights, the loss log and a record of how they were made."""
    args.weights.mkdir(parents=True, exist_ok=True)
    target = args.weights / f"{name}.safetensors"
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in module.network.state_dict().items()}
    write_atomically(target, lambda path: save_file(tensors, path))
    record = {
        "command": f"python scripts/train_digits.py {name} --steps {module.steps} --batch {args.batch} --seed {args.seed}",
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "measured": measured,
        "versions": {p: version(p) for p in ("torch", "diffusers", "pytorch-lightning", "scikit-learn")},
        "machine": platform.machine(),
    }
    write_json(args.weights / f"{name}.json", record)
    files = sorted((args.out / name / "log").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    joined: dict[str, dict[str, str]] = {}  # a step's losses and its validation are rows of their own
    for row in (row for path in files for row in csv.DictReader(path.open(encoding="utf-8"))):
        joined.setdefault(row["step"], {}).update({key: value for key, value in row.items() if value})
    fields = [f for f in ("step", "loss", "held_out_accuracy") if any(f in row for row in joined.values())]
    with (args.weights / f"{name}.log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(joined.values())


def save_samples(weights: Path, steps: int = 50) -> None:
    """64 samples of the trained denoiser by deterministic DDIM, as one picture."""
    denoiser = load_denoiser(str(weights / "denoiser.safetensors"))
    sampling, plan = Sampling(DDIM(steps)), ImagePlan(64, seed=0, batch=64)
    images = sample_shard(sampling.predictor(denoiser.unet), denoiser, sampling, plan, range(64))
    picture = Image.fromarray(mosaic(images.numpy(), columns=16, gap=1))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(weights / "denoiser.png")


def main() -> None:
    """Parse the command line and train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["denoiser", "classifier", "all", "pipeline"])
    parser.add_argument(
        "--steps", type=int, help="of the optimiser (default: 7000 for a denoiser, 2500 for the classifier)"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/digits"), help="checkpoints and logs")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished networks go")
    args = parser.parse_args()
    images, labels = load_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[HELD_OUT:], order[:HELD_OUT]
    if args.network in ("classifier", "all"):
        pl.seed_everything(args.seed)
        module: Training = ClassifierTraining(args.steps or 2500)
        held_out = TensorDataset(images[unseen], labels[unseen])
        export(
            "classifier",
            module,
            train("classifier", module, TensorDataset(images[seen], labels[seen]), held_out, args),
            args,
        )
    if args.network in ("denoiser", "all"):
        pl.seed_everything(args.seed)
        module = DenoiserTraining(build_unet(), build_schedule(), args.steps or 7000)
        export("denoiser", module, train("denoiser", module, TensorDataset(images, labels), None, args), args)
        save_samples(args.weights)
    if args.network == "pipeline":
        pl.seed_everything(args.seed)
        pipeline = build_pipeline()
        module = DenoiserTraining(pipeline.unet, pipeline.scheduler, args.steps or 7000)
        train("pipeline", module, TensorDataset(images, labels), None, args)
        pipeline.save_pretrained(args.out / "pipeline")


if __name__ == "__main__":
    with standard_streams():
        main()
