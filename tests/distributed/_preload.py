"""Imported once by the fork server."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import evaluate  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import transformers  # noqa: F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

import prunadapt_ds.commands.reexport
import prunadapt_ds.latency
import prunadapt_ds.pages
import prunadapt_ds.proof
import prunadapt_ds.train
from tests.distributed import stranger

torch.set_num_threads(1)

if stranger.ADDRESS in os.environ:
    prunadapt_ds.proof.run_script = stranger.run_script

# What a test times is nobody's figure: a few small passes do.
prunadapt_ds.latency.SETTING.update(batch_size=2, seq_length=16, repeats=2)

gc.collect()
gc.freeze()  # a million objects of imported modules, which every collection of every rank would walk through again
