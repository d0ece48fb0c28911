"""How long it takes to read and clean reviews and metadata, and how much memory.

    python -m benchmarks.reading                1 million reviews, 100,000 items, some minutes to make them up
    python -m benchmarks.reading --quick        a hundredth of it, to see that everything works
    python -m benchmarks.reading --keep FOLDER  leave the made-up files there, and use them again

The files have the form of the 2018 edition, gzipped: reviews of some 520 characters with everything that such a row
has, and metadata of some 1,500. Users and items follow a Zipf law, some lines stand twice, and prices are of all kinds.
What is measured is `prepare` as the command ``python -m dataset_prep amazon`` calls it, from the files to a complete
folder (filters, k-core, leave-one-out, table of items), in a process of its own: wall-clock seconds, and the highest
resident size of that process. ``reading`` is the part in which the two files are read, without the rest. The process
is held to two cores where the system allows it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

N_REVIEWS, N_ITEMS = 1_000_000, 100_000
QUICK = 100
N_CORES = 2
TARGET_SECONDS, TARGET_GIB = 60, 1.0
PRICES = ("$12.99", "$1,299.00", "$5.00 - $15.00", "", ".a-box-inner{background-color:#fff}")


def make_files(folder: Path, *, n_reviews: int, n_items: int) -> None:
    """Write ``reviews.json.gz`` and ``meta.json.gz``; same arguments, same bytes."""
    draw = random.Random(2018)
    prose = _prose(draw)
    items = [f"B{number:09d}" for number in draw.sample(range(10**9), n_items)]
    users = [f"A{number:013d}" for number in draw.sample(range(10**13), n_reviews // 8)]

    def text(low: int, high: int) -> str:
        length = draw.randrange(low, high)
        start = draw.randrange(len(prose) - length)
        return prose[start : start + length]

    def popular(names: list[str]) -> str:
        return names[int(len(names) ** draw.random()) - 1]  # the k-th has a share of about 1 / k

    with gzip.open(folder / "reviews.json.gz", "wt", compresslevel=4, encoding="utf-8") as out:
        line = ""
        for number in range(n_reviews):
            if not number or draw.random() > 0.01:  # else the same once more
                moment = 1_300_000_000 + 86_400 * draw.randrange(2_600)
                item = popular(items) if draw.random() < 0.5 else draw.choice(items)
                row = {
                    "overall": float(draw.randrange(1, 6)), "verified": draw.random() < 0.9,
                    "reviewTime": time.strftime("%m %d, %Y", time.gmtime(moment)), "reviewerID": draw.choice(users),
                    "asin": item, "style": {"Color:": " Black"}, "reviewerName": text(5, 20),
                    "reviewText": text(150, 400), "summary": text(5, 40), "unixReviewTime": moment,
                }  # fmt: skip
                line = json.dumps(row) + "\n"
            out.write(line)
    with gzip.open(folder / "meta.json.gz", "wt", compresslevel=4, encoding="utf-8") as out:
        for number, item in enumerate(items):
            address = f"https://images-na.ssl-images-amazon.com/images/I/{number:09d}L"
            row = {
                "category": ["Office Products", text(8, 20), text(8, 20)], "tech1": "",
                "description": [f"<p>{text(100, 500)} &amp;amp; more</p>"], "fit": "", "title": text(20, 120),
                "also_buy": draw.sample(items, 10), "tech2": "", "brand": text(4, 12), "feature": [text(50, 100)] * 3,
                "rank": "12 in Office Products", "also_view": draw.sample(items, 5), "details": {"ASIN: ": item},
                "main_cat": "Office Products", "similar_item": "", "date": "", "price": draw.choice(PRICES),
                "asin": item, "imageURL": [address + "._SX38_.jpg"], "imageURLHighRes": [address + ".jpg"],
            }  # fmt: skip
            out.write(json.dumps(row) + "\n")


def _prose(draw: random.Random) -> str:
    """Some 200,000 characters of made-up words."""
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randrange(2, 10))) for _ in range(4_000)]
    return " ".join(draw.choices(words, k=32_000))


def measure(folder: Path) -> dict[str, float]:
    """Prepare the files of a folder in this process; seconds, GiB and counts."""
    import resource

    from dataset_prep.preparation import prepare
    from dataset_prep.preparation_settings import PreparationSettings
    from dataset_prep.sources.amazon import AmazonSource

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:N_CORES])
    reading = 0.0

    class Timed(AmazonSource):
        def events(self, rejects):
            nonlocal reading
            start = time.perf_counter()
            events = super().events(rejects)
            reading += time.perf_counter() - start
            return events

        def items(self, wanted, rejects):
            nonlocal reading
            rows, start = super().items(wanted, rejects), time.perf_counter()
            for item in rows:
                reading += time.perf_counter() - start
                yield item
                start = time.perf_counter()
            reading += time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=folder) as out:
        start = time.perf_counter()
        source = Timed(folder / "reviews.json.gz", folder / "meta.json.gz", progress=False)
        report = prepare(source, Path(out) / "made_up", PreparationSettings(duplicates="first"))
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1 << 10  # bytes of ru_maxrss
    return {
        "seconds": seconds,
        "reading": reading,
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "n_read": report.n_read,
        "n_items": report.n_items,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the made-up files are left")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    share = QUICK if options.quick else 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)) / f"{N_REVIEWS // share}_{N_ITEMS // share}"
        if not (folder / "meta.json.gz").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            make_files(folder, n_reviews=N_REVIEWS // share, n_items=N_ITEMS // share)
        command = [sys.executable, "-m", "benchmarks.reading", "--measure", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['n_read']:,} reviews and {N_ITEMS // share:,} rows of metadata; {found['n_items']:,} items are left")
    print(f"all       {found['seconds']:6.1f} s   (target: under {TARGET_SECONDS} s for a million)")
    print(f"reading   {found['reading']:6.1f} s")
    print(f"memory    {found['GiB']:6.2f} GiB at most (target: under {TARGET_GIB:g} GiB)")


if __name__ == "__main__":
    main()
