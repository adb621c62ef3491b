"""The losses in training frameworks: one module for each. Each imports its framework when used."""
