"""Export a run, finished or interrupted: `python launcher/export.py --run_dir outputs --export_formats padded onnx`."""

from prunadapt_ds.environment import leave, prepare_program

prepare_program()  # before torch and deepspeed are imported

from prunadapt_ds.commands.reexport import main  # noqa: E402

if __name__ == "__main__":
    leave(main())
