"""Score a folder on a task: `python launcher/evaluate.py --model_name_or_path DIR --task_name mrpc`, or under any launcher."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.commands.evaluate import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
