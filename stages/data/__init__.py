"""Image sets, views and labelled data sets."""
