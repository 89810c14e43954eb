"""The embedded world: language, pictures, corpora and items, built from a seed and nothing else."""
