"""A denoiser from the folder of any known pipeline of diffusers, with its conditions and first stage."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.files import hash_of_json, sha256_of
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.loading.scheduler_config import CONFIG, training_noise
from tfmq_exp.denoisers.pipelines.pipeline_calls import PipelineCalls
from tfmq_exp.denoisers.pipelines.pipeline_decoder import PipelineDecoder
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.pipelines.pipeline_recording import Recorder, record_calls
from tfmq_exp.denoisers.pipelines.text_components import load_text_encoder

# Pipelines that bring the guided prediction back to the length of the one with the condition.
NORMALISED = frozenset({"Lumina2Pipeline", "QwenImagePipeline"})
ENCODED_TOGETHER = 8
ReadEncoders = Callable[[], Mapping[str, Any]]


def example_choice(folder: PipelineFolder) -> str | int:
    """A text or a class that stands for any."""
    return 0 if "class_labels" in inspect.signature(folder.kind.__call__).parameters else "a picture"


@lru_cache(maxsize=2)
def _recorded(path: Path, checkpoint: Path | None, settings: str, _written: tuple[int, ...]) -> PipelineCalls:
    folder = PipelineFolder(path, checkpoint)
    return record_calls(folder, [example_choice(folder)], json.loads(settings))


def example_calls(folder: PipelineFolder, settings: Mapping[str, Any]) -> PipelineCalls:
    """Calls of a pipeline's denoiser for one text or class, recorded once; errors are those of `record_calls`."""
    written = tuple(
        file.stat().st_mtime_ns for file in sorted(folder.path.rglob("*"))
    )  # another pipeline may take its place
    return _recorded(folder.path, folder.checkpoint, json.dumps(dict(settings), sort_keys=True), written)


def open_folder(path: str | Path, checkpoint: str | Path | None = None) -> PipelineFolder:
    """A pipeline's folder, and the checkpoint that has its denoiser's weights, if any; errors are those of `PipelineFolder`."""
    return PipelineFolder(Path(path), None if checkpoint is None else Path(checkpoint))


class PipelineEncoder:
    """Conditions of texts or classes as a pipeline makes them; each different one is computed once.

    Args:
        folder: of the pipeline.
        settings: of the pipeline's call, see `record_calls`.
        encoders: reads text encoders that take the place of the folder's, by their names.
    """

    def __init__(
        self, folder: PipelineFolder, settings: Mapping[str, Any], encoders: ReadEncoders | None = None
    ) -> None:
        self.folder, self.settings, self.encoders = folder, settings, encoders
        self.device = torch.device("cpu")
        self.rows: dict[Any, dict[str, Tensor]] = {}  # by choice
        example = self._record([example_choice(folder)]) if encoders else example_calls(folder, settings)
        normalised = folder.name in NORMALISED and bool(example.null)
        if example.lists or example.null_constants or (example.guidance.weights is None and not normalised):
            raise ValueError(f"a {folder.name} calls its network in a way that is not supported with {dict(settings)}")
        self.shared = Conditions({}, example.null, example.constants, normalised)
        self._keep([example_choice(folder)], example)

    def _record(self, choices: Sequence[Any]) -> PipelineCalls:
        encoders = self.encoders() if self.encoders else None
        return record_calls(self.folder, choices, self.settings, rows=ENCODED_TOGETHER, encoders=encoders)

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Names of the pipeline's text encoders."""
        return tuple(name for name in self.folder.components if name.startswith("text_encoder"))

    def text_encoders(self) -> Mapping[str, Any]:
        """The pipeline's text encoders, read anew."""
        parts = {name: self.folder.components[name] for name in self.text_encoder_names}
        return self.encoders() if self.encoders else {name: load_text_encoder(*part) for name, part in parts.items()}

    def run_text_encoders(self, encoders: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Let the pipeline's program call these encoders for each different text, as it would for images of them."""
        recorder, distinct = (
            Recorder(self.folder, self.settings, self.folder.scheduler, encoders),
            [*dict.fromkeys(texts)],
        )
        for some in batches(len(distinct), ENCODED_TOGETHER):
            recorder.run(distinct[some.start : some.stop], most_steps=1)

    def with_text_encoders(self, encoders: ReadEncoders) -> "PipelineEncoder":
        """Conditions of other text encoders, which are read for new texts, and freed."""
        found = PipelineEncoder(self.folder, self.settings, encoders)
        found.to(self.device)
        return found

    def _keep(self, choices: Sequence[Any], calls: PipelineCalls) -> None:
        for i, choice in enumerate(choices):
            self.rows[choice] = {name: value[i] for name, value in calls.given.items()}

    def prepare(self, choices: Sequence[Any]) -> None:
        """Compute the conditions of choices that are new; text encoders are read for that, and freed.

        Raises:
            ValueError: others than the pipeline takes.
        """
        if new := [choice for choice in dict.fromkeys(choices) if choice not in self.rows]:
            self._keep(new, self._record(new))

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these texts or classes, a row each; ValueError for none, or others than the pipeline takes."""
        if not choices:
            where = "captions=FILE gives a file with a text a line, model.sampling.conditioning classes"
            raise ValueError(f"a {self.folder.name} makes an image of a text or a class: got none; {where}")
        self.prepare(choices)
        rows = [self.rows[choice] for choice in choices]
        given = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Conditions(given, self.shared.null, self.shared.constants, self.shared.normalised).to(self.device)

    def example(self) -> Conditions:
        return self([example_choice(self.folder)])

    def to(self, device: torch.device) -> None:
        self.device = device


def hash_parts(folder: PipelineFolder, names: Sequence[str]) -> str:
    """SHA-256 of the hashes of all files of some components."""
    files = [file for name in names for file in sorted(folder.components[name].folder.iterdir()) if file.is_file()]
    found = {file.relative_to(folder.path).as_posix(): sha256_of(file) for file in files}
    if folder.checkpoint and folder.denoiser_name in names:
        found["checkpoint"] = sha256_of(folder.checkpoint)
    return hash_of_json(found)


def load_pipeline(
    path: str | Path,
    name: str = "pipeline",
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    decode_rows: int = 8,
    weights: Literal["memory", "stored"] = "memory",
) -> Denoiser:
    """Read the denoiser of a pipeline that diffusers saved: float32, in evaluation mode, without gradients, on the CPU.

    Args:
        path: the folder, with model_index.json and safetensors.
        name: of the model, as results have it.
        settings: of the pipeline's call that decide on shapes and conditions: height, width, guidance_scale, negative_prompt.
        checkpoint: a file with the denoiser's weights in place of the folder's, see `read_single_file`.
        decode_rows: images that the first stage decodes together; bounds its memory.
        weights: place of the denoiser's weights: in memory, or read from their files, part by part, whenever they are needed.

    Raises:
        FileNotFoundError: a component lacks files; nothing is downloaded.
        ValueError: a pipeline or a network that is not known, or damaged; one whose weights cannot be read in parts.
    """
    folder, given, shards = open_folder(path, checkpoint), dict(settings or {}), None
    if weights == "stored":
        network, shards = folder.stored_network()
    else:
        network = folder.network(folder.denoiser_name)
    family_of(network)
    others = [part for part in folder.components if part != folder.denoiser_name]
    return Denoiser(
        name=name,
        network=network,
        sample_shape=example_calls(folder, given).sample_shape,
        schedule=training_noise(folder.components["scheduler"].folder / CONFIG),
        weights_sha256=hash_parts(folder, [folder.denoiser_name]),
        encoder=PipelineEncoder(folder, given),
        first_stage=PipelineDecoder(folder, given, decode_rows),
        settings={"pipeline": folder.name, "call": given, "others_sha256": hash_parts(folder, others)},
        shards=shards,
    )
