"""Each benchmark runs, at its smallest. What it measures is not tested."""

import pytest
from conftest import ROOT, python

SMALL = "--model mae_vit_tiny_patch16 --batch_size 1 --objectives CAN"
COMMANDS = {
    "loader.py --profile": "torchvision's recipe",
    f"train_step.py {SMALL} --precisions fp32 --profile": "CAN fp32",
    "nt_xent.py --smallest 6 --largest 7 --largest_plain 6": "128",
    "end_to_end.py --steps 2 --batch_size 2": "mae_vit_tiny_patch16",
    "flops.py": "large_patch16    71.7  41.3   123.1          1.72",
    "file_list.py --files 20000": "20,000",
    "data_scale.py --files 2000 --samples 5000000": "after a resume: the same",
    "shards.py --images 200": "shards of 100",
    "knn.py --references 20000 --width 64 --queries 8": "8 queries of 20,000 x 64",
    "saving.py --millions 1 --saves 1": "a state of 0.0 GB into 3 files",
    "gpu_check.py --device cpu --only versions parts two_ranks": "8 pass, 0 miss, 0 error",
    "epochs.py --batch_size 2 --steps 2": "stand still",
    "figure.py": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(command):
    name, *flags = command.split()
    result = python(ROOT / "benchmarks" / name, *flags, timeout=600, BENCHMARK_SECONDS="0")
    assert result.returncode == 0, result.stderr
    assert COMMANDS[command] in result.stdout
