import dataclasses
from dataclasses import dataclass, field

import pytest

from mini.flags import UserError, field_names, from_dict, parse_flags
from mini.model.config import ModelConfig
from mini.presets import BERT_PRESETS, GPT_PRESETS
from mini.tasks.masked import MLMConfig
from mini.text.corpus import DataConfig
from mini.training.loop import TrainConfig
from mini.training.optim import OptimConfig
from mini.training.start import Job

CLASSES = [Job, ModelConfig, DataConfig, OptimConfig, TrainConfig]


def parse(*argv: str, presets=GPT_PRESETS, **defaults):
    return parse_flags(list(argv), CLASSES, "test", presets, **defaults)


def test_flags_beat_defaults_beat_the_preset_beat_the_fields():
    (_, model, _, optim, train), given = parse("--preset", "char", "--lr=3e-4", "--steps", "1e3", seed=9)
    assert (model.d_model, train.batch_size) == (128, 12)  # preset
    assert train.seed == 9  # default of the command
    assert (optim.lr, train.steps) == (3e-4, 1000)  # flags
    assert optim.momentum == OptimConfig().momentum  # field
    assert given == {"lr", "steps"}


def test_kinds_of_values():
    (_, model, data, _, train), _ = parse("--n_heads", "4,2,2", "--n_layers", "3", "--d_head", "8", "--tied", "False")
    assert model.n_heads == [4, 2, 2] and model.layers("n_heads") == [4, 2, 2] and model.tied is False
    assert data.train is None and train.checkpoint_activations is False


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer", "3"], "unknown flag --n_layer (did you mean --n_layers?)"),
        (["--d_modle=3"], "unknown flag --d_modle (did you mean --d_model?)"),
        (["--preset", "gpt2-midium"], "unknown preset gpt2-midium (did you mean gpt2-medium?)"),
        (["--norm", "batchnorm"], "--norm batchnorm: choose one of layernorm, rmsnorm"),
        (["--epochs", "inf"], "--epochs inf"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--n_layers", "2.5"], "--n_layers 2.5: expected a whole number"),
        (["--tied", "maybe"], "--tied maybe: expected true or false"),
        (["--d_model", "30", "--n_heads", "4"], "--d_model 30 is not divisible by --n_heads 4"),
        (["--n_heads", "4,4"], "--n_heads lists 2 values for 4 layers"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--valid_fraction", "1"], "--valid_fraction 1.0"),
        (["--lr"], "--lr: expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (["--window", "1"], "--window 1: the next token alone is no context"),
        (["--window", "-3"], "--window -3: must be at least 0"),
        (["--window", "64,64,64,64,0"], "--window lists 5 values for 4 layers"),
        (["--n_global", "1", "--window", "8"], "--n_global is for BERTs"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for cls in CLASSES:
        for f in dataclasses.fields(cls):
            assert (f"--{f.name} " in text) == f.metadata.get("flag", True), f.name
    assert "width of the residual stream (C) [192]" in text  # the preset's, not the field's


@pytest.mark.parametrize("presets", [GPT_PRESETS, BERT_PRESETS])
def test_presets_set_fields_that_exist(presets):
    for name, preset in presets.items():
        unknown = set(preset) - set().union(*map(field_names, (*CLASSES, MLMConfig)))
        assert not unknown, name
        (_, model, *_), _ = parse("--preset", name, presets=presets)
        assert model.causal == (presets is GPT_PRESETS)


# ---------------------------------------------------------------- typed JSON
@dataclass
class Inner:
    n: int


@dataclass
class Outer:
    inner: Inner
    rate: float = 0.5
    sizes: int | list[int] = 3
    name: str | None = None
    table: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values, message",
    [
        ([], r"a.json: should be an object {...}, not \[\]"),
        ({}, "a.json: no 'inner'"),
        ({"inner": {"n": 1}, "rat": 1}, "a.json: unknown rat"),
        ({"inner": {"n": 1.0}}, "a.json: inner: n should be a whole number, not 1.0"),
        ({"inner": {"n": True}}, "inner: n should be a whole number, not True"),
        ({"inner": {"n": 1}, "rate": "1"}, "rate should be a number, not '1'"),
        ({"inner": {"n": 1}, "sizes": [1, "2"]}, r"sizes\[1\] should be a whole number"),
        ({"inner": {"n": 1}, "sizes": "3"}, "sizes should be a whole number or a list"),
        ({"inner": {"n": 1}, "name": 3}, "name should be a text or null"),
        ({"inner": {"n": 1}, "table": {"a": None}}, "table.a should be a whole number"),
        ({"inner": None}, "inner should be an object, not None"),
    ],
)
def test_json_of_a_wrong_type_is_refused_by_its_place(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values, "a.json")


def test_json_of_the_right_type_is_taken():
    found = from_dict(Outer, {"inner": {"n": 1}, "rate": 1, "sizes": [1, 2], "table": {"a": 1}}, "a.json")
    assert found == Outer(Inner(1), 1, [1, 2], None, {"a": 1})
    with pytest.raises(UserError, match=r"x: --mask_rate 2"):
        from_dict(MLMConfig, {"mask_rate": 2}, "x")
