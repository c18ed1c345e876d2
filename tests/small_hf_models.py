"""Small Hugging Face models from configurations, inputs for them, and how their token scores are compared."""

import torch
from tiny_models import randomise

TEXT = dict(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    num_hidden_layers=2,
    vocab_size=64,
    max_position_embeddings=32,
)
VISION = dict(
    hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2, image_size=16, patch_size=8
)
SEQ2SEQ = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
LLAMA = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    **SPECIAL,
)
LONG, SHORT = 7, 4


def build(model, config, attention="sdpa"):
    config._attn_implementation = attention
    return randomise(model(config).double(), scale=0.25)


def ids(length, seed=0):
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded():
    """Two texts, the second one shorter."""
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, SHORT:] = 0
    return {"input_ids": ids(LONG), "attention_mask": mask}


def alone(inputs, i):
    """The i-th example without its padding."""
    one = {name: t[i : i + 1] for name, t in inputs.items()}
    if "attention_mask" in one:
        real = int(one["attention_mask"].sum())
        one = {name: t[:, :real] if name in ("input_ids", "attention_mask") else t for name, t in one.items()}
    return one


FLOAT32_SOFTMAX = 1e-5  # Llama, CLIP and SigLIP compute parts in float32 whatever the model's dtype


def close(got, want, tolerance=1e-9):
    """Scores of one example; beyond its tokens there must be nothing."""
    got, want = got.flatten(), want.flatten()
    assert want.abs().max() > 0
    assert (got[: len(want)] - want).abs().max() <= tolerance * want.abs().max()
    assert (got[len(want) :] == 0).all()


def briefs(schedule):
    return [step.brief for step in schedule]
