"""From the float network to the finished method: weights, activations, correction, pulled through the store.

Each method here says in its first lines what the stage depends on; that is its key.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tfmq_exp.core.files import write_checked
from tfmq_exp.core.finite import naming_rates
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.methods.noise_correction import NoiseStatistics
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.pipeline.training_stages import TrainingStages
from tfmq_exp.pipeline.unit_checkpoints import FileUnitCheckpointer, LoggingCallback, load_learned, noted, save_learned
from tfmq_exp.reconstruction.callbacks import UnitResult
from tfmq_exp.reconstruction.loop import ReconstructionContext
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.sampler import Predict
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

log = logging.getLogger(__name__)


class NetworkStages(TrainingStages):
    """The stages that make a quantized network."""

    # weights -----------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Entry:
        """Integer weights: depend on data only where the method learns, on activations only where it learns both."""
        method, lines = self.method, self.plan.sites.items()
        inputs: dict[str, Any] = {
            **self.network_inputs,
            "specs": {name: line.weight for name, line in lines if line.weight},
            "splits": {name: line.split for name, line in lines if line.weight and line.split},
            "range": method.weight_observer,
            "weights": method.weights,
        }
        if self.plan.trained is not None:
            inputs["form"] = self.plan.trained
        if self.trains_on_images:
            inputs |= self.training_inputs
        elif method.weights.learns:
            inputs |= {"trajectory": self.trajectory.key, "seed": self.seed}
        if "activations" in method.weights.learns:
            inputs |= self.activation_inputs
        return self.store.entry("weights", inputs)

    def weighted_model(self) -> QuantizedUNet:
        """The model with integer weights; activations are still float, or learned already if that was done jointly."""
        if self.trains_on_images:
            return self.trained_model(self.weights)
        model = build_quantized_unet(self.denoiser.unet, self.plan, self.method.weight_observer)

        def compute(folder: Path) -> None:
            keeper = self.learn("weights", self.method.weights, model, self.seed, folder)
            state = model.activation_state() if "activations" in self.method.weights.learns else {}
            if self.processes.is_main:
                save_learned(folder / "weights.safetensors", UnitResult(model.integers, state), {})
                keeper.write_notes(folder)

        learned, _ = load_learned(self.pull("weights", self.weights, compute) / "weights.safetensors")
        frozen = model.integers
        for site, weight in learned.integers.items():
            if site not in frozen:
                model.freeze(site, weight)
        model.load_activations(learned.activations)
        return model

    def learn(
        self, name: str, phase: Callable[..., None], model: QuantizedUNet, seed: int, folder: Path
    ) -> FileUnitCheckpointer:
        """Run a method's phase under a progress bar, with every finished unit kept in the folder."""
        data = self.calibration_set() if self.follows_trajectories else self.no_trajectories()
        with self.bars.stage(name, 1) as advance:
            watcher = LoggingCallback(advance, self.mirror, name)
            keeper = FileUnitCheckpointer(folder / "units", watcher.curves, self.store.write)
            task = ReconstructionContext(
                model, self.denoiser.unet, self.structure, data, self.means, seed, keeper, watcher
            )
            with naming_rates(f"method.{name}"):
                phase(task)
        self.shown_losses |= watcher.shown
        return keeper

    def noted(self, name: str) -> list[dict[str, Any]]:
        """What learning noted: `units.json`, its effect unit by unit; `losses.json`, thinned curves. Empty without learning."""
        return noted((self.weights, self.activations), name)

    # activations -------------------------------------------------------------------------------------------------

    @property
    def activation_inputs(self) -> dict[str, Any]:
        """Where activations are quantized and how."""
        return {
            "inputs": {name: line.input for name, line in self.plan.sites.items()},
            "outputs": {name: line.output for name, line in self.plan.sites.items()},
            "splits": {name: line.split for name, line in self.plan.sites.items()},
            "operands": self.plan.operands,
            "tied": self.plan.tied,
        }

    @cached_property
    def activations(self) -> Entry:
        """The finished quantized model: depends on weights, data, and everything about activations."""
        inputs = {
            "weights": self.weights.key,
            "trajectory": self.trajectory.key,
            **self.activation_inputs,
            "activations": self.method.activations,
            "temporal": self.method.temporal,
            "seed": self.seed,
        }
        return self.store.entry("activations", inputs)

    @cached_property
    def quantized_model(self) -> QuantizedUNet:
        """The finished model, loaded from its artefact."""

        def compute(folder: Path) -> None:
            model = self.weighted_model()
            keeper = self.learn(
                "activations", self.method.activations, model, derive_seed(self.seed, "activations"), folder
            )
            self.method.temporal(model, self.denoiser.unet, self.structure)
            model.tabulate_scales()
            if self.processes.is_main:
                recipe = Recipe.of(self.sampling, self.denoiser)
                write_checked(folder / "quantized.safetensors", lambda path: serialization.save(model, path, recipe))
                keeper.write_notes(folder)

        path = self.pull("activations", self.activations, compute) / "quantized.safetensors"
        return serialization.load(path).to(next(self.denoiser.unet.parameters()).device)

    def have_origins(self, goal: str) -> None:
        """Have what a network that was found is made of: weights, and the data behind them. What was deleted is made again."""
        self.have("weights", self.weights, self.weighted_model)
        for name, entry, pull in self.data(goal):
            self.have(name, entry, pull)

    def data(self, goal: str) -> list[tuple[str, Entry, Callable[[], object]]]:
        """What weights, or a network with activations, are found from: trajectories, training images, or both."""
        found: list[tuple[str, Entry, Callable[[], object]]] = []
        if self.follows_trajectories and not (goal == "weights" and self.trains_on_images):
            found.append(("trajectory", self.trajectory, self.calibration_set))
        if self.trains_on_images:
            found.append(("examples", self.examples, self.example_set))
        return found

    # correction --------------------------------------------------------------------------------------------------

    @cached_property
    def correction(self) -> Entry | None:
        """Statistics of the quantization noise, for methods that correct it."""
        if not self.method.correction.measures:
            return None
        inputs = {
            **self.model_inputs,
            "activations": self.activations.key,
            "correction": self.method.correction,
            "seed": self.seed,
        }
        return self.store.entry("correction", inputs)

    @cached_property
    def statistics(self) -> NoiseStatistics | None:
        """The same, measured if the store has none."""
        correction: Any = self.method.correction
        if self.correction is None:
            return None

        def compute(folder: Path) -> None:
            batch = self.batch
            with self.bars.stage("correction", -(-correction.images // batch) * len(self.calls)) as advance:
                statistics = correction.measure(
                    self.quantized_model,
                    self.denoiser,
                    self.sampling,
                    seed=self.seed,
                    batch=batch,
                    each_step=lambda done: advance(done, ""),
                )
            self.store.write(folder / "statistics.safetensors", lambda path: save_file(statistics.tensors(), path))

        return NoiseStatistics.of(
            load_file(self.pull("correction", self.correction, compute) / "statistics.safetensors")
        )

    @cached_property
    def corrected(self) -> tuple[Predict, Sampling]:
        """What the finished method samples with: the quantized network's prediction and the sampling, both corrected."""
        model, statistics = self.quantized_model, self.statistics
        if statistics is not None and statistics.bits:
            model.use_bits(statistics.bits)
        elif widths := model.activation_bits():
            log.warning("nothing chooses between %s activation bits: %d at every step", widths, widths[-1])
        correction: Any = self.method.correction
        return correction(self.sampling.predictor(model.for_timesteps(self.calls)), self.sampling, statistics)

    @property
    def finished(self) -> Entry:
        """The last entry that says what is sampled with."""
        return self.correction or self.activations
