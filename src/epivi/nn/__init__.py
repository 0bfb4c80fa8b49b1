"""Networks as pure torch: tensor in, tensor out, no knowledge of AnnData, scvi-tools or training."""
