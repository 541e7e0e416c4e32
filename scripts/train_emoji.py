"""Train the shipped text-to-image model of emojis from nothing, and the classifier that evaluates it.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz    # the pictures, in package/
    python scripts/train_emoji.py package                    # all, in this order; run again after a crash to resume
    python scripts/train_emoji.py package --only denoiser    # one of autoencoder, classifier, denoiser
    python scripts/train_emoji.py package --only export      # the model's folder, from the newest checkpoints so far

Writes checkpoints and logs under --out. The export writes the folder that diffusers' StableDiffusionPipeline reads, float16,
with the prompts, the classifier, samples and a record of how it was made, to --weights. Another autoencoder makes other latents:
after its training the denoiser starts anew.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as it is for a script, for tests that import this file

import pytorch_lightning as pl
import torch
from digits_training.training import train
from emoji_training.autoencoder import AutoencoderTraining
from emoji_training.classifier import ClassifierTraining
from emoji_training.denoiser import DenoiserTraining, build_unet, encode_variants
from emoji_training.export import averaged_autoencoder, export
from emoji_training.pictures import held_out_names, load_pictures, read_emojis, without_flags
from emoji_training.text import build_text_encoder, load_tokenizer, tokens_of
from torch.utils.data import TensorDataset

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.denoisers.emoji import CATEGORIES, FOLDER

STEPS = {"autoencoder": 12000, "classifier": 1500, "denoiser": 20000}
BATCH = {"autoencoder": 8, "classifier": 64, "denoiser": 64}


def options_of(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The command line's options with this network's own number of steps and of pictures in a batch."""
    own = {"steps": args.steps or STEPS[name], "batch": args.batch or BATCH[name], "network": name}
    return argparse.Namespace(**{**vars(args), **own})


def train_autoencoder(args: argparse.Namespace) -> None:
    """Train the autoencoder on all pictures without flags that are not held out."""
    pl.seed_everything(args.seed)
    emojis = without_flags(read_emojis(args.package))
    held_out = set(held_out_names(emojis))
    pictures = load_pictures([emoji for emoji in emojis if emoji.name not in held_out])
    train("autoencoder", AutoencoderTraining(args.steps), TensorDataset(pictures), None, args, "bf16-mixed", 0.99)


def train_classifier(args: argparse.Namespace) -> None:
    """Train the classifier on nine tenths of the pictures, flags among them."""
    pl.seed_everything(args.seed)
    emojis = read_emojis(args.package)
    pictures, labels = load_pictures(emojis), torch.tensor([CATEGORIES.index(emoji.category) for emoji in emojis])
    order = torch.randperm(len(emojis), generator=torch.Generator().manual_seed(0))
    rows = (order[len(order) // 10 :], order[: len(order) // 10])
    seen, held_out = (TensorDataset(pictures[part], labels[part]) for part in rows)
    train("classifier", ClassifierTraining(args.steps), seen, held_out, args)


def train_denoiser(args: argparse.Namespace) -> None:
    """Train UNet and text encoder on latents of the trained autoencoder."""
    pl.seed_everything(args.seed)
    emojis = without_flags(read_emojis(args.package))
    held_out = set(held_out_names(emojis))
    trained = [emoji for emoji in emojis if emoji.name not in held_out]
    texts = [text for emoji in trained for text in (emoji.name, emoji.short_name)]
    tokenizer = load_tokenizer(texts, args.out / "tokenizer")
    autoencoder = averaged_autoencoder(args.out, trained)
    mirrored = [emoji.mirrored for emoji in trained]
    variants = encode_variants(autoencoder, load_pictures(trained), mirrored) * autoencoder.config["scaling_factor"]
    captions = tokens_of(tokenizer, texts).unflatten(0, (len(trained), 2))
    empty = tokens_of(tokenizer, [""])
    module = DenoiserTraining(build_unet(), build_text_encoder(tokenizer), empty, args.steps)
    train("denoiser", module, TensorDataset(variants, captions), None, args, "bf16-mixed")


def main() -> None:
    """Parse the command line and train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainings = {"autoencoder": train_autoencoder, "classifier": train_classifier, "denoiser": train_denoiser}
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package emoji-datasource-google")
    parser.add_argument("--only", choices=[*trainings, "export"], help="one part (default: all, one after the other)")
    parser.add_argument("--steps", type=int, help=f"of the optimiser (default: {STEPS})")
    parser.add_argument("--batch", type=int, help=f"pictures (default: {BATCH})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji"), help="checkpoints and logs")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="where the exported folder goes")
    args = parser.parse_args()
    for name in (args.only,) if args.only else (*trainings, "export"):
        if name == "export":
            export(args)
        else:
            trainings[name](options_of(args, name))


if __name__ == "__main__":
    with standard_streams():
        main()
