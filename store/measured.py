"""All tables of figures that may lie beside a teacher's features."""

from store import drift, equivariance

MEASURED = (equivariance.TABLE, drift.TABLE)
