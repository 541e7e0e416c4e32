"""Extractors of embeddings, and CMMD, against slow double precision."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.helpers.clip_folder import save_clip
from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.embeddings import clip_extractor, dinov2_extractor, interpolate_positions
from tfmq_exp.evaluation.metrics import maximum_mean_discrepancy

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("counts", [(7, 5), (1030, 3)])  # the second has more rows than a block
def test_cmmd_is_the_sum_over_all_pairs(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = (F.normalize(torch.randn(n, 6, generator=generator) + 0.3 * n % 1, dim=1) for n in counts)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a]))

    x, y = real.double().numpy(), generated.double().numpy()
    within = mean(x[:60], x[:60]) if counts[0] < 60 else None
    ours = maximum_mean_discrepancy(real, generated)
    if within is not None:
        assert ours == pytest.approx(1000 * (within + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    else:
        kernel = np.exp(-(2 - 2 * np.clip(x @ x.T, -1, 1)) / 200)
        assert ours == pytest.approx(1000 * (kernel.mean() + mean(y, y) - 2 * mean(x, y)), rel=1e-6)
    assert maximum_mean_discrepancy(real, real) == pytest.approx(0, abs=1e-9)


def test_clip_embeddings_have_length_one_and_are_the_models(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    extract = clip_extractor(str(folder), batch_size=3, device="cpu")
    images = pictures(4, 32, 0)
    found = extract(images)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        pixels = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        expected = model(input_ids=torch.tensor([[16, 17]]), pixel_values=pixels).image_embeds
    assert torch.allclose(found.pooled, expected, atol=1e-5)
    assert torch.allclose(found.pooled.norm(dim=1), torch.ones(4))
    assert (extract.widths, found.spatial.shape, found.logits.shape) == ((8, 0), (4, 0), (4, 0))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def moved_positions(positions: Tensor, patches: int) -> Tensor:
    """DINOv2's interpolation, each new patch apart: cubic convolution (a = -0.75) with a factor of (patches + 0.1) / side."""
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[0, 1:].reshape(side, side, -1).double()

    def weight(d: float) -> float:
        d, a = abs(d), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    matrix = torch.zeros(patches, side, dtype=torch.float64)
    for i in range(patches):
        centre = (i + 0.5) * side / (patches + 0.1) - 0.5
        for k in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(k, 0), side - 1)] += weight(centre - k)
    moved = torch.einsum("ik,jl,klc->ijc", matrix, matrix, grid).reshape(patches**2, -1)
    return torch.cat([positions[0, :1].double(), moved])[None]


def test_positions_are_interpolated_as_by_dinov2() -> None:
    positions = torch.randn(1, 26, 3, generator=torch.Generator().manual_seed(0))
    ours = interpolate_positions(positions, 16)
    assert torch.allclose(ours.double(), moved_positions(positions, 16), atol=1e-5)
    to_size = F.interpolate(positions[:, 1:].reshape(1, 5, 5, 3).permute(0, 3, 1, 2), size=(16, 16), mode="bicubic")
    assert not torch.allclose(ours[:, 1:], to_size.flatten(2).transpose(1, 2), atol=1e-3)
    assert interpolate_positions(positions, 5) is positions


def test_dinov2_features_are_class_tokens_of_resized_images(dinov2: Path) -> None:
    images = pictures(2, 40, 0)
    wide = torch.cat([images, images.flip(3)], dim=3)  # squeezed, not cropped
    ours = dinov2_extractor(str(dinov2), device="cpu")(wide)
    model = transformers.Dinov2Model.from_pretrained(dinov2).double().eval()
    positions = moved_positions(model.embeddings.position_embeddings.detach(), 16)
    model.embeddings.position_embeddings = torch.nn.Parameter(positions)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    for i in range(2):
        picture = Image.fromarray(wide[i].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 255
        with torch.no_grad():
            out = model(((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None]).last_hidden_state[0, 0]
        assert torch.allclose(ours.pooled[i].double(), out, atol=1e-4)


def test_missing_models_and_images_of_another_kind(tmp_path: Path, dinov2: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"put config.json and model.safetensors of facebook/dinov2-large there"
    ):
        dinov2_extractor(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        clip_extractor(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"expected uint8 images \(batch, 3, height, width\), got torch.uint8 \(1, 1, 8, 8\)"
    ):
        dinov2_extractor(str(dinov2), device="cpu")(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
