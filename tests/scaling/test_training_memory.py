"""Memory of a step against the figures of the ZeRO paper and against a published run."""

import pytest
from published_runs import work_of

from lightning_lm.scaling.training_memory import Layout, StateBytes, memory_use, sharded_states

GB = 1e9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_states_are_those_of_the_zero_paper(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs, 2 + 2 + 12 bytes for each."""
    whole = StateBytes(15 * GB, 15 * GB, 90 * GB)
    states = sharded_states(whole, Layout(data=64, zero_stage=stage))
    assert sum(states) / GB == pytest.approx(gigabytes, rel=0.005)


def test_tensor_and_pipeline_parallelism_divide_all_of_it():
    whole = StateBytes(15 * GB, 15 * GB, 90 * GB)
    assert sum(sharded_states(whole, Layout(data=2, tensor=4, pipeline=2))) == pytest.approx(15 * GB)
    assert sum(sharded_states(whole, Layout(data=2, tensor=4, context=2, zero_stage=3))) == pytest.approx(7.5 * GB)


def test_accumulated_gradients_are_whole_until_they_are_reduced():
    work = work_of("Llama 3 8B", rows=2, micro_batches=2)
    once = work_of("Llama 3 8B", rows=4, micro_batches=1)
    for stage in (2, 3):
        layout = Layout(data=8, zero_stage=stage)
        assert memory_use(work, layout).gradients == 8 * memory_use(once, layout).gradients


def test_memory_is_that_of_a_published_run():
    """Llama 3.1 8B with selective checkpointing on 8 and 128 GPUs: 82.4 and 67.0 GiB, logits not fused.

    All logits at once are the most that the loss can take beside the activations, and a fused loss the least.

    Source: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3.
    """
    options = {"rows": 2, "micro_batches": 1, "checkpointing": "ops"}
    fused, whole = (work_of("Llama 3 8B", fused_loss=fused, **options) for fused in (True, False))
    for gpus, published in ((8, 82.4), (128, 67.0)):
        layout = Layout(data=gpus, zero_stage=3)
        least, most = (memory_use(work, layout).total / 2**30 for work in (fused, whole))
        assert 0.9 * published < least < published < most
    few, many = (memory_use(fused, Layout(data=gpus, zero_stage=3)).total / 2**30 for gpus in (8, 128))
    assert few - many == pytest.approx(82.4 - 67.0, rel=0.1)
