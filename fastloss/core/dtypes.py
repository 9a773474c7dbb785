"""The table of element types, with their names in NumPy, LLVM and CUDA."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np


class ElementType(NamedTuple):
    """One type that the elements of an array can have."""

    name: str  # in NumPy, in ml_dtypes and in PyTorch
    code: str  # in a kernel's spec: NumPy's type code, or B2 for bfloat16, whose NumPy code "V2" is that of any 2-byte structure
    size: int  # in bytes
    llvm: str  # kernels load bfloat16 and bool as integers and convert them
    cuda: str  # kernels load both 16-bit types as integers and convert them


TYPES = (
    ElementType("float16", "f2", 2, "half", "unsigned short"),
    ElementType("bfloat16", "B2", 2, "i16", "unsigned short"),
    ElementType("float32", "f4", 4, "float", "float"),
    ElementType("float64", "f8", 8, "double", "double"),
    ElementType("bool", "b1", 1, "i8", "unsigned char"),
    ElementType("int8", "i1", 1, "i8", "signed char"),
    ElementType("int16", "i2", 2, "i16", "short"),
    ElementType("int32", "i4", 4, "i32", "int"),
    ElementType("int64", "i8", 8, "i64", "long long"),
    ElementType("uint8", "u1", 1, "i8", "unsigned char"),
    ElementType("uint16", "u2", 2, "i16", "unsigned short"),
    ElementType("uint32", "u4", 4, "i32", "unsigned int"),
    ElementType("uint64", "u8", 8, "i64", "unsigned long long"),
)
BY_CODE = {t.code: t for t in TYPES}
FLOATS = tuple(t.name for t in TYPES if "float" in t.name)  # accepted for inputs
FRACTIONS = tuple(t.code for t in TYPES if "float" in t.name)
NAMES = tuple(t.name for t in TYPES)  # accepted for targets


@cache
def code_of(dtype: np.dtype[Any]) -> str:
    """Return the code of a dtype that is in the table."""
    return "B2" if dtype.name == "bfloat16" else dtype.str[1:]


@cache
def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is a floating-point type of the table, bfloat16 included."""
    return dtype.name in FLOATS


def float_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of an input beside targets of a dtype: the same, or float32 for integers."""
    return dtype if is_float(dtype) else np.dtype(np.float32)
