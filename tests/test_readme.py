"""What the README says is so: its commands run as written, but for sizes and paths."""

import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, free_port, run
from PIL import Image

from model_mae import mae_vit_tiny_patch16
from util import visualize
from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.run import checkpoint
from util.slurm.flags import job_parser

README = (ROOT / "README.md").read_text()


def command(name: str) -> str:
    """The code block after the comment <!-- name -->."""
    (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
    return block


def words(name: str, **values: object) -> tuple[dict[str, str], list[str]]:
    """A command's environment and words, with flags' values replaced and ours for `python`."""
    parts = shlex.split(command(name).replace("\\\n", " "))
    env = {}
    while "=" in parts[0]:
        key, value = parts.pop(0).split("=")
        env[key] = value
    parts[0] = {"python": sys.executable}[parts[0]]
    for flag, value in values.items():
        places = [i for i, part in enumerate(parts) if part.startswith(f"--{flag}")]
        assert places, f"--{flag} is not in the README's command"
        for i in places:
            if "=" in parts[i]:
                parts[i] = f"--{flag}={value}"
            else:
                parts[i + 1] = str(value)
    return env, parts


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("can", "CAN = 0.679 reconstruction + 0.291 noise + 0.03 contrastive, mask ratio 0.5"),
        ("mae", "MAE = 1 reconstruction + 0 noise + 0 contrastive, mask ratio 0.75, no noise"),
    ],
)
def test_pretraining_commands_run_two_steps(name, objective, photos, tmp_path):
    env, parts = words(
        name,
        nproc_per_node=2,
        data_path=photos,
        output_dir=tmp_path / "out",
        log_dir=tmp_path / "logs",
        num_workers=1,
        model="mae_vit_tiny_patch16",
        batch_size=3,
        dist_url=f"tcp://localhost:{free_port()}",
        epochs=1,
    )
    result = run(*parts, **env)
    assert result.returncode == 0, result.stderr
    assert objective in result.stdout
    assert "batch: 24 images = 3 x 4 accumulated x 2 processes, 2 steps per epoch" in result.stdout
    assert "epoch 0 [2/2]" in result.stdout
    state = torch.load(tmp_path / "out" / "checkpoint-0.pth", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert list((tmp_path / "logs").glob("events*"))


def test_linear_evaluation_command_runs(photos, tmp_path):
    """On a checkpoint as pretraining writes it."""
    torch.manual_seed(0)
    weights = mae_vit_tiny_patch16().state_dict()
    checkpoint.save({"model": weights, "epoch": 49}, tmp_path / "checkpoint-49.pth")
    env, parts = words(
        "linprobe",
        nproc_per_node=2,
        data_path=photos,
        batch_size=12,
        model="vit_tiny_patch16",
        finetune=tmp_path / "checkpoint-49.pth",
        epochs=1,
        output_dir=tmp_path / "out",
    )
    result = run(*parts, "--num_workers", "1", **env)
    assert result.returncode == 0, result.stderr
    assert "epoch 0 [2/2]" in result.stdout
    assert "top-1" in result.stdout.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoint-best.pth").exists()


@pytest.mark.slow
def test_quick_start_trains_and_draws(tmp_path):
    """The first command after its installation; the second is what runs these tests."""
    install, *rest = command("quickstart").replace("\\\n", " ").split(" &&\n")
    assert "pip install -r requirements.txt" in install
    script = " && ".join(rest).replace("quickstart", str(tmp_path / "quickstart"))
    script = script.replace("python ", f"{shlex.quote(sys.executable)} ")
    result = run("bash", "-c", script, timeout=900)
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"reconstruction (\d\.\d+)", result.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    assert Image.open(tmp_path / "quickstart" / "reconstructions.png").size[0] > 800
    names = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {"checkpoint-last.pth", "log.txt", "reconstructions.png"} <= names
    assert any(name.startswith("events") for name in names)
    random, trained = (float(x) for x in re.findall(r"best top-1 (\d+\.\d+)", result.stdout))
    assert trained > random + 3  # percent; 92.5 and 86.9 when this was written


def test_every_flag_it_mentions_exists():
    scripts = (pretrain_parser(), finetune_parser(), linprobe_parser())
    parsers = [*scripts, *map(job_parser, scripts), visualize.get_args_parser()]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts"}
    known |= {"--logdir"}  # tensorboard's; above, launchers'
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', benchmark.read_text()))
    assert set(re.findall(r"--[a-z_0-9]+", README.replace("<!--", ""))) <= known


def test_defaults_in_the_flag_table_are_the_parser_s():
    rows = re.findall(r"^\| (`--.*?) \|", README, re.MULTILINE)
    shown = [pair for row in rows for pair in re.findall(r"--(\w+) ([\d.e-]+|auto)[ `]", row)]
    assert len(shown) > 8
    defaults = vars(pretrain_parser().parse_args(["--data_path", "x"]))
    for name, value in shown:
        if (name, value) in {("weight_simclr", "0"), ("weight_mae", "0"), ("resume", "auto")}:
            continue  # values to give, not defaults
        assert defaults[name] == type(defaults[name])(value), name


def test_every_file_it_mentions_exists():
    names = set(re.findall(r"`([\w/]+\.(?:py|png|yml|txt))`", README)) - {"log.txt"}
    names -= {"reconstructions.png"}
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_conda_installs_the_same_requirements():
    assert "- -r requirements.txt" in (ROOT / "can.yml").read_text()
