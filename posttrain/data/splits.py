"""Which split a data file belongs to, by its name, so that training and test rows are never mixed unasked.

`train-00000-of-00002.parquet` is of the split `train`, as the shards of a hub are named; else a word such as train,
validation or test in the file's name says it, or the folder that it lies in. The words are those of the `datasets`
library.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from posttrain.errors import DataError

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


def split_of(file: PurePath) -> str:
    """The split of a file below a dataset's folder, or ""."""
    name = file.name.partition(".")[0]
    if (shard := _SHARD.fullmatch(name)) is not None:
        return shard[1]
    for part in (name, *reversed(file.parent.parts)):
        found = next((word for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS), "")
        if found:
            return found
    return ""


def subset_and_split(file: PurePath) -> str:
    """The split of a file of a dataset on a hub, behind the folder of its subset if there is one: main/train."""
    split = split_of(file)
    folders = [part for part in file.parent.parts if part not in ("data", split)]
    return "/".join([*folders, *([split] if split else [])])


def check_one_split(path: str, files: Sequence[PurePath]) -> None:
    """Raise `DataError` where the files of a local folder belong to several splits."""
    by_split: dict[str, list[PurePath]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    by_split.pop("", None)
    if len(by_split) > 1:
        counted = _counted({split: len(of) for split, of in by_split.items()})
        first = f"{path}/{next(iter(by_split.values()))[0]}"
        raise DataError(f"{path}: holds several splits: {counted}; name the files of those to read, such as [{first}]")


def files_of_split(name: str, split: str, files: Sequence[PurePath]) -> list[PurePath]:
    """The files of one split of a dataset on a hub. split: "" where none is named.

    Raises `DataError` where there is no such split, and where none is named but there are several.
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
