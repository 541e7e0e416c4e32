"""The CLIP score by a tiny model with random weights, saved as transformers saves one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.clip import ClipScore

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a cat", "a dog", "a cat a dog", "dog " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    letters = "acdgot"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "do", "dog</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n")
    transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = len(vocabulary) - 1
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    text |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**options).save_pretrained(path)
    return path


def test_the_score_is_the_models_own_logit_without_its_scale(folder: Path) -> None:
    images = pictures(4, 32, 0)
    metric = ClipScore(str(folder), device="cpu")
    ours = metric(images, CAPTIONS)
    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for i, caption in enumerate(CAPTIONS):
        tokens = tokenizer(caption)["input_ids"]
        tokens = tokens if len(tokens) <= 12 else [*tokens[:11], tokens[-1]]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), pixel_values=pixels[i : i + 1])
            expected = 100 * output.logits_per_image[0, 0] / model.logit_scale.exp()
        assert float(ours[i]) == pytest.approx(float(expected), rel=1e-4), caption
    assert not torch.allclose(ours, metric(images, CAPTIONS[::-1])), "the pairs matter"


def test_weights_are_part_of_the_identity(folder: Path) -> None:
    identity = ClipScore(str(folder), device="cpu").identity
    assert len(identity["sha256"]) == 64
    assert identity["model"] == folder.name


def test_tokenizer_and_preparation_are_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    before = ClipScore(str(folder), device="cpu").identity
    assert ClipScore(str(copy), device="cpu").identity == before
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.5"))
    changed = ClipScore(str(copy), device="cpu").identity
    assert (changed["sha256"], changed != before) == (before["sha256"], True)


def test_a_missing_model_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        ClipScore(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-base-patch32"):
        ClipScore("openai/clip-vit-base-patch32")


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
