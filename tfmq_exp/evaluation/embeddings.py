"""Extractors of embeddings: CLIP's, for CMMD, and DINOv2's, for the Fréchet distance on them. Neither has logits or maps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.evaluation.clip import load_clip
from tfmq_exp.evaluation.features import Extractor, Features
from tfmq_exp.evaluation.model_folder import device_of, identity_of, load_model, pixels_of

SIDE, OFFSET = (
    224,
    0.1,
)  # pixels of a side; and what DINOv2's program adds to the number of patches before it interpolates
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels

Images = UInt8[Tensor, "batch 3 height width"]


def _extractor(
    embed: Callable[[Images], Tensor], width: int, identity: dict[str, Any], batch_size: int, device: Any
) -> Extractor:
    def features(images: Images) -> Features:
        rows = embed(images)
        return Features(rows, rows[:, :0], rows[:, :0])

    return Extractor(features, (width, 0), identity, batch_size, str(device))


def clip_extractor(folder: str, batch_size: int = 64, device: str | None = None) -> Extractor:
    """Unit embeddings of images by the CLIP model of a folder: CMMD's are of openai/clip-vit-large-patch14-336 (arXiv 2401.09603)."""
    clip = load_clip(folder, device)
    identity = identity_of(Path(folder), Path(folder) / "model.safetensors")
    return _extractor(clip.embed_images, clip.model.config.projection_dim, identity, batch_size, clip.device)


def dinov2_extractor(folder: str, batch_size: int = 64, device: str | None = None) -> Extractor:
    """Class tokens of DINOv2, as arXiv 2306.04675 computes its Fréchet distance (dgm-eval): ViT-L/14, images resized to 224 by PIL.

    Args:
        folder: `config.json` and `model.safetensors` of facebook/dinov2-large.
        batch_size: images in one forward pass.
        device: of the network; None for CUDA where there is one.
    """
    from transformers import Dinov2Model  # here: it takes seconds, and most runs need none
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root, place = Path(folder), device_of(device)
    model = load_model(Dinov2Model, root, place, "config.json and model.safetensors of facebook/dinov2-large")
    patches = SIDE // model.config.patch_size
    positions = model.embeddings.position_embeddings
    model.embeddings.position_embeddings = nn.Parameter(interpolate_positions(positions, patches), requires_grad=False)
    # to a square without a crop, and ImageNet's moments; the folder's own file says otherwise
    settings: dict[str, Any] = {"image_mean": MEAN, "image_std": DEVIATION, "do_center_crop": False}
    processor: Any = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, **settings)

    @torch.no_grad()
    def embed(images: Images) -> Tensor:
        return model(pixels_of(processor, images, place)).pooler_output

    return _extractor(embed, model.config.hidden_size, identity_of(root, root / "model.safetensors"), batch_size, place)


def interpolate_positions(
    positions: Float[Tensor, "1 positions channels"], patches: int
) -> Float[Tensor, "1 patches channels"]:
    """The embeddings of a class token and `patches` x `patches` patches, as DINOv2's program interpolates them (bicubic).

    The factor has 0.1 more patches than there are, which moves the grid; transformers interpolates to the size itself.
    """
    side, channels = round((positions.shape[1] - 1) ** 0.5), positions.shape[2]
    if side == patches:
        return positions
    grid = positions[:, 1:].reshape(1, side, side, channels).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, scale_factor=(patches + OFFSET) / side, mode="bicubic")
    return torch.cat([positions[:, :1], moved.permute(0, 2, 3, 1).reshape(1, patches**2, channels)], dim=1)
