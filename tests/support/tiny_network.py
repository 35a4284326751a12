"""A network of 164 parameters, with a spec of one format that needs no GPU. All its stages together take a second."""

from pathlib import Path

from tests.support.project import Project

NETWORK = """\
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv(x)
        {body}
        return self.head(x.mean(dim=(2, 3)))


def build():
    return Network()
"""

SPEC = """\
formats = [{formats}]
max_batch_size = 3

[architecture]
network = "network.py:build"

[input]
shape = [3, 16, 16]
{input}

[weights]
source = "weights.safetensors"

[onnx]
{onnx}

[engine]
{engine}
"""


def add(
    project: Project,
    name: str,
    engine: str = "",
    *,
    onnx: str = "",
    input_table: str = "",
    body: str = "",
    formats: str = '"rtx"',
) -> Path:
    """Add a model with this network to the project, and return its folder.

    Args:
        engine: Lines of the table [engine].
        onnx: Lines of the table [onnx].
        input_table: Further lines of the table [input].
        body: Code in the middle of the network's forward().
        formats: The formats of the spec, as TOML without the brackets.
    """
    import torch
    from safetensors.torch import save_file
    from torch import nn

    spec = SPEC.format(engine=engine, onnx=onnx, input=input_table, formats=formats)
    folder = project.model(name, spec, network_py=NETWORK.replace("{body}", body))
    torch.manual_seed(1)
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(5, 4)})
    save_file(layers.state_dict(), folder / "weights.safetensors")  # the gate ignores random:// ones
    return folder
