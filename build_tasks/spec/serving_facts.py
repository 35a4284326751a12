"""The facts about a model of a spec that the checks of a ModelConfig use."""

from build_tasks.spec.engine_profiles import profiles_of, promised_box
from build_tasks.spec.interface import inputs_of
from build_tasks.spec.model import Model
from build_tasks.triton.model_config import INITIAL_STATE_FOLDER, WARM_UP_FOLDER
from build_tasks.triton.serving_facts import ServingFacts


def facts_of(model: Model) -> ServingFacts:
    """Return the facts about a model. Only specs with fields of ModelConfig import this module."""
    keys, model_formats, spec = model.triton_keys, (*model.served_formats, *model.ensemble_parts), model.spec
    return ServingFacts(
        config_fields=model.config_fields,
        own_keys=keys.__struct_fields__,
        model_formats=model_formats,
        release=keys.release,
        device=keys.device,
        cores=keys.cores,
        keep_versions=keys.keep_versions,
        max_batch_size=spec.max_batch_size,
        largest_batches={model_format: model.largest_batch(model_format) for model_format in model_formats},
        profile=spec.profile,
        profiles=tuple(profiles_of(spec)) if spec.engine.profiles else (),
        promised=promised_box(model),
        warm_up_folder=model.source(WARM_UP_FOLDER),
        initial_state_folder=model.source(INITIAL_STATE_FOLDER),
        inputs=() if spec.from_onnx and not spec.inputs else tuple(each["name"] for each in inputs_of(spec)),
    )
