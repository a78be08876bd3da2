"""The one rule that says whether a reply is right, from the profile to the evaluation and the report."""


def is_right(reward: float, threshold: float) -> bool:
    """Whether a reply with this reward counts as right. threshold: the stage's `reward.correct_threshold`.

    A reward that equals the threshold is right: with 0.5, a program that passes half of its tests counts as right.
    """
    return reward >= threshold
