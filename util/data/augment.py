"""SimCLR's pixel augmentation on batches of tensors, each image with parameters of its own.

Images are [N, C, H, W], float in 0 .. 255; parameters are drawn for one image at a time, on the
CPU (`util_contrastive.draw_parameters`), and used for whole batches, on the device of the images.
Equal to torchvision's functional transforms, except that nothing is rounded in between.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD

LUMA = (0.2989, 0.587, 0.114)  # grey level of R, G, B (ITU-R BT.601, torchvision's digits)

BLUR_RADIUS = 3  # sigmas, rounded up to whole pixels

CPU_PIXELS = 2**14  # of the images processed at once: what caches hold

# One image's parameters: blends (before hue, after it, and one for greyscale), hue, sigma. A blend
# [own, grey, mean] turns a pixel into own x pixel + grey x its luma + mean x the image's mean luma.
IDENTITY = (1.0, 0.0, 0.0)
BEFORE, AFTER = 3, 4  # blends


def augment(
    crops: Tensor,
    parameters: Tensor,
    means: Sequence[float] = IMAGENET_MEAN,
    stds: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Jitters colours, greys, blurs and normalises.

    Args:
        crops: uint8 [N, C, H, W], or float32 in 0 .. 255, on any device.
        parameters: [N, 23], on the CPU: operations that no image of the batch needs are skipped
            without asking the device.
        means, stds: of the C channels, in 0 .. 1, to normalise by.
    Returns:
        float32 [N, C, H, W].
    """
    at_once = max(1, CPU_PIXELS // crops[0, 0].numel())
    if crops.device.type == "cpu" and len(crops) > at_once:
        parts = zip(crops.split(at_once), parameters.split(at_once), strict=True)
        return torch.cat([augment(*part, means, stds) for part in parts])
    wanted = (parameters[:, :-2].unflatten(1, (-1, 3)) != torch.tensor(IDENTITY)).any(dim=2)
    wanted = wanted.any(dim=0).tolist()
    least_shift = parameters[:, -2].abs().min().item()
    largest_shift, largest_sigma = parameters[:, -2:].abs().amax(dim=0).tolist()
    parameters = parameters.to(crops.device, non_blocking=True)
    blends = parameters[:, :-2].unflatten(1, (-1, 3)).unbind(1)
    shift, sigma = parameters[:, -2:].unbind(1)

    imgs = crops.to(torch.float32, copy=True)
    for i, weights in enumerate(blends):
        if i == BEFORE and largest_shift:
            shifted = shift_hue(imgs, shift)
            if not least_shift:  # a shift of 0 would round: images must not depend on their batch
                shifted = torch.where(shift[:, None, None, None] == 0, imgs, shifted)
            imgs = shifted
        if wanted[i]:
            imgs = blend(imgs, weights)
    if largest_sigma:
        imgs = blur(imgs, sigma, math.ceil(BLUR_RADIUS * largest_sigma))
    for channel, mean, std in zip(imgs.unbind(1), means, stds, strict=True):
        channel.sub_(255 * mean).mul_(1 / (255 * std))
    return imgs


def blend(imgs: Tensor, weights: Tensor) -> Tensor:
    """Brightness, contrast, saturation or greyscale, by each image's weights [N, 3].

    Weights are of the pixel itself, of its luma, and of the image's mean luma. Where there are not
    three channels, each is its own luma.
    """
    own, grey, mean = weights[:, :, None, None, None].unbind(1)
    if imgs.shape[1] != 3:
        return torch.addcmul(mean * imgs.mean(dim=(2, 3), keepdim=True), own, imgs).clamp_(0, 255)
    red, green, blue = imgs.split(1, dim=1)
    luma = (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    other = torch.addcmul(mean * luma.mean(dim=(2, 3), keepdim=True), grey, luma)
    return torch.addcmul(other, own, imgs).clamp_(0, 255)


def shift_hue(imgs: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue by each image's shift [N], in turns of the colour circle.

    The conversion to HSV and back, without branches and remainders, which are slow.
    """
    red, green, blue = imgs.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)

    # Hue in sixths of the circle; where chroma is 0, so are all differences.
    scale = chroma.clamp_min(1e-6).reciprocal_()
    near_red, near_green, near_blue = (
        torch.add(phase, difference.mul_(scale))
        for phase, difference in ((0, green - blue), (2, blue - red), (4, red - green))
    )
    hue = torch.lerp(near_green, near_blue, (value - green).sign_())
    hue = torch.lerp(near_red, hue, (value - red).sign_()).add_(6 * shift[:, None, None])

    shifted = torch.empty_like(imgs)
    for channel, opposite in enumerate((3, 5, 1)):  # the hue at which the channel is at its least
        distance = hue - opposite
        distance.sub_((distance / 6).round_(), alpha=6).abs_()
        torch.addcmul(value, (2 - distance).clamp_(0, 1), chroma, value=-1, out=shifted[:, channel])
    return shifted


def blur(imgs: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur, reflected at the borders.

    Args:
        sigma: each image's deviation [N] in pixels; 0 leaves an image as it is. Kernels reach
            `BLUR_RADIUS` sigma, rounded up to whole pixels.
        radius: the largest kernel's, in pixels; shortened if it reaches past a reflected border.
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
