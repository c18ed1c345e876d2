"""Language models: completeness over families, masks and padding, half precision, contrasts, generated tokens, chats,
adapters."""

import pytest
import torch
import transformers as T
from small_language_models import LLAMA, SIZE, WORDS, build, word_tokenizer

from benchmarks.data_folder import data_folder
from captum_transformer_attr import (
    AttentionRelevance,
    Contrast,
    InputError,
    TargetError,
    TransformerLRP,
    TransformerRelevance,
)
from captum_transformer_attr.generation import explain_generation
from captum_transformer_attr.prompts import prompt_inputs

DATA = data_folder()
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SOFT = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
GPT2 = {**WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}

CAUSAL = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**LLAMA)),
    "mistral": (T.MistralForCausalLM, T.MistralConfig(**LLAMA, sliding_window=4)),
    "gemma2": (T.Gemma2ForCausalLM, T.Gemma2Config(**LLAMA, **SOFT)),
    "gemma3": (T.Gemma3ForCausalLM, T.Gemma3TextConfig(**LLAMA, **SOFT)),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config(**LLAMA, head_dim=8)),
    "olmo2": (T.Olmo2ForCausalLM, T.Olmo2Config(**LLAMA)),
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config(**GPT2)),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**WORDS, **SIZE, max_position_embeddings=32)),
    "mixtral": (T.MixtralForCausalLM, T.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (T.Qwen3MoeForCausalLM, T.Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=8)),
}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
TARGET = (8, 5)


@pytest.fixture(scope="module")
def llama():
    return build(*CAUSAL["llama"])


# ---------------------------------------------------------------------- completeness
@pytest.mark.parametrize("family", CAUSAL)
def test_completeness(family):
    model = build(*CAUSAL[family])
    logit = model(IDS).logits[:, 8, 5].detach()
    for rules in ("cp", "libra"):
        relevance, delta = TransformerLRP(model, rules).attribute(IDS, TARGET, return_convergence_delta=True)
        assert relevance.shape == IDS.shape and delta.abs().max() < 1e-6
        taken = sum(TransformerLRP(model, rules).parameter_relevance(IDS, TARGET).values())
        # Parts of these models (RMSNorm, rotary embedding, router) are computed in float32 whatever the dtype.
        assert torch.allclose(relevance.sum(1) + taken, logit, atol=1e-5)
    delta = TransformerLRP(model).attribute(IDS, TARGET, return_convergence_delta=True)[1]
    assert delta.abs().max() < 1e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_grouped_experts(family):
    """transformers' grouped matrix products against its loop over experts, in float32."""
    one, grouped = (build(*CAUSAL[family], dtype=torch.float32, experts=e) for e in ("eager", "grouped_mm"))
    for rules in ("deep_taylor", "attnlrp", "cp", "libra"):
        want, got = (TransformerLRP(m, rules).attribute(IDS, TARGET) for m in (one, grouped))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    want, got = (TransformerRelevance(m).attribute(IDS, TARGET) for m in (one, grouped))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoder(family):
    if family == "bart":
        sizes = {"d_model": 32, **{f"{part}_layers": 2 for part in ("encoder", "decoder")}}
        sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        sizes |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
        model = build(T.BartForConditionalGeneration, T.BartConfig(**WORDS, **sizes, max_position_embeddings=32))
    else:
        config = T.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = build(T.T5ForConditionalGeneration, config)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4], "use_cache": False}
    logit = model(**inputs).logits[:, 3, 5].detach()
    for rules in ("cp", "libra"):
        relevance, delta = TransformerLRP(model, rules).attribute(inputs, (3, 5), return_convergence_delta=True)
        assert delta.abs().max() < 1e-6
        assert all(relevance[name].abs().max() > 0 for name in ("input_ids", "decoder_input_ids"))
        taken = sum(TransformerLRP(model, rules).parameter_relevance(inputs, (3, 5)).values())
        assert torch.allclose(sum(r.sum(1) for r in relevance.values()) + taken, logit, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- masks
@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_the_future_gets_nothing(llama, rules):
    relevance = TransformerLRP(llama, rules).attribute(IDS, (4, 5))
    assert (relevance[:, 5:] == 0).all() and (relevance[:, :5] != 0).all()
    assert torch.allclose(
        relevance[:, :5], TransformerLRP(llama, rules).attribute(IDS[:, :5], (4, 5)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_sliding_window(rules):
    """With one layer and a window of 4 a position sees itself and three before."""
    config = T.MistralConfig(**{**LLAMA, "num_hidden_layers": 1}, sliding_window=4)
    relevance = TransformerLRP(build(T.MistralForCausalLM, config), rules).attribute(IDS, TARGET)
    assert (relevance[:, :5] == 0).all() and (relevance[:, 5:] != 0).all()


@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_padding_on_the_left(llama, rules):
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    padded = TransformerLRP(llama, rules).attribute(inputs, TARGET)["input_ids"]
    alone = TransformerLRP(llama, rules).attribute(IDS[1:, 4:], (4, 5))
    assert torch.allclose(padded[1:, 4:], alone, rtol=1e-9, atol=1e-12) and (padded[1, :4] == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cache_and_attention_implementation(llama, implementation):
    """Neither the key-value cache nor the fused kernel changes anything."""
    config = T.LlamaConfig(**LLAMA)
    config._attn_implementation = implementation
    model = build(T.LlamaForCausalLM, config)
    want = TransformerLRP(llama, "attnlrp").attribute({"input_ids": IDS, "use_cache": False}, TARGET)["input_ids"]
    for cache in (True, False):
        got = TransformerLRP(model, "attnlrp").attribute({"input_ids": IDS, "use_cache": cache}, TARGET)["input_ids"]
        assert torch.allclose(got, want, atol=1e-6)


# ---------------------------------------------------------------------- half precision
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["deep_taylor", "attnlrp", "cp", "libra", AttentionRelevance, TransformerRelevance])
def test_half_precision(dtype, method):
    """A model in half precision explains itself like the same weights in float32."""
    half = build(*CAUSAL["llama"], dtype=dtype)
    single = build(*CAUSAL["llama"], dtype=dtype).float()

    def run(model):
        return (TransformerLRP(model, method) if isinstance(method, str) else method(model)).attribute(IDS, TARGET)

    got, want = run(half), run(single)
    assert torch.isfinite(got).all() and want.abs().max() > 0
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


# ---------------------------------------------------------------------- contrasts
@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp", "cp", "libra"])
def test_contrast(llama, rules):
    method = TransformerLRP(llama, rules)
    target = Contrast((8, 5), [(8, 7), (3, 9)])
    got, delta = method.attribute(IDS, target, return_convergence_delta=True)
    want = method.attribute(IDS, (8, 5)) - method.attribute(IDS, [(8, 7), (3, 9)])
    assert torch.allclose(got, want, atol=1e-8) and got.abs().max() > 0
    if rules != "attnlrp":
        assert delta.abs().max() < 1e-6


def test_contrast_of_a_head_that_computes_the_difference(llama):
    """The gradient of a difference of logits is that of a head with the difference of their weights."""
    other = build(*CAUSAL["llama"])
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    other.lm_head.weight.data[5] -= llama.lm_head.weight.data[7]
    for method in (AttentionRelevance, lambda m: TransformerLRP(m, "libra")):
        got = method(llama).attribute(IDS, Contrast((8, 5), (8, 7)))
        assert torch.allclose(got, method(other).attribute(IDS, (8, 5)), atol=1e-7)


def test_bad_contrast(llama):
    with pytest.raises(TargetError, match="target=99"):
        TransformerLRP(llama).attribute(IDS, Contrast((8, 5), 99))


# ---------------------------------------------------------------------- generated tokens, chats
@pytest.mark.parametrize("rules", ["deep_taylor", "attnlrp"])
def test_every_generated_token(llama, rules):
    method = TransformerLRP(llama, rules)
    generated = llama.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    found = explain_generation(method, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, generated)
    for step in range(3):
        prefix = generated[:, : 9 + step]
        want = method.attribute(prefix, [(8 + step, int(t)) for t in generated[:, 9 + step]])
        assert torch.allclose(found.scores["input_ids"][:, step, : 9 + step], want, atol=1e-6)
    with pytest.raises(InputError, match="targets is empty"):
        method.attribute_tokens_each(IDS, [])


def test_prompts_and_chats(llama):
    tokenizer = word_tokenizer()
    chats = [[{"role": "user", "content": "why is the sky blue"}], [{"role": "user", "content": "why"}]]
    inputs = prompt_inputs(tokenizer, chats)
    assert inputs["input_ids"].tolist() == [[3, 5, 6, 7, 8, 9, 4], [0, 0, 0, 0, 3, 5, 4]]
    assert inputs["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3]
    assert torch.equal(prompt_inputs(tokenizer, chats[0])["input_ids"], inputs["input_ids"][:1])
    assert prompt_inputs(tokenizer, "the sky")["input_ids"].tolist() == [[7, 8]]
    relevance = TransformerLRP(llama, "cp").attribute(inputs, (-1, 6))["input_ids"]
    assert (relevance[1, :4] == 0).all() and relevance.abs().max() > 0


def test_bad_prompts():
    tokenizer = word_tokenizer(template=None)
    with pytest.raises(InputError, match="no chat template"):
        prompt_inputs(tokenizer, [{"role": "user", "content": "why"}])
    with pytest.raises(InputError, match="prompts is empty"):
        prompt_inputs(tokenizer, [])
    with pytest.raises(InputError, match="number 1 holds no token"):
        prompt_inputs(tokenizer, ["sky", ""])


# ---------------------------------------------------------------------- adapters, quantised layers
def test_lora_adapter(llama):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(build(*CAUSAL["llama"]), config).eval()
    for rules in ("cp", "libra"):
        relevance, delta = TransformerLRP(adapted, rules).attribute(IDS, TARGET, return_convergence_delta=True)
        assert delta.abs().max() < 1e-6
        # The rules of cp and libra are linear in linear layers: an adapter beside a weight is the sum of both.
        merged = TransformerLRP(peft.get_peft_model(build(*CAUSAL["llama"]), config).eval(), rules)
        merged.forward_func.load_state_dict(adapted.state_dict())
        merged.forward_func = merged.forward_func.merge_and_unload()
        assert torch.allclose(relevance, merged.attribute(IDS, TARGET), atol=1e-6)
    assert not torch.allclose(relevance, TransformerLRP(llama, "libra").attribute(IDS, TARGET), atol=1e-3)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers(kind):
    """Explained as linear layers with the weights that the integers stand for; the model's own forward is put back."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.LlamaConfig(**WORDS, **sizes)
    model, reference = (build(T.LlamaForCausalLM, config, torch.float32) for _ in range(2))
    options = {"compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "proj" in path:
            layer = getattr(bitsandbytes.nn, kind)(module.in_features, module.out_features, bias=False, **options)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(path, layer.to("cpu"))
            layer.eval()
            weight = layer(torch.eye(module.in_features)).detach().T.float()
            reference.get_submodule(path).weight.data = weight
    for rules in ("deep_taylor", "libra"):
        got, delta = TransformerLRP(model, rules).attribute(IDS, TARGET, return_convergence_delta=True)
        want = TransformerLRP(reference, rules).attribute(IDS, TARGET)
        assert (got - want).abs().max() < 1e-3 * want.abs().max()
        assert delta.abs().max() < 1e-4
    assert not any("forward" in vars(m) for m in model.modules())


# ---------------------------------------------------------------------- a real model
def test_stories():
    """On a trained Llama the name that the story is about gets the most positive relevance for being repeated."""
    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set CTA_DATA)")
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = prompt_inputs(
        tokenizer, "Once upon a time, there was a little girl named Lily. She loved to play outside. One day,"
    )
    with torch.no_grad():
        chosen = int(model(**inputs).logits[0, -1].argmax())
    for rules in ("attnlrp", "libra"):
        relevance, delta = TransformerLRP(model, rules).attribute(inputs, (-1, chosen), return_convergence_delta=True)
        assert torch.isfinite(relevance["input_ids"]).all()
        if rules == "libra":
            assert delta.abs().max() < 1e-4
