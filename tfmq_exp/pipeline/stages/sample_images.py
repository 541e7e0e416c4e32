"""Images of one network, in shards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.core.files import intact, write_checked
from tfmq_exp.core.finite import within
from tfmq_exp.pipeline.networks import SampledNetwork
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.sampling.images import sample_shard


@dataclass(eq=False)
class SampleImages(Stage):
    """Images, a file for each batch. They depend on the network, the sampler, count and seed, and (in the last bit) the batch."""

    network: SampledNetwork
    stored_as = "images"

    @property
    def name(self) -> str:
        return f"{self.network.prefix}images"

    def inputs(self) -> Mapping[str, Any]:
        return {**self.run.model_inputs, **self.network.inputs, "images": self.run.images}

    def compute(self, folder: Path) -> None:
        run, calls = self.run, len(self.run.calls)
        predict, sampling = self.network.sampler()
        with self.pipeline.progress(self.name, run.images.count) as advance:
            for shard in self.pipeline.group.shard(run.images.shards()):

                def each_step(step: int, shard: range = shard) -> None:
                    advance(shard.start + len(shard) * (step + 1) / calls, f"step {step + 1}")

                target = shard_file(folder, shard)
                if not intact(target):
                    with within(f"{self.name} {shard.start} to {shard.stop - 1}"):
                        images = sample_shard(predict, run.denoiser, sampling, run.images, shard, each_step)
                    write_checked(target, lambda path, images=images: save_file({"images": images}, path))
                advance(shard.stop, "")

    def count(self) -> int:
        return sum(len(shard) for shard in self.run.images.shards() if not shard_file(self.entry.path, shard).is_file())

    def shards(self) -> dict[range, Path]:
        """Files by the indices of their images."""
        folder = self.result()
        return {shard: shard_file(folder, shard) for shard in self.run.images.shards()}

    def images(self) -> Iterator[Tensor]:
        """The images, shard by shard, uint8."""
        for file in self.shards().values():
            yield load_file(file)["images"]


def shard_file(folder: Path, shard: range) -> Path:
    """File of a shard's images."""
    return folder / f"images-{shard.start:06d}.safetensors"
