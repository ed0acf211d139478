"""Denoising: what is damaged, how much, always the same; and what counts as repaired."""

from collections import Counter

import numpy as np
import pytest
import torch

from mini.errors import UserError
from mini.tasks.base import IGNORE
from mini.tasks.denoise import FAR, DenoiseConfig, Denoising
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import TokenFile

TOKENIZER = ByteTokenizer().with_special(Denoising.special_tokens)
EOT, MASK, SEP = TOKENIZER.eot, TOKENIZER.mask, TOKENIZER.sep


def make(n: int = 4000, max_len: int = 81, seed: int = 1, **options) -> Denoising:
    none = np.zeros(1, dtype=np.uint64)
    file = TokenFile((np.arange(n) % 199).astype(np.uint16), none, none, n, "")
    return Denoising(file, file, TOKENIZER, max_len, seed, 8, DenoiseConfig(**options))


def halves(data: Denoising, row: int, inputs: dict) -> tuple[list[int], list[int], list[int]]:
    """The damaged copy, the text, and the targets of a row."""
    begin, tokens = int(inputs["begins"][row]), inputs["tokens"][row].tolist()
    targets = inputs["targets"][row].tolist()
    assert tokens[begin - 1] == SEP and targets[: begin - 1] == [IGNORE] * (begin - 1)
    assert targets[begin - 1 : begin + data.size] == [*tokens[begin : begin + data.size], EOT]
    assert set(targets[begin + data.size :]) <= {IGNORE}
    return tokens[: begin - 1], tokens[begin : begin + data.size], targets


@pytest.mark.parametrize("noise", ["delete", "mask", "replace", "shuffle", "all", "none"])
def test_what_is_done_to_a_text(noise):
    data = make(noise=noise, noise_rate=0.3)
    batch = data.batch(np.arange(data.n))
    assert data.n == 4000 // 40 and batch.inputs["tokens"].shape == (100, 81) and batch.counts == {"lm": 41 * 100}
    changed, texts = 0, []
    for row in range(100):
        damaged, text, _ = halves(data, row, batch.inputs)
        texts.append(text[0])
        assert text == [(text[0] + i) % 199 for i in range(40)]  # as it stands in the corpus
        if noise == "delete":
            rest = iter(text)
            assert all(token in rest for token in damaged)  # in this order
            changed += 40 - len(damaged)
        elif noise in ("mask", "replace"):
            assert len(damaged) == 40
            hits = [a for a, b in zip(damaged, text, strict=True) if a != b]
            assert noise == "replace" or set(hits) <= {MASK}
            changed += len(hits)
        elif noise == "shuffle":
            assert Counter(damaged) == Counter(text) and damaged != text
            assert max(abs(damaged.index(token) - i) for i, token in enumerate(text)) <= FAR
        elif noise == "none":
            assert damaged == text
        else:
            changed += sum((Counter(text) - Counter(damaged)).values())
    assert Counter(texts) == Counter(i * 40 % 199 for i in range(100))  # they tile it
    if noise not in ("shuffle", "none"):
        assert changed == pytest.approx(0.3 * 4000, rel=0.1)


def test_what_stands_in_anothers_place_is_no_mark_and_documents_may_begin_anywhere():
    data = make(noise="replace", noise_rate=1.0)
    data.train = np.full(4000, EOT)
    batch = data.batch(np.arange(data.n)).inputs
    for row in range(data.n):
        damaged, text, _ = halves(data, row, batch)
        assert set(text) == {EOT} and not {EOT, MASK, SEP} & set(damaged)


def test_it_depends_on_seed_and_index_alone():
    data = make()
    whole = data.batch(np.arange(10, 20)).inputs["tokens"]
    assert torch.equal(whole, torch.cat([data.batch(np.arange(i, i + 5)).inputs["tokens"] for i in (10, 15)]))
    assert not torch.equal(whole, make(seed=2).batch(np.arange(10, 20)).inputs["tokens"])
    epochs = [data.batch(np.arange(e * data.n, (e + 1) * data.n)) for e in range(2)]
    copies = [{halves(data, i, e.inputs)[1][0]: halves(data, i, e.inputs)[0] for i in range(data.n)} for e in epochs]
    assert copies[0].keys() == copies[1].keys() and copies[0] != copies[1]  # another damage in each epoch


def test_validation_is_always_the_same_and_judges_as_many_as_asked():
    found = []
    for seed, size in ((1, 7), (2, 30)):
        batches = [batch.inputs for batch in make(seed=seed, n_judged=13).validation(size)]
        found.append([torch.cat([batch[name] for batch in batches]) for name in ("tokens", "targets", "judged")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert int(found[0][2].sum()) == 13 and len(found[0][0]) == 100
    assert sum(len(b.inputs["tokens"]) for b in make().validation(7, limit=400)) == 10


class Copying(torch.nn.Module):
    """Writes down what it was given, or with `knows` the text."""

    def __init__(self, knows: bool):
        super().__init__()
        self.knows, self.one = knows, torch.nn.Parameter(torch.ones(1))

    def answers(self, inputs):
        targets = inputs["targets"].clamp(min=0) if self.knows else torch.zeros_like(inputs["targets"])
        return {"lm": 20.0 * torch.nn.functional.one_hot(targets, TOKENIZER.vocab_size).float()}

    def generate(self, tokens, most, lengths, stop):
        assert not stop  # a document may begin in a text
        out = torch.full((len(tokens), tokens.size(1) + most), EOT)
        for row, n in enumerate(lengths.tolist()):
            given = tokens[row, : n - 1]
            if self.knows:
                begin = int(given[given < 199][0])  # right where the first token was not damaged
                given = (begin + torch.arange(40)) % 199
            out[row, n : n + len(given)] = given
        return out


def figures(data: Denoising, model: torch.nn.Module) -> dict:
    sums: dict = {}
    for batch in data.validation(9):
        measured = data.measure(model, batch.inputs) | {"count/lm": torch.tensor(float(batch.counts["lm"]))}
        sums = {name: sums.get(name, 0) + value for name, value in measured.items()}
    return data.metrics(sums)


def test_what_counts_as_repaired():
    right = figures(make(noise="mask"), Copying(True))
    assert right["token_accuracy"] == 1 and right["val_loss"] < 1e-6 and right["exact"] > 0.5 > right["copied_exact"]
    lazy = figures(make(noise="mask"), Copying(False))
    assert lazy["exact"] == lazy["copied_exact"] and lazy["token_accuracy"] < 0.1
    whole = figures(make(noise="none"), Copying(False))
    assert whole["exact"] == whole["copied_exact"] == 1
    assert "exact" not in figures(make(n_judged=0), Copying(True))


def test_refused():
    with pytest.raises(UserError, match="--noise 'mix': choose any of"):
        make(noise="mix")
    with pytest.raises(UserError, match="too short for a text"):
        make(max_len=8)
    with pytest.raises(UserError, match="too little text: one takes 40 tokens"):
        make(n=39)


def test_command(command, text_file, tmp_path):
    run = tmp_path / "denoise"
    flags = ["--tokenizer", "bytes", "--n_layers", 2, "--d_model", 32, "--n_heads", 2, "--max_len", 33]
    done = command("train_gpt.py", "--task", "denoise", "--data", text_file, *flags, "--steps", 4, "--out", run)
    assert "Of whole texts, " in done.stdout and "mini sample" in done.stdout
    assert "ran.\n-> " in command("-m", "mini", "sample", run, "the [MASK] ran.", "--max_new_tokens", 8).stdout
    assert '"token_accuracy_se"' in command("-m", "mini", "evaluate", run, text_file).stdout
    command("compress.py", "prune", run, "--sparsity", 0.5, "--steps", 2, "--out", tmp_path / "half")
