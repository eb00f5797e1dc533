"""SimCLR's pixel augmentation on batches of tensors, each image with parameters of its own.

Images are [N, C, H, W], float in 0 .. 255; parameters are drawn for one image at a time, on the
CPU (`util_contrastive.draw_parameters`), and used for whole batches, on the device of the images.
Equal to torchvision's functional transforms, except that nothing is rounded in between.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD

LUMA = (0.2989, 0.587, 0.114)  # grey level of R, G, B (ITU-R BT.601, torchvision's digits)

BLUR_RADIUS = 3  # sigmas, rounded up to whole pixels

CPU_PIXELS = 2**14  # of the images processed at once: what caches hold
COMPILED_FROM = 32  # images: smaller batches differ in what they ask for, and each is compiled

# One image's parameters: blends (before hue, after it, and one for greyscale), hue, sigma. A blend
# [own, grey, mean] turns a pixel into own x pixel + grey x its luma + mean x the image's mean luma.
IDENTITY = (1.0, 0.0, 0.0)
BEFORE, AFTER = 3, 4  # blends


def augment(
    crops: Tensor,
    parameters: Tensor,
    means: Sequence[float] = IMAGENET_MEAN,
    stds: Sequence[float] = IMAGENET_STD,
    compiled: bool = False,
) -> Tensor:
    """Jitters colours, greys, blurs and normalises.

    Args:
        crops: uint8 [N, C, H, W], or float32 in 0 .. 255, on any device.
        parameters: [N, 23], on the CPU: operations that no image of the batch needs are skipped
            without asking the device.
        means, stds: of the C channels, in 0 .. 1, to normalise by.
        compiled: on a GPU, batches of `COMPILED_FROM` images or more by few kernels that torch
            makes at the first call.
    Returns:
        float32 [N, C, H, W].
    """
    at_once = max(1, CPU_PIXELS // crops[0, 0].numel())
    if crops.device.type == "cpu" and len(crops) > at_once:
        parts = zip(crops.split(at_once), parameters.split(at_once), strict=True)
        return torch.cat([augment(*part, means, stds) for part in parts])
    work = Work.of(parameters)
    compiled = compiled and crops.is_cuda and len(crops) >= COMPILED_FROM
    run = compiled_run() if compiled else run_all
    return run(crops, parameters.to(crops.device, non_blocking=True), work, means, stds)


class Work(NamedTuple):
    """What a batch of parameters asks for: which blends, hue of some images or of all, and blur."""

    blends: tuple[bool, ...]
    some_hue: bool
    all_hue: bool
    radius: int

    @classmethod
    def of(cls, parameters: Tensor) -> "Work":
        """Of parameters [N, 23] on the CPU."""
        wanted = (parameters[:, :-2].unflatten(1, (-1, 3)) != torch.tensor(IDENTITY)).any(dim=2)
        shifts, sigma = parameters[:, -2].abs(), parameters[:, -1].max().item()
        some_hue, all_hue = bool(shifts.max()), bool(shifts.min())
        radius = math.ceil(BLUR_RADIUS * sigma)
        return cls(tuple(wanted.any(dim=0).tolist()), some_hue, all_hue, radius)


def run_all(
    crops: Tensor, parameters: Tensor, work: Work, means: Sequence[float], stds: Sequence[float]
) -> Tensor:
    """`augment`, once it is known what is to be done: of tensors alone, on one device."""
    blends = parameters[:, :-2].unflatten(1, (-1, 3)).unbind(1)
    shift, sigma = parameters[:, -2:].unbind(1)
    imgs = crops.to(torch.float32, copy=True)
    for i, weights in enumerate(blends):
        if i == BEFORE and work.some_hue:
            shifted = shift_hue(imgs, shift)
            if not work.all_hue:  # a shift of 0 would round: images must not depend on their batch
                shifted = torch.where(shift[:, None, None, None] == 0, imgs, shifted)
            imgs = shifted
        if work.blends[i]:
            imgs = blend(imgs, weights)
    if work.radius:
        imgs = (blur_by_matrix if imgs.is_cuda else blur)(imgs, sigma, work.radius)
    for channel, mean, std in zip(imgs.unbind(1), means, stds, strict=True):
        channel.sub_(255 * mean).mul_(1 / (255 * std))
    return imgs


@cache
def compiled_run() -> Callable:
    """`run_all`, for each kind of work that batches ask for: of large ones nearly always one."""
    return torch.compile(run_all, dynamic=False)


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

    shifted = []
    for opposite in (3, 5, 1):  # the hue at which the channel is at its least
        distance = hue - opposite
        distance.sub_((distance / 6).round_(), alpha=6).abs_()
        shifted.append(torch.addcmul(value, (2 - distance).clamp_(0, 1), chroma, value=-1))
    return torch.stack(shifted, dim=1)


def gaussian(sigma: Tensor, radius: int) -> Tensor:
    """Weights [N, 1 + radius] of a pixel and its neighbours at one side, for deviations [N]."""
    steps = torch.arange(radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp_min(1e-6)[:, None]) ** 2)
    kernel = kernel * (steps <= (BLUR_RADIUS * sigma).ceil()[:, None])
    return kernel / (2 * kernel.sum(dim=1, keepdim=True) - kernel[:, :1])


def blur_by_matrix(imgs: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """`blur` as two products with matrices: on GPUs, a tenth of its traffic for many more FLOPs."""
    radius = min(radius, min(imgs.shape[2:]) - 1)
    kernel = F.pad(gaussian(sigma, radius), (0, 1))  # 0 at every larger distance
    rows, columns = (_band(kernel, side) for side in imgs.shape[2:])
    return rows[:, None] @ (imgs.flatten(1, 2) @ columns.transpose(1, 2)).view_as(imgs)


def _band(kernel: Tensor, side: int) -> Tensor:
    """[N, side, side]: how much each pixel of a line takes from each, reflected at the ends."""
    here = torch.arange(side, device=kernel.device)
    there, last, far = here[:, None], side - 1, kernel.shape[1] - 1
    direct = kernel[:, (here - there).abs().clamp_max(far)]
    first = kernel[:, torch.where(here > 0, (here + there).clamp_max(far), far)]
    second = torch.where(here < last, (2 * last - here - there).clamp_max(far), far)
    return direct + first + kernel[:, second]


def blur(imgs: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur, reflected at the borders.

    Args:
        sigma: each image's deviation [N] in pixels; 0 leaves an image as it is. Kernels reach
            `BLUR_RADIUS` sigma, rounded up to whole pixels.
        radius: the largest kernel's, in pixels; shortened if it reaches past a reflected border.
    """
    radius = min(radius, min(imgs.shape[2:]) - 1)
    taps = gaussian(sigma, radius).T[:, :, None, None, None].unbind(0)

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
