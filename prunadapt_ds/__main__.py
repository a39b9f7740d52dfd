"""`python -m prunadapt_ds COMMAND ...`, and so `deepspeed --module` and `torchrun -m`."""

import sys

from prunadapt_ds.console import main

if __name__ == "__main__":
    sys.exit(main())
