"""Mistakes in [[inputs]], [dimensions] and [[outputs]]. Only specs that have one of these tables import this module."""

import itertools
import math
import re
from collections.abc import Iterator

from build_tasks.errors import listed, with_suggestion
from build_tasks.spec import pictures
from build_tasks.spec.interface import dimensions_of, inputs_of, interface_of, label_files
from build_tasks.spec.model import Spec
from build_tasks.spec.picture_keys import NAMES
from build_tasks.spec.tables import Input, Output
from build_tasks.spec.tensor_tables import TensorInput
from build_tasks.spec.value_checks import Mistake
from build_tasks.tensors import BATCH, can_be_argument, signature_dims

# The types of tensors that a format cannot have.
# Sources: ModelConfigDataTypeToTorchType in src/libtorch_utils.cc of Triton's pytorch_backend; TensorRT's
# documentation, "Data Types": int8 exists there only between quantized layers.
UNSUPPORTED = {
    "torchscript": ("uint16", "uint32", "uint64", "string"),
    "tensorrt": ("float64", "int8", "int16", "uint16", "uint32", "uint64", "string"),
}
UNSUPPORTED["rtx"] = UNSUPPORTED["tensorrt"]
UNSUPPORTED["aoti"] = UNSUPPORTED["torchscript"]  # the same backend


def mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield the mistakes in the tables of tensors."""
    if spec.inputs and spec.input != Input():
        yield "input", "nothing, since [[inputs]] describes the inputs", "[input]"
    for index, table in enumerate(spec.inputs):
        yield from _input_mistakes(spec, f"inputs[{index}]", table)
    yield from _dimension_mistakes(spec)
    yield from _name_mistakes(spec)
    yield from _key_mistakes(spec)
    files = label_files(spec)
    if spec.labels and spec.outputs and spec.outputs[0].labels:
        yield "labels", "nothing, since outputs[0].labels has those of the first output", repr(spec.labels)
    if len({file for file, _ in files.values()}) < len(files):
        yield "outputs", "names that differ in more than : and /, for the files of their labels", ", ".join(files)
    if spec.outputs and spec.output != Output() and len(spec.outputs) > 1:
        yield "output", "nothing, since there are several [[outputs]]", "[output]"
    if spec.inputs and isinstance(spec.ensemble, str):
        yield (
            "ensemble",
            "nothing, since it prepares the picture of [input], and this spec has [[inputs]]",
            repr(spec.ensemble),
        )


def _input_mistakes(spec: Spec, key: str, table: TensorInput) -> Iterator[Mistake]:
    for model_format in spec.formats:
        if table.dtype in UNSUPPORTED.get(model_format, ()):
            yield f"{key}.dtype", f"a type that {model_format} has (formats)", repr(table.dtype)
            return
    if table.dtype == "string" and not spec.from_onnx:
        yield f"{key}.dtype", "another type, since only ONNX files have strings", repr(table.dtype)
    if table.layout and len(table.shape) != 3:
        yield f"{key}.layout", "nothing, or a shape of three dimensions", f"{table.layout!r}, {table.shape}"
    yield from _picture_mistakes(key, table)
    if table.ragged:
        from build_tasks.spec import ragged  # few specs have such inputs

        yield from ragged.mistakes(spec, key, table)
    elif table.dims:
        from build_tasks.triton.derived_tensors import reshape_mistake

        words = [[dim for dim in shape if isinstance(dim, str)] for shape in (table.dims, table.shape)]
        if words[0] != words[1]:
            yield f"{key}.dims", f"the words of shape, {listed(words[1]) or 'none'}", listed(words[0]) or "none"
        elif mistake := reshape_mistake(signature_dims(table.dims), signature_dims(table.shape)):
            yield f"{key}.dims", *mistake
    if table.batch_dimension > len(table.shape):
        yield f"{key}.batch_dimension", f"at most {len(table.shape)}, the last dimension", repr(table.batch_dimension)
    yield from _range_mistakes(key, table)


def _picture_mistakes(key: str, table: TensorInput) -> Iterator[Mistake]:
    """Yield keys of pictures that the input does not have, or that contradict each other."""
    stated = [name for name in NAMES if getattr(table, name) not in (None, 1)]
    if not table.layout:
        for name in stated:
            yield f"{key}.{name}", 'nothing, since it is for pictures (layout = "nchw" or "nhwc")', "a value"
        return
    if table.dtype == "uint8":
        for name in {"mean", "std", "scale"} & {*stated}:
            yield f"{key}.{name}", "nothing, since a uint8 input takes pixels as they are", repr(getattr(table, name))
    elif table.dtype not in ("float32", "float16", "float64"):
        yield f"{key}.dtype", "uint8 or a type of floats, since layout says that it is a picture", repr(table.dtype)
    channels = table.shape[0 if table.layout == "nchw" else -1] if len(table.shape) == 3 else 0
    if isinstance(channels, str):
        yield f"{key}.layout", "a fixed number of channels", f"{table.layout!r}, {table.shape}"
        return
    yield from pictures.key_mistakes(table, key, channels)


def _range_mistakes(key: str, table: TensorInput) -> Iterator[Mistake]:
    """Yield values of random samples that the type of an input does not have."""
    ranges = {name: value for name in ("low", "high") if (value := getattr(table, name)) is not None}
    if ranges and table.values is not None:
        yield f"{key}.values", "either values, or low and high", "both"
    if ranges and table.dtype in ("bool", "string"):
        yield f"{key}.{next(iter(ranges))}", f"nothing, since {table.dtype} has no range (values)", repr(ranges)
        return
    stated = [*((f"{key}.{name}", value) for name, value in ranges.items())]
    stated += [(f"{key}.values[{index}]", value) for index, value in enumerate(table.values or ())]
    for name, value in stated:
        if not _fits(value, table.dtype):
            yield name, f"a value of {table.dtype}", repr(value)
            return
    low, high = table.low, table.high
    default = None if table.dtype.startswith("float") else 255 if table.dtype == "uint8" else 1
    if high is None and low is not None and default is not None and low > default:
        yield f"{key}.high", f"the largest value, since low is above its default, {default}", "nothing"
    elif low is None and high is not None and high < 0:
        yield f"{key}.low", "the smallest value, since high is negative", "nothing"
    elif high is not None and low is not None and low > high:
        yield f"{key}.low", f"at most high, {high!r}", repr(low)


def _fits(value: float | bool | str, dtype: str) -> bool:
    """Return whether a value of TOML can be one of a type."""
    if dtype in ("bool", "string"):
        return isinstance(value, {"bool": bool, "string": str}[dtype])
    if isinstance(value, bool | str) or not math.isfinite(value):
        return False
    if dtype.startswith("float"):
        return abs(value) <= {"float16": 65504, "float32": 3.4028234663852886e38}.get(dtype, math.inf)
    bits = int(re.sub(r"\D", "", dtype))
    least, most = (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return isinstance(value, int) and least <= value <= most


def _dimension_mistakes(spec: Spec) -> Iterator[Mistake]:
    used = dict.fromkeys(dim for each in inputs_of(spec) for dim in each["shape"] or [] if isinstance(dim, str))
    words = dimensions_of(spec)
    for index, table in enumerate(spec.inputs):
        for axis, dim in enumerate(table.shape):
            if dim == BATCH:
                yield f"inputs[{index}].shape[{axis}]", "another word, since batch is the first dimension", repr(dim)
            elif isinstance(dim, str) and dim not in words:
                expected = f"a word of [dimensions], {listed(words)}" if words else "a table [dimensions.WORD] for it"
                yield f"inputs[{index}].shape[{axis}]", expected, with_suggestion(dim, words)
    for word in spec.dimensions:
        if not spec.inputs:
            yield f"dimensions.{word}", "nothing, since there are no [[inputs]]", "a table"
        elif word not in used:
            yield f"dimensions.{word}", "a word that the shape of an input has", with_suggestion(word, used)
    for word, bounds in words.items():
        if not bounds["min"] <= bounds["opt"] <= bounds["max"]:
            found = f"{bounds['min']}, {bounds['opt']}, {bounds['max']}"
            yield f"dimensions.{word}", "min <= opt <= max", found


def _name_mistakes(spec: Spec) -> Iterator[Mistake]:
    interface = interface_of(spec)
    names = {f"inputs[{index}]": each["name"] for index, each in enumerate(interface["inputs"])}
    names |= {f"outputs[{index}]": each["name"] for index, each in enumerate(interface["outputs"])}
    for (key, name), (other, found) in itertools.combinations(names.items(), 2):
        if found == name:
            yield f"{other}.name", f"another name than that of {key}", repr(found)
            return
    if "aoti" in spec.formats:
        # Triton finds the tensors of a package by their places. Source: README.md of pytorch_backend.
        for kind, start in (("inputs", "INPUT__"), ("outputs", "OUTPUT__")):
            for index, name in enumerate(each["name"] for each in interface[kind]):  # type: ignore[literal-required]
                if name != f"{start}{index}":
                    expected = f"'{start}{index}', since Triton's torch_aoti finds tensors by their place (formats)"
                    yield f"{kind}[{index}].name", expected, repr(name)
    if "torchscript" not in spec.formats or spec.from_onnx:
        return
    for index, table in enumerate(spec.inputs):
        if table.name and not can_be_argument(table.name):
            # The PyTorch backend finds inputs as arguments of forward.
            expected = "a name of ASCII letters, digits and _, which an argument of TorchScript can have (formats)"
            yield f"inputs[{index}].name", expected, repr(table.name)
    for index, output in enumerate(interface["outputs"]):
        place = re.search(r"__(\d+)$", output["name"])
        if place and int(place[1]) != index:  # the PyTorch backend takes such a number as the place of the output
            yield f"outputs[{index}].name", f"the number {index} behind __, its place", repr(output["name"])


def _key_mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield outputs that are the same tensor of the answer. What only the answer shows is refused when it is there."""
    places: list[str] = []
    for index, table in enumerate(spec.outputs):
        place = table.name or index if table.key is None else table.key  # without a key: by its name or position
        if str(place) in places:
            expected = f"another tensor of the answer than that of outputs[{places.index(str(place))}]"
            yield f"outputs[{index}].key", expected, repr(place)
        places.append(str(place))
