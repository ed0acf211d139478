"""BERT: the stack as an encoder, and heads for masked tokens, the next sentence, classes and spans."""

import dataclasses
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.config import ModelConfig, UserError
from mini.storage import load_published, load_weights, read_json, settings_of
from mini.transformer import (
    ACTIVATIONS,
    Dropout,
    Linear,
    Transformer,
    init_weights,
    make_norm,
    vocabulary_logits,
)


class Bert(nn.Module):
    """Bidirectional encoder (Devlin et al. 2019); the config says which of the heads it has.

    Pretraining needs mlm and, with pairs, nsp; fine-tuning n_classes or spans. nsp and classes look at the pooled
    first token.
    """

    kind = "bert"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config = dataclasses.replace(config, causal=False)
        C = config.d_model
        self.stack = Transformer(config)
        pooled = config.pooler or config.nsp or config.n_classes
        self.pooler = nn.Linear(C, C) if pooled else None
        self.mlm = MLMHead(config, self.stack.tokens) if config.mlm else None
        self.nsp = nn.Linear(C, 2) if config.nsp else None
        self.classifier = nn.Linear(C, config.n_classes) if config.n_classes else None
        self.spans = nn.Linear(C, 2) if config.spans else None
        self.dropout = Dropout(config.dropout)
        for head in filter(None, (self.pooler, self.nsp, self.classifier, self.spans)):
            init_weights(head)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> hidden states (B, T, C).

        segments (B, T): 0 for the first text, 1 for the second; padding (B, T): True where a token is real.
        """
        return self.stack(tokens, padding=padding, segments=segments)

    def encode(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Tensor:
        """The same for rows that are padded at the right to lengths (B,)."""
        return self(tokens, segments, real_tokens(tokens, lengths))

    def pool(self, hidden: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, C): tanh(W h + b), h the state of the first token, [CLS], or the mean of all real ones."""
        if self.pooler is None:
            raise ValueError("this BERT has no pooler: it was trained without the next sentence and without classes")
        return torch.tanh(self.pooler(average(hidden, padding) if self.config.pooling == "mean" else hidden[:, 0]))

    def embed(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None, pooling: str = "mean") -> Tensor:
        """A vector for each row, (B, C): the mean of its real tokens' hidden states, or the first one's ("cls")."""
        hidden = self.encode(tokens, lengths, segments)  # (B, T, C)
        return hidden[:, 0] if pooling == "cls" else average(hidden, real_tokens(tokens, lengths))

    # ------------------------------------------------------------ pretraining
    def predict(self, tokens: Tensor, lengths: Tensor, places: Tensor, segments: Tensor | None = None):
        """Logits (B, M, V) of the tokens at places (B, M), and of the next sentence (B, 2): follows, is random.

        Only the M masked places meet the vocabulary: at 15 % of the tokens, an all but free head.
        """
        hidden = self.encode(tokens, lengths, segments)  # (B, T, C)
        masked = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.size(-1)))  # (B, M, C)
        pooled = self.pool(hidden, real_tokens(tokens, lengths)) if self.nsp is not None else None
        return self.mlm(masked), self.nsp(pooled) if self.nsp is not None else None

    def loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        places: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        unrelated: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Summed cross-entropies in nats: of the masked tokens, and of the next sentence.

        targets (B, M), -100 where a row has fewer masked tokens; unrelated (B,), 1 where the second segment is random.
        """
        mlm, nsp = self.predict(tokens, lengths, places, segments)
        losses = {"mlm": F.cross_entropy(mlm.float().flatten(0, 1), targets.flatten(), reduction="sum")}
        if nsp is not None:
            losses["nsp"] = F.cross_entropy(nsp.float(), unrelated, reduction="sum")
        return losses

    # ------------------------------------------------------------ fine-tuning
    def classify(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) padded at the right to lengths (B,) -> class logits (B, n_classes)."""
        pooled = self.pool(self.encode(tokens, lengths, segments), real_tokens(tokens, lengths))
        return self.classifier(self.dropout(pooled))

    def find_spans(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T) of an answer's first token, and of its last."""
        first, last = self.spans(self.encode(tokens, lengths, segments)).unbind(-1)
        return first, last

    # ------------------------------------------------------------ size
    def num_params(self) -> int:
        """Parameters, without those that vocab_multiple adds."""
        extra = self.stack.tokens.num_embeddings - self.config.vocab_size
        per_row = self.config.d_model
        if self.mlm is not None:  # a bias, and an untied decoder
            per_row += 1 + (0 if self.config.tied else self.config.d_model)
        return sum(p.numel() for p in self.parameters()) - extra * per_row

    # ------------------------------------------------------------ published weights
    @classmethod
    def from_published(cls, folder: str | Path) -> "Bert":
        """A BERT, in eval mode, from a folder with config.json and its weights, with the heads that are there.

        The weights: model.safetensors or pytorch_model.bin, with or without the "bert." prefix.
        Raises UserError naming missing, extra and misshapen tensors, and settings that this BERT does not have.
        """
        tensors = published_tensors(folder)
        config = published_config(read_json(Path(folder) / "config.json"), folder)
        config.mlm, config.nsp = "mlm.dense.weight" in tensors, "nsp.weight" in tensors
        config.pooler, config.spans = "pooler.weight" in tensors, "spans.weight" in tensors
        config.n_classes = len(tensors.get("classifier.weight", ()))
        if config.n_classes and not config.pooler:
            raise UserError(f"{folder}: a classifier of tokens, not of texts, which mini does not have")
        if config.tied:  # some files hold the shared matrix twice
            tensors.pop("mlm.decoder.weight", None)
        model = cls(config)
        load_weights(model, tensors, folder)
        return model.eval()


def real_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B, T): True up to a row's length, False in the padding behind it."""
    return torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None]


def average(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, C): the mean over the tokens for which padding (B, T) is True, or over all."""
    if padding is None:
        return hidden.mean(dim=1)
    return (hidden * padding[:, :, None]).sum(dim=1) / padding.sum(dim=1, keepdim=True)


class MLMHead(nn.Module):
    """dense, activation, norm, then a score for each token: the embedding matrix again, with a bias of its own."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding):
        super().__init__()
        self.config = config
        self.dense = Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS.get(config.activation, F.silu)
        self.norm = make_norm(config)
        self.decoder = Linear(config.d_model, tokens.num_embeddings)
        self.apply(init_weights)
        if config.tied:
            self.decoder.weight = tokens.weight
        elif config.zero_init:  # every token equally likely at first: the loss starts at ln V
            nn.init.zeros_(self.decoder.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        hidden = self.activation(self.dense(hidden)).to(self.norm.weight.dtype)  # where autocast has made it bfloat16
        return vocabulary_logits(self.decoder(self.norm(hidden)), self.config)


# ---------------------------------------------------------------- BERT's published names and settings
PUBLISHED_NAMES = {
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
PUBLISHED_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def published_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of published weights under our names, queries, keys and values joined."""
    renamed = {}
    for name, tensor in load_published(folder).items():
        name = name.removeprefix("bert.")
        if name == "embeddings.position_ids":  # 0, 1, 2, ..: stored by old versions
            continue
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # as TensorFlow called them
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        for theirs, ours in PUBLISHED_NAMES.items():
            name, found = re.subn(f"^{theirs}", ours, name)
            if found:
                break
        renamed[name] = tensor
    for name in [name for name in renamed if ".attention.query." in name]:
        parts = [renamed.pop(name.replace(".query.", f".{part}."), None) for part in ("query", "key", "value")]
        if any(part is None for part in parts):
            raise UserError(f"{folder}: {name} has no key or no value beside it")
        renamed[name.replace(".query.", ".qkv.")] = torch.cat(parts)  # (3C, C) or (3C,)
    return renamed


def published_config(published: dict, folder: str | Path) -> ModelConfig:
    """BERT's config.json as a ModelConfig, without heads."""
    if published.get("model_type", "bert") != "bert" or "intermediate_size" not in published:
        raise UserError(f"{folder}/config.json describes a {published.get('model_type', 'model')!r}, not a BERT")
    activation = published.get("hidden_act", "gelu")
    if activation not in PUBLISHED_ACTIVATIONS:
        raise UserError(f"{folder}/config.json: hidden_act {activation!r} is not one that Bert has")
    if published.get("position_embedding_type", "absolute") != "absolute" or published.get("is_decoder"):
        raise UserError(f"{folder}/config.json: relative positions and decoders are not supported")
    with settings_of("BERT", f"{folder}/config.json"):
        return ModelConfig(
            n_layers=published["num_hidden_layers"],
            n_heads=published["num_attention_heads"],
            d_model=published["hidden_size"],
            d_ff=published["intermediate_size"],
            max_len=published["max_position_embeddings"],
            vocab_size=published["vocab_size"],
            n_segments=published.get("type_vocab_size", 2),
            norm_place="post",
            norm_eps=published.get("layer_norm_eps", 1e-12),
            activation=PUBLISHED_ACTIVATIONS[activation],
            dropout=published.get("hidden_dropout_prob", 0.1),
            tied=published.get("tie_word_embeddings", True),
            causal=False,
        )
