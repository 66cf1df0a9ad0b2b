"""Concepts of activations: sparse autoencoders, trained, used and kept in files."""
