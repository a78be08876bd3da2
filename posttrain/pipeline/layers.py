"""The table of which part of the package may import which.

A part is a folder or module directly under `posttrain/`. It may import itself and the parts of lower floors. Parts of
the same floor must not import each other. `tests/test_layers.py` checks every import in the source against this table,
and `hashing.code_hashes` uses it to find the code on which a stage's result can depend.
"""

# The floors, from the lowest to the highest. All stages are on one floor, so only the pipeline joins them.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("decoding", "errors", "lazy"),
    ("records", "files", "resources", "compat"),
    ("config",),
    ("context", "storage"),
    ("actors",),
    ("hosts",),
    ("scoring",),
    ("data",),
    ("metrics",),
    ("model",),
    ("parallel",),
    ("planning",),
    ("train",),
    ("sampling",),
    ("judging", "tune", "episodes"),
    ("base", "filtering", "sft", "rl", "dpo", "eval"),
    ("rewards", "environments"),
    ("forecast",),
    ("pipeline",),
    ("report", "reward_tools", "serving"),
    ("cli",),
)

# The rooms inside the two large parts, in the same order.
ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "scoring": (("plugins", "sandbox"), ("pool",), ("remote",)),
    "rl": (
        ("loss_config", "advantages"),
        ("losses", "records"),
        ("objective",),
        ("rollouts",),
        ("grading",),
        ("prompts",),
        ("training",),
        ("history",),
        ("config",),
        ("loop",),
        ("inputs",),
        ("stage",),
    ),
}


def floor_of(part: str, floors: tuple[tuple[str, ...], ...] = FLOORS) -> int:
    """The floor of a part, counted from the ground. Raises ValueError for a part that the table does not name."""
    for number, parts in enumerate(floors):
        if part in parts:
            return number
    raise ValueError(f"{part!r} is not in the table of layers, posttrain/pipeline/layers.py")


def may_import(part: str, other: str, floors: tuple[tuple[str, ...], ...] = FLOORS) -> bool:
    """Whether `part` may import from `other`."""
    return part == other or floor_of(other, floors) < floor_of(part, floors)


def parts_below(part: str) -> set[str]:
    """The part itself and everything that it may import."""
    return {part} | {other for floor in FLOORS[: floor_of(part)] for other in floor}
