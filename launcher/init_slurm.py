"""Copy SLURM templates and DeepSpeed configurations to a folder: `python launcher/init_slurm.py my-project`. Needs no torch."""

import sys

from prunadapt_ds.commands.init_slurm import main

if __name__ == "__main__":
    sys.exit(main())
