"""Print docs/compat.md: `python -m posttrain.compat > docs/compat.md`."""

from posttrain.compat.patches import table

HEAD = """# Patches of upstream libraries

Made by `python -m posttrain.compat > docs/compat.md`; a test compares it with the code. Do not edit it by hand.

The code depends in these places on how a library works inside. A *fault* is something that upstream does wrong; its
patch goes when upstream is mended. A *gap* is something that upstream offers no public way to do; its patch goes when
there is one. When a library is upgraded, `tests/test_compat.py` names the patches to look at again.
"""


def page() -> str:
    """The whole of docs/compat.md."""
    return f"{HEAD}\n{table()}".rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
