"""The encoder of a checkpoint, as a file that timm's own ViT loads.

python -m util.export --checkpoint output_dir/checkpoint-49.pth --out vit.safetensors
"""

import argparse
from pathlib import Path

import safetensors.torch
import timm
import torch

from util.args import Parser
from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from util.encoders import timm_arguments
from util.errors import UserError
from util.run.checkpoint import load_published
from util.run.launch import launch
from util.weights import check_same, encoder_part


def get_args_parser() -> Parser:
    parser = Parser(prog="util.export", description="Write a checkpoint's encoder for timm")
    text = "path or URL; pretrained, probed or fine-tuned"
    parser.add_argument("--checkpoint", required=True, help=text)
    parser.add_argument("--out", default="vit.safetensors", help="the file to write")
    return parser


def main(args: argparse.Namespace) -> None:
    if not args.out.endswith(".safetensors"):
        raise UserError(f"--out {args.out}: the name must end in .safetensors")
    state = load_published(args.checkpoint)
    flags = state.get("args", {})
    weights, _ = encoder_part(state["model"])
    arguments = timm_arguments(weights, args.checkpoint, flags)
    with torch.device("meta"):
        model = timm.create_model(**arguments)
    check_same(model.state_dict(), weights, args.checkpoint)
    temporary = Path(args.out + ".tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, temporary)
        temporary.replace(args.out)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}") from None
    words = [repr(arguments.pop("model_name"))] + [f"{k}={v!r}" for k, v in arguments.items()]
    print(
        f"{args.out}: {len(weights)} tensors; load with timm.create_model("
        f"{', '.join(words)}, checkpoint_path={args.out!r}), "
        f"on images {input_words(Pixels.of(flags))}"
    )


def input_words(pixels: Pixels) -> str:
    """What an encoder takes."""
    if (pixels.mean, pixels.std) == (IMAGENET_MEAN, IMAGENET_STD):
        words = "normalised by ImageNet's mean and standard deviation"
    else:
        mean, std = (" ".join(f"{v:g}" for v in part) for part in (pixels.mean, pixels.std))
        words = f"normalised by mean {mean} and standard deviation {std}"
    if isinstance(pixels.scale, tuple):
        words = "whose values {:g} to {:g} became 0 to 1, ".format(*pixels.scale) + words
    return words


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
