"""Communication against the volumes of the ZeRO paper, and speeds against published runs."""

import pytest
from published_runs import H100_96, work_of

from lightning_lm.scaling.gpus import find_gpu
from lightning_lm.scaling.training_memory import Layout
from lightning_lm.scaling.training_time import COMPILED, EAGER, Rates, communication, step_time


def sent(layout, **options):
    work = work_of("Llama 3 8B", rows=1, micro_batches=1, **options)
    return sum(one.sent_bytes for one in communication(work, layout)) / work.whole.parameters


@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 3), (2, 2), (3, 3)])
def test_volumes_are_those_of_the_zero_paper(stage, volume):
    """Rajbhandari et al. 2020, section 7: 2 sizes of the parameters, 3 with stage 3.

    Stage 1 here all-reduces gradients and gathers parameters, which are 3; the paper reduces and scatters.
    """
    assert sent(Layout(data=1024, zero_stage=stage)) == pytest.approx(volume, rel=0.01)


def test_nothing_is_sent_by_one_gpu_and_a_pipeline_sends_what_it_makes():
    assert sent(Layout()) == 0
    work = work_of("Llama 3 8B", rows=1, micro_batches=4)
    one, *others = communication(work, Layout(pipeline=4))
    assert not others
    assert one.sent_bytes == 4 * 2 * 8192 * 4096 * 2  # forward and backward, in bfloat16


def test_tensor_parallelism_all_reduces_four_times_a_layer():
    """Korthikanti et al. 2022, section 4.2.1; sequence parallelism sends as much by halves."""
    work = work_of("Llama 3 8B", rows=1, micro_batches=1)
    for sequence_parallel in (False, True):
        (one,) = communication(work, Layout(tensor=8, sequence_parallel=sequence_parallel))
        layers = 4 * 32 * 2 * (7 / 8) * 8192 * 4096 * 2
        assert one.sent_bytes == pytest.approx(layers, rel=0.05)


def test_a_slow_network_counts_as_far_as_nothing_hides_it():
    work, layout = work_of("Llama 3 8B", rows=1, micro_batches=1), Layout(data=64, zero_stage=3)
    gpu = find_gpu("h100")
    fast, slow = (
        step_time(work, layout, gpu.__class__(**{**vars(gpu), "network_bytes_per_s": speed}), Rates())
        for speed in (50e9, 0.1e9)
    )
    assert fast.exposed_s == 0
    assert slow.exposed_s == pytest.approx(slow.communication_s - slow.compute_s, rel=0.3)
    assert slow.tokens_per_s < fast.tokens_per_s / 5


def test_a_measured_speed_replaces_the_model_of_one_gpu():
    work = work_of("Llama 3 8B", rows=1, micro_batches=1)
    time = step_time(work, Layout(), find_gpu("h100"), Rates(whole_step=0.5))
    assert time.compute_s == pytest.approx(work.model_flops / (0.5 * 989.4e12))
    assert 0.45 < time.mfu < 0.5  # the optimizer takes its part


def test_a_pipeline_idles_as_narayanan_counts():
    """Narayanan et al. 2021, section 2.2: (p - 1) / (v m) of the work."""
    work = work_of("Llama 3 8B", rows=1, micro_batches=8)
    for parts in (1, 2):
        time = step_time(work, Layout(pipeline=4, virtual_stages=parts), find_gpu("h100"), Rates())
        assert time.bubble_s == pytest.approx(3 / (parts * 8) * time.compute_s, rel=0.01)


H100, A100 = find_gpu("h100"), find_gpu("a100")
SHARDED = {"zero_stage": 3}
META = {"tensor": 8, "pipeline": 16, "zero_stage": 2, "sequence_parallel": True, "virtual_stages": 8}
RUNS = [
    # torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3: two rows of 8,192, selective
    # checkpointing, H100 with a limit of 500 W.
    ("Llama 3 8B", 8192, 2, 1, "ops", SHARDED | {"data": 8}, H100_96, EAGER, 5762),
    ("Llama 3 8B", 8192, 2, 1, "ops", SHARDED | {"data": 8}, H100_96, COMPILED, 6667),
    ("Llama 3 8B", 8192, 2, 1, "ops", SHARDED | {"data": 128}, H100_96, EAGER, 5605),
    ("Llama 3 8B", 8192, 2, 1, "ops", SHARDED | {"data": 128}, H100_96, COMPILED, 6514),
    # torchtitan, docs/performance.md of 2024: 64 A100, one row of 8,192.
    ("Llama 3 8B", 8192, 1, 1, "ops", SHARDED | {"data": 64}, A100, COMPILED, 2973),
    ("Llama 3 70B", 8192, 1, 1, "blocks", SHARDED | {"data": 64}, A100, COMPILED, 331),
    # OLMo-core 1.2.0, README: 9.7-10K tokens per second and device, H100, rows of 4,096.
    ("OLMo 2 7B", 4096, 2, 1, "none", SHARDED | {"data": 64}, H100, COMPILED, 9850),
    # Ai2, "OLMo 2 32B", March 2025: above 1,800 tokens per second and GPU, about 38 % MFU.
    ("OLMo 2 32B", 4096, 2, 1, "blocks", SHARDED | {"data": 1024}, H100, COMPILED, 1800),
]


@pytest.mark.parametrize(("name", "length", "rows", "micro_batches", "kept", "layout", "gpu", "fused", "speed"), RUNS)
def test_speeds_are_those_of_published_runs(name, length, rows, micro_batches, kept, layout, gpu, fused, speed):
    work = work_of(name, rows=rows, micro_batches=micro_batches, length=length, checkpointing=kept)
    layout = Layout(**layout)
    time = step_time(work, layout, gpu, Rates(fused=fused))
    assert time.tokens_per_s / layout.ranks == pytest.approx(speed, rel=0.15)


@pytest.mark.parametrize(
    ("layout", "length", "rows", "teraflops", "mfu"),
    [
        (META | {"data": 64}, 8192, 32, 430, 0.43),
        (META | {"data": 128}, 8192, 16, 400, 0.41),
        (META | {"data": 8, "context": 16}, 131_072, 16, 380, 0.38),
    ],
)
def test_speeds_are_those_of_llama_3(layout, length, rows, teraflops, mfu):
    """Grattafiori et al. 2024, arXiv:2407.21783, table 4: 405B parameters on 8,192 and 16,384 H100.

    The paper does not print how many parts of the model each stage has, nor how FLOPs are counted: taken are one layer
    a part (8 of them), and the pairs of tokens that causal attention sees.
    """
    work = work_of("Llama 3 405B", rows=1, micro_batches=rows, length=length)
    layout = Layout(**layout)
    time = step_time(work, layout, H100, Rates(fused=EAGER))
    causal = 1 - 3 * work.attention_flops / 2 / work.model_flops
    assert time.mfu * causal == pytest.approx(mfu, rel=0.15)
    assert time.mfu * causal * H100.half_flops_per_s / 1e12 == pytest.approx(teraflops, rel=0.15)
