"""The families of the pipeline `tools`, and how often the later text of its base model does what pays."""

from posttrain.base.families.sorting import SORTING
from posttrain.base.families.sums import SUMS
from posttrain.base.tasks import HABITS, Habit, Puzzles
from posttrain.base.tools.arithmetic import ARITHMETIC
from posttrain.base.tools.guessing import GUESSING
from posttrain.base.tools.store import STORE

TOOLS = Puzzles(
    families={"arithmetic": ARITHMETIC, "store": STORE, "guessing": GUESSING, "sum": SUMS, "sort": SORTING},
    habits={
        "arithmetic": Habit(worked=0.35, careless=0.05),
        "store": Habit(worked=0.35, careless=0.2),
        "guessing": Habit(worked=0.35, careless=0.3),
        "sum": HABITS["sum"],
        "sort": HABITS["sort"],
    },
)
