"""The configuration of runs, sources and experiments as typed, validated models."""
