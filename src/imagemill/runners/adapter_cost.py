"""What a switch of adapters costs and what it saves: the one place where it is decided how adapters are put on.

Two ways. `layers`: PEFT computes base and adapter side by side, in every forward. `merged`: the adapter is added to the
weights, and the kept base is copied back afterwards; forwards then cost what they cost without adapters.

Measured on an H100 80GB with the 6.15 B parameters (12.3 GB) of Z-Image at 1024², batch 1, an adapter of rank 32 on
attention and feed-forward:

| what | seconds |
|---|---|
| a forward with compiled blocks, without adapters / with layers | 0.0985 / 0.110 |
| a forward without compiling | 0.153 / 0.180 |
| adding the adapter to all weights | 0.045 |
| bringing the base from pinned host memory first, at 55 GB/s | 0.22 more |

So a switch is paid back after 4 forwards when the base copy is on the device, which is less than one picture of 8 steps,
and after 24 when it is in host memory, three such pictures. Pictures of many steps, or with two forwards a step, pay it
back at once. Small pictures save less a forward, but the layers' launches weigh more there.

The way is chosen once for a worker, never by what waits in the queue: merged weights of 16 bits round otherwise than
layers do, and the picture of a task must not depend on its neighbours.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["layers", "merged", "merged_from_host"]
"""How adapters are put on: as PEFT layers, or merged into weights whose base is kept on the device or in host memory."""

SAVED_PER_BYTE = 0.0115 / 12.3e9
"""Seconds that merging saves in each forward, per byte of the adapted weights."""

MERGE_PER_BYTE = 0.045 / 12.3e9
"""Seconds of a merge, per byte of the adapted weights."""

UPLOAD_PER_BYTE = 1 / 55e9
"""Seconds to bring a byte from pinned host memory to the device."""

HEADROOM = 12 * 2**30
"""Bytes on the device that base copies leave free: for latents, activations, adapters and what compiling needs."""

HOST_SHARE = 0.5
"""The most of the free host memory that the workers of a run pin together; each has as much of it as the others."""

NEIGHBOURS_VARIABLE = "IMAGEMILL_WORKERS_HERE"
"""The environment variable that tells a worker process how many workers of its run the host has, itself included."""

GROUP_FORWARDS = 32
"""How many forwards a group of tasks with one set of adapters is taken to make: four pictures of 8 steps."""


def break_even(mode: Mode) -> float:
    """After how many forwards a switch has paid for itself, against layers. The size of the model cancels out."""
    if mode == "layers":
        return 0.0
    upload = UPLOAD_PER_BYTE if mode == "merged_from_host" else 0.0
    return (MERGE_PER_BYTE + upload) / SAVED_PER_BYTE


def adapter_mode(
    device: str,
    weights: int,
    device_free: int,
    host_free: int,
    *,
    neighbours: int = 1,
    forwards: int = GROUP_FORWARDS,
    force: Mode | None = None,
) -> Mode:
    """The way for a worker: `merged` on CUDA where a copy of the base fits and pays, else `layers`.

    `weights` is the bytes of all weights that adapters can change, the most that is ever copied; `device_free` and
    `host_free` are bytes. `neighbours` are the workers that share the host, this one included: each finds the same memory
    free. On the CPU it is `layers`: models run in float32 there, and their pictures stay as they are.
    """
    if force is not None:
        return force
    if not device.startswith("cuda"):
        return "layers"
    if weights + HEADROOM <= device_free and forwards >= break_even("merged"):
        return "merged"
    if weights <= host_free * HOST_SHARE / neighbours and forwards >= break_even("merged_from_host"):
        return "merged_from_host"
    return "layers"
