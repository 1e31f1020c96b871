"""Converts a traced JAX function to an ONNX model, for services without JAX.

Existing converters require other versions of the training libraries. This one covers the primitives
of our networks, about forty; each is one line or one function in `OPERATORS`. Values that do not
depend on the input (BatchNorm scales, position embeddings, transposed kernels) are computed during
the conversion and stored as constants.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from afa.errors import UserError

OPSET = 18
IR_VERSION = 9  # older than the default of onnx, because runtimes refuse newer versions than theirs
INPUT, OUTPUT, ROWS = "views", "vectors", "rows"
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
BEYOND = 2**31 - 1  # slice end beyond the end of any axis
# Primitives that contain a jaxpr, with their names in several versions of JAX.
INLINED = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")

Known = np.ndarray | Array
Value = Known | str  # a constant, or the name of a tensor of the graph


def model(function: Callable[[Array], Array], size: int, about: Mapping[str, str]) -> bytes:
    """Converts a function of any number of images to an ONNX model.

    Args:
      function: uint8 images (rows, size, size, 3) -> (rows, d). Arrays in its closure are stored as
        constants.
      size: side of the images in pixels.
      about: metadata of the model.

    Returns:
      Content of the ONNX file.

    Raises:
      UserError: onnx is not installed, or the function uses a primitive that is not in `OPERATORS`.
    """
    try:
        import onnx  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("an ONNX file needs onnx (pip install 'afa[onnx]')") from None
    rows = export.symbolic_shape(ROWS)[0]
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8))
    graph, make = Graph(onnx.helper, rows), onnx.helper
    (result,) = run(graph, traced.jaxpr, traced.consts, [INPUT])
    graph.nodes.append(make.make_node("Identity", [graph.name_of(result)], [OUTPUT]))
    nodes, stored = graph.reached(OUTPUT)
    shapes = [ROWS, size, size, 3], [ROWS, *traced.out_avals[0].shape[1:]]
    body = make.make_graph(
        nodes,
        "embed",
        [make.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, shapes[0])],
        [make.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, shapes[1])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [make.make_opsetid("", OPSET)]
    made = make.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
    make.set_model_props(made, dict(about))
    onnx.checker.check_model(made)
    return made.SerializeToString()


class Graph:
    """Nodes and constants of a model under construction.

    Attributes:
      make: `onnx.helper`.
      rows: symbolic number of images.
    """

    def __init__(self, make: Any, rows: Any) -> None:
        self.make, self.rows = make, rows
        self.nodes: list[Any] = []
        self._stored: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, operator: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or the names of its outputs."""
        names = [self._new_name() for _ in range(outputs)]
        input_names = [self.name_of(each) for each in inputs]
        self.nodes.append(self.make.make_node(operator, input_names, names, **attributes))
        return names[0] if outputs == 1 else names

    def name_of(self, value: Value) -> str:
        """Returns the name of a tensor; a constant is stored first."""
        if isinstance(value, str):
            return value
        name = self._new_name()
        self._stored[name] = np.asarray(value)
        return name

    def reshape(self, x: Value, shape: Sequence[Any]) -> str:
        """Reshapes; at most one dimension may depend on the number of images."""
        return self.add("Reshape", x, integers(*(side if fixed(side) else -1 for side in shape)))

    def expand(self, x: Value, shape: Sequence[Any]) -> str:
        """Broadcasts dimensions of size 1 to a shape."""
        rows = self.add("Shape", INPUT, start=0, end=1)
        sides = [
            integers(side) if fixed(side) else self.add("Mul", rows, integers(side // self.rows))
            for side in shape
        ]
        return self.add("Expand", x, self.add("Concat", *sides, axis=0))

    def reached(self, output: str) -> tuple[list[Any], dict[str, np.ndarray]]:
        """Returns the nodes and constants that an output depends on."""
        wanted, nodes = {output}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                nodes.append(node)
        return nodes[::-1], {name: a for name, a in self._stored.items() if name in wanted}

    def _new_name(self) -> str:
        self._count += 1
        return f"t{self._count}"


def run(graph: Graph, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Adds the equations of a jaxpr to the graph; returns its outputs."""
    arrays = map(np.asarray, consts)  # JAX 0.7 has constants of a class of its own
    values: dict[Any, Value] = dict(zip(jaxpr.constvars, arrays, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)

    def read(atom: Any) -> Value:
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        results = _apply(graph, equation, [read(each) for each in equation.invars])
        values |= zip(equation.outvars, results, strict=True)
    return [read(each) for each in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    name, shapes = equation.primitive.name, [each.aval.shape for each in equation.outvars]
    if name in INLINED:
        inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
        return run(graph, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    if all(0 in filter(fixed, shape) for shape in shapes):  # empty, such as padding by 0
        return [np.zeros([side if fixed(side) else 0 for side in shape], np.float32)
                for shape in shapes]  # fmt: skip
    if all(map(fixed, sum(shapes, ()))) and not any(isinstance(each, str) for each in inputs):
        found = equation.primitive.bind(*inputs, **equation.params)
        return list(found) if equation.primitive.multiple_results else [found]
    if name not in OPERATORS:
        raise UserError(
            f"this network cannot be written as ONNX: primitive {name!r} is not supported"
        )
    found = OPERATORS[name](graph, equation, *inputs)
    return found if isinstance(found, list) else [found]


def fixed(side: Any) -> bool:
    """Whether a dimension is a number, not symbolic."""
    return isinstance(side, int)


def integers(*numbers: int) -> np.ndarray:
    """Returns an int64 array."""
    return np.asarray(numbers, np.int64)


# ---- operators -----------------------------------------------------------------------------------


def _plain(operator: str) -> Callable[..., str]:
    return lambda graph, equation, *inputs: graph.add(operator, *inputs)


def _alias(graph: Graph, equation: Any, x: Value) -> Value:
    return x


def _number(equation: Any, value: int | float) -> np.ndarray:
    return np.asarray(value, equation.invars[0].aval.dtype)


def _rsqrt(graph: Graph, equation: Any, x: Value) -> str:
    return graph.add("Reciprocal", graph.add("Sqrt", x))


def _log1p(graph: Graph, equation: Any, x: Value) -> str:
    # x log(1 + x) / ((1 + x) - 1) corrects the rounding of 1 + x (Goldberg 1991, theorem 4).
    one = _number(equation, 1)
    total = graph.add("Add", x, one)
    scaled = graph.add("Mul", x, graph.add("Log", total))
    exact = graph.add("Div", scaled, graph.add("Sub", total, one))
    return graph.add("Where", graph.add("Equal", total, one), x, exact)


def _erfc(graph: Graph, equation: Any, x: Value) -> str:
    return graph.add("Sub", _number(equation, 1), graph.add("Erf", x))


def _cast(graph: Graph, equation: Any, x: Value) -> str:
    kind = np.dtype(equation.params["new_dtype"])
    return graph.add("Cast", x, to=graph.make.np_dtype_to_tensor_dtype(kind))


def _broadcast(graph: Graph, equation: Any, x: Value, *_: Value) -> str:
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    own = dict(zip(kept, equation.invars[0].aval.shape, strict=True))
    before = [own.get(axis, 1) for axis in range(len(shape))]
    reshaped = graph.reshape(x, before)
    return reshaped if before == list(shape) else graph.expand(reshaped, shape)


def _concatenate(graph: Graph, equation: Any, *parts: Value) -> str:
    nonempty = [part for part in parts if isinstance(part, str) or part.size]
    return graph.add("Concat", *nonempty, axis=equation.params["dimension"])


def _reshape(graph: Graph, equation: Any, x: Value, *_: Value) -> str:
    return graph.reshape(x, equation.outvars[0].aval.shape)


def _transpose(graph: Graph, equation: Any, x: Value) -> str:
    return graph.add("Transpose", x, perm=equation.params["permutation"])


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    params, shape = equation.params, equation.invars[0].aval.shape
    steps = params["strides"] or (1,) * len(shape)
    cuts = [
        (axis, _index(start, side), _index(stop, side), step)
        for axis, (start, stop, step, side) in enumerate(
            zip(params["start_indices"], params["limit_indices"], steps, shape, strict=True)
        )
        if (start, stop, step) != (0, side, 1)
    ]
    if not cuts:
        return x
    axes, starts, stops, steps = (integers(*each) for each in zip(*cuts, strict=True))
    return graph.add("Slice", x, starts, stops, axes, steps)


def _index(index: Any, side: Any) -> int:
    """Index of a slice; counted from the end if it depends on the number of images."""
    return index if fixed(index) else (index - side) or BEYOND


def _reverse(graph: Graph, equation: Any, x: Value) -> str:
    axes = equation.params["dimensions"]
    last, before_first = integers(*[-1] * len(axes)), integers(*[-BEYOND] * len(axes))
    return graph.add("Slice", x, last, before_first, integers(*axes), last)


def _gather(graph: Graph, equation: Any, x: Value, indices: Value) -> str:
    """A block that begins at constant indices, or constant indices along one axis: the forms of
    indexing next to a symbolic dimension."""
    how, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    axes = how.start_index_map
    if not isinstance(indices, str) and np.ndim(indices) == 1:
        starts = np.asarray(indices, np.int64)
        stops = starts + [equation.params["slice_sizes"][axis] for axis in axes]
        block = graph.add("Slice", x, starts, stops, integers(*axes))
        return graph.reshape(block, equation.outvars[0].aval.shape)
    others = tuple(each for each in range(len(shape)) if each not in axes)
    if isinstance(indices, str) or len(axes) != 1 or how.offset_dims != others:
        raise UserError("this network cannot be written as ONNX: an index depends on the input")
    return graph.add("Gather", x, np.asarray(indices, np.int64)[:, 0], axis=axes[0])


def _split(graph: Graph, equation: Any, x: Value) -> list[str]:
    sizes, axis = equation.params["sizes"], equation.params["axis"]
    if len(sizes) == 1:
        return [graph.add("Identity", x)]
    if all(map(fixed, sizes)):
        return graph.add("Split", x, integers(*sizes), outputs=len(sizes), axis=axis)
    return graph.add("Split", x, outputs=len(sizes), axis=axis, num_outputs=len(sizes))


def _reduce(operator: str) -> Callable[..., str]:
    return lambda graph, equation, x: graph.add(
        operator, x, integers(*equation.params["axes"]), keepdims=0
    )


def _select(graph: Graph, equation: Any, which: Value, no: Value, yes: Value) -> str:
    return graph.add("Where", which, yes, no)


def _different(graph: Graph, equation: Any, x: Value, y: Value) -> str:
    return graph.add("Not", graph.add("Equal", x, y))


def _dot(graph: Graph, equation: Any, x: Value, y: Value) -> str:
    (over_x, over_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    ranks = [len(each.aval.shape) for each in equation.invars]
    if not batch_x and over_y == (0,) and over_x == (ranks[0] - 1,) and ranks[1] == 2:
        return graph.add("MatMul", x, y)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_x = [next(letters) for _ in range(ranks[0])]
    same = dict(zip((*batch_y, *over_y), (of_x[i] for i in (*batch_x, *over_x)), strict=True))
    of_y = [same.get(i) or next(letters) for i in range(ranks[1])]
    out = [of_x[i] for i in batch_x]
    out += [of_x[i] for i in range(ranks[0]) if i not in (*batch_x, *over_x)]
    out += [of_y[i] for i in range(ranks[1]) if i not in (*batch_y, *over_y)]
    text = f"{''.join(of_x)},{''.join(of_y)}->{''.join(out)}"
    return graph.add("Einsum", x, y, equation=text)


def _pads(pads: Sequence[tuple[int, int]]) -> list[int]:
    return [int(before) for before, _ in pads] + [int(after) for _, after in pads]


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> str:
    params = equation.params
    numbers = params["dimension_numbers"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise UserError("this network cannot be written as ONNX: it has transposed convolutions")
    found = graph.add(
        "Conv",
        graph.add("Transpose", x, perm=numbers.lhs_spec),
        np.transpose(np.asarray(kernel), numbers.rhs_spec),
        strides=params["window_strides"],
        pads=_pads(params["padding"]),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return graph.add("Transpose", found, perm=np.argsort(numbers.out_spec).tolist())


def _pool(operator: str) -> Callable[..., str]:
    """Pools over height and width of an NHWC map; "AveragePool" is scaled to a sum."""

    def pool(graph: Graph, equation: Any, x: Value, *_: Value) -> str:
        params = equation.params
        window = params["window_dimensions"][1:3]
        sums = operator == "AveragePool"
        found = graph.add(
            operator,
            graph.add("Transpose", x, perm=TO_NCHW),
            kernel_shape=window,
            strides=params["window_strides"][1:3],
            pads=_pads(params["padding"][1:3]),
            **({"count_include_pad": 1} if sums else {}),
        )
        if sums:
            found = graph.add("Mul", found, _number(equation, math.prod(window)))
        return graph.add("Transpose", found, perm=TO_NHWC)

    return pool


OPERATORS: dict[str, Callable[..., Any]] = {
    "abs": _plain("Abs"),
    "add": _plain("Add"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "copy": _alias,
    "div": _plain("Div"),
    "dot_general": _dot,
    "eq": _plain("Equal"),
    "erfc": _erfc,
    "exp": _plain("Exp"),
    "floor": _plain("Floor"),
    "gather": _gather,
    "ge": _plain("GreaterOrEqual"),
    "gt": _plain("Greater"),
    "log": _plain("Log"),
    "log1p": _log1p,
    "logistic": _plain("Sigmoid"),
    "lt": _plain("Less"),
    "max": _plain("Max"),
    "min": _plain("Min"),
    "mul": _plain("Mul"),
    "ne": _different,
    "neg": _plain("Neg"),
    "pow": _plain("Pow"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "reshape": _reshape,
    "rev": _reverse,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "sqrt": _plain("Sqrt"),
    "square": lambda graph, equation, x: graph.add("Mul", x, x),
    "squeeze": _reshape,
    "stop_gradient": _alias,
    "sub": _plain("Sub"),
    "transpose": _transpose,
}
