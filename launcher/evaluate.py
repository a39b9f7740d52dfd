"""Score a folder on a task: `deepspeed launcher/evaluate.py --model_name_or_path DIR --task_name mrpc`, or plain python."""

import sys

from prunadapt_ds.environment import prepare_environment

prepare_environment()  # before torch and deepspeed are imported

from prunadapt_ds.evaluate_command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
