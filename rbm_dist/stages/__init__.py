"""What each stage reads, does and writes; their order; manifests."""
