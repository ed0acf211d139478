"""BERT: the stack as an encoder, and heads for masked tokens, the next sentence, classes and spans."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from mini.model.config import ModelConfig
from mini.model.layers import Linear, linear_flops, make_norm
from mini.model.published import bert_config, bert_tensors, with_heads
from mini.model.scores import Unscored
from mini.model.transformer import Model, at_positions, make_activation, real_tokens
from mini.tensors import loaded

NEVER = -1e9  # a score so low that its probability is zero, and still no infinity


class Bert(Model):
    """Bidirectional encoder (Devlin et al. 2019); the config says which of the heads it has.

    Pretraining needs mlm and, with pairs, nsp; fine-tuning n_classes or spans. nsp and classes see the pooled token.
    """

    kind = "bert"
    special_tokens = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, config: ModelConfig):
        super().__init__(dataclasses.replace(config, causal=False))
        C = config.d_model
        pooled = config.pooler or config.nsp or config.n_classes
        self.pooler = Linear(C, C) if pooled else None
        self.mlm = MLMHead(self.config, self.stack.tokens.weight) if config.mlm else None
        self.nsp = nn.Linear(C, 2) if config.nsp else None
        self.classifier = nn.Linear(C, config.n_classes) if config.n_classes else None
        self.spans = nn.Linear(C, 2) if config.spans else None
        self.initialise()

    def freeze_unused(self) -> None:
        if self.pooler is not None and self.classifier is None and self.nsp is None:
            self.pooler.requires_grad_(False)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> hidden states (B, T, C).

        segments (B, T): 0 for the first text, 1 for the second; real (B, T): True where a token is real.
        """
        return self.stack(tokens, real=real, segments=segments)

    def encode(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None,
               documents: Tensor | None = None) -> Tensor:  # fmt: skip
        """The same for rows that are padded at the right to lengths (B,); documents (B, T): see View."""
        return self.stack(tokens, real=real_tokens(tokens, lengths), segments=segments, documents=documents)

    def pool(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, C): tanh(W h + b), h the state of the first token, [CLS], or the mean of all real ones."""
        if self.pooler is None:
            raise ValueError("this BERT has no pooler: it was trained without the next sentence and without classes")
        return torch.tanh(self.pooler(average(hidden, real) if self.config.pooling == "mean" else hidden[:, 0]))

    def embed(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None, pooling: str = "mean") -> Tensor:
        """A vector for each row, (B, C): the mean of its real tokens' hidden states, or the first one's ("cls")."""
        hidden = self.encode(tokens, lengths, segments)  # (B, T, C)
        return hidden[:, 0] if pooling == "cls" else average(hidden, real_tokens(tokens, lengths))

    def answers(self, inputs: dict[str, Tensor], in_parts: bool = False) -> dict[str, Tensor | Unscored]:
        """The logits of classes, (B, n_classes); of an answer's first and last token, (B, 2, T), padding aside; of
        masked tokens, (B, M, V), and the next sentence, (B, 2); or without a head the hidden states, (B, T, C)."""
        tokens, lengths, segments = inputs["tokens"], inputs["lengths"], inputs.get("segments")
        if self.classifier is not None:
            return {"classify": self.classify(tokens, lengths, segments)}
        if self.spans is not None:
            logits = self.find_spans(tokens, lengths, segments).float()
            return {"qa": logits.masked_fill(~real_tokens(tokens, lengths)[:, None], NEVER)}
        if self.mlm is None:
            return {"hidden": self.encode(tokens, lengths, segments)}
        mlm, nsp = self.predict(tokens, lengths, inputs["positions"], segments, inputs.get("documents"), in_parts)
        return {"mlm": mlm} if nsp is None else {"mlm": mlm, "nsp": nsp}

    def predict(self, tokens: Tensor, lengths: Tensor, positions: Tensor, segments: Tensor | None = None,
                documents: Tensor | None = None,
                in_parts: bool = False) -> tuple[Tensor | Unscored, Tensor | None]:  # fmt: skip
        """Logits (B, M, V) of the tokens at positions (B, M), and of the next sentence (B, 2): follows, is random.

        Only the M masked ones meet the vocabulary: at 15 % of the tokens, an all but free head.
        """
        hidden = self.encode(tokens, lengths, segments, documents)  # (B, T, C)
        masked = at_positions(hidden, positions)  # (B, M, C)
        pooled = self.pool(hidden, real_tokens(tokens, lengths)) if self.nsp is not None else None
        states = self.mlm.transform(masked)  # (B, M, C)
        mlm = self.unscored(states, self.mlm.decoder) if in_parts else self.vocabulary(self.mlm.decoder(states))
        return mlm, self.nsp(pooled) if self.nsp is not None else None

    def classify(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Tensor:
        """tokens (B, T) padded at the right to lengths (B,) -> class logits (B, n_classes)."""
        pooled = self.pool(self.encode(tokens, lengths, segments), real_tokens(tokens, lengths))
        return self.classifier(self.stack.dropout(pooled))

    def find_spans(self, tokens: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Tensor:
        """Logits (B, 2, T) of an answer's first token, and of its last."""
        return self.spans(self.encode(tokens, lengths, segments)).transpose(1, 2)  # (B, 2, T)

    def flops(self, length: int, predicted: float = 1.0) -> float:
        heads = [head for head in (self.pooler, self.nsp, self.classifier, self.spans) if head is not None]
        total = self.stack.flops(length) + sum(map(linear_flops, heads)) / length  # but for spans, one token in all
        return total + (predicted * linear_flops(self.mlm) if self.mlm is not None else 0)

    def vocabulary_weights(self) -> set[nn.Parameter]:
        decoder = set(self.mlm.decoder.parameters()) if self.mlm is not None else set()
        return super().vocabulary_weights() | decoder

    @classmethod
    def from_published(cls, folder: str | Path) -> "Bert":
        """A BERT, in eval mode, from a folder with config.json and its weights, with the heads that are there.

        The weights: model.safetensors or pytorch_model.bin, with or without the "bert." prefix.
        Raises UserError naming missing, extra and misshapen tensors, and settings that this BERT does not have.
        """
        tensors = bert_tensors(folder)
        config = with_heads(bert_config(folder), tensors, folder)
        if config.tied:  # some files hold the shared matrix twice
            tensors.pop("mlm.decoder.weight", None)
        return loaded(lambda: cls(config), tensors, folder).eval()


def average(hidden: Tensor, real: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, C): the mean over the tokens for which real (B, T) is True, or over all."""
    if real is None:
        return hidden.mean(dim=1)
    return (hidden * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)


class MLMHead(nn.Module):
    """dense, activation, norm, then a score for each token: the embedding matrix again, with a bias of its own."""

    def __init__(self, config: ModelConfig, tokens: nn.Parameter):
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = make_activation(config)
        self.norm = make_norm(config)
        # At zero every token is equally likely at first: the loss starts at ln V.
        self.decoder = Linear(config.d_model, config.n_rows, std=0.0 if config.zero_init else 0.02)
        if config.tied:
            self.decoder.weight = tokens

    def transform(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., C), which the decoder multiplies"""
        hidden = self.activation(self.dense(hidden)).to(self.norm.weight.dtype)  # where autocast has made it bfloat16
        return self.norm(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., rows of the embedding)"""
        return self.decoder(self.transform(hidden))
