"""Multi-token prediction against a float64 loop over single positions, documents and micro-batches."""

import pytest
import torch

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    GLU,
    Attention,
    GatedDeltaNet,
    Layer,
    MoE,
    MultiTokenConfig,
    ParallelHeads,
    SequentialHeads,
    Transformer,
    TransformerConfig,
    parameter_roles,
)
from lightning_lm.models.huggingface.config_json import config_to_huggingface
from lightning_lm.modules import CrossEntropy, MultiToken, PretrainModule
from lightning_lm.optim import SGD, Constant
from lightning_lm.types import IGNORE_INDEX

HEADS = {"sequential": SequentialHeads(num_tokens=2), "parallel": ParallelHeads(num_tokens=2)}
SIZES = {"vocab_size": 23, "d_model": 16, "num_layers": 2, "context_length": 16}


def config_of(heads, **more):
    return MultiTokenConfig(**{**SIZES, **more}, layers=Layer(mixer=Attention(num_heads=2), ffn=GLU()), ahead=heads)


def model_of(heads, **more):
    torch.manual_seed(0)
    return config_of(heads, **more).build().double().train()


def packed(lengths=((5, 3, 4), (2, 10)), seed=1):
    """Rows of documents, the first token of each of which is no target."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    ids = torch.randint(23, documents.shape, generator=generator)
    labels = ids.clone()
    labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "document_ids": documents}


def log_prob(model, stream, norm, token):
    return torch.log_softmax(model.head(norm(stream)), dim=-1)[token]


def loop(model, batch, weight):
    """Document by document and token by token, from the two papers' equations."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    heads = list(model.ahead)
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for document in documents.unique():
            text = ids[documents == document]
            trunk = [model.embed(text)[None]]
            for block in model.layers:
                context = model._head_context(text[None], None, None)
                trunk.append(block(trunk[-1], context))
            stream = trunk[-1]
            for place in range(len(text) - 1):
                total = total - log_prob(model, stream[0, place], model.norm, text[place + 1])
                count += 1
            for k, head in enumerate(heads, start=1):
                reach = len(text) - k - 1  # positions i with a token i + k + 1
                if reach < 1:
                    break
                if hasattr(head, "join"):
                    known = model.embed(text[k : k + reach])[None]
                    pair = torch.cat([head.stream_norm(stream[:, :reach]), head.token_norm(known)], dim=-1)
                    entering = pair @ head.join.weight.T
                else:
                    entering = trunk[-2][:, :reach]
                stream = head.block(entering, model._head_context(text[None, :reach], None, None))
                for place in range(reach):
                    further = log_prob(model, stream[0, place], head.norm, text[place + k + 1])
                    total = total - weight / len(heads) * further
    return total, count


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_loss_and_gradients_are_those_of_a_loop_over_documents_and_tokens(heads):
    model, batch = model_of(heads), packed()
    found = MultiToken(weight=0.7)(model, batch)
    wanted, count = loop(model, batch, 0.7)
    assert found.num_tokens == count
    torch.testing.assert_close(found.loss_sum, wanted, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(found.loss_sum, parameters)
    for got, want in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_what_is_measured_is_the_next_token_alone(heads):
    model, batch = model_of(heads), packed()
    plain, found = CrossEntropy()(model, batch), MultiToken()(model, batch)
    torch.testing.assert_close(found.nll_sum, plain.nll_sum)
    assert found.loss_sum > plain.loss_sum
    torch.testing.assert_close(MultiToken(weight=0.0)(model, batch).loss_sum, plain.loss_sum)
    model.eval()
    assert MultiToken()(model, batch).loss_sum == plain.loss_sum


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_no_gradient_crosses_a_document(heads):
    model, batch = model_of(heads), packed(((6, 6),))
    batch["labels"][:, 6:] = IGNORE_INDEX  # targets in the first document only
    MultiToken()(model, batch).loss_sum.backward()
    first = set(batch["input_ids"][0, :6].tolist())
    others = [token for token in batch["input_ids"][0, 6:].tolist() if token not in first]
    assert others
    assert not model.embed.weight.grad[others].any()


def test_a_row_shorter_than_the_heads_reach_has_the_heads_that_fit():
    model = model_of(SequentialHeads(num_tokens=4))
    found = MultiToken()(model, packed(((3,),)))
    assert torch.isfinite(found.loss_sum)
    assert [x.size(1) for x in model.hidden_ahead(torch.zeros(1, 2, dtype=torch.int64))] == [2, 1]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_next_token_path_is_that_of_the_transformer(heads):
    model = model_of(heads)
    plain = Transformer(TransformerConfig(**SIZES, layers=model.config.layers)).double()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("ahead.")})
    ids = packed()["input_ids"]
    assert torch.equal(model(ids), plain(ids))
    assert torch.equal(model.hidden_ahead(ids)[0], plain.hidden(ids))
    assert {parameter_roles(model)[f"ahead.0.{name}"] for name in ("block.ffn.down.weight",)} == {"matrix"}
    assert MultiTokenConfig.from_dict(model.config.to_dict()) == model.config


def test_recurrent_layers_and_experts_can_stand_in_a_head():
    layer = Layer(mixer=GatedDeltaNet(num_heads=2), ffn=MoE(experts=GLU(hidden_size=8), num_experts=4))
    model = model_of(SequentialHeads(layer=layer))
    MultiToken()(model, packed()).loss_sum.backward()
    assert all(x.grad is not None for name, x in model.named_parameters() if "choice_bias" not in name)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_micro_batches_of_unequal_targets_give_the_step_of_the_whole_batch(heads, row_data, make_trainer):
    def weights(accumulate, size):
        torch.manual_seed(0)
        model = config_of(heads, vocab_size=31).build()
        module = PretrainModule(model, optimizer=SGD(lr=0.1), schedule=Constant(), loss=MultiToken())
        data = row_data(size=size)
        make_trainer(max_steps=2, accumulate_grad_batches=accumulate).fit(module, datamodule=data)
        return model.state_dict()

    whole, parts = weights(1, 4), weights(4, 1)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


def test_a_model_without_heads_and_a_prefix_are_refused():
    plain = Transformer(TransformerConfig(**SIZES)).train()
    with pytest.raises(ConfigurationError, match="class_path MultiTokenConfig"):
        MultiToken()(plain, packed())
    with pytest.raises(ConfigurationError, match="prefix"):
        MultiToken()(model_of(SequentialHeads()), {**packed(), "prefix_lengths": torch.tensor([2, 2])})


def test_no_family_of_transformers_has_these_heads():
    config = MultiTokenConfig(vocab_size=50, d_model=16, num_layers=1)
    with pytest.raises(ConfigurationError, match="llama: it describes a TransformerConfig, not a MultiTokenConfig"):
        config_to_huggingface(config)
