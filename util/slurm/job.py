"""What runs in each task of a submitted job: a script, resumed if the job ran before."""

import argparse
import copy
import importlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import submitit

from util.slurm.follow import slurm_states


class Job:
    """A script's run over all starts of a job.

    A stop request (time limit, preemption) reaches the training loop, which saves at its next step
    on all ranks and ends; rank 0 then requeues the job, and its next start resumes from there. A
    job that SLURM requeues by itself (`scontrol requeue`, a failed node) resumes the last save.

    Args:
        module: the script's name, such as main_pretrain.
        args: its flags; %j in a folder's name becomes the job's id.
        requeue_limit: starts after the first.
    Attributes:
        restarts: so far, if SLURM does not count them.
        submitted: when, in seconds of `time.time`.
    """

    submitted = 0.0  # of jobs that were submitted before this was kept

    def __init__(self, module: str, args: argparse.Namespace, requeue_limit: int):
        self.module, self.args, self.requeue_limit = module, args, requeue_limit
        self.restarts, self.submitted = 0, time.time()

    def __call__(self) -> None:
        env = submitit.JobEnvironment()
        try:
            self._run(env)
        except Exception:
            # submitit would pickle the traceback, raise it again and log it twice.
            traceback.print_exc()
            sys.exit(1)
        # All is saved. Python drops its handlers before it ends: a time limit reached then would
        # kill this process, and SLURM call the job failed.
        signal.signal(_signal(env), signal.SIG_IGN)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The job's next start. submitit calls this on rank 0 only: nothing here is collective."""
        again = copy.copy(self)
        again.restarts += 1
        return submitit.helpers.DelayedSubmission(again)

    def _run(self, env: submitit.JobEnvironment) -> None:
        _join(env)
        sys.argv = [f"{self.module}.py"]  # errors begin with this name
        logging.getLogger("submitit").propagate = False  # it has a handler of its own

        from util.run.checkpoint import LAST  # imports torch, which reads the environment
        from util.run.launch import launch

        # SLURM's own count, since a requeue by SLURM itself restores the Job first submitted.
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", self.restarts))
        args = argparse.Namespace(**vars(self.args))
        args.output_dir, args.log_dir = (
            folder.replace("%j", env.job_id) for folder in (args.output_dir, args.log_dir)
        )
        if restarts and self._has_begun(args, Path(args.output_dir, LAST)):
            args.resume, args.overwrite = "auto", False
        beyond = (
            f"{self.module}.py: error: --requeue_limit {self.requeue_limit} is reached; "
            f"to continue: --output_dir {args.output_dir} --resume auto"
        )
        if restarts > self.requeue_limit:  # requeued by SLURM itself
            sys.exit(beyond)

        requeue = signal.getsignal(_signal(env))  # submitit's own, until training replaces it
        try:
            launch(importlib.import_module(self.module).main, args)
        except SystemExit as end:
            if not _to_be_requeued(env, end.code):
                raise
        else:
            return
        if env.global_rank != 0:
            sys.exit(0)  # any other status would end rank 0 too early
        if restarts >= self.requeue_limit:
            sys.exit(beyond)
        requeue(_signal(env), None)

    def _has_begun(self, args: argparse.Namespace, last: Path) -> bool:
        """Whether this job's run is to be resumed; `Run` looks, on rank 0, for its checkpoint."""
        if any(vars(args).get(name) for name in ("eval", "predict", "knn")):
            return False  # it begins anew
        if args.overwrite:  # what it is to remove may still be there
            return last.exists() and last.stat().st_mtime > self.submitted
        return not args.resume or last.exists()


def _join(env: submitit.JobEnvironment) -> None:
    """Sets what torchrun would set: this process's rank, the meeting point, and its threads."""
    # A raw id is an array task's own. Systems give clients ports from 32768 on, not these.
    port = 10000 + int(re.sub(r"\D", "", env.raw_job_id)) % 20000
    place = {"RANK": env.global_rank, "LOCAL_RANK": env.local_rank, "WORLD_SIZE": env.num_tasks}
    place |= {"MASTER_ADDR": env.hostnames[0], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    # By default each process would use as many threads as its node has cores.
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or max(1, os.cpu_count() // env.num_tasks)
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _signal(env: submitit.JobEnvironment) -> signal.Signals:
    """What submitit has SLURM send before a time limit and on preemption."""
    return signal.Signals[f"SIG{env.USR_SIG}"]


def _to_be_requeued(env: submitit.JobEnvironment, status: int) -> bool:
    """Whether a script with this exit status was stopped by a time limit or a preemption."""
    if env.cluster != "slurm":
        return env.cluster == "local" and status == 128 + _signal(env)
    # SIGTERM comes with a preemption, if SLURM sends no other signal, but also when the job has
    # been cancelled or requeued; then it is no longer running.
    stopped = status in (128 + _signal(env), 128 + signal.SIGTERM)
    return stopped and slurm_states([env.job_id])[env.job_id] in ("RUNNING", "UNKNOWN")
