"""Train the networks that the project ships: two denoisers of digits and the digits classifier; and another denoiser.

    python scripts/train_digits.py all --out outputs/digits          # all, from nothing (about 2 h on two CPU cores)
    python scripts/train_digits.py denoiser --steps 7000             # one of them; run again after a crash to resume
    python scripts/train_digits.py dit                               # the transformer by class, a rectified flow
    python scripts/train_digits.py pipeline                          # another denoiser, as a folder of diffusers

The pipeline differs in architecture and noise schedule, to try a setting that was chosen on the shipped one:

    python run.py model=diffusers path=outputs/digits/pipeline data=digits eval=digits protocol=digits

Writes checkpoints and logs under --out and, when training is complete, `<name>.safetensors`, `<name>.log.csv`,
`<name>.json` (how it was made, with hash) and for the denoisers `<name>.png` (some samples) under --weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as it is for a script, for tests that import this file

import pytorch_lightning as pl
import torch
from digits_training.classifier import ClassifierTraining
from digits_training.denoiser import DenoiserTraining, build_pipeline, save_samples
from digits_training.flow_samples import save_class_samples, scores_by_guidance
from digits_training.rectified_flow import RectifiedFlowTraining
from digits_training.training import export, train
from torch import Tensor
from torch.utils.data import TensorDataset

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.data.digits import load_images
from tfmq_exp.denoisers.digits import WEIGHTS, build_dit, build_schedule, build_unet

HELD_OUT = 360  # a fifth of the digits, never seen by the classifier while it trains


def train_classifier(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train and export the classifier on four fifths of the digits."""
    pl.seed_everything(args.seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, held_out = (TensorDataset(images[rows], labels[rows]) for rows in (order[HELD_OUT:], order[:HELD_OUT]))
    module = ClassifierTraining(args.steps or 2500)
    export("classifier", module, train("classifier", module, seen, held_out, args), args)


def train_denoiser(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train and export the denoiser of DDPM."""
    pl.seed_everything(args.seed)
    module = DenoiserTraining(build_unet(), build_schedule(), args.steps or 7000)
    export("denoiser", module, train("denoiser", module, TensorDataset(images, labels), None, args), args)
    save_samples(args.weights)


def train_dit(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train the transformer by class, score its samples with the classifier, and export it."""
    pl.seed_everything(args.seed)
    dit = build_dit()
    module = RectifiedFlowTraining(dit, args.steps or 6000)
    measured = train("digits_dit", module, TensorDataset(images, labels), None, args)
    export("digits_dit", module, {**measured, **scores_by_guidance(dit.cpu().eval())}, args)
    save_class_samples(dit, args.weights / "digits_dit.png")


def train_pipeline(images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train another denoiser of DDPM and save it as diffusers does."""
    pl.seed_everything(args.seed)
    pipeline = build_pipeline()
    module = DenoiserTraining(pipeline.unet, pipeline.scheduler, args.steps or 7000)
    train("pipeline", module, TensorDataset(images, labels), None, args)
    pipeline.save_pretrained(args.out / "pipeline")


def main() -> None:
    """Parse the command line and train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = {"classifier": train_classifier, "denoiser": train_denoiser, "dit": train_dit}
    trainings = {**shipped, "pipeline": train_pipeline}
    parser.add_argument("network", choices=["all", *trainings])
    steps = "of the optimiser (default: 7000 for a denoiser, 6000 for the transformer, 2500 for the classifier)"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/digits"), help="checkpoints and logs")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished networks go")
    args = parser.parse_args()
    images, labels = load_images()
    for name in shipped if args.network == "all" else (args.network,):
        trainings[name](images, labels, argparse.Namespace(**{**vars(args), "network": name}))


if __name__ == "__main__":
    with standard_streams():
        main()
