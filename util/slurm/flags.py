"""The flags of a submission, beside those of the script it submits; imports no torch."""

import argparse
import os

from util.args import COUNT, POSITIVE, Parser

JOB_DIR = "the --job_dir"  # the default of --output_dir


def seeds(text: str) -> list[int]:
    """An argparse type: SLURM's notation of an array, `0-2,7` is [0, 1, 2, 7]."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-2 or 0,5")
        found += range(int(first), int(last or first) + 1)
    return found


def setting(text: str) -> tuple[str, list[str]]:
    """An argparse type: `name=v1,v2` is ("name", ["v1", "v2"])."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE")
    return name, values.split(",")


# fmt: off
def job_flags() -> argparse.ArgumentParser:
    """What a submission adds to a script's flags, for `parents=`."""
    parser = argparse.ArgumentParser(add_help=False)

    add = parser.add_argument_group("job").add_argument
    add("--cluster", choices=("auto", "slurm", "local", "debug"), default="auto",
        help="local: processes of this machine, debug: one process, here and now; auto: slurm if "
        "there is an srun, else local")
    add("--nodes", type=POSITIVE, default=2, help="machines")
    add("--ngpus", type=COUNT, default=8, help="GPUs per node, 0: CPUs; sets --device")
    add("--tasks_per_node", type=POSITIVE,
        help="processes per node; default: one per GPU, or with --ngpus 0 one")
    add("--cpus_per_task", type=POSITIVE, default=10, help="CPU cores per process")
    add("--mem_gb", type=POSITIVE,
        help="memory per node; default: 40 per GPU, or with --ngpus 0 the partition's own")
    add("--timeout", type=POSITIVE, default=4320, help="time limit, in minutes")
    add("--requeue_limit", type=COUNT, default=30, help="how often the job may be requeued after a "
        "time limit, a preemption or a failed node")
    add("--job_dir", default="jobs/%j", help="folder of the job's logs, and its --output_dir "
        "unless that is given; %%j becomes the job's id")
    add("--partition", help="queue; default: the cluster's")
    add("--constraint", help="features that nodes must have")
    add("--use_volta32", action="store_true", help="--constraint volta32gb")
    add("--account", help="account to charge")
    add("--qos", help="quality of service, if the cluster has several")
    add("--comment", help="shown to the cluster's administrators")
    add("--slurm_setup", action="append", metavar="COMMAND", help="shell command to run on the "
        "first node before the processes start; may be repeated")

    add = parser.add_argument_group("sweep and waiting").add_argument
    add("--array", type=seeds, nargs="?", const=[], metavar="SEEDS",
        help="submit a job array with one run per --seed, such as 0-2 or 0,5")
    add("--set", type=setting, action="append", default=[], metavar="NAME=V1,V2", help="submit a "
        "job array with one run per value of a flag; if repeated, of all combinations")
    add("--wait", action="store_true",
        help="follow the job to its end; exit 0 if it succeeded, else 1")
    return parser
# fmt: on


def check_job(args: argparse.Namespace) -> None:
    """Resolves a submission's own defaults; raises ValueError for what cannot be submitted."""
    if args.ngpus == 0 and args.device == "cuda":
        raise ValueError("--device cuda needs GPUs: --ngpus is 0")
    if args.ngpus > 0 and args.device == "cpu":
        raise ValueError(f"--device cpu with --ngpus {args.ngpus}: give --ngpus 0")
    if args.ngpus > 0 and args.tasks_per_node not in (None, args.ngpus):
        raise ValueError(
            f"--tasks_per_node {args.tasks_per_node}: each process has a GPU of its own, "
            f"and --ngpus is {args.ngpus}"
        )
    args.device = "cuda" if args.ngpus else "cpu"  # fail rather than fall back to the CPU
    args.tasks_per_node = args.tasks_per_node or args.ngpus or 1
    args.mem_gb = args.mem_gb or 40 * args.ngpus or None

    args.job_dir = os.path.abspath(os.path.expanduser(args.job_dir))
    if args.output_dir == JOB_DIR:
        args.output_dir = args.job_dir
    if not args.output_dir and args.requeue_limit > 0:
        raise ValueError("--output_dir '' saves nothing to resume from: it needs --requeue_limit 0")
    if found := set(args.job_dir.replace("%j", "")) & set("%\\'\"\n"):
        raise ValueError(  # sbatch reads them as patterns and quotes
            f"--job_dir {args.job_dir!r}: SLURM's paths cannot hold {min(found)!r}, except as %j"
        )
    if args.array == [] and not args.set:
        raise ValueError("--array needs seeds, such as 0-2, or a --set NAME=V1,V2")


def job_parser(script: Parser) -> Parser:
    """The flags of a script, given its parser, and of its submission."""

    def check(args: argparse.Namespace) -> None:
        check_job(args)
        script.check(args)

    text, parents = f"{script.description}, submitted", [script, job_flags()]
    parser = Parser(
        description=text, parents=parents, check=check, idle=script.idle, add_help=False
    )
    parser.set_defaults(output_dir=JOB_DIR)
    return parser
