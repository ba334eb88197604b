"""From settings to a loaded policy and its store: what the server and the worker do alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog
import torch

from servetune.adapters.family import Family
from servetune.adapters.policy import LoraSpec, Policy
from servetune.adapters.sharing import share_weights
from servetune.adapters.store import AdapterStore
from servetune.adapters.versions import Manifest, StoreError
from servetune.nano import WEIGHTS
from servetune.server.settings import Settings
from servetune.server.valkey import try_lock

log = structlog.get_logger()


def load_policy(settings: Settings, slots: Sequence[str], threads: int, stays: bool = False) -> Policy:
    """Load the model of the settings with a thread budget of its own.

    Two processes that both use every core slow each other tenfold, so nobody takes the default.

    Args:
        stays: for as long as a server runs. Such processes have the base weights in memory once, in a file of
            their size under the home; what only looks at a model leaves no such file.

    Raises:
        UnsupportedModel: see `Family.load`.
    """
    torch.set_num_threads(threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = str(WEIGHTS) if settings.model == "nano" else settings.model
    family = Family.load(source, device, getattr(torch, _dtype(settings, device)))
    if stays and settings.share_weights:
        _share(settings, family)
    spec = LoraSpec(settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    return Policy(family, spec, slots, settings.feature_cache_bytes)


def _share(settings: Settings, family: Family) -> None:
    try:
        share_weights(family.model, settings.path("weights", "x").parent)
    except OSError as error:  # a full disk, for instance: it takes more memory then
        log.warning("weights_not_shared", error=type(error).__name__)


def _dtype(settings: Settings, device: str) -> str:
    """bfloat16 where the hardware multiplies it faster: on GPUs and on processors with AMX.

    Others have instructions for it (AVX512-BF16) and yet are slower than in float32. nano is too small to gain,
    and its figures are to be the same on every machine.
    """
    if settings.dtype != "auto":
        return settings.dtype
    if device.startswith("cuda"):
        return "bfloat16"
    faster = settings.model != "nano" and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if faster else "float32"


class Stores:
    """The stores of all adapters of a home, for one base model."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self._root = settings.path("store", "x").parent
        policy.use(None)
        self._zero = policy.zero_weights(), policy.peft_config(), policy.base_digest, policy.probe()
        self._fit: dict[str, bool] = {}  # what a folder is for changes only when it is rebased

    def names(self) -> list[str]:
        """The adapters there are for this model, in order; a home may hold those of others as well."""
        return sorted(name for path in self._root.glob("*/aliases.json") if self._fits(name := path.parent.name))

    def foreign(self) -> list[str]:
        """The adapters of the home that were made for another model or shape, in order."""
        there = {path.parent.name for path in self._root.glob("*/aliases.json")}
        return sorted(name for name in there if not self._fits(name))

    def _fits(self, name: str) -> bool:
        if name not in self._fit:
            _, config, base_digest, _ = self._zero
            try:
                self._fit[name] = self.at(name).fits(config, base_digest)
            except StoreError:  # damaged: who asks for it is to hear that
                return True
        return self._fit[name]

    def at(self, adapter: str) -> AdapterStore:
        """An adapter's store, as it is."""
        return AdapterStore(self._root, adapter)

    def open(self, adapter: str) -> AdapterStore:
        """An adapter's store, with version 0 in place; made where there is none.

        Raises:
            ForeignStore: the home holds this adapter for another base model or shape.
        """
        store = self.at(adapter)
        store.initialise(*self._zero)
        return store

    def rebase(self, adapter: str) -> Manifest | None:
        """Begin an adapter again on this model; None where it is of this model already.

        Raises UnknownVersion where there is none of that name.
        """
        made = self.at(adapter).rebase(*self._zero)
        self._fit.pop(adapter, None)
        return made


def open_store(settings: Settings, policy: Policy) -> AdapterStore:
    """The store of the adapter that the settings name. Raises as `Stores.open` does."""
    return Stores(settings, policy).open(settings.adapter)


@contextmanager
def worker_lock(settings: Settings) -> Iterator[Callable[[], bool]]:
    """A call that tries to become the only worker of the adapter and home, which it then stays until the end."""
    with settings.path("store", f"{settings.adapter}.worker.lock").open("w") as file:
        yield lambda: try_lock(file.fileno())
