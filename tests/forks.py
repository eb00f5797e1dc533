"""Scripts run in forks of one process that has imported them: each starts within milliseconds.

with Forks("main_pretrain", "util.export") as forks:
    status, out, err = forks.run("main_pretrain", "--epochs", "0", cwd=folder)
    status, out, err = forks.run("main_pretrain", "--epochs", "0", cwd=folder, processes=2)
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def places(count: int, port: int | str) -> list[dict[str, str]]:
    """What a launcher says in the environment of each of `count` processes of this machine."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Forks:
    """A process that forks for each run; a context manager."""

    def __init__(self, *modules: str):
        self.modules = modules

    def __enter__(self) -> "Forks":
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.modules],
            env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(
        self,
        module: str,
        *flags: object,
        cwd: Path,
        processes: int = 1,
        limit_s: int = 180,
        powerless: bool = False,
        **env: str,
    ) -> tuple[int, str, str]:
        """A script's exit status (-N: killed by signal N), standard output and standard error.

        Args:
            processes: more than one have RANK, LOCAL_RANK, WORLD_SIZE and a place to meet in their
                environment. The status is the first that is not 0, the texts are all they say,
                rank by rank. Unlike a launcher's, they share Python's seed of hashes, and nothing
                ends the others when one fails.
            powerless: without root's right to read and write whatever it likes.
        """
        words = [str(flag) for flag in flags]
        alone = processes == 1
        envs = [env] if alone else [place | env for place in places(processes, free_port())]
        request = [module, words, str(cwd), limit_s, powerless, envs]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the server has ended: {self.process.wait()}"
        return tuple(json.loads(answer))


def serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what a child's collector does not touch need not be copied for it
    for line in sys.stdin:
        module, flags, cwd, limit_s, powerless, envs = json.loads(line)
        started = [_start(module, flags, cwd, limit_s, powerless, env) for env in envs]
        pids, files_of = zip(*started, strict=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        status = next(filter(None, statuses), 0)
        outs, errs = ("".join(map(_text, files)) for files in zip(*files_of, strict=True))
        print(json.dumps([status, outs, errs]), flush=True)


def _start(
    module: str, flags: list[str], cwd: str, limit_s: int, powerless: bool, env: dict[str, str]
) -> tuple[int, list[int]]:
    """Forks; returns the child's pid, and the files of its standard output and error."""
    files = [os.memfd_create(name) for name in ("out", "err")]
    child = os.fork()
    if child == 0:
        signal.alarm(limit_s)
        for number, file in enumerate(files, start=1):
            os.dup2(file, number)
        os.chdir(cwd)
        os.environ.update(env)
        if powerless:
            _drop_capabilities()
        sys.argv = [f"{module.rpartition('.')[2]}.py", *flags]
        _run_and_exit(module)
    return child, files


def _text(file: int) -> str:
    """Reads a file from its beginning, and closes it."""
    with open(file, errors="replace") as stream:
        stream.seek(0)
        return stream.read()


def _run_and_exit(module: str) -> None:
    """Runs a module as `python -m` does, and leaves with its status."""
    status = 0
    try:
        # the module is imported already, and is run once more under another name
        sys.modules.pop(module)
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _drop_capabilities() -> None:
    """Leaves a root process the rights of a user who owns root's files; others keep theirs."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    ctypes.CDLL(None).capset(header, none)


if __name__ == "__main__":
    serve(sys.argv[1:])
