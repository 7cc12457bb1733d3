"""torchvision, imported so that a build for CUDA works beside a torch for CPUs. Import it from this module."""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError:
    # A torchvision built for CUDA cannot load its compiled operators beside a torch built for CPUs, and its import
    # fails because two of them are not defined. No classifier uses either, so declaring them is enough.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
