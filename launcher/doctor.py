"""Check the installation and all ranks: `python launcher/doctor.py`, or under any launcher, like launcher/train.py."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.commands.doctor import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
