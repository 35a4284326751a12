"""Wrong specs with the line that reports the mistake, and specs that look wrong but are valid."""


def spec(
    top: str = "",
    architecture: str = 'timm = "test_efficientnet"',
    weights: str = 'source = "random://0"',
    more: str = "",
) -> str:
    """Return a spec, which is valid unless an argument makes it wrong."""
    return f"{top}\n[architecture]\n{architecture}\n[weights]\n{weights}\n{more}\n"


def table(name: str, line: str) -> str:
    return spec(more=f"[{name}]\n{line}")


def profiles(*lines: str) -> str:
    return spec(more="".join(f"[[engine.profiles]]\n{line}\n" for line in lines))


def top(line: str) -> str:
    return spec(top=line)


def source(value: str) -> str:
    return spec(weights=f'source = "{value}"')


def network(line: str) -> str:
    return spec(architecture=line, more="[input]\nshape = [3, 8, 8]")


def onnx_source(more: str = "", shape: str = "shape = [3, 8, 8]", formats: str = '["onnx"]', weights: str = "") -> str:
    return f'formats = {formats}\n[weights]\nsource = "m.onnx"\n{weights}\n[input]\n{shape}\n{more}\n'


def rule(lines: str, accuracy: str = "") -> str:
    return spec(more=f"[accuracy]\n{accuracy}\n[[accuracy.gate]]\n{lines}")


COLORS = "gray 1, rgb 3, bgr 3, rgba 4, bgra 4"
AS_IT_IS = "expected nothing, since weights.source is an ONNX file, which is used as it is"


GATE = "format, precision, output, relative_l2, max_absolute, top1_drop, top5_drop, cosine, snr, top1, top5"


TOP = (
    "top level: expected one of architecture, weights, input, inputs, dimensions, output, outputs, formats, "
    "max_batch_size, ensemble, labels, torchscript, onnx, … (docs/reference/spec.md)"
)


ENGINE = (
    "engine: expected one of precision, keep_fp32, keep_io_types, calibration, repair, min_batch_size, "
    "opt_batch_size, max_batch_size, profiles, workspace, … (docs/reference/spec.md)"
)


READABLE = (
    "weights.source: expected a checkpoint (.safetensors, its .index.json, .pth, .npz), ONNX (.onnx), "
    "TorchScript (.pt) or torch.export (.pt2)"
)
SCHEMES = "weights.source: expected one of hf://, https://, http://, package://, timm://, random:// or a path"


DERIVED = "expected nothing, since it follows from the artifact"


RELEASE = 'expected a release of Triton\'s containers, such as "26.08"'


KEEP = "expected true, since only fp16 engines can have inputs and outputs in their own precision, found false"


PRECISIONS = "fp32, tf32, fp16, bf16, int8, fp8"


COVER = "expected profiles that together take all that clients may send (max_batch_size, [dimensions])"
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
        "weights: expected one of source, sha256, prefix, ema, converter, found 'sha' (did you mean 'sha256'?)",
    ),
    (
        table("input", "means = [0.5, 0.5, 0.5]"),
        "input: expected one of format, shape, min_size, max_size, color, files, scale, mean, std, "
        "interpolation, crop_pct, crop_mode, fill, found 'means' (did you mean 'mean'?)",
    ),
    (
        table("onnx", "batchsize = 11"),
        "onnx: expected one of precision, exporter, opset, dynamic_axes, batch_size, external_data, found 'batchsize' "
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
        "onnx: expected one of precision, exporter, opset, dynamic_axes, batch_size, external_data, found 'a\\nb'",
    ),
    # Keys that are missing
    ('[weights]\nsource = "random://0"\n', "architecture: expected either `timm` or `network`, found neither"),
    ('[architecture]\ntimm = "x"\n', "top level: expected the key 'weights', found nothing"),
    (spec(weights=""), "weights: expected the key 'source', found nothing"),
    # Values of another type
    (table("onnx", 'opset = "11"'), "onnx.opset: expected one of int, auto, found '11'"),
    (table("onnx", "opset = 11.0"), "onnx.opset: expected int | str, found 11.0"),
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
        "accuracy.gate[0].precision: expected fp32, the precision of onnx, found 'fp16'",
    ),
    (
        rule('format = "torchscript"\nprecision = "bf16"\ntop1 = 1') + '[torchscript]\nprecision = "fp16"\n',
        "accuracy.gate[0].precision: expected fp16, the precision of torchscript, found 'bf16'",
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
        "accuracy.truth: expected the classes of the samples, since gate[0] limits the loss of accuracy, found nothing",
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
        "formats[1]: expected one of torchscript, onnx, tensorrt, aoti, rtx, found 'tensorflow' "
        "(did you mean 'tensorrt'?)",
    ),
    (
        top('formats = ["onxx"]'),
        "formats[0]: expected one of torchscript, onnx, tensorrt, aoti, rtx, found 'onxx' (did you mean 'onnx'?)",
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
    (
        table("input", "min_size = [96, 96]"),
        "input: expected both min_size and max_size, or neither, found one of them",
    ),
    (
        table("input", "max_size = [96, 96]"),
        "input: expected both min_size and max_size, or neither, found one of them",
    ),
    (
        table("input", "min_size = [96, 96]\nmax_size = [224, 224]"),
        "input.shape: expected [channels, height, width] to tune for, between min_size and max_size, found nothing",
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
        f"engine.precision: expected one of {PRECISIONS}, found 'FP16' (did you mean 'fp16'?)",
    ),
    (table("engine", "precision = 16"), "engine.precision: expected str, found 16"),
    (table("engine", 'keep_fp32 = "Conv"'), "engine.keep_fp32: expected array, found 'Conv'"),
    (table("engine", "keep_fp32 = [3]"), "engine.keep_fp32[0]: expected str, found 3"),
    (table("engine", 'keep_fp32 = ["Conv", ""]'), "engine.keep_fp32[1]: expected str of length >= 1, found ''"),
    *(
        (
            table("engine", f'precision = "{precision}"\nkeep_fp32 = ["Conv"]'),
            f"engine.keep_fp32: expected nothing, since all nodes of a {precision} graph are fp32, found ['Conv']",
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
            f"engine.calibration: expected nothing, since {precision} needs no calibration, found 'pictures'",
        )
        for precision in ("fp32", "tf32", "fp16", "bf16")
    ),
    (
        table("engine", 'precision = "tf32"\nrepair = true'),
        "engine.repair: expected false, since all nodes of a tf32 graph are fp32, found true",
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
    # Several profiles
    (
        profiles("a = 1"),
        "engine.profiles[0]: expected one of min_batch_size, opt_batch_size, max_batch_size, dimensions, found 'a'",
    ),
    (table("engine", "profiles = 2"), "engine.profiles: expected array, found 2"),
    (profiles("min_batch_size = 0"), "engine.profiles[0].min_batch_size: expected int >= 1, found 0"),
    (profiles("opt_batch_size = 8\nmax_batch_size = 4"), f"engine.profiles[0]: expected {PROFILE}, found 1, 8, 4"),
    (
        table("engine", "max_batch_size = 4\n[[engine.profiles]]"),
        "engine.max_batch_size: expected nothing, since [[engine.profiles]] has the batches, found 4",
    ),
    (profiles("", ""), "engine.profiles[1]: expected other ranges than those of profiles[0], found the same"),
    (profiles("max_batch_size = 1", "min_batch_size = 3"), f"engine.profiles: {COVER}, found none for batch 2"),
    (
        profiles("[engine.profiles.dimensions.length]\nmax = 8"),
        "engine.profiles[0].dimensions.length: expected nothing, since no length is open, found 'length'",
    ),
    (
        table("onnx", "dynamic_axes = false") + "[[engine.profiles]]\n",
        "engine.profiles: expected nothing, since no dimension is open, found 1 of them",
    ),
    (
        spec(top='formats = ["onnx"]', more="[[engine.profiles]]"),
        "engine.profiles: expected nothing, since formats has no engine, found 1 of them",
    ),
    (
        profiles("", "max_batch_size = 1") + '[triton.tensorrt]\ninstance_group = [{ profile = ["2"] }]',
        "triton.tensorrt.instance_group[0].profile: expected indices of engine.profiles, 0, 1, found '2'",
    ),
    (
        profiles("", "max_batch_size = 1") + '[triton.tensorrt]\ninstance_group = [{ profile = ["0", "0"] }]',
        "triton.tensorrt.instance_group[0].profile: expected each profile once, found ['0', '0']",
    ),
    (
        profiles("", "max_batch_size = 1") + '[triton.tensorrt]\ninstance_group = [{}, { profile = ["1"] }]',
        "triton.tensorrt.instance_group[1].profile: expected profiles that take all that clients may send, since a "
        "request goes to any free instance, found ['1'], none for batch 2 to 32",
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
            f"engine.{key}: expected each compute capability once, found ['8.6', '8.9', '8.6']",
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
        "input.shape: expected [channels, height, width], since it is not read from your own network, found nothing",
    ),
    # Pictures
    (
        table("input", 'color = "brg"'),
        "input.color: expected one of gray, rgb, bgr, rgba, bgra, found 'brg' (did you mean 'rgb'?)",
    ),
    (
        table("input", 'color = "grey"'),
        "input.color: expected one of gray, rgb, bgr, rgba, bgra, found 'grey' (did you mean 'gray'?)",
    ),
    (
        table("input", 'shape = [1, 28, 28]\ncolor = "rgb"'),
        f"input.color: expected channels in the number that the input has, 1 ({COLORS}), found 'rgb'",
    ),
    (
        table("input", 'shape = [5, 8, 8]\nfiles = ["a.png", "b.png"]'),
        f"input.color: expected channels in the number that the input has, 5 ({COLORS}), found 2 gray pictures",
    ),
    (
        table("input", 'files = ["a.png", "b.png"]\ncolor = ["rgb"]'),
        "input.color: expected 2 colors, one for each of input.files, found ['rgb']",
    ),
    (
        table("input", 'color = ["rgb", "gray"]'),
        "input.color: expected one color, since there is no input.files, found ['rgb', 'gray']",
    ),
    (
        table("input", 'files = ["a.png", "aa.png"]'),
        "input.files[1]: expected an ending of one file of each sample, and of no other, found 'aa.png'",
    ),
    (table("input", "files = []"), "input.files: expected array of length >= 1, found []"),
    (table("input", "scale = 2"), "input.scale: expected one of 1, 255, found 2"),
    (table("input", "scale = 0.00392"), "input.scale: expected one of 1, 255, found 0.00392"),
    (
        table("input", "scale = 255\nstd = [0.5, 0.5, 0.5]"),
        "input.std: expected a value for pixels from 0 to 255, probably [127.5, 127.5, 127.5], found [0.5, 0.5, 0.5], "
        "for 0 to 1",
    ),
    (
        table("input", 'crop_mode = "letter_box"'),
        "input.crop_mode: expected one of center, squash, border, letterbox, found 'letter_box' "
        "(did you mean 'letterbox'?)",
    ),
    (
        table("input", 'crop_mode = "letterbox"\ncrop_pct = 0.9'),
        "input.crop_pct: expected nothing, since letterbox keeps the whole picture, found 0.9",
    ),
    (
        table("input", "fill = 114"),
        'input.fill: expected nothing, since it is only for crop_mode = "letterbox", found 114',
    ),
    (table("input", 'crop_mode = "letterbox"\nfill = 256'), "input.fill: expected int <= 255, found 256"),
    (
        table("input", "shape = [480, 640, 3]"),
        "input.shape: expected [channels, height, width], found [480, 640, 3] (did you mean [3, 480, 640]?)",
    ),
    (
        spec(architecture='timm = "x"\narguments = { in_chans = 1 }', more="[input]\nshape = [3, 8, 8]"),
        "input.shape: expected 1 channels, as architecture.arguments.in_chans says, found [3, 8, 8]",
    ),
    # A model whose source is an ONNX file
    (
        onnx_source(shape=""),
        "input.shape: expected [channels, height, width], since it is not read from an ONNX file, found nothing",
    ),
    (
        onnx_source('[architecture]\ntimm = "x"'),
        f"architecture.timm: {AS_IT_IS}, found 'x'",
    ),
    (onnx_source("[architecture]\narguments = { a = 1 }"), f"architecture.arguments: {AS_IT_IS}, found {{'a': 1}}"),
    (onnx_source("[output]\nsoftmax = true"), f"output.softmax: {AS_IT_IS}, found True"),
    (onnx_source("[output]\ntop_k = 5"), f"output.top_k: {AS_IT_IS}, found 5"),
    (onnx_source('[torchscript]\nprecision = "fp16"'), f"torchscript.precision: {AS_IT_IS}, found 'fp16'"),
    (
        onnx_source('[torchscript]\nmemory_format = "contiguous"'),
        f"torchscript.memory_format: {AS_IT_IS}, found 'contiguous'",
    ),
    (onnx_source("[onnx]\nopset = 13"), f"onnx.opset: {AS_IT_IS}, found 13"),
    (onnx_source('[onnx]\nexporter = "dynamo"'), f"onnx.exporter: {AS_IT_IS}, found 'dynamo'"),
    (onnx_source(shape='shape = [3, 8, 8]\nformat = "uint8_nhwc"'), f"input.format: {AS_IT_IS}, found 'uint8_nhwc'"),
    (
        onnx_source(weights='converter = "c.py:f"'),
        "weights.converter: expected nothing, since weights.source is an ONNX file, found 'c.py:f'",
    ),
    (
        onnx_source(formats='["torchscript", "onnx"]'),
        "formats: expected no torchscript, since weights.source is an ONNX file, which cannot become TorchScript, "
        "found ['torchscript', 'onnx']",
    ),
    (network('network = "n.py"'), "architecture.network: expected `file.py:function`, found 'n.py'"),
    (
        spec(weights='source = "random://0"\nconverter = "convert.to_timm"'),
        "weights.converter: expected `file.py:function`, found 'convert.to_timm'",
    ),
    # Sources
    (source("ftp://host/file"), f"{SCHEMES}, found 'ftp://' (did you mean 'http://'?)"),
    (source("gopher://host/file"), f"{SCHEMES}, found 'gopher://'"),
    *(
        (source(name), f"{READABLE}, found a file '{suffix}'")
        for name, suffix in (
            ("model.engine", ".engine"),
            ("model.ort", ".ort"),
            ("hf://owner/repository/model.TFLITE@main", ".TFLITE"),
            ("https://host/model.h5?download=true", ".h5"),
            ("folder/saved_model.pb", ".pb"),
            ("weights.tar", ".tar"),
        )
    ),
    (source("MODEL.ONNX"), f"{READABLE}, with the suffix in lower case, found '.ONNX'"),
    (source(""), "weights.source: expected str of length >= 1, found ''"),
    (source("timm://"), "weights.source: expected a name after ://, found 'timm://'"),
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
    (
        table("triton", 'name = "x"'),
        f"triton.name: {DERIVED} (a table of one format can set it), found 'x'",
    ),
    (
        table("triton", "max_batch_size = 7"),
        f"triton.max_batch_size: {DERIVED} (set it above the tables, or in the table of one format), found 7",
    ),
    (table("triton", 'platform = "x"'), f"triton.platform: {DERIVED}, found 'x'"),
    (
        table("triton", 'cc_model_filenames = { "8.6" = "model.plan" }'),
        f"triton.cc_model_filenames: {DERIVED} (use engine.compute_capabilities), found {{'8.6': 'model.plan'}}",
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


VALID = [
    *(table("engine", f'precision = "{p}"\ncalibration = "pictures"\nkeep_fp32 = ["Conv"]') for p in ("int8", "fp8")),
    table("engine", "keep_io_types = false"),
    profiles("max_batch_size = 1", "min_batch_size = 2\nopt_batch_size = 32"),
    rule('format = "graph"\nprecision = "int8"\noutput = "OUTPUT__1"\nrelative_l2 = 0.7\ntop1 = 0\nsnr = 3'),
    rule("top1_drop = 0.02", 'truth = "folders"'),
    table("engine", 'compute_capabilities = ["7.5", "12.0"]\nrtx_compute_capabilities = ["7.5", "12.0"]'),
    table("onnx", "dynamic_axes = false\nbatch_size = 2\n[engine]\nmin_batch_size = 2\nmax_batch_size = 2"),
    table("input", "shape = [3, 64, 128]\nmin_size = [64, 128]\nmax_size = [64, 128]"),
    table("triton", 'release = "24.10"'),
    onnx_source("[onnx]\ndynamic_axes = false\nbatch_size = 4\nexternal_data = true"),
    onnx_source().replace("m.onnx", "hf://owner/repository/onnx/model.onnx@main"),
    onnx_source().replace("m.onnx", "https://host/model.onnx?download=true"),
    spec(top='formats = ["rtx"]', more="[engine]\nstrip_plan = true"),
    spec(top='formats = ["torchscript", "onnx"]', more="[engine]\nstrip_plan = true"),
]
