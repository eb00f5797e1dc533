"""What reaches the model, the losses and the optimizers: each step's draws, and what flags say."""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, in_processes, objective, run_main, small_mae
from PIL import Image

import engine_finetune
import engine_pretrain
import main_finetune
import main_linprobe
import main_pretrain
from model_mae import MaskedAutoencoderViT
from util.args import pretrain_parser
from util.crop import TorchCrop
from util.lars import LARS
from util.misc import MetricLogger
from util.run import training
from util_contrastive import two_crops

RUN = ["--epochs", 2, "--batch_size", 16, "--output_dir", "", "--warmup_epochs", 0]
VIT = ["--model", "vit_nano_patch4", *TINY[2:], *RUN, "--epochs", 1]


@pytest.fixture
def seen(photos, monkeypatch) -> Callable[..., list[Namespace]]:
    """What a rank's forward passes of pretraining get and draw, three steps an epoch for two."""

    def seen(*flags: object, rank: int = 0) -> list[Namespace]:
        found = []

        def forward(self, imgs, mask_ratio, run=MaskedAutoencoderViT.forward):
            parts = run(self, imgs, mask_ratio)
            if self.training:
                drawn = {"imgs": imgs, "ratio": mask_ratio, "mask": parts["mask"]}
                found.append(Namespace(model=self, **drawn))
            return parts

        with monkeypatch.context() as patch:
            patch.setattr(MaskedAutoencoderViT, "forward", forward)
            patch.setattr(training, "get_rank", lambda: rank)
            words = ["--data_path", photos, *TINY]
            assert run_main(main_pretrain, *words, "--input_size", 32, *RUN, *flags) == 0
        return found

    return seen


def test_an_image_s_views_stand_where_they_are_contrasted(seen):
    """In rows n and N + n; without augmentation they are alike."""
    for step in seen("--augment", "none"):
        assert torch.equal(*step.imgs.chunk(2))


def test_each_step_epoch_and_rank_draws_its_own(seen):
    one, two = (seen("--augment", "none", rank=rank) for rank in (0, 1))
    masks = [step.mask.numpy().tobytes() for step in (*one, *two)]
    assert len(set(masks)) == 2 * 6
    epochs = one[:3], one[3:]
    assert not any(torch.equal(a.imgs, b.imgs) for a, b in zip(*epochs, strict=True))


def test_the_model_is_what_the_flags_say(seen):
    flags = ["--mask_ratio", 0.25, "--std", 0.2, "--norm_pix_loss", "--grad_checkpointing"]
    for step in seen(*flags, "--pool", "cls"):
        assert (step.ratio, step.model.std, step.model.parts.pool) == (0.25, 0.2, "cls")
        assert step.model.norm_pix_loss
        assert step.model.grad_checkpointing
        assert step.mask.sum(dim=1).tolist() == [16] * 32  # of 64 patches


def test_the_contrast_is_what_the_flags_say(monkeypatch):
    parts = {"embedding": F.normalize(torch.randn(8, 4), dim=1)}
    asked = []

    def nt_xent(embeddings, original=engine_pretrain.nt_xent, **kwargs):
        asked.append(kwargs)
        return original(embeddings, **kwargs)

    monkeypatch.setattr(engine_pretrain, "nt_xent", nt_xent)
    for flags in ({}, {"temperature": 1.0, "local_negatives": True}):
        engine_pretrain.total_loss(parts, objective(**flags))
    assert asked == [
        {"temperature": 0.1, "global_negatives": True},
        {"temperature": 1.0, "global_negatives": False},
    ]


def views_of(*flags: str):
    return two_crops(pretrain_parser().parse_args(["--data_path", "x", *flags]))


RAMP = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")


def test_views_differ_in_their_crops_and_in_their_colours():
    views = views_of("--input_size", "32", "--flip", "none")
    torch.manual_seed(0)
    pairs = [views(RAMP) for _ in range(40)]
    assert not any(torch.equal(one[0], two[0]) for one, two in pairs)
    alike = sum(torch.equal(one[1], two[1]) for one, two in pairs)
    assert alike < 10  # neither is blurred, jittered or grey in 1 of 150 pairs


def test_views_are_what_the_flags_say(monkeypatch):
    asked = []

    def get_params(image, scale, ratio, original=TorchCrop.get_params):
        asked.append((scale, ratio))
        return original(image, scale, ratio)

    monkeypatch.setattr(TorchCrop, "get_params", get_params)
    torch.manual_seed(0)
    flags = ["--input_size", "16", "32", "--crop_scale", "0.5", "0.9", "--blur_prob", "1"]
    views = views_of(*flags, "--jitter_strength", "0")(RAMP)
    assert asked == [((0.5, 0.9), pytest.approx((2 * 3 / 4, 2 * 4 / 3)))] * 2
    assert [tuple(crop.shape) for crop, _ in views] == [(3, 16, 32)] * 2
    assert all(parameters[-1] > 0 for _, parameters in views)  # the blur's sigma
    calm = views_of("--input_size", "32", "--blur_prob", "0", "--jitter_strength", "0")
    drawn = torch.stack([parameters for _ in range(40) for _, parameters in calm(RAMP)])
    assert not drawn[:, -2:].any()  # no hue, no blur
    assert set(drawn[:, :-2].flatten().tolist()) == {0.0, 1.0}  # at most grey


@pytest.mark.parametrize(
    ("script", "kind", "flags"),
    [
        (main_pretrain, torch.optim.AdamW, [*TINY, *RUN]),
        (main_finetune, torch.optim.AdamW, [*VIT, "--layer_decay", 0.5]),
        (main_linprobe, LARS, VIT),
    ],
    ids=["pretrain", "finetune", "linprobe"],
)
def test_the_optimizer_s_weight_decay_and_layer_decay(script, kind, flags, photos, monkeypatch):
    made = []

    def remember(self, *args, original=kind.__init__, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(kind, "__init__", remember)
    assert run_main(script, "--data_path", photos, *flags, "--weight_decay", 0.2) == 0
    groups = made[0].param_groups
    assert {group["weight_decay"] for group in groups} - {0.0} == {0.2}
    if script is main_finetune:
        assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(6)}


def test_fine_tuning_is_what_the_flags_say(photos, monkeypatch):
    asked = []

    def epoch(training, *args, original=engine_finetune.train_one_epoch):
        asked.append((training.model.module, *args))
        return original(training, *args)

    monkeypatch.setattr(engine_finetune, "train_one_epoch", epoch)
    flags = ["--drop_path", 0.3, "--smoothing", 0.2, "--clip_grad", 0.5]
    for mix in ([], ["--mixup", 0.8, "--cutmix", 0.6, "--mixup_prob", 0.9]):
        assert run_main(main_finetune, "--data_path", photos, *VIT, *flags, *mix) == 0
    (model, _, without, smoothing, _), (_, _, mixup, _, _) = asked
    assert (without, smoothing) == (None, 0.2)
    rates = [block.drop_path1.drop_prob for block in list(model.blocks)[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (0.8, 0.6, 0.9)
    assert mixup.label_smoothing == 0.2


def test_a_grid_of_probes_is_chosen_by_images_that_it_was_not_trained_on(photos, monkeypatch):
    rows = []

    def accuracies(self, features, labels, original=engine_finetune.GridHeads.accuracies):
        rows.append(len(features))
        return original(self, features, labels)

    monkeypatch.setattr(engine_finetune.GridHeads, "accuracies", accuracies)
    flags = ["--data_path", photos, *VIT, "--blr", "auto", "--batch_size", 8]
    assert run_main(main_linprobe, *flags) == 0
    assert rows == [4]  # a tenth of each class's 24, at least one


def test_initial_weights_have_mae_s_spread():
    """Xavier's bound, sqrt(6 / (in + out)), for linear maps and the patch embedding as one."""
    model = small_mae()
    matrices = {name: p for name, p in model.named_parameters() if p.ndim in (2, 4)}
    assert len(matrices) > 10
    for name, weight in matrices.items():
        rows = weight.flatten(1)
        bound = (6 / sum(rows.shape)) ** 0.5
        assert 0.9 * bound < rows.abs().max() <= bound, name
        assert rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.4)


def test_embeddings_in_half_precision_have_unit_length():
    model = small_mae()
    widths = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *args: widths.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        embedding = model(torch.randn(4, 3, 32, 32), 0.5)["embedding"]
    assert widths == [torch.bfloat16]
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def log_a_step(rank: int, out: str) -> None:
    metrics = MetricLogger()
    metrics.update(16, loss=torch.tensor(1.0 + 2 * rank))
    torch.save(metrics.window() | {"seconds": metrics._epoch.seconds}, f"{out}/{rank}.pth")


def test_logs_are_of_all_ranks(tmp_path):
    in_processes(log_a_step, 2, str(tmp_path))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert found["loss"] == 2
        assert found["images_per_second"] == pytest.approx(2 * 16 / found["seconds"])
