"""What Triton's releases carry, and what an artifact must be so that they can load it.

    [triton]
    release = "26.08"    # of nvcr.io/nvidia/tritonserver:26.08-py3, the server that will serve

Sources: ONNX Runtime from the table TRITON_VERSION_MAP in build.py of the server's branches r23.10 to r26.08. CUDA from
NVIDIA's release notes of Triton, or the server's docs/introduction/compatibility.md. PyTorch and TensorRT from NVIDIA's
containers of the same month, on which Triton's is built, as their notes, their environment variables and their users
tell. What no source tells is None; a version of TensorRT that is known in part stands so.
"""

from typing import Any, NamedTuple


class Release(NamedTuple):
    tensorrt: str | None
    onnxruntime: str | None
    pytorch: str | None
    cuda: str | None


class Reads(NamedTuple):
    """The newest that a version of ONNX Runtime reads."""

    opset: int
    ir_version: int


# fmt: off
RELEASES = {
    "23.10": Release("8.6", "1.16.0", "2.1", "12.2"),
    "23.11": Release("8.6.1.6", "1.16.3", "2.2", "12.3"),
    "23.12": Release(None, "1.16.3", "2.2", "12.3"),
    "24.01": Release("8.6.1.6", "1.16.3", "2.2", "12.3"),
    "24.02": Release("8.6.3.1", "1.16.3", "2.3", "12.3"),
    "24.03": Release("8.6.3.1", "1.17.2", "2.3", "12.4"),
    "24.04": Release("8.6.3.1", "1.17.3", "2.3", "12.4"),
    "24.05": Release("10.0.1.6", "1.18.0", "2.4", "12.4"),
    "24.06": Release(None, "1.18.0", "2.4", "12.5"),
    "24.07": Release("10.2", "1.18.1", "2.4", "12.5"),
    "24.08": Release(None, "1.19.0", "2.5", "12.6"),
    "24.09": Release("10.4.0.26", "1.19.2", "2.5", "12.6"),
    "24.10": Release("10.5", "1.19.2", "2.5", "12.6"),
    "24.11": Release("10.6", "1.19.2", "2.6", "12.6"),
    "24.12": Release("10.7.0", "1.20.1", "2.6", "12.6"),
    "25.01": Release("10.8.0.43", "1.20.1", "2.6", "12.8"),
    "25.02": Release("10.8.0", "1.20.1", "2.7", "12.8"),
    "25.03": Release("10.9.0.34", "1.21.0", "2.7", "12.8"),
    "25.04": Release("10.9.0", "1.21.0", "2.7", "12.9"),
    "25.05": Release("10.10.0.31", "1.22.0", "2.8", "12.9"),
    "25.06": Release("10.11.0", "1.22.0", "2.8", "12.9"),
    "25.07": Release(None, "1.22.0", None, None),
    "25.08": Release("10.13.2.6", "1.23.0", "2.8", "13.0"),
    "25.09": Release("10.13.3.9", "1.23.0", "2.9", "13.0"),
    "25.10": Release("10.13.3", "1.23.1", "2.9", "13.0"),
    "25.11": Release("10.14.1", "1.23.2", "2.10", "13.0"),
    "25.12": Release("10.14.1.48", "1.23.2", "2.10", "13.1"),
    "26.01": Release(None, "1.23.2", "2.10", "13.1"),
    "26.02": Release("10.15.1", "1.24.1", "2.11", "13.1"),
    "26.03": Release("10.16.0.72", "1.24.2", "2.11", "13.2"),
    "26.04": Release("10.16.1", "1.24.4", "2.12", "13.2"),
    "26.05": Release("10.16.1.11", "1.24.4", "2.12", "13.2"),
    "26.06": Release("11.0.0.114", "1.24.4", "2.13", "13.3"),
    "26.07": Release("11.1.0.106", "1.27.0", "2.13", "13.3"),
    "26.08": Release("11.2.1.2", "1.28.0", "2.14", "13.4"),
    "26.09": Release("11.3.0.99", None, "2.14", "13.4"),
}

# Measured: with the release on PyPI of each version, by loading a model of every opset and IR version.
ONNX_RUNTIME = {
    "1.15": Reads(19, 9), "1.16": Reads(19, 9), "1.17": Reads(20, 9), "1.18": Reads(21, 10), "1.19": Reads(21, 10),
    "1.20": Reads(21, 10), "1.21": Reads(22, 10), "1.22": Reads(22, 10), "1.23": Reads(23, 11), "1.24": Reads(25, 13),
    "1.25": Reads(26, 13), "1.26": Reads(26, 13), "1.27": Reads(26, 13), "1.28": Reads(26, 13),
}
# fmt: on


def onnx(release: str) -> Reads | None:
    """The newest ONNX that a release reads, None where that is not known."""
    version = RELEASES[release].onnxruntime if release in RELEASES else None
    return ONNX_RUNTIME.get(version.rpartition(".")[0]) if version else None


def oldest_with(opset: int) -> str | None:
    """The first release that reads an opset."""
    return next((r for r in RELEASES if (reads := onnx(r)) and reads.opset >= opset), None)


def refusal(release: str, model_format: str, signature: dict[str, Any]) -> str | None:
    """Why a release's server cannot load an artifact, None where it can, or where that is not known.

    signature: the artifact's, which holds opset and ir_version of ONNX, or the TensorRT of a plan.
    """
    carried = RELEASES.get(release)
    if carried is None:
        return None
    if model_format == "onnx" and (reads := onnx(release)):
        for key, kind in (("opset", "opset"), ("ir_version", "IR version")):
            if signature[key] > getattr(reads, key):
                return (
                    f"the graph has {kind} {signature[key]}, and Triton {release} has ONNX Runtime "
                    f"{carried.onnxruntime}, which reads {getattr(reads, key)} at most"
                )
    if model_format == "tensorrt" and carried.tensorrt:
        return _plan_refusal(release, carried.tensorrt, signature)
    return None


def _plan_refusal(release: str, carried: str, signature: dict[str, Any]) -> str | None:
    """A plan runs with the TensorRT that built it; a version compatible one with newer ones, up to the next major one.

    Source: TensorRT's documentation, "Version Compatibility". Where the release's version is known in part, that part
    counts.
    """
    built = str(signature["TensorRT"])
    if signature.get("version_compatible"):
        ours, theirs = ([int(part) for part in version.split(".")[:2]] for version in (built, carried))
        if ours <= theirs and theirs[0] - ours[0] <= 1:
            return None
    elif f"{built}.".startswith(f"{carried}.") or f"{carried}.".startswith(f"{built}."):
        return None
    return (
        f"the plan is of TensorRT {built}, and Triton {release} has {carried}: `doit container` builds it with that one"
    )


def warning(release: str, model_format: str, signature: dict[str, Any]) -> str | None:
    """What may keep a release's server from loading an artifact, or what is not known of it."""
    carried = RELEASES.get(release)
    if carried is None:
        return f"Triton {release} is not in releases.py: what it can load was not checked"
    if model_format == "torchscript" and carried.pytorch:
        built = str(signature["PyTorch"])
        if [int(part) for part in built.split(".")[:2]] > [int(part) for part in carried.pytorch.split(".")]:
            return (
                f"traced with PyTorch {built}, and Triton {release} has {carried.pytorch}: `doit smoke` shows whether "
                "it loads that"
            )
    unknown = {"torchscript": carried.pytorch, "onnx": onnx(release), "tensorrt": carried.tensorrt}
    if model_format in unknown and unknown[model_format] is None:
        return f"what Triton {release} has for {model_format} is not in releases.py, and was not checked"
    return None
