"""main_pretrain.py with one change to the model that no flag makes; `study.py` runs it.

For encoders narrower or wider than 128, which is how `head=` tells its layers from others.

python benchmarks/study/variants.py target=unit --data_path IMAGES ...
"""

import sys
from collections.abc import Callable

import paths  # noqa: F401
from torch import Tensor, nn

import main_pretrain
import model_mae
from model_mae import PROJECTION_DIM, MaskedAutoencoderViT
from util.run.launch import launch

Model = MaskedAutoencoderViT


def level_unscaled() -> None:
    """The noise level embedded as the public release does: sigma itself, not 1000 sigma / std."""
    model_mae.NOISE_TIME_SCALE = 0.05  # the default std


def level_none() -> None:
    """The decoder is not told the noise level."""
    model_mae.noise_level_embedding = lambda level: level.new_zeros(len(level), 128)


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


def pool_patches() -> None:
    """Contrast of the mean over patch tokens, without cls."""
    _change_pooling(lambda latent: latent[:, 1:])


def pool_cls() -> None:
    """Contrast of the cls token alone."""
    _change_pooling(lambda latent: latent[:, :1])


def _change_pooling(choose: Callable[[Tensor], Tensor]) -> None:
    forward_projection = Model.forward_projection
    Model.forward_projection = lambda self, latent: forward_projection(self, choose(latent))


def head_1() -> None:
    """A projection head of one linear layer."""
    _change_head(1)


def head_3() -> None:
    """A projection head of three linear layers."""
    _change_head(3)


def _change_head(depth: int) -> None:
    mlp = model_mae._mlp

    def changed(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
        if out_dim != PROJECTION_DIM:
            return mlp(in_dim, hidden_dim, out_dim)
        hidden = []
        for _ in range(depth - 1):
            hidden += [nn.Linear(in_dim, hidden_dim), nn.ReLU()]
            in_dim = hidden_dim
        return nn.Sequential(*hidden, nn.Linear(in_dim, out_dim))

    model_mae._mlp = changed


VARIANTS = {
    "level=unscaled": level_unscaled,
    "level=none": level_none,
    "target=unit": target_unit,
    "target=patch": target_patch,
    "pool=patches": pool_patches,
    "pool=cls": pool_cls,
    "head=1": head_1,
    "head=3": head_3,
}


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"variants.py: error: the first argument is one of {', '.join(VARIANTS)}")
    VARIANTS[sys.argv.pop(1)]()
    launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args())
