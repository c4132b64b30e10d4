"""Stage two: train the student from stored targets."""
