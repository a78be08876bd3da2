"""The families of puzzles about pictures, and how often the later text of its base model does what pays."""

from posttrain.base.families.sorting import SORTING
from posttrain.base.families.sums import SUMS
from posttrain.base.pictures.bars import BARS
from posttrain.base.pictures.cells import CELLS
from posttrain.base.pictures.counting import COUNTING
from posttrain.base.pictures.differing import DIFFERING
from posttrain.base.pictures.digits import DIGITS
from posttrain.base.tasks import HABITS, Habit, Puzzles

PICTURES = Puzzles(
    families={
        "count": COUNTING,
        "find": CELLS,
        "bars": BARS,
        "digits": DIGITS,
        "differ": DIFFERING,
        "sum": SUMS,
        "sort": SORTING,
    },
    habits={
        "count": Habit(worked=0.25, careless=0.5),
        "find": Habit(worked=0.25, careless=0.5),
        "bars": Habit(worked=0.25, careless=0.5),
        "digits": Habit(worked=0.25, careless=0.5),
        "differ": Habit(worked=0.25, careless=0.5),
        "sum": HABITS["sum"],
        "sort": HABITS["sort"],
    },
)
