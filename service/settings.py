"""Every knob of the service. A flag wins over the environment, that over the file, and that over the default."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

from pydantic import Field, IPvAnyAddress, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from service.errors import StartupError

ENV_PREFIX = "COMPLETION_"


class Settings(BaseSettings):
    """Settings of the completion service: `--model-dir`, COMPLETION_MODEL_DIR, or `model_dir` in the file.

    With `config show` before them the service only says where each comes from, with `doctor` whether it could start.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    model_dir: Path = Field(description="Model directory, as `python -m model_export` writes it.")
    host: IPvAnyAddress = Field(
        IPv4Address("127.0.0.1"), description="IP address to listen on; other than loopback needs an API key file."
    )
    port: int = Field(50051, ge=1, le=65535, description="Port to listen on.")
    api_keys_file: Path | None = Field(
        None, description="File of accepted API keys, `<SHA-256 in hex> <name>` per line; without it any key is taken."
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file of the service's certificate and its chain; without it nothing is encrypted.",
    )
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authority that issues callers' certificates; with it callers must have one."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What computes; auto is an NVIDIA GPU where there is one and the model is for it."
    )
    device_id: int = Field(0, ge=0, description="Which GPU, as its driver counts them.")
    gpu_memory_mib: int | None = Field(
        None,
        ge=1,
        description="Memory of the GPU for the model, in MiB: limits the slots; 9/10 of what is free if not set.",
    )
    context_length: int | None = Field(
        None, ge=16, description="Most tokens of prompt and completion together; the model's own if not set."
    )
    max_running: int = Field(
        32, ge=1, le=1024, description="Most sequences that advance together, each with a slot of keys and values."
    )
    memory_mib: int | None = Field(
        None,
        ge=1,
        description="Memory for the process, in MiB: limits the slots; 3/4 of what there is if not set.",
    )
    max_waiting: int = Field(
        1024, ge=1, description="Sequences that may wait before requests are refused; one caller's alone half of them."
    )
    max_queue_seconds: float = Field(
        30.0, gt=0, description="Longest estimated wait for a slot, in seconds, before a caller's requests are refused."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens of prompts and answers per minute and key; no limit if not set."
    )
    max_sequences: int | None = Field(
        None, ge=1, description="Most sequences of one key at once, running and waiting; no limit if not set."
    )
    prompt_chunk: int = Field(
        128, ge=16, le=4096, description="Most prompt tokens per step: what running streams wait for between tokens."
    )
    threads: int = Field(
        len(os.sched_getaffinity(0)), ge=1, description="Threads that compute; best the number of physical cores."
    )
    batch_invariant: bool = Field(
        True,
        description="Whether a result never depends on what else runs (CPU alone); off is faster for a lone request.",
    )
    max_stops: int = Field(4, ge=1, le=64, description="Most entries of a request's `stop`; some editors send 16.")
    max_message_bytes: int = Field(
        16 << 20, ge=1 << 16, description="Largest request message, in bytes; JSON of 2 MiB can grow to 12 MiB."
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
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def load(arguments: Sequence[str]) -> Settings:
    """The settings that flags, environment, file and defaults make; StartupError names what is wrong."""
    file = _config_file(arguments)
    if file is not None and not file.is_file():
        raise StartupError(f"settings file {file} does not exist")

    class Configured(Settings):
        model_config = SettingsConfigDict(toml_file=file, cli_parse_args=list(arguments))

    try:
        return Configured()
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(_explain(error, file)) from None


def origins(arguments: Sequence[str]) -> dict[str, str]:
    """Where each setting's value comes from: `flag`, `environment`, the file by its name, or `default`."""
    file = _config_file(arguments)
    sources: list[tuple[str, PydanticBaseSettingsSource]] = [
        ("flag", CliSettingsSource(Settings, cli_parse_args=list(arguments))),
        ("environment", EnvSettingsSource(Settings)),
        (f"file {file}", TomlConfigSettingsSource(Settings, file)),
    ]
    found = dict.fromkeys(Settings.model_fields, "default")
    for origin, source in reversed(sources):
        found.update(dict.fromkeys(source(), origin))
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
        name = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] == "missing" else f", but got {problem['input']!r}"
        problems.append(f"{name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): {problem['msg']}{given}")
    return "; ".join(problems)
