"""The checked arguments of the linked multiome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from epivi._errors import ConfigError
from epivi.simulate._arguments import check_integer, check_number, stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

# No linked peak lies further than this from the start of its gene; with smaller gaps more do not fit.
LINK_BP: Final = 50_000
MAX_LINKS: Final = 46

STREAM: Final = 5


@dataclass(frozen=True)
class LinkedSetting:
    """The arguments of :func:`epivi.simulate.linked_multiome`, each within its range.

    Examples
    --------
    >>> import inspect
    >>> from epivi.simulate import linked_multiome
    >>> defaults = {key: p.default for key, p in inspect.signature(linked_multiome).parameters.items()}
    >>> LinkedSetting.checked(defaults).n_genes
    200
    """

    n_cells: int
    n_types: int
    n_peaks: int
    n_genes: int
    peaks_per_gene: int
    n_batches: int
    batch_effect: float
    thinned_share: float
    mean_open: float
    mean_counts: float
    within_sd: float
    n_programs: int
    depth_sd: float
    binary: bool
    seed: int

    @classmethod
    def checked(cls, arguments: Mapping[str, Any]) -> LinkedSetting:
        """Return the setting after checking every argument.

        Raises
        ------
        ConfigError
            If an argument is out of its range or two of them do not go together.
        """
        a = dict(arguments)
        counts = ("n_cells", "n_types", "n_peaks", "n_genes", "peaks_per_gene", "n_batches")
        a |= {key: check_integer(key, a[key], low=1) for key in counts}
        a |= {key: check_integer(key, a[key]) for key in ("n_programs", "seed")}
        a |= {key: check_number(key, a[key], high=1.0) for key in ("batch_effect", "thinned_share")}
        a["mean_open"] = check_number("mean_open", a["mean_open"], low=1e-4, high=0.9)
        a["mean_counts"] = check_number("mean_counts", a["mean_counts"], low=1e-4, high=1e4)
        a |= {key: check_number(key, a[key], high=3.0) for key in ("within_sd", "depth_sd")}
        if not isinstance(a["binary"], bool):
            message = f"binary={a['binary']!r} is not valid: give True or False."
            raise ConfigError(message)
        for key in ("n_types", "n_batches"):
            if a[key] > a["n_cells"]:
                message = f"{key}={a[key]} is more than n_cells={a['n_cells']}: give at least one cell for each."
                raise ConfigError(message)
        if a["batch_effect"] > 0 and a["n_batches"] == 1:
            message = (
                f"batch_effect={a['batch_effect']:g} needs a second batch and n_batches=1: give n_batches=2 or more."
            )
            raise ConfigError(message)
        if a["peaks_per_gene"] > min(a["n_peaks"], MAX_LINKS):
            message = (
                f"peaks_per_gene={a['peaks_per_gene']} is more than n_peaks={a['n_peaks']}, or than the {MAX_LINKS} "
                f"peaks that fit within {LINK_BP} bp: give fewer."
            )
            raise ConfigError(message)
        return cls(**a)

    def rng(self, *key: int) -> np.random.Generator:
        """Return the random stream of one part of the simulation."""
        return stream(self.seed, STREAM, *key)
