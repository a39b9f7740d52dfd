"""Imported once by the fork server."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

import prunadapt_ds.latency
import prunadapt_ds.train

torch.set_num_threads(1)

# What a test times is nobody's figure: a few small passes do.
prunadapt_ds.latency.SETTING.update(batch_size=2, seq_length=16, repeats=2)
