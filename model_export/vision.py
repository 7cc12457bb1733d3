"""torchvision, importable: import it from here."""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError:
    # A torchvision built for CUDA beside a torch built for CPUs: its compiled operators cannot load, and the import
    # fails for want of two of them. No classifier uses either, so naming them is enough.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
