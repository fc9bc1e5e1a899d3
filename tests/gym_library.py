"""Reasoning Gym, or a stand-in with a few tasks of the same form where it is not installed: it needs a compiler."""

import importlib.util
import sys
from pathlib import Path

__all__: list[str] = []

if importlib.util.find_spec("reasoning_gym") is None:
    sys.path.insert(0, str(Path(__file__).with_name("stand_ins")))
