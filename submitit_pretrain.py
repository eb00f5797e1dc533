"""Submits main_pretrain.py to SLURM: takes its flags, and those of the job.

Example:
    python submitit_pretrain.py --nodes 2 --ngpus 8 --data_path IMAGES --batch_size 64
"""

from util.args import pretrain_parser
from util.slurm.submit import submit

if __name__ == "__main__":
    submit("main_pretrain", pretrain_parser())
