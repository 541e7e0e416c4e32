"""Scores of single images by a CLIP model of a folder: CLIP score, HPSv2, PickScore, CLIP-IQA.

All are cosines between the embeddings of an image and of a text; they differ in weights, in the factor, and in the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.validate import check_fields, one_of
from tfmq_exp.denoisers.loading.checkpoint import assign_weights, read_tensors
from tfmq_exp.denoisers.loading.condition_encoders import check_tokenizer
from tfmq_exp.evaluation.model_folder import (
    check_settings,
    device_of,
    identity_of,
    load_model,
    pixels_of,
    ready,
    require_file,
)
from tfmq_exp.evaluation.open_clip_layout import from_open_clip

Images = UInt8[Tensor, "batch 3 height width"]
PUBLISHED = (
    "a model as transformers saves it, with tokenizer and preprocessor_config.json, such as openai/clip-vit-large-patch14 "
    "(PickScore: yuvalkirstain/PickScore_v1, with the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
)
HPS = "HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of huggingface.co/xswu/HPSv2"
QUALITY = ("Good photo.", "Bad photo.")  # CLIP-IQA's texts for quality (arXiv 2207.12396)


@dataclass(frozen=True)
class ClipModel:
    """A CLIP model with its tokenizer and image processor."""

    model: Any
    tokenizer: Any
    processor: Any
    device: torch.device

    @torch.no_grad()
    def embed_images(self, images: Images) -> Float[Tensor, "batch features"]:
        """Unit embeddings of images, prepared as the folder says: PIL's resize of bytes, by default to the shorter side, and a crop."""
        pixels = pixels_of(self.processor, images, self.device)
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Unit embeddings of texts, cut at the length that the model knows."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens.to(self.device)).pooler_output, dim=-1)


def load_clip(folder: str, device: str | None = None, weights: str | None = None) -> ClipModel:
    """The model of a folder; with the weights of another file in open_clip's layout, if one is named.

    Raises:
        FileNotFoundError: no model there, or no such file; says where both are published.
        ValueError: damaged, of another architecture, or a folder that names code.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer  # here: it takes seconds, and most runs need none
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    root, place = Path(folder), device_of(device)
    if weights is None:
        model = load_model(CLIPModel, root, place, PUBLISHED)
    else:
        check_settings(root, PUBLISHED)
        file = require_file(Path(weights), HPS)
        model = CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True))
        try:
            assign_weights(model, from_open_clip(read_tensors(file)))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        model = ready(model, file, place)
    check_tokenizer(root / "tokenizer_config.json")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return ClipModel(model, tokenizer, CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True), place)


class ClipScore:
    """The CLIP score (arXiv 2104.08718): 100 times the cosine between an image and its caption, and scores of its kind.

    Published CLIP scores are of ViT-L/14, if nothing else is said. HPSv2 (arXiv 2306.09341) is this number with its own weights.
    PickScore (arXiv 2305.01569) is the cosine times the factor that its model learned.

    Args:
        folder: `config.json`, `model.safetensors`, and the files of tokenizer and image processor.
        device: of the model; None for CUDA where there is one.
        weights: a file in open_clip's layout, as HPSv2 is published, in the place of `model.safetensors`. Images must be
            square then: HPSv2's program pads others, which the folder's processor crops.
        factor: `hundred`, or the `learned` one, exp(logit_scale).
    """

    needs_captions = True

    def __init__(
        self,
        folder: str,
        device: str | None = None,
        weights: str | None = None,
        factor: Literal["hundred", "learned"] = "hundred",
    ) -> None:
        self.factor = factor
        check_fields(self, factor=one_of("hundred", "learned"))
        self.clip, self.square = load_clip(folder, device, weights), weights is not None
        file = Path(weights) if weights else Path(folder) / "model.safetensors"
        chosen = {} if factor == "hundred" else {"factor": factor}
        self.identity: Mapping[str, Any] = {**identity_of(Path(folder), file), **chosen}

    def __call__(self, images: Images, captions: Sequence[str]) -> Float[Tensor, "batch"]:
        """The cosine of each pair times the factor, on the CPU."""
        if self.square and images.shape[2] != images.shape[3]:
            raise ValueError(f"HPSv2 scores square images here, got {images.shape[2]}x{images.shape[3]} pixels")
        cosines = torch.cosine_similarity(self.clip.embed_images(images), self.clip.embed_texts(captions))
        return ((self.clip.model.logit_scale.exp() if self.factor == "learned" else 100) * cosines).cpu()


class ClipQuality:
    """CLIP-IQA (arXiv 2207.12396): the share of "Good photo." against "Bad photo.", from 0 to 1, without a caption.

    The paper's own network is CLIP's ResNet-50 without embeddings of positions, which transformers has no class for. What
    papers on quantization print is torchmetrics' number with openai/clip-vit-large-patch14, which this is.
    """

    needs_captions = False

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.clip = load_clip(folder, device)
        self.identity: Mapping[str, Any] = {
            **identity_of(Path(folder), Path(folder) / "model.safetensors"),
            "texts": list(QUALITY),
        }
        self.texts = self.clip.embed_texts(QUALITY)

    def __call__(self, images: Images, captions: Sequence[str] = ()) -> Float[Tensor, "batch"]:
        """softmax(100 cos(image, text))[0] of each image, on the CPU."""
        return (100 * self.clip.embed_images(images) @ self.texts.t()).softmax(-1)[:, 0].cpu()
