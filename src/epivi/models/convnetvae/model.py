"""ConvNetVAE and FCVAE, as their users see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch

from epivi.models.convnetvae.base import TracksModel
from epivi.models.convnetvae.config import ConvNetVaeConfig, FcvaeConfig, TracksConfig
from epivi.models.convnetvae.conv_module import ConvNetVaeModule
from epivi.models.convnetvae.fc_module import FcvaeModule
from epivi.models.convnetvae.geometry import ConvGeometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

    from epivi.models.convnetvae.module import TracksModule
    from epivi.nn.covariates import Covariates

PRIOR = "prior"


class ConvNetVAE(TracksModel):
    r"""One latent of several epigenomic tracks of a cell (ConvNet-VAE, Gao and Welch, Bioinformatics 2025).

    Modalities measured in the same cells, such as histone marks and accessibility, are channels of one signal over
    genomic bins. Strided convolutions along the genome encode log counts; the batch joins after them. The decoder
    mirrors the encoder and gives each modality m the shares w of its bins,

    .. math::
        x_{mg} \sim \mathrm{Poisson}(l_m w_{mg}), \qquad w_m = \mathrm{softmax}(\rho_m), \qquad
        L = -E_q \log p(x | z, b) + \mathrm{KL}(q(z|x, b) \| N(0, I))

    (equations 1-3), with the observed library :math:`l_m`.

    Parameters
    ----------
    adata
        AnnData with tracks in obsm, set up with :meth:`setup_anndata`, or MuData of modalities, set up with
        :meth:`setup_mudata`; data that were not are set up with the defaults.
    n_latent
        Latent dimensions d.
    n_layers, kernel_size, stride
        Convolutions, 1 to 3, and their kernel K and stride S in bins. The paper uses one layer with K = S of 11, 31 or
        51, or one to three layers with K = 11 and S = 3.
    n_filters
        Channels after each convolution; by default 32, 64, 128.
    n_hidden
        Units of the layer after the convolutions.
    dropout_rate
        Dropout after hidden activations.
    likelihood
        ``"poisson"``, or ``"nb"``: negative binomial with one dispersion for each channel and bin.
    boundaries
        Where no kernel crosses: ``"chromosome"`` ends, ``"gap"`` (chromosome ends and gaps between selected bins), or
        ``"none"``, the paper. ``"auto"`` takes gaps, or chromosomes where the selected bins lie too far apart.
    modality_dropout_rate
        Share of measured modalities hidden from the encoder in training, one always staying; by default 0.3 where some
        cells lack a modality, else 0. Imputation of a modality that all cells have needs it above 0.
    mask_channels
        Whether channels tell the encoder which modalities were measured; by default where one can be missing.
    kl_scale
        Factor beta of the KL term.
    batch_norm_momentum, batch_norm_eps
        Of the batch normalisation.
    seed
        Seed of the weights, and of the training unless it is given another; by default that of scvi-tools, else 0.

    Raises
    ------
    ConfigError
        If an argument is outside its range.
    DataError
        If the data cannot be used, or the bins of the modalities do not fit one grid.

    Notes
    -----
    The decoder convolves in polyphase form, so that nothing of the upsampled length is computed, and the likelihood
    reads the non-zero counts; both equal the paper's network and Poisson likelihood exactly. Modalities may have finer
    bins that divide those of the coarsest; a strided convolution of each brings them onto the common grid.

    Examples
    --------
    >>> import epivi
    >>> adata = epivi.simulate.tracks(60, n_bins=200, n_types=2)
    >>> epivi.ConvNetVAE.setup_anndata(adata)
    >>> model = epivi.ConvNetVAE(adata, n_latent=5, kernel_size=11, stride=11)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (60, 5)
    """

    _config_cls: ClassVar[type[TracksConfig]] = ConvNetVaeConfig
    config: ConvNetVaeConfig

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 30,
        n_layers: int = 1,
        kernel_size: int = 31,
        stride: int = 31,
        n_filters: tuple[int, ...] | None = None,
        n_hidden: int = 128,
        dropout_rate: float = 0.2,
        likelihood: str = "poisson",
        boundaries: str = "auto",
        modality_dropout_rate: float | None = None,
        mask_channels: bool | None = None,
        kl_scale: float = 1.0,
        batch_norm_momentum: float = 0.1,
        batch_norm_eps: float = 1e-5,
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        self._start(adata, registry, chosen, seed)

    def _build_module(self, covariates: Covariates, library_c: torch.Tensor) -> TracksModule:
        self.geometry = ConvGeometry.of(self.layout, self.config.boundaries, self.config.stride, self.config.n_layers)
        return ConvNetVaeModule(self.config, self.geometry, covariates, library=library_c)


class FCVAE(TracksModel):
    r"""One latent of several modalities by a product of fully connected experts (Gao and Welch, Bioinformatics 2025).

    The baseline of ConvNet-VAE, and the model for modalities with different features: each modality has an encoder
    and a decoder of its own, and the posterior is the product of the prior and the experts of the measured modalities,

    .. math::
        \frac1{v_k} = 1 + \sum_m \frac{o_m}{v_{mk}}, \qquad
        \mu_k = v_k \sum_m o_m \frac{\mu_{mk}}{v_{mk}}

    (equations 4-5). The likelihood is that of :class:`epivi.ConvNetVAE`.

    Parameters
    ----------
    adata
        AnnData with tracks in obsm, set up with :meth:`setup_anndata`, or MuData of modalities with any features, set
        up with :meth:`setup_mudata`; data that were not are set up with the defaults.
    n_latent
        Latent dimensions d.
    n_layers, n_hidden
        Fully connected layers of each expert and each decoder, 1 to 3, and their units.
    dropout_rate, likelihood, modality_dropout_rate, kl_scale, batch_norm_momentum, batch_norm_eps, seed
        As in :class:`epivi.ConvNetVAE`.

    Raises
    ------
    ConfigError
        If an argument is outside its range.
    DataError
        If the data cannot be used.

    Notes
    -----
    Every modality has an encoder of its own; in the released code the third modality is encoded by the second one's.
    The prior enters the product exactly once, as in equations 4-5; equation 6 as printed omits it.

    Initial weights: the first layer of each expert (on its bins and the covariates) and the first layer of the decoder
    are uniform in plus and minus one over the square root of their inputs, as in :class:`torch.nn.Linear`. All other
    layers of experts and decoders, with the heads of means and log variances and the logits, are Xavier uniform for
    each modality with biases of zero.

    Examples
    --------
    >>> import epivi
    >>> adata = epivi.simulate.tracks(60, n_bins=200, n_types=2)
    >>> epivi.FCVAE.setup_anndata(adata)
    >>> model = epivi.FCVAE(adata, n_latent=5)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> model.get_expert_weights().shape
    (60, 4)
    """

    _config_cls: ClassVar[type[TracksConfig]] = FcvaeConfig
    config: FcvaeConfig
    module: FcvaeModule

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 30,
        n_layers: int = 1,
        n_hidden: int = 128,
        dropout_rate: float = 0.2,
        likelihood: str = "poisson",
        modality_dropout_rate: float | None = None,
        kl_scale: float = 1.0,
        batch_norm_momentum: float = 0.1,
        batch_norm_eps: float = 1e-5,
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        self._start(adata, registry, chosen, seed)

    def _build_module(self, covariates: Covariates, library_c: torch.Tensor) -> TracksModule:
        return FcvaeModule(self.config, self.layout.n_bins, covariates, library=library_c)

    @torch.inference_mode()
    def get_expert_weights(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Return how much of the posterior precision of each cell comes from each modality and from the prior.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.

        Returns
        -------
        Cells × (modalities, prior): shares averaged over the latent dimensions; rows add up to 1.
        """
        data, rows, batches = self._trained_batches(adata, indices, batch_size)
        parts = []
        for batch in batches:
            inputs = self.module._get_inference_input(batch)
            parts.append(self.module.expert_weights(**inputs).cpu())
        columns = [*self.layout.channels, PRIOR]
        return pd.DataFrame(torch.cat(parts).numpy(), index=data.obs_names[rows], columns=columns)
