"""The tensor augmentation against torchvision's transforms: each operation, and all in order."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch._dynamo.utils import counters
from torch._inductor import config

import util.data.augment
from util.data.augment import (
    AFTER,
    BEFORE,
    IDENTITY,
    Work,
    augment,
    blend,
    blur,
    blur_by_matrix,
    run_all,
    shift_hue,
)
from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from util_contrastive import BLUR_PROB, GREY_P, JITTER_P, color_jitter, draw_parameters


def images(count: int, side: int = 48) -> torch.Tensor:
    """Smooth uint8 images with flat, grey and saturated places."""
    torch.manual_seed(0)
    imgs = F.interpolate(255 * torch.rand(count, 3, 9, 9), (side, side), mode="bicubic")
    imgs = (1.4 * imgs - 50).clamp(0, 255).byte()
    imgs[:, :, :5] = 77
    imgs[:, 1, :, :5] = imgs[:, 0, :, :5]  # two channels alike: hue's branches meet
    return imgs


def factors(low: float, high: float, count: int = 8) -> torch.Tensor:
    return torch.linspace(low, high, count)


def assert_levels(ours: torch.Tensor, imgs: torch.Tensor, reference, values) -> None:
    """Equal to torchvision's function in float, and to within its rounding in uint8."""
    for our, img, value in zip(ours, imgs, values.tolist(), strict=True):
        exact, rounded = 255 * reference(img / 255, value), reference(img, value).float()
        torch.testing.assert_close(our, exact, rtol=0, atol=2e-3)
        torch.testing.assert_close(our, rounded, rtol=0, atol=2)


@pytest.mark.parametrize(
    ("reference", "weights"),
    [
        (TF.adjust_brightness, lambda f: (f, 0 * f, 0 * f)),
        (TF.adjust_contrast, lambda f: (f, 0 * f, 1 - f)),
        (TF.adjust_saturation, lambda f: (f, 1 - f, 0 * f)),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_blends_equal_torchvision(reference, weights):
    imgs, values = images(8), factors(0.4, 1.8)
    ours = blend(imgs.float(), torch.stack(weights(values), dim=1))
    assert_levels(ours, imgs, reference, values)


def test_hue_equals_torchvision():
    imgs, values = images(9), factors(-0.5, 0.5, 9)
    assert_levels(shift_hue(imgs.float(), values), imgs, TF.adjust_hue, values)


def test_grey_equals_torchvision():
    imgs = images(2)
    grey = blend(imgs.float(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert_levels(grey, imgs, lambda img, _: TF.rgb_to_grayscale(img, 3), factors(0, 1, 2))


@pytest.mark.parametrize("side", [48, 5])
def test_blur_equals_torchvision(side):
    imgs, sigmas = images(8, side), factors(0.1, 2.0)
    if side == 5:  # no kernel reaches past a reflected border
        sigmas = sigmas.clamp(max=4 / 3)

    def reference(img: torch.Tensor, sigma: float) -> torch.Tensor:
        return TF.gaussian_blur(img, 2 * int(torch.tensor(3 * sigma).ceil()) + 1, sigma)

    assert_levels(blur(imgs.float(), sigmas, radius=6), imgs, reference, sigmas)


def test_blur_of_sigma_zero_changes_nothing():
    imgs = images(2).float()
    blurred = blur(imgs, torch.tensor([0.0, 1.0]), radius=3)
    assert torch.equal(blurred[0], imgs[0])
    assert not torch.equal(blurred[1], imgs[1])


def one_by_one(crop: torch.Tensor) -> torch.Tensor:
    """What `draw_parameters` and `augment` do, in torchvision's words and the same draws."""
    img = crop / 255
    if torch.rand(()) < JITTER_P:
        jitter = color_jitter()
        order, *values = jitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for operation in order:
            img = adjust[operation](img, values[operation])
    if torch.rand(()) < GREY_P:
        img = TF.rgb_to_grayscale(img, 3)
    if torch.rand(()) < BLUR_PROB:
        sigma = torch.empty(()).uniform_(0.1, 2.0).item()
        img = TF.gaussian_blur(img, 2 * int(torch.tensor(3 * sigma).ceil()) + 1, sigma)
    return TF.normalize(img, IMAGENET_MEAN, IMAGENET_STD)


def test_a_batch_equals_torchvision_s_operations_image_by_image_in_each_s_order():
    crops = images(96, 24)
    torch.manual_seed(1)
    parameters = torch.stack([draw_parameters() for _ in crops])
    torch.manual_seed(1)
    expected = torch.stack([one_by_one(crop) for crop in crops])
    torch.testing.assert_close(augment(crops, parameters), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [21, 32, 96])  # done in parts of 37, of 16, one by one
def test_an_image_s_augmentation_does_not_depend_on_the_batch(side):
    crops = images(48, side)
    parameters = torch.stack([draw_parameters() for _ in crops])
    batch = augment(crops, parameters)
    for i in range(48):
        assert torch.equal(batch[i], augment(crops[i : i + 1], parameters[i : i + 1])[0])


def uniformity(values: list[float], low: float, high: float) -> float:
    """Kolmogorov and Smirnov's distance to the uniform distribution, times sqrt(n)."""
    x = (torch.tensor(values).sort().values - low) / (high - low)
    n = len(x)
    assert x[0] >= 0
    assert x[-1] <= 1
    return ((x - (torch.arange(n) + 0.5) / n).abs().max() * n**0.5).item()


def test_parameters_are_distributed_as_torchvision_s():
    torch.manual_seed(0)
    count = 6000
    drawn = torch.stack([draw_parameters() for _ in range(count)])
    blends = drawn[:, :-2].unflatten(1, (BEFORE + AFTER, 3)).tolist()
    hue, sigma = drawn[:, -2:].T.tolist()

    orders, values = Counter(), {"brightness": [], "contrast": [], "saturation": []}
    for row, shift in zip(blends, hue, strict=True):
        if not shift:
            assert row[:-1] == [list(IDENTITY)] * (BEFORE + AFTER - 1)
            continue
        order = []
        for i, (own, grey, mean) in enumerate(row[:-1]):
            if i == BEFORE:
                order.append("hue")
            if (own, grey, mean) != IDENTITY:
                order.append("saturation" if grey else "contrast" if mean else "brightness")
                values[order[-1]].append(own)
        orders[tuple(order)] += 1

    jittered = sum(orders.values())
    share = {
        0.8: jittered,  # SimCLR's
        0.2: sum(row[-1] == [0, 1, 0] for row in blends),
        0.5: sum(s > 0 for s in sigma),
    }
    for p, seen in share.items():
        assert abs(seen - p * count) < 4 * (p * (1 - p) * count) ** 0.5
    assert len(orders) == 24  # all of them, equally often: chi squared of 23 degrees of freedom
    assert sum((n - jittered / 24) ** 2 / (jittered / 24) for n in orders.values()) < 50
    for name in values:
        assert uniformity(values[name], 0.6, 1.4) < 1.95  # exceeded once in a thousand
    assert uniformity([h for h in hue if h], -0.1, 0.1) < 1.95
    assert uniformity([s for s in sigma if s], 0.1, 2.0) < 1.95


@pytest.mark.parametrize("strength", [0, 2.5])
def test_jitter_of_the_least_and_the_most_that_is_allowed(strength):
    torch.manual_seed(0)
    drawn = torch.stack([draw_parameters(0.0, color_jitter(strength)) for _ in range(50)])
    colours = drawn[:, : -2 - len(IDENTITY)].unflatten(1, (-1, 3))  # greyscale aside
    assert drawn.isfinite().all()
    assert bool((colours == torch.tensor(IDENTITY)).all() and (drawn[:, -2] == 0).all()) == (
        strength == 0
    )


@pytest.mark.parametrize("shape", [(48, 48), (5, 5), (31, 7)])
def test_blur_by_matrix_is_the_same(shape):
    imgs, sigmas = images(8).float()[:, :, : shape[0], : shape[1]], factors(0.0, 2.0)
    expected = blur(imgs, sigmas, radius=6)
    torch.testing.assert_close(blur_by_matrix(imgs, sigmas, 6), expected, rtol=0, atol=1e-3)
    assert torch.equal(blur_by_matrix(imgs, sigmas, 6)[0], imgs[0])


@pytest.mark.parametrize("by", [blur, blur_by_matrix])
def test_a_batch_is_one_graph(by, monkeypatch):
    """ "aot_eager" generates no code, which would take a minute."""
    monkeypatch.setattr(util.data.augment, "blur", by)
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(run_all, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.manual_seed(1)
    for _ in range(2):
        crops = images(64, 24)
        parameters = torch.stack([draw_parameters() for _ in crops])
        found = run(crops, parameters, Work.of(parameters), IMAGENET_MEAN, IMAGENET_STD)
        torch.testing.assert_close(found, augment(crops, parameters), rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(
    not hasattr(config, "_post_fusion_custom_pass"), reason="older torch shows no kernels"
)
def test_a_compiled_batch_moves_a_third_of_the_bytes(monkeypatch):
    """Of those that 512 views of 224 pixels moved on fake CUDA before there was such a graph."""
    before, count, moved = 57.8e9 / 512, 16, []

    class Counted(Exception):
        """Ends the compilation before it generates code."""

    def add_up(kernels):
        moved.append(sum(kernel.get_read_write_buffers_sizes() for kernel in kernels))
        raise Counted

    monkeypatch.setattr(util.data.augment, "blur", blur_by_matrix)  # a GPU's
    monkeypatch.setattr(config, "_post_fusion_custom_pass", add_up)
    torch._dynamo.reset()
    crops, parameters = images(count, 224), torch.stack([draw_parameters() for _ in range(count)])
    run = torch.compile(run_all, fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match="Counted"):
        run(crops, parameters, Work.of(parameters), IMAGENET_MEAN, IMAGENET_STD)
    assert Work.of(parameters).blends.count(True) == 7
    assert 0 < moved[0] / count < before / 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_and_is_not_waited_for():
    crops = images(32)
    parameters = torch.stack([draw_parameters() for _ in crops])
    on_gpu, pinned = crops.cuda(), parameters.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augment(on_gpu, pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), augment(crops, parameters), rtol=0, atol=1e-4)
