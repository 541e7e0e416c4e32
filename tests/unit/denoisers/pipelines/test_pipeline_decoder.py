"""Images of final latents are those of the pipelines."""

import pytest
import torch
from diffusers import AutoencoderKL

from tests.helpers.pipelines import GOLDENS, NAMES, call_of, recorded
from tfmq_exp.denoisers.pipelines.pipeline_decoder import PipelineDecoder
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder

TOLERANCE = 1e-4


def decoder(name: str, rows: int = 8) -> PipelineDecoder:
    return PipelineDecoder(PipelineFolder(GOLDENS / name), call_of(name)[1], rows)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dit"])
@pytest.mark.parametrize("rows", [1, 8])
def test_images_are_the_recorded_ones(name: str, rows: int) -> None:
    golden = recorded(name)
    images = decoder(name, rows).decode(golden["final_latents"])
    expected = golden["decoded"].movedim(-1, 1)
    assert images.shape == expected.shape
    assert images.dtype == torch.float32
    assert float(((images + 1) / 2 - expected).abs().max()) <= TOLERANCE


def test_images_of_dit_are_those_of_its_first_stage() -> None:
    """Its pipeline takes and returns no latents."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stage = AutoencoderKL.from_pretrained(GOLDENS / "dit/vae", local_files_only=True)
    with torch.no_grad():
        expected = stage.decode(x / 0.18215).sample.clamp(-1, 1)
    assert torch.allclose(decoder("dit").decode(x), expected, atol=1e-5)


def test_the_callers_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    decoder("flux").decode(recorded("flux")["final_latents"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.bad_input
def test_impossible_settings_are_refused() -> None:
    folder = PipelineFolder(GOLDENS / "flux")
    with pytest.raises(ValueError, match="takes no setting 'size'"):
        PipelineDecoder(folder, {"size": 16})
    with pytest.raises(ValueError, match="rows must be"):
        PipelineDecoder(folder, {}, rows=0)


@pytest.mark.bad_input
def test_latents_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents of shape .* the settings make"):
        decoder("flux").decode(torch.zeros(1, 9, 16))
