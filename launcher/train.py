"""Train: `deepspeed launcher/train.py --ds_config ds_configs/zero3.json [options]`, or under any launcher, or with plain python."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.train import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
