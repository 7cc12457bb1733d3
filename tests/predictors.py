"""Predictors that are no image classifiers: real ones, served with --predictor by the tests."""

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
    """Answers with the tensor that it got, whatever it is."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array}

    def predict(self, rows: Arrays) -> Arrays:
        return rows

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response([Tensor("output-0", predictions["rows"])])


class Gated(Echo):
    """An instance is the name of a FIFO in model_dir: the request waits there until somebody has written to it."""

    def preprocess(self, request: Request) -> Arrays:
        assert self.model_dir
        (self.model_dir / request.input.array.flat[0].decode()).read_bytes()
        return super().preprocess(request)


class GatedPredict(Gated):
    """The same, on the one thread that predicts."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array}

    def predict(self, rows: Arrays) -> Arrays:
        assert self.model_dir
        (self.model_dir / rows["rows"].flat[0].decode()).read_bytes()
        return rows


class Failing(Echo):
    """An instance is the name of an exception: one of the error table, or one of Python's own, to raise."""

    def preprocess(self, request: Request) -> Arrays:
        name = request.input.array.flat[0].decode()
        kind = getattr(errors, name, None) or getattr(__import__("builtins"), name)
        has_own_text = issubclass(kind, errors.ServingError) and not signature(kind).parameters
        raise kind() if has_own_text else kind("the secret of the text")


class Ending(Echo):
    """An instance is the name of the handler that calls sys.exit."""

    def preprocess(self, request: Request) -> Arrays:
        self._end("preprocess", request.input.array)
        return super().preprocess(request)

    def predict(self, rows: Arrays) -> Arrays:
        self._end("predict", rows["rows"])
        return rows

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        self._end("postprocess", predictions["rows"])
        return super().postprocess(predictions, request)

    def _end(self, handler: str, rows: NDArray[Any]) -> None:
        if rows.flat[0] == handler.encode():
            sys.exit(1)


class Unloadable(Echo):
    def load(self) -> None:
        raise RuntimeError("no such table: weights")


class Threaded(Echo):
    """Has a thread that never ends, and that an interpreter would wait for."""

    def load(self) -> None:
        threading.Thread(target=threading.Event().wait).start()


class EndingLoad(Echo):
    def load(self) -> None:
        sys.exit("no weights")


class GatedLoad(Echo):
    """Loads for as long as nobody writes to the FIFO named gate."""

    def load(self) -> None:
        assert self.model_dir
        (self.model_dir / "gate").read_bytes()


class FromFile(Echo):
    """Answers every instance with the text of the file `model` in model_dir, as it was when it was loaded."""

    def load(self) -> None:
        assert self.model_dir
        self.text = (self.model_dir / "model").read_bytes()

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": np.full(len(rows["rows"]), self.text, object)}


class Knotted(Echo):
    """Refers to itself, and leaves a file `freed` in model_dir. Answers how many objects a full collection looks at."""

    def load(self) -> None:
        self.itself = self

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": np.full(len(rows["rows"]), len(gc.get_objects()))}

    def __del__(self) -> None:
        assert self.model_dir
        (self.model_dir / "freed").touch()


class ProcessId(FromFile):
    """Answers every instance with the number of the process that it reached; the first that is 1 stops it before."""

    has_stopped = False

    def predict(self, rows: Arrays) -> Arrays:
        if not self.has_stopped and 1 in rows["rows"]:
            self.has_stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"rows": np.full(len(rows["rows"]), os.getpid())}


class Forking(ProcessId):
    """Has a process of its own, which outlives it and leaves its number as the name of a file in model_dir."""

    def load(self) -> None:
        super().load()
        assert self.model_dir
        if child := os.fork():
            (self.model_dir / f"child-{child}").touch()
        else:
            signal.pause()


class BatchSize(Echo):
    """Answers every row with how many ran together; one that begins with a slash is a FIFO to wait at, "fail" fails."""

    def predict(self, rows: Arrays) -> Arrays:
        for row in rows["rows"].flat:
            if row == b"fail":
                raise RuntimeError("this row")
            if isinstance(row, bytes) and row.startswith(b"/"):
                Path(row.decode()).read_bytes()
        return {"rows": np.full(len(rows["rows"]), len(rows["rows"]))}


class Slow(BatchSize):
    """A row takes as many seconds as it says."""

    def predict(self, rows: Arrays) -> Arrays:
        time.sleep(sum(float(row) for row in rows["rows"].flat if not row.startswith(b"/")))
        return super().predict(rows)


class EveryCore(BatchSize):
    """The same, with runs that take every core; one that begins with an @ is a FIFO to wait at while decoding."""

    uses_all_cores = True

    def preprocess(self, request: Request) -> Arrays:
        rows = super().preprocess(request)
        for row in rows["rows"].flat:
            if row.startswith(b"@"):
                Path(row[1:].decode()).read_bytes()
        return rows


class Deadly(Echo):
    """A row that is 0 ends the process, as the kernel does where memory runs out."""

    def predict(self, rows: Arrays) -> Arrays:
        if 0 in rows["rows"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


class Lists(BatchSize):
    """Gives rows that are no array yet, and outputs that can be gone through once."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array.tolist()}

    def postprocess(self, predictions: Arrays, request: Request) -> Response:
        return Response(tensor for tensor in super().postprocess(predictions, request).outputs)  # type: ignore[arg-type]


class Added(Echo):
    """Of two inputs."""

    inputs = (TensorSpec("one", "INT64", (-1,)), TensorSpec("other", "INT64", (-1,)))

    def preprocess(self, request: Request) -> Arrays:
        return {tensor.name: tensor.array for tensor in request.inputs}

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": rows["one"] + rows["other"]}


class NoRows(Echo):
    """Loses them all."""

    def preprocess(self, request: Request) -> Arrays:
        return {"rows": request.input.array[:0]}


class TooFew(Echo):
    """Loses a row."""

    def predict(self, rows: Arrays) -> Arrays:
        return {"rows": rows["rows"][1:]}


class ConfiguresLogging(Echo):
    """Brings a configuration of logging of its own, as the tutorial's model does in its main."""

    def load(self) -> None:
        configure_logging(json.loads(os.environ["TEST_LOGGING"]))
