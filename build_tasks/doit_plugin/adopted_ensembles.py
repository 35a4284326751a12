"""Ensembles of a repository of another origin whose steps are all adopted: they become [ensemble] of a step's spec.

ensemble_scheduling ─► steps all adopted? ─► [[ensemble.steps]] in the spec of the last step
                            no ─► left alone, with the names of the other steps
"""

import copy
from collections.abc import Mapping
from typing import Any

from build_tasks.doit_plugin.adoption import Adoption
from build_tasks.errors import UserError
from build_tasks.formats.ensemble_steps import steps_of
from build_tasks.runtime import atomic_files
from build_tasks.spec import adopted_spec
from build_tasks.spec.model import Model
from build_tasks.stages import config as config_stage
from build_tasks.triton import config_fields
from build_tasks.triton.derived_config import to_text
from build_tasks.triton.existing_repository import ExistingModel, read_config
from build_tasks.triton.model_config import DERIVED, IN_FLIGHT


def with_ensembles(adoptions: list[Adoption]) -> list[Adoption]:
    """Return the models of a repository. The ensembles whose steps are adopted are added to the specs of steps."""
    found = {adoption.existing.name: adoption for adoption in adoptions}
    for name, adoption in found.items():
        if adoption.existing.config.HasField("ensemble_scheduling"):
            try:
                ensemble, host = attach(adoption.existing, found)
            except UserError as error:
                found[name] = adoption._replace(reason=str(error))
            else:
                found |= {name: ensemble, host.existing.name: host}
    return list(found.values())


def attach(existing: ExistingModel, adoptions: Mapping[str, Adoption]) -> tuple[Adoption, Adoption]:
    """Return an ensemble, and its last step with the ensemble in its spec.

    Args:
        adoptions: The other models of the repository, by name.
    Raises:
        UserError: If the ensemble is left alone.
    """
    steps = existing.config.ensemble_scheduling.step
    names = list(dict.fromkeys(step.model_name for step in steps))
    others = [name for name in names if name not in adoptions or adoptions[name].spec is None]
    if others:
        raise UserError(f"an ensemble of models that doit does not build: {', '.join(others)}")
    host = adoptions[steps[-1].model_name]
    assert host.spec is not None
    if "ensemble" in host.spec.document:
        raise UserError(f"its last step, {host.existing.name}, ends another ensemble already, and a spec has one")
    document = copy.deepcopy(host.spec.document)
    document["ensemble"] = {
        "outputs": [output.name for output in existing.config.output],
        "steps": [
            {"model": step.model_name, "inputs": dict(step.input_map), "outputs": dict(step.output_map)}
            for step in steps
        ],
    }
    fields = {key: value for key, value in config_fields.to_fields(existing.config).items() if key not in DERIVED}
    in_flight = getattr(existing.config.ensemble_scheduling, IN_FLIGHT, 0)
    document["triton"]["ensemble"] = {"name": existing.name, "ensemble_scheduling": {IN_FLIGHT: in_flight}, **fields}
    spec = adopted_spec.checked(host.spec._replace(document=document))
    models = [each.spec.model for name, each in adoptions.items() if each.spec and name != host.existing.name]
    after = _expected_config(spec.model, [*models, spec.model], adoptions)
    before = config_fields.normalized(existing.config, existing.name, "ensemble")
    after = config_fields.normalized(after, existing.name, "ensemble")
    version = spec.model.triton_keys.first_version
    return Adoption(existing, None, before, after, "", host.existing.name, version), host._replace(spec=spec)


def _expected_config(model: Model, models: list[Model], adoptions: Mapping[str, Adoption]) -> Any:
    """Return the ModelConfig that the stage `config` would derive from the configs of the steps."""
    steps = steps_of(model, models)
    stage = config_stage.ensemble_task(model, steps)["meta"]["stage"]
    with atomic_files.scratch_dir() as scratch:
        inputs = dict(stage.inputs)
        for index, (name, path) in enumerate(inputs.items()):
            triton_model = name.partition("/")[0]
            inputs[name] = f"{scratch}/{index}"
            with open(inputs[name], "w", encoding="utf-8") as file:
                file.write(to_text(adoptions[triton_model].after) if path.endswith(".pbtxt") else "{}")
        outputs = {name: f"{scratch}/{name}" for name in stage.outputs}
        stage.build(inputs, outputs, stage.settings)
        return read_config(outputs["config"])
