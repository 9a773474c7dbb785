"""The divergence of a variational autoencoder's latent distributions from the standard normal distribution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from math import factorial
from typing import Any

from fastloss.backends.find import find_backend
from fastloss.core.abstract_loss import AbstractLoss, signature
from fastloss.core.call import Arguments
from fastloss.core.checks import check_dtype, check_shapes, is_none, refuse_grad_output
from fastloss.core.definition import Definition
from fastloss.core.docstrings import OPERANDS, complete
from fastloss.core.overlap import check_buffers, span_of
from fastloss.core.plan import Array
from fastloss.formula import Formula
from fastloss.loss import VALUE
from fastloss.losses.table import row
from fastloss.ops import exp, minimum, polynomial, where

__all__ = ["gaussian_kl_loss"]

_SLOPES, _CURVATURES = ("slope", "target_slope"), ("curvature", "target_curvature")  # by mu and by logvar
_OPTIONS = ("mask", "grad_output", "out")
_OPERANDS = {"mu": OPERANDS["input"], "logvar": "The shape of mu; any of these dtypes."}
_OUT = "a pair of arrays for the gradients; (mu, logvar) itself is accepted, and is then overwritten."
_RETURNS = (
    "The call itself returns a float64 number, or arrays for the reductions that keep an axis. `grad` and `curvature` return a pair "
    "of arrays, by mu and by logvar; `value_and_grad` returns the value and the pair of gradients."
)
# exp(x) - 1 - x = x**2 (1/2! + x/3! + x**2/4! + ...), to the last digit of float64 for -1 <= x <= 1.75
_EXP_TERMS = tuple(1.0 / factorial(k) for k in range(2, 24))
_EXP_35 = math.exp(35.0)  # an eighth of an ulp off, in float32 and in float64


class LatentLoss(AbstractLoss):
    """A loss of two arrays, mu and logvar, with gradients to both. Its methods are those of a `Loss`.

    `grad` and `curvature` return a pair of arrays, and `out` takes a pair.
    """

    operands = ("mu", "logvar")
    gradients = 2

    def __init__(self, function: Callable[..., Any]) -> None:
        accepted = ("weight", "reduction", *_OPTIONS)
        self._definition = Definition(Formula(function), {}, (), accepted, self.operands, self.gradients)
        functools.update_wrapper(self, function, updated=())
        example = f"value, (by_mu, by_logvar) = fastloss.{function.__name__}.value_and_grad(mu, logvar)"
        self.__doc__ = complete(function.__doc__, ("weight", "reduction", *_OPTIONS), example, (), _OPERANDS, {"out": _OUT}, _RETURNS)
        self.__signature__ = signature(self.operands, "mean", dict.fromkeys(_OPTIONS))
        self.register(self._definition)

    def __call__(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, one number for each sample, or with reduction "none" an array of mu's dtype."""
        refuse_grad_output(options)
        if options.get("out") is not None:
            raise ValueError("out takes the two gradients, and the value alone has none: use grad or value_and_grad")
        if is_none(reduction):
            return find_backend(mu).compute(self, Arguments((), VALUE, mu, logvar, weight, reduction, options))[1][0]
        return find_backend(mu).compute(self, Arguments(VALUE, (), mu, logvar, weight, reduction, options))[0]

    def grad(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Array, Array]:
        """Return the gradients with respect to mu and to logvar."""
        slopes = find_backend(mu).compute(self, Arguments((), _SLOPES, mu, logvar, weight, reduction, options))[1]
        return slopes[0], slopes[1]

    def value_and_grad(
        self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any
    ) -> tuple[Any, tuple[Array, Array]]:
        """Return the loss and its gradients with respect to mu and to logvar, from one pass over memory."""
        if is_none(reduction):
            *slopes, value = find_backend(mu).compute(self, Arguments((), (*_SLOPES, "value"), mu, logvar, weight, reduction, options))[1]
        else:
            value, slopes = find_backend(mu).compute(self, Arguments(VALUE, _SLOPES, mu, logvar, weight, reduction, options))
        return value, (slopes[0], slopes[1])

    def curvature(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Array, Array]:
        """Return the second derivatives with respect to each element of mu and of logvar: the Hessian's diagonal."""
        curvatures = find_backend(mu).compute(self, Arguments((), _CURVATURES, mu, logvar, weight, reduction, options))[1]
        return curvatures[0], curvatures[1]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities in one pass."""
        mu, logvar = call.as_array("mu", arguments.first), call.as_array("logvar", arguments.second)
        check_shapes("mu", mu.shape, "logvar", logvar.shape)
        check_dtype("mu", mu.dtype)
        check_dtype("logvar", logvar.dtype)
        one = call(self._definition, arguments._replace(first=mu, second=logvar))
        spans = {name: span_of(x, call.address_of(x)) for name, x in (("mu", mu), ("logvar", logvar))}
        check_buffers([span_of(x, call.address_of(x)) for x in one.buffers()], spans, self.operands)
        outcome: tuple[Any, list[Any]] = one.compute()
        return outcome


@row(
    "Gaussian KL", "the latent code of a variational autoencoder", input="means, log-variances", arrays=("mu", "logvar"),
    gradients=(0, 1), is_elementwise=False, module="GaussianKLLoss",
    ulp={"value": 4, "slope": 0, "target_slope": 2.5, "curvature": 0, "target_curvature": 2.5},
)  # fmt: skip
@LatentLoss
def gaussian_kl_loss(mu: Any, logvar: Any) -> Any:
    """Kullback-Leibler divergence of the normal distributions N(mu, exp(logvar)) from N(0, 1).

    Per element:

        value     = (mu**2 + exp(logvar) - 1 - logvar) / 2
        slope     = mu                 by mu,    (exp(logvar) - 1) / 2  by logvar
        curvature = 1                  by mu,    exp(logvar) / 2        by logvar

    Near logvar = 0, where training starts and ends, exp(logvar) - 1 - logvar cancels to logvar**2 / 2. Value and slope come from
    its series there. No term of the value is negative, so both keep their digits.

    Args:
        mu: means.
        logvar: logarithms of the variances.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951; Kingma and Welling, "Auto-Encoding Variational
        Bayes", 2013, appendix B.
    """
    # exp(logvar) may overflow where its half does not; for such logvar, logvar - 35 is exact, and e**35 almost
    far = logvar > 80.0
    half_exp = exp(where(far, logvar - 35.0, logvar)) * where(far, 0.5 * _EXP_35, 0.5)
    near = (logvar > -1.0) & (logvar < 1.75)
    excess = logvar * logvar * polynomial(logvar, _EXP_TERMS, 1.75)  # exp(logvar) - 1 - logvar
    half_expm1 = where(near, 0.5 * (logvar + excess), half_exp - 0.5)
    # beyond 1000 exp is inf, and inf - inf would be NaN
    half_excess = where(near, 0.5 * excess, half_expm1 - 0.5 * minimum(logvar, 1000.0))
    return (0.5 * mu) * mu + half_excess, mu, 1.0, half_expm1, 0.0, half_exp
