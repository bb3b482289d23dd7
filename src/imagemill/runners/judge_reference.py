"""The judge by a target picture: PSNR, SSIM and L1 of the edit against it. No model.

The images of a task are (edit, target[, mask]). White in the mask is what was to be edited.
"""

from __future__ import annotations

from imagemill.runners.judge_metrics import MetricsRunner


def create(device: str, threads: int) -> MetricsRunner:
    """The runner; it computes on the CPU whatever the device."""
    return MetricsRunner("target")
