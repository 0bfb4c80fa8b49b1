"""Browser-like picture of tracks: observed and reconstructed signal of cell groups over a region."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import OBSM_TRACKS, VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_choice, check_key, check_number
from epivi._validate_regions import parse_region
from epivi.pl._tracks_data import (
    CELL,
    LIBRARY,
    Signal,
    along_region,
    bins_in_region,
    cells_of_groups,
    channel_names,
    matched,
    pseudobulk,
    stored_tracks,
    widened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

    from epivi._validate_regions import Region

_MAX_ROWS = 60
_ROW_INCHES, _WIDTH_INCHES = 0.55, 7.0
# a letter of a gene name takes about this share of the width
_LETTER = 0.011
_NOT_MEASURED = "not measured"
_SCALES = ("modality", "row", "all")


class _Row(NamedTuple):
    """One row of the picture."""

    modality: str
    group: str
    observed: Signal | None
    reconstructed: Signal | None

    @property
    def highest(self) -> float:
        """The largest value that is drawn."""
        found = [np.nanmax(part.values) for part in (self.observed, self.reconstructed) if part is not None]
        return float(max(found, default=0.0))


def tracks(  # noqa: PLR0913
    adata: AnnData,
    region: str | Sequence[Any],
    *,
    groupby: str | None = None,
    groups: Sequence[Any] | str | None = None,
    modality: str | Sequence[str] | None = None,
    reconstructed: AnnData | None = None,
    genes: pd.DataFrame | None = None,
    normalize: str = LIBRARY,
    bin_size_bp: int | None = None,
    ylim: str | float | Mapping[str, float] = "modality",
    colors: Mapping[str, Any] | None = None,
    key: str = OBSM_TRACKS,
    mask_key: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the pseudobulk of tracks over a region, one row for each modality and group of cells.

    Observed tracks are filled, reconstructed ones a line. Cells in which a modality was not measured do not count;
    where no cell of a group was, the row says so. Nothing is drawn where bins were left out.

    Parameters
    ----------
    adata
        Tracks in ``obsm[key]``, dense (n, c, l) or CSR (n, c · l), described in ``uns[key]``.
    region
        ``"chr1:1,000,000-2,000,000"``, or a triple; 0-based, half-open.
    groupby, groups
        Column of obs, and which of its groups to draw, in their order; all by default. One row a modality without it.
    modality
        Modalities to draw, in their order; all by default.
    reconstructed
        AnnData of cells × bins whose var has channel, chrom, start and end, as ``model.get_normalized_expression`` and
        ``model.impute_modality`` return it; its cells are found by name. The mean over the cells of the group in which
        the modality was measured is drawn, and over all of the group that it has where it holds none of these.
    genes
        Table with chrom, start, end, name and, if known, strand, as :func:`epivi.pp.read_genes` returns it.
    normalize
        ``"library"``: counts of a bin over all counts of the modality, summed over the cells of the group; beside it
        belongs a reconstruction with ``library_size=1``. ``"cell"``: mean counts of a cell; beside it belongs one with
        ``library_size="observed"``.
    bin_size_bp
        Draw sums over wider bins of this width.
    ylim
        Upper end of the y axis: common to a ``"modality"``, to ``"all"``, each ``"row"`` its own, a number, or a
        mapping from modalities to numbers. All begin at zero.
    colors
        Colours by name of group or modality. By default those of ``uns["<groupby>_colors"]`` or one a group, and one a
        modality without groups.
    key, mask_key
        Keys of the tracks and of the mask (n, c) of measured modalities in obsm, ``<key>_mask`` where it is there.
    ax
        Axes whose place is divided into the rows; new ones by default.

    Returns
    -------
    The Axes: ``child_axes`` holds the rows from top to bottom, labelled ``"<modality>"`` or ``"<modality> <group>"``,
    and last, labelled ``"genes"``, the genes, if some lie in the region.

    Raises
    ------
    ConfigError
        If the region cannot be read, a group, modality, column or option is unknown, ``bin_size_bp`` cuts bins, or a
        colour or limit is missing or not valid.
    DataError
        If the tracks, the mask, the reconstruction or the genes are missing something or do not fit one another, no bin
        lies in the region, or there are more than 60 rows.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> bins = pd.DataFrame({"chrom": "chr1", "start": [0, 100], "end": [100, 200]})
    >>> counts = np.array([[[1, 3]], [[2, 2]]])
    >>> adata = AnnData(obsm={"tracks": counts}, uns={"tracks": {"channels": ["ATAC"], "bins": bins}})
    >>> tracks(adata, "chr1:0-200").child_axes[0].patches[0].get_data().values.tolist()
    [0.375, 0.625]
    """
    check_choice(normalize, "normalize", (LIBRARY, CELL))
    if bin_size_bp is not None:
        check_number(bin_size_bp, "bin_size_bp", low=1, integer=True)
    place = parse_region(region)
    stored = stored_tracks(adata, key, mask_key)
    names, group_n = cells_of_groups(adata, groupby, groups)
    channels = channel_names(modality, stored.channels)
    if (n_rows := len(channels) * len(names)) > _MAX_ROWS:
        message = f"There would be {n_rows} rows, at most {_MAX_ROWS} can be read. Choose groups= or modality=."
        raise DataError(message)
    span = widened(place, bin_size_bp)
    columns = bins_in_region(stored.bins, span)
    if columns.size == 0:
        message = f"No bin lies in {place.chrom}:{place.start}-{place.end}. The tracks have {_extent(stored.bins)}."
        raise DataError(message)
    model = None if reconstructed is None else matched(reconstructed, adata)
    rows = []
    for name in channels:
        signal_gl = pseudobulk(stored, name, group_n, len(names), normalize)
        found = None if model is None else model.signal(name, span, group_n, stored.channel(name)[1], len(names))
        for g, group in enumerate(names):
            observed = _signal(stored.bins.iloc[columns], signal_gl[g, columns], bin_size_bp)
            line = None if found is None else _signal(found[0], found[1][g], bin_size_bp)
            rows.append(_Row(name, group, observed, line))
    shown = None if genes is None else _genes_in(genes, place)
    return _draw(rows, _limits(rows, ylim), _palette(adata, groupby, names, channels, colors), shown, place, ax)


def _signal(bins: pd.DataFrame, values_r: np.ndarray, bin_size_bp: int | None) -> Signal | None:
    """Return a signal, or ``None`` if no cell has it."""
    return None if np.isnan(values_r).all() else along_region(bins, values_r, bin_size_bp)


def _extent(bins: pd.DataFrame) -> str:
    """Say which chromosomes there are, and how far their bins reach."""
    spans = bins.groupby(bins[VAR_CHROM].astype(str), sort=False).agg({VAR_START: "min", VAR_END: "max"})
    shown = ", ".join(f"{name}:{start}-{end}" for name, start, end in spans.head(5).itertuples())
    return shown + (f" and {len(spans) - 5} more chromosomes" if len(spans) > 5 else "")


def _limits(rows: list[_Row], ylim: Any) -> list[float]:
    """Return the upper end of the y axis of each row."""
    if isinstance(ylim, Mapping):
        for name in dict.fromkeys(row.modality for row in rows):
            if name not in ylim:
                message = f"ylim has no entry for the modality '{name}'. {nearest(name, ylim)}"
                raise ConfigError(message)
            check_number(ylim[name], f"ylim['{name}']", low=0, low_inclusive=False)
        return [float(ylim[row.modality]) for row in rows]
    if not isinstance(ylim, str):
        check_number(ylim, "ylim", low=0, low_inclusive=False)
        return [float(ylim)] * len(rows)
    check_choice(ylim, "ylim", _SCALES)
    highest: dict[Any, float] = {}
    shared = [{"modality": row.modality, "all": 0, "row": i}[ylim] for i, row in enumerate(rows)]
    for row, which in zip(rows, shared, strict=True):
        highest[which] = max(highest.get(which, 0.0), row.highest)
    # an axis without any signal still needs a height
    return [1.05 * highest[which] or 1.0 for which in shared]


def _palette(
    adata: AnnData, groupby: str | None, groups: list[str], channels: list[str], colors: Mapping[str, Any] | None
) -> dict[tuple[str, str], Any]:
    """Return the colour of each modality and group."""
    from matplotlib import colormaps
    from matplotlib.colors import is_color_like, to_hex

    names = channels if groupby is None else groups
    shades = colormaps["tab10" if len(names) <= 10 else "tab20"]
    chosen = {name: to_hex(shades(i % shades.N)) for i, name in enumerate(names)}
    if groupby is not None and (stored := adata.uns.get(f"{groupby}_colors")) is not None:
        column = adata.obs[groupby]
        order = column.cat.categories if hasattr(column, "cat") else sorted(column.dropna().unique())
        chosen |= {name: entry for name, entry in zip(map(str, order), map(str, stored), strict=False) if name in names}
    for name, colour in (colors or {}).items():
        if name not in channels and name not in groups:
            message = (
                f"colors names '{name}', no group or modality that is drawn. {nearest(name, [*groups, *channels])}"
            )
            raise ConfigError(message)
        if not is_color_like(colour):
            message = f"colors['{name}']={colour!r} is no colour of matplotlib: give a name or '#rrggbb'."
            raise ConfigError(message)
    given = dict(colors or {})
    return {
        (channel, group): given.get(group, given.get(channel, chosen.get(group if groupby else channel)))
        for channel in channels
        for group in groups
    }


def _genes_in(genes: Any, region: Region) -> pd.DataFrame:
    """Return the genes that overlap the region, by start.

    Raises
    ------
    DataError
        If it is no table of genes.
    """
    if not hasattr(genes, "columns"):
        message = f"genes is a {type(genes).__name__}: a table with chrom, start, end and name is needed."
        raise DataError(message)
    for column in (VAR_CHROM, VAR_START, VAR_END, "name"):
        check_key(genes, column, where="genes")
    return genes.iloc[bins_in_region(genes, region)]


def _draw(
    rows: list[_Row],
    tops: list[float],
    palette: Mapping[tuple[str, str], Any],
    genes: pd.DataFrame | None,
    region: Region,
    ax: Axes | None,
) -> Axes:
    """Divide the axes into rows and fill them."""
    lanes = [] if genes is None else _lanes(genes, region)
    heights = [1.0] * len(rows) + ([0.45 * (1 + max(lanes))] if lanes else [])
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(_WIDTH_INCHES, 0.7 + _ROW_INCHES * sum(heights)), layout="constrained")[1]
    ax.set_axis_off()
    ax.set_xlim(region.start, region.end)
    ends = 1 - np.cumsum(heights) / sum(heights)
    panels = [
        ax.inset_axes((0.0, end, 1.0, 0.86 * height / sum(heights))) for end, height in zip(ends, heights, strict=True)
    ]
    for panel, row, top in zip(panels, rows, tops, strict=False):
        _draw_row(panel, row, top, palette[row.modality, row.group])
    if lanes and genes is not None:
        _draw_genes(panels[-1], genes, lanes, region)
    if any(row.reconstructed is not None for row in rows):
        _draw_legend(panels[0])
    for panel in panels:
        panel.set_xlim(region.start, region.end)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7, labelbottom=panel is panels[-1], bottom=panel is panels[-1])
    unit, name = (1e6, "Mb") if region.end - region.start >= 200_000 else (1e3, "kb")
    panels[-1].xaxis.set_major_formatter(lambda position, _: f"{position / unit:,.10g}")
    panels[-1].set_xlabel(f"{region.chrom} ({name})", fontsize=8)
    return ax


def _draw_row(ax: Axes, row: _Row, top: float, colour: Any) -> None:
    """Draw one modality of one group."""
    label = f"{row.modality} {row.group}".strip()
    ax.set_label(label)
    if row.observed is not None:
        ax.stairs(row.observed.values, row.observed.edges, fill=True, color=colour, alpha=0.55, linewidth=0)
    if row.reconstructed is not None:
        edges, values = row.reconstructed
        ax.plot(edges, np.append(values, values[-1]), drawstyle="steps-post", color=colour, linewidth=1.0)
    if row.observed is None:
        ax.text(0.01, 0.9, _NOT_MEASURED, transform=ax.transAxes, va="top", fontsize=7, color="#808080")
    ax.set_ylim(0, top)
    ax.set_yticks([top], [f"{top:.2g}"])
    ax.set_ylabel(f"{row.modality}\n{row.group}".strip(), rotation=0, ha="right", va="center", fontsize=8)


def _draw_legend(ax: Axes) -> None:
    """Say what is filled and what is a line."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color="#808080", alpha=0.55, linewidth=0, label="observed"),
        Line2D([], [], color="#808080", linewidth=1.0, label="reconstructed"),
    ]
    ax.legend(handles=handles, frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95))


def _name_at(start: float, name: str, region: Region) -> tuple[float, float]:
    """Return about where the name of a gene begins and ends: at the gene, but inside the region."""
    width = min(_LETTER * (len(name) + 3), 1.0) * (region.end - region.start)
    left = min(max(start, region.start), region.end - width)
    return left, left + width


def _lanes(genes: pd.DataFrame, region: Region) -> list[int]:
    """Put genes in lanes, so that neither they nor their names overlap."""
    ends: list[float] = []
    lanes = []
    for start, end, name in zip(genes[VAR_START], genes[VAR_END], genes["name"], strict=True):
        left, right = _name_at(start, str(name), region)
        lane = next((i for i, taken in enumerate(ends) if taken <= left), len(ends))
        ends[lane : lane + 1] = [max(right, min(end, region.end))]
        lanes.append(lane)
    return lanes


def _draw_genes(ax: Axes, genes: pd.DataFrame, lanes: list[int], region: Region) -> None:
    """Draw genes as bars with their names above, an arrow for the strand."""
    ax.set_label("genes")
    strands = genes["strand"] if "strand" in genes else ["."] * len(genes)
    for start, end, name, strand, lane in zip(
        genes[VAR_START], genes[VAR_END], genes["name"], strands, lanes, strict=True
    ):
        ax.plot(
            [max(start, region.start), min(end, region.end)],
            [-lane, -lane],
            color="#333333",
            linewidth=3,
            solid_capstyle="butt",
        )
        arrow = {"+": " →", "-": " ←"}.get(strand, "")
        ax.text(_name_at(start, str(name), region)[0], 0.25 - lane, f"{name}{arrow}", fontsize=7, va="bottom")
    ax.set_ylim(-max(lanes) - 0.4, 0.9)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_ylabel("genes", rotation=0, ha="right", va="center", fontsize=8)
