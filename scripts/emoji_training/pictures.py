"""Pictures of Noto Emoji with their names, from the npm package emoji-datasource-google, and what of them is held out."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

SIZE = 64
HELD_OUT = 48  # names that training leaves out
FLAGS, PARTS = "Flags", "Component"  # categories: flags are for the classifier alone, parts of other emojis for nothing
RENAMED = {"heavy black heart": "red heart"}  # black once meant filled
COMMON = 4  # names in which each word of a held-out name occurs at least
# Words whose pictures a mirror makes wrong; all of the category Symbols are left as they are, too.
SIDED = frozenset(
    [
        "left",
        "right",
        "leftwards",
        "rightwards",
        "east",
        "west",
        "clock",
        "facing",
        "index",
        "letters",
        "abc",
        "calendar",
        "keycap",
    ]
)


class Emoji(NamedTuple):
    """A picture's file, its texts and its category."""

    file: Path
    name: str
    short_name: str
    category: str
    subcategory: str

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image has the same name."""
        return self.category != "Symbols" and not SIDED & set(f"{self.name} {self.short_name}".split())


def words(text: str) -> str:
    """Lower-case words with a space between, of letters and digits alone."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def read_emojis(package: Path) -> list[Emoji]:
    """All emojis of the package with a picture, in its order, without parts; skin tones other than yellow are left out.

    Raises:
        FileNotFoundError: the folder is not that of the package.
    """
    table = package / "emoji.json"
    if not table.exists():
        raise FileNotFoundError(f"no {table}: expected the folder of the unpacked npm package emoji-datasource-google")
    rows: list[dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))

    def emoji(row: dict[str, Any]) -> Emoji:
        name, file = words(row["name"]), package / "img/google/64" / row["image"]
        return Emoji(
            file, RENAMED.get(name, name), words(row["short_name"]) or name, row["category"], row["subcategory"]
        )

    return [emoji(row) for row in rows if row["has_img_google"] and row["category"] != PARTS]


def without_flags(emojis: Sequence[Emoji]) -> list[Emoji]:
    """The emojis that have prompts."""
    return [emoji for emoji in emojis if emoji.category != FLAGS]


def in_random_order(texts: Sequence[str]) -> list[str]:
    """Different texts in an order that depends on them alone: that of their hashes."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def held_out_names(emojis: Sequence[Emoji], count: int = HELD_OUT) -> list[str]:
    """Names that are new combinations of words which other names have, too: no picture of theirs is trained on."""
    names = [emoji.name for emoji in emojis]
    counts = Counter(word for name in names for word in set(name.split()))
    candidates = [
        emoji.name
        for emoji in emojis
        if " " in emoji.name and emoji.subcategory != "family" and min(counts[w] for w in emoji.name.split()) >= COMMON
    ]
    return in_random_order(candidates)[:count]


def load_picture(file: Path) -> UInt8[Tensor, "3 64 64"]:
    """A picture on white."""
    image = Image.open(file).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, image).convert("RGB"))).permute(2, 0, 1)


def load_pictures(emojis: Sequence[Emoji]) -> UInt8[Tensor, "pictures 3 64 64"]:
    """Pictures on white, in the order of the emojis."""
    return torch.stack([load_picture(emoji.file) for emoji in emojis])
