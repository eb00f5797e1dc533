"""Every flag, defined once. Standard library only, so that a login node can parse them quickly."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable

from util.sizes import SIZES, patch_size

# timm's auto_augment strings: a name, and for the random ones numbers by letter.
_NUMBER = r"\d{1,3}(\.\d{1,9})?"
AUGMENTATION_POLICY = (
    rf"(v0r?|originalr?|3a)(-mstd{_NUMBER})?|(rand|augmix)(-(mstd|mmax|inc|[mnwtdbap]){_NUMBER})*"
)


class Parser(argparse.ArgumentParser):
    """`argparse` whose errors are one line, and whose `check` sees flags that depend on each other.

    Args:
        check: called with the parsed namespace; fills in derived defaults, and raises ValueError
            with the line to show. The process then exits with status 2, as for any bad flag.
    """

    def __init__(self, check: Callable[[argparse.Namespace], None] | None = None, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.check = check

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        if self.check is not None:
            try:
                self.check(parsed)
            except ValueError as error:
                self.error(str(error))
        return parsed

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":  # every rank parses the same flags: one speaks
            message = message.replace("\n", "\\n")  # as names of files may hold
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def number(kind: type, low: float, high: float = math.inf, ends: str = "[)") -> Callable:
    """An argparse type: an int or float between low and high; `ends` as in [low, high)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            word = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        above = low <= value if ends[0] == "[" else low < value
        below = value <= high if ends[1] == "]" else value < high
        if not (above and below):  # so NaN is refused too: it compares false with everything
            span = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
            raise argparse.ArgumentTypeError(f"{text} is outside {span}")
        return value

    return parse


def common_flags() -> argparse.ArgumentParser:
    """The flags of all three scripts, for `parents=`; scripts set their own defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    count, positive = number(int, 0), number(int, 1)
    amount = number(float, 0)

    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--batch_size",
        type=positive,
        default=64,
        help="images per process and forward pass; the global batch is "
        "batch_size x accum_iter x processes",
    )
    group.add_argument("--epochs", type=positive, help="passes over the data set")
    group.add_argument(
        "--accum_iter",
        type=positive,
        default=1,
        help="forward passes whose gradients are added up for one step",
    )
    group.add_argument(
        "--weight_decay", type=amount, help="of weights; biases, norms and tokens have none"
    )
    group.add_argument(
        "--lr",
        type=amount,
        default=None,
        help="learning rate; if not given, blr x global batch / 256",
    )
    group.add_argument(
        "--skip_nonfinite",
        type=count,
        default=0,
        help="steps in a row that may be left out because a loss or gradient is not finite; one "
        "more ends the run",
    )
    group.add_argument("--blr", type=amount, help="base learning rate, for a batch of 256")
    group.add_argument("--min_lr", type=amount, help="where the cosine schedule ends")
    group.add_argument("--warmup_epochs", type=count, help="epochs of linear warm-up")

    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--input_size",
        type=number(int, 1, 4096, "[]"),
        default=224,
        help="image side in pixels",
    )
    group.add_argument(
        "--data_path",
        required=True,
        help="a folder of images, or a built-in data set: digits (scikit-learn's, "
        "offline), cifar10, ... (torchvision's, downloaded into ./data)",
    )
    group.add_argument(
        "--num_workers",
        type=number(int, 0, 1024, "[]"),
        default=10,
        help="loader processes per training process",
    )
    group.add_argument(
        "--pin_mem",
        action="store_true",
        default=True,
        help="page-locked memory for faster copies to the GPU",
    )
    group.add_argument(
        "--no_pin_mem", action="store_false", dest="pin_mem", help="turn --pin_mem off"
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        help="folder of checkpoints and log.txt; '' saves nothing",
    )
    group.add_argument(
        "--log_dir", default=None, help="folder of TensorBoard's files; if not given, output_dir"
    )
    group.add_argument(
        "--save_freq",
        type=positive,
        default=20,
        help="epochs between numbered checkpoints; the last epoch's is always kept",
    )
    group.add_argument(
        "--keep_last",
        type=positive,
        default=None,
        help="numbered checkpoints to keep, the newest; if not given, all",
    )
    group.add_argument(
        "--save_interval",
        type=number(float, 0, ends="()"),
        default=15.0,
        help="minutes between saves of checkpoint-last.pth within an epoch",
    )
    group.add_argument(
        "--resume",
        default="",
        metavar="auto|PATH",
        help="checkpoint to go on from; auto takes output_dir's "
        "checkpoint-last.pth if there is one",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the checkpoints and logs that output_dir holds; otherwise a folder with a "
        "run is refused, unless --resume goes on from one",
    )
    group.add_argument(
        "--start_epoch", type=count, default=0, help="epoch to begin with; --resume sets it"
    )

    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default=None,
        help="if not given, cuda where there is one, else cpu",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: bf16 where the device computes it natively, fp16 on older GPUs, "
        "else fp32; losses are always fp32",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model, in place")
    group.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="of everything random")
    group.add_argument(
        "--world_size",
        type=positive,
        default=1,
        help="number of processes, where no launcher says it",
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=number(int, -1, 2**31),
        default=-1,
        help="this process's number on its machine; launchers set it",
    )
    group.add_argument(
        "--dist_on_itp",
        action="store_true",
        help="take ranks from Open MPI's environment (OMPI_COMM_WORLD_*)",
    )
    group.add_argument(
        "--dist_url",
        default="env://",
        help="where the processes meet: env://, tcp://HOST:PORT or file:///PATH",
    )
    return parser


def supervised_flags() -> argparse.ArgumentParser:
    """The flags that fine-tuning and probing share, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("classifier")
    group.add_argument(
        "--model",
        default="vit_large_patch16",
        metavar="MODEL",
        choices=[f"vit_{size}" for size in SIZES],
        help="one of " + ", ".join(f"vit_{size}" for size in SIZES),
    )
    group.add_argument(
        "--finetune",
        default="",
        metavar="PATH|URL",
        help="weights of the encoder: a checkpoint of CAN or MAE, or timm's; '' begins at random",
    )
    group.add_argument(
        "--global_pool",
        action="store_true",
        help="classify the mean over patches",
    )
    group.add_argument(
        "--cls_token",
        action="store_false",
        dest="global_pool",
        help="classify the cls token",
    )
    group.add_argument(
        "--nb_classes",
        type=number(int, 2),
        default=None,
        help="number of classes, which the data must have; if not given, what the data has",
    )
    group.add_argument(
        "--val_fraction",
        type=number(float, 0, 1),
        default=0.0,
        help="share of the training images to validate on, instead of val/",
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate the weights of --resume, and stop"
    )
    group.add_argument(
        "--dist_eval",
        action="store_true",
        help="share the validation images among the processes; otherwise each evaluates all",
    )
    return parser


def check_common(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of `common_flags` contradict each other or `--model`."""
    if args.input_size % patch_size(args.model):
        raise ValueError(
            f"--input_size {args.input_size} is not a multiple of the patch size "
            f"{patch_size(args.model)} of --model {args.model}"
        )
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
        raise ValueError("--overwrite begins anew and --resume goes on: give one of them")
    if args.log_dir is None:
        args.log_dir = args.output_dir


def pretrain_parser() -> Parser:
    """The flags of main_pretrain.py."""
    parser = Parser(description="CAN pretraining", parents=[common_flags()], check=check_pretrain)
    parser.set_defaults(epochs=400, weight_decay=0.05, blr=1e-3, min_lr=0.0, warmup_epochs=40)

    group = parser.add_argument_group("objective")
    group.add_argument(
        "--model",
        default="mae_vit_large_patch16",
        metavar="MODEL",
        choices=[f"mae_vit_{size}" for size in SIZES],
        help="one of " + ", ".join(f"mae_vit_{size}" for size in SIZES),
    )
    group.add_argument(
        "--weight_mae",
        type=number(float, 0),
        default=0.97,
        help="weight of reconstruction and noise prediction together",
    )
    group.add_argument(
        "--weight_simclr",
        type=number(float, 0),
        default=0.03,
        help="weight of the contrastive loss",
    )
    group.add_argument(
        "--weight_noise",
        type=number(float, 0, 1, "[]"),
        default=0.3,
        help="share of noise prediction within weight_mae",
    )
    group.add_argument(
        "--noise_loss",
        action="store_true",
        default=None,
        help="add noise to the images and predict it; if not given, the "
        "objective's own: on for CAN, off for MAE and SimCLR",
    )
    group.add_argument(
        "--no_noise_loss",
        action="store_false",
        dest="noise_loss",
        default=None,
        help="neither add nor predict noise",
    )
    group.add_argument(
        "--std",
        type=number(float, 0),
        default=0.05,
        help="largest noise level, in units of normalised pixels",
    )
    group.add_argument(
        "--mask_ratio",
        type=number(float, 0, 1),
        default=None,
        help="share of patches removed; if not given, the objective's own: "
        "0.5 for CAN, 0.75 for MAE, 0 for SimCLR",
    )
    group.add_argument(
        "--norm_pix_loss",
        action="store_true",
        help="reconstruct pixels normalised within each patch",
    )
    group.add_argument(
        "--blur_prob",
        type=number(float, 0, 1, "[]"),
        default=0.5,
        help="how often a view is blurred; 0 suits images of 32 pixels, which blur spoils",
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="compute activations a second time in the backward pass: far less memory, "
        "a third more time",
    )
    group.add_argument(
        "--local_negatives",
        action="store_true",
        help="contrast with this process's images only, as the public release did",
    )
    group.add_argument(
        "--eval_freq",
        type=number(int, 0),
        default=0,
        help="epochs between kNN accuracies of the encoder, for images with labels; 0 for none",
    )
    return parser


def check_pretrain(args: argparse.Namespace) -> None:
    """Resolves the objective's own defaults; raises ValueError for what cannot be trained.

    CAN has a contrastive and a reconstruction weight; without the first it is MAE, without the
    second SimCLR.
    """
    check_common(args)
    if args.weight_mae == 0 and args.weight_simclr == 0:
        raise ValueError("--weight_mae 0 and --weight_simclr 0 leave nothing to learn")

    can = args.weight_simclr > 0 and args.weight_mae > 0
    if args.noise_loss is None:
        args.noise_loss = can
    if args.mask_ratio is None:
        args.mask_ratio = 0.5 if can else 0.75 if args.weight_mae > 0 else 0.0

    patches = (args.input_size // patch_size(args.model)) ** 2
    kept = int(patches * (1 - args.mask_ratio))
    if kept == 0:
        raise ValueError(f"--mask_ratio {args.mask_ratio} keeps none of {patches} patches")
    if kept == patches and args.weight_mae > 0:
        raise ValueError(
            f"--mask_ratio {args.mask_ratio} removes none of {patches} patches: "
            "nothing to reconstruct (SimCLR is --weight_mae 0)"
        )


def finetune_parser() -> Parser:
    """The flags of main_finetune.py."""
    parser = Parser(
        description="Fine-tuning",
        parents=[common_flags(), supervised_flags()],
        check=check_finetune,
    )
    parser.set_defaults(
        epochs=50, weight_decay=0.05, blr=1e-3, min_lr=1e-6, warmup_epochs=5, global_pool=True
    )
    share, amount = number(float, 0, 1, "[]"), number(float, 0)

    group = parser.add_argument_group("regularisation")
    group.add_argument(
        "--drop_path",
        type=number(float, 0, 1),
        default=0.1,
        help="probability of leaving out the last block; earlier blocks' falls linearly to 0",
    )
    group.add_argument(
        "--clip_grad",
        type=number(float, 0, ends="()"),
        default=None,
        help="largest gradient norm; if not given, gradients are not clipped",
    )
    group.add_argument(
        "--layer_decay",
        type=number(float, 0, 1, "(]"),
        default=0.75,
        help="factor between the learning rates of a layer and the next",
    )
    group.add_argument("--smoothing", type=number(float, 0, 1), default=0.1, help="of labels")

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--color_jitter", type=amount, default=None, help="strength; used only where --aa is ''"
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="timm's name of a RandAugment or AutoAugment policy; '' for none",
    )
    group.add_argument(
        "--reprob", type=share, default=0.25, help="probability of erasing a rectangle"
    )
    group.add_argument(
        "--remode",
        choices=("pixel", "rand", "const"),
        default="pixel",
        help="what it is filled with: noise by pixel, one random colour, or zero",
    )
    group.add_argument(
        "--recount", type=number(int, 1, 1000, "[]"), default=1, help="rectangles at most"
    )
    group.add_argument(
        "--resplit",
        action="store_true",
        help="accepted for MAE's commands, where it changes nothing either: it concerns batches "
        "of several augmented copies",
    )
    group.add_argument("--mixup", type=amount, default=0.0, help="alpha of mixup; 0 for none")
    group.add_argument("--cutmix", type=amount, default=0.0, help="alpha of cutmix; 0 for none")
    group.add_argument(
        "--cutmix_minmax",
        type=share,
        nargs=2,
        default=None,
        metavar=("MIN", "MAX"),
        help="cutmix with a side uniform in this range of the image's, instead of by alpha",
    )
    group.add_argument(
        "--mixup_prob", type=share, default=1.0, help="probability of mixing, where it is on"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=share,
        default=0.5,
        help="probability of cutmix, where mixup is on too",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="what shares one draw: the batch, a pair of images, or none",
    )
    return parser


def check_supervised(args: argparse.Namespace) -> None:
    """Raises ValueError where flags of `supervised_flags` contradict each other."""
    check_common(args)
    if args.eval and args.resume in ("", "auto"):
        raise ValueError("--eval needs the weights to evaluate: --resume PATH or URL")


def check_finetune(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be trained."""
    check_supervised(args)
    if args.cutmix_minmax:
        low, high = (int(args.input_size * side) for side in args.cutmix_minmax)
        if low >= high:
            raise ValueError(
                f"--cutmix_minmax gives sides from {low} to {high} pixels: no room for a draw"
            )
    if args.aa and not re.fullmatch(AUGMENTATION_POLICY, args.aa):
        raise ValueError(
            f"--aa {args.aa!r} is no policy of timm's, such as rand-m9-mstd0.5-inc1, augmix-m5-w4, "
            "original or v0"
        )
    mixes = args.mixup or args.cutmix or args.cutmix_minmax
    if mixes and args.batch_size % 2:
        raise ValueError(
            f"--batch_size {args.batch_size} is odd: mixup and cutmix need an even one"
        )


def linprobe_parser() -> Parser:
    """The flags of main_linprobe.py."""
    parser = Parser(
        description="Linear probing, and kNN",
        parents=[common_flags(), supervised_flags()],
        check=check_linprobe,
    )
    parser.set_defaults(
        batch_size=512, epochs=90, weight_decay=0.0, blr=0.1, min_lr=0.0, warmup_epochs=10
    )
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--cache_features",
        action="store_true",
        help="encode every image once, without augmentation, and train on that",
    )
    group.add_argument(
        "--knn",
        action="store_true",
        help="classify by the 20 nearest training images instead, without training, and stop",
    )
    return parser


def check_linprobe(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be probed."""
    check_supervised(args)
    if args.knn and (args.eval or args.resume):
        raise ValueError("--knn trains nothing: it takes --finetune, not --eval or --resume")
    if args.batch_size == 1:
        raise ValueError("--batch_size 1: the probe's BatchNorm needs two images or more")


def seeds(text: str) -> list[int]:
    """An argparse type: SLURM's notation of an array, `0-2,7` is [0, 1, 2, 7]."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-2 or 0,5")
        found += range(int(first), int(last or first) + 1)
    return found


def setting(text: str) -> tuple[str, list[str]]:
    """An argparse type: `name=v1,v2` is ("name", ["v1", "v2"])."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE")
    return name, values.split(",")


def job_flags() -> argparse.ArgumentParser:
    """What a submission adds to a script's flags, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False)
    count, positive = number(int, 0), number(int, 1)

    group = parser.add_argument_group("job")
    group.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local", "debug"),
        default="auto",
        help="local: processes of this machine, debug: one process, here and now; "
        "auto: slurm where there is an srun, else local",
    )
    group.add_argument("--nodes", type=positive, default=2, help="machines")
    group.add_argument(
        "--ngpus", type=count, default=8, help="GPUs per node, one process each; 0: CPUs"
    )
    group.add_argument(
        "--tasks_per_node",
        type=positive,
        default=None,
        help="processes per node; if not given, one per GPU, or with --ngpus 0 one",
    )
    group.add_argument("--cpus_per_task", type=positive, default=10, help="CPU cores per process")
    group.add_argument(
        "--mem_gb",
        type=positive,
        default=None,
        help="memory per node; if not given, 40 per GPU, or with --ngpus 0 the partition's own",
    )
    group.add_argument("--timeout", type=positive, default=4320, help="time limit, in minutes")
    group.add_argument(
        "--requeue_limit",
        type=count,
        default=30,
        help="how often the job may be requeued after a time limit, a preemption or a failed node",
    )
    group.add_argument(
        "--job_dir",
        default="jobs/%j",
        help="folder of the job's logs, and its --output_dir unless that is given; "
        "%%j becomes the job's id",
    )
    group.add_argument("--partition", help="queue; if not given, the cluster's default")
    group.add_argument("--constraint", help="features that nodes must have")
    group.add_argument("--use_volta32", action="store_true", help="--constraint volta32gb")
    group.add_argument("--account", help="who is charged")
    group.add_argument("--qos", help="quality of service, if the cluster has several")
    group.add_argument("--comment", help="shown to the cluster's administrators")
    group.add_argument(
        "--slurm_setup",
        action="append",
        metavar="COMMAND",
        help="shell command to run on the first node before the processes start; may be repeated",
    )

    group = parser.add_argument_group("sweep and waiting")
    group.add_argument(
        "--array",
        type=seeds,
        nargs="?",
        const=[],
        metavar="SEEDS",
        help="submit a job array with one run per --seed, such as 0-2 or 0,5",
    )
    group.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="submit a job array with one run per value of a flag; if repeated, of all "
        "combinations",
    )
    group.add_argument(
        "--wait",
        action="store_true",
        help="follow the job to its end; exit 0 if it succeeded, else 1",
    )
    return parser


def check_job(args: argparse.Namespace) -> None:
    """Resolves a submission's own defaults; raises ValueError for what cannot be submitted."""
    if args.ngpus == 0 and args.device == "cuda":
        raise ValueError("--device cuda needs GPUs: --ngpus is 0")
    if args.ngpus > 0 and args.device == "cpu":
        raise ValueError(f"--device cpu needs none of --ngpus {args.ngpus}: give --ngpus 0")
    if args.ngpus > 0 and args.tasks_per_node not in (None, args.ngpus):
        raise ValueError(
            f"--tasks_per_node {args.tasks_per_node}: each process has a GPU of its own, "
            f"and --ngpus is {args.ngpus}"
        )
    args.device = "cuda" if args.ngpus else "cpu"  # not to train for days on the wrong one
    args.tasks_per_node = args.tasks_per_node or args.ngpus or 1
    args.mem_gb = args.mem_gb or 40 * args.ngpus or None

    args.job_dir = os.path.abspath(os.path.expanduser(args.job_dir))
    if args.output_dir is None:
        args.output_dir = args.job_dir
    if not args.output_dir and args.requeue_limit > 0:
        raise ValueError("--output_dir '' saves nothing to go on from: it needs --requeue_limit 0")
    if found := set(args.job_dir.replace("%j", "")) & set("%\\'\"\n"):
        raise ValueError(  # sbatch reads them as patterns and quotes
            f"--job_dir {args.job_dir!r}: SLURM's paths cannot hold {min(found)!r}, except as %j"
        )
    if args.array == [] and not args.set:
        raise ValueError("--array needs seeds, such as 0-2, or a --set NAME=V1,V2")


def job_parser(script: Parser) -> Parser:
    """The flags of a script, given its parser, and of its submission."""

    def check(args: argparse.Namespace) -> None:
        check_job(args)
        script.check(args)

    parents = [script, job_flags()]
    parser = Parser(
        description=f"{script.description}, submitted", parents=parents, check=check, add_help=False
    )
    parser.set_defaults(output_dir=None)
    return parser
