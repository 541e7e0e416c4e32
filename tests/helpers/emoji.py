"""A model of emojis as the training exports it, with random weights; and a package of pictures as npm has it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tfmq_exp.denoisers.emoji import CLASSIFIER, EmojiClassifier

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from emoji_training.autoencoder import build_autoencoder
from emoji_training.denoiser import build_unet
from emoji_training.export import pipeline_of, save_half, write_prompts, write_reference
from emoji_training.pictures import held_out_names, load_pictures, read_emojis, without_flags
from emoji_training.text import build_text_encoder, load_tokenizer

COLOURS, THINGS = ("red", "blue", "green", "white", "black"), ("heart", "circle", "square", "book", "cat", "apple")


def emoji_row(name: str, image: str, category: str = "Objects") -> dict[str, Any]:
    own = {"name": name.upper(), "short_name": name.replace(" ", "_"), "image": image, "category": category}
    return {**own, "subcategory": "tool", "has_img_google": True}


def make_package(folder: Path) -> Path:
    """A package of 30 emojis with names of two words, an extra flag, and one half transparent."""
    names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    rows = [emoji_row(name, f"{i}.png") for i, name in enumerate(names)]
    rows.append(emoji_row("flag", "30.png", "Flags"))
    pictures = folder / "img/google/64"
    pictures.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for row in rows:
        Image.fromarray(noise.integers(0, 256, (64, 64, 4), dtype=np.uint8)).save(pictures / row["image"])
    (folder / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def save_untrained(folder: Path) -> Path:
    """The exported folder of a model whose weights are all random."""
    torch.manual_seed(0)
    emojis = without_flags(read_emojis(make_package(folder / "package")))
    tokenizer = load_tokenizer([emoji.name for emoji in emojis], folder / "words")
    networks = build_autoencoder(), build_text_encoder(tokenizer), tokenizer, build_unet()
    target = folder / "model"
    save_half(pipeline_of(*networks), target)
    classifier = EmojiClassifier().eval()
    save_file(classifier.state_dict(), target / CLASSIFIER)
    write_reference(classifier, load_pictures(emojis), target / "reference.npz")
    write_prompts(emojis, held_out_names(emojis, count=3), target, calibration=8)
    return target
