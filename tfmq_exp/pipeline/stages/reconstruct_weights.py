"""Integer weights by post-training quantization: rounded to nearest, or reconstructed unit by unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.pipeline.learning import learning
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.pipeline.unit_checkpoints import load_result, save_result
from tfmq_exp.reconstruction.context import ReconstructionContext, UnitResult
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

FILE = "weights.safetensors"


@dataclass(eq=False)
class ReconstructWeights(Stage):
    """Weights turned into integers; depends on data only where the method learns, on activations only where it learns both."""

    method: RoundToNearest | Reconstruct
    trajectory: CollectTrajectory
    stored_as = "weights"

    @property
    def joint(self) -> bool:
        """Whether activation scales are learned together with the weights."""
        return "activations" in self.method.learns

    def inputs(self) -> Mapping[str, Any]:
        data = {"trajectory": self.trajectory.key, "seed": self.run.seed} if self.method.learns else {}
        return {**self.run.weight_inputs, **data, **(self.run.layer_inputs if self.joint else {})}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.run.quantized_unet(), self.trajectory.samples_if_needed()
        with learning(self.pipeline, self.name, folder) as callbacks:
            network = model, run.denoiser.unet, run.structure
            self.method(ReconstructionContext(*network, data, run.compute, run.seed, *callbacks))
        if self.pipeline.group.is_main:
            state = model.activation_state() if self.joint else {}
            save_result(folder / FILE, UnitResult(model.integers, state), {})

    def count(self) -> int:
        return len(list(self.entry.path.glob("units/*.safetensors")))

    def model(self) -> QuantizedUNet:
        """The network with integer weights; its activations are still float, or learned if that was done jointly."""
        result, _ = load_result(self.result() / FILE)
        model = self.run.quantized_unet()
        for layer, weight in result.integers.items():
            model.freeze(layer, weight)
        model.load_activations(result.activations)
        return model
