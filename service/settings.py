"""Every knob of the service. A flag wins over the environment, that over the file, and that over the default."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyAddress, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from service.errors import StartupError

ENV_PREFIX = "COMPLETION_"

# What a model may have of its own has the same bounds there as for all.
_Device = Literal["auto", "cpu", "cuda"]
_DeviceId = Annotated[int, Field(ge=0)]
_ContextLength = Annotated[int, Field(ge=16)]
_MaxRunning = Annotated[int, Field(ge=1, le=1024)]
_Positive = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
_PromptChunk = Annotated[int, Field(ge=16, le=4096)]
# A key file separates a key's models by commas.
_Name = Annotated[str, Field(pattern=r"^[^\s,]+$")]


def _several(given: object) -> object:
    """One directory stands for a list of one."""
    return (given,) if isinstance(given, str | Path) else given


class ModelTable(BaseModel):
    """What one model has of its own, in the file's table `[models.NAME]`; the rest is as for all models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: Path
    aliases: tuple[_Name, ...] = ()
    device: _Device | None = None
    device_id: _DeviceId | None = None
    gpu_memory_mib: _Positive | None = None
    context_length: _ContextLength | None = None
    max_running: _MaxRunning | None = None
    memory_mib: _Positive | None = None
    max_waiting: _Positive | None = None
    max_queue_seconds: _Seconds | None = None
    prompt_chunk: _PromptChunk | None = None
    threads: _Positive | None = None
    batch_invariant: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model to serve: its directory, and its aliases and its part of the memory, in MiB, where it has them given.

    `settings` are the settings as they are for this model. `table` is the NAME in the file, if it has a table there.
    """

    directory: Path
    settings: Settings
    aliases: tuple[str, ...] = ()
    memory_mib: int | None = None
    table: str | None = None


class Settings(BaseSettings):
    """Settings of the completion service: `--model-dir`, COMPLETION_MODEL_DIR, or `model_dir` in the file.

    With `config show` before them the service only says where each comes from, with `doctor` whether it could start.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Compose sets what its caller has not set to nothing.
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    model_dir: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        (), description="Model directory, as `python -m model_export` writes it; repeat it for several models."
    )
    alias: dict[_Name, str] = Field({}, description="A further name of a model, as `NAME=ID`; repeat it for several.")
    models: dict[str, ModelTable] = Field(
        {}, description="Models with settings of their own: tables `[models.NAME]` of the file, or JSON."
    )
    host: IPvAnyAddress = Field(
        IPv4Address("127.0.0.1"), description="IP address to listen on; other than loopback needs an API key file."
    )
    port: int = Field(50051, ge=1, le=65535, description="Port to listen on.")
    api_keys_file: Path | None = Field(
        None,
        description="File of accepted API keys, `<SHA-256 in hex> <name>` per line; without it no key is asked for.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file of the service's certificate and its chain; without it nothing is encrypted.",
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authority that issues callers' certificates; with it callers must have one."
    )
    device: _Device = Field(
        "auto", description="What computes; auto is an NVIDIA GPU where there is one and the model is for it."
    )
    device_id: _DeviceId = Field(0, description="Which GPU, as its driver counts them.")
    gpu_memory_mib: _Positive | None = Field(
        None,
        description="Memory of the GPU for the model, in MiB: limits the slots; 9/10 of what is free if not set.",
    )
    context_length: _ContextLength | None = Field(
        None, description="Most tokens of prompt and completion together; the model's own if not set."
    )
    max_running: _MaxRunning = Field(
        32, description="Most sequences that advance together, each with a slot of keys and values."
    )
    memory_mib: _Positive | None = Field(
        None,
        description="Memory for the process, in MiB: limits the slots; 3/4 of what there is if not set.",
    )
    max_waiting: _Positive = Field(
        1024, description="Sequences that may wait before requests are refused; one caller's alone half of them."
    )
    max_queue_seconds: _Seconds = Field(
        30.0, description="Longest estimated wait for a slot, in seconds, before a caller's requests are refused."
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Most requests per minute and key; no limit if not set."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens of prompts and answers per minute and key; no limit if not set."
    )
    max_sequences: int | None = Field(
        None, ge=1, description="Most sequences of one key at once, running and waiting; no limit if not set."
    )
    prompt_chunk: _PromptChunk = Field(
        128, description="Most prompt tokens per step: what running streams wait for between tokens."
    )
    threads: _Positive = Field(
        len(os.sched_getaffinity(0)),
        description="Threads that compute, of each model; best the number of physical cores.",
    )
    batch_invariant: bool = Field(
        True,
        description="Whether a result never depends on what else runs (CPU alone); off is faster for a lone request.",
    )
    max_stops: int = Field(4, ge=1, le=64, description="Most entries of a request's `stop`; some editors send 16.")
    max_message_bytes: int = Field(
        16 << 20, ge=1 << 16, description="Largest request message, in bytes; JSON of 2 MiB can grow to 12 MiB."
    )
    longest_request_seconds: int = Field(
        600,
        ge=1,
        le=86400,
        description="How long a request may take, in seconds; Envoy's configuration says the same.",
    )
    send_timeout_seconds: float = Field(
        60.0, gt=0, description="How long a stream's pieces may wait for a caller that reads nothing, in seconds."
    )
    watchdog_seconds: float = Field(
        30.0, gt=0, description="How long one step of the engine may take before the process ends with 1, in seconds."
    )
    drain_delay_seconds: float = Field(
        5.0,
        ge=0,
        description="How long requests are still taken after SIGTERM, while health says NOT_SERVING, in seconds.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="How long running requests may take to finish after that, in seconds."
    )
    metrics_host: IPvAnyAddress = Field(
        IPv4Address("127.0.0.1"), description="IP address to serve metrics on, to whoever asks."
    )
    metrics_port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="Port to serve metrics on, 0 for none; the default is given up if it is taken.",
    )
    vllm_metric_names: bool = Field(
        False, description="Whether metrics also appear under the names that vLLM gives them."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://[^/]+$",
        description="OTLP receiver over gRPC for traces, as `http://host:port`; needs the extra `otel`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    config: Path | None = Field(None, description="TOML file of these settings.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, _Environment(settings_cls), TomlConfigSettingsSource(settings_cls))

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if not self.model_dir and not self.models:
            named = f"(--model-dir, {ENV_PREFIX}MODEL_DIR, or a table [models.NAME] of the file)"
            raise ValueError(f"there is no model to serve: name its directory {named}")
        return self

    def each_model(self) -> tuple[ModelSettings, ...]:
        """The models to serve, those without a table first."""
        plain = (ModelSettings(directory, self) for directory in self.model_dir)
        return (*plain, *(self._of_table(name, table) for name, table in self.models.items()))

    def _of_table(self, name: str, table: ModelTable) -> ModelSettings:
        own = table.model_dump(exclude_none=True, exclude={"dir", "aliases", "memory_mib"})
        return ModelSettings(table.dir, self.model_copy(update=own), table.aliases, table.memory_mib, name)


class _Environment(EnvSettingsSource):
    """The environment, in which a single model directory need not be a JSON list."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        if field_name == "model_dir" and not value.startswith("["):
            return value
        return super().decode_complex_value(field_name, field, value)


def load(arguments: Sequence[str]) -> Settings:
    """The settings that flags, environment, file and defaults make; StartupError names what is wrong."""
    file = _config_file(arguments)
    if file is not None and not file.is_file():
        raise StartupError(f"settings file {file} does not exist")

    class Configured(Settings):
        model_config = SettingsConfigDict(toml_file=file, cli_parse_args=list(arguments))

    try:
        return Configured()
    except SettingsError as error:
        raise StartupError(f"{error}: expected JSON, or NAME=ID for an alias") from None
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(_explain(error, file)) from None


def origins(arguments: Sequence[str]) -> dict[str, str]:
    """Where each setting's value comes from: `flag`, `environment`, the file by its name, or `default`.

    Tables of models and aliases may come from several of them: those are named together, and each entry of a table by
    itself, as `models.NAME.ENTRY`.
    """
    file = _config_file(arguments)
    sources: list[tuple[str, PydanticBaseSettingsSource]] = [
        ("flag", CliSettingsSource(Settings, cli_parse_args=list(arguments))),
        ("environment", _Environment(Settings)),
        (f"file {file}", TomlConfigSettingsSource(Settings, file)),
    ]
    found = dict.fromkeys(Settings.model_fields, "default")
    for origin, source in reversed(sources):
        given = source()
        for name in given:
            joined = name in ("models", "alias") and found[name] != "default"
            found[name] = f"{origin}, {found[name]}" if joined else origin
        for name, table in given.get("models", {}).items():
            found.update({f"models.{name}.{entry}": origin for entry in table})
    return found


def _config_file(arguments: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    given = parser.parse_known_args(list(arguments))[0].config
    return Path(given) if given else None


def _explain(error: ValueError, file: Path | None) -> str:
    if not isinstance(error, ValidationError):
        return f"settings file {file}: {error}"
    problems = []
    for problem in error.errors():
        if not problem["loc"]:
            problems.append(problem["msg"].removeprefix("Value error, "))
            continue
        where, name = ".".join(str(part) for part in problem["loc"]), str(problem["loc"][0])
        given = "" if problem["type"] == "missing" else f", but got {problem['input']!r}"
        problems.append(f"{where} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {problem['msg']}{given}")
    return "; ".join(problems)
