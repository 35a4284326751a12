"""What each release of Triton contains, and what a release changed. Data only; releases.py reads it.

Each row names its source:

    BRANCH   Triton and ONNX Runtime: TRITON_VERSION and build.py in the branch r<release> of the server. CUDA: NVIDIA's
             release notes of Triton. PyTorch and TensorRT: NVIDIA's containers of the same month, on which Triton's
             container is built: their release notes, their environment variables, or reports of users.
    PAGES    the server's releases on GitHub, and NVIDIA's release notes of Triton

None stands for a version that no source names. If a version of TensorRT is known only in part, it has fewer numbers.
"""

from msgspec import Struct

BRANCH = "server: branch of the release; containers of the same month"
PAGES = "server: page of the release"


class Release(Struct, frozen=True):
    """Versions that a release contains."""

    triton: str
    tensorrt: str | None
    onnxruntime: str | None
    pytorch: str | None
    cuda: str | None
    source: str


class OnnxSupport(Struct, frozen=True):
    """The newest ONNX that a version of ONNX Runtime reads."""

    opset: int
    ir_version: int


class Change(Struct, frozen=True):
    """Something that means another thing from a release on."""

    release: str
    model_formats: tuple[str, ...]  # the formats that it concerns; empty for the server as a whole
    text: str
    source: str


# fmt: off
RELEASES = {
    "23.10": Release("2.39.0", "8.6", "1.16.0", "2.1", "12.2", BRANCH),
    "23.11": Release("2.40.0", "8.6.1.6", "1.16.3", "2.2", "12.3", BRANCH),
    "23.12": Release("2.41.0", None, "1.16.3", "2.2", "12.3", BRANCH),
    "24.01": Release("2.42.0", "8.6.1.6", "1.16.3", "2.2", "12.3", BRANCH),
    "24.02": Release("2.43.0", "8.6.3.1", "1.16.3", "2.3", "12.3", BRANCH),
    "24.03": Release("2.44.0", "8.6.3.1", "1.17.2", "2.3", "12.4", BRANCH),
    "24.04": Release("2.45.0", "8.6.3.1", "1.17.3", "2.3", "12.4", BRANCH),
    "24.05": Release("2.46.0", "10.0.1.6", "1.18.0", "2.4", "12.4", BRANCH),
    "24.06": Release("2.47.0", None, "1.18.0", "2.4", "12.5", BRANCH),
    "24.07": Release("2.48.0", "10.2", "1.18.1", "2.4", "12.5", BRANCH),
    "24.08": Release("2.49.0", None, "1.19.0", "2.5", "12.6", BRANCH),
    "24.09": Release("2.50.0", "10.4.0.26", "1.19.2", "2.5", "12.6", BRANCH),
    "24.10": Release("2.51.0", "10.5", "1.19.2", "2.5", "12.6", BRANCH),
    "24.11": Release("2.52.0", "10.6", "1.19.2", "2.6", "12.6", BRANCH),
    "24.12": Release("2.53.0", "10.7.0", "1.20.1", "2.6", "12.6", BRANCH),
    "25.01": Release("2.54.0", "10.8.0.43", "1.20.1", "2.6", "12.8", BRANCH),
    "25.02": Release("2.55.0", "10.8.0", "1.20.1", "2.7", "12.8", BRANCH),
    "25.03": Release("2.56.0", "10.9.0.34", "1.21.0", "2.7", "12.8", BRANCH),
    "25.04": Release("2.57.0", "10.9.0", "1.21.0", "2.7", "12.9", BRANCH),
    "25.05": Release("2.58.0", "10.10.0.31", "1.22.0", "2.8", "12.9", BRANCH),
    "25.06": Release("2.59.0", "10.11.0", "1.22.0", "2.8", "12.9", BRANCH),
    "25.07": Release("2.59.1", None, "1.22.0", None, None, BRANCH),
    "25.08": Release("2.60.0", "10.13.2.6", "1.23.0", "2.8", "13.0", BRANCH),
    "25.09": Release("2.61.0", "10.13.3.9", "1.23.0", "2.9", "13.0", BRANCH),
    "25.10": Release("2.62.0", "10.13.3", "1.23.1", "2.9", "13.0", BRANCH),
    "25.11": Release("2.63.0", "10.14.1", "1.23.2", "2.10", "13.0", BRANCH),
    "25.12": Release("2.64.0", "10.14.1.48", "1.23.2", "2.10", "13.1", BRANCH),
    "26.01": Release("2.65.0", None, "1.23.2", "2.10", "13.1", BRANCH),
    "26.02": Release("2.66.0", "10.15.1", "1.24.1", "2.11", "13.1", BRANCH),
    "26.03": Release("2.67.0", "10.16.0.72", "1.24.2", "2.11", "13.2", BRANCH),
    "26.04": Release("2.68.0", "10.16.1", "1.24.4", "2.12", "13.2", BRANCH),
    "26.05": Release("2.69.0", "10.16.1.11", "1.24.4", "2.12", "13.2", BRANCH),
    "26.06": Release("2.70.0", "11.0.0.114", "1.24.4", "2.13", "13.3", BRANCH),
    "26.07": Release("2.71.0", "11.1.0.106", "1.27.0", "2.13", "13.3", BRANCH),
    "26.08": Release("2.72.0", "11.2.1.2", "1.28.0", "2.14", "13.4", BRANCH),
    "26.09": Release("2.73.0", "11.3.0.99", "1.30.0", "2.14", "13.4", PAGES),
    "26.10": Release("2.74.0", None, None, None, "13.4", f"{PAGES}; CUDA: rel-26-10.html"),
    "26.11": Release("2.75.0", None, None, None, None, PAGES),
}

# Measured: each version from PyPI loaded a model of every opset and IR version.
ONNX_RUNTIME = {
    "1.15": OnnxSupport(19, 9), "1.16": OnnxSupport(19, 9), "1.17": OnnxSupport(20, 9),
    "1.18": OnnxSupport(21, 10), "1.19": OnnxSupport(21, 10), "1.20": OnnxSupport(21, 10),
    "1.21": OnnxSupport(22, 10), "1.22": OnnxSupport(22, 10), "1.23": OnnxSupport(23, 11),
    "1.24": OnnxSupport(25, 13), "1.25": OnnxSupport(26, 13), "1.26": OnnxSupport(26, 13),
    "1.27": OnnxSupport(26, 13), "1.28": OnnxSupport(26, 13), "1.29": OnnxSupport(26, 13),
    "1.30": OnnxSupport(26, 13), "1.31": OnnxSupport(26, 13), "1.32": OnnxSupport(28, 14),
}

# The first release that has a field of ModelConfig, by the message that holds it. All other fields are older than the
# first row of RELEASES. Source: protobuf/model_config.proto in the branches r23.10 to r26.07 of the repository
# `common`, compared with each other. No later branch was seen.
FIELDS_SINCE = {
    "ModelSequenceBatching.iterative_sequence": "23.11",
    "ModelSequenceBatching.State.use_same_buffer_for_input_output": "23.11",
    "ModelSequenceBatching.State.use_growable_memory": "23.11",
    "ModelConfig.runtime": "24.01",
    "ModelInput.is_non_linear_format_io": "24.08",
    "ModelOutput.is_non_linear_format_io": "24.08",
    "ModelConfig.model_metrics": "24.11",
    "ModelEnsembling.max_inflight_requests": "25.11",
}

# The first release whose backend has tensors in bfloat16. Source: onnxruntime_utils.cc of the branch r26.03 of
# onnxruntime_backend, tensorrt_utils.cc of the branch r24.06 of tensorrt_backend, release notes of 26.11. PyTorch's
# backend has none for TorchScript.
BF16_SINCE = {"onnx": "26.03", "tensorrt": "24.06", "aoti": "26.11"}

# The first release that loads a format, and the first one that runs requests of several clients as one batch. Source:
# README.md of pytorch_backend, release notes of 26.07. Measured with the backend of June 2026 in the core of 24.10:
# with dynamic_batching every request got the rows of the whole batch, and a second instance was not loaded.
PLATFORM_SINCE = {"aoti": "26.03"}
BATCHING_SINCE = {"aoti": "26.07"}

CHANGES = (
    Change(
        "23.12", ("torchscript",), "parameters.ENABLE_NVFUSER is ignored: PyTorch has no NvFuser any more",
        "pytorch_backend: src/libtorch.cc, r23.11 and r23.12",
    ),
    Change(
        "24.05", ("torchscript",),
        "parameters.INTRA_OP_THREAD_COUNT and INTER_OP_THREAD_COUNT are read, and hold for the whole server",
        "pytorch_backend: src/libtorch.cc, r24.03 and r24.05",
    ),
    Change(
        "24.06", ("onnx",), 'optimization: the accelerator "cuda" exists',
        "onnxruntime_backend: src/onnxruntime.cc, r24.05 and r24.06",
    ),
    Change(
        "25.05", ("tensorrt",), "parameters.execution_context_allocation_strategy is read",
        "tensorrt_backend: src/model_state.cc, r25.03 and r25.05",
    ),
    Change(
        "25.08", (), "GPUs need compute capability 7.5 or newer: CUDA 13 has dropped Pascal and Volta",
        "release notes of CUDA 13.0, and of Triton 26.07",
    ),
    Change(
        "26.04", ("ensemble",),
        "ensemble_scheduling.max_inflight_requests limits all requests of an ensemble together, not each request",
        "common: protobuf/model_config.proto, r26.03 and r26.04",
    ),
    Change(
        "26.04", ("torchscript",),
        "default_model_filename is empty in the configuration that the server reports (it still loads model.pt)",
        "core: src/model_config_utils.cc, r26.03 and r26.04",
    ),
    Change(
        "26.04", (), "clients cannot use shared memory, unless the server starts with --allow-client-shm=true",
        "server: src/command_line_parser.cc, r26.03 and r26.04",
    ),
    Change(
        "26.06", ("onnx",),
        "optimization: TensorRT 11 has no flags for fp16, bf16 and int8: precision_mode may only be FP32",
        "onnxruntime#28611; release notes of TensorRT 11",
    ),
    Change(
        "26.07", ("aoti",), "dynamic_batching and several instances work: until then config.pbtxt has neither of them",
        "release notes of 26.07; pytorch_backend#196",
    ),
)
# fmt: on
