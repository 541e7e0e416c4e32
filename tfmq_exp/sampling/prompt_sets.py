"""Prompts of a benchmark as conditions: a subset by a published rule, and other prompts to calibrate with."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.text_files import decode_text
from tfmq_exp.core.validate import COUNT, check_fields, one_of, optional
from tfmq_exp.data.prompt_files import Choice, choose_names, read_prompts
from tfmq_exp.denoisers.emoji import emoji_folder
from tfmq_exp.sampling.conditioning import hash_of, read_captions


@dataclass(frozen=True)
class PromptSubset:
    """Prompts of a file. `sha256` is that of those that are chosen."""

    path: str
    sha256: str
    count: int | None = None  # None: all
    choice: Choice = "first"

    def __post_init__(self) -> None:
        check_fields(self, count=optional(COUNT), choice=one_of("first", "shuffled"))

    @classmethod
    def read(cls, path: str, count: int | None = None, choice: Choice = "first", origin: str = "") -> "PromptSubset":
        """Choose prompts of a file, see `read_prompts`, or captions, see `read_captions`.

        Args:
            path: the file.
            count: of prompts; None for all.
            choice: see `choose_names`.
            origin: which file that is and where it is published, for the message if it is missing.
        """
        if not Path(path).exists():
            raise FileNotFoundError(
                f"no prompts at {path}: nothing is downloaded; put {origin or 'a file of prompts'} there"
            )
        return cls(path, hash_of(cls(path, "", count, choice)._chosen()), count, choice)

    def _chosen(self) -> list[str]:
        path = Path(self.path)
        try:
            prompts = read_any(path)
            return [prompts[name] for name in choose_names(list(prompts), self.count, self.choice)]
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All chosen prompts; ValueError if they have changed since `read`."""
        found = tuple(self._chosen())
        if hash_of(found) != self.sha256:
            raise ValueError(f"{self.path} has changed since the run began: start it again")
        return found


def read_any(path: Path) -> dict[str, str]:
    """Prompts by name, of a file of prompts, a text file or COCO's annotations; captions are named by their number."""
    if path.suffix.lower() in ("", ".txt") or is_coco(path):
        return {str(i): text for i, text in enumerate(read_captions(path))}
    return read_prompts(path)


def is_coco(path: Path) -> bool:
    """Whether a file is JSON with annotations."""
    try:
        return path.suffix.lower() == ".json" and "annotations" in json.loads(decode_text(path))
    except (ValueError, TypeError, RecursionError):  # damaged: its reader says where
        return False


@dataclass(frozen=True)
class PromptSets:
    """Prompts of images in turn, and others for everything else that a run samples: calibration, corrections, diagnosis.

    A prompt in both is refused: images would be scored that the network was calibrated with.
    """

    images: PromptSubset
    calibration: PromptSubset

    def __post_init__(self) -> None:
        known = {_plain(text) for text in self.calibration.texts}
        if both := [text for text in self.images.texts if _plain(text) in known]:
            raise ValueError(
                f"{len(both)} of {len(self.images.texts)} prompts in {self.images.path} are among those of calibration, "
                f"{self.calibration.path}: {both[0]!r:.80}; give prompts.calibration.path another file"
            )

    def choose(self, seed: int, stream: str, indices: Iterable[int]) -> list[str]:
        """The prompts of images `indices` of a stream, in turn."""
        texts = (self.images if stream == Stream.IMAGES else self.calibration).texts
        return [texts[i % len(texts)] for i in indices]


def emoji_prompts(folder: str | None = None) -> PromptSets:
    """Prompts of the text-to-image model of emojis, in its folder."""
    files = (emoji_folder(folder) / f"{use}.txt" for use in ("evaluation", "calibration"))
    return PromptSets(*(PromptSubset.read(str(file)) for file in files))


def _plain(text: str) -> str:
    """A text without what makes no other prompt of it: capitals, and spaces beyond the first."""
    return " ".join(text.split()).casefold()
