"""Files of TorchScript and torch.export that were saved in training mode, and those that only look so."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from build_tasks.errors import UserError
from build_tasks.formats.torch_program import load_program


class Attention(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.rate if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=rate)


class StandardizedWeight(nn.Module):
    """A convolution that normalizes its weight with the function for batches, also in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.batch_norm(self.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight))


class Guarded(nn.Module):
    """A dropout that knows nothing of the mode, behind a branch on it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = nn.functional.dropout(x, 0.5)
        return x


class Recurrent(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.layers = nn.LSTM(16, 8, 2, dropout=rate, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers(x.flatten(1, 2))[0]
        return answer


def trace(network: nn.Module, path: Path) -> None:
    torch.jit.trace(network, torch.zeros(2, 3, 16, 16), check_trace=False).save(path)


def script(network: nn.Module, path: Path) -> None:
    torch.jit.script(network).save(path)


def export(network: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 16, 16),)), path)


def decompose(network: nn.Module, path: Path) -> None:
    program = torch.export.export(network, (torch.zeros(2, 3, 16, 16),)).run_decompositions()
    torch.export.save(program, path)


Save = Callable[[nn.Module, Path], None]
FILES: dict[Save, str] = {trace: "n.pt", script: "n.pt", export: "n.pt2", decompose: "n.pt2"}
DIFFERENT_IN_TRAINING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(3), "batch_norm"),
    "dropout": (lambda: nn.Dropout(0.3), "dropout"),
    "dropout of channels": (lambda: nn.Dropout2d(0.3), "feature_dropout"),
    "alpha dropout": (lambda: nn.AlphaDropout(0.3), "alpha_dropout"),
    "random slopes": (lambda: nn.RReLU(), "rrelu"),
    "attention": (lambda: Attention(0.1), "scaled_dot_product_attention"),
    "recurrent": (lambda: Recurrent(0.2), "lstm"),
    "guarded": (Guarded, "dropout"),
}
THE_SAME: dict[str, Callable[[], nn.Module]] = {
    "batch norm without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm2d(3),
    "dropout of nothing": lambda: nn.Dropout(0.0),
    "attention without dropout": lambda: Attention(0.0),
    "recurrent without dropout": lambda: Recurrent(0.0),
    "standardized weight": StandardizedWeight,
}


def save(write: Save, network: nn.Module, folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing in training mode warns
        write(network, folder / FILES[write])
    return str(folder / FILES[write])


@pytest.mark.parametrize("write", [trace, export])
@pytest.mark.parametrize("case", DIFFERENT_IN_TRAINING)
def test_a_file_saved_in_training_mode_is_refused(tmp_path: Path, case: str, write: Save) -> None:
    create, operator = DIFFERENT_IN_TRAINING[case]
    with pytest.raises(UserError, match=rf"was saved in training mode, .*\({operator}\): call eval\(\)"):
        load_program(save(write, create().train(), tmp_path))
    load_program(save(write, create().eval(), tmp_path))


@pytest.mark.parametrize("case", ["batch norm", "dropout", "attention", "random slopes"])
def test_so_is_one_whose_operators_were_decomposed(tmp_path: Path, case: str) -> None:
    create, _ = DIFFERENT_IN_TRAINING[case]
    with pytest.raises(UserError, match="was saved in training mode"):
        load_program(save(decompose, create().train(), tmp_path))
    load_program(save(decompose, create().eval(), tmp_path))


@pytest.mark.parametrize("case", ["batch norm", "dropout", "random slopes", "guarded"])
def test_a_script_in_training_mode_is_set_to_inference(tmp_path: Path, case: str) -> None:
    network = DIFFERENT_IN_TRAINING[case][0]()
    program = load_program(save(script, network.train(), tmp_path))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program(x), network.eval()(x))


@pytest.mark.parametrize("write", FILES)
@pytest.mark.parametrize("case", THE_SAME)
def test_a_network_that_computes_the_same_in_both_modes_is_taken(tmp_path: Path, case: str, write: Save) -> None:
    load_program(save(write, THE_SAME[case]().train(), tmp_path))
