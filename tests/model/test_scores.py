"""The loss in parts is that of all logits at once, forward and backward, and holds none of them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mini import GPT, Bert, ModelConfig
from mini.model import scores
from mini.model.scores import Unscored, token_loss
from mini.tasks.lm import LanguageModelling
from mini.tasks.masked import MaskedLanguageModelling

SMALL = ModelConfig(n_layers=1, n_heads=2, d_model=16, max_len=12, vocab_size=50)


def plain(x, head, vocab_size, cap):
    logits = head(x)[..., :vocab_size]
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_equals_the_plain_loss(rows, bias, cap, monkeypatch):
    monkeypatch.setattr(scores, "rows_at_once", lambda device: rows)
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(6, 16, bias=bias, dtype=torch.float64)  # of which 11 are tokens
    targets = torch.randint(11, (2, 7))
    targets[0, 2:5] = -100
    found = []
    for logits in (plain(x, head, 11, cap), Unscored(x, head, 11, cap)):
        loss = token_loss(logits, targets)
        found.append((loss.double(), *torch.autograd.grad(0.3 * loss, [x, *head.parameters()])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the plain one takes logarithms in float32, too
    assert token_loss(Unscored(x, head, 11, cap), torch.full((2, 7), -100)) == 0


def random_inputs(kind: str) -> dict:
    torch.manual_seed(1)
    tokens = torch.randint(50, (3, 12))
    if kind == "gpt":
        return {"tokens": tokens, "targets": tokens.roll(-1, 1)}
    positions = torch.tensor([[1, 5, 9]] * 3)
    return {"tokens": tokens, "lengths": torch.tensor([12, 9, 12]), "positions": positions,
            "targets": tokens.gather(1, positions).index_fill(1, torch.tensor([2]), -100)}  # fmt: skip


VARIANTS = {
    "tied": {},
    "untied": dict(tied=False),
    "padded": dict(vocab_multiple=64),
    "capped": dict(logit_softcap=4.0),
}


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("name", VARIANTS)
def test_models_learn_the_same(name, kind, monkeypatch):
    monkeypatch.setattr(scores, "rows_at_once", lambda device: 4)
    settings, inputs = dict(vars(SMALL), **VARIANTS[name]), random_inputs(kind)
    task = LanguageModelling if kind == "gpt" else MaskedLanguageModelling
    found = []
    for in_parts in (False, True):
        torch.manual_seed(0)
        model = GPT(ModelConfig(**settings)) if kind == "gpt" else Bert(ModelConfig(**settings | dict(mlm=True)))
        answers = model.answers(inputs, in_parts=in_parts)
        assert isinstance(next(iter(answers.values())), Unscored) == in_parts
        sum(task.losses(None, answers, inputs).values()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found)


def test_a_head_that_does_not_learn():
    x, head = torch.randn(5, 6, requires_grad=True), nn.Linear(6, 11).requires_grad_(False)
    targets = torch.randint(11, (5,))
    for logits in (head(x), Unscored(x, head, 11, 0.0)):
        token_loss(logits, targets).backward()
    assert head.weight.grad is None and x.grad is not None


def test_no_tensor_as_large_as_the_logits_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        x, head = torch.randn(400, 6, requires_grad=True), nn.Linear(6, 300)
        targets = torch.randint(300, (400,))
        loss = token_loss(Unscored(x, head, 300, 0.0), targets)
        assert kept and max(kept) < 400 * 300 / 10
        token_loss(head(x), targets)
        assert max(kept) == 400 * 300
    loss.backward()


def test_judging_computes_no_gradient():
    x, head, targets = torch.randn(50, 6), nn.Linear(6, 30), torch.randint(30, (50,))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        found = token_loss(Unscored(x, head, 30, 0.0), targets)
    assert counted.get_total_flops() == 2 * 50 * 6 * 30
    torch.testing.assert_close(found, token_loss(head(x), targets))


def test_float16_holds_the_sums_over_rows(monkeypatch):
    """Two thousand of one target, as many as a GPU does at a time."""
    monkeypatch.setattr(scores, "rows_at_once", lambda device: 2048)
    x = torch.full((2048, 4), 200.0, dtype=torch.float16, requires_grad=True)
    head = nn.Linear(4, 8, bias=False).half()
    nn.init.zeros_(head.weight)
    loss = token_loss(Unscored(x, head.float(), 8, 0.0), torch.zeros(2048, dtype=torch.int64))
    (slope,) = torch.autograd.grad(loss, head.weight)
    assert torch.isfinite(slope).all() and float(slope[0, 0]) == pytest.approx(-2048 * 200 * 7 / 8, rel=1e-2)


def test_what_does_not_count_may_be_no_number():
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    head, targets = nn.Linear(2, 3), torch.tensor([1, -100])
    torch.testing.assert_close(token_loss(Unscored(x, head, 3, 0.0), targets), token_loss(head(x), targets))


def test_compiled():
    torch.manual_seed(0)
    x, head, targets = torch.randn(9, 6, requires_grad=True), nn.Linear(6, 11), torch.randint(11, (9,))

    def loss(x):
        return token_loss(Unscored(x, head, 11, 0.0), targets)

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception:
        pytest.skip("no compiler")
    compiled = torch.compile(loss)(x)
    found = [(value, *torch.autograd.grad(value, [x, *head.parameters()])) for value in (loss(x), compiled)]
    torch.testing.assert_close(*found)
