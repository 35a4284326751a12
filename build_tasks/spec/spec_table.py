"""The top level of a spec: the keys above the tables, and the tables."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, field

from build_tasks.spec.engine_tables import Engine, Profile
from build_tasks.spec.ensemble_tables import Ensemble
from build_tasks.spec.tables import (
    ENGINES,
    Accuracy,
    Aoti,
    Architecture,
    Batch,
    Card,
    Formats,
    Input,
    Onnx,
    Output,
    ServedFormat,
    Table,
    Text,
    TorchScript,
    Weights,
)
from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput, Word


class Spec(Table, kw_only=True):
    """The model."""

    architecture: Architecture = field(default_factory=Architecture)
    weights: Weights
    input: Input = field(default_factory=Input)
    inputs: Annotated[list[TensorInput], Meta(description="The inputs, if they are not one picture.")] = field(
        default_factory=list
    )
    dimensions: Annotated[dict[Word, Dimension], Meta(description="Open dimensions of [[inputs]].")] = field(
        default_factory=dict
    )
    output: Output = field(default_factory=Output)
    outputs: Annotated[list[TensorOutput], Meta(description="The outputs. Default: all.")] = field(default_factory=list)
    formats: Annotated[Formats, Meta(description="Formats to build.")] = field(
        default_factory=lambda: ["torchscript", "onnx", "tensorrt"]
    )
    max_batch_size: Annotated[Batch, Meta(description="Largest batch that is served and checked.")] = 32
    ensemble: Annotated[
        ServedFormat | Ensemble | None,
        Meta(description="Also serve this format as an ensemble, which takes encoded pictures and prepares them."),
    ] = None
    labels: Annotated[
        Text | None, Meta(description='"imagenet-1k", or a text file of the model with one class per line.')
    ] = None
    torchscript: TorchScript = field(default_factory=TorchScript)
    onnx: Onnx = field(default_factory=Onnx)
    engine: Engine = field(default_factory=Engine)
    aoti: Aoti = field(default_factory=Aoti)
    accuracy: Accuracy = field(default_factory=Accuracy)
    card: Card = field(default_factory=Card)
    triton: Annotated[
        dict[str, Any],
        Meta(description="How Triton serves the model. Fields of Triton's ModelConfig, and keys of this project."),
    ] = field(default_factory=dict)

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, best and largest batch of the engine. Of several profiles, the best batch is that of the first."""
        tables: Sequence[Engine | Profile] = self.engine.profiles or [self.engine]
        batches = [self.batches_of(table) for table in tables]
        return min(each[0] for each in batches), batches[0][1], max(each[2] for each in batches)

    def batches_of(self, table: Engine | Profile) -> tuple[int, int, int]:
        """Return the smallest, best and largest batch of an optimization profile.

        Defaults: 1, at most 8, and max_batch_size. If the batch is fixed, all three are that batch.
        """
        if not self.onnx.dynamic_axes:
            return self.onnx.batch_size, self.onnx.batch_size, self.onnx.batch_size
        largest = table.max_batch_size or max(self.max_batch_size, table.min_batch_size or 1)
        smallest = table.min_batch_size or 1
        return smallest, table.opt_batch_size or max(smallest, min(8, largest)), largest

    @property
    def from_onnx(self) -> bool:
        """Whether the source is an ONNX file. Then there is no PyTorch network, and the file is the reference."""
        return re.search(r"\.onnx([@?#].*)?$", self.weights.source) is not None

    @property
    def program_suffix(self) -> str | None:
        """The suffix of a source of TorchScript or torch.export, which contains the network; None for other sources."""
        if (self.architecture.timm, self.architecture.network) != (None, None):
            return None
        found = re.search(r"(\.pt2|\.pth?|\.ts|\.jit|\.torchscript)([@?#].*)?$", self.weights.source)
        return found and found[1]

    @property
    def has_engine(self) -> bool:
        """Whether one of the formats is an engine."""
        return not set(ENGINES).isdisjoint(self.formats)
