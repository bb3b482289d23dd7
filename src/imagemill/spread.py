"""GPUs put together for a model that none of them can take alone."""

from __future__ import annotations

from collections.abc import Sequence

from imagemill.devices import GIB, Choice, Device, Gpu

SHARE = 0.9
"""Of the free memory of GPUs together, what a model cut into layers can use: the cuts do not come out even."""

SPREAD_DEVICE = "cuda"
"""The torch device of a worker that uses every GPU it sees."""


def spread(gpus: Sequence[Gpu], need: int, workers: int | None = None, tasks: int | None = None) -> Choice | None:
    """Devices of several GPUs each, in order, that hold `need` bytes together: one a worker, no more than `tasks`.

    None when a single GPU takes the model, or all together do not. GPUs that fill no further device are left out.
    """
    usable = [gpu for gpu in gpus if not gpu.fault]
    if any(gpu.free >= need for gpu in usable):
        return None
    groups: list[list[Gpu]] = []
    rest: list[Gpu] = []
    for gpu in usable:
        rest.append(gpu)
        if SHARE * sum(one.free for one in rest) >= need:
            groups.append(rest)
            rest = []
    if not groups:
        return None
    limit = min(len(groups), workers or len(groups), len(groups) if tasks is None else tasks)
    left_out = [f"{gpu.label}: {gpu.fault}" for gpu in gpus if gpu.fault]
    left_out += [f"{gpu.label}: {gpu.free / GIB:.1f} GiB free fill no further share of the model" for gpu in rest]
    return Choice(tuple(_device(group) for group in groups[:limit]), tuple(left_out))


def _device(group: Sequence[Gpu]) -> Device:
    shown = ",".join(gpu.uuid for gpu in group)
    return Device(
        label="GPU " + "+".join(gpu.label.removeprefix("GPU ") for gpu in group),
        torch_device=SPREAD_DEVICE,
        inline_device="",  # a worker inside this process would see every GPU of the machine
        environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": shown},
        free=sum(gpu.free for gpu in group),
        total=sum(gpu.total for gpu in group),
        name=group[0].name,
    )
