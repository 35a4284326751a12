"""The versions that each release of Triton contains, and whether it can load an artifact.

    [triton]
    release = "26.08"    # the server is nvcr.io/nvidia/tritonserver:26.08-py3

Sources: ONNX Runtime from the table TRITON_VERSION_MAP in build.py of the server's branches r23.10 to r26.08. CUDA from
NVIDIA's release notes of Triton, or from the server's docs/introduction/compatibility.md. PyTorch and TensorRT from
NVIDIA's containers of the same month, on which Triton's container is built: from their release notes, their environment
variables and reports of their users. None stands for a version that no source names. If a version of TensorRT is
known only in part, it has fewer numbers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Release(NamedTuple):
    """Versions that a release contains."""

    tensorrt: str | None
    onnxruntime: str | None
    pytorch: str | None
    cuda: str | None


class OnnxSupport(NamedTuple):
    """The newest ONNX that a version of ONNX Runtime reads."""

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

# Measured: each version from PyPI loaded a model of every opset and IR version.
ONNX_RUNTIME = {
    "1.15": OnnxSupport(19, 9), "1.16": OnnxSupport(19, 9), "1.17": OnnxSupport(20, 9),
    "1.18": OnnxSupport(21, 10), "1.19": OnnxSupport(21, 10), "1.20": OnnxSupport(21, 10),
    "1.21": OnnxSupport(22, 10), "1.22": OnnxSupport(22, 10), "1.23": OnnxSupport(23, 11),
    "1.24": OnnxSupport(25, 13), "1.25": OnnxSupport(26, 13), "1.26": OnnxSupport(26, 13),
    "1.27": OnnxSupport(26, 13), "1.28": OnnxSupport(26, 13),
}
# fmt: on


def onnx_support(release: str) -> OnnxSupport | None:
    """Return the newest ONNX that a release reads, None if that is unknown."""
    version = RELEASES[release].onnxruntime if release in RELEASES else None
    return ONNX_RUNTIME.get(version.rpartition(".")[0]) if version else None


def oldest_release_for(opset: int) -> str | None:
    """Return the first release that reads an opset, None if there is none."""
    return next((r for r in RELEASES if (support := onnx_support(r)) and support.opset >= opset), None)


def load_error(release: str, model_format: str, signature: Mapping[str, Any]) -> str | None:
    """Return why a server of this release cannot load an artifact. None if it can, or if that is unknown.

    Args:
        release: "26.08".
        model_format: "torchscript", "onnx" or "tensorrt".
        signature: Of the artifact; ONNX needs opset and ir_version, a plan TensorRT and version_compatible.
    """
    contents = RELEASES.get(release)
    if contents is None:
        return None
    if model_format == "onnx" and (support := onnx_support(release)):
        for key, label in (("opset", "opset"), ("ir_version", "IR version")):
            if signature[key] > getattr(support, key):
                return (
                    f"the graph has {label} {signature[key]}, and Triton {release} has ONNX Runtime "
                    f"{contents.onnxruntime}, which reads {getattr(support, key)} at most"
                )
    if model_format == "tensorrt" and contents.tensorrt:
        return _plan_error(release, contents.tensorrt, signature)
    return None


def _plan_error(release: str, contained: str, signature: Mapping[str, Any]) -> str | None:
    """Return why TensorRT of a release cannot load a plan.

    A plan runs with the version of TensorRT that built it. A version-compatible plan also runs with newer versions, up
    to the next major version. Where the release's version is known in part, only that part is compared.
    Source: TensorRT's documentation, "Version Compatibility".
    """
    built = str(signature["TensorRT"])
    if signature.get("version_compatible"):
        old, new = ([int(part) for part in version.split(".")[:2]] for version in (built, contained))
        if old <= new and new[0] - old[0] <= 1:
            return None
    elif f"{built}.".startswith(f"{contained}.") or f"{contained}.".startswith(f"{built}."):
        return None
    return (
        f"the plan was built with TensorRT {built}, and Triton {release} has {contained}; `doit container` builds it "
        "with that version"
    )


def load_warning(release: str, model_format: str, signature: Mapping[str, Any]) -> str | None:
    """Return the reasons why a server of this release may not load an artifact, or the checks that were impossible."""
    contents = RELEASES.get(release)
    if contents is None:
        return f"Triton {release} is not in releases.py: it was not checked whether it can load this artifact"
    if model_format == "torchscript" and contents.pytorch:
        built = str(signature["PyTorch"])
        if [int(part) for part in built.split(".")[:2]] > [int(part) for part in contents.pytorch.split(".")]:
            return (
                f"traced with PyTorch {built}, and Triton {release} has {contents.pytorch}: `doit smoke` shows whether "
                "it can be loaded"
            )
    versions = {"torchscript": contents.pytorch, "onnx": onnx_support(release), "tensorrt": contents.tensorrt}
    if model_format in versions and versions[model_format] is None:
        return (
            f"the version that Triton {release} has for {model_format} is not in releases.py: it was not checked "
            "whether it can load this artifact"
        )
    return None
