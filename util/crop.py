"""The crop of the linear probe."""

import math

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's with the first draw clipped to the image, where torchvision draws again.

    So do the TensorFlow codebases whose probes MAE compares with (BYOL, Grill et al. 2020).
    """

    @staticmethod
    def get_params(
        img: Image.Image | torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, in pixels."""
        _, height, width = TF.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(*map(math.log, ratio)).item())
        # not below one pixel: a 1 x 1 image's crop would have none
        w = max(1, min(width, round(math.sqrt(area * aspect))))
        h = max(1, min(height, round(math.sqrt(area / aspect))))
        top = torch.randint(0, height - h + 1, (1,)).item()
        left = torch.randint(0, width - w + 1, (1,)).item()
        return top, left, h, w
