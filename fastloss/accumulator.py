"""`Accumulator`: the value of a loss over a data set that arrives in batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from fastloss.backends.find import find_backend
from fastloss.core.accumulated import Sums, channels_of, check_channels, exact, joined, rounded
from fastloss.core.checks import check_reduction, refuse_unknown, warn_of_empty_mean

MOST_WAITING = 1 << 13  # samples whose sums wait to be added, because adding those of many batches at once takes less time


class Accumulator:
    """The value of a loss over a data set that arrives in batches, on one machine or on several.

        total = fastloss.Accumulator(fastloss.binary_cross_entropy_with_logits, target_scale=1 / 255)
        for logits, images in batches:
            total.update(logits, images)
        print(total.compute())

    The result is the loss of all batches joined along the first axis: with masks, ignored targets, weights and batches of different
    lengths, the mean of the batches' means is not. The numbers of each sample (an entry of the first axis) are added without any
    rounding. So on a CPU the same samples give the same bits, in whatever batches they arrive, in whatever order accumulators are
    merged, and on any number of threads, if all batches have the same memory order. On a GPU, a sample's own sum depends on the size
    of its batch in the last bits, and `update` waits for the device.

    A pickled accumulator has a few hundred bytes; one that is in use also holds the sums of its last samples, up to 8,192. With
    PyTorch, no gradient flows through it.

    Args:
        loss: a loss of fastloss, or one that `elementwise_loss` has made.
        reduction: "mean", "sum" or "batchmean"; None for the loss's own default. "none" gives one number for each channel with the Dice
            losses where `per_sample` is False. `vae_loss` has no reduction.
        options: options of the loss for every batch: numbers, or arrays that broadcast against each batch.

    Raises:
        TypeError: not a loss, or an option that the loss does not have.
        ValueError: a reduction that has no value over a data set.
    """

    def __init__(self, loss: Any, *, reduction: str | None = None, **options: Any) -> None:
        if not hasattr(loss, "sample_sums"):
            raise TypeError(f"loss is {loss!r}; accepted: a loss of fastloss, or one made by fastloss.elementwise_loss")
        self.loss, self.options = loss, options
        self.reduction: str = loss.default_reduction() if reduction is None else reduction
        refuse_unknown(options, loss.accumulated_options())
        check_reduction(self.reduction, loss.accumulated_reductions(options))
        self._options_of_batches = tuple(name for name in loss.accumulated_options() if name not in loss.settings)
        self.reset()

    def __repr__(self) -> str:
        return f"<Accumulator of {self.loss.__name__}, {self.reduction}: {self.samples} samples, {self.count} elements>"

    def reset(self) -> None:
        """Forget all batches."""
        self.samples = 0  # length of the first axes of all batches together
        self._channels: int | None = None
        self._added: Sums = {}
        self._waiting: list[dict[str, Any]] = []  # the sums of the samples that are not added yet, by batch
        self._waiting_samples = 0

    @property
    def _sums(self) -> Sums:
        """The sums over all samples."""
        self._add_waiting()
        return self._added

    @_sums.setter
    def _sums(self, sums: Sums) -> None:
        self._added, self._waiting, self._waiting_samples = sums, [], 0

    def _add_waiting(self) -> None:
        """Add the sums that wait."""
        if self._waiting:
            self._sums = joined(self._added, exact(*self._waiting))

    def __getstate__(self) -> dict[str, Any]:
        self._add_waiting()
        return vars(self)

    @property
    def count(self) -> float:
        """Number of elements that count, which no mask and no `ignore_index` excludes; with class weights, the sum of their weights."""
        total = float(self._sums["count"].rounded().sum()) if self._sums else 0.0
        return int(total) if total.is_integer() else total

    def update(self, *operands: Any, **options: Any) -> None:
        """Add a batch: the arrays that the loss takes, with `weight`, `mask` or other options of this batch.

        Settings that belong to the whole data set, such as `smooth` and `per_sample` of a Dice loss or `beta`, are those of the
        accumulator.

        Raises:
            TypeError, ValueError: as in a call of the loss. The accumulator is then unchanged.
        """
        names = self.loss.operands
        if len(operands) != len(names):
            found = f"{len(operands)} array{'s' * (len(operands) != 1)}"
            raise TypeError(f"update got {found}; accepted: {', '.join(names)}, and options by keyword")
        refuse_unknown(options, self._options_of_batches)
        backend = find_backend(operands[0])
        if backend.is_lazy:
            raise TypeError(
                f"{names[0]} is a {type(operands[0]).__name__} of Dask; accepted: call the loss itself, which adds up all blocks"
            )
        given = {name: x for name, x in {**self.options, **options}.items() if x is not None}
        backend.compute_jointly(self._take, dict(zip(names, operands, strict=True)), given)

    def _take(self, *, call: Any, **arguments: Any) -> tuple[()]:
        """Add a batch whose arrays the class `call` reads."""
        operands = [arguments.pop(name) for name in self.loss.operands]
        self._add(self.loss.host_sums(operands, arguments, call), len(operands[0]))
        return ()

    def _add(self, found: dict[str, Any], samples: int) -> None:
        """Add the sums of a batch's samples."""
        channels = max(math.prod(np.shape(x)[1:]) for x in found.values())
        if self._channels is not None:
            check_channels(self._channels, channels)
        self._channels, self.samples = channels, self.samples + samples
        self._waiting.append(found)
        self._waiting_samples += samples
        if self._waiting_samples >= MOST_WAITING:
            self._add_waiting()

    def merge_state(self, *others: Self) -> None:
        """Add the batches that other accumulators of the same loss and options have seen.

        Raises:
            TypeError: not an accumulator.
            ValueError: one of another loss, reduction or other options.
        """
        for other in others:
            if not isinstance(other, Accumulator):
                raise TypeError(f"merge_state got a {type(other).__name__}; accepted: accumulators of the same loss and options")
            if (self.loss, self.reduction) != (other.loss, other.reduction) or not same(self.options, other.options):
                raise ValueError(f"merge_state got {other!r} with {other.options}; this is {self!r} with {self.options}")
        sums = functools.reduce(joined, [other._sums for other in others], self._sums)
        self._sums, self.samples = sums, self.samples + sum(other.samples for other in others)
        self._channels = channels_of(sums) if sums else None

    def compute(self) -> Any:
        """Return the loss of all batches together, a float64 number; for `vae_loss` a `VAEValue`.

        A mean over no elements is NaN, with a RuntimeWarning.
        """
        if self.reduction != "sum" and not (self.count if self.reduction == "mean" else self.samples):
            warn_of_empty_mean()
        with np.errstate(all="ignore"):
            return self.loss.value_of_sums(rounded(self._sums), self.samples, self.reduction, self.options)


def same(these: Mapping[str, Any], those: Mapping[str, Any]) -> bool:
    """Whether options are equal, arrays included."""
    return these.keys() == those.keys() and all(np.array_equal(these[name], those[name]) for name in these)
