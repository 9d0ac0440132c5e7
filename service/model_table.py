"""The settings that each model may have for itself, with the bounds that they have for all models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Device = Literal["auto", "cpu", "cuda"]
DeviceId = Annotated[int, Field(ge=0)]
ContextLength = Annotated[int, Field(ge=16)]
MaxRunning = Annotated[int, Field(ge=1, le=1024)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
PromptChunk = Annotated[int, Field(ge=16, le=4096)]
# A key file separates the names of models by commas, so a name cannot contain one.
Name = Annotated[str, Field(pattern=r"^[^\s,]+$")]


class ModelTable(BaseModel):
    """Settings of one model, in the file's table `[models.NAME]`. Missing entries take the value for all models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: Path
    aliases: tuple[Name, ...] = ()
    device: Device | None = None
    device_id: DeviceId | None = None
    gpu_memory_mib: Positive | None = None
    context_length: ContextLength | None = None
    max_running: MaxRunning | None = None
    memory_mib: Positive | None = None
    max_waiting: Positive | None = None
    max_queue_seconds: Seconds | None = None
    prompt_chunk: PromptChunk | None = None
    step_seconds: Seconds | None = None
    threads: Positive | None = None
    batch_invariant: bool | None = None
