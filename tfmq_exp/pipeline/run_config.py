"""One experiment: what is quantized, how, and what is measured. Configuration and what follows from it; nothing is stored."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationPlan
from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, Checked, Kind, one_of, sequence_of
from tfmq_exp.data.image_dataset import ImageDataset
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.loading.condition_encoders import TextEncoder
from tfmq_exp.denoisers.loading.meta_network import move_loaded
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, NetworkStructure
from tfmq_exp.denoisers.temporal import measured_temporal_layers
from tfmq_exp.evaluation.image_comparison import ImageComparison
from tfmq_exp.evaluation.scores import Evaluator
from tfmq_exp.methods.first_stage import FirstStageBits
from tfmq_exp.methods.method import Method
from tfmq_exp.methods.temporal_features import FeatureInputs
from tfmq_exp.methods.text_encoder import TextEncoderBits
from tfmq_exp.quant.timestep_context import Timestep
from tfmq_exp.reconstruction.context import ComputeConfig
from tfmq_exp.sampling.conditioning import Classes
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan
from tfmq_exp.surgery.attention import attention_modules
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import ResolvedConfig, resolve

log = logging.getLogger(__name__)


WORDS = sequence_of(Kind("a word", lambda value: isinstance(value, str) and 0 < len(value.strip()) == len(value)))


@dataclass(frozen=True)
class DiagnosisPlan(Checked):
    """Size of a diagnosis."""

    # of calibration, spread over the sampling steps, on which every unit's sensitivity is measured
    samples: Annotated[int, COUNT]
    trajectories: Annotated[int, COUNT]  # whose activations and errors are followed
    sensitivity: Literal["alone", "others"]  # quantize each unit alone, or all the others and leave it float
    words: Annotated[Sequence[str], WORDS] = ()  # of captions, whose cross-attention is compared


FLOORS = ("batch", "bfloat16", "threads")


@dataclass(frozen=True)
class FloorPlan(Checked):
    """Float images made once more, otherwise in one respect each: their distances from the first are no quantization error."""

    floor: Annotated[Sequence[str], sequence_of(one_of(*FLOORS))]
    floor_images: Annotated[int, COUNT]  # of the run's images, the first ones


@dataclass(frozen=True, eq=False)
class Run:
    """Configuration of one experiment."""

    denoiser: Denoiser  # the float network with its noise schedule, condition encoder and first stage
    sampling: Sampling  # sampler, guidance and conditions
    method: Method  # of quantization
    images: ImagePlan  # number, seed and batch size of the images that are scored
    calibration: CalibrationPlan
    diagnostics: int  # trajectories on which the quantized network is compared with the float one
    diagnosis: DiagnosisPlan
    compute: ComputeConfig  # batch size, cache, trainer and processes
    seed: int  # of all random numbers but those of the images
    floor: FloorPlan
    make_comparison: Callable[[], ImageComparison]  # loads networks of perceptual distances, when images are compared
    make_evaluator: Callable[[], Evaluator]  # loads feature extractor and reference, when scores are needed
    make_training_images: Callable[[], ImageDataset]  # opens those of quantization-aware training, when they are needed
    first_stage: FirstStageBits | None = None  # of the first stage's decoder; None: float
    text_encoder: TextEncoderBits | None = None  # of all text encoders; None: float

    @cached_property
    def evaluator(self) -> Evaluator:
        """Feature extractor, reference and metrics."""
        return self.make_evaluator()

    @cached_property
    def comparison(self) -> ImageComparison:
        """Distances from the float model's images."""
        return self.make_comparison()

    @cached_property
    def training_images(self) -> ImageDataset:
        """Images of quantization-aware training."""
        return self.make_training_images()

    @cached_property
    def structure(self) -> NetworkStructure:
        """Blocks and layers of the network; those that depend on t alone are confirmed by measurement."""
        return measured_structure(self.denoiser, self.calls[-1])

    @cached_property
    def temporal_conditions(self) -> Mapping[str, Tensor]:
        """Conditions of the first images, of which temporal features are compared; empty where these depend on t alone."""
        names = family_of(self.denoiser.network).conditions_of(self.denoiser.encoder.example().given)
        if not names:  # texts need not be encoded
            return {}
        images = range(min(self.diagnostics, self.images.count))
        found = self.sampling.conditions(self.denoiser, self.images.seed, Stream.IMAGES, images)
        parts = (found.given, found.null) if self.sampling.guided else (found.given,)
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    @cached_property
    def sampled_choices(self) -> tuple[Any, ...]:
        """Classes, all of them, or the different captions, of images and calibration; none where features depend on t alone."""
        names = family_of(self.denoiser.network).conditions_of(self.denoiser.encoder.example().given)
        conditioning = self.sampling.conditioning
        if not names or isinstance(conditioning, Classes):
            return tuple(range(conditioning.count)) if names and isinstance(conditioning, Classes) else ()
        images = conditioning.choose(self.images.seed, Stream.IMAGES, range(self.images.count))
        learned = conditioning.choose(self.seed, Stream.CALIBRATION, range(self.calibration.images))
        return tuple(dict.fromkeys([*images, *learned]))

    @property
    def feature_inputs(self) -> FeatureInputs:
        """Every condition of the run for temporal features, that of none among them, and its sampler's timesteps."""
        encoder, guided = self.denoiser.encoder, self.sampling.guided
        found = (
            encoder(list(self.sampled_choices)).to(self.denoiser.device) if self.sampled_choices else encoder.example()
        )
        names = family_of(self.denoiser.network).conditions_of(found.given)
        parts = (found.given, found.null) if guided and found.null else (found.given,)
        conditions = {name: torch.cat([part[name] for part in parts]) for name in names}
        sampling = self.calibration_sampling
        return FeatureInputs(conditions, lambda steps: sampling.with_steps(steps).calls(self.denoiser))

    @cached_property
    def calls(self) -> tuple[Timestep, ...]:
        """Timesteps of the network calls for one image."""
        calls = self.sampling.calls(self.denoiser)
        numbers = len(calls), len(set(calls)), calls[0], calls[-1]
        log.info("%s: %d network calls at %d timesteps, %s .. %s", self.sampling.sampler, *numbers)
        return calls

    @cached_property
    def calibration_sampling(self) -> Sampling:
        """Sampling of the calibration trajectories, whose timesteps are the finite set."""
        steps = self.calibration.num_inference_steps
        return self.sampling if steps is None else self.sampling.with_steps(steps)

    @cached_property
    def calibration_calls(self) -> tuple[Timestep, ...]:
        """Timesteps of the network calls for one calibration trajectory."""
        return self.calibration_sampling.calls(self.denoiser)

    @cached_property
    def resolved(self) -> ResolvedConfig:
        """Quantizers of every layer."""
        names, timesteps = (
            tuple(attention_modules(self.denoiser.network)),
            self.calibration_sampling.finite_set(self.denoiser),
        )
        return resolve(self.method.surgery, self.structure, names, self.method.scales, timesteps)

    def quantized_network(self, resolved: ResolvedConfig | None = None) -> QuantizedNetwork:
        """A quantized copy of the network, nothing calibrated yet."""
        plan, observer = resolved or self.resolved, self.method.weight_observer
        model = build_quantized_network(self.denoiser.network, plan, observer)
        move_loaded(model, self.denoiser.device)
        return model

    @property
    def float_bytes(self) -> int:
        """Size of the float network in float32."""
        return 4 * sum(p.numel() for p in self.denoiser.network.parameters())

    @property
    def follows_trajectories(self) -> bool:
        """Whether the method learns or observes anything on trajectories of the float model."""
        observed = self.method.activations.budget(self.calibration.images, len(self.calibration_calls)).samples
        return not self.method.weights.trains or bool(observed)

    @cached_property
    def captions(self) -> Mapping[str, int]:
        """`TextEncoder.count_cut` over all captions of the run and of its calibration; empty without a text encoder."""
        encoder, choose = self.denoiser.encoder, self.sampling.conditioning.choose
        if not isinstance(encoder, TextEncoder):
            return {}
        images = choose(self.images.seed, Stream.IMAGES, range(self.images.count))
        return encoder.count_cut([*images, *choose(self.seed, Stream.CALIBRATION, range(self.calibration.images))])

    def made_otherwise(self, kind: str) -> "Run":
        """The first images by another batch size or precision, or as they are with other threads."""
        batch = max(1, self.images.batch // 2) if self.images.batch > 1 else 2
        precision = "float32" if self.sampling.precision == "bfloat16" else "bfloat16"
        count = min(self.floor.floor_images, self.images.count)
        return replace(
            self,
            images=replace(self.images, count=count, batch=batch if kind == "batch" else self.images.batch),
            sampling=replace(self.sampling, precision=precision) if kind == "bfloat16" else self.sampling,
        )

    # parts of the stages' keys

    @property
    def network_inputs(self) -> dict[str, Any]:
        """Identity of the float network."""
        return {"weights_sha256": self.denoiser.weights_sha256, "settings": dict(self.denoiser.settings)}

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        """Identity of the float model and its sampling."""
        schedule = dict(self.denoiser.schedule)
        return {"model": self.denoiser.name, **self.network_inputs, "schedule": schedule, "sampling": self.sampling}

    @cached_property
    def layer_inputs(self) -> dict[str, Any]:
        """Quantizers of all layers, whatever the sampler's timesteps."""
        return {"layers": replace(self.resolved, timesteps=())}

    @property
    def weight_inputs(self) -> dict[str, Any]:
        """Inputs of the weights' stage: the quantized weights with their specs, and the settings that learn them."""
        layers = {name: (layer.weight, layer.split) for name, layer in self.resolved.layers.items() if layer.weight}
        method = {"range": self.method.weight_observer, "weights": self.method.weights, "qat": self.resolved.trained}
        return {**self.network_inputs, "specs": layers, **method}


def measured_structure(denoiser: Denoiser, t: Timestep) -> NetworkStructure:
    """The network's structure, its temporal layers compared with those that react to a change of the timestep `t`.

    Raises:
        ValueError: a layer depends on t otherwise than its role says.
    """
    example, family = denoiser.example(t), family_of(denoiser.network)
    other = t + 1 if t + 1 < int(denoiser.schedule["num_train_timesteps"]) else t - 1
    with denoiser.loading():
        structure = read_structure(denoiser.network, example)
        measured = measured_temporal_layers(denoiser.network, example, t, other, family.conditions)
    temporal = {layer.name for layer in structure.by_role(*TEMPORAL_ROLES)}
    if wrong := sorted(measured.symmetric_difference(temporal)):
        raise ValueError(
            f"by measurement {len(wrong)} layers of the network depend on t otherwise than their roles say, first {wrong[0]}: "
            "are its weights, or those before it, zeros?"
        )
    return structure
