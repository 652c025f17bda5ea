"""The adapter: which linears LoRA trains, and how."""

from __future__ import annotations

import dataclasses

from sst_jax.model.fields import as_tuple, check_numbers, check_one_of, require

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685) on the named linears: y = x W + (alpha / rank) * dropout(x) A B, A and B in float32.

    rank     columns of A, rows of B; 0 is no adapter
    alpha    of the factor alpha / rank
    targets  the linears that get one
    dropout  share of x that is dropped in training
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = LINEARS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        as_tuple("adapter", self, "targets")
        whole = isinstance(self.rank, int) and 0 <= self.rank < 2**20
        require(whole, f"adapter.rank={self.rank!r} must be an integer >= 0, and below {2**20}")
        check_numbers("adapter", self, "alpha", "dropout")
        for target in self.targets:
            several = isinstance(target, str) and "," in target
            spelled = tuple(part.strip() for part in str(target).split(","))
            require(not several, f'adapter.targets={target!r} is one name: write several as "{spelled!r}"')
            check_one_of("adapter", "targets", target, LINEARS)
        require(0.0 <= self.dropout < 1.0, f"adapter.dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0
