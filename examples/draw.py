"""This script draws picture.jpg, a traffic light in the evening, and writes input.json: `python -m examples.draw`."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 480, 360
LAMPS = ((235, 60, 45), (90, 75, 20), (25, 80, 45))


def draw() -> Image.Image:
    """Return the picture."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(picture)
    for y in range(HEIGHT):
        share = y / HEIGHT
        pen.line((0, y, WIDTH, y), fill=(int(70 + 160 * share), int(110 + 60 * share), int(170 - 60 * share)))
    for left, top in ((0, 250), (90, 215), (330, 235), (410, 190)):
        pen.rectangle((left, top, left + 85, HEIGHT), fill=(52, 50, 66))
        for x in range(left + 10, left + 80, 18):
            for y in range(top + 12, HEIGHT, 24):
                pen.rectangle((x, y, x + 8, y + 11), fill=(240, 205, 120) if (x + y) % 5 else (70, 68, 84))
    pen.rectangle((232, 240, 248, HEIGHT), fill=(45, 45, 48))
    pen.rounded_rectangle((190, 40, 290, 260), 14, fill=(28, 28, 31), outline=(60, 60, 64), width=4)
    for number, colour in enumerate(LAMPS):
        top = 56 + 68 * number
        pen.ellipse((210, top, 270, top + 60), fill=colour, outline=(12, 12, 12), width=4)
        pen.arc((203, top - 8, 277, top + 66), 200, 340, fill=(12, 12, 12), width=7)
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def main() -> None:
    """Write both files beside this module."""
    folder = Path(__file__).parent
    draw().save(folder / "picture.jpg", quality=88)
    picture = base64.b64encode((folder / "picture.jpg").read_bytes()).decode()
    (folder / "input.json").write_text(json.dumps({"instances": [{"image": {"b64": picture}}]}) + "\n")


if __name__ == "__main__":
    main()
