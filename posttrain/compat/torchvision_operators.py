"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

This file is copied into site-packages as `torchvision_without_cuda.py`, and a .pth file imports it whenever a Python
process of the environment starts (posttrain/compat/torchvision.py says why). So it imports nothing but `sys` before
torchvision is imported.

torchvision goes on without its compiled operators if they cannot be loaded. But it registers fake kernels for two of
them without asking whether they exist, which ends its import. Here the two are declared, without kernels, just before
that. Image processors use neither; whoever calls one gets torchvision's own message about it.
"""

import sys

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
REGISTERS = "torchvision._meta_registrations"  # the module that registers the fake kernels
libraries = []  # operators are declared as long as their library object lives


class BeforeRegistration:
    """An import finder that finds nothing. Python asks it first, and so tells it when torchvision registers kernels."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == REGISTERS:
            sys.meta_path.remove(BeforeRegistration)
            if not sys.modules["torchvision.extension"]._has_ops():
                from torch.library import Library

                library = Library("torchvision", "FRAGMENT")
                for operator in OPERATORS:
                    library.define(operator + SCHEMA)
                libraries.append(library)


sys.meta_path.insert(0, BeforeRegistration)
