"""Presets of paper tables set what the published protocol of that table says; models have their published sizes."""

import itertools
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tests.e2e.jobs import CONF, composed
from tfmq_exp.quant.qat_functions import Lsq
from tfmq_exp.report.protocol_match import AS_PRINTED, clip_network, published_calls
from tfmq_exp.report.published_tables import PublishedRow, read_published

PUBLISHED = read_published()
FAMILIES = ("tfmq", "qdiff", "ptqd", "tdq")
SAMPLERS = {"DDIM": "ddim", "PLMS": "plms"}
PARTS = {
    ("blockwise", "static"): "brecq",
    ("temporal_aware", "static"): "tiar",
    ("blockwise", "finite_set"): "fsc",
    ("temporal_aware", "finite_set"): "tfmq",
}

# preset: paper, table, model. Typed by hand: a preset that is not here, or says something else, fails.
TABLES = {
    "tfmq/table1_bedroom": ("TFMQ-DM", "1", "ldm_bedroom"),
    "tfmq/table2_bedroom": ("TFMQ-DM", "2", "ldm_bedroom"),
    "tfmq/table2_church": ("TFMQ-DM", "2", "ldm_church"),
    "tfmq/table2_celebahq": ("TFMQ-DM", "2", "ldm_celebahq"),
    "tfmq/table2_ffhq": ("TFMQ-DM", "2", "ldm_ffhq"),
    "tfmq/table3_imagenet": ("TFMQ-DM", "3", "ldm_imagenet"),
    "tfmq/table4_sd": ("TFMQ-DM", "4", "sd_v1_4"),
    "tfmq/table4_sd_qdiff": ("TFMQ-DM", "4", "sd_v1_4"),
    "tfmq/table5_ablation": ("TFMQ-DM", "5", "ldm_bedroom"),
    "tfmq/table6_estimators": ("TFMQ-DM", "6", "ldm_bedroom"),
    "tfmq/cifar10": ("TFMQ-DM", "cifar10", "ddim_cifar10"),
    "qdiff/table1_cifar10": ("Q-Diffusion", "1", "ddim_cifar10"),
    "qdiff/tables2_3_bedroom": ("Q-Diffusion", "2 and 3", "ldm_bedroom"),
    "qdiff/tables2_3_church": ("Q-Diffusion", "2 and 3", "ldm_church"),
    "ptqd/imagenet_20_steps": ("PTQD", "imagenet 20 steps", "ldm_imagenet"),
    "ptqd/imagenet_250_steps": ("PTQD", "imagenet 250 steps", "ldm_imagenet"),
    "ptqd/lsun_bedroom": ("PTQD", "lsun", "ldm_bedroom"),
    "ptqd/lsun_church": ("PTQD", "lsun", "ldm_church"),
    "tdq/s4_church": ("TDQ", "S4", "ldm_church"),
    "tdq/s4_church_intervals": ("TDQ", "S4", "ldm_church"),
    "tdq/s4_imagenet": ("TDQ", "S4", "ldm_imagenet"),
    "tdq/s4_imagenet_intervals": ("TDQ", "S4", "ldm_imagenet"),
    "tdq/table2_cifar10": ("TDQ", "2", "ddim_cifar10"),
    "tdq/table2_church": ("TDQ", "2", "ldm_church"),
    "tdq/s1_cifar10_qat": ("TDQ", "S1", "ddim_cifar10"),
    "tdq/s2_cifar10_qat": ("TDQ", "S2", "ddim_cifar10"),
    "tdq/s5_cifar10_qat": ("TDQ", "S5", "ddim_cifar10"),
    "tdq/s6_cifar10_qat": ("TDQ", "S6", "ddim_cifar10"),
    "tdq/s6_church_qat": ("TDQ", "S6", "ldm_church"),
    "tdq/s7_cifar10_qat": ("TDQ", "S7", "ddim_cifar10"),
    "tdq/table1_cifar10_qat": ("TDQ", "1 cifar10", "ddim_cifar10"),
    "tdq/table1_church_qat": ("TDQ", "1 church", "ldm_church"),
}
# rows of these tables that no preset makes: methods that are not here, and bits that their sources leave open
NOT_HERE = {"linear", "squant"}
# and rows that a preset of another table makes, or nobody can, since the source does not name the method
ELSEWHERE = {("TFMQ-DM", "6", "ldm_bedroom"): {("w4a8", "qdiff"), ("w4a8", "ptqd"), ("w4a8", "unstated")}}


def text(preset: str) -> str:
    return (CONF / "experiment" / f"{preset}.yaml").read_text()


def axes(preset: str) -> dict[str, list[str]]:
    """What a preset's sweep goes through."""
    params = OmegaConf.create(text(preset)).hydra.sweeper.params
    return {str(key): str(values).split(",") for key, values in params.items()}


@cache
def configured(preset: str) -> DictConfig:
    """The last job of a preset's sweep."""
    with tempfile.TemporaryDirectory() as folder:
        last = [f"{key}={values[-1]}" for key, values in axes(preset).items()]
        return composed(Path(folder), f"experiment={preset}", *last)


def made(preset: str) -> set[tuple[str, str]]:
    """Bits and method, as published rows name them, of every job."""
    swept = axes(preset)
    if "method.scales.temporal.count" in swept:
        methods = [f"s{count}" for count in swept["method.scales.temporal.count"]]
    elif "method/weights/partition" in swept:
        parts = itertools.product(swept["method/weights/partition"], swept["method/scales"])
        methods = [PARTS[part] for part in parts]
    else:
        methods = swept.get("method", [configured(preset).method.name])
    if preset.endswith("_qat"):
        methods = [AS_PRINTED.get(method, method) for method in methods]
    return set(itertools.product(swept["quant"], methods))


def rows_of(preset: str) -> list[PublishedRow]:
    """The published rows of a preset's table and model."""
    paper, table, model = TABLES[preset]
    found = [row for row in PUBLISHED if (row.paper, row.table, row.model) == (paper, table, model)]
    assert found
    return found


def test_released_lsq_scales_the_gradients_of_weights_alone(tmp_path: Path) -> None:
    qat = instantiate(composed(tmp_path, "method=lsq", "method/surgery=trained_as_released").method.surgery.qat)
    assert qat.activations == Lsq("tdq_release", scaled=False)
    assert qat.weights == Lsq("tdq_release", scaled=True)
    assert instantiate(composed(tmp_path, "method=lsq").method.surgery.qat).activations == Lsq()


def test_every_preset_is_compared_with_a_published_table() -> None:
    files = {str(path.relative_to(CONF / "experiment").with_suffix("")) for path in CONF.rglob("experiment/*/*.yaml")}
    assert {name for name in files if name.split("/")[0] in FAMILIES} == TABLES.keys()


@pytest.mark.parametrize("preset", TABLES)
def test_a_preset_composes_and_its_first_comment_is_its_command(preset: str) -> None:
    cfg = configured(preset)
    assert text(preset).splitlines()[:2] == ["# @package _global_", f"#   python run.py -m experiment={preset}"]
    assert OmegaConf.create(text(preset)).hydra.mode == "MULTIRUN"
    assert cfg.model.name == TABLES[preset][2]
    for key, values in axes(preset).items():
        files = [CONF / key / f"{value}.yaml" for value in values]
        assert "." in key or key == "seed" or all(file.is_file() for file in files), files
    printed = AS_PRINTED.get(cfg.method.name, cfg.method.name)
    assert (cfg.quant.name, printed) in made(preset) or "method/scales" in axes(preset)


@pytest.mark.parametrize("preset", TABLES)
def test_its_rows_are_those_that_the_paper_prints(preset: str) -> None:
    printed = {(row.bits, row.method) for row in rows_of(preset)}
    rows = made(preset)
    assert {method for _, method in rows} <= {method for _, method in printed}
    if "unstated" not in {bits for bits, _ in printed}:
        assert {bits for bits, _ in rows} <= {bits for bits, _ in printed}


@pytest.mark.parametrize("place", sorted(set(TABLES.values())), ids=" ".join)
def test_presets_make_all_rows_of_methods_that_are_here(place: tuple[str, str, str]) -> None:
    names = [preset for preset, where in TABLES.items() if where == place]
    printed = {(row.bits, row.method) for row in rows_of(names[0]) if row.method not in NOT_HERE}
    stated = {row for row in printed if re.fullmatch(r"w\da\d+", row[0])}
    assert stated - ELSEWHERE.get(place, set()) <= set().union(*map(made, names))


@pytest.mark.parametrize("preset", TABLES)
def test_sampling_is_that_of_the_table(preset: str) -> None:
    cfg = configured(preset)
    sampler, kind = cfg.sampler, cfg.sampler._target_.rpartition(".")[2]
    for row in rows_of(preset):
        said = row.protocol
        assert SAMPLERS[kind] == said.get("sampler", "ddim")
        assert sampler.num_inference_steps == said.get("steps", sampler.num_inference_steps)
        assert cfg.protocol.sampling.eta == said.get("eta", cfg.protocol.sampling.eta)
        assert cfg.model.sampling.guidance == said.get("cfg", cfg.model.sampling.guidance)
        assert cfg.protocol.sampling.images == said.get("images", cfg.protocol.sampling.images)
        if "clip" in said:
            assert clip_network(Path(cfg.eval.image_scores.clip.folder).name) == said["clip"]
    if kind == "DDIM":
        ddim = cfg.model.name == "ddim_cifar10" and not preset.endswith("_qat")  # TDQ's program is LDM's
        form = ("quadratic", 0, True) if ddim else ("uniform", 1, False)
        assert (sampler.eta, sampler.timestep_spacing, sampler.steps_offset, sampler.set_alpha_to_one) == (
            cfg.protocol.sampling.eta,
            *form,
        )


def halves(cfg: DictConfig) -> int:
    return 1 if cfg.model.sampling.guidance == 1 else 2


@pytest.mark.parametrize("preset", TABLES)
def test_calibration_is_that_of_the_rows_method(preset: str) -> None:
    cfg = configured(preset)
    set_up, rows = cfg.protocol, made(preset)
    iterations = set_up.qat.iterations if preset.endswith("_qat") else set_up.reconstruction.iterations
    steps, images, every = cfg.sampler.num_inference_steps, set_up.calibration.images, set_up.calibration.step_stride
    for said in (row.protocol for row in rows_of(preset) if (row.bits, row.method) in rows):
        assert every == said.get("interval_length", every)
        for key in ("weight_iterations", "iterations"):
            assert iterations == said.get(key, iterations)
        assert set_up.reconstruction.batch_size == said.get(
            "weight_batch", said.get("calibration_batch", set_up.reconstruction.batch_size)
        )
        assert set_up.scales.iterations == said.get("activation_iterations", set_up.scales.iterations)
        assert set_up.scales.learning_rate == said.get("activation_lr", set_up.scales.learning_rate)
        if "weight_samples" in said:
            assert images * halves(cfg) * len(range(0, steps, every)) == said["weight_samples"]
            assert images * halves(cfg) * steps == said["activation_samples"]


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("qdiff/table1_cifar10", 5120),
        ("qdiff/tables2_3_bedroom", 5120),
        ("qdiff/tables2_3_church", 5120),
        ("tfmq/table4_sd_qdiff", 25 * 128 * 2 + 256),  # 51 calls: one more than 25 steps
        ("ptqd/imagenet_250_steps", 1024),
        ("tdq/s4_church", 256),
        ("tdq/s4_church_intervals", 256),
        ("tdq/s4_imagenet", 256),
        ("tdq/s4_imagenet_intervals", 256),
    ],
)
def test_calibration_samples_at_real_network_calls(name: str, samples: int) -> None:
    cfg = configured(name)
    sampler = SAMPLERS[cfg.sampler._target_.rpartition(".")[2]]
    skip = {"skip": "quad"} if cfg.sampler.get("timestep_spacing") == "quadratic" else {}
    calls = published_calls({"sampler": sampler, "steps": cfg.sampler.num_inference_steps, **skip})
    assert calls is not None
    every = range(0, calls, cfg.protocol.calibration.step_stride)
    assert cfg.protocol.calibration.images * len(every) * halves(cfg) == samples


@pytest.mark.parametrize("method", ["ptq4dm", "qdiff", "ptqd", "tfmq"])
def test_weights_alone_leave_layers_inputs_float(tmp_path: Path, method: str) -> None:
    block = composed(tmp_path, f"method={method}", "quant=w4a32").method.surgery.roles.res_conv
    assert (block.weight, block.input, block.get("output")) == (4, None, None)
