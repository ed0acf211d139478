"""Names for sets of flags."""

from mini.flags import field_names, from_dict
from mini.model.config import ModelConfig

# A modern small recipe, kept together because its parts were tuned together.
MODERN = dict(norm="rmsnorm", positions="rope", activation="relu2", qk_norm=True, bias=False, tied=False,
              zero_init=True)  # fmt: skip
# Three minutes on two cores without bfloat16: tables that cost no arithmetic, many small steps (docs/log.md).
LAPTOP = dict(MODERN, n_layers=4, n_heads=3, d_model=192, value_embeddings=True, lr=0.005, embed_lr=0.005,
              head_lr=0.0025, turns=2)  # fmt: skip
# GPT-2's ways (Radford et al. 2019) with the training values of nanoGPT's reproduction.
GPT2 = dict(max_len=1024, vocab_size=50257, vocab_multiple=64, tokenizer="gpt2", optimizer="adamw", lr=6e-4, beta2=0.95,
            weight_decay=0.1, schedule="cosine", warmup=0.007, min_lr=0.1, batch_size=480, accumulation=5,
            steps=100_000, eval_every=1000, checkpoint_every=1000)  # fmt: skip
GPT_PRESETS: dict[str, dict] = {
    "laptop": dict(LAPTOP, max_len=256, vocab_size=1024, weight_decay=0.1, batch_size=4, steps=1040, eval_every=520,
                   sample_every=520, checkpoint_every=260),
    # Four times the context, as many tokens in a step; three layers of four look at 128 tokens (docs/long-texts.md).
    "laptop-long": dict(LAPTOP, max_len=1024, window=[128, 128, 128, 0], vocab_size=1024, weight_decay=0.1,
                        batch_size=1, steps=1040, eval_every=520, sample_every=520, checkpoint_every=260),
    "char": dict(MODERN, n_layers=4, n_heads=4, d_model=128, max_len=64, tokenizer="bytes", data="tinyshakespeare",
                 batch_size=12, steps=2000, eval_every=500, turns=1),
    "gpt2": dict(GPT2, n_layers=12, n_heads=12, d_model=768),
    "gpt2-medium": dict(GPT2, n_layers=24, n_heads=16, d_model=1024, lr=3e-4),
    "gpt2-large": dict(GPT2, n_layers=36, n_heads=20, d_model=1280, lr=2.5e-4),
    "gpt2-xl": dict(GPT2, n_layers=48, n_heads=25, d_model=1600, lr=2e-4),
}  # fmt: skip
ENCODER = dict(causal=False, n_segments=2)  # what makes a stack of blocks one
# BERT's ways (Devlin et al. 2019, appendix A.2); the small sizes are those of Turc et al. 2019.
BERT = dict(ENCODER, norm_place="post", norm_eps=1e-12, activation="gelu", dropout=0.1, max_len=512, vocab_size=30522,
            vocab_multiple=64, optimizer="adamw", lr=1e-4, beta2=0.999, weight_decay=0.01, schedule="linear",
            warmup=0.01, batch_size=256, steps=1_000_000, eval_every=5000, checkpoint_every=5000)  # fmt: skip
BERT_PRESETS: dict[str, dict] = {
    "bert-laptop": dict(LAPTOP, **ENCODER, max_len=128, vocab_size=2048, batch_size=16, steps=600, eval_every=300,
                        sample_every=300, checkpoint_every=150),
    "bert-tiny": dict(BERT, n_layers=2, n_heads=2, d_model=128),
    "bert-mini": dict(BERT, n_layers=4, n_heads=4, d_model=256),
    "bert-small": dict(BERT, n_layers=4, n_heads=8, d_model=512),
    "bert-medium": dict(BERT, n_layers=8, n_heads=8, d_model=512),
    "bert-base": dict(BERT, n_layers=12, n_heads=12, d_model=768),
    "bert-large": dict(BERT, n_layers=24, n_heads=16, d_model=1024),
}  # fmt: skip
# ModernBERT's shape (Warner et al. 2024): two layers of three look at 64 tokens to each side. How modernbert-base
# learns is a beginning for whoever has the machines; nobody has trained it here.
MODERN_ENCODER = dict(causal=False, positions="rope", rope_base=[160_000.0, 10_000.0, 10_000.0], window=[0, 64, 64],
                      activation="geglu", embed_norm=True, bias=False, nsp=False, mask_rate=0.3)  # fmt: skip
BERT_PRESETS |= {
    "modernbert-laptop": dict(MODERN_ENCODER, n_layers=4, n_heads=3, d_model=192, max_len=512, vocab_size=2048,
                              optimizer="muon", lr=0.005, embed_lr=0.005, head_lr=0.0025, turns=2, batch_size=4,
                              steps=600, eval_every=300, sample_every=300, checkpoint_every=150),
    "modernbert-base": dict(MODERN_ENCODER, n_layers=22, n_heads=12, d_model=768, d_ff=1152, max_len=8192,
                            vocab_size=50368, optimizer="adamw", lr=8e-4, beta2=0.98, weight_decay=1e-5, batch_size=448,
                            steps=100_000, eval_every=1000, checkpoint_every=1000),
}  # fmt: skip
PRESETS = BERT_PRESETS | GPT_PRESETS


def model_preset(name: str) -> ModelConfig:
    """The ModelConfig of a preset, for use from Python: GPT(model_preset("gpt2"))."""
    return from_dict(ModelConfig, {k: v for k, v in PRESETS[name].items() if k in field_names(ModelConfig)}, name)
