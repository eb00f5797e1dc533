"""The flags of the three scripts, defined once; imports no torch, so that it parses quickly."""

import argparse
import math
import re
from collections.abc import Callable

from util.idle import idle_finetune, idle_linprobe, idle_pretrain
from util.parser import (
    ABOVE_0,
    AMOUNT,
    BELOW_1,
    COUNT,
    POSITIVE,
    SHARE,
    NumbersOr,
    Parser,
    Sides,
    number,
    or_word,
)
from util.recipes import recipe_flags, resolve_recipe
from util.sizes import SIZES, check_patches, height_width, patch_size

# timm's auto_augment strings: a name, and for the random ones numbers by letter.
_NUMBER = r"\d{1,3}(\.\d{1,9})?"
AUGMENTATION_POLICY = (
    rf"(v0r?|originalr?|3a)(-mstd{_NUMBER})?|(rand|augmix)(-(mstd|mmax|inc|[mnwtdbap]){_NUMBER})*"
)


# The flags stand as tables, one in one or two lines.
# fmt: off
def common_flags() -> argparse.ArgumentParser:
    """The flags of all three scripts, for `parents=`; scripts set their own defaults."""
    parser = argparse.ArgumentParser(add_help=False)

    add = parser.add_argument_group("schedule").add_argument
    add("--batch_size", type=POSITIVE, default=64, help="images per process and forward pass")
    add("--epochs", type=POSITIVE, help="passes over the dataset")
    add("--accum_iter", type=POSITIVE, default=1,
        help="forward passes per step; the global batch is batch_size x accum_iter x processes")
    add("--weight_decay", type=AMOUNT, help="weight decay; none on biases, norms and tokens")
    add("--lr", type=AMOUNT, help="learning rate; if not given, blr x global batch / 256")
    add("--blr", type=AMOUNT, help="base learning rate, for a global batch of 256")
    add("--min_lr", type=AMOUNT, help="learning rate at the end of the cosine schedule")
    add("--warmup_epochs", type=COUNT, help="epochs of linear warm-up")
    add("--skip_nonfinite", type=COUNT, default=0,
        help="steps in a row to skip if loss or gradient are not finite; one more ends the run")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="a folder of images, of tar shards or of Parquet files; "
        "shards, such as 'shards/{000..127}.tar'; hf:NAME, a dataset of Hugging Face's; or digits "
        "(scikit-learn's, offline), cifar10, ... (torchvision's, downloaded into ./data)")
    add("--labels", default="", metavar="FILE.csv",
        help="table of the images' labels: columns file and label; for folders without classes")
    add("--shuffle_window", type=COUNT, help="images of whole shards to shuffle at once, for "
        "reading forward; 0: all of the dataset's; default: 20000 of tar shards, else 0")
    add("--input_size", type=number(int, 1, 4096, "[]"), default=224, nargs="+", action=Sides,
        metavar="SIDE", help="side of the images in pixels, or their height and width")
    add("--patch_size", type=number(int, 1, 256, "[]"), help="side in pixels; default: the model's")
    add("--resize", choices=("crop", "squash", "pad"),
        help="what fits other shapes to --input_size in evaluation: cut off what stands over, "
        "change the aspect, or add borders; default: the checkpoint's, or else crop")
    add("--flip", choices=("none", "horizontal", "both"),
        help="random flips; default: the checkpoint's, or horizontal (with --augment none: none)")
    add("--rotate90", action="store_true", default=None, help="quarter turns; half if not square")
    add("--no_rotate90", action="store_false", dest="rotate90", default=None,
        help="no turns; default: the checkpoint's, or none")
    add("--num_workers", type=number(int, 0, 1024, "[]"), default=10, help="loaders per process")
    add("--pin_mem", action="store_true", default=True, help="pin memory for GPUs (default)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="do not pin memory")

    add = parser.add_argument_group("pixels").add_argument
    add("--in_chans", type=number(int, 1, 1024, "[]"),
        help="channels of the images; default: the checkpoint's, or else 3")
    add("--pages", choices=("first", "channels"), help="of files of several pages or frames: the "
        "first (default), or all, as channels")
    add("--pixel_range", action=NumbersOr, words=("auto", "dtype"), count=2,
        metavar="LOW HIGH|auto|dtype", help="values that become 0 and 1; auto: measured; default: "
        "the checkpoint's, or else dtype, the ends of each file's integer type")
    add("--pixel_mean", action=NumbersOr, words=("auto",), metavar="MEAN|auto",
        help="mean of each channel, in 0 .. 1; auto: measured; default: the checkpoint's, or else "
        "ImageNet's of RGB, measured for other channels")
    add("--pixel_std", action=NumbersOr, words=("auto",), metavar="STD|auto",
        help="deviation of each channel, as --pixel_mean; --std is the noise level")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="./output_dir", help="checkpoints and log.txt; '' saves nothing")
    add("--log_dir", help="folder of TensorBoard's files; if not given, output_dir")
    add("--save_freq", type=POSITIVE, default=20,
        help="epochs between numbered checkpoints; the last epoch's is always kept")
    add("--keep_last", type=POSITIVE, help="newest numbered checkpoints to keep; default: all")
    add("--save_interval", type=ABOVE_0, default=15.0,
        help="minutes between saves of checkpoint-last.pth, within epochs and after them")
    add("--resume", default="", metavar="auto|PATH|URL",
        help="checkpoint to continue from; auto: output_dir's checkpoint-last.pth if there is one")
    add("--overwrite", action="store_true", help="remove the run that output_dir holds; otherwise "
        "such a folder is refused, unless --resume continues the run")
    add("--start_epoch", type=COUNT, default=0, help="first epoch; --resume sets it")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "cpu"), help="if not given, cuda if there is one, else cpu")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 where the device computes it natively, fp16 on older GPUs, else fp32; "
        "losses are always fp32")
    add("--compile", action="store_true", help="torch.compile the model, in place, "
        "and on GPUs the augmentation of pretraining")
    add("--seed", type=number(int, 0, 2**63), default=0, help="random seed")
    add("--world_size", type=POSITIVE, default=1, help="number of processes, without a launcher")
    add("--local_rank", "--local-rank", type=number(int, -1, 2**31), default=-1,
        help="this process's rank on its machine; launchers set it")
    add("--dist_on_itp", action="store_true",
        help="take ranks from Open MPI's environment (OMPI_COMM_WORLD_*)")
    add("--dist_url", default="env://",
        help="where the processes meet: env://, tcp://HOST:PORT or file:///PATH")
    return parser


def supervised_flags() -> argparse.ArgumentParser:
    """The flags that fine-tuning and probing share, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("classifier").add_argument
    add_model(add, "vit_")
    add("--finetune", default="", metavar="PATH|URL",
        help="the encoder's weights: ours, MAE's, timm's, Hugging Face's, ...; else random")
    add("--global_pool", action="store_true",
        help="classify the mean over patches (the default of fine-tuning)")
    add("--cls_token", action="store_false", dest="global_pool",
        help="classify the cls token (the default of probing)")
    add("--nb_classes", type=number(int, 2),
        help="number of classes, which the data must have; if not given, the data's")
    add("--val_fraction", type=BELOW_1, default=0.0,
        help="share of the training images to validate on, instead of val/")
    add("--class_weights", choices=("balanced",),
        help="of the training loss: each class counts as much as any other, however many images")
    add("--eval", action="store_true", help="evaluate the weights of --resume, and stop")
    add("--predict", default="", metavar="FOLDER",
        help="classify all images of a folder by --resume's weights into --predictions, and stop")
    add("--predictions", default="", metavar="FILE.csv",
        help="with --eval or --predict: each image's file and five most probable classes")
    add("--per_class", default="", metavar="FILE.csv", help="with --eval: each class's accuracy")
    add("--dist_eval", action="store_true",
        help="share the validation images among the processes; otherwise each evaluates all")
    return parser


def pretrain_parser() -> Parser:
    """The flags of main_pretrain.py."""
    shared = [common_flags(), recipe_flags()]
    parser = Parser(description="CAN pretraining", parents=shared, check=check_pretrain,
        idle=idle_pretrain)
    parser.set_defaults(epochs=400, weight_decay=0.05, blr=1e-3, min_lr=0.0, warmup_epochs=40)

    add = parser.add_argument_group("objective").add_argument
    add_model(add, "mae_vit_")
    add("--weight_mae", type=AMOUNT, default=0.97,
        help="weight of reconstruction and noise prediction together")
    add("--weight_simclr", type=AMOUNT, default=0.03, help="weight of the contrastive loss")
    add("--noise_loss", action="store_true", default=None, help="add noise to the images and "
        "predict it; default: on for CAN, off for MAE and SimCLR")
    add("--no_noise_loss", action="store_false", dest="noise_loss", default=None,
        help="neither add nor predict noise")
    add("--std", type=AMOUNT, default=0.05, help="largest noise level, in normalised pixels")
    add("--mask_ratio", type=BELOW_1,
        help="share of patches removed; default: 0.5 for CAN, 0.75 for MAE, 0 for SimCLR")
    add("--init", default="", metavar="PATH|URL", help="weights to start from, of MAE, timm, DINO, "
        "Hugging Face, ...: what fits is used, with a new schedule")
    add("--augment", choices=("ssl", "weak", "none"), default="ssl", help="of the two views: "
        "SimCLR's; only crops and flips; or none, the middle of the image twice")
    add("--blur_prob", type=SHARE, default=0.5,
        help="probability of blurring a view; use 0 for images of 32 pixels")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the "
        "backward pass: far less memory, a third more time")
    add("--local_negatives", action="store_true",
        help="contrast with this process's images only, as the public release did")
    add("--eval_freq", type=COUNT, default=0, help="epochs between kNN accuracies of the encoder, "
        "for images with labels; 0: never")
    return parser


def finetune_parser() -> Parser:
    """The flags of main_finetune.py."""
    shared = [common_flags(), supervised_flags()]
    parser = Parser(description="Fine-tuning", parents=shared, check=check_finetune,
        idle=idle_finetune)
    parser.set_defaults(epochs=50, weight_decay=0.05, blr=1e-3, min_lr=1e-6, warmup_epochs=5)
    parser.set_defaults(global_pool=True)

    add = parser.add_argument_group("regularisation").add_argument
    add("--drop_path", type=BELOW_1, default=0.1,
        help="probability of dropping the last block; it falls linearly to 0 at the first")
    add("--clip_grad", type=ABOVE_0,
        help="largest gradient norm; if not given, gradients are not clipped")
    add("--layer_decay", type=number(float, 0, 1, "(]"), default=0.75,
        help="factor between the learning rates of a layer and the next")
    add("--smoothing", type=BELOW_1, default=0.1, help="label smoothing")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color_jitter", type=AMOUNT, help="strength; used with --aa '' and 3a; default: none")
    add("--aa", default="rand-m9-mstd0.5-inc1",
        help="timm's name of a RandAugment or AutoAugment policy; '' for none")
    add("--reprob", type=SHARE, default=0.25, help="probability of erasing a rectangle")
    add("--remode", choices=("pixel", "rand", "const"), default="pixel",
        help="fill it with noise per pixel, one random colour, or zeros")
    add("--recount", type=number(int, 1, 1000, "[]"), default=1, help="most rectangles per image")
    add("--resplit", action="store_true", help="ignored; accepted for MAE's commands")
    add("--mixup", type=AMOUNT, default=0.0, help="alpha of mixup; 0: none")
    add("--cutmix", type=AMOUNT, default=0.0, help="alpha of cutmix; 0: none")
    add("--cutmix_minmax", type=SHARE, nargs=2, metavar=("MIN", "MAX"),
        help="cutmix with a side uniform in this range of the image's; default: by --cutmix")
    add("--mixup_prob", type=SHARE, default=1.0, help="probability of mixing, if it is on")
    add("--mixup_switch_prob", type=SHARE, default=0.5,
        help="probability of cutmix, if mixup is on too")
    add("--mixup_mode", choices=("batch", "pair", "elem"), default="batch",
        help="one draw per batch, pair of images, or image")
    return parser


def linprobe_parser() -> Parser:
    """The flags of main_linprobe.py."""
    shared = [common_flags(), supervised_flags()]
    parser = Parser(description="Linear probing, and kNN", parents=shared, check=check_linprobe,
        idle=idle_linprobe)
    parser.set_defaults(batch_size=512, epochs=90, weight_decay=0.0, blr=0.1, min_lr=0.0)
    parser.set_defaults(warmup_epochs=10)
    (blr,) = (action for action in parser._actions if action.dest == "blr")
    blr.type, blr.metavar = or_word(AMOUNT, "auto"), "BLR|auto"
    blr.help += "; auto: 13 on both poolings at once, chosen by a tenth of the training images"

    add = parser.add_argument_group("probe").add_argument
    add("--cache_features", action="store_true",
        help="encode every image once, without augmentation; train on these (float16 above 1 GB)")
    add("--knn", action="store_true",
        help="classify by the 20 nearest training images instead, without training, and stop")
    return parser
# fmt: on


def add_model(add: Callable, prefix: str) -> None:
    """Adds `--model`, whose names are a prefix and a size."""
    names = [f"{prefix}{size}" for size in SIZES]
    large, listed = f"{prefix}large_patch16", "one of " + ", ".join(names)
    add("--model", default=large, metavar="MODEL", choices=names, help=listed)


def check_common(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of `common_flags` contradict each other or `--model`."""
    if not args.data_path and not getattr(args, "predict", ""):
        raise ValueError("the following arguments are required: --data_path")
    args.patch_size = patch = args.patch_size or patch_size(args.model)
    check_patches(args.input_size, patch, args.model)
    check_pixels(args)
    if not args.dist_url.startswith(("env://", "tcp://", "file://")):
        raise ValueError(
            f"--dist_url {args.dist_url!r} is none of env://, tcp://HOST:PORT, file:///PATH"
        )
    if args.world_size > 1 and args.local_rank >= args.world_size:
        raise ValueError(
            f"--local_rank {args.local_rank} is not below --world_size {args.world_size}"
        )
    if args.resume == "auto" and not args.output_dir:
        raise ValueError("--resume auto needs an --output_dir to look in")
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}")
    if args.overwrite and args.resume:
        raise ValueError("--overwrite starts over and --resume continues: choose one")
    if args.log_dir is None:
        args.log_dir = args.output_dir


def check_pixels(args: argparse.Namespace) -> None:
    """Raises ValueError where the flags of pixels contradict each other."""
    if isinstance(args.pixel_range, list) and args.pixel_range[0] >= args.pixel_range[1]:
        raise ValueError("--pixel_range {:g} {:g}: LOW is not below HIGH".format(*args.pixel_range))
    if isinstance(args.pixel_std, list) and min(args.pixel_std) <= 0:
        raise ValueError("--pixel_std: deviations must be above 0")
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(args, name)
        if isinstance(values, list) and len(values) != (args.in_chans or len(values)):
            raise ValueError(f"--{name}: {len(values)} values, but --in_chans {args.in_chans}")


def check_pretrain(args: argparse.Namespace) -> None:
    """Resolves the objective's own defaults; raises ValueError for what cannot be trained.

    CAN has a contrastive and a reconstruction weight; without the first it is MAE, without the
    second SimCLR.
    """
    check_common(args)
    resolve_recipe(args)
    if args.weight_mae == 0 and args.weight_simclr == 0:
        raise ValueError("--weight_mae 0 and --weight_simclr 0 leave nothing to learn")

    can = args.weight_simclr > 0 and args.weight_mae > 0
    if args.noise_loss is None:
        args.noise_loss = can
    if args.mask_ratio is None:
        args.mask_ratio = 0.5 if can else 0.75 if args.weight_mae > 0 else 0.0

    patches = math.prod(side // args.patch_size for side in height_width(args.input_size))
    kept = int(patches * (1 - args.mask_ratio))
    if kept == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio} keeps none of {patches} patches")
    if kept == patches and args.weight_mae > 0:
        removed = f"--mask_ratio {args.mask_ratio} removes none of {patches} patches"
        raise ValueError(f"{removed}: nothing to reconstruct (SimCLR is --weight_mae 0)")


def check_supervised(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of `supervised_flags` contradict each other."""
    check_common(args)
    if args.eval and args.predict:
        raise ValueError("--eval and --predict: one at a time")
    for flag, doing in (("eval", "to evaluate"), ("predict", "to predict by")):
        if getattr(args, flag) and args.resume in ("", "auto"):
            raise ValueError(f"--{flag} needs the weights {doing}: --resume PATH or URL")
    if args.predict and not args.predictions:
        raise ValueError("--predict needs a file to write to: --predictions FILE.csv")
    for flag in ("predictions", "per_class"):
        if getattr(args, flag) and not (args.eval or (args.predict and flag == "predictions")):
            raise ValueError(f"--{flag} is written with --eval")


def check_finetune(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be trained."""
    check_supervised(args)
    if args.cutmix_minmax:
        low, high = (int(min(height_width(args.input_size)) * side) for side in args.cutmix_minmax)
        if low >= high:
            raise ValueError(f"--cutmix_minmax: sides from {low} to {high}: no room for a draw")
    if args.aa and not re.fullmatch(AUGMENTATION_POLICY, args.aa):
        raise ValueError(f"--aa {args.aa!r} is not a timm policy, such as rand-m9-mstd0.5 or v0")
    mixes = args.mixup or args.cutmix or args.cutmix_minmax
    if mixes and args.batch_size % 2:
        raise ValueError(f"--batch_size {args.batch_size} is odd; mixup and cutmix need it even")


def check_linprobe(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be probed."""
    check_supervised(args)
    args.grid = args.blr == "auto"
    if args.grid:
        args.blr, args.cache_features = 1.0, True
        if args.lr is not None:
            raise ValueError("--blr auto chooses the learning rate: it takes no --lr")
    if args.knn and (args.eval or args.resume):
        raise ValueError("--knn trains nothing: it takes --finetune, not --eval or --resume")
    if args.batch_size == 1 and not (args.knn or args.eval or args.predict):
        raise ValueError("--batch_size 1: the probe's BatchNorm needs two images or more")
