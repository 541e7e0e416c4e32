"""The finished network as files of an inference engine, and sampling with that engine."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.deploy.engine import Engine, read_manifest, write_manifest
from tfmq_exp.pipeline.pipeline import Stage
from tfmq_exp.pipeline.stages.activations import QuantizationResult
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.recipe import Recipe
from tfmq_exp.sampling.trajectory import Predict
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

FLOAT = "float"  # execution of layers that the engine has no integer kernel for


@dataclass(eq=False)
class ExportEngine(Stage):
    """The exported network; depends on the quantized one and on the engine."""

    engine: Engine
    quantized: QuantizationResult
    stored_as = "deployed"

    @property
    def name(self) -> str:
        return self.engine.name

    def inputs(self) -> Mapping[str, Any]:
        return {"network": self.quantized.stage.key, "engine": self.engine.identity}

    @property
    def rows(self) -> int:
        """Rows that go through the network together."""
        return min(self.run.compute.batch, self.run.images.count) * (2 if self.run.sampling.guided else 1)

    def example(self) -> dict[str, Tensor]:
        """Arguments of a forward pass."""
        one = self.run.denoiser.example()
        example = {name: value.cpu().expand(self.rows, *value.shape[1:]).contiguous() for name, value in one.items()}
        return {**example, "timestep": torch.full((self.rows,), self.run.calls[0])}

    @cached_property
    def cpu_model(self) -> QuantizedNetwork:
        """The quantized network on the CPU."""
        model = self.quantized.model
        return model if self.run.denoiser.device.type == "cpu" else copy.deepcopy(model).cpu()

    def compute(self, folder: Path) -> None:
        if self.pipeline.group.is_main:
            self.engine.export(self.cpu_model, self.example(), folder)
            recipe = Recipe.of(self.run.sampling, self.run.denoiser)
            write_manifest(folder, {**read_manifest(folder), "sampling": recipe and recipe.to_json()})

    @cached_property
    def executable(self) -> nn.Module:
        """The network that the engine opens."""
        return self.engine.open(self.cpu_model, self.result(), batch=self.rows)

    def sampler(self) -> tuple[Predict, Sampling]:
        """Prediction by the engine and the sampling, both corrected like those of the quantized network."""
        return self.quantized.corrected(self.run.sampling.predictor(self.executable))

    def layers(self) -> list[dict[str, Any]]:
        """Role and execution of every layer; `float` ones with the reason."""
        layers, rows = self.run.structure.layers, read_manifest(self.result())["layers"]
        return [{"site": (name := row.pop("layer")), "role": layers[name].role.value, **row} for row in rows]

    def attention_products(self) -> list[dict[str, Any]]:
        """Rows of the same table for the products of every attention: in floating point, or in bf16 where that is faster."""
        plain = {"role": "attention products", "executed": FLOAT, "weight_bits": "", "products": 2, "note": ""}
        executed = {row["attention"]: row for row in read_manifest(self.result()).get("attention", [])}
        rows: list[dict[str, Any]] = []
        for name in attentions(self.run.denoiser.network):
            operands = self.run.resolved.operands.get(name, {})
            grids = f"; {', '.join(operands)} on their grids in floating point" if operands else ""
            row = {"site": name, **plain, "why": f"no integer products of activations{grids}"}
            own = executed.get(name, row)
            rows.append(row | {key: own[key] for key in ("executed", "note", "why")})
        return rows

    @property
    def executed_bytes(self) -> int:
        """Size of the engine's own files, or of the artefact where it has none."""
        files = self.result().glob("model.*")
        return sum(path.stat().st_size for path in files) or self.quantized.activations.artefact.stat().st_size
