"""Masked-gene reconstruction: the encoder, its training loop, checkpoints and exports."""
