"""Small language models from configurations, and a tokenizer whose pieces are words."""

import torch
import transformers

WORDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WORDS, **SIZE, "num_key_value_heads": 2, "max_position_embeddings": 32}


def build(model_class, config, dtype=torch.float64, experts="eager"):
    """A seeded model whose weights and biases all matter; float64 needs the experts one by one."""
    torch.manual_seed(0)
    config._experts_implementation = experts
    model = model_class(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(dtype)
    return model


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "why", "is", "the", "sky", "blue"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer
