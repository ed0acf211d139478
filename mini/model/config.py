"""What a model is: a GPT and a BERT differ in these values only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mini.flags import Checked, UserError, option

UNGATED, GATED = ("gelu", "gelu_tanh", "relu2"), ("swiglu", "geglu")  # names of activations
OF_TRANSFORMERS = {"n_heads", "n_kv_heads", "d_head", "d_ff", "rope_base", "window", "activation", "value_embeddings",
                   "qk_norm", "attention"}  # what an LSTM has not # fmt: skip


@dataclass
class ModelConfig(Checked):
    """The model. A GPT and a BERT differ in these values only; the defaults are GPT-2's ways, small."""

    n_layers: int = option(6, "number of blocks", low=1, high=1000, fixed=True)
    block: str = option("transformer", "attention and MLP, or an LSTM, which has nothing of their settings",
                       ("transformer", "lstm"), fixed=True)  # fmt: skip
    n_heads: int | list[int] = option(6, "attention heads; one number, or one for each layer: 6,6,4", low=1, fixed=True)
    n_kv_heads: int = option(0, "key/value heads, each for n_heads / n_kv_heads queries; 0: n_heads", low=0, fixed=True)
    d_model: int = option(384, "width of the residual stream (C)", low=1, fixed=True)
    d_head: int = option(0, "width of a head (D); 0: d_model / n_heads", low=0, fixed=True)
    d_ff: int | list[int] = option(0, "hidden width of the MLP, or one for each layer; 0: 4 d_model", low=0, fixed=True)
    max_len: int = option(256, "longest context in tokens (T)", low=1)
    vocab_size: int = option(4096, "tokens of a trained BPE; any other tokenizer sets it", low=1, fixed=True)
    vocab_multiple: int = option(1, "pad the embedding's rows to a multiple (64 is fast on GPUs); same loss", low=1)
    norm: str = option("layernorm", "normalisation", ("layernorm", "rmsnorm"))
    norm_place: str = option("pre", "norm before each sublayer (GPT-2) or after its sum (BERT)", ("pre", "post"))
    norm_eps: float = option(1e-5, "epsilon of the normalisation", low=0)
    positions: str = option("learned", "position encoding", ("learned", "rope", "sinusoidal", "none"))
    rope_base: float | list[float] = option(1e4, "longest wavelength of RoPE / 2 pi, in tokens; or each layer's", low=1)
    window: int | list[int] = option(0, "tokens seen to each side, if causal back; 0: all; 64,64,0: by turns", low=0)
    n_global: int = option(0, "BERT with windows: first tokens that see all and are seen by all", low=0)
    activation: str = option("gelu_tanh", "the MLP's function, with -glu of a gate", (*UNGATED, *GATED), fixed=True)
    embed_norm: bool = option(False, "pre-norm: one behind the embedding, in the place of the first block's first")
    value_embeddings: bool = option(False, "a table of each layer adds to a token's values", fixed=True)
    qk_norm: bool = option(False, "normalise each query and key head (RMS) before their product")
    bias: bool = option(True, "biases in linear layers and LayerNorms", fixed=True)
    tied: bool = option(True, "the output head is the token embedding", fixed=True)
    zero_init: bool = option(False, "start the residual projections (and an untied head) at zero")
    logit_softcap: float = option(0.0, "c tanh(logits / c); 0: off", low=0)
    dropout: float = option(0.0, "dropout of embeddings, attention weights and sublayer outputs", low=0, high=0.99)
    attention: str = option("auto", "the faster, the equations, or the fused call", ("auto", "reference", "fused"))
    n_segments: int = option(0, "segment embeddings, of which BERT has 2; 0: none", low=0, fixed=True)
    causal: bool = option(True, "a token sees only itself and what is before it", flag=False)
    n_classes: int = option(0, "classes of a classification head; 0: none", low=0, flag=False, head=True)
    mlm: bool = option(False, "BERT: a head that predicts masked tokens", flag=False, head=True)
    nsp: bool = option(False, "BERT: a head that tells the next sentence from a random one", flag=False, head=True)
    spans: bool = option(False, "BERT: a head that finds the first and last token of an answer", flag=False, head=True)
    pooling: str = option("cls", "BERT: the pooler sees the first token, or the mean of all", ("cls", "mean"))
    pooler: bool = option(False, "BERT: a tanh layer on the first token", flag=False, head=True)

    def __post_init__(self):
        super().__post_init__()
        for name in ("window", "rope_base"):  # these lists repeat over the layers
            if isinstance(values := getattr(self, name), list) and 0 < len(values) < self.n_layers:
                setattr(self, name, (values * self.n_layers)[: self.n_layers])
        for name, values in vars(self).items():
            if isinstance(values, list) and len(values) != self.n_layers:
                fewer = ", or fewer, by turns" if name in ("window", "rope_base") else ""
                raise UserError(
                    f"--{name} lists {len(values)} values for {self.n_layers} layers: give one for each{fewer}"
                )
        if not self.d_head and self.block != "lstm":
            if isinstance(self.n_heads, list):
                raise UserError("--n_heads differs between layers: give the width of a head with --d_head")
            if self.d_model % self.n_heads:
                raise UserError(f"--d_model {self.d_model} is not divisible by --n_heads {self.n_heads}")
        for heads in self.layers("n_heads"):
            if self.n_kv_heads and heads % self.n_kv_heads:
                raise UserError(f"--n_heads {heads} is not divisible by --n_kv_heads {self.n_kv_heads}")
        if self.embed_norm and self.norm_place == "post":
            raise UserError("--embed_norm: with --norm_place post there is a norm behind the embedding already")
        if self.n_segments == 1:
            raise UserError("--n_segments 1: a pair of texts has two; give 0 for none")
        if self.block == "lstm" and not self.causal:
            raise UserError("--block lstm: it reads forwards alone, and a BERT sees both sides")
        if self.block == "lstm" and any(self.layers("window")):
            raise UserError("--block lstm: it has no attention that --window could limit")
        if 1 in self.layers("window"):
            raise UserError("--window 1: the next token alone is no context; give more, or 0 for all tokens")
        if self.n_global and self.causal:
            raise UserError("--n_global is for BERTs: in a GPT, what sees all and all see would tell what comes later")
        if self.n_global > self.max_len:
            raise UserError(f"--n_global {self.n_global}: more than --max_len {self.max_len}")
        if self.n_global and not any(self.layers("window")):
            raise UserError("--n_global: without --window every token sees all already")
        if self.positions == "rope" and self.block != "lstm" and self.head_size % 2:
            raise UserError(f"--positions rope needs an even head width, not {self.head_size}")

    def layers(self, name: str) -> list:
        """The value of a field for each layer, of which it may be a list; of d_ff what 0 stands for."""
        value = getattr(self, name)
        values = value if isinstance(value, list) else [value] * self.n_layers
        if name == "d_ff":
            # With a gate there are three matrices, not two: 8/3 of d_model keeps the parameters (Shazeer 2020, §2).
            usual = (8 * self.d_model // 3 + 63) // 64 * 64 if self.gated else 4 * self.d_model
            values = [d or usual for d in values]
        return values

    def of_layers(self, keep: Sequence[int]) -> "ModelConfig":
        """The config of a model with only these layers: of each list their values."""
        if self.embed_norm and 0 not in keep:
            raise UserError("--embed_norm: the first layer has no norm before it, and cannot go")
        lists = {name: [value[i] for i in keep] for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, n_layers=len(keep), **lists)

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def endless(self) -> bool:
        """Whether it reads texts of any length at a cost for each token that does not grow: max_len is no bound."""
        near = self.block == "lstm" or all(self.layers("window"))
        return self.causal and self.positions in ("rope", "none") and near

    @property
    def n_rows(self) -> int:
        """Of the tables that are looked up by token."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads
