"""TokenTM against its formula, token by token with plain loops; what it refuses."""

import math

import pytest
import timm
import torch
import transformers as T
from golden_models import assert_padding_changes_nothing
from tiny_models import Block, TinyText, TinyViT, randomise
from torch import nn

from captum_transformer_attr import InputError, TokenTM

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64)
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LLAMA = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}


# ---------------------------------------------------------------------- the formula
def length(vector):
    return math.sqrt(sum(v**2 for v in vector.tolist()))


def weights(entering, leaving):
    """(|ẽ| / |e|) · NECC of every token of one example, ``(N, C)`` each."""
    cosines = [
        sum(a * b for a, b in zip(e.tolist(), t.tolist(), strict=True)) / (length(e) * length(t))
        for e, t in zip(entering, leaving, strict=True)
    ]
    mean = sum(math.exp(c) for c in cosines) / len(cosines)
    return [length(t) / length(e) * math.exp(c) / mean for e, t, c in zip(entering, leaving, cosines, strict=True)]


def product(layers, first):
    """C and what of it is no attention's, for one example.

    layers: per block attention and its gradient ``(H, N, N)``, the tokens that enter and leave attention and
        feed-forward, ``(N, C)`` each; None where the feed-forward layer has no factor.
    first: the tokens that enter the first block.
    """
    tokens = len(first)
    c = torch.diag(torch.tensor([length(e) for e in first], dtype=torch.float64))
    own = c.clone()
    for a, g, (e, values), (before, after) in layers:
        w, heads = weights(e, values), len(a)
        u = torch.eye(tokens, dtype=torch.float64)
        for i in range(tokens):
            for j in range(tokens):
                u[i, j] += sum(max(0.0, (a[h, i, j] * g[h, i, j]).item()) for h in range(heads)) / heads * w[j]
        ffn = [0.0] * tokens if after is None else weights(before, after)
        ffn = torch.diag(1 + torch.tensor(ffn, dtype=torch.float64))
        c, own = ffn @ u @ c, ffn @ own
    return c, own


class Watched:
    """What passed some modules in a forward and what gradient came back, taken with plain hooks."""

    def __init__(self, modules):
        self.inputs, self.outputs = {m: [] for m in modules}, {m: [] for m in modules}
        self.handles = [m.register_forward_hook(self.keep) for m in modules]

    def keep(self, module, args, output):
        if output.requires_grad:
            output.retain_grad()
        self.inputs[module].append(args[0])
        self.outputs[module].append(output)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def close(got, want, tolerance=1e-9):
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() < tolerance * want.abs().max()


# ---------------------------------------------------------------------- against the formula
@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("entering", ["projection", "trunk"])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "class_token": False, "init_values": 0.5}])
def test_vit(options, entering, feed_forward):
    """Class token and mean pooling; what a block adds is taken behind its layer scale."""
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, num_classes=5, embed_dim=8, depth=3, num_heads=2, **options
    )
    model = randomise(model).double()
    got = TokenTM(model, entering, feed_forward).attribute_tokens(IMAGES, target=[2, 4])
    for block in model.blocks:
        block.attn.fused_attn = False  # so that the maps can be watched from outside
    first = model.blocks[0].norm1
    ways_in = [(b.norm1, b.norm2) if entering == "trunk" else (b.attn.qkv, b.mlp.fc1) for b in model.blocks]
    parts = [(b.attn.attn_drop, b.attn.qkv, b.ls2, *way) for b, way in zip(model.blocks, ways_in, strict=True)]
    watched = Watched({first, *(m for block in parts for m in block)})
    model(IMAGES)[[0, 1], [2, 4]].sum().backward()
    watched.remove()
    prefix = model.num_prefix_tokens
    for example in range(2):
        layers = []
        for drop, qkv, scale, *way in parts:
            a, (to_attention, to_mlp) = watched.outputs[drop][0], (watched.inputs[m][0][example] for m in way)
            values = watched.outputs[qkv][0][example, :, -8:]
            added = watched.outputs[scale][0][example] if feed_forward else None
            layers.append((a[example], a.grad[example], (to_attention, values), (to_mlp, added)))
        c, own = product(layers, watched.inputs[first][0][example])
        rows = (c - own)[:1] if prefix else c - own
        close(got[example].flatten(), rows.mean(0)[prefix:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_bert(implementation):
    """Post-norm; padding takes part in no mean and gets nothing."""
    config = T.BertConfig(**SIZES, num_labels=3, attn_implementation=implementation)
    model = randomise(T.BertForSequenceClassification(config)).double()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = {"input_ids": torch.randint(3, 30, (2, 6)) * mask, "attention_mask": mask}
    got = TokenTM(model).attribute(inputs, target=1)["input_ids"]
    model.set_attn_implementation("eager")
    blocks = model.bert.encoder.layer
    parts = [(b.attention.self.value, b.intermediate.dense, b.output.dense) for b in blocks]
    watched = Watched([m for block in parts for m in block])
    out = model(**inputs, output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    out.logits[:, 1].sum().backward()
    watched.remove()
    for example, n in enumerate((6, 4)):
        layers = [
            (
                a[example, :, :n, :n],
                a.grad[example, :, :n, :n],
                (watched.inputs[value][0][example, :n], watched.outputs[value][0][example, :n]),
                (watched.inputs[first][0][example, :n], watched.outputs[last][0][example, :n]),
            )
            for a, (value, first, last) in zip(out.attentions, parts, strict=True)
        ]
        c, own = product(layers, watched.inputs[parts[0][0]][0][example, :n])  # post-norm: values read the trunk
        close(got[example, :n], (c - own)[0])
        assert (got[example, n:] == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_llama_repeats_grouped_heads(implementation):
    model = randomise(T.LlamaForCausalLM(T.LlamaConfig(**LLAMA, attn_implementation=implementation)).double())
    ids = torch.randint(3, 30, (1, 6))
    got = TokenTM(model, entering="projection").attribute(ids, target=(5, 3))
    model.set_attn_implementation("eager")
    blocks = model.model.layers
    parts = [(b.self_attn.v_proj, b.mlp.gate_proj, b.mlp.down_proj) for b in blocks]
    watched = Watched([m for block in parts for m in block] + [blocks[0].input_layernorm])
    out = model(ids, output_attentions=True)
    for a in out.attentions:
        a.retain_grad()
    out.logits[0, 5, 3].backward()
    watched.remove()
    layers = []
    for a, (value, first, last) in zip(out.attentions, parts, strict=True):
        one, other = watched.outputs[value][0][0].split(4, -1)
        repeated = torch.cat([one, one, other, other], -1)
        layers.append(
            (
                a[0],
                a.grad[0],
                (watched.inputs[value][0][0], repeated),
                (watched.inputs[first][0][0], watched.outputs[last][0][0]),
            )
        )
    c, own = product(layers, watched.inputs[blocks[0].input_layernorm][0][0])
    close(got[0], (c - own)[5], 1e-5)  # Llama computes its norms in float32


# ---------------------------------------------------------------------- batches, layouts
class Encoder(nn.Module):
    """PyTorch's own post-norm encoder, examples first or second."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(16, 4), batch_first

    def forward(self, x):
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


FEATURES = torch.randn(2, 5, 16, dtype=torch.float64)
CASES = {
    "vit": (TinyViT, IMAGES[:, :, :8, :8], 1),
    "text": (TinyText, torch.randint(0, 20, (2, 6)), (4, 3)),
    "examples first": (lambda: Encoder(True), FEATURES, 2),
    "examples second": (lambda: Encoder(False), FEATURES, 2),
    "flattened linear maps": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)), torch.randint(0, 30, (2, 6)), (5, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_equals_its_examples(case):
    build, inputs, target = CASES[case]
    method = TokenTM(randomise(build()).double())
    together = method.attribute(inputs, target)
    alone = torch.cat([method.attribute(inputs[i : i + 1], target) for i in range(2)])
    assert together.abs().max() > 1e-3
    assert (together - alone).abs().max() <= 1e-12 * together.abs().max()


def test_layouts_do_not_matter():
    first, second = randomise(Encoder(True)).double(), randomise(Encoder(False)).double()
    close(TokenTM(first).attribute(FEATURES, 2), TokenTM(second).attribute(FEATURES, 2))


def test_padding_changes_nothing():
    assert_padding_changes_nothing(lambda model: TokenTM(model).attribute_tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_llama(side):
    model = randomise(T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).double())
    ids, real = torch.randint(3, 30, (2, 7)), slice(3, 7) if side == "left" else slice(0, 4)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got = TokenTM(model).attribute(inputs, [(6, 3), (real.stop - 1, 5)])["input_ids"]
    close(got[1:, real], TokenTM(model).attribute({"input_ids": ids[1:, real]}, [(3, 5)])["input_ids"], 1e-5)
    assert (got[1][mask[1] == 0] == 0).all()


def test_towers_are_followed_apart():
    """CLIP: two sets of tokens, each with a product of its own."""
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    text, vision = {**SIZES, "eos_token_id": 2, "bos_token_id": 1}, {**sizes, "image_size": 16, "patch_size": 8}
    model = randomise(T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))).double()
    ids = torch.randint(3, 30, (2, 5))
    got = TokenTM(model).attribute_tokens({"input_ids": ids, "pixel_values": IMAGES}, target=[0, 1])
    alone = TokenTM(model).attribute_tokens({"input_ids": ids[:1], "pixel_values": IMAGES[:1]}, target=0)
    close(got["input_ids"][:1], alone["input_ids"])
    close(got["pixel_values"][:1], alone["pixel_values"])


# ---------------------------------------------------------------------- refusals
class Convolved(Block):
    """A convolution over neighbouring tokens in the place of the feed-forward layer."""

    def __init__(self):
        super().__init__(16, 2)
        self.mlp = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(1, 2))


def vit_with(build):
    model = TinyViT()
    model.blocks = nn.Sequential(*(build() for _ in range(2)))
    return model


def timm_vit(**options):
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, num_classes=5, embed_dim=8, depth=2, num_heads=2, **options
    )


REFUSED = {
    "windows": (
        lambda: timm.models.SwinTransformer(
            img_size=16, patch_size=2, num_classes=5, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4
        ),
        "module 'layers.0.blocks.0.attn' does not read its block's tokens as they are",
    ),
    "merged tokens": (
        lambda: timm.models.pit.PoolingVisionTransformer(
            img_size=16, patch_size=4, stride=4, stem_type="overlap", base_dims=(8, 8), depth=(1, 1), heads=(1, 2),
            mlp_ratio=2, num_classes=5,
        ),
        "module 'transformers.1.blocks.0.attn' reads other tokens of 'input0'",
    ),
    "cross-attention": (
        lambda: timm_vit(global_pool="map", class_token=False),
        "module 'attn_pool' asks other tokens than its own",
    ),
    "parallel attention and MLP": (
        lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        "module 'blocks.0' joins an attention with another branch",
    ),
    "parallel attentions": (
        lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock),
        "module 'blocks.0' joins an attention with another branch",
    ),
    "convolution": (lambda: vit_with(Convolved), "module 'blocks.0' is no token-wise function"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    build, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        TokenTM(randomise(build()).double()).attribute(IMAGES[:, :, :8, :8] if case == "convolution" else IMAGES, 1)
    assert "TokenTM" in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_values_of_another_width():
    model = T.LlamaForCausalLM(T.LlamaConfig(**LLAMA, head_dim=8))
    with pytest.raises(InputError, match="layers.0.self_attn' has 32 channels, what it was made from 16"):
        TokenTM(randomise(model)).attribute(torch.randint(3, 30, (1, 6)), (5, 3))


def test_refuses_unknown_options():
    with pytest.raises(InputError, match="entering='norm': choose one of projection, trunk"):
        TokenTM(TinyViT(), entering="norm")


def test_without_feed_forward_their_branches_do_not_matter():
    """A convolution beside the trunk is passed by, as in AttentionRelevance."""
    images = IMAGES[:, :, :8, :8]
    assert TokenTM(randomise(vit_with(Convolved)).double(), feed_forward=False).attribute(images, 1).abs().max() > 1e-3


class ResidualHead(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)


def test_residuals_of_the_head_have_no_factor():
    """The same function written with and without a residual behind the read-out."""
    model = TinyViT()
    model.head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    randomise(model).double()
    images = IMAGES[:, :, :8, :8]
    layer = model.head[0]
    residual = ResidualHead(16, 16).double()
    with torch.no_grad():
        residual.weight.copy_(layer.weight - torch.eye(16))
        residual.bias.copy_(layer.bias)
    want = TokenTM(model).attribute(images, 1)
    model.head[0] = residual
    close(TokenTM(model).attribute(images, 1), want)
