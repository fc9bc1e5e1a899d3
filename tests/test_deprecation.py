"""Names that an earlier version exported."""

import importlib
import inspect
import warnings

import pytest

from lightning_lm.data import SupervisedRows
from lightning_lm.deprecation import RENAMED_ARGUMENTS, renamed_exports
from lightning_lm.modules import GRPOModule, PolicyModule
from lightning_lm.strategies import DataParallelStrategy

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


def test_a_constructor_takes_the_old_name_of_an_argument_and_warns():
    with pytest.warns(DeprecationWarning, match=r"learn_on of SupervisedRows is now called train_on; version 0\.3"):
        rows = SupervisedRows(learn_on="all")
    assert rows == SupervisedRows(train_on="all")
    with pytest.warns(DeprecationWarning, match="is now called train_on"):
        assert rows.learn_on == "all"
    with pytest.warns(DeprecationWarning, match="exchange of DataParallelStrategy is now called communication"):
        assert DataParallelStrategy(exchange="flat").communication == "flat"
    with pytest.raises(TypeError, match="learn_on is the old name of train_on; give SupervisedRows train_on"):
        SupervisedRows(learn_on="all", train_on="assistant")


def test_a_checkpoint_that_describes_a_part_by_old_names_is_read():
    written = {**SupervisedRows(train_on="all").to_dict()}
    written["learn_on"] = written.pop("train_on")
    assert SupervisedRows.from_dict(written) == SupervisedRows(train_on="all")


@pytest.mark.parametrize("name", RENAMED_ARGUMENTS)
def test_every_renamed_argument_is_one_of_its_class(name):
    modules = (importlib.import_module(f"lightning_lm.{package}") for package in ("callbacks", "data", "strategies"))
    cls = next(getattr(module, name) for module in modules if hasattr(module, name))
    arguments = inspect.signature(cls).parameters
    for old, new in RENAMED_ARGUMENTS[name].items():
        assert new in arguments
        assert old not in arguments
        assert isinstance(vars(cls)[old], property)  # that is, `takes_renamed_arguments` stands above it


def test_a_subclass_that_overrides_a_method_by_its_old_name_is_heard():
    with pytest.warns(DeprecationWarning, match="Mine.scores is now called token_scores; version 0.3 removes"):

        class Mine(GRPOModule):
            def scores(self, model, batch):
                return "mine"

    assert Mine.token_scores(None, None, None) == "mine"
    assert GRPOModule.token_scores is PolicyModule.token_scores
