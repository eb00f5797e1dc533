"""main_pretrain.py with one change to the model that no flag makes; `study.py` runs it.

python benchmarks/study/variants.py target=unit --data_path IMAGES ...
"""

import sys
from collections.abc import Callable

import paths  # noqa: F401
from torch import Tensor

import main_pretrain
import model_mae
from model_mae import MaskedAutoencoderViT
from util.run.launch import launch

Model = MaskedAutoencoderViT


def level_unscaled() -> None:
    """The noise level embedded as the public release does: sigma itself, not 1000 sigma / std."""
    model_mae.NOISE_TIME_SCALE = 0.05  # the default std


def level_none() -> None:
    """The decoder is not told the noise level."""
    model_mae.noise_level_embedding = lambda level, dim=128: level.new_zeros(len(level), dim)


def target_unit() -> None:
    """The target is e, of variance 1, in place of sigma e."""
    _change_target(lambda self, noise, level: noise / _sigma(self, level))


def target_patch() -> None:
    """The target is the noise normalised within each patch."""

    def normalised(self: Model, noise: Tensor, level: Tensor) -> Tensor:
        patches = self.patchify(noise / _sigma(self, level))
        mean = patches.mean(dim=-1, keepdim=True)
        return self.unpatchify((patches - mean) / self.patch_std(patches))

    _change_target(normalised)


def _sigma(model: Model, level: Tensor) -> Tensor:
    return (model.std * level).clamp_min(1e-6).view(-1, 1, 1, 1)


def _change_target(change: Callable[[Model, Tensor, Tensor], Tensor]) -> None:
    add_noise = Model.add_noise

    def changed(self: Model, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, noise, level = add_noise(self, imgs)
        return seen, change(self, noise, level), level

    Model.add_noise = changed


VARIANTS = {
    "level=unscaled": level_unscaled,
    "level=none": level_none,
    "target=unit": target_unit,
    "target=patch": target_patch,
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"variants.py: error: the first argument is one of {', '.join(VARIANTS)}")
    VARIANTS[sys.argv.pop(1)]()
    launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args())
