"""`doit adopt PATH --compare` and `--replace`: does what doit built answer as the originals, and may it replace them?

original ─┐                      ┌─► the same: the original is copied to build/.adopted/ and marked
          ├─► accuracy samples ──┤      └─► the next `publish` replaces it in one step
build/ ───┘                      └─► not the same: nothing changes, exit code 1
"""

import os
import sys

from build_tasks.doit_plugin.adoption import Adoption
from build_tasks.errors import UserError, first_lines, printable
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.runtime import atomic_files, repository_files, worker
from build_tasks.spec import loader
from build_tasks.spec.model import Model
from build_tasks.triton.model_config import enum
from build_tasks.triton.repository import ADOPTED, overwrite_error

KEPT = f"{BUILD}/.adopted"  # the originals that were replaced; nothing removes them
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2  # of the relative error; the second is for outputs in fp16


def compare(adoptions: list[Adoption], replace: bool) -> int:
    """Compare each model with its original, and print a line for each. Return the exit code: 1 if one differs.

    Args:
        replace: Whether originals in model_repository/ may be replaced by what answers the same.
    """
    code = 0
    published: list[str] = []
    the_same: set[str] = set()
    for adoption in adoptions:
        if adoption.spec is None:
            continue
        name = adoption.existing.name
        try:
            model = _model_of(name)
            errors = answer_errors(adoption, model)
        except UserError as error:
            sys.stderr.write(printable(f"ERROR: {name}: {error}\n"))
            code = 1
            continue
        wrong = [output for output, error in errors.items() if error > _tolerance(adoption, output)]
        figures = ", ".join(f"{output} {error:.1e}" for output, error in errors.items())
        print(f"{name}: {'answers otherwise' if wrong else 'answers the same'}, relative error: {figures}")
        if wrong:
            code = 1
            continue
        the_same.add(name)
        if replace and _allow_replacement(adoption.existing.folder):
            published.append(model.name)
    for adoption in adoptions:
        steps = {step.model_name for step in adoption.existing.config.ensemble_scheduling.step}
        if replace and adoption.host and steps <= the_same:
            _allow_replacement(adoption.existing.folder)  # its parts answer the same, and its config is the same
    if published:
        print(f"next: `doit {' '.join(published)}` publishes them; {KEPT}/ keeps the originals")
    elif replace and code == 0:
        print(f"nothing to replace: the originals are not in {REPOSITORY}/, which `doit` fills")
    return code


def answer_errors(adoption: Adoption, model: Model) -> dict[str, float]:
    """Return the largest relative error of each output on the accuracy samples.

    Raises:
        UserError: If the model is not built yet, or if an artifact does not run.
    """
    from polygraphy.json import load_json

    from build_tasks.formats import artifact_answers

    existing = adoption.existing
    built, samples = model.artifact(model.files(existing.model_format)[0]), model.artifact("samples.json")
    for path in (built, samples):
        if not os.path.exists(path):
            raise UserError(f"{path} is not there: `doit {model.name}` builds it")
    outputs = [output.name for output in existing.config.output]
    try:
        errors: dict[str, float] = worker.call(
            artifact_answers.compare_answers,
            (existing.artifact, built),
            existing.model_format,
            load_json(samples),
            outputs,
            log=f"{BUILD}/{model.name}/logs/adopt.log",
        )
    except worker.CrashError as error:
        raise UserError(first_lines(error)) from error
    return errors


def _model_of(name: str) -> Model:
    """Return the model of the project that is served under a name."""
    for folder in loader.model_names():
        model = loader.read_model(folder)
        if name in model.triton_models:
            return model
    raise UserError("no spec describes it: `doit adopt PATH --write` writes one")


def _tolerance(adoption: Adoption, output: str) -> float:
    types = {tensor.name: tensor.data_type for tensor in adoption.existing.config.output}
    return HALF_TOLERANCE if types[output] == enum("DataType", "TYPE_FP16") else TOLERANCE


def _allow_replacement(folder: str) -> bool:
    """Copy a model of model_repository/ that was not generated here, and let `publish` replace it.

    Returns: Whether the folder is one.
    """
    name = os.path.basename(os.path.abspath(folder))
    if os.path.realpath(folder) != os.path.realpath(f"{REPOSITORY}/{name}") or overwrite_error(name) is None:
        return False
    with repository_files.repository_lock(), atomic_files.scratch_dir() as scratch:
        atomic_files.copy(folder, f"{scratch}/{name}", hard_link=False)
        atomic_files.flush(f"{scratch}/{name}")
        target = f"{KEPT}/{name}"
        while os.path.lexists(target):
            target += "+"
        atomic_files.replace(f"{scratch}/{name}", target)
        with open(f"{folder}/{ADOPTED}", "w", encoding="utf-8") as file:
            file.write(f"doit may replace this model. {target} is a copy of it.\n")
    return True
