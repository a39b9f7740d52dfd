"""`prunadapt COMMAND ...`, also as `python -m prunadapt_ds`, and so `deepspeed --module` and `torchrun -m`."""

from typing import NoReturn

from prunadapt_ds.console import main
from prunadapt_ds.environment import end_on_interrupt, leave


def run() -> NoReturn:
    """The installed script. What `main` returns is the exit code."""
    end_on_interrupt()
    leave(main())


if __name__ == "__main__":
    run()
