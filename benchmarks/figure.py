"""Draws can.png, the README's figure of the method, around one of scikit-learn's digits.

python benchmarks/figure.py
"""

import argparse

import numpy as np
from common import ROOT
from PIL import Image, ImageDraw, ImageFont

from util.datasets import Digits

SCALE = 2  # drawn at twice the size of the coordinates below
WIDTH, HEIGHT = 1180, 430
INK, PAPER, GREY = "#20242c", "white", "#b9bec7"
BLUE, GREEN, ORANGE, VIOLET = "#dce8fb", "#ddf2e0", "#fdebd3", "#eadff7"
SIDE, PATCHES = 88, 4  # of a drawn image, pixels, and patches along it
NOISE = 0.12  # drawn far stronger than trained with, to be seen


class Canvas:
    """A picture with the few shapes the figure is made of; coordinates in unscaled pixels."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 14, anchor: str = "mm") -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.multiline_text(
            (x * SCALE, y * SCALE), words, INK, font, anchor=anchor, align="center"
        )

    def box(self, x: float, y: float, width: float, height: float, words: str, fill: str) -> None:
        corners = [v * SCALE for v in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, 10 * SCALE, fill, INK, SCALE)
        self.text(x + width / 2, y + height / 2, words)

    def arrow(self, *points: tuple[float, float]) -> None:
        points = np.array(points) * SCALE
        self.draw.line([tuple(p) for p in points], INK, 2 * SCALE)
        along = points[-1] - points[-2]
        along = along / np.linalg.norm(along) * 9 * SCALE
        across = np.array([-along[1], along[0]]) / 2
        tip = points[-1]
        head = [tuple(tip), tuple(tip - along + across), tuple(tip - along - across)]
        self.draw.polygon(head, INK)

    def picture(self, x: float, y: float, pixels: np.ndarray) -> None:
        image = Image.fromarray(np.uint8(pixels.clip(0, 1) * 255)).convert("RGB")
        image = image.resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST)
        self.image.paste(image, (int(x * SCALE), int(y * SCALE)))
        corners = [v * SCALE for v in (x, y, x + SIDE, y + SIDE)]
        self.draw.rectangle(corners, None, INK, SCALE)

    def cover(self, x: float, y: float, removed: np.ndarray) -> None:
        """Greys out the removed patches, rows and columns of a boolean grid, of a picture."""
        patch = SIDE / PATCHES
        for row, column in np.argwhere(removed):
            left, top = x + column * patch, y + row * patch
            corners = [v * SCALE for v in (left, top, left + patch, top + patch)]
            self.draw.rectangle(corners, GREY, INK, SCALE // 2)


def draw() -> Image.Image:
    """The figure, with fixed random choices."""
    rng = np.random.default_rng(3)
    digit = Digits(train=True).images[2] / 255
    views = [np.roll(digit, 1, axis=1) * 0.85 + 0.1, digit[:, ::-1] * 0.55 + 0.3]
    canvas = Canvas()
    canvas.picture(20, 165, digit)
    canvas.text(64, 272, "image x")

    for y, view, name in zip((50, 280), views, ("view 1", "view 2"), strict=True):
        middle = y + SIDE / 2
        noise = NOISE * rng.standard_normal(view.shape)
        removed = rng.permutation(PATCHES**2).reshape(PATCHES, PATCHES) < PATCHES**2 // 2
        canvas.arrow((108, 209), (130, middle), (152, middle))
        canvas.picture(155, y, view)
        canvas.text(155 + SIDE / 2, y + SIDE + 16, name)
        canvas.arrow((243, middle), (285, middle))
        canvas.picture(288, y, view + noise)
        canvas.text(288 + SIDE / 2, y + SIDE + 16, "+ noise")
        canvas.arrow((376, middle), (418, middle))
        canvas.picture(421, y, view + noise)
        canvas.cover(421, y, removed)
        canvas.text(421 + SIDE / 2, y + SIDE + 16, "50 % masked")
        canvas.arrow((509, middle), (553, middle))

    canvas.box(556, 40, 110, 350, "ViT encoder\n\nvisible\npatches\nonly", BLUE)
    for middle, side in ((94, 172), (324, 246)):
        canvas.arrow((666, middle), (706, middle))
        canvas.box(709, middle - 29, 120, 58, "mean, then\nprojection", GREEN)
        canvas.arrow((829, middle), (1090, middle), (1090, side))
    canvas.box(1015, 172, 150, 74, "InfoNCE:\nan image's views\nattract", ORANGE)

    canvas.arrow((666, 209), (706, 209))
    canvas.box(709, 167, 84, 84, "decoder,\ntold the\nnoise level", VIOLET)
    for top, words in (
        (139, "reconstruction of\nremoved patches"),
        (217, "noise of the\nvisible patches"),
    ):
        canvas.arrow((793, 209), (814, top + 31), (835, top + 31))
        canvas.box(838, top, 145, 62, words, ORANGE)
    return canvas.image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=ROOT / "can.png", help="the PNG to write")
    draw().save(parser.parse_args().out, optimize=True)
