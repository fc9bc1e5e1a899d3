"""Names that an earlier version exported."""

import importlib
import warnings

import pytest

from lightning_lm.deprecation import renamed_exports

RENAMED = [
    ("lightning_lm.functional.collectives", "enter", "copy_to"),
    ("lightning_lm.functional.collectives", "leave", "reduce_from"),
    ("lightning_lm.functional.collectives", "summed", "all_reduce"),
    ("lightning_lm.functional.collectives", "gather_parts", "all_gather"),
    ("lightning_lm.functional.collectives", "scatter_sum", "reduce_scatter"),
    ("lightning_lm.functional.collectives", "part_of", "shard_of"),
    ("lightning_lm.functional.collectives", "whole_of", "gather_replicated"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_new_one_and_warns(module, old, new):
    found = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {module}\.{new}; version \d+\.\d+ removes"):
        value = getattr(found, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value is getattr(found, new)
    assert old not in found.__all__


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'm' has no attribute 'nothing'"):
        renamed_exports("m", {"old": "new"}, until="0.3")("nothing")


def test_a_name_that_moved_to_another_package_is_found_there():
    get = renamed_exports("lightning_lm.models", {"Mean": "lightning_lm.functional.TokenMean"}, until="0.3")
    with pytest.warns(DeprecationWarning, match=r"models\.Mean is now lightning_lm\.functional\.TokenMean"):
        assert get("Mean").__name__ == "TokenMean"


def call_what_is_deprecated(module, category):
    try:
        exec(
            "import warnings; warnings.warn('old', category, stacklevel=1)", {"__name__": module, "category": category}
        )
    except (DeprecationWarning, FutureWarning):
        return "refused"
    return "shown"


CALLERS = [
    "lightning_lm.modules.pretrain",
    "lightning_lm.callbacks.lora",
    "lightning_lm.strategies",
    "lightning_lm.cli",
]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_deprecated_calls_of_ours_are_errors(category):
    for module in CALLERS:
        assert call_what_is_deprecated(module, category) == "refused"
