"""What the benchmarks share: the machine in words, times as medians, memory, tables."""

import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the scripts are

# Of measuring each contender, at least; the tests, which only see whether it runs, take none.
SECONDS = float(os.environ.get("BENCHMARK_SECONDS", "1"))
ROUNDS = 3 if SECONDS else 1  # measurements of each contender, at least


def describe_machine(device: torch.device) -> str:
    """One line: processor, threads, torch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(": ")[1] if models else name
    load = os.getloadavg()[0]
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads, "
        f"torch {torch.__version__}, load {load:.1f}"
    )


def measure(contenders: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Median seconds of each contender: a GPU's by the clock, a CPU's of processor time.

    They take turns, so that whatever else the machine does disturbs all alike.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():  # to warm up
        run()
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < SECONDS * len(contenders):
        for name, run in contenders.items():
            since = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].append(clock() - since)
        rounds += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that a run needs at once, beyond what is in use before it.

    On CPUs Linux's own account of the process, which can be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there for the taking
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def run_script(
    device: str, folder: str, *flags: str, stop: signal.Signals | None = None
) -> list[dict]:
    """log.txt's lines of a run of main_pretrain.py.

    Args:
        stop: a signal to send once the first checkpoint is there.
    Raises:
        RuntimeError: it failed, its last line; or it ended before the signal.
    """
    words = [sys.executable, str(ROOT / "main_pretrain.py"), "--device", device]
    words += ["--output_dir", folder, *flags]
    log, checkpoint = Path(folder, "log.txt"), Path(folder, "checkpoint-last.pth")
    expected = {None: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output)
        while stop and process.poll() is None and not checkpoint.exists():
            time.sleep(0.005)
        if stop:
            process.send_signal(stop)
        if (status := process.wait()) != expected[stop]:
            output.seek(0)
            raise RuntimeError((output.read().strip() or f"status {status}").splitlines()[-1])
    return [json.loads(line) for line in log.read_text().splitlines()]


def table(header: list[str], rows: list[list[str]]) -> None:
    """Prints columns, right-aligned but for the first."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]))
