"""The models by name, and their state: who would answer now, and the loads and unloads that clients ask for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pinnace.errors import LoadFailed, ModelNotFound, ModelNotReady, NotSupported, Overloaded, StartupError
from pinnace.inference.model import Model
from pinnace.memory import collect_and_freeze
from pinnace.observability.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_PENDING_CHANGES = 16  # loads and unloads that wait for their turn


class Repository:
    """The models that are served, in the order of their registration; clients may neither add one nor name a path.

    `changed` is set, and replaced by another event, when the answer to who is ready may have changed.
    """

    def __init__(self, models: Iterable[Model], metrics: Metrics, mutable: bool) -> None:
        """`may_change` is --enable_model_repository."""
        self._models = {model.name: model for model in models}
        self._metrics = metrics
        for model in self:
            metrics.model(model.name, model.metadata.platform, model.ready)
        self._loader = ThreadPoolExecutor(1, "loader")
        self._changes = 0
        self.mutable = mutable
        self.draining = False
        self.changed = asyncio.Event()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def ready(self) -> bool:
        """Whether an inference would be answered now, of one model at least: each tells of itself besides."""
        return not self.draining and any(model.ready for model in self)

    def get(self, name: str) -> Model:
        """Raises ModelNotFound."""
        try:
            return self._models[name]
        except KeyError:
            raise ModelNotFound(name) from None

    def is_ready(self, name: str) -> bool:
        """What probes of one model are told: false in a drain, which still answers. Raises ModelNotFound."""
        return self.get(name).ready and not self.draining

    def check_ready(self, name: str) -> None:
        """The same for probes that are told by an error. Raises ModelNotFound and ModelNotReady."""
        if not self.is_ready(name):
            raise ModelNotReady(name)

    def get_ready(self, name: str) -> Model:
        """Whoever may be asked now. Raises ModelNotFound and ModelNotReady."""
        model = self.get(name)
        model.check_ready()
        return model

    def index(self, only_ready: bool) -> list[Model]:
        """Raises NotSupported."""
        self.check_may_change()
        return [model for model in self if model.ready or not only_ready]

    async def load(self, name: str) -> None:
        """Load the model from where the settings say. Raises NotSupported, ModelNotFound, LoadFailed and Overloaded."""
        await self._change(name, lambda model: model.load())

    async def unload(self, name: str) -> None:
        """Give the model's memory back, once its requests under way are answered. Raises what `load` raises."""
        await self._change(name, lambda model: model.unload())

    async def watch(self) -> None:
        """Tells of models whose readiness changes by itself, as where they run elsewhere; until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for model in self:
                tasks.create_task(self._watch(model))

    def drain(self) -> None:
        """From now on not ready, whatever is answered yet."""
        self.draining = True
        self._announce()

    def close(self) -> None:
        for model in self:
            model.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def check_may_change(self) -> None:
        """Raises NotSupported."""
        if not self.mutable:
            raise NotSupported("The model repository is off: see --enable_model_repository")

    async def _change(self, name: str, change: Callable[[Model], None]) -> None:
        """One after the other, and to its end even if its client leaves."""
        self.check_may_change()
        model = self.get(name)
        if self._changes >= MAX_PENDING_CHANGES:
            raise Overloaded("loads and unloads")
        self._changes += 1
        work = asyncio.get_running_loop().run_in_executor(self._loader, _changed, model, change)
        work.add_done_callback(partial(self._done, model))
        try:
            await asyncio.shield(work)
        except StartupError:
            raise LoadFailed(name) from None

    def _done(self, model: Model, work: asyncio.Future[None]) -> None:
        self._changes -= 1
        if not work.cancelled() and (error := work.exception()):
            logger.error("%s could not be loaded: %s", model.name, error)
        self._tell(model)

    async def _watch(self, model: Model) -> None:
        while True:
            await model.changes()
            self._tell(model)

    def _tell(self, model: Model) -> None:
        logger.info("%s is %s", model.name, "ready" if model.ready else "not ready")
        self._metrics.model(model.name, model.metadata.platform, model.ready)
        self._announce()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _changed(model: Model, change: Callable[[Model], None]) -> None:
    change(model)
    collect_and_freeze()
