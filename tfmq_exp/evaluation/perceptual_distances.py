"""Distances of features of two images: LPIPS (arXiv 1801.03924) by torchmetrics, and one of the digit classifier's features.

LPIPS needs torchvision's weights of AlexNet or VGG16, from a local file; its own linear layers come with torchmetrics.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import lpips as lpips_of_torchmetrics

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.files import sha256_of
from tfmq_exp.core.finite import require_finite_weights
from tfmq_exp.denoisers.loading.checkpoint import read_tensors
from tfmq_exp.evaluation.features import Extractor, digits_extractor
from tfmq_exp.evaluation.image_distances import Images, PerceptualDistance, PerImage

Network = Literal["alex", "vgg"]
RELEASED = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # of download.pytorch.org/models
SMALLEST = {"alex": 31, "vgg": 16}  # pixels of a side, below which a layer has no outputs
BATCH = 16  # images that go through the network together


def load_lpips(path: Path, network: Network) -> torch.nn.Module:
    """LPIPS with the convolutions of a file of torchvision, `.pth` or `.safetensors`; every tensor has to fit.

    Raises:
        FileNotFoundError: no such file; says where it is published.
        ValueError: damaged, refused by `read_tensors`, another network's weights, or weights that are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no weights of LPIPS at {path}{why_missing(path)}: nothing is downloaded; put {RELEASED[network]} of "
            "download.pytorch.org/models there, or name the file that you have"
        )
    found = read_tensors(path)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        model = lpips_of_torchmetrics._NoTrainLpips(net=network, pnet_rand=True)
    # a slice keeps the numbers of torchvision's layers: net.slice2.3.weight is features.3.weight
    own = {name: f"features.{name.split('.', 2)[2]}" for name in model.state_dict() if name.startswith("net.")}
    for name, released in own.items():
        have, expected = found.get(released), model.state_dict()[name]
        if have is None or have.shape != expected.shape or have.dtype is not torch.float32:
            kind = "is missing" if have is None else f"is {have.dtype} {tuple(have.shape)}"
            raise ValueError(
                f"{path} holds weights of another network than {RELEASED[network]}: {released} {kind}, expected float32 "
                f"{tuple(expected.shape)}"
            )
    model.load_state_dict({name: found[released] for name, released in own.items()}, strict=False)
    require_finite_weights(model, f"{path}: the weights")
    return model.eval().requires_grad_(False)


def lpips(weights: str, network: Network, device: str | None = None) -> PerceptualDistance:
    """LPIPS of images of any size; gray ones count as three equal channels.

    Args:
        weights: torchvision's file for ImageNet.
        network: alex or vgg.
        device: of the network; None for CUDA where there is one.
    """
    if network not in RELEASED:
        raise ValueError(f"network must be one of {', '.join(RELEASED)}, got {network!r}")
    path, place = Path(weights), device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_lpips(path, network).to(place)

    def measure(images: Images, exact: Images) -> PerImage:
        if min(images.shape[2:]) < SMALLEST[network]:
            sides = f"{images.shape[3]}x{images.shape[2]}"
            raise ValueError(f"LPIPS ({network}) needs sides of at least {SMALLEST[network]} pixels, got {sides}")
        pairs = zip(images.split(BATCH), exact.split(BATCH), strict=True)
        return torch.cat([model(*map(signed, pair)).flatten() for pair in pairs])

    def signed(images: Images) -> Float[Tensor, "batch 3 height width"]:
        return (images.to(place).float() / 127.5 - 1).expand(-1, 3, -1, -1)

    return PerceptualDistance(f"lpips_{network}", measure, {"weights_sha256": sha256_of(path)})


def digits_distance() -> PerceptualDistance:
    """Distance of the features of the shipped digit classifier, of gray 16x16 images: no LPIPS, and not comparable with it."""
    extractor = digits_extractor()
    return PerceptualDistance(
        "digits_features", lambda images, exact: feature_distances(extractor, images, exact), dict(extractor.identity)
    )


def feature_distances(extractor: Extractor, images: Images, exact: Images) -> PerImage:
    """Squared distance of unit vectors, 0 to 4: mean of that of pooled and that of spatial features."""
    pairs = zip(extractor(images)[:2], extractor(exact)[:2], strict=True)
    unit: Any = torch.nn.functional.normalize
    return torch.stack([(unit(a) - unit(b)).square().sum(1) for a, b in pairs]).mean(0)
