"""Numbers out of range are refused at construction, with one sentence."""

import pytest

from lightning_lm.data import PairRows, ReverseDigits, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, Loading, PreferenceDataModule, PromptDataModule, UnpairedDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.modules import RolloutPlan, Validation


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        *((kind, {"train": [], "batch_size": 0}) for kind in (ChatDataModule, PreferenceDataModule, PromptDataModule)),
        (UnpairedDataModule, {"train": [], "batch_size": 1}),
        (PromptDataModule, {"train": [], "max_prompt_tokens": 0}),
        (ChatDataModule, {"train": [], "validation": 1.5}),
        (SupervisedRows, {"context_length": 0}),
        (PairRows, {"max_length": 1}),
        (PairRows, {"steps_sorted": 0}),
        (Loading, {"num_workers": -1}),
        (Loading, {"prefetch": 0}),
        (Loading, {"tokenize_workers": 0}),
        (ReverseDigits, {"num_examples": 0}),
        *((RolloutPlan, {name: 0}) for name in ("samples_per_prompt", "max_new_tokens", "epochs", "minibatches")),
        *((RolloutPlan, {name: -1}) for name in ("resample_rounds", "max_staleness", "rows_at_once", "importance_cap")),
        (Validation, {"samples": 0}),
        (Validation, {"pass_at": (0,)}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_a_number_out_of_range_is_refused(build, settings):
    with pytest.raises(ConfigurationError) as refused:
        build(**settings)
    assert str(refused.value).count("\n") == 0
