"""A folder that a pipeline of diffusers was saved to: which pipelines and components are allowed, and the pipeline built of them.

The pipeline's own program runs, of the installed diffusers; no code, no class outside the lists here, and no pickle comes from the
folder.
"""

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.files import read_json
from tfmq_exp.denoisers.loading.autoencoder import check_latent_scale
from tfmq_exp.denoisers.loading.network_config import check_code
from tfmq_exp.denoisers.loading.network_folder import build_outline, load_network, reason_of
from tfmq_exp.denoisers.loading.scheduler_config import CONFIG, check_count, check_finite, check_former_names
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights
from tfmq_exp.denoisers.loading.single_file import require_single_file
from tfmq_exp.denoisers.loading.stored_network import open_stored_network
from tfmq_exp.denoisers.pipelines.pipeline_classes import AUTOENCODERS, FORMER, PIPELINES, SCHEDULERS
from tfmq_exp.denoisers.pipelines.text_components import TEXT_ENCODERS, TOKENIZERS, load_text_encoder, load_tokenizer

# Parts that change no image of text or noise: the pipeline is built without them.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
DENOISER_NAMES = ("transformer", "unet")
# Settings of a pipeline that its index may hold; labels' names change nothing.
SETTINGS = ("force_zeros_for_empty_prompt", "boundary_ratio", "expand_timesteps", "is_distilled")
NAMES_ONLY = ("id2label",)
OFF = ("requires_safety_checker", "add_watermarker")  # of images, after they are made


# Component -> its library, and the classes that it may have; numbers that end its name are left out.
CLASSES: dict[str, tuple[str, Collection[str]]] = {
    "scheduler": ("diffusers", SCHEDULERS),
    "vae": ("diffusers", AUTOENCODERS),
    "text_encoder": ("transformers", TEXT_ENCODERS),
    "tokenizer": ("transformers", TOKENIZERS),
}


class Component(NamedTuple):
    """A part of a pipeline: its folder, and the class that the index names."""

    folder: Path
    kind: str


class PipelineFolder:
    """A pipeline's folder, its index checked; components are read when they are asked for.

    Weights of the denoiser come from a `checkpoint` in place of the folder where one is given, see `read_single_file`.

    Raises:
        FileNotFoundError: no model_index.json, or no folder of a component that it lists.
        ValueError: a pipeline or a component that is not in the lists above, by its class; an index that is damaged, names code,
            or lacks a component.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path, self.file = path, path / "model_index.json"
        self.checkpoint = checkpoint and require_single_file(checkpoint)
        index = read_json(self.file)
        check_code(self.file, index)
        name = index.get("_class_name")
        name = FORMER.get(name, name) if isinstance(name, str) else None
        if name not in PIPELINES:
            expected = ", ".join(sorted(PIPELINES))
            raise ValueError(
                f"{self.file}: the pipeline {index.get('_class_name')!r:.80} is not supported; expected {expected}"
            )
        self.name, self.kind = name, getattr(diffusers, name)
        self.parameters = {
            key: p for key, p in inspect.signature(self.kind.__init__).parameters.items() if key != "self"
        }
        self.settings, self.components = dict[str, Any](), dict[str, Component]()
        for key, value in index.items():
            if not key.startswith("_") and key not in (*LEFT_OUT, *NAMES_ONLY, *OFF):
                self._add(key, value)
        parts = [key for key, p in self.parameters.items() if p.default is p.empty and key not in LEFT_OUT]
        if lacking := [key for key in parts if key not in self.components and key not in index]:
            raise ValueError(f"{self.file} lacks the component {lacking[0]!r} of a {self.name}")
        for role in (self.denoiser_name, "vae", "scheduler"):
            if role not in self.components:
                raise ValueError(f"{self.file}: a {self.name} without {role} makes no images")

    @property
    def denoiser_name(self) -> str:
        """The name of the denoiser among the components: transformer or unet."""
        return next(key for key in DENOISER_NAMES if key in self.parameters)

    def _add(self, key: str, value: Any) -> None:
        """Take an entry of the index over, a setting or a component with its library and class."""
        if key not in self.parameters:
            raise ValueError(f"{self.file}: {key!r:.80} is no part of a {self.name}")
        if key in SETTINGS and isinstance(value, bool | int | float | None):
            self.settings[key] = value
            return
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str | None) for v in value):
            raise ValueError(
                f"{self.file}: {key}={value!r:.80} cannot be: expected the library and the class of a component"
            )
        library, kind = value
        if library is None or kind is None:
            return
        role = re.sub(r"(text_encoder|tokenizer)_\d$", r"\1", key)
        if role not in (classes := {**CLASSES, self.denoiser_name: ("diffusers", {PIPELINES[self.name]})}):
            lacking = f"{key} ({kind}) of a {self.name} is not supported"
            raise ValueError(f"{self.file}: {lacking}; without it images would be others")
        right, allowed = classes[role]
        if library != right or kind not in allowed:
            expected = f"of {right}, {' or '.join(sorted(allowed))}"
            raise ValueError(f"{self.file}: {key} of class {library}.{kind} is not supported; expected one {expected}")
        if not (folder := self.path / key).is_dir():
            raise FileNotFoundError(f"{self.path} lacks the folder {key}/, which its index lists{why_missing(folder)}")
        self.components[key] = Component(folder, kind)

    def network(self, name: str) -> Any:
        """The denoiser or the autoencoder by its name, with its weights; errors are those of `load_network`."""
        folder, kind = self._checked(name)
        return load_network(folder, {kind}, self.checkpoint if name == self.denoiser_name else None)

    def _checked(self, name: str) -> Component:
        """The denoiser or the autoencoder; ValueError for latents without a scale."""
        component = self.components[name]
        if name == "vae" and (file := component.folder / "config.json").is_file():
            check_latent_scale(read_json(file), file)
        return component

    def outline(self, name: str) -> Any:
        """The denoiser or the autoencoder by its name, without its weights; errors are those of `load_network`."""
        folder, kind = self._checked(name)
        return build_outline(folder, {kind}, self.checkpoint if name == self.denoiser_name else None)

    def stored_network(self) -> tuple[Any, ShardedWeights]:
        """The denoiser on the meta device and its weights in their files; errors are those of `open_stored_network`."""
        if self.checkpoint:
            raise ValueError(
                f"{self.checkpoint}: weights in one file are read whole; leave it out, or load into memory"
            )
        folder, kind = self.components[self.denoiser_name]
        return open_stored_network(folder, kind)

    def text_components(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Tokenizers and text encoders by their names; errors are those of `load_tokenizer` and `load_text_encoder`.

        `others` are text encoders that take the place of the folder's.
        """
        readers, given = {"tokenizer": load_tokenizer, "text_encoder": load_text_encoder}, dict(others or {})
        return {
            name: given[name] if name in given else read(*part)
            for kind, read in readers.items()  # tokenizers first, for they are small
            for name, part in self.components.items()
            if name.startswith(kind)
        }

    def scheduler(self) -> Any:
        """A new scheduler; ValueError for settings that cannot be."""
        folder, kind = self.components["scheduler"]
        file = folder / CONFIG
        config = read_json(file)
        check_code(file, config)
        try:
            if config.get("_class_name") != kind:
                raise ValueError(f"{config.get('_class_name')!r:.80} is not the {kind} of the index")
            check_former_names(config)
            check_count(config.get("num_train_timesteps", 1000))
            check_finite(kind, config)
            return getattr(diffusers, kind).from_config(config)
        except Exception as error:  # settings that do not go together fail in any way
            raise ValueError(f"{file}: {reason_of(error)}") from error

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """The pipeline of these components by their names, without all others; it shows no progress.

        Raises:
            ValueError: components that do not go together.
        """
        absent = {key: None for key, p in self.parameters.items() if p.default is p.empty}
        settings = {**self.settings, **{key: False for key in OFF if key in self.parameters}}
        try:
            pipeline = self.kind(**{**absent, **settings, **parts})
        except Exception as error:  # they fail in any way
            raise ValueError(f"{self.path}: no {self.name} can be built of it: {reason_of(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
