"""In-process baseline: the speed of decoding, preprocessing, inference and postprocessing in a loop without a server.

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

from bench.payloads import read_image
from pinnace.cpus import available_cpus
from pinnace.memory import limit_malloc_arenas
from pinnace.models.classifier import Classifier
from pinnace.predictor import Request
from pinnace.settings import Settings
from pinnace.tensors import Tensor

BATCH_SIZE = 16  # the fastest of 4, 8, 16 and 32, or within 2 % of it (measured)


class InProcessBaseline:
    """The in-process baseline around a measurement: it is measured before and after, each time in a fresh process."""

    def __init__(self, model_dir: Path, request: Path, seconds: float) -> None:
        """Measure for the first time. `request` is a file with a V1 request; `seconds` is the time per measurement."""
        self._command = [sys.executable, "-m", "bench.baseline", str(model_dir), str(request), str(seconds)]
        self._previous = self._measure()

    def measure_again(self) -> tuple[float, float]:
        """Measure again. Return the mean of this measurement and the previous one.

        Returns:
            Images per second on all cores, and the seconds that a single image takes on all cores.
        """
        before, self._previous = self._previous, self._measure()
        throughput, latency = ((old + new) / 2 for old, new in zip(before, self._previous, strict=True))
        return throughput, latency

    def _measure(self) -> tuple[float, float]:
        measured = json.loads(subprocess.run(self._command, capture_output=True, check=True).stdout)
        return measured["images_per_second"], measured["seconds_per_image"]


def load_classifier(model_dir: Path, threads: int) -> Classifier:
    """Return the model, loaded with so many threads per run."""
    classifier = Classifier(Settings(threads=threads), model_dir)
    classifier.load()
    return classifier


def classify(classifier: Classifier, request: Request) -> None:
    """Do a request's work: preprocess, predict and postprocess."""
    classifier.postprocess(classifier.predict(classifier.preprocess(request)), request)


def measure_latency(classifier: Classifier, image: bytes, seconds: float) -> float:
    """Return the median seconds per image, one image at a time. The classifier should use all cores."""
    request = Request("", (Tensor.from_values("", "BYTES", [1], [image]),))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started_at = time.perf_counter()
        classify(classifier, request)
        times.append(time.perf_counter() - started_at)
    return median(times)


def measure_throughput(classifier: Classifier, image: bytes, seconds: float) -> float:
    """Return the images per second of one thread per core, each with batches of its own.

    The classifier should use one thread per run: then no thread ever waits for another.
    """
    request = Request("", (Tensor.from_values("", "BYTES", [BATCH_SIZE], [image] * BATCH_SIZE),))
    counts = [0] * available_cpus()
    started_at = time.perf_counter()

    def work(number: int) -> None:
        while time.perf_counter() < started_at + seconds:
            classify(classifier, request)
            counts[number] += BATCH_SIZE

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started_at)


def main() -> None:
    """Measure throughput and latency, and print both as JSON."""
    logging.disable()
    limit_malloc_arenas()
    model_dir, image, seconds = Path(sys.argv[1]), read_image(Path(sys.argv[2])), float(sys.argv[3])
    throughput = measure_throughput(load_classifier(model_dir, 1), image, seconds)
    latency = measure_latency(load_classifier(model_dir, available_cpus()), image, seconds / 2)
    sys.stdout.write(json.dumps({"images_per_second": throughput, "seconds_per_image": latency}) + "\n")


if __name__ == "__main__":
    main()
