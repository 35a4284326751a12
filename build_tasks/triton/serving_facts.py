"""The facts about a model that the checks of a ModelConfig use. The package spec builds this record."""

from typing import Any

from msgspec import Struct

from build_tasks.tensors import OptimizationProfile
from build_tasks.triton.optimization_profiles import Box


class ServingFacts(Struct, frozen=True):
    """One model of the project, as far as Triton is concerned.

    A model format is a key of platforms.TRITON_MODELS: a format that is served, or a part of the ensemble.
    """

    config_fields: dict[str, Any]  # [triton] without the project's own keys: fields, and a table of fields by format
    own_keys: tuple[str, ...]  # the project's own keys of [triton]
    model_formats: tuple[str, ...]  # one Triton model is published for each
    release: str  # triton.release, "26.08"
    device: str  # triton.device: "auto", "gpu" or "cpu"
    cores: int | None  # triton.cores
    keep_versions: int  # triton.keep_versions
    max_batch_size: int  # the largest batch that the build checks
    largest_batches: dict[str, int]  # the largest batch by model format; 0 if the batch is fixed
    profile: tuple[int, int, int]  # smallest, best and largest batch of the engine
    profiles: tuple[OptimizationProfile, ...]  # of the engine, if the spec has several
    promised: Box  # the batches and lengths that clients may send to it
    warm_up_folder: str  # holds the files that model_warmup names
    initial_state_folder: str  # holds the files that the states of sequence_batching begin with
    inputs: tuple[str, ...]  # the names of the network's inputs; empty if only its file knows them
