"""The task on easy-VQA: questions about pictures whose relevant region is known, for the models trained here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.trained_models.easy_vqa import GRID_SIZE, load_easy_vqa, shape_mask, shape_patches
from benchmarks.trained_models.vqa_models import load_lxmert_vqa, load_visualbert_vqa
from captum_transformer_attr.evaluation import Batch, Measure, Task, spread
from captum_transformer_attr.evaluation.batch import runner_up
from captum_transformer_attr.evaluation.measures import ORDERS, Perturbation, Pointing, entry_scores
from captum_transformer_attr.evaluation.task import batched
from captum_transformer_attr.metrics import TokenRemoval
from captum_transformer_attr.recording.outputs import unwrap


class VqaTask(Task):
    """VisualBERT or LXMERT on held-out questions: perturbation of the words and of the image regions (ICCV 2021,
    section 5: truly removed, [CLS] and [SEP] stay), and the pointing game on the shape's pixels.

    Args:
        architecture: which of the trained models.
        count: number of questions, spread over the test split.
        half: `"even"`, `"odd"` or `"all"` of them.
        needs_region: only questions whose answer changes when the patches of the shape are removed. More than half of
            all answers do not: "no" is what the models answer when they see nothing.
    """

    def __init__(
        self,
        architecture: Literal["visualbert", "lxmert"],
        count: int,
        half: str = "all",
        needs_region: bool = False,
    ) -> None:
        self.trained = load_visualbert_vqa() if architecture == "visualbert" else load_lxmert_vqa()
        self.data = load_easy_vqa("test")
        self.regions = "visual_embeds" if architecture == "visualbert" else "visual_feats"
        name = {"visualbert": "VisualBERT", "lxmert": "LXMERT"}[architecture]
        indices = spread(len(self.data), count, half)
        title, task = f"{name} on easy-VQA questions", architecture
        if needs_region:
            # Twice and a half as many are looked at, which leaves about as many as were asked for.
            indices = self._needing_the_region(spread(len(self.data), 5 * count // 2, half))[:count]
            title, task = f"{title} whose answer needs the shape", f"{architecture}-needs-shape"
        super().__init__(task, title, self.trained.model, self._measures(), indices)

    @torch.no_grad()
    def _needing_the_region(self, indices: list[int]) -> list[int]:
        """Those whose top answer is another one without the patches of the shape."""
        chosen = []
        for row in indices:
            image = self.data.images[self.data.image_indices[row]]
            inputs = self.trained.inputs(image[None], [self.data.questions[row]])
            kept = torch.from_numpy(~shape_patches(image).flatten())
            along = (self.regions, "visual_attention_mask", "visual_token_type_ids", "visual_pos")
            without = {name: value[:, kept] if name in along else value for name, value in inputs.items()}
            answers = [unwrap(self.trained.model(**given)).argmax().item() for given in (inputs, without)]
            if answers[0] != answers[1]:
                chosen.append(row)
        return chosen

    def _measures(self) -> list[Measure]:
        words = TokenRemoval("delete", keep=self.trained.tokenizer.all_special_ids)
        regions = TokenRemoval(
            "delete",
            tokens=self.regions,
            attention_mask="visual_attention_mask",
            along=("visual_token_type_ids", "visual_pos"),
        )
        return [
            *(Perturbation(regions, order, ("predicted",), entry=self.regions, label="image") for order in ORDERS),
            *(Perturbation(words, order, ("predicted",), entry="input_ids", label="question") for order in ORDERS),
            Pointing("predicted", to_maps=self._region_maps),
        ]

    def _region_maps(self, attributions: Any) -> Tensor:
        return entry_scores(attributions, self.regions).unflatten(1, (GRID_SIZE, GRID_SIZE))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for rows in batched(self.indices, batch_size):
            images = self.data.images[self.data.image_indices[rows]]
            inputs = self.trained.inputs(images, [self.data.questions[row] for row in rows])
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            with torch.no_grad():
                logits = unwrap(self.model(**inputs))
            predicted = logits.argmax(1)
            label = torch.from_numpy(self.data.answer_indices[rows]).to(self.device)
            targets = {"predicted": predicted, "label": label, "other": runner_up(logits, predicted)}
            masks = {"predicted": torch.stack([torch.from_numpy(shape_mask(image)) for image in images])}
            yield Batch([f"question {row}" for row in rows], inputs, logits, targets, masks).to(self.device)
