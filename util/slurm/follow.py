"""Follows submitted jobs to their end: prints their logs, states, and why they failed."""

import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import submitit

POLL_S = 2.0  # between two looks at a job
# Final states; PREEMPTED and REQUEUED are followed by another start.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"}
ENDED |= {"DEADLINE", "REVOKED", "GONE"}  # the last is ours
ENDED |= {"FINISHED", "INTERRUPTED"}  # submitit's words for processes of this machine

START = "Starting with JobEnvironment"  # submitit's line; a log holds all starts of a job
# Lines of a log that say why a process ended.
USER_ERROR = r"^\S+\.py: error: (?!another process).+"  # a lost peer is not the cause
EXCEPTION = r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*"
TASK_ENDED = r"^srun: error: .+: tasks? \d.+"  # in rank 0's log; the first is the cause
SLURM_ERROR = r"^slurmstepd.*: error: .+"


def slurm_states(job_ids: Iterable[str]) -> dict[str, str]:
    """The state of each job: GONE if SLURM has forgotten it, UNKNOWN if it does not answer.

    From squeue, since sacct needs a database that not every cluster has.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
    command += ["--jobs", ",".join(job_ids)]
    result = subprocess.run(command, capture_output=True, text=True)
    absent = "GONE" if not result.returncode or "Invalid job id" in result.stderr else "UNKNOWN"
    known = dict(line.split() for line in result.stdout.splitlines())
    return {job_id: known.get(job_id, absent) for job_id in job_ids}


def _states(jobs: list[submitit.Job]) -> list[str]:
    if isinstance(jobs[0], submitit.SlurmJob):
        return list(slurm_states([job.job_id for job in jobs]).values())
    return [job.state for job in jobs]


def follow(jobs: dict[str, submitit.Job]) -> int:
    """Prints rank 0's log of each job until all have ended.

    Args:
        jobs: by the label to print before their lines.
    Returns:
        0 if all succeeded, 1 if one failed, 130 if interrupted; the jobs then continue.
    """
    running, seen, offsets, failed = dict(jobs), {}, dict.fromkeys(jobs, 0), False
    try:
        while running:
            states = zip([*running], _states([*running.values()]), strict=True)
            for label, state in states:
                job = running[label]
                prefix = f"{label}: " if label else ""
                offsets[label] = _print_from(job.paths.stdout, offsets[label], prefix)
                if seen.get(label) != state:
                    print(f"{prefix}job {job.job_id} is {state}", flush=True)
                seen[label] = state
                if state not in ENDED:
                    continue
                del running[label]
                if state != "COMPLETED" and not _all_results(job):
                    failed = True
                    for cause in _causes(job):
                        print(f"{prefix}job {job.job_id} failed: {cause}", file=sys.stderr)
            if running:
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        print("no longer followed; the job continues", file=sys.stderr)
        return 130
    return int(failed)


def _print_from(log: Path, offset: int, prefix: str) -> int:
    """Prints the whole lines of a log from an offset in bytes, and returns where they end."""
    try:
        with open(log, "rb") as file:
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return offset
    text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print(f"{prefix}{line}", flush=True)
    return offset + len(text)


def _all_results(job: submitit.Job) -> bool:
    return all(job.task(r).paths.result_pickle.exists() for r in range(job.num_tasks))


def _causes(job: submitit.Job) -> list[str]:
    """Why a job's last start failed: its error lines, or else how its processes ended."""
    logs = [job.task(rank).paths.stdout for rank in range(job.num_tasks)]
    texts = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    texts = [text.rpartition(START)[2] for text in texts]

    def found(pattern: str) -> list[str]:
        first_rank: dict[str, int] = {}
        for rank, text in enumerate(texts):
            for line in re.findall(pattern, text, re.MULTILINE)[-1:]:
                first_rank.setdefault(line, rank)
        return [f"{line} (rank {rank})" for line, rank in first_rank.items()]

    ended = re.findall(TASK_ENDED, texts[0], re.MULTILINE)[:1]
    causes = found(USER_ERROR) or ended + found(EXCEPTION) or found(SLURM_ERROR)
    return causes or [f"no reason found in its log: {logs[0]}"]
