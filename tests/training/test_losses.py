"""Contract: what loss() returns is what is trained, and its figure is one number everywhere."""

import pytest
import torch
from conftest import TINY, last_json, metrics
from torch import nn

from mini import GPT, Bert, ModelConfig, load_run
from mini.tasks.base import Batch, Task
from mini.tasks.lm import LanguageModelling
from mini.training.loop import Losses, backward, count
from mini.training.optim import OptimConfig, make_optimizers, roles
from mini.training.ranks import World

SIZE = dict(n_layers=2, n_heads=2, d_model=16, max_len=8, vocab_size=20)


class Two(Task):
    """Two sums over one parameter; only the first is counted by the data."""

    loss_weights = {"second": 0.25}  # noqa: RUF012

    def losses(self, answers, inputs):
        return {"first": 2 * inputs["x"].sum() * answers["w"], "second": inputs["x"].sum() * answers["w"]}


class Model(nn.Module):
    loss_weights = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def answers(self, inputs):
        return {"w": self.w}

    def extra_losses(self):
        return {}


def gradient(model, task, batches):
    numbered = list(enumerate(batches))
    losses = Losses(model, task)
    world = World("cpu")
    counts, n, _ = count(task, numbered, world)
    sums, weights = backward(losses, task, model.loss_weights, numbered, counts, n, torch.float32, world)
    return {name: float(x) / counts.get(name, n) for name, x in sums.items()}, weights, n, float(model.w.grad)


def test_an_uncounted_loss_is_trained_too_over_the_real_tokens():
    batches = [Batch({"x": torch.ones(4)}, {"first": 2}, 10), Batch({"x": torch.ones(2)}, {"first": 1}, 5)]
    means, weights, n, slope = gradient(Model(), Two(), batches)
    assert n == 15 and weights == {"first": 1.0, "second": 0.25}
    assert means == {"first": pytest.approx(2 * 6 * 3 / 3), "second": pytest.approx(6 * 3 / 15)}
    assert slope == pytest.approx(2 * 6 / 3 + 0.25 * 6 / 15)


def test_what_does_not_fit_together_is_an_error():
    """Counts and weights without a loss, micro-batches that count otherwise, and names that are taken."""
    model, x = Model(), {"x": torch.ones(4)}
    with pytest.raises(ValueError, match="no loss, of the name third"):
        gradient(model, Two(), [Batch(x, {"first": 2, "third": 2}, 10)])
    model.loss_weights = {"fourth": 1.0}
    with pytest.raises(ValueError, match="no loss, of the name fourth"):
        gradient(model, Two(), [Batch(x, {"first": 2}, 10)])
    model.loss_weights = {}
    with pytest.raises(ValueError, match="count different losses"):
        gradient(model, Two(), [Batch(x, {"first": 2}, 10), Batch(x, {"second": 2}, 10)])
    for name in ("first", "lr"):
        model.extra_losses = lambda name=name: {name: model.w}
        with pytest.raises(ValueError, match=f"have the name {name}"):
            gradient(model, Two(), [Batch(x, {"first": 2}, 10)])


@pytest.mark.parametrize("default", [0.0, 2.0])
def test_a_models_own_loss_does_not_have_the_weight_of_the_tasks(default):
    """As under distillation, where `default` is that of the labels."""
    task, model = Two(), Model()
    task.default_weight = default
    model.extra_losses = lambda: {"extra": model.w * 7}
    _, weights, _, _ = gradient(model, task, [Batch({"x": torch.ones(4)}, {"first": 2}, 10)])
    assert weights == {"first": default, "second": 0.25, "extra": 1.0}


def test_what_a_model_asks_for_is_trained_with_its_own_weight():
    model = Model()
    model.loss_weights = {"extra": 0.5}
    model.extra_losses = lambda: {"extra": model.w * 7}
    means, _, _, slope = gradient(model, Two(), [Batch({"x": torch.zeros(4)}, {"first": 2}, 10)])
    assert means["extra"] == pytest.approx(2.1) and slope == pytest.approx(0.35)


def test_a_second_loss_is_one_number_everywhere(text_file, tmp_path, command, monkeypatch):
    """In metrics.jsonl "loss" is the weighted sum of the losses beside it; the figure of validation is the task's."""

    def losses(self, answers, inputs):
        return plain(self, answers, inputs) | {"z": answers["lm"].float().logsumexp(-1).square().sum()}

    plain = LanguageModelling.losses
    monkeypatch.setattr(LanguageModelling, "losses", losses)
    monkeypatch.setattr(LanguageModelling, "loss_weights", {"z": 1e-3})
    monkeypatch.setattr(LanguageModelling, "in_parts", False)  # it looks at all logits
    flags = ["--steps", 4, "--log_every", 1, "--eval_every", 0, "--sample_every", 0, "--out", tmp_path / "run"]
    result = last_json(command("train_gpt.py", "--data", text_file, *TINY, *flags))
    rows = metrics(tmp_path / "run")
    assert all(row["loss"] == pytest.approx(row["lm"] + 1e-3 * row["z"], rel=1e-5) for row in rows)
    assert rows[-1]["val_loss"] == result["val_loss"] and rows[-1]["z"] > 0


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_group_by_what_its_module_says(optimizer):
    model = Bert(ModelConfig(**SIZE, n_segments=2, mlm=True, nsp=True, n_classes=3, tied=False))
    found = roles(model)
    assert found["stack.tokens.weight"] == found["stack.segments.weight"] == "embedding"
    assert found["stack.blocks.1.mlp.up.weight"] == "hidden" and found["stack.blocks.1.mlp.up.bias"] == "vector"
    assert found["mlm.decoder.weight"] == found["classifier.weight"] == found["pooler.weight"] == "head"
    groups = [g for o in make_optimizers(model, OptimConfig(optimizer)) for g in o.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_a_module_within_a_block_may_say_otherwise():
    """A router's matrix, say, is not orthogonalised."""
    model = GPT(ModelConfig(**SIZE))
    model.stack.blocks[0].router = nn.Linear(16, 4)
    assert roles(model)["stack.blocks.0.router.weight"] == "hidden"
    model.stack.blocks[0].router.role = "head"
    assert roles(model)["stack.blocks.0.router.weight"] == "head"
    model.stack.blocks[0].router.role = "heads"
    with pytest.raises(ValueError, match=r"router\.weight has the role 'heads'"):
        make_optimizers(model, OptimConfig())


# ---------------------------------------------------------------- settings
def test_another_optimizer_does_not_keep_the_presets_rates():
    import train_gpt

    assert train_gpt.read(["--optimizer", "adamw"]).optim.lr == 0.001
    assert train_gpt.read(["--optimizer", "adamw", "--lr", "0.01"]).optim.lr == 0.01
    preset = train_gpt.read([]).optim
    assert preset.optimizer == "muon" and train_gpt.read(["--optimizer", "muon"]).optim == preset
    assert train_gpt.read(["--preset", "gpt2"]).optim.lr == 6e-4
    assert train_gpt.read(["--preset", "gpt2", "--optimizer", "muon"]).optim.lr == 0.02
    assert train_gpt.read(["--task", "pairs", "--optimizer", "muon"]).optim.lr == 0.002


def test_fewer_steps_than_turns_leave_no_matrix_out(text_file, tmp_path, command):
    runs = []
    for steps in (2, 3):
        flags = ["--steps", steps, "--eval_every", 0, "--sample_every", 0, "--zero_init", "false"]
        command("train_gpt.py", "--data", text_file, *TINY, *flags, "--turns", 8, "--out", tmp_path / str(steps))
        runs.append(load_run(tmp_path / str(steps))[0])
    torch.manual_seed(1)
    fresh = GPT(runs[0].config)
    for run in runs:
        for name, parameter in run.stack.blocks.named_parameters():
            assert not torch.equal(parameter, fresh.stack.blocks.get_parameter(name)), name
