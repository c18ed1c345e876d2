"""Tiny random models of the transformers library that read images and texts: the multimodal part of ``coverage_transformers.py``.

Their configurations nest one configuration per tower, so every model has a function that builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from benchmarks.coverage_inputs import EOS, LONG, SHORT, VOCABULARY, Case, Inputs, pixels, redrawn, spectra, texts

IMAGE_ID = VOCABULARY - 2  # stands in the text where the image's features go
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION = {
    "image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


class Pairs(nn.Module):
    """The scores of every image and its own text, one number per example: what a two-tower model is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.model(**inputs)
        scores = output.logits_per_audio if hasattr(output, "logits_per_audio") else output.logits_per_image
        return scores.diagonal()


# ---------------------------------------------------------------------- inputs
def pictures_and_texts() -> Inputs:
    """Two images and two texts of different lengths."""
    return {**texts(), **pixels()}


def written_texts(**more: Tensor) -> Inputs:
    """The same for towers that read a text's last token, which is its end-of-text id."""
    inputs = pictures_and_texts()
    inputs["input_ids"][0, LONG - 1] = inputs["input_ids"][1, SHORT - 1] = EOS
    return {**inputs, **more}


def fixed_texts() -> Inputs:
    """SigLIP reads texts without a mask."""
    inputs = pictures_and_texts()
    del inputs["attention_mask"]
    return inputs


def conversation(tokens: int, size: int = 16, **more: Any) -> Inputs:
    """Texts in which ``tokens`` places are the image's."""
    ids = torch.randint(4, VOCABULARY - 4, (2, LONG + tokens), generator=torch.Generator().manual_seed(6))
    ids[:, 1 : 1 + tokens] = IMAGE_ID
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels(size), **more}


def patches_in_a_row() -> Inputs:
    """Qwen's inputs: the patches of all images one after the other (no batch axis), and each image's grid."""
    inputs = conversation(4)
    rows = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    kinds = (inputs["input_ids"] == IMAGE_ID).int()
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {**inputs, "pixel_values": rows, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def patch_rows() -> Inputs:
    """SigLIP 2's images: patches in rows, a mask and the grid."""
    rows = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    inputs = fixed_texts()
    return {**inputs, "pixel_values": rows, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int), "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}  # fmt: skip


def regions() -> Inputs:
    """Features and boxes of image regions, as a detector gives them."""
    generator = torch.Generator().manual_seed(9)
    return {**texts(), "visual_feats": torch.randn((2, 5, 24), generator=generator, dtype=torch.float64),
            "visual_pos": torch.rand((2, 5, 4), generator=generator, dtype=torch.float64)}  # fmt: skip


def region_embeddings() -> Inputs:
    """Features of image regions in one sequence with the text."""
    inputs = texts()
    rows = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return {**inputs, "visual_embeds": rows, "visual_attention_mask": torch.ones(2, 5)}


def several_tiles() -> Inputs:
    """One image per text, in the five axes of models that read several."""
    inputs = conversation(4)
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    return inputs


def sounds_and_texts() -> Inputs:
    """Two spectrograms and two texts."""
    return {**texts(), "input_features": spectra(32, 8)["input_features"][:, None]}


def described_images() -> Inputs:
    """Images and the beginnings of their descriptions."""
    return {**pixels(), "decoder_input_ids": texts(5)["input_ids"][:, :5]}


def boxes() -> Tensor:
    """Where every word stands on its page."""
    corner = torch.randint(0, 8, (2, LONG, 2), generator=torch.Generator().manual_seed(10))
    return torch.cat([corner, corner + 4], -1)


def tiled() -> Inputs:
    """Llama's inputs: images in tiles, which the text asks by cross-attention."""
    inputs = texts()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    image = pixels()["pixel_values"][:, None, None]
    return {**inputs, "pixel_values": image, "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, LONG, 1, 1, dtype=torch.long)}  # fmt: skip


def flattened_patches() -> Inputs:
    """Pix2Struct's images: every patch with its row and column in front."""
    rows = torch.randn(2, 16, 18, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    place = torch.stack(torch.meshgrid(torch.arange(1.0, 5), torch.arange(1.0, 5), indexing="ij"), -1).reshape(16, 2)
    rows[..., :2] = place
    return {"flattened_patches": rows, "attention_mask": torch.ones(2, 16), "decoder_input_ids": texts(5)["input_ids"][:, :5]}  # fmt: skip


# ---------------------------------------------------------------------- models
def two_towers(name: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **more: Any) -> Callable[[], Any]:  # fmt: skip
    def config() -> Any:
        return getattr(T, name)(text_config={**TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})}, **more)  # fmt: skip

    return config


ANSWER = [(LONG - 1, 5), (SHORT - 1, 7)]
LAST = 12  # position of a word after image and text

# model type: (class, configuration, inputs, target)
MODELS: dict[str, tuple[str, Callable[[], Any], Callable[[], Inputs], Any]] = {
    "altclip": ("AltCLIPModel", two_towers("AltCLIPConfig", {"project_dim": 32, "type_vocab_size": 2}, projection_dim=16), pictures_and_texts, None),
    "blip": ("BlipForImageTextRetrieval", two_towers("BlipConfig", {"encoder_hidden_size": 32}, projection_dim=16, image_text_hidden_size=16), pictures_and_texts, 1),
    "blip (captioning)": ("BlipForConditionalGeneration", two_towers("BlipConfig", {"encoder_hidden_size": 32, "is_decoder": True}, projection_dim=16), pictures_and_texts, ANSWER),
    "bridgetower": ("BridgeTowerForImageAndTextRetrieval", two_towers("BridgeTowerConfig", {"pad_token_id": 1, "type_vocab_size": 1}, {"image_size": 16, "hidden_size": 64}, hidden_size=32, num_attention_heads=4, num_hidden_layers=2), lambda: {**texts(pad=1), **pixels()}, 1),
    "chinese_clip": ("ChineseCLIPModel", two_towers("ChineseCLIPConfig", projection_dim=16), pictures_and_texts, None),
    "clip": ("CLIPModel", two_towers("CLIPConfig", projection_dim=16), written_texts, None),
    "clipseg": ("CLIPSegForImageSegmentation", two_towers("CLIPSegConfig", projection_dim=16, reduce_dim=8, decoder_num_attention_heads=2, decoder_intermediate_size=16, extract_layers=[0, 1]), written_texts, (5, 6)),
    "gemma3": ("Gemma3ForConditionalGeneration", lambda: T.Gemma3Config(text_config={**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE_ID, boi_token_index=4, eoi_token_index=5), lambda: conversation(4), (LAST, 5)),
    "git": ("GitForCausalLM", lambda: T.GitConfig(vision_config=VISION, **{**TEXT, "bos_token_id": 1}), pictures_and_texts, (LAST + 12, 5)),
    "groupvit": ("GroupViTModel", lambda: T.GroupViTConfig(text_config=TEXT, vision_config={**VISION, "depths": [1, 2], "num_group_tokens": [4, 2], "num_output_groups": [4, 2], "assign_mlp_ratio": [0.5, 4]}, projection_dim=16, projection_intermediate_dim=24), written_texts, None),
    "idefics3": ("Idefics3ForConditionalGeneration", lambda: T.Idefics3Config(text_config={**DECODER, "model_type": "llama"}, vision_config=VISION, image_token_id=IMAGE_ID, scale_factor=2), several_tiles, (LAST, 5)),
    "instructblip": ("InstructBlipForConditionalGeneration", lambda: T.InstructBlipConfig(vision_config=VISION, qformer_config={**TEXT, "encoder_hidden_size": 32}, text_config={**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}, num_query_tokens=4, image_token_index=IMAGE_ID), lambda: {**conversation(4), "qformer_input_ids": texts(3)["input_ids"]}, (LAST, 5)),
    "blip-2": ("Blip2ForConditionalGeneration", lambda: T.Blip2Config(vision_config=VISION, qformer_config={**TEXT, "encoder_hidden_size": 32}, text_config={**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}, num_query_tokens=4, image_token_index=IMAGE_ID), lambda: conversation(4), (LAST, 5)),
    "internvl": ("InternVLForConditionalGeneration", lambda: T.InternVLConfig(text_config={**DECODER, "model_type": "qwen2"}, vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, image_token_id=IMAGE_ID), lambda: conversation(4), (LAST, 5)),
    "llava": ("LlavaForConditionalGeneration", lambda: T.LlavaConfig(text_config={**DECODER, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=IMAGE_ID), lambda: conversation(16), (LAST + 12, 5)),
    "lxmert": ("LxmertForQuestionAnswering", lambda: T.LxmertConfig(**{**TEXT, "num_hidden_layers": None}, num_qa_labels=3, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=24), regions, 1),
    "metaclip_2": ("MetaClip2Model", two_towers("MetaClip2Config", projection_dim=16), written_texts, None),
    "mllama": ("MllamaForConditionalGeneration", lambda: T.MllamaConfig(text_config={**DECODER, "num_hidden_layers": 2, "cross_attention_layers": [1]}, vision_config={**VISION, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}, image_token_index=IMAGE_ID), tiled, (LONG - 1, 5)),
    "owlvit": ("OwlViTForObjectDetection", two_towers("OwlViTConfig", projection_dim=32), written_texts, (3, 0)),
    "paligemma": ("PaliGemmaForConditionalGeneration", lambda: T.PaliGemmaConfig(text_config={**DECODER, "model_type": "gemma"}, vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}, image_token_index=IMAGE_ID, projection_dim=32, hidden_size=32), lambda: conversation(16), (LAST + 12, 5)),
    "pix2struct": ("Pix2StructForConditionalGeneration", lambda: T.Pix2StructConfig(text_config={**TEXT, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}, vision_config={**VISION, "d_kv": 8, "d_ff": 48, "patch_embed_hidden_size": 16, "seq_len": 16}), flattened_patches, (4, 5)),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", lambda: T.Qwen2VLConfig(text_config={**DECODER, "rope_parameters": ROPE}, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}, image_token_id=IMAGE_ID, video_token_id=61, vision_start_token_id=60, vision_end_token_id=59), patches_in_a_row, (LAST, 5)),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", lambda: T.Qwen2_5_VLConfig(text_config={**DECODER, "rope_parameters": ROPE}, vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}, image_token_id=IMAGE_ID, video_token_id=61, vision_start_token_id=60, vision_end_token_id=59), patches_in_a_row, (LAST, 5)),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", lambda: T.Qwen3VLConfig(text_config={**DECODER, "rope_parameters": {**ROPE, "mrope_interleaved": True}}, vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, image_token_id=IMAGE_ID, video_token_id=61, vision_start_token_id=60, vision_end_token_id=59), patches_in_a_row, (LAST, 5)),
    "siglip": ("SiglipModel", two_towers("SiglipConfig", {"projection_size": 32}), fixed_texts, None),
    "siglip2": ("Siglip2Model", two_towers("Siglip2Config", {"projection_size": 32}, {"num_patches": 16}), patch_rows, None),
    "smolvlm": ("SmolVLMForConditionalGeneration", lambda: T.SmolVLMConfig(text_config={**DECODER, "model_type": "llama"}, vision_config=VISION, image_token_id=IMAGE_ID, scale_factor=2), several_tiles, (LAST, 5)),
    "vilt": ("ViltForQuestionAnswering", lambda: T.ViltConfig(**TEXT, image_size=16, patch_size=4, num_labels=3), pictures_and_texts, 1),
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", lambda: T.VisionEncoderDecoderConfig(encoder={**VISION, "model_type": "vit"}, decoder={**TEXT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True}), described_images, (4, 5)),
    "visual_bert": ("VisualBertForQuestionAnswering", lambda: T.VisualBertConfig(**TEXT, visual_embedding_dim=24, num_labels=3), region_embeddings, 1),
    "clap": ("ClapModel", lambda: T.ClapConfig(text_config={**TEXT, "pad_token_id": 0}, audio_config={"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4, "depths": [1, 1], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "enable_fusion": False}, projection_dim=16), sounds_and_texts, None),
    "layoutlmv3": ("LayoutLMv3ForSequenceClassification", lambda: T.LayoutLMv3Config(**TEXT, input_size=16, patch_size=4, num_labels=3, max_2d_position_embeddings=32, coordinate_size=6, shape_size=4, rel_pos_bins=8, rel_2d_pos_bins=8), lambda: {**pictures_and_texts(), "bbox": boxes()}, 1),
}  # fmt: skip
IMAGE_AND_TEXT_SCORE = ("altclip", "chinese_clip", "clip", "groupvit", "metaclip_2", "siglip", "siglip2", "clap")


def built(name: str, attention: str) -> nn.Module:
    """The model with an attention implementation in all its towers."""
    torch.manual_seed(0)
    model, make, _, _ = MODELS[name]
    config = make()
    config._attn_implementation = attention
    found = redrawn(getattr(T, model)(config))
    return Pairs(found).eval() if name in IMAGE_AND_TEXT_SCORE else found


def cases() -> Iterator[Case]:
    """One case per model and attention implementation."""
    for name, (model, _, inputs, target) in MODELS.items():
        for attention in ("sdpa", "eager") if getattr(T, model)._supports_sdpa else ("eager",):
            yield (
                f"{name} [{attention}]",
                "multimodal",
                lambda name=name, attention=attention: built(name, attention),
                inputs,
                target,
            )
