"""One frozen Settings, read exactly once: flags > SERVETUNE_* > servetune.toml > defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from platformdirs import user_data_path
from pydantic import BaseModel, Field, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from servetune.clients.types import AdapterName
from servetune.server.quiet import CpuBudget, Quiet, Windows

PASSWORDS = re.compile(r"([?&](?:password|sentinel_password|ssl_password)=)[^&#]*")  # in the query of a Redis URL
SECRETS = {"api_keys", "adapter_keys", "admin_key", "buffer_key", "webhook_url", "webhook_secret"}
_WEB_ADDRESS = re.compile(r"https?://[!-~]{1,2000}", re.IGNORECASE)


def _default_threads(share: float) -> int:
    return max(1, round((os.cpu_count() or 1) * share))


class Settings(BaseSettings):
    """Everything an operator can choose. A misspelt name in servetune.toml or a flag is an error."""

    model_config = SettingsConfigDict(
        env_prefix="SERVETUNE_", frozen=True, extra="forbid", toml_file="servetune.toml"
    )

    home: Path = Field(default_factory=lambda: user_data_path("servetune"), description="all state lives here")
    model: str = Field("nano", description="`nano`, a folder or a hub id of an image-text-to-text checkpoint")
    adapter: AdapterName = Field("default", description="of whoever names none")

    # HTTP
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: tuple[SecretStr, ...] = Field((), description="user keys; none: loopback only, /answer open")
    adapter_keys: dict[AdapterName, tuple[SecretStr, ...]] = Field(
        {}, description="user keys of tenants: each is answered by one adapter alone, and teaches no other"
    )
    admin_key: SecretStr | None = Field(None, description="default: the file admin.key in the home")
    max_body_bytes: int = Field(16_000_000, ge=1024)
    max_import_bytes: int = Field(256 * 2**20, ge=1024, description="of an archive that an administrator imports")
    max_image_pixels: int = Field(50_000_000, ge=4096)
    max_image_side: int = Field(12_000, ge=64)
    decode_side: int = Field(2048, ge=64, description="longest side an image is decoded to, in pixels")
    image_hosts: tuple[str, ...] = Field((), description="https hosts that image URLs may name; none: off")
    requests_per_minute: int | None = Field(
        None, ge=1, description="questions from each key (without keys, from all); ten seconds' worth at once"
    )
    queue_size: int = Field(256, ge=1, description="requests waiting for the engine before 503")
    queue_wait_s: float = Field(
        2.0, gt=0, description="expected wait for the engine from which on a request gets 503"
    )
    request_timeout_s: float = Field(60.0, gt=0)
    now_deadline_s: float = Field(
        5.0, gt=0, description="for an answer with `adapt: now`, unless the request says"
    )

    # engine
    device: str = Field("auto", description="auto, cpu, cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    share_weights: bool = Field(
        True, description="server and worker map one copy of the base weights, a file under the home (CPU)"
    )
    serve_threads: int = Field(
        default_factory=lambda: _default_threads(0.5),
        ge=1,
        description="threads of the model at most; how many of them pay is tried at the start",
    )
    recognition_question: str | None = Field(None, description="default question of recognition requests")
    swap_poll_s: float = Field(0.25, gt=0)
    resident_versions: int = Field(
        16, ge=3, description="weights of adapters kept loaded beside the base, of one adapter three at most"
    )

    # LoRA
    lora_rank: int = Field(8, ge=1, le=256)
    lora_alpha: int = Field(16, ge=1)
    lora_targets: Literal["language", "vision", "all"] = "language"

    feature_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="vision features kept in memory by image content; server and worker each"
    )

    prompt_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="prompts kept by the server as keys and values, by content and version"
    )

    # buffer
    redis_url: str | None = Field(
        None,
        description="redis://, rediss://, unix:// or redis+sentinel://HOST,HOST/SERVICE; "
        "default: the embedded Valkey under the home",
    )
    buffer_key: SecretStr | None = Field(None, description="base64 key of stored images; default: home/buffer.key")
    buffer_queries: int = Field(10_000, ge=1)
    buffer_bytes: int = Field(1_000_000_000, ge=1)
    buffer_ttl_s: int = Field(7 * 86_400, ge=1)
    buffer_client_share: float = Field(0.5, gt=0, le=1, description="cap per client, from two clients up")
    review_queries: int = Field(
        0, ge=0, le=10_000, description="newest queries of each adapter kept to compare versions on; 0: none"
    )
    review_bytes: int = Field(100_000_000, ge=1, description="of all adapters together")
    review_ttl_s: int = Field(7 * 86_400, ge=1)
    buffer_wait_s: float = Field(0.05, ge=0, description="how long an answer waits for the buffer at most")

    # worker
    worker: bool = Field(True, description="`servetune serve` starts a worker beside the API")
    worker_threads: int = Field(default_factory=lambda: _default_threads(0.5), ge=1)
    worker_adapters: int = Field(
        4, ge=1, description="adapters that a worker learns for at the same time; the others wait for a place"
    )
    learner: Literal["default", "frequency", "ttrv", "released", "majority", "random", "format-only"] = "default"
    num_rollouts: int = Field(32, ge=2, le=512)
    max_answer_tokens: int = Field(32, ge=1, le=1024)
    queries_per_step: int = Field(16, ge=1)
    steps_per_candidate: int = Field(8, ge=1)
    reset_after_queries: int | None = Field(
        None, ge=1, description="back to the base after so many learned queries; default: never"
    )
    retain_recent: int = Field(
        20, ge=0, description="newest versions of an adapter whose weights are kept, whatever they are; 0: all"
    )
    retain_best: int = Field(5, ge=0, description="versions kept beside them, the best by the gate's witnesses")
    flush_s: float = Field(5.0, ge=0, description="learn from an incomplete batch after waiting this long")
    lease_s: float = Field(30.0, gt=1)
    max_deliveries: int = Field(5, ge=1)
    step_bytes: int = Field(2 * 2**30, ge=1, description="activations of one backward pass at most, about")
    learning_rate: float = Field(1e-3, gt=0)
    kl_coefficient: float = Field(0.04, ge=0)
    seed: int = 0

    # quiet operation
    learn_windows: str | None = Field(
        None, description="times of the day to learn in: 22:00-06:00,12:30-13:00; default: any"
    )
    learn_timezone: str | None = Field(
        None, description="of the windows, such as Europe/Berlin; default: as the machine is set"
    )
    learn_cpu_share: float | None = Field(
        None, gt=0, le=1, description="of `worker_threads` over a minute that slides; default: whatever is idle"
    )

    trace_endpoint: str | None = Field(
        None,
        description="OTLP/HTTP address for traces (/v1/traces); default: as OTEL_EXPORTER_OTLP_* say",
    )

    # alerts
    webhook_url: SecretStr | None = Field(
        None, description="told of rollbacks, collapse, drift and a worker in trouble; an address may hold a key"
    )
    webhook_secret: SecretStr | None = Field(None, description="signs what is sent there")

    @field_validator("learn_timezone")
    @classmethod
    def _a_timezone(cls, name: str | None) -> str | None:
        try:
            ZoneInfo(name or "UTC")
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no time zone has that name: write one such as Europe/Berlin or UTC") from None
        return name

    @field_validator("learn_windows")
    @classmethod
    def _windows(cls, text: str | None) -> str | None:
        if text is not None:
            Windows.parse(text)
        return text

    @field_validator("webhook_url")
    @classmethod
    def _an_address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not _WEB_ADDRESS.fullmatch(url.get_secret_value()):
            raise ValueError("give an address that begins with https:// or http://")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def origins(cls) -> dict[str, str]:
        """Where a setting that nobody gave as a flag comes from; those not named here are defaults."""
        toml = dict.fromkeys(TomlConfigSettingsSource(cls)(), "servetune.toml")
        return toml | dict.fromkeys(EnvSettingsSource(cls)(), "environment")

    def path(self, *parts: str) -> Path:
        """A path below the home, whose folders are private to the user."""
        target = self.home.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return target

    def quiet(self) -> Quiet:
        """When learning must wait."""
        zone = ZoneInfo(self.learn_timezone) if self.learn_timezone else None
        return Quiet(
            windows=Windows.parse(self.learn_windows, zone) if self.learn_windows else None,
            budget=CpuBudget(self.learn_cpu_share, self.worker_threads) if self.learn_cpu_share else None,
        )

    def traces_to(self) -> str | None:
        """Where traces are sent: an address, "" for that of OTEL_*, None for nowhere."""
        otel = _Otel()
        if otel.sdk_disabled.lower() == "true" or otel.traces_exporter == "none":
            return None
        elsewhere = otel.exporter_otlp_traces_endpoint or otel.exporter_otlp_endpoint
        return self.trace_endpoint or ("" if elsewhere else None)

    def without_secrets(self) -> dict[str, Any]:
        """The resolved settings, fit to print."""
        return self.model_dump(mode="json", exclude=SECRETS)


class _Otel(BaseSettings):
    """What of OpenTelemetry's own variables decides whether there are traces; the rest its SDK reads."""

    model_config = SettingsConfigDict(env_prefix="OTEL_", extra="ignore")

    sdk_disabled: str = ""
    traces_exporter: str = "otlp"
    exporter_otlp_endpoint: str | None = None
    exporter_otlp_traces_endpoint: str | None = None


class Setting(BaseModel):
    """One setting as it is resolved."""

    setting: str
    value: Any
    source: str


def resolved(**flags: Any) -> list[Setting]:
    """All settings, and where each comes from. Of secrets only whether there are any."""
    settings, origins = Settings(**flags), Settings.origins() | dict.fromkeys(flags, "flag")
    values = settings.without_secrets() | {
        "redis_url": settings.redis_url and without_password(settings.redis_url),
        "trace_endpoint": settings.trace_endpoint and without_password(settings.trace_endpoint),
    }
    values |= {name: bool(getattr(settings, name)) for name in SECRETS}
    return [
        Setting(setting=name, value=values[name], source=origins.get(name, "default"))
        for name in Settings.model_fields
    ]


def without_password(url: str) -> str:
    """A URL fit to be shown."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    shown = url.replace(f"{user}@", f"{user.partition(':')[0]}:***@", 1) if at and ":" in user else url
    return PASSWORDS.sub(r"\1***", shown)
