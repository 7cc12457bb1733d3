"""Results of the clients, written for people (text) or programs (csv, json)."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class Result:
    """The classes of a picture: labels and probabilities, the highest first, and the request's duration."""

    picture: str
    milliseconds: float
    classes: list[tuple[str, float]]


class Report:
    """Writer of results. It writes each at once; `close` writes the end that JSON needs."""

    def __init__(self, output_format: str, file: TextIO) -> None:
        """Write to `file` as text, csv or json."""
        self._format = output_format
        self._file = file
        self._csv = csv.writer(file)
        self._count = 0
        if output_format == "csv":
            self._csv.writerow(["picture", "milliseconds", "rank", "label", "probability"])

    def write(self, result: Result) -> None:
        """Write one result, and flush."""
        if self._format == "text":
            self._file.write(f"{result.picture}  {result.milliseconds:.0f} ms\n")
            self._file.writelines(f"  {probability:6.1%}  {label}\n" for label, probability in result.classes)
        elif self._format == "csv":
            for rank, (label, probability) in enumerate(result.classes, 1):
                self._csv.writerow([result.picture, f"{result.milliseconds:.1f}", rank, label, f"{probability:.6f}"])
        else:
            self._file.write("," if self._count else "[")
            classes = [{"label": label, "probability": probability} for label, probability in result.classes]
            self._file.write(f"\n{json.dumps(asdict(result) | {'classes': classes}, ensure_ascii=False)}")
        self._count += 1
        self._file.flush()

    def close(self) -> None:
        """Write the end of the report. The file stays open."""
        if self._format == "json":
            self._file.write("\n]\n" if self._count else "[]\n")
