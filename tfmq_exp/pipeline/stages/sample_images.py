"""Images of one network, in shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.files import intact, write_checked
from tfmq_exp.finite import within
from tfmq_exp.pipeline.networks import SampledNetwork
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.sampling.images import sample_shard


class SampleImages(Stage):
    """Images, a file for each batch. They depend on the network, the sampler, count and seed, and (in the last bit) the batch."""

    stored_as = "images"

    def __init__(self, run: Run, pipeline: Pipeline, network: SampledNetwork) -> None:
        super().__init__(run, pipeline)
        self.network, self.name = network, f"{network.prefix}images"

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {**self.run.model_inputs, **self.network.inputs, "images": self.run.images}

    def compute(self, folder: Path) -> None:
        run, calls = self.run, len(self.run.calls)
        predict, sampling = self.network.sampler()
        with self.pipeline.progress.stage(self.name, run.images.count) as advance:
            for shard in self.pipeline.group.shard(run.images.shards()):

                def each_step(step: int, shard: range = shard) -> None:
                    advance(shard.start + len(shard) * (step + 1) / calls, f"step {step + 1}")

                target = shard_file(folder, shard)
                if not intact(target):
                    with within(f"{self.name} {shard.start} to {shard.stop - 1}"):
                        images = sample_shard(predict, run.denoiser, sampling, run.images, shard, each_step)
                    write_checked(target, lambda path, images=images: save_file({"images": images}, path))
                advance(shard.stop, "")

    def shards(self) -> dict[range, Path]:
        """Files by the indices of their images."""
        folder = self.result()
        return {shard: shard_file(folder, shard) for shard in self.run.images.shards()}

    def images(self) -> Iterator[Tensor]:
        """The images, shard by shard, uint8."""
        for file in self.shards().values():
            yield load_file(file)["images"]

    def missing(self) -> int:
        """Number of images that no shard in the store holds."""
        if self.entry.done:
            return 0
        return sum(len(s) for s in self.run.images.shards() if not shard_file(self.entry.path, s).is_file())


def shard_file(folder: Path, shard: range) -> Path:
    """File of a shard's images."""
    return folder / f"images-{shard.start:06d}.safetensors"
