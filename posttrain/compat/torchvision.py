"""torchvision: its Python part beside a CPU build of torch.

    python -m posttrain.compat torchvision      mends the environment of this Python; `make install` does it

Importing this module imports neither torch nor torchvision.
"""

import shutil
from functools import partial
from pathlib import Path

from posttrain.compat.patches import patch

_patch = partial(patch, "torchvision")
HOOK = "torchvision_without_cuda"


@_patch(
    "0.28.0",
    "fault",
    reason="The image processors of transformers and vLLM need torchvision's Python part. The wheel of the default "
    "index is built for CUDA. Beside a CPU build of torch its operators cannot be loaded, which it allows, but it "
    "registers fake kernels for two missing ones, so that its import fails. vLLM inspects models in processes of its "
    "own, so a file that every process of the environment imports when it starts declares the two",
    reference="torchvision/_meta_registrations.py, the two uses of `torch.library.register_fake`",
    test="tests/test_compat.py::test_torchvision_still_needs_two_operators_on_a_cpu",
)
def write_hook(site_packages: Path) -> list[Path]:
    """Write the module and the .pth file into a site-packages folder, and return them.

    Where torchvision's operators can be loaded the module does nothing, so it may be written into any environment.
    """
    module, starter = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"
    shutil.copyfile(Path(__file__).with_name("torchvision_operators.py"), module)
    starter.write_text(f"import {HOOK}\n")
    return [module, starter]
