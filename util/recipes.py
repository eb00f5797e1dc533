"""The two recipes of CAN: named sets of flags that the command line overrides; imports no torch.

`release` is the public code's. `paper` is what the paper's text seems to say: read in a
reimplementation made from it (github.com/bwconrad/can), not in the paper. docs/DIFFERENCES.md has
the equations.
"""

import argparse
from dataclasses import dataclass, fields

from util.parser import ABOVE_0, SHARE, number

RECIPES: dict[str, dict] = {
    "release": {
        "norm_pix_loss": False,
        "noise_target": "raw",
        "weight_noise": 0.3,
        "pool": "all",
        "projection_layers": 2,
        "projection_dim": None,  # the encoder's width
        "projection_norm": "none",
        "noise_level_tokens": "visible",
        "mask_token_width": "decoder",
        "temperature": 0.1,
        "crop_scale": [0.2, 1.0],
        "jitter_strength": 0.5,
    },
    "paper": {
        "norm_pix_loss": True,
        "noise_target": "normalised",
        "weight_noise": 0.3 / 0.97,  # .67 reconstruction + .3 noise
        "pool": "patches",
        "projection_layers": 3,
        "projection_dim": 4096,
        "projection_norm": "batch",
        "noise_level_tokens": "all",
        "mask_token_width": "encoder",
        "temperature": 0.1,
        "crop_scale": [0.08, 1.0],
        "jitter_strength": 1.0,
    },
}


@dataclass(frozen=True)
class Parts:
    """What the recipes choose in the model; the defaults are the release's.

    Args:
        noise_target: predict the noise itself, or normalised within each patch.
        pool: the tokens whose mean is contrasted: all, patches (without cls), cls.
        projection_layers, projection_dim, projection_norm: of the projection head; width in
            channels, None for the encoder's; batch normalises over the batches of all processes.
        noise_level_tokens: what the noise level's embedding is added to: the encoder's output
            (visible patches and cls), or all patches without cls. Its MLP has width 128 or the
            encoder's.
        mask_token_width: decoder, or encoder: then it is embedded with the rest.
    """

    noise_target: str = "raw"
    pool: str = "all"
    projection_layers: int = 2
    projection_dim: int | None = None
    projection_norm: str = "none"
    noise_level_tokens: str = "visible"
    mask_token_width: str = "decoder"

    @classmethod
    def of(cls, flags: dict) -> "Parts":
        """The parts that a run's flags name; the release's where they name none."""
        return cls(**{f.name: flags[f.name] for f in fields(cls) if f.name in flags})


def trains_patches(flags: dict) -> bool:
    """Whether a run contrasted, or classified, the mean over patches without cls."""
    contrasted = flags.get("pool") == "patches" and flags.get("weight_simclr", 0) > 0
    return contrasted or bool(flags.get("global_pool"))


# fmt: off
def recipe_flags() -> argparse.ArgumentParser:
    """The flags whose defaults are a recipe's, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=list(RECIPES), default="release",
        help="the defaults of all flags below")
    add("--weight_noise", type=SHARE, help="share of noise prediction within weight_mae")
    add("--noise_target", choices=("raw", "normalised"),
        help="the noise to predict: as added, or normalised within each patch")
    add("--noise_level_tokens", choices=("visible", "all"),
        help="tokens that carry the noise level to the decoder: visible and cls, or all patches")
    add("--norm_pix_loss", action="store_true", default=None,
        help="reconstruct pixels normalised within each patch")
    add("--no_norm_pix_loss", action="store_false", dest="norm_pix_loss", default=None,
        help="reconstruct pixels as they are")
    add("--mask_token_width", choices=("decoder", "encoder"), help="width of the mask token")
    add("--pool", choices=("all", "patches", "cls"), help="tokens whose mean is contrasted")
    add("--projection_layers", type=number(int, 1, 8, "[]"), help="linear layers before contrast")
    add("--projection_dim", type=number(int, 1, 2**16), help="their hidden width")
    add("--projection_norm", choices=("none", "batch"),
        help="BatchNorm in the hidden layers, over the batches of all processes")
    add("--temperature", type=ABOVE_0, help="temperature of the contrastive loss")
    add("--crop_scale", type=number(float, 0, 1, "(]"), nargs=2, metavar=("MIN", "MAX"),
        help="range of a crop's share of the image's area")
    add("--jitter_strength", type=number(float, 0, 2.5, "[]"),
        help="strength of colour jitter; 1 is SimCLR's")
    for action in parser._actions:
        if action.dest in RECIPES["release"] and action.const is not False:
            values = ", ".join(f"{name}: {shown(r[action.dest])}" for name, r in RECIPES.items())
            action.help += f" ({values})"
    return parser
# fmt: on


def shown(value: object) -> str:
    """A flag's value, as the command line or a person writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if value is None:
        return "the encoder's width"
    short = f"{value:.4g}" if isinstance(value, float) else str(value)
    return repr(value) if isinstance(value, float) and float(short) != value else short


def resolve_recipe(args: argparse.Namespace) -> None:
    """Sets the recipe's flags that the command line did not.

    Raises:
        ValueError: --crop_scale is no range.
    """
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    low, high = args.crop_scale
    if low > high:
        raise ValueError(f"--crop_scale {low} {high}: the first is larger")
