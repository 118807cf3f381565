"""Calibration: run any model block by block over data, collect statistics, keep a journal."""

from zeroskip.calibrate.blocks import find_blocks, sites_of
from zeroskip.calibrate.collect import collect
from zeroskip.calibrate.data import Batch, read_batches
from zeroskip.calibrate.fp32 import in_fp32, in_fp32_by_parts, to_fp32
from zeroskip.calibrate.journal import Journal
from zeroskip.calibrate.replay import Block, Replay
from zeroskip.calibrate.stats import Collector, SharingError, Stat
from zeroskip.calibrate.teacher import Lesson, Teacher, first_tensor
from zeroskip.calibrate.text import drawn_windows, strings_of, text_batches, token_stream, window_limit

__all__ = [
    "Batch",
    "Block",
    "Collector",
    "Journal",
    "Lesson",
    "Replay",
    "SharingError",
    "Stat",
    "Teacher",
    "collect",
    "drawn_windows",
    "find_blocks",
    "first_tensor",
    "in_fp32",
    "in_fp32_by_parts",
    "read_batches",
    "sites_of",
    "strings_of",
    "text_batches",
    "to_fp32",
    "token_stream",
    "window_limit",
]
