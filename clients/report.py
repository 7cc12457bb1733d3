"""What was found in pictures, written for people (text) or programs (csv, json)."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class Result:
    """Labels and their probabilities, the highest first; `milliseconds` from the request to the answer."""

    picture: str
    milliseconds: float
    classes: list[tuple[str, float]]


class Report:
    """Written as it goes; `close` writes what must come last."""

    def __init__(self, style: str, file: TextIO) -> None:
        """`style` is text, csv or json."""
        self._style = style
        self._file = file
        self._csv = csv.writer(file)
        self._written = 0
        if style == "csv":
            self._csv.writerow(["picture", "milliseconds", "rank", "label", "probability"])

    def write(self, found: Result) -> None:
        if self._style == "text":
            self._file.write(f"{found.picture}  {found.milliseconds:.0f} ms\n")
            self._file.writelines(f"  {probability:6.1%}  {label}\n" for label, probability in found.classes)
        elif self._style == "csv":
            for rank, (label, probability) in enumerate(found.classes, 1):
                self._csv.writerow([found.picture, f"{found.milliseconds:.1f}", rank, label, f"{probability:.6f}"])
        else:
            self._file.write("," if self._written else "[")
            entry = asdict(found) | {"classes": [{"label": one, "probability": share} for one, share in found.classes]}
            self._file.write(f"\n{json.dumps(entry, ensure_ascii=False)}")
        self._written += 1
        self._file.flush()

    def close(self) -> None:
        if self._style == "json":
            self._file.write("\n]\n" if self._written else "[]\n")
