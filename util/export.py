"""The encoder of a checkpoint, for timm, Hugging Face's transformers, and ONNX.

python -m util.export --checkpoint output_dir/checkpoint-49.pth --out vit.safetensors
python -m util.export --checkpoint output_dir/checkpoint-49.pth --out vit
python -m util.export --checkpoint output_dir/checkpoint-49.pth --out vit --format transformers
python -m util.export --checkpoint output_dir/checkpoint-49.pth --out vit.onnx
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from util.args import Parser
from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from util.data.survey import PIXEL_FLAGS
from util.encoders import timm_arguments
from util.errors import UserError
from util.layouts import to_hugging_face
from util.recipes import trains_patches
from util.run.checkpoint import FLAGS, load_published
from util.run.launch import launch
from util.sizes import SIZES, image_size, size_of
from util.weights import check_same, encoder_part

ONNX_LIMIT = 2**31 - 2**20  # bytes of weights
# What a .safetensors file tells of images.
KEPT_FLAGS = ("input_size", "resize", "augment", "flip", "rotate90", *PIXEL_FLAGS)
NORM_EPS, PROBE_EPS = 1e-6, 1e-6  # of the encoder's norms, and of the probe's BatchNorm


def get_args_parser() -> Parser:
    parser = Parser(prog="util.export", description="Write weights for timm, transformers or ONNX")
    text = "path or URL; pretrained, probed or fine-tuned, of any layout that --init takes"
    parser.add_argument("--checkpoint", required=True, help=text)
    text = "a .safetensors file, of the encoder; or a folder or .onnx file, with the classifier too"
    parser.add_argument("--out", default="vit.safetensors", help=text)
    text = "what opens the folder: timm (local-dir:FOLDER), or ViTModel and ViTMAEForPreTraining"
    parser.add_argument("--format", choices=("timm", "transformers"), default="timm", help=text)
    return parser


def main(args: argparse.Namespace) -> None:
    args.out = str(Path(args.out))  # without a slash at the end
    kind = Path(args.out).suffix
    as_file = kind in FILES
    if kind in (".pth", ".pt", ".bin", ".ckpt"):
        raise UserError(f"--out {args.out}: a file's name must end in {' or '.join(FILES)}")
    if as_file and args.format != "timm":
        raise UserError(f"--out {args.out}: --format {args.format} writes a folder")
    state = load_published(args.checkpoint)
    write_folder = write_timm if args.format == "timm" else write_transformers
    write = FILES[kind] if as_file else write_folder
    temporary = Path(f"{args.out}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        if not as_file:
            if Path(args.out).is_dir() and any(Path(args.out).iterdir()):
                raise UserError(f"--out {args.out} is not empty")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        words = write(temporary, args.out, state, args.checkpoint)
        temporary.replace(args.out)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {args.out}: {error}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
    print(f"{args.out}: {words}, on images {input_words(Pixels.of(state.get('args', {})))}")


def checked_encoder(
    state: dict[str, Any], source: str
) -> tuple[dict[str, Tensor], dict[str, Any], nn.Module]:
    """An encoder's weights, timm's arguments for it, and the model, without memory.

    Raises:
        UserError: as `timm_arguments`; they do not fit the model.
    """
    weights, _ = encoder_part(state["model"])
    arguments = timm_arguments(weights, source, state.get("args", {}))
    with torch.device("meta"):
        model = timm.create_model(**arguments)
    check_same(model.state_dict(), weights, source)
    return weights, arguments, model


def write_file(path: Path, out: str, state: dict[str, Any], source: str) -> str:
    """The encoder alone; returns how to load it."""
    weights, arguments, _ = checked_encoder(state, source)
    flags = state.get("args", {})
    kept = {name: flags[name] for name in KEPT_FLAGS if flags.get(name) is not None}
    kept |= {"global_pool": True} if trains_patches(flags) else {}
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt", FLAGS: json.dumps(kept)})
    words = [repr(arguments.pop("model_name"))] + [f"{k}={v!r}" for k, v in arguments.items()]
    call = f"timm.create_model({', '.join(words)}, checkpoint_path={out!r})"
    return f"{len(weights)} tensors; load with {call}"


def write_timm(path: Path, out: str, state: dict[str, Any], source: str) -> str:
    """A folder with weights, architecture and preprocessing, by timm's own `save_for_hf`."""
    flags = state.get("args", {})
    model, arguments = timm_model(state, source)
    pixels, (height, width) = Pixels.of(flags), model.patch_embed.img_size
    mode = {"squash": "squash", "pad": "border"}.get(flags.get("resize"), "center")
    model.pretrained_cfg |= {
        "input_size": (pixels.in_chans, height, width),
        "mean": pixels.mean,
        "std": pixels.std,
        # As in `eval_transform`.
        "crop_pct": 224 / 256 if mode == "center" and max(height, width) <= 224 else 1.0,
        "crop_mode": mode,
        "interpolation": "bicubic",
        "num_classes": arguments["num_classes"],
        "fixed_input_size": True,
    }
    names = state.get("classes") if model.num_classes else None
    model_args = {k: v for k, v in arguments.items() if k not in ("model_name", "num_classes")}
    timm.models.save_for_hf(
        model,
        path,
        model_config={"label_names": names} if names else {},
        model_args=model_args,
        safe_serialization=True,
    )
    return f"{described(model)}; load with timm.create_model('local-dir:{out}', pretrained=True)"


def described(model: nn.Module) -> str:
    if model.num_classes:
        return f"a classifier of {model.num_classes} classes"
    return "an encoder, of the mean over patches" if model.global_pool == "avg" else "an encoder"


def timm_model(state: dict[str, Any], source: str) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint's encoder, and classifier if it has one, as timm's; and timm's arguments."""
    flags = state.get("args", {})
    weights, _ = encoder_part(state["model"])
    arguments = timm_arguments(weights, source, flags)
    if head := classifier(state["model"]):
        weights |= head
        arguments["num_classes"] = len(head["head.bias"])
    model = timm.create_model(**arguments)
    check_same(model.state_dict(), weights, source)
    model.load_state_dict(weights)
    return model, arguments


def write_onnx(path: Path, out: str, state: dict[str, Any], source: str) -> str:
    """The whole network, for batches of any size; raises UserError without torch's exporter."""
    model, _ = timm_model(state, source)
    images = torch.zeros(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    name = "logits" if model.num_classes else "embedding"
    if sum(p.nbytes for p in model.parameters()) > ONNX_LIMIT:
        raise UserError(f"--out {out}: such a file holds 2 GB at most: write a folder")
    try:
        program = torch.onnx.export(
            model.eval(),
            (images,),
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except ImportError:
        raise UserError("--out ...onnx needs libraries: pip install onnx onnxscript") from None
    if isinstance(program.model.graph.inputs[0].shape[0], int):  # as torch 2.6's has it
        raise UserError(f"--out {out}: torch {torch.__version__} exports one batch size: update it")
    program.save(path)
    return f"{described(model)}; onnxruntime.InferenceSession({out!r}): images -> {name}"


def classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a head as one linear layer; a probe's standardisation becomes part of it."""
    if "head.weight" in weights and weights["head.weight"].ndim == 2:
        return {f"head.{kind}": weights[f"head.{kind}"] for kind in ("weight", "bias")}
    if "head.0.running_var" not in weights:
        return {}
    scale = (weights["head.0.running_var"] + PROBE_EPS).rsqrt()
    matrix = weights["head.1.weight"] * scale
    bias = weights["head.1.bias"] - matrix @ weights["head.0.running_mean"]
    return {"head.weight": matrix, "head.bias": bias}


def write_transformers(path: Path, out: str, state: dict[str, Any], source: str) -> str:
    """A folder for ViTModel, or for ViTMAEForPreTraining of what was pretrained without noise."""
    flags = state.get("args", {})
    weights, _, model = checked_encoder(state, source)
    if "fc_norm.weight" in weights:
        raise UserError(f"{source} normalises after pooling, which ViTModel does not: use timm")
    size, (height, width) = model.patch_embed, image_size(weights, source, flags)
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
        "image_size": height if height == width else [height, width],
        "patch_size": size.patch_size[0],
        "num_channels": size.proj.in_channels,
    }
    tensors = to_hugging_face(weights)
    if is_plain_mae(state["model"], flags):
        tensors = {f"vit.{name}": tensor for name, tensor in tensors.items()}
        tensors |= decoder_of(state["model"])
        config |= decoder_config(state["model"], flags)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    pixels = Pixels.of(flags)
    preprocessing = {"do_normalize": True, "image_mean": pixels.mean, "image_std": pixels.std}
    preprocessing |= {"image_processor_type": "ViTImageProcessor", "resample": 3}
    preprocessing |= {"size": {"height": height, "width": width}}
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    name = config["architectures"][0]
    words = f"{len(tensors)} tensors; load with transformers.{name}.from_pretrained({out!r})"
    if classifier(state["model"]):
        words += "; its classifier is left out"
    if trains_patches(flags):
        words += "; read last_hidden_state[:, 1:].mean(1): what was trained is the patches' mean"
    if flags.get("resize") != "squash":  # which is all that ViTImageProcessor does
        words += "; its processor squashes images where evaluation here cuts or pads them"
    return words


def is_plain_mae(weights: dict[str, Tensor], flags: dict[str, Any]) -> bool:
    """Whether the decoder is one that ViTMAE has: without noise, its mask token as wide as it."""
    known = any(name.startswith("noise_pe_mlp.") for name in weights)
    noise = flags.get("noise_loss", known)
    if noise or "decoder_pred.weight" not in weights:
        return False
    return weights["mask_token"].shape[-1] == weights["decoder_embed.weight"].shape[0]


def decoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's decoder under Hugging Face's names."""
    found = {n.removeprefix("decoder_"): t for n, t in weights.items() if "decoder_blocks" in n}
    blocks = to_hugging_face(found)
    renamed = {f"decoder.decoder_{n.removeprefix('encoder.')}": t for n, t in blocks.items()}
    renamed = {name.replace("decoder_layer.", "decoder_layers."): t for name, t in renamed.items()}
    rest = ("decoder_embed.", "decoder_norm.", "decoder_pred.", "decoder_pos_embed", "mask_token")
    return renamed | {f"decoder.{n}": t for n, t in weights.items() if n.startswith(rest)}


def decoder_config(weights: dict[str, Tensor], flags: dict[str, Any]) -> dict[str, Any]:
    size = SIZES[size_of(weights, "the checkpoint")]
    return {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": weights["decoder_embed.weight"].shape[0],
        "decoder_num_hidden_layers": sum(
            "decoder_blocks" in n and "qkv.weight" in n for n in weights
        ),
        "decoder_num_attention_heads": size.decoder_num_heads,
        "decoder_intermediate_size": weights["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        "mask_ratio": flags.get("mask_ratio", 0.75),
        "norm_pix_loss": bool(flags.get("norm_pix_loss")),
    }


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


FILES = {".safetensors": write_file, ".onnx": write_onnx}

if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
