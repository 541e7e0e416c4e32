"""ImageReward (arXiv 2304.05977): how much people would like an image of a prompt, by BLIP with a small head."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tfmq_exp.core.text_files import read_lines
from tfmq_exp.denoisers.loading.checkpoint import assign_weights, read_tensors
from tfmq_exp.evaluation.model_folder import device_of, identity_of, pixels_of, ready, require_file

WEIGHTS, VOCABULARY = "ImageReward.pt", "vocab.txt"
LENGTH, SIDE, HEAD = 35, 224, 64  # tokens of a prompt; pixels of a side; channels of an attention head
MEAN, DEVIATION = (
    0.16717362830052426,
    1.0333394966054072,
)  # of rewards of the training set: THUDM/ImageReward, ImageReward.py
# Names of the published file, and those of transformers' classes; what begins otherwise is not used by the score.
TOWERS = {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.layers.": "mlp."}
PARTS = {
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.": ".self_attn.",
}
LINEAR = (0, 2, 4, 6, 7)  # layers of the head; between them is dropout, which does nothing here
Shapes = Mapping[str, tuple[int, ...]]


class RewardModel(nn.Module):
    """BLIP's image encoder, its text encoder with cross-attention to the image, and linear layers with nothing between them.

    Sizes are those of the weights; attention has heads of 64 channels, as all of BLIP's have.
    """

    def __init__(self, shapes: Shapes) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel  # here: it takes seconds
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
        vision = BlipVisionConfig(
            image_size=SIDE,
            patch_size=patch,
            layer_norm_eps=1e-6,  # as BLIP's program has it; transformers' default is 1e-5
            intermediate_size=shapes["vision.encoder.layers.0.mlp.fc1.weight"][0],
            **_sizes(width, shapes, "vision.encoder.layers"),
        )
        words, text_width = shapes["text.embeddings.word_embeddings.weight"]
        text = BlipTextConfig(
            vocab_size=words,
            encoder_hidden_size=width,
            max_position_embeddings=shapes["text.embeddings.position_embeddings.weight"][0],
            intermediate_size=shapes["text.encoder.layer.0.intermediate.dense.weight"][0],
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
            **_sizes(text_width, shapes, "text.encoder.layer"),
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        shape = {i: shapes[f"mlp.{i}.weight"] for i in LINEAR}
        self.mlp = nn.Sequential(
            *(nn.Linear(shape[i][1], shape[i][0]) if i in shape else nn.Identity() for i in range(1 + max(LINEAR)))
        )

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Float[Tensor, "batch"]:
        """The reward of each image and prompt, before it is standardized."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "encoder_hidden_states": image}
        return self.mlp(self.text(**given).last_hidden_state[:, 0])[:, 0]


def _sizes(width: int, shapes: Shapes, layers: str) -> dict[str, Any]:
    """Width, number of heads and number of layers of one encoder."""
    count = 1 + max(int(name.removeprefix(layers).split(".")[1]) for name in shapes if name.startswith(f"{layers}."))
    return {"hidden_size": width, "num_attention_heads": width // HEAD, "num_hidden_layers": count}


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `RewardModel` from those of the published file."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        start = next((start for start in TOWERS if name.startswith(start)), None)
        if start is None or name.endswith(".position_ids"):  # projections of pretraining, and a buffer
            continue
        own = TOWERS[start] + name.removeprefix(start)
        for old, new in PARTS.items() if own.startswith("vision.") else ():
            own = own.replace(old, new)
        found[own] = tensor
    return found


class ImageReward:
    """Rewards of images for their prompts: standardized, so that 0 is the mean of the training set, and 1 a deviation above.

    Prompts are cut at 35 tokens, as in the original program.

    Args:
        folder: `ImageReward.pt`, and `vocab.txt` of google-bert/bert-base-uncased.
        device: of the model; None for CUDA where there is one.
    """

    needs_captions = True

    def __init__(self, folder: str, device: str | None = None) -> None:
        from transformers import BertTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        root, self.device = Path(folder), device_of(device)
        weights = require_file(root / WEIGHTS, f"{WEIGHTS} of huggingface.co/THUDM/ImageReward")
        words = root / VOCABULARY
        if not words.is_file():
            raise FileNotFoundError(f"no {words}: put vocab.txt of google-bert/bert-base-uncased there")
        tensors = from_published(read_tensors(weights))
        try:
            model = RewardModel({name: tuple(x.shape) for name, x in tensors.items()})
            assign_weights(model, tensors)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{weights} holds no weights of ImageReward: {error}") from error
        self.model = ready(model, weights, self.device)
        vocabulary = {word: i for i, word in enumerate(read_lines(words))}
        self.tokenizer: Any = BertTokenizer(vocabulary)
        self.processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        self.identity: Mapping[str, Any] = identity_of(root, weights)

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "batch 3 height width"], captions: Sequence[str]
    ) -> Float[Tensor, "batch"]:
        """The reward of each image for its caption, on the CPU."""
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        text = self.tokenizer(list(captions), **options).to(self.device)
        rewards = self.model(pixels_of(self.processor, images, self.device), text["input_ids"], text["attention_mask"])
        return ((rewards - MEAN) / DEVIATION).cpu()
