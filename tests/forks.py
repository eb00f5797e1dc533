"""Scripts run in forks of one process that has imported them: each starts within milliseconds.

with Forks("main_pretrain", "util.export") as forks:
    status, out, err = forks.run("main_pretrain", "--epochs", "0", cwd=folder)
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
        limit_s: int = 180,
        powerless: bool = False,
        **env: str,
    ) -> tuple[int, str, str]:
        """A script's exit status (-N: killed by signal N), standard output and standard error.

        Args:
            powerless: without root's right to read and write whatever it likes.
        """
        words = [str(flag) for flag in flags]
        request = [module, words, str(cwd), limit_s, powerless, env]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


def serve(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what a child's collector does not touch need not be copied for it
    for line in sys.stdin:
        module, flags, cwd, limit_s, powerless, env = json.loads(line)
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
        _, status = os.waitpid(child, 0)
        texts = []
        for file in files:
            with open(file, errors="replace") as stream:
                stream.seek(0)
                texts.append(stream.read())
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


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
