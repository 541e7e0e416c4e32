"""A rare pixel of the initial noise does not stay in the image: the first layer sees x as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad, unfold

import tfmq_exp
from tests.e2e.jobs import job
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.sampling.images import to_uint8
from tfmq_exp.sampling.sampler import trajectory

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")
GREY_LEVELS = 60  # by which an isolated pixel is outside the range of its eight neighbours


def with_isolated_pixel(images: Tensor) -> int:
    """Number of uint8 images of one channel with a pixel far brighter or far darker than all of its neighbours."""
    around = unfold(pad(images.float(), (1, 1, 1, 1), value=torch.nan), 3).unflatten(1, (1, 9))[:, 0]
    others = torch.cat([around[:, :4], around[:, 5:]], dim=1)
    brighter = around[:, 4] - others.nan_to_num(-torch.inf).amax(1)
    darker = others.nan_to_num(torch.inf).amin(1) - around[:, 4]
    return int((torch.maximum(brighter, darker) > GREY_LEVELS).any(1).sum())


def test_isolated_pixels_are_counted() -> None:
    images = torch.full((4, 1, 5, 5), 100, dtype=torch.uint8)
    images[1, 0, 2, 2], images[2, 0, 0, 4] = 161, 39  # inside, and in a corner
    images[3, 0, 2, 1:3] = 255  # two neighbours
    assert [with_isolated_pixel(image[None]) for image in images] == [0, 1, 1, 0]


@pytest.mark.parametrize(("stem", "trace"), [((), False), (("method.surgery.roles.stem.input=8",), True)])
def test_a_rare_pixel_of_the_noise_leaves_no_trace(stem: tuple[str, ...], trace: bool) -> None:
    quick = ("protocol.calibration.images=4", "protocol.sampling.num_inference_steps=20", *stem)
    denoiser = tfmq_exp.load_denoiser("digits", *quick)
    model = tfmq_exp.quantize(denoiser, 4, "nearest", "w8a8", overrides=quick, progress=False)
    assert model.recipe is not None
    x = torch.randn(16, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    x[:, 0, 1, 1] = 7.0  # in the background, where a range of calibration ends at about 4
    counts: list[int] = []
    for unet in (denoiser.unet, model.unet):
        steps = trajectory(
            model.recipe.sampling.predictor(unet), model.recipe.sampler, denoiser.schedule, x, [], Conditions()
        )
        with torch.no_grad():
            *_, last = steps
        counts.append(with_isolated_pixel(to_uint8(last.x_next, "round")))
    assert counts[0] == 0
    assert (counts[1] >= 3) == trace, counts


@pytest.mark.slow
def test_the_default_run_has_no_isolated_pixel(tmp_path: Path) -> None:
    """1,024 images of `python run.py`: the count of docs/results.md."""
    run = job(tmp_path)
    stages = json.loads((run / "artifacts.json").read_text())
    _, record = json.loads((run / "results.json").read_text())["rows"]
    images = {
        kind: torch.cat([load_file(f)["images"] for f in sorted(Path(stages[kind]["path"]).glob("images-*"))])
        for kind in ("images", "float images")
    }
    assert {kind: (len(found), with_isolated_pixel(found)) for kind, found in images.items()} == {
        "images": (1024, 0),
        "float images": (1024, 0),
    }
    assert record["errors"]["trajectory"] <= 0.003
