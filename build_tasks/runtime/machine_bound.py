"""Artifacts that are compiled for one kind of machine: what this machine lacks for them, and what they depend on.

    model.plan, model.sm90.plan    TensorRT, and the GPU of this machine, or one of this compute capability
    model.pt2, model.sm90.pt2      PyTorch, and the GPU in the same way; or the instruction set of this machine's CPU

Every machine can build and run all other artifacts.
"""

import functools
from collections.abc import Callable

from msgspec import Struct

from build_tasks.runtime import hardware
from build_tasks.spec.model import Model


class Machine(Struct, frozen=True):
    """The machine that an artifact is for. The fields are those of a Stage."""

    missing_requirements: Callable[[], str | None]  # to run it
    host_fingerprint: Callable[[], dict[str, str]]
    compute_capability: str | None

    @property
    def made_elsewhere(self) -> bool:
        """Whether the artifact may come from another machine: if the spec names the kind of GPU."""
        return self.compute_capability is not None


def machine_of(model: Model, file: str) -> Machine | None:
    """Return the machine that an artifact of a model is for, None if that is every machine."""
    if file in model.plans:
        capability = model.plans[file]
        missing = functools.partial(hardware.missing_requirements, capability)
        return Machine(missing, hardware.host_fingerprint, capability)
    if file in model.packages:
        capability = model.packages[file]
        device = package_device(model)
        missing = functools.partial(hardware.missing_for_package, device, capability)
        return Machine(missing, functools.partial(hardware.package_fingerprint, device), capability)
    return None


def missing_requirements(model: Model, file: str) -> str | None:
    """Return the requirements that this machine lacks to run an artifact, None if it has all."""
    machine = machine_of(model, file)
    return machine.missing_requirements() if machine else None


def package_device(model: Model) -> str:
    """Return the device that packages of AOTInductor are for: "gpu" or "cpu".

    With triton.device = "auto" it is a GPU if this machine has one that PyTorch can use.
    """
    device = model.triton_keys.device
    if device != "auto" or model.spec.aoti.compute_capabilities:
        return "cpu" if device == "cpu" else "gpu"
    return "gpu" if isinstance(hardware.usable_gpu("torch"), hardware.Gpu) else "cpu"
