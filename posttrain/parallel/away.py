"""What a rank on another host than the home host needs to be there: its model folder."""

import socket

from posttrain.errors import UserError
from posttrain.hosts.away import folder_now
from posttrain.model.adapter import is_adapter


def staying(key: str, reason: str) -> UserError:
    """The error of a rank that has to be on the home host. key: of the section that says where it runs."""
    return UserError(
        f"{key}: was placed on host {socket.gethostname()}, and {reason}; give the home host the CPUs and GPUs that it "
        "asks for, or name that host in nodes"
    )


def model_here(path: str, key: str, deadline_s: float) -> str:
    """A model folder of the home host as this host has it. It is pulled if it is not there.

    key: as for `staying`. deadline_s: without a byte. Raises UserError for adapters, whose base does not travel.
    """
    found = folder_now(path, deadline_s)
    if is_adapter(found):
        raise staying(key, f"{path} holds adapters, whose base does not travel")
    return found
