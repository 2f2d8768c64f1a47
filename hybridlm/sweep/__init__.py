"""Sweeps: many runs that differ in what is compared and in nothing else."""
