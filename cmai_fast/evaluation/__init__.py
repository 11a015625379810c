"""Protocols that measure robustness, and the report that shows what was measured."""
