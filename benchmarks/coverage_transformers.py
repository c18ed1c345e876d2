"""Tiny random models of the transformers library's model types: what ``coverage.py`` and the tests run the engine on.

Every model is built from a configuration (nothing is downloaded), made float64, and all its weights are drawn anew: with the library's own
initialisation (std 0.02, biases 0, norms 1) most mistakes would vanish below every tolerance. Texts come as a batch of two of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Case = tuple[str, str, Callable[[], nn.Module], Callable[[], Inputs], Any]

VOCABULARY, LONG, SHORT = 64, 9, 6  # ids 4 … 63 are words; lengths of the two texts of a batch
EOS = 3


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode with every parameter drawn anew: matrices by their fan-in, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim <= 1:
                centre = 0.0 if name.endswith("bias") else parameter.mean()
                parameter.copy_(centre + 0.2 * noise)
            elif "embed" in name or "token" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def built(model: type[nn.Module], kind: str, settings: dict[str, Any], attention: str) -> nn.Module:
    """An instance of a transformers class with the given settings and attention implementation."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if value is not None})
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    return redrawn(model(config))


# ---------------------------------------------------------------------- inputs
def texts(seed: int = 0, pad: int = 0) -> Inputs:
    """Two texts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY - 4, (2, LONG), generator=generator)
    mask = torch.ones(2, LONG, dtype=torch.long)
    ids[1, SHORT:], mask[1, SHORT:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(size: int = 16, frames: int | None = None, name: str = "pixel_values") -> Inputs:
    """Two images (or clips)."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, size, size) if frames is None else (2, frames, 3, size, size)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64)}


def waves(length: int = 400) -> Inputs:
    """Two recordings, the second one shorter."""
    generator = torch.Generator().manual_seed(2)
    return {"input_values": torch.randn((2, length), generator=generator, dtype=torch.float64)}


def spectra(bins: int, frames: int, name: str = "input_features") -> Inputs:
    """Two spectrograms."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn((2, bins, frames), generator=generator, dtype=torch.float64)}


def dialogues() -> Inputs:
    """Two sources and two targets for an encoder-decoder."""
    decoder = texts(5)
    return {**texts(), "decoder_input_ids": decoder["input_ids"][:, :5]}


# ---------------------------------------------------------------------- model types
WIDTHS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
}  # fmt: skip
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
POSITIONS_AFTER_PADDING = {"pad_token_id": 0, "max_position_embeddings": 64}

# model type (and variant): its own settings
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "camembert": POSITIONS_AFTER_PADDING,
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 16, "downsampling_rate": 3},
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3},
    "data2vec-text": POSITIONS_AFTER_PADDING,
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 2},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "fnet": {},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "ibert": {"quant_mode": False},
    "layoutlm": {},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "megatron-bert": {},
    "mobilebert (no trigrams)": {"trigram_input": False, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 1, "sep_token_id": 3, "classifier_pooling": "mean"},
    "mpnet": {"pad_token_id": 1, "max_position_embeddings": 66},
    "mra": {},
    "nystromformer": {"num_landmarks": 9, "segment_means_seq_len": 9},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": POSITIONS_AFTER_PADDING,
    "roberta-prelayernorm": POSITIONS_AFTER_PADDING,
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "roformer": {"embedding_size": 16},
    "squeezebert": {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "xlm-roberta": POSITIONS_AFTER_PADDING,
    "xlm-roberta-xl": POSITIONS_AFTER_PADDING,
    "xlnet": {"max_position_embeddings": None, "d_inner": 48, "d_model": 32, "n_layer": 2, "n_head": 4, "d_head": 8},
    "xmod": {**POSITIONS_AFTER_PADDING, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {},
}  # fmt: skip

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bert-generation": {"is_decoder": True},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 4},
    "ctrl": {"dff": 48},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "falcon": {"head_dim": None, "multi_query": True, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon (alibi)": {"head_dim": None, "alibi": True, "multi_query": True, "parallel_attn": False},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": {},
    "glm4": {},
    "gpt2": {"n_positions": 64},
    "gpt_bigcode": {"n_positions": 64, "multi_query": True},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gpt_oss": {"sliding_window": 4},
    "gptj": {"rotary_dim": 4, "n_positions": 64},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "granitemoe": {},
    "helium": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {},
    "minimax": {},
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "mixtral": {},
    "modernbert-decoder": {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"], "cls_token_id": 1, "sep_token_id": 3},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {},
    "openai-gpt": {"n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "attention_head_size": 8, "axial_pos_embds": False, "local_attn_chunk_length": 4, "feed_forward_size": 48},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "starcoder2": {"sliding_window": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "attention_dropout": 0.0},
}  # fmt: skip


# ---------------------------------------------------------------------- cases
def case(name: str, family: str, model: str, settings: dict[str, Any], inputs: Callable[[], Inputs], target: Any) -> Iterator[Case]:
    """One case per attention implementation that the class has."""
    kind = name.partition(" ")[0]
    cls = getattr(transformers, model)
    for attention in ("sdpa", "eager") if cls._supports_sdpa else ("eager",):
        yield f"{name} [{attention}]", family, lambda attention=attention: built(cls, kind, settings, attention), inputs, target


def encoders() -> Iterator[Case]:
    """Text encoders with a classification head."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for name, settings in ENCODERS.items():
        yield from case(name, "encoder", names[name.partition(" ")[0]], {**WIDTHS, **settings}, texts, 1)


def language_models() -> Iterator[Case]:
    """Causal language models; explained is a word after the last real token of each text."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for name, settings in LANGUAGE_MODELS.items():
        yield from case(name, "language model", names[name.partition(" ")[0]], {**EXPERTS, **settings}, texts, [(LONG - 1, 5), (SHORT - 1, 7)])


def cases() -> Iterator[Case]:
    """All cases: name, family, how to build the model, its inputs, the target."""
    yield from encoders()
    yield from language_models()
