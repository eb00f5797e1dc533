"""Flags that a run makes no use of, with the reason; imports no torch."""

import argparse
from collections.abc import Callable

Idle = dict[str, str]  # the reason, by the flag


def idle_of(flags: dict) -> Callable[[dict], Idle]:
    """The function, of flags, for the one of the three scripts that has these."""
    kinds = {"weight_simclr": idle_pretrain, "layer_decay": idle_finetune, "knn": idle_linprobe}
    find = next((kind for name, kind in kinds.items() if name in flags), lambda _: {})
    return lambda flags: find(argparse.Namespace(**flags))


def idle_pretrain(args: argparse.Namespace) -> Idle:
    """Of main_pretrain.py, once its objective is settled."""
    why = {}
    if not args.weight_simclr:
        names = "pool projection_layers projection_dim projection_norm temperature local_negatives"
        why |= dict.fromkeys(names.split(), "nothing is contrasted")
    elif args.projection_layers == 1:
        why |= dict.fromkeys(("projection_dim", "projection_norm"), "--projection_layers is 1")
    if not args.weight_mae:
        why |= dict.fromkeys(("norm_pix_loss", "mask_token_width"), "nothing is reconstructed")
    if not (args.weight_mae and args.noise_loss):
        names = ("noise_target", "weight_noise", "noise_level_tokens")
        why |= dict.fromkeys(names, "no noise is predicted")
    if not args.noise_loss:
        why["std"] = "no noise is added"
    if args.augment != "ssl":
        names = ("jitter_strength", "blur_prob", *["crop_scale"] * (args.augment == "none"))
        why |= dict.fromkeys(names, f"--augment is {args.augment}")
    return why


def idle_finetune(args: argparse.Namespace) -> Idle:
    """Of main_finetune.py."""
    why = _idle_supervised(args)
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        names = ("mixup_prob", "mixup_switch_prob", "mixup_mode")
        why |= dict.fromkeys(names, "there is no mixup and no cutmix")
    if not args.reprob:
        why |= dict.fromkeys(("remode", "recount"), "--reprob is 0")
    if args.aa and "3a" not in args.aa:
        why["color_jitter"] = f"--aa is {args.aa}"
    return why


def idle_linprobe(args: argparse.Namespace) -> Idle:
    """Of main_linprobe.py."""
    why = _idle_supervised(args)
    if args.knn or args.cache_features:
        why |= dict.fromkeys(("flip", "rotate90"), "features are of images as they are")
    if args.grid and not args.knn:
        why["global_pool"] = "--blr auto tries both"
    if args.knn:
        names = ("class_weights", "compile", *["blr"] * args.grid)
        why |= dict.fromkeys(names, "--knn trains nothing")
    return why


def _idle_supervised(args: argparse.Namespace) -> Idle:
    why = {}
    if args.eval or args.predict:
        mode = "--eval" if args.eval else "--predict"
        names = ("compile", "class_weights", "flip", "rotate90")
        why |= dict.fromkeys(names, f"{mode} trains nothing")
        why["finetune"] = f"{mode} takes all weights from --resume"
    if args.predict:
        names = ("data_path", "labels", "nb_classes", "val_fraction")
        why |= dict.fromkeys(names, "--predict takes a folder without labels")
    return why
