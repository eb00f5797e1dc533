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
from torch.utils.data import Dataset

from engine_pretrain import train_one_epoch
from model_mae import MaskedAutoencoderViT, build_model
from util.args import pretrain_parser as get_args_parser
from util.datasets import (
    SeededDataset,
    open_dataset,
    open_labelled,
    preview_images,
    train_loader,
)
from util.distributed import (
    from_rank_zero,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    launch,
)
from util.epoch import Training
from util.errors import UserError
from util.features import encoder_knn
from util.folder import check_folder
from util.logs import RunLog, describe_run
from util.lr_sched import scale_learning_rate
from util.misc import seed_all
from util.precision import Precision
from util.run import Run
from util.visualize import PREVIEW_IMAGES, reconstruction_grid
from util_contrastive import pretrain_transform

logger = logging.getLogger(__name__)

NO_WEIGHT_DECAY = ("cls_token", "mask_token")  # besides biases and norms; positions are fixed


def main(args: argparse.Namespace) -> None:
    device = init_distributed_mode(args)
    from_rank_zero(lambda: check_folder(args))
    run = Run(args, args.resume)
    images, val, _ = from_rank_zero(lambda: open_images(args))
    transform = pretrain_transform(args.input_size, device, args.blur_prob)
    data = SeededDataset(images, transform, args.seed)
    loader = train_loader(data, args, device, transform.finish)
    steps_per_epoch = len(loader) // args.accum_iter
    scale_learning_rate(args)

    seed_all(args.seed)
    model = build_model(args).to(device)
    groups = param_groups_weight_decay(
        model, args.weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY
    )
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    precision = Precision(args.precision, device)
    negatives = negatives_per_anchor(args)
    if is_main_process():
        describe_objective(args, model, negatives)
        describe_run(args, model, precision, steps_per_epoch)

    run.resume(model, optimizer=optimizer, scaler=precision.scaler)
    log = RunLog(args, run, steps_per_epoch)
    preview = preview_images(images, PREVIEW_IMAGES, args.input_size)

    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        model.compile()
    # Not static_graph: it saves no time here, and torch's does not go with no_sync.
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    training = Training(ddp, loader, optimizer, precision, args, run, log)
    for epoch in range(run.epoch, args.epochs):
        stats = train_one_epoch(training, epoch)
        line = {"epoch": epoch} | {f"train_{name}": value for name, value in stats.items()}
        step = (epoch + 1) * steps_per_epoch
        if args.eval_freq and ((epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs):
            knn = encoder_knn(model.features, images, val, args, precision, run.poll)
            line["knn_acc1"] = knn
            log.scalars({"perf/knn_acc1": knn}, step)
            logger.info(f"epoch {epoch}: kNN top-1 {knn:.2f} %")
        log.epoch(line)
        if model.reconstruct and is_main_process():
            grid = reconstruction_grid(model, preview.to(device), args.mask_ratio)
            log.image("reconstruction", grid, step)
        run.save(epoch)
    log.close()


def open_images(args: argparse.Namespace) -> tuple[Dataset, Dataset | None, int | None]:
    """The images, and where `--eval_freq` asks for them, those for validation, with labels."""
    if args.eval_freq:
        return open_labelled(args.data_path, cache_dir=args.output_dir)
    return open_dataset(args.data_path, True, args.output_dir), None, None


def negatives_per_anchor(args: argparse.Namespace) -> int:
    """Other images' views that an embedding is contrasted with: those of one forward pass.

    Raises:
        UserError: there is none, and the objective wants some.
    """
    images = args.batch_size * (1 if args.local_negatives else get_world_size())
    if images == 1 and args.weight_simclr > 0:
        raise UserError("--batch_size 1 leaves no other image to contrast with")
    return 2 * images - 2


def describe_objective(
    args: argparse.Namespace, model: MaskedAutoencoderViT, negatives: int
) -> None:
    """Prints what the weights amount to, and warns of what people tend not to want."""
    methods = {(True, True): "CAN", (False, True): "MAE", (True, False): "SimCLR"}
    method = methods[model.contrastive, model.reconstruct]
    noise = f"noise up to {args.std}" if model.noise_loss else "no noise"
    share = args.weight_noise if model.noise_loss else 0.0
    patches = model.patch_embed.num_patches
    kept = int(patches * (1 - args.mask_ratio))
    logger.info(
        f"objective: {method} = {args.weight_mae * (1 - share):.4g} reconstruction + "
        f"{args.weight_mae * share:.4g} noise + {args.weight_simclr:.4g} contrastive, "
        f"mask ratio {args.mask_ratio}, {noise}, {kept} of {patches} patches kept"
    )
    if model.contrastive:
        logger.info(f"contrast: {negatives} negatives per anchor")
        if args.accum_iter > 1:
            logger.warning(
                f"warning: --accum_iter {args.accum_iter} adds up gradients, not negatives: each "
                f"anchor still sees {negatives}"
            )


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
