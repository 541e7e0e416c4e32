"""What holds for every source, and the files that choose them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from tfmq_exp.data.digits import DigitsImages, load_images
from tfmq_exp.data.image_dataset import ImageDataset

CONF = Path(__file__).parents[3] / "conf"


def test_digits_are_all_of_scikit_learns_in_its_order() -> None:
    source = DigitsImages()
    (found,) = source.batches(2000)
    assert found.shape == (len(source), *source.shape) == (1797, 1, 16, 16)
    assert torch.cat(list(source.batches(100))).equal(found)
    pixels, labels = load_digits(return_X_y=True)
    originals = pixels.reshape(-1, 8, 8)  # 0 .. 16
    means = found.float().unflatten(-1, (8, 2)).unflatten(-3, (8, 2)).mean((-1, -3)).squeeze(1).numpy() / 255 * 16
    # two by two, an enlarged digit is nearly the original
    assert np.abs(means - originals).mean() < 1
    others = np.abs(np.roll(means, 1, axis=0) - originals).mean(axis=(1, 2))
    assert (np.abs(means - originals).mean(axis=(1, 2)) < others).all()
    assert load_images()[1].tolist() == labels.tolist()


def test_a_batch_without_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image, got 0"):
        DigitsImages().batches(0)


def chosen(name: str, data: Path, **values: object) -> ImageDataset:
    """The source that a file of conf/data/ chooses."""
    cfg = OmegaConf.create({"paths": {"data": str(data)}, "data": OmegaConf.load(CONF / f"data/{name}.yaml")})
    cfg.data.update(values)
    return instantiate(cfg.data)


FOLDERS = {"celebahq": "celebahq", "ffhq": "ffhq", "imagenet": "imagenet", "coco": "coco/val2014"}


@pytest.mark.parametrize("name", FOLDERS)
def test_files_of_folders_choose_what_they_say(name: str, tmp_path: Path) -> None:
    with pytest.raises(InstantiationException, match=r"FileNotFoundError.*https://\S+ \(nothing is downloaded\)"):
        chosen(name, tmp_path)
    folder = tmp_path / FOLDERS[name]
    folder.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)).save(folder / "1.jpg")
    source = chosen(name, tmp_path)
    assert next(source.batches(1)).shape == (1, *source.shape)
    assert source.shape[1] == (512 if name == "coco" else 256)
    assert json.loads(json.dumps(source.identity)) == source.identity


@pytest.mark.parametrize("name", ["cifar10", "lsun_bedroom", "lsun_church"])
def test_files_of_archives_say_what_belongs_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(InstantiationException, match=r"FileNotFoundError.*https://\S+.* \(nothing is downloaded\)"):
        chosen(name, tmp_path)


def test_any_folder_can_be_chosen_by_its_path_and_size(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = chosen("image_folder", tmp_path / "nowhere", path=str(tmp_path), size=8)
    assert (len(source), source.shape) == (1, (3, 8, 8))


def test_every_file_says_what_to_put_where() -> None:
    files = sorted((CONF / "data").glob("*.yaml"))
    assert {file.stem for file in files} >= {
        "digits",
        "cifar10",
        "lsun_bedroom",
        "lsun_church",
        "image_folder",
        "statistics",
        *FOLDERS,
    }
    assert all(file.read_text().startswith("# ") for file in files)
