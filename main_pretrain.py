"""Pretrains CAN, or with other weights MAE or SimCLR.

One process, on the GPU if there is one:

    python main_pretrain.py --data_path IMAGES --model mae_vit_base_patch16

Four GPUs:

    torchrun --nproc_per_node=4 main_pretrain.py --data_path IMAGES --model mae_vit_base_patch16
"""

import argparse
import logging

import torch
from timm.optim import param_groups_weight_decay
from torch.nn.parallel import DistributedDataParallel

from engine_pretrain import train_one_epoch
from model_mae import MaskedAutoencoderViT, build_model
from util.args import pretrain_parser as get_args_parser
from util.checkpoint import Run
from util.datasets import global_batch, preview_images, train_loader
from util.distributed import get_world_size, init_distributed_mode, launch
from util.errors import UserError
from util.logs import RunLog
from util.misc import is_main_process, seed_all
from util.precision import Precision
from util.visualize import PREVIEW_IMAGES, reconstruction_grid
from util_contrastive import pretrain_transform

logger = logging.getLogger(__name__)

NO_WEIGHT_DECAY = ("cls_token", "mask_token")  # besides biases and norms; positions are fixed


def main(args: argparse.Namespace) -> None:
    device = init_distributed_mode(args)
    loader = train_loader(args, pretrain_transform(args.input_size), device)
    steps_per_epoch = len(loader) // args.accum_iter
    if args.lr is None:
        args.lr = args.blr * global_batch(args) / 256

    seed_all(args.seed)
    model = build_model(args).to(device)
    groups = param_groups_weight_decay(
        model, args.weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY
    )
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    precision = Precision(args.precision, device)
    negatives = negatives_per_anchor(args)
    if is_main_process():
        describe(args, model, precision, steps_per_epoch, negatives)

    run = Run(args, model, optimizer=optimizer, scaler=precision.scaler)
    run.resume()
    log = RunLog(args, run.epoch, run.epoch * steps_per_epoch + run.step)
    preview = preview_images(loader.dataset.dataset, PREVIEW_IMAGES, args.input_size)

    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for epoch in range(run.epoch, args.epochs):
        stats = train_one_epoch(ddp, loader, optimizer, precision, epoch, args, run, log)
        log.epoch({"epoch": epoch} | {f"train_{name}": value for name, value in stats.items()})
        if model.reconstruct and is_main_process():
            grid = reconstruction_grid(model, preview.to(device), args.mask_ratio)
            log.image("reconstruction", grid, (epoch + 1) * steps_per_epoch)
        run.save(epoch)
    log.close()


def negatives_per_anchor(args: argparse.Namespace) -> int:
    """Other images' views that an embedding is contrasted with: those of one forward pass.

    Raises:
        UserError: there is none, and the objective wants some.
    """
    images = args.batch_size * (1 if args.local_negatives else get_world_size())
    if images == 1 and args.weight_simclr > 0:
        raise UserError("--batch_size 1 leaves no other image to contrast with")
    return 2 * images - 2


def describe(
    args: argparse.Namespace,
    model: MaskedAutoencoderViT,
    precision: Precision,
    steps: int,
    negatives: int,
) -> None:
    """Prints what will be trained, and warns of what people tend not to want."""
    methods = {(True, True): "CAN", (False, True): "MAE", (True, False): "SimCLR"}
    method = methods[model.contrastive, model.reconstruct]
    noise = f"noise up to {args.std}" if model.noise_loss else "no noise"
    share = args.weight_noise if model.noise_loss else 0.0
    logger.info(
        f"objective: {method} = {args.weight_mae * (1 - share):.4g} reconstruction + "
        f"{args.weight_mae * share:.4g} noise + {args.weight_simclr:.4g} contrastive, "
        f"mask ratio {args.mask_ratio}, {noise}"
    )
    patches = model.patch_embed.num_patches
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = int(patches * (1 - args.mask_ratio))
    logger.info(
        f"model: {args.model}, {parameters / 1e6:.1f} M trained parameters, "
        f"{kept} of {patches} patches kept"
    )
    logger.info(
        f"batch: {global_batch(args)} images = {args.batch_size} x {args.accum_iter} "
        f"accumulated x {get_world_size()} processes, {steps} steps per epoch, "
        f"lr {args.lr:.3g}"
    )
    if model.contrastive:
        logger.info(f"contrast: {negatives} negatives per anchor")
        if args.accum_iter > 1:
            logger.warning(
                f"warning: --accum_iter {args.accum_iter} adds up gradients, not negatives: each "
                f"anchor still sees {negatives}"
            )
    logger.info(
        f"device: {precision.device.type} x {get_world_size()}, {precision}, "
        f"torch {torch.__version__}"
    )
    if args.warmup_epochs > args.epochs / 5:
        logger.warning(
            f"warning: --warmup_epochs {args.warmup_epochs} is more than a fifth of "
            f"--epochs {args.epochs}"
        )


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
