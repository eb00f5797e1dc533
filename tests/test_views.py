"""Crops, flips and turns: of any depth, for inputs of any shape."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_pixels import write

from util.args import finetune_parser
from util.data.images import open_image
from util.data.pixels import RGB, Pixels
from util.data.transforms import build_transform, crop_ratio, eval_transform, probe_transform
from util_contrastive import TwoCrops


def test_wide_strips_are_seen_whole_where_the_input_is_as_wide(tmp_path):
    strip = np.zeros((64, 2048, 3), np.uint8)
    strip[:, :200] = 255
    seen = eval_transform((16, 512), crop=1.0)(Image.fromarray(strip))
    assert seen[:, :, :40].min() > 2
    assert seen[:, :, 60:].max() < -1


def test_training_crops_have_the_input_s_shape():
    """A centred square stays one, whatever the input's shape is: nothing is stretched by it."""
    flags = ["--data_path", "x", "--model", "vit_nano_patch4", "--input_size", "32", "128"]
    args = finetune_parser().parse_args(flags)
    low, high = crop_ratio((32, 128))
    assert (low, high) == (3, 16 / 3)
    assert crop_ratio(32) == (3 / 4, 4 / 3)
    crops = [probe_transform((32, 128)).transforms[1], build_transform(True, args).transforms[1]]
    assert [tuple(crop.ratio) for crop in crops] == [(low, high)] * 2


def test_fine_tuning_turns_what_is_not_square_too():
    flags = ["--data_path", "x", "--model", "vit_nano_patch4", "--input_size", "8", "--aa", ""]
    args = finetune_parser().parse_args([*flags, "--rotate90", "--flip", "none", "--reprob", "0"])
    image = Image.fromarray(np.zeros((20, 60, 3), np.uint8))
    image.paste((255, 255, 255), (0, 0, 60, 10))  # the upper half
    transform = build_transform(True, args)
    sides = set()
    for _ in range(30):
        bright = transform(image)[0] > 0
        sides.add(bool(bright[:, 0].all() or bright[:, -1].all()))  # of a turned one
    assert len(sides) == 2


def test_crops_of_deep_images_are_those_of_shallow_ones(tmp_path):
    """256 grey levels, in 8 bits and in 16; the same boxes, the same colours, no rounding."""
    rgb = np.asarray(Image.effect_noise((40, 30), 80).convert("RGB").resize((40, 30)))
    shallow = write(tmp_path / "a.png", rgb)
    deep = write(tmp_path / "a.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    for level in ("ssl", "weak", "none"):
        views = []
        for file, pixels in ((shallow, RGB), (deep, Pixels(scale="dtype"))):
            torch.manual_seed(0)
            views.append(TwoCrops(16, pixels=pixels, level=level)(open_image(str(file))))
        for one, two in zip(*views, strict=True):
            assert (one - two).abs().max() < 0.1  # crops of 8 bits are rounded
    a, b = (
        eval_transform(16, pixels=p)(open_image(str(f)))
        for f, p in ((shallow, RGB), (deep, Pixels(scale="dtype")))
    )
    assert (a - b).abs().max() < 0.2


@pytest.mark.parametrize("size", [(8, 16), (16, 8), 16])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", [(40, 40, 3), (10, 90, 3), (90, 10, 3), (1, 1, 3)])
def test_evaluation_has_the_input_s_size(size, resize, shape):
    image = Image.fromarray(np.full(shape, 200, np.uint8))
    height, width = (size, size) if isinstance(size, int) else size
    assert eval_transform(size, resize=resize)(image).shape == (3, height, width)
    views = TwoCrops(size)(image) + TwoCrops(size, level="none")(image)
    assert {view.shape for view in views} == {(3, height, width)}


def test_padding_is_the_mean_and_around_the_image():
    image = Image.fromarray(np.full((16, 4, 3), 255, np.uint8))
    padded = eval_transform(16, resize="pad")(image)
    assert torch.equal(padded[:, :, :6], torch.zeros(3, 16, 6))
    assert (padded[:, :, 6:10] > 2).all()
    assert torch.equal(padded[:, :, 10:], torch.zeros(3, 16, 6))


def test_views_without_augmentation_are_twice_the_middle():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8))
    one, two = TwoCrops(20, level="none")(image)
    assert torch.equal(one, two)
    middle = eval_transform(20, 1.0)(image.crop((20, 0, 40, 20)))
    torch.testing.assert_close(one, middle, atol=1e-5, rtol=0)


def test_weak_views_are_crops_of_the_same_colours():
    image = Image.fromarray(np.full((20, 20, 3), (10, 200, 30), np.uint8))
    for view in TwoCrops(8, level="weak")(image):
        torch.testing.assert_close(view, eval_transform(8)(image), atol=1e-5, rtol=0)


def test_flips_and_quarter_turns():
    image = Image.fromarray((np.arange(64).reshape(8, 8) * 3).astype(np.uint8)).convert("RGB")

    def seen(**kwargs) -> int:
        torch.manual_seed(0)
        views = [
            v
            for _ in range(60)
            for v in TwoCrops(8, crop_scale=(1, 1), level="none", **kwargs)(image)
        ]
        return len({view.numpy().tobytes() for view in views})

    assert seen() == seen(flip="none") == 1
    assert seen(flip="horizontal") == 2
    assert seen(flip="both") == 4
    assert seen(flip="none", rotate90=True) == 4
    assert seen(flip="both", rotate90=True) == 8
