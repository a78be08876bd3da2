"""Programs of `x += 1` statements to be run. The work is the value after each statement."""

import random

from posttrain.base.problem import Family, Problem, with_steps


def apply(operator: str, value: int, operand: int) -> int:
    """The value of x after one statement `x {operator}= operand`."""
    if operator == "+":
        return value + operand
    if operator == "-":
        return value - operand
    return value * operand


def draw(level: int, rng: random.Random) -> Problem:
    """An assignment and `level` different updates; x stays between 0 and 28."""
    start = rng.randint(1, 20 if level == 1 else 9)
    value, statements = start, []
    for _ in range(level):
        statement = rng.choice([option for option in _updates(value) if option not in statements])
        statements.append(statement)
        value = apply(statement[0], value, statement[1])
    text = "; ".join([f"x = {start}", *(f"x {operator}= {operand}" for operator, operand in statements)])
    return Problem("code", level, f"Run: {text}", str(value), f"code {text}", (start, *statements), {})


def _updates(value: int) -> list[tuple[str, int]]:
    """Updates that keep x in range."""
    sums = [("+", operand) for operand in range(1, 10)] if value < 20 else []
    differences = [("-", operand) for operand in range(1, min(9, value) + 1)]
    # There are few products; three times each makes them about as frequent as one of the others.
    products = [("*", operand) for operand in (2, 3)] * 3 if 0 < value <= 7 else []
    return sums + differences + products


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """Run one statement at a time; a slip is off by one in one of them."""
    value, *statements = problem.parts
    slip_at = rng.randrange(len(statements)) if slip else -1
    steps = []
    for index, (operator, operand) in enumerate(statements):
        after = apply(operator, value, operand)
        if index == slip_at:
            after = max(0, after + rng.choice((-1, 1)))
        steps.append(f"{value} {operator} {operand} = {after}")
        value = after
    return with_steps(steps, str(value))


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The last value at once; a careless one is off by one."""
    return f"Answer: {max(0, int(problem.answer) + (rng.choice((-1, 1)) if careless else 0))}"


PROGRAMS = Family("coding", draw, worked, terse)
