"""Figures and tables of runs and sweeps: one HTML page, PNG files."""
