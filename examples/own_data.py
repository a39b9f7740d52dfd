"""From your own files to predictions: train and prune on a csv, then classify new texts with the smaller model.

python examples/own_data.py              (two CPU ranks: deepspeed --num_accelerators 2 examples/own_data.py)

The same on the command line: `prunadapt train --train_file ...` and `prunadapt predict --input_file ...`.
"""

import csv
import itertools
import sys
from pathlib import Path

from prunadapt_ds.environment import prepare_environment

prepare_environment()

from prunadapt_ds import answers, distributed, train  # noqa: E402
from prunadapt_ds.config import parse  # noqa: E402
from prunadapt_ds.entry import guarded  # noqa: E402

ARGUMENTS = [word for word in sys.argv[1:] if not word.startswith("-")]
MODEL = ARGUMENTS[0] if ARGUMENTS else "sample"
OUTPUT = Path(ARGUMENTS[1] if len(ARGUMENTS) > 1 else "outputs/own_data")
THINGS = ("the soup", "this film", "our room", "the book", "her song", "the train ride", "my lunch", "that game")
WORDS = {
    "good": ("wonderful", "a real joy", "bright and warm", "just lovely"),
    "bad": ("awful", "a sad waste", "dark and cold", "just boring"),
}


def write_files() -> None:
    """Write train.csv and validation.csv. Columns: `sentence1` (for pairs also `sentence2`) and `label`, the label's name."""
    rows = [
        (f"{thing} was {word}", label) for label in WORDS for thing, word in itertools.product(THINGS, WORDS[label])
    ]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", rows[::2] + rows[3::4]), ("validation", rows[1::4])):
        with (OUTPUT / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence1", "label"), *some])


def main() -> None:
    distributed.init()
    distributed.on_rank_0("writing the files", write_files)
    options = {
        "model_name_or_path": MODEL,
        "train_file": OUTPUT / "train.csv",
        "validation_file": OUTPUT / "validation.csv",
        "output_dir": OUTPUT / "run",
        "target_sparsity": 0.5,
        "max_seq_length": 32,  # tokens
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
    }
    report = train.run(parse([f"--{name}={value}" for name, value in options.items()]))

    model = answers.load(str(OUTPUT / "run/exports/compact"), trust_remote_code=False, max_seq_length=32, batch_size=8)
    texts = ["the concert was lovely", "the waiting was awful"]
    logits = model.logits({"sentence1": texts})  # [2, number of labels], in the order of model.label_names
    if distributed.rank() == 0:
        kept = report["params"]["encoder_kept"] / report["params"]["encoder_dense"]
        print(f"kept {kept:.0%} of the encoder; accuracy {report['metric']['exported']['accuracy']:.2f}")
        for text, row in zip(texts, logits.softmax(dim=1), strict=True):
            print(f"{text}: {model.label_names[int(row.argmax())]} ({float(row.max()):.2f})")


if __name__ == "__main__":
    sys.exit(guarded(main))
