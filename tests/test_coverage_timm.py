"""One model per family of timm with softmax attention, made small by its constructor, and the ones that are refused.

The bounds are those of ``benchmarks/coverage.py``, which runs every architecture of ``timm.list_models()``.
"""

import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import byoanet, byobnet, gcvit, metaformer, mobilenetv3, mvitv2, nest, volo

from benchmarks.coverage_check import BATCH, DELTA, FORWARD, check
from benchmarks.coverage_timm import redrawn

NARROW = {"embed_dim": 48, "num_heads": 4}
TWO = {"img_size": 64, "depth": 2}
STAGES = {"img_size": 64, "embed_dim": 24, "depths": (2, 1, 1, 1)}


def by_blocks(configurations, name, size=64):
    """A ResNet of timm's building blocks at a quarter of its width."""
    return lambda: byobnet.ByobNet(replace(configurations[name], width_factor=0.25), num_classes=10, img_size=size)


def mvit(**options):
    config = mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=24, **options)
    return lambda: mvitv2.MultiScaleVit(config, img_size=64, num_classes=10)


def caformer():
    mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    return metaformer.MetaFormer(
        depths=(1, 1, 2, 1), dims=(32, 32, 64, 64), token_mixers=mixers, norm_layers=norms, num_classes=10
    )


# name: constructor arguments of ``timm.create_model``, or a function that builds the model
FAMILIES = {
    "beit_base_patch16_224": {**TWO, **NARROW},
    "botnet26t_256": by_blocks(byoanet.model_cfgs, "botnet26t"),
    "caformer": caformer,
    "cait_xxs24_224": {**TWO, **NARROW},
    "coat_lite_tiny": {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1, 1, 1, 1)},
    "coat_tiny": {
        "img_size": 64,
        "embed_dims": (16, 24, 24, 24),
        "serial_depths": (1, 1, 1, 1),
        "parallel_depth": 1,
    },
    "convit_tiny": {"img_size": 64, "depth": 3, "local_up_to_layer": 2, **NARROW},
    "cpubone_nano": {},
    "crossvit": {"depth": [[1, 2, 0]], "embed_dim": [24, 48]},
    "csatv2": {},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 4, 4)},
    "deit_tiny_distilled_patch16_224": TWO,
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 48)},
    "efficientformerv2_s0": {"img_size": 64, "depths": (1, 1, 2, 2)},
    "efficientvit_m0": {"img_size": 64, "depth": (1, 1, 1)},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "fastvit_sa12": {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)},
    "gcvit": lambda: gcvit.GlobalContextVit(
        depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 8), embed_dim=16, img_size=64, num_classes=10
    ),
    "gemma4_vit_167m": {"img_size": 96, "depth": 2, **NARROW},
    "hiera_tiny_224": {"img_size": 64, "stages": (1, 1, 2, 1), "embed_dim": 16},
    "iformer_t": {},
    "lamhalobotnet50ts_256": by_blocks(byoanet.model_cfgs, "lamhalobotnet50ts", 128),
    "levit_128s": {"img_size": 64},
    "levit_conv_128s": {"img_size": 64},
    "lowformer_b0": {},
    "mobilenetv4_hybrid": lambda: mobilenetv3._gen_mobilenet_v4("mobilenetv4_hybrid_medium", 0.25, num_classes=10),
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "mvitv2": mvit(),
    "mvitv2_cls": mvit(use_cls_token=True),
    "naflexvit_base_patch16_gap": {"depth": 2, **NARROW},
    "nest": lambda: nest.Nest(
        img_size=64, embed_dims=(24, 48, 96), num_heads=(1, 2, 4), depths=(1, 1, 2), num_classes=10
    ),
    "nextvit_small": {"depths": (1, 1, 5, 1)},
    "pit_ti_distilled_224": {"img_size": 64},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "qwen3_vit_88m": {**TWO, **NARROW},
    "resnet50_clip": by_blocks(byobnet.model_cfgs, "resnet50_clip"),
    "sam2_hiera_tiny": {"stages": (1, 1, 2, 1), "global_att_blocks": (3,), "embed_dim": 16},
    "samvit_base_patch16_224": {**TWO, **NARROW, "global_attn_indexes": (1,), "window_size": 3},
    "shvit_s1": {},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_cr_tiny_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
    "test_coatnet": {"img_size": 64},
    "test_maxvit": {"img_size": 64},
    "test_vit": {"img_size": 64},
    "test_vit3": {"img_size": 64},
    "test_vit_relpos": {"img_size": 64},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "tnt_s_legacy_patch16_224": {**TWO, "embed_dim": 48, "inner_dim": 24, "num_heads_outer": 4},
    "twins_pcpvt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 64)},
    "visformer_tiny": {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48},
    "vit_pe_core_tiny_patch16_384": TWO,
    "vit_tiny_r_s16_p8_224": TWO,
    "vitamin_small_224": TWO,
    "volo": lambda: volo.VOLO(
        (1, 1, 1, 1), img_size=64, embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4), num_classes=10
    ),
    "xcit_nano_12_p16_224": TWO,
}
SIDES = {"eva02_tiny_patch14_224": 56, "gemma4_vit_167m": 96, "efficientformer_l1": 224, "lamhalobotnet50ts_256": 128}


def run(name, arguments):
    def build():
        torch.manual_seed(0)
        return redrawn(
            arguments()
            if callable(arguments)
            else timm.create_model(NAMES.get(name, name), num_classes=10, **arguments)
        )

    def images():
        side = SIDES.get(name, 64)
        return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    return check((name, "", build, images, [3, 7]), "TransformerRelevance")


NAMES = {"crossvit": "crossvit_9_240"}


@pytest.mark.parametrize("name", FAMILIES)
def test_attributed(name):
    row = run(name, FAMILIES[name])
    assert row.outcome == "attributed", row.reason
    assert row.delta <= DELTA and row.batch <= BATCH and row.forward <= FORWARD
    assert row.attentions > 0 and row.grid


# name: what the refusal says, with the module it names
REFUSED = {
    "edgenext_xx_small": r"no softmax attention over tokens .*softmax in module 'stages\.1\.blocks\.1\.xca' is over",
    "skresnet18": r"no softmax attention over tokens .*softmax in module 'layer1\.0\.conv1\.attn'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    row = run(name, {})
    assert row.outcome == "refused" and re.search(REFUSED[name], row.reason), (row.outcome, row.reason)
