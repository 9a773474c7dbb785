"""The losses of a variational autoencoder: the divergence of its latent Gaussians from the standard one, and the whole objective."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from math import factorial
from typing import Any, NamedTuple

import numpy as np

from fastloss.call import LARGEST, Call, Definition, as_buffers, bounded, check_apart, refuse_unknown, to_float
from fastloss.formula import Formula
from fastloss.loss import AnyLoss, find_door, refuse_grad_output, signature
from fastloss.losses.logistic import binary_cross_entropy_with_logits, mse_with_logits_loss
from fastloss.ops import exp, minimum, polynomial, where
from fastloss.plan import Array, check_dtype, check_output, check_shapes

_OPTIONS = ("mask", "grad_output", "out")
# exp(x) - 1 - x = x**2 (1/2! + x/3! + x**2/4! + ...), to the last digit of float64 for -1 <= x <= 1.75
_EXP_TERMS = tuple(1.0 / factorial(k) for k in range(2, 24))
_EXP_35 = math.exp(35.0)  # an eighth of a unit in the last place off, in float32 and in float64


class LatentLoss(AnyLoss):
    """A loss of two arrays, mu and logvar, with gradients to both: called and asked for gradients as a `Loss` is.

    Where a `Loss` returns or takes one gradient, this does a pair: `grad`, `curvature`, and `out`.
    """

    operands = ("mu", "logvar")
    overwrites = False

    def __init__(self, function: Callable[..., Any]) -> None:
        formula = Formula(function)
        self._definition = Definition(formula, {}, (), ("weight", "reduction", *_OPTIONS), self.operands, buffers=2)
        functools.update_wrapper(self, function, updated=())
        self.__signature__ = signature(("mu", "logvar"), "mean", dict.fromkeys(_OPTIONS))
        self._register(self._definition)

    def __repr__(self) -> str:
        return f"<loss {self.__name__}>"

    def __call__(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, one a sample, or with reduction "none" an array of mu's dtype."""
        refuse_grad_output(options)
        if options.get("out") is not None:
            raise ValueError("out takes the two gradients, and the value alone has none: use grad or value_and_grad")
        if reduction == "none":
            return self._run((), ("value",), mu, logvar, weight, reduction, options)[1][0]
        return self._run(("value",), (), mu, logvar, weight, reduction, options)[0]

    def grad(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Array, Array]:
        """Return the gradients with respect to mu and to logvar."""
        slopes = self._run((), ("slope", "target_slope"), mu, logvar, weight, reduction, options)[1]
        return slopes[0], slopes[1]

    def value_and_grad(
        self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any
    ) -> tuple[Any, tuple[Array, Array]]:
        """Return the loss and its gradients with respect to mu and to logvar, from one pass over memory."""
        if reduction == "none":
            *slopes, value = self._run((), ("slope", "target_slope", "value"), mu, logvar, weight, reduction, options)[1]
        else:
            value, slopes = self._run(("value",), ("slope", "target_slope"), mu, logvar, weight, reduction, options)
        return value, (slopes[0], slopes[1])

    def curvature(self, mu: Any, logvar: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Array, Array]:
        """Return the second derivatives with respect to each element of mu and of logvar: the Hessian's diagonal."""
        curvatures = self._run((), ("curvature", "target_curvature"), mu, logvar, weight, reduction, options)[1]
        return curvatures[0], curvatures[1]

    def _compute(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str,
        options: dict[str, Any], call: type[Call] = Call
    ) -> tuple[Any, list[Array]]:  # fmt: skip
        mu, logvar = call.as_array("mu", first), call.as_array("logvar", second)
        check_latents(mu, logvar)
        one = call(self._definition, mu, logvar, weight, reduction, options)
        check_apart(one.buffers(), {"mu": mu, "logvar": logvar}, ("mu", "logvar"))
        return one.compute(summed, wanted)


def check_latents(mu: Array, logvar: Array) -> None:
    """Refuse arrays that are not those of one batch of Gaussians."""
    check_shapes("mu", mu.shape, "logvar", logvar.shape)
    check_dtype("mu", mu.dtype)
    check_dtype("logvar", logvar.dtype)


@LatentLoss
def gaussian_kl_loss(mu: Any, logvar: Any) -> Any:
    """Kullback-Leibler divergence of the normal distributions N(mu, exp(logvar)) from the standard one, N(0, 1).

    Per element:

        value     = (mu**2 + exp(logvar) - 1 - logvar) / 2
        slope     = mu                 by mu,    (exp(logvar) - 1) / 2  by logvar
        curvature = 1                  by mu,    exp(logvar) / 2        by logvar

    Near logvar = 0, where training starts and ends, exp(logvar) - 1 - logvar cancels to logvar**2 / 2: there it is a
    series, and so is the slope. No term is negative, and both keep their digits.

    Args:
        mu: means, any shape; float16, bfloat16, float32 or float64.
        logvar: logarithms of the variances, the same shape; these dtypes, not necessarily the same.
        weight: multiplies value and slopes; broadcasts against mu.
        reduction: "mean", "sum", "none", "batchmean" (the VAE convention: sum over latents, mean over the batch),
            "sample_mean", "sample_sum".
        mask, grad_output: as for every loss; see `fastloss.Loss`.
        out: a pair of arrays for the gradients; (mu, logvar) itself is allowed.

    Returns:
        As a `Loss` does, but `grad` and `curvature` return a pair, by mu and by logvar.

    Raises:
        ValueError: the shapes differ, or an option is out of range.
        TypeError: a dtype is not accepted, or an option is unknown.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951; Kingma and Welling, "Auto-Encoding Variational
        Bayes", 2013, appendix B.
    """
    # far out exp(logvar) overflows where its half does not; logvar - 35 is exact there, and e**35 almost
    far = logvar > 80.0
    half_exp = exp(where(far, logvar - 35.0, logvar)) * where(far, 0.5 * _EXP_35, 0.5)
    near = (logvar > -1.0) & (logvar < 1.75)
    excess = logvar * logvar * polynomial(logvar, _EXP_TERMS, 1.75)  # exp(logvar) - 1 - logvar
    half_expm1 = where(near, 0.5 * (logvar + excess), half_exp - 0.5)
    # beyond 1000 exp is inf, and inf - inf would be NaN
    half_excess = where(near, 0.5 * excess, half_expm1 - 0.5 * minimum(logvar, 1000.0))
    return (0.5 * mu) * mu + half_excess, mu, 1.0, half_expm1, 0.0, half_exp


class VAEValue(NamedTuple):
    """The objective of a variational autoencoder, a mean over the batch, and its two parts."""

    total: np.float64  # reconstruction + beta * divergence
    reconstruction: np.float64
    divergence: np.float64


class VAEGradient(NamedTuple):
    """The gradients of a variational autoencoder's objective."""

    reconstruction_logits: Array
    mu: Array
    logvar: Array


_VAE_OPTIONS = ("reconstruction", "beta", "weight", "mask", "ignore_index", "target_scale", "validate")
_RECONSTRUCTIONS = {"bce": binary_cross_entropy_with_logits, "mse": mse_with_logits_loss}


class VAELoss:
    """Negative evidence lower bound of a variational autoencoder: what it fails to reconstruct, and what its code costs.

        total          = reconstruction + beta * divergence
        reconstruction = sum over pixels, mean over the batch, of binary_cross_entropy_with_logits ("bce") or
                         mse_with_logits_loss ("mse")
        divergence     = sum over latents, mean over the batch, of gaussian_kl_loss

    Slopes: those of the parts, divided by the batch's length, and by mu and logvar times beta. Each array is read once.

    Args:
        reconstruction_logits: what the decoder returns, before the sigmoid; (N, ...), any float dtype.
        images: the same shape; floats in [0, 1], bool, or integers with `target_scale`, such as uint8 and 1/255.
        mu, logvar: what the encoder returns; the same shape, (N, ...).
        reconstruction: "bce" or "mse"; both squash the logits by a sigmoid.
        beta: weight of the divergence, from 0 on.
        weight, mask, ignore_index, target_scale, validate: of the images; see `fastloss.Loss`.
        grad_output: number that multiplies the gradients.
        out: three arrays for the gradients; the logits, mu and logvar themselves are allowed.

    Returns:
        Called: `VAEValue`, (total, reconstruction, divergence). `grad`: `VAEGradient`, (reconstruction_logits, mu, logvar).
        `value_and_grad`: both.

    Raises:
        ValueError: an unknown reconstruction, a negative beta, shapes that do not fit; nothing has been written.
        TypeError: a dtype is not accepted, or an option is unknown.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013; beta: Higgins et al., "beta-VAE", 2017.
    """

    __name__ = __qualname__ = "vae_loss"

    def __repr__(self) -> str:
        return "<loss vae_loss(reconstruction_logits, images, mu, logvar, *, reconstruction='bce', beta=1.0)>"

    def __reduce__(self) -> str:
        return "vae_loss"

    def __call__(
        self,
        reconstruction_logits: Any,
        images: Any,
        mu: Any,
        logvar: Any,
        *,
        reconstruction: str = "bce",
        beta: float = 1.0,
        **options: Any,
    ) -> VAEValue:
        """Return the objective and its two parts."""
        refuse_grad_output(options)
        door = find_door(reconstruction_logits)
        refuse_unknown(options, _VAE_OPTIONS if door is None or door.CALL else (*_VAE_OPTIONS, "inplace_grad"))
        loss, beta = _part(reconstruction), bounded("beta", beta, (0.0, LARGEST))
        mu, logvar = _check_batch(reconstruction_logits, mu, logvar, Call if door is None else door.CALL)
        divergence = gaussian_kl_loss(mu, logvar, reduction="batchmean")
        value = loss(reconstruction_logits, images, reduction="batchmean", **options)
        return _together(value, beta, divergence)

    def grad(self, reconstruction_logits: Any, images: Any, mu: Any, logvar: Any, **options: Any) -> VAEGradient:
        """Return the three gradients."""
        return self.value_and_grad(reconstruction_logits, images, mu, logvar, **options)[1]

    def value_and_grad(
        self,
        reconstruction_logits: Any,
        images: Any,
        mu: Any,
        logvar: Any,
        *,
        reconstruction: str = "bce",
        beta: float = 1.0,
        grad_output: float = 1.0,
        out: Any = None,
        **options: Any,
    ) -> tuple[VAEValue, VAEGradient]:
        """Return the objective with its two parts, and the three gradients."""
        operands = {"reconstruction_logits": reconstruction_logits, "images": images, "mu": mu, "logvar": logvar}
        options |= {"reconstruction": reconstruction, "beta": beta, "grad_output": grad_output, "out": out}
        if (door := find_door(reconstruction_logits)) is None:
            return self._compute(**operands, **options)
        result: tuple[VAEValue, VAEGradient] = door.through_arrays(self._compute, operands, options)
        return result

    def _compute(
        self, reconstruction_logits: Any, images: Any, mu: Any, logvar: Any, *, reconstruction: str, beta: float, grad_output: float,
        out: Any, call: type[Call] = Call, **options: Any
    ) -> tuple[VAEValue, VAEGradient]:  # fmt: skip
        """Do the same for arrays."""
        refuse_unknown(options, (*_VAE_OPTIONS, "grad_output", "out"))
        loss, beta = _part(reconstruction), bounded("beta", beta, (0.0, LARGEST))
        upstream = to_float("grad_output", grad_output)
        mu, logvar = _check_batch(reconstruction_logits, mu, logvar, call)
        # the latents are small: their gradients are copied once the images' pass has not raised, so that nothing is half written
        divergence, slopes = gaussian_kl_loss.value_and_grad(mu, logvar, reduction="batchmean", grad_output=beta * upstream)
        if not beta:  # then the latents do not count, not even if their divergence is infinite
            slopes = np.zeros_like(slopes[0]), np.zeros_like(slopes[1])
        reads = {"reconstruction_logits": reconstruction_logits, "images": images, "mu": mu, "logvar": logvar}
        reads |= {name: options[name] for name in ("weight", "mask") if options.get(name) is not None}
        buffers = _check_buffers(out, slopes, {name: call.as_array(name, x) for name, x in reads.items()}, call)
        value, slope = loss.value_and_grad(
            reconstruction_logits, images, reduction="batchmean", grad_output=upstream, out=buffers[0], **options
        )
        for buffer, computed in zip(buffers[1:], slopes, strict=True):
            if buffer is not None:
                np.copyto(buffer, computed)
        latent = [computed if buffer is None else buffer for buffer, computed in zip(buffers[1:], slopes, strict=True)]
        return _together(value, beta, divergence), VAEGradient(slope, *latent)


def _part(reconstruction: str) -> Any:
    """Return the loss that measures the reconstruction."""
    if not isinstance(reconstruction, str) or reconstruction not in _RECONSTRUCTIONS:
        raise ValueError(f"reconstruction is {reconstruction!r}; accepted: {', '.join(map(repr, _RECONSTRUCTIONS))}")
    return _RECONSTRUCTIONS[reconstruction]


def _together(reconstruction: Any, beta: float, divergence: Any) -> VAEValue:
    """Return the objective; with beta = 0 the divergence does not count, not even if it is infinite."""
    with np.errstate(all="ignore") if isinstance(reconstruction, np.floating) else contextlib.nullcontext():
        return VAEValue(reconstruction + (beta * divergence if beta else 0.0), reconstruction, divergence)


def _check_batch(reconstruction_logits: Any, mu: Any, logvar: Any, call: type[Call] | None) -> tuple[Any, Any]:
    """Return the latents as arrays of the call's kind, or as the tensors that they are; refuse those of another batch."""
    logits = reconstruction_logits
    if call is not None:
        logits, mu, logvar = call.as_array("reconstruction_logits", logits), call.as_array("mu", mu), call.as_array("logvar", logvar)
        check_latents(mu, logvar)
    images, codes = tuple(logits.shape), tuple(mu.shape)
    if not codes or images[:1] != codes[:1]:
        found = f"reconstruction_logits has shape {images} and mu {codes}"
        raise ValueError(f"{found}; their first axes, the batch, must be equal")
    return mu, logvar


def _check_buffers(out: Any, slopes: tuple[Array, Array], reads: dict[str, Array], call: type[Call]) -> list[Any]:
    """Return the caller's three buffers, or three times None; what the images' loss checks itself is left to it."""
    if out is None:
        return [None] * 3
    buffers = as_buffers(out, 3, call.check_buffer)
    for k, (buffer, slope) in enumerate(zip(buffers[1:], slopes, strict=True), 1):
        check_output(f"out[{k}]", buffer.shape, buffer.strides, buffer.dtype, slope.shape, slope.dtype)
    check_apart(buffers, reads, ("reconstruction_logits", "mu", "logvar"))
    return list(buffers)


vae_loss = VAELoss()
