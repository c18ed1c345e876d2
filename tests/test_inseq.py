"""Our classes behind inseq, as docs/interoperability.md has it: the scores are those of ``explain_generation``."""

import pytest
import torch

from benchmarks.data_folder import data_folder
from captum_transformer_attr import TransformerLRP
from captum_transformer_attr.generation import explain_generation

DATA = data_folder()


def test_class_in_place_of_captums():
    inseq = pytest.importorskip("inseq", reason="inseq is not installed: pip install inseq")
    from inseq.attr.feat.gradient_attribution import GradientAttributionRegistry

    folder = DATA / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set CTA_DATA)")

    class AttnLRP(GradientAttributionRegistry):
        method_name = "attnlrp"

        def __init__(self, attribution_model):
            super().__init__(attribution_model)
            self.method = TransformerLRP(attribution_model, rules="attnlrp")

    model = inseq.load_model(str(folder), "attnlrp", tokenizer=str(folder))
    prompt, text = "Once upon a time, there was a", "Once upon a time, there was a little girl"
    out = model.attribute(prompt, text, attributed_fn="logit", show_progress=False)
    got = out.sequence_attributions[0].target_attributions.sum(-1).nan_to_num()
    inputs, written = (model.tokenizer(words, return_tensors="pt") for words in (prompt, text))
    method = TransformerLRP(model.model, rules="attnlrp")
    want = explain_generation(method, dict(inputs), written["input_ids"]).scores["input_ids"][0].T
    assert want.abs().max() > 1 and torch.allclose(got[: len(want)], want, atol=1e-4)
