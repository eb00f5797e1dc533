"""Pretrains CAN, or with other weights MAE or SimCLR.

One process, on the GPU if there is one:

    python main_pretrain.py --data_path IMAGES --model mae_vit_base_patch16

Four GPUs:

    torchrun --nproc_per_node=4 main_pretrain.py --data_path IMAGES --model mae_vit_base_patch16
"""

import util.parents  # isort: skip  # noqa: F401 (before torch, see there)

import logging
from argparse import Namespace

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import Dataset

from engine_pretrain import describe_objective, train_one_epoch
from model_mae import build_model
from util.args import pretrain_parser as get_args_parser
from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.data.pixels import Pixels
from util.data.survey import inherit_pixels, settle_pixels
from util.data.transforms import eval_transform_of
from util.datasets import open_dataset, open_labelled
from util.distributed import from_rank_zero, init_distributed_mode, is_main_process
from util.encoders import Encoder
from util.features import encode, knn_accuracy
from util.misc import seed_all
from util.pictures import attention_sheet, neighbour_sheet, pca_sheet
from util.precision import Precision
from util.run.checkpoint import load_published
from util.run.launch import launch, session
from util.run.logs import describe_run, log_to_console
from util.run.run import Run
from util.run.training import Training
from util.visualize import PREVIEW_IMAGES, preview_images, reconstruction_grid
from util.weights import start_from
from util_contrastive import two_crops

logger = logging.getLogger(__name__)

NO_DECAY = ("cls_token", "mask_token")  # besides biases and norms; positions are fixed


@session
def main(args: Namespace) -> None:
    device = init_distributed_mode(args)
    log_to_console()
    run = Run(args)
    start = load_published(args.init) if args.init and not run.resumed else {}
    inherit_pixels(args, start.get("args", {}), args.init)
    images, val, _ = from_rank_zero(lambda: open_images(args))
    run.data = settle_pixels(args, train=images, val=val)
    transform = two_crops(args)
    data = SeededDataset(images, transform, args.seed)
    loader = train_loader(data, args, device, finish=transform.finish)

    seed_all(args.seed)
    precision = Precision(args.precision, device)
    model = build_model(args).to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=NO_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    describe_objective(args, model)

    run.resume(model, optimizer=optimizer, scaler=precision.scaler)
    if start:
        start_from(model, start["model"], args.init, start.get("args"))
        start.clear()  # the memory of all of it
    training = Training(model, loader, optimizer, precision, args, run)
    describe_run(args, model, precision, training.steps)
    preview = preview_images(images, PREVIEW_IMAGES, eval_transform_of(args, crop=1.0)).to(device)
    for epoch in range(run.epoch, args.epochs):
        stats = train_one_epoch(training, args, epoch)
        tests = {}
        if args.eval_freq and ((epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs):
            tests = look_at_features(training, images, val, preview, epoch)
        training.log.add_epoch(epoch, stats, tests)
        if model.reconstruct and is_main_process():
            grid = reconstruction_grid(model, preview, args.mask_ratio, Pixels.of(args))
            training.log.add_image("reconstruction", grid, epoch)
        run.save(epoch)
    training.log.close()


def look_at_features(
    training: Training, images: Dataset, val: Dataset, preview: Tensor, epoch: int
) -> dict[str, float]:
    """The kNN accuracy of the encoder's features; what they show goes to TensorBoard."""
    args, model = training.args, training.model.module
    train, test = (
        encode(model.features, part, args, training.precision, training.run.poll)
        for part in (images, val)
    )
    accuracy = knn_accuracy(train, test)
    logger.info(f"epoch {epoch}: kNN top-1 {accuracy:.2f} %")
    if is_main_process():
        pixels, log = Pixels.of(args), training.log
        data = SeededDataset(images, eval_transform_of(args), args.seed)
        nearest = neighbour_sheet(lambda i: data[0, i][0], train.features, len(preview), pixels)
        log.add_image("neighbours", nearest, epoch)
        encoder = Encoder({"model": model.state_dict(), "args": vars(args)}, "the model")
        encoder.to(preview.device)
        log.add_image("pca", pca_sheet(encoder, preview, pixels), epoch)
        log.add_image("attention", attention_sheet(encoder, preview, pixels), epoch)
    return {"knn_acc1": accuracy}


def open_images(args: Namespace) -> tuple[Dataset, Dataset | None, int | None]:
    """The images, and for `--eval_freq` those for validation, with labels."""
    if args.eval_freq:
        return open_labelled(args.data_path, cache_dir=args.output_dir, labels=args.labels)
    return open_dataset(args.data_path, True, args.output_dir, args.labels), None, None


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
