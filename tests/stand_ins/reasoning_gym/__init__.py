"""A few tasks in the form of Reasoning Gym's, for where it is not installed: it needs a compiler."""

from reasoning_gym.factory import create_dataset

__all__ = ["create_dataset"]
