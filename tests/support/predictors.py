"""Predictors that the tests serve with --predictor. None is an image classifier."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinnace import errors
from pinnace.observability.logging import configure_logging
from pinnace.predictor import Arrays, Predictor, Request, Response
from pinnace.tensors import Tensor, TensorSpec


class Echo(Predictor):
    """Answers every request with its own input tensor."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array}

    def predict(self, rows: Arrays) -> Arrays:
        return rows

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response([Tensor("output-0", predictions["rows"])])


class Gated(Echo):
    """Holds each request in `preprocess`, at a gate: a FIFO in model_dir that the request's first value names.

    The request waits until a test has opened the FIFO for writing and closed it again; see `make_gate`.
    """

    def preprocess(self, request: Request) -> Arrays:
        assert self.model_dir
        (self.model_dir / request.input.array.flat[0].decode()).read_bytes()
        return super().preprocess(request)


class GatedPredict(Gated):
    """Holds each request in `predict`, which runs on one thread."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array}

    def predict(self, rows: Arrays) -> Arrays:
        assert self.model_dir
        (self.model_dir / rows["rows"].flat[0].decode()).read_bytes()
        return rows


class Failing(Echo):
    """Raises the exception that the instance names: one of pinnace.errors, or one of Python's own."""

    def preprocess(self, request: Request) -> Arrays:
        name = request.input.array.flat[0].decode()
        error_class = getattr(errors, name, None) or getattr(__import__("builtins"), name)
        has_own_text = issubclass(error_class, errors.ServingError) and not signature(error_class).parameters
        raise error_class() if has_own_text else error_class("the secret of the text")


class Exiting(Echo):
    """Calls sys.exit in the handler that the instance names."""

    def preprocess(self, request: Request) -> Arrays:
        self._exit_in("preprocess", request.input.array)
        return super().preprocess(request)

    def predict(self, rows: Arrays) -> Arrays:
        self._exit_in("predict", rows["rows"])
        return rows

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        self._exit_in("postprocess", predictions["rows"])
        return super().postprocess(predictions, request)

    def _exit_in(self, handler: str, rows: NDArray[Any]) -> None:
        if rows.flat[0] == handler.encode():
            sys.exit(1)


class FailingLoad(Echo):
    """Cannot be loaded."""

    def load(self) -> None:
        raise RuntimeError("no such table: weights")


class HugeLoad(Echo):
    """Needs more memory than any machine has."""

    def load(self) -> None:
        bytearray(1 << 60)


class WithThread(Echo):
    """Starts a thread that never ends. It is no daemon, so that the interpreter would wait for it."""

    def load(self) -> None:
        threading.Thread(target=threading.Event().wait).start()


class ExitingLoad(Echo):
    """Calls sys.exit while it is loaded."""

    def load(self) -> None:
        sys.exit("no weights")


class GatedLoad(Echo):
    """Holds its load at the FIFO `gate` in model_dir, until a test has opened it for writing and closed it."""

    def load(self) -> None:
        assert self.model_dir
        (self.model_dir / "gate").read_bytes()


class FromFile(Echo):
    """Answers every instance with the text that the file `model` in model_dir had at load time."""

    def load(self) -> None:
        assert self.model_dir
        self.text = (self.model_dir / "model").read_bytes()

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": np.full(len(rows["rows"]), self.text, object)}


class Large(Echo):
    """Answers every row with a million bytes."""

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": np.full(len(rows["rows"]), b"x" * 1_000_000, object)}


class SelfReferencing(Echo):
    """Answers with the number of objects that a full garbage collection examines.

    It refers to itself, so that only a collection frees it. When freed, it writes the file `freed` to model_dir.
    """

    def load(self) -> None:
        self.itself = self

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": np.full(len(rows["rows"]), len(gc.get_objects()))}

    def __del__(self) -> None:
        assert self.model_dir
        (self.model_dir / "freed").touch()


class ProcessId(FromFile):
    """Answers every instance with the process id. At the first instance 1, the process stops itself with SIGSTOP."""

    has_stopped = False

    def predict(self, rows: Arrays) -> Arrays:
        if not self.has_stopped and 1 in rows["rows"]:
            self.has_stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"rows": np.full(len(rows["rows"]), os.getpid())}


class Forking(ProcessId):
    """Forks a process that outlives it, and names a file in model_dir after the id of that process."""

    def load(self) -> None:
        super().load()
        assert self.model_dir
        if child := os.fork():
            (self.model_dir / f"child-{child}").touch()
        else:
            signal.pause()


class BatchSize(Echo):
    """Answers every row with the number of rows in its batch.

    A row that begins with a slash is the path of a gate that holds the run. The row "fail" makes the run fail.
    """

    def predict(self, rows: Arrays) -> Arrays:
        for row in rows["rows"].flat:
            if row == b"fail":
                raise RuntimeError("this row")
            if isinstance(row, bytes) and row.startswith(b"/"):
                Path(row.decode()).read_bytes()
        return {"rows": np.full(len(rows["rows"]), len(rows["rows"]))}


class Slow(BatchSize):
    """Takes as many seconds per row as the row says."""

    def predict(self, rows: Arrays) -> Arrays:
        time.sleep(sum(float(row) for row in rows["rows"].flat if not row.startswith(b"/")))
        return super().predict(rows)


class AllCores(BatchSize):
    """A BatchSize whose runs use all cores. A row that begins with @ is the path of a gate that holds the decoding."""

    uses_all_cores = True

    def preprocess(self, request: Request) -> Arrays:
        rows = super().preprocess(request)
        for row in rows["rows"].flat:
            if row.startswith(b"@"):
                Path(row[1:].decode()).read_bytes()
        return rows


class KillsItself(Echo):
    """Ends its process at the row 0, as the kernel does when memory runs out."""

    def predict(self, rows: Arrays) -> Arrays:
        if 0 in rows["rows"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


class ListRows(BatchSize):
    """Returns rows as a list instead of an array, and outputs as a generator instead of a list."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array.tolist()}

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response(tensor for tensor in super().postprocess(predictions, request).outputs)  # type: ignore[arg-type]


class Sum(Echo):
    """Answers with the sum of its two inputs."""

    inputs = (TensorSpec("left", "INT64", (-1,)), TensorSpec("right", "INT64", (-1,)))

    def preprocess(self, request: Request) -> Arrays:
        return {tensor.name: tensor.array for tensor in request.inputs}

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": rows["left"] + rows["right"]}


class LosesAllRows(Echo):
    """Returns no rows from `preprocess`."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array[:0]}


class LosesRow(Echo):
    """Returns one row too few from `predict`."""

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": rows["rows"][1:]}


class ConfiguresLogging(Echo):
    """Configures logging itself, as the tutorial's model does in its main function."""

    def load(self) -> None:
        configure_logging(json.loads(os.environ["TEST_LOGGING"]))
