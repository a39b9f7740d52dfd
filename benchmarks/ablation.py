"""Ablates the ingredients of the defaults one by one, by default on MRPC and STS-B at a sparsity of 0.6.

python benchmarks/ablation.py --data_dir GLUE        (all other options are compare.py's)
"""

import sys
from pathlib import Path

import compare

INGREDIENTS = [variant for variant in compare.VARIANTS if variant != "5-epochs"]  # more steps are not an ingredient

if __name__ == "__main__":
    given = " ".join(sys.argv)
    if "--tasks" not in given:
        sys.argv += ["--tasks", "mrpc", "stsb"]
    if "--methods" not in given:
        sys.argv += ["--methods", "peft", "ours@0.6", *(f"ours@0.6+{variant}" for variant in INGREDIENTS)]
    if "--results" not in given:
        sys.argv += ["--results", str(Path(__file__).resolve().parent / "results/ablation")]
    compare.main()
