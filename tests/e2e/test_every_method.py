"""Every method of conf/method on pipelines of every family: it quantizes and samples, or is refused with the reason."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.jobs import CONF
from tests.e2e.test_pipelines import INDEX, choices_of, overrides_of
from tfmq_exp import api
from tfmq_exp.denoisers.denoiser import Denoiser

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
TRAINED = re.compile(r"(lsq|pact|nipq|qil|duq|dynamic_generator)(_.*)?")
# One of each kind, and all of them, on two families; the rest of the table takes minutes.
QUICK = {
    "dit": ("nearest", "intervals", "gptq_reconstruct", "qdiff", "lsq", "duq_tdq", "dynamic_generator_time", "ptqd"),
    "flux": ("ptq4dm", "tfmq_qdrop", "tfmq_cache", "lsq_tdq"),
}
PAIRS = [
    pytest.param(family, method, marks=() if method in QUICK.get(family, ()) else pytest.mark.every_family)
    for family in INDEX
    for method in METHODS
]
PACKED = r"images as latents of a \w+: it packs them, or has units that are not known here"
SETTINGS = (
    *("debug=smoke", "runtime.threads=1", "quant=w4a8", "protocol.calibration.step_stride=1"),
    *("protocol.reconstruction.iterations=2", "protocol.scales.iterations=2", "protocol.qat.iterations=2"),
)


def refusal(family: str, method: str) -> str | None:
    """Why a method cannot be used on a family, as its error says; None where it can."""
    if method == "ptqd":
        return "corrects its samples by statistics that no file of a network holds: use run.py"
    if TRAINED.fullmatch(method) and family == "flux":
        return PACKED
    if TRAINED.fullmatch(method) and family == "wan":
        return "is trained on images"  # and makes videos
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


def trained_on(denoiser: Denoiser, place: Path, choices: Sequence[Any]) -> list[str]:
    """Overrides for a few images of the size of a denoiser's, with classes, or captions in the way of COCO."""
    side, classes = denoiser.image_shape()[-1], isinstance(choices[0], int)
    (place / "a").mkdir(parents=True, exist_ok=True)
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "a" / f"{i}.png")
    of = "FolderClasses" if classes else "CocoCaptions"
    file = place / "captions.json"
    file.write_text(
        '{"images": [' + ", ".join(f'{{"id": {i}, "file_name": "{i}.png"}}' for i in range(6)) + '], "annotations": ['
        + ", ".join(f'{{"id": {i}, "image_id": {i}, "caption": "a red cat"}}' for i in range(6)) + "]}"
    )  # fmt: skip
    labels = f"_target_: tfmq_exp.qat.conditioning.{of}" + ("" if classes else f", path: {file}")
    return [
        *(f"data.path={place / 'a' if not classes else place}", f"data.size={side}"),
        f"method.weights.labels={{{labels}}}",
        "method.weights.protocol.condition_dropout=0.5",
    ]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_it_samples_or_says_why_not(family: str, method: str, folder: Path) -> None:
    overrides = [*overrides_of(family, folder), *SETTINGS, "protocol.sampling.num_inference_steps=3"]
    denoiser = api.load_denoiser("pipeline", *overrides)
    given = denoiser.encoder(choices_of(family))
    if TRAINED.fullmatch(method):
        overrides += trained_on(denoiser, folder / family, choices_of(family))
        if not given.null:
            overrides += ["method.weights.protocol.condition_dropout=0"]
    if reason := refusal(family, method):
        with pytest.raises(ValueError, match=reason):
            api.quantize(denoiser, method=method, overrides=overrides, progress=False)
        return
    model = api.quantize(denoiser, method=method, overrides=overrides, progress=False)
    samples = api.sample(model, range(2), conditions=given)
    assert samples.isfinite().all()
    exact = api.sample(api.QuantizedModel(denoiser.network, model.recipe), range(2), conditions=given)  # type: ignore[arg-type]
    assert not torch.equal(samples, exact)
