"""ConvNet-VAE and FC-VAE: one latent of several epigenomic tracks of a cell."""

from epivi.models.convnetvae.model import FCVAE, ConvNetVAE

__all__ = ["FCVAE", "ConvNetVAE"]
