"""Pictures of what an encoder learnt: nearest neighbours, patch features, attention, curves.

Shapes: N images, H x W pixels, h x w patches, D width.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.data.pixels import Pixels
from util.encoders import Encoder
from util.errors import UserError
from util.features import REFERENCES

NEIGHBOURS = 8
TILE, GAP, TEXT = 112, 6, 15  # pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)
TAILS = (0.01, 0.99)  # of a component's values, which become 0 and 1
CURVES = ("train_loss", "train_reconstruction", "train_noise", "train_contrastive",
          "knn_acc1", "test_acc1", "test_balanced")  # fmt: skip


def to_image(img: Tensor, pixels: Pixels) -> Image.Image:
    """One image [C, H, W], normalised, as RGB; of other channels the first three, or the first."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pixels.mean, pixels.std))
    img = (img.cpu() * std + mean).clamp(0, 1)
    img = img[:3] if len(img) >= 3 else img[:1].expand(3, -1, -1)
    return Image.fromarray((img * 255).round().byte().permute(1, 2, 0).numpy())


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows of one height, with a title above each column; small ones are magnified."""
    width, height = rows[0][0].size
    zoom = TILE / min(width, height)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    columns = max(map(len, rows))
    font = ImageFont.load_default(TEXT)
    top = TEXT + 2 * GAP
    whole = (columns * (size[0] + GAP) + GAP, top + len(rows) * (size[1] + GAP))
    canvas = Image.new("RGB", whole, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        middle = GAP + column * (size[0] + GAP) + size[0] // 2
        draw.text((middle, top // 2), title, INK, font, anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            way = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.BICUBIC
            place = GAP + x * (size[0] + GAP), top + y * (size[1] + GAP)
            canvas.paste(picture.convert("RGB").resize(size, way), place)
    return canvas


def neighbours(features: Tensor, queries: Sequence[int]) -> list[list[int]]:
    """Of each query image its nearest others, by the cosine similarity of features [N, D]."""
    own = torch.tensor(list(queries)).to(features.device)
    asked = F.normalize(features[own].float(), dim=1)
    tiles = (F.normalize(tile.float(), dim=1) for tile in features.split(REFERENCES))
    similar = torch.cat([asked @ tile.T for tile in tiles], dim=1)
    similar.scatter_(1, own[:, None], -math.inf)
    return similar.topk(min(NEIGHBOURS, len(features) - 1)).indices.tolist()


def neighbour_sheet(
    image: Callable[[int], Tensor], features: Tensor, count: int, pixels: Pixels
) -> Image.Image:
    """Some images, spread over all, each with its nearest.

    Args:
        image: one by its number, [C, H, W], normalised.
        features: [N, D], of all.
    """
    queries = spread(count, len(features))
    rows = [
        [to_image(image(i), pixels) for i in (query, *near)]
        for query, near in zip(queries, neighbours(features, queries), strict=True)
    ]
    return sheet(rows, ["image", *(f"nearest {n}" for n in range(1, len(rows[0])))])


@torch.no_grad()
def components(encoder: Encoder, imgs: Tensor) -> list[Image.Image]:
    """The first three principal components of all images' patches, as colours, h x w each.

    Of several images without what all have at a place: else one sees places, and no things.
    """
    patches = encoder.tokens(imgs)[:, 1:].float()
    several = len(imgs) > 1
    flat = (patches - patches.mean(dim=0 if several else 1, keepdim=True)).flatten(0, 1)
    _, directions = torch.linalg.eigh(flat.T @ flat)  # the largest stand last
    values = flat @ directions[:, -3:].flip(1)
    low, high = (values.quantile(q, dim=0) for q in TAILS)
    colours = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    grid = encoder.vit.patch_embed.grid_size
    found = (colours.view(len(imgs), *grid, 3) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(one) for one in found]


@torch.no_grad()
def attentions(encoder: Encoder, imgs: Tensor) -> Tensor:
    """How much the cls token of the last block looks at each patch, [N, heads, h, w], each to 1."""
    vit = encoder.vit
    seen = {}
    block = vit.blocks[-1].attn
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    try:
        encoder.tokens(imgs)
    finally:
        hook.remove()
    count, length, _ = seen["x"].shape
    qkv = block.qkv(seen["x"]).view(count, length, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = qkv[0][:, :, :1], qkv[1]
    weights = (query @ key.transpose(2, 3) * block.scale).softmax(dim=-1)[:, :, 0, 1:]
    weights = weights / weights.amax(dim=-1, keepdim=True)
    return weights.view(count, block.num_heads, *vit.patch_embed.grid_size)


def heat(values: Tensor) -> Image.Image:
    """A map [h, w] of 0 .. 1, from black over red and yellow to white."""
    parts = [(3 * values - shift).clamp(0, 1) for shift in range(3)]
    rgb = (torch.stack(parts, dim=-1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(rgb)


def pca_sheet(encoder: Encoder, imgs: Tensor, pixels: Pixels) -> Image.Image:
    """Images [N, C, H, W] beside their `components`, two pairs a row."""
    clean = [to_image(img, pixels) for img in imgs]
    large = [_as_large(colours, imgs) for colours in components(encoder, imgs)]
    rows = [list(pair) for pair in zip(clean, large, strict=True)]
    half = (len(rows) + 1) // 2
    rows = [rows[i] + (rows[half + i] if half + i < len(rows) else []) for i in range(half)]
    return sheet(rows, ["image", "patches"] * (len(rows[0]) // 2))


def attention_sheet(encoder: Encoder, imgs: Tensor, pixels: Pixels) -> Image.Image:
    """Images [N, C, H, W] beside their `attentions`, a row each."""
    rows = [
        [to_image(img, pixels), *(_as_large(heat(one), imgs) for one in some)]
        for img, some in zip(imgs, attentions(encoder, imgs), strict=True)
    ]
    return sheet(rows, ["image", *(f"head {n}" for n in range(1, len(rows[0])))])


def _as_large(picture: Image.Image, imgs: Tensor) -> Image.Image:
    return picture.resize(imgs.shape[:1:-1], Image.Resampling.NEAREST)


def curves(runs: Sequence[str]) -> tuple[Image.Image, int]:
    """What runs' log.txt hold, side by side, and the number of panels.

    Raises:
        UserError: matplotlib is not installed, or a folder has no log.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need a library: pip install matplotlib") from None

    logs = {run: read_log(run) for run in runs}
    names = [n for n in CURVES if any(n in line for log in logs.values() for line in log)]
    alike = len({Path(run).name for run in logs}) < len(logs)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for name, axis in zip(names, axes.flat, strict=False):
        for run, log in logs.items():
            points = [(line["epoch"], line[name]) for line in log if name in line]
            label = run if alike else Path(run).name
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), label=label, marker=".")
        axis.set_title(name.removeprefix("train_"), fontsize=11)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes.flat[0].legend(fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), len(names)


def read_log(run: str) -> list[dict[str, float]]:
    """The lines of a run's log.txt, one per epoch."""
    path = Path(run, "log.txt")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not a log of ours") from None
    if not lines or not any(name in line for line in lines for name in CURVES):
        raise UserError(f"{path} holds no epoch")
    return lines


def spread(count: int, among: int) -> list[int]:
    """Numbers of images, evenly spread."""
    return np.unique(np.linspace(0, among - 1, min(count, among)).astype(int)).tolist()
