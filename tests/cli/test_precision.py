"""The precision of a run that names none, on devices that this machine may not have."""

import pytest
import torch

from lightning_lm.cli.config.defaults import fast_precision


@pytest.mark.parametrize(
    ("accelerator", "cuda", "bf16", "instructions", "expected"),
    [
        ("auto", True, True, "avx2", "bf16-mixed"),
        ("gpu", True, False, "amx_bf16", "32-true"),
        ("auto", False, False, "amx_bf16", "bf16-mixed"),
        ("auto", False, False, "avx512_bf16", "bf16-mixed"),
        ("auto", False, False, "avx512_f", "32-true"),
        ("cpu", True, True, "avx512_f", "32-true"),
        ("cpu", True, True, "amx_bf16", "bf16-mixed"),
    ],
)
def test_bfloat16_only_where_the_device_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, cuda: bool, bf16: bool, instructions: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    assert fast_precision(accelerator) == expected
