"""The names and settings under which GPT-2 and BERT are published, and ours."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mini.errors import UserError
from mini.flags import from_dict
from mini.model.config import ModelConfig
from mini.storage import load_tensors, read_json

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass
class PublishedGPT2:
    """What a GPT-2's config.json says; other keys do not change what it computes."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    model_type: str = "gpt2"
    n_inner: int | None = None
    n_positions: int | None = None
    n_ctx: int | None = None
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    tie_word_embeddings: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False


@dataclass
class PublishedBert:
    """What a BERT's config.json says."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    vocab_size: int
    model_type: str = "bert"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    tie_word_embeddings: bool = True
    position_embedding_type: str = "absolute"
    is_decoder: bool = False


def gpt2_config(folder: str | Path) -> ModelConfig:
    """GPT-2's config.json as a ModelConfig. Raises UserError for settings that GPT does not have."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("model_type", "gpt2") != "gpt2" or "n_embd" not in values:
        raise UserError(f"{path} describes a {values.get('model_type', 'model')!r}, not a GPT-2")
    p = from_dict(PublishedGPT2, values, path, ignore_unknown=True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(p, name):
            raise UserError(f"{path}: {name} is not supported")
    max_len = p.n_positions or p.n_ctx
    if not max_len:
        raise UserError(f"{path}: no 'n_positions'")
    config = dict(
        n_layers=p.n_layer, n_heads=p.n_head, d_model=p.n_embd, d_ff=p.n_inner or 0, max_len=max_len,
        vocab_size=p.vocab_size, norm_eps=p.layer_norm_epsilon, activation=activation(p.activation_function, path),
        dropout=p.resid_pdrop, tied=p.tie_word_embeddings,
    )  # fmt: skip
    return from_dict(ModelConfig, config, path)


def bert_config(folder: str | Path) -> ModelConfig:
    """BERT's config.json as a ModelConfig, without heads. Raises UserError for settings that Bert does not have."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("model_type", "bert") != "bert" or "intermediate_size" not in values:
        raise UserError(f"{path} describes a {values.get('model_type', 'model')!r}, not a BERT")
    p = from_dict(PublishedBert, values, path, ignore_unknown=True)
    if p.position_embedding_type != "absolute" or p.is_decoder:
        raise UserError(f"{path}: relative positions and decoders are not supported")
    config = dict(
        n_layers=p.num_hidden_layers, n_heads=p.num_attention_heads, d_model=p.hidden_size, d_ff=p.intermediate_size,
        max_len=p.max_position_embeddings, vocab_size=p.vocab_size, n_segments=p.type_vocab_size, norm_place="post",
        norm_eps=p.layer_norm_eps, activation=activation(p.hidden_act, path), dropout=p.hidden_dropout_prob,
        tied=p.tie_word_embeddings, causal=False,
    )  # fmt: skip
    return from_dict(ModelConfig, config, path)


def activation(name: str, path: Path) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"{path}: the activation {name!r} is not one that mini has ({', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def published_kind(folder: str | Path) -> str:
    """ "gpt" or "bert"."""
    config = read_json(Path(folder) / "config.json")
    kind = config.get("model_type", "gpt2" if "n_embd" in config else "bert")
    kinds = {"gpt2": "gpt", "bert": "bert"}
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{folder}/config.json describes a {kind!r}; mini opens {' and '.join(kinds)}")
    return kinds[kind]


# ---------------------------------------------------------------- tensors
GPT2_NAMES = {
    r"wte\.": "stack.tokens.",
    r"wpe\.": "stack.positions.",
    r"ln_f\.": "stack.norm.",
    r"lm_head\.": "head.",
    r"h\.(\d+)\.attn\.c_attn\.": r"stack.blocks.\1.attention.qkv.",
    r"h\.(\d+)\.attn\.c_proj\.": r"stack.blocks.\1.attention.out.",
    r"h\.(\d+)\.mlp\.c_fc\.": r"stack.blocks.\1.mlp.up.",
    r"h\.(\d+)\.mlp\.c_proj\.": r"stack.blocks.\1.mlp.down.",
    r"h\.(\d+)\.ln_1\.": r"stack.blocks.\1.norm1.",
    r"h\.(\d+)\.ln_2\.": r"stack.blocks.\1.norm2.",
}
BERT_NAMES = {
    r"embeddings\.word_embeddings\.": "stack.tokens.",
    r"embeddings\.position_embeddings\.": "stack.positions.",
    r"embeddings\.token_type_embeddings\.": "stack.segments.",
    r"embeddings\.LayerNorm\.": "stack.norm.",
    r"encoder\.layer\.(\d+)\.attention\.self\.": r"stack.blocks.\1.attention.",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"stack.blocks.\1.attention.out.",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.": r"stack.blocks.\1.norm1.",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.": r"stack.blocks.\1.mlp.up.",
    r"encoder\.layer\.(\d+)\.output\.dense\.": r"stack.blocks.\1.mlp.down.",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.": r"stack.blocks.\1.norm2.",
    r"pooler\.dense\.": "pooler.",
    r"cls\.predictions\.transform\.dense\.": "mlm.dense.",
    r"cls\.predictions\.transform\.LayerNorm\.": "mlm.norm.",
    r"cls\.predictions\.decoder\.": "mlm.decoder.",
    r"cls\.predictions\.bias$": "mlm.decoder.bias",  # newer files store it a second time, as the decoder's
    r"cls\.seq_relationship\.": "nsp.",
    r"qa_outputs\.": "spans.",
}


def our_name(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name, found = re.subn(f"^{theirs}", ours, name)
        if found:
            break
    return name


def gpt2_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a published GPT-2 under our names."""
    renamed = {}
    for name, tensor in load_published(folder).items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, stored by old versions
            continue
        in_block = name.startswith("h.") and tensor.ndim == 2
        renamed[our_name(name, GPT2_NAMES)] = tensor.t() if in_block else tensor  # published as (in, out), for x @ W
    return renamed


def bert_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a published BERT under our names, queries, keys and values joined."""
    renamed = {}
    for name, tensor in load_published(folder).items():
        name = name.removeprefix("bert.")
        if name == "embeddings.position_ids":  # 0, 1, 2, ..: stored by old versions
            continue
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # as TensorFlow called them
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        renamed[our_name(name, BERT_NAMES)] = tensor
    for name in [name for name in renamed if ".attention.query." in name]:
        three = [renamed.pop(name.replace(".query.", f".{which}."), None) for which in ("query", "key", "value")]
        if any(tensor is None for tensor in three):
            raise UserError(f"{folder}: {name} has no key or no value beside it")
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(three)  # (3C, C) or (3C,)
    return renamed


def with_heads(config: ModelConfig, tensors: dict[str, Tensor], folder: str | Path) -> ModelConfig:
    """The config of a BERT with the heads that its tensors are of."""
    heads = {head: f"{name}.weight" in tensors for head, name in
             dict(mlm="mlm.dense", nsp="nsp", pooler="pooler", spans="spans").items()}  # fmt: skip
    config = dataclasses.replace(config, **heads, n_classes=len(tensors.get("classifier.weight", ())))
    if config.n_classes and not config.pooler:
        raise UserError(f"{folder}: a classifier of tokens, not of texts, which mini does not have")
    return config


def load_published(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder with published weights: model.safetensors or pytorch_model.bin."""
    safetensors, pickled = Path(folder) / "model.safetensors", Path(folder) / "pytorch_model.bin"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    if safetensors.exists():
        return load_tensors(safetensors)
    if not pickled.exists():
        raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it")
    try:  # the one pickle that mini opens, and only its tensors
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{pickled}: not a file of tensors ({type(error).__name__}): download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{pickled}: should hold {{name: tensor}} and nothing else")
    return tensors
