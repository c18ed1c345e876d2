"""VisualBERT and LXMERT for easy-VQA: small configurations, the tokenizer, the model inputs and the loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    LxmertConfig,
    LxmertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
)

from benchmarks.trained_models.easy_vqa import FEATURE_DIM, Images, patch_boxes, patch_features
from benchmarks.trained_models.storage import find_checkpoint, load_model

Architecture = Literal["visualbert", "lxmert"]
ARCHITECTURES: tuple[Architecture, ...] = ("visualbert", "lxmert")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
HIDDEN_SIZE = 64
# The usual 0.02 suits 768 channels; with 64 it would leave every attention flat for the first thousands of steps.
INITIALIZER_RANGE = 0.08


@dataclass(frozen=True)
class TrainedVqa:
    """A question-answering model with its tokenizer and answers.

    Attributes:
        model: the Hugging Face model, float32, eval mode. ``model.config.id2label`` names the answers.
        tokenizer: word-level tokenizer of the questions.
        architecture: ``"visualbert"`` or ``"lxmert"``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    architecture: Architecture

    @property
    def answers(self) -> list[str]:
        """The 13 answers in the order of the logits."""
        labels = self.model.config.id2label
        return [labels[index] for index in range(len(labels))]

    def inputs(self, images: Images, questions: Sequence[str]) -> dict[str, Tensor]:
        """The keyword arguments of the model for images ``(N, 64, 64, 3)`` (0 to 255) and N questions."""
        return vqa_inputs(self.architecture, self.tokenizer, patch_features(images), questions)


def build_tokenizer(questions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer (lower case, punctuation apart) whose vocabulary is the words of `questions`.

    A question becomes ``[CLS] words [SEP]``. Words outside the vocabulary become ``[UNK]``.
    """
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = {word for text in set(questions) for word, _ in pre_tokenizer.pre_tokenize_str(text.lower())}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def build_model(architecture: Architecture, vocab_size: int, answers: Sequence[str]) -> PreTrainedModel:
    """A randomly initialised small model with one logit per answer.

    Raises:
        ValueError: unknown architecture.
    """
    labels = dict(enumerate(answers))
    label_ids = {answer: index for index, answer in labels.items()}
    if architecture == "visualbert":
        return VisualBertForQuestionAnswering(
            VisualBertConfig(
                vocab_size=vocab_size,
                hidden_size=HIDDEN_SIZE,
                visual_embedding_dim=FEATURE_DIM,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=4 * HIDDEN_SIZE,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                max_position_embeddings=32,
                initializer_range=INITIALIZER_RANGE,
                id2label=labels,
                label2id=label_ids,
            )
        )
    if architecture == "lxmert":
        return LxmertForQuestionAnswering(
            LxmertConfig(
                vocab_size=vocab_size,
                hidden_size=HIDDEN_SIZE,
                num_attention_heads=4,
                num_qa_labels=len(answers),
                intermediate_size=4 * HIDDEN_SIZE,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                max_position_embeddings=32,
                initializer_range=INITIALIZER_RANGE,
                l_layers=2,
                r_layers=2,
                x_layers=2,
                visual_feat_dim=FEATURE_DIM,
                id2label=labels,
                label2id=label_ids,
            )
        )
    raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}")


def vqa_inputs(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    features: npt.NDArray[np.float32],
    questions: Sequence[str],
    patches: npt.NDArray[np.int64] | None = None,
) -> dict[str, Tensor]:
    """Keyword arguments of the model.

    Args:
        architecture: which model they are for.
        tokenizer: from `build_tokenizer`.
        features: ``(N, 64, 208)`` from `patch_features`.
        questions: N texts; shorter ones are padded.
        patches: ``(N, K)`` positions of the patches to keep; all 64 by default.

    Returns:
        Text ids and mask ``(N, T)``, visual features ``(N, K, 208)`` and, for LXMERT, boxes ``(N, K, 4)``.
    """
    text = tokenizer(list(questions), padding=True, return_tensors="pt")
    boxes = np.broadcast_to(patch_boxes(), (len(features), features.shape[1], 4))
    if patches is not None:
        features = np.take_along_axis(features, patches[:, :, None], axis=1)
        boxes = np.take_along_axis(boxes, patches[:, :, None], axis=1)
    visual = torch.from_numpy(np.ascontiguousarray(features))
    inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    if architecture == "visualbert":
        ones = torch.ones(visual.shape[:2], dtype=torch.long)
        return inputs | {"visual_embeds": visual, "visual_attention_mask": ones, "visual_token_type_ids": ones}
    return inputs | {"visual_feats": visual, "visual_pos": torch.from_numpy(np.ascontiguousarray(boxes))}


def vqa_logits(output: Any) -> Tensor:
    """The answer logits ``(N, 13)`` of either model's output."""
    logits = output.get("logits")
    return output.question_answering_score if logits is None else logits


def checkpoint_name(architecture: Architecture) -> str:
    """Folder name of the architecture's checkpoint."""
    return f"{architecture}_easy_vqa"


def load_visualbert_vqa() -> TrainedVqa:
    """The VisualBERT trained on easy-VQA.

    Raises:
        MissingCheckpointError: it has not been trained; the message has the command.
    """
    return _load("visualbert", VisualBertForQuestionAnswering)


def load_lxmert_vqa() -> TrainedVqa:
    """The LXMERT trained on easy-VQA.

    Raises:
        MissingCheckpointError: it has not been trained; the message has the command.
    """
    return _load("lxmert", LxmertForQuestionAnswering)


def _load(architecture: Architecture, model_class: type[PreTrainedModel]) -> TrainedVqa:
    command = f"python -m benchmarks.trained_models.train_vqa --arch {architecture}"
    folder = find_checkpoint(checkpoint_name(architecture), command)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return TrainedVqa(load_model(model_class, folder), tokenizer, architecture)
