"""The bi-modal benchmark's own measures: masks, the true region as scores, notes that survive a new run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from benchmarks.detector_masks import measured  # noqa: E402
from benchmarks.trained_models.easy_vqa import patch_features, shape_mask  # noqa: E402
from benchmarks.trained_models.vqa_models import load_visualbert_vqa  # noqa: E402
from benchmarks.vqa_methods import AGAINST, AbsoluteRelevance, question_methods, shape_first  # noqa: E402
from benchmarks.vqa_perturbation import NOTES, notes  # noqa: E402
from captum_transformer_attr import AttentionRelevance  # noqa: E402


def test_measures_of_a_map() -> None:
    truth = np.zeros((16, 16), dtype=bool)
    truth[4:12, 4:12] = True
    perfect = {name: float(value) for name, value in measured(torch.from_numpy(truth).double(), truth).items()}
    assert perfect.pop("IoU, tokens") > 0.9  # enlarging the mask rounds its corners
    assert perfect == dict.fromkeys(perfect, 1.0)
    # The left half of the object, half as strong elsewhere on it: Otsu takes the strong half or all of it.
    half = torch.from_numpy(truth).double() * 0.2
    half[4:12, 4:8] = 1
    found = {name: float(value) for name, value in measured(half, truth).items()}
    assert found["precision"] == 1 and found["recall"] == 0.5 and found["IoU, pixels"] == 0.5
    assert found["best IoU"] == 1 and found["AP"] == 1 and found["mass on digit"] == 1
    # 0.2 becomes 0.45 under the root, still on the other side of the threshold between 0 and 1.
    assert found["IoU, pixels of √map"] >= found["IoU, pixels"]
    nothing = {name: float(value) for name, value in measured(torch.zeros(16, 16, dtype=torch.double), truth).items()}
    assert nothing["IoU, pixels"] == 0 and nothing["mass on digit"] == 0


@pytest.fixture(scope="module")
def question() -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    image = np.full((64, 64, 3), 230, dtype=np.uint8)
    image[10:30, 20:50] = (255, 0, 0)
    return image, load_visualbert_vqa().inputs(image[None], ["what color is the shape?"])


def test_the_true_region_as_scores(question: tuple[np.ndarray, dict[str, torch.Tensor]]) -> None:
    image, inputs = question
    scores = shape_first(torch.nn.Identity(), inputs, None)
    counts = shape_mask(image).reshape(8, 8, 8, 8).sum((1, 3)).flatten()
    assert patch_features(image[None]).shape == scores["visual_embeds"].shape
    assert (scores["visual_embeds"][0, :, 0].numpy() == counts).all() and not scores["input_ids"].any()


def test_ablations(question: tuple[np.ndarray, dict[str, torch.Tensor]]) -> None:
    model, (_, inputs) = load_visualbert_vqa().model, question
    target = torch.tensor([0])
    absolute = AbsoluteRelevance(model).attribute_tokens(inputs, target)["visual_embeds"]
    positive = AttentionRelevance(model).attribute_tokens(inputs, target)["visual_embeds"]
    assert (absolute >= positive).all() and (absolute > positive).any()
    (against,) = [m for m in question_methods(crossing=False) if m.name == AGAINST]
    logits = model(**inputs).logits
    rival = int(logits[0].topk(2).indices[int(logits.argmax() == 0)])

    class Difference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **given: torch.Tensor) -> torch.Tensor:
            output = self.inner(**given).logits
            return output[:, 0] - output[:, rival]

    want = AttentionRelevance(Difference()).attribute(inputs)["visual_embeds"]
    got = against.attribute(model, inputs, target)["visual_embeds"]
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-6 * want.abs().max())


def test_notes_survive_a_new_run(tmp_path: Path) -> None:
    page = tmp_path / "vqa.md"
    assert notes(page) == ""
    page.write_text(f"# Tables\n\n{NOTES}\n\nBy hand.\n", encoding="utf-8")
    assert notes(page) == f"\n{NOTES}\n\nBy hand.\n"
