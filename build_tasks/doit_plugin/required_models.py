"""Models that the ensembles of other models need, although the no-op cache has nothing for them to do."""

from collections.abc import Sequence

from build_tasks.doit_plugin.noop_cache import NoopCache
from build_tasks.errors import UserError
from build_tasks.formats.ensemble_steps import models_of_steps
from build_tasks.spec.ensemble_checks import endless_steps
from build_tasks.spec.loader import read_model
from build_tasks.spec.model import Model


def load_required(cache: NoopCache, models: Sequence[Model]) -> list[Model]:
    """Return the models that the steps of ensembles name, and that the no-op cache left out.

    They leave the cache for this run, so that their tasks exist for the tasks of the ensemble to depend on. Their own
    ensembles may name further models.

    Raises:
        UserError: If a spec cannot be read, or if an ensemble contains itself.
    """
    required: list[Model] = []
    waiting = [*models]
    while waiting:
        named = models_of_steps(waiting.pop())
        for records in (cache.unchanged, cache.unselected):
            for name in [name for name, record in records.items() if not named.isdisjoint(record.triton_models)]:
                del records[name]
                cache.requested = [each for each in cache.requested if each != name]
                required.append(read_model(name))
                waiting.append(required[-1])
    if required and (mistakes := list(endless_steps([*models, *required]))):
        raise UserError(*mistakes)
    return required
