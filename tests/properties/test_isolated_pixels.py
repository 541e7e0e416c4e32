"""A rare pixel of the initial noise does not stay in the image: the first layer sees x as it is."""

import pytest
import torch

import tfmq_exp
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.diagnostics.isolated_pixels import isolated_pixels
from tfmq_exp.sampling.images import to_uint8
from tfmq_exp.sampling.trajectory import trajectory

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


def test_isolated_pixels_are_counted() -> None:
    images = torch.full((4, 1, 5, 5), 100, dtype=torch.uint8)
    images[1, 0, 2, 2], images[2, 0, 0, 4] = 161, 39  # inside, and in a corner
    images[3, 0, 2, 1:3] = 255  # two neighbours
    assert [isolated_pixels(image[None]) for image in images] == [0, 1, 1, 0]
    assert isolated_pixels(images) == 2
    assert isolated_pixels(images.transpose(0, 1)) == 1  # four channels of one image


@pytest.mark.parametrize(("stem", "trace"), [((), False), (("method.surgery.roles.stem.input=8",), True)])
def test_a_rare_pixel_of_the_noise_leaves_no_trace(stem: tuple[str, ...], trace: bool) -> None:
    quick = ("protocol.calibration.images=4", "protocol.sampling.num_inference_steps=20", *stem)
    denoiser = tfmq_exp.load_denoiser("digits", *quick)
    model = tfmq_exp.quantize(denoiser, 4, "nearest", "w8a8", overrides=quick, progress=False)
    assert model.recipe is not None
    x = torch.randn(16, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    x[:, 0, 1, 1] = 7.0  # in the background, where a range of calibration ends at about 4
    counts: list[int] = []
    for network in (denoiser.network, model.network):
        steps = trajectory(
            model.recipe.sampling.predictor(network),
            model.recipe.sampling.sampler,
            denoiser.schedule,
            x,
            [],
            Conditions(),
        )
        with torch.no_grad():
            *_, last = steps
        counts.append(isolated_pixels(to_uint8(last.x_next, "round")))
    assert counts[0] == 0
    assert (counts[1] >= 3) == trace, counts
