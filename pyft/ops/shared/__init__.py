"""What several ops are built of: projections with adapters, the fused op over a group of them."""
