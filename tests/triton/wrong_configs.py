"""Wrong configurations by kind: what Triton says of each, and what this project says.

`triton` is what a server of `source` does:

    refused: …   it does not load the model; the text is a part of its reason
    ignored      it loads the model, and the mistake has no effect, or another one than the user meant
    fails: …     it loads the model, and requests fail
    never loads  it does not load the model; where the warm-up of a Python model fails, it hangs or ends
    ends         the server ends

`python -m tests.triton.wrong_configs` prints the table. `source` is "core" for Triton's core of release 24.10, which tests/serving/test_core.py runs, or the file of a
backend or of a later core that was read: no backend but the Python one is in the core from PyPI.
"""

# ruff: noqa: E501  (one configuration a line)

from typing import NamedTuple

from build_tasks.text_table import format_table

CORE = "core"
LIBTORCH = "pytorch_backend: src/pt/model_state.cc"
ORT = "onnxruntime_backend: src/onnxruntime.cc"
TRT = "tensorrt_backend: src/model_state.cc"
STATES = "core: src/sequence_state.cc"
INITIAL = "core: src/sequence_batch_scheduler.cc"  # read, since one of three such models ended the core of 24.10
QUEUE = "core: src/scheduler_utils.cc, PolicyQueue::Enqueue"


class Wrong(NamedTuple):
    kind: str
    model_format: str
    lines: str  # below [triton.<model_format>]
    triton: str
    ours: str  # a part of the message
    source: str = CORE
    release: str = "24.10"
    pbtxt: str = ""  # for the core, where the protobuf cannot hold the fields


IMAGES = "inputs = { IMAGE = { data_type = 'TYPE_STRING', dims = [1], %s } }"
ZEROS = "inputs = { INPUT__0 = { data_type = 'TYPE_FP32', dims = [3, 160, 160], zero_data = true } }"


def of_file(name: str) -> str:
    return f"model_warmup = [{{ name = 'w', batch_size = 1, {IMAGES % f'input_data_file = {name!r}'} }}]"


def accelerator(text: str) -> str:
    return f"optimization = {{ execution_accelerators = {{ gpu_execution_accelerator = [{{ {text} }}] }} }}"


def queue(text: str, more: str = "") -> str:
    return f"dynamic_batching = {{ {more} default_queue_policy = {{ {text} }} }}"


START = "{ name = 'IMAGE', control = [{ int32_false_true = [0, 1] }] }"


def controls(text: str) -> str:
    return f"control_input = [{text}]"


def state(text: str) -> str:
    return f"state = [{{ input_name = 'A', output_name = 'B', data_type = 'TYPE_FP32', dims = [2], {text} }}]"


def batch_input(text: str) -> str:
    return f"batch_input = [{{ target_name = ['N'], {text} }}]"


METRICS = (
    "model_metrics = { metric_control = [{ metric_identifier = { family = 'x' }, "
    "histogram_options = { buckets = [1, 2] } }] }"
)

WRONG_CONFIGS = [
    # 1
    Wrong("fields of a later release", "preprocess", METRICS, 'refused: has no field named "model_metrics"', "24.11 and newer do"),
    Wrong("fields of a later release", "onnx", METRICS, 'refused: has no field named "model_metrics"', "24.11 and newer do"),
    Wrong("fields of a later release", "ensemble", "ensemble_scheduling = { max_inflight_requests = 4 }",
          'refused: has no field named "max_inflight_requests"', "25.11 and newer do"),
    Wrong("fields of a later release", "torchscript", "runtime = 'libtriton_pytorch.so'", "refused: has no field named \"runtime\"",
          "24.01 and newer do", "common: protobuf/model_config.proto, r23.12", "23.12"),
    Wrong("fields of a later release", "torchscript", "sequence_batching = { iterative_sequence = true }",
          "refused: has no field named \"iterative_sequence\"", "23.11 and newer do",
          "common: protobuf/model_config.proto, r23.10", "23.10"),
    # 2
    Wrong("unknown names and values", "onnx", "dynamic_batchin = {}", 'refused: has no field named "dynamic_batchin"',
          "did you mean 'dynamic_batching'?", pbtxt="dynamic_batchin {}"),
    Wrong("unknown names and values", "onnx", "instance_group = [{ kind = 'KIND_GPUS' }]",
          'refused: Unknown enumeration value of "KIND_GPUS"', "did you mean 'KIND_GPU'?", pbtxt="instance_group { kind: KIND_GPUS }"),
    Wrong("unknown names and values", "onnx", "dynamic_batching = { max_queue_delay_microseconds = -1 }",
          "refused: Expected integer", "int >= 0", pbtxt="dynamic_batching { max_queue_delay_microseconds: -1 }"),
    Wrong("unknown names and values", "onnx", "metric_tags = { team = 7 }", "refused: Expected string", "expected str",
          pbtxt='metric_tags { key: "team" value: 7 }'),
    Wrong("unknown names and values", "onnx", "version_policy = { latest = { num_versions = 1 }, all = {} }",
          "refused: ", "found both", pbtxt="version_policy { latest { num_versions: 1 } all {} }"),
    # 3
    Wrong("schedulers and batches", "onnx", "dynamic_batching = { preferred_batch_size = [9] }",
          "refused: dynamic batching preferred size must be <= max batch size", "1 to max_batch_size, 8, found 9"),
    Wrong("schedulers and batches", "onnx", "dynamic_batching = { preferred_batch_size = [0] }",
          "refused: dynamic batching preferred size must be positive", "1 to max_batch_size, 8, found 0"),
    Wrong("schedulers and batches", "onnx", "dynamic_batching = {}\nsequence_batching = {}", "refused: ", "found both",
          pbtxt="dynamic_batching {} sequence_batching {}"),
    Wrong("schedulers and batches", "onnx", "sequence_batching = { oldest = { preferred_batch_size = [9] } }",
          "refused: sequence batching preferred batch size must be <= max batch", "1 to max_batch_size, 8, found 9"),
    Wrong("schedulers and batches", "onnx", "sequence_batching = { direct = { minimum_slot_utilization = 1.5 } }",
          "refused: minimum slot utilization must be in range", "0 to 1"),
    Wrong("schedulers and batches", "onnx", "sequence_batching = {}\nresponse_cache = { enable = true }",
          "refused: Response Cache does not currently support model", "Triton does not cache sequences"),
    # 4
    Wrong("queues", "preprocess", queue("timeout_action = 'DELAY'"), "ignored", "default_timeout_microseconds = 0 is no timeout", QUEUE),
    Wrong("queues", "preprocess", queue("allow_timeout_override = true"), "ignored",
          "a request can only shorten default_timeout_microseconds, which is 0", QUEUE),
    Wrong("queues", "preprocess", queue("default_timeout_microseconds = 1"), "fails: Request timeout expired", "at least 100"),
    Wrong("queues", "preprocess", queue("default_timeout_microseconds = 1000", "max_queue_delay_microseconds = 5000,"),
          "fails: Request timeout expired", "more than max_queue_delay_microseconds, 5000"),
    Wrong("queues", "onnx", queue("default_timeout_microseconds = 5000, timeout_action = 'DELAY'", "preserve_ordering = true,"),
          "refused: Queue policy can not have DELAY as timeout action", "REJECT, since preserve_ordering = true"),
    Wrong("queues", "onnx", "max_batch_size = 1\ndynamic_batching = { max_queue_delay_microseconds = 500 }", "ignored",
          "leaves nothing to batch", "core: src/dynamic_batch_scheduler.cc, GetDynamicBatch: every request waits"),
    # 5
    Wrong("priorities", "onnx", "dynamic_batching = { priority_levels = 3 }", "refused: default priority level must be in range",
          "1 to priority_levels, 3, found 0"),
    Wrong("priorities", "onnx", "dynamic_batching = { priority_levels = 2, default_priority_level = 3 }",
          "refused: default priority level must be in range", "1 to priority_levels, 2, found 3"),
    Wrong("priorities", "onnx",
          "dynamic_batching = { priority_levels = 2, default_priority_level = 1, priority_queue_policy = { 3 = {} } }",
          "refused: priority queue policy must have priority level in range", "levels from 1 to priority_levels, 2, found 3"),
    Wrong("priorities", "onnx", "dynamic_batching = { priority_queue_policy = { 1 = { max_queue_size = 2 } } }", "ignored",
          "nothing, since there are no priority_levels"),
    Wrong("priorities", "onnx", "dynamic_batching = { preserve_ordering = true, priority_levels = 2, default_priority_level = 1 }",
          "refused: Only one priority level is allowed", "false, since there are 2 priority_levels"),
    # 6
    Wrong("instances", "preprocess", "instance_group = [{ kind = 'KIND_CPU', gpus = [0] }]",
          "refused: has kind KIND_CPU but specifies one or more GPUs", "nothing, since kind = KIND_CPU"),
    Wrong("instances", "preprocess", "instance_group = [{ kind = 'KIND_MODEL', gpus = [0] }]",
          "refused: has kind KIND_MODEL but specifies one or more GPUs", "nothing, since kind = KIND_MODEL"),
    Wrong("instances", "preprocess", "instance_group = [{ kind = 'KIND_CPU', profile = ['0'] }]",
          "refused: specifies profile field which is only supported for", "nothing, since only plans have profiles"),
    Wrong("instances", "tensorrt", "instance_group = [{ kind = 'KIND_CPU' }]", "refused: supports only GPU",
          "KIND_GPU, since a plan runs on a GPU", "core: src/backend_model.cc; tensorrt_backend: src/tensorrt.cc"),
    Wrong("instances", "preprocess", "instance_group = [{ passive = true }]", "ends", "a group that is not passive"),
    Wrong("instances", "preprocess", "instance_group = [{ rate_limiter = { resources = [{ name = 'R' }] } }]", "ignored",
          "resources with a name and a count >= 1"),
    # 7
    Wrong("warm-ups", "preprocess", f"model_warmup = [{{ name = 'w', batch_size = 1, {IMAGES % 'zero_data = true'} }}]",
          "never loads", "input_data_file, since the model decodes pictures"),
    Wrong("warm-ups", "preprocess", f"model_warmup = [{{ name = 'w', batch_size = 1, {IMAGES % 'random_data = true'} }}]",
          "never loads", "input_data_file, since the model decodes pictures"),
    Wrong("warm-ups", "preprocess", of_file("plain.jpg"), "never loads", "each preceded by its length in 4 bytes"),
    Wrong("warm-ups", "preprocess", of_file("text.bin"), "never loads", "expected pictures"),
    Wrong("warm-ups", "preprocess", of_file("two.bin"), "never loads", "1 elements, each preceded by its length"),
    Wrong("warm-ups", "preprocess", of_file("nothing.bin"), "never loads", "a file in models/m/warmup/"),
    Wrong("warm-ups", "preprocess", f"model_warmup = [{{ name = 'w', {IMAGES % 'zero_data = true'} }}]", "ignored", "batch_size: expected 1"),
    Wrong("warm-ups", "onnx",
          "model_warmup = [{ name = 'w', batch_size = 1, inputs = { INPUT__0 = { data_type = 'TYPE_FP32', "
          "dims = [3, 160, 160], input_data_file = 'text.bin' } } }]",
          "refused: warmup setting expects 307200 bytes", "307200 bytes, as dims and data_type say",
          "core: src/backend_model_instance.cc, GenerateWarmupData"),
    Wrong("warm-ups", "onnx", f"model_warmup = [{{ name = 'w', batch_size = 9, {ZEROS} }}]", "refused: max allowed is 8",
          "1 to max_batch_size, 8, found 9", "core: src/infer_request.cc"),
    # 8
    Wrong("parameters of PyTorch", "torchscript", "parameters = { intra_op_thread_count = 2 }", "ignored", "INTRA_OP_THREAD_COUNT", LIBTORCH),
    Wrong("parameters of PyTorch", "torchscript", "parameters = { INTRA_OP_THREAD_COUNT = 'two' }",
          "refused: failed to convert 'two' to integral number", "int >= 1", LIBTORCH),
    Wrong("parameters of PyTorch", "torchscript", "parameters = { INTER_OP_THREAD_COUNT = 0 }", "ignored", "int >= 1", LIBTORCH),
    Wrong("parameters of PyTorch", "torchscript", "parameters = { INFERENCE_MODE = 'yes' }",
          "refused: failed to convert 'yes' to boolean", "one of true, false, on, off, 1, 0", LIBTORCH),
    Wrong("parameters of PyTorch", "torchscript", "parameters = { ENABLE_NVFUSER = true }", "ignored", "23.12 and newer do not read it", LIBTORCH),
    Wrong("parameters of PyTorch", "torchscript", "parameters = { DISABLE_CUDNN = true }", "ignored", "24.06 and newer do", LIBTORCH, "24.05"),
    # 9
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { INTRA_OP_THREAD_COUNT = 2 }", "ignored", "intra_op_thread_count", ORT),
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { intra_op_num_threads = 2 }", "ignored", "intra_op_thread_count", ORT),
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { execution_mode = 2 }", "refused: Expected values for  execution_mode are 0 or 1",
          "one of 0, 1", ORT),
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { enable_mem_arena = 'yes' }", "refused: failed to convert 'yes' to boolean",
          "one of true, false", ORT),
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { 'memory.enable_memory_arena_shrinkage' = 'gpu:9' }",
          "fails: Did not find an arena based allocator registered", "cpu:0 or gpu:0", "onnxruntime: core/session/inference_session.cc"),
    Wrong("parameters of ONNX Runtime", "onnx", "parameters = { arena_extend_strategy = 2 }", "refused: unsupported arena_extend_strategy value",
          "one of 0, 1", ORT),
    # 10
    Wrong("optimization", "onnx", accelerator("name = 'tensorr'"), "refused: unknown Execution Accelerator", "did you mean 'tensorrt'?", ORT),
    Wrong("optimization", "onnx", accelerator("name = 'tensorrt', parameters = { precision = 'FP16' }"),
          "refused: unknown parameter 'precision' is provided", "did you mean 'precision_mode'?", ORT),
    Wrong("optimization", "onnx", accelerator("name = 'tensorrt', parameters = { precision_mode = 'FP16' }"),
          "refused: TensorRT 11 has no flag for it", "takes the precision from the graph alone", "onnxruntime#28611", "26.08"),
    Wrong("optimization", "onnx", accelerator("name = 'tensorrt', parameters = { precision_mode = 'BF16' }"),
          "refused: unsupported precision mode 'BF16' is requested", "26.02 and newer do", ORT),
    Wrong("optimization", "onnx", accelerator("name = 'tensorrt', parameters = { trt_engine_cache_enable = 'yes' }"),
          "refused: failed to convert 'yes' to boolean", "one of 1, 0", ORT),
    Wrong("optimization", "onnx", accelerator("name = 'cuda'"), "refused: unknown Execution Accelerator 'cuda' is requested",
          "24.06 and newer do", ORT, "24.05"),
    Wrong("optimization", "torchscript", "optimization = { cuda = { graphs = true } }", "ignored", "only TensorRT's backend reads it", LIBTORCH),
    # 11
    Wrong("ensembles and Python models", "preprocess", "model_transaction_policy = { decoupled = true }",
          "fails: ", "decoupled: expected false, since each image has one answer"),
    Wrong("ensembles and Python models", "ensemble", "model_transaction_policy = { decoupled = true }\nresponse_cache = { enable = true }",
          "refused: Response Cache does not currently support model", "decoupled: expected false, since each image has one answer"),
    Wrong("ensembles and Python models", "preprocess", "parameters = { FORCE_CPU_ONLY_INPUT_TENSORS = true }",
          "refused: Incorrect value for FORCE_CPU_ONLY_INPUT_TENSORS", "one of yes, no"),
    Wrong("ensembles and Python models", "preprocess", "parameters = { EXECUTION_ENV_PATH = '/nothere' }",
          "refused: Failed to get the canonical path", "the published folder contains no environment"),
    Wrong("ensembles and Python models", "ensemble", "instance_group = [{ count = 2 }]",
          "refused: instance group should not be specified for ensemble", "an ensemble has none of its own"),
    Wrong("ensembles and Python models", "ensemble", "parameters = { intra_op_thread_count = 2 }", "ignored", "which onnx reads"),
    Wrong("ensembles and Python models", "ensemble", "ensemble_scheduling = { step = [] }", "ignored",
          "only max_inflight_requests, since the steps follow", "this project: the steps would be added to its own"),
    # 12
    Wrong("names, versions and files", "preprocess", "metric_tags = { 'my team' = 'vision' }", "ends", "any other name ends the server"),
    Wrong("names, versions and files", "preprocess", "metric_tags = { model = 'vision' }", "ignored", "names besides Triton's own"),
    Wrong("names, versions and files", "preprocess", "runtime = 'mine.so'", "refused: unable to find backend library 'mine.so'",
          "expected 'libtriton_python.so', the backend"),
    Wrong("names, versions and files", "preprocess", "version_policy = { specific = { versions = [2, 3] } }",
          "refused: at least one version must be available", "at most triton.keep_versions, 1"),
    Wrong("names, versions and files", "preprocess", "model_operations = { op_library_filename = ['nothere.so'] }", "ignored",
          "only ONNX Runtime's backend reads it"),
    Wrong("names, versions and files", "tensorrt", "parameters = { execution_context_allocation_strategy = 'DYNAMIC' }",
          "refused: Invalid value for 'execution_context_allocation_strategy'", "one of STATIC, ON_PROFILE_CHANGE", TRT, "26.08"),
    # 13
    *(
        Wrong("sequences", "preprocess", f"sequence_batching = {{ {text} }}", f"refused: {reason}", ours, source)
        for text, reason, ours, source in [
            (controls(f"{START}, {START.replace('IMAGE', 'B')}"), "sequence batching specifies multiple CONTROL_SEQUENCE_START",
             "each kind of control once", CORE),
            (controls(f"{START}, {START}"), "is specified for multiple control kinds", "each once, found 'IMAGE'", CORE),
            (controls(START.replace("[0, 1]", "[0, 1], fp32_false_true = [0, 1]")), "specifies more than one from", "found int32", CORE),
            (controls(START.replace("[0, 1]", "[]")), "must specify either", "found none of them", CORE),
            (controls(START.replace("[0, 1]", "[1]")), "must have exactly 2 entries", "two values, for false and for true, found [1]", CORE),
            (controls("{ name = 'IMAGE', control = [{ kind = 'CONTROL_SEQUENCE_CORRID', data_type = 'TYPE_FP32' }] }"),
             "unexpected data type for control", "one of TYPE_UINT64, TYPE_INT64", CORE),
            (controls(START.replace("int32", "kind = 'CONTROL_SEQUENCE_CORRID', int32")), "must not specify either", "data_type instead", CORE),
            (state("initial_state = [{ name = 's', data_type = 'TYPE_FP32', dims = [2, 3], zero_data = true }]"),
             "Number of dimensions in 'initial_state'", "fixed dims that fit those of the state, [2], found [2, 3]", INITIAL),
            (state("initial_state = [{ name = 's', data_type = 'TYPE_INT32', dims = [2], zero_data = true }]"),
             "The data type used for 'initial_state'", "initial_state.data_type: expected TYPE_FP32", INITIAL),
            (state("initial_state = [{ data_type = 'TYPE_FP32', dims = [2], zero_data = true }]"),
             "Field 'name' must be set", "initial_state.name: expected a name", INITIAL),
            (state("initial_state = [{ name = 's', data_type = 'TYPE_FP32', dims = [2], data_file = 'none.bin' }]"),
             "failed to open", "a file in models/m/initial_state/", INITIAL),
            (state("use_growable_memory = true"), "you must also enable", "use_same_buffer_for_input_output = true as well", STATES),
        ]
    ),
    Wrong("sequences", "preprocess",
          "sequence_batching = { state = [{ input_name = 'A', output_name = 'Z', data_type = 'TYPE_FP32', dims = [2] }, "
          "{ input_name = 'B', output_name = 'Y', data_type = 'TYPE_FP32', dims = [2] }] }",
          "ignored", "since Triton pairs them by that order", STATES),
    # 14
    Wrong("ragged batches", "preprocess", batch_input("data_type = 'TYPE_INT64', source_input = ['IMAGE']"),
          "refused: batch input data type must be TYPE_INT32 or TYPE_FP32", "one of TYPE_INT32, TYPE_FP32, found 'TYPE_INT64'"),
    Wrong("ragged batches", "preprocess", batch_input("data_type = 'TYPE_INT32'"), "refused: expects 1 source input, got 0",
          "source_input: expected one input, found []"),
    Wrong("ragged batches", "preprocess", batch_input("data_type = 'TYPE_INT32', source_input = ['IMAGES']"),
          "refused: unknown source input name 'IMAGES'", "did you mean 'IMAGE'?"),
    Wrong("ragged batches", "preprocess", "batch_output = [{ target_name = ['S'], source_input = ['IMAGES'] }]",
          "refused: unknown source input name 'IMAGES'", "did you mean 'IMAGE'?"),
    Wrong("ragged batches", "torchscript", "batch_output = [{ target_name = ['S'], source_input = ['INPUT__0'] }]", "ignored",
          "PyTorch's backend does not read it", LIBTORCH),
]  # fmt: skip


if __name__ == "__main__":
    print(
        format_table(
            ("kind", "format", "below [triton.<format>]", "Triton", "source", "we say"),
            [(w.kind, w.model_format, " ".join(w.lines.split()), w.triton, w.source, w.ours) for w in WRONG_CONFIGS],
            left=("format", "below [triton.<format>]", "Triton", "source", "we say"),
        )
    )
