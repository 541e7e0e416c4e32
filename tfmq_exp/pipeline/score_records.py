"""What a run found, as the records that tables are made of."""

import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.cli.job_identity import INSIDE
from tfmq_exp.pipeline.stages import Stages
from tfmq_exp.pipeline.store import describe, key_of
from tfmq_exp.report.records import ScoreRecord

LEARNING = "model.protocol."


def protocol(stages: Stages) -> dict[str, Any]:
    """What makes rows comparable: the float network, sampler, images, the rule that makes them bytes, calibration."""
    return {
        "network": describe({**stages.network_inputs, "schedule": dict(stages.denoiser.schedule)}),
        "sampler": describe(stages.sampling.sampler),
        "conditioning": describe(stages.sampling.conditioning),
        **({"captions": dict(stages.captions)} if stages.captions else {}),
        "guidance": stages.sampling.guidance,
        "precision": stages.sampling.precision,
        "network_calls": len(stages.calls),
        "images": stages.images.count,
        "uint8_rule": f"{stages.images.uint8}((x + 1) * 127.5)",
        "calibration_images": stages.calibration.images,
    }


def effort(stages: Stages) -> dict[str, int]:
    """Calibration samples that weights and activations saw, and iterations of learning per unit."""
    method, given = stages.method, (stages.calibration.images, len(stages.calls))
    halves = 2 if stages.sampling.guided else 1
    weights, activations = method.weights.effort(*given), method.activations.effort(*given)
    return {
        "weight_samples": weights.samples * halves,
        "weight_iterations": weights.iterations,
        "activation_samples": activations.samples * halves,
        "activation_iterations": activations.iterations,
    }


def quantization_seconds(stages: Stages) -> float | None:
    """What data, weights, activations and correction took when they were made, by this run or by another that shares them."""
    data = [entry for _, entry, _ in stages.data("activations")]
    entries = (*data, stages.weights, stages.activations, stages.correction)
    took = [entry.took for entry in entries if entry is not None]
    return None if None in took else round(sum(filter(None, took)), 1)


def score_records(
    stages: Stages,
    cfg: DictConfig,
    covered: Mapping[str, Any],
    errors: Mapping[str, list[dict[str, Any]]],
    environment: Mapping[str, Any],
    began: float,
) -> list[ScoreRecord]:
    """The float row and this run's row."""
    float_scores, evaluator = stages.scores(quantized=False)
    scores, _ = stages.scores(quantized=True)
    shared: dict[str, Any] = {
        "model": cfg.model.name,
        "seed": cfg.seed,
        "protocol": protocol(stages),
        "evaluator": evaluator,
        "environment": dict(environment),
    }
    size = stages.artefact.stat().st_size
    cost = {
        **effort(stages),
        **({"training_images": len(stages.training_images)} if stages.trains_on_images else {}),
        "size_ratio": size / stages.float_bytes,
        "quantization_seconds": quantization_seconds(stages),
        "seconds": round(time.perf_counter() - began, 1),
        "stages": stages.hits,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    quantized = {key: value for key, value in covered.items() if key not in ("float_weights", "float_inputs")}
    if (
        stages.method.weights.data == "images"
    ):  # settings of one name, trained on other images, are no seeds of each other
        quantized["trained_on"] = stages.examples.key[:8]
    return [
        ScoreRecord(
            quant="fp32",
            method="float",
            scores=float_scores,
            weights_bytes=stages.float_bytes,
            cost={"size_ratio": 1.0},
            **shared,
        ),
        ScoreRecord(
            quant=cfg.quant.name,
            method=cfg.method.name,
            scores=scores,
            weights_bytes=size,
            choices=method_choices(),
            settings=settings(cfg),
            errors=mean_errors(errors),
            quantized=quantized,
            cost=cost,
            keys={name: hit["key"] for name, hit in stages.hits.items()},
            **shared,
        ),
    ]


def mean_errors(errors: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The two error curves as the numbers of a row."""
    return {
        "temporal_cosine": _mean(errors["temporal"], "cosine"),
        "temporal_mse": _mean(errors["temporal"], "mse"),
        "temporal_relative_mse": _mean(errors["temporal"], "relative_mse"),
        "step": _mean(errors["trajectory"], "eps_error"),
        "trajectory": errors["trajectory"][-1]["x_error"],
    }


def method_choices() -> dict[str, str]:
    """What the command line changed inside the method, a release's own choices included."""
    overrides = dict(text.split("=", 1) for text in HydraConfig.get().overrides.task if "=" in text)
    inside = {key: value for key, value in overrides.items() if key.startswith(INSIDE)}
    experiment = overrides.get("experiment", "")
    return inside | ({"experiment": experiment} if "as_released/" in experiment else {})


def settings(cfg: DictConfig) -> dict[str, str]:
    """What decides the method's numbers beside the seed, as `ScoreRecord` has it."""
    plain: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"seed": 0}), resolve=True)
    digest = key_of("settings", {"method": plain["method"], "quant": plain["quant"]})
    named = [text for text in HydraConfig.get().overrides.task if text.startswith(("experiment=", LEARNING))]
    return {"hash": digest[:8], "named": ", ".join(sorted(text.removeprefix(LEARNING) for text in named))}


def _mean(rows: list[dict[str, Any]], column: str) -> float:
    return float(np.mean([row[column] for row in rows]))
