"""What is refused by the configuration alone, before anything slow."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from tests.e2e.jobs import CONF, composed
from tfmq_exp.cli.run_info import current_run
from tfmq_exp.cli.validation import COUNTS, RATES, check_name, real_images
from tfmq_exp.cli.validation import check as check_job

pytestmark = pytest.mark.bad_input


def check(cfg: DictConfig) -> None:
    check_job(cfg, current_run())


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    return composed(tmp_path_factory.mktemp("checks"), "debug=smoke", "method=intervals")


@pytest.mark.parametrize(
    ("key", "value", "right_ones"),
    [
        ("until", "fid", "one of trajectory, weights, activations, correction, images, scores, compare, diagnose"),
        ("seed", "abc", "a whole number from 0 to"),
        ("seed", 1.5, "a whole number from 0 to"),
        ("seed", -1, "a whole number from 0 to"),
        ("seed", None, "a whole number from 0 to"),
        ("dry_run", "perhaps", "true or false"),
        ("protocol.sampling.num_inference_steps", "ten", "a whole number, at least 1"),
        ("protocol.sampling.images", 0, "a whole number, at least 1"),
        ("protocol.reconstruction.iterations", True, "a whole number, at least 1"),
        ("protocol.reconstruction.learning_rate", 0.0, "a number above 0"),
        ("protocol.sampling.eta", math.nan, "a number from 0 to 1"),
        ("protocol.qat.ema_decay", 1.5, "a number, at least 0 and below 1"),
        ("protocol.qat.horizontal_flip", "no", "true or false"),
        ("runtime.batch_size", 2.0, "a whole number, at least 1"),
        ("runtime.threads", 0, "a whole number, at least 1 and below 2**31, or null"),
        ("runtime.activation_cache_gib", -1, "a number, at least 0"),
        ("runtime.device_cache_gib", -0.5, "a number, at least 0, or null"),
        ("diagnosis.samples", "few", "a whole number, at least 1"),
        ("name", 7, "text, in quotes of its own"),
        ("data.path", ["x"], "text, in quotes of its own"),
        ("paths.store", 2024, "text, in quotes of its own"),
        ("captions", ["a cat", "a dog"], "text, in quotes of its own"),
        ("captions", 5, "text, in quotes of its own"),
        ("data.listing", ["a.png"], "text, in quotes of its own"),
        ("data.size", "16", "a whole number, at least 1"),
        ("data.size", [16, 16], "a whole number, at least 1"),
        ("data.size", -16, "a whole number, at least 1"),
        ("data.size", 16.0, "a whole number, at least 1"),
        ("data.grey", "perhaps", "true or false"),
        ("data.grey", None, "true or false"),
        ("data.grey", 1, "true or false"),
    ],
)
def test_a_value_that_cannot_be_right_is_named(right: DictConfig, key: str, value: object, right_ones: str) -> None:
    check(right)
    cfg = right.copy()
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ValueError, match=re.escape(f"{key} must be {right_ones}")) as error:
        check(cfg)
    assert str(error.value).endswith(f"got {value!r}")


def test_what_must_be_given_is_asked_for(right: DictConfig) -> None:
    cfg = right.copy()
    OmegaConf.update(cfg, "data", OmegaConf.load(CONF / "data" / "image_folder.yaml"), merge=False)
    with pytest.raises(ValueError, match=r"data\.path has no value: give it one"):
        check(cfg)
    for goal in ("trajectory", "weights", "images", "diagnose"):  # whoever trains on images asks for them itself
        OmegaConf.update(cfg, "until", goal)
        check(cfg)
    with pytest.raises(ValueError, match=r"data\.path has no value: give it one"):
        real_images(cfg, current_run().folder)


@pytest.mark.parametrize(
    "key", ["path", "captions", "data.path", "data.listing", "paths.outputs", "model.denoiser.path"]
)
def test_a_home_folder_that_no_shell_has_written_out_is_refused(
    right: DictConfig, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = right.copy()
    OmegaConf.update(cfg, key, "~/models", force_add=True)
    with pytest.raises(
        ValueError, match=rf"{re.escape(key)} is ~/models: ~ is not expanded here; write /home/me/models"
    ):
        check(cfg)


def test_every_process_has_a_part_where_gradients_are_scaled(right: DictConfig) -> None:
    cfg = right.copy()
    OmegaConf.update(cfg, "method.weights.protocol.precision", "16-mixed", force_add=True)
    OmegaConf.update(cfg, "runtime.processes", 2)
    with pytest.raises(ValueError, match=r"runtime\.microbatches must be at least 2, the number of processes, got 1"):
        check(cfg)
    OmegaConf.update(cfg, "runtime.microbatches", 2)
    check(cfg)


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_more_processes_than_the_machine_can_run_are_refused(
    right: DictConfig, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    cfg = right.copy()
    OmegaConf.update(cfg, "runtime.processes", 4 * cores)
    check(cfg)
    OmegaConf.update(cfg, "runtime.processes", 4 * cores + 1)
    with pytest.raises(
        ValueError, match=rf"runtime\.processes must be at most {4 * cores}, 4 for each of the {cores} cor"
    ):
        check(cfg)


def test_a_method_goes_by_the_name_of_its_file_or_by_one_of_no_other(right: DictConfig) -> None:
    cfg = right.copy()
    OmegaConf.update(cfg, "method.name", "brecq")
    with pytest.raises(ValueError, match=r"method=intervals has method\.name=brecq, .*`name: intervals`"):
        check(cfg)
    for path in (CONF / "method").glob("*.yaml"):
        check_name(yaml.safe_load(path.read_text())["name"], path.stem, {p.stem for p in path.parent.glob("*.yaml")})


def test_a_method_of_ones_own_needs_a_name(tmp_path: Path) -> None:
    own = tmp_path / "conf/method/mine.yaml"
    own.parent.mkdir(parents=True)
    words = (f"hydra.searchpath=[file://{tmp_path}/conf]", "method=mine")
    own.write_text("defaults: [tfmq, _self_]\n")
    with pytest.raises(ValueError, match=r"method=mine has method\.name=tfmq"):
        check(composed(tmp_path, *words))
    own.write_text("defaults: [tfmq, _self_]\nname: mine\n")
    check(composed(tmp_path, *words))


def test_every_number_of_a_protocol_is_looked_at() -> None:
    """Of all protocols' files: a new key has to say what it may be."""
    found: dict[str, set[type]] = {}
    for path in (CONF / "protocol").glob("*.yaml"):
        for group, values in yaml.safe_load(path.read_text()).items():
            for key, value in values.items() if group != "defaults" else ():
                number = float(value) if isinstance(value, str) and value[0].isdigit() else value  # YAML 1.1's 1e-3
                if isinstance(number, int | float) and not isinstance(number, bool):
                    found.setdefault(f"{group}.{key}", set()).add(type(number))
    assert {key for key, kinds in found.items() if kinds == {int}} == {*COUNTS.split(), "qat.warmup"}
    assert {key for key, kinds in found.items() if float in kinds} == {*RATES.split(), "sampling.eta", "qat.ema_decay"}


def test_mistakes_and_finished_jobs_need_no_heavy_imports() -> None:
    heavy = "{'torch', 'diffusers', 'pytorch_lightning', 'matplotlib', 'numpy'}"
    code = f"import sys, run, tfmq_exp.cli.job, tfmq_exp.cli.sweep_report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, check=False).returncode == 0


def test_the_folder_of_a_pipeline_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path has no value: give it the folder that pipeline\.save_pretrained"):
        check(composed(tmp_path, "model=diffusers", "until=images"))
    check(composed(tmp_path, "model=diffusers", "until=images", "path=folder"))
    check(composed(tmp_path, "model=diffusers", "until=images", "model.denoiser.path=folder"))
