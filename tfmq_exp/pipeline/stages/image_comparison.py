"""Comparison of one network's images with those of the float network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.evaluation.image_distances import pooled_signal_noise_ratio
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.evaluation import SampleImages
from tfmq_exp.report.image_distances import DISTANCES, summarize

COMPARISON, DISTANCE_VALUES = "comparison.json", "distances.safetensors"


@dataclass(eq=False)
class CompareImages(Stage):
    """Images of one network against those that the float network makes of the same noise."""

    images: SampleImages
    exact: SampleImages
    stored_as = "comparison"
    in_parts = True

    def inputs(self) -> Mapping[str, Any]:
        keys = {"images": self.images.key, "float_images": self.exact.key}
        return {**keys, "comparison": self.run.comparison.identity}

    def compute(self, folder: Path) -> None:
        if not self.pipeline.group.is_main:
            return
        pairs = matched(self.images.images(), self.exact.images())
        found = self.run.comparison(pairs)
        values = {name: torch.tensor(numbers) for name, numbers in found.values.items()}
        self.pipeline.store.write(folder / DISTANCE_VALUES, partial(save_file, values))
        ratio, same = pooled_signal_noise_ratio(found.values["psnr"]), found.identical == len(values["psnr"])
        fid = {} if found.fid is None else {"fid": found.fid}
        summary = {"psnr": None if same else ratio, "identical": found.identical, **fid}
        self.pipeline.store.write_json(folder / COMPARISON, {**summary, "images": summarize(found.values)})

    def summary(self) -> dict[str, Any]:
        """`psnr` of the mean error over all images in dB, None where all are the same; `images`: summary of each distance.

        `fid`: Fréchet distance to the float images, where there is an extractor; `identical`: number of equal pairs.
        """
        return self.read_json(COMPARISON)

    def values(self) -> dict[str, list[float]]:
        """Distances of every image, in order."""
        found = load_file(self.result() / DISTANCE_VALUES)  # which sorts its names
        return {name: found[name].tolist() for name in DISTANCES if name in found}


def matched(images: Iterator[Tensor], exact: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images, each with as many of the other ones in the same order; those may come in other batches, and be more."""
    left = torch.empty(0)
    for batch in images:
        parts = [left] if len(left) else []
        while sum(map(len, parts)) < len(batch):
            parts.append(next(exact))
        joined = torch.cat(parts)
        yield batch, joined[: len(batch)]
        left = joined[len(batch) :]
