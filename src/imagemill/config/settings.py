"""The settings of a run as frozen records. `None` means: the model's own default."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from imagemill.config.values import (
    Loras,
    Schedule,
    Size,
    as_attention,
    as_base_url,
    as_batch,
    as_gpus,
    as_loads,
    as_schedule,
    as_switch,
    as_tuple,
    as_variable,
)
from imagemill.plan import MAX_SEED, MAX_STEPS

Scale: TypeAlias = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Precision: TypeAlias = Literal["bf16", "fp8"]
Switch: TypeAlias = Annotated[Literal["auto", "on", "off"], BeforeValidator(as_switch)]
BatchSize: TypeAlias = Annotated[int | Literal["auto"], BeforeValidator(as_batch)]
Attention: TypeAlias = Annotated[str, BeforeValidator(as_attention)]


FP8_ON_CPU = "precision fp8 needs a GPU, and this run is on the CPU; remove it"


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DeviceSettings(_Section):
    """Which devices, and how many workers. `gpu_ids` are the numbers that nvidia-smi shows; `gpus` counts them.

    `workers` is the number of worker processes, `None` for one a device. `isolate` starts a process
    even for one worker.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    gpus: Annotated[int | Literal["auto"], BeforeValidator(as_gpus)] = "auto"
    gpu_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=4095)], ...], BeforeValidator(as_tuple)] = ()
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    isolate: bool = False

    @model_validator(mode="after")
    def _agree(self) -> DeviceSettings:
        if len(set(self.gpu_ids)) != len(self.gpu_ids):
            raise ValueError(f"gpu_ids names a GPU twice: {list(self.gpu_ids)}; name each once")
        if self.gpu_ids and self.gpus != "auto":
            raise ValueError("gpus and gpu_ids are both given; keep one of them")
        if self.device == "cpu" and (self.gpu_ids or self.gpus != "auto"):
            raise ValueError("GPUs are named though device is cpu; remove one of them")
        return self


class OutputSettings(_Section):
    """Where pictures go. `sink: none` keeps no pictures (for timing); `metadata` writes the task into each picture."""

    folder: Annotated[str, Field(min_length=1)] = "out"
    format: Literal["png", "jpg", "webp"] = "png"
    sink: Literal["files", "none"] = "files"
    metadata: bool = True


class LimitSettings(_Section):
    """Bounds of a run. Timeouts are in seconds without a sign of life; `read_ahead` is in tasks of the source.

    `parallel_loads` workers load at once; `auto` as many as main memory holds on GPUs, one on the CPU.
    """

    load_timeout: Seconds = 1800.0
    task_timeout: Seconds = 600.0
    parallel_loads: Annotated[int | Literal["auto"], BeforeValidator(as_loads)] = "auto"
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    read_ahead: Count = 1024


class JudgeSettings(_Section):
    """How a judge is asked. `pixels` is the most a picture has when a model sees it; it is never enlarged.

    `batch_size: null` takes as many tasks as free memory holds. The rest is for `judge:openai:MODEL`: `base_url` such as
    `http://localhost:8000/v1`, `api_key_env` the environment variable that holds the key, `concurrency` how many requests
    of the whole run are under way at once, `timeout` seconds without a sign of the endpoint.
    """

    batch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 512
    pixels: Annotated[int, Field(ge=4096, le=67_108_864)] = 1_048_576
    base_url: Annotated[str, AfterValidator(as_base_url)] | None = None
    api_key_env: Annotated[str, AfterValidator(as_variable)] = "OPENAI_API_KEY"
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout: Seconds = 120.0


class LoggingSettings(_Section):
    """What is logged and where. `folder: null` is `logs/` inside the output folder."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    folder: Annotated[str, Field(min_length=1)] | None = None


class Settings(_Section):
    """All settings of a run. A model of `None` is the embedded one; `model_fields_set` tells what was given.

    `dtype` is what models compute in; `auto` is bfloat16 on GPUs and float32 on the CPU. `precision: fp8` has the linear
    layers of a diffusion model multiply in 8 bits. `batch_size` is the most tasks of one shape that run together; `auto`
    goes by the shape. `exact` keeps batches of one, and `compile: auto` then stays off: a picture hangs on no other task.
    `attention` is a back end of diffusers. `preload` starts the workers before the source is read; `trace` writes
    trace.json beside the report. `allow_urls` has pictures to edit fetched that are named by an address of the web.
    """

    model: Annotated[str, Field(min_length=1)] | None = None
    devices: DeviceSettings = DeviceSettings()
    size: Size | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    loras: Loras = ()
    schedule: Annotated[Schedule, BeforeValidator(as_schedule)] = Schedule()
    batch_size: BatchSize = "auto"
    exact: bool = False
    compile: Switch = "auto"
    precision: Precision = "bf16"
    attention: Attention = "auto"
    dtype: Dtype = "auto"
    preload: bool = False
    trace: bool = False
    allow_urls: bool = False
    output: OutputSettings = OutputSettings()
    limits: LimitSettings = LimitSettings()
    judge: JudgeSettings = JudgeSettings()
    logging: LoggingSettings = LoggingSettings()

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        for name, size in (("batch_size", self.batch_size), ("judge.batch_size", self.judge.batch_size)):
            if self.exact and isinstance(size, int) and size > 1:
                raise ValueError(f"exact keeps batches of one, and {name} is {size}; keep one of them")
        if self.precision == "fp8" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"precision fp8 goes with dtype bfloat16, and dtype is {self.dtype}; change one of them")
        if self.precision == "fp8" and self.devices.device == "cpu":
            raise ValueError(FP8_ON_CPU)
        return self
