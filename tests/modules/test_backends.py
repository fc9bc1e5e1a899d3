"""Rollouts through other engines: a server process with weights of its own, and the generate of transformers."""

import dataclasses
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy

from lightning_lm.cli import main
from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.generation import HTTPBackend, OwnBackend, TransformersBackend, WeightPush
from lightning_lm.json_http import JSONServer
from lightning_lm.models import Attention, Layer, TransformerConfig, TransformersModel, export_model
from lightning_lm.modules import GRPOModule, PPOModule, RolloutPlan
from lightning_lm.optim import AdamW, Constant
from lightning_lm.parts import Part

SERVER = Path(__file__).parents[1] / "policy_server.py"
PLAN = RolloutPlan(samples_per_prompt=6, max_new_tokens=5, minibatches=2)


def share_of_ones(*, completions, **columns):
    return [completion.count("1") / 5 for completion in completions]


def number(value):
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server process; each test gives it the weights that it begins with."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served")
    layers = Layer(mixer=Attention(num_heads=2))
    export_model(TransformerConfig(vocab_size=13, d_model=16, num_layers=1, layers=layers).build(), folder)
    with subprocess.Popen([sys.executable, SERVER, folder], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.fixture
def serving(address, policy, tmp_path):
    """Return how to reach the server, which has the policy's first weights, and how often it was given others."""
    server = JSONServer(url=address, backoff_s=0.0, timeout_s=60.0)
    start = tmp_path / "start"
    export_model(policy(), start)
    assert server.post("update_weights_from_disk", {"model_path": str(start)})["success"]

    def pushes():
        with urllib.request.urlopen(address) as answer:
            return json.load(answer)["/update_weights_from_disk"]

    api = dataclasses.replace(server, url=f"{address}/v1")
    push = WeightPush(server=server, folder=str(tmp_path / "pushed"))
    return HTTPBackend(server=api, model="policy", weights=push), pushes


def train(policy, prompt_data, make_trainer, plan, steps, *, kind=GRPOModule, **settings):
    module, seen = kind(policy, rewards=[share_of_ones], plan=plan, optimizer=AdamW(lr=1e-2), schedule=Constant()), []
    module.record = lambda name, total, count=1: seen.append((name, number(total) / max(1e-9, number(count))))
    module.record_max = module.record_min = lambda name, value: seen.append((name, number(value)))
    trainer = make_trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, **settings)
    trainer.fit(module, prompt_data())
    curves = {}
    for name, value in seen:
        curves.setdefault(name, []).append(value)
    return module, curves


@pytest.mark.parametrize("kind", [GRPOModule, PPOModule])
def test_a_server_that_gets_the_weights_samples_from_the_policy(policy, prompt_data, make_trainer, serving, kind):
    backend, pushes = serving
    before = pushes()
    plan = dataclasses.replace(PLAN, backend=backend)
    module, curves = train(policy(), prompt_data, make_trainer, plan, 8, kind=kind)
    assert pushes() - before == 4  # one before each rollout
    assert curves["rollout/sampler_staleness"] == [0, 0, 0, 0]
    assert max(curves["sampling/sampling_logp_difference/max"]) < 1e-4
    assert [abs(ratio - 1) < 1e-4 for ratio in curves["ratio/max"]] == [True, False] * 4
    assert {answer.finish_reason for answer in module.last_rollout[0].completions} <= {"eos", "length"}


def test_a_server_with_old_weights_is_corrected_for_and_its_age_is_logged(policy, prompt_data, make_trainer, serving):
    backend, pushes = serving
    before = pushes()
    plan = dataclasses.replace(PLAN, backend=dataclasses.replace(backend, weights=None), importance_cap=1.5)
    module, curves = train(policy(), prompt_data, make_trainer, plan, 12)
    assert pushes() == before
    assert curves["rollout/sampler_staleness"] == [0, 2, 4, 6, 8, 10]
    differences = curves["sampling/sampling_logp_difference/mean"]
    assert differences[0] < 1e-4
    assert differences[-1] > 0.01
    rows, rollout = module.last_rollout[1], module.last_rollout[0]
    ratio = (rows["old_logprobs"] - rollout.sampler_logprobs(rows["old_logprobs"])).exp()
    torch.testing.assert_close(rows["importance_weights"], ratio.clamp(max=1.5))
    assert ratio.max() > 1.01
    # Each rollout begins from log-probabilities of the policy as it is, so its first ratio is one all the same.
    assert max(abs(ratio - 1) for ratio in curves["ratio/max"][::2]) < 1e-4


def test_weights_are_pushed_as_rarely_as_wished(policy, prompt_data, make_trainer, serving):
    backend, pushes = serving
    rarely = dataclasses.replace(backend, weights=dataclasses.replace(backend.weights, every=5))
    before = pushes()
    plan = dataclasses.replace(PLAN, backend=rarely, importance_cap=2.0)
    _, curves = train(policy(), prompt_data, make_trainer, plan, 12)
    assert curves["rollout/sampler_staleness"] == [0, 2, 4, 0, 2, 4]
    assert pushes() - before == 2
    plan = dataclasses.replace(plan, max_staleness=3)
    with pytest.raises(ConfigurationError, match="4 optimizer steps old, and max_staleness=3"):
        train(policy(), prompt_data, make_trainer, plan, 12)


class Diary(GRPOModule):
    """Leaves what its rank measured in a file, since the ranks of a test are other processes."""

    folder = None

    def record_max(self, name, value):
        self.largest = {**getattr(self, "largest", {}), name: max(number(value), self.noted(name))}
        super().record_max(name, value)

    def noted(self, name):
        return getattr(self, "largest", {}).get(name, 0.0)

    def on_fit_end(self):
        answers = [answer.token_ids for answer in self.last_rollout[0].completions]
        torch.save({"largest": self.largest, "answers": answers}, self.folder / f"{self.global_rank}.pt")


@pytest.fixture
def two_ranks(prompt_data, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(Diary, "folder", tmp_path)

    def fit(model, plan):
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
        trainer = make_trainer(max_steps=4, max_epochs=-1, limit_val_batches=0, devices=2, strategy=strategy)
        trainer.fit(Diary(model, rewards=[share_of_ones], plan=plan, optimizer=AdamW(lr=1e-2)), prompt_data())
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return fit


def test_the_server_gets_the_weights_of_two_ranks_once(policy, two_ranks, serving):
    backend, pushes = serving
    before = pushes()
    ranks = two_ranks(policy(), dataclasses.replace(PLAN, backend=backend))
    assert pushes() - before == 2  # of two rollouts
    for rank in ranks:
        assert rank["largest"]["sampling/sampling_logp_difference/max"] < 1e-4
    assert ranks[0]["answers"] != ranks[1]["answers"]


def test_held_out_prompts_are_answered_by_the_policy_itself(policy, prompt_data, make_trainer, serving, digits):
    backend, _ = serving
    nowhere = dataclasses.replace(backend, server=JSONServer(url="http://127.0.0.1:9", retries=0), weights=None)
    plan = dataclasses.replace(PLAN, backend=nowhere, importance_cap=2.0)
    (metrics,) = make_trainer().validate(
        GRPOModule(policy(), rewards=[share_of_ones], plan=plan), prompt_data(), verbose=False
    )
    assert metrics["val/completions/mean_length"] > 0


def test_old_weights_without_a_correction_are_refused(serving):
    backend, _ = serving
    with pytest.raises(ConfigurationError, match=r"every at most 2.*importance_cap"):
        dataclasses.replace(PLAN, backend=dataclasses.replace(backend, weights=None))
    with pytest.raises(ConfigurationError, match="importance_cap"):
        dataclasses.replace(
            PLAN, backend=dataclasses.replace(backend, weights=dataclasses.replace(backend.weights, every=3))
        )


def test_a_server_that_is_down_or_cannot_load_says_what_to_do(policy, prompt_data, make_trainer, serving, tmp_path):
    backend, _ = serving
    down = dataclasses.replace(backend, server=JSONServer(url="http://127.0.0.1:9/v1", retries=1, backoff_s=0.0))
    with pytest.raises(RemoteError, match=r"127.0.0.1:9/v1/completions cannot be reached.*2 attempts.*Start the"):
        train(policy(), prompt_data, make_trainer, dataclasses.replace(PLAN, backend=down), 2)
    lost = dataclasses.replace(backend.weights, body={"model_path": str(tmp_path / "elsewhere")})
    plan = dataclasses.replace(PLAN, backend=dataclasses.replace(backend, weights=lost))
    with pytest.raises(RemoteError, match=r"did not load the weights.*must see that folder under the same name"):
        train(policy(), prompt_data, make_trainer, plan, 2)


def test_backends_travel_as_plain_data(serving):
    backend, _ = serving
    for part in (backend, OwnBackend(), TransformersBackend()):
        plan = dataclasses.replace(PLAN, backend=part)
        assert Part.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_backend_is_chosen_in_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("served.yaml").write_text(
        """
base: grpo/reverse
model:
  init_args:
    plan:
      backend:
        class_path: HTTPBackend
        init_args:
          server: {url: "http://localhost:30000/v1"}
          model: policy
          weights: {server: {url: "http://localhost:30000"}, folder: pushed}
"""
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", "served.yaml", "--print_config"])
    backend = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["plan"]["init_args"]["backend"]
    assert backend["class_path"].endswith("HTTPBackend")
    weights = backend["init_args"]["weights"]
    assert weights["init_args"]["path"] == "update_weights_from_disk"
    assert weights["init_args"]["body"] == {"model_path": "{folder}"}


# --- transformers ---


@pytest.fixture
def foreign():
    """A small Llama of transformers whose own defaults would spoil the distribution."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=2, temperature=0.1, suppress_tokens=[1]
    )
    return model


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("backend", [OwnBackend(), TransformersBackend()])
def test_a_model_of_transformers_is_a_policy_as_it_is(foreign, prompt_data, make_trainer, backend, wrapped):
    kept = foreign.generation_config
    plan = dataclasses.replace(PLAN, backend=backend, importance_cap=2.0, rows_at_once=7)
    model = TransformersModel(foreign) if wrapped else foreign
    _, curves = train(model, prompt_data, make_trainer, plan, 4)
    assert max(curves["sampling/sampling_logp_difference/max"]) < 1e-4
    assert [abs(ratio - 1) < 1e-4 for ratio in curves["ratio/max"]] == [True, False] * 2
    assert curves["reward"][0] > 0  # the suppressed id 1 is the digit 1
    assert foreign.generation_config is kept


def test_ranks_of_different_length_wait_for_each_other(foreign, two_ranks):
    plan = dataclasses.replace(PLAN, backend=TransformersBackend(), importance_cap=2.0, max_new_tokens=20)
    ranks = two_ranks(foreign, dataclasses.replace(plan, samples_per_prompt=2))
    for rank in ranks:
        assert rank["largest"]["sampling/sampling_logp_difference/max"] < 1e-4
