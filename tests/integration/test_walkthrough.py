"""What the pages tell a reader to type, typed: every bash block, run by bash, on models and data of the names it uses.

Programs are the real ones. Trainings are told to be short, and tasks to be read from a folder, as no hub is there.
"""

import csv
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.tiny import tiny_data, tiny_folder, tiny_glue, tiny_instructions, tiny_language_folder
from tests.unit import commands

pytestmark = pytest.mark.full
# Not run here. SLURM's and MPI's programs, commands for several hosts (test_launchers.py), TensorBoard (by make and by itself),
# the notebook, the installation and the site have tests of their own; of make's other targets, most of which run tests,
# recipes are parsed (unit/test_documentation.py).
LEFT_OUT = ("make", "sbatch", "srun", "mpirun", "tensorboard", "jupyter", "pip", "source", "kill", "bash")
SHORT = ["--max_steps", "6", "--max_seq_length", "32", "--per_device_train_batch_size", "4"]
ENCODERS, LANGUAGE = ("bert-base-uncased", "bert-base", "my-encoder", "roberta-base"), ("Qwen/Qwen3-0.6B", "llama")
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
SHIM = """#!{python}
import os, socket, sys
words, name = sys.argv[1:], os.path.basename(sys.argv[0])
behind = [b for a, b in zip([name, *words], words) if a in ("prunadapt", "prunadapt_ds")]
said = [*behind[:1], *[os.path.basename(w)[:-3] for w in words if w.startswith("launcher/")]]
if said[:1] == ["train"]:
    folder = words[words.index("--output_dir") + 1] if "--output_dir" in words else "outputs"
    with open("trained", "a+") as seen:  # what lies there is older than the page; what a line of the page left is not
        seen.seek(0)
        if folder not in seen.read().split() and "--resume" not in words:
            words += ["--resume", "never"]
        print(folder, file=seen)
    words += {short} + ([] if "--method" in words else ["--num_decisions", "1"])
if said[:1] in (["train"], ["evaluate"]) and "--task_name" in words and "--data_dir" not in words:
    words += ["--data_dir", "glue_data"]
if name in ("deepspeed", "torchrun") and not any("port" in w for w in words):  # pages may be walked side by side
    with socket.create_server(("127.0.0.1", 0)) as free:
        words = ["--master_port", str(free.getsockname()[1]), *words]
program = {programs!r} + "/" + name
os.execv(program, [program, *words])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder in which everything has happened that a page takes for granted."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("launcher", "examples", "benchmarks", "ds_configs", "slurm", "prunadapt_ds"):
        (folder / name).symlink_to(ROOT / name)
    for name in ENCODERS:
        tiny_folder(folder / name, "bert")
    for name in LANGUAGE:
        tiny_language_folder(folder / name, "qwen3" if "Qwen" in name else "llama")
    (folder / "meta-llama" / "Llama-2-70b-hf").mkdir(parents=True)
    (folder / "meta-llama" / "Llama-2-70b-hf" / "config.json").write_text(json.dumps(LLAMA_70B))
    tiny_glue(folder / "glue_data", tasks=("rte", "wnli", "mrpc"))
    (folder / "glue_data" / "MRPC" / "test.tsv").write_text(
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(f"{i}\t1\t2\tsun rain\tjoy\n" for i in range(5))
    )
    for data, theirs in ((tiny_data(folder / "own"), "csv"), (tiny_instructions(folder / "own"), "jsonl txt")):
        for suffix in theirs.split():
            shutil.copy(data / f"train.{suffix}", folder / f"train.{suffix}")
            shutil.copy(data / f"validation.{suffix}", folder / f"dev.{suffix}")
    for name in ("train.csv", "dev.csv"):  # single texts, as on the page about own data
        rows = list(csv.DictReader((folder / name).open(newline="")))
        lines = [f"{row['sentence1']},{row['label']}\n" for row in rows]
        (folder / name).write_text("sentence1,label\n" + "".join(lines))
    (folder / "reviews.csv").write_text("sentence1\nsun and joy\npain\n")
    (folder / "new.csv").write_text("sentence1,sentence2\nsun and joy,rain\npain,tree\n")
    asked = [*SHORT, "--num_decisions", "1", "--target_sparsity", "0.3"]
    asked += ["--model_name_or_path", str(folder / "bert-base-uncased")]
    argv = ["--task_name", "mrpc", "--data_dir", str(folder / "glue_data"), *asked, "--output_dir"]
    assert run_ranks(runs.whole_run, 1, [*argv, str(folder / "outputs"), "--uniform"]) == [0]
    copies = [
        "bert_mrpc",
        "mrpc/0.5",
        "rte/0.5",
        *(f"glue/{task}/seed{seed}" for task in ("mrpc", "rte") for seed in range(3)),
    ]
    for name in copies:
        shutil.copytree(folder / "outputs", folder / "copies" / name)
    for copy in (folder / "copies").iterdir():
        shutil.move(copy, folder / "outputs" / copy.name)
    assert run_ranks(runs.whole_run, 1, [*argv, str(folder / "outputs" / "quickstart")]) == [0]
    own = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "dev.csv"), "--output_dir"]
    assert run_ranks(runs.whole_run, 1, [*asked, *own, str(folder / "outputs" / "own")]) == [0]
    return folder


@pytest.fixture
def walk(start, tmp_path):
    """(run a block, from the start): output and exit code."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("deepspeed", "torchrun", "python", "prunadapt"):
        text = SHIM.format(python=sys.executable, short=SHORT, programs=str(Path(sys.executable).parent))
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(block, number, files):
        folder = tmp_path / str(number)
        shutil.copytree(start, folder, symlinks=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        command = ["bash", "-euo", "pipefail", "-c", block]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)

    return run


def typed(block):
    """The lines of a block that are not another test's."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [re.sub(r"""^([A-Z_]+=("[^"]*"|\S+) )*""", "", line.strip()).partition(" ")[0] for line in lines]
    pairs = zip(lines, words, strict=True)
    kept = [line for line, first in pairs if first not in LEFT_OUT and "--hostfile" not in line]
    return "\n".join(kept).replace(" ...", "")


@pytest.mark.timeout(1800)  # a slow machine takes ten minutes for the README's trainings
@pytest.mark.parametrize("page", commands.PAGES)
def test_every_block_of_a_page_runs(walk, page):
    text = commands.PAGES[page].read_text()
    named = [re.match(r"# ([\w.]+)\n", block) for block in commands.blocks(text, "yaml")]
    files = {m[1]: m.string for m in named if m}
    blocks = [b for b in map(typed, commands.blocks(text, "bash")) if re.sub(r"#.*|\s", "", b)]
    for number, block in enumerate(blocks):
        done = walk(block, number, files)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
