"""Auxiliary losses and loads of experts over optimizer steps: exact however the rows are cut, and after a resume."""

import dataclasses

import jaxtyping
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from recorded_gradients import Record

from lightning_lm.functional.preference import SimPO
from lightning_lm.models import (
    GLU,
    Attention,
    EncoderConfig,
    HashRouter,
    LaggedLoss,
    Layer,
    LoadBias,
    MoE,
    SequenceLoss,
    TopK,
    collect_auxiliary,
)
from lightning_lm.modules import DPOModule, MaskedNLL, PretrainModule, SFTModule
from lightning_lm.optim import AdamW, Constant, SkipRule
from lightning_lm.types import IGNORE_INDEX

ROWS, WINDOW, EXPERTS, K = 20, 16, 5, 2
PART = MoE(experts=GLU(hidden_size=8), num_experts=EXPERTS, router=TopK(k=K))
BALANCED = {
    "bias": PART,
    "lagged": dataclasses.replace(PART, balance=LaggedLoss(weight=1.0), z_loss=0.5),
    "sequence": dataclasses.replace(PART, router=TopK(k=K, score="softmax"), balance=SequenceLoss(weight=1.0)),
}


def with_experts(config, part):
    return dataclasses.replace(config, layers=Layer(mixer=Attention(num_heads=2), ffn=part))


def lengths(labels):
    """Tokens of each row that its last target depends on."""
    return [int(row.nonzero().max()) if row.any() else 0 for row in labels != IGNORE_INDEX]


def exact(config, windows, part):
    """Gradients and loads of each window in float64, every row alone and without its padding.

    Auxiliary losses are means over tokens, up to the number of targets per token, which is that of the window before.
    """
    torch.manual_seed(0)
    model = config.build().double()
    seen, routers = [], [layer.ffn.router for layer in model.layers]
    for router in routers:
        router.register_forward_hook(lambda router, given, routed: seen.append(routed))
    ratio, fractions = None, [torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64) for _ in routers]
    for rows in windows:
        model.zero_grad()
        total, auxiliary, counts = 0.0, 0.0, [torch.zeros(EXPERTS) for _ in routers]
        for ids, labels, length in zip(rows["input_ids"], rows["labels"], lengths(rows["labels"]), strict=True):
            if not length:
                continue
            seen.clear()
            logits = model(ids[None, :length])[0]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1 : length + 1], reduction="sum")
            for layer, (choices, scores) in enumerate(seen):
                loads = torch.stack([(choices.experts == expert).sum() for expert in range(EXPERTS)])
                counts[layer] += loads
                if isinstance(part.balance, LaggedLoss):
                    shares = scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
                    auxiliary = auxiliary + part.balance.weight * EXPERTS * (shares @ fractions[layer]).sum()
                    auxiliary = auxiliary + part.z_loss * scores.exp().sum(-1).log().square().sum()
                if isinstance(part.balance, SequenceLoss):
                    shares = scores.softmax(-1).mean(0)
                    auxiliary = auxiliary + length * EXPERTS / (K * length) * (loads * shares).sum()
        targets, tokens = int((rows["labels"] != IGNORE_INDEX).sum()), sum(lengths(rows["labels"]))
        ratio = targets / tokens if ratio is None else ratio
        ((total + ratio * auxiliary) / targets).backward()
        ratio = targets / tokens
        fractions = [(count / count.sum()).double() for count in counts]
        for layer, count in zip(model.layers, counts, strict=True):
            if isinstance(part.balance, LoadBias):
                step = part.balance.rate * torch.sign(count.mean() - count)
                layer.ffn.balance.bias.add_(step - step.mean())
        yield {name: param.grad.clone() for name, param in model.named_parameters()}, counts


def distance(found, wanted) -> float:
    difference = sum((found[name].double() - wanted[name]).square().sum() for name in wanted)
    return (difference / sum(value.square().sum() for value in wanted.values())).sqrt().item()


class Writer(PretrainModule):
    """Leaves what its rank saw in a file, since the ranks of a test may be other processes."""

    folder = None

    def on_fit_end(self):
        seen = self.trainer.optimizers[0].children[0].seen
        state = {name: value for name, value in self.state_dict().items() if "balance" in name}
        torch.save((seen, state), self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("balance", BALANCED)
@pytest.mark.parametrize(
    ("ranks", "accumulate", "settings"),
    [(1, 1, {}), (1, 4, {"activation_checkpointing": "blocks"}), (1, 16, {}), (2, 4, {})],
    ids=["one", "four, recomputed", "sixteen", "two ranks"],
)
def test_gradients_and_loads_do_not_depend_on_how_rows_are_cut(
    config, rows, loader, make_trainer, tmp_path, balance, ranks, accumulate, settings
):
    part = BALANCED[balance]
    config, data = with_experts(config, part), rows(ROWS, empty=True)
    strategy = "auto" if ranks == 1 else DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, devices=ranks, strategy=strategy)
    torch.manual_seed(0)
    module = Writer(config, optimizer=Record(), **settings)
    module.folder = tmp_path

    class Shares:
        def __len__(self):
            return len(loader(data, WINDOW // ranks // accumulate, ranks=ranks))

        def __iter__(self):
            return iter(loader(data, WINDOW // ranks // accumulate, rank=trainer.global_rank, ranks=ranks))

    trainer.fit(module, Shares())
    windows = [{name: value[cut] for name, value in data.items()} for cut in (slice(WINDOW), slice(WINDOW, ROWS))]
    wanted = list(exact(config, windows, part))
    for rank in range(ranks):
        seen, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, (gradients, _) in zip(seen, wanted, strict=True):
            found = {name.removeprefix("module."): value for name, value in found.items()}
            assert distance(found, gradients) < 1e-6
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}.ffn.balance"
            if balance == "lagged":
                counts = wanted[1][1][layer]
                torch.testing.assert_close(state[f"{prefix}.fractions"], (counts / counts.sum()).float())
            if balance == "bias":
                steps = [1e-3 * torch.sign(counts[layer].mean() - counts[layer]) for _, counts in wanted]
                change = sum(step - step.mean() for step in steps)
                torch.testing.assert_close(state[f"{prefix}.bias"], change, atol=1e-9, rtol=1e-5)


def test_padding_that_is_packed_away_counts_for_nothing(config, rows, loader, make_trainer):
    """Fine-tuning packs padded rows; loads are those of the tokens that a target depends on."""
    data = rows(8)
    torch.manual_seed(0)
    module = SFTModule(with_experts(config, PART), optimizer=Record())
    make_trainer(max_epochs=1).fit(module, loader(data, 8))
    load = module.model.layers[0].ffn.last_load
    assert load.tokens == sum(lengths(data["labels"]))
    assert load.counts.sum() == K * load.tokens


@pytest.mark.parametrize("accumulate", [1, 4])
def test_auxiliary_losses_are_means_over_tokens_where_few_are_targets(config, rows, loader, make_trainer, accumulate):
    part = dataclasses.replace(BALANCED["sequence"], z_loss=0.5, balance=LaggedLoss(weight=2.0), router=TopK(k=K))
    config, data = with_experts(config, part), rows(ROWS)
    data["labels"][:, 1:4] = IGNORE_INDEX
    torch.manual_seed(0)
    module = SFTModule(config, optimizer=Record())
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(data, WINDOW // accumulate))
    windows = [{name: value[cut] for name, value in data.items()} for cut in (slice(WINDOW), slice(WINDOW, ROWS))]
    wanted = [gradients for gradients, _ in exact(config, windows, part)]
    seen = trainer.optimizers[0].children[0].seen
    if accumulate == 1:  # in the first step, which no other precedes, each micro-batch has its own ratio
        assert distance(seen[0], wanted[0]) < 1e-6
    assert distance(seen[1], wanted[1]) < 1e-6


def test_auxiliary_losses_are_means_over_tokens_where_pairs_are_counted(config, loader, make_trainer):
    pairs = {"input_ids": torch.arange(36).view(4, 9) % 31, "labels": torch.arange(36).view(4, 9) % 31}
    pairs["labels"][:, :5] = IGNORE_INDEX
    pairs["labels"][1, 7:] = IGNORE_INDEX
    config = dataclasses.replace(config, num_layers=1)
    router, tokens, found = "model.layers.0.ffn.router.weight", sum(lengths(pairs["labels"])), []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        part = dataclasses.replace(PART, balance=None, z_loss=weight)
        module = DPOModule(with_experts(config, part), loss=SimPO(), optimizer=Record())
        trainer = make_trainer(max_steps=2)
        trainer.fit(module, loader({name: value.repeat(2, 1) for name, value in pairs.items()}, 4))
        found.append([seen[router.removeprefix("model.")] for seen in trainer.optimizers[0].children[0].seen])
    model, logits = module.model, []
    model.layers[0].ffn.router.register_forward_hook(lambda router, given, routed: logits.append(routed.logits))
    for ids, length in zip(pairs["input_ids"], lengths(pairs["labels"]), strict=True):
        model(ids[None, :length])
    mean = torch.cat(logits).logsumexp(-1).square().sum() / tokens
    wanted = torch.autograd.grad(mean, module.get_parameter(router))[0]
    for plain, weighed in zip(*found, strict=True):
        torch.testing.assert_close(weighed - plain, wanted, rtol=1e-4, atol=1e-6)


def test_masked_rows_count_the_tokens_of_documents_with_a_target(config):
    config = EncoderConfig(**{**vars(config), "layers": Layer(mixer=Attention(num_heads=2, causal=False), ffn=PART)})
    labels = torch.full((2, 8), IGNORE_INDEX)
    labels[0, 3] = labels[1, 0] = 7
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
    batch = {"input_ids": torch.arange(16).view(2, 8), "labels": labels, "document_ids": documents}
    with collect_auxiliary() as loads:
        MaskedNLL()(config.build(), batch)
    assert [load.sums[0].item() for load in loads] == [8, 8]
    assert all(load.counts.sum() == 8 * K for load in loads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Always(SkipRule):
    def reason(self, grad_norm, history):
        return "it is a test"


def test_a_step_that_is_skipped_moves_no_bias(config, row_data, make_trainer):
    torch.manual_seed(0)
    module = PretrainModule(with_experts(config, PART), optimizer=AdamW(), skip=Always())
    make_trainer(max_steps=2).fit(module, datamodule=row_data())
    assert module.skipped_steps == 2
    assert module.model.layers[0].ffn.balance.bias.abs().max() == 0


def test_a_resumed_run_goes_on_bit_for_bit(config, row_data, make_trainer, tmp_path):
    part = dataclasses.replace(PART, balance=LaggedLoss(weight=0.1), z_loss=0.01)
    cycle = (Layer(mixer=Attention(num_heads=2), ffn=PART), Layer(mixer=Attention(num_heads=2), ffn=part))
    config, states = dataclasses.replace(config, layers=cycle), []
    data = row_data()
    data.train_rows["labels"][:, 1:4] = IGNORE_INDEX  # so that tokens and targets differ
    for steps, resume in ((4, None), (2, None), (4, tmp_path / "two.ckpt")):
        torch.manual_seed(0)
        module = PretrainModule(config, optimizer=AdamW(), schedule=Constant())
        trainer = make_trainer(max_steps=steps, accumulate_grad_batches=2)
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        if steps == 2:
            trainer.save_checkpoint(tmp_path / "two.ckpt")
        states.append(module.state_dict())
    assert any("balance" in name for name in states[0])
    assert states[0]["model.layers.0.ffn.balance.bias"].abs().max() > 0
    assert all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_compiled_layers_count_and_train_as_others(config, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a compiler cannot follow the checks of shapes
    ids = torch.arange(16).view(2, 8)
    torch.manual_seed(0)
    model = with_experts(dataclasses.replace(config, num_layers=1), BALANCED["lagged"]).build()
    found = []
    for _ in range(2):
        with collect_auxiliary() as loads:
            total = model.hidden(ids, counted=ids % 5 > 0).square().sum()
        total = total + sum(load.loss for load in loads)
        found.append((torch.autograd.grad(total, list(model.layers.parameters())), loads))
        for block in model.layers:
            block.compile(backend="aot_eager")
    (plain, before), (compiled, after) = found
    assert [load.layer for load in after] == [layer.ffn for layer in model.layers]
    for ours, theirs in zip([*plain, *before[0][1:]], [*compiled, *after[0][1:]], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_hashed_tokens_train_without_a_balance(config, row_data, make_trainer):
    part = dataclasses.replace(PART, router=HashRouter(k=2))
    module = PretrainModule(with_experts(config, part), optimizer=AdamW())
    make_trainer(max_steps=2).fit(module, datamodule=row_data())
    assert module.model.layers[0].ffn.last_load.tokens > 0
