"""Records of a run's scores, of which tables are made: a row each for the float, the simulated and the deployed network."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from tfmq_exp.cli.finished_jobs import INSIDE
from tfmq_exp.pipeline.experiment import Evaluation, Experiment
from tfmq_exp.pipeline.run_config import Run
from tfmq_exp.pipeline.stages.export_engine import FLOAT, ExportEngine
from tfmq_exp.pipeline.store import canonical, key_of
from tfmq_exp.reconstruction.context import peak_memory_mib
from tfmq_exp.report.records import ScoreRecord

PROTOCOL = "protocol."


def score_records(
    experiment: Experiment,
    cfg: DictConfig,
    overrides: Sequence[str],
    covered: Mapping[str, Any],
    environment: Mapping[str, Any],
    began: float,
) -> list[ScoreRecord]:
    """Rows of the float network, the simulation, and the engine if there is one.

    Args:
        experiment: whose images are scored.
        cfg: resolved configuration.
        overrides: of the command line.
        covered: shares of the network that are quantized, `surgery.coverage`.
        environment: machine and versions.
        began: `time.perf_counter()` at the start of the run.
    """
    run, activations = experiment.run, experiment.activations
    float_scores, scores = experiment.float_scores.scores(), experiment.simulated.scores.scores()
    shared: dict[str, Any] = {
        "model": cfg.model.name,
        "seed": cfg.seed,
        "protocol": protocol(run),
        "evaluator": experiment.reference.evaluator_record(),
        "environment": dict(environment),
    }
    quantized = {key: value for key, value in covered.items() if key not in ("float_weights", "float_inputs")}
    quantized["outside_timesteps"] = run.resolved.outside_timesteps
    quantized |= (components := experiment.components.record())
    if experiment.examples:  # rows of the same settings that were trained on other images are no repetitions
        quantized["trained_on"] = experiment.examples.key[:8]
    original = {"quant": "fp32", "method": "float", "scores": float_scores, "weights_bytes": run.float_bytes}
    simulated = ScoreRecord(
        quant=cfg.quant.name,
        method=cfg.method.name,
        scores=scores,
        weights_bytes=activations.artefact.stat().st_size,
        choices=changes(overrides, INSIDE)
        | {key: value for key, value in changes(overrides, "experiment=").items() if "as_released/" in value}
        | {name: stage.bits.name for name, stage in experiment.components.stages.items()},
        settings=settings(cfg, overrides),
        errors=mean_errors(experiment.simulated) | component_errors(components),
        quantized=quantized,
        cost=cost_of(experiment, began),
        keys={name: record["key"] for name, record in experiment.pipeline.stage_log.items()},
        **shared,
    )
    records = [ScoreRecord(**original, cost={"size_ratio": 1.0}, **shared), simulated]
    if experiment.export and experiment.deployed:
        records.append(deployed_record(simulated, experiment.export, experiment.deployed, overrides))
    return records


def deployed_record(
    simulated: ScoreRecord, export: ExportEngine, deployed: Evaluation, overrides: Sequence[str]
) -> ScoreRecord:
    """Row of the network that an engine executes, from that of its simulation."""
    executed, size, engine = [row["executed"] for row in export.layers()], export.executed_bytes, export.engine
    kernels = {
        "layers_executed": sum(kernel != FLOAT for kernel in executed) / len(executed),
        "executed_in": sorted(set(executed) - {FLOAT}),
        "engine": dict(engine.identity),
    }
    stages = {stage.stored_as: stage for stage in deployed}
    return replace(
        simulated,
        scores=deployed.scores.scores(),
        errors=mean_errors(deployed),
        choices={**simulated.choices, **engine_choices(engine.name, overrides)},
        weights_bytes=size,
        quantized={**simulated.quantized, **kernels},
        cost={**simulated.cost, "size_ratio": size / export.run.float_bytes},
        keys={**simulated.keys, **{name: stage.key for name, stage in stages.items()}},
    )


def protocol(run: Run) -> dict[str, Any]:
    """Protocol that comparable rows share: network, sampler, images, rounding to bytes, calibration."""
    return {
        "network": canonical({**run.network_inputs, "schedule": dict(run.denoiser.schedule)}),
        "sampler": canonical(run.sampling.sampler),
        "conditioning": canonical(run.sampling.conditioning),
        **({"captions": dict(run.captions)} if run.captions else {}),
        "guidance": run.sampling.guidance,
        "precision": run.sampling.precision,
        "network_calls": len(run.calls),
        "images": run.images.count,
        "uint8_rule": f"{run.images.uint8}((x + 1) * 127.5)",
        "calibration_images": run.calibration.images,
        **({"calibration_calls": len(run.calibration_calls)} if run.calibration.num_inference_steps else {}),
    }


def cost_of(experiment: Experiment, began: float) -> dict[str, Any]:
    """Samples, iterations, seconds, bytes. `quantization_seconds` are of making the stages, by this run or another one."""
    run = experiment.run
    given = run.calibration.images, len(run.calibration_calls)
    halves = 2 if run.sampling.guided and not experiment.examples else 1  # training images are not guided
    budgets = {name: getattr(run.method, name).budget(*given) for name in ("weights", "activations")}
    network = (experiment.weights, experiment.activations, experiment.correction, *experiment.component_stages())
    seconds = [stage.entry.seconds for stage in (*experiment.data("activations"), *filter(None, network))]
    return {
        **{f"{name[:-1]}_samples": budget.samples * halves for name, budget in budgets.items()},
        **{f"{name[:-1]}_iterations": budget.iterations for name, budget in budgets.items()},
        **({"training_images": len(run.training_images)} if experiment.examples else {}),
        "size_ratio": experiment.activations.artefact.stat().st_size / run.float_bytes,
        "quantization_seconds": None if None in seconds else round(sum(filter(None, seconds)), 1),
        "seconds": round(time.perf_counter() - began, 1),
        "stages": experiment.pipeline.stage_log,
        "peak_mib": peak_memory_mib(),
    }


def mean_errors(evaluation: Evaluation) -> dict[str, float]:
    """The two error curves as the numbers of a row, and the distance of the images from the float network's."""
    errors, compared = evaluation.errors.errors(), evaluation.comparison.summary()
    columns = [("temporal", f"temporal_{name}", name) for name in ("cosine", "mse", "relative_mse")]
    columns.append(("trajectory", "step", "eps_error"))
    averages = {title: float(np.mean([row[name] for row in errors[curve]])) for curve, title, name in columns}
    return {**averages, "trajectory": errors["trajectory"][-1]["x_error"], **image_errors(compared)}


def image_errors(compared: Mapping[str, Any]) -> dict[str, float]:
    """Distances from the float images: PSNR over all images, the other ones as means, the Fréchet distance as `float_fid`."""
    means = {name: summary["mean"] for name, summary in compared["images"].items() if name != "psnr"}
    whole = {"psnr": compared["psnr"], "float_fid": compared.get("fid")}
    return {**{name: value for name, value in whole.items() if value is not None}, **means}


def component_errors(components: Mapping[str, Any]) -> dict[str, float]:
    """Errors of quantized components as the numbers of a row: of several text encoders those of the worst."""
    psnr, encoders = components.get("first_stage", {}).get("psnr"), components.get("text_encoders", {}).values()
    worst = {
        "text_error": max((row["relative_error"] for row in encoders), default=None),
        "text_cosine": min((row["cosine"] for row in encoders), default=None),
    }
    return {name: value for name, value in {"decoder_psnr": psnr, **worst}.items() if value is not None}


def changes(overrides: Sequence[str], keys: str | tuple[str, ...]) -> dict[str, str]:
    """Values of the command line for keys that begin like these."""
    return dict(text.split("=", 1) for text in overrides if "=" in text and text.startswith(keys))


def engine_choices(name: str, overrides: Sequence[str]) -> dict[str, str]:
    """The engine and changes of the command line in it, but for its threads, which change no number."""
    given = changes(overrides, "engine.")
    given.pop("engine.threads", None)
    return {"engine": name, **given}


def settings(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Identity of the method's settings, whatever the seed; see `ScoreRecord`."""
    plain: Any = OmegaConf.to_container(OmegaConf.merge(cfg, {"seed": 0}), resolve=True)
    components = {name: plain[name] for name in ("first_stage", "text_encoder") if plain[name]}
    digest = key_of("settings", {"method": plain["method"], "quant": plain["quant"], **components})
    named = [text for text in overrides if text.startswith(("experiment=", PROTOCOL))]
    return {"hash": digest[:8], "named": ", ".join(sorted(text.removeprefix(PROTOCOL) for text in named))}
