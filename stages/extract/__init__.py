"""Stage one: run frozen teachers once and write their features."""
