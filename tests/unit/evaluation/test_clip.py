"""Scores of a tiny CLIP model with random weights: against the model's own logits, open_clip's layout, and torchmetrics."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.clip_folder import save_clip
from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.clip import ClipQuality, ClipScore

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a cat", "a dog", "a cat a dog", "dog " * 40]
MEAN, STD = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def tokens_of(folder: Path, caption: str) -> Tensor:
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(caption)["input_ids"]
    return torch.tensor([tokens if len(tokens) <= 12 else [*tokens[:11], tokens[-1]]])


def pixels_of(images: Tensor) -> Tensor:
    return (images / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


@pytest.mark.parametrize("factor", ["hundred", "learned"])
def test_the_score_is_the_models_own_logit(folder: Path, factor: Literal["hundred", "learned"]) -> None:
    """PickScore is the logit itself, the CLIP score the logit with 100 in the place of its scale."""
    images = pictures(4, 32, 0)
    metric = ClipScore(str(folder), device="cpu", factor=factor)
    ours = metric(images, CAPTIONS)
    model = transformers.CLIPModel.from_pretrained(folder)
    for i, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            output = model(input_ids=tokens_of(folder, caption), pixel_values=pixels_of(images)[i : i + 1])
            expected = output.logits_per_image[0, 0]
            expected = expected if factor == "learned" else 100 * expected / model.logit_scale.exp()
        assert float(ours[i]) == pytest.approx(float(expected), rel=1e-4), caption
    assert not torch.allclose(ours, metric(images, CAPTIONS[::-1])), "the pairs matter"


class Block(nn.Module):
    """A residual block as open_clip names its parts: one matrix for query, key and value, from torch's own attention."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.causal = nn.LayerNorm(width), nn.LayerNorm(width), causal
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 32), "c_proj": nn.Linear(32, width)})

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1) if self.causal else None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))  # CLIP's own GELU, as the folder says


class Tower(nn.Module):
    def __init__(self, positions: int, causal: bool) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(positions, 16))
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(Block(16, causal) for _ in range(2)))})


class OpenClip(Tower):
    """A two-tower model whose tensors have open_clip's names, in double precision."""

    def __init__(self) -> None:
        super().__init__(12, causal=True)
        self.visual = Tower(17, causal=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(16))
        self.visual.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.visual.proj = nn.Parameter(torch.randn(16, 8))
        self.token_embedding, self.ln_final = nn.Embedding(18, 16), nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for parameter in self.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        self.double()

    def cosine(self, pixels: Tensor, tokens: Tensor) -> float:
        own: Any = self.visual
        x = own.conv1(pixels.double()).flatten(2).transpose(1, 2)
        x = torch.cat([own.class_embedding.expand(1, 1, -1), x], dim=1) + own.positional_embedding
        x = own.ln_post(own.transformer["resblocks"](own.ln_pre(x))[:, 0]) @ own.proj
        y = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        y = self.ln_final(self.transformer["resblocks"](y)[:, -1]) @ self.text_projection
        return float(torch.cosine_similarity(x, y))


@pytest.fixture(scope="module")
def hps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenClip, Path]:
    """A model, and its file as HPSv2 publishes it: a state dict of half precision below another key."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = OpenClip()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half())
    path = tmp_path_factory.mktemp("hps") / "HPS.pt"
    torch.save({"epoch": 1, "state_dict": {name: x.half() for name, x in model.state_dict().items()}}, path)
    return model, path


def test_weights_in_open_clips_layout(folder: Path, hps: tuple[OpenClip, Path]) -> None:
    model, path = hps
    images = pictures(4, 32, 0)
    ours = ClipScore(str(folder), device="cpu", weights=str(path))(images, CAPTIONS)
    with torch.no_grad():
        pairs = zip(pixels_of(images), CAPTIONS, strict=True)
        expected = [100 * model.cosine(pixels[None], tokens_of(folder, caption)) for pixels, caption in pairs]
    assert ours.tolist() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="square images here, got 32x40"):
        ClipScore(str(folder), device="cpu", weights=str(path))(torch.zeros(1, 3, 32, 40, dtype=torch.uint8), ["a cat"])


def test_weights_of_another_size(folder: Path, hps: tuple[OpenClip, Path], tmp_path: Path) -> None:
    state = {name: x for name, x in hps[0].state_dict().items() if "resblocks.1" not in name}
    torch.save(state, tmp_path / "few.pt")
    with pytest.raises(ValueError, match=r"few.pt: the weights do not fit the architecture: \d+ missing"):
        ClipScore(str(folder), device="cpu", weights=str(tmp_path / "few.pt"))
    with pytest.raises(FileNotFoundError, match=r"no none.pt at .*: nothing is downloaded; put HPS_v2.1_compressed.pt"):
        ClipScore(str(folder), device="cpu", weights=str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="factor must be"):
        ClipScore(str(folder), device="cpu", factor="none")  # pyright: ignore[reportArgumentType]


def test_quality_is_torchmetrics_own(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchmetrics' arithmetic on the same folder; its way to the features is of an older transformers."""
    import torchmetrics.functional.multimodal.clip_iqa as reference

    close = tmp_path / "clip"
    shutil.copytree(folder, close)
    model = transformers.CLIPModel.from_pretrained(folder)
    model.text_model.final_layer_norm.weight.data.mul_(0.01)  # random weights put the two texts far apart
    model.save_pretrained(close)

    class Plain(transformers.CLIPModel):
        def get_text_features(self, *given: Any) -> Tensor:
            return super().get_text_features(*given).pooler_output

        def get_image_features(self, *given: Any) -> Tensor:
            return super().get_image_features(*given).pooler_output

    def load(path: str) -> tuple[Any, Any]:
        return Plain.from_pretrained(path), transformers.CLIPProcessor.from_pretrained(path)

    monkeypatch.setattr(reference, "_get_clip_model_and_processor", load)
    images = pictures(4, 32, 0)
    name: Any = str(close)
    expected = reference.clip_image_quality_assessment(images.float(), name)
    ours = ClipQuality(str(close), device="cpu")(images)
    assert isinstance(expected, Tensor)
    assert torch.allclose(ours, expected, rtol=1e-4)
    assert float(expected.max() - expected.min()) > 0.01


def identities(folder: Path) -> Sequence[object]:
    return [ClipScore(str(folder), device="cpu").identity, ClipQuality(str(folder), device="cpu").identity]


def test_weights_tokenizer_and_preparation_are_part_of_the_identity(
    folder: Path, hps: tuple[OpenClip, Path], tmp_path: Path
) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    before = identities(folder)
    assert identities(copy) == before
    score = ClipScore(str(folder), device="cpu").identity
    assert (len(score["sha256"]), score["model"]) == (64, folder.name)
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.5"))
    changed = ClipScore(str(copy), device="cpu").identity
    assert (changed["sha256"], changed != score) == (score["sha256"], True)
    learned = ClipScore(str(folder), device="cpu", factor="learned").identity
    others = [learned, ClipScore(str(folder), device="cpu", weights=str(hps[1])).identity]
    assert len({str(identity) for identity in (score, *others, before[1])}) == 4


def test_a_missing_model_is_not_downloaded(tmp_path: Path) -> None:
    for kind in (ClipScore, ClipQuality):
        with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
            kind(str(tmp_path))
        with pytest.raises(FileNotFoundError, match="yuvalkirstain/PickScore_v1"):
            kind("openai/clip-vit-base-patch32")


def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "clip")
    tensors = load_file(copy / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model.safetensors lacks 1 weights of a CLIPModel, first text_projection.weight"
    ):
        ClipScore(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "key"),
    [
        ("config.json", {"_attn_implementation": "kernels-community/flash-attn2"}, "_attn_implementation"),
        ("config.json", {"text_config": {"_attn_implementation_internal": "someone/kernels"}}, "_attn_implementation"),
        ("config.json", {"auto_map": {"AutoModel": "someone/code--model.Model"}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "someone/code--t.T"}}, "auto_map"),
    ],
)
def test_nothing_in_its_folder_names_code(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, object], key: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "clip")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    with pytest.raises(ValueError, match=rf"{file}: {key}.* is refused"):
        ClipScore(str(copy), device="cpu")
