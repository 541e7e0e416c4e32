"""Images with an isolated wrong pixel: a pixel of the initial noise that the network did not see as it was, and left."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad, unfold

GREY_LEVELS = 60  # by which an isolated pixel is outside the range of its eight neighbours


def isolated_pixels(images: UInt8[Tensor, "images channels height width"]) -> int:
    """Number of images with a pixel far brighter, or far darker, than all of its neighbours in the same channel.

    Smooth images have none; for textures compare the number with that of the float network's images.
    """
    planes = images.flatten(0, 1)[:, None].float()
    around = unfold(pad(planes, (1, 1, 1, 1), value=torch.nan), 3).unflatten(1, (1, 9))[:, 0]
    others = torch.cat([around[:, :4], around[:, 5:]], dim=1)
    brighter = around[:, 4] - others.nan_to_num(-torch.inf).amax(1)
    darker = others.nan_to_num(torch.inf).amin(1) - around[:, 4]
    found = (torch.maximum(brighter, darker) > GREY_LEVELS).any(1)
    return int(found.view(len(images), -1).any(1).sum())
