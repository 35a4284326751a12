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


def package(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """The signature of a package of AOTInductor."""
    signature = tensors(device=device, PyTorch="2.13.0", profiles=plan()["profiles"], **more)
    return {key: value for key, value in signature.items() if key not in ("opset", "ir_version")}


def plan(largest: int = 8, tensorrt: str = "11.2.1.2", **more: Any) -> dict[str, Any]:
    shape = [3, 160, 160]
    shapes = {"INPUT__0": {"min": [1, *shape], "opt": [2, *shape], "max": [largest, *shape]}}
    return tensors(profiles=[shapes], TensorRT=tensorrt, GPU="NVIDIA L4", **more)


AOTI = 'formats = ["aoti"]'
# By name: (spec, signatures).
PACKAGES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "cpu_aoti": (triton('release = "26.07"', AOTI), [package()]),
    "early_aoti": (triton('release = "26.05"\ndevice = "gpu"', AOTI), [package("gpu", GPU="NVIDIA L4")]),
    "fleet_aoti": (
        spec(
            '[aoti]\ncompute_capabilities = ["8.9", "9.0"]\n[triton]\nrelease = "26.11"\n'
            "[triton.aoti]\ninstance_group = [{ count = 2 }]",
            AOTI,
        ),
        [package("gpu", GPU="NVIDIA L4"), package("gpu", GPU="NVIDIA H100")],
    ),
}

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
