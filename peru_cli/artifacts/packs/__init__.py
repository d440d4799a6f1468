"""The kinds of artifact that hold several tasks: superposed sums, and masks on one sum."""
