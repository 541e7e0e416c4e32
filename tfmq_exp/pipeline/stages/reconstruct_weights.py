"""Integer weights by post-training quantization: rounded to nearest, or reconstructed unit by unit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.methods.weights import Reconstruct, RoundToNearest
from tfmq_exp.pipeline.learning import learning
from tfmq_exp.pipeline.pipeline import Pipeline, Stage
from tfmq_exp.pipeline.run import Run
from tfmq_exp.pipeline.stages.collect_trajectory import CollectTrajectory
from tfmq_exp.pipeline.unit_checkpoints import load_result, save_result
from tfmq_exp.reconstruction.callbacks import UnitResult
from tfmq_exp.reconstruction.loop import ReconstructionContext
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

FILE = "weights.safetensors"


class ReconstructWeights(Stage):
    """Weights turned into integers; depends on data only where the method learns, on activations only where it learns both."""

    name = stored_as = "weights"

    def __init__(
        self, run: Run, pipeline: Pipeline, method: RoundToNearest | Reconstruct, trajectory: CollectTrajectory
    ) -> None:
        super().__init__(run, pipeline)
        self.method, self.trajectory = method, trajectory
        self.joint = "activations" in method.learns

    @property
    def inputs(self) -> Mapping[str, Any]:
        data = {"trajectory": self.trajectory.key, "seed": self.run.seed} if self.method.learns else {}
        return {**self.run.weight_inputs, **data, **(self.run.activation_inputs if self.joint else {})}

    def compute(self, folder: Path) -> None:
        run, model, data = self.run, self.run.quantized_unet(), self.trajectory.samples_if_needed()
        with learning(self.pipeline, self.name, folder) as callbacks:
            network = model, run.denoiser.unet, run.structure
            self.method(ReconstructionContext(*network, data, run.compute, run.seed, *callbacks))
        if self.pipeline.group.is_main:
            state = model.activation_state() if self.joint else {}
            save_result(folder / FILE, UnitResult(model.integers, state), {})

    def model(self) -> QuantizedUNet:
        """The network with integer weights; its activations are still float, or learned if that was done jointly."""
        result, _ = load_result(self.result() / FILE)
        model = self.run.quantized_unet()
        for layer, weight in result.integers.items():
            model.freeze(layer, weight)
        model.load_activations(result.activations)
        return model
