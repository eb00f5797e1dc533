"""Accidents that people report: closed consoles, small limits, other locales, lost terminals."""

import io
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, python, run, run_main, state_of, the_error
from torch.utils.data import DataLoader

import main_pretrain
from util.data import workers
from util.run import logs


@pytest.fixture(scope="module")
def command(photos):
    """A run of 6 steps that prints each, without its folder."""
    flags = ["--data_path", photos, "--model", "mae_vit_nano_patch4", "--input_size", 8]
    flags += ["--batch_size", 8, "--epochs", 1, "--warmup_epochs", 0, "--device", "cpu"]
    flags += ["--num_workers", 0]
    return " ".join(map(str, [sys.executable, "main_pretrain.py", *flags, "--output_dir"]))


starts = pytest.mark.faults  # what takes seconds to start a process


def shell(text: str, **kwargs):
    return run("bash", "-c", text, **kwargs)


@starts
@pytest.mark.parametrize("end", ["| head -n 1", "> /dev/full", "2>&1 | true", ">&-"])
def test_a_console_that_goes_away_is_given_up_quietly(end, command, tmp_path):
    out = tmp_path / "out"
    done = shell(f"set -o pipefail; {command} {out} {end}; echo $? > {tmp_path}/status")
    assert (tmp_path / "status").read_text() == "0\n", done.stderr
    assert "Error" not in done.stderr
    assert len(log_of(out)) == 1
    assert state_of(out)["epoch"] == 0


def test_a_console_that_is_closed_is_given_up_once():
    """As a test's or a notebook's is, by the time that another library logs a line."""
    console = logs.Console(io.StringIO())
    console.stream.close()
    for _ in range(2):
        console.handle(logging.LogRecord("x", logging.INFO, "x", 1, "line", (), None))
    assert console.stream.name == os.devnull


@starts
def test_letters_that_a_console_lacks_do_not_end_it(command, tmp_path):
    text = f"{command.replace('--epochs 1', '--epochs 2')} {tmp_path / 'Läufe'} --resume auto"
    done = shell(text, PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr
    assert rf"no {tmp_path}/L\xe4ufe/checkpoint-last.pth yet" in done.stdout
    assert "epoch 1 [6/6]" in done.stdout


def test_other_errors_of_logging_are_shown(capsys):
    console = logs.Console(io.StringIO())
    console.handle(logging.LogRecord("x", logging.INFO, "x", 1, "%d", ("not a number",), None))
    assert "TypeError" in capsys.readouterr().err


@starts
@pytest.mark.parametrize("files", [25, 36])
def test_too_few_open_files_are_one_line(files, command):
    text = f"ulimit -n {files}; {command.replace('--num_workers 0', '--num_workers 4')} ''"
    done = shell(text)
    assert done.returncode == 1
    errors = done.stderr[done.stderr.index("main_pretrain.py: error") :]
    line = the_error(errors)
    assert "cannot start 4 workers: Too many open files" in line or f"allows {files} open" in line


@starts
def test_a_locale_without_unicode(command, tmp_path):
    out = tmp_path / "Läufe"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"{command} {out}", **locale)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("warning: no TensorBoard in ") == 1
    assert len(log_of(out)) == 1


def test_a_small_dev_shm_is_noticed_before_it_is_full(flags, tmp_path, monkeypatch, capsys):
    """16 images of two views x 8 x 8 in float32, twice for each of two processes."""
    usage = SimpleNamespace(free=16 * 2 * 3 * 64 * 4 * 2 * 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    flags = [*flags, "--num_workers", 2]
    assert run_main(main_pretrain, *flags) == 1
    line = the_error(capsys.readouterr().err)
    for words in ("--num_workers 2", "/dev/shm", "--ipc=host", "--shm-size"):
        assert words in line
    usage.free += 64 * 1024
    assert run_main(main_pretrain, *flags, "--epochs", 1, "--warmup_epochs", 0) == 0


class Spoilt(torch.utils.data.Dataset):
    """Its images cannot be sent to another process; or cannot be read."""

    def __init__(self, how: str):
        self.how = how

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        if os.getpid() != multiprocessing.current_process().pid or self.how == "dataset":
            raise RuntimeError("of the dataset's own")
        if multiprocessing.parent_process() and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return (lambda: 0) if self.how == "unsent" else 0


@pytest.mark.parametrize("how", ["killed", "unsent", "dataset"])
def test_the_end_of_a_loader_process_is_explained_and_no_other_error(how):
    """A batch that cannot be sent, as on a full /dev/shm, must not be waited for."""
    options = {"collate_fn": lambda rows: rows, "worker_init_fn": workers.begin_worker}
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        list(DataLoader(Spoilt(how), batch_size=4, num_workers=1, **options))
    assert time.monotonic() - begin < 30
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise, in any test
    for process in multiprocessing.active_children():  # which the error's traceback keeps
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, handler)
    line = workers.explain(error.value)
    if how == "dataset":
        assert line is None
        return
    assert line.startswith("DataLoader worker")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert "/dev/shm has" in line
    assert f"`ulimit -n` allows {files} open files" in line


@pytest.mark.parametrize(
    "words",
    [
        "unable to write to file </torch_4868_3223831450_63>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_9_1_2>: No space left on device",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_too_little_shared_memory_is_explained(words):
    """As torch 2.6 to 2.14 say it, behind a loader process's traceback."""
    text = f"Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: {words}\n"
    assert "--ipc=host" in workers.explain(RuntimeError(text))


def test_a_dead_thread_of_a_gpu_s_loader_is_explained():
    """As of too many open files; this is all that the main thread is told."""
    line = workers.explain(RuntimeError("Pin memory thread exited unexpectedly"))
    assert "see its own message; `ulimit -n` allows" in line


@pytest.mark.parametrize("cause", ["out of memory", "device-side assert triggered"])
def test_memory_that_cannot_be_pinned_is_explained(cause):
    """As torch's loader says it in the main thread, of what the driver told its pinning one."""
    text = (
        "Caught AcceleratorError in pin memory thread for device 0.\n"
        'Original Traceback (most recent call last):\n  File "pin_memory.py", line 39, in step\n'
        f"torch.AcceleratorError: CUDA error: {cause}\nCUDA kernel errors might be ...\n"
    )
    line = workers.explain(RuntimeError(text))
    explained = "no more memory can be pinned for batches; --no_pin_mem does without"
    assert line == (explained if "memory" in cause else None)


LEFT = """
import argparse, torch
from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.datasets import open_dataset
from util_contrastive import TwoCrops

data = SeededDataset(open_dataset("digits", True), TwoCrops(8), 0)
names = dict(accum_iter=1, epochs=2, seed=0, pin_mem=False, output_dir="", shuffle_window=0)
args = argparse.Namespace(batch_size=4, num_workers=1, **names)
loader = train_loader(data, args, torch.device("cpu"))
batches = loader.epoch(0)
next(batches)
print("left")
"""


def test_a_loader_that_is_left_does_not_keep_python_from_ending():
    """Its processes ignore the signal by which multiprocessing would end them."""
    done = python("-c", LEFT, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@starts
@pytest.mark.parametrize("ignored", [False, True], ids=["closed terminal", "nohup"])
def test_a_hangup_saves_and_stops_unless_it_is_ignored(ignored, command, tmp_path):
    out = tmp_path / "out"
    long = command.replace("--epochs 1", "--epochs 20 --log_dir ''")
    text = "trap '' HUP; " * ignored + f"{long} {out} & sleep .1; pid=$!; "
    text += f"until [ -s {out}/log.txt ]; do sleep .05; done; kill -HUP $pid; wait $pid"
    done = shell(text)
    if ignored:
        assert done.returncode == 0, done.stderr
        assert len(log_of(out)) == 20
    else:
        assert done.returncode == 128 + signal.SIGHUP
        assert "stopped by SIGHUP after saving" in done.stdout
        assert state_of(out)["epoch"] == len(log_of(out)) - 1


def test_nan_before_any_save_says_that_there_is_none(flags, capsys):
    assert run_main(main_pretrain, *flags, "--lr", 1e30, "--warmup_epochs", 0) == 1
    assert the_error(capsys.readouterr().err).endswith("; this run has saved nothing yet")


def test_nan_later_says_what_there_is(flags, capsys):
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    capsys.readouterr()
    flags += ["--epochs", 9, "--lr", 1e30, "--warmup_epochs", 0, "--resume", "auto"]
    assert run_main(main_pretrain, *flags) == 1
    line = the_error(capsys.readouterr().err)
    assert line.endswith("; checkpoint-last.pth is of epoch 1, step 0")


def test_more_loader_processes_than_processors_are_one_line(flags, tmp_path, forks):
    """In torch's words they were two for each loader."""
    workers = len(os.sched_getaffinity(0)) + 1
    words = ["--num_workers", workers, "--eval_freq", 1, "--epochs", 1]
    status, out, err = forks.run("main_pretrain", *flags, *words, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert out.count("processors: fewer may be faster") == 1
    assert f"warning: --num_workers {workers}, but {workers - 1} processors" in out


def test_grey_images_bring_no_warning_of_torch_s(flags, tmp_path, forks):
    status, _, err = forks.run(
        "main_pretrain", *flags, "--in_chans", 1, "--epochs", 1, cwd=tmp_path
    )
    assert (status, err) == (0, "")


def test_numbers_of_numpy_s_do_not_hinder_a_finetuning(flags, photos, tmp_path, forks):
    assert run_main(main_pretrain, *flags, "--epochs", 1) == 0
    state = state_of(tmp_path / "out")
    torch.save(state | {"best_acc": np.float32(0.5)}, tmp_path / "x.pth")
    words = ["--data_path", photos, "--model", "vit_nano_patch4", *flags[4:], "--output_dir", ""]
    words += ["--epochs", 1, "--finetune", tmp_path / "x.pth"]
    status, _, err = forks.run("main_finetune", *words, cwd=tmp_path)
    assert status == 0, err


ENDS = """
import atexit, signal, sys, threading, time
from util.errors import Stopped, UserError
from util.run import launch

class Late:  # what Python would take apart in the end
    def __del__(self):
        print("taken apart")

late, launch.is_script = Late(), lambda: True
atexit.register(print, "called")
threading.Thread(target=lambda: time.sleep(0.3) or print("joined")).start()
def main(args):
    print("ran")
    {act}
launch.launch(main, None)
"""


@pytest.mark.parametrize(
    ("act", "status"),
    [("pass", 0), ("raise Stopped(signal.SIGTERM)", 143), ("raise KeyboardInterrupt", 130),
     ("raise UserError('no')", 1), ("sys.exit('no')", 1), ("sys.exit()", 0)],
)  # fmt: skip
def test_a_script_ends_without_taking_python_apart(act, status):
    """Its threads are joined, what is to be called is called, and what it printed arrives."""
    words = [sys.executable, "-c", ENDS.format(act=act)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "ran\njoined\ncalled\n"), done.stderr
    assert ("no" in done.stderr) == ("no" in act)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's always full disk")
def test_what_could_not_be_printed_at_the_end_is_no_success():
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", ENDS.format(act="pass")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            words, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "output was lost: No space left on device\n")
