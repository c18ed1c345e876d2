"""Long inputs: what a method holds at its peak grows with the tokens, not with their square."""

import pytest
import torch
import transformers
from every_class import CLASSES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import captum_transformer_attr as cta
from captum_transformer_attr.ops import attention

METHODS = {
    **{method.__name__: method for method in CLASSES},
    **{
        f"TransformerLRP {rules}": lambda model, rules=rules: cta.TransformerLRP(model, rules=rules)
        for rules in ("attnlrp", "cp", "libra")  # deep_taylor is the default
    },
}


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at a time, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("name", METHODS)
def test_peak_grows_with_the_tokens(name, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 2**12)  # many blocks of query rows at both lengths
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        max_position_embeddings=2048,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    method = METHODS[name](model)

    def peak(tokens):
        inputs = {"input_ids": torch.randint(0, 50, (1, tokens)), "logits_to_keep": 1}
        method.attribute(inputs, target=(0, 1))
        with Peak() as found:
            method.attribute(inputs, target=(0, 1))
        return found.bytes

    assert peak(512) < 4.6 * peak(128)
