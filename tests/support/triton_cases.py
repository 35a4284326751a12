"""Parts of specs with [triton], and specs of TensorRT plans whose config.pbtxt is in tests/triton/golden/."""

from typing import Any

HEAD = """\
max_batch_size = 8
{top}
[architecture]
timm = "test_efficientnet"
[weights]
source = "random://0"
{more}
"""


def spec(more: str, top: str = "") -> str:
    return HEAD.format(more=more, top=top)


def triton(lines: str, top: str = "") -> str:
    return spec(f"[triton]\n{lines}", top)


def of_format(model_format: str, lines: str) -> str:
    return spec(f"[triton.{model_format}]\n{lines}")


def batching(lines: str) -> str:
    return triton(f"dynamic_batching = {{ {lines} }}")


ENSEMBLE = 'ensemble = "onnx"'


def tensors(batch: int = -1, **more: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "INPUT__0", "dtype": "float32", "shape": [batch, 3, 160, 160]}],
        "outputs": [{"name": "OUTPUT__0", "dtype": "float32", "shape": [batch, 1000]}],
        "opset": 17,
        "ir_version": 8,
        **more,
    }


def plan(largest: int = 8, tensorrt: str = "11.2.1.2", **more: Any) -> dict[str, Any]:
    shape = [3, 160, 160]
    shapes = {"INPUT__0": {"min": [1, *shape], "opt": [2, *shape], "max": [largest, *shape]}}
    return tensors(profiles=[shapes], TensorRT=tensorrt, GPU="NVIDIA L4", **more)


PLANS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plan_trt": (spec(""), [plan()]),
    "fleet_trt": (spec('[engine]\ncompute_capabilities = ["8.6", "9.0"]'), [plan(8), plan(4)]),
    "graphs_trt": (
        spec(
            """
            [engine]
            max_batch_size = 4

            [triton]
            device = "gpu"

            [triton.tensorrt]
            dynamic_batching = { preferred_batch_size = [4] }
            optimization = { cuda = { graphs = true, graph_spec = [{ batch_size = 4 }], output_copy_stream = true } }
            instance_group = [{ count = 2, gpus = [0, 1], profile = ["0"] }]
            """
        ),
        [plan(4)],
    ),
}
