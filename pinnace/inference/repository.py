"""The model repository: the models by name, whether they are ready, and the loads and unloads that clients request."""

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

MAX_PENDING_CHANGES = 16  # loads and unloads that run or wait for their turn


class Repository:
    """The models that are served, in the order of their registration. Clients can neither add a model nor name a path.

    `changed` is set, and replaced by a new event, whenever the readiness of the server or of a model may have changed.
    """

    def __init__(self, models: Iterable[Model], metrics: Metrics, mutable: bool) -> None:
        """Register the models. `mutable` is the setting enable_model_repository: clients may load and unload."""
        self._models = {model.name: model for model in models}
        self._metrics = metrics
        for model in self:
            metrics.set_model_state(model.name, model.metadata.platform, model.is_ready)
        self._loader = ThreadPoolExecutor(1, "loader")
        self._num_pending_changes = 0
        self.mutable = mutable
        self.is_draining = False
        self.is_stuck = False
        """Whether the worker threads are busy with work that takes longer than requests may take."""
        self.changed = asyncio.Event()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def names(self) -> list[str]:
        """Return the names of the models."""
        return list(self._models)

    def is_ready(self, name: str | None = None) -> bool:
        """Return whether probes should see the model as ready; without a name, whether any model is.

        During a drain the answer is no, although requests are still answered. Raises ModelNotFound.
        """
        models = self if name is None else [self.get(name)]
        return not self.is_draining and not self.is_stuck and any(model.is_ready for model in models)

    def get(self, name: str) -> Model:
        """Return the model. Raises ModelNotFound."""
        try:
            return self._models[name]
        except KeyError:
            raise ModelNotFound(name) from None

    def get_ready(self, name: str) -> Model:
        """Return the model if it answers requests now, also during a drain. Raises ModelNotFound and ModelNotReady."""
        model = self.get(name)
        if not model.is_ready:
            raise ModelNotReady(name)
        return model

    def index(self, only_ready: bool) -> list[Model]:
        """Return the models for the index of Triton's model repository extension. Raises NotSupported."""
        self.check_mutable()
        return [model for model in self if model.is_ready or not only_ready]

    async def load(self, name: str) -> None:
        """Load the model from its configured path. Raises NotSupported, ModelNotFound, LoadFailed and Overloaded."""
        await self._enqueue(name, lambda model: model.load())

    async def unload(self, name: str) -> None:
        """Free the model's memory once its requests in flight are answered. Raises what `load` raises."""
        await self._enqueue(name, lambda model: model.unload())

    async def watch(self) -> None:
        """Publish changes of readiness that have other causes, such as a lost replica, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for model in self:
                tasks.create_task(self._watch(model))

    def set_stuck(self, is_stuck: bool) -> None:
        """Report not ready, or ready again, because worker threads are stuck or no longer are."""
        if is_stuck == self.is_stuck:
            return
        self.is_stuck = is_stuck
        if is_stuck:
            logger.error(
                "not ready: every thread that decodes, or a run of a model, has been busy for longer than "
                "request_timeout_seconds"
            )
        else:
            logger.info("ready again: worker threads are free")
        self._notify()

    def drain(self) -> None:
        """Report not ready from now on. Requests are still answered."""
        self.is_draining = True
        self._notify()

    def close(self) -> None:
        """Close the models without waiting for a load or unload that runs."""
        for model in self:
            model.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def check_mutable(self) -> None:
        """Raise NotSupported unless clients may load and unload models."""
        if not self.mutable:
            raise NotSupported("The model repository is off: see --enable_model_repository")

    async def _enqueue(self, name: str, change: Callable[[Model], None]) -> None:
        """Apply a load or unload after those before it. It completes even if its client disconnects."""
        self.check_mutable()
        model = self.get(name)
        if self._num_pending_changes >= MAX_PENDING_CHANGES:
            raise Overloaded("loads and unloads")
        self._num_pending_changes += 1
        work = asyncio.get_running_loop().run_in_executor(self._loader, _apply, model, change)
        work.add_done_callback(partial(self._on_applied, model))
        try:
            await asyncio.shield(work)
        except StartupError:
            raise LoadFailed(name) from None

    def _on_applied(self, model: Model, work: asyncio.Future[None]) -> None:
        self._num_pending_changes -= 1
        if not work.cancelled() and (error := work.exception()):
            logger.error("%s could not be loaded: %s", model.name, error)
        self._publish_readiness(model)

    async def _watch(self, model: Model) -> None:
        while True:
            await model.wait_until_ready_changes()
            self._publish_readiness(model)

    def _publish_readiness(self, model: Model) -> None:
        logger.info("%s is %s", model.name, "ready" if model.is_ready else "not ready")
        self._metrics.set_model_state(model.name, model.metadata.platform, model.is_ready)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


def _apply(model: Model, change: Callable[[Model], None]) -> None:
    change(model)
    collect_and_freeze()
