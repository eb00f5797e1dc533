"""NT-Xent and SupCon: reference values, an oracle, gradients, and many processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import loss_contrastive
from loss_contrastive import SupConLoss, nt_xent

# (batch, width, temperature): loss, gradient norm, gradient's absolute sum; computed with the
# public SupCon code on features = normalize(fill((batch, 2, width), 3, 1.0)).
REFERENCE = {
    (2, 8, 0.1): (0.3533410429954529, 4.193552494049072, 21.11383628845215),
    (8, 16, 0.1): (8.596220016479492, 6.226459980010986, 88.79910278320312),
    (16, 128, 0.1): (5.275529861450195, 3.111999273300171, 179.19642639160156),
    (8, 16, 0.5): (3.084591865539551, 1.0737003087997437, 15.359808921813965),
}
SUPCON_REFERENCE = 13.312739372253418  # batch 8, width 16, labels 0 0 1 1 2 2 3 3


def reference_features(batch: int, width: int) -> torch.Tensor:
    return F.normalize(fill((batch, 2, width), 3, 1.0), dim=-1)


def by_view(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features[:, 0], features[:, 1]])


def oracle(rows: list[list[float]], temperature: float) -> tuple[float, float]:
    """SimCLR's equation 1 in plain Python: mean loss and top-1 accuracy over all 2N anchors."""
    count, losses, hits = len(rows), [], 0
    for i in range(count):
        similarity = {
            j: sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / temperature
            for j in range(count)
            if j != i
        }
        positive = (i + count // 2) % count
        losses.append(math.log(sum(map(math.exp, similarity.values()))) - similarity[positive])
        hits += max(similarity, key=similarity.get) == positive
    return sum(losses) / count, hits / count


@pytest.fixture(params=[loss_contrastive.TILE_ROWS, 3], ids="tiles of {}".format)
def tile_rows(request, monkeypatch):
    """All anchors in one tile, and in several of which the last is not full."""
    monkeypatch.setattr(loss_contrastive, "TILE_ROWS", request.param)
    return request.param


def test_nt_xent_is_one_graph():
    """Forward and backward; "aot_eager" generates no code, which would take a minute."""
    found = []
    torch._dynamo.reset()
    for run in (nt_xent, torch.compile(nt_xent, fullgraph=True, backend="aot_eager")):
        embeddings = by_view(reference_features(8, 16)).requires_grad_()
        loss, top1 = run(embeddings)
        loss.backward()
        found.append((loss, top1, embeddings.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize(("case", "expected"), REFERENCE.items(), ids=str)
def test_nt_xent_equals_the_reference(case, expected):
    batch, width, temperature = case
    features = reference_features(batch, width).requires_grad_()
    loss, _ = nt_xent(by_view(features), temperature)
    loss.backward()
    grad = features.grad
    actual = (loss.item(), grad.norm().item(), grad.abs().sum().item())
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_nt_xent_equals_an_oracle(batch):
    torch.manual_seed(batch)
    rows = F.normalize(torch.randn(2 * batch, 12), dim=-1)
    loss, top1 = nt_xent(rows, 0.1)
    assert (loss.item(), top1.item()) == pytest.approx(oracle(rows.tolist(), 0.1), abs=1e-5)


@pytest.mark.usefixtures("tile_rows")
def test_nt_xent_gradient_in_float64():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(8, 4, dtype=torch.float64), dim=-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, 0.1)[0], rows)


class LargestResult(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_nt_xent_memory_grows_linearly(monkeypatch):
    monkeypatch.setattr(loss_contrastive, "TILE_ROWS", 64)
    for count in (512, 1024, 2048):
        rows = F.normalize(torch.randn(count, 16), dim=-1).requires_grad_()
        with LargestResult() as largest:
            nt_xent(rows)[0].backward()
        assert largest.elements == 64 * count


def test_nt_xent_is_float32_under_autocast():
    rows = by_view(reference_features(16, 128))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = nt_xent(rows, 0.1)
        supcon = SupConLoss(0.1)(reference_features(16, 128))
    expected = REFERENCE[16, 128, 0.1][0]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert supcon.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [torch.ones(8, 4) / 2, torch.zeros(8, 4)], ids=["same", "zero"])
def test_embeddings_all_alike_give_the_log_of_the_candidates(rows):
    loss, _ = nt_xent(rows)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 4)])
def test_nt_xent_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \[2N, d\]"):
        nt_xent(torch.zeros(shape))


def test_supcon_equals_the_reference():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    features = reference_features(8, 16)
    by_labels = SupConLoss(0.1)(features, labels)
    by_mask = SupConLoss(0.1)(features, mask=labels[:, None] == labels)
    assert by_labels.item() == pytest.approx(SUPCON_REFERENCE, rel=1e-5)
    assert by_mask.item() == pytest.approx(SUPCON_REFERENCE, rel=1e-5)


@pytest.mark.parametrize(("case", "expected"), REFERENCE.items(), ids=str)
def test_supcon_without_labels_is_nt_xent(case, expected):
    batch, width, temperature = case
    loss = SupConLoss(temperature)(reference_features(batch, width))
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"features": torch.zeros(4, 2)},
        {"labels": torch.zeros(3)},
        {"mask": torch.eye(3)},
        {"labels": torch.zeros(4), "mask": torch.eye(4)},
    ],
    ids=["features", "labels", "mask", "both"],
)
def test_supcon_refuses_what_does_not_fit(kwargs):
    with pytest.raises(ValueError, match=r"expected|exclude"):
        SupConLoss()(**{"features": torch.zeros(4, 2, 3), **kwargs})


def inputs(kind: str) -> torch.Tensor:
    """Both views [2, 2N, 16] of 2N = 12 images, of which each of two ranks will hold 6."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    if kind == "identical":  # all of rank 0's images are one image: its anchors are much harder
        views[:, :6] = views[:, :1]
    if kind == "zero":  # rank 1 embeds to zero vectors
        views[:, 6:] = 0
    return views


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)]
    return nn.Sequential(*layers).double()


def train_step(model: nn.Module, views: torch.Tensor, global_negatives: bool = True) -> None:
    embeddings = F.normalize(model(views.flatten(0, 1)), dim=-1)
    nt_xent(embeddings, global_negatives=global_negatives)[0].backward()


def gradients_of_a_rank(rank: int, out: str) -> None:
    loss_contrastive.TILE_ROWS = 5  # of 12 anchors
    grads = {}
    for kind in ("random", "identical", "zero"):
        for negatives in (True, False):
            model = DistributedDataParallel(network())
            train_step(model, inputs(kind)[:, 6 * rank : 6 * (rank + 1)], negatives)
            grads[kind, negatives] = [p.grad for p in model.parameters()]
    torch.save(grads, f"{out}/{rank}.pth")


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    in_processes(gradients_of_a_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for kind in ("random", "identical", "zero"):
        model = network()
        train_step(model, inputs(kind))
        expected = [p.grad for p in model.parameters()]
        for grads in ranks:
            torch.testing.assert_close(grads[kind, True], expected, rtol=1e-9, atol=1e-12)

        # local negatives: the mean of what each rank would learn alone
        halves = []
        for half in inputs(kind).chunk(2, dim=1):
            model = network()
            train_step(model, half)
            halves.append([p.grad for p in model.parameters()])
        expected = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
        torch.testing.assert_close(ranks[0][kind, False], expected, rtol=1e-9, atol=1e-12)
