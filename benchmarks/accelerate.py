"""How much faster accelerated models decode: `python benchmarks/accelerate.py --help`.

Every contender decodes every prompt, one after the other in one process, and each is compared with `generate` of the
given model on the same prompt at the same time. Only such ratios mean something on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeAlias

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from specflow import CachedPredictor, Dice, Fixed, GreedyProcessor, LLMDrafter, Tokens, accelerate, models
from specflow import autoregressive_step, run, speculative_step, start, unwrap
from specflow.models import DType
from specflow.state import Step

Decoder: TypeAlias = Callable[[Tokens, int], Tokens]
"""(prompt, n) → n new tokens."""

PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain how a refrigerator works, step by step.",
    "Translate into French: The library opens at nine and closes at six, but on Sundays it stays closed.",
    "Summarize: The committee met on Monday to discuss the budget. After two hours it agreed on the first draft, and "
    "the chair thanked all members. The next meeting is on Friday, when the second draft will be discussed.",
)
