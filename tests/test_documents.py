"""What the documents say is so: their commands run as written, but for sizes and paths."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port, run, run_main
from packaging.version import Version
from PIL import Image

import main_linprobe
from model_mae import mae_vit_tiny_patch16
from util import embed, export, shards, visualize
from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.run import checkpoint
from util.slurm.flags import job_parser

# Lines at most, so that each is read in one sitting.
LENGTHS = {
    "README.md": 200,
    "PRETRAIN.md": 150,
    "FINETUNE.md": 130,
    "CONTRIBUTING.md": 40,
    "docs/DATA.md": 80,
    "docs/TASK.md": 50,
    "docs/SLURM.md": 80,
    "docs/RESUMING.md": 60,
    "docs/DIFFERENCES.md": 30,
    "docs/CODE.md": 50,
    "benchmarks/README.md": 120,
}
STUDY = tuple(f"benchmarks/study/{name}.md" for name in ("RESULTS", "RECIPES", "FIRST"))
DOCUMENTS = {name: (ROOT / name).read_text() for name in (*LENGTHS, *STUDY)}
PARSERS = {
    "main_pretrain": pretrain_parser,
    "main_finetune": finetune_parser,
    "main_linprobe": linprobe_parser,
    "submitit_pretrain": lambda: job_parser(pretrain_parser()),
    "submitit_finetune": lambda: job_parser(finetune_parser()),
    "submitit_linprobe": lambda: job_parser(linprobe_parser()),
    "util.visualize": visualize.get_args_parser,
    "util.export": export.get_args_parser,
    "util.shards": shards.get_args_parser,
    "util.embed": embed.get_args_parser,
}
OPTIONAL = {"tifffile", "datasets", "matplotlib", "onnxscript"}  # the others are for tests
OPTIONAL |= {"webdataset", "transformers", "onnxruntime", "pytest", "ruff"}
LAUNCHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max_restarts"}
LAUNCHERS |= {"--ipc=host", "--shm-size"}  # Docker's


def command(name: str) -> str:
    """The code block after the comment <!-- name -->, of whichever document has it."""
    pattern = rf"<!-- {name} -->\n```bash\n(.*?)```"
    (block,) = re.findall(pattern, "\n".join(DOCUMENTS.values()), re.DOTALL)
    return block


def words(name: str, **values: object) -> tuple[dict[str, str], list[str]]:
    """A command's environment and words, with flags' values replaced and ours for `python`."""
    parts = shlex.split(command(name).replace("\\\n", " "))
    env = {}
    while "=" in parts[0]:
        key, value = parts.pop(0).split("=")
        env[key] = value
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[parts[0]]
    parts[:1] = [sys.executable, *launcher]
    for flag, value in values.items():
        places = [i for i, part in enumerate(parts) if part.startswith(f"--{flag}")]
        assert places, f"--{flag} is not in the command"
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
def test_the_release_s_commands_run_two_steps(name, objective, photos, tmp_path):
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


@pytest.mark.parametrize("name", ["own", "own-torchrun"])
def test_own_images_are_trained_on(name, photos, tmp_path):
    """The folder tree is that of the README: `photos` has train/CLASS and val/CLASS."""
    small = {"model": "mae_vit_tiny_patch16", "input_size": 32, "batch_size": 8, "epochs": 1}
    launch = {"nproc_per_node": 2} if "torchrun" in name else {}
    env, parts = words(name, data_path=photos, output_dir=tmp_path / "out", **small, **launch)
    result = run(*parts, "--num_workers", "0", **env)
    assert result.returncode == 0, result.stderr
    assert "epoch 0 [" in result.stdout
    assert (tmp_path / "out" / "checkpoint-last.pth").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A checkpoint as pretraining writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "checkpoint-49.pth"
    checkpoint.save({"model": mae_vit_tiny_patch16().state_dict(), "epoch": 49}, path)
    return path


@pytest.mark.parametrize("name", ["linprobe", "finetune"])
def test_supervised_commands_run(name, encoder, photos, tmp_path):
    env, parts = words(
        name,
        nproc_per_node=2,
        data_path=photos,
        batch_size=12 if name == "linprobe" else 6,
        model="vit_tiny_patch16",
        finetune=encoder,
        epochs=1,
        output_dir=tmp_path / "out",
    )
    result = run(*parts, "--num_workers", "1", **env)
    assert result.returncode == 0, result.stderr
    assert "epoch 0 [" in result.stdout
    assert "top-1" in result.stdout.splitlines()[-1]
    assert (tmp_path / "out" / "checkpoint-best.pth").exists()


def test_knn_command_runs(encoder, photos, capsys):
    _, parts = words("knn", data_path=photos, model="vit_tiny_patch16", finetune=encoder)
    assert run_main(main_linprobe, *parts[2:], "--num_workers", 0) == 0
    assert "kNN top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_start_trains_draws_and_probes(tmp_path):
    """After its installation, which is what CI's environment was made by."""
    steps = [command(name).strip() for name in ("train", "look", "probe")]
    random = steps[-1].replace("--finetune quickstart/checkpoint-last.pth ", "")
    script = " && ".join([*steps, random]).replace("quickstart", str(tmp_path / "quickstart"))
    script = script.replace("\\\n", " ").replace("python ", f"{shlex.quote(sys.executable)} ")
    result = run("bash", "-c", script, timeout=900)
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"reconstruction (\d\.\d+)", result.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    assert "8 images; rows: clean, 50% masked, reconstructed" in result.stdout
    assert Image.open(tmp_path / "quickstart" / "reconstructions.png").size[0] > 800
    names = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {"checkpoint-last.pth", "log.txt", "reconstructions.png"} <= names
    assert any(name.startswith("events") for name in names)
    trained, random = (float(x) for x in re.findall(r"epoch 59: top-1 ([\d.]+)", result.stdout))
    assert trained > random + 3  # percent; 92.2 and 86.1 when this was written


def test_set_up_in_one_command_is_the_quick_start_s():
    install, train = command("install").strip(), command("train").strip()
    assert command("main").strip() == f"{install} &&\n{train}"
    assert command("test").strip() == f"{install} &&\npython -m pytest"
    assert "- -r requirements.txt" in (ROOT / "can.yml").read_text()


def commands() -> Iterator[tuple[str, str, str]]:
    """(document, script, flags) of every command in a code block, or between backticks."""
    for name, text in DOCUMENTS.items():
        found = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        found += re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in "\n".join(found).replace("\\\n", " ").splitlines():
            for part in re.sub(r"\s#.*", "", line).split("&&"):
                script = re.search(
                    r"(benchmarks/.*\.py|\w+(?=\.py))\S*(.*)|-m (util\.\w+)(.*)", part
                )
                if script:
                    yield name, script[1] or script[3], script[2] or script[4] or ""


@pytest.mark.parametrize(("document", "script", "flags"), list(commands()))
def test_every_command_has_flags_that_its_script_takes(document, script, flags):
    flags = shlex.split(flags)
    if script.startswith("benchmarks/"):  # which `test_benchmarks` and `test_study` run
        shared = ["benchmarks/study/tables.py"]  # whose flags draw.py takes, too
        shared += ["benchmarks/study/study.py"] if script.endswith("downstream.py") else []
        code = "".join((ROOT / name).read_text() for name in (script, *shared))
        known = re.findall(r'add_argument\(\s*"(--\w+)"', code)
        assert {flag for flag in flags if flag.startswith("--")} <= set(known)
    elif flags not in (["--help"], []):
        PARSERS[script]().parse_args(flags)


def test_every_flag_mentioned_exists():
    known = LAUNCHERS | {"--logdir", "--check"}  # tensorboard's, ruff's
    for parser in PARSERS.values():
        known |= parser()._option_string_actions.keys()
    for benchmark in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', benchmark.read_text()))
    for name, text in DOCUMENTS.items():
        shown = re.findall(r"(?<![\w-])--[a-z][a-z_0-9]*(?:-size|=host)?", text.replace("<!--", ""))
        assert set(shown) <= known, name


def test_defaults_in_the_flag_table_are_the_parser_s():
    rows = re.findall(r"^\| (`--.*?) \|", DOCUMENTS["PRETRAIN.md"], re.MULTILINE)
    shown = [pair for row in rows for pair in re.findall(r"--(\w+) ([\d.e-]+|auto)[ `]", row)]
    assert len(shown) > 8
    defaults = vars(pretrain_parser().parse_args(["--data_path", "x"]))
    for name, value in shown:
        if (name, value) in {("weight_simclr", "0"), ("weight_mae", "0"), ("resume", "auto")}:
            continue  # values to give, not defaults
        assert defaults[name] == type(defaults[name])(value), name


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_exist(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    anchors = re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", text)
    for file, anchor in anchors:
        target = (ROOT / name).parent / file if file else ROOT / name
        titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert anchor in slugs, anchor
    for file in re.findall(r"`((?:\w+/)*\w+\.(?:py|yml|sh))`", text):
        folders = (ROOT, (ROOT / name).parent, ROOT / "benchmarks")
        assert any((Path(folder) / file).exists() for folder in folders), file


@pytest.mark.parametrize("name", LENGTHS)
def test_documents_are_short(name):
    assert len(DOCUMENTS[name].splitlines()) <= LENGTHS[name]


def test_no_file_has_more_than_350_lines():
    kept = [ROOT / name for name in ("util", "tests", "benchmarks", "docs")]
    files = [p for folder in kept for p in folder.rglob("*") if p.suffix in (".py", ".md", ".sh")]
    files += [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / ".ci/run"]
    assert len(files) > 150
    assert [str(p) for p in files if len(p.read_text().splitlines()) > 350] == []


def versions(path: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)[>=]=([\d.]+)", (ROOT / path).read_text(), re.M))


def test_the_oldest_versions_are_the_requirements_floor():
    floor, oldest = versions("requirements.txt"), versions(".github/oldest.txt")
    assert set(floor) - set(oldest) == OPTIONAL
    assert all(f"{oldest[name]}.".startswith(f"{floor[name]}.") for name in oldest)
    newest = versions(".github/newest.txt")
    assert newest.keys() == oldest.keys()
    assert all(Version(newest[name]) > Version(oldest[name]) for name in oldest)
