"""[triton] of the spec: mistakes, and the config.pbtxt that follows from it, parsed by Triton's own protobuf."""

# ruff: noqa: E501  (messages are quoted on one line)

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from build_tasks.errors import UserError
from build_tasks.formats.ensemble_steps import steps_of
from build_tasks.provenance import new_version
from build_tasks.spec.loader import load
from build_tasks.spec.model import Model
from build_tasks.stages import config
from build_tasks.triton import release_table, releases
from build_tasks.triton.cpu_cores import THREAD_PARAMETERS
from build_tasks.triton.platforms import TRITON_MODELS
from tests.support.project import ROOT
from tests.support.triton_cases import (
    AOTI,
    ENSEMBLE,
    PACKAGES,
    PLANS,
    batching,
    of_format,
    package,
    plan,
    spec,
    tensors,
    triton,
)

PATH = "models/m/model.toml"


def warm_up(lines: str) -> str:
    return triton(f"model_warmup = [{{ {lines} }}]")


ZEROS = "inputs = { INPUT__0 = { data_type = 'TYPE_FP32', dims = [3, 160, 160], zero_data = true } }"
NCHW = "[3, 160, 160]"

# Mistakes that the spec alone shows. They are reported before anything runs.
WRONG = [
    # Fields and values that the protobuf does not have
    (
        triton("dynamic_batchin = {}"),
        "triton: expected fields of Triton's ModelConfig, found 'dynamic_batchin' (did you mean 'dynamic_batching'?)",
    ),
    (
        of_format("onnx", "instance_groups = []"),
        "triton.onnx: expected fields of Triton's ModelConfig, found 'instance_groups' (did you mean 'instance_group'?)",
    ),
    (
        batching("preferred_batchsize = [4]"),
        "triton.dynamic_batching: expected fields of ModelDynamicBatching: preferred_batch_size, "
        "max_queue_delay_microseconds, preserve_ordering, priority_levels, default_priority_level, …, found "
        "'preferred_batchsize' (did you mean 'preferred_batch_size'?)",
    ),
    (
        triton('instance_group = [{ kind = "KIND_GPUS" }]'),
        "triton.instance_group[0].kind: expected one of KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL, found 'KIND_GPUS' "
        "(did you mean 'KIND_GPU'?)",
    ),
    (
        batching('default_queue_policy = { timeout_action = "REJCT" }'),
        "triton.dynamic_batching.default_queue_policy.timeout_action: expected one of REJECT, DELAY, found 'REJCT' "
        "(did you mean 'REJECT'?)",
    ),
    (triton('instance_group = { count = 2 }'), "triton.instance_group: expected a list, found {'count': 2}"),
    (triton("dynamic_batching = true"), "triton.dynamic_batching: expected a table, found True"),
    (batching('preserve_ordering = "yes"'), "triton.dynamic_batching.preserve_ordering: expected bool, found 'yes'"),
    (
        batching("max_queue_delay_microseconds = -1"),
        "triton.dynamic_batching.max_queue_delay_microseconds: expected int >= 0 of 64 bits, found -1",
    ),
    (triton('instance_group = [{ count = "2" }]'), "triton.instance_group[0].count: expected int, found '2'"),
    (triton("metric_tags = { team = 7 }"), "triton.metric_tags.team: expected str, found 7"),
    (
        triton("version_policy = { latest = { num_versions = 1 }, all = {} }"),
        "triton.version_policy: expected one of latest and all, found both",
    ),
    (
        batching("priority_queue_policy = { high = {} }"),
        "triton.dynamic_batching.priority_queue_policy: expected keys that are int >= 0, found 'high'",
    ),
    (
        triton("instance_group = [{ rate_limiter = { priority = inf } }]"),
        "triton.instance_group[0].rate_limiter.priority: expected int >= 0, found inf",
    ),
    (
        triton("sequence_batching = { direct = { minimum_slot_utilization = inf } }"),
        "triton.sequence_batching.direct.minimum_slot_utilization: expected a finite float, found inf",
    ),
    # Fields that follow from the artifact
    (
        triton('input = [{ name = "INPUT__0" }]'),
        "triton.input: expected nothing, since it follows from the artifact, found [{'name': 'INPUT__0'}]",
    ),
    (
        of_format("onnx", 'backend = "onnxruntime"'),
        "triton.onnx.backend: expected nothing, since it follows from the artifact, found 'onnxruntime'",
    ),
    (
        triton("ensemble_scheduling = {}"),
        "triton.ensemble_scheduling: expected nothing, since it follows from the artifact (use the key ensemble), found {}",
    ),
    # Keys of [triton] itself
    (triton('device = "GPU"'), "triton.device: expected one of auto, gpu, cpu, found 'GPU' (did you mean 'gpu'?)"),
    (triton('device = "gpu"\nwarm_up = 0'), "triton.warm_up: expected int >= 1, found 0"),
    (
        triton("warm_up = 8"),
        'triton.warm_up: expected nothing, since it needs the format torchscript and triton.device = "gpu", found 8',
    ),
    (
        triton('device = "gpu"\nwarm_up = 8', 'formats = ["onnx"]'),
        'triton.warm_up: expected nothing, since it needs the format torchscript and triton.device = "gpu", found 8',
    ),
    *(
        (triton(lines, 'formats = ["torchscript", "onnx"]'), f"triton.{message}")
        for lines, message in (
            ('device = "cpu"\ncores = 0', "cores: expected int >= 1, found 0"),
            ('device = "cpu"\ncores = "2"', "cores: expected int >= 1, found '2'"),
            ('device = "cpu"\ncores = 2.0', "cores: expected int >= 1, found 2.0"),
            ('device = "cpu"\ncores = true', "cores: expected int >= 1, found True"),
            ('device = "cpu"\ncores = 1025', "cores: expected int <= 1024, found 1025"),
            ('device = "gpu"\ncores = 2', 'cores: expected nothing, since it needs triton.device = "cpu", found 2'),
            ("cores = 2", 'cores: expected nothing, since it needs triton.device = "cpu", found 2'),
            (
                'device = "cpu"\ncores = 2\n[triton.onnx]\nparameters = { intra_op_thread_count = 4 }',
                "onnx.parameters.intra_op_thread_count: expected int <= 2, since triton.cores = 2, found '4'",
            ),
            (
                'device = "cpu"\ncores = 2\nparameters = { INTRA_OP_THREAD_COUNT = 4 }',
                "parameters.INTRA_OP_THREAD_COUNT: expected int <= 2, since triton.cores = 2, found '4'",
            ),
        )
    ),
    (triton("keep_versions = 0"), "triton.keep_versions: expected int >= 1, found 0"),
    (triton('provenance = "yes"'), "triton.provenance: expected bool, found 'yes'"),
    (
        triton('release = "26.13"'),
        'triton.release: expected a release of Triton\'s containers, such as "26.08", found \'26.13\'',
    ),
    (triton('device = "cpu"'), "formats: expected no tensorrt, since triton.device = \"cpu\", found ['torchscript', "
     "'onnx', 'tensorrt']"),
    (triton("onnx = 3"), "triton.onnx: expected a table, found 3"),
    (
        triton("tensorrt = { dynamic_batching = {} }", 'formats = ["onnx"]'),
        "triton.tensorrt: expected nothing, since formats does not contain tensorrt, found {'dynamic_batching': {}}",
    ),
    (
        triton("ensemble = { response_cache = { enable = true } }"),
        "triton.ensemble: expected nothing, since there is no ensemble, found {'response_cache': {'enable': True}}",
    ),
    # Batches
    (
        of_format("onnx", "max_batch_size = 16"),
        "triton.onnx.max_batch_size: expected at most 8, the max_batch_size above the tables, found 16",
    ),
    (
        spec("[engine]\nmax_batch_size = 4\n[triton.tensorrt]\nmax_batch_size = 8"),
        "triton.tensorrt.max_batch_size: expected at most 4, the largest batch of the engine's profile, found 8",
    ),
    (of_format("onnx", "max_batch_size = -1"), "triton.onnx.max_batch_size: expected int >= 0, found -1"),
    (
        batching("preferred_batch_size = [4, 16]"),
        "triton.dynamic_batching.preferred_batch_size: expected 1 to max_batch_size, 8, found 16",
    ),
    (
        spec("[triton.onnx]\nmax_batch_size = 4\ndynamic_batching = { preferred_batch_size = [8] }"),
        "triton.onnx.dynamic_batching.preferred_batch_size: expected 1 to max_batch_size, 4, found 8",
    ),
    (
        spec("[onnx]\ndynamic_axes = false\n[triton.onnx]\ndynamic_batching = {}"),
        "triton.onnx.dynamic_batching: expected false, or the policies of a queue, since onnx.dynamic_axes = false fixes "
        "the batch, which leaves nothing to batch, found {}",
    ),
    (
        of_format("onnx", "max_batch_size = 1\ndynamic_batching = {}"),
        "triton.onnx.dynamic_batching: expected false, or the policies of a queue, since max_batch_size = 1 leaves nothing "
        "to batch, found {}",
    ),
    (
        spec("[onnx]\ndynamic_axes = false\n[triton.onnx]\nsequence_batching = {}"),
        "triton.onnx.sequence_batching: expected false in [triton.onnx], since onnx.dynamic_axes = false fixes the batch, found {}",
    ),
    (
        spec("[onnx]\ndynamic_axes = false\n[triton.onnx]\ndynamic_batching = { preferred_batch_size = [1] }"),
        "triton.onnx.dynamic_batching.preferred_batch_size: expected nothing, since onnx.dynamic_axes = false fixes the "
        "batch, which leaves nothing to batch, found [1]",
    ),
    # Queues
    (
        batching("priority_levels = 3"),
        "triton.dynamic_batching.default_priority_level: expected 1 to priority_levels, 3, found 0",
    ),
    (
        batching("priority_levels = 2\ndefault_priority_level = 1\n".replace("\n", ", ")
                 + "priority_queue_policy = { 3 = { max_queue_size = 4 } }"),
        "triton.dynamic_batching.priority_queue_policy: expected levels from 1 to priority_levels, 2, found 3",
    ),
    (
        batching("default_priority_level = 1"),
        "triton.dynamic_batching.default_priority_level: expected nothing, since there are no priority_levels, found 1",
    ),
    (
        batching("preserve_ordering = true, priority_levels = 2, default_priority_level = 1"),
        "triton.dynamic_batching.preserve_ordering: expected false, since there are 2 priority_levels, found true",
    ),
    (
        batching('preserve_ordering = true, default_queue_policy = { timeout_action = "DELAY" }'),
        "triton.dynamic_batching.default_queue_policy.timeout_action: expected REJECT, since preserve_ordering = true, "
        "found 'DELAY'",
    ),
    (
        batching("max_queue_delay_microseconds = 500, default_queue_policy = { default_timeout_microseconds = 400 }"),
        "triton.dynamic_batching.default_queue_policy.default_timeout_microseconds: expected more than "
        "max_queue_delay_microseconds, 500, since a single request waits that long, found 400",
    ),
    # Sequences
    (
        triton("sequence_batching = {}\ndynamic_batching = {}"),
        "triton: expected one of dynamic_batching and sequence_batching, found both",
    ),
    (
        triton('sequence_batching = { control_input = [{ name = "START" }] }'),
        "triton.sequence_batching.control_input[0].control: expected one control, found none",
    ),
    (
        triton("sequence_batching = { oldest = { preferred_batch_size = [9] } }"),
        "triton.sequence_batching.oldest.preferred_batch_size: expected 1 to max_batch_size, 8, found 9",
    ),
    (
        triton("sequence_batching = {}\nresponse_cache = { enable = true }"),
        "triton.response_cache: expected nothing, since Triton does not cache sequences, found enable = true",
    ),
    # Instances
    (triton("instance_group = []"), "triton.instance_group: expected at least one group, found []"),
    (triton("instance_group = [{ count = 0 }]"), "triton.instance_group[0].count: expected int >= 1, found 0"),
    (
        of_format("onnx", 'instance_group = [{ kind = "KIND_CPU", gpus = [0] }]'),
        "triton.onnx.instance_group[0].gpus: expected nothing, since kind = KIND_CPU, found [0]",
    ),
    (
        triton("instance_group = [{ gpus = [1, 1] }]"),
        "triton.instance_group[0].gpus: expected numbers of GPUs, each once, found [1, 1]",
    ),
    (
        of_format("tensorrt", 'instance_group = [{ kind = "KIND_CPU" }]'),
        "triton.tensorrt.instance_group[0].kind: expected KIND_GPU, since a plan runs on a GPU, found 'KIND_CPU'",
    ),
    (
        triton('device = "cpu"\ninstance_group = [{ kind = "KIND_GPU" }]', 'formats = ["onnx"]'),
        "triton.instance_group[0].kind: expected KIND_CPU, since triton.device = \"cpu\", found 'KIND_GPU'",
    ),
    (
        of_format("onnx", 'instance_group = [{ profile = ["0"] }]'),
        "triton.onnx.instance_group[0].profile: expected nothing, since only plans have profiles, found ['0']",
    ),
    (
        of_format("tensorrt", 'instance_group = [{ profile = ["99999999999"] }]'),
        "triton.tensorrt.instance_group[0].profile: expected [\"0\"], since the engine has one profile (engine.profiles), "
        "found ['99999999999']",
    ),
    (
        triton("instance_group = [{ passive = true }]"),
        "triton.instance_group: expected a group that is not passive, to answer requests, found only passive groups",
    ),
    (
        triton("instance_group = [{ rate_limiter = { resources = [{ name = 'R' }] } }]"),
        "triton.instance_group[0].rate_limiter.resources: expected resources with a name and a count >= 1, found 'R', 0",
    ),
    # Versions
    (
        triton("version_policy = { latest = { num_versions = 2 } }"),
        "triton.version_policy.latest.num_versions: expected 1 to triton.keep_versions, 1, found 2",
    ),
    (triton("version_policy = {}"), "triton.version_policy: expected one of latest, all, specific, found {}"),
    (
        triton("keep_versions = 2\nversion_policy = { specific = { versions = [1, 2, 3] } }"),
        "triton.version_policy.specific.versions: expected at most triton.keep_versions, 2, found 3, [1, 2, 3]",
    ),
    # Warm-up
    (warm_up(f'name = "w", {ZEROS}'), "triton.model_warmup[0].batch_size: expected 1 to max_batch_size, 8, found 0"),
    (
        warm_up(f'name = "w", batch_size = 9, {ZEROS}'),
        "triton.model_warmup[0].batch_size: expected 1 to max_batch_size, 8, found 9",
    ),
    (
        warm_up('name = "w", batch_size = 1, inputs = { INPUT__0 = { data_type = "TYPE_FP32", dims = [3] } }'),
        "triton.model_warmup[0].inputs.INPUT__0: expected one of zero_data, random_data, input_data_file, "
        "found none of them",
    ),
    (
        warm_up('name = "w", batch_size = 1, inputs = { INPUT__0 = { dims = [3], input_data_file = "no" } }'),
        "triton.model_warmup[0].inputs.INPUT__0.input_data_file: expected a file in models/m/warmup/, found 'no'",
    ),
    # Fields that only some backends read
    (
        of_format("onnx", "optimization = { cuda = { graphs = true } }"),
        "triton.onnx.optimization.cuda: expected nothing in onnx, since only TensorRT's backend reads it, "
        "found {'graphs': True}",
    ),
    (
        of_format("tensorrt", "optimization = { cuda = { graphs = true, graph_spec = [{ batch_size = 16 }] } }"),
        "triton.tensorrt.optimization.cuda.graph_spec[0].batch_size: expected 1 to 8, the batches of the engine, found 16",
    ),
    (
        of_format("onnx", "optimization = { graph = { level = 3 } }"),
        "triton.onnx.optimization.graph.level: expected one of -1 (basic), 0 (all), 1 (extended), 2 (none), found 3",
    ),
    (
        of_format("onnx", "optimization = { execution_accelerators = { gpu_execution_accelerator = [{ name = 'tensorr' }] } }"),
        "triton.onnx.optimization.execution_accelerators.gpu_execution_accelerator[0].name: expected one of tensorrt, "
        "cuda, found 'tensorr' (did you mean 'tensorrt'?)",
    ),
    (
        of_format(
            "onnx",
            "optimization = { execution_accelerators = { gpu_execution_accelerator = [{ name = 'tensorrt', "
            "parameters = { precision = 'FP16' } }] } }",
        ),
        "triton.onnx.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters: expected parameters of "
        "tensorrt, found 'precision' (did you mean 'precision_mode'?)",
    ),
    (
        triton("model_transaction_policy = { decoupled = true }"),
        "triton.model_transaction_policy.decoupled: expected false, since each image has one answer, found true",
    ),
    (
        triton('parameters = { "provenance.1.build" = "mine" }'),
        "triton.parameters.provenance.1.build: expected another name, since publish writes parameters of this name, "
        "found 'provenance.1.build'",
    ),
    (
        triton("parameters = { trained = 2026-01-01 }"),
        "triton.parameters.trained: expected a string, a number or a boolean, found date 2026-01-01",
    ),
    (
        triton('instance_group = [{ kind = ["KIND_GPU"] }]'),
        "triton.instance_group[0].kind: expected one of KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL, found ['KIND_GPU'] (did you mean 'KIND_GPU'?)",
    ),
    (
        spec("[engine]\nmin_batch_size = 4\n[triton.tensorrt]\nmax_batch_size = 2"),
        "triton.tensorrt.max_batch_size: expected at least 4, the smallest batch of the engine's profile, found 2",
    ),
    # Ensembles
    (triton('onnx = { max_batch_size = "8" }', ENSEMBLE), "triton.onnx.max_batch_size: expected int >= 0, found '8'"),
    (triton("onnx = false", ENSEMBLE), "triton.onnx: expected a table, found False"),
    (
        spec("[triton.preprocess]\ninstance_group = [{ gpus = [0] }]", ENSEMBLE),
        "triton.preprocess.instance_group[0].gpus: expected nothing, since kind = KIND_CPU, found [0]",
    ),
    (
        spec("[engine]\nkeep_io_types = false", 'ensemble = "tensorrt"'),
        "ensemble: expected engine.keep_io_types = true, since the ensemble prepares pictures in fp32, found false",
    ),
    (
        triton("", 'ensemble = "onnx"\nformats = ["torchscript"]'),
        "ensemble: expected one of the served formats, torchscript, found 'onnx'",
    ),
    (
        spec("[onnx]\ndynamic_axes = false", ENSEMBLE),
        "ensemble: expected a format with an open batch (onnx.dynamic_axes = true), found 'onnx'",
    ),
    (
        spec("[input]\nshape = [2, 28, 28]", ENSEMBLE),
        "ensemble: expected nothing, since pictures have 1, 3 or 4 channels (or set input.files), found input.shape = "
        "[2, 28, 28]",
    ),
    (
        spec("[triton.ensemble]\ninstance_group = [{ count = 2 }]", ENSEMBLE),
        "triton.ensemble.instance_group: expected nothing, since an ensemble has none of its own, found [{'count': 2}]",
    ),
    # Releases
    (
        spec('[onnx]\nopset = 23\n[triton]\nrelease = "24.10"'),
        "onnx.opset: expected at most 21, the newest opset that Triton 24.10 reads, or triton.release = '25.08' or newer, found 23",
    ),
    # Packages of AOTInductor
    (
        triton('release = "26.02"', AOTI),
        "formats: expected no aoti, since Triton 26.02 has no platform torch_aoti (26.03 and newer have it), found ['aoti']",
    ),
    (
        triton('release = "26.06"\ndynamic_batching = {}', AOTI),
        "triton.dynamic_batching: expected false in [triton.aoti], since Triton 26.06 would answer each request with the rows of all of them (26.07 and newer do not), found {}",
    ),
    (
        spec('[triton]\nrelease = "26.03"\n[triton.aoti]\nsequence_batching = {}', AOTI),
        "triton.aoti.sequence_batching: expected false in [triton.aoti], since Triton 26.03 would answer each request with the rows of all of them (26.07 and newer do not), found {}",
    ),
    (
        triton('release = "26.06"\ninstance_group = [{ count = 2 }]', AOTI),
        "triton.instance_group: expected one instance in [triton.aoti], since Triton 26.06 does not load a second one, found 2",
    ),
    (
        spec('[triton.aoti]\nparameters = { INTRA_OP_THREAD_COUNT = 2 }', AOTI),
        "triton.aoti.parameters: expected INTRA_OP_THREAD_COUNT, which torchscript reads, or a name unlike it, since Triton ignores this one, found 'INTRA_OP_THREAD_COUNT'",
    ),
    (
        spec('[aoti]\ncompute_capabilities = ["9.0"]\n[triton]\ndevice = "cpu"', AOTI),
        "aoti.compute_capabilities: expected nothing, since triton.device = \"cpu\", found ['9.0']",
    ),
    (
        spec('[[inputs]]\nname = "image"\nshape = [3, 8, 8]\ndtype = "float32"', AOTI),
        "inputs[0].name: expected 'INPUT__0', since Triton's torch_aoti finds tensors by their place (formats), found 'image'",
    ),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty project; stages find the modules that they declare in it."""
    (tmp_path / "build_tasks").symlink_to(ROOT / "build_tasks")
    monkeypatch.chdir(tmp_path)


def load_model(text: str) -> Model:
    folder = Path("models/m")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.toml").write_text(text)
    [model] = load()
    return model


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "line"), WRONG, ids=[line.partition(": expected")[0] for _, line in WRONG])
def test_a_wrong_spec_is_refused_with_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(text)
    assert str(error.value) == f"{PATH}: {line}"


# Mistakes that only the artifact shows.


def derive_config(text: str, model_format: str, *plans: dict[str, Any], labels: int | None = None) -> ModelConfig:
    """Return the config.pbtxt that the stage `config` writes for artifacts with these signatures."""
    model = load_model(text)
    files = model.files(model_format)[: len(plans)]
    Path("build/m").mkdir(parents=True, exist_ok=True)
    for file, signature in zip(files, plans, strict=True):
        Path(model.artifact(f"{file}.signature.json")).write_text(json.dumps(signature))
    if labels is not None:
        Path("build/m/labels.txt").write_text("class\n" * labels)
    stage = config.task(model, model_format, files)["meta"]["stage"]
    stage.build(stage.inputs, stage.outputs, stage.settings)
    return text_format.Parse(Path(stage.outputs["config"]).read_text(), ModelConfig())


PROFILES = """
[[engine.profiles]]
max_batch_size = 1
[[engine.profiles]]
min_batch_size = 1
opt_batch_size = 4
max_batch_size = 8
"""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("lines", ["", "[triton.tensorrt]\ninstance_group = [{ count = 2 }, { profile = ['1'] }]\n"])
def test_all_profiles_of_a_plan_are_served_and_warmed_up(lines: str) -> None:
    """Without `profile`, Triton's TensorRT backend uses the first profile alone."""
    shape = [3, 160, 160]
    batches = [(1, 1, 1), (1, 4, 8)]
    points = [dict(zip(("min", "opt", "max"), ([size, *shape] for size in each), strict=True)) for each in batches]
    signature = {**plan(), "profiles": [{"INPUT__0": each} for each in points]}
    parsed = derive_config(spec(PROFILES + lines), "tensorrt", signature)
    assert parsed.max_batch_size == 8
    assert [list(group.profile) for group in parsed.instance_group] == [["0", "1"], ["1"]][: 1 + bool(lines)]
    assert [(each.name, each.batch_size) for each in parsed.model_warmup] == [
        ("batch of 8", 8),
        ("batch of 1", 1),
        ("profile 1", 4),
    ]


ARTIFACT = [
    (
        warm_up('name = "w", batch_size = 1, inputs = { x = { zero_data = true } }'),
        tensors(),
        "triton.model_warmup[0].inputs: expected the model's inputs, INPUT__0, found 'x'",
    ),
    (
        warm_up(f'name = "w", batch_size = 1, {ZEROS.replace("160, 160", "224, 224")}'),
        tensors(),
        "triton.model_warmup[0].inputs.INPUT__0.dims: expected [3, 160, 160], the dims of the model, found [3, 224, 224]",
    ),
    (
        warm_up(f'name = "w", batch_size = 1, {ZEROS.replace("FP32", "UINT8")}'),
        tensors(),
        "triton.model_warmup[0].inputs.INPUT__0.data_type: expected TYPE_FP32, found TYPE_UINT8",
    ),
    (
        triton('release = "24.10"'),
        tensors(ir_version=11),
        "triton.release: the graph has IR version 11, and Triton 24.10 has ONNX Runtime 1.19.2, which reads 10 at most",
    ),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "signature", "line"), ARTIFACT, ids=[line.split(":")[0] for *_, line in ARTIFACT])
def test_a_spec_that_contradicts_the_artifact_is_refused_with_one_line(
    text: str, signature: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as error:
        derive_config(text, "onnx", signature)
    assert str(error.value) == f"{PATH}: {line}"


RIGHT = {
    "a note of the user": triton('parameters = { owner = "vision", "trained on" = "2026-01-01", threads = 4 }'),
    "parameters of each format": spec(
        """
        [triton.torchscript]
        parameters = { INTRA_OP_THREAD_COUNT = 2, ENABLE_CACHE_CLEANING = true, INFERENCE_MODE = "ON" }
        [triton.onnx]
        parameters = { intra_op_thread_count = 2, execution_mode = 1, "memory.enable_memory_arena_shrinkage" = "cpu:0;gpu:0" }
        [triton.tensorrt]
        parameters = { execution_context_allocation_strategy = "ON_PROFILE_CHANGE" }
        """
    ),
    "a parameter for all formats that one of them reads": triton("parameters = { INTRA_OP_THREAD_COUNT = 2 }"),
    "the arena of one GPU": of_format(
        "onnx", 'instance_group = [{ gpus = [1] }]\nparameters = { "memory.enable_memory_arena_shrinkage" = "gpu:1" }'
    ),
    "fields of the release": triton("model_metrics = { metric_control = [] }"),
    "load shedding with batch 1": of_format(
        "onnx", "max_batch_size = 1\ndynamic_batching = { default_queue_policy = { max_queue_size = 16 } }"
    ),
    "load shedding with a fixed batch": spec(
        "[onnx]\ndynamic_axes = false\n[triton.onnx.dynamic_batching]\npriority_levels = 2\ndefault_priority_level = 2\n"
        "default_queue_policy = { default_timeout_microseconds = 200000, allow_timeout_override = true }"
    ),
    "the precision of TensorRT 10": spec(
        '[triton]\nrelease = "26.05"\n[triton.onnx.optimization.execution_accelerators]\n'
        'gpu_execution_accelerator = [{ name = "tensorrt", parameters = { precision_mode = "BF16" } }]'
    ),
    "a limit of the ensemble": spec("[triton.ensemble.ensemble_scheduling]\nmax_inflight_requests = 4", ENSEMBLE),
    "a file of the right size": warm_up(
        'name = "w", batch_size = 1, inputs = { INPUT__0 = { data_type = "TYPE_FP32", dims = [3, 160, 160], '
        'input_data_file = "zeros" } }'
    ),
    "a tag of the metrics": triton('metric_tags = { team_1 = "vision" }'),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_spec_is_accepted(name: str) -> None:
    Path("models/m/warmup").mkdir(parents=True)
    Path("models/m/warmup/zeros").write_bytes(bytes(4 * 3 * 160 * 160))
    load_model(RIGHT[name])


@pytest.mark.parametrize("value", ["gpu:9", "gpu:0", "cpu:1", "CPU:0", "cpu:0;gpu:0", " cpu:0", "cpu:0", "cpu:0;cpu:0"])
@pytest.mark.usefixtures("folder")
def test_a_list_of_memory_arenas_is_accepted_exactly_if_onnx_runtime_accepts_it(value: str) -> None:
    """On a machine without a GPU, whose session has the arena of the CPU alone."""
    import onnx.parser
    import onnxruntime

    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", value)
    try:
        session.run(None, {"x": np.ones(1, np.float32)}, options)
        runs = True
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
        runs = False
    text = triton(
        f'device = "cpu"\nparameters = {{ "memory.enable_memory_arena_shrinkage" = "{value}" }}', 'formats = ["onnx"]'
    )
    if runs:
        load_model(text)
    else:
        with pytest.raises(UserError, match="expected cpu:0, the memory arenas that every instance has"):
            load_model(text)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("release", "lines", "limit"),
    [
        ("25.10", "", 0),
        ("25.11", "", 64),
        ("26.08", "", 64),
        ("26.08", "[triton.onnx]\ninstance_group = [{ count = 4, gpus = [0, 1] }]", 4 * 8 * 8),
        ("26.08", "[triton.ensemble.ensemble_scheduling]\nmax_inflight_requests = 5", 5),
        ("26.08", "[triton.ensemble.ensemble_scheduling]\nmax_inflight_requests = 0", 0),
    ],
)
def test_an_ensemble_limits_the_requests_that_wait_in_memory(release: str, lines: str, limit: int) -> None:
    text = spec(f'[triton]\nrelease = "{release}"\n{lines}', ENSEMBLE)
    derive_config(text, "onnx", tensors())
    model = load_model(text)
    pictures = {
        "inputs": [{"name": "IMAGE", "dtype": "bytes", "shape": [-1, 1]}],
        "outputs": [{"name": "INPUT__0", "dtype": "float32", "shape": [-1, 3, 160, 160]}],
    }
    Path("build/m/preprocess.signature.json").write_text(json.dumps(pictures))
    first = config.task(model, "preprocess", ["preprocess"])
    both = [task["meta"]["stage"] for task in (first, config.ensemble_task(model, steps_of(model, [model])))]
    for stage in both:
        stage.build(stage.inputs, stage.outputs, stage.settings)
    parsed = text_format.Parse(Path(both[1].outputs["config"]).read_text(), ModelConfig())
    assert parsed.ensemble_scheduling.max_inflight_requests == limit
    assert len(parsed.ensemble_scheduling.step) == 2


STEPS = """
[[ensemble.steps]]
model = "m_onnx"
[[ensemble.steps]]
model = "m_preprocess"
"""


@pytest.mark.usefixtures("folder")
def test_the_short_form_of_an_ensemble_is_the_steps_that_it_stands_for() -> None:
    pictures = {
        "inputs": [{"name": "IMAGE", "dtype": "bytes", "shape": [-1, 1]}],
        "outputs": [{"name": "INPUT__0", "dtype": "float32", "shape": [-1, 3, 160, 160]}],
    }
    texts = []
    for text in (spec("", ENSEMBLE), spec(STEPS)):
        derive_config(text, "onnx", tensors())
        Path("build/m/preprocess.signature.json").write_text(json.dumps(pictures))
        model = load_model(text)
        tasks = (
            config.task(model, "preprocess", ["preprocess"]),
            config.ensemble_task(model, steps_of(model, [model])),
        )
        for stage in (task["meta"]["stage"] for task in tasks):
            stage.build(stage.inputs, stage.outputs, stage.settings)
        texts.append(Path("build/m/model.ensemble.config.pbtxt").read_text())
    assert [line.partition("signature")[0] for line in texts[0].splitlines()] == [
        line.partition("signature")[0] for line in texts[1].splitlines()
    ]


@pytest.mark.usefixtures("folder")
def test_there_must_be_one_label_for_each_class() -> None:
    top = 'labels = "labels.txt"'
    with pytest.raises(
        UserError, match=r"labels: expected one label for each of the 1000 classes of OUTPUT__0, found 999 labels"
    ):
        derive_config(spec("", top), "onnx", tensors(), labels=999)
    assert derive_config(spec("", top), "onnx", tensors(), labels=1000).output[0].label_filename == "labels.txt"


def test_there_are_at_least_forty_wrong_specs() -> None:
    assert len({text for text, _ in WRONG}) + len(ARTIFACT) >= 40


# Configs of plans. A machine without a GPU cannot build plans, so the signatures are made up.


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("model_format", "name"), [*(("tensorrt", name) for name in PLANS), *(("aoti", name) for name in PACKAGES)]
)
def test_the_config_of_a_plan_or_package_is_the_golden_one(model_format: str, name: str) -> None:
    """Packages: before 26.07, requests are not batched, and there is one instance, since others would not load."""
    text, artifacts = {**PLANS, **PACKAGES}[name]
    assert derive_config(text, model_format, *artifacts) == text_format.Parse(
        (ROOT / f"tests/triton/golden/{name}.pbtxt").read_text(), ModelConfig()
    )


@pytest.mark.usefixtures("folder")
def test_an_instance_on_another_device_than_the_package_is_refused() -> None:
    text = spec("[triton.aoti]\ninstance_group = [{ kind = 'KIND_GPU' }]", AOTI)
    with pytest.raises(UserError, match="expected KIND_CPU, since the package was compiled for it, found 'KIND_GPU'"):
        derive_config(text, "aoti", package("cpu"))


# Releases of Triton.


def test_the_table_of_releases_has_every_month_and_a_source_for_each_row() -> None:
    months = [f"{year}.{month:02}" for year in (23, 24, 25, 26) for month in range(1, 13)]
    assert list(release_table.RELEASES) == [month for month in months if "23.10" <= month <= "26.11"]
    rows = release_table.RELEASES.values()
    assert all(row.source for row in rows)
    numbers = [[int(part) for part in row.triton.split(".")] for row in rows]
    assert numbers == sorted(numbers)
    assert (release_table.RELEASES["26.10"].triton, release_table.RELEASES["26.11"].triton) == ("2.74.0", "2.75.0")
    for library in ("onnxruntime", "pytorch", "cuda"):  # load_warning relies on it: no release has an older library
        versions = [[int(part) for part in version.split(".")] for row in rows if (version := getattr(row, library))]
        assert versions == sorted(versions), library
    assert {row.onnxruntime.rpartition(".")[0] for row in rows if row.onnxruntime} <= release_table.ONNX_RUNTIME.keys()


def test_the_table_of_changes_names_known_releases_formats_and_sources() -> None:
    for change in release_table.CHANGES:
        assert change.release in release_table.RELEASES
        assert set(change.model_formats) <= TRITON_MODELS.keys()
        assert change.text
        assert change.source
    assert [change.release for change in release_table.CHANGES] == sorted(c.release for c in release_table.CHANGES)


@pytest.mark.parametrize(
    ("release", "opset", "ir_version", "message"),
    [
        ("26.09", 26, 13, None),
        ("26.09", 27, 13, "the graph has opset 27, and Triton 26.09 has ONNX Runtime 1.30.0, which reads 26 at most"),
        (
            "26.09",
            26,
            14,
            "the graph has IR version 14, and Triton 26.09 has ONNX Runtime 1.30.0, which reads 13 at most",
        ),
        # Which ONNX Runtime it has is unknown, and no older one than that of 26.09.
        ("26.11", 26, 13, None),
        ("26.11", 27, 13, "which ONNX Runtime Triton 26.11 has is unknown"),
        (
            "26.12",
            17,
            8,
            "Triton 26.12 is unknown here (known: 23.10 to 26.11, in release_table.py): it was not checked",
        ),
        (
            "23.09",
            17,
            8,
            "Triton 23.09 is unknown here (known: 23.10 to 26.11, in release_table.py): it was not checked",
        ),
    ],
)
def test_a_graph_needs_a_release_that_reads_it(release: str, opset: int, ir_version: int, message: str | None) -> None:
    signature = tensors(opset=opset, ir_version=ir_version)
    found = releases.load_error(release, "onnx", signature) or releases.load_warning(release, "onnx", signature)
    assert (found or "").startswith(message or "")
    assert bool(found) == bool(message)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("model_format", "release", "reason"),
    [
        ("onnx", "26.03", None),
        ("onnx", "26.02", "INPUT__0, OUTPUT__0 has the dtype bfloat16, which Triton 26.02 cannot serve; Triton 26.03"),
        ("tensorrt", "26.08", None),
        ("aoti", "26.11", None),
        ("aoti", "26.10", "INPUT__0, OUTPUT__0 has the dtype bfloat16, which Triton 26.10 cannot serve; Triton 26.11"),
        ("torchscript", "26.11", "INPUT__0, OUTPUT__0 has the dtype bfloat16, which Triton 26.11 cannot serve"),
    ],
)
def test_tensors_in_bf16_need_a_backend_that_has_them(model_format: str, release: str, reason: str | None) -> None:
    signature = plan(PyTorch="2.14.1")
    for tensor in (*signature["inputs"], *signature["outputs"]):
        tensor["dtype"] = "bfloat16"
    if model_format != "tensorrt":
        del signature["profiles"]
    text = triton(f'release = "{release}"', f'formats = ["{model_format}"]')
    if reason is None:
        parsed = derive_config(text, model_format, signature)
        assert {tensor.data_type for tensor in (*parsed.input, *parsed.output)} == {DataType.Value("TYPE_BF16")}
        assert parsed.model_warmup[0].inputs["INPUT__0"].data_type == DataType.Value("TYPE_BF16")
    else:
        with pytest.raises(UserError, match=re.escape(reason)):
            derive_config(text, model_format, signature)


@pytest.mark.parametrize(
    ("release", "built", "compatible", "loads"),
    [
        ("26.08", "11.2.1.2", False, True),
        ("26.08", "11.2.1", False, True),
        ("26.08", "11.2.1.3", False, False),
        ("26.08", "11.1.0.106", False, False),
        ("26.08", "11.1.0.106", True, True),
        ("26.08", "10.16.1.11", True, True),
        ("26.08", "11.3.0.99", True, False),
        ("24.10", "10.5.0.18", False, True),  # the release has 10.5, the rest is unknown
        ("24.10", "10.6.0.26", False, False),
        ("26.01", "10.14.1.48", False, True),  # the release's version is unknown
    ],
)
def test_a_plan_needs_a_release_with_its_tensorrt(release: str, built: str, compatible: bool, loads: bool) -> None:
    signature = {"TensorRT": built, "version_compatible": compatible}
    assert (releases.load_error(release, "tensorrt", signature) is None) == loads
    if release == "26.01":
        assert "which TensorRT Triton 26.01 has is unknown" in str(
            releases.load_warning(release, "tensorrt", signature)
        )


def test_every_server_gets_the_option_that_a_version_compatible_plan_needs() -> None:
    from build_tasks.serving import triton_server

    option = releases.VERSION_COMPATIBLE_OPTION
    assert releases.server_option([plan(), plan(version_compatible=False)]) is None
    assert str(releases.server_option([plan(), plan(version_compatible=True)])).startswith(option)
    for kind in ("local", "core"):
        launched = triton_server.launch(kind, "26.08", triton_server.Ports(), "127.0.0.1", None, "key")
        assert option in launched.command
    in_docker = triton_server.launch("docker", "26.08", triton_server.Ports(), "127.0.0.1", None, "key").command
    assert option in in_docker[-1]
    assert json.loads((ROOT / "Dockerfile").read_text().rpartition("CMD ")[2])[-1] == option


def test_a_newer_pytorch_gives_a_warning_and_no_error() -> None:
    signature = {"PyTorch": "2.14.1"}
    assert releases.load_error("25.05", "torchscript", signature) is None
    assert "traced with PyTorch 2.14.1, and Triton 25.05 has 2.8" in str(
        releases.load_warning("25.05", "torchscript", signature)
    )
    assert releases.load_warning("26.08", "torchscript", signature) is None
    assert "Triton 29.01 is unknown here" in str(releases.load_warning("29.01", "torchscript", signature))


@pytest.mark.usefixtures("folder")
def test_container_images_follow_from_the_release() -> None:
    from build_tasks.serving import container, triton_server

    model = load_model(triton('release = "25.05"'))
    assert "nvcr.io/nvidia/tensorrt:25.05-py3" in container.commands([model])[0]
    start = triton_server.launch("docker", model.release, triton_server.Ports(), "127.0.0.1", None, "key")
    assert "nvcr.io/nvidia/tritonserver:25.05-py3" in start.command
    assert "127.0.0.1:8000:8000" in start.command


@pytest.mark.usefixtures("folder")
def test_a_smallest_batch_above_one_is_noted() -> None:
    model = load_model(spec(""))
    Path("build/m").mkdir(parents=True)
    signature = plan()
    signature["profiles"][0]["INPUT__0"]["min"][0] = 4
    Path("build/m/model.plan.signature.json").write_text(json.dumps(signature))
    stage = config.task(model, "tensorrt", ["model.plan"])["meta"]["stage"]
    notes = stage.build(stage.inputs, stage.outputs, stage.settings)
    assert notes["smallest batch"] == "4, below which a request fails (engine.min_batch_size)"
    parsed = text_format.Parse(Path(stage.outputs["config"]).read_text(), ModelConfig())
    assert [sample.batch_size for sample in parsed.model_warmup] == [8, 4]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("lines", "model_format", "expected"),
    [
        ('device = "gpu"', "torchscript", [8, 7, 6, 5, 4, 3, 2, 1]),
        ('device = "gpu"\nwarm_up = 3', "torchscript", [8, 3, 2, 1]),
        ('device = "gpu"\nwarm_up = 1', "torchscript", [8, 1]),
        ('device = "gpu"\n[triton.torchscript]\nmax_batch_size = 3', "torchscript", [3, 2, 1]),
        ('device = "gpu"', "onnx", [8, 1]),
        ('device = "cpu"', "torchscript", [8, 1]),
        ("", "torchscript", [8, 1]),
    ],
)
def test_torchscript_is_warmed_up_at_every_batch_on_a_gpu_from_the_largest_down(
    lines: str, model_format: str, expected: list[int]
) -> None:
    more = 'formats = ["torchscript", "onnx"]'
    parsed = derive_config(triton(lines, more), model_format, tensors(PyTorch="2.14.1"))
    count = 2 if model_format == "torchscript" else 0
    assert [(sample.batch_size, sample.count) for sample in parsed.model_warmup] == [(size, count) for size in expected]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("lines", "torchscript", "onnx"),
    [
        ("cores = 1", (1, "1"), (1, "1")),
        ("cores = 16", (16, "1"), (16, "1")),
        # What the spec sets stays, and the rest follows.
        ("cores = 16\ninstance_group = [{ count = 4 }]", (4, "4"), (4, "4")),
        ("cores = 16\ninstance_group = [{ count = 3 }, {}]", (3, "4"), (3, "4")),
        ("cores = 2\ninstance_group = [{ count = 8 }]", (8, "1"), (8, "1")),
        ("cores = 16\n[triton.onnx]\nparameters = { intra_op_thread_count = 4 }", (16, "1"), (4, "4")),
        ("cores = 16\n[triton.onnx]\nparameters.intra_op_thread_count.string_value = '5'", (16, "1"), (3, "5")),
        ("cores = 16\n[triton.onnx]\nparameters = { intra_op_thread_count = 0 }", (16, "1"), (1, "0")),
        ("cores = 16\nparameters = { INTRA_OP_THREAD_COUNT = 8, owner = 'me' }", (2, "8"), (16, "1")),
        (
            "cores = 16\ninstance_group = [{ count = 2 }]\nparameters = { INTRA_OP_THREAD_COUNT = 3 }",
            (2, "3"),
            (2, "8"),
        ),
        # false leaves a default out, and so this one too.
        ("cores = 16\nparameters = false", (1, ""), (1, "")),
        ("cores = 16\ninstance_group = false", (0, ""), (0, "")),
        # Triton 24.04 cannot limit the threads of PyTorch.
        ("cores = 16\nrelease = '24.04'", (1, ""), (16, "1")),
        ("", (1, ""), (1, "")),
    ],
)
def test_instances_and_threads_follow_from_the_cores_of_a_cpu_server(
    lines: str, torchscript: tuple[int, str], onnx: tuple[int, str]
) -> None:
    text = triton(f'device = "cpu"\n{lines}', 'formats = ["torchscript", "onnx"]')
    for model_format, expected in {"torchscript": torchscript, "onnx": onnx}.items():
        parsed = derive_config(text, model_format, tensors(PyTorch="2.2.0"))
        count = parsed.instance_group[0].count if parsed.instance_group else 0
        threads = parsed.parameters[THREAD_PARAMETERS[model_format]].string_value
        assert (count, threads) == expected


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("cores", "processes", "limit"), [(2, 2, 64), (16, 4, 512)])
def test_an_ensemble_follows_the_cores_of_a_cpu_server(cores: int, processes: int, limit: int) -> None:
    text = spec(f'[triton]\ndevice = "cpu"\ncores = {cores}', f'{ENSEMBLE}\nformats = ["onnx"]')
    derive_config(text, "onnx", tensors())
    pictures = {
        "inputs": [{"name": "IMAGE", "dtype": "bytes", "shape": [-1, 1]}],
        "outputs": [{"name": "INPUT__0", "dtype": "float32", "shape": [-1, 3, 160, 160]}],
    }
    model = load_model(text)
    Path("build/m/preprocess.signature.json").write_text(json.dumps(pictures))
    first = config.task(model, "preprocess", ["preprocess"])["meta"]["stage"]
    first.build(first.inputs, first.outputs, first.settings)
    group = text_format.Parse(Path(first.outputs["config"]).read_text(), ModelConfig()).instance_group
    assert [each.count for each in group] == [processes]
    whole = config.ensemble_task(model, steps_of(model, [model]))["meta"]["stage"]
    whole.build(whole.inputs, whole.outputs, whole.settings)
    parsed = text_format.Parse(Path(whole.outputs["config"]).read_text(), ModelConfig())
    assert parsed.ensemble_scheduling.max_inflight_requests == limit


@pytest.mark.usefixtures("folder")
def test_a_release_that_cannot_limit_threads_is_noted_beside_the_cores() -> None:
    model = load_model(triton('device = "cpu"\ncores = 4\nrelease = "24.04"', 'formats = ["torchscript"]'))
    Path("build/m").mkdir(parents=True)
    Path("build/m/model.pt.signature.json").write_text(json.dumps(tensors(PyTorch="2.2.0")))
    stage = config.task(model, "torchscript", ["model.pt"])["meta"]["stage"]
    notes = stage.build(stage.inputs, stage.outputs, stage.settings)
    assert notes["cores"].startswith("triton.cores has no effect, since Triton 24.04 does not read INTRA_OP_THREAD")


@pytest.mark.usefixtures("folder")
def test_an_ensemble_accepts_no_larger_batch_than_its_steps() -> None:
    text = spec("[triton.preprocess]\nmax_batch_size = 2", ENSEMBLE)
    derive_config(text, "onnx", tensors())
    pictures = {
        "inputs": [{"name": "IMAGE", "dtype": "bytes", "shape": [-1, 1]}],
        "outputs": [{"name": "INPUT__0", "dtype": "float32", "shape": [-1, 3, 160, 160]}],
    }
    model = load_model(text)
    Path("build/m/preprocess.signature.json").write_text(json.dumps(pictures))
    first = config.task(model, "preprocess", ["preprocess"])["meta"]["stage"]
    first.build(first.inputs, first.outputs, first.settings)
    whole = config.ensemble_task(model, steps_of(model, [model]))["meta"]["stage"]
    assert whole.build(whole.inputs, whole.outputs, whole.settings)["max_batch_size"] == 2
    pictures["outputs"][0]["dtype"] = "uint8"
    Path("build/m/preprocess.signature.json").write_text(json.dumps(pictures))
    first.build(first.inputs, first.outputs, first.settings)
    message = r"m_onnx takes TYPE_FP32 \[3, 160, 160\], but m_preprocess makes TYPE_UINT8 \[3, 160, 160\]"
    with pytest.raises(UserError, match=message):
        whole.build(whole.inputs, whole.outputs, whole.settings)


@pytest.mark.usefixtures("folder")
def test_a_batch_that_an_option_fixes_for_one_run_contradicts_nothing() -> None:
    load_model(spec("[triton]\ndynamic_batching = {}", ENSEMBLE))
    [model] = load(overrides={"m": {("onnx", "dynamic_axes"): ("--no-dynamic_axes", False)}})
    assert model.largest_batch("onnx") == 0


def test_plans_of_another_profile_or_tensorrt_are_no_versions_of_one_model() -> None:
    settings = {"format": "tensorrt", "files": ["model.sm90.plan", "model.sm86.plan"]}
    properties = new_version.plan_properties(settings, [plan(8), plan(8)])
    assert json.loads(json.dumps(properties)) == properties, "JSON reads the same value"
    assert properties != new_version.plan_properties(settings, [plan(8), plan(4)])
    assert properties != new_version.plan_properties(settings, [plan(8, "11.3.0.99"), plan(8)])
    assert new_version.plan_properties({"format": "onnx", "files": ["model.onnx"]}, [tensors()]) == []
