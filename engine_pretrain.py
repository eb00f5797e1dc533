"""The pretraining objective, and one epoch of it; `util.run.training` makes the steps."""

import logging
from argparse import Namespace

import torch
from torch import Tensor

from loss_contrastive import nt_xent
from model_mae import MaskedAutoencoderViT
from util.distributed import get_world_size, is_main_process
from util.errors import UserError
from util.idle import idle_pretrain
from util.recipes import RECIPES, shown
from util.run.training import Training

logger = logging.getLogger(__name__)


def total_loss(parts: dict[str, Tensor], args: Namespace) -> dict[str, Tensor]:
    """The weighted sum `loss` and its terms, scalars, from a model's output.

    total = weight_mae ((1 - weight_noise) reconstruction + weight_noise noise)
            + weight_simclr contrastive; without noise prediction
    total = weight_mae reconstruction + weight_simclr contrastive. Terms that the objective leaves
    out are neither computed nor returned.
    """
    names = ("reconstruction", "noise", "noise_zero")
    terms = {name: parts[name] for name in names if name in parts}
    total = 0.0
    if "reconstruction" in parts:
        total = parts["reconstruction"]
        if "noise" in parts:
            total = torch.lerp(total, parts["noise"], args.weight_noise)
        total = args.weight_mae * total
    if "embedding" in parts:
        terms["contrastive"], terms["contrastive_top1"] = nt_xent(
            parts["embedding"],
            temperature=args.temperature,
            global_negatives=not args.local_negatives,
        )
        total = total + args.weight_simclr * terms["contrastive"]
    return {"loss": total, **terms}


def train_one_epoch(training: Training, args: Namespace, epoch: int) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        training: its loader gives ([view 1, view 2], label) batches, views [N, C, H, W] on the
            device.
        args: main_pretrain.py's.
    Raises:
        UserError, Stopped: as `Training.batches`.
    """
    for views, _ in training.batches(epoch):
        with training.precision.autocast():
            parts = training.model(torch.cat(views), mask_ratio=args.mask_ratio)
        training.backward(total_loss(parts, args))
    return training.means()


def negatives_per_anchor(args: Namespace) -> int:
    """Other images' views that an embedding is contrasted with: those of one forward pass.

    Raises:
        UserError: there is none, and the objective needs some.
    """
    images = args.batch_size * (1 if args.local_negatives else get_world_size())
    if images == 1 and args.weight_simclr > 0:
        raise UserError("--batch_size 1 leaves no other image to contrast with")
    return 2 * images - 2


def describe_objective(args: Namespace, model: MaskedAutoencoderViT) -> None:
    """Prints the terms' weights and what the model sees; raises as `negatives_per_anchor`."""
    negatives = negatives_per_anchor(args)
    methods = {(True, True): "CAN", (False, True): "MAE", (True, False): "SimCLR"}
    method = methods[model.contrastive, model.reconstruct]
    noise = f"noise up to {args.std}" if model.noise_loss else "no noise"
    share = args.weight_noise if model.noise_loss else 0.0
    idle, patches = idle_pretrain(args), model.patch_embed.num_patches
    kept = int(patches * (1 - args.mask_ratio))
    logger.info(
        f"objective: {method} = {args.weight_mae * (1 - share):.4g} reconstruction + "
        f"{args.weight_mae * share:.4g} noise + {args.weight_simclr:.4g} contrastive, "
        f"mask ratio {args.mask_ratio}, {noise}, {kept} of {patches} patches kept"
    )
    used = [name for name in RECIPES[args.recipe] if name not in idle]
    chosen = ", ".join(f"{name} {shown(getattr(args, name))}" for name in used)
    logger.info(f"recipe {args.recipe}: {chosen}")
    if model.contrastive:
        logger.info(f"contrast: {negatives} negatives per anchor")
        if args.accum_iter > 1 and is_main_process():
            with_norm = args.projection_norm == "batch" and "projection_norm" not in idle
            also = "; nor does BatchNorm see more than one pass" if with_norm else ""
            logger.warning(
                f"warning: --accum_iter {args.accum_iter} adds up gradients, not negatives: each "
                f"anchor still sees {negatives}{also}"
            )
