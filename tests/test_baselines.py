"""The baselines of CVPR 2021 against the published maps and against their formulas written out."""

import pytest
import timm
import torch
import transformers as T
from golden_models import (
    assert_padding_changes_nothing,
    assert_relatively_close,
    published,
    published_bert,
    published_vit,
)
from tiny_models import Block, TinyText, TinyViT, randomise
from torch import nn

from captum_transformer_attr import (
    AttCAT,
    AttentionGradCam,
    AttentionRelevance,
    AttentionRollout,
    InputError,
    PartialLRP,
    RawAttention,
    RelevanceRollout,
    TransformerLRP,
    TransformerRelevance,
    UnsupportedModelError,
)
from captum_transformer_attr.ops.residual import ConstantSum, Sum
from captum_transformer_attr.rules import relevance_tables

VIT_METHODS = {
    "raw_attention": (RawAttention, {}),
    "lrp_rollout": (RelevanceRollout, {}),
    "last_layer_relevance": (PartialLRP, {}),
    "last_layer_relevance_x_grad": (PartialLRP, {"with_gradient": True}),
    "second_layer_relevance": (PartialLRP, {"layer": 1}),
}
# The published class behind these three maps normalises with epsilon 1e-5, timm's with 1e-6.
OTHER_EPSILON = {
    "rollout": (AttentionRollout, {}),
    "rollout_start1": (AttentionRollout, {"start_layer": 1}),
    "attention_gradcam": (AttentionGradCam, {}),
}


def stretched(maps):
    """Min-max normalised, as the published Grad-CAM is."""
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return (maps - low) / (high - low)


VIT_MAPS = [
    (name, map_name)
    for name in ("vit_small_grid", "vit_14x14")
    for map_name in (*VIT_METHODS, *OTHER_EPSILON)
    # That golden holds no Grad-CAM.
    if (name, map_name) != ("vit_small_grid", "attention_gradcam")
]


@pytest.mark.parametrize("name, map_name", VIT_MAPS)
def test_vit_maps(name, map_name):
    golden, model = published_vit(name)
    method, options = {**VIT_METHODS, **OTHER_EPSILON}[map_name]
    if map_name in OTHER_EPSILON:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
    got = method(model, **options).attribute_tokens(golden["images"], golden["targets"]).flatten(1)
    assert_relatively_close(stretched(got) if map_name == "attention_gradcam" else got, golden[f"map.{map_name}"])


def stabilised_fork(rule, value):
    """The published code sends relevance through every fork as x · Σ R / (x + 1e-9): a loss where an activation is
    nearly 0."""

    def through(node, r, signal):
        x = value(node)
        return rule(node, torch.where(x == 0, 0, r * x / (x + 1e-9)), signal)

    return through


@pytest.mark.parametrize("name, tolerance", [("vit_small_grid", 1e-5), ("vit_14x14", 2e-5)])
def test_vit_full_lrp(name, tolerance, monkeypatch):
    golden, model = published_vit(name)
    want, targets = golden["map.full_lrp"], golden["targets"]

    def run():
        return TransformerLRP(model).attribute(golden["images"], targets).sum(1)

    assert_relatively_close(run(), want, tolerance)
    table = relevance_tables.deep_taylor.TABLE
    monkeypatch.setitem(table, Sum, stabilised_fork(table[Sum], lambda node: node.a + node.b))
    monkeypatch.setitem(table, ConstantSum, stabilised_fork(table[ConstantSum], lambda node: node.x + node.constant))
    assert_relatively_close(run(), want, 1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_rollout(implementation):
    golden, model = published_bert(implementation)
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask")}
    got = AttentionRollout(model).attribute_tokens(inputs, golden["targets"])["input_ids"]
    assert_relatively_close(got[:, 1:], golden["map.rollout"][:, 1:], 1e-9)


def joint_step(first, second, **parts):
    """Rows of (A + I) over their sums for the tokens of two streams together.

    ``parts`` by who asks and who is asked.
    """
    step = torch.eye(first + second, dtype=torch.float64)
    axis = {"a": slice(0, first), "b": slice(first, None)}
    for name, part in parts.items():
        step[axis[name[0]], axis[name[1]]] += part
    return step / step.sum(-1, keepdim=True)


def test_rollout_across_modalities():
    """LXMERT as one graph over text and image tokens; both directions of a co-attention read what was there before."""
    want, model = published("lxmert_generic_attention", T.LxmertForQuestionAnswering, T.LxmertConfig)
    inputs = {name: want[name] for name in ("input_ids", "visual_feats", "visual_pos")}
    method = AttentionRollout(model)
    got = method.attribute_tokens(inputs, want["targets"])
    maps = [record.attention.mean(1) for record in method.attention_records(inputs, want["targets"])]
    for i in range(2):
        a = [m[i] for m in maps]
        steps = [dict(aa=a[0]), dict(aa=a[1]), dict(bb=a[2]), dict(bb=a[3])]
        steps += [dict(ab=a[4], ba=a[5]), dict(aa=a[6]), dict(bb=a[7])]
        steps += [dict(ab=a[8], ba=a[9]), dict(aa=a[10]), dict(bb=a[11]), dict(ab=a[12]), dict(aa=a[13])]
        rows = torch.eye(14, dtype=torch.float64)
        for step in steps:
            rows = joint_step(8, 6, **step) @ rows
        assert_relatively_close(got["input_ids"][i, 1:], rows[0, 1:8], 1e-9)
        assert_relatively_close(got["visual_feats"][i], rows[0, 8:], 1e-9)


def test_rollout_of_an_encoder_and_a_decoder():
    settings = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, vocab_size=40)
    settings |= dict(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16)
    model = randomise(T.BartForConditionalGeneration(T.BartConfig(**settings)).double())
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(4, 40, (1, 5), generator=draw),
        "decoder_input_ids": torch.randint(4, 40, (1, 3), generator=draw),
    }
    method = AttentionRollout(model)
    got = method.attribute_tokens(inputs, (1, 7))
    a = [record.attention.mean(1)[0] for record in method.attention_records(inputs, (1, 7))]
    rows = torch.eye(8, dtype=torch.float64)
    for step in (dict(bb=a[0]), dict(bb=a[1]), dict(aa=a[2]), dict(ab=a[3]), dict(aa=a[4]), dict(ab=a[5])):
        rows = joint_step(3, 5, **step) @ rows
    assert_relatively_close(got["input_ids"][0], rows[1, 3:], 1e-9)
    assert_relatively_close(got["decoder_input_ids"][0, [0, 2]], rows[1, [0, 2]], 1e-9)


def last_attention(model, ids):
    """Attention of the last block of ``TinyText`` and what it needs, by hand: ``(A, its graph, logits)``."""
    x = model.embed(ids)
    for block in model.blocks:
        b, n, c = x.shape
        q, k, v = block.qkv(block.norm1(x)).reshape(b, n, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        attention.retain_grad()
        x = x + block.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
        x = x + block.mlp(block.norm2(x))
    return attention, model.head(x)


@pytest.mark.parametrize("average", ["row", "map"])
def test_attention_gradcam_formula(average):
    model = randomise(TinyText().double())
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    attention, logits = last_attention(model, ids)
    logits[:, 4, 3].sum().backward()
    gradient, attention = attention.grad, attention.detach()
    others = [j for j in range(6) if j != 4]
    # Rows other than the read-out row have no gradient here, so the mean over the map is the row's over the number of
    # rows.
    head = gradient[:, :, 4, others].mean(-1) if average == "row" else gradient.mean((-2, -1))
    want = (attention[:, :, 4] * head[..., None]).mean(1).clamp(min=0)
    assert (want > 0).any() and (want == 0).any()
    got = AttentionGradCam(model, average=average).attribute_tokens(ids, (4, 3))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arguments", [{"reg_tokens": 3}, {"reg_tokens": 2, "no_embed_class": True}, "distilled"])
def test_attention_gradcam_reads_patch_columns(arguments):
    """CVPR 2021: a head's weight is the mean of ∇A over the patches; registers and a distillation token are none."""
    shape = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    distilled = arguments == "distilled"
    build = timm.models.deit.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
    model = randomise(build(**shape, **({} if distilled else arguments)).double())
    for block in model.blocks:
        block.attn.fused_attn = False
    maps = []
    handle = model.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out))
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logit = model(images)[:, 1].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, maps)
    rows = slice(0, 2 if distilled else 1)
    attention, gradient = (t.detach()[:, :, rows, -6:] for t in (maps[0], gradient))
    want = (attention * gradient.mean(-1, keepdim=True)).mean((1, 2)).clamp(min=0)
    got = AttentionGradCam(model).attribute_tokens(images, 1).flatten(1)
    assert want.max() > 0 and torch.allclose(got, want, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("fused", [True, False])
def test_lrp_grid_of_a_model_without_class_token(fused):
    """Queries times keys of such a model lie on the patch grid twice; the tokens are the patches all the same."""
    model = timm.models.VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=12, depth=1, num_heads=2, class_token=False, global_pool="avg"
    )
    randomise(model.double()).blocks[0].attn.fused_attn = fused
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    method = TransformerLRP(model)
    pixels, tokens = method.attribute(images, 1), method.attribute_tokens(images, 1)
    patches = pixels.reshape(2, 3, 2, 8, 3, 8).sum((1, 3, 5))
    torch.testing.assert_close(tokens, patches)


@pytest.mark.parametrize("average", ["row", "map"])
def test_attention_gradcam_ignores_padding(average):
    assert_padding_changes_nothing(lambda model: AttentionGradCam(model, average=average).attribute_tokens)


def test_one_layer_of_the_full_method():
    """With one block, the method cut down to its last layer is the method."""
    model = randomise(TinyViT(depth=1).double())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    full = TransformerRelevance(model).attribute_tokens(images, 1)
    cut = PartialLRP(model, with_gradient=True).attribute_tokens(images, 1)
    assert torch.allclose(full, cut, rtol=1e-12, atol=1e-12) and full.abs().max() > 0


class TwoTowers(nn.Module):
    """Text and image encoders of different depth, compared by a dot product."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.text = nn.Sequential(Block(width, 2), Block(width, 2))
        self.vision = nn.Sequential(Block(width, 2), Block(width, 2), Block(width, 2))

    def forward(self, ids, pixels):
        text = self.text(self.embed(ids))[:, -1]
        image = self.vision(self.patches(pixels).flatten(2).transpose(1, 2))[:, 0]
        return (text * image).sum(-1)


def test_every_stream_has_its_own_last_layer():
    model = randomise(TwoTowers().double())
    ids, pixels = torch.randint(0, 20, (2, 5)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    inputs = {"ids": ids, "pixels": pixels}
    records = {r.name: r.attention for r in AttentionRollout(model).attention_records(inputs)}
    for layer in (-1, 0):
        got = RawAttention(model, layer=layer).attribute_tokens(inputs)
        text = records[f"text.{range(2)[layer]}"].mean(1)[:, -1]
        image = records[f"vision.{range(3)[layer]}"].mean(1)[:, 0]
        assert torch.allclose(got["ids"], text, rtol=1e-9, atol=1e-12)
        assert torch.allclose(got["pixels"].flatten(1), image, rtol=1e-9, atol=1e-12)


def test_queries_that_have_read_the_image_are_none_of_its_tokens():
    """The layers of a detector's image are those of the encoder and the cross-attentions, not the queries' own."""
    model = published("detr_generic_attention", T.DetrForObjectDetection, T.DetrConfig, T.ResNetConfig)[1]
    pixels = {
        "pixel_values": torch.randn(2, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    }
    target = [(1, 2), (3, 0)]
    records = AttentionRelevance(model).attention_records(pixels, target)
    maps = [r.attention.mean(1) for r in records if r.name.endswith("encoder_attn")]
    assert len(maps) > 1
    for layer, map_ in enumerate(maps):
        got = RawAttention(model, layer=layer - len(maps)).attribute_tokens(pixels, target)["pixel_values"]
        want = torch.stack([map_[i, query] for i, (query, _) in enumerate(target)])
        assert torch.allclose(got.flatten(1), want, rtol=1e-9, atol=1e-12)


def test_bad_options():
    model = randomise(TinyViT())
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(InputError, match="layer=5: .* 2 attention calls"):
        RawAttention(model, layer=5).attribute(images, 0)
    with pytest.raises(InputError, match="average='mean': choose one of row, map"):
        AttentionGradCam(model, average="mean")


def test_tokens_without_a_way_to_the_input_are_refused():
    """LeViT shrinks its grid by attention without a residual: a later layer's tokens have no place in the image."""
    model = randomise(timm.create_model("levit_128s", num_classes=3).double())
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    for method in (RawAttention, AttCAT):
        with pytest.raises(UnsupportedModelError, match="followed to the input"):
            method(model).attribute(images, target=1)
    assert AttentionRollout(model).attribute(images, target=1).abs().sum() > 0


def test_the_token_that_is_read_out_keeps_what_attention_brings_to_it():
    """Of a causal model's last token the rollout has the identity's share, 1/2 per layer; no more is taken out."""
    config = T.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    model = randomise(T.LlamaForCausalLM._from_config(config, attn_implementation="eager")).double()
    ids = torch.tensor([[3, 7, 1, 12, 5], [2, 2, 9, 4, 11]])
    rollout = torch.eye(5, dtype=torch.float64)
    for attention in model(ids, output_attentions=True).attentions:
        rollout = (attention.mean(1) + torch.eye(5)) / 2 @ rollout
    want = rollout[:, -1]
    want[:, -1] -= 0.5**3
    got = AttentionRollout(model).attribute_tokens({"input_ids": ids}, target=(-1, 3))["input_ids"]
    # transformers computes the softmax in float32.
    assert (got - want).abs().max() < 1e-6 and (got > 0).all()
