"""Finds the split of a data file by its name, so that training and test rows are never mixed by accident.

`train-00000-of-00002.parquet` belongs to the split `train`: shards on a hub are named so. Otherwise the split is the
first word such as train, validation or test in the name of the file or of a folder above it. The words are those of
the `datasets` library.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from posttrain.errors import DataError

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def split_of(file: PurePath) -> str:
    """The split of a file, "" if its name has none. file: path relative to the dataset's folder."""
    name = file.name.partition(".")[0]
    if (shard := _SHARD.fullmatch(name)) is not None:
        return shard[1]
    for part in (name, *reversed(file.parent.parts)):
        found = next((word for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS), "")
        if found:
            return found
    return ""


def subset_and_split(file: PurePath) -> str:
    """The split of a file of a dataset on a hub, after the name of its subset if it has one, such as main/train."""
    split = split_of(file)
    folders = [part for part in file.parent.parts if part not in ("data", split)]
    return "/".join([*folders, *([split] if split else [])])


def check_one_split(path: str, files: Sequence[PurePath]) -> None:
    """Raise `DataError` if the files of a local folder belong to several splits."""
    by_split: dict[str, list[PurePath]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    by_split.pop("", None)
    if len(by_split) > 1:
        counted = _counted({split: len(of) for split, of in by_split.items()})
        first = f"{path}/{next(iter(by_split.values()))[0]}"
        raise DataError(f"{path}: holds several splits: {counted}; name the files of those to read, such as [{first}]")


def files_of_split(name: str, split: str, files: Sequence[PurePath]) -> list[PurePath]:
    """The files of one split of a dataset on a hub. split: "" for the only one.

    Raises `DataError` if there is no such split, and if `split` is "" although there are several.
    """
    by_label: dict[str, list[PurePath]] = {}
    for file in files:
        by_label.setdefault(subset_and_split(file), []).append(file)
    if split in by_label and split:
        return by_label[split]
    labels = {label: len(of) for label, of in by_label.items() if label}
    if split:
        raise DataError(f"{name}:{split}: no such split; there are {_counted(labels) or 'none'}")
    if len(labels) > 1:
        raise DataError(
            f"{name}: holds several splits: {_counted(labels)}; name one, such as {name}:{next(iter(labels))}"
        )
    return list(files)


def _counted(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{split} ({count} file{'s' * (count > 1)})" for split, count in splits.items())
