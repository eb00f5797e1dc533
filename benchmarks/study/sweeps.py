"""What the study runs: pretrainings by name, each with the flags that distinguish it."""

from typing import NamedTuple

SHARES = {"100": 1.0, "10": 0.1, "1": 0.01}  # of the labels, in percent


class Run(NamedTuple):
    """A pretraining, and how it is probed.

    Args:
        name: of its log, beside the seed.
        flags: main_pretrain.py's; None for no pretraining.
        flops: the objective whose forward pass counts, to train as long as CAN in these; None to
            train as many epochs.
        variant: what `variants.py` changes in the model, which no flag does.
        processes: that share the batch.
        shares: of the labels that linear probes get, as in `SHARES`.
        supervised: no pretraining, but fine-tuning from random weights.
        length: of the training, as a share of the sweep's epochs.
    """

    name: str
    flags: str | None = ""
    flops: str | None = None
    variant: str | None = None
    processes: int = 1
    shares: tuple[str, ...] = ("100",)
    supervised: bool = False
    length: float = 1.0


ALL = tuple(SHARES)
NO_CONTRAST = "--weight_mae 1 --weight_simclr 0"
NO_RECONSTRUCTION = "--weight_mae 0 --weight_simclr 1"
METHODS = [
    Run("can", shares=ALL),
    Run("mae", NO_CONTRAST, shares=ALL),
    Run("simclr", NO_RECONSTRUCTION, shares=ALL),
    Run("can-without-noise", "--no_noise_loss", shares=ALL),
    Run("can-noise-as-augmentation", "--weight_noise 0", shares=ALL),
    Run("random", None, shares=ALL),
    Run("supervised", None, supervised=True),
    Run("mae-equal-flops", NO_CONTRAST, "MAE", shares=ALL),
    Run("simclr-equal-flops", NO_RECONSTRUCTION, "SimCLR", shares=ALL),
]
# Each differs in one thing from METHODS' can; the first in none, noise-strong in all of noise. The
# last two are what the others led to: the better ones together, and MAE with normalised targets.
ABLATIONS = [
    Run("again"),
    *(Run(f"mask-{ratio}", f"--mask_ratio {ratio}") for ratio in (0.25, 0.75)),
    *(Run(f"std-{std}", f"--std {std}") for std in (0, 0.1, 0.25)),
    *(Run(f"simclr-{w}", f"--weight_simclr {w}") for w in (0.01, 0.1, 0.3)),
    Run("simclr-0", "--weight_simclr 0 --noise_loss --mask_ratio 0.5"),
    Run("local-negatives", "--local_negatives", processes=2),
    Run("no-noise", "--no_noise_loss --weight_mae 0.679"),  # what reconstruction weighs with noise
    Run("level-unscaled", variant="level=unscaled"),
    Run("level-none", variant="level=none"),
    Run("target-unit", variant="target=unit"),
    Run("target-patch", variant="target=patch"),
    Run("noise-strong", "--std 0.25 --weight_noise 0.9", variant="target=unit"),
    Run("no-noise-strong", "--no_noise_loss --weight_mae 0.097"),  # what it weighs in noise-strong
    *(Run(f"pool-{tokens}", f"--pool {tokens}") for tokens in ("patches", "cls")),
    Run("norm-pix", "--norm_pix_loss"),
    *(Run(f"head-{depth}", f"--projection_layers {depth}") for depth in (1, 3)),
    *(Run(f"warmup-{epochs}", f"--warmup_epochs {epochs}") for epochs in (0, 5)),
    Run("simclr-0.1-norm-pix", "--weight_simclr 0.1 --norm_pix_loss"),
    Run("mae-norm-pix-equal-flops", f"{NO_CONTRAST} --norm_pix_loss", "MAE"),
]
# Which rows of the paper's recipe help which method, at which rate: twelve runs for each method,
# chosen by a tenth of the training images that is held out. The paper's head has width 4096; here
# 512, five times the encoder's, as the paper's is of ViT-B.
BN_HEAD = "--projection_layers 3 --projection_dim 512 --projection_norm batch"
PAPER = "--recipe paper --projection_dim 512"
RATES = ("1e-3", "2e-3", "4e-3")
AUGMENT = "--crop_scale 0.08 1 --jitter_strength 1"
RECIPES = [
    *(Run(f"can-{blr}", f"--blr {blr}") for blr in RATES),
    *(Run(f"can-paper-{blr}", f"{PAPER} --blr {blr}") for blr in RATES),
    Run("can-norm-pix", "--norm_pix_loss"),
    Run("can-targets", "--norm_pix_loss --noise_target normalised"),
    Run("can-bn-head", BN_HEAD),
    Run("can-patches", "--pool patches"),
    Run("can-level", "--noise_level_tokens all --mask_token_width encoder"),
    Run("can-augment", AUGMENT),
    *(Run(f"mae-{blr}", f"{NO_CONTRAST} --blr {blr}") for blr in RATES),
    *(Run(f"mae-norm-pix-{blr}", f"{NO_CONTRAST} --norm_pix_loss --blr {blr}") for blr in RATES),
    *(Run(f"mae-mask-{r}", f"{NO_CONTRAST} --norm_pix_loss --mask_ratio {r}") for r in (0.5, 0.6)),
    Run("mae-mask-token", f"{NO_CONTRAST} --norm_pix_loss --mask_token_width encoder"),
    Run("mae-augment", f"{NO_CONTRAST} --norm_pix_loss {AUGMENT}"),
    *(
        Run(f"mae-jitter-{s}", f"{NO_CONTRAST} --norm_pix_loss --jitter_strength {s}")
        for s in (0, 1)
    ),
    *(Run(f"simclr-{blr}", f"{NO_RECONSTRUCTION} --blr {blr}") for blr in RATES),
    *(Run(f"simclr-bn-head-{b}", f"{NO_RECONSTRUCTION} {BN_HEAD} --blr {b}") for b in RATES),
    *(Run(f"simclr-t-{t}", f"{NO_RECONSTRUCTION} --temperature {t}") for t in (0.05, 0.2, 0.5)),
    Run("simclr-patches", f"{NO_RECONSTRUCTION} --pool patches"),
    Run("simclr-jitter-1", f"{NO_RECONSTRUCTION} --jitter_strength 1"),
    Run("simclr-augment", f"{NO_RECONSTRUCTION} {AUGMENT}"),
]
# Added when the larger runs had been chosen, so not to choose from: each half of *can-level*, and
# the weights, which no other run has. The first is *can-2e-3* again, in the others' fp32.
ROWS = [
    Run("can-again"),
    Run("can-level-alone", "--noise_level_tokens all"),
    Run("can-mask-token", "--mask_token_width encoder"),
    Run("can-weights", f"--weight_noise {0.3 / 0.97}"),  # .67 reconstruction + .3 noise
]
# Each method with the row of RECIPES that had the best pooled probe among the held-out images: of
# SimCLR, CAN, MAE, the release's CAN and the paper's. That without noise is the paper's, with
# reconstruction weighing what it does beside noise. The last has the processor time of can's runs.
BEST_SIMCLR = f"{NO_RECONSTRUCTION} --blr 4e-3"
BEST_CAN = "--norm_pix_loss --noise_target normalised"
BEST_MAE = f"{NO_CONTRAST} --norm_pix_loss --mask_ratio 0.5"
SCALE = [
    Run("simclr", BEST_SIMCLR),
    Run("can", BEST_CAN),
    Run("mae", BEST_MAE),
    Run("can-release", "--blr 4e-3"),
    Run("can-paper", f"{PAPER} --blr 4e-3"),
    Run("can-paper-no-noise", f"{PAPER} --no_noise_loss --weight_mae 0.67 --blr 4e-3"),
    Run("random", None),
    Run("simclr-equal-cost", BEST_SIMCLR, length=0.82),  # can's time
]
# PRETRAIN.md's recipe for small images, beside MAE and SimCLR for as long as `cost.py` gives them.
SMALL = [
    Run("can", BEST_CAN),
    Run("mae", BEST_MAE, length=1.1),
    Run("simclr", BEST_SIMCLR, length=0.82),
]
# Whether noise pays where it can be learnt: five times the default's, for three times as long as in
# METHODS. Without it reconstruction weighs what it does beside it.
STRONG = "--norm_pix_loss --std 0.25"
NOISE = [
    Run("normalised", f"{STRONG} --noise_target normalised"),
    Run("none", "--norm_pix_loss --no_noise_loss --weight_mae 0.679"),
    Run("level-hidden", f"{STRONG} --noise_target normalised", variant="level=none"),
    Run("raw", STRONG),
    Run("augmentation", f"{STRONG} --weight_mae 0.679 --weight_noise 0"),
    Run("normalised-std-0.05", "--norm_pix_loss --noise_target normalised"),
    Run("raw-std-0.05", "--norm_pix_loss"),
]


class Sweep(NamedTuple):
    """Runs, and what they share.

    Args:
        runs: in the order of the tables.
        images: to train on.
        test_images: to probe on.
        epochs: of pretraining; of runs of equal FLOPs, CAN's.
        held_out: those to probe on are training images, the next ones of each class.
        seeds: in the order of which its runs are carried out.
        probe_chooses: its rate and pooling, by a tenth of the training images.
    """

    runs: list[Run]
    images: int
    test_images: int
    epochs: int
    seeds: tuple[int, ...] = (0,)
    held_out: bool = False
    probe_chooses: bool = False


SWEEPS = {
    "methods": Sweep(METHODS, 10_000, 5_000, 20, seeds=(0, 1, 2)),
    "ablations": Sweep(ABLATIONS, 10_000, 5_000, 20),
    "recipes": Sweep(RECIPES + ROWS, 9_000, 1_000, 20, held_out=True),
    "scale": Sweep(SCALE, 50_000, 10_000, 40, probe_chooses=True),
    "noise": Sweep(NOISE, 10_000, 5_000, 60),
    "small": Sweep(SMALL, 10_000, 5_000, 20, seeds=(0, 1, 2), probe_chooses=True),
}
