"""Training of the digits classifier that the offline metrics read their features from."""

import torch
import torch.nn.functional as F
from torch import Tensor

from digits_training.training import Training
from tfmq_exp.denoisers.digits import DigitClassifier


class ClassifierTraining(Training):
    """Cross-entropy on randomly shifted, scaled and noised digits; accuracy on the held-out ones."""

    def __init__(self, steps: int) -> None:
        super().__init__(DigitClassifier(), steps, weight_decay=1e-2)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(augment(images)).logits, labels, label_smoothing=0.05)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        correct = (self.network(images).logits.argmax(1) == labels).float().mean()
        self.log("held_out_accuracy", correct, prog_bar=True)


def augment(images: Tensor) -> Tensor:
    """Random affine jitter: shift up to 1.5 pixels, rotation up to 12 degrees, scale within 10 %; uint8 in and out."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 2 * 12 * torch.pi / 180
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 2 * 1.5 / 8
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)
