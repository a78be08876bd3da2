"""Print docs/compat.md, or mend torchvision.

python -m posttrain.compat > docs/compat.md
python -m posttrain.compat torchvision        lets a torchvision for CUDA be imported beside a CPU build of torch
"""

import sys
import sysconfig
from pathlib import Path

from posttrain.compat.patches import table
from posttrain.compat.torchvision import write_hook

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
    if sys.argv[1:] == ["torchvision"]:
        for written in write_hook(Path(sysconfig.get_path("purelib"))):
            print(f"wrote {written}")
    else:
        print(page(), end="")
