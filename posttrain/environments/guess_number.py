"""A number to guess: after each wrong one the policy hears whether the number is higher or lower."""

from posttrain.episodes.session import Session
from posttrain.records import RewardResult, Row

REQUIRES = {"guess_number": ["answer"]}


async def guess_number(session: Session, row: Row, *, max_turns: int = 5) -> RewardResult:
    """1 if the policy says the row's answer, a whole number, within `max_turns` turns."""
    number = int(str(row.answer))
    for left in range(max_turns - 1, -1, -1):
        said = (await session.sample()).text.strip()
        guess = int(said) if said.isascii() and said.isdigit() and len(said) <= len(str(number)) + 2 else None
        if guess == number:
            return RewardResult(1.0)
        if left:
            await session.add("user", "give a number" if guess is None else "higher" if guess < number else "lower")
    return RewardResult(0.0, reason=f"not guessed in {max_turns} turns")
