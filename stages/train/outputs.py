"""From a student's logits to what a task's metric and a person want to see."""

import torch.nn.functional as F
from torch import Tensor


def predict(task: str, logits: Tensor) -> Tensor:
    """Turn logits `B C H W` into the prediction of a task.

    segmentation, parts: classes `B H W` int64; saliency, boundary: probability `B H W`;
    normals: unit vectors `B 3 H W`; depth: metres `B H W`, as predicted (may be negative).
    """
    match task:
        case "segmentation" | "parts":
            return logits.argmax(dim=1)
        case "saliency":
            return logits.softmax(dim=1)[:, 1]
        case "boundary":
            return logits[:, 0].sigmoid()
        case "normals":
            return F.normalize(logits, dim=1)
        case "depth":
            return logits[:, 0]
        case _:
            raise ValueError(f"no prediction is defined for task {task!r}")
