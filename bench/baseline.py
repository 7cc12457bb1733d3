"""What the cores can do with no server: decode, resize, run and answer in a bare loop.

`python -m bench.baseline MODEL_DIR REQUEST SECONDS` prints one line of JSON.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

from bench.payloads import picture
from pinnace.cpus import available_cpus
from pinnace.memory import limit_malloc_arenas
from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor

BATCH = 16  # the best of 4, 8, 16 and 32, or within 2 % of it (measured)


class Baseline:
    """The limit before and after what is measured, each time in a process of its own."""

    def __init__(self, model_dir: Path, request: Path, seconds: float) -> None:
        self._command = [sys.executable, "-m", "bench.baseline", str(model_dir), str(request), str(seconds)]
        self._before = self._measure()

    def around(self) -> tuple[float, float]:
        """Images a second on all cores, seconds of one alone: the mean of now and of the last time."""
        before, self._before = self._before, self._measure()
        rate, alone = ((one + other) / 2 for one, other in zip(before, self._before, strict=True))
        return rate, alone

    def _measure(self) -> tuple[float, float]:
        measured = json.loads(subprocess.run(self._command, capture_output=True, check=True).stdout)
        return measured["images_per_second"], measured["alone_seconds"]


def loaded(model_dir: Path, threads: int) -> Classifier:
    classifier = Classifier(Settings(threads=threads), model_dir)
    classifier.load()
    return classifier


def answer(classifier: Classifier, request: Request) -> None:
    classifier.postprocess(classifier.predict(classifier.preprocess(request)), request)


def alone_seconds(classifier: Classifier, image: bytes, seconds: float) -> float:
    """The median time of one image at a time, on all cores."""
    request = Request("", (Tensor.from_values("", "BYTES", [1], [image]),))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started_at = time.perf_counter()
        answer(classifier, request)
        times.append(time.perf_counter() - started_at)
    return median(times)


def images_per_second(classifier: Classifier, image: bytes, seconds: float) -> float:
    """A thread a core, each with batches and with one thread of the engine: nothing waits for anything."""
    request = Request("", (Tensor.from_values("", "BYTES", [BATCH], [image] * BATCH),))
    done = [0] * available_cpus()
    started_at = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() < started_at + seconds:
            answer(classifier, request)
            done[number] += BATCH

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(done))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started_at)


def main() -> None:
    logging.disable()
    limit_malloc_arenas()
    model_dir, image, seconds = Path(sys.argv[1]), picture(Path(sys.argv[2])), float(sys.argv[3])
    rate = images_per_second(loaded(model_dir, 1), image, seconds)
    alone = alone_seconds(loaded(model_dir, available_cpus()), image, seconds / 2)
    sys.stdout.write(json.dumps({"images_per_second": rate, "alone_seconds": alone}) + "\n")


if __name__ == "__main__":
    main()
