"""The kinds of records and the layouts of files by name; the command line needs no more than these to start."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["demonstration", "prompt", "preference", "unpaired", "comparison"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LayoutName = Literal["jsonl", "trl", "alpaca", "sharegpt", "openai", "hh", "csv", "parquet"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
