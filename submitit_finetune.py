"""Submits main_finetune.py to SLURM: takes its flags, and those of the job.

Example:
    python submitit_finetune.py --nodes 1 --ngpus 8 --data_path IMAGES --finetune CHECKPOINT
"""

from util.args import finetune_parser
from util.slurm.submit import submit

if __name__ == "__main__":
    submit("main_finetune", finetune_parser())
