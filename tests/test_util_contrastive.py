"""The two crops: where they are cut, from what they are decoded, and when they are finished."""

import io
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images

from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.data.pixels import RGB, Pixels
from util.datasets import open_dataset
from util_contrastive import TwoCrops, cut

BOXES = [(4, 8, 200, 260), (100, 0, 224, 232)]  # top, left, height, width


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


def encoded(photo: Image.Image, file_format: str = "JPEG", mode: str = "RGB") -> Image.Image:
    """As a file that is not decoded yet."""
    buffer = io.BytesIO()
    photo.convert(mode).save(buffer, file_format)
    return Image.open(buffer)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_crops_equal_pil_s(photo, file_format):
    crops = cut(encoded(photo, file_format), BOXES, 160)
    decoded = encoded(photo, file_format).convert("RGB")
    for crop, box in zip(crops, BOXES, strict=True):
        expected = TF.pil_to_tensor(TF.resized_crop(decoded, *box, [160, 160]))
        assert crop.dtype == torch.uint8
        torch.testing.assert_close(crop.int(), expected.int(), rtol=0, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_s_pixels_are_pil_s(photo, mode):
    expected = TF.pil_to_tensor(encoded(photo, mode=mode).convert("RGB"))
    assert torch.equal(RGB.decode(encoded(photo, mode=mode)), expected)


@pytest.mark.parametrize(
    ("size", "expected"), [(224, (427, 640)), (100, (214, 320)), (64, (214, 320)), (50, (107, 160))]
)
def test_jpegs_are_decoded_at_the_scale_that_no_crop_outgrows(photo, size, expected, monkeypatch):
    seen = []

    def spy(self, image: Image.Image, shrink: int, decode=Pixels.decode) -> torch.Tensor:
        pixels = decode(self, image, shrink)
        seen.append(tuple(pixels.shape[1:]))
        return pixels

    monkeypatch.setattr(Pixels, "decode", spy)
    crops = cut(encoded(photo), BOXES, size)
    assert seen == [expected]
    whole = cut(encoded(photo).convert("RGB"), BOXES, size)  # decoded: nothing to scale
    assert seen[1] == (427, 640)
    for crop, reference in zip(crops, whole, strict=True):
        assert crop.shape == (3, size, size)
        crop, reference = crop.float(), reference.float()
        shifted = reference.roll(1, dims=-1)
        assert (crop - reference).abs().mean() < 0.4 * (shifted - reference).abs().mean()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_views_finished_in_batches_are_those_finished_one_by_one(photos, device):
    args = Namespace(
        batch_size=8,
        accum_iter=1,
        epochs=2,
        seed=0,
        num_workers=0,
        pin_mem=True,
        output_dir="",
        shuffle_window=0,
    )
    batches = []
    for defer, where in ((False, "cpu"), (True, device)):
        transform = TwoCrops(32, defer)
        data = SeededDataset(open_dataset(str(photos), train=True), transform, args.seed)
        loader = train_loader(data, args, torch.device(where), finish=transform.finish)
        loader.sampler.set_epoch(1)
        batches.append([views for views, _ in loader])
    assert len(batches[0]) == 6
    for one_by_one, together in zip(*batches, strict=True):
        for expected, view in zip(one_by_one, together, strict=True):
            assert view.device == torch.device(device)
            torch.testing.assert_close(view.cpu(), expected, rtol=0, atol=1e-4)


def test_half_of_the_views_are_flipped():
    """Of an image brighter to the right, whose crops therefore are, too."""
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    data = SeededDataset([(ramp, 0)], TwoCrops(8), seed=0)
    views = torch.stack([view for epoch in range(100) for view in data[epoch, 0][0]])
    flipped = (views[..., :4].mean((1, 2, 3)) > views[..., 4:].mean((1, 2, 3))).sum().item()
    assert abs(flipped - 100) < 4 * (200 / 4) ** 0.5


def test_a_truncated_jpeg_is_named(photo, tmp_path):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    (tmp_path / "short.jpg").write_bytes(buffer.getvalue()[:9000])
    dataset = SeededDataset(open_dataset(str(tmp_path), train=True), TwoCrops(224), seed=0)
    with pytest.raises(Exception, match=r"short\.jpg is not a readable image \(.*truncated"):
        dataset[0, 0]
