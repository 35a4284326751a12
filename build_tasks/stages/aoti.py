"""aoti: weights.safetensors -> model.pt2 (AOTInductor), and its signature

    network ─► reparameterized ─► torch.export, open batch ─► cast ─► AOTInductor ─► model.pt2
                                                                                         │
                                    the dtypes and shapes of its outputs, in fp32 on a CPU also the values,
                                    at batches 1, 2, 3, max and at lengths of open dimensions, against the network

A package is compiled for the GPU of this machine, or for the instruction set of its CPU, and runs only there. The gate
checks its values later, on the accuracy samples, on the machine that it is for.
"""

import functools
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import declarations
from build_tasks.formats.declarations import COMPARISON_MODULES, INTERFACE_MODULES, PHOTOGRAPHS
from build_tasks.json_files import write_json
from build_tasks.runtime import hardware, machine_bound
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.tensors import Interface, OptimizationProfile, ProfileShapes, Range, profile_shapes
from build_tasks.verification.batch_check import TUNED

if TYPE_CHECKING:
    import numpy as np

TOOLS = ("torch", "timm", "triton")  # Triton the compiler, which writes kernels for GPUs
CHECKED_BATCH = 2
PACKAGE_MODULES = (
    "build_tasks.formats.aoti_package",
    "build_tasks.formats.torch_export",
    "build_tasks.formats.torch_signature",
    "build_tasks.formats.torchscript_graph",
)
PLACES = {"inputs": "INPUT__{}", "outputs": "OUTPUT__{}"}


def task(model: Model, file: str) -> dict[str, Any]:
    """The doit task of one of the model's packages."""
    machine = machine_bound.machine_of(model, file)
    assert machine is not None
    device = machine_bound.package_device(model)
    capability = model.packages[file]
    stage = Stage(
        name=f"aoti:{model.name}{model.capability_suffix(file)}",
        model=model,
        build=build,
        inputs={"weights": model.weights, **{path: path for path in PHOTOGRAPHS}},
        outputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "tools": model.artifact(f"{file}.tools.json"),
        },
        peak_batch=model.spec.max_batch_size,
        settings={
            **declarations.settings_of(model),
            "interface": interface_of(model.spec),
            "max_batch_size": model.spec.max_batch_size,
            "precision": model.aoti.precision,
            "compute_capabilities": capability and [capability],
            "device": device,
        },
        tools=TOOLS,
        modules=(
            __name__,
            "build_tasks.verification.batch_check",
            *PACKAGE_MODULES,
            *COMPARISON_MODULES,
            *INTERFACE_MODULES,
            *declarations.source_modules(model),
        ),
        source_files=declarations.user_source_files(model),
        missing_requirements=functools.partial(missing_requirements, machine),
        made_elsewhere=machine.made_elsewhere,
        compute_capability=machine.compute_capability,
        host_fingerprint=functools.partial(host_fingerprint, device),
        same_bytes=device == "cpu",
    )
    return stage.task(doc=f"{file}: compiled for this machine's {device.upper()}, {model.aoti.precision}")


def missing_requirements(machine: machine_bound.Machine) -> str | None:
    """The requirements that this machine lacks to compile a package, None if it has all."""
    return machine.missing_requirements() or (None if hardware.compiler() else hardware.NO_COMPILER)


def host_fingerprint(device: str) -> dict[str, str]:
    """The facts about this machine that a package depends on. Call it only if no requirement is missing."""
    return {**hardware.package_fingerprint(device), "C++ compiler": hardware.compiler_version()}


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch
    from timm.utils.model import reparameterize_model

    from build_tasks.formats import aoti_package, pytorch_network, torch_export, torchscript_graph
    from build_tasks.formats.serving_interface import resolve_interface, wrap_for_serving
    from build_tasks.formats.torch_signature import signature_tensors

    network = pytorch_network.create_network(settings, inputs["weights"])
    interface = resolve_interface(network, settings["interface"])
    module = wrap_for_serving(reparameterize_model(network), interface)
    torch.backends.mha.set_fastpath_enabled(False)  # no exporter knows the operator of its fast path
    largest = settings["max_batch_size"]
    batch = aoti_package.example_batch(settings["device"], largest)
    example, shapes = torch_export.export_arguments(module, interface, batch, True, largest)
    names = output_names_of(module, tuple(each[:CHECKED_BATCH] for each in example))
    tensors = signature_tensors(module, names, interface, CHECKED_BATCH)
    require_places(tensors)
    try:
        with torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes)
            if settings["precision"] != "fp32":
                pictures = [each["layout"] == "nchw" for each in interface["inputs"]]
                dtype = torchscript_graph.DTYPES[settings["precision"]]
                program = torch_export.cast_program(program, dtype, pictures, shapes)
    except Exception as error:  # of torch.export, which has no common base class
        raise UserError(f"torch.export refuses the network: {first_lines(error)}") from error
    host = host_fingerprint(settings["device"])
    aoti_package.compile_package(
        program, outputs["model"], settings["device"], hardware.instruction_set(), hardware.compiler_command()
    )
    errors = check(outputs["model"], module, interface, settings)
    signature = {
        **tensors,
        "PyTorch": torch.__version__.partition("+")[0],
        "device": settings["device"],
        "precision": settings["precision"],
        "profiles": [profile(interface, largest)],
        **hardware.package_fingerprint(settings["device"]),
    }
    for name, record in (("signature", signature), ("tools", {**versions(TOOLS), **host})):
        write_json(outputs[name], record)
    found = {"error": max(each for each in errors.values() if each is not None)} if any(errors.values()) else {}
    return {"precision": settings["precision"], **found, "batches": sorted({batch for batch, *_ in errors})}


def output_names_of(module: Any, example: tuple[Any, ...]) -> list[str]:
    """The names of the outputs, which a network has when it has run."""
    from build_tasks.formats.serving_interface import explain_errors, forward, output_names

    with explain_errors(example):
        forward(module, example)
    return output_names(module)


def require_places(tensors: dict[str, Any]) -> None:
    """Raise a UserError if a tensor has another name than its place.

    Triton finds the tensors of a package by their places. Source: README.md of pytorch_backend, "Ordinal Base I/O
    Names", and src/pt2/model_instance_state.cc.
    """
    for kind, pattern in PLACES.items():
        for index, tensor in enumerate(tensors[kind]):
            if tensor["name"] != (expected := pattern.format(index)):
                raise UserError(
                    f"{kind}[{index}].name: expected {expected!r}, since Triton's torch_aoti finds tensors by their "
                    f"place, found {tensor['name']!r}; name it in [[{kind}]], or leave aoti out of formats"
                )


def profile(interface: Interface, largest: int) -> dict[str, ProfileShapes]:
    """The shapes for which a package is compiled, by input, in the form of TensorRT's optimization profiles."""
    batches = Range(min=1, opt=min(TUNED, largest), max=largest)
    bounds = OptimizationProfile(batch=batches, dimensions=interface["dimensions"])
    return {each["name"]: profile_shapes(bounds, each["shape"] or []) for each in interface["inputs"]}


def check(path: str, module: Any, interface: Interface, settings: Settings) -> dict[tuple[int, ...], float | None]:
    """The relative errors of a package against the network, by the batch and the lengths of open dimensions.

    A package in fp16 or bf16, and one for a GPU, which rounds otherwise, are compared in dtypes and shapes alone. Then
    the error is None.

    Raises:
        UserError: If the package refuses a batch or a length, or if its outputs are other ones.
    """
    from build_tasks.formats import aoti_package, fp32_comparison
    from build_tasks.formats.example_inputs import cases_to_check, example_inputs, format_case
    from build_tasks.formats.serving_interface import forward

    loaded = aoti_package.load_package(path)
    exact = settings["precision"] == "fp32" and settings["device"] == "cpu"
    comparison = fp32_comparison.Comparison(module, interface) if exact else None

    def run(batch: "list[Any]") -> "list[np.ndarray]":
        on_device = [each.to("cuda" if settings["device"] == "gpu" else "cpu") for each in batch]
        return [answer.cpu().numpy() for answer in forward(loaded, on_device)]

    errors: dict[tuple[int, ...], float | None] = {}
    for size, lengths in cases_to_check(interface, sorted({1, CHECKED_BATCH, 3, settings["max_batch_size"]})):
        at = format_case(size, lengths)
        try:
            if comparison:
                errors[size, *lengths.values()] = comparison.check(run, lengths, size)
                continue
            batch = example_inputs(interface, size, lengths)
            expected = [answer.numpy() for answer in forward(module, batch)]
            forms = [[(answer.dtype, answer.shape) for answer in each] for each in (run(batch), expected)]
            if forms[0] != forms[1]:
                raise fp32_comparison.InaccurateError(f"in form: {forms[0]}, and not {forms[1]}")
            errors[size, *lengths.values()] = None
        except fp32_comparison.InaccurateError as error:
            raise UserError(f"at {at} the package differs from the network {error}") from error
        except RuntimeError as error:
            raise UserError(f"the package fails at {at}: {first_lines(error)}") from error
    return errors
