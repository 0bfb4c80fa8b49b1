"""The Roadmap pilot data (four cell types, five marks) and what CANDI is compared with on them.

Every target is one mark of a cell type that no method saw in training; the other four marks of that cell type are given
on the test chromosomes. The plain network is a dilated residual convolution with the same inputs, masks, loss, number
of parameters and training time as CANDI.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

CELLS = ("E003", "E017", "E065", "E117")
MARKS = ("H3K4me1", "H3K4me3", "H3K27me3", "H3K36me3", "H3K9me3")
BIN_SIZE_BP = 25
RIDGE = 1.0


def folder() -> Path:
    """Return the folder of the pilot data."""
    return Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data")) / "bulk" / "avocado_pilot"


def read_regions() -> pd.DataFrame:
    """Return the pilot regions: chrom, first bin, number of bins, offset in the arrays, split."""
    return pd.read_csv(folder() / "pilot_regions_hg19_bins.tsv", sep="\t")


def read_pilot() -> AnnData:
    """Return cell types by marks with the signal along all bins, regions in the order of the genome."""
    import anndata

    regions = read_regions()
    order = regions.assign(number=regions["chrom"].str[3:].astype(int)).sort_values(["number", "first_bin_start_hg19"])
    take = np.concatenate([np.arange(row.offset, row.offset + row.n_bins) for row in order.itertuples()])
    signal = np.stack(
        [[np.load(folder() / f"{cell}.{mark}.pilot.arcsinh.npz")["arr_0"][take] for mark in MARKS] for cell in CELLS]
    )
    start = np.concatenate(
        [row.first_bin_start_hg19 + BIN_SIZE_BP * np.arange(row.n_bins) for row in order.itertuples()]
    )
    bins = pd.DataFrame({"chrom": np.repeat(order["chrom"].to_numpy(str), order["n_bins"]), "start": start})
    bins["end"] = bins["start"] + BIN_SIZE_BP
    held = order.loc[order["split"] == "heldout", "chrom"].unique().tolist()
    adata = anndata.AnnData(
        np.ones((len(CELLS), len(MARKS)), dtype=np.float32),
        obs=pd.DataFrame(index=list(CELLS)),
        var=pd.DataFrame(index=list(MARKS)),
        obsm={"signal": signal, "availability": np.ones(signal.shape[:2], dtype=bool)},
        uns={"bins": bins, "signal_transform": "arcsinh"},
    )
    adata.uns["test_chroms"] = np.array(held)
    return adata


def scores(observed: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return MSE, Pearson and Spearman correlation."""
    from epivi.metrics import imputation_scores

    found = imputation_scores(observed, predicted)
    return {key: float(found[key]) for key in ("mse", "pearson", "spearman")}


class Fold:
    """One cell type left out: arrays for training and for test.

    Parameters
    ----------
    adata
        What :func:`read_pilot` returned.
    cell
        The cell type left out.
    """

    def __init__(self, adata: AnnData, cell: str) -> None:
        self.cell = cell
        self.row = adata.obs_names.get_loc(cell)
        self.others = [row for row in range(adata.n_obs) if row != self.row]
        self.signal = adata.obsm["signal"]
        self.chrom = adata.uns["bins"]["chrom"].to_numpy(str)
        self.start = adata.uns["bins"]["start"].to_numpy()
        self.is_test = np.isin(self.chrom, adata.uns["test_chroms"])

    @property
    def test(self) -> np.ndarray:
        """Signal of the cell type left out on the test chromosomes, shape (marks, bins)."""
        return self.signal[self.row][:, self.is_test]

    def prior(self, row: int) -> np.ndarray:
        """Mean of the training cell types other than ``row``, shape (marks, all bins)."""
        return np.mean([self.signal[other] for other in self.others if other != row], axis=0)

    def linear(self) -> dict[str, np.ndarray]:
        """Predictions of the average, of least squares on the other marks, and on marks and average together."""
        found: dict[str, list[np.ndarray]] = {"average": [], "linear on marks": [], "linear on both": []}
        average = self.prior(self.row)
        train = ~self.is_test
        for mark in range(len(MARKS)):
            rest = [other for other in range(len(MARKS)) if other != mark]
            marks = [(self.signal[row][rest][:, train], self.signal[row][mark][train]) for row in self.others]
            both = [
                (np.vstack([x, self.prior(row)[mark][train]]), y)
                for row, (x, y) in zip(self.others, marks, strict=True)
            ]
            x_test = self.signal[self.row][rest][:, self.is_test]
            found["average"].append(average[mark][self.is_test])
            found["linear on marks"].append(_apply(_least_squares(marks), x_test))
            joint = np.vstack([x_test, average[mark][self.is_test]])
            found["linear on both"].append(_apply(_least_squares(both), joint))
        return {name: np.stack(parts) for name, parts in found.items()}


def _least_squares(blocks: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return weights and intercept of least squares with a small ridge, by normal equations."""
    size = len(blocks[0][0]) + 1
    gram, moment = np.zeros((size, size)), np.zeros(size)
    for x, y in blocks:
        a = np.vstack([x, np.ones(x.shape[1])]).astype(np.float64)
        gram += a @ a.T
        moment += a @ y.astype(np.float64)
    penalty = np.full(size, RIDGE)
    penalty[-1] = 0.0
    return np.linalg.solve(gram + np.diag(penalty), moment)


def _apply(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return weights[:-1] @ x + weights[-1]


def plain_network(n_assays: int, width: int, n_layers: int, *, n_inputs: int) -> torch.nn.Module:
    """Return a dilated residual convolutional network with mean and log variance of each mark as output."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, width)
            self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(torch.relu(self.norm(x)))

    dilations = [2 ** (i % 8) for i in range(n_layers)]
    return nn.Sequential(
        nn.Conv1d(n_inputs, width, 5, padding=2), *(Block(d) for d in dilations), nn.Conv1d(width, 2 * n_assays, 1)
    )


def train_plain(
    fold: Fold, *, n_parameters: int, seconds: float, window: int, use_prior: bool, seed: int, batch_size: int = 32
) -> dict[str, Any]:
    """Train the plain network for so many seconds of processor time and predict the test chromosomes."""
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    n, depth = len(MARKS), 10
    n_inputs = n * (3 if use_prior else 2)
    width = int(np.sqrt(n_parameters / (3 * depth)))
    net = plain_network(n, width, depth, n_inputs=n_inputs)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    priors = {row: fold.prior(row).astype(np.float32) for row in (*fold.others, fold.row)} if use_prior else {}
    starts = np.flatnonzero(_fits(fold, window) & ~fold.is_test)
    begun, steps = time.process_time(), 0
    while (spent := time.process_time() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((steps + 1) / 50, 1.0) * 0.5 * (1 + np.cos(np.pi * spent / seconds))
        rows = rng.choice(fold.others, batch_size)
        first = rng.choice(starts, batch_size)
        x = np.stack([fold.signal[row][:, at : at + window] for row, at in zip(rows, first, strict=True)])
        hidden = np.zeros((batch_size, n, 1), dtype=np.float32)
        n_hidden = rng.integers(1, n)
        for one in hidden:
            one[rng.permutation(n)[:n_hidden]] = 1
        prior = [priors[row][:, at : at + window] for row, at in zip(rows, first, strict=True)] if use_prior else None
        target = torch.from_numpy(x)
        mean, log_variance = _forward(net, target, torch.from_numpy(1 - hidden), prior)
        variance = torch.nn.functional.softplus(log_variance) + 1e-3
        nll = 0.5 * ((target - mean) ** 2 / variance + variance.log())
        mask = torch.from_numpy(hidden).expand_as(nll)
        loss = (nll * mask).sum() / mask.sum() + (nll * (1 - mask)).sum() / (1 - mask).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        steps += 1
    mean, sd = predict_plain(net, fold, priors.get(fold.row))
    return {"mean": mean, "sd": sd, "steps": steps, "parameters": sum(p.numel() for p in net.parameters())}


def _forward(net: Any, x: Any, shown: Any, prior: Any) -> tuple[Any, Any]:
    import torch

    parts = [x * shown, shown.expand_as(x)]
    if prior is not None:
        parts.append(torch.from_numpy(np.stack(prior)))
    mean, log_variance = net(torch.cat(parts, dim=1)).chunk(2, dim=1)
    return torch.nn.functional.softplus(mean), log_variance


def _fits(fold: Fold, window: int) -> np.ndarray:
    """Return whether a window that starts at a bin stays within its region."""
    gap = (fold.chrom[1:] != fold.chrom[:-1]) | (np.diff(fold.start) != BIN_SIZE_BP)
    ends = np.append(np.flatnonzero(gap) + 1, fold.chrom.size)
    return ends[np.searchsorted(ends, np.arange(fold.chrom.size), side="right")] - np.arange(fold.chrom.size) >= window


def predict_plain(net: Any, fold: Fold, prior: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each mark given the others on the test chromosomes."""
    import torch

    net.eval()
    bins = np.flatnonzero(fold.is_test)
    regions = np.split(bins, np.flatnonzero(np.diff(fold.start[bins]) != BIN_SIZE_BP) + 1)
    means, sds = np.empty((len(MARKS), bins.size)), np.empty((len(MARKS), bins.size))
    at = 0
    with torch.inference_mode():
        for region in regions:
            x = torch.from_numpy(fold.signal[fold.row][:, region])[None].expand(len(MARKS), -1, -1)
            shown = 1 - torch.eye(len(MARKS))[:, :, None]
            part = None if prior is None else np.repeat(prior[None][:, :, region], len(MARKS), axis=0)
            mean, log_variance = _forward(net, x, shown, part)
            variance = torch.nn.functional.softplus(log_variance) + 1e-3
            place = slice(at, at + region.size)
            means[:, place] = torch.diagonal(mean, dim1=0, dim2=1).T.numpy()
            sds[:, place] = torch.diagonal(variance.sqrt(), dim1=0, dim2=1).T.numpy()
            at += region.size
    return means, sds
