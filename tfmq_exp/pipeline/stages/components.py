"""Quantization of what a pipeline has beside its denoiser: the first stage's decoder, and text encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import within
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.decoder import Decoder
from tfmq_exp.denoisers.first_stage_decoder import autoencoder_of, decoder_inputs
from tfmq_exp.evaluation.image_distances import signal_noise_ratio
from tfmq_exp.methods import text_encoder as text
from tfmq_exp.methods.first_stage import DecoderCalibration, FirstStageBits, decoded_pairs
from tfmq_exp.pipeline.pipeline import Advance, Stage
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.stages.data import CollectTrajectory
from tfmq_exp.pipeline.unit_checkpoints import finished_units, learning
from tfmq_exp.sampling.images import to_uint8
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.components import encoder_names, with_components

ARTEFACT, ERRORS = "decoder.safetensors", "errors.json"
HELD_OUT = 8  # one of so many calibration samples is measured instead of learned from
Samples = TypeVar("Samples", Sequence[str], Tensor)


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to learn from, and the last eighth to measure; of a single one both are that."""
    learned = len(samples) - max(1, len(samples) // HELD_OUT)
    return samples[: learned or None], samples[learned:]


@dataclass(eq=False)
class CollectLatents(Stage):
    """Final latents of the float model's calibration trajectories, as the autoencoder decodes them."""

    trajectory: CollectTrajectory
    stored_as = "latents"

    def inputs(self) -> Mapping[str, Any]:
        return {"trajectory": self.trajectory.key}

    def compute(self, folder: Path) -> None:
        run, calls = self.run, len(self.run.calibration_calls)
        sampling, given = run.calibration_sampling, {"seed": run.seed, "stream": Stream.CALIBRATION}
        predict = sampling.predictor(run.denoiser.network)

        def make(indices: range, advance: Advance) -> Callable[[Path], object]:
            x = torch.empty(0)  # every sampler takes a step
            with within(f"{self.name} {indices.start} to {indices.stop - 1}"), torch.no_grad():
                for step in sampling.trajectory(predict, run.denoiser, **given, indices=indices):
                    advance((step.index + 1) / calls, f"step {step.index + 1}")
                    x = step.x_next
                latents = decoder_inputs(run.denoiser.first_stage, x)
            return partial(save_file, {"latents": latents.cpu().contiguous()})

        with self.pipeline.progress(self.name, 1) as advance:
            self.pipeline.compute_files(self.files_in(folder), make, advance)

    def files_in(self, folder: Path) -> dict[range, Path]:
        """Files in a folder by the indices of their trajectories."""
        together = batches(self.run.calibration.images, self.run.calibration.batch)
        return {indices: folder / f"latents-{indices.start:06d}.safetensors" for indices in together}

    def latents(self) -> Tensor:
        """All of them."""
        return torch.cat([load_file(file)["latents"] for file in self.files_in(self.result()).values()])


@dataclass(eq=False)
class QuantizeFirstStage(Stage):
    """The decoder with integer weights as an artefact, and its images' distance from those of the float one."""

    bits: FirstStageBits
    latents: CollectLatents
    stored_as = "first_stage"

    def inputs(self) -> Mapping[str, Any]:
        method = self.run.method
        phases = {"weights": method.weights, "activations": method.activations, "range": method.weight_observer}
        return {"latents": self.latents.key, "bits": self.bits, "seed": self.run.seed, **phases}

    def compute(self, folder: Path) -> None:
        run, stage = self.run, self.run.denoiser.first_stage
        decoder = Decoder(autoencoder_of(stage)).to(run.denoiser.device)
        learned, measured = held_out(self.latents.latents())
        compute = replace(run.compute, batch=min(run.compute.batch, getattr(stage, "rows", run.compute.batch)))
        calibration = DecoderCalibration(learned, run.method, compute, run.seed)
        with learning(self.pipeline, "weights", folder, self.name) as callbacks:
            model = calibration.quantize(decoder, self.bits, *callbacks)
        self.pipeline.store.write(folder / ARTEFACT, lambda path: serialization.save(model, path))
        pairs = decoded_pairs(model, decoder, measured, compute.batch)
        bytes_of = partial(to_uint8, rule=run.images.uint8)
        psnr = signal_noise_ratio((bytes_of(ours).cpu(), bytes_of(exact).cpu()) for ours, exact in pairs)
        size = 4 * sum(p.numel() for p in decoder.parameters())
        found = {"psnr": psnr, "latents": len(measured), "float_bytes": size}
        self.pipeline.store.write_json(folder / ERRORS, found)

    def count(self) -> int:
        return finished_units(self.entry.path)

    def record(self) -> dict[str, Any]:
        """Bits, bytes, and PSNR in dB over all images of the measured latents; None where all are the same."""
        bits, size = self.bits.name, (self.result() / ARTEFACT).stat().st_size
        return {"bits": bits, "bytes": size, **self.read_json(ERRORS)}


@dataclass(eq=False)
class QuantizeTextEncoders(Stage):
    """Every text encoder with integer weights as an artefact, and its embeddings' distance from the float ones."""

    bits: text.TextEncoderBits
    stored_as = "text_encoders"

    def inputs(self) -> Mapping[str, Any]:
        run = self.run
        texts = {"calibration": run.calibration, "seed": run.seed}
        return {**run.model_inputs, **texts, "bits": self.bits, "range": run.method.weight_observer}

    def compute(self, folder: Path) -> None:
        run, found, device = self.run, dict[str, Any](), self.run.denoiser.device
        encoder: Any = run.denoiser.encoder
        encoders, texts = encoder.text_encoders(), run.sampling.conditioning
        calls: list[dict[str, list[text.Call]]] = []
        for some in held_out(
            [*dict.fromkeys(texts.choose(run.seed, Stream.CALIBRATION, range(run.calibration.images)))]
        ):
            with text.recorded_text_calls(encoders) as recorded:
                encoder.run_text_encoders(encoders, some)
            calls.append(recorded)
        with self.pipeline.progress(self.name, len(encoders)) as advance:
            for done, (name, float_encoder) in enumerate(encoders.items()):
                advance(done, name)
                float_encoder.to(device)
                learned, measured = (on_device(part[name], device) for part in calls)
                exact, size = (
                    text.embeddings(float_encoder, measured),
                    4 * sum(p.numel() for p in float_encoder.parameters()),
                )
                model = text.quantize_text_encoder(float_encoder, self.bits, run.method.weight_observer, learned)
                found[name] = text.embedding_error(text.embeddings(model.network, measured), exact) | {
                    "float_bytes": size
                }
                self.pipeline.store.write(
                    folder / f"{name}.safetensors", lambda path, _model=model: serialization.save(_model, path)
                )
                float_encoder.to("meta")  # its memory is the next one's
        self.pipeline.store.write_json(folder / ERRORS, found)

    def files(self) -> dict[str, Path]:
        """The artefacts by the encoders' names."""
        folder = self.result()
        return {name: folder / f"{name}.safetensors" for name in self.read_json(ERRORS)}

    def record(self) -> dict[str, dict[str, Any]]:
        """Bits, bytes, relative error and cosine of every encoder."""
        files, errors = self.files(), self.read_json(ERRORS)
        return {name: {"bits": self.bits.name, "bytes": files[name].stat().st_size, **errors[name]} for name in files}


def on_device(calls: Sequence[text.Call], device: torch.device) -> list[text.Call]:
    """Calls with their tensors on a device."""
    return [pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, call) for call in calls]


@dataclass(eq=False)
class QuantizedComponents:
    """Components that take the place of float ones when the quantized network is sampled; none where all stay float.

    Raises:
        ValueError: bits for a first stage or text encoders that the model does not have, or whose decoder is not known.
    """

    run: Run
    first_stage: QuantizeFirstStage | None
    text_encoders: QuantizeTextEncoders | None

    def __post_init__(self) -> None:
        if self.first_stage:
            Decoder(autoencoder_of(self.run.denoiser.first_stage))
        if self.text_encoders and not encoder_names(self.run.denoiser):
            raise ValueError(
                f"{self.run.denoiser.name} has no text encoder that could be quantized: text_encoder=float"
            )

    @property
    def stages(self) -> dict[str, QuantizeFirstStage | QuantizeTextEncoders]:
        """Stages that make them, by the name of their bits in the configuration."""
        found: dict[str, Any] = {"first_stage": self.first_stage, "text_encoder": self.text_encoders}
        return {name: stage for name, stage in found.items() if stage}

    @property
    def inputs(self) -> dict[str, str]:
        """Their identity, as a part of keys."""
        return {name: stage.key for name, stage in self.stages.items()}

    def record(self) -> dict[str, Any]:
        """Bits, bytes and errors of each."""
        records = {"first_stage": self.first_stage, "text_encoders": self.text_encoders}
        return {name: stage.record() for name, stage in records.items() if stage}

    @cached_property
    def denoiser(self) -> Denoiser:
        """The float denoiser with the quantized components, loaded from their artefacts."""
        decoder = self.first_stage.result() / ARTEFACT if self.first_stage else None
        return with_components(self.run.denoiser, decoder, self.text_encoders.files() if self.text_encoders else {})
