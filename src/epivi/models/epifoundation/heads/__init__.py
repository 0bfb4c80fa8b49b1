"""What EpiFoundation reads of a cell beside its vector."""
