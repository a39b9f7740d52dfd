"""Predict a file: `python launcher/predict.py --model_name_or_path DIR --input_file new.csv --output_file answers.csv`."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.commands.predict import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
