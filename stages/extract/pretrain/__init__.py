"""The recipe of the three small teachers of the embedded default."""
