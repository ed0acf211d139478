"""The encoder: its heads, its padding, its published form."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mini import Bert, ModelConfig, load_run
from mini.errors import UserError
from mini.presets import BERT_PRESETS, ENCODER, MODERN, model_preset
from mini.tasks.base import IGNORE
from mini.tasks.masked import MaskedLanguageModelling
from mini.tensors import load_tensors, save_tensors, weights
from mini.training.runs import copy_weights, read_labels

FIXTURE = Path(__file__).parents[1] / "fixtures" / "bert"
SMALL = dict(
    ENCODER, n_layers=2, n_heads=4, d_model=32, max_len=24, vocab_size=60, norm_place="post", activation="gelu"
)
PRETRAINING = dict(SMALL, mlm=True, nsp=True)


def make(seed: int = 0, **settings) -> Bert:
    torch.manual_seed(seed)
    model = Bert(ModelConfig(**settings)).eval()
    with torch.no_grad():  # nothing at zero or one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(B: int = 3, T: int = 12, M: int = 3) -> dict:
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([12, 9, 5])[:B]
    targets = torch.randint(60, (B, M), generator=g)
    targets[2, 1:] = IGNORE
    return dict(
        tokens=torch.randint(60, (B, T), generator=g),
        segments=(torch.arange(T) > 3).long().expand(B, T),
        lengths=lengths,
        positions=torch.tensor([[1, 5, 8], [2, 3, 7], [4, 0, 0]]),
        targets=targets,
        unrelated=torch.tensor([0, 1, 1]),
    )


def losses(model: Bert, batch: dict) -> dict:
    return MaskedLanguageModelling.losses(None, model.answers(batch), batch)


# ---------------------------------------------------------------- published weights
def expected() -> dict:
    return {name: torch.tensor(values) for name, values in json.loads((FIXTURE / "expected.json").read_text()).items()}


def assert_published(model: Bert, e: dict, pretraining: bool = True) -> None:
    T = e["tokens"].size(1)
    real = torch.arange(T) < e["lengths"][:, None]
    with torch.no_grad():
        hidden = model(e["tokens"], segments=e["segments"], real=real)
        torch.testing.assert_close(hidden[real], e["hidden"][real], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.pool(hidden), e["pooled"], atol=1e-5, rtol=0)
        if pretraining:
            places = torch.arange(T).expand(len(real), T)
            mlm, nsp = model.predict(e["tokens"], e["lengths"], places, e["segments"])
            torch.testing.assert_close(mlm[real], e["mlm"][real], atol=1e-5, rtol=0)
            torch.testing.assert_close(nsp, e["nsp"], atol=1e-5, rtol=0)


def test_published_weights_give_the_published_outputs():
    """tests/fixtures/bert: random weights of ours, outputs of Hugging Face's BertForPreTraining 5.23."""
    model, tokenizer = load_run(FIXTURE)
    assert_published(model, expected())
    assert not model.training and tokenizer.kind == "wordpiece" and tokenizer.lowercase


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_global=25, window=4), "--n_global 25: more than --max_len 24"),
        (dict(n_global=1), "without --window every token sees all"),
        (dict(embed_norm=True), "--embed_norm: with --norm_place post"),
    ],
)
def test_settings_that_say_nothing(settings, message):
    with pytest.raises(UserError, match=message):
        make(**SMALL | settings)


def test_modernbert_gives_its_published_outputs():
    """tests/fixtures/modernbert: random weights and outputs of Hugging Face's ModernBertForMaskedLM 5.23."""
    folder = FIXTURE.with_name("modernbert")
    model, expected = Bert.from_published(folder), json.loads((folder / "expected.json").read_text())
    assert model.config.window == [0, 4, 4, 0] and model.config.rope_base == [50000, 10000, 10000, 50000]
    tokens, lengths = torch.tensor(expected["tokens"]), torch.tensor(expected["lengths"])
    hidden = model.encode(tokens, lengths)
    logits, _ = model.predict(tokens, lengths, torch.tensor(expected["positions"]).expand(2, -1))
    for row, n in enumerate(expected["lengths"]):
        torch.testing.assert_close(hidden[row, :n], torch.tensor(expected["hidden"][row]), atol=2e-5, rtol=0)
        torch.testing.assert_close(logits[row], torch.tensor(expected["logits"][row]), atol=2e-5, rtol=0)


def rewrite(folder: Path, change, config: dict | None = None) -> Path:
    shutil.copytree(FIXTURE, folder)
    save_tensors(
        folder / "model.safetensors",
        change({n: t.clone() for n, t in load_tensors(FIXTURE / "model.safetensors").items()}),
    )
    if config:
        old = json.loads((FIXTURE / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
    return folder


def test_old_names(tmp_path):
    """gamma and beta, stored positions, the decoder stored a second time."""

    def old(tensors):
        names = {
            n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for n in tensors
        }
        tensors = {names[n]: t for n, t in tensors.items()}
        tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        return tensors

    folder = rewrite(tmp_path / "old", old)
    torch.save(
        {n: t.clone() for n, t in load_tensors(folder / "model.safetensors").items()}, folder / "pytorch_model.bin"
    )
    assert_published(Bert.from_published(folder), expected())
    (folder / "model.safetensors").unlink()
    assert_published(Bert.from_published(folder), expected())


def test_without_prefix_and_heads(tmp_path):
    def bare(tensors):
        return {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}

    model = Bert.from_published(rewrite(tmp_path / "bare", bare))
    assert model.mlm is None and model.nsp is None
    assert_published(model, expected(), pretraining=False)


def test_without_pooler(tmp_path):
    def masked_only(tensors):
        return {n: t for n, t in tensors.items() if "pooler" not in n and "seq_relationship" not in n}

    model = Bert.from_published(rewrite(tmp_path / "mlm", masked_only))
    assert model.mlm is not None and model.nsp is None
    with pytest.raises(ValueError, match="no pooler"):
        model.pool(torch.zeros(1, 2, 32))


def test_published_heads_for_classes_and_spans(tmp_path):
    torch.manual_seed(0)
    heads = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    heads |= {"qa_outputs.weight": torch.randn(2, 32), "qa_outputs.bias": torch.randn(2)}
    names = {"id2label": {"10": "c", "2": "b", "0": "a"}}
    folder = rewrite(tmp_path / "x", lambda tensors: tensors | heads, names)
    model, e = Bert.from_published(folder), expected()
    hidden = model.encode(e["tokens"], e["lengths"], e["segments"])
    logits = model.pool(hidden) @ heads["classifier.weight"].T + heads["classifier.bias"]
    torch.testing.assert_close(model.classify(e["tokens"], e["lengths"], e["segments"]), logits)
    first, last = model.find_spans(e["tokens"], e["lengths"], e["segments"]).unbind(1)
    torch.testing.assert_close(
        torch.stack([first, last], -1), hidden @ heads["qa_outputs.weight"].T + heads["qa_outputs.bias"]
    )
    assert read_labels(folder) == ["a", "b", "c"]  # in the order of their numbers
    assert read_labels(rewrite(tmp_path / "y", lambda tensors: tensors, {"id2label": None})) == []
    no_pooler = {"classifier.weight": torch.randn(3, 32)}
    token_classifier = rewrite(tmp_path / "z", lambda t: {n: x for n, x in t.items() if "pooler" not in n} | no_pooler)
    with pytest.raises(UserError, match="a classifier of tokens"):
        Bert.from_published(token_classifier)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "roberta"}, "describes a 'roberta'"),
        ({"hidden_act": "relu"}, "the activation 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"num_hidden_layers": 3}, "missing stack.blocks.2"),
        ({"hidden_size": 40}, "stack.tokens.weight is [68, 32], not [68, 40]"),
        ({"num_attention_heads": None}, "gives no num_attention_heads"),
    ],
)
def test_other_architectures_are_refused(tmp_path, config, message):
    folder = rewrite(tmp_path / "x", lambda tensors: tensors, config)
    with pytest.raises(UserError) as error:
        load_run(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("part", ["query", "key"])
def test_missing_tensors_are_named(tmp_path, part):
    def broken(tensors):
        return {n: t for n, t in tensors.items() if f"layer.1.attention.self.{part}.weight" not in n}

    with pytest.raises(UserError, match=r"layer.1|blocks.1"):
        Bert.from_published(rewrite(tmp_path / "x", broken))


@pytest.mark.parametrize(
    "preset, parameters",  # of encoder and pooler, as published (Devlin et al. 2019; Turc et al. 2019)
    [
        ("bert-tiny", 4_385_920),
        ("bert-mini", 11_170_560),
        ("bert-small", 28_763_648),
        ("bert-medium", 41_373_184),
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters):
    config = model_preset(preset)
    config.pooler = True
    with torch.device("meta"):
        assert Bert(config).num_params() == parameters
    if preset == "bert-base":
        config.mlm = config.nsp = True
        with torch.device("meta"):
            assert Bert(config).num_params() == 110_106_428
            config.vocab_multiple = 64
            assert Bert(config).num_params() == 110_106_428
    assert set(BERT_PRESETS) == {
        "bert-laptop",
        *(f"bert-{s}" for s in ["tiny", "mini", "small", "medium", "base", "large"]),
        "modernbert-laptop",
        "modernbert-base",
    }
    modern = model_preset("modernbert-base")
    modern.mlm = True
    with torch.device("meta"):  # as many as Hugging Face's ModernBertForMaskedLM has with its default config
        assert Bert(modern).num_params() == 149_655_232


# ---------------------------------------------------------------- what it computes
@pytest.mark.parametrize("settings", [{}, dict(MODERN, norm_place="pre"), dict(norm_place="pre", activation="swiglu")])
def test_padding_changes_nothing(settings):
    model = make(**(PRETRAINING | settings))
    batch = inputs()
    longer = dict(
        batch, tokens=F.pad(batch["tokens"], (0, 5), value=7), segments=F.pad(batch["segments"], (0, 5), value=1)
    )
    for name, value in losses(model, batch).items():
        torch.testing.assert_close(value, losses(model, longer)[name], atol=1e-4, rtol=1e-5)
    alone = {k: v[2:, :5] if k in ("tokens", "segments") else v[2:] for k, v in batch.items()}
    mlm, nsp = model.predict(**{k: v for k, v in batch.items() if k not in ("targets", "unrelated")})
    mlm1, nsp1 = model.predict(**{k: v for k, v in alone.items() if k not in ("targets", "unrelated")})
    torch.testing.assert_close(mlm[2, :1], mlm1[0, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(nsp[2:], nsp1, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_all_logits_at_the_masked_places():
    model, batch = make(**PRETRAINING), inputs()
    everywhere = torch.arange(12).expand(3, 12)
    mlm, nsp = model.predict(batch["tokens"], batch["lengths"], everywhere, batch["segments"])
    labels = torch.full((3, 12), IGNORE)
    for row, place, target in (
        (b, int(batch["positions"][b, m]), int(batch["targets"][b, m])) for b in range(3) for m in range(3)
    ):
        if target != IGNORE:
            labels[row, place] = target
    found = losses(model, batch)
    expected = F.cross_entropy(mlm.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found["mlm"], expected)
    torch.testing.assert_close(found["nsp"], F.cross_entropy(nsp, batch["unrelated"], reduction="sum"))


def test_a_token_looks_both_ways_and_segments_matter():
    model, batch = make(**PRETRAINING), inputs()
    tokens = batch["tokens"]
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 60
    with torch.no_grad():
        assert (model(tokens)[:, 0] != model(changed)[:, 0]).any()
        assert (model(tokens, batch["segments"]) != model(tokens)).any()
        assert torch.equal(model(tokens), model(tokens, torch.zeros_like(tokens)))


def test_fresh_losses_are_those_of_knowing_nothing():
    torch.manual_seed(0)
    model = Bert(ModelConfig(**PRETRAINING)).eval()
    batch = inputs()
    found = {name: loss.detach() for name, loss in losses(model, batch).items()}
    assert float(found["mlm"]) / 7 == pytest.approx(4.094, abs=0.2)  # ln 60
    assert float(found["nsp"]) / 3 == pytest.approx(0.693, abs=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder(tied):
    model = make(**(PRETRAINING | dict(tied=tied, vocab_multiple=64)))
    assert (model.mlm.decoder.weight is model.stack.tokens.weight) == tied
    assert model.predict(**{k: v for k, v in inputs().items() if k not in ("targets", "unrelated")})[0].shape == (
        3,
        3,
        60,
    )
    same = make(**(PRETRAINING | dict(tied=tied)))
    assert model.num_params() == same.num_params() == sum(p.numel() for p in same.parameters())


def test_embeddings_are_means_over_real_tokens():
    model, batch = make(**SMALL), inputs()
    batch = {k: batch[k] for k in ("tokens", "segments", "lengths")}
    vectors = model.embed(**batch)
    for row, n in enumerate(batch["lengths"].tolist()):
        alone = model(batch["tokens"][row : row + 1, :n], batch["segments"][row : row + 1, :n])
        torch.testing.assert_close(vectors[row], alone[0].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.embed(**batch, pooling="cls"), model.encode(**batch)[:, 0])


# ---------------------------------------------------------------- from one run to the next
def test_heads_that_both_have_are_kept_and_others_fresh():
    start = make(1, **PRETRAINING)
    model = make(2, **(SMALL | dict(n_classes=3)))
    fresh = weights(model)["classifier.weight"].clone()
    copy_weights(model, start, "there", keep_classes=False)
    assert torch.equal(model.pooler.weight, start.pooler.weight)
    assert torch.equal(model.stack.blocks[1].mlp.up.weight, start.stack.blocks[1].mlp.up.weight)
    assert torch.equal(model.classifier.weight, fresh)
    third = make(3, **(SMALL | dict(n_classes=3)))
    copy_weights(third, model, "there", keep_classes=True)
    assert torch.equal(third.classifier.weight, fresh)


def test_shorter_texts_take_the_first_positions():
    start, model = make(1, **PRETRAINING), make(2, **(PRETRAINING | dict(max_len=16)))
    copy_weights(model, start, "there", keep_classes=False)
    assert torch.equal(model.stack.positions.weight, start.stack.positions.weight[:16])
    with pytest.raises(UserError, match=r"positions.weight is"):
        copy_weights(make(2, **(PRETRAINING | dict(max_len=32))), start, "there", keep_classes=False)


def test_a_bert_looks_both_ways_whatever_the_config_says():
    model = make(**{**SMALL, "causal": True})
    tokens = inputs()["tokens"]
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 60
    assert not model.config.causal and not torch.allclose(model(tokens)[:, 0], model(changed)[:, 0])
