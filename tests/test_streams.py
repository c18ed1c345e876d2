"""Streams found in graphs of all shapes, on models written out here; schedules and scores against the rules by hand."""

import pytest
import timm
import torch
import transformers
from hand_rules import Relations
from small_hf_models import LLAMA, VISION, build, ids, noise
from tiny_models import randomise
from torch import nn

from captum_transformer_attr import AttentionRelevance, TransformerRelevance
from captum_transformer_attr.flow.stream_finder import find_streams
from captum_transformer_attr.recording.inputs import parse
from captum_transformer_attr.recording.session import recorded

WIDTH = 16


class Ask(nn.Module):
    """Attention of ``x`` over ``y``; ``maps`` keeps what it computed, in the order of the calls."""

    def __init__(self, width=WIDTH, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.maps = []

    def forward(self, x, y=None):
        y = self.norm(x) if y is None else y
        q, k, v = (
            f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, t in ((self.q, self.norm(x)), (self.k, y), (self.v, y))
        )
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        self.maps.append(p)
        return self.o((p @ v).transpose(1, 2).flatten(2))


class Mix(nn.Module):
    """A token-wise MLP with its norm."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return self.layers(x)


def made(cls, *args):
    return randomise(cls(*args).double())


def tokens(n, seed=0, batch=2):
    return torch.randn(batch, n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def briefs(model, inputs, target=0):
    return [step.brief for step in AttentionRelevance(model).schedule(inputs, target)]


def hand_maps(model, inputs, i, target=0):
    """Averaged ∇A ⊙ A of one example per attention module, in the order of its calls."""
    asks = {name: m for name, m in model.named_modules() if isinstance(m, Ask)}
    for m in asks.values():
        m.maps.clear()
    output = model(**{name: t[i : i + 1] for name, t in inputs.items()})
    flat = [(name, p) for name, m in asks.items() for p in m.maps]
    gradients = torch.autograd.grad(output[0, target], [p for _, p in flat])
    found = {name: [] for name in asks}
    for (name, p), g in zip(flat, gradients, strict=True):
        found[name].append((p * g)[0].clamp(min=0).mean(0).detach())
    return found


def close(got, want, tolerance=1e-10):
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# ---------------------------------------------------------------------- cross-attention in all positions
class Shared(nn.Module):
    """One cross-attention module for both directions, used in two layers: four calls of it."""

    def __init__(self):
        super().__init__()
        self.cross, self.own = Ask(), Ask()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a, b):
        for _ in range(2):
            a, b = a + self.cross(a, b), b + self.cross(b, a)
            a, b = a + self.own(a), b + self.own(b)
        return self.head(a[:, 0])


def test_shared_modules_and_values_from_before_the_layer():
    model, inputs = made(Shared), {"a": tokens(3), "b": tokens(5, 1)}
    hand = ["a <- b: 10", "b <- a: 10", "a: 6, 7", "b: 6, 7", "a <- b: 10, 11", "a: 6, 7"]
    assert briefs(model, inputs) == hand
    got = AttentionRelevance(model).attribute_tokens(inputs, 0)
    for i in range(2):
        maps = hand_maps_up_to(model, inputs, i, {"cross": 3, "own": 3})
        r = Relations(a=3, b=5)
        before = {s: dict(r.R[s]) for s in "ab"}
        r.ask("a", "b", maps["cross"][0])
        asked = r.R["a"]
        r.R["a"] = before["a"]
        r.ask("b", "a", maps["cross"][1])
        r.R["a"] = asked
        r.own("a", maps["own"][0])
        r.own("b", maps["own"][1])
        r.ask("a", "b", maps["cross"][2])
        r.own("a", maps["own"][2])
        close(got["a"][i], r.row("a", 0, "a"))
        close(got["b"][i], r.row("a", 0, "b"))


def hand_maps_up_to(model, inputs, i, used):
    """``hand_maps`` for modules whose last calls the output does not depend on."""
    asks = {name: m for name, m in model.named_modules() if isinstance(m, Ask)}
    for m in asks.values():
        m.maps.clear()
    output = model(**{name: t[i : i + 1] for name, t in inputs.items()})
    flat = [(name, p) for name, m in asks.items() for p in m.maps[: used[name]]]
    gradients = torch.autograd.grad(output[0, 0], [p for _, p in flat])
    found = {name: [] for name in asks}
    for (name, p), g in zip(flat, gradients, strict=True):
        found[name].append((p * g)[0].clamp(min=0).mean(0).detach())
    return found


class Patches(nn.Module):
    """A decoder that reads the encoder's tokens without the class token; ``order`` shuffles them first."""

    def __init__(self, order=None):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder, self.mix, self.own, self.cross = Ask(), Mix(), Ask(), Ask()
        self.head = nn.Linear(WIDTH, 3)
        self.order = order

    def forward(self, image, text):
        x = torch.cat([self.cls.expand(len(image), -1, -1), image], 1)
        x = x + self.encoder(x)
        x = x + self.mix(x)
        read = x[:, 1:] if self.order is None else x[:, self.order]
        text = text + self.own(text)
        text = text + self.cross(text, read)
        return self.head(text[:, -1])


@pytest.mark.parametrize("order", [None, [3, 1, 4]])
def test_only_some_tokens_are_asked(order):
    model, inputs = made(Patches, order), {"image": tokens(5), "text": tokens(3, 1)}
    assert briefs(model, inputs) == ["image: 6", "text: 6", "text <- image: 10"]
    got = AttentionRelevance(model).attribute_tokens(inputs, 0)
    for i in range(2):
        maps = hand_maps(model, inputs, i)
        r = Relations(v=6, t=3)
        r.own("v", maps["encoder"][0])
        r.own("t", maps["own"][0])
        columns = list(range(1, 6)) if order is None else order
        wide = torch.zeros(3, 6, dtype=torch.float64)
        wide[:, columns] = maps["cross"][0]
        r.ask("t", "v", wide)
        close(got["image"][i], r.row("t", 2, "v")[1:])
        close(got["text"][i], r.row("t", 2, "t"))


class Parallel(nn.Module):
    """Self- and two cross-attentions beside each other, all reading the same moment."""

    def __init__(self):
        super().__init__()
        self.first, self.own, self.left, self.right, self.mix = Ask(), Ask(), Ask(), Ask(), Mix()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, y, z):
        x = x + self.first(x)
        x = x + self.own(x) + self.left(x, y) + self.right(x, z) + self.mix(x)
        return self.head(x[:, 1])


def test_parallel_attentions():
    model, inputs = made(Parallel), {"x": tokens(3), "y": tokens(4, 1), "z": tokens(5, 2)}
    assert briefs(model, inputs) == ["x: 6", "x: 6", "x <- y: 10", "x <- z: 10"]
    got = AttentionRelevance(model).attribute_tokens(inputs, 0)
    for i in range(2):
        maps = hand_maps(model, inputs, i)
        r = Relations(x=3, y=4, z=5)
        r.own("x", maps["first"][0])
        old = dict(r.R["x"])
        hat = r.normalised("x")
        new = {"x": old["x"] + maps["own"][0] @ old["x"], "y": hat.T @ maps["left"][0], "z": hat.T @ maps["right"][0]}
        row = new["x"][1].clone()
        row[1] -= 1
        for name, want in (("x", row), ("y", new["y"][1]), ("z", new["z"][1])):
            close(got[name][i], want)


class Resampler(nn.Module):
    """Learned queries read an image, ask one another before and after it; a text reads them."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 3, WIDTH))
        self.before, self.look, self.after = Ask(), Ask(), Ask()
        self.own, self.cross = Ask(), Ask()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, image, text):
        q = self.queries.repeat(len(image), 1, 1)
        q = q + self.before(q)
        q = q + self.look(q, image)
        q = q + self.after(q)
        text = text + self.own(text)
        text = text + self.cross(text, q)
        return self.head(text[:, -1])


def test_learned_queries_in_between():
    model, inputs = made(Resampler), {"image": tokens(6), "text": tokens(4, 1)}
    hand = ["queries: 6", "queries <- image: 10", "queries: 6, 7", "text: 6", "text <- queries: 10, 11"]
    assert briefs(model, inputs) == hand
    got = AttentionRelevance(model).attribute_tokens(inputs, 0)
    for i in range(2):
        maps = hand_maps(model, inputs, i)
        r = Relations(v=6, q=3, t=4)
        r.own("q", maps["before"][0])
        r.ask("q", "v", maps["look"][0])
        r.own("q", maps["after"][0])
        r.own("t", maps["own"][0])
        r.ask("t", "q", maps["cross"][0])
        close(got["image"][i], r.row("t", 3, "v"))
        close(got["text"][i], r.row("t", 3, "t"))


class Derived(nn.Module):
    """Tokens that are joined from two encoders, read by a decoder: relevance goes on below the joint."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.joint, self.own, self.cross = (Ask() for _ in range(5))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a, b, text):
        joint = torch.cat([a + self.left(a), b + self.right(b)], 1)
        joint = joint + self.joint(joint)
        text = text + self.own(text)
        return self.head((text + self.cross(text, joint))[:, -1])


def test_a_joint_stream_leads_back_to_both():
    model, inputs = made(Derived), {"a": tokens(3), "b": tokens(2, 1), "text": tokens(4, 2)}
    assert briefs(model, inputs) == ["a: 6", "b: 6", "a+b: 6", "text: 6", "text <- a+b: 10"]
    got = AttentionRelevance(model).attribute_tokens(inputs, 0)
    for i in range(2):
        maps = hand_maps(model, inputs, i)
        r, left, right = Relations(j=5, t=4), Relations(a=3), Relations(b=2)
        left.own("a", maps["left"][0])
        right.own("b", maps["right"][0])
        r.own("j", maps["joint"][0])
        r.own("t", maps["own"][0])
        r.ask("t", "j", maps["cross"][0])
        row = r.row("t", 3, "j")
        close(got["a"][i], row[:3] @ left.R["a"]["a"])
        close(got["b"][i], row[3:] @ right.R["b"]["b"])


# ---------------------------------------------------------------------- torch's own layers
class TorchDecoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        settings = dict(d_model=WIDTH, nhead=2, dim_feedforward=24, batch_first=batch_first, norm_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**settings), 2)
        self.head = nn.Linear(WIDTH, 3)
        self.batch_first = batch_first

    def forward(self, source, text):
        if not self.batch_first:
            source, text = source.transpose(0, 1), text.transpose(0, 1)
        x = self.decoder(text, self.encoder(source))
        return self.head(x[:, -1] if self.batch_first else x[-1])


def test_sequence_first_is_batch_first():
    inputs = {"source": tokens(5), "text": tokens(3, 1)}
    models = [made(TorchDecoder, batch_first) for batch_first in (True, False)]
    asks = "text <- source: 10"
    assert briefs(models[1], inputs) == ["source: 6"] * 2 + ["text: 6", asks, "text: 6, 7", asks]
    first, second = (AttentionRelevance(m).attribute_tokens(inputs, 1) for m in models)
    for name in inputs:
        close(second[name], first[name])


# ---------------------------------------------------------------------- self-attention in all shapes
@pytest.mark.parametrize(
    "name, settings, calls",
    [
        (
            "swin_tiny_patch4_window7_224",
            dict(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2)),
            4,
        ),
        ("pvt_v2_b0", dict(depths=(1, 1, 1, 1), embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1)), 4),
        ("cait_xxs24_224", dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2), 4),
    ],
)
def test_windows_reduced_keys_and_class_attention_are_self_attention(name, settings, calls):
    model = randomise(timm.create_model(name, num_classes=4, **settings).double())
    images = noise(2, 3, 32, 32)
    schedule = AttentionRelevance(model).schedule(images, 0)
    assert [step.rules for step in schedule] == [(6,)] * calls
    # One tower: the last layer is the last call of all, not of every stage.
    last = AttentionRelevance(model, -1).schedule(images, 0)
    assert [step.rules for step in last] == [()] * (calls - 1) + [(6,)]
    # With LRP relevance rule 6 is the CVPR 2021 method, which knows no streams.
    got = AttentionRelevance(model, use_relevance=True).attribute_tokens(images, 0)
    assert torch.equal(got, TransformerRelevance(model).attribute_tokens(images, 0))


def test_parallel_blocks():
    """GPT-J adds attention and MLP to the same trunk."""
    config = transformers.GPTJConfig(
        n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=64, n_positions=16, rotary_dim=4
    )
    model = build(transformers.GPTJForCausalLM, config, "eager")
    inputs = {"input_ids": ids(5)}
    assert briefs(model, inputs, (4, 1)) == ["input_ids: 6"] * 2


def test_a_tower_below_a_language_model_counts_with_it():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_id=63,
    )
    text = ids(7)
    text[:, 1:5] = 63
    inputs = {"pixel_values": noise(2, 3, 16, 16), "input_ids": text}
    model = build(transformers.LlavaForConditionalGeneration, config)
    steps = AttentionRelevance(model, -1).schedule(inputs, (6, 1))
    assert [step.rules for step in steps] == [(), (), (6,)]


# ---------------------------------------------------------------------- memory
def test_only_the_matrices_that_the_row_needs():
    """The last updates are rows; a decoder without self terms needs no matrix of its own."""
    from captum_transformer_attr.flow.bimodal import Relations as Found
    from captum_transformer_attr.flow.bimodal import Rules

    model, inputs = made(TorchDecoder, True), {"source": tokens(5), "text": tokens(3, 1)}
    with recorded(model, parse(inputs)) as recording:
        recording.select(0)
        streams = find_streams(recording)
        attentions = [call.attention for call in streams.crossing]
        asked = {call.attention for call in streams.crossing if call.update.stream.name == "text"}
        origins = {call.key.stream for call in streams.crossing}

        def matrices(rules):
            relations = Found(streams.crossing, attentions, lambda node, rows: node.value, 2, rules)
            return sorted((s.stream.name, p.name) for s, p in relations.needed(asked, origins))

        # Encoder after both layers; decoder after the first self-attention, the first layer, the second self-attention.
        text = [("text", "source"), ("text", "text")]
        assert matrices(Rules()) == sorted([("source", "source")] * 2 + text[1:] * 3 + text[:1])
        assert ("text", "source") in matrices(Rules(self_terms=False))
        assert matrices(Rules(self_terms=False)).count(("source", "source")) == 0
