"""Every setting of the service. Flags override the environment, which overrides the file, which overrides defaults."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, IPvAnyAddress, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
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
from service.model_table import (
    ContextLength,
    Device,
    DeviceId,
    MaxRunning,
    ModelTable,
    Name,
    Positive,
    PromptChunk,
    Seconds,
)

ENV_PREFIX = "COMPLETION_"
_LOOPBACK = IPv4Address("127.0.0.1")


def _as_tuple(value: object) -> object:
    """A single directory becomes a tuple of one."""
    return (value,) if isinstance(value, str | Path) else value


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model to serve. `settings` are the settings for all models, overridden by the model's table.

    `aliases` and `memory_mib` (the model's part of the memory, in MiB) come from its table, if it has one.
    """

    directory: Path
    settings: Settings
    aliases: tuple[str, ...] = ()
    memory_mib: int | None = None


class Settings(BaseSettings):
    """Settings of the completion service: `--model-dir`, COMPLETION_MODEL_DIR, or `model_dir` in the file.

    `config show` before the flags prints each setting's value and source; `doctor` checks if the service can start.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Docker Compose sets variables that its caller left unset to an empty string.
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    model_dir: Annotated[tuple[Path, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="Model directory that `python -m model_export` has written; repeat the flag for several models."
    )
    alias: dict[Name, str] = Field(
        {}, description="Another name of a model, as `NAME=ID`; repeat the flag for several."
    )
    models: dict[str, ModelTable] = Field(
        {}, description="Models with individual settings: tables `[models.NAME]` in the file, or JSON."
    )
    host: IPvAnyAddress = Field(
        _LOOPBACK, description="IP address to listen on; any address but loopback needs an API key file."
    )
    port: int = Field(50051, ge=1, le=65535, description="Port to listen on.")
    api_keys_file: Path | None = Field(
        None,
        description="File of accepted API keys, `<SHA-256 in hex> <name>` per line; without it callers need no key.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file of the service's certificate and its chain; without it connections are not encrypted.",
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of the authority that issues callers' certificates; with it callers must present one.",
    )
    device: Device = Field(
        "auto",
        description="Device to compute on; auto is an NVIDIA GPU if there is one and the model was exported for it.",
    )
    device_id: DeviceId = Field(0, description="Index of the GPU in the driver's numbering.")
    gpu_memory_mib: Positive | None = Field(
        None, description="GPU memory for the model, in MiB, which limits the slots; if not set, 9/10 of what is free."
    )
    context_length: ContextLength | None = Field(
        None, description="Most tokens of prompt and completion together; if not set, as many as the memory holds."
    )
    max_running: MaxRunning = Field(32, description="Most sequences that run at once, each in a slot of the KV cache.")
    memory_mib: Positive | None = Field(
        None, description="Memory for the process, in MiB; if not set, 3/4 of all, or 9/10 of what is free if less."
    )
    max_waiting: Positive = Field(
        1024, description="Most sequences that wait before requests are refused; one caller may have half as many."
    )
    max_queue_seconds: Seconds = Field(
        30.0, description="Longest estimated wait for a slot, in seconds; beyond it a caller's requests are refused."
    )
    requests_per_minute: Positive | None = Field(None, description="Requests per minute and key; no limit if not set.")
    tokens_per_minute: Positive | None = Field(
        None, description="Most tokens of prompts and completions per minute and key; no limit if not set."
    )
    max_sequences: Positive | None = Field(
        None, description="Most running and waiting sequences of one key at once; no limit if not set."
    )
    prompt_chunk: PromptChunk = Field(
        128, description="Most prompt tokens in one step; running streams wait for such a step between two tokens."
    )
    step_seconds: Seconds = Field(
        0.5, description="Longest prompt chunk beside running streams, in seconds; at least 16 tokens."
    )
    threads: Positive = Field(
        len(os.sched_getaffinity(0)), description="Compute threads of each model; the number of physical cores is best."
    )
    batch_invariant: bool = Field(
        True,
        description="Keep results independent of the rest of the batch (CPU only); off is faster for one request.",
    )
    max_stops: int = Field(4, ge=1, le=64, description="Most entries in a request's `stop`; some editors send 16.")
    unknown_parameters: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="Whether parameters that the contract lacks are refused, or named in a header; for Envoy too.",
    )
    parse_special: bool = Field(True, description="Whether text prompts are read with control tokens by default.")
    max_logprobs: int = Field(5, ge=0, le=100, description="Most `logprobs` that a request may ask for.")
    always_fingerprint: bool = Field(
        False, description="Whether every answer has a `system_fingerprint`, not only one for a seed or token ids."
    )
    max_message_bytes: int = Field(
        16 << 20, ge=1 << 16, description="Largest request message in bytes; JSON of 2 MiB can grow to 12 MiB."
    )
    longest_request_seconds: int = Field(
        600,
        ge=1,
        le=86400,
        description="Longest duration of a request, in seconds; Envoy's configuration must have the same value.",
    )
    send_timeout_seconds: Seconds = Field(
        60.0, description="How long pieces of a stream may wait for a caller that does not read, in seconds."
    )
    watchdog_seconds: Seconds = Field(
        30.0, description="Seconds after which the process exits with 1 when an engine step or the event loop hangs."
    )
    drain_delay_seconds: float = Field(
        5.0, ge=0, description="Seconds for which the service accepts requests after SIGTERM, while NOT_SERVING."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Seconds for running requests to finish, after the delay.")
    metrics_host: IPvAnyAddress = Field(_LOOPBACK, description="IP address to serve metrics on, without a key.")
    metrics_port: int = Field(
        9464,
        ge=0,
        le=65535,
        description="Port to serve metrics on, 0 for none; if unset and the default is in use, there are no metrics.",
    )
    vllm_metric_names: bool = Field(False, description="Whether metrics also appear under vLLM's names.")
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://[^/]+$",
        description="Where to send traces by OTLP over gRPC, as `http://host:port`; needs the extra `otel`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    config: Path | None = Field(None, description="TOML file with these settings.")

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
            ways = f"(--model-dir, {ENV_PREFIX}MODEL_DIR, or a table [models.NAME] in the file)"
            raise ValueError(f"there is no model to serve: name its directory {ways}")
        return self

    def configured_models(self) -> tuple[ModelSettings, ...]:
        """The models to serve, those without a table first."""
        plain = (ModelSettings(directory, self) for directory in self.model_dir)
        return (*plain, *map(self._override, self.models.values()))

    def _override(self, table: ModelTable) -> ModelSettings:
        overrides = table.model_dump(exclude_none=True, exclude={"dir", "aliases", "memory_mib"})
        return ModelSettings(table.dir, self.model_copy(update=overrides), table.aliases, table.memory_mib)


class _Environment(EnvSettingsSource):
    """The environment as a source. A single model directory may be a plain path instead of a JSON list."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        if field_name == "model_dir" and not value.startswith("["):
            return value
        return super().decode_complex_value(field_name, field, value)


def load(arguments: Sequence[str]) -> Settings:
    """Reads the settings from flags, environment, file and defaults. Raises StartupError naming the invalid ones."""
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
    """The source of each setting's value: `flag`, `environment`, the file by its name, or `default`.

    `models` and `alias` can come from several sources, which are then all named. Each entry of a model's table has a
    key `models.NAME.ENTRY` besides.
    """
    file = _config_file(arguments)
    sources: list[tuple[str, PydanticBaseSettingsSource]] = [
        ("flag", CliSettingsSource(Settings, cli_parse_args=list(arguments))),
        ("environment", _Environment(Settings)),
        (f"file {file}", TomlConfigSettingsSource(Settings, file)),
    ]
    by_name = dict.fromkeys(Settings.model_fields, "default")
    for origin, source in reversed(sources):
        values = source()
        for name in values:
            merged = name in ("models", "alias") and by_name[name] != "default"
            by_name[name] = f"{origin}, {by_name[name]}" if merged else origin
        for name, table in values.get("models", {}).items():
            by_name.update({f"models.{name}.{entry}": origin for entry in table})
    return by_name


def _config_file(arguments: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    path = parser.parse_known_args(list(arguments))[0].config
    return Path(path) if path else None


def _explain(error: ValueError, file: Path | None) -> str:
    if not isinstance(error, ValidationError):
        return f"settings file {file}: {error}"
    return "; ".join(map(_problem, error.errors()))


def _problem(details: ErrorDetails) -> str:
    if not details["loc"]:
        return details["msg"].removeprefix("Value error, ")
    where, name = ".".join(map(str, details["loc"])), str(details["loc"][0])
    value = "" if details["type"] == "missing" else f", but got {details['input']!r}"
    return f"{where} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {details['msg']}{value}"
