"""[engine] of a spec, as types. See tables.py for the other tables."""

from typing import Annotated, Literal

from msgspec import Meta, field

from build_tasks.spec.tables import END, Batch, Capability, Precision, Table, Text

Mebibytes = Annotated[int, Meta(ge=1, le=2**24)]
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Word = Annotated[str, Meta(pattern=f"^[A-Za-z_][A-Za-z0-9_]*{END}")]


class ProfileDimension(Table):
    """The lengths of an open dimension in one optimization profile."""

    min: Annotated[Length | None, Meta(description="Smallest length. Default: the smallest of the dimension.")] = None
    opt: Annotated[
        Length | None, Meta(description="Length that the profile is tuned for. Default: that of the dimension, or max.")
    ] = None
    max: Annotated[Length | None, Meta(description="Largest length. Default: the largest of the dimension.")] = None


class Profile(Table):
    """One optimization profile of the engine."""

    min_batch_size: Annotated[Batch | None, Meta(description="Smallest batch of the profile. Default: 1.")] = None
    opt_batch_size: Annotated[
        Batch | None, Meta(description="Batch that the profile is tuned for. Default: at most 8.")
    ] = None
    max_batch_size: Annotated[
        Batch | None, Meta(description="Largest batch of the profile. Default: the max_batch_size of the model.")
    ] = None
    dimensions: Annotated[
        dict[Word, ProfileDimension],
        Meta(description="Lengths of open dimensions by their words; height and width with [input]. Default: all."),
    ] = field(default_factory=dict)


class Engine(Table):
    """The engines that TensorRT and TensorRT-RTX compile."""

    # The graph that is compiled
    precision: Annotated[
        Precision, Meta(description="Precision of the compiled graph. tf32 is a flag of the builder.")
    ] = "fp16"
    keep_fp32: Annotated[
        list[Text],
        Meta(description="Nodes that stay in fp32: types of operators, or regular expressions for names of nodes."),
    ] = field(default_factory=list)
    keep_io_types: Annotated[
        bool, Meta(description="Keep inputs and outputs in fp32. Only fp16 graphs allow false.")
    ] = True
    calibration: Annotated[
        Text | None,
        Meta(description="Calibration samples for int8 and fp8, as in accuracy.samples, which is the default."),
    ] = None
    repair: Annotated[
        bool,
        Meta(description="If the gate fails, find the nodes that must stay in fp32, and record them in a lock file."),
    ] = False
    # Its optimization profile
    min_batch_size: Annotated[
        Batch | None,
        Meta(description="Smallest batch of the profile. Default: 1, or onnx.batch_size if the batch is fixed."),
    ] = None
    opt_batch_size: Annotated[
        Batch | None, Meta(description="Batch that the engine is tuned for. Default: at most 8.")
    ] = None
    max_batch_size: Annotated[
        Batch | None, Meta(description="Largest batch of the profile. Default: the max_batch_size of the model.")
    ] = None
    profiles: Annotated[
        list[Profile],
        Meta(
            description="Several optimization profiles, in the place of the three keys above. Each is tuned for some "
            "batches and lengths of open dimensions; together they must take all that clients may send."
        ),
    ] = field(default_factory=list)
    # The builder
    workspace: Annotated[
        Mebibytes | None, Meta(description="Memory limit of the builder in MiB. Default: all memory of the GPU.")
    ] = None
    optimization_level: Annotated[
        int, Meta(ge=0, le=5, description="A higher level takes longer to build and may give a faster engine.")
    ] = 3
    sparse_weights: Annotated[
        bool, Meta(description="Allow kernels for weights in which two of four values are zero.")
    ] = False
    refittable: Annotated[bool, Meta(description="Allow the weights to be replaced later.")] = False
    strip_plan: Annotated[
        bool, Meta(description="Leave the weights out of the engine. They must be refitted where it runs.")
    ] = False
    profiling_verbosity: Annotated[
        Literal["none", "layer_names_only", "detailed"], Meta(description="How much profilers show of the engine.")
    ] = "layer_names_only"
    # TensorRT only
    compute_capabilities: Annotated[
        list[Capability],
        Meta(description="Build one plan for each, all in one Triton model. Default: the GPU of this machine."),
    ] = field(default_factory=list)
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        Meta(description="GPUs that can run the plan besides the one that built it. TensorRT only."),
    ] = "none"
    version_compatible: Annotated[bool, Meta(description="Allow newer versions of TensorRT to run the plan.")] = False
    timing_cache: Annotated[
        Text | None,
        Meta(description="A timing cache in the model's folder, which is only read. Default: one in build/."),
    ] = None
    # TensorRT-RTX only
    rtx_compute_capabilities: Annotated[
        list[Capability],
        Meta(description="GPUs that an engine of TensorRT-RTX must run on. Default: all that it supports."),
    ] = field(default_factory=list)
