"""The source of the weights, and the files that a spec names: what they must look like, and where they may lie."""

import os
import re
from collections.abc import Iterator

from build_tasks.errors import UNSAFE, UserError, with_suggestion
from build_tasks.spec import model_files
from build_tasks.spec.ensemble_tables import Ensemble, python_folders
from build_tasks.spec.model import Model, Spec, split_source
from build_tasks.spec.model_files import SpecPath
from build_tasks.spec.value_checks import Mistake
from build_tasks.triton import model_config

SCHEMES = ("hf", "https", "http", "package", "timm", "random")
MAX_SOURCE = 2000  # characters of a URL, as most servers accept
HOST = r"([^\s:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
# Files that hold a network in a form that this project does not read, or that it builds itself.
NO_SOURCES = (
    *(".engine", ".plan", ".trt", ".rtx", ".ort", ".tflite", ".pb", ".h5", ".hdf5", ".keras", ".mlmodel", ".mlpackage"),
    *(".xml", ".pdmodel", ".pdiparams", ".caffemodel", ".gguf", ".msgpack", ".tar", ".mar", ".so"),
)
CALLED_TAR = (".pth.tar", ".pt.tar")  # timm and torchvision's examples call their checkpoints so; torch.save wrote them
READABLE = (
    "a checkpoint (.safetensors, its .index.json, .pth, .npz), ONNX (.onnx), TorchScript (.pt) or torch.export (.pt2)"
)
TENSOR_SUFFIXES = (".npz", ".json")  # of samples that are not a folder of pictures
IMAGENET = "imagenet-1k"  # the value of labels that is no file: the classes of ImageNet, as timm has them
DATA_OF_TRITON = "triton.model_warmup"
FOLDERS = "folders"  # the value of accuracy.truth that is no file: each picture lies in a folder of its class


def mistakes(model: Model) -> Iterator[Mistake]:
    """Yield what is wrong with weights.source, and with the paths of the spec."""
    yield from _source_mistakes(model.spec)
    yield from _path_mistakes(model)


def has_control_characters(text: str) -> bool:
    """Return whether a text holds a line break or a character that `errors.printable` would escape."""
    return not text.isprintable() and ("\n" in text or re.search(UNSAFE, text) is not None)


def _source_mistakes(spec: Spec) -> Iterator[Mistake]:
    key, source = "weights.source", spec.weights.source
    scheme, rest = split_source(source)
    if scheme not in (*SCHEMES, "file"):
        schemes = [f"{s}://" for s in SCHEMES]
        yield key, f"one of {', '.join(schemes)} or a path", with_suggestion(f"{scheme}://", schemes)
    elif scheme == "random" and not rest.isdecimal():
        yield key, "random:// and a seed", repr(source)
    elif scheme == "random" and int(rest) >= 2**64:
        yield key, "random:// and a seed below 2**64", repr(source)
    elif scheme != "file" and (has_control_characters(rest) or len(rest) > MAX_SOURCE):
        yield key, f"at most {MAX_SOURCE} characters, and no control characters", repr(source)
    elif scheme in ("http", "https"):
        yield from _url_mistakes(spec, scheme, rest)
    elif scheme == "hf" and not (re.fullmatch(r"[^/@]+/[^/@]+/[^@]+(@[^@]+)?", rest) and _is_relative(rest)):
        yield key, "`hf://owner/repository/file@revision`", repr(source)
    elif scheme == "package" and not (re.fullmatch(r"[A-Za-z_]\w*/.+", rest) and _is_relative(rest)):
        yield key, "`package://package/path/in/it`", repr(source)
    elif scheme == "timm" and "/" in rest:
        yield key, "`timm://architecture.tag`", repr(source)
    elif not rest:
        yield key, "a name after ://", repr(source)
    if scheme not in ("random", "timm"):
        file = rest.partition("?")[0].partition("#")[0].partition("@")[0].lower()
        suffix = os.path.splitext(rest.partition("?")[0].partition("#")[0].partition("@")[0])[1]
        if suffix.lower() in NO_SOURCES and not file.endswith(CALLED_TAR):
            yield key, READABLE, f"a file {suffix!r}"
        elif suffix.lower() == ".onnx" and not spec.from_onnx:
            yield key, f"{READABLE}, with the suffix in lower case", repr(suffix)
    if scheme == "random" and spec.weights.sha256 is not None:
        yield "weights.sha256", "nothing, since random weights have no file", repr(spec.weights.sha256)


def _url_mistakes(spec: Spec, scheme: str, rest: str) -> Iterator[Mistake]:
    """Yield what is wrong with a URL. What is found is shown without what may be secret in it."""
    key, (host, slash, path) = "weights.source", rest.partition("?")[0].partition("#")[0].partition("/")
    if "@" in host:
        expected = f"`{scheme}://host/path/file`, without a user and password, which belong into ~/.netrc"
        yield key, expected, f"{scheme}://…@{host.rpartition('@')[2]}"
    elif not re.fullmatch(HOST, host) or not re.fullmatch(r"(.*/)?[^/]+", path) or not _is_relative(path):
        found = f"{host}{slash}{path}" if re.fullmatch(HOST, host) else "…"
        yield key, f"`{scheme}://host/path/file`", repr(f"{scheme}://{found}")
    elif scheme == "http" and spec.weights.sha256 is None:
        expected = "the digest of the file, since nothing else protects a download over http:// (https:// needs none)"
        yield "weights.sha256", expected, "nothing"


def _is_relative(path: str) -> bool:
    """Return whether no part of a path leads upwards or to the root."""
    return not path.startswith("/") and {"", ".", ".."}.isdisjoint(path.partition("@")[0].split("/"))


def _path_mistakes(model: Model) -> Iterator[Mistake]:
    """Yield the paths of the spec that the model may not use, and samples that cannot be listed."""
    for named in spec_paths(model):
        if named.key == DATA_OF_TRITON and not _is_relative(named.path):
            yield named.key, "files in warmup/, without `..` in their path", repr(named.path.removeprefix("warmup/"))
        elif mistake := model_files.path_mistake(model.name, named):
            expected, found = mistake
            is_folder = named.key == "weights.source" and os.path.isdir(model.source(named.path))
            yield named.key, READABLE if is_folder else expected, found
        elif named.is_folder:
            try:
                for _ in model_files.walk(model.source(named.path), model_files.roots(model.name, named.is_data)):
                    pass
            except UserError as error:
                yield named.key, "a folder that can be listed", str(error)
                continue
            if named.key == "weights.source" and (link := model_files.linked_folder(model.source(named.path))):
                yield named.key, "a folder without links to folders", repr(link)


def spec_paths(model: Model) -> Iterator[SpecPath]:
    """Yield every path that a spec names: relative to the model's folder, or absolute."""
    spec = model.spec
    scheme, rest = split_source(spec.weights.source)
    if scheme == "file":
        yield SpecPath("weights.source", rest, is_data=True, is_folder=spec.from_onnx)  # a folder has external data
        for name in model_files.shards(model.source(rest)):
            yield SpecPath("weights.source", os.path.join(os.path.dirname(rest), name), is_data=True)
    for key, path in (("accuracy.samples", spec.accuracy.samples), ("engine.calibration", spec.engine.calibration)):
        if path is not None:
            yield SpecPath(key, path, is_data=True, is_folder=not path.endswith(TENSOR_SUFFIXES))
    if spec.engine.timing_cache is not None:
        yield SpecPath("engine.timing_cache", spec.engine.timing_cache, is_data=True)
    labels = {"labels": spec.labels, **{f"outputs[{i}].labels": each.labels for i, each in enumerate(spec.outputs)}}
    for key, path in labels.items():
        if path is not None and path != IMAGENET:
            yield SpecPath(key, path, is_data=False)
    if spec.accuracy.truth is not None and spec.accuracy.truth != FOLDERS:
        yield SpecPath("accuracy.truth", spec.accuracy.truth, is_data=False)
    for folder in python_folders(model.steps):
        yield SpecPath("ensemble.steps", folder, is_data=False, is_folder=True)
    if isinstance(spec.ensemble, Ensemble) and spec.ensemble.samples:
        yield SpecPath("ensemble.samples", spec.ensemble.samples, is_data=True)
    functions = {"architecture.network": spec.architecture.network, "weights.converter": spec.weights.converter}
    for key, function in functions.items():
        if function is not None:
            yield SpecPath(key, function.partition(":")[0], is_data=False)
    for model_format in (*model.served_formats, *model.ensemble_parts):
        try:
            files = model_config.config_files(model_config.fields_of_format(model.config_fields, model_format))
        except (AttributeError, TypeError, ValueError):  # [triton] is wrong, which its own checks report
            continue
        for file in files:
            yield SpecPath(DATA_OF_TRITON, file, is_data=False)
