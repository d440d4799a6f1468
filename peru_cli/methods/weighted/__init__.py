"""Weighted sums of whole models or task vectors."""
