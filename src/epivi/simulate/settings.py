"""Standard settings of the simulated accessibility, named alike in tests, benchmarks and documents."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import ConfigError, nearest
from epivi.simulate._arguments import cell_table, check_keywords, check_number
from epivi.simulate.scatac import accessibility

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

_S1: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "n_cells": (400, 400, 400, 360, 40),
        "n_fg": 2000,
        "n_bg": 2000,
        "median": 600,
        "log_sd": 0.8,
        "clip": (100, 4000),
        "rho": 0.4,
    }
)
# 90,635 features; how many of them are peaks is not stated, half is taken
_SIM: Final[Mapping[str, Any]] = MappingProxyType({"n_fg": 45_318, "n_bg": 45_317, "clip": (1000, 20_000)})

SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "S1": _S1,
        "S2": MappingProxyType({**_S1, "n_cells": (200,) * 9, "median": 300}),
        "S3": MappingProxyType(
            {
                **_S1,
                "n_cells": ((350, 350, 300, 50, 0), (350, 350, 300, 0, 50)),
                "median": (300, 600),
                "rho": (0.4, 0.5),
            }
        ),
        "S1-chr": MappingProxyType({**_S1, "chrom_sizes": "hg38"}),
        "Sim1": MappingProxyType(
            {**_SIM, "n_cells": (2475, 2475, 2475, 2475, 100), "median": 5000, "log_sd": 1.5, "rho": 0.4}
        ),
        "Sim2": MappingProxyType({**_SIM, "n_cells": (1112, *(1111,) * 8), "median": 3000, "log_sd": 1.5, "rho": 0.4}),
        "Sim3": MappingProxyType(
            {
                **_SIM,
                "n_cells": ((2475, 2475, 2475, 2475, 100, 0), (2475, 2475, 2475, 2475, 0, 100)),
                "median": (2500, 5000),
                "log_sd": 0.5,
                "rho": (0.4, 0.5),
            }
        ),
    }
)


def standard(
    name: str, seed: int = 0, *, scale: float = 1.0, region_scale: float | None = None, **overrides: Any
) -> AnnData:
    """Simulate a standard setting.

    S1: five types, one of them rare (2.5 %). S2: nine types, shallow. S3: two batches that differ in depth and
    background, each with a rare type of its own. S1-chr: S1 over 22 chromosomes. Sim1, Sim2 and Sim3 are like the
    simulations of the SAILER paper in numbers of types and cells, rare share (1 %), depth, spread and background, with
    synthetic profiles.

    Parameters
    ----------
    name
        One of :data:`SETTINGS`.
    seed
        Seed of the simulation.
    scale
        Factor on the number of cells of every type; a type that is present keeps at least one cell.
    region_scale
        Factor on the number of regions, and with them on median and limits of the fragments, so that the density of
        the data stays; by default ``scale``.
    **overrides
        Arguments of :func:`epivi.simulate.accessibility` that replace those of the setting, taken as they are and not
        scaled; ``median=5000`` keeps the depth of Sim1 on fewer regions.

    Returns
    -------
    AnnData as from :func:`epivi.simulate.accessibility`.

    Raises
    ------
    ConfigError
        If the name or an override is unknown, or a factor is not positive and finite.

    Notes
    -----
    Sim1 to Sim3 at ``scale=1`` have 10,000 or 20,000 cells and 90,635 regions, and take about a minute. The paper used
    bulk profiles of blood cells, does not state the share of peaks among the regions (half here) nor the rare share of
    Sim3 (1 % here, as in Sim1), so that its absolute figures cannot be expected.

    Examples
    --------
    >>> adata = standard("Sim1", scale=0.02)
    >>> adata.shape, int(adata.obs["rare"].sum())
    ((202, 1812), 2)
    """
    if name not in SETTINGS:
        message = f"'{name}' is not a standard setting. {nearest(name, SETTINGS)}"
        raise ConfigError(message)
    check_keywords("overrides", overrides, accessibility)
    tiny = float(np.finfo(float).tiny)
    scale = check_number("scale", scale, low=tiny)
    region_scale = scale if region_scale is None else check_number("region_scale", region_scale, low=tiny)
    arguments = dict(SETTINGS[name])
    table = cell_table(arguments.pop("n_cells"))
    scaled = np.where(table > 0, np.maximum(np.rint(table * scale), 1), 0).astype(int)
    for key in ("n_fg", "n_bg"):
        arguments[key] = max(1, round(arguments[key] * region_scale))
    arguments["median"] = (np.asarray(arguments["median"]) * region_scale * np.ones(len(table))).tolist()
    arguments["clip"] = [max(1, round(limit * region_scale)) for limit in arguments["clip"]]
    n_cells = overrides.pop("n_cells", scaled)
    return accessibility(n_cells, **{**arguments, **overrides}, seed=seed)
