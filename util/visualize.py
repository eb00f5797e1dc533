"""Pictures to look at: reconstructions, nearest neighbours, patch features, attention, curves.

    python -m util.visualize --checkpoint output_dir/checkpoint-last.pth --data_path digits \\
        --out reconstructions.png
    python -m util.visualize --what neighbours --checkpoint ... --data_path ...
    python -m util.visualize --what curves --runs my_run my_other_run
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid

from util.args import Parser, number
from util.data.loader import warn_of
from util.data.order import SeededDataset
from util.data.pixels import RGB, Pixels
from util.data.survey import PIXEL_FLAGS, inherit_pixels, settle_pixels
from util.data.transforms import eval_transform
from util.datasets import open_dataset
from util.distributed import is_main_process
from util.encoders import Encoder
from util.errors import UserError
from util.files import written_whole
from util.pictures import attention_sheet, curves, neighbour_sheet, pca_sheet
from util.run.checkpoint import load_published
from util.run.launch import launch

PREVIEW_IMAGES = 8
AMONG, CHUNK = 2000, 64  # images to look for neighbours in; encoded at once
MASK_SEED = 0  # the same patches are removed every time, so that grids compare
MIN_TILE = 112  # pixels; smaller images are magnified

Drawn = tuple[Image.Image, str]  # a picture, and what it shows


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
) -> Image.Image:
    """A column for each image; clean, masked, reconstructed rows.

    Of more than three channels the first three are drawn; of two, the first.
    """
    seen, reconstructed = reconstruct(model, imgs, mask_ratio)
    mean, std = (torch.tensor(v).view(-1, 1, 1).to(imgs) for v in (pixels.mean, pixels.std))
    rows = torch.cat([imgs, seen, reconstructed]) * std + mean
    rows = rows[:, :3] if rows.shape[1] >= 3 else rows[:, :1].expand(-1, 3, -1, -1)
    zoom = math.ceil(MIN_TILE / min(imgs.shape[-2:]))
    rows = rows.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
    grid = make_grid(rows, nrow=len(imgs), padding=4, pad_value=1.0)
    grid = (grid.clamp(0, 1) * 255).round().byte().cpu()
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


# fmt: off
def get_args_parser() -> Parser:
    parser = Parser(prog="util.visualize", description="Draw what a checkpoint learnt",
                    check=check_flags)
    add = parser.add_argument
    add("--what", choices=tuple(DRAW), default="reconstructions", help="of a pretraining "
        "checkpoint, its reconstructions; of any encoder, nearest neighbours, patch features' "
        "first components as colours, or where the cls token looks; or the curves of --runs")
    add("--checkpoint", help="of any layout that --init takes")
    add("--data_path", help="folder or name of the images, as in pretraining")
    add("--runs", nargs="+", default=[], metavar="FOLDER", help="of log.txt's, for curves")
    add("--out", help="the PNG to write; default: WHAT.png")
    add("--mask_ratio", type=number(float, 0, 1),
        help="default: the checkpoint's own, or else MAE's 0.75")
    add("--norm_pix_loss", action="store_true",
        help="how the model was trained, if the checkpoint does not say")
    add("--images", type=number(int, 1), default=PREVIEW_IMAGES, help="how many to draw")
    add("--among", type=number(int, 2), default=AMONG, help="images to look for neighbours in")
    return parser
# fmt: on


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where flags are missing."""
    wanted = ("runs",) if args.what == "curves" else ("checkpoint", "data_path")
    if missing := [f"--{name}" for name in wanted if not getattr(args, name)]:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    args.out = args.out or f"{args.what}.png"
    args.device = "cuda" if torch.cuda.is_available() else "cpu"


def main(args: argparse.Namespace) -> None:
    kind = Image.registered_extensions().get(Path(args.out).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"--out {args.out}: the name must end as a picture's, such as .png")
    picture, words = DRAW[args.what](args)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(args.out) as temporary:
            picture.save(temporary, kind)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {words}")


def draw_reconstructions(args: argparse.Namespace) -> Drawn:
    from model_mae import model_from_checkpoint  # above util/, as only a command may do

    state = load_published(args.checkpoint)
    model = model_from_checkpoint(state, args.checkpoint, args.norm_pix_loss)
    if not model.reconstruct:
        raise UserError(f"{args.checkpoint} was trained without reconstruction (--weight_mae 0)")
    flags = state.get("args", {})
    mask_ratio = flags.get("mask_ratio", 0.75) if args.mask_ratio is None else args.mask_ratio
    imgs, pixels = images_of(args, state, model.patch_embed, args.images)
    model, imgs = model.to(args.device), imgs.to(args.device)
    words = f"{len(imgs)} images; rows: clean, {mask_ratio:.0%} masked, reconstructed"
    return reconstruction_grid(model, imgs, mask_ratio, pixels), words


def draw_neighbours(args: argparse.Namespace) -> Drawn:
    encoder, imgs, pixels = encoder_and_images(args, args.among)
    features = torch.cat([encoder(some.to(args.device))[1] for some in imgs.split(CHUNK)])
    picture = neighbour_sheet(imgs.__getitem__, features, args.images, pixels)
    drawn = min(args.images, len(imgs))
    return picture, f"{drawn} images, and the nearest of {len(imgs)} by the mean over patches"


def draw_pca(args: argparse.Namespace) -> Drawn:
    encoder, imgs, pixels = encoder_and_images(args, args.images)
    words = "colours: the first three principal components of patches"
    words += ", less each place's mean" if len(imgs) > 1 else ""
    return pca_sheet(encoder, imgs.to(args.device), pixels), f"{len(imgs)} images; {words}"


def draw_attention(args: argparse.Namespace) -> Drawn:
    encoder, imgs, pixels = encoder_and_images(args, args.images)
    words = "where the cls token of the last block looks, by head"
    return attention_sheet(encoder, imgs.to(args.device), pixels), f"{len(imgs)} images; {words}"


def draw_curves(args: argparse.Namespace) -> Drawn:
    picture, count = curves(args.runs)
    return picture, f"{count} curves of {len(args.runs)} runs"


def encoder_and_images(args: argparse.Namespace, count: int) -> tuple[Encoder, Tensor, Pixels]:
    """The encoder, on the device, and images on the CPU."""
    state = load_published(args.checkpoint)
    encoder = Encoder(state, args.checkpoint)
    return encoder.to(args.device), *images_of(args, state, encoder.vit.patch_embed, count)


def images_of(
    args: argparse.Namespace, state: dict[str, Any], embedding: nn.Module, count: int
) -> tuple[Tensor, Pixels]:
    """Images as a checkpoint takes them, and what their pixels are."""
    dataset = open_dataset(args.data_path, train=True)
    unknown = dict.fromkeys((*PIXEL_FLAGS, "resize"))
    vars(args).update(unknown, in_chans=embedding.proj.in_channels)
    inherit_pixels(args, state.get("args", {}), args.checkpoint)
    settle_pixels(args, images=dataset)
    pixels = Pixels.of(args)
    transform = eval_transform(embedding.img_size, 1.0, pixels, args.resize)
    return preview_images(dataset, count, transform), pixels


DRAW = {
    "reconstructions": draw_reconstructions,
    "neighbours": draw_neighbours,
    "pca": draw_pca,
    "attention": draw_attention,
    "curves": draw_curves,
}

if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
