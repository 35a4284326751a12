"""The tensors of an ensemble's steps are connected by name; what Triton would refuse ends with one line."""

# ruff: noqa: E501  (one mistake a line)

from typing import Any

import pytest
from google.protobuf import text_format

from build_tasks.errors import UserError
from build_tasks.triton.ensemble_graph import Graph, Wiring, check_steps, connect, flatten
from build_tasks.triton.model_config import to_message

SPEC = "models/m/model.toml"


def tensors(text: str) -> str:
    """`X FP32 3 16` as the fields of a ModelConfig's input or output."""
    name, dtype, *dims = text.split()
    return f'name: "{name}" data_type: TYPE_{dtype} dims: [{", ".join(dims)}]'


def config(name: str, inputs: list[str], outputs: list[str], batch: int = 8, more: str = "") -> Any:
    fields = [f"input {{ {tensors(text)} }}" for text in inputs] + [f"output {{ {tensors(text)} }}" for text in outputs]
    text = f'name: "{name}" max_batch_size: {batch} {" ".join(fields)} {more}'
    return text_format.Parse(text, to_message({}))


PREPARE = config("prepare", ["IMAGE STRING 1"], ["PIXELS FP32 3 16 16"], 4)
NETWORK = config("network", ["INPUT__0 FP32 3 -1 -1"], ["OUTPUT__0 FP32 10"])
OTHER = config("other", ["INPUT__0 FP32 3 16 16"], ["OUTPUT__0 FP32 10"], 6)
JOIN = config("join", ["A FP32 10", "B FP32 10"], ["BEST INT64 1", "TEXT STRING 1"], 16)

RAGGED = 'input { name: "X" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }'

PIXELS = {"INPUT__0": "PIXELS"}
CHAIN = [
    ("join", JOIN, {"A": "scores", "B": "scores"}, {}),
    ("network", NETWORK, PIXELS, {"OUTPUT__0": "scores"}),
    ("prepare", PREPARE, {}, {}),
]
BRANCHES = [
    ("prepare", PREPARE, {}, {}),
    ("network", NETWORK, PIXELS, {"OUTPUT__0": "one"}),
    ("other", OTHER, PIXELS, {"OUTPUT__0": "two"}),
    ("join", JOIN, {"A": "one", "B": "two"}, {"BEST": "best"}),
]


def connected(steps: list[Any], outputs: tuple[str, ...] = (), largest: int = 32) -> Graph:
    wirings = [Wiring(name, inputs, outputs) for name, _, inputs, outputs in steps]
    return connect(wirings, [each for _, each, _, _ in steps], outputs, largest, SPEC)


def test_steps_run_after_those_whose_tensors_they_take() -> None:
    graph = connected(CHAIN)
    assert graph.order == [2, 1, 0]
    assert list(graph.inputs) == ["IMAGE"]
    assert list(graph.outputs) == ["BEST", "TEXT"]
    assert graph.max_batch_size == 4, "the smallest of the steps"


def test_two_branches_take_one_tensor_and_meet() -> None:
    graph = connected(BRANCHES, largest=2)
    assert graph.order == [0, 1, 2, 3]
    assert list(graph.outputs) == ["best", "TEXT"]
    assert graph.max_batch_size == 2
    assert list(connected(BRANCHES, ("best", "one")).outputs) == ["best", "one"], "clients may get inner tensors, too"


def test_a_tensor_that_nobody_takes_is_left_out() -> None:
    """Triton refuses it: "ensemble tensor 'TEXT' is unused". A step without any tensor is refused here."""
    graph = connected(BRANCHES, ("best",))
    assert [output_map for _, output_map in graph.maps][3] == {"BEST": "best"}
    steps = [*BRANCHES, ("more", NETWORK, PIXELS, {"OUTPUT__0": "three"})]
    line = "ensemble.steps[4]: expected a step of which another one or a client takes a tensor, found more"
    with pytest.raises(UserError) as error:
        check_steps([Wiring(name, {}, {}) for name, *_ in steps], connected(steps, ("best",)), SPEC)
    assert str(error.value) == f"{SPEC}: {line}"


def test_ensembles_without_a_batch_have_none() -> None:
    steps: list[Any] = [("fixed", config("fixed", ["X FP32 2 4"], ["Y FP32 2"], 0), {}, {})]
    assert connected(steps).max_batch_size == 0


def open_batch(text: str) -> Any:
    """A step that makes `Y` of `X`, and whose batch only clients form."""
    return config("free", [f"X FP32 {text}"], [f"Y FP32 {text}"], 0)


@pytest.mark.parametrize(
    ("dims", "max_batch_size", "batches", "seen"),
    [("-1 10", 4, (1, 4), [[1], [10]]), ("3 10", 0, (3, 3), [[3, 1], [3, 10]])],
    ids=["any batch", "a fixed batch"],
)
def test_a_step_without_a_batch_works_beside_steps_that_batch(
    dims: str, max_batch_size: int, batches: tuple[int, int], seen: list[list[int]]
) -> None:
    """tests/serving/test_core_ensembles.py shows that Triton answers like this."""
    graph = connected([*CHAIN[1:], ("free", open_batch(dims), {"X": "scores"}, {})])
    assert (graph.max_batch_size, graph.batches) == (max_batch_size, batches)
    assert [list(each.dims) for each in (graph.inputs["IMAGE"], graph.outputs["Y"])] == seen


def test_steps_whose_batch_only_clients_form_have_an_open_one() -> None:
    graph = connected([("free", open_batch("-1 10"), {}, {})], largest=5)
    assert (graph.max_batch_size, graph.batches) == (0, (1, 5))
    assert connected([("free", open_batch("10"), {}, {})]).batches == (10, 10), "every request has the same samples"
    graph = connected([("other", OTHER, {}, {})], largest=0)
    assert (graph.max_batch_size, graph.batches, list(graph.inputs["INPUT__0"].dims)) == (0, (1, 6), [-1, 3, 16, 16])


def test_an_ensemble_among_the_steps_is_replaced_by_its_own_steps() -> None:
    """Its inner tensors get names that no other step has."""
    text = """name: "inner" platform: "ensemble" max_batch_size: 4
    input { name: "IMAGE" data_type: TYPE_STRING dims: 1 } output { name: "scores" data_type: TYPE_FP32 dims: 10 }
    ensemble_scheduling {
      step { model_name: "prepare" input_map { key: "IMAGE" value: "IMAGE" } output_map { key: "PIXELS" value: "x" } }
      step { model_name: "network" input_map { key: "INPUT__0" value: "x" } output_map { key: "OUTPUT__0" value: "scores" } }
    }"""
    inner = text_format.Parse(text, to_message({}))
    configs = {"inner": inner, "prepare": PREPARE, "network": NETWORK, "join": JOIN}
    flat = flatten([Wiring("inner", {}, {"scores": "s"}), Wiring("join", {"A": "s", "B": "s"}, {})], configs)
    assert flat == [
        Wiring("prepare", {"IMAGE": "IMAGE"}, {"PIXELS": "inner[0].x"}),
        Wiring("network", {"INPUT__0": "inner[0].x"}, {"OUTPUT__0": "s"}),
        Wiring("join", {"A": "s", "B": "s"}, {}),
    ]


def test_an_ensemble_that_stands_at_the_same_place_in_two_others_has_tensors_of_its_own_in_each() -> None:
    def ensemble(name: str, steps: str) -> Any:
        fields = 'input { name: "IMAGE" data_type: TYPE_STRING dims: 1 } output { name: "scores" data_type: TYPE_FP32 dims: 10 }'
        text = f'name: "{name}" platform: "ensemble" max_batch_size: 4 {fields} ensemble_scheduling {{ {steps} }}'
        return text_format.Parse(text, to_message({}))

    def step(name: str, taken: tuple[str, str], made: tuple[str, str]) -> str:
        maps = [f'{kind}_map {{ key: "{a}" value: "{b}" }}' for kind, (a, b) in (("input", taken), ("output", made))]
        return f'step {{ model_name: "{name}" {" ".join(maps)} }}'

    outer = step("inner", ("IMAGE", "IMAGE"), ("scores", "scores"))
    chain = step("prepare", ("IMAGE", "IMAGE"), ("PIXELS", "x"))
    chain += step("network", ("INPUT__0", "x"), ("OUTPUT__0", "scores"))
    configs = {"inner": ensemble("inner", chain), "prepare": PREPARE, "network": NETWORK, "join": JOIN}
    configs |= {name: ensemble(name, outer) for name in ("left", "right")}
    steps = [Wiring("left", {}, {"scores": "a"}), Wiring("right", {}, {"scores": "b"})]
    flat = flatten([*steps, Wiring("inner", {}, {"scores": "c"}), Wiring("join", {"A": "a", "B": "b"}, {})], configs)
    made = [tensor for each in flat for tensor in each.outputs.values()]
    assert made == ["left[0].inner[0].x", "a", "right[1].inner[0].x", "b", "inner[2].x", "c"]


WRONG: dict[str, tuple[list[Any], str]] = {
    "an input that the step does not have": (
        [("network", NETWORK, {"INPUT_0": "PIXELS"}, {})],
        "steps[0].inputs: expected tensors of network, INPUT__0, found 'INPUT_0' (did you mean 'INPUT__0'?)",
    ),
    "an output that the step does not have": (
        [("network", NETWORK, {}, {"OUT": "scores"})],
        "steps[0].outputs: expected tensors of network, OUTPUT__0, found 'OUT'",
    ),
    "two steps that make one tensor": (
        [("network", NETWORK, PIXELS, {}), ("other", OTHER, PIXELS, {})],
        "steps[1].outputs.OUTPUT__0: expected a name that network does not make, found 'OUTPUT__0'",
    ),
    "another type": (
        [("prepare", config("prepare", ["IMAGE STRING 1"], ["PIXELS UINT8 3 16 16"]), {}, {}), CHAIN[1]],
        "network takes TYPE_FP32 [3, -1, -1], but prepare makes TYPE_UINT8 [3, 16, 16]",
    ),
    "other dims": (
        [("prepare", config("prepare", ["IMAGE STRING 1"], ["PIXELS FP32 3 15 16"]), {}, {}), ("other", OTHER, PIXELS, {})],
        "other takes TYPE_FP32 [3, 16, 16], but prepare makes TYPE_FP32 [3, 15, 16]",
    ),
    "two steps that take an input of the ensemble in two shapes": (
        [("join", JOIN, {"A": "x", "B": "x"}, {}), ("more", config("more", ["C FP32 9"], ["D FP32 9"]), {"C": "x"}, {})],
        "more takes TYPE_FP32 [9], but join takes TYPE_FP32 [10]",
    ),
    "a cycle": (
        [
            ("one", config("one", ["A FP32 2"], ["B FP32 2"]), {}, {}),
            ("two", config("two", ["B FP32 2", "X FP32 2"], ["A FP32 2"]), {}, {}),
        ],
        "steps: expected steps without a cycle, found one among one, two",
    ),
    "a step that takes its own output": (
        [("one", config("one", ["A FP32 2", "X FP32 2"], ["B FP32 2"]), {"A": "B"}, {})],
        "steps: expected steps without a cycle, found one among one",
    ),
    "steps of which only some batch": (
        [CHAIN[2], ("fixed", config("fixed", ["PIXELS FP32 3 16 16"], ["Y FP32 4 2"], 0), {"PIXELS": "other"}, {})],
        "steps: expected dims that begin with the batch (-1, or one number of at most 4) in fixed, which has max_batch_size 0 "
        "beside steps that batch, found TYPE_FP32 [3, 16, 16], TYPE_FP32 [4, 2]",
    ),
    "a fixed batch that is too large for a step that batches": (
        [CHAIN[2], ("fixed", config("fixed", ["X FP32 5 16"], ["Y FP32 5 2"], 0), {}, {})],
        "one number of at most 4) in fixed, which has max_batch_size 0",
    ),
    "a step without a batch that has one value per sample": (
        [CHAIN[2], ("free", config("free", ["X FP32 -1"], ["Y FP32 -1 2"], 0), {}, {})],
        "steps: expected free, which has max_batch_size 0, to have a dimension behind the batch, found TYPE_FP32 [-1]",
    ),
    "a step with ragged inputs": (
        [("sums", config("sums", [], ["Y FP32 1"], 8, RAGGED), {}, {})],
        "steps[0]: expected a model that takes batches, found sums, whose inputs are ragged",
    ),
    "a decoupled step": (
        [("many", config("many", ["A FP32 2"], ["B FP32 2"], 8, "model_transaction_policy { decoupled: true }"), {}, {})],
        "steps[0]: expected a model that answers each request once, found many, decoupled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_steps_that_do_not_fit_are_refused_with_one_line(kind: str) -> None:
    steps, line = WRONG[kind]
    with pytest.raises(UserError) as error:
        connected(steps)
    message = str(error.value)
    assert line in message
    assert message.startswith(f"{SPEC}: ensemble")
    assert "\n" not in message


def test_an_output_that_no_step_makes_is_refused() -> None:
    with pytest.raises(UserError, match=r"ensemble\.outputs: expected tensors of the steps, found 'Best'"):
        connected(BRANCHES, ("Best",))
