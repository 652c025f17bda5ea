"""Axis legend and array aliases, used by every package.

    B  batch rows            N  query heads             L  decoder layers
    T  positions             K  key/value heads         V  vocabulary
    D  d_model               H  head_dim                I  iterations of the stack at one position
    F  d_ff                  R  LoRA rank               S  slots of a key/value cache

At iteration depth I every position is unfolded into I consecutive *steps*, so an activation is [B, T*I, D] and step
t*I + i is iteration i of position t. At depth 1 steps are positions and the shape is the usual [B, T, D].

The aliases are checked at run time in the tests (jaxtyping with beartype) and cost nothing elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8, UInt32

AnyArray = Array | np.ndarray  # on a device or in the host's memory

Tokens = Int[AnyArray, "B T"]
SegmentIds = Int[AnyArray, "B T"]  # 0 is padding, documents count from 1
Positions = Int[AnyArray, "B T"]  # restart at 0 with every document
Logits = Float[Array, "B T V"]
Hidden = Float[Array, "B TI D"]  # the residual stream, or a state
IteratedHidden = Float[Array, "B T I D"]  # the same, some or all of the iterations apart
Queries = Float[Array, "B TI N H"]
KeysValues = Float[Array, "B TI K H"]
PositionKeys = Float[Array, "B T K H"]  # keys or values that one iteration of each position leaves
OnePositionKeys = Float[Array, "B 1 K H"]
AttentionOutput = Float[Array, "B TI NH"]  # heads side by side, before their projection
StepMask = Bool[Array, "B TI 1"]
StepRamp = Float[Array, "B TI 1"]  # a factor of alpha
Activations = Float[Array, "*B D"]  # of all steps, of one, or of one position
AnyFloat = Float[Array, "..."]
AnyInts = Int[AnyArray, "..."]
AllStates = Float[Array, "L B T I D"]
AllSteps = Float[Array, "L B TI D"]
StepScalars = Float[Array, "B TI"]
AllStepScalars = Float[Array, "L B TI"]
LayerIterations = Float[Array, "L I"]
RotaryTable = Float[Array, "B T half"]  # cosines or sines, half = H/2
QueryScale = Float[Array, "B T 1"]  # what queries at a position are multiplied by
Heads = Float[Array, "B T heads H"]
AttentionMask = Bool[Array, "rows 1 T S"]  # rows: B, B * I or 1
SeenKeys = Bool[Array, "B S"]
Alpha = Float[Array, "#D"]  # one a dimension, or one for all
Gain = Float[Array, "1"]
Scalar = Float[Array, ""]
Ring = Int[Array, "B slots"]  # the position that each slot of a ring holds
Frequencies = Float[np.ndarray, "half"]  # radians a position
ScalarInt = Int[Array, ""]
ScalarBool = Bool[Array, ""]

Kernel = Num[Array, "*L inputs outputs"]  # of a linear, or of a stack of them
LinearInputs = Float[Array, "*B inputs"]
LinearOutputs = Float[Array, "*B outputs"]
EachKernel = Num[Array, "*L inputs _"]  # of one of several linears of the same inputs
EachOutputs = Float[Array, "*B _"]  # of one of several linears
Gram = Float[Array, "inputs inputs"]  # sum of x^T x over a linear's inputs x, or a factor of its inverse
# A linear as it is stored: a dict of arrays, such as {"kernel": ...}, other names under a quantised storage.
Leaf = Mapping[str, Array]
# NF4, where blocks of inputs share a scale; *L holds the axes before.
WeightBlocks = Float[Array, "*L block outputs"]
BlockScales = Float[Array, "*L outputs"]
UnitWeights = Float[Array, "*W"]  # divided by their block's scale
UnitCodes = UInt8[Array, "*W"]  # number of the nearest level
Codes = UInt8[Array, "*L inputs outputs"]
PackedCodes = UInt8[Array, "*L half outputs"]  # two codes a byte, half = inputs/2
Embedding = Float[Array, "V D"]
Params = dict[str, Any]  # a tree of parameters: nested dicts of arrays


@runtime_checkable
class LayerStack(Protocol):
    """The arrays [L, ...] of one parameter: an array, or what reads a layer from a file when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, layer: int, /) -> AnyArray: ...


PyTree = Array | np.ndarray | Mapping[str, Any] | Sequence[Any] | None  # a tree of arrays, as JAX maps over it
Json = dict[str, Any]  # a JSON object
ReadOnlyJson = Mapping[str, Any]
FieldValue = bool | int | float | str | tuple | list | None  # of a config's field
JsonValue = None | bool | int | float | str | list[Any] | Json  # anything that JSON may hold
HostArray = np.ndarray  # of any shape and type, in the host's memory
HostArrays = dict[str, np.ndarray]  # by name
HostFloats = Float[np.ndarray, "..."]  # of any shape, each its own
HostInts = Int[np.ndarray, "..."]

# Training. M counts the positions of all rows, one after another.
AnswerMask = Bool[AnyArray, "B T"]  # tokens that are learned
Losses = Float[Array, "B T"]  # nats, 0 where nothing is learned
FlatHidden = Float[Array, "M D"]
FlatTokens = Int[AnyArray, "M"]
FlatIndex = Int[Array, "rows"]  # positions of a block of the loss
BlockHidden = Float[Array, "rows D"]
BlockLosses = Float[Array, "rows"]
BlockMask = Bool[Array, "rows"]
FlatMask = Bool[AnyArray, "M"]
FlatLosses = Float[Array, "M"]
HeadTable = Float[Array, "V D"]
Fraction = Scalar
RandomKey = Array  # of `jax.random.key`, whose dtype no shape string names
DeviceArrays = dict[str, Array]  # by name

# Decoding, one position a row.
RowInts = Int[Array, "B"]
RowFloats = Float[Array, "B"]
RowBools = Bool[Array, "B"]
RowHidden = Float[Array, "B D"]  # normed hidden states of one position
RowStates = Float[Array, "L B D"]  # each layer's state
PastStates = Float[Array, "steps L B D"]  # of several steps
RowLogits = Float[Array, "B V"]
SomeLogits = Float[Array, "*B V"]  # of positions in any arrangement
SomeTokens = Int[Array, "*B"]
PositionHidden = Float[Array, "T D"]  # normed hidden states of one sequence
PositionTokens = Int[AnyArray, "T"]
TokenIds = Sequence[int] | Int[np.ndarray, "T"]  # of a text
PickedRows = Int[Array, "picked"]  # places in a batch
PickedHidden = Float[Array, "picked D"]
CacheStack = Float[Array, "layers B _ K H"]  # keys or values of one kind of layers, of slots or of new positions
LayerStates = Float[np.ndarray, "L D"]  # one sequence's states, on the host
HostTokens = Int[np.ndarray, "B T"]
HostRowInts = Int[np.ndarray, "B"]
HostRowBools = Bool[np.ndarray, "B"]
# What the host says of each row, or a program computed.
AnyRowInts = Int[AnyArray, "B"]
AnyRowSeeds = UInt32[AnyArray, "B"]
AnyRowFloats = Float[AnyArray, "B"]
AnyRowBools = Bool[AnyArray, "B"]
