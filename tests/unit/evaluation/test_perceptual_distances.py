"""LPIPS against its formula written slowly, with random weights, and what its files may hold."""

from pathlib import Path

import pytest
import torch
import torchmetrics
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.evaluation import pictures
from tfmq_exp.evaluation.image_comparison import ImageComparison
from tfmq_exp.evaluation.perceptual_distances import Network, digits_distance, load_lpips, lpips

# layers whose outputs are compared: each ReLU before a pooling, or after every convolution (lpips of its authors)
TAPPED = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def features_of(network: Network) -> torch.nn.Sequential:
    """The convolutions with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if network == "alex":
            return torchvision.models.alexnet(weights=None).features
        return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])  # without the large classifier


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    paths = {name: folder / f"{name}.safetensors" for name in TAPPED}
    for name, path in paths.items():
        state = {f"features.{key}": value for key, value in features_of(name).state_dict().items()}
        save_file(state | {"classifier.6.bias": torch.zeros(3)}, path)
    return paths


def slow(
    features: torch.nn.Sequential, lins: list[Tensor], tapped: tuple[int, ...], image: Tensor, exact: Tensor
) -> float:
    """Equation 1 of arXiv 1801.03924 for one pair: unit vectors over channels, weighted squares, mean over places."""
    layers, total = features.double(), 0.0
    x, y = (
        (each.double() / 127.5 - 1 - torch.tensor(SHIFT).double().view(3, 1, 1))
        / torch.tensor(SCALE).double().view(3, 1, 1)
        for each in (image, exact)
    )
    for i, layer in enumerate(layers[: tapped[-1] + 1]):
        x, y = layer(x[None])[0], layer(y[None])[0]
        if i in tapped:
            weights = lins[tapped.index(i)]
            unit = [z / (z.square().sum(0, keepdim=True) + 1e-8).sqrt() for z in (x, y)]
            places = (weights.double().view(-1, 1, 1) * (unit[0] - unit[1]).square()).sum(0)
            total += float(places.mean())
    return total


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_its_formula(files: dict[str, Path], network: Network) -> None:
    side = 64 if network == "alex" else 24
    exact, images = pictures(2, side, 0), pictures(2, side, 1)
    images[1] = (exact[1].int() + 3).clamp(max=255).to(torch.uint8)
    measured = lpips(str(files[network]), network, "cpu")
    assert measured.name == f"lpips_{network}"
    released = Path(torchmetrics.__file__).parent / f"functional/image/lpips_models/{network}.pth"
    state = torch.load(released, map_location="cpu", weights_only=True)
    lins = [state[f"lin{i}.model.1.weight"].flatten() for i in range(5)]
    assert all((weights >= 0).all() and weights.sum() > 0 for weights in lins)
    found = measured.measure(images, exact).tolist()
    for value, image, own in zip(found, images, exact, strict=True):
        with torch.no_grad():
            assert value == pytest.approx(slow(features_of(network), lins, TAPPED[network], image, own), rel=1e-3)
    assert found[0] > 3 * found[1] > 0
    assert float(measured.measure(exact, exact).abs().max()) == 0


def test_gray_images_count_as_three_equal_channels(files: dict[str, Path]) -> None:
    measure = lpips(str(files["alex"]), "alex", "cpu").measure
    exact, images = pictures(3, 40, 0, 1), pictures(3, 40, 1, 1)
    coloured = measure(images.expand(-1, 3, -1, -1), exact.expand(-1, 3, -1, -1))
    torch.testing.assert_close(measure(images, exact), coloured)


def test_wrong_files_and_sizes_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79\.pth"):
        load_lpips(tmp_path / "absent.pth", "alex")
    with pytest.raises(
        ValueError, match=r"another network than vgg16-397923af\.pth: features\.0\.weight is torch.float32"
    ):
        load_lpips(files["alex"], "vgg")
    state = load_file(files["alex"])
    del state["features.10.bias"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"features\.10\.bias is missing"):
        load_lpips(tmp_path / "less.safetensors", "alex")
    state["features.10.bias"] = torch.full((256,), torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="the weights"):
        load_lpips(tmp_path / "nan.safetensors", "alex")
    exact, measure = pictures(1, 40, 0)[..., :30], lpips(str(files["alex"]), "alex", "cpu").measure
    with pytest.raises(ValueError, match="at least 31 pixels, got 30x40"):
        measure(exact, exact)


def test_the_global_generator_is_left_as_it_was(files: dict[str, Path]) -> None:
    before = torch.random.get_rng_state()
    load_lpips(files["alex"], "alex")
    assert torch.equal(before, torch.random.get_rng_state())


def test_digits_features_have_their_own_name_and_order_distances() -> None:
    distance = digits_distance()
    exact = pictures(4, 16, 0, 1)
    near = (exact.int() + 2).clamp(max=255).to(torch.uint8)
    compared = [
        ImageComparison((distance,))([(images, exact)]).values for images in (exact, near, pictures(4, 16, 5, 1))
    ]
    same, little, far = (values["digits_features"] for values in compared)
    assert max(same) == pytest.approx(0, abs=1e-6)
    assert all(0 < a < b <= 4 for a, b in zip(little, far, strict=True))
