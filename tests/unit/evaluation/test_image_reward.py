"""ImageReward with tiny random weights in its published layout, against BLIP's arithmetic written out in double precision."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.image_reward import ImageReward

pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "##s", "."]
CAPTIONS = ["a cat", "A dogs.", "a bird"]
TOKENS = [[2, 4, 5, 3], [2, 4, 6, 7, 8, 3], [2, 4, 1, 3]]
WIDTH, TEXT, PATCH, LAYERS = 64, 128, 56, 2  # one head of 64 channels, and two
State = dict[str, Tensor]


def linear(state: State, name: str, shape: tuple[int, ...]) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 0.2 * torch.randn(shape), 0.2 * torch.randn(shape[0])


def norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)


@pytest.fixture(scope="module")
def state() -> State:
    found: State = {}
    image, text = "blip.visual_encoder", "blip.text_encoder"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found[f"{image}.cls_token"] = torch.randn(1, 1, WIDTH)
        found[f"{image}.pos_embed"] = torch.randn(1, 17, WIDTH)
        linear(found, f"{image}.patch_embed.proj", (WIDTH, 3, PATCH, PATCH))
        norm(found, f"{image}.norm", WIDTH)
        found[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
        found[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, TEXT)
        found[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(40, TEXT)
        norm(found, f"{text}.embeddings.LayerNorm", TEXT)
        for i in range(LAYERS):
            block, layer = f"{image}.blocks.{i}", f"{text}.encoder.layer.{i}"
            for name, shape in (("attn.qkv", (3 * WIDTH, WIDTH)), ("attn.proj", (WIDTH, WIDTH))):
                linear(found, f"{block}.{name}", shape)
            for name, shape in (("mlp.fc1", (96, WIDTH)), ("mlp.fc2", (WIDTH, 96))):
                linear(found, f"{block}.{name}", shape)
            for name in ("norm1", "norm2"):
                norm(found, f"{block}.{name}", WIDTH)
            for kind, given in (("attention", TEXT), ("crossattention", WIDTH)):
                linear(found, f"{layer}.{kind}.self.query", (TEXT, TEXT))
                linear(found, f"{layer}.{kind}.self.key", (TEXT, given))
                linear(found, f"{layer}.{kind}.self.value", (TEXT, given))
                linear(found, f"{layer}.{kind}.output.dense", (TEXT, TEXT))
                norm(found, f"{layer}.{kind}.output.LayerNorm", TEXT)
            linear(found, f"{layer}.intermediate.dense", (80, TEXT))
            linear(found, f"{layer}.output.dense", (TEXT, 80))
            norm(found, f"{layer}.output.LayerNorm", TEXT)
        for i, shape in ((0, (12, TEXT)), (2, (6, 12)), (4, (5, 6)), (6, (4, 5)), (7, (1, 4))):
            linear(found, f"mlp.layers.{i}", shape)
        linear(found, "blip.vision_proj", (8, WIDTH))  # of pretraining
    return found


@pytest.fixture(scope="module")
def folder(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    torch.save(state, path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence, a head of 64 channels at a time."""
    heads = [
        torch.softmax(a @ b.t() / 8, dim=1) @ c
        for a, b, c in zip(q.split(64, 1), k.split(64, 1), v.split(64, 1), strict=True)
    ]
    return torch.cat(heads, dim=1)


def reward(state: State, pixels: Tensor, tokens: list[int]) -> float:
    """The reward of one image and one prompt."""
    w = {name: x.double() for name, x in state.items() if x.is_floating_point()}

    def lin(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def normed(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    kernel = w[f"{image}.patch_embed.proj.weight"].flatten(1)
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = patches @ kernel.t() + w[f"{image}.patch_embed.proj.bias"]
    x = torch.cat([w[f"{image}.cls_token"][0], x]) + w[f"{image}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{image}.blocks.{i}"
        q, k, v = lin(normed(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, 1)
        x = x + lin(attend(q, k, v), f"{block}.attn.proj")
        x = x + lin(F.gelu(lin(normed(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    x = normed(x, f"{image}.norm", 1e-6)
    y = w[f"{text}.embeddings.word_embeddings.weight"][tokens]
    y = y + w[f"{text}.embeddings.position_embeddings.weight"][: len(tokens)]
    y = normed(y, f"{text}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            given = y if kind == "attention" else x
            q, k, v = (lin(z, f"{layer}.{kind}.self.{n}") for z, n in ((y, "query"), (given, "key"), (given, "value")))
            out = lin(attend(q, k, v), f"{layer}.{kind}.output.dense")
            y = normed(y + out, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        out = lin(F.gelu(lin(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        y = normed(y + out, f"{layer}.output.LayerNorm", 1e-12)
    z = y[0]
    for i in (0, 2, 4, 6, 7):
        z = lin(z, f"mlp.layers.{i}")
    return (float(z) - 0.16717363) / 1.0333395


def test_rewards_are_blips(folder: Path, state: State) -> None:
    images = pictures(3, 224, 0)
    ours = ImageReward(str(folder), device="cpu")(images, CAPTIONS)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).double()
    pixels = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = [reward(state, x, tokens) for x, tokens in zip(pixels, TOKENS, strict=True)]
    assert ours.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 3


def test_long_prompts_are_cut_at_35_tokens(folder: Path) -> None:
    metric, images = ImageReward(str(folder), device="cpu"), pictures(1, 64, 0)
    long = "cat " * 33
    assert torch.equal(metric(images, [long]), metric(images, [long + "dog " * 9]))
    assert not torch.equal(metric(images, [long]), metric(images, ["cat " * 32]))


def test_missing_and_foreign_files(folder: Path, state: State, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"put ImageReward.pt of huggingface.co/THUDM/ImageReward there"):
        ImageReward(str(tmp_path))
    torch.save({name: x for name, x in state.items() if "mlp.layers.4" not in name}, tmp_path / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"put vocab.txt of google-bert/bert-base-uncased there"):
        ImageReward(str(tmp_path))
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    with pytest.raises(ValueError, match=r"ImageReward.pt holds no weights of ImageReward"):
        ImageReward(str(tmp_path))
    torch.save({"a": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward.pt holds no weights of ImageReward: 'vision"):
        ImageReward(str(tmp_path))
