"""The one table of losses that the tests are run over."""

from __future__ import annotations

from types import SimpleNamespace

import fastloss as fl
from fastloss import reference
from tests import oracle

LOSSES = {
    name: SimpleNamespace(loss=getattr(fl, name), oracle=getattr(oracle, name), reference=getattr(reference, name))
    for name in ("binary_cross_entropy_with_logits", "mse_loss", "mse_with_logits_loss")
}
