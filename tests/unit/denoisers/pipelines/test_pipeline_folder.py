"""Which folders of pipelines are built, and that the others are refused with the class or component that is wrong."""

import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.helpers.pipelines import GOLDENS, NAMES, copied, edit
from tfmq_exp.denoisers.pipelines.pipeline_classes import AUTOENCODERS, DENOISERS, PIPELINES, SCHEDULERS
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", lambda content: content.update(changes))


def without(key: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", lambda content: content.pop(key))


@pytest.mark.parametrize("name", NAMES)
def test_saved_pipelines_are_built(name: str) -> None:
    folder = PipelineFolder(GOLDENS / name)
    parts = {
        "scheduler": folder.scheduler(),
        "vae": folder.outline("vae"),
        "transformer": folder.outline("transformer"),
    }
    assert type(folder.pipeline(parts)).__name__ == folder.name
    own = getattr(diffusers, folder.components["scheduler"].kind).from_pretrained(GOLDENS / name / "scheduler")
    assert dict(folder.scheduler().config) == dict(own.config)


def test_the_lists_name_classes_of_the_installed_diffusers() -> None:
    for name in (*PIPELINES, *DENOISERS, *AUTOENCODERS, *SCHEDULERS):
        assert inspect.isclass(getattr(diffusers, name)), name


def test_a_former_name_of_a_pipeline_is_known(tmp_path: Path) -> None:
    folder = copied("lumina2", tmp_path)
    index(_class_name="Lumina2Text2ImgPipeline")(folder)
    assert PipelineFolder(folder).name == "Lumina2Pipeline"


def test_parts_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    folder = copied("flux", tmp_path)
    index(feature_extractor=["transformers", "CLIPImageProcessor"], image_encoder=["transformers", "Other"])(folder)
    assert "image_encoder" not in PipelineFolder(folder).components


HOSTILE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "unknown pipeline": ("dit", index(_class_name="EvilPipeline"), "'EvilPipeline' is not supported; expected"),
    "no pipeline": ("dit", without("_class_name"), "None is not supported"),
    "pipeline of another kind": ("dit", index(_class_name=["DiTPipeline", "x"]), "is not supported"),
    "pipeline's own code": ("dit", index(_class_name=["pipeline", "MyPipeline"]), "is not supported"),
    "auto_map": ("dit", index(auto_map={"a": "evil.Model"}), "auto_map"),
    "unknown denoiser": ("dit", index(transformer=["diffusers", "EvilModel"]), "diffusers.EvilModel is not supported"),
    "another denoiser": (
        "dit",
        index(transformer=["diffusers", "FluxTransformer2DModel"]),
        "FluxTransformer2DModel is not",
    ),
    "denoiser of the folder": (
        "dit",
        index(transformer=["evil", "DiTTransformer2DModel"]),
        "evil.DiTTransformer2DModel is",
    ),
    "unknown autoencoder": ("dit", index(vae=["diffusers", "os.system"]), "os.system is not supported"),
    "unknown scheduler": ("dit", index(scheduler=["diffusers", "EvilScheduler"]), "EvilScheduler is not supported"),
    "another text encoder": (
        "flux",
        index(text_encoder=["transformers", "AutoModel"]),
        "transformers.AutoModel is not",
    ),
    "another tokenizer": ("flux", index(tokenizer_2=["transformers", "AutoProcessor"]), "AutoProcessor is not"),
    "text encoder of the folder": ("flux", index(text_encoder=["evil", "CLIPTextModel"]), "evil.CLIPTextModel is not"),
    "more components": ("dit", index(controlnet=["diffusers", "ControlNetModel"]), "'controlnet' is no part"),
    "second denoiser": (
        "wan",
        index(transformer_2=["diffusers", "WanTransformer3DModel"]),
        "transformer_2 .* not supported",
    ),
    "no class": ("dit", index(vae=["diffusers"]), "expected the library and the class"),
    "text for a setting": ("wan", index(boundary_ratio="__import__('os')"), "boundary_ratio"),
    "no scheduler": ("dit", without("scheduler"), "lacks the component 'scheduler'"),
    "no text encoder": ("sd3", without("text_encoder_2"), "lacks the component 'text_encoder_2'"),
    "an empty denoiser": ("dit", index(transformer=[None, None]), "without transformer"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", HOSTILE)
def test_other_folders_are_refused(case: str, tmp_path: Path) -> None:
    name, damage, named = HOSTILE[case]
    folder = copied(name, tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=named) as error:
        PipelineFolder(folder)
    assert str(folder / "model_index.json") in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "lacking", ["vae", "transformer", "scheduler", "text_encoder_3", "tokenizer", "model_index.json"]
)
def test_missing_components_are_named(lacking: str, tmp_path: Path) -> None:
    folder = copied("sd3", tmp_path)
    place = folder / lacking
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(FileNotFoundError, match=lacking):
        PipelineFolder(folder)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "is not the DDIMScheduler of the index"),
        ({"auto_map": "evil"}, "auto_map"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"beta_schedule": "evil"}, "evil"),
        ({"trained_betas": "evil"}, "scheduler_config.json"),
        ({"predict_epsilon": False}, "predict_epsilon"),
    ],
)
def test_impossible_schedulers_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = copied("dit", tmp_path)
    edit(folder / "scheduler/scheduler_config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=named):
        PipelineFolder(folder).scheduler()


@pytest.mark.bad_input
def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    """Not even where it is named as custom code is."""
    folder, trace = copied("dit", tmp_path), tmp_path / "ran"
    for place in (folder / "pipeline.py", folder / "transformer/evil.py", folder / "model_index.py"):
        place.write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    pipeline = PipelineFolder(folder)
    pipeline.network("transformer")
    index(transformer=["evil", "Model"])(folder)
    with pytest.raises(ValueError, match="evil"):
        PipelineFolder(folder)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["flux", "dit"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1"])
def test_latents_without_a_scale_are_refused_by_their_key(name: str, value: Any, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    edit(folder / "vae/config.json", lambda content: content.update(scaling_factor=value))
    for read in (PipelineFolder(folder).outline, PipelineFolder(folder).network):
        with pytest.raises(ValueError, match=r"vae/config.json: scaling_factor must be a number above 0, got"):
            read("vae")


@pytest.mark.parametrize(
    ("key", "value"), [("shift_factor", math.nan), ("latents_std", [1.0, 0.0]), ("latents_mean", [math.inf])]
)
def test_other_numbers_of_latents_are_refused_by_their_key(key: str, value: Any, tmp_path: Path) -> None:
    folder = copied("flux", tmp_path)
    edit(folder / "vae/config.json", lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=f"vae/config.json: {key} must be"):
        PipelineFolder(folder).network("vae")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["shift", "base_shift", "max_shift"])
def test_settings_of_a_scheduler_that_are_no_numbers_are_refused_by_their_key(
    key: str, value: float, tmp_path: Path
) -> None:
    folder = copied("flux", tmp_path)
    edit(folder / "scheduler/scheduler_config.json", lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=f"scheduler_config.json: {key} must be a finite number, got {value}"):
        PipelineFolder(folder).scheduler()
