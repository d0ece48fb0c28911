"""Encoders for tests that other processes must find too; how they fail is told by files, which all of them see."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np

from dataset_prep.__main__ import main
from dataset_prep.encoders.counts import Counts


class Letters:
    """How often a, b and c occur in a text, and its length."""

    name, source = "letters", "text"

    def __init__(self, *, factor: float = 1.0, seconds: float = 0.0, log: str | None = None) -> None:
        self.settings = {"factor": factor, "width": 4}
        self._factor, self._seconds, self._log = factor, seconds, log
        self.counts = Counts("truncated")

    def fit(self, everything):
        """Nothing to learn."""

    def encode(self, batch):
        time.sleep(self._seconds)
        if self._log:
            with open(self._log, "a") as out:
                out.write(f"{os.getpid()}\n")
        self.counts["truncated"] += sum(len(text) > 12 for text in batch)
        found = [[*map(text.count, "abc"), len(text)] for text in batch]
        return [np.array([self._factor * (n + 0.0) if n else 0.0 for n in row], dtype=np.float32) for row in found]


class Dying(Letters):
    """Ends its process at a text with "die" in it, as long as a file has fewer lines than it may die."""

    def __init__(self, *, log: str, times: int = 1) -> None:
        super().__init__()
        self._deaths, self._times = Path(log), times

    def encode(self, batch):
        died = len(self._deaths.read_text()) if self._deaths.exists() else 0
        if any("die" in text for text in batch) and died < self._times:
            self._deaths.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(batch)


class Failing(Letters):
    """Raises an error at every text."""

    def __init__(self, *, error: type[Exception] = MemoryError, message: str = "") -> None:
        super().__init__()
        self._error, self._message = error, message

    def encode(self, batch):
        raise self._error(self._message)


class Corners:
    """Mean colour of each quarter's corner pixel; several rows of a picture, 0 to 3 by its red."""

    name, source = "corners", "image"

    def __init__(self, *, several: bool = False) -> None:
        self.settings, self._several = {"several": several}, several

    def fit(self, everything):
        """Nothing to learn."""

    def transform(self, image):
        return np.asarray(image, dtype=np.float32)[0, 0]  # [3]

    def encode(self, batch):
        if not self._several:
            return list(batch)
        return [np.arange(3 * (int(red) % 4), dtype=np.float32).reshape(-1, 3) + 1 for red, _, _ in batch]


class Crashing(Corners):
    """Whose transform ends its process at a picture that begins with the given red."""

    def __init__(self, *, red: int) -> None:
        super().__init__()
        self._red = red
        self.transform = partial(crash, red=red)


def crash(image, *, red):
    if image.getpixel((0, 0))[0] == red:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(image, dtype=np.float32)[0, 0]


if __name__ == "__main__":  # the command line, with small shards and one more encoder
    import sys

    import dataset_prep.encoders.text
    import dataset_prep.features

    dataset_prep.features.TEXTS_AT_ONCE = 2
    dataset_prep.encoders.KNOWN["letters"] = "text:Letters"
    dataset_prep.encoders.text.Letters = Letters
    sys.exit(main(sys.argv[1:]))
