"""Wrong [[inputs]], [dimensions] and [[outputs]] with the line that reports the mistake, and specs that are valid."""

HEAD = """\
formats = {formats}
[architecture]
network = "network.py:build"
[weights]
source = "random://0"
"""
IDS = '[[inputs]]\nname = "ids"\ndtype = "int64"\nshape = ["length"]\n'
TWO = '[[inputs]]\nshape = [2]\n{first}\n[[inputs]]\nshape = ["a", 4]\n{second}\n[dimensions.a]\nmax = 3\n'


def tensors(text: str, formats: str = '["torchscript", "onnx"]') -> str:
    """Return a spec of a network of the user, with these tables."""
    return HEAD.format(formats=formats) + text


def one(line: str, formats: str = '["torchscript", "onnx"]') -> str:
    return tensors(f"[[inputs]]\nshape = [2]\n{line}\n", formats)


def picture(lines: str) -> str:
    return tensors(f'[[inputs]]\nshape = [3, 8, 8]\nlayout = "nchw"\n{lines}\n')


def length(lines: str) -> str:
    return tensors(f"{IDS}[dimensions.length]\n{lines}\n")


def ragged(lines: str, more: str = "") -> str:
    table = f'[[inputs]]\nshape = ["length"]\nragged = true\n{lines}\n[dimensions.length]\nmax = 8\n'
    return f'formats = ["onnx"]\n[weights]\nsource = "m.onnx"\n{table}{more}'


def profiles(*lines: str) -> str:
    tables = "".join(f"[[engine.profiles]]\n{each}\n" for each in lines)
    return length(f"min = 2\nopt = 6\nmax = 16\n{tables}").replace('"torchscript", "onnx"', '"rtx"')


NO_PICTURE = "expected nothing, since it prepares the picture of [input], and this spec has [[inputs]], found 'onnx'"
ONE_OUTPUT = "output: expected nothing, since there are several [[outputs]], found [output]"
DTYPES = "float32, float16, float64, int64, int32, int16, int8, uint64, uint32, uint16, uint8, bool, string"
INPUT_KEYS = (
    "name, dtype, shape, dims, layout, low, high, values, batch_dimension, ragged, color, files, scale, mean, std, "
    "interpolation, … (docs/reference/spec.md)"
)
RAGGED = (
    "inputs[0].ragged: expected false, since only an ONNX file that is served in this one format, in fp32, may be "
    "ragged, found true, formats = {}"
)
COLORS = "gray 1, rgb 3, bgr 3, rgba 4, bgra 4"
PICTURES = 'expected nothing, since it is for pictures (layout = "nchw" or "nhwc"), found a value'
PLACE = "outputs[{}].name: expected the number {} behind __, its place, found {!r}"
SAME_TENSOR = "expected another tensor of the answer than that of outputs[0]"
IDENTIFIER = "expected a name of ASCII letters, digits and _, which an argument of TorchScript can have (formats)"

MISTAKES = [
    # [[inputs]]
    (one("size = 3"), f"inputs[0]: expected one of {INPUT_KEYS}, found 'size'"),
    (tensors("[inputs]\nshape = [2]"), "inputs: expected array, found {'shape': [2]}"),
    (tensors("[[inputs]]\n"), "inputs[0]: expected the key 'shape', found nothing"),
    (tensors("[[inputs]]\nshape = 2"), "inputs[0].shape: expected array, found 2"),
    (tensors("[[inputs]]\nshape = [0]"), "inputs[0].shape[0]: expected int >= 1, found 0"),
    (tensors("[[inputs]]\nshape = [1.5]"), "inputs[0].shape[0]: expected int | str, found 1.5"),
    (
        tensors('[[inputs]]\nshape = ["a b"]'),
        "inputs[0].shape[0]: expected str matching regex '^[A-Za-z_][A-Za-z0-9_]*$', found 'a b'",
    ),
    (
        one('dtype = "int46"'),
        "inputs[0].dtype: expected one of float32, float16, float64, int64, int32, int16, int8, uint64, uint32, "
        "uint16, uint8, bool, string, found 'int46' (did you mean 'int64'?)",
    ),
    *(
        (one(f'dtype = "{found}"'), f"inputs[0].dtype: expected one of {DTYPES}, found '{found}'{meant}")
        for found, meant in {
            "TYPE_FP16": " (did you mean 'float16'?)",
            "torch.long": " (did you mean 'int64'?)",
            "BYTES": " (did you mean 'string'?)",
            "bfloat16": ", which NumPy and Triton's clients do not have",
        }.items()
    ),
    (one("high = 1e39"), "inputs[0].high: expected a value of float32, found 1e+39"),
    (
        one('dtype = "int64"\nlow = 5'),
        "inputs[0].high: expected the largest value, since low is above its default, 1, found nothing",
    ),
    (one('dtype = "uint32"'), "inputs[0].dtype: expected a type that torchscript has (formats), found 'uint32'"),
    (
        one('dtype = "float64"', '["onnx", "tensorrt"]'),
        "inputs[0].dtype: expected a type that tensorrt has (formats), found 'float64'",
    ),
    (
        one('dtype = "string"', '["onnx"]'),
        "inputs[0].dtype: expected another type, since only ONNX files have strings, found 'string'",
    ),
    (one('name = "a.b"'), f"inputs[0].name: {IDENTIFIER}, found 'a.b'"),
    *((one(f'name = "{name}"'), f"inputs[0].name: {IDENTIFIER}, found '{name}'") for name in ("class", "torch")),
    (
        one('name = "ids\\n"', '["onnx"]'),  # Python's $ also matches before a line break at the end
        "inputs[0].name: expected str matching regex '^[A-Za-z_][A-Za-z0-9_.:/-]*$', found 'ids\\n'",
    ),
    (
        tensors(f"[[inputs]]\nshape = {[1] * 16}"),
        f"inputs[0].shape: expected array of length <= 15, found {[1] * 16}",
    ),
    (
        one('name = ""'),
        "inputs[0].name: expected str matching regex '^[A-Za-z_][A-Za-z0-9_.:/-]*$', found ''",
    ),
    (
        tensors(TWO.format(first='name = "x"', second='name = "x"')),
        "inputs[1].name: expected another name than that of inputs[0], found 'x'",
    ),
    (
        tensors(TWO.format(first='name = "INPUT__1"', second="")),
        "inputs[1].name: expected another name than that of inputs[0], found 'INPUT__1'",
    ),
    # Pictures
    *(
        (one(f"{key} = {value}"), f"inputs[0].{key}: {PICTURES}")
        for key, value in {
            "color": '"bgr"',
            "files": '["a"]',
            "scale": 255,
            "mean": [0.5],
            "std": [0.5],
            "crop_pct": 0.5,
            "fill": 0,
            "interpolation": '"nearest"',
            "crop_mode": '"squash"',
        }.items()
    ),
    (
        picture('color = "gray"'),
        f"inputs[0].color: expected channels in the number that the input has, 3 ({COLORS}), found 'gray'",
    ),
    (picture("mean = [0.5, 0.5]"), "inputs[0].mean: expected 3 values, one for each channel, found [0.5, 0.5]"),
    (
        picture("std = [58.0]"),
        "inputs[0].std: expected a value for pixels from 0 to 1, probably [0.2275], found [58.0], for 0 to 255, "
        "which need inputs[0].scale = 255",
    ),
    (
        picture('dtype = "uint8"\nscale = 255'),
        "inputs[0].scale: expected nothing, since a uint8 input takes pixels as they are, found 255",
    ),
    (
        picture('dtype = "int64"'),
        "inputs[0].dtype: expected uint8 or a type of floats, since layout says that it is a picture, found 'int64'",
    ),
    (one('layout = "nchw"'), "inputs[0].layout: expected nothing, or a shape of three dimensions, found 'nchw', [2]"),
    (one("batch_dimension = 2"), "inputs[0].batch_dimension: expected at most 1, the last dimension, found 2"),
    (one("low = 3\nhigh = 2"), "inputs[0].low: expected at most high, 2, found 3"),
    (one("high = -2"), "inputs[0].low: expected the smallest value, since high is negative, found nothing"),
    (one("low = 3\nvalues = [2]"), "inputs[0].values: expected either values, or low and high, found both"),
    (one("values = []"), "inputs[0].values: expected array of length >= 1, found []"),
    (one('dtype = "int8"\nhigh = 128'), "inputs[0].high: expected a value of int8, found 128"),
    (one('dtype = "uint8"\nlow = -1'), "inputs[0].low: expected a value of uint8, found -1"),
    (one('dtype = "int64"\nlow = 0.5'), "inputs[0].low: expected a value of int64, found 0.5"),
    (one('dtype = "int64"\nvalues = [1, true]'), "inputs[0].values[1]: expected a value of int64, found True"),
    (one('dtype = "bool"\nvalues = [1]'), "inputs[0].values[0]: expected a value of bool, found 1"),
    (one('dtype = "float16"\nhigh = 65505'), "inputs[0].high: expected a value of float16, found 65505"),
    (one("low = nan"), "inputs[0].low: expected a value of float32, found nan"),
    (one("high = inf"), "inputs[0].high: expected a value of float32, found inf"),
    (
        one('dtype = "bool"\nlow = 0'),
        "inputs[0].low: expected nothing, since bool has no range (values), found {'low': 0}",
    ),
    (
        one("") + "[input]\nmean = [0.5]\n",
        "input: expected nothing, since [[inputs]] describes the inputs, found [input]",
    ),
    ('ensemble = "onnx"\n' + one(""), f"ensemble: {NO_PICTURE}"),
    (
        tensors("[[inputs]]\nshape = [65536, 65536]"),
        "inputs: expected inputs of at most 2**31 - 1 values, the most that a tensor holds, in a batch of 32, found 32 "
        "x [65536, 65536]",
    ),
    (
        one("dims = [3]"),
        "inputs[0].dims: expected dims of as many values as [2], between the same open dimensions, found [3]",
    ),
    # Ragged batches
    (one("ragged = true"), RAGGED.format("torchscript, onnx")),
    (ragged("", '[onnx]\nprecision = "fp16"\n'), RAGGED.format("onnx")),
    (
        ragged("", "[onnx]\ndynamic_axes = false\n"),
        "inputs[0].ragged: expected false, since onnx.dynamic_axes = false fixes the batch, found true",
    ),
    (
        ragged('dims = ["length", 1]'),
        "inputs[0].dims: expected nothing, since the input is ragged, found ['length', 1]",
    ),
    (ragged("batch_dimension = 1"), "inputs[0].batch_dimension: expected nothing, since the input is ragged, found 1"),
    (
        ragged("").replace('["length"]', "[]", 1).replace("[dimensions.length]\nmax = 8\n", ""),
        "inputs[0].shape: expected a dimension, since the input is ragged, found []",
    ),
    (
        ragged(
            "", '[[triton.onnx.batch_input]]\ntarget_name = ["N"]\ndata_type = "TYPE_INT32"\nsource_input = ["X"]\n'
        ),
        "triton.onnx.batch_input[0].source_input: expected one of INPUT__0, found 'X'",
    ),
    # [dimensions]
    (tensors(IDS), "inputs[0].shape[0]: expected a table [dimensions.WORD] for it, found 'length'"),
    (
        tensors(IDS.replace("length", "lenght") + "[dimensions.length]\nmax = 3"),
        "inputs[0].shape[0]: expected a word of [dimensions], length, found 'lenght' (did you mean 'length'?)\n"
        "dimensions.length: expected a word that the shape of an input has, found 'length' (did you mean 'lenght'?)",
    ),
    (
        tensors('[[inputs]]\nshape = ["batch"]\n'),
        "inputs[0].shape[0]: expected another word, since batch is the first dimension, found 'batch'",
    ),
    (length("min = 2"), "dimensions.length: expected the key 'max', found nothing"),
    (length("max = 0"), "dimensions.length.max: expected int >= 1, found 0"),
    (length('max = "8"'), "dimensions.length.max: expected int, found '8'"),
    (length("max = 8\nstep = 2"), "dimensions.length: expected one of min, opt, max, found 'step'"),
    (length("min = 4\nmax = 3"), "dimensions.length: expected min <= opt <= max, found 4, 3, 3"),
    (length("min = 4\nopt = 3\nmax = 8"), "dimensions.length: expected min <= opt <= max, found 4, 3, 8"),
    (length("opt = 9\nmax = 8"), "dimensions.length: expected min <= opt <= max, found 1, 9, 8"),
    (
        length("max = 8\n[dimensions.wide]\nmax = 3"),
        "dimensions.wide: expected a word that the shape of an input has, found 'wide'",
    ),
    (
        tensors("[input]\nshape = [3, 8, 8]\n[dimensions.length]\nmax = 3"),
        "dimensions.length: expected nothing, since there are no [[inputs]], found a table",
    ),
    (
        length('max = 8\n[dimensions."a b"]\nmax = 3'),
        "dimensions: expected str matching regex '^[A-Za-z_][A-Za-z0-9_]*$', found 'length, a b'",
    ),
    # Optimization profiles
    (
        profiles("dimensions.lenght = { max = 8 }"),
        "engine.profiles[0].dimensions.lenght: expected an open dimension, length, found 'lenght' (did you mean "
        "'length'?)",
    ),
    (
        profiles("dimensions.length = { most = 8 }"),
        "engine.profiles[0].dimensions.length: expected one of min, opt, max, found 'most'",
    ),
    (
        profiles("dimensions.length = { min = 6, max = 5 }"),
        "engine.profiles[0].dimensions.length: expected min <= opt <= max, found 6, 6, 5",
    ),
    (
        profiles("dimensions.length = { max = 17 }"),
        "engine.profiles[0].dimensions.length: expected lengths from 2 to 16, those of the dimension, found 2 to 17",
    ),
    (
        profiles("dimensions.length = { max = 8 }", "max_batch_size = 4\ndimensions.length = { min = 9 }"),
        "engine.profiles: expected profiles that together take all that clients may send (max_batch_size, "
        "[dimensions]), found none for batch 5 to 32, length 9 to 16",
    ),
    # [[outputs]]
    (
        one("[[outputs]]\nindex = 1"),
        "outputs[0]: expected one of name, key, classes, labels, dims, batch_dimension, found 'index'",
    ),
    (one("[[outputs]]\ndims = [0]"), "outputs[0].dims[0]: expected int >= 1, found 0"),
    (one("[[outputs]]\nbatch_dimension = -1"), "outputs[0].batch_dimension: expected int >= 0, found -1"),
    (one("[[outputs]]\nbatch_dimension = 16"), "outputs[0].batch_dimension: expected int <= 15, found 16"),
    (one("batch_dimension = -1"), "inputs[0].batch_dimension: expected int >= 0, found -1"),
    (one("[[outputs]]\nkey = -1"), "outputs[0].key: expected int >= 0, found -1"),
    (one('[[outputs]]\nkey = ""'), "outputs[0].key: expected str of length >= 1, found ''"),
    (one('[[outputs]]\nclasses = "yes"'), "outputs[0].classes: expected bool, found 'yes'"),
    (one('[[outputs]]\nlabels = ""'), "outputs[0].labels: expected str of length >= 1, found ''"),
    (
        one('[[outputs]]\nkey = "a"\n[[outputs]]\nname = "a"\nkey = "b"'),
        "outputs[1].name: expected another name than that of outputs[0], found 'a'",
    ),
    (
        one('name = "a_b"\n[[outputs]]\nkey = "a b"'),  # which is served as a_b
        "outputs[0].name: expected another name than that of inputs[0], found 'a_b'",
    ),
    (
        one('name = "a"\n[[outputs]]\nname = "a"'),
        "outputs[0].name: expected another name than that of inputs[0], found 'a'",
    ),
    *(
        (one(f"[[outputs]]\n{first}\n[[outputs]]\n{second}"), f"outputs[1].key: {SAME_TENSOR}, found {found}")
        for first, second, found in (
            ('name = "x"\nkey = "a"', 'name = "y"\nkey = "a"', "'a'"),
            ("key = 0", "key = 0", "0"),
            ("key = 0", 'key = "0"\nname = "y"', "'0'"),
            ("key = 1", "", "1"),
            ('name = "a"', 'key = "a"\nname = "b"', "'a'"),
        )
    ),
    (one('[[outputs]]\nname = "OUTPUT__1"'), PLACE.format(0, 0, "OUTPUT__1")),
    (one("[[outputs]]\nkey = 0\n[[outputs]]\nkey = 1\n[output]\nsoftmax = true"), ONE_OUTPUT),
]

VALID = [
    ragged("low = 1"),
    'formats = ["onnx"]\n[weights]\nsource = "m.onnx"\n[[inputs]]\nshape = [2]\nbatch_dimension = 1',
    profiles("dimensions.length = { max = 8 }", "opt_batch_size = 1\ndimensions.length = { min = 5 }"),
    profiles("dimensions.length = { min = 3, max = 8 }", ""),
    tensors(TWO.format(first="", second='name = "x"\nlow = -1\nhigh = 1.5\nbatch_dimension = 2')),
    length("max = 1"),
    length("min = 2\nopt = 3\nmax = 4"),
    one('name = "images:0"', '["onnx", "rtx"]'),
    one("values = [1, 2.5]\n[[outputs]]\nkey = 'a.b'\nclasses = true\n[[outputs]]\nname = 'OUTPUT__1'"),
    tensors('[[inputs]]\nshape = [8, 8, 3]\nlayout = "nhwc"\ndtype = "uint8"'),
    tensors("[[inputs]]\nshape = []"),
    tensors("[input]\nshape = [3, 8, 8]\n[[outputs]]\nkey = 1"),
]
