"""Models of the tiny network, each with other settings of Triton. Their config.pbtxt are in tests/triton/golden/."""

from pathlib import Path

from tests.support import tiny_network
from tests.support.project import Project

# Built as TorchScript and ONNX, since their two configs differ in more than the name.
BOTH = {"cores", "plain", "queues", "sequences", "tuned", "versions"}

# By name: (keys above the tables, [input], [onnx], all other tables).
SPECS: dict[str, tuple[str, str, str, str]] = {
    "plain": ("", "", "", ""),
    "on_cpu": ("", "", "", '[triton]\ndevice = "cpu"\ninstance_group = [{ count = 2 }]'),
    "cores": (
        "",
        "",
        "",
        """
        [triton]
        device = "cpu"
        cores = 2

        [triton.onnx]
        parameters = { enable_mem_arena = "0" }
        """,
    ),
    "queues": (
        "",
        "",
        "",
        """
        [triton.torchscript.dynamic_batching]
        preferred_batch_size = [2, 3]
        max_queue_delay_microseconds = 200
        priority_levels = 2
        default_priority_level = 2
        default_queue_policy = { timeout_action = "DELAY", default_timeout_microseconds = 1000, max_queue_size = 64 }
        priority_queue_policy = { 1 = { default_timeout_microseconds = 5000000, allow_timeout_override = true } }

        [triton.onnx]
        dynamic_batching = { preserve_ordering = true }
        """,
    ),
    "sequences": (
        "",
        "",
        "",
        """
        [triton]
        sequence_batching = { max_sequence_idle_microseconds = 5000000, direct = { minimum_slot_utilization = 0.5 } }

        [triton.onnx]
        sequence_batching = { oldest = { max_candidate_sequences = 4, preferred_batch_size = [2] } }
        """,
    ),
    "bare": ("", "", "", "[triton]\ndynamic_batching = false\nmodel_warmup = false\ninstance_group = false"),
    "tuned": (
        "",
        "",
        "",
        """
        [triton]
        optimization = { input_pinned_memory = { enable = true }, priority = "PRIORITY_MAX" }
        metric_tags = { team = "vision" }
        response_cache = { enable = true }

        [triton.torchscript]
        parameters = { INFERENCE_MODE = true, INTRA_OP_THREAD_COUNT = 2, DISABLE_CUDNN = "false" }

        [triton.onnx]
        max_batch_size = 2
        parameters = { intra_op_thread_count = 2 }

        [triton.onnx.optimization.graph]
        level = 1

        [[triton.onnx.optimization.execution_accelerators.gpu_execution_accelerator]]
        name = "tensorrt"
        parameters = { precision_mode = "FP32", max_workspace_size_bytes = "1073741824" }

        [[triton.onnx.optimization.execution_accelerators.cpu_execution_accelerator]]
        name = "openvino"

        [[triton.onnx.instance_group]]
        count = 2
        rate_limiter = { resources = [{ name = "R1", count = 1 }], priority = 2 }

        [[triton.onnx.instance_group]]
        name = "spare"
        kind = "KIND_CPU"
        host_policy = "numa0"
        """,
    ),
    "from_bytes": ("", 'format = "uint8_nhwc"', "", "[output]\nsoftmax = true\ntop_k = 2"),
    "sizes": ("", "min_size = [16, 16]\nmax_size = [32, 24]", "", ""),
    "fixed": ("", "", "dynamic_axes = false\nbatch_size = 2", ""),
    "versions": (
        'ensemble = "torchscript"',
        "",
        "",
        "[triton]\nkeep_versions = 3\n[triton.onnx]\nversion_policy = { specific = { versions = [1] } }",
    ),
    "pictures": (
        'ensemble = "onnx"\nlabels = "labels.txt"',
        'format = "uint8_nhwc"',
        "",
        "[output]\nsoftmax = true\n[triton.preprocess]\ninstance_group = [{ count = 1 }]\n"
        "[triton.ensemble]\nparameters = { owner = 'vision' }",
    ),
    "warmed": (
        "",
        "",
        "",
        """
        [[triton.model_warmup]]
        name = "a picture"
        batch_size = 2
        count = 3
        inputs = { INPUT__0 = { data_type = "TYPE_FP32", dims = [3, 16, 16], input_data_file = "picture" } }
        """,
    ),
}


def add(project: Project, name: str) -> Path:
    """Add one of the models to a project, with its labels and warm-up file. Return its folder."""
    top, input_table, onnx, more = SPECS[name]
    formats = '"torchscript", "onnx"' if name in BOTH else '"onnx"'
    folder = tiny_network.add(project, name, onnx=onnx, input_table=input_table, formats=formats)
    text = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(f"{top}\n{text}\n{more}\n")
    (folder / "labels.txt").write_text("one\ntwo\nthree\nfour\n")
    (folder / "warmup").mkdir(exist_ok=True)
    (folder / "warmup/picture").write_bytes(bytes(4 * 3 * 16 * 16))
    return folder
