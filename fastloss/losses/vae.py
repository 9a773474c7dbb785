"""The objective of a variational autoencoder: the error of its reconstructions, and the divergence of its latent codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.find import find_backend
from fastloss.core.accumulated import Accumulated
from fastloss.core.checks import LARGEST, check_output, refuse_grad_output, refuse_unknown, to_bounded, to_buffers, to_float
from fastloss.core.docstrings import OPERANDS, complete
from fastloss.core.overlap import check_buffers, span_of
from fastloss.core.plan import Array
from fastloss.losses.latent import gaussian_kl_loss
from fastloss.losses.logistic import binary_cross_entropy_with_logits, mse_with_logits_loss
from fastloss.losses.table import row

__all__ = ["VAEGradient", "VAEValue", "vae_loss"]


class VAEValue(NamedTuple):
    """The objective of a variational autoencoder and its two parts, as means over the batch."""

    total: np.float64  # reconstruction + beta * divergence
    reconstruction: np.float64
    divergence: np.float64


class VAEGradient(NamedTuple):
    """The gradients of a variational autoencoder's objective."""

    reconstruction_logits: Array
    mu: Array
    logvar: Array


_RECONSTRUCTIONS = {"bce": binary_cross_entropy_with_logits, "mse": mse_with_logits_loss}


_IMAGE_OPTIONS = ("weight", "mask", "ignore_index", "target_scale", "validate")
_SETTINGS: dict[str, Any] = {"reconstruction": "bce", "beta": 1.0}
_OPTIONS = (*_SETTINGS, *_IMAGE_OPTIONS)
_OPERANDS = {
    "reconstruction_logits": "Shape (N, ...); float16, bfloat16 (`ml_dtypes`), float32 or float64.",
    "images": "The shape of the logits; these dtypes, bool, or integers of 8 to 64 bits.",
    "mu": OPERANDS["input"].replace("Any shape and strides", "Any strides"),
    "logvar": "The shape of mu; the float dtypes.",
}
_OWN = {
    "grad_output": "number that multiplies the gradients.",
    "out": "three arrays for the gradients; the logits, mu and logvar themselves are accepted, and are then overwritten.",
}
_EXAMPLE = "value, grads = fastloss.vae_loss.value_and_grad(logits, images, mu, logvar, target_scale=1 / 255)"
_RETURNS = (
    "The call itself returns `VAEValue`: (total, reconstruction, divergence). `grad` returns `VAEGradient`: (reconstruction_logits, mu, "
    "logvar). `value_and_grad` returns both."
)


class VAELoss(Accumulated):
    """Negative evidence lower bound of a variational autoencoder: reconstruction error plus divergence of the latent code.

        total          = reconstruction + beta * divergence
        reconstruction = sum over pixels, mean over the batch, of binary_cross_entropy_with_logits ("bce") or
                         mse_with_logits_loss ("mse")
        divergence     = sum over latents, mean over the batch, of gaussian_kl_loss

    The slopes are those of the parts, divided by the length of the batch; those by mu and logvar are multiplied by beta. Each array
    is read once.

    Args:
        reconstruction_logits: output of the decoder, before the sigmoid.
        images: the images to reconstruct, in [0, 1].
        mu: means from the encoder, (N, ...).
        logvar: log-variances from the encoder, (N, ...).
        reconstruction: "bce" or "mse"; both squash the logits by a sigmoid.
        beta: weight of the divergence, 0 or more.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013; beta: Higgins et al., "beta-VAE", 2017.
    """

    __doc__ = complete(__doc__, (*_IMAGE_OPTIONS, *_OWN), _EXAMPLE, ("images",), _OPERANDS, _OWN, _RETURNS)
    __name__ = __qualname__ = "vae_loss"
    operands = ("reconstruction_logits", "images", "mu", "logvar")
    options, settings = _OPTIONS, _SETTINGS

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
        backend = find_backend(reconstruction_logits)
        refuse_unknown(options, (*_OPTIONS, *backend.options))
        loss, beta = _reconstruction_loss(reconstruction), to_bounded("beta", beta, (0.0, LARGEST))
        mu, logvar = _to_latents(reconstruction_logits, mu, logvar, backend.as_array)
        shared = {name: x for name, x in options.items() if name == "process_group"}
        divergence = gaussian_kl_loss(mu, logvar, reduction="batchmean", **shared)
        value = loss(reconstruction_logits, images, reduction="batchmean", **options)
        return _add_parts(value, beta, divergence)

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
        result: tuple[VAEValue, VAEGradient] = find_backend(reconstruction_logits).compute_jointly(self._compute, operands, options)
        return result

    def _compute(
        self, reconstruction_logits: Any, images: Any, mu: Any, logvar: Any, *, reconstruction: str, beta: float, grad_output: float,
        out: Any, call: Any, **options: Any
    ) -> tuple[VAEValue, VAEGradient]:  # fmt: skip
        """Compute the value and the gradients on arrays that the class `call` reads."""
        refuse_unknown(options, (*_OPTIONS, "grad_output", "out"))
        loss, beta = _reconstruction_loss(reconstruction), to_bounded("beta", beta, (0.0, LARGEST))
        upstream = to_float("grad_output", grad_output)
        mu, logvar = _to_latents(reconstruction_logits, mu, logvar, call.as_array)
        # the latents are small: their gradients are copied after the pass over the images, which may raise; nothing is half written
        divergence, slopes = gaussian_kl_loss.value_and_grad(mu, logvar, reduction="batchmean", grad_output=beta * upstream)
        if not beta:  # the latents do not count, even if their divergence is infinite
            slopes = np.zeros_like(slopes[0]), np.zeros_like(slopes[1])
        reads = {"reconstruction_logits": reconstruction_logits, "images": images, "mu": mu, "logvar": logvar}
        reads |= {name: options[name] for name in ("weight", "mask") if options.get(name) is not None}
        buffers = _to_buffers(out, slopes, {name: call.as_array(name, x) for name, x in reads.items()}, call)
        value, slope = loss.value_and_grad(
            reconstruction_logits, images, reduction="batchmean", grad_output=upstream, out=buffers[0], **options
        )
        for buffer, computed in zip(buffers[1:], slopes, strict=True):
            if buffer is not None:
                np.copyto(buffer, computed)
        latent = [computed if buffer is None else buffer for buffer, computed in zip(buffers[1:], slopes, strict=True)]
        return _add_parts(value, beta, divergence), VAEGradient(slope, *latent)

    def accumulated_reductions(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the loss's only reduction."""
        return ("batchmean",)

    def default_reduction(self) -> str:
        """Return the loss's only reduction."""
        return "batchmean"

    def sample_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return the sums of the samples; see `Accumulated`."""
        logits, images, mu, logvar = operands
        mu, logvar = _to_latents(logits, mu, logvar, call.as_array)
        of_images = {name: x for name, x in options.items() if name in _IMAGE_OPTIONS}
        loss = _reconstruction_loss({**_SETTINGS, **options}["reconstruction"])
        divergence = gaussian_kl_loss.sample_sums((mu, logvar), {}, call)["value"]
        return {**loss.sample_sums((logits, images), of_images, call), "divergence": divergence}

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> VAEValue:
        """Return the objective and its parts, given the sums."""
        image, latent = (sums[name][0] if sums else np.float64(0.0) for name in ("value", "divergence"))
        return _add_parts(image / samples, to_bounded("beta", {**_SETTINGS, **options}["beta"], (0.0, LARGEST)), latent / samples)


def _reconstruction_loss(reconstruction: str) -> Any:
    """Return the loss that a value of `reconstruction` names."""
    if not isinstance(reconstruction, str) or reconstruction not in _RECONSTRUCTIONS:
        raise ValueError(f"reconstruction is {reconstruction!r}; accepted: {', '.join(map(repr, _RECONSTRUCTIONS))}")
    return _RECONSTRUCTIONS[reconstruction]


def _add_parts(reconstruction: Any, beta: float, divergence: Any) -> VAEValue:
    """Return the objective with its parts. With beta = 0 the divergence does not count, even if it is infinite."""
    with np.errstate(all="ignore") if isinstance(reconstruction, np.floating) else contextlib.nullcontext():
        return VAEValue(reconstruction + (beta * divergence if beta else 0.0), reconstruction, divergence)


def _to_latents(logits: Any, mu: Any, logvar: Any, as_array: Callable[[str, Any], Any]) -> tuple[Any, Any]:
    """Convert the latents to arrays, and refuse those whose first axis is not that of the logits."""
    mu, logvar = as_array("mu", mu), as_array("logvar", logvar)
    images, codes = tuple(as_array("reconstruction_logits", logits).shape), tuple(mu.shape)
    if not codes or images[:1] != codes[:1]:
        found = f"reconstruction_logits has shape {images} and mu {codes}"
        raise ValueError(f"{found}; their first axes, the batch, must be equal")
    return mu, logvar


def _to_buffers(out: Any, slopes: tuple[Array, Array], reads: dict[str, Array], call: Any) -> list[Any]:
    """Return the caller's three buffers, or a list of three None. The first buffer is checked further by the reconstruction's loss."""
    if out is None:
        return [None] * 3
    buffers = to_buffers(out, 3, call.check_buffer)
    for k, (buffer, slope) in enumerate(zip(buffers[1:], slopes, strict=True), 1):
        check_output(f"out[{k}]", (buffer.dtype, buffer.shape, buffer.strides), slope.shape, slope.dtype)
    spans = {name: span_of(x, call.address_of(x)) for name, x in reads.items()}
    check_buffers([span_of(x, call.address_of(x)) for x in buffers], spans, ("reconstruction_logits", "mu", "logvar"))
    return list(buffers)


vae_loss = row(
    "VAE", "the whole objective of a variational autoencoder", input="logits, images, means, log-variances",
    arrays=("logits", "targets", "latent_mu", "latent_logvar"), gradients=(0, 2, 3), reduction="batchmean", is_elementwise=False,
)(VAELoss())  # fmt: skip
