"""Ladders: architectures compared over sizes, with hyperparameters that are carried over, fits and error bars."""
