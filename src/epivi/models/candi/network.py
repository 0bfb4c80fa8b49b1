"""The network of CANDI: towers, fusion, transformer, decoders and heads as pure torch (C1 to C5, C8, C9).

Legend of shapes: b windows of the batch, a assays, l bins, t latent positions (l / 2^n), d width, k covariates,
g base pairs (l R), h units of the embedded covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, linear

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.candi.experiments import LITERAL, ExperimentEmbedding
from epivi.models.candi.heads import CountHead, PaperCountHead, PaperSignalHead, SignalHead, prior_link
from epivi.nn.attention import RelativeBias, RelativeKeyValue, SelfAttention, Transformer, TransformerLayer
from epivi.nn.conv.towers import DnaTower, SignalTower, UpTower, convolve, pool_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from epivi.models.candi.config import CandiConfig

HEAD_NAMES = ("counts", "signal")


class CandiOutputs(NamedTuple):
    """Parameters of what is predicted, each of shape (b, l, a) or ``None`` if the network has no such head.

    ``log_mean_bla`` is the log mean of counts before the depth offset, ``log_theta_bla`` the log dispersion;
    ``mean_bla`` and ``variance_bla`` are those of the signal.
    """

    log_mean_bla: Tensor | None = None
    log_theta_bla: Tensor | None = None
    mean_bla: Tensor | None = None
    variance_bla: Tensor | None = None


class Fusion(nn.Module):
    """Linear map of features and of a vector that is the same at all positions, then LayerNorm and perhaps ReLU.

    Parameters
    ----------
    n_inputs, n_constant, n_outputs
        Width of the features, of the vector (0 if there is none) and of the result.
    relu
        Whether a ReLU follows.

    Examples
    --------
    >>> Fusion(4, 2, 3)(torch.zeros(5, 7, 4), torch.zeros(5, 2)).shape
    torch.Size([5, 7, 3])
    """

    def __init__(self, n_inputs: int, n_constant: int, n_outputs: int, *, relu: bool = True) -> None:
        super().__init__()
        self.n_inputs = n_inputs
        self.project = nn.Linear(n_inputs + n_constant, n_outputs)
        self.norm = nn.LayerNorm(n_outputs)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x_btd: Tensor, constant_bh: Tensor | None = None) -> Tensor:
        """Return the fused features, shape (b, t, n_outputs)."""
        weight = self.project.weight
        y_btd = linear(x_btd, weight[:, : self.n_inputs], self.project.bias)
        if constant_bh is not None:
            y_btd = y_btd + linear(constant_bh, weight[:, self.n_inputs :])[:, None]
        return self.activation(self.norm(y_btd))


class InputSkip(nn.Module):
    """Add a small network of decoded features and input at full resolution; it starts at 0.

    The latent positions hold 2^n bins each; detail finer than that reaches the heads only here.

    Parameters
    ----------
    n_outputs
        Channels of the decoded features.
    n_inputs
        Input channels of all assays.

    Examples
    --------
    >>> InputSkip(3, 6)(torch.ones(2, 8, 3), torch.ones(2, 8, 6)).sum().item()
    48.0
    """

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        n_hidden = max(4 * n_outputs, 32)
        self.hidden = nn.Conv1d(n_outputs + n_inputs, n_hidden, 3, padding=1)
        self.project = nn.Linear(n_hidden, n_outputs)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x_bla: Tensor, inputs_blc: Tensor) -> Tensor:
        """Return the features with what the input adds, shape (b, l, a)."""
        hidden = gelu(convolve(torch.cat([x_bla, inputs_blc.to(x_bla.dtype)], dim=2), self.hidden))
        return x_bla + self.project(hidden)


class Decoder(nn.Module):
    """From latent positions and wanted covariates to features of every bin (C4).

    Parameters
    ----------
    config
        Choices of the network.
    n_assays
        Assays A.
    n_continuous, categories
        Covariates, as in :class:`ExperimentEmbedding`.
    """

    def __init__(self, config: CandiConfig, n_assays: int, n_continuous: int, categories: Sequence[int]) -> None:
        super().__init__()
        width = config.width(n_assays)
        self.covariates = ExperimentEmbedding(
            n_assays, n_continuous=n_continuous, categories=categories, relu=False, missing=config.missing
        )
        self.fusion = Fusion(width, self.covariates.n_outputs, width, relu=False)
        self.tower = UpTower(config.decoder_channels(n_assays), upsampling=config.upsampling)
        n_outputs = config.n_features * n_assays
        self.skip = InputSkip(n_outputs, n_assays * config.n_input_channels) if config.skip else None

    def forward(
        self,
        z_btd: Tensor,
        continuous_bak: Tensor | None,
        categorical_bak: Tensor | None,
        inputs_blc: Tensor | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the features X, shape (b, l, a)."""
        x_bla = self.tower(self.fusion(z_btd, self.covariates(continuous_bak, categorical_bak)), masks)
        if self.skip is None or inputs_blc is None:
            return x_bla
        if masks is not None:
            x_bla, inputs_blc = x_bla * masks[-1][:, :, None], inputs_blc * masks[-1][:, :, None]
        return self.skip(x_bla, inputs_blc)


class CandiNetwork(nn.Module):
    """Encoder of the available tracks, their covariates and the DNA; decoders of all tracks at wanted covariates.

    Parameters
    ----------
    config
        Choices of the network.
    n_assays
        Assays A.
    n_continuous
        Continuous covariates.
    categories
        Number of levels of each categorical covariate.
    has_dna
        Whether the DNA is an input.
    heads
        Which of "counts" and "signal" are predicted.

    Raises
    ------
    ConfigError
        If there is no head or an unknown one, no assay, or the heads of the attention do not divide the width.

    Examples
    --------
    >>> from epivi.models.candi.config import CandiConfig
    >>> network = CandiNetwork(CandiConfig.chosen({}, size="test"), 3, 0, (), has_dna=False, heads=("signal",))
    >>> z = network.encode(torch.zeros(2, 160, 3), torch.ones(2, 3))
    >>> z.shape, network.decode(z).mean_bla.shape
    (torch.Size([2, 40, 12]), torch.Size([2, 160, 3]))
    """

    def __init__(
        self,
        config: CandiConfig,
        n_assays: int,
        n_continuous: int,
        categories: Sequence[int],
        *,
        has_dna: bool,
        heads: Sequence[str],
    ) -> None:
        super().__init__()
        _validate.check_number(n_assays, "n_assays", low=1, integer=True)
        if not heads:
            message = f"CANDI needs at least one head, any of {', '.join(HEAD_NAMES)}; none was given."
            raise ConfigError(message)
        for name in heads:
            _validate.check_choice(name, "heads", HEAD_NAMES)
        self.config = config
        self.n_assays = n_assays
        width = config.width(n_assays)
        squeeze = config.squeeze_excitation
        self.signal_tower = SignalTower(config.signal_channels(n_assays), groups=n_assays, squeeze_excitation=squeeze)
        self.dna_tower = (
            DnaTower(config.dna_channels(n_assays), config.dna_pools, squeeze_excitation=squeeze) if has_dna else None
        )
        self.covariates = ExperimentEmbedding(
            n_assays, n_continuous=n_continuous, categories=categories, missing=config.missing
        )
        self.fusion = Fusion(width, self.covariates.n_outputs, width)
        self.dna_fusion = Fusion(2 * width, 0, width) if has_dna else None
        self.transformer = _transformer(config, width)
        names = [name for name in HEAD_NAMES if name in heads]
        self.decoders = nn.ModuleDict({name: Decoder(config, n_assays, n_continuous, categories) for name in names})
        self.heads = nn.ModuleDict({name: _head(config, n_assays, name) for name in names})

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of trained numbers of each part."""
        parts: dict[str, nn.Module | None] = {
            "signal_tower": self.signal_tower,
            "dna_tower": self.dna_tower,
            "covariates": self.covariates,
            "fusion": self.fusion,
            "dna_fusion": self.dna_fusion,
            "transformer": self.transformer,
        }
        parts |= {f"decoder_{name}": part for name, part in self.decoders.items()}
        parts |= {f"head_{name}": part for name, part in self.heads.items()}
        return {name: 0 if part is None else sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def encode(  # noqa: PLR0913
        self,
        values_bla: Tensor,
        mask_ba: Tensor,
        continuous_bak: Tensor | None = None,
        categorical_bak: Tensor | None = None,
        dna_bg: Tensor | None = None,
        prior_bla: Tensor | None = None,
        has_prior_ba: Tensor | None = None,
        *,
        inputs_blc: Tensor | None = None,
        bin_mask_bl: Tensor | None = None,
    ) -> Tensor:
        """Return the latent positions Z, shape (b, t, d) (C2, C3).

        Parameters
        ----------
        values_bla
            Transformed values; whatever stands under mask 0 has no influence, NaN included.
        mask_ba
            1 where an assay is available and not hidden.
        continuous_bak, categorical_bak
            Covariates of the input: standardised values, NaN where unknown; codes, -1 where unknown.
        dna_bg
            Codes 0-3 (ACGT) and 4.
        prior_bla, has_prior_ba
            Mean of each assay over other biosamples and whether there is one.
        inputs_blc
            What :meth:`inputs` returned for these values; made here if ``None``.
        bin_mask_bl
            False for bins beyond the end of a short run: the window then acts as if it ended there, exactly so if the
            run is a multiple of 2^n bins. ``None``: all are real.

        Raises
        ------
        ConfigError
            If the DNA or the prior is missing, or the bins are not a multiple of 2^n.
        """
        masks = self._masks(bin_mask_bl)
        if inputs_blc is None:
            inputs_blc = self.inputs(values_bla, mask_ba, prior_bla, has_prior_ba)
        h_btd = self.signal_tower(inputs_blc, None if masks is None else masks[0])
        h_btd = self.fusion(h_btd, self.covariates(continuous_bak, categorical_bak, mask_ba))
        if self.dna_tower is not None and self.dna_fusion is not None:
            if dna_bg is None:
                message = "This network was built with DNA; pass dna_bg, codes of the base pairs of the windows."
                raise ConfigError(message)
            mask_bg = None if masks is None else masks[0].repeat_interleave(self.config.bin_size_bp, dim=1)
            h_btd = self.dna_fusion(torch.cat([h_btd, self.dna_tower(dna_bg, mask_bg).to(h_btd.dtype)], dim=2))
        return self.transformer(h_btd, None if masks is None else masks[-1])

    def inputs(
        self,
        values_bla: Tensor,
        mask_ba: Tensor,
        prior_bla: Tensor | None = None,
        has_prior_ba: Tensor | None = None,
    ) -> Tensor:
        """Return what enters the network at full resolution, shape (b, l, c), the channels of an assay side by side.

        Raises
        ------
        ConfigError
            If the bins are not a multiple of 2^n, or the network has a prior and none is given.
        """
        if values_bla.shape[1] % self.config.scale:
            message = f"The windows have {values_bla.shape[1]} bins, which is not a multiple of {self.config.scale}."
            raise ConfigError(message)
        mask_b1a = (mask_ba > 0)[:, None]
        is_literal = self.config.missing == "literal"
        channels = [torch.where(mask_b1a, values_bla, LITERAL if is_literal else 0.0)]
        if not is_literal:
            channels.append(mask_b1a.to(values_bla.dtype).expand_as(values_bla))
        if self.config.locus_prior:
            prior_bla, has_prior_ba = _given(prior_bla, has_prior_ba)
            channels.append(torch.where((has_prior_ba > 0)[:, None], prior_bla, 0.0).to(values_bla.dtype))
        return channels[0] if len(channels) == 1 else torch.stack(channels, dim=3).flatten(2)

    def decode(
        self,
        z_btd: Tensor,
        continuous_bak: Tensor | None = None,
        categorical_bak: Tensor | None = None,
        prior_bla: Tensor | None = None,
        has_prior_ba: Tensor | None = None,
        *,
        inputs_blc: Tensor | None = None,
        bin_mask_bl: Tensor | None = None,
    ) -> CandiOutputs:
        """Return the parameters of all assays at the wanted covariates (C4, C5, C8, C9).

        Parameters
        ----------
        z_btd
            Latent positions.
        continuous_bak, categorical_bak
            Wanted covariates, unknown as in :meth:`encode`.
        prior_bla, has_prior_ba
            As in :meth:`encode`; for networks with a prior.
        inputs_blc
            What :meth:`inputs` returned; for networks with a skip.
        bin_mask_bl
            As in :meth:`encode`.

        Raises
        ------
        ConfigError
            If the network has a prior or a skip and what it needs is missing.
        """
        if self.config.skip and inputs_blc is None:
            message = "This network was built with skip=True; pass inputs_blc, the result of inputs(...)."
            raise ConfigError(message)
        link_bla = None
        if self.config.locus_prior:
            prior_bla, has_prior_ba = _given(prior_bla, has_prior_ba)
            link_bla = prior_link(prior_bla, has_prior_ba)
        masks = self._masks(bin_mask_bl)
        if masks is not None:
            masks = masks[::-1]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, decoder in self.decoders.items():
            x_bla = decoder(z_btd, continuous_bak, categorical_bak, inputs_blc, masks)
            # means and dispersions go into exponentials: half precision would not do
            x_bla = x_bla.to(torch.promote_types(x_bla.dtype, torch.float32))
            with torch.autocast(x_bla.device.type, enabled=False):
                found[name] = self.heads[name](x_bla, link_bla, has_prior_ba)
        nothing = (None, None)
        return CandiOutputs(*found.get("counts", nothing), *found.get("signal", nothing))

    def _masks(self, bin_mask_bl: Tensor | None) -> list[Tensor] | None:
        """Return which positions hold anything real, from bins to latent positions."""
        if bin_mask_bl is None:
            return None
        masks = [bin_mask_bl.bool()]
        for _ in range(self.config.n_stages):
            masks.append(pool_mask(masks[-1], 2))
        return masks


def _given(prior_bla: Tensor | None, has_prior_ba: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the prior, or say that it is missing."""
    if prior_bla is None or has_prior_ba is None:
        message = "This network was built with locus_prior=True; pass prior_bla and has_prior_ba."
        raise ConfigError(message)
    return prior_bla, has_prior_ba


def _transformer(config: CandiConfig, width: int) -> Transformer:
    """Return post-norm layers with relative positions and a feed-forward network of three widths."""
    layers = []
    for _ in range(config.n_layers):
        position: RelativeBias | RelativeKeyValue
        if config.position == "bias":
            position = RelativeBias(config.n_heads, config.n_positions, max_distance=config.max_distance)
        else:
            head_width = width // config.n_heads
            position = RelativeKeyValue(head_width, config.n_positions, max_distance=config.max_distance)
        attention = SelfAttention(width, config.n_heads, position=position)
        layer = TransformerLayer(attention, 3 * width, dropout_rate=config.dropout_rate, pre_norm=config.pre_norm)
        layers.append(layer)
    return Transformer(layers)


def _head(config: CandiConfig, n_assays: int, name: str) -> nn.Module:
    """Return the head of counts or of signal."""
    if config.head == "paper":
        return PaperCountHead(n_assays) if name == "counts" else PaperSignalHead(n_assays)
    # the prior is of the kind of the input; the other kind has to learn its scale
    start = float(name == config.input) if config.locus_prior else None
    if name == "counts":
        per_bin = config.dispersion == "assay-bin"
        return CountHead(n_assays, n_features=config.n_features, per_bin=per_bin, prior_start=start)
    return SignalHead(n_assays, n_features=config.n_features, prior_start=start)
