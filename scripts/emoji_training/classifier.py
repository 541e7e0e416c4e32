"""Training of the classifier of emojis' categories that the metrics read their features from."""

import torch
import torch.nn.functional as F
from digits_training.training import Training
from torch import Tensor

from emoji_training.autoencoder import random_shift
from tfmq_exp.denoisers.emoji import EmojiClassifier


class ClassifierTraining(Training):
    """Cross-entropy on shifted and mirrored pictures; accuracy on held-out ones."""

    def __init__(self, steps: int) -> None:
        super().__init__(EmojiClassifier(), steps, weight_decay=5e-2)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        pictures, labels = batch
        flipped = torch.rand(len(pictures), 1, 1, 1) < 0.5
        pictures = random_shift(torch.where(flipped, pictures.flip(3), pictures))
        loss = F.cross_entropy(self.network(pictures).logits, labels, label_smoothing=0.05)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        pictures, labels = batch
        correct = (self.network(pictures).logits.argmax(1) == labels).float().mean()
        self.log("held_out_accuracy", correct, prog_bar=True)
