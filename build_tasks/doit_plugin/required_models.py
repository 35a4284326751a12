"""Models that the ensembles of other models need, although the no-op cache has nothing for them to do."""

from collections.abc import Collection, Iterator

from build_tasks.doit_plugin.noop_cache import NoopCache
from build_tasks.spec.loader import read_model
from build_tasks.spec.model import Model


def load_required(cache: NoopCache, triton_models: Collection[str]) -> Iterator[Model]:
    """Yield the models that describe some Triton models, and that the no-op cache left out.

    They leave the cache for this run, so that their tasks exist for the tasks of the ensemble to depend on.

    Args:
        triton_models: Names of Triton models that steps of ensembles name.
    """
    for records in (cache.unchanged, cache.unselected):
        for name in [
            name for name, record in records.items() if not record.triton_models.keys().isdisjoint(triton_models)
        ]:
            del records[name]
            cache.requested = [each for each in cache.requested if each != name]
            yield read_model(name)
