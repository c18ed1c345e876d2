"""A small DETR that finds handwritten digits in digit scenes: configuration, inputs, quality measure and loader."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchvision.ops import box_convert, box_iou
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from benchmarks.trained_models.storage import find_checkpoint, load_model
from captum_transformer_attr.digit_scenes import CLASS_NAMES, DigitScenes

CHECKPOINT_NAME = "detr_digit_scenes"
COMMAND = "python -m benchmarks.trained_models.train_detr"
WIDTH = 64
STRIDE = 4  # of the backbone: a 64-pixel canvas becomes 16x16 tokens, 4 to 6 of them along each side of a digit


def build_model() -> DetrForObjectDetection:
    """A randomly initialised small DETR: one-stage ResNet, 2 encoder and 3 decoder layers, 12 queries, 10 classes."""
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[WIDTH],
        depths=[2],
        layer_type="basic",
        downsample_in_first_stage=False,
        out_features=["stage1"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=WIDTH,
        num_queries=12,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        dropout=0.0,
        # Xavier's standard deviation of a 64 to 64 projection; the default suits 256 channels.
        init_std=WIDTH**-0.5,
        auxiliary_loss=True,
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: index for index, name in enumerate(CLASS_NAMES)},
    )
    model = DetrForObjectDetection(config)
    # As in the original DETR. Queries that start alike would have to be told apart by the matching alone.
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)
    return model


def detector_inputs(images: Tensor) -> dict[str, Tensor]:
    """The keyword arguments of the detector for RGB images ``(N, 3, S, S)`` in [0, 1]."""
    return {"pixel_values": (images - 0.5) / 0.5}


def detection_labels(scenes: DigitScenes) -> list[dict[str, Tensor]]:
    """What `DetrForObjectDetection` takes as ``labels``: per scene, classes ``(K,)`` and boxes ``(K, 4)``.

    Boxes are centre x, centre y, width, height as fractions of the canvas.
    """
    size = scenes.images.shape[-1]
    boxes = box_convert(scenes.boxes.float() / size, "xyxy", "cxcywh")
    present = scenes.labels.bool()
    return [{"class_labels": row.nonzero()[:, 0], "boxes": box[row]} for row, box in zip(present, boxes, strict=True)]


@torch.no_grad()
def average_precision(model: DetrForObjectDetection, scenes: DigitScenes, iou: float = 0.5) -> float:
    """Mean over the ten classes of the average precision of the detector's boxes.

    Every query is a detection of its best class. In order of confidence, a detection is right if its overlap with
    the digit of that class in its scene is at least `iou` and no earlier one found that digit; a scene has a class
    at most once. No interpolation of the precision.

    Args:
        model: the detector.
        scenes: held-out scenes.
        iou: least intersection over union of a right box.
    """
    model.eval()
    size = scenes.images.shape[-1]
    scores_by_class: list[list[float]] = [[] for _ in CLASS_NAMES]
    right_by_class: list[list[bool]] = [[] for _ in CLASS_NAMES]
    for start in range(0, len(scenes), 64):
        output = model(**detector_inputs(scenes.images[start : start + 64]))
        confidence, classes = output.logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        boxes = box_convert(output.pred_boxes, "cxcywh", "xyxy") * size
        for offset in range(len(boxes)):
            truth = scenes.boxes[start + offset].float()
            found: set[int] = set()
            for query in confidence[offset].argsort(descending=True).tolist():
                label = int(classes[offset, query])
                present = bool(scenes.labels[start + offset, label])
                overlap = float(box_iou(boxes[offset, query, None], truth[label, None])) if present else 0.0
                right = overlap >= iou and label not in found
                found |= {label} if right else set()
                scores_by_class[label].append(float(confidence[offset, query]))
                right_by_class[label].append(right)
    precisions = []
    for label, (scores, hits) in enumerate(zip(scores_by_class, right_by_class, strict=True)):
        # scikit-learn takes the digits that were found for all digits there are; the factor counts the missed ones.
        recall = sum(hits) / max(1.0, float(scenes.labels[:, label].sum()))
        precisions.append(recall * float(average_precision_score(hits, scores)) if recall else 0.0)
    return float(np.mean(precisions))


def load_digit_detr() -> DetrForObjectDetection:
    """The DETR trained on digit scenes, float32, eval mode; `detector_inputs` makes its input.

    Raises:
        MissingCheckpointError: it has not been trained; the message has the command.
    """
    return load_model(DetrForObjectDetection, find_checkpoint(CHECKPOINT_NAME, COMMAND))
