"""The graph of an ensemble: how the tensors of its steps are connected, and what Triton would refuse.

Sources of the rules: ValidateEnsembleConfig and ValidateTensorMapping in the core's ensemble_utils.cc, and for steps of
which only some batch ReshapeTensorDims in ensemble_scheduler.cc.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from build_tasks.errors import UserError, listed, with_suggestion
from build_tasks.triton.model_config import protobuf


class Wiring(Struct, frozen=True):
    """A step as far as the ensemble's config.pbtxt depends on the spec. It is plain data for a fingerprint."""

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]


class Graph(Struct, frozen=True):
    """The connected steps of an ensemble.

    Attributes:
        order: The steps, so that each comes after those whose outputs it takes.
        inputs: By name in the ensemble: a tensor of a ModelConfig, with the dims that clients send.
        outputs: By name in the ensemble: a tensor of a ModelConfig, with the dims that clients get.
        maps: For each step, its input_map and its output_map.
        max_batch_size: The largest batch that all steps take; 0 if dims contain the batch.
        batches: The smallest and the largest number of samples in a request; 0, 0 if dims have no batch.
    """

    order: list[int]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    maps: list[tuple[dict[str, str], dict[str, str]]]
    max_batch_size: int
    batches: tuple[int, int]


def connect(
    steps: Sequence[Wiring], configs: Sequence[Any], requested: Sequence[str], largest: int, spec: str
) -> Graph:
    """Connect the steps of an ensemble by the names of their tensors.

    Args:
        steps: The steps.
        configs: Their ModelConfigs.
        requested: The tensors that clients get; empty: all that no step takes.
        largest: The largest batch that the spec allows.
        spec: The path of the spec, for messages.

    Raises:
        UserError: If names, types, dims or batches do not fit, or if the steps form a cycle.
    """
    made: dict[str, tuple[int, Any]] = {}
    taken: dict[str, list[tuple[int, Any]]] = {}
    maps = []
    for index, (step, config) in enumerate(zip(steps, configs, strict=True)):
        key = f"{spec}: ensemble.steps[{index}]"
        if config.model_transaction_policy.decoupled:
            raise UserError(f"{key}: expected a model that answers each request once, found {step.name}, decoupled")
        if any(tensor.allow_ragged_batch for tensor in config.input):  # Triton counts requests, and one may be a batch
            raise UserError(f"{key}: expected a model that takes batches, found {step.name}, whose inputs are ragged")
        input_map = _map(f"{key}.inputs", step.inputs, config.input, step.name)
        output_map = _map(f"{key}.outputs", step.outputs, config.output, step.name)
        maps.append((input_map, output_map))
        tensors = {tensor.name: tensor for tensor in (*config.input, *config.output)}
        for name, tensor in output_map.items():
            if tensor in made:
                other = steps[made[tensor][0]].name
                raise UserError(f"{key}.outputs.{name}: expected a name that {other} does not make, found {tensor!r}")
            made[tensor] = index, tensors[name]
        for name, tensor in input_map.items():
            taken.setdefault(tensor, []).append((index, tensors[name]))
    for tensor, takers in taken.items():
        first = made.get(tensor, takers[0])
        for taker in takers:
            _compare(first, taker, steps, configs, f"{spec}: ensemble", made=tensor in made)
    needs = [{made[tensor][0] for tensor in input_map.values() if tensor in made} for input_map, _ in maps]
    order = _order(needs, steps, spec)
    sent = {tensor: takers[0] for tensor, takers in taken.items() if tensor not in made}
    if not sent:
        raise UserError(f"{spec}: ensemble: expected a tensor that clients send, found steps that make all they take")
    for name in requested:
        if name not in made:
            raise UserError(
                f"{spec}: ensemble.outputs: expected tensors of the steps, found {with_suggestion(name, made)}"
            )
    answered = {name: made[name] for name in requested or [name for name in made if name not in taken]}
    for _, output_map in maps:  # Triton refuses a tensor that nobody takes
        for name in [name for name, tensor in output_map.items() if tensor not in taken and tensor not in answered]:
            del output_map[name]
    max_batch_size, batches = _batches(configs, steps, largest, spec)
    inputs, outputs = (
        {
            name: _as_clients_see(name, tensor, configs[step], max_batch_size, batches, spec)
            for name, (step, tensor) in tensors.items()
        }
        for tensors in (sent, answered)
    )
    return Graph(order, inputs, outputs, maps, max_batch_size, batches)


def check_steps(steps: Sequence[Wiring], graph: Graph, spec: str) -> None:
    """Raise UserError if no tensor of a step is taken, neither by another step nor by clients: Triton refuses it."""
    for index, (step, (_, output_map)) in enumerate(zip(steps, graph.maps, strict=True)):
        if not output_map:
            expected = "a step of which another one or a client takes a tensor"
            raise UserError(f"{spec}: ensemble.steps[{index}]: expected {expected}, found {step.name}")


def flatten(steps: Sequence[Wiring], configs: Mapping[str, Any], prefix: str = "") -> list[Wiring]:
    """Return the steps of an ensemble with the steps of other ensembles in the place of these.

    Args:
        configs: The ModelConfigs of the steps and of the steps of ensembles among them, by name.
        prefix: Of the names of inner tensors: the place of the steps, "outer[0].", if they are those of a step.
    """
    flat = []
    for index, step in enumerate(steps):
        config = configs[step.name]
        if not config.HasField("ensemble_scheduling"):
            flat.append(step)
            continue
        place = f"{prefix}{step.name}[{index}]."
        names = {each.name: step.inputs.get(each.name, each.name) for each in config.input}
        names |= {each.name: step.outputs.get(each.name, each.name) for each in config.output}
        parts = [
            Wiring(
                part.model_name,
                *(
                    {name: names.get(tensor, place + tensor) for name, tensor in each.items()}
                    for each in (part.input_map, part.output_map)
                ),
            )
            for part in config.ensemble_scheduling.step
        ]
        flat += flatten(parts, configs, place)
    return flat


def _map(key: str, names: Mapping[str, str], tensors: Sequence[Any], model: str) -> dict[str, str]:
    """Return the map of a step from its tensors to those of the ensemble."""
    known = [tensor.name for tensor in tensors]
    for name in names:
        if name not in known:
            raise UserError(
                f"{key}: expected tensors of {model}, {listed(known)}, found {with_suggestion(name, known)}"
            )
    return {name: names.get(name, name) for name in known}


def _compare(
    first: tuple[int, Any],
    second: tuple[int, Any],
    steps: Sequence[Wiring],
    configs: Sequence[Any],
    key: str,
    made: bool,
) -> None:
    """Compare the type and dims of a tensor as two steps have them. An open dimension fits every length.

    Raises:
        UserError: If they do not fit.
    """
    (one, a), (two, b) = first, second
    full = [([-1] if configs[step].max_batch_size else []) + [*tensor.dims] for step, tensor in (first, second)]
    fits = len(full[0]) == len(full[1]) and all(-1 in pair or pair[0] == pair[1] for pair in zip(*full, strict=True))
    if a.data_type != b.data_type or not fits:
        verb = "makes" if made else "takes"
        raise UserError(
            f"{key}: {steps[two].name} takes {format_tensor(b)}, but {steps[one].name} {verb} {format_tensor(a)}"
        )


def format_tensor(tensor: Any) -> str:
    """Return the type and the dims of a tensor of a ModelConfig."""
    return f"{protobuf().DataType.Name(tensor.data_type)} {list(tensor.dims)}"


def _order(needs: Sequence[set[int]], steps: Sequence[Wiring], spec: str) -> list[int]:
    """Return the steps in an order in which each comes after those that it needs.

    Raises:
        UserError: If they form a cycle.
    """
    order: list[int] = []
    while len(order) < len(needs):
        ready = [index for index, needed in enumerate(needs) if index not in order and needed <= set(order)]
        if not ready:
            cycle = [steps[index].name for index in range(len(needs)) if index not in order]
            raise UserError(f"{spec}: ensemble.steps: expected steps without a cycle, found one among {listed(cycle)}")
        order += ready
    return order


def _batches(configs: Sequence[Any], steps: Sequence[Wiring], largest: int, spec: str) -> tuple[int, tuple[int, int]]:
    """Return the max_batch_size of an ensemble, and the smallest and the largest number of samples in a request.

    A step with max_batch_size 0 works beside steps that batch if its dims begin with the batch: with -1 for any batch,
    otherwise with the number of samples that each request has.

    Raises:
        UserError: If other steps with max_batch_size 0 stand beside steps that batch. Triton compares their dims with
            the batch only when a request comes.
    """
    limits = [config.max_batch_size for config in configs if config.max_batch_size]
    fixed: set[int] = set()
    for step, config in zip(steps, configs, strict=True):
        if config.max_batch_size:
            continue
        first = {next(iter(tensor.dims), 0) for tensor in (*config.input, *config.output)}
        fixed |= first - {-1} if len(first) == 1 else {0}
        if limits and (len(first) > 1 or len(fixed) > 1 or max(fixed, default=0) > min(limits)):
            raise UserError(
                f"{spec}: ensemble.steps: expected dims that begin with the batch (-1, or one number of at most "
                f"{min(limits)}) in {step.name}, which has max_batch_size 0 beside steps that batch, found "
                f"{listed(format_tensor(tensor) for tensor in (*config.input, *config.output))}"
            )
    if len(fixed) > 1 or 0 in fixed:
        return 0, (0, 0)
    if fixed:
        return 0, (min(fixed), min(fixed))
    bounds = [*([largest] if largest else []), *limits]
    return (min(largest, *limits) if limits else 0), (1, min(bounds, default=1))


def _as_clients_see(
    name: str, tensor: Any, config: Any, max_batch_size: int, batches: tuple[int, int], spec: str
) -> Any:
    """Return a tensor of a step in the dims of the ensemble, with or without the batch as the ensemble's others.

    Raises:
        UserError: If nothing is left without the batch, since Triton needs a dimension.
    """
    seen = type(tensor)()
    seen.CopyFrom(tensor)
    seen.ClearField("reshape")  # the step itself reshapes
    seen.name = name
    if max_batch_size and not config.max_batch_size:
        del seen.dims[0]
        if not seen.dims:
            expected = f"{config.name}, which has max_batch_size 0, to have a dimension behind the batch"
            raise UserError(f"{spec}: ensemble.steps: expected {expected}, found {format_tensor(tensor)}")
    elif config.max_batch_size and not max_batch_size:
        smallest, largest = batches
        seen.dims.insert(0, smallest if smallest == largest else -1)
    return seen
