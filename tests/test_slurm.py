"""Jobs on a real SLURM of two nodes (tests/slurm.sh): same weights, whatever happens to them.

REQUIRE_SLURM=1 fails these tests, rather than skipping them, where the cluster cannot be started.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port, python
from jobs import RUN, Submitted, scontrol, squeue, wait_until

pytestmark = pytest.mark.slurm

TWO_NODES = ["--cpus_per_task", "1", "--ngpus", "0", "--nodes", "2"]
STOPPED = "stopped by SIGUSR2 after saving"
ONE_NODE = ["--cpus_per_task", "1", "--ngpus", "0", "--nodes", "1"]


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    # Not below pytest's own folder, which is closed to others: munge's socket must be open to all.
    before = dict(os.environ)
    root = Path(before.get("SLURM_ROOT") or tempfile.mkdtemp(prefix="slurm-"))
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    env = {"SLURM_ROOT": str(root), "SLURM_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        script = [ROOT / "tests/slurm.sh"]
        started = subprocess.run([*script, "up"], capture_output=True, text=True)
        if started.returncode:
            fail_or_skip = pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip
            fail_or_skip(f"no SLURM: {started.stderr.strip()}")
        for line in subprocess.check_output([*script, "env"], text=True).splitlines():
            for name, value in re.findall(r"(\w+)=(\S+)", line):
                patch.setenv(name, os.path.expandvars(value))
        try:
            yield
        finally:
            subprocess.run([*script, "down"], check=True)
            if "SLURM_ROOT" not in before:
                shutil.rmtree(root)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The folder of the run that nothing happened to, by torchrun."""
    folder = tmp_path_factory.mktemp("reference")
    done = python("main_pretrain.py", *RUN, "--output_dir", folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def preempt() -> None:
    """Runs a job that takes both nodes from whatever is there, with SLURM's signal and grace."""
    command = ["sbatch", "-p", "high", "-N", "2", "-c", "64", "-o", "/dev/null"]
    subprocess.run([*command, "--wrap", "true"], check=True, stdout=subprocess.DEVNULL)


def assert_same_state(folder: Path, reference: Path) -> None:
    """Weights and optimizer state are equal bit for bit, and every epoch is in the log once."""
    ours, theirs = (
        torch.load(path / "checkpoint-last.pth", weights_only=True) for path in (folder, reference)
    )
    assert ours["epoch"] == theirs["epoch"] == 2
    for part in ("model", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    lines = (folder / "log.txt").read_text().splitlines()
    assert [re.search(r'"epoch": (\d)', line)[1] for line in lines] == ["0", "1", "2"]


@pytest.mark.parametrize("place", [TWO_NODES, [*ONE_NODE, "--tasks_per_node", "2"]])
def test_two_tasks_train_as_torchrun_does(place, reference, tmp_path):
    job = Submitted(tmp_path, *place, "--wait")
    assert job.result.returncode == 0, job.result.stderr
    assert "epoch 2 [5/5]" in job.result.stdout
    assert_same_state(job.output, reference)


def test_srun_needs_no_flag(reference, tmp_path):
    """On one machine, where its processes can find each other by the job's number."""
    words = [sys.executable, "main_pretrain.py", *RUN, "--output_dir", tmp_path / "out"]
    command = ["srun", "-N", "1", "-n", "2", "-c", "1", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "out", reference)


def test_a_job_goes_on_after_its_time_limit(reference, tmp_path):
    job = Submitted(tmp_path, *TWO_NODES, "--timeout", "1")
    job.wait_for_line(r"epoch 0 \[")
    job.freeze()  # the run takes less than a minute
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert STOPPED in job.log()
    assert "this job is timed-out" in job.log()
    assert re.search(r"resumed .+ epoch [01], step [1-4]\n", job.log()), "not within an epoch"
    assert_same_state(job.output, reference)


def test_a_job_over_shards_goes_on_after_three_preemptions(reference, tmp_path):
    """With the full shuffle, as one over the images that they were made of."""
    made = python("-m", "util.shards", "--data_path", "digits", "--keep_order", "--out",
                  tmp_path / "shards", "--shard_images", "100")  # fmt: skip
    assert made.returncode == 0, made.stderr
    flags = ["--data_path", str(tmp_path / "shards"), "--shuffle_window", "0"]
    flags += ["--save_interval", "1e-4"]  # minutes: at every step
    job = Submitted(tmp_path, *TWO_NODES, *flags)
    for starts in (1, 2, 3):
        begin = time.time()
        wait_until(
            lambda begin=begin: any(
                f.stat().st_mtime > begin for f in tmp_path.rglob("*-last.pth")
            ),
            f"a save of start {starts}",
        )
        job.freeze()  # or it might be done before
        preempt()
        wait_until(lambda n=starts: job.log().count(STOPPED) == n, f"stop {starts}")
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert len(re.findall(r"resumed .+ epoch \d", job.log())) == 3
    assert_same_state(job.output, reference)


def test_a_job_goes_on_after_an_administrators_requeue_and_a_failed_node(reference, tmp_path):
    job = Submitted(tmp_path, *TWO_NODES)
    job.wait_for_line(r"epoch 0 \[")
    scontrol("requeue", job.id)
    job.wait_for_line(r"resumed .+: epoch 1")
    scontrol("update", "nodename=node2", "state=down", "reason=test")
    wait_until(lambda: job.state() == "PENDING", "requeued")
    # Down on request, it may come back by itself, and cannot then be resumed.
    subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], stderr=subprocess.PIPE)
    assert job.wait_for_end() == "COMPLETED", job.log()
    assert len(re.findall(r"resumed .+: epoch \d", job.log())) == 2
    assert_same_state(job.output, reference)


def test_a_batch_step_that_is_killed_leaves_no_process_and_loses_nothing(reference, tmp_path):
    job = Submitted(tmp_path, *TWO_NODES, "--save_interval", "1e-4")
    job.wait_for_line(r"epoch 0 \[")
    subprocess.run(["scancel", "--batch", "--signal=KILL", job.id], check=True)
    wait_until(lambda: not job.processes(), "the end of its processes", 10)
    assert job.wait_for_end() == "FAILED"
    again = Submitted(tmp_path, *TWO_NODES, "--output_dir", job.output, "--resume", "auto")
    assert again.wait_for_end() == "COMPLETED", again.log()
    assert "resumed " in again.log()
    assert_same_state(job.output, reference)


def test_a_job_into_a_folder_in_use_is_refused(tmp_path):
    job = Submitted(tmp_path, *ONE_NODE, "--epochs", "100")
    wait_until(lambda: list(tmp_path.rglob("events.*")), "the start of training")
    flags = ["--output_dir", job.output, "--resume", "auto", "--wait"]
    errors = Submitted(tmp_path, *ONE_NODE, *flags).result.stderr
    assert f"{job.output} is in use by another run: process {job.processes()[0]} on node" in errors
    assert f", job {job.id}, since " in errors
    assert job.state() == "RUNNING"
    subprocess.run(["scancel", job.id], check=True)


def test_a_job_that_waits_takes_the_folder_of_one_whose_node_fails(tmp_path):
    """The first is requeued, and finds in the end that all is done."""
    whole = ["--cpus_per_task", "64"]
    first = Submitted(tmp_path, *TWO_NODES, *whole)
    first.wait_for_line(r"epoch 0 \[")
    more = ["--output_dir", first.output, "--resume", "auto"]
    second = Submitted(tmp_path, *ONE_NODE, *whole, *more)
    scontrol("update", "nodename=node2", "state=down", "reason=test")
    wait_until(lambda: first.state() == "PENDING", "requeued")
    second.wait_for_line(r"resumed .+: epoch \d")
    subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], stderr=subprocess.PIPE)
    assert second.wait_for_end() == "COMPLETED", second.log()
    assert "with --accum_iter 2 the global batch stays 256" in second.log()
    assert first.wait_for_end() == "COMPLETED", first.log()
    assert "all 3 epochs are done" in first.log()
    lines = (first.output / "log.txt").read_text().splitlines()
    assert [re.search(r'"epoch": (\d)', line)[1] for line in lines] == ["0", "1", "2"]


@pytest.mark.parametrize("command", [["scancel", "--signal=USR2"], ["scontrol", "requeue"]])
def test_a_job_does_not_go_on_beyond_its_limit(command, tmp_path):
    job = Submitted(tmp_path, *ONE_NODE, "--requeue_limit", "0", "--epochs", "100")
    wait_until(lambda: list(tmp_path.rglob("events.*")), "the start of training")
    subprocess.run([*command, job.id], check=True)
    assert job.wait_for_end() == "FAILED"
    assert (job.output / "checkpoint-last.pth").exists()
    told = f"--requeue_limit 0 is reached; to continue: --output_dir {job.output} --resume auto"
    assert told in job.log()


def test_a_preemption_that_comes_as_sigterm_is_one_too(tmp_path):
    """What jobs get where SLURM is not set up to send them their own signal."""
    job = Submitted(tmp_path, *ONE_NODE, "--epochs", "100")
    wait_until(lambda: list(tmp_path.rglob("events.*")), "the start of training")
    subprocess.run(["scancel", "--signal=TERM", job.id], check=True)
    job.wait_for_line(r"resumed .+: epoch \d")
    assert "stopped by SIGTERM after saving" in job.log()
    subprocess.run(["scancel", job.id], check=True)


def test_a_cancelled_job_stays_cancelled(tmp_path):
    job = Submitted(tmp_path, *ONE_NODE, "--epochs", "100")
    wait_until(lambda: list(tmp_path.rglob("events.*")), "the start of training")
    subprocess.run(["scancel", job.id], check=True)
    assert job.wait_for_end() == "CANCELLED"
    time.sleep(7)  # longer than a requeued job is held back
    assert job.state() == "CANCELLED"


def test_a_process_that_dies_ends_the_job_and_is_named(tmp_path):
    flags = [str(word) for word in (*RUN, *TWO_NODES, "--epochs", "100")]
    command = [sys.executable, str(ROOT / "submitit_pretrain.py"), *flags, "--wait"]
    follower = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    job = Submitted.__new__(Submitted)
    job.folder = tmp_path
    wait_until(lambda: list(tmp_path.glob("jobs/*/*_0_log.out")), "the job's log")
    job.ids = [next(tmp_path.glob("jobs/[0-9]*")).name]
    job.wait_for_line(r"device: cpu x 2")
    begin = time.monotonic()
    os.kill(job.processes()[1], signal.SIGKILL)
    output, errors = follower.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert follower.returncode == 1
    assert f"job {job.id} is FAILED" in output
    assert f"job {job.id} failed: srun: error: node2: task 1: Killed" in errors
    assert "Traceback" not in errors


def test_the_reason_for_a_failure_is_shown(tmp_path):
    job = Submitted(tmp_path, *TWO_NODES, "--batch_size", "4000", "--wait")
    assert job.result.returncode == 1
    message, _, rank = job.result.stderr.rpartition(" (rank ")
    assert message == (
        f"job {job.id} failed: main_pretrain.py: error: 1437 images do not fill one step of 8000 "
        "(batch_size x accum_iter x processes): lower --batch_size"
    )
    assert rank in ("0)\n", "1)\n")
    assert not list(job.output.glob("*_result.pkl"))  # no pickled traceback


def test_gpus_are_asked_for_and_a_node_without_them_is_an_error(tmp_path):
    flags = ["--ngpus", "2", "--nodes", "1", "--device", "cuda", "--wait", "--use_volta32"]
    flags += ["--comment", "a comment", "--slurm_setup", "echo GPUS $CUDA_VISIBLE_DEVICES"]
    job = Submitted(tmp_path, *flags)
    assert job.result.returncode == 1
    assert "--device cuda: no usable GPU here" in job.result.stderr
    assert "GPUS 0,1" in job.log()
    shown = subprocess.check_output(["scontrol", "show", "job", job.id], text=True)
    for setting in ("Features=volta32gb", "Comment=a comment", "MinMemoryNode=80G", "Requeue=1"):
        assert setting in shown


def test_a_sweep_is_one_array_with_a_result_each(tmp_path):
    flags = [*ONE_NODE, "--array", "0-2", "--epochs", "1", "--wait", "--job_dir", "a sweep/%j"]
    job = Submitted(tmp_path, *flags)
    assert job.result.returncode == 0, job.result.stderr
    assert len(job.ids) == 3
    assert len({job_id.partition("_")[0] for job_id in job.ids}) == 1
    weights = []
    for seed, job_id in enumerate(job.ids):
        state = torch.load(tmp_path / "a sweep" / job_id / "checkpoint-0.pth", weights_only=True)
        assert state["args"]["seed"] == seed
        weights.append(state["model"]["decoder_pred.weight"])
        assert f"seed={seed}: job {job_id} is COMPLETED" in job.result.stdout
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize("script", ["finetune", "linprobe"])
def test_the_other_scripts_are_jobs_too(script, tmp_path):
    job = Submitted(tmp_path, *TWO_NODES, "--epochs", "1", "--wait", script=script)
    assert job.result.returncode == 0, job.result.stderr
    assert (job.output / "checkpoint-0.pth").exists()
    assert "device: cpu x 2" in job.log()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--batch_size", "0"], 2, "0 is outside [1, inf)"),
        (["--set", "blr=1e-3,much"], 2, "'much' is not a number"),
        (["--partition", "nope"], 1, "invalid partition specified: nope"),
        (["--job_dir", "/proc/nope/%j"], 1, "/proc/nope: No such file or directory"),
    ],
)
def test_an_error_in_the_flags_submits_nothing(flags, status, words, tmp_path):
    before = squeue("-t", "all", "-o", "%i")
    job = Submitted(tmp_path, *ONE_NODE, *flags)
    assert job.result.returncode == status
    assert job.result.stderr.count("\n") == 1
    assert "submitit_pretrain.py: error: " in job.result.stderr
    assert words in job.result.stderr
    assert squeue("-t", "all", "-o", "%i") == before
    assert [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "jobs"] == []


def test_submitting_takes_less_than_two_seconds(tmp_path):
    begin = time.monotonic()
    job = Submitted(tmp_path, *ONE_NODE)
    assert time.monotonic() - begin < 2
    for shown in ("folder", "tail -F", "tensorboard --logdir", f"scancel {job.id}"):
        assert shown in job.result.stdout
    subprocess.run(["scancel", job.id], check=True)
