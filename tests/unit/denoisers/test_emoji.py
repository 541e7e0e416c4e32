"""The text-to-image model of emojis: diffusers and the project sample its folder alike; what its training learns from."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.emoji import COLOURS, emoji_row, make_package, save_untrained
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.emoji import FOLDER, load_emoji
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.prompt_sets import emoji_prompts
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import trajectory

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from diffusers import StableDiffusionPipeline
from emoji_training.autoencoder import LARGEST_SHIFT, shift
from emoji_training.denoiser import build_scheduler, loss_weights
from emoji_training.pictures import Emoji, held_out_names, load_picture, read_emojis, words
from emoji_training.text import LENGTH, load_tokenizer, tokens_of

PROMPTS = ["red heart", "blue cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("emoji"))


def test_diffusers_gives_the_same_latents(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    expected = pipeline(PROMPTS, latents=noise, **call)[0]
    denoiser, sampling = load_emoji(str(folder)), Sampling(DDIM(4), guidance=3.0)
    given, generators = denoiser.encoder(PROMPTS), [torch.Generator() for _ in PROMPTS]
    x = noise
    for step in trajectory(
        sampling.predictor(denoiser.network), sampling.sampler, denoiser.schedule, noise, generators, given
    ):
        x = step.x_next
    assert expected.std() > 0.1
    assert (x - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_calibration_and_evaluation_share_no_prompt(folder: Path) -> None:
    prompts = emoji_prompts(str(folder))
    evaluated, *others = (
        set(prompts.choose(0, stream, range(100)))
        for stream in (Stream.IMAGES, Stream.CALIBRATION, Stream.CORRECTION, Stream.DIAGNOSTICS)
    )
    assert len(evaluated) == 22
    assert all(len(other) == 8 and not other & evaluated for other in others)


@pytest.mark.bad_input
def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no emoji model at .*nowhere: make it with .*train_emoji.py"):
        load_emoji(str(tmp_path / "nowhere"))


@pytest.mark.bad_input
def test_another_folder_than_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm package emoji-datasource-google"):
        read_emojis(tmp_path)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:32] = (200, 100, 0, 255)
    pixels[48:, :, 3] = 51  # a fifth of black over white
    Image.fromarray(pixels).save(tmp_path / "one.png")
    picture = load_picture(tmp_path / "one.png")
    colours = [picture[:, row].unique(dim=1).flatten().tolist() for row in (8, 40, 56)]
    assert colours == [[200, 100, 0], [255, 255, 255], [204, 204, 204]]


def test_names_are_lower_case_words_and_parts_are_left_out(tmp_path: Path) -> None:
    assert words("KEYCAP: 2, Face-Palm’s") == "keycap 2 face palm s"
    rows = [emoji_row("HEAVY BLACK HEART", "0.png"), emoji_row("LIGHT SKIN TONE", "1.png", "Component")]
    (tmp_path / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [emoji.name for emoji in read_emojis(tmp_path)] == ["red heart"]


def test_words_of_held_out_names_occur_in_other_names(tmp_path: Path) -> None:
    emojis = read_emojis(make_package(tmp_path / "package"))
    held_out = held_out_names(emojis, count=2)
    seen = {word for emoji in emojis if emoji.name not in held_out for word in emoji.name.split()}
    assert len(held_out) == 2
    assert all(set(name.split()) <= seen for name in held_out)


@pytest.mark.parametrize(
    ("name", "category", "mirrored"),
    [("red apple", "Food & Drink", True), ("man facing right", "People & Body", False), ("on", "Symbols", False)],
)
def test_what_has_a_side_is_not_mirrored(name: str, category: str, mirrored: bool) -> None:
    assert Emoji(Path(), name, name, category, "").mirrored is mirrored


def test_a_shift_is_that_of_each_picture() -> None:
    pictures = torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8)
    offsets = torch.tensor([[0, 0], [2, -3], [-LARGEST_SHIFT, LARGEST_SHIFT]])
    for picture, moved, (rows, columns) in zip(pictures, shift(pictures, offsets), offsets.tolist(), strict=True):
        expected = torch.full_like(picture, 255)
        for row in range(64):
            for column in range(64):
                if 0 <= row - rows < 64 and 0 <= column - columns < 64:
                    expected[:, row, column] = picture[:, row - rows, column - columns]
        assert torch.equal(moved, expected)


def test_weights_are_one_in_the_noise_and_small_near_the_image() -> None:
    alphas = build_scheduler().alphas_cumprod
    weights = loss_weights(alphas, torch.arange(1000))
    ratio = alphas.double() / (1 - alphas.double())
    assert torch.equal(weights[ratio < 5], torch.ones(int((ratio < 5).sum())))
    assert float(weights[0]) == pytest.approx(5 / float(ratio[0]), rel=1e-4)


def test_words_are_tokens_and_captions_have_one_length(tmp_path: Path) -> None:
    texts = [f"{colour} {thing}" for colour in COLOURS for thing in ("heart", "cat")]
    tokenizer = load_tokenizer(texts, tmp_path)
    assert tokenizer.tokenize("red heart cat") == ["red</w>", "heart</w>", "cat</w>"]
    tokens = tokens_of(tokenizer, ["red heart", "", " ".join(["cat"] * 40)])
    assert tokens.shape == (3, LENGTH)
    assert torch.equal(tokens, tokens_of(load_tokenizer([], tmp_path), ["red heart", "", " ".join(["cat"] * 40)]))


@pytest.mark.skipif(not FOLDER.exists(), reason="the model is not shipped yet")
def test_the_shipped_model_is_that_of_its_record_and_small() -> None:
    record = json.loads((FOLDER / "record.json").read_text(encoding="utf-8"))
    assert load_emoji().network.num_parameters() == record["parameters"]["unet"]
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 10e6
