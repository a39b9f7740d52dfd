"""Imported once by the fork server."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

import prunadapt_ds.train  # noqa: F401

torch.set_num_threads(1)
