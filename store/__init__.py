"""The feature store: a plain Zarr v3 hierarchy of teacher features."""
