"""Every argument of every loss, given every kind of bad value: only TypeError or ValueError comes out, and no array is changed."""

from __future__ import annotations

import datetime
import decimal
import fractions
import warnings

import numpy as np
import pytest

from tests.arguments import EVERY_LOSS, methods_of, options_of

pytestmark = pytest.mark.filterwarnings("ignore:mean of no elements")

REFUSALS = (TypeError, ValueError)
SHAPES = {"empty": (0, 3), "small": (2, 3)}
HUGE = (1 << 61) - 1  # elements of float32; the most that NumPy allows


class RaisedError(Exception):
    """RaisedError by arguments with hostile methods."""


def hostile(**methods):
    """Return an object with methods that return the given values, or raise an error that is given as a class."""

    def method(result):
        def call(self, *args, **kwargs):
            if isinstance(result, type):
                raise result
            return result

        return call

    return type("Hostile", (), {name: method(result) for name, result in methods.items()})()


def read_only(array):
    array.flags.writeable = False
    return array


# bad values by name, each made for the shape of the input
BAD = {
    "None": lambda shape: None,
    "text": lambda shape: "x",
    "empty text": lambda shape: "",
    "bytes": lambda shape: b"mean",
    "number as text": lambda shape: "1.0",
    "object": lambda shape: object(),
    "class": lambda shape: float,
    "function": lambda shape: len,
    "dict": lambda shape: {"a": 1},
    "set": lambda shape: {1.0},
    "iterator": lambda shape: iter([1.0]),
    "empty tuple": lambda shape: (),
    "list of text": lambda shape: ["a", "b", "c"],
    "ragged list": lambda shape: [[1.0], [1.0, 2.0]],
    "list of None": lambda shape: [None, None, None],
    "list of numbers": lambda shape: [0.5, 0.25, 1.0],
    "complex number": lambda shape: 1j,
    "complex NumPy number": lambda shape: np.complex64(1),
    "decimal": lambda shape: decimal.Decimal(1),
    "signalling decimal": lambda shape: decimal.Decimal("sNaN"),
    "fraction": lambda shape: fractions.Fraction(1, 2),
    "date": lambda shape: datetime.date(2024, 1, 1),
    "slice": lambda shape: slice(None),
    "ellipsis": lambda shape: ...,
    "huge integer": lambda shape: 10**400,
    "bool": lambda shape: True,
    "negative": lambda shape: -1,
    "NaN": lambda shape: float("nan"),
    "infinity": lambda shape: float("inf"),
    "minus infinity": lambda shape: float("-inf"),
    "NumPy datetime": lambda shape: np.datetime64("2024-01-01"),
    "masked": lambda shape: np.ma.masked,
    "memory": lambda shape: memoryview(b"abc"),
    "array of no axes": lambda shape: np.array(0.5, np.float32),
    "complex array": lambda shape: np.zeros(shape, complex),
    "longdouble array": lambda shape: np.zeros(shape, np.longdouble),
    "object array": lambda shape: np.full(shape, object()),
    "object array of numbers": lambda shape: np.full(shape, 0.5, object),
    "structured array": lambda shape: np.zeros(shape, [("a", np.float32)]),
    "array of void": lambda shape: np.zeros(shape, "V2"),
    "datetime array": lambda shape: np.zeros(shape, "M8[s]"),
    "timedelta array": lambda shape: np.zeros(shape, "m8[s]"),
    "text array": lambda shape: np.full(shape, "a"),
    "bytes array": lambda shape: np.full(shape, b"a"),
    "other byte order": lambda shape: np.zeros(shape, np.dtype(np.float32).newbyteorder()),
    "integers of other byte order": lambda shape: np.zeros(shape, np.dtype(np.int16).newbyteorder()),
    "integer array": lambda shape: np.zeros(shape, np.int64),
    "bool array": lambda shape: np.ones(shape, bool),
    "float16 array": lambda shape: np.zeros(shape, np.float16),
    "float32 array": lambda shape: np.zeros(shape, np.float32),
    "float64 array": lambda shape: np.zeros(shape, np.float64),
    "read-only array": lambda shape: read_only(np.zeros(shape, np.float32)),
    "masked array": lambda shape: np.ma.array(np.zeros(shape, np.float32)),
    "matrix": lambda shape: np.zeros(shape, np.float32).view(np.matrix),
    "array of another shape": lambda shape: np.zeros((5, 7), np.float32),
    "array of no elements": lambda shape: np.zeros((0, 0), np.float32),
    "array of more axes": lambda shape: np.zeros((1, *shape), np.float32),
    "array of 64 axes": lambda shape: np.zeros((1,) * 64, np.float32),
    "huge array": lambda shape: np.broadcast_to(np.float32(0), HUGE),
    "huge array of several axes": lambda shape: np.broadcast_to(np.float32(0), (1 << 30, 1 << 20, 3)),
    "tuple of arrays": lambda shape: (np.zeros(shape, np.float32),) * 2,
    "array that fails": lambda shape: hostile(__array__=RaisedError),
    "array that is text": lambda shape: hostile(__array__="x"),
    "array that is complex": lambda shape: hostile(__array__=np.zeros(shape, complex)),
    "broken array interface": lambda shape: hostile(__array_interface__=RaisedError),
    "wrong array interface": lambda shape: type("Wrong", (), {"__array_interface__": {"shape": (-1,), "typestr": "<f4", "version": 3}})(),
    "sequence of negative length": lambda shape: hostile(__len__=-1, __getitem__=0.0),
    "sequence that fails": lambda shape: hostile(__len__=3, __getitem__=RaisedError),
    "index that fails": lambda shape: hostile(__index__=RaisedError),
    "index that is text": lambda shape: hostile(__index__="x"),
    "float that fails": lambda shape: hostile(__float__=RaisedError),
    "float that is text": lambda shape: hostile(__float__="x"),
    "text that fails": lambda shape: hostile(__repr__=RaisedError, __str__=RaisedError),
    "not comparable": lambda shape: hostile(__eq__=RaisedError, __hash__=RaisedError),
    "attributes that fail": lambda shape: hostile(__getattr__=RaisedError),
}


# what is no error: names of BAD by argument, and for arguments of the same kind
FLOAT_ARRAYS = {"float16 array", "float32 array", "float64 array", "read-only array", "matrix"}
ARRAYS = FLOAT_ARRAYS | {"array of no axes", "bool", "bool array", "integer array", "list of numbers", "memory"}
NUMBERS = {"array of no axes", "bool", "decimal", "fraction"}
ANY_NUMBERS = NUMBERS | {"NaN", "infinity", "minus infinity", "negative"}
PARAMETERS = ARRAYS | NUMBERS
OF_ANY_SHAPE = {
    "array of another shape",
    "array of no elements",
    "array of more axes",
    "array of 64 axes",
    "empty tuple",
    "tuple of arrays",
}
ACCEPTED = {
    "weight": ARRAYS | ANY_NUMBERS - {"decimal", "fraction"},
    "pixel_weight": ARRAYS | ANY_NUMBERS - {"decimal", "fraction"} | {"empty tuple"},
    "mask": {"bool", "bool array"},
    "ignore_index": ANY_NUMBERS - {"NaN"},
    "target_scale": ANY_NUMBERS - {"NaN"} | {"masked"},
    "grad_output": ANY_NUMBERS | FLOAT_ARRAYS | {"bool array", "integer array", "masked"},
    "validate": {"bool"},
    "per_channel": {"bool"},
    "per_sample": {"bool"},
    "pos_weight": PARAMETERS | {"infinity"},
    "label_smoothing": PARAMETERS,
    "alpha": PARAMETERS | {"negative", "minus infinity"},
    "gamma": PARAMETERS | {"infinity"},
    "beta": PARAMETERS | {"infinity"},
    "delta": PARAMETERS | {"infinity"},
    "eps": PARAMETERS,
    "smooth": NUMBERS,
    "smooth_denominator": NUMBERS,
    "background": {"bool"},
    "squared": {"bool"},
    "zero_absent": {"bool"},
    "ce_weight": NUMBERS,
    "dice_weight": NUMBERS,
    "bce_weight": NUMBERS,
    "out": {"float32 array", "matrix"},
}
OPERANDS = {"targets": FLOAT_ARRAYS | {"bool array", "integer array"}, "classes": FLOAT_ARRAYS}  # floats: probabilities of classes
ENTROPY_TARGETS = OPERANDS["targets"] | ARRAYS | ANY_NUMBERS - {"decimal", "fraction"} | OF_ANY_SHAPE
HUGE_ARRAYS = ("huge array", "huge array of several axes")


def arguments_of(row):
    """Return every argument of a loss: positions of the operands, and names of the options."""
    return [*range(len(row.arrays)), *options_of(row)]


def accepted(row, argument):
    """Return the names of the values that a loss may accept for an argument, and of those that it is not given here."""
    if row.name == "binary_entropy" and argument == 0:  # the target alone decides the shape; a huge one would be read for years
        return ENTROPY_TARGETS | set(HUGE_ARRAYS)
    if isinstance(argument, int):  # a huge input is a case of its own
        of_inputs = set(HUGE_ARRAYS) if row.is_elementwise else {"array of no elements"} if row.has_classes else set()  # no classes
        return OPERANDS.get(row.arrays[argument], FLOAT_ARRAYS) | (of_inputs if argument == 0 else set())
    if argument == "reduction":  # a case of its own
        return set(HUGE_ARRAYS) if row.is_local else set()
    if argument == "out" and row.name == "gaussian_kl_loss":
        return ACCEPTED["out"] | {"tuple of arrays"}
    return ACCEPTED.get(argument, set())


def arguments(row, shape, argument):
    """Return good operands and outputs for a batch of a shape; whole numbers as targets, if the argument scales them."""
    operands = row.draw(np.random.default_rng(1), np.float32, shape)
    buffers = [np.full_like(operands[k], 7) for k in row.gradients]
    if argument == "target_scale":
        at = row.arrays.index("targets")
        operands[at] = operands[at].astype(np.uint8)
    return operands, buffers


def placed(row, argument, bad, operands, buffers, method):
    """Return operands and options with a bad value as one argument. A bad output is given at each position among good ones."""
    if isinstance(argument, int):
        operands[argument] = bad
    options = {"out": row.out(buffers)} if method in ("grad", "value_and_grad") else {}
    if argument == "out" and row.gradients and not row.has_one_gradient:
        return [{"out": tuple(bad if k == at else x for k, x in enumerate(buffers))} for at in range(len(buffers))] + [{"out": bad}]
    return [options if isinstance(argument, int) else options | {argument: bad}]


def outcome(row, method, operands, options):
    """Call a method of a loss. Return the exception that comes out, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about values that it converts
            getattr(row.loss, method)(*operands, **options)
    except Exception as error:
        return error
    return None


def assert_refused(row, method, argument, name, shape):
    """Assert that a bad value is refused with the right type of error, and that no array has changed.

    An error that a method of the value itself raises comes out as it is.
    """
    operands, buffers = arguments(row, shape, argument)
    bad = BAD[name](shape)
    for options in placed(row, argument, bad, operands, buffers, method):
        small = [x for x in (*operands, *buffers, bad) if type(x) is np.ndarray and not x.dtype.hasobject and x.size < HUGE >> 40]
        before = [x.tobytes() for x in small]
        error = outcome(row, method, operands, options)
        told = f"{row.name}, {method}, {argument} = {name} {shape}: {error!r}"
        assert isinstance(error, (*REFUSALS, RaisedError)), told
        assert not isinstance(error, RaisedError) or name.endswith(("fail", "fails", "comparable")) or "interface" in name, told
        assert [x.tobytes() for x in small] == before, told


CASES = [(row, argument) for row in EVERY_LOSS.values() for argument in arguments_of(row)]
IDS = [f"{row.name}-{argument if isinstance(argument, str) else row.arrays[argument]}" for row, argument in CASES]


@pytest.mark.parametrize("shape", [SHAPES["empty"], pytest.param(SHAPES["small"], marks=pytest.mark.slow)], ids=SHAPES)
@pytest.mark.parametrize(("case", "argument"), CASES, ids=IDS)
def test_bad_values_are_refused_and_nothing_is_written(case, argument, shape):
    names = BAD.keys() - accepted(case, argument) - ({"None"} if isinstance(argument, str) else set())
    assert len(names) > len(BAD) // 3
    for name in sorted(names):
        for method in methods_of(case):
            assert_refused(case, method, argument, name, shape)


@pytest.mark.parametrize(("case", "argument"), CASES, ids=IDS)
def test_other_values_are_accepted_or_refused(case, argument):
    """Values that some calls accept, on a batch of no elements, for which no kernel is compiled."""
    shape = SHAPES["empty"]
    for name in sorted(accepted(case, argument).difference(HUGE_ARRAYS)):
        for method in methods_of(case):
            operands, buffers = arguments(case, shape, argument)
            for options in placed(case, argument, BAD[name](shape), operands, buffers, method):
                error = outcome(case, method, operands, options)
                assert error is None or isinstance(error, REFUSALS), f"{case.name}, {method}, {argument} = {name}: {error!r}"


@pytest.mark.parametrize("name", HUGE_ARRAYS)
@pytest.mark.parametrize("case", [row for row in EVERY_LOSS.values() if row.is_local and "reduction" in options_of(row)], ids=str)
def test_a_huge_array_as_reduction(case, name):
    for method in methods_of(case):
        assert_refused(case, method, "reduction", name, SHAPES["small"])


@pytest.mark.parametrize("name", HUGE_ARRAYS)
@pytest.mark.parametrize("case", [row for row in EVERY_LOSS.values() if row.is_elementwise], ids=str)
def test_a_huge_input_with_a_target_of_another_shape(case, name):
    for method in ("__call__", "grad", "curvature"):
        operands, _ = arguments(case, SHAPES["small"], 0)
        operands[0] = BAD[name](None)
        error = outcome(case, method, operands, {"reduction": "none"})
        assert isinstance(error, REFUSALS), f"{method}: {error!r}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [row for row in EVERY_LOSS.values() if row.gradients], ids=str)
def test_outputs_that_overlap_other_arrays(case):
    """An output may be its own operand, element for element, and no other array that is read or written."""
    for at, own in enumerate(case.gradients):
        operands, buffers = arguments(case, SHAPES["small"], 0)
        backwards = operands[own][::-1]
        others = [backwards, *(x for k, x in enumerate(operands) if k != own), *(x for k, x in enumerate(buffers) if k != at)]
        for other in others:
            out = [other if k == at else x for k, x in enumerate(buffers)]
            before = [x.tobytes() for x in (*operands, *buffers)]
            for method in ("grad", "value_and_grad"):
                error = outcome(case, method, operands, {"out": case.out(out)})
                assert isinstance(error, ValueError), f"{method}, out[{at}] of shape {other.shape}: {error!r}"
                assert [x.tobytes() for x in (*operands, *buffers)] == before
