"""Estimate what a run needs, from the configuration alone: `python launcher/plan.py --model_name_or_path DIR --world_size 8`."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.commands.plan import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
