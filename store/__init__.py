"""The feature store: a plain Zarr v3 hierarchy of teacher features.

`create_store` lists the images, a `FeatureWriter` fills in one teacher, a `FeatureStore` reads;
`append_images` adds images, `collect_garbage` deletes what is no longer needed;
`store.inspect` has the dask and xarray views.
"""
