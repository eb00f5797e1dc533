"""Submits a script to SLURM, or as processes of this machine, and follows it to its end.

Submitting needs no torch: only the job imports it.
"""

import contextlib
import io
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import submitit
from submitit.core.utils import JobPaths

from util.args import Parser
from util.errors import UserError
from util.slurm.flags import job_flags, job_parser
from util.slurm.follow import follow
from util.slurm.job import Job

ROOT = Path(__file__).resolve().parents[2]
SIGNAL_DELAY_S = 120  # between the signal and the time limit, for saving
JOB_FLAGS = frozenset(vars(job_flags().parse_args([])))


def submit(module: str, script: Parser) -> None:
    """Submits a script with the command line's flags, prints where to look, and may follow it.

    Args:
        module: the script's, such as main_pretrain.
        script: its parser.
    """
    try:
        sys.exit(_submit(module, job_parser(script)))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(1)


def _submit(module: str, parser: Parser) -> int:
    args = parser.parse_args()
    runs = _sweep(parser, args)
    cluster = _cluster(args, len(runs))
    executor = _executor(args, cluster, module.removeprefix("main_"))
    calls = []
    for run in runs.values():
        flags = {name: value for name, value in vars(run).items() if name not in JOB_FLAGS}
        calls.append(Job(module, Namespace(**flags), args.requeue_limit))
    _warn_of_missing(args)
    jobs = _submit_array(executor, calls)
    if cluster == "debug":
        jobs[0].results()  # runs it
        return 0
    if cluster == "slurm":
        _release(jobs[0].job_id.partition("_")[0])
    jobs = dict(zip(runs, jobs, strict=True))
    _describe(jobs, runs, cluster)
    return follow(jobs) if args.wait else 0


def _sweep(parser: Parser, args: Namespace) -> dict[str, Namespace]:
    """Each run's flags, by what distinguishes it from the others; '' for a single run."""
    varied = {}
    seeds = [("seed", [str(seed) for seed in args.array])] if args.array else []
    for name, values in [*args.set, *seeds]:
        if name in varied:
            parser.error(f"--set {name}: it is set twice; all of its values belong into one")
        varied[name] = values
    for name in varied.keys() & JOB_FLAGS:
        parser.error(f"--set {name}: it is the same for all jobs of an array")
    runs = {}
    for values in itertools.product(*varied.values()):
        words = [f"{name}={value}" for name, value in zip(varied, values, strict=True)]
        flags = [*sys.argv[1:], *(f"--{word}" for word in words)]
        runs[" ".join(words)] = parser.parse_args(flags)
    for name in ("output_dir", "log_dir"):
        folders = [f for run in runs.values() if (f := vars(run)[name]) and "%j" not in f]
        if len(set(folders)) < len(folders):
            parser.error(f"--{name} {folders[0]}: a sweep needs %j in it, a folder for each run")
    return runs


def _cluster(args: Namespace, runs: int) -> str:
    """The cluster to use; raises UserError if it is not there or cannot do what is asked."""
    cluster = args.cluster
    if cluster == "auto":
        cluster = "slurm" if shutil.which("srun") else "local"
    elif cluster == "slurm" and not shutil.which("srun"):
        raise UserError("--cluster slurm: there is no srun on PATH")
    if cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--cluster {cluster} is one machine: give --nodes 1, not {args.nodes}")
    if cluster != "slurm" and runs > 1:
        raise UserError(f"a sweep needs a SLURM job array: not --cluster {cluster}")
    return cluster


def _executor(args: Namespace, cluster: str, name: str) -> submitit.AutoExecutor:
    # The job must find this code wherever it is submitted from.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    python = shlex.join(["env", f"PYTHONPATH={paths}", sys.executable])
    base = JobPaths.get_first_id_independent_folder(args.job_dir)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--job_dir {base}: {error.strerror}") from None
    if not os.access(base, os.W_OK):
        raise UserError(f"--job_dir {base}: no permission to write there")
    same = {"max_num_timeout": args.requeue_limit, "python": python}
    each = {f"{kind}_{name}": v for kind in ("slurm", "local") for name, v in same.items()}
    executor = submitit.AutoExecutor(args.job_dir, cluster, **each)
    constraint = "&".join(filter(None, ["volta32gb" * args.use_volta32, args.constraint]))
    executor.update_parameters(
        name=name,
        nodes=args.nodes,
        tasks_per_node=args.tasks_per_node,
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus_per_task,
        mem_gb=args.mem_gb,
        timeout_min=args.timeout,
        stderr_to_stdout=True,
        slurm_partition=args.partition,
        slurm_constraint=constraint or None,
        slurm_account=args.account,
        slurm_qos=args.qos,
        slurm_comment=args.comment or None,
        slurm_setup=args.slurm_setup,
        slurm_signal_delay_s=min(SIGNAL_DELAY_S, args.timeout * 10),
        # A process that fails ends the others, which would otherwise wait for it.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        # Held, because SLURM fails jobs that start before submitit has made their folder.
        slurm_additional_parameters={"requeue": True, "hold": True},
    )
    return executor


def _warn_of_missing(args: Namespace) -> None:
    """Warns of paths that are not on this machine; they may exist where the job runs."""
    for name in ("data_path", "labels", "finetune", "init", "resume", "predict"):
        path = getattr(args, name, "") or ""
        if name == "labels" and not os.path.exists(path):
            path = path.rpartition(":")[0] or path  # before a column's name
        named = "://" in path or path.startswith("hf:") or any(c in path for c in "{*?")
        if os.sep in path and not named and not os.path.exists(path):
            print(f"warning: --{name} {path} is not on this machine", file=sys.stderr)


def _submit_array(executor: submitit.AutoExecutor, calls: list[Job]) -> list[submitit.Job]:
    """Submits a job, or an array."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return executor.submit_array(calls)
    except (RuntimeError, OSError) as error:  # RuntimeError: what sbatch said
        said = "; ".join(str(error).strip().splitlines())
        raise UserError(f"not submitted: {said}") from None


def _release(job_id: str) -> None:
    result = subprocess.run(["scontrol", "release", job_id], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"job {job_id} is held: scontrol release: {result.stderr.strip()}")


def _describe(jobs: dict[str, submitit.Job], runs: dict[str, Namespace], cluster: str) -> None:
    """Prints where to look."""
    for label, job in jobs.items():
        run = runs[label]
        log, folder = job.paths.stdout, run.log_dir.replace("%j", job.job_id)
        each = f"{run.ngpus} GPUs" if run.ngpus else f"{run.tasks_per_node} processes on CPUs"
        print(f"job {job.job_id} ({cluster}): {run.nodes} x {each}  {label}".rstrip())
        print(f"  folder       {shlex.quote(str(job.paths.folder))}")
        print(f"  log          tail -F {shlex.quote(str(log))}")
        print(f"  TensorBoard  tensorboard --logdir {shlex.quote(folder)}")
    if cluster == "slurm":
        job_id = next(iter(jobs.values())).job_id.partition("_")[0]
        print(f"squeue -j {job_id} shows the state, scancel {job_id} ends it", flush=True)
