"""Puts the scripts' and the benchmarks' folders on the path; to be imported first."""

import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:0] = [str(STUDY.parents[1]), str(STUDY.parent)]
