"""Submitting: flags, sweeps, what is refused, and jobs on this machine's processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import torch
from conftest import ROOT, TINY, the_error

from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.run import launch
from util.slurm import follow, job, submit
from util.slurm.flags import job_parser, seeds

SCRIPTS = sorted(path.stem for path in ROOT.glob("submitit_*.py"))
JOB_FLAGS = {
    "account": None, "array": None, "cluster": "auto", "comment": None, "constraint": None,
    "cpus_per_task": 10, "job_dir": "jobs/%j", "mem_gb": 320, "ngpus": 8, "nodes": 2,
    "partition": None, "qos": None, "requeue_limit": 30, "set": [], "slurm_setup": None,
    "tasks_per_node": 8, "timeout": 4320, "use_volta32": False, "wait": False,
}  # fmt: skip
RUN = [*TINY, "--data_path", "digits", "--batch_size", "128", "--warmup_epochs", "1"]
RUN += ["--ngpus", "0", "--nodes", "1", "--cluster", "local"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def parse(*flags: str):
    return job_parser(pretrain_parser()).parse_args(["--data_path", "x", *flags])


def run_submit(monkeypatch, *flags: str) -> int:
    """The exit status of submitit_pretrain.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", "--data_path", "x", *flags])
    with pytest.raises(SystemExit) as end:
        submit.submit("main_pretrain", pretrain_parser())
    return end.value.code


@pytest.mark.parametrize("script_parser", [pretrain_parser, finetune_parser, linprobe_parser])
def test_flags_and_defaults(script_parser):
    expected = JOB_FLAGS | {"job_dir": os.path.abspath("jobs/%j")}
    args = vars(job_parser(script_parser()).parse_args(["--data_path", "x"]))
    assert {name: args[name] for name in submit.JOB_FLAGS} == expected
    script = vars(script_parser().parse_args(["--data_path", "x"]))
    changed = {name for name in script if args[name] != script[name]}
    assert changed == {"device", "output_dir", "log_dir"}
    assert args["device"] == "cuda"
    assert args["output_dir"] == args["log_dir"] == args["job_dir"]


def test_every_flag_says_what_it_does():
    assert [a.dest for a in job_parser(pretrain_parser())._actions if not a.help] == []


def test_without_gpus_one_cpu_process_per_node():
    args = parse("--ngpus", "0")
    assert (args.device, args.tasks_per_node, args.mem_gb) == ("cpu", 1, None)
    assert parse("--ngpus", "0", "--tasks_per_node", "3").tasks_per_node == 3


def test_seeds_are_written_as_slurm_writes_arrays():
    assert seeds("0-2,7") == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch_size 0", "0 is outside [1, inf)"),
        ("--mask_ratio 0.999", "keeps none of 196 patches"),
        ("--nodes 0", "0 is outside [1, inf)"),
        ("--ngpus -1", "-1 is outside [0, inf)"),
        ("--timeout 1.5", "'1.5' is not an integer"),
        ("--cluster pbs", "'pbs'"),
        ("--ngpus 0 --device cuda", "--ngpus is 0"),
        ("--device cpu", "give --ngpus 0"),
        ("--tasks_per_node 4", "--ngpus is 8"),
        ("--output_dir=", "needs --requeue_limit 0"),
        ("--job_dir a%d", "cannot hold '%'"),
        ("--job_dir a'b", 'cannot hold "\'"'),
        ("--array 2-", "'2-' is not a list of seeds"),
        ("--array", "--array needs seeds"),
        ("--set blr", "'blr' is not NAME=VALUE,VALUE"),
        ("--set blr=1,,2", "is not NAME=VALUE,VALUE"),
        ("--set blr=1,x", "'x' is not a number"),
        ("--set colour=1,2", "unrecognized arguments: --colour=1"),
        ("--set nodes=1,2", "--set nodes: it is the same for all jobs"),
        ("--array 0-1 --output_dir out", "--output_dir out: a sweep needs %j"),
        ("--array 0-1 --job_dir here", "here: a sweep needs %j"),
    ],
)
def test_bad_flags_exit_2_with_one_line_and_make_nothing(
    flags, words, monkeypatch, capsys, tmp_path
):
    assert run_submit(monkeypatch, *flags.split()) == 2
    assert words in the_error(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cluster slurm", "there is no srun on PATH"),
        ("--cluster auto", "--cluster local is one machine: give --nodes 1"),
        ("--cluster local --nodes 1 --array 0-1", "a sweep needs a SLURM job array"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_line_and_makes_nothing(
    flags, words, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_submit(monkeypatch, *flags.split()) == 1
    assert words in the_error(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_all_combinations(monkeypatch):
    flags = ["--data_path", "x", "--set", "blr=1e-3,2e-3", "--set", "std=0.1", "--array", "4,5"]
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", *flags])
    parser = job_parser(pretrain_parser())
    runs = submit._sweep(parser, parser.parse_args())
    found = {label: (run.blr, run.std, run.seed) for label, run in runs.items()}
    assert found == {
        "blr=1e-3 std=0.1 seed=4": (1e-3, 0.1, 4),
        "blr=1e-3 std=0.1 seed=5": (1e-3, 0.1, 5),
        "blr=2e-3 std=0.1 seed=4": (2e-3, 0.1, 4),
        "blr=2e-3 std=0.1 seed=5": (2e-3, 0.1, 5),
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "blr=0.1", "--set", "blr=0.2"], "--set blr: it is set twice"),
        (["--array", "0-1", "--set", "seed=5"], "--set seed: it is set twice"),
        (["--array", "0-1", "--log_dir", "logs"], "--log_dir logs: a sweep needs %j"),
        (["--array", "0-1", "--output_dir", "out"], "--output_dir out: a sweep needs %j"),
    ],
)
def test_sweeps_that_would_lose_a_setting_or_share_a_folder_are_refused(
    flags, words, monkeypatch, capsys
):
    assert run_submit(monkeypatch, "--cluster", "local", *flags) == 2
    assert words in the_error(capsys.readouterr().err)


def test_a_sweep_may_have_no_tensorboard(monkeypatch):
    flags = ["--data_path", "x", "--array", "0-1", "--log_dir", ""]
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", *flags])
    parser = job_parser(pretrain_parser())
    assert len(submit._sweep(parser, parser.parse_args())) == 2


def test_a_table_s_column_is_no_part_of_its_path(tmp_path, capsys):
    (tmp_path / "l.csv").touch()
    for name, said in ((f"{tmp_path}/l.csv:breed", False), (f"{tmp_path}/m.csv:breed", True)):
        submit._warn_of_missing(SimpleNamespace(labels=name))
        assert ("is not on this machine" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("parser", "flags", "old", "new", "resume", "overwrite"),
    [
        (pretrain_parser, [], False, False, "auto", False),  # `Run` starts anew
        (pretrain_parser, ["--resume", "x"], False, False, "x", False),
        (pretrain_parser, ["--resume", "x"], False, True, "auto", False),
        (pretrain_parser, ["--overwrite"], True, False, "", True),  # it is still to be removed
        (pretrain_parser, ["--overwrite"], False, False, "", True),
        (pretrain_parser, ["--overwrite"], True, True, "auto", False),
        (linprobe_parser, ["--eval", "--resume", "x"], True, True, "x", False),
        (linprobe_parser, ["--knn"], True, True, "", False),
    ],
)
def test_what_a_job_that_starts_again_resumes(
    parser, flags, old, new, resume, overwrite, tmp_path, monkeypatch
):
    """With a checkpoint of a run before the job, or of its own."""
    started = []
    monkeypatch.setattr(launch, "launch", lambda main, args: started.append(args))
    monkeypatch.setattr(job, "_join", lambda env: None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    args = parser().parse_args(["--data_path", "x", "--output_dir", str(tmp_path), *flags])
    last = tmp_path / "checkpoint-last.pth"
    if old:
        last.touch()
        os.utime(last, (0, 0))
    module = "main_pretrain" if parser is pretrain_parser else "main_linprobe"
    again = job.Job(module, args, requeue_limit=3).checkpoint().function
    if new:
        os.utime(last, (again.submitted + 9,) * 2) if old else last.touch()
    again._run(SimpleNamespace(job_id="7", USR_SIG="USR2"))
    assert (started[0].resume, started[0].overwrite) == (resume, overwrite)


def test_a_time_limit_reached_while_a_finished_job_ends_does_not_fail_it():
    """The signal comes when Python has dropped its handlers, and is taking its modules down."""
    code = """if True:
        import os, signal, types
        import submitit
        from util.slurm.job import Job

        class Last:
            def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGUSR2):
                kill(process, number)
                os.write(1, b"sent")

        signal.signal(signal.SIGUSR2, print)  # as submitit does
        submitit.JobEnvironment = lambda: types.SimpleNamespace(USR_SIG="USR2")
        Job._run = lambda self, env: None
        Job("main_pretrain", None, 3)()
        last = Last()
    """
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "sent"), ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_submit_without_torch(script):
    assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 15
    code = f"import sys, {script}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("logs", "causes"),
    [
        # What the user can mend is said alone.
        (
            ["RuntimeError: closed\n", "x.py: error: no images\n"],
            ["x.py: error: no images (rank 1)"],
        ),
        # Else all that ended a process, beginning with the first that SLURM saw.
        (
            ["srun: error: n2: task 1: Killed\nRuntimeError: a\nsrun: error: n1: task 0: Killed\n"],
            ["srun: error: n2: task 1: Killed", "RuntimeError: a (rank 0)"],
        ),
        (["ValueError: a\n", "ValueError: a\n"], ["ValueError: a (rank 0)"]),
        # An earlier start's are over.
        (
            ["ValueError: a\n... Starting with JobEnvironment(...)\nOSError: b\n"],
            ["OSError: b (rank 0)"],
        ),
        (["slurmstepd: error: *** CANCELLED\n"], ["slurmstepd: error: *** CANCELLED (rank 0)"]),
    ],
)
def test_the_cause_of_a_failure_is_found_in_the_logs(logs, causes, tmp_path):
    for rank, log in enumerate(logs):
        (tmp_path / f"7_{rank}_log.out").write_text(log)
    job = submitit.LocalJob(tmp_path, "7", tasks=range(len(logs)))
    assert follow._causes(job) == causes


def test_a_missing_path_is_pointed_out(monkeypatch, capsys):
    submit._warn_of_missing(parse("--data_path", "no/such", "--resume", "a/b.pth"))
    submit._warn_of_missing(parse("--data_path", "digits", "--resume", "https://host/b.pth"))
    assert capsys.readouterr().err.splitlines() == [
        "warning: --data_path no/such is not on this machine",
        "warning: --resume a/b.pth is not on this machine",
    ]


def test_a_failed_local_job_says_why(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "submitit_pretrain.py", *RUN, "--batch_size", "4000", "--wait"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "main_pretrain.py: error: 1437 images do not fill one step" in the_error(result.stderr)


@pytest.mark.slow
def test_a_local_job_goes_on_after_a_signal(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "submitit_pretrain.py"),
        *RUN,
        "--epochs",
        "2",
        "--overwrite",
    ]
    with subprocess.Popen([*command, "--wait"], stdout=subprocess.PIPE, text=True) as follower:
        seen = ""
        for line in follower.stdout:
            seen += line
            if "device: cpu" in line and "stopped by" not in seen:
                time.sleep(1)
                (job_id,) = re.findall(r"^job (\d+) \(local\)", seen, re.MULTILINE)
                (task,) = Path(f"/proc/{job_id}/task/{job_id}/children").read_text().split()
                os.kill(int(task), signal.SIGUSR2)
    assert follower.returncode == 0
    assert "stopped by SIGUSR2 after saving" in seen
    assert re.search(r"resumed .+: epoch [01], step \d", seen)
    state = torch.load(next(tmp_path.glob("jobs/*/checkpoint-1.pth")), weights_only=True)
    assert state["epoch"] == 1
