"""Mistakes in specs: each is answered with one line, before anything is built."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Project

from build_tasks.errors import UserError
from build_tasks.reading import load
from build_tasks.spec import Engine

PATH = "models/m/model.toml"


def spec(
    top: str = "",
    architecture: str = 'timm = "test_efficientnet"',
    weights: str = 'source = "random://0"',
    more: str = "",
) -> str:
    """A valid spec, but for what the arguments say otherwise."""
    return f"{top}\n[architecture]\n{architecture}\n[weights]\n{weights}\n{more}\n"


def table(name: str, line: str) -> str:
    return spec(more=f"[{name}]\n{line}")


def top(line: str) -> str:
    return spec(top=line)


def source(value: str) -> str:
    return spec(weights=f'source = "{value}"')


def network(line: str) -> str:
    return spec(architecture=line, more="[input]\nshape = [3, 8, 8]")


def only_onnx(more: str = "", shape: str = "shape = [3, 8, 8]", formats: str = '["onnx"]', weights: str = "") -> str:
    return f'formats = {formats}\n[weights]\nsource = "m.onnx"\n{weights}\n[input]\n{shape}\n{more}\n'


def rule(lines: str, accuracy: str = "") -> str:
    return spec(more=f"[accuracy]\n{accuracy}\n[[accuracy.gate]]\n{lines}")


AS_IT_IS = "expected nothing, since weights.source is ONNX, which is taken as it is"
GATE = "format, precision, output, relative_l2, max_absolute, top1_drop, top5_drop, cosine, snr, top1, top5"
TOP = (
    "top level: expected one of architecture, weights, input, output, formats, max_batch_size, ensemble, labels, "
    "torchscript, onnx, engine, accuracy, triton"
)
ENGINE = (
    "engine: expected one of precision, keep_fp32, keep_io_types, calibration, repair, min_batch_size, "
    "opt_batch_size, max_batch_size, workspace, optimization_level, sparse_weights, refittable, strip_plan, "
    "profiling_verbosity, compute_capabilities, hardware_compatibility, version_compatible, timing_cache, "
    "rtx_compute_capabilities"
)
SCHEMES = "weights.source: expected one of hf://, https://, http://, package://, timm://, random:// or a path"
DERIVED = "expected nothing, since it follows from the artifact"
RELEASE = 'expected a release of Triton\'s containers, such as "26.08"'
KEEP = "expected true, since clients have fp32 and fp16 and nothing narrower, found false"
PRECISIONS = "fp32, tf32, fp16, bf16, int8, fp8"
PROFILE = "min_batch_size <= opt_batch_size <= max_batch_size"

MISTAKES = [
    # Keys that do not exist, with the nearest one that does
    (top("opset = 11"), f"{TOP}, found 'opset'"),
    (top("max_batchsize = 4"), f"{TOP}, found 'max_batchsize' (did you mean 'max_batch_size'?)"),
    (table("oonx", "opset = 11"), f"{TOP}, found 'oonx' (did you mean 'onnx'?)"),
    (
        spec(architecture='tim = "x"'),
        "architecture: expected one of timm, network, arguments, found 'tim' (did you mean 'timm'?)",
    ),
    (
        spec(weights='source = "random://0"\nsha = "x"'),
        "weights: expected one of source, sha256, converter, found 'sha' (did you mean 'sha256'?)",
    ),
    (
        table("input", "means = [0.5, 0.5, 0.5]"),
        "input: expected one of format, shape, min_size, max_size, mean, std, interpolation, crop_pct, crop_mode, "
        "found 'means' (did you mean 'mean'?)",
    ),
    (
        table("onnx", "batchsize = 11"),
        "onnx: expected one of exporter, opset, dynamic_axes, batch_size, external_data, found 'batchsize' "
        "(did you mean 'batch_size'?)",
    ),
    (table("engine", "max_batch = 8"), f"{ENGINE}, found 'max_batch' (did you mean 'max_batch_size'?)"),
    (table("engine", "strongly_typed = true"), f"{ENGINE}, found 'strongly_typed'"),
    (
        table("engine", 'compute_capability = "8.6"'),
        f"{ENGINE}, found 'compute_capability' (did you mean 'compute_capabilities'?)",
    ),
    (
        table("accuracy", "sample = 'pictures'"),
        "accuracy: expected one of samples, truth, gate, allow_untestable, found 'sample' (did you mean 'samples'?)",
    ),
    (
        table("onnx", '"a\\nb" = 1'),
        "onnx: expected one of exporter, opset, dynamic_axes, batch_size, external_data, found 'a\\nb'",
    ),
    # Keys that are missing
    ('[weights]\nsource = "random://0"\n', "architecture: expected either `timm` or `network`, found neither"),
    ('[architecture]\ntimm = "x"\n', "top level: expected the key 'weights', found nothing"),
    (spec(weights=""), "weights: expected the key 'source', found nothing"),
    # Values of another type
    (table("onnx", 'opset = "11"'), "onnx.opset: expected int, found '11'"),
    (table("onnx", "opset = 11.0"), "onnx.opset: expected int, found 11.0"),
    (table("onnx", 'dynamic_axes = "yes"'), "onnx.dynamic_axes: expected bool, found 'yes'"),
    (top("max_batch_size = true"), "max_batch_size: expected int, found True"),
    (top("labels = 7"), "labels: expected str, found 7"),
    (top('engine = "fp16"'), "engine: expected table, found 'fp16'"),
    (table("input", "shape = 224"), "input.shape: expected array, found 224"),
    (table("input", 'shape = [3, 224, "224"]'), "input.shape[2]: expected int, found '224'"),
    (rule('relative_l2 = "1e-4"'), "accuracy.gate[0].relative_l2: expected float, found '1e-4'"),
    (spec(weights="source = 3"), "weights.source: expected str, found 3"),
    # Values out of range
    (table("onnx", "opset = 24"), "onnx.opset: expected int <= 23, found 24"),
    (table("onnx", "opset = 6"), "onnx.opset: expected int >= 7, found 6"),
    (top("max_batch_size = 0"), "max_batch_size: expected int >= 1, found 0"),
    (table("input", "shape = [3, 224]"), "input.shape: expected array of length >= 3, found [3, 224]"),
    (table("input", "shape = [3, 0, 224]"), "input.shape[1]: expected int >= 1, found 0"),
    (table("input", "crop_pct = 1.5"), "input.crop_pct: expected float <= 1.0, found 1.5"),
    (table("input", "std = [0.2, 0.0, 0.2]"), "input.std[1]: expected float > 0.0, found 0.0"),
    (rule("relative_l2 = 0"), "accuracy.gate[0].relative_l2: expected float > 0.0, found 0"),
    (rule("relative_l2 = inf"), "accuracy.gate[0].relative_l2: expected float < 1.0, found inf"),
    (rule("snr = nan"), "accuracy.gate[0].snr: expected float >= -200.0, found nan"),
    (rule("top1 = 2"), "accuracy.gate[0].top1: expected float <= 1.0, found 2"),
    (rule("cosine = 1.1"), "accuracy.gate[0].cosine: expected float <= 1.0, found 1.1"),
    (
        rule('precision = "fp61"\ntop1 = 1'),
        f"accuracy.gate[0].precision: expected one of {PRECISIONS}, found 'fp61' (did you mean 'fp16'?)",
    ),
    (rule("psnr = 30"), f"accuracy.gate[0]: expected one of {GATE}, found 'psnr' (did you mean 'snr'?)"),
    (
        rule('precision = "int8"'),
        "accuracy.gate[0]: expected a limit: one of cosine, max_absolute, relative_l2, snr, top1, top1_drop, top5, "
        "top5_drop, found none",
    ),
    (
        rule('format = "onnx"\nprecision = "fp16"\ntop1 = 1'),
        "accuracy.gate[0].precision: expected fp32, as onnx is, found 'fp16'",
    ),
    (
        rule('format = "torchscript"\nprecision = "bf16"\ntop1 = 1') + '[torchscript]\nprecision = "fp16"\n',
        "accuracy.gate[0].precision: expected fp16, as torchscript is, found 'bf16'",
    ),
    (
        table("torchscript", 'precision = "int8"'),
        "torchscript.precision: expected one of fp32, fp16, bf16, found 'int8'",
    ),
    (
        table("torchscript", 'memory_format = "channel_last"'),
        "torchscript.memory_format: expected one of contiguous, channels_last, found 'channel_last' "
        "(did you mean 'channels_last'?)",
    ),
    (
        rule("top1_drop = 0.02"),
        "accuracy.truth: expected what the samples show, since gate[0] limits the loss of accuracy, found nothing",
    ),
    (top('labels = ""'), "labels: expected str of length >= 1, found ''"),
    (
        spec(weights='source = "random://0"\nsha256 = "abc"'),
        "weights.sha256: expected str matching regex '^[0-9a-f]{64}$', found 'abc'",
    ),
    # Choices
    (
        table("onnx", 'exporter = "torchscrpt"'),
        "onnx.exporter: expected one of auto, torchscript, dynamo, found 'torchscrpt' (did you mean 'torchscript'?)",
    ),
    (
        table("input", 'interpolation = "cubic"'),
        "input.interpolation: expected one of nearest, bilinear, bicubic, lanczos, found 'cubic' "
        "(did you mean 'bicubic'?)",
    ),
    (
        top('formats = ["torchscript", "tensorflow"]'),
        "formats[1]: expected one of torchscript, onnx, tensorrt, rtx, found 'tensorflow' (did you mean 'tensorrt'?)",
    ),
    (
        top('formats = ["onxx"]'),
        "formats[0]: expected one of torchscript, onnx, tensorrt, rtx, found 'onxx' (did you mean 'onnx'?)",
    ),
    (top('formats = ["onnx", "onnx"]'), "formats: expected each format once, found ['onnx', 'onnx']"),
    (top('formats = ["rtx", "onnx", "rtx"]'), "formats: expected each format once, found ['rtx', 'onnx', 'rtx']"),
    (top("formats = []"), "formats: expected array of length >= 1, found []"),
    # The size of the input
    (table("input", "min_size = 96"), "input.min_size: expected array, found 96"),
    (table("input", "max_size = [96.5, 96]"), "input.max_size[0]: expected int, found 96.5"),
    (table("input", "min_size = [96, 0]"), "input.min_size[1]: expected int >= 1, found 0"),
    (table("input", "min_size = [96]"), "input.min_size: expected array of length >= 2, found [96]"),
    (table("input", "max_size = [3, 96, 96]"), "input.max_size: expected array of length <= 2, found [3, 96, 96]"),
    (table("input", "min_size = [96, 96]"), "input: expected min_size and max_size, or neither, found one of them"),
    (table("input", "max_size = [96, 96]"), "input: expected min_size and max_size, or neither, found one of them"),
    (
        table("input", "min_size = [96, 96]\nmax_size = [224, 224]"),
        "input.shape: expected [channels, height, width], the size between min_size and max_size to tune for, "
        "found nothing",
    ),
    *(
        (
            table("input", f"shape = [3, 64, 128]\nmin_size = {small}\nmax_size = {large}"),
            f"input: expected min_size <= height and width of shape <= max_size, found {small}, [64, 128], {large}",
        )
        for small, large in (
            ([65, 65], [224, 224]),
            ([32, 129], [224, 224]),
            ([32, 32], [63, 128]),
            ([32, 32], [64, 127]),
            ([224, 224], [32, 32]),
        )
    ),
    # The engine: the graph
    (
        table("engine", 'precision = "half"'),
        f"engine.precision: expected one of {PRECISIONS}, found 'half'",
    ),
    (
        table("engine", 'precision = "FP16"'),
        f"engine.precision: expected one of {PRECISIONS}, found 'FP16'",
    ),
    (table("engine", "precision = 16"), "engine.precision: expected str, found 16"),
    (table("engine", 'keep_fp32 = "Conv"'), "engine.keep_fp32: expected array, found 'Conv'"),
    (table("engine", "keep_fp32 = [3]"), "engine.keep_fp32[0]: expected str, found 3"),
    (table("engine", 'keep_fp32 = ["Conv", ""]'), "engine.keep_fp32[1]: expected str of length >= 1, found ''"),
    *(
        (
            table("engine", f'precision = "{precision}"\nkeep_fp32 = ["Conv"]'),
            f"engine.keep_fp32: expected nothing, since all of {precision} is fp32, found ['Conv']",
        )
        for precision in ("fp32", "tf32")
    ),
    (table("engine", 'keep_io_types = "no"'), "engine.keep_io_types: expected bool, found 'no'"),
    *(
        (
            table("engine", f'precision = "{precision}"\nkeep_io_types = false'),
            f"engine.keep_io_types: {KEEP}",
        )
        for precision in ("fp32", "tf32", "bf16", "int8", "fp8")
    ),
    (table("engine", "calibration = 500"), "engine.calibration: expected str, found 500"),
    (table("engine", 'calibration = ""'), "engine.calibration: expected str of length >= 1, found ''"),
    *(
        (
            table("engine", f'precision = "{precision}"\ncalibration = "pictures"'),
            f"engine.calibration: expected nothing, since {precision} is not calibrated, found 'pictures'",
        )
        for precision in ("fp32", "tf32", "fp16", "bf16")
    ),
    (
        table("engine", 'precision = "tf32"\nrepair = true'),
        "engine.repair: expected false, since all of tf32 is fp32, found true",
    ),
    # Its profile
    (table("engine", "min_batch_size = 0"), "engine.min_batch_size: expected int >= 1, found 0"),
    (table("engine", "opt_batch_size = 0"), "engine.opt_batch_size: expected int >= 1, found 0"),
    (table("engine", "max_batch_size = 0"), "engine.max_batch_size: expected int >= 1, found 0"),
    (table("engine", 'max_batch_size = "8"'), "engine.max_batch_size: expected int, found '8'"),
    (table("engine", "min_batch_size = 4\nopt_batch_size = 2"), f"engine: expected {PROFILE}, found 4, 2, 32"),
    (table("engine", "opt_batch_size = 64"), f"engine: expected {PROFILE}, found 1, 64, 32"),
    (table("engine", "opt_batch_size = 8\nmax_batch_size = 4"), f"engine: expected {PROFILE}, found 1, 8, 4"),
    (table("engine", "min_batch_size = 8\nmax_batch_size = 4"), f"engine: expected {PROFILE}, found 8, 8, 4"),
    *(
        (
            table("onnx", f"dynamic_axes = false\nbatch_size = 2\n[engine]\n{key} = 3"),
            f"engine.{key}: expected 2, the batch that onnx.dynamic_axes = false fixes, found 3",
        )
        for key in ("min_batch_size", "opt_batch_size", "max_batch_size")
    ),
    # The builder
    (table("engine", "workspace = 0"), "engine.workspace: expected int >= 1, found 0"),
    (table("engine", 'workspace = "1 GiB"'), "engine.workspace: expected int, found '1 GiB'"),
    (table("engine", "optimization_level = 6"), "engine.optimization_level: expected int <= 5, found 6"),
    (table("engine", "optimization_level = -1"), "engine.optimization_level: expected int >= 0, found -1"),
    (table("engine", "sparse_weights = 1"), "engine.sparse_weights: expected bool, found 1"),
    (table("engine", 'refittable = "no"'), "engine.refittable: expected bool, found 'no'"),
    (table("engine", 'strip_plan = "no"'), "engine.strip_plan: expected bool, found 'no'"),
    (
        table("engine", "strip_plan = true"),
        "engine.strip_plan: expected false, since Triton cannot refit a plan without weights, found true",
    ),
    (
        table("engine", 'profiling_verbosity = "detail"'),
        "engine.profiling_verbosity: expected one of none, layer_names_only, detailed, found 'detail' "
        "(did you mean 'detailed'?)",
    ),
    (
        table("engine", 'compute_capabilities = "8.6"'),
        "engine.compute_capabilities: expected array, found '8.6'",
    ),
    (table("engine", "compute_capabilities = [8.6]"), "engine.compute_capabilities[0]: expected str, found 8.6"),
    *(
        (
            table("engine", f'{key} = ["8.6", "{capability}"]'),
            rf"engine.{key}[1]: expected str matching regex '^[1-9][0-9]?\\.[0-9]$', found '{capability}'",
        )
        for key in ("compute_capabilities", "rtx_compute_capabilities")
        for capability in ("86", "sm_86", "0.6", "8.10", "9.0a")
    ),
    *(
        (
            table("engine", f'{key} = ["8.6", "8.9", "8.6"]'),
            f"engine.{key}: expected each once, found ['8.6', '8.9', '8.6']",
        )
        for key in ("compute_capabilities", "rtx_compute_capabilities")
    ),
    (
        table("engine", 'hardware_compatibility = "ampere"'),
        "engine.hardware_compatibility: expected one of none, ampere_plus, same_compute_capability, found 'ampere' "
        "(did you mean 'ampere_plus'?)",
    ),
    (table("engine", "version_compatible = 1"), "engine.version_compatible: expected bool, found 1"),
    (table("engine", 'timing_cache = ""'), "engine.timing_cache: expected str of length >= 1, found ''"),
    # The network
    (
        network('timm = "x"\nnetwork = "n.py:build"'),
        "architecture: expected either `timm` or `network`, found both",
    ),
    (spec(architecture=""), "architecture: expected either `timm` or `network`, found neither"),
    (
        spec(architecture='network = "n.py:build"'),
        "input.shape: expected [channels, height, width], since the network is your own, found nothing",
    ),
    # A model that exists only as ONNX
    (
        only_onnx(shape=""),
        "input.shape: expected [channels, height, width], since it is not asked of an ONNX file, found nothing",
    ),
    (
        only_onnx('[architecture]\ntimm = "x"'),
        f"architecture.timm: {AS_IT_IS}, found 'x'",
    ),
    (only_onnx("[architecture]\narguments = { a = 1 }"), f"architecture.arguments: {AS_IT_IS}, found {{'a': 1}}"),
    (only_onnx("[output]\nsoftmax = true"), f"output.softmax: {AS_IT_IS}, found True"),
    (only_onnx("[output]\ntop_k = 5"), f"output.top_k: {AS_IT_IS}, found 5"),
    (only_onnx('[torchscript]\nprecision = "fp16"'), f"torchscript.precision: {AS_IT_IS}, found 'fp16'"),
    (
        only_onnx('[torchscript]\nmemory_format = "contiguous"'),
        f"torchscript.memory_format: {AS_IT_IS}, found 'contiguous'",
    ),
    (only_onnx("[onnx]\nopset = 13"), f"onnx.opset: {AS_IT_IS}, found 13"),
    (only_onnx('[onnx]\nexporter = "dynamo"'), f"onnx.exporter: {AS_IT_IS}, found 'dynamo'"),
    (only_onnx(shape='shape = [3, 8, 8]\nformat = "uint8_nhwc"'), f"input.format: {AS_IT_IS}, found 'uint8_nhwc'"),
    (
        only_onnx(weights='converter = "c.py:f"'),
        "weights.converter: expected nothing, since weights.source is ONNX, found 'c.py:f'",
    ),
    (
        only_onnx(formats='["torchscript", "onnx"]'),
        "formats: expected no torchscript, since weights.source is ONNX, of which PyTorch makes nothing, found "
        "['torchscript', 'onnx']",
    ),
    (network('network = "n.py"'), "architecture.network: expected `file.py:function`, found 'n.py'"),
    (
        spec(weights='source = "random://0"\nconverter = "convert.to_timm"'),
        "weights.converter: expected `file.py:function`, found 'convert.to_timm'",
    ),
    # Sources
    (source("ftp://host/file"), f"{SCHEMES}, found 'ftp://' (did you mean 'http://'?)"),
    (source("gopher://host/file"), f"{SCHEMES}, found 'gopher://'"),
    (source(""), "weights.source: expected str of length >= 1, found ''"),
    (source("timm://"), "weights.source: expected something after ://, found 'timm://'"),
    (source("random://"), "weights.source: expected random:// and a seed, found 'random://'"),
    (source("random://-1"), "weights.source: expected random:// and a seed, found 'random://-1'"),
    (
        source("random://18446744073709551616"),
        "weights.source: expected random:// and a seed below 2**64, found 'random://18446744073709551616'",
    ),
    (
        source("hf://owner/repository"),
        "weights.source: expected `hf://owner/repository/file@revision`, found 'hf://owner/repository'",
    ),
    (
        source("hf://owner/repository/file@"),
        "weights.source: expected `hf://owner/repository/file@revision`, found 'hf://owner/repository/file@'",
    ),
    (source("package://torch"), "weights.source: expected `package://package/path/in/it`, found 'package://torch'"),
    (source("https://host"), "weights.source: expected `https://host/path/file`, found 'https://host'"),
    (source("http://host/path/"), "weights.source: expected `http://host/path/file`, found 'http://host/path/'"),
    # Triton's fields
    (table("triton", 'name = "x"'), f"triton.name: {DERIVED}, found 'x'"),
    (
        table("triton", "max_batch_size = 7"),
        f"triton.max_batch_size: {DERIVED} (the key max_batch_size stands above the tables, or in the table "
        "of one format), found 7",
    ),
    (table("triton", 'platform = "x"'), f"triton.platform: {DERIVED}, found 'x'"),
    (
        table("triton", 'cc_model_filenames = { "8.6" = "model.plan" }'),
        f"triton.cc_model_filenames: {DERIVED} (of engine.compute_capabilities), found {{'8.6': 'model.plan'}}",
    ),
    (
        table("triton", 'default_model_filename = "model.plan"'),
        f"triton.default_model_filename: {DERIVED}, found 'model.plan'",
    ),
    (table("triton", "release = 26.08"), f"triton.release: {RELEASE}, found 26.08"),
    (table("triton", 'release = "26.8"'), f"triton.release: {RELEASE}, found '26.8'"),
    (table("triton", 'release = "26.08-py3"'), f"triton.release: {RELEASE}, found '26.08-py3'"),
    (table("triton", 'release = ""'), f"triton.release: {RELEASE}, found ''"),
    (
        table("triton.dynamic_batchin", ""),
        "triton: expected fields of Triton's ModelConfig, found 'dynamic_batchin' (did you mean 'dynamic_batching'?)",
    ),
    # TOML
    ("labels = \n" + spec(), "not valid TOML: Invalid value (at line 1, column 10)"),
    (spec(architecture='timm = "x"\ntimm = "y"'), "not valid TOML: Cannot overwrite a value (at line 4, column 11)"),
]


def write(name: str, text: str) -> None:
    folder = Path("models", name)
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(text)


def mistakes(*reserved: str) -> list[str]:
    """What `load` has against the specs of the current folder, a line each."""
    with pytest.raises(UserError) as refusal:
        load(reserved)
    return str(refusal.value).split("\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[line.partition(": expected")[0] for _, line in MISTAKES])
def test_a_mistake_is_told_with_key_expectation_and_finding(text: str, line: str) -> None:
    write("m", text)
    assert mistakes() == [f"{PATH}: {line}"]


def test_every_key_of_the_engine_has_a_mistake_of_its_own() -> None:
    told = {line.removeprefix("engine.").partition(":")[0].partition("[")[0] for _, line in MISTAKES}
    assert set(Engine.__struct_fields__) <= told


def test_the_spec_that_the_mistakes_were_made_in_is_valid() -> None:
    write("m", spec())
    [model] = load()
    assert (model.name, model.seed, model.spec.formats) == ("m", 0, ["torchscript", "onnx", "tensorrt"])


SOUND = [
    *(table("engine", f'precision = "{p}"\ncalibration = "pictures"\nkeep_fp32 = ["Conv"]') for p in ("int8", "fp8")),
    table("engine", "keep_io_types = false"),
    rule('format = "graph"\nprecision = "int8"\noutput = "OUTPUT__1"\nrelative_l2 = 0.7\ntop1 = 0\nsnr = 3'),
    rule("top1_drop = 0.02", 'truth = "folders"'),
    table("engine", 'compute_capabilities = ["7.5", "12.0"]\nrtx_compute_capabilities = ["7.5", "12.0"]'),
    table("onnx", "dynamic_axes = false\nbatch_size = 2\n[engine]\nmin_batch_size = 2\nmax_batch_size = 2"),
    table("input", "shape = [3, 64, 128]\nmin_size = [64, 128]\nmax_size = [64, 128]"),
    table("triton", 'release = "24.10"'),
    only_onnx("[onnx]\ndynamic_axes = false\nbatch_size = 4\nexternal_data = true"),
    only_onnx().replace("m.onnx", "hf://owner/repository/onnx/model.onnx@main"),
    only_onnx().replace("m.onnx", "https://host/model.onnx?download=true"),
    spec(top='formats = ["rtx"]', more="[engine]\nstrip_plan = true"),
    spec(top='formats = ["torchscript", "onnx"]', more="[engine]\nstrip_plan = true"),
]


@pytest.mark.parametrize("text", SOUND)
def test_what_only_looks_like_a_mistake_is_valid(text: str) -> None:
    write("m", text)
    assert [model.name for model in load()] == ["m"]


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        (spec(), (1, 8, 32)),
        (top("max_batch_size = 4"), (1, 4, 4)),
        (table("engine", "min_batch_size = 16"), (16, 16, 32)),
        (table("engine", "min_batch_size = 64"), (64, 64, 64)),
        (table("engine", "max_batch_size = 4"), (1, 4, 4)),
        (table("engine", "max_batch_size = 64"), (1, 8, 64)),
        (table("engine", "opt_batch_size = 2"), (1, 2, 32)),
        (table("onnx", "batch_size = 5"), (1, 8, 32)),
        (table("onnx", "dynamic_axes = false\nbatch_size = 5"), (5, 5, 5)),
    ],
)
def test_batches_of_an_engine_that_are_left_out_follow_from_the_others(text: str, profile: tuple[int, ...]) -> None:
    write("m", text)
    [model] = load()
    assert model.spec.profile == profile


def test_a_release_of_triton_is_no_field_of_its_configuration() -> None:
    write("m", table("triton", 'release = "24.10"'))
    write("n", spec())
    assert [model.release for model in load()] == ["24.10", "26.08"]


def test_an_engine_of_tensorrt_rtx_is_built_and_not_served() -> None:
    write("m", top('formats = ["rtx", "tensorrt"]'))
    [model] = load()
    assert (model.served, model.spec.compiled) == (["tensorrt"], True)
    assert (model.triton_name("tensorrt"), model.files("tensorrt")) == ("m_trt", ["model.plan"])


def test_a_plan_for_each_compute_capability_has_a_file_of_its_own() -> None:
    write("m", table("engine", 'compute_capabilities = ["8.6", "12.0"]'))
    [model] = load()
    assert model.files("tensorrt") == ["model.sm86.plan", "model.sm120.plan"]
    assert [model.served_as("tensorrt", file) for file in model.files("tensorrt")] == ["m_trt.sm86", "m_trt.sm120"]


@pytest.mark.parametrize(
    ("lines", "precision", "memory_format", "file"),
    [
        ("", "fp32", "contiguous", "model.pt"),
        ('[triton]\ndevice = "cpu"', "fp32", "contiguous", "model.pt"),
        ('[triton]\ndevice = "gpu"', "fp16", "channels_last", "model.fp16.pt"),
        ('[triton]\ndevice = "gpu"\n[torchscript]\nprecision = "fp32"', "fp32", "contiguous", "model.pt"),
        ('[torchscript]\nprecision = "fp16"\nmemory_format = "contiguous"', "fp16", "contiguous", "model.fp16.pt"),
        ('[torchscript]\nprecision = "bf16"', "bf16", "channels_last", "model.bf16.pt"),
        ('[torchscript]\nmemory_format = "channels_last"', "fp32", "channels_last", "model.fp32.pt"),
    ],
)
def test_torchscript_on_a_gpu_is_fp16_unless_the_spec_says_otherwise(
    lines: str, precision: str, memory_format: str, file: str
) -> None:
    write("m", spec(top='formats = ["torchscript"]', more=lines))
    [model] = load()
    assert (model.torchscript.precision, model.torchscript.memory_format) == (precision, memory_format)
    assert (model.files("torchscript"), model.cast) == ([file], file != "model.pt")


def test_bytes_that_are_no_text_are_no_valid_toml() -> None:
    write("m", "")
    Path(PATH).write_bytes(b'labels = "\xff"\n')
    [line] = mistakes()
    assert line.startswith(f"{PATH}: not valid TOML: ")


def test_every_mistake_of_a_spec_that_has_the_right_types_is_told() -> None:
    write("m", spec(top='formats = ["onnx", "onnx"]', weights='source = "random://"\nconverter = "convert"'))
    assert mistakes() == [
        f"{PATH}: weights.converter: expected `file.py:function`, found 'convert'",
        f"{PATH}: weights.source: expected random:// and a seed, found 'random://'",
        f"{PATH}: formats: expected each format once, found ['onnx', 'onnx']",
    ]


def test_every_mistake_of_an_engine_is_told() -> None:
    engine = """
        precision = "tf32"
        keep_fp32 = ["Conv"]
        keep_io_types = false
        calibration = "pictures"
        min_batch_size = 8
        max_batch_size = 4
        strip_plan = true
        compute_capabilities = ["8.6", "8.6"]
        rtx_compute_capabilities = ["8.9", "8.9"]
    """
    write("m", spec(more=f"[input]\nmin_size = [96, 96]\n[triton]\nrelease = '26'\n[engine]{engine}"))
    assert mistakes() == [
        f"{PATH}: input: expected min_size and max_size, or neither, found one of them",
        f"{PATH}: triton.release: {RELEASE}, found '26'",
        f"{PATH}: engine: expected {PROFILE}, found 8, 8, 4",
        f"{PATH}: engine.keep_io_types: {KEEP}",
        f"{PATH}: engine.keep_fp32: expected nothing, since all of tf32 is fp32, found ['Conv']",
        f"{PATH}: engine.calibration: expected nothing, since tf32 is not calibrated, found 'pictures'",
        f"{PATH}: engine.strip_plan: expected false, since Triton cannot refit a plan without weights, found true",
        f"{PATH}: engine.compute_capabilities: expected each once, found ['8.6', '8.6']",
        f"{PATH}: engine.rtx_compute_capabilities: expected each once, found ['8.9', '8.9']",
    ]


def test_mistakes_of_several_models_are_told_in_one_go() -> None:
    write("a", top("max_batch_size = 0"))
    write("b", spec())
    write("c", source("gopher://host/file"))
    assert mistakes() == [
        "models/a/model.toml: max_batch_size: expected int >= 1, found 0",
        f"models/c/model.toml: {SCHEMES}, found 'gopher://'",
    ]


@pytest.mark.parametrize("name", ["a b", "a.b", "é", ".hidden", "-x", "_x"])
def test_a_name_that_tools_could_take_for_something_else_is_refused(name: str) -> None:
    write(name, spec())
    assert mistakes() == [
        f"models/{name}: a model's name is made of letters, digits, _ and -, and begins with a letter or digit"
    ]


def test_a_reserved_name_is_refused() -> None:
    write("onnx", spec())
    assert mistakes("weights", "onnx") == ["models/onnx: doit knows a command or stage named onnx; rename the folder"]


def test_two_models_that_would_be_served_under_one_name_are_refused() -> None:
    write("a", spec())
    write("a_onnx", top('formats = ["torchscript"]'))
    assert mistakes() == [
        "models/a_onnx/model.toml: format torchscript is served as a_onnx, and so is format onnx of models/a/model.toml"
    ]


def test_an_engine_shares_its_name_with_no_other_model() -> None:
    write("a", top('formats = ["tensorrt"]'))
    write("a_trt", top('formats = ["torchscript"]'))
    assert mistakes() == [
        "models/a_trt/model.toml: format torchscript is served as a_trt, and so is format tensorrt of "
        "models/a/model.toml"
    ]


def test_a_name_that_only_looks_like_another_s_format_is_fine() -> None:
    write("a", top('formats = ["torchscript"]'))
    write("a_onnx", top('formats = ["torchscript"]'))
    assert [model.name for model in load()] == ["a", "a_onnx"]


def test_no_models_at_all_is_a_mistake() -> None:
    expected = ["models/: there is no model here; a model is a folder with a file model.toml"]
    assert mistakes() == expected
    Path("models/notes").mkdir(parents=True)
    assert mistakes() == expected


def test_the_shipped_specs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [model.name for model in load()]
    assert names == sorted(path.parent.name for path in (ROOT / "models").glob("*/model.toml"))
    assert {"efficientnet_b3", "efficientnet_lite0"} <= set(names)


# ---------------------------------------------------------------------------------------------------------------
# Through doit


def test_doit_tells_all_mistakes_at_once_and_creates_nothing(project: Project) -> None:
    project.model("a", top("max_batch_size = 0"))
    project.model("b", source("gopher://host/file"))
    project.model("fine")
    project.model("onnx")
    for arguments in ([], ["fine"], ["list"], ["clean"]):
        run = project.doit(*arguments)
        assert run.code == 3
        assert run.out.splitlines() == [
            "ERROR: models/a/model.toml: max_batch_size: expected int >= 1, found 0",
            f"models/b/model.toml: {SCHEMES}, found 'gopher://'",
            "models/onnx: doit knows a command or stage named onnx; rename the folder",
        ]
    assert project.tree("build") == {}
    assert project.tree("model_repository") == {}


def test_a_model_cannot_be_named_like_a_command_or_a_stage(project: Project) -> None:
    """`doit list` would list, and never build the model of that name."""
    stages = ["container", "engine", "precision", "prune", "publish", "rtx", "weights"]
    names = sorted(["clean", "forget", "help", "info", "list", "run", *stages])
    for name in names:
        project.model(name)
    run = project.doit()
    assert run.code == 3
    expected = [f"models/{name}: doit knows a command or stage named {name}; rename the folder" for name in names]
    assert run.out.removeprefix("ERROR: ").splitlines() == expected


def test_doit_accepts_the_shipped_models(project: Project) -> None:
    shutil.copytree(ROOT / "models", project / "models", dirs_exist_ok=True)
    listed = project.built("list").out
    for path in (ROOT / "models").glob("*/model.toml"):
        assert re.search(rf"^{path.parent.name} ", listed, re.MULTILINE)


@pytest.fixture
def compiled(project: Project) -> Project:
    """A project whose model `tiny` has all formats."""
    project.model("tiny", spec(top='formats = ["torchscript", "onnx", "tensorrt", "rtx"]'))
    return project


def assert_refused(project: Project, *command: str) -> str:
    """The output of a command that is refused before anything runs."""
    run = project.doit(*command)
    assert run.code == 3
    assert "Traceback" not in run.out
    assert project.tree("build").keys() <= {".doit.sqlite3", ".digests.sqlite3"}
    return run.out


@pytest.mark.parametrize(
    "option",
    [
        *("--opset_version", "--batch_size"),
        *("--min_engine_batch_size", "--opt_engine_batch_size", "--max_engine_batch_size"),
    ],
)
def test_an_override_that_is_no_number_is_refused_by_the_command_line(compiled: Project, option: str) -> None:
    out = assert_refused(compiled, "engine:tiny", option, "x")
    assert f"'{option.removeprefix('--')}'" in out
    assert "'x'" in out


@pytest.mark.parametrize(
    "command",
    [
        ["onnx:tiny", "--opsets", "17"],
        ["onnx:tiny", "--engine_precision", "fp16"],
        ["engine:tiny", "--engine_precisions", "fp16"],
        ["weights:tiny", "--opset_version", "17"],
        ["tiny", "--opset_version", "17"],
    ],
    ids=" ".join,
)
def test_an_option_that_a_task_does_not_have_is_refused_by_the_command_line(
    compiled: Project, command: list[str]
) -> None:
    assert f"option {command[1]} not recognized" in assert_refused(compiled, *command)


def test_an_override_without_a_value_is_refused_by_the_command_line(compiled: Project) -> None:
    out = assert_refused(compiled, "engine:tiny", "--engine_precision")
    assert "option --engine_precision requires argument" in out


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("onnx:tiny --opset_version 99", "--opset_version 99: onnx.opset: expected int <= 23, found 99"),
        ("run -n 2 onnx:tiny --opset_version=99", "--opset_version 99: onnx.opset: expected int <= 23, found 99"),
        ("weights:tiny onnx:tiny --opset_version 6", "--opset_version 6: onnx.opset: expected int >= 7, found 6"),
        ("onnx:tiny --batch_size 0", "--batch_size 0: onnx.batch_size: expected int >= 1, found 0"),
        ("engine:tiny --batch_size 0", "--batch_size 0: onnx.batch_size: expected int >= 1, found 0"),
        (
            "engine:tiny --engine_precision FP15",
            f"--engine_precision fp15: engine.precision: expected one of {PRECISIONS}, found 'fp15' "
            "(did you mean 'fp16'?)",
        ),
        (
            "rtx:tiny --engine_precision half",
            f"--engine_precision half: engine.precision: expected one of {PRECISIONS}, found 'half'",
        ),
        *(
            (
                f"{stage}:tiny --{point}_engine_batch_size 0",
                f"--{point}_engine_batch_size 0: engine.{point}_batch_size: expected int >= 1, found 0",
            )
            for stage in ("engine", "rtx")
            for point in ("min", "opt", "max")
        ),
        (
            "rtx:tiny --opt_engine_batch_size 9 --max_engine_batch_size=8",
            f"--opt_engine_batch_size 9 --max_engine_batch_size 8: engine: expected {PROFILE}, found 1, 9, 8",
        ),
        (
            "engine:tiny --no-dynamic_axes --max_engine_batch_size 8",
            "--max_engine_batch_size 8 --no-dynamic_axes: engine.max_batch_size: expected 1, the batch that "
            "onnx.dynamic_axes = false fixes, found 8",
        ),
    ],
)
def test_overrides_that_no_spec_may_say_are_refused_before_anything_runs(
    compiled: Project, command: str, line: str
) -> None:
    assert assert_refused(compiled, *command.split()) == f"ERROR: models/tiny/model.toml {line}\n"


@pytest.mark.parametrize(
    ("more", "command", "line"),
    [
        (
            '[engine]\nprecision = "int8"\ncalibration = "pictures"',
            "engine:tiny --engine_precision FP16",
            "--engine_precision fp16: engine.calibration: expected nothing, since fp16 is not calibrated, "
            "found 'pictures'",
        ),
        (
            "[engine]\nkeep_io_types = false",
            "rtx:tiny --engine_precision bf16",
            f"--engine_precision bf16: engine.keep_io_types: {KEEP}",
        ),
        (
            "[engine]\nopt_batch_size = 16",
            "engine:tiny --max_engine_batch_size 8",
            f"--max_engine_batch_size 8: engine: expected {PROFILE}, found 1, 16, 8",
        ),
        (
            "[onnx]\ndynamic_axes = false\n[engine]\nopt_batch_size = 1",
            "rtx:tiny --batch_size 8",
            "--batch_size 8: engine.opt_batch_size: expected 8, the batch that onnx.dynamic_axes = false fixes, "
            "found 1",
        ),
        (
            '[engine]\ncompute_capabilities = ["8.6", "8.9"]',
            "engine:tiny.sm86 --min_engine_batch_size 64 --max_engine_batch_size 32",
            f"--min_engine_batch_size 64 --max_engine_batch_size 32: engine: expected {PROFILE}, found 64, 64, 32",
        ),
    ],
)
def test_overrides_that_contradict_the_spec_are_refused_before_anything_runs(
    compiled: Project, more: str, command: str, line: str
) -> None:
    compiled.model("tiny", spec(top='formats = ["torchscript", "tensorrt", "rtx"]', more=more))
    assert assert_refused(compiled, *command.split()) == f"ERROR: models/tiny/model.toml {line}\n"


def test_two_overrides_of_one_key_are_refused(compiled: Project) -> None:
    out = assert_refused(compiled, "onnx:tiny", "--opset_version", "13", "rtx:tiny", "--opset_version", "16")
    assert out == "ERROR: tiny: --opset_version 13 and --opset_version 16 at once\n"


def test_a_batch_that_is_fixed_for_one_run_overrides_the_profile_of_the_spec() -> None:
    write("m", table("engine", "opt_batch_size = 4"))
    [model] = load(overrides={"m": {("onnx", "dynamic_axes"): ("--no-dynamic_axes", False)}})
    assert model.spec.profile == (1, 1, 1)


def test_a_graph_that_is_judged_apart_shares_its_name_with_no_model(compiled: Project) -> None:
    compiled.model("a", spec(top='formats = ["rtx"]', more='[engine]\nprecision = "fp32"'))
    compiled.model("a_onnx", spec(top='formats = ["torchscript"]'))
    listed = compiled.built("list", "--all").out
    assert "accuracy:a.fp32" in listed
    assert "accuracy:a_onnx" in listed


def test_an_override_is_of_one_model_alone(compiled: Project) -> None:
    compiled.model("other", top("max_batch_size = 0"))
    assert assert_refused(compiled, "onnx:tiny", "--opset_version", "99").splitlines() == [
        "ERROR: models/other/model.toml: max_batch_size: expected int >= 1, found 0",
        "models/tiny/model.toml --opset_version 99: onnx.opset: expected int <= 23, found 99",
    ]
