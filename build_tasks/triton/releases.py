"""What a release of Triton can load, by the table in release_table.py.

[triton]
release = "26.08"    # the server is nvcr.io/nvidia/tritonserver:26.08-py3
"""

from collections.abc import Iterable, Mapping
from typing import Any

from build_tasks.triton.platforms import TRITON_MODELS
from build_tasks.triton.release_table import (
    BATCHING_SINCE,
    BF16_SINCE,
    ONNX_RUNTIME,
    PLATFORM_SINCE,
    RELEASES,
    OnnxSupport,
)

# TensorRT's backend loads a version-compatible plan only with this option, since such a plan contains code that runs on
# the host. Source: tensorrt_backend, src/tensorrt.cc; server#6129.
VERSION_COMPATIBLE_OPTION = "--backend-config=tensorrt,version-compatible=true"
MADE = {"torchscript": "traced", "aoti": "compiled"}  # how PyTorch makes an artifact, by its format


def unknown(release: str) -> str | None:
    """Return a remark on a release that the table does not contain, None if it does."""
    if release in RELEASES:
        return None
    return f"Triton {release} is unknown here (known: {min(RELEASES)} to {max(RELEASES)}, in release_table.py)"


def onnx_support(release: str) -> OnnxSupport | None:
    """Return the newest ONNX that a release reads, None if that is unknown."""
    return _onnx_support_of(RELEASES[release].onnxruntime if release in RELEASES else None)


def _onnx_support_of(version: str | None) -> OnnxSupport | None:
    return ONNX_RUNTIME.get(version.rpartition(".")[0]) if version else None


def _at_least(release: str, library: str) -> str | None:
    """Return the version of a library that the last release before has: no release has had an older one than that."""
    versions = [getattr(contents, library) for name, contents in RELEASES.items() if name <= release]
    return next(filter(None, reversed(versions)), None)


def tensorrt_major(release: str) -> int:
    """Return the major version of a release's TensorRT, or of the last known one before it; 0 before the table."""
    return int((_at_least(release, "tensorrt") or "0").partition(".")[0])


def oldest_release_for(opset: int) -> str | None:
    """Return the first release that reads an opset, None if there is none."""
    return next((r for r in RELEASES if (support := onnx_support(r)) and support.opset >= opset), None)


def platform_error(release: str, model_format: str) -> str | None:
    """Return why a server of this release cannot load any artifact of a format, None if it can."""
    since = PLATFORM_SINCE.get(model_format, "")
    if release >= since:
        return None
    return f"Triton {release} has no platform {TRITON_MODELS[model_format].platform} ({since} and newer have it)"


def batching_error(release: str, model_format: str) -> str | None:
    """Return what goes wrong if a server of this release runs several requests as one batch; None if it is right."""
    since = BATCHING_SINCE.get(model_format, "")
    if release >= since:
        return None
    return f"Triton {release} would answer each request with the rows of all of them ({since} and newer do not)"


def load_error(release: str, model_format: str, signature: Mapping[str, Any]) -> str | None:
    """Return why a server of this release cannot load an artifact. None if it can, or if that is unknown.

    Args:
        release: "26.08".
        model_format: A key of FORMATS.
        signature: Of the artifact; ONNX needs opset and ir_version, a plan TensorRT and version_compatible.
    """
    if error := platform_error(release, model_format):
        return error
    tensors = (*signature.get("inputs", ()), *signature.get("outputs", ()))
    since = BF16_SINCE.get(model_format)
    if (since is None or release < since) and (narrow := [t["name"] for t in tensors if t["dtype"] == "bfloat16"]):
        newer = f"; Triton {since} and newer can" if since else ""
        return f"{', '.join(narrow)} has the dtype bfloat16, which Triton {release} cannot serve{newer}"
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


def server_option(signatures: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the option that a server needs to load these artifacts, None if it needs none."""
    if any(signature.get("version_compatible") for signature in signatures):
        return f"{VERSION_COMPATIBLE_OPTION}, without which Triton refuses this plan"
    return None


def load_warning(release: str, model_format: str, signature: Mapping[str, Any]) -> str | None:
    """Return the reasons why a server of this release may not load an artifact, or the checks that were impossible."""
    contents = RELEASES.get(release)
    if contents is None:
        return f"{unknown(release)}: it was not checked whether it can load this artifact"
    if model_format in MADE and (contained := contents.pytorch or _at_least(release, "pytorch")):
        built = str(signature["PyTorch"])
        if [int(part) for part in built.split(".")[:2]] > [int(part) for part in contained.split(".")]:
            return (
                f"{MADE[model_format]} with PyTorch {built}, and Triton {release} has {contained}"
                f"{'' if contents.pytorch else ' or newer'}: `doit smoke` shows whether it can be loaded"
            )
    unchecked = model_format == "tensorrt" and contents.tensorrt is None
    if model_format == "onnx" and contents.onnxruntime is None:
        support = _onnx_support_of(_at_least(release, "onnxruntime"))
        limits = OnnxSupport.__struct_fields__
        unchecked = support is None or any(signature[key] > getattr(support, key) for key in limits)
    if unchecked:
        library = {"onnx": "ONNX Runtime", "tensorrt": "TensorRT"}[model_format]
        return (
            f"which {library} Triton {release} has is unknown (release_table.py): it was not checked whether it can "
            "load this artifact"
        )
    return None
