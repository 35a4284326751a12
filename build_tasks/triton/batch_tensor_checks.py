"""Checks of ModelConfig's batch_input and batch_output, with which requests of several lengths form one batch.

Sources: ValidateBatchIO in the core's model_config_utils.cc. Each backend counts one tensor of the network for each
batch_input (ModelInstanceState in onnxruntime.cc and in pt/model_instance_state.cc).
"""

from collections.abc import Collection, Iterator
from typing import Any

from build_tasks.errors import with_suggestion
from build_tasks.triton.model_config import Mistake, protobuf

COUNT_TYPES = ("TYPE_INT32", "TYPE_FP32")


def mistakes(config: Any, model_format: str, inputs: Collection[str]) -> Iterator[Mistake]:
    """Yield contradictions within batch_input and batch_output of a ModelConfig whose max_batch_size is set.

    Args:
        inputs: The names of the model's inputs; empty if they are not known yet. The outputs are those of the config.
    """
    outputs = [tensor.name for tensor in config.output]
    for field in ("batch_input", "batch_output"):
        entries = getattr(config, field)
        if not entries:
            continue
        if config.max_batch_size == 0:
            yield field, "nothing, since max_batch_size = 0 forms no batch", f"{len(entries)} of them"
            return
        if field == "batch_output" and model_format in ("torchscript", "aoti"):
            expected = f"nothing in {model_format}, since PyTorch's backend does not read it"
            yield field, expected, f"{len(entries)} of them"
            continue
        targets: list[str] = []
        for index, entry in enumerate(entries):
            key = f"{field}[{index}]"
            if len(entry.source_input) != 1:
                yield f"{key}.source_input", "one input", repr(list(entry.source_input))
            yield from _names(f"{key}.source_input", entry.source_input, inputs)
            if field == "batch_input":
                dtype = protobuf().DataType.Name(entry.data_type)
                if dtype not in COUNT_TYPES:
                    yield f"{key}.data_type", f"one of {', '.join(COUNT_TYPES)}", repr(dtype)
                if len(entry.target_name) != 1:
                    yield f"{key}.target_name", "one input of the network", repr(list(entry.target_name))
            elif not entry.target_name:
                yield f"{key}.target_name", "outputs of the network", "nothing"
            else:
                yield from _names(f"{key}.target_name", entry.target_name, outputs)
            for name in entry.target_name:
                if name in targets:
                    yield f"{key}.target_name", "each tensor once", repr(name)
                targets.append(name)


def _names(key: str, names: Collection[str], known: Collection[str]) -> Iterator[Mistake]:
    for name in names:
        if known and name not in known:
            yield key, f"one of {', '.join(known)}", with_suggestion(name, known)
