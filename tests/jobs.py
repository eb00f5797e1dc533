"""Jobs on a SLURM: submitted, watched, and waited for."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, TINY

# 15 steps of 2 processes x 128 images, on CPUs.
RUN = [*TINY, "--data_path", "digits", "--batch_size", "128", "--epochs", "3"]
RUN += ["--warmup_epochs", "1", "--save_interval", "1000"]


class Submitted:
    """A job, or an array, in a folder of its own."""

    def __init__(self, folder: Path, *flags: str, script: str = "pretrain"):
        run = RUN if script == "pretrain" else [word.removeprefix("mae_") for word in RUN]
        command = [sys.executable, ROOT / f"submitit_{script}.py", *run, *flags]
        self.folder = folder
        self.result = subprocess.run(
            [str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=300
        )
        self.ids = re.findall(r"^job (\S+) \(slurm\)", self.result.stdout, re.MULTILINE)

    @property
    def id(self) -> str:
        return self.ids[0]

    @property
    def output(self) -> Path:
        return self.folder / "jobs" / self.id

    def log(self, rank: int = 0) -> str:
        path = self.output / f"{self.id}_{rank}_log.out"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        return squeue("-t", "all", "-j", self.id, "-o", "%T")

    def wait_for_line(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self.log()) or self.state() == "FAILED", pattern)
        assert re.search(pattern, self.log()), self.log()

    def wait_for_end(self) -> str:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_until(lambda: self.state() in ends, "the job's end")
        return self.state()

    def processes(self) -> list[int]:
        """The pids of its tasks, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                text = (folder / "environ").read_text()
            except OSError:  # gone in the meantime
                continue
            env = dict(word.partition("=")[::2] for word in text.split("\0"))
            is_task = words[1:4] == [b"-u", b"-m", b"submitit.core._submit"]
            if is_task and env.get("SLURM_JOB_ID") == self.id:
                found[int(env["SLURM_PROCID"])] = int(folder.name)
        return [found[rank] for rank in sorted(found)]

    def freeze(self) -> None:
        """Stops its processes' clock; SLURM sets it going again before it sends a signal."""
        for pid in self.processes():
            os.kill(pid, signal.SIGSTOP)


def squeue(*words: str) -> str:
    return subprocess.check_output(["squeue", "-h", *words], text=True).strip()


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True)


def wait_until(true: Callable[[], object], what: str, timeout: float = 600) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.1)
