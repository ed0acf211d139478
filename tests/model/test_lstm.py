"""The LSTM: one call, the equations, and PyTorch's own module are the same; what has no meaning for it is refused."""

import multiprocessing

import pytest
import torch
from conftest import last_json

from mini import GPT, ModelConfig
from mini.errors import UserError

CONFIG = dict(n_layers=2, n_heads=2, d_model=16, max_len=12, vocab_size=30, block="lstm", positions="none")


def layer(**changes):
    torch.manual_seed(3)
    return GPT(ModelConfig(**{**CONFIG, **changes})).double().stack.blocks[1]


@pytest.mark.parametrize("bias", [True, False])
def test_fused_is_as_written_forward_and_backward(bias):
    lstm, x = layer(bias=bias), torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    if bias:
        torch.nn.init.normal_(lstm.read.bias)
    found = []
    for y in (lstm.written(x, None, None), lstm.fused(x)):
        inner = [p for name, p in lstm.named_parameters() if "norm" not in name]
        found.append([y, *torch.autograd.grad((y * torch.arange(16)).sum(), [x, *inner])])
    torch.testing.assert_close(*found)


def test_it_is_torchs():
    """With the forget gate's bias of one in it."""
    lstm, x = layer(), torch.randn(2, 7, 16, dtype=torch.float64)
    theirs = torch.nn.LSTM(16, 16, batch_first=True).double()
    theirs.weight_ih_l0, theirs.weight_hh_l0 = lstm.read.weight, lstm.recur.weight
    torch.nn.init.zeros_(theirs.bias_hh_l0)
    theirs.bias_ih_l0.data = lstm.read.bias.data + lstm.remember
    torch.testing.assert_close(lstm.fused(x), theirs(x)[0])
    torch.testing.assert_close(lstm(x, None, None, None, None), x + theirs(lstm.norm(x))[0])


def test_what_watches_its_matrices_sees_every_step():
    lstm, x, seen = layer(), torch.randn(2, 7, 16, dtype=torch.float64), []
    alone = lstm(x, None, None, None, None)
    with lstm.recur.register_forward_hook(lambda module, arguments, output: seen.append(output)):
        torch.testing.assert_close(lstm(x, None, None, None, None), alone)
    assert len(seen) == 7


def test_ragged_prompts_go_on_from_their_last_token():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**CONFIG)).eval()
    torch.nn.init.normal_(model.stack.tokens.weight)
    prompts = torch.randint(30, (3, 6))
    together = model.generate(prompts, 9, lengths=torch.tensor([6, 2, 4]))
    for row, n in zip(range(3), (6, 2, 4), strict=True):
        alone = model.generate(prompts[row : row + 1, :n], 9)[0, n:]
        assert together[row, n : n + 9].tolist() == alone.tolist()


def test_with_matrices_stored_short_it_is_written_out():
    model = GPT(ModelConfig(**CONFIG)).eval()
    tokens = torch.randint(30, (1, 6))
    plain = model(tokens)
    torch.testing.assert_close(model.store(torch.bfloat16)(tokens), plain, rtol=0.1, atol=0.1)


def test_its_arithmetic_is_its_matrices():
    model = GPT(ModelConfig(**CONFIG))
    assert model.stack.flops(5) == model.stack.flops(500) == 2 * 2 * (4 * 16 * 16 * 2)


@pytest.mark.parametrize(("changes", "says"), [(dict(causal=False), "a BERT sees both sides"),
                                               (dict(window=4), "it has no attention that --window")])  # fmt: skip
def test_refused(changes, says):
    with pytest.raises(UserError, match=says):
        ModelConfig(**{**CONFIG, **changes})


def test_commands(command, text_file, tmp_path, monkeypatch):
    """A run like any other: trained, sampled, made smaller, told apart; and what an LSTM has not is one line."""
    run = tmp_path / "lstm"
    flags = ["--tokenizer", "bytes", "--n_layers", 2, "--d_model", 32, "--max_len", 32]
    train = ["train_gpt.py", "--data", text_file, *flags, "--block", "lstm", "--steps", 4]
    command(*train, "--out", run)
    assert command("-m", "mini", "sample", run, "the cat", "--max_new_tokens", 40).stdout.startswith("the cat")
    small = ["--out", tmp_path / "small", "--steps", 2]
    command("compress.py", "prune", run, "--sparsity", 0.5, "--method", "wanda", *small)
    command("compress.py", "quantize", run, "--scheme", "static", "--out", tmp_path / "int8")
    command("compress.py", "reduce", run, "--keep", "1", "--steps", 2, "--out", tmp_path / "one")
    command("compress.py", "distill", run, "--recipe", "distilbert", "--steps", 2, "--out", tmp_path / "student")
    spawned = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: spawned("fork" if kind == "spawn" else kind))
    flags = ["--repeats", 1, "--lengths", 16, "--out", tmp_path / "report"]
    assert last_json(command("compress.py", "report", run, tmp_path / "int8", *flags))["rows"] >= 2
    for arguments, says in [
        (
            ["compress.py", "prune", run, "--pattern", "heads", "--out", tmp_path / "x"],
            "an LSTM has none that could go",
        ),
        (["compress.py", "distill", run, "--recipe", "minilm", "--steps", 2, "--out", tmp_path / "x"], "no attention"),
        ([*train, "--n_heads", 4, "--out", tmp_path / "x"], "--n_heads has no effect here"),
        ([*train, "--document_mask", "true", "--separator", "\\n", "--out", tmp_path / "x"], "carries its state over"),
    ]:
        assert says in command(*arguments, status=2).stderr
    assert not (tmp_path / "x").exists()
