"""The CLIP score (arXiv 2104.08718): 100 times the cosine between an image and its caption, by a CLIP model of a folder."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.file_kind import kind_of
from tfmq_exp.core.files import read_json, sha256_of
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.condition_encoders import check_tokenizer
from tfmq_exp.denoisers.loading.network_config import check_code


class ClipScore:
    """A CLIP model in the layout of transformers, with its weights as safetensors.

    Published scores are of ViT-L/14, if nothing else is said. Captions are cut at the length that the model knows.

    Args:
        folder: `config.json`, `model.safetensors`, and the files of tokenizer and image processor.
        device: of the model; None for CUDA where there is one.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        from transformers import CLIPModel, CLIPTokenizer  # here: it takes seconds, and most runs need none
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        root = Path(folder)
        weights = root / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(
                f"no CLIP model at {weights}: nothing is downloaded; put a model there as transformers saves it, with "
                "tokenizer and preprocessor_config.json, such as openai/clip-vit-large-patch14"
            )
        if kind := kind_of(weights):
            raise ValueError(f"{weights} {kind}")
        check_code(root / "config.json", read_json(root / "config.json"))
        check_tokenizer(root / "tokenizer_config.json")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        local: dict[str, Any] = {"local_files_only": True}
        model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
        require_finite_weights(model, f"{weights}: the weights")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, **local)
        self.processor: Any = CLIPImageProcessorPil.from_pretrained(folder, **local)
        settings = hashlib.sha256()  # of the model, the tokenizer and the image processor
        for path in sorted(path for path in root.iterdir() if path.suffix in (".json", ".txt") and path.is_file()):
            settings.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        hashes = {"sha256": sha256_of(weights), "settings_sha256": settings.hexdigest()}
        self.identity: Mapping[str, Any] = {"model": root.resolve().name, **hashes}

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "batch 3 height width"], captions: Sequence[str]
    ) -> Float[Tensor, "batch"]:
        """100 cos(image, caption) for each pair, on the CPU; the CLIP score is their mean, or 0 if that is below."""
        pixels = self.processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model(**text.to(self.device), pixel_values=pixels["pixel_values"].to(self.device))
        return 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).cpu()
