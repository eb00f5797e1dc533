"""Reconstructions to look at: clean, masked, and reconstructed images side by side.

    python -m util.visualize --checkpoint output_dir/checkpoint-last.pth --data_path digits \\
        --out reconstructions.png
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid, save_image

from util.args import Parser, number
from util.data.loader import warn_of
from util.data.order import SeededDataset
from util.data.pixels import RGB, Pixels
from util.data.survey import PIXEL_FLAGS, inherit_pixels, settle_pixels
from util.data.transforms import eval_transform
from util.datasets import open_dataset
from util.distributed import is_main_process
from util.errors import UserError
from util.run.checkpoint import load_published
from util.run.launch import launch

PREVIEW_IMAGES = 8
MASK_SEED = 0  # the same patches are removed every time, so that grids compare
MIN_TILE = 112  # pixels; smaller images are magnified


def preview_images(dataset: Dataset, count: int, transform: Callable) -> Tensor:
    """Images [count, C, H, W] spread over a dataset, normalised."""
    data = SeededDataset(dataset, transform, seed=0)
    indices = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    images, _, bad = zip(*(data[0, int(i)] for i in indices), strict=True)
    if is_main_process():
        warn_of({name: reason for name, reason in bad if name})
    return torch.stack(images)


@torch.no_grad()
def reconstruct(model: nn.Module, imgs: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """The images as seen and as reconstructed, both [N, 3, H, W] in normalised pixels.

    In the first, removed patches are grey. In the second, visible patches are the true ones, since
    the model predicts noise there; removed ones are predictions, with per-patch normalisation
    undone.

    Args:
        imgs: [N, 3, H, W], normalised.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[imgs.device] if imgs.is_cuda else []):
        torch.manual_seed(MASK_SEED)
        # Not model(imgs), for which `--compile` would compile the model again.
        parts = model.forward(imgs, mask_ratio=mask_ratio)
    model.train(was_training)

    pred, target = parts["pred"].float(), model.patchify(imgs)
    if model.norm_pix_loss:
        pred = pred * model.patch_std(target) + target.mean(dim=-1, keepdim=True)
    removed = parts["mask"].bool()[:, :, None]
    seen = model.unpatchify(target.masked_fill(removed, 0.0))
    return seen, model.unpatchify(torch.where(removed, pred, target))


def reconstruction_grid(
    model: nn.Module, imgs: Tensor, mask_ratio: float, pixels: Pixels = RGB
) -> Tensor:
    """A uint8 picture [3, H', W']: a column for each image; clean, masked, reconstructed rows.

    Of more than three channels the first three are drawn; of two, the first.
    """
    seen, reconstructed = reconstruct(model, imgs, mask_ratio)
    mean, std = (torch.tensor(v).view(-1, 1, 1).to(imgs) for v in (pixels.mean, pixels.std))
    rows = torch.cat([imgs, seen, reconstructed]) * std + mean
    rows = rows[:, :3] if rows.shape[1] >= 3 else rows[:, :1].expand(-1, 3, -1, -1)
    zoom = math.ceil(MIN_TILE / min(imgs.shape[-2:]))
    rows = rows.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
    grid = make_grid(rows, nrow=len(imgs), padding=4, pad_value=1.0)
    return (grid.clamp(0, 1) * 255).round().byte().cpu()


# fmt: off
def get_args_parser() -> Parser:
    parser = Parser(prog="util.visualize", description="Draw a checkpoint's reconstructions")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a pretraining checkpoint")
    add("--data_path", required=True, help="folder or name of the images, as in pretraining")
    add("--out", default="reconstructions.png", help="the PNG to write")
    add("--mask_ratio", type=number(float, 0, 1),
        help="default: the checkpoint's own, or else MAE's 0.75")
    add("--norm_pix_loss", action="store_true",
        help="how the model was trained, if the checkpoint does not say")
    add("--images", type=number(int, 1), default=PREVIEW_IMAGES, help="how many to draw")
    return parser
# fmt: on


def main(args: argparse.Namespace) -> None:
    from model_mae import model_from_checkpoint  # above util/, as only a command may do

    state = load_published(args.checkpoint)
    model = model_from_checkpoint(state, args.checkpoint, args.norm_pix_loss)
    if not model.reconstruct:
        raise UserError(f"{args.checkpoint} was trained without reconstruction (--weight_mae 0)")
    flags = state.get("args", {})
    mask_ratio = flags.get("mask_ratio", 0.75) if args.mask_ratio is None else args.mask_ratio
    dataset = open_dataset(args.data_path, train=True)
    vars(args).update(dict.fromkeys(PIXEL_FLAGS), in_chans=model.patch_embed.proj.in_channels)
    inherit_pixels(args, flags, args.checkpoint)
    settle_pixels(args, images=dataset)
    pixels, size = Pixels.of(args), model.patch_embed.img_size
    transform = eval_transform(size, 1.0, pixels, flags.get("resize", "crop"))
    imgs = preview_images(dataset, args.images, transform)
    grid = reconstruction_grid(model, imgs, mask_ratio, pixels)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        save_image(grid / 255, args.out)
    except (OSError, ValueError) as error:  # ValueError: no such picture format
        raise UserError(f"cannot write {args.out}: {error}") from None
    print(f"{args.out}: {len(imgs)} images; rows: clean, {mask_ratio:.0%} masked, reconstructed")


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
