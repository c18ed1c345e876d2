"""Tiny random models of the transformers library's model types: what ``coverage.py`` and the tests run the engine on.

Every model is built from a configuration (nothing is downloaded), made float64, and all its weights are drawn anew: with the library's own
initialisation (std 0.02, biases 0, norms 1) most mistakes would vanish below every tolerance. Texts come as a batch of two of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import coverage_multimodal
from benchmarks.coverage_inputs import (
    EOS,
    LONG,
    SHORT,
    VOCABULARY,
    Case,
    Inputs,
    dialogues,
    long_waves,
    masked_pixels,
    padded_waves,
    pixels,
    redrawn,
    spectra,
    spectrograms,
    speech,
    speech_rows,
    texts,
    waves,
)


class DoubleByDefault(nn.Module):
    """For a model that makes constants of the default dtype and so fails in float64, recorded or not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return self.model(**inputs)
        finally:
            torch.set_default_dtype(before)


def built(model: type[nn.Module], kind: str, settings: dict[str, Any], attention: str) -> nn.Module:
    """An instance of a transformers class with the given settings and attention implementation."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{name: value for name, value in settings.items() if value is not None}
    )
    config._attn_implementation = attention
    if kind == "xglm":
        return DoubleByDefault(redrawn(model(config)))
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    return redrawn(model(config))


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


ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": {},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blenderbot": {},
    "blenderbot-small": {},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longt5": {"local_radius": 3, "global_block_size": 3},
    "longt5 (transient global)": {"local_radius": 3, "global_block_size": 3, "encoder_attention_type": "transient-global"},
    "m2m_100": {},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "mbart": {},
    "mt5": {"feed_forward_proj": "gated-gelu"},
    "mvp": {},
    "nllb-moe": {"num_experts": 4, "expert_capacity": 16, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "pegasus": {},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 2},
    "plbart": {},
    "switch_transformers": {"num_experts": 4, "expert_capacity": 16, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_layers": 2, "num_decoder_layers": 2},
    "t5": {},
    "t5 (gated)": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"feed_forward_proj": "gated-gelu"},
}  # fmt: skip
HALVES = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip

IMAGE = {
    "image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3,
}  # fmt: skip
PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "num_labels": 3, "num_channels": 3,
}  # fmt: skip
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}

# model type: (class, settings, inputs, target)
VISION: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs], Any]] = {
    "beit": ("BeitForImageClassification", {**IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}, pixels, 1),
    "cvt": ("CvtForImageClassification", {"patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1], "num_labels": 3}, lambda: pixels(32), 1),
    "data2vec-vision": ("Data2VecVisionForImageClassification", {**IMAGE, "use_shared_relative_position_bias": True}, pixels, 1),
    "deit": ("DeiTForImageClassification", IMAGE, pixels, 1),
    "deit (with teacher)": ("DeiTForImageClassificationWithTeacher", IMAGE, pixels, 1),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True}, pixels, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", {**IMAGE, "mlp_ratio": 2, "num_register_tokens": 2}, pixels, 1),
    "dinov3_vit": ("DINOv3ViTModel", {**IMAGE, "num_register_tokens": 2, "use_gated_mlp": True}, pixels, (0, 3)),
    "dpt": ("DPTForSemanticSegmentation", {**IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5], "is_hybrid": False, "use_auxiliary_head": False}, pixels, (1, 3, 3)),
    "hiera": ("HieraForImageClassification", {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "depths": [1, 2], "num_heads": [2, 4], "num_query_pool": 1, "query_stride": [2, 2], "masked_unit_size": [4, 4], "masked_unit_attention": [True, False], "num_labels": 3}, lambda: pixels(32), 1),
    "ijepa": ("IJepaForImageClassification", IMAGE, pixels, 1),
    "levit": ("LevitForImageClassification", {"image_size": 64, "num_channels": 3, "kernel_size": 3, "stride": 2, "padding": 1, "patch_size": 16, "hidden_sizes": [16, 32], "num_attention_heads": [2, 4], "depths": [1, 1], "key_dim": [8, 8], "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": [["Subsample", 8, 4, 2, 2, 2]], "num_labels": 3}, lambda: pixels(64), 1),
    "mobilevit": ("MobileViTForImageClassification", {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48], "num_labels": 3}, lambda: pixels(64), 1),
    "pvt": ("PvtForImageClassification", {**PYRAMID, "image_size": 32, "patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1]}, lambda: pixels(32), 1),
    "pvt_v2": ("PvtV2ForImageClassification", {**PYRAMID, "image_size": 32, "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1]}, lambda: pixels(32), 1),
    "segformer": ("SegformerForImageClassification", {**PYRAMID, "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1]}, lambda: pixels(32), 1),
    "segformer (segmentation)": ("SegformerForSemanticSegmentation", {**PYRAMID, "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "decoder_hidden_size": 16}, lambda: pixels(32), (1, 3, 4)),
    "swiftformer": ("SwiftFormerForImageClassification", {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_labels": 3}, lambda: pixels(64), 1),
    "swin": ("SwinForImageClassification", WINDOWS, lambda: pixels(32), 1),
    "swinv2": ("Swinv2ForImageClassification", WINDOWS, lambda: pixels(32), 1),
    "timesformer": ("TimesformerForVideoClassification", {**IMAGE, "num_frames": 2}, lambda: pixels(16, 2), 1),
    "videomae": ("VideoMAEForVideoClassification", {**IMAGE, "num_frames": 4, "tubelet_size": 2}, lambda: pixels(16, 4), 1),
    "vit": ("ViTForImageClassification", IMAGE, pixels, 1),
    "vit_mae": ("ViTMAEForPreTraining", {**IMAGE, "decoder_num_attention_heads": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24, "mask_ratio": 0.25}, masked_pixels, (3, 7)),
    "vit_msn": ("ViTMSNForImageClassification", IMAGE, pixels, 1),
    "vitdet": ("VitDetModel", {**IMAGE, "window_size": 2, "window_block_indices": [0], "use_relative_position_embeddings": True}, pixels, (3, 1, 1)),
    "vivit": ("VivitForVideoClassification", {**IMAGE, "num_frames": 4, "tubelet_size": [2, 4, 4]}, lambda: pixels(16, 4), 1),
    "yolos": ("YolosForObjectDetection", {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 3}, pixels, (1, 2)),
}  # fmt: skip

WAVE = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": [16, 16], "conv_stride": [5, 4],
    "conv_kernel": [10, 4], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "num_labels": 3,
    "apply_spec_augment": False,
}  # fmt: skip

AUDIO: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs], Any]] = {
    "audio-spectrogram-transformer": ("ASTForAudioClassification", {**IMAGE, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}, lambda: spectra(16, 8, "input_values"), 1),
    "clap_audio_model": ("ClapAudioModel", {"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4, "depths": [1, 1], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "enable_fusion": False}, spectrograms, (1, 0, 0)),
    "data2vec-audio": ("Data2VecAudioForSequenceClassification", {**WAVE, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, waves, 1),
    "hubert": ("HubertForSequenceClassification", WAVE, waves, 1),
    "sew": ("SEWForSequenceClassification", {**WAVE, "squeeze_factor": 2}, waves, 1),
    "sew-d": ("SEWDForSequenceClassification", {**WAVE, "squeeze_factor": 2, "max_position_embeddings": 32, "position_buckets": 8}, waves, 1),
    "unispeech": ("UniSpeechForSequenceClassification", WAVE, waves, 1),
    "unispeech-sat": ("UniSpeechSatForSequenceClassification", WAVE, waves, 1),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", WAVE, waves, 1),
    "wav2vec2 (CTC, padded)": ("Wav2Vec2ForCTC", {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, padded_waves, (3, 5)),
    "wav2vec2-bert": ("Wav2Vec2BertForSequenceClassification", {**WAVE, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 4, "right_max_position_embeddings": 2, "output_hidden_size": 32}, lambda: spectra(12, 8), 1),
    "wav2vec2-conformer": ("Wav2Vec2ConformerForSequenceClassification", {**WAVE, "conv_depthwise_kernel_size": 3, "position_embeddings_type": "relative"}, waves, 1),
    "wavlm": ("WavLMForSequenceClassification", {**WAVE, "num_buckets": 8, "max_bucket_distance": 16}, waves, 1),
    "whisper": ("WhisperForConditionalGeneration", {**HALVES, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "suppress_tokens": [], "begin_suppress_tokens": []}, speech, (4, 5)),
    "whisper (classification)": ("WhisperForAudioClassification", {**HALVES, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "classifier_proj_size": 16, "num_labels": 3}, lambda: spectra(8, 12), 1),
    "speech_to_text": ("Speech2TextForConditionalGeneration", {**HALVES, "input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16, "max_source_positions": 32, "max_target_positions": 16}, speech_rows, (4, 5)),
    "moonshine": ("MoonshineForConditionalGeneration", {**HALVES, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "intermediate_size": 48}, long_waves, (4, 5)),
}  # fmt: skip


# ---------------------------------------------------------------------- cases
def case(
    name: str, family: str, model: str, settings: dict[str, Any], inputs: Callable[[], Inputs], target: Any
) -> Iterator[Case]:
    """One case per attention implementation that the class has."""
    kind = name.partition(" ")[0]
    cls = getattr(transformers, model)
    for attention in ("sdpa", "eager") if cls._supports_sdpa else ("eager",):
        yield (
            f"{name} [{attention}]",
            family,
            lambda attention=attention: built(cls, kind, settings, attention),
            inputs,
            target,
        )


def encoders() -> Iterator[Case]:
    """Text encoders with a classification head."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for name, settings in ENCODERS.items():
        yield from case(name, "encoder", names[name.partition(" ")[0]], {**WIDTHS, **settings}, texts, 1)


def language_models() -> Iterator[Case]:
    """Causal language models; explained is a word after the last real token of each text."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for name, settings in LANGUAGE_MODELS.items():
        yield from case(
            name,
            "language model",
            names[name.partition(" ")[0]],
            {**EXPERTS, **settings},
            texts,
            [(LONG - 1, 5), (SHORT - 1, 7)],
        )


def encoder_decoders() -> Iterator[Case]:
    """Encoder-decoders; explained is a word after the decoder's last token, by source and target."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    for name, settings in ENCODER_DECODERS.items():
        yield from case(
            name, "encoder-decoder", names[name.partition(" ")[0]], {**HALVES, **settings}, dialogues, (4, 5)
        )


def listed(family: str, models: dict[str, tuple[str, dict[str, Any], Callable[[], Inputs], Any]]) -> Iterator[Case]:
    """Models of a table of classes."""
    for name, (model, settings, inputs, target) in models.items():
        yield from case(name, family, model, settings, inputs, target)


def vision() -> Iterator[Case]:
    """Images and videos."""
    yield from listed("vision", VISION)


def audio() -> Iterator[Case]:
    """Waves and spectrograms."""
    yield from listed("audio", AUDIO)


def cases() -> Iterator[Case]:
    """All cases: name, family, how to build the model, its inputs, the target."""
    yield from encoders()
    yield from language_models()
    yield from encoder_decoders()
    yield from vision()
    yield from audio()
    yield from coverage_multimodal.cases()
