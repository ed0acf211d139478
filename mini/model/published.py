"""The names and settings under which GPT-2, BERT and ModernBERT are published, and ours."""

import dataclasses
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mini.flags import Checked, UserError, field_names, from_dict, of_type, option
from mini.model.config import ModelConfig
from mini.storage import read_json
from mini.tensors import DTYPE_NAMES, load_tensors

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


# Our fields and theirs, with the values of those that a config.json may leave out; others change nothing.
GPT2_SETTINGS = {
    "n_layers": "n_layer", "n_heads": "n_head", "d_model": "n_embd", "d_ff": ("n_inner", 0), "max_len": "n_positions",
    "vocab_size": "vocab_size", "norm_eps": ("layer_norm_epsilon", 1e-5), "dropout": ("resid_pdrop", 0.1),
    "activation": ("activation_function", "gelu_new"), "tied": ("tie_word_embeddings", True),
}  # fmt: skip
BERT_SETTINGS = {
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_model": "hidden_size",
    "d_ff": "intermediate_size", "max_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_segments": ("type_vocab_size", 2), "norm_eps": ("layer_norm_eps", 1e-12), "activation": ("hidden_act", "gelu"),
    "dropout": ("hidden_dropout_prob", 0.1), "tied": ("tie_word_embeddings", True),
}  # fmt: skip
MODERNBERT_SETTINGS = {
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "d_model": "hidden_size",
    "d_ff": "intermediate_size", "max_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "norm_eps": ("norm_eps", 1e-5), "activation": ("hidden_activation", "gelu"), "dropout": ("embedding_dropout", 0.0),
    "tied": ("tie_word_embeddings", True),
}  # fmt: skip
UNSUPPORTED = {
    "attention_bias": (False, None), "mlp_bias": (False, None), "norm_bias": (False, None),
    "decoder_bias": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None), "is_decoder": (False, None),
    "position_embedding_type": ("absolute", None),
}  # fmt: skip


def read_settings(folder: str | Path, kind: str, mark: str, names: dict, **ours) -> ModelConfig:
    """A published config.json as a ModelConfig, without heads. Raises UserError for settings that mini does not have.

    kind: their name for the model; mark: a key that tells it.
    """
    path = Path(folder) / "config.json"
    found = read_json(path)
    if found.get("model_type", kind) != kind or mark not in found:
        raise UserError(f"{path} describes a {found.get('model_type', 'model')!r}, not a {kind}")
    for name, supported in UNSUPPORTED.items():
        if found.get(name) not in supported:
            raise UserError(f"{path}: {name} {found[name]!r} is not supported")
    found.setdefault("n_positions", found.get("n_ctx"))
    for mine, theirs in names.items():
        name, default = (theirs, None) if isinstance(theirs, str) else theirs
        ours[mine] = default if found.get(name) is None else found[name]
        if ours[mine] is None:
            raise UserError(f"{path}: it gives no {name}")
    known = {"gelu": "geglu"} if kind == "modernbert" else ACTIVATIONS
    if not isinstance(ours["activation"], str) or ours["activation"] not in known:
        raise UserError(f"{path}: the activation {ours['activation']!r} is not one that mini has ({', '.join(known)})")
    return from_dict(ModelConfig, ours | {"activation": known[ours["activation"]]}, path)


@dataclasses.dataclass
class NearBy(Checked):
    """How ModernBERT's layers look near by, as its files give it."""

    global_attn_every_n_layers: int = option(3, "the others look near by", low=1, high=1000)
    local_attention: int = option(128, "tokens to both sides together", low=4)
    global_rope_theta: float = option(160000.0, "base of RoPE in layers that see all", low=1)
    local_rope_theta: float = option(10000.0, "and in the others", low=1)


def gpt2_config(folder: str | Path) -> ModelConfig:
    return read_settings(folder, "gpt2", "n_embd", GPT2_SETTINGS)


def bert_config(folder: str | Path) -> ModelConfig:
    """Of a BERT, or of a ModernBERT (Warner et al. 2024), most of whose layers look near by."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    if found.get("model_type") == "modernbert":
        ours = from_dict(NearBy, {f: found[f] for f in field_names(NearBy) if f in found}, path)
        newer = of_type(found.get("rope_parameters", {}), dict[str, dict], f"{path}: rope_parameters")
        older = {"full_attention": ours.global_rope_theta, "sliding_attention": ours.local_rope_theta}
        bases = [newer.get(name, {}).get("rope_theta", base) for name, base in older.items()]
        near = ours.global_attn_every_n_layers - 1  # layers of so many
        return read_settings(
            folder, "modernbert", "intermediate_size", MODERNBERT_SETTINGS, causal=False, positions="rope", bias=False,
            embed_norm=True, window=[0, *near * [ours.local_attention // 2]], rope_base=[bases[0], *near * [bases[1]]],
        )  # fmt: skip
    return read_settings(folder, "bert", "intermediate_size", BERT_SETTINGS, norm_place="post", causal=False)


def published_kind(folder: str | Path) -> str:
    """ "gpt" or "bert"."""
    config = read_json(Path(folder) / "config.json")
    kind = config.get("model_type", "gpt2" if "n_embd" in config else "bert")
    kinds = {"gpt2": "gpt", "bert": "bert", "modernbert": "bert"}
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


MODERNBERT_NAMES = {
    r"embeddings\.tok_embeddings\.": "stack.tokens.",
    r"embeddings\.norm\.": "stack.embed_norm.",
    r"final_norm\.": "stack.norm.",
    r"layers\.(\d+)\.attn_norm\.": r"stack.blocks.\1.norm1.",
    r"layers\.(\d+)\.attn\.Wqkv\.": r"stack.blocks.\1.attention.qkv.",
    r"layers\.(\d+)\.attn\.Wo\.": r"stack.blocks.\1.attention.out.",
    r"layers\.(\d+)\.mlp_norm\.": r"stack.blocks.\1.norm2.",
    r"layers\.(\d+)\.mlp\.Wi\.": r"stack.blocks.\1.mlp.gate_and_up.",
    r"layers\.(\d+)\.mlp\.Wo\.": r"stack.blocks.\1.mlp.down.",
    r"head\.dense\.": "mlm.dense.",
    r"head\.norm\.": "mlm.norm.",
    r"decoder\.": "mlm.decoder.",
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
    """The tensors of a published BERT or ModernBERT under our names, queries, keys and values joined."""
    renamed = {}
    if read_json(Path(folder) / "config.json").get("model_type") == "modernbert":
        for name, tensor in load_published(folder).items():
            name = our_name(name.removeprefix("model."), MODERNBERT_NAMES)
            if name.endswith(".gate_and_up.weight"):  # two matrices in one
                for part, rows in zip(("gate", "up"), tensor.tensor_split(2), strict=True):
                    renamed[name.replace("gate_and_up", part)] = rows
            else:
                renamed[name] = tensor
        return renamed
    for name, tensor in load_published(folder).items():
        name = name.removeprefix("bert.")
        if name == "embeddings.position_ids":  # 0, 1, 2, ..: stored by old versions
            continue
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # as TensorFlow called them
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        renamed[our_name(name, BERT_NAMES)] = tensor
    for name in [name for name in renamed if ".attention.query." in name]:
        three = [renamed.pop(name.replace(".query.", f".{which}."), None) for which in ("query", "key", "value")]
        if any(tensor is None or tensor.shape[1:] != three[0].shape[1:] or not tensor.ndim for tensor in three):
            raise UserError(f"{folder}: {name} has no key or no value of its shape beside it")
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(three)  # (3C, C) or (3C,)
    return renamed


def with_heads(config: ModelConfig, tensors: dict[str, Tensor], folder: str | Path) -> ModelConfig:
    """The config of a BERT with the heads that its tensors are of."""
    heads = {head: f"{name}.weight" in tensors for head, name in
             dict(mlm="mlm.dense", nsp="nsp", pooler="pooler", spans="spans").items()}  # fmt: skip
    n_classes = tensors["classifier.weight"].shape[:1].numel() if "classifier.weight" in tensors else 0
    config = dataclasses.replace(config, **heads, n_classes=n_classes)
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
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{pickled}: not a file of tensors ({type(error).__name__}): download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and is_plain(t) for n, t in tensors.items()):
        raise UserError(f"{pickled}: should hold {{name: tensor}} and nothing else, each tensor with values of its own")
    return tensors


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor of real numbers, all in memory: not sparse, quantized, nested, or one value repeated."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    if tensor.dtype not in DTYPE_NAMES:
        return False
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
