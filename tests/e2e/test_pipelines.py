"""Whole pipelines of diffusers: sampled as diffusers samples them, quantized, stored, and sampled again from the file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp import api
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.pipelines.load import load_pipeline
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.pipeline_sampler import read_pipeline_guidance, read_pipeline_sampler
from tfmq_exp.sampling.trajectory import trajectory

PIPELINES = Path(__file__).parents[1] / "goldens/transformers/pipelines"
INDEX: dict[str, Any] = json.loads((PIPELINES / "index.json").read_text(encoding="utf-8"))
GENERIC = ("prompt", "class_labels", "output_type", "num_inference_steps")
QUICK = ("dit", "flux")  # the others take as long each
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.every_family) for name in INDEX]


def settings_of(name: str) -> dict[str, Any]:
    """Arguments of the recorded call that are settings."""
    return {key: value for key, value in INDEX[name]["call"].items() if key not in GENERIC}


def choices_of(name: str) -> list[Any]:
    call = INDEX[name]["call"]
    return call.get("prompt") or call["class_labels"]


def first_sample(name: str, recorded: dict[str, Tensor]) -> Tensor:
    """The first x of the images with their conditions, as their network was given it."""
    key = next(
        key for key in recorded if key.startswith("call.0.") and key.split(".")[2] in ("hidden_states", "sample")
    )
    rows, count = recorded[key], len(choices_of(name))
    return rows[:count]  # guidance gives both halves the same


@pytest.mark.parametrize("name", [name for name in INDEX if name != "dit"])  # which records no final latents
def test_latents_are_those_of_diffusers(name: str) -> None:
    settings, steps = settings_of(name), INDEX[name]["call"]["num_inference_steps"]
    recorded, denoiser = (
        load_file(PIPELINES / f"{name}.io.safetensors"),
        load_pipeline(PIPELINES / name, settings=settings),
    )
    sampler = read_pipeline_sampler(PIPELINES / name, steps, settings)
    sampling = Sampling(sampler, guidance=read_pipeline_guidance(PIPELINES / name, settings))
    moves = sampler.start(denoiser.schedule)
    noise = first_sample(name, recorded) / float(moves.input(0, torch.ones(1))) / moves.sigma
    given, generators = denoiser.encoder(choices_of(name)), [torch.Generator().manual_seed(0) for _ in choices_of(name)]
    x = noise
    for step in trajectory(sampling.predictor(denoiser.network), sampler, denoiser.schedule, noise, generators, given):
        x = step.x_next
    final = recorded["final_latents"]
    assert (x.reshape(final.shape) - final).abs().max() <= 2e-5 * final.abs().max()


def overrides_of(name: str, folder: Path) -> list[str]:
    """A run of seconds with the recorded settings of the pipeline's call."""
    texts = folder / "captions.txt"
    texts.write_text("a red cat\nphoto of the sea\n")
    negative = {"negative_prompt": "dog"} if "negative_prompt" in settings_of(name) else {}
    call = [f"+model.call.{key}={json.dumps(value)}" for key, value in (settings_of(name) | negative).items()]
    classes = "++model.sampling.conditioning={_target_: tfmq_exp.sampling.conditioning.Classes, count: 1000}"
    return [
        *(f"path={PIPELINES / name}", *call),
        classes if "class_labels" in INDEX[name]["call"] else f"captions={texts}",
        *("protocol.sampling.num_inference_steps=4", "protocol.calibration.images=4", "runtime.batch_size=4"),
        *("protocol.reconstruction.iterations=20", "protocol.reconstruction.batch_size=4"),
    ]


def quantized(denoiser: Denoiser, method: str, overrides: list[str]) -> api.QuantizedModel:
    return api.quantize(denoiser, method=method, overrides=overrides, progress=False)


@pytest.mark.parametrize("name", EVERY)
def test_it_is_quantized_stored_and_sampled(name: str, tmp_path: Path) -> None:
    overrides = overrides_of(name, tmp_path)
    denoiser = api.load_denoiser("pipeline", *overrides)
    model = quantized(denoiser, "tfmq", overrides)
    model.save(tmp_path / "model.safetensors")
    loaded = api.load_quantized(tmp_path / "model.safetensors")
    given = denoiser.encoder(choices_of(name))
    samples, again = (api.sample(one, range(2), conditions=given) for one in (model, loaded))
    assert torch.equal(samples, again)
    images = denoiser.first_stage.decode(samples)
    assert images.shape[:2] == (2, 3)
    assert float(images.abs().max()) <= 1
    with torch.no_grad():
        exact = api.sample(api.QuantizedModel(denoiser.network, model.recipe), range(2), conditions=given)  # type: ignore[arg-type]
    assert not torch.equal(exact, samples)
    assert (samples - exact).square().mean() < 0.5 * exact.var()


def test_a_table_of_features_that_depend_on_the_prompt_has_those_of_the_run(tmp_path: Path) -> None:
    overrides = overrides_of("flux", tmp_path)
    denoiser = api.load_denoiser("pipeline", *overrides)
    model = quantized(denoiser, "tfmq_cache", [*overrides, "method.temporal.select=always"])
    model.save(tmp_path / "model.safetensors")
    loaded, given = api.load_quantized(tmp_path / "model.safetensors"), denoiser.encoder(choices_of("flux"))
    assert torch.equal(*(api.sample(one, range(2), conditions=given) for one in (model, loaded)))
    with pytest.raises(ValueError, match="for which no temporal features are stored"):
        api.sample(loaded, range(1), conditions=denoiser.encoder(["another text"]))


def test_a_table_replaces_the_temporal_information_block_where_features_depend_on_t_alone(tmp_path: Path) -> None:
    overrides = overrides_of("pixart", tmp_path)
    denoiser = api.load_denoiser("pipeline", *overrides)
    model = quantized(denoiser, "tfmq_cache", [*overrides, "method.temporal.select=always"])
    assert set(model.network.stored_features) == {"adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_2"}
    stored = model.save(tmp_path / "cached.safetensors")
    plain = quantized(denoiser, "tfmq", overrides).save(tmp_path / "plain.safetensors")
    assert stored < plain
    loaded, given = api.load_quantized(tmp_path / "cached.safetensors"), denoiser.encoder(choices_of("pixart"))
    assert torch.equal(*(api.sample(one, range(2), conditions=given) for one in (model, loaded)))


@pytest.mark.parametrize("further", [{}, {"cfg_normalization": False}], ids=str)
def test_guidance_is_that_of_the_call_where_none_is_given(further: dict[str, Any]) -> None:
    """Lumina 2 predicts the negative, and normalises the guided prediction; its call's default is 4."""
    settings = {key: value for key, value in settings_of("lumina2").items() if key != "guidance_scale"}
    assert read_pipeline_guidance(PIPELINES / "lumina2", settings | further) == pytest.approx(4.0, abs=1e-4)


@pytest.mark.bad_input
def test_conditions_that_are_missing_or_of_another_call_are_refused(tmp_path: Path) -> None:
    overrides = [*overrides_of("sd3", tmp_path), "quant=w8a8"]
    denoiser = api.load_denoiser("pipeline", *overrides)
    model, given = quantized(denoiser, "nearest", overrides), denoiser.encoder(choices_of("sd3"))
    with pytest.raises(ValueError, match="this network is conditioned: give conditions= with encoder_hidden_states"):
        api.sample(model, range(2))
    with pytest.raises(ValueError, match=r"guidance is 4\.0: conditions need those of no text or class, too"):
        api.sample(model, range(2), conditions=replace(given, null={}))
    with pytest.raises(ValueError, match="conditions hold attention_kwargs, which this network does not take"):
        api.sample(model, range(2), conditions=replace(given, constants={"attention_kwargs": None}))
