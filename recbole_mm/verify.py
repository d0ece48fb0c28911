"""Command line: repeat a recorded run, and say whether its metrics come out again.

python -m recbole_mm.verify RUN [--tolerance 0.005] [--runs-file results/runs.jsonl] [--data-path dataset]

  record --> same data and features? --> same versions? --> train and test again --> same metrics?
               no: cannot verify           no: say so         nothing is recorded      within the tolerance
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recbole_mm.errors import EXIT_INTERRUPTED, DatasetError, RecBoleMMError, SettingError, exit_code_of, nearest
from recbole_mm.records import NOT_IDENTITY, RUNS_FILE, RunRecord, load, read_per_user

TOLERANCE = 0.005
DESCRIPTION = """\
Repeat a recorded run with its settings and its seed, and compare the metrics. Nothing is added to the file of runs.

RUN is the id of a run, the beginning of one, "last", or "line:3" for the third run of the file.
"""
EPILOG = f"""\
The tolerance is absolute and holds for each metric, of test and validation. On the same machine with the same versions
a run comes out exactly, also with --tolerance=0; other processors, numbers of threads and versions add numbers in
another order, and {TOLERANCE} leaves room for that.

exit code: 0 within the tolerance, 1 not, 2 no such run or wrong usage, 3 the data are not those of the record, 4 the
machine gave up, 5 interrupted
"""
_SHOWN = 5  # runs, where the one asked for is not found
_ROUNDED = 1e-5  # records hold metrics rounded to six places


class Line(NamedTuple):
    """One metric, such as "recall@20" of "test"; None where a run has no such metric."""

    part: str
    metric: str
    recorded: float | None
    repeated: float | None

    @property
    def difference(self) -> float:
        if self.recorded is None or self.repeated is None:
            return float("nan")
        return self.repeated - self.recorded

    def within(self, tolerance: float) -> bool:
        return abs(self.difference) <= tolerance + 1e-12  # the difference of two decimals is not exact


@dataclass(frozen=True)
class Verification:
    """What repeating a run came to.

    Attributes:
        repeated: the record of the repetition, which is in no file.
        notes: what differs between the two runs apart from metrics, in sentences.
        contradictions: what in the record contradicts itself, or contradicts the repetition.
        lines: test metrics, then those of validation.
    """

    record: RunRecord
    repeated: RunRecord
    tolerance: float
    notes: list[str]
    contradictions: list[str]
    lines: list[Line]

    @property
    def within(self) -> bool:
        return not self.contradictions and all(line.within(self.tolerance) for line in self.lines)

    def __str__(self) -> str:
        """A table and one sentence."""
        rows = [("", "metric", "recorded", "repeated", "difference", "within?")]
        for line in self.lines:
            yes = "yes" if line.within(self.tolerance) else "NO"
            rows.append((line.part, line.metric, *map(_number, line[2:]), f"{line.difference:+.6f}", yes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        name = f"{_titled(self.record)}, run {self.record.run_id}"
        if self.within:
            verdict = f"verified: {name} comes out again within {self.tolerance:g}"
        else:
            verdict = f"NOT verified: {name} does not come out again within {self.tolerance:g}"
        n_test = self.repeated.n_test
        unit = [f"one of {n_test} test rows is worth {1 / n_test:.6f} of a recall"] if n_test else []
        return "\n".join([*table, *unit, *self.contradictions, verdict])


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6f}"


def _titled(record: RunRecord) -> str:
    knocked_out = f", knocked out {record.knockout}" if record.knockout else ""
    return f"{record.model} on {record.dataset}, seed {record.seed}{knocked_out}"


def verify(
    run: str,
    *,
    runs_file: Path | str = RUNS_FILE,
    tolerance: float = TOLERANCE,
    data_path: Path | str | None = None,
    tell: Callable[[str], Any] = print,
) -> Verification:
    """Repeat a recorded run.

    Args:
        run: its id, the beginning of it, "last", or "line:3" for the third one.
        tolerance: largest difference of a metric, absolute.
        data_path: where the folder of the dataset is now; None for where it was.
        tell: gets what is to be known before the training, in sentences.

    Returns:
        Both results.

    Raises:
        SettingError: no such run, one that failed, or a checkpoint that it started from is gone.
        DatasetError: interactions, features or item columns are not those of the record.
        RecBoleMMError: the run cannot be repeated.
    """
    from recbole_mm import quick_start

    if not 0 <= tolerance < float("inf"):
        raise SettingError(f"--tolerance must be at least 0, found {tolerance}")
    record = find_run(run, Path(runs_file), tell=tell)
    folder = _folder_of(record, data_path)
    _check_data(record, folder)
    settings, notes = _settings_of(record, folder)
    notes = [*_versions(record), *notes]
    for note in notes:
        tell(note)
    with tempfile.TemporaryDirectory() as checkpoints:
        repeated = quick_start.run(
            record.model,
            record.dataset,
            settings={**settings, "checkpoint_dir": checkpoints},
            runs_file=None,
        )
    _check_rows(record, repeated)
    lines = [
        Line(name, metric, recorded.get(metric), again.get(metric))
        for name, recorded, again in (
            ("test", record.test, repeated.test),
            ("valid", record.valid, repeated.valid),
        )
        for metric in {**recorded, **again}
    ]
    return Verification(record, repeated, tolerance, notes, _contradictions(record, Path(runs_file)), lines)


# ------------------------------------------------ which run


def find_run(run: str, runs_file: Path, *, tell: Callable[[str], Any] = print) -> RunRecord:
    """The record that an id, the beginning of an id, "last" or "line:3" stands for.

    Raises:
        SettingError: none, several, or a run without a result.
        DatasetError: there is no such file.
    """
    records, problems = load(runs_file)
    for problem in problems:
        tell(problem)
    if not records:
        raise SettingError(f"{runs_file} has no run to verify")
    number = run.removeprefix("line:")
    if run == "last":
        found = records[-1:]
    elif number != run:
        if problems:
            raise SettingError(
                f"lines of {runs_file} cannot be read, so that they cannot be counted; name the run's id"
            )
        found = records[int(number) - 1 :][:1] if number.isdecimal() and int(number) > 0 else []
    else:
        found = [record for record in records if run and record.run_id == run]
        found = found or [record for record in records if run and record.run_id.startswith(run)]
    if not found:
        near = nearest(run, {record.run_id for record in records})
        raise SettingError(f"no run {run!r} in {runs_file}{near}\n{_listed('the last ones', records)}")
    if len(found) > 1:
        raise SettingError(f"{run!r} stands for {len(found)} runs of {runs_file}\n{_listed('the last of them', found)}")
    (record,) = found
    if record.status == "failed":
        raise SettingError(f"the run {record.run_id} failed, and has no result to verify: {record.error}")
    if not record.test:
        raise SettingError(f"the run {record.run_id} has no test metrics to verify")
    return record


def _listed(what: str, records: Sequence[RunRecord]) -> str:
    rows = [f"    {each.run_id or '(no id)':<12}  {each.started[:16]}  {_titled(each)}" for each in records[-_SHOWN:]]
    return "\n".join([f"  {what}:", *rows])


# ------------------------------------------------ what it was made from


def _folder_of(record: RunRecord, data_path: Path | str | None) -> Path:
    from recbole_mm.config import make_demo_folder, missing_folder_message

    folder = Path(data_path) / record.dataset if data_path else Path(str(record.settings.get("data_path", "dataset")))
    if folder.name != record.dataset:  # a record that holds the folder above
        folder = folder / record.dataset
    make_demo_folder(record.dataset, folder.parent)
    if not folder.is_dir():
        raise DatasetError(f"{missing_folder_message(folder)}\n  or say where it is now, with --data-path=FOLDER")
    return folder


def _check_data(record: RunRecord, folder: Path) -> None:
    """Interactions, features and item columns are those of the record.

    Raises:
        DatasetError: naming all that differ.
    """
    from recbole_mm.data.files import sha256_of
    from recbole_mm.data.layout import Manifest, data_fingerprint
    from recbole_mm.plan import ITEM_FILE

    manifest, item_file = Manifest.load(folder), folder / f"{folder.name}.item"
    then = {"the interactions": record.data_fingerprint}
    now = {"the interactions": data_fingerprint(folder)}
    then |= {f"the feature {name}": digest for name, digest in record.features.items()}
    now |= {f"the feature {name}": manifest.files[info.file].sha256 for name, info in manifest.features.items()}
    digest = (record.settings.get("inputs") or {}).get(ITEM_FILE)
    if record.settings.get("field_hashes") and digest:
        then["the item file"] = digest
        now["the item file"] = sha256_of(item_file) if item_file.is_file() else None
    differ = [
        f"  - {name}: {str(digest)[:12]} then, {str(now.get(name, 'gone'))[:12]} now"
        for name, digest in then.items()
        if now.get(name) != digest
    ]
    if differ:
        raise DatasetError(
            f"cannot verify run {record.run_id}: {folder} is not what it was made from\n"
            + "\n".join(differ)
            + "\n  prepare the folder as it was, or name the right one with --data-path"
        )


def _check_rows(record: RunRecord, repeated: RunRecord) -> None:
    """The two runs were tested on the same rows with the same candidates, and read the same columns and features.

    Raises:
        DatasetError: they were not, and cannot be compared.
    """
    pairs = {
        "the test rows and candidates": (record.test_fingerprint, repeated.test_fingerprint),
        "the number of test rows": (record.n_test, repeated.n_test),
        "the item columns": (record.settings.get("field_hashes"), repeated.settings.get("field_hashes")),
        "the features": (sorted(record.features), sorted(repeated.features)),
    }
    differ = [f"{what} ({then}, now {now})" for what, (then, now) in pairs.items() if then and then != now]
    if differ:
        raise DatasetError(f"cannot verify run {record.run_id}: not the same: {'; '.join(differ)}")


def _versions(record: RunRecord) -> list[str]:
    """What differs of packages and of the machine."""
    import torch

    from recbole_mm.quick_start import installed_versions

    now = installed_versions()
    notes = [
        f"not the same version: {name} {then} then, {now.get(name, 'none')} now"
        for name, then in record.versions.items()
        if now.get(name) != then
    ]
    on_gpu = "gpu" in record.peak_memory
    if on_gpu != torch.cuda.is_available():
        notes.append(f"not the same kind of machine: {'with' if on_gpu else 'without'} a GPU then, not so now")
    return notes


def _settings_of(record: RunRecord, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What to give, so that all settings are those of the record; what had to be given because defaults changed.

    Raises:
        SettingError: a setting is not known any more, or the checkpoint of pre-training is gone.
    """
    from recbole_mm.checkpoint import plain
    from recbole_mm.config import Config, identity_of
    from recbole_mm.plan import ITEM_FILE, inputs_of

    given = {key: value for key, value in record.settings_given.items() if key not in ("model", "dataset")}
    given |= {"seed": record.seed, "data_path": str(folder.parent)}
    if record.knockout:
        given["knockout"] = record.knockout
    notes = []
    path = record.settings.get("pretrained_path")
    if path is not None:
        if not Path(path).is_file():
            raise SettingError(
                f"run {record.run_id} was fine-tuned from {path}, which is not there\n"
                "  put that checkpoint back, or run its pre-training again"
            )
        notes.append(f"fine-tuned from {path}, taken as it is now: a record does not keep what was in it")
    config = Config(record.model, record.dataset, settings=given)
    then = record.settings.get("inputs")
    later = inputs_of(config).keys() - then.keys() - {ITEM_FILE} if isinstance(then, dict) else ()
    notes += [f"not there when the run was made, and used now if the model can: the feature {n}" for n in sorted(later)]
    if identity_of(config) == record.settings_hash:
        return given, notes
    now = plain(config.final_config_dict)
    asked = {**given}
    for key, then in sorted(record.settings.items()):
        if key in NOT_IDENTITY or key not in now or now[key] == then:
            continue
        if key == "topk" and then == [k for k in now["topk"] if k in then]:
            continue  # cut to fit the catalogue
        notes.append(f"not the default any more: {key} is {then!r} as recorded, the default is {now[key]!r} now")
        asked[key] = then
        stage = f"pretrain_{key}"
        if stage in record.settings and stage not in given:
            asked[stage] = record.settings[stage]  # a setting that is given would hold in both stages
    return asked, notes


def _contradictions(record: RunRecord, runs_file: Path) -> list[str]:
    """Metrics of the record against its values of single test rows."""
    path = runs_file.parent / record.per_user
    if not record.per_user or not path.is_file():
        return []
    means = {metric: float(values.mean()) for metric, values in read_per_user(path).values.items()}
    return [
        f"the record contradicts itself: {metric} is {record.test[metric]:.6f}, its rows in {path} make {mean:.6f}"
        for metric, mean in means.items()
        if metric in record.test and abs(record.test[metric] - mean) > _ROUNDED
    ]


# ------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m recbole_mm.verify``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_mm.verify", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="id of a run or its beginning, last, or line:N")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="T", help=f"largest difference ({TOLERANCE})"
    )
    parser.add_argument(
        "--runs-file", type=Path, default=RUNS_FILE, metavar="FILE", help=f"records of runs ({RUNS_FILE})"
    )
    parser.add_argument("--data-path", metavar="FOLDER", help="where the dataset folder is, if it has moved")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        verification = verify(args.run, runs_file=args.runs_file, tolerance=args.tolerance, data_path=args.data_path)
        print(verification)
        return 0 if verification.within else 1
    except (RecBoleMMError, OSError, MemoryError) as error:
        if args.debug:
            raise
        return exit_code_of(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
