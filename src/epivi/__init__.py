"""Deep generative models for single-cell epigenomes, on AnnData and MuData.

Every name below is imported on first use, so that ``import epivi`` stays light.

Examples
--------
>>> import epivi
>>> "SAILERX" in dir(epivi)
True
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from epivi._errors import nearest

if TYPE_CHECKING:
    from epivi import metrics, models, pl, pp, simulate, tl
    from epivi.models.candi import CANDI
    from epivi.models.convnetvae import FCVAE, ConvNetVAE
    from epivi.models.epifoundation import EpiFoundation
    from epivi.models.expresser import Expresser
    from epivi.models.sailer import SAILER
    from epivi.models.sailerx import SAILERX

__version__ = version("epivi")

# Each name but the version has its line in _HOMES and, for type checkers, its import above.
__all__ = [
    "CANDI",
    "FCVAE",
    "SAILER",
    "SAILERX",
    "ConvNetVAE",
    "EpiFoundation",
    "Expresser",
    "__version__",
    "metrics",
    "models",
    "pl",
    "pp",
    "simulate",
    "tl",
]

# name -> module that holds it; a room is its own home
_HOMES = {
    "CANDI": "epivi.models.candi",
    "ConvNetVAE": "epivi.models.convnetvae",
    "EpiFoundation": "epivi.models.epifoundation",
    "Expresser": "epivi.models.expresser",
    "FCVAE": "epivi.models.convnetvae",
    "SAILER": "epivi.models.sailer",
    "SAILERX": "epivi.models.sailerx",
    "metrics": "epivi.metrics",
    "models": "epivi.models",
    "pl": "epivi.pl",
    "pp": "epivi.pp",
    "simulate": "epivi.simulate",
    "tl": "epivi.tl",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        message = f"module 'epivi' has no attribute '{name}'. {nearest(name, __all__)}"
        raise AttributeError(message)
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"epivi.{name}" else getattr(home, name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    """Return the public names, those not yet imported among them."""
    return sorted(__all__)
