"""`python -m prunadapt_ds COMMAND ...`, and so `deepspeed --module` and `torchrun -m`."""

from prunadapt_ds.console import main
from prunadapt_ds.environment import leave

if __name__ == "__main__":
    leave(main())
