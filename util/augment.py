"""SimCLR's pixel augmentation on batches of tensors, each image with parameters of its own.

Images are [N, 3, H, W], float in 0 .. 255; parameters are drawn one image at a time, on the CPU,
and used for whole batches, on whichever device holds the images. Equal to torchvision's functional
transforms but for rounding to whole levels in between, which is not done.
"""

import math

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import Tensor

from util.datasets import IMAGENET_MEAN, IMAGENET_STD

LUMA = (0.2989, 0.587, 0.114)  # grey level of R, G, B (ITU-R BT.601, torchvision's digits)

# SimCLR's strengths, as in the public CAN release.
FLIP_P, JITTER_P, GREY_P, BLUR_P = 0.5, 0.8, 0.2, 0.5
JITTER = T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
BLUR_SIGMA = (0.1, 2.0)  # pixels
BLUR_RADIUS = 3  # sigmas, rounded up to whole pixels

# One image's parameters: blends (before hue, after it, and one for greyscale), hue, sigma, flip.
# A blend [own, grey, mean] makes of a pixel: own x pixel + grey x its luma + mean x the image's
# mean luma.
IDENTITY = (1.0, 0.0, 0.0)
BEFORE, AFTER = 3, 4  # blends


def draw_parameters() -> Tensor:
    """One view's parameters [24], from torch's random state, distributed as torchvision's."""
    before, after, hue = [], [], 0.0
    flip = torch.rand(()).item() < FLIP_P
    if torch.rand(()).item() < JITTER_P:
        order, b, c, s, h = JITTER.get_params(
            JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue
        )
        blends = {0: (b, 0.0, 0.0), 1: (c, 0.0, 1 - c), 2: (s, 1 - s, 0.0)}
        slot = before
        for operation in order.tolist():
            if operation == 3:
                hue, slot = h, after
            else:
                slot.append(blends[operation])
    before += [IDENTITY] * (BEFORE - len(before))
    after += [IDENTITY] * (AFTER - 1 - len(after))
    after.append((0.0, 1.0, 0.0) if torch.rand(()).item() < GREY_P else IDENTITY)
    sigma = 0.0
    if torch.rand(()).item() < BLUR_P:
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
    return torch.tensor([v for blend in before + after for v in blend] + [hue, sigma, flip])


def augment(crops: Tensor, parameters: Tensor) -> Tensor:
    """Flips, jitters colours, greys, blurs and normalises.

    Args:
        crops: uint8 [N, 3, H, W], on any device.
        parameters: `draw_parameters`' [N, 24], on the CPU: what no image of the batch wants is
            skipped, without asking the device.
    Returns:
        float32 [N, 3, H, W], normalised by ImageNet's mean and deviation.
    """
    device = crops.device
    wanted = (parameters[:, :-3].unflatten(1, (-1, 3)) != torch.tensor(IDENTITY)).any(dim=2)
    wanted = wanted.any(dim=0).tolist()
    any_hue, max_sigma, any_flip = parameters[:, -3:].abs().amax(dim=0).tolist()
    parameters = parameters.to(device, non_blocking=True)
    blends = parameters[:, :-3].unflatten(1, (-1, 3)).unbind(1)
    hue, sigma, flip = parameters[:, -3:].unbind(1)

    if any_flip:
        crops = torch.where(flip.bool()[:, None, None, None], crops.flip(-1), crops)
    imgs = crops.float()
    for i, weights in enumerate(blends):
        if i == BEFORE and any_hue:
            imgs = shift_hue(imgs, hue)
        if wanted[i]:
            imgs = blend(imgs, weights)
    if max_sigma:
        imgs = blur(imgs, sigma, math.ceil(BLUR_RADIUS * max_sigma))
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return imgs.sub_(mean.to(device, non_blocking=True)).div_(std.to(device, non_blocking=True))


def blend(imgs: Tensor, weights: Tensor) -> Tensor:
    """Brightness, contrast, saturation or greyscale, by each image's weights [N, 3].

    Weights are of the pixel itself, of its luma, and of the image's mean luma.
    """
    own, grey, mean = weights[:, :, None, None, None].unbind(1)
    luma = sum(w * channel for w, channel in zip(LUMA, imgs.split(1, dim=1), strict=True))
    other = grey * luma + mean * luma.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(other, own, imgs).clamp_(0, 255)


def shift_hue(imgs: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by each image's shift [N], in turns of the colour circle."""
    red, green, blue = imgs.unbind(1)
    value = imgs.amax(dim=1)
    chroma = value - imgs.amin(dim=1)
    # Hue in sixths of the circle; where chroma is 0, so are all differences.
    safe = chroma.clamp_min(1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue += 6 * shift[:, None, None]
    shifted = torch.empty_like(imgs)
    for channel, phase in enumerate((5, 3, 1)):
        distance = (hue + phase).remainder_(6)
        share = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.addcmul(value, share, chroma, value=-1, out=shifted[:, channel])
    return shifted


def blur(imgs: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur, reflected at the borders.

    Args:
        sigma: each image's deviation [N] in pixels; 0 leaves an image as it is. Kernels reach
            `BLUR_RADIUS` sigma, rounded up to whole pixels.
        radius: the largest kernel's, in pixels; cut off where it reaches past a reflected border.
    """
    radius = min(radius, min(imgs.shape[2:]) - 1)
    steps = torch.arange(radius + 1, device=imgs.device)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-6)[:, None]) ** 2)
    kernel *= steps <= (BLUR_RADIUS * sigma).ceil()[:, None]
    kernel /= 2 * kernel.sum(dim=1, keepdim=True) - kernel[:, :1]
    taps = kernel.T[:, :, None, None, None].unbind(0)

    # Sums of shifted images: several times faster than a convolution of three channels.
    imgs = F.pad(imgs, (radius,) * 4, mode="reflect")
    for dim in (2, 3):
        size = imgs.shape[dim] - 2 * radius
        blurred = imgs.narrow(dim, radius, size) * taps[0]
        for step in range(1, radius + 1):
            blurred.addcmul_(imgs.narrow(dim, radius - step, size), taps[step])
            blurred.addcmul_(imgs.narrow(dim, radius + step, size), taps[step])
        imgs = blurred
    return imgs
