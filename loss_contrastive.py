"""The projection head, NT-Xent, SupCon, and the gather that lets gradients through.

Shapes: N images per process, 2N view-images (rows 0..N-1 view 1, rows N..2N-1 view 2), V views,
W processes, d embedding width. Embeddings have unit length.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from util.recipes import Parts

PROJECTION_DIM = 128  # width of the contrastive embedding
TILE_ROWS = 512  # anchors whose similarities are held at once: 2 KiB of memory per candidate


class _GatherWithGrad(torch.autograd.Function):
    """All-gather whose backward pass sums every process's gradient of this process's tensor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(x: Tensor) -> Tensor:
    """Rows [M, d] of all processes, [W * M, d], by rank; differentiable.

    The gradient is the sum over the processes' losses. Under DDP, which averages gradients, each
    process's mean over its own anchors therefore trains exactly as one process with all of them.
    """
    return _GatherWithGrad.apply(x)


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose statistics in training are those of all processes' rows [M, C], float32.

    torch's SyncBatchNorm does this on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        several = dist.is_initialized() and dist.get_world_size() > 1
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if not (several and self.training):
                return super().forward(x)
            mean = gather_with_grad(x.mean(dim=0, keepdim=True)).mean(dim=0)
            var = gather_with_grad((x - mean).square().mean(dim=0, keepdim=True)).mean(dim=0)
            count = len(x) * dist.get_world_size()
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                unbiased = (var * count / (count - 1)).to(self.running_var)
                self.running_var.lerp_(unbiased, self.momentum)
            return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


def projection_head(embed_dim: int, parts: Parts) -> nn.Sequential:
    """Linear layers with ReLU, and a BatchNorm before it if `parts` says so; from D to 128."""
    layers, width = [], embed_dim
    for _ in range(parts.projection_layers - 1):
        hidden = parts.projection_dim or embed_dim
        norm = [GlobalBatchNorm(hidden)] if parts.projection_norm == "batch" else []
        layers += [nn.Linear(width, hidden), *norm, nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, PROJECTION_DIM))


class _NTXent(torch.autograd.Function):
    """NT-Xent's sum over anchors, and the number of anchors whose positive is the nearest.

    The gradient is computed in the same pass over tiles of rows, while a tile's softmax exists:
    nothing of size anchors x candidates is kept, and no product is computed twice.
    """

    @staticmethod
    def forward(
        ctx, anchors: Tensor, candidates: Tensor, offset: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        count, device = len(anchors), anchors.device
        loss, hits = anchors.new_zeros(()), anchors.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        if wanted:
            grad_anchors, grad_candidates = torch.empty_like(anchors), torch.zeros_like(candidates)

        for begin in range(0, count, TILE_ROWS):
            tile = slice(begin, min(begin + TILE_ROWS, count))
            own = torch.arange(tile.start, tile.stop, device=device)
            row, positive = own - begin, (own + count // 2) % count + offset

            scaled = anchors[tile] / temperature
            logits = scaled @ candidates.T
            logits.diagonal(begin + offset).fill_(-torch.inf)  # no anchor is its own candidate
            highest, nearest = logits.max(dim=1)
            hits += (nearest == positive).sum()
            loss += (highest - logits[row, positive]).sum()
            weights = logits.sub_(highest[:, None]).exp_()  # in place, to hold one tile only
            normaliser = weights.sum(dim=1)
            loss += normaliser.log().sum()

            if wanted:  # d loss / d logits is softmax - one-hot
                weights /= normaliser[:, None]
                weights[row, positive] -= 1
                torch.mm(weights, candidates, out=grad_anchors[tile])
                grad_candidates.addmm_(weights.T, scaled)
            del logits, weights  # before the next tile

        if wanted:
            ctx.save_for_backward(grad_anchors.div_(temperature), grad_candidates)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_anchors, grad_candidates = ctx.saved_tensors
        return grad * grad_anchors, grad * grad_candidates, None, None


def nt_xent(
    embeddings: Tensor, temperature: float = 0.1, global_negatives: bool = True
) -> tuple[Tensor, Tensor]:
    """Normalised-temperature cross-entropy in float32 (SimCLR, Chen et al. 2020, equation 1).

    Exact, in memory that grows with the number of candidates, not with its square.

    Args:
        embeddings: this process's [2N, d], view 1 then view 2.
        global_negatives: contrast with the images of all processes, not only this one's.
    Returns:
        The mean over this process's 2N anchors, and the share of anchors whose positive is the
        nearest of all candidates (top-1 accuracy).
    Raises:
        ValueError: embeddings of another shape.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] % 2:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}, expected [2N, d]")
    # Outside autocast: half-precision logits at temperature 0.1 lose the differences that matter.
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        several = global_negatives and dist.is_initialized() and dist.get_world_size() > 1
        # A view, since torch.compile takes no tensor twice.
        candidates = gather_with_grad(embeddings) if several else embeddings.view_as(embeddings)
        offset = dist.get_rank() * len(embeddings) if several else 0
        loss, hits = _NTXent.apply(embeddings, candidates, offset, temperature)
    return loss / len(embeddings), hits / len(embeddings)


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020, equation 2), of this process's images.

    Args:
        temperature: divides the similarities.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mean loss over all N * V anchors.

        Args:
            features: [N, V, d], unit length.
            labels: [N]; views of images with the same label are positives.
            mask: [N, N] instead of labels; row i's positives are the columns that are not 0.
                With neither, an image's positives are its own other views (NT-Xent).
        Raises:
            ValueError: shapes other than these, or both labels and mask.
        """
        if features.ndim != 3:
            raise ValueError(f"features of shape {tuple(features.shape)}, expected [N, V, d]")
        n, views, _ = features.shape
        if labels is not None and mask is not None:
            raise ValueError("labels and mask exclude each other")
        if labels is not None:
            if labels.shape != (n,):
                raise ValueError(f"labels of shape {tuple(labels.shape)}, expected [{n}]")
            mask = labels[:, None] == labels
        elif mask is None:
            mask = torch.eye(n, device=features.device)
        elif mask.shape != (n, n):
            raise ValueError(f"mask of shape {tuple(mask.shape)}, expected [{n}, {n}]")

        itself = torch.eye(views * n, dtype=torch.bool, device=features.device)
        positives = mask.bool().repeat(views, views) & ~itself
        with torch.autocast(features.device.type, enabled=False):
            rows = features.transpose(0, 1).flatten(0, 1).float()  # [V * N, d], view-major
            logits = (rows @ rows.T / self.temperature).masked_fill(itself, -torch.inf)
            log_prob = logits.log_softmax(dim=1).masked_fill(~positives, 0)
        return -(log_prob.sum(dim=1) / positives.sum(dim=1)).mean()
