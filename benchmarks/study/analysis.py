"""What a pretrained model's losses do to its encoder; prints JSON. `study.py` keeps it.

    python benchmarks/study/analysis.py --checkpoint CHECKPOINT --data_path IMAGES

- `trunk_gradient`: norm of each weighted term's gradient on the encoder's blocks, of a batch of one
  process: its negatives are the run's own where that had one process, or local negatives.
- `cosine`: between the gradients of two terms.
- `effective_rank` of features of whole validation images: exp of the entropy of their centred
  singular values (Roy & Vetterli 2007); at most the encoder's width.
"""

import argparse
import itertools
import json
import statistics
from argparse import Namespace
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from variants import VARIANTS

from engine_pretrain import total_loss
from model_mae import MaskedAutoencoderViT, model_from_checkpoint
from util.data.order import SeededDataset
from util.data.transforms import eval_transform
from util.datasets import open_dataset
from util.misc import seed_all
from util.run.checkpoint import load
from util.run.launch import launch
from util_contrastive import two_crops

BATCH, BATCHES = 256, 4
FEATURE_IMAGES = 7 * BATCH


def batches(data: Dataset, size: int = BATCH) -> DataLoader:
    """In a random order, which `seed_all` settles."""
    return DataLoader(data, size, sampler=[(0, i) for i in torch.randperm(len(data)).tolist()])


def trunk_gradients(model: MaskedAutoencoderViT, views: Tensor, flags: Namespace) -> dict:
    """Each weighted term's gradient on the blocks, as one vector; views are [2N, C, H, W]."""
    share = flags.weight_noise if model.noise_loss else 0.0
    weights = {
        "reconstruction": flags.weight_mae * (1 - share),
        "noise": flags.weight_mae * share,
        "contrastive": flags.weight_simclr,
    }
    terms = total_loss(model(views, mask_ratio=flags.mask_ratio), flags)
    trunk = list(model.blocks.parameters())
    return {
        name: torch.cat(
            [g.flatten() for g in torch.autograd.grad(w * terms[name], trunk, retain_graph=True)]
        )
        for name, w in weights.items()
        if name in terms
    }


def effective_rank(features: Tensor) -> float:
    """Of features [M, D]."""
    values = torch.linalg.svdvals(features - features.mean(dim=0))
    return torch.distributions.Categorical(probs=values).entropy().exp().item()


def analyse(args: argparse.Namespace) -> dict:
    state = load(args.checkpoint)
    model, flags = model_from_checkpoint(state, args.checkpoint), Namespace(**state["args"])
    seed_all(flags.seed)
    norms, cosines = defaultdict(list), defaultdict(list)

    images = open_dataset(args.data_path, train=True)
    transform = two_crops(flags)
    data = batches(SeededDataset(images, transform, flags.seed), flags.batch_size)
    for views, *_ in itertools.islice(data, BATCHES):
        imgs = torch.cat(transform.finish(views, torch.device("cpu")))
        gradients = trunk_gradients(model, imgs, flags)
        for name, gradient in gradients.items():
            norms[name].append(gradient.norm().item())
        for (one, a), (two, b) in itertools.combinations(gradients.items(), 2):
            cosines[f"{one}, {two}"].append(torch.cosine_similarity(a, b, dim=0).item())
    found = {
        kind: {name: statistics.fmean(values) for name, values in measured.items()}
        for kind, measured in (("trunk_gradient", norms), ("cosine", cosines))
    }

    images = open_dataset(args.data_path, train=False)
    data = batches(SeededDataset(images, eval_transform(flags.input_size), flags.seed))
    with torch.no_grad():
        latent = torch.cat(
            [
                model.forward_encoder(imgs, mask_ratio=0.0)[0]
                for imgs, *_ in itertools.islice(data, FEATURE_IMAGES // BATCH)
            ]
        )
    pools = {"cls": latent[:, 0], "pooled": latent[:, 1:].mean(dim=1)}
    found["effective_rank"] = {name: effective_rank(pool) for name, pool in pools.items()}
    return found


def main(args: argparse.Namespace) -> None:
    if args.variant:
        VARIANTS[args.variant]()
    print(json.dumps(analyse(args)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a pretraining checkpoint of ours")
    parser.add_argument("--data_path", required=True, help="a folder with train/ and val/")
    parser.add_argument("--variant", choices=VARIANTS, help="what variants.py changed")
    launch(main, parser.parse_args())
