"""The study's machinery: each variant is what it says, a sweep leaves logs and is not repeated."""

import argparse
import itertools
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fill, python, run_main
from test_documents import DOCUMENTS, STUDY

import main_pretrain
import model_mae
from model_mae import MaskedAutoencoderViT
from util.args import pretrain_parser
from util.recipes import RECIPES

sys.path.insert(0, str(ROOT / "benchmarks/study"))
import cost
import downstream
import folders
import noise
import study
import sweeps
import tables
from analysis import effective_rank
from flops import forward_flops
from variants import VARIANTS


@pytest.fixture
def variant(monkeypatch):
    """Applies a variant, and takes it back after the test."""
    monkeypatch.setattr(MaskedAutoencoderViT, "add_noise", MaskedAutoencoderViT.add_noise)
    for name in ("NOISE_TIME_SCALE", "noise_level_embedding"):
        monkeypatch.setattr(model_mae, name, getattr(model_mae, name))
    return lambda name: VARIANTS[name]()


def tiny() -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        8, 4, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1,
        decoder_num_heads=2, noise_loss=True,
    )  # fmt: skip


def test_targets_of_unit_variance(variant):
    """The encoder sees the same noise of at most std; only what is to be predicted differs."""
    imgs = fill((64, 3, 8, 8), 1, 1.0)
    model = tiny()
    torch.manual_seed(1)
    seen, noise, level = model.add_noise(imgs)
    for name in ("target=unit", "target=patch"):
        variant(name)
        torch.manual_seed(1)
        seen_too, target, _ = model.add_noise(imgs)
        torch.testing.assert_close(seen_too, seen)
        expected = noise / (0.05 * level.view(-1, 1, 1, 1))
        if name == "target=unit":
            torch.testing.assert_close(target, expected)
        else:
            patches = model.patchify(target)
            torch.testing.assert_close(patches.mean(-1), torch.zeros(64, 4), atol=1e-5, rtol=0)
            torch.testing.assert_close(patches.std(-1), torch.ones(64, 4), atol=1e-3, rtol=0)


def test_noise_levels_told_otherwise(variant):
    level = torch.linspace(0.1, 1, 5)
    told = model_mae.noise_level_embedding(level)
    assert (told.std(dim=0) > 0.1).any()
    variant("level=unscaled")
    sigma = 0.05 * level  # the release embeds it as it is: the first frequency is 1
    torch.testing.assert_close(model_mae.noise_level_embedding(level)[:, 0], sigma.sin())
    variant("level=none")
    assert not model_mae.noise_level_embedding(level).any()


def record(name: str, seed: int, accuracy: float, right: list[int]) -> dict:
    """A log with the same accuracy in all readouts."""
    probe = {f"{pool}-100": {"test_acc1": accuracy} for pool in ("cls", "pooled")}
    bits = np.packbits(np.array(right, np.uint8)).tobytes().hex()
    return {
        "name": name, "seed": seed, "test_images": len(right), "probe": probe,
        "knn": {"cls": accuracy, "pooled": accuracy}, "right": {"pooled": bits},
    }  # fmt: skip


def test_deviations_between_seeds_are_pooled():
    """Two runs of deviations 1 and 3 with one degree of freedom each; one seed alone has none."""
    runs = [[50 - 0.5**0.5, 50 + 0.5**0.5], [60 - 4.5**0.5, 60 + 4.5**0.5], [99.0]]
    logs = [[record("x", i, value, [1]) for i, value in enumerate(run)] for run in runs]
    assert tables.seed_deviations(logs)["kNN pooled"] == pytest.approx(5**0.5)


def test_disagreement_between_runs_and_between_seeds():
    a, b, c = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 0, 1]  # five images: no whole byte
    logs = {"x": [record("x", 0, 0, a), record("x", 1, 0, b)], "y": [record("y", 2, 0, c)]}
    logs["z"] = [record("z", seed, 0, [0] * 5) for seed in (0, 1, 2)]  # seeds of its own kind agree
    pairs = {"xy": [3, 2], "xx": [1], "zz": [0, 0, 0], "yz": [2, 2], "xz": [3, 3, 2, 2]}
    between, within = tables.disagreements(logs)
    between_too = np.mean(pairs["xy"] + pairs["yz"] + pairs["xz"]) / 5
    within_too = np.mean(pairs["xx"] + pairs["zz"]) / 5
    assert (between, within) == (pytest.approx(between_too), pytest.approx(within_too))
    error = 100 * ((between - within) / 5) ** 0.5
    assert tables.images_error(between, within, 5) == pytest.approx(error)
    assert tables.disagreements({"x": logs["x"]}) == (0, pytest.approx(1 / 5))


@pytest.mark.parametrize(("change", "shown"), [(1.9, "+1.9"), (-2.1, "*-2.1*"), (3.1, "**+3.1**")])
def test_differences_are_marked_beyond_two_and_three_errors(change, shown, capsys):
    can = [record("can", seed, 50.0, [1]) for seed in range(3)]
    columns = ("probe cls-100", "probe pooled-100", "kNN cls", "kNN pooled")
    deviations = dict.fromkeys(columns, 0.6 / (1 + 1 / 3) ** 0.5)  # one seed against three
    tables.differences({"x": [record("x", 0, 50 + change, [1])]}, can, deviations, images=0.8)
    assert capsys.readouterr().out.splitlines()[3] == "| x | 1 |" + f" {shown} ± 1.0 |" * 4


def test_epochs_of_equal_flops():
    """At the study's size CAN's 20 epochs are MAE's 33 and SimCLR's 12, within 2 %."""
    epochs = {run.name: study.epochs_of(run, 20, "nano_patch4") for run in sweeps.METHODS}
    assert epochs["can"] == epochs["mae"] == epochs["simclr"] == 20
    for name, objective in (("mae-equal-flops", "MAE"), ("simclr-equal-flops", "SimCLR")):
        can, other = (forward_flops("mae_vit_nano_patch4", o, 32) for o in ("CAN", objective))
        assert epochs[name] * other == pytest.approx(20 * can, rel=0.02)


def test_each_method_has_as_many_runs_to_choose_from():
    names = [run.name for run in sweeps.RECIPES]
    assert len(set(names)) == len(names) == 36
    assert [sum(n.startswith(m) for n in names) for m in ("can-", "mae-", "simclr-")] == [12] * 3
    for run in sweeps.SWEEPS["recipes"].runs:  # flags as study.py gives them to main_pretrain.py
        pretrain_parser().parse_args(
            ["--data_path", "x", *study.PRETRAIN.split(), *run.flags.split()]
        )


CHANGED = {  # of the paper's recipe: what the study's run of each changes
    "norm-pix": {"norm_pix_loss"},
    "targets": {"norm_pix_loss", "noise_target"},
    "bn-head": {"projection_layers", "projection_dim", "projection_norm"},
    "patches": {"pool"},
    "level": {"noise_level_tokens", "mask_token_width"},
    "level-alone": {"noise_level_tokens"},
    "mask-token": {"mask_token_width"},
    "weights": {"weight_noise"},
    "augment": {"crop_scale", "jitter_strength"},
}


def test_every_choice_of_the_papers_recipe_is_in_a_run():
    parse = pretrain_parser().parse_args
    release = vars(parse(["--data_path", "x"]))
    paper = RECIPES["paper"] | {"projection_dim": 512}  # as the study's runs of the paper's have it
    runs = {run.name: run.flags.split() for run in sweeps.SWEEPS["recipes"].runs}
    for row, names in CHANGED.items():
        flags = vars(parse(["--data_path", "x", *runs[f"can-{row}"]]))
        changed = {name: flags[name] for name in flags if flags[name] != release[name]}
        assert changed == {name: paper[name] for name in names}, row
    assert set.union(*CHANGED.values()) == {name for name in paper if paper[name] != release[name]}


def test_recipes_are_chosen_by_training_images(photos, tmp_path):
    flags = ["--data_path", str(photos), "--work_dir", str(tmp_path), "--what", "recipes"]
    args = study.get_args_parser().parse_args([*flags, "--images", "32", "--test_images", "16"])
    folder = Path(folders.prepare(study.complete(args, "recipes"))["100"])
    names = {s: sorted(p.resolve() for p in (folder / s).rglob("*.jpg")) for s in ("train", "val")}
    assert sorted(names["train"] + names["val"]) == sorted(
        p.resolve() for p in (photos / "train").rglob("*.jpg")
    )
    assert (len(names["train"]), len(names["val"])) == (32, 16)


def test_effective_rank():
    """Of features spread evenly over three directions of eight, three."""
    directions = torch.eye(8)[:3]
    assert effective_rank(torch.cat([directions, -directions])) == pytest.approx(3, rel=1e-5)


def test_what_the_best_linear_prediction_of_noise_leaves():
    """For pixels of variance 1 the mean over levels l of 1 / (1 + s^2 l^2) is atan(s) / s."""
    s = 0.7
    raw, unit = noise.shares_left(torch.ones(1), s)
    assert unit == pytest.approx(math.atan(s) / s, abs=1e-3)
    assert raw == pytest.approx(3 / s**2 * (1 - math.atan(s) / s), abs=1e-3)


def test_results_are_the_tables_of_the_logs(capsys):
    tables.main(tables.get_args_parser().parse_args([]))
    results = [line for name in STUDY for line in DOCUMENTS[name].splitlines()]
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in shown) >= 30
    assert [line for line in shown if line not in results] == []


def test_tables_of_one_sweep_alone(tmp_path, capsys):
    shutil.copytree(study.LOGS / "noise", tmp_path / "noise")
    tables.main(tables.get_args_parser().parse_args(["--log_dir", str(tmp_path)]))
    assert capsys.readouterr().out.startswith("| run | epochs |")


def test_the_documents_numbers_are_the_logs():
    readme = DOCUMENTS["README.md"] + DOCUMENTS["PRETRAIN.md"]
    measured = tables.read_cost(study.LOGS)
    finetuned = tables.read(study.LOGS / "downstream", sweeps.SCALE)
    for name, records in tables.read(study.LOGS / "scale", sweeps.SCALE).items():
        found = tables.accuracies(records)
        cells = [found.get("probe chosen-100", []), found["kNN pooled"]]
        cells.append([r["finetuned"]["1"] for r in finetuned.get(name, [])])
        cells = " | ".join(map(tables.written, cells))
        hours = f"{tables.processor_hours(records[0], measured):.2f}" if name in measured else ""
        assert f" | {hours} | {cells} |" in readme, name
    for name, records in tables.read(study.LOGS / "small", sweeps.SMALL).items():
        values = tables.accuracies(records)["probe chosen-100"]
        minutes = f"{60 * tables.processor_hours(records[0], measured):.1f}"
        by_seed = ", ".join(f"{value:.1f}" for value in values)
        assert f" | {minutes} | {by_seed} | {tables.written(values)} |" in readme, name
    recipe = readme.split("<!-- small -->")[1].split("```")[1].replace("\\\n", " ").split()
    assert sweeps.BEST_CAN in " ".join(recipe)
    for flags in (study.PRETRAIN, f"--blr auto {study.PROBE_LENGTH['100']}"):
        words = flags.split()
        for pair in zip(words[::2], words[1::2], strict=True):
            assert pair in list(itertools.pairwise(recipe))


@pytest.mark.slow
def test_encoders_are_fine_tuned_and_transferred(photos, tmp_path, monkeypatch, capsys):
    """With a tenth of the labels, and digits in two folds."""
    monkeypatch.setattr(downstream, "FOLDS", 2)
    monkeypatch.setattr(downstream, "SETS", {"digits": downstream.digits})
    schedule = {"10": "--batch_size 4 --epochs 2 --warmup_epochs 0"}
    monkeypatch.setattr(downstream, "SCHEDULE", schedule)
    monkeypatch.setattr(downstream, "PROBE", f"{downstream.PROBE} --epochs 6")
    train = tmp_path / "scale/can-3/train"
    flags = ["--data_path", photos, "--model", "mae_vit_nano_patch4", "--input_size", "32"]
    flags += ["--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
    assert run_main(main_pretrain, *flags, "--output_dir", train) == 0
    flags = ["--data_path", photos, "--work_dir", tmp_path, "--log_dir", tmp_path]
    flags += ["--seeds", "3", "--images", "40", "--test_images", "8", "--only", "can", "mae"]
    flags += ["--precision", "fp32"]  # bf16 is slow where processors do not have it
    args = study.get_args_parser().parse_args(list(map(str, flags)))
    log = study.log_path(sweeps.Run("can"), 3, study.complete(args, "scale"))
    log.write_text("{}")  # it has ended
    downstream.main(args)
    shown = capsys.readouterr().out
    assert "mae 3: not pretrained yet" in shown
    (log,) = (tmp_path / "downstream").glob("*.json")
    found = json.loads(log.read_text())
    assert found["finetuned"]["10"] % 12.5 == 0  # all eight images, and not those watched alone
    assert all(50 < value < 100 for value in found["transfer"]["digits"]["probe"])
    assert all(50 < value < 100 for value in found["transfer"]["digits"]["knn"])
    tables.downstream_table({"can": [found]})
    assert "| can | 1 (1 in fp32) | " in capsys.readouterr().out
    folds = [tmp_path / f"transfer/digits-{fold}" for fold in range(2)]
    files = [{f.relative_to(p / "val") for f in (p / "val").rglob("*.png")} for p in folds]
    assert len(files[0] | files[1]) == 1797
    assert not files[0] & files[1]


def test_the_cost_of_an_image_is_measured_in_turns_without_start_up(photos, monkeypatch, capsys):
    """Start-up takes 5 s here, an epoch of n images n s of CAN and 2 n s of the others."""
    asked = []

    class Launcher:
        def __call__(self, script: str, *flags: str) -> None:
            asked.append(pretrain_parser().parse_args(shlex.split(" ".join(flags))))
            factor = 1 if asked[-1].weight_mae < 1 and asked[-1].weight_simclr < 1 else 2
            self.processor_seconds = 5 + factor * 40 * asked[-1].epochs

    monkeypatch.setattr(cost, "Launcher", Launcher)
    flags = {"data_path": str(photos), "size": "nano_patch4", "batch_size": 40, "rounds": 2}
    cost.main(argparse.Namespace(**flags))
    found = json.loads(capsys.readouterr().out)["seconds per 1,000 images"]
    assert found["can"] == found["can-paper"] == [1000, 1000]
    assert found["mae"] == found["simclr"] == [2000, 2000]
    assert "random" not in found
    assert [args.epochs for args in asked] == [1, 2] * 2 * len(found)
    run = {"name": "mae", "epochs": 3, "images": 100, "batch_size": 40}  # steps are full
    assert tables.processor_hours(run, found) == pytest.approx(3 * 80 * 2 / 3600)


def test_one_command_carries_out_every_sweep_as_it_is_set(photos, tmp_path, monkeypatch, capsys):
    asked = {}

    def carry_out(run, seed, args, data):
        found = asked.setdefault(args.what, (data["100"], args.epochs, []))
        found[-1].append((run.name, seed))
        return f"{args.what} {run.name}"

    monkeypatch.setattr(study, "carry_out", carry_out)
    where = ["--data_path", str(photos), "--work_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    study.main(study.get_args_parser().parse_args([*where, "--only", "can", "can-weights"]))
    seeds = {what: found[-1] for what, found in asked.items()}
    assert seeds == {
        "methods": [("can", 0), ("can", 1), ("can", 2)],
        "recipes": [("can-weights", 0)],
        "scale": [("can", 0)],
        "small": [("can", 0), ("can", 1), ("can", 2)],
    }
    assert asked["scale"][:2] == (str(tmp_path / "50000-10000-100"), 40)
    assert asked["recipes"][0] == str(tmp_path / "9000-1000-100-held-out")
    assert capsys.readouterr().out.count("can") == 8


@pytest.mark.slow
def test_a_sweep_leaves_logs_and_is_not_repeated(photos, tmp_path):
    command = [
        "benchmarks/study/study.py", "--data_path", photos, "--work_dir", tmp_path / "work",
        "--log_dir", tmp_path, "--what", "ablations", "--only", "target-unit",
        "--seeds", "3", "--images", "40", "--test_images", "8", "--epochs", "3",
        "--batch_size", "8", "--precision", "fp32",
    ]  # fmt: skip
    done = python(*map(str, command), timeout=300)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "ablations" / "target-unit-3.json"
    log = json.loads(path.read_text())
    assert [line["epoch"] for line in log["training"]] == [0, 1, 2]
    assert set(log["probe"]) == {"cls-100", "pooled-100"}
    assert set(log["knn"]) == {"cls", "pooled"}
    right = np.unpackbits(np.frombuffer(bytes.fromhex(log["right"]["pooled"]), np.uint8))
    assert abs(right.sum() - 8 * log["probe"]["pooled-100"]["test_acc1"] / 100) <= 1
    assert log["training"][-1]["train_noise_zero"] == pytest.approx(1.0, rel=0.4)
    assert set(log["analysis"]["trunk_gradient"]) == {"reconstruction", "noise", "contrastive"}
    again = python(*map(str, command))
    assert (again.returncode, again.stdout) == (0, "")
    other = python(*map(str, command), "--precision", "bf16")
    assert (other.returncode, other.stdout) == (0, f"{path}, of fp32, counts as done\n")
    other = python(*map(str, command), "--epochs", "4")
    assert other.returncode == 1
    assert "has epochs 3, not 4" in other.stderr.splitlines()[-1]
