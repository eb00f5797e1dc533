"""Random crops: of one pixel at least, and the linear probe's."""

import math

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

Box = tuple[int, int, int, int]  # top, left, height and width, in pixels


def at_least_one_pixel(image: Image.Image | torch.Tensor, box: Box) -> Box:
    """A crop's box, which torchvision and timm round to none of an image of very few pixels."""
    _, height, width = TF.get_dimensions(image)
    top, left, tall, wide = box
    return min(top, height - 1), min(left, width - 1), max(tall, 1), max(wide, 1)


class TorchCrop(T.RandomResizedCrop):
    """torchvision's, of one pixel at least."""

    @staticmethod
    def get_params(
        img: Image.Image | torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> Box:
        """A random crop's box."""
        return at_least_one_pixel(img, T.RandomResizedCrop.get_params(img, scale, ratio))


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's with the first draw clipped to the image, where torchvision draws again.

    So do the TensorFlow codebases whose probes MAE compares with (BYOL, Grill et al. 2020).
    """

    @staticmethod
    def get_params(
        img: Image.Image | torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> Box:
        """A random crop's box."""
        _, height, width = TF.get_dimensions(img)
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = math.exp(torch.empty(1).uniform_(*map(math.log, ratio)).item())
        # not below one pixel: a 1 x 1 image's crop would have none
        w = max(1, min(width, round(math.sqrt(area * aspect))))
        h = max(1, min(height, round(math.sqrt(area / aspect))))
        top = torch.randint(0, height - h + 1, (1,)).item()
        left = torch.randint(0, width - w + 1, (1,)).item()
        return top, left, h, w
