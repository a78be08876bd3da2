"""Print docs/compat.md: `python -m posttrain.compat > docs/compat.md`."""

from posttrain.compat.patches import table

HEAD = """# Patches of upstream libraries

Made by `python -m posttrain.compat > docs/compat.md`; a test compares it with the code. Do not edit it by hand.

In these places the code depends on the internals of a library. A *fault* is something that the library does wrong; the
patch is deleted once the library does it right. A *gap* is something that the library has no public function for; the
patch is deleted once there is one. After an upgrade of a library, `tests/test_compat.py` names the patches to read
again.
"""


def page() -> str:
    """The whole of docs/compat.md."""
    return f"{HEAD}\n{table()}".rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
